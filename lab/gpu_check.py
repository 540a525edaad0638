"""What the first person with a GPU runs: at most ten minutes, no network, one Markdown table to send back.

    python lab/gpu_check.py                 # all of it; exit code 1 if a check failed
    python lab/gpu_check.py kernels step    # these groups alone

Each group of checks runs in a process of its own, so that a crash or a lack of memory costs its own rows alone. With
vLLM it puts 3 GB into the temporary folder. On a CPU it checks what it can in a minute, on smaller sizes.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import tokenizers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import align  # noqa: E402
from speed import installed  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE, SMALLER = ("cuda", "") if CUDA else ("cpu", "; smaller, for a CPU")
DEADLINE = 600      # seconds

class LeftOut(Exception):
    """Why a check is not made here."""

def now():
    """Seconds, once the GPU has done all that it was asked for."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()

def error_of(values, references):
    """|value − reference| / |reference|, the largest of several tensors', nan if one of them is."""
    errors = [(value - reference).double().norm() / reference.double().norm()
              for value, reference in zip(values, references, strict=True)]
    return torch.stack(errors).max().item()

# ---- kernels: against references in float32 ------------------------------------------

def choose_attention(kernel):
    """Lets packed_attention take this kernel from now on."""
    if kernel == "flash-attn" and not (CUDA and installed("flash_attn")):
        raise LeftOut("flash-attn is not installed" if CUDA else "no GPU")
    if kernel == "flash-attn" and not align.flash_attn_func:
        raise align.flash_attn_error
    align.use_flash_attn = lambda *_: kernel == "flash-attn"

def made_up_rows(longest):
    """Pairs of lists of ids: prompts, some of one token, and three responses of 1 to `longest` tokens to each."""
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(length)] for length in (1, longest // 5, 1, 7)]
    lengths = [1, longest] + [rng.randint(1, longest) for _ in range(10)]
    return [(prompts[i // 3], [rng.randrange(1000) for _ in range(n)]) for i, n in enumerate(lengths)]

def attention(kernel, dtype):
    """packed_attention and its gradients against softmax(q kᵀ / √D) v, written out."""
    choose_attention(kernel)
    longest, heads, width = (1024, 12, 128) if CUDA else (120, 6, 32)
    packed, _ = align.pack(made_up_rows(longest), DEVICE)
    rows, places, n = packed["rows"], packed["places"], packed["input_ids"].shape[1]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, n, width, device=DEVICE).to(getattr(torch, dtype)).requires_grad_()
                         for h in (heads, heads // 3, heads // 3))      # three heads share a key head
    upstream = torch.randn(1, n, heads, width, device=DEVICE).to(query.dtype)
    output, _ = align.packed_attention(None, query, key, value, scaling=width**-0.5, rows=rows, places=places)
    ours = [output, *torch.autograd.grad(output, (query, key, value), upstream)]

    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
    q, k, v = (tensor[0][:, rows] for tensor in exact)      # (heads, B, longest, D)
    k, v = k.repeat_interleave(3, dim=0), v.repeat_interleave(3, dim=0)
    scores = (q @ k.mT) * width**-0.5
    later = torch.ones_like(scores[0, 0]).triu(1).bool()
    whole = scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v
    reference = whole.flatten(1, 2)[:, places].transpose(0, 1)[None]
    error = error_of(ours, [reference, *torch.autograd.grad(reference, exact, upstream.float())])
    limit = 2e-2 if dtype == "bfloat16" else 1e-3
    result = f"error {error:.1e} of output and gradients; 12 rows of up to {rows.shape[1]} tokens{SMALLER}"
    return result, f"{limit:.0e}", error <= limit

def log_probs():
    """ChunkedLogProbs in bfloat16 against float32 log_softmax on whole logits, of the same rounded numbers."""
    n, width, vocab = (2048, 1536, 151936) if CUDA else (150, 32, 151936)
    torch.manual_seed(0)
    hidden = torch.randn(n, width, device=DEVICE).bfloat16().requires_grad_()
    head = (2 * torch.randn(vocab, width, device=DEVICE) / width**0.5).bfloat16().float().requires_grad_()
    labels, upstream = torch.randint(vocab, (n,), device=DEVICE), torch.randn(n, device=DEVICE)
    values, entropies = align.ChunkedLogProbs.apply(hidden, head, labels)
    ours = torch.autograd.grad(values, (hidden, head), upstream)
    exact = hidden.detach().float().requires_grad_()
    logits = exact @ head.T
    whole = logits.log_softmax(dim=-1)
    reference = whole.gather(1, labels[:, None])[:, 0]
    entropy = -(whole.exp() * whole).sum(dim=-1)
    nats = torch.cat([values - reference, entropies - entropy]).abs().max().item()
    error = error_of(ours, torch.autograd.grad(reference, (exact, head), upstream))
    # On a CPU the product itself is rounded to bfloat16.
    limit = 1e-3 if CUDA else logits.abs().max().item() * 2**-8
    return (f"log-probs and entropies {nats:.1e} nats off, gradients' error {error:.1e}; {n} tokens, vocabulary "
            f"{vocab}{SMALLER}", f"{limit:.1e} nats, 1e-02", nats <= limit and error <= 1e-2)

def random_llama(vocab):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1, eos_token_id=0, pad_token_id=0)
    with torch.device(DEVICE):
        return align.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

def packed_update(kernel, dtype):
    """get_packed_log_probs and its gradient against get_response_log_probs with eager attention in float32."""
    choose_attention(kernel)
    model, pairs = random_llama(1000), made_up_rows(600 if CUDA else 60)
    batch = {name: t.to(DEVICE) for name, t in align.batch_token_ids(*zip(*pairs), 0).items()}

    def update(function, dtype):
        model.zero_grad()
        found, mask = function(dtype)
        found[mask].sum().backward()
        return found[mask].detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def plain(dtype):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            whole = align.get_response_log_probs(model, batch["input_ids"], batch["labels"])
        return whole["log_probs"], batch["response_mask"]

    def packed(dtype):
        return align.get_packed_log_probs(model, pairs, dtype=dtype)[::2]

    exact, rounded = update(plain, "float32"), update(plain, dtype)
    model.set_attn_implementation("packed")
    error = error_of(update(packed, dtype), exact)
    limit, why = (2 * error_of(rounded, exact), ", twice whole rows'") if dtype == "bfloat16" else (1e-3, "")
    return f"error {error:.1e} of log-probs and gradient; 12 rows{SMALLER}", f"{limit:.1e}{why}", error <= limit

def made_up_tokenizer(vocab):
    """A byte-level tokenizer, as Qwen's, of this many tokens."""
    words = ["<eos>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(f"w{i}" for i in range(vocab))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words[:vocab])}, []))
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")

def sampled_frequencies():
    """First tokens of many responses against softmax; all but 152 of the vocabulary have probability 0."""
    vocab, n, prompts = (151936, 512, [[5, 6, 7]] * 200) if CUDA else (151936, 64, [[5, 6, 7]] * 16)
    model = random_llama(vocab)
    logits = torch.full((vocab,), -200.0)
    logits[50::1000] = 2 * torch.randn(152)
    with torch.no_grad():
        ids = torch.tensor(prompts[:1], device=DEVICE)
        hidden = model.base_model(ids).last_hidden_state[0, -1]
        model.get_output_embeddings().weight.copy_(logits.to(DEVICE)[:, None] * hidden / hidden.square().sum())
        p = model(ids).logits[0, -1].float().softmax(dim=-1).double()
    model.set_attn_implementation("packed")
    sampler = align.TorchSampler(made_up_tokenizer(vocab), 512, "float32")
    sampler.load_weights(model)
    search, falls, strays = torch.searchsorted, [], []

    def search_and_look(cumulated, drawn, **options):
        steps = cumulated[:8].diff(dim=-1) / cumulated[:8, -1:]
        falls.append(0.0 - steps.min().item())
        strays.append(steps[:, p[1:] == 0].clamp(min=0).sum(dim=-1).max().item())
        return search(cumulated, drawn, **options)

    with mock.patch.object(torch, "searchsorted", search_and_look):
        rollouts = sampler.generate(prompts, n, list(range(len(prompts))), 1.0, 1, 0, None)
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts], device=DEVICE), minlength=vocab)
    expected = p * len(rollouts)
    often = expected >= 8
    squares = ((counts - expected).square() / expected)[often].mean().item()
    never = int(counts[p == 0].sum())
    limit = 1 + 6 * math.sqrt(2 / int(often.sum()))
    return (f"χ² {squares:.2f} per token over {int(often.sum())}; {never} of {len(rollouts)} draws of probability 0, "
            f"whose share is {max(strays):.0e}; the cumulated distribution falls by {max(falls):.0e} at most{SMALLER}",
            f"{limit:.2f}; 0; 1e-12; 1e-15",
            squares <= limit and never == 0 and max(strays) <= 1e-12 and max(falls) <= 1e-15)

# ---- tiny: a whole run ---------------------------------------------------------------

def tiny_preset():
    flags = "--algo grpo --preset tiny --sampler torch --save_frequency 0"
    if not CUDA:
        flags += " --n_grpo_steps 8 --rollout_batch_size 256 --train_batch_size 256 --validation_size 256" \
                 " --validation_frequency 0"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "align.py", *flags.split(), "--output_dir", f"{folder}/output"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        records = align.read_metrics(f"{folder}/output")
    before, after = records[0]["eval/accuracy"], records[-1]["eval/accuracy"]
    bar, why = (0.9, "") if CUDA else (before + 0.1, ", the base model's + 10 %: 8 small steps on a CPU")
    return (f"accuracy {before:.1%} → {after:.1%} in {len(records) - 1} steps, "
            f"{records[-1]['seconds']:.0f} s without validations", f"{bar:.1%}{why}", after >= bar)

# ---- vllm_…: weight syncs ------------------------------------------------------------

def make_run(model, tokenizer, flags):
    """A Run as load_run makes it, of a model that is here already."""
    args = align.parse_args(["--algo", "grpo", *flags.split()])
    sampler = align.make_sampler(args, tokenizer)
    return align.Run(args, model, tokenizer, sampler, *align.reward_fn_and_stop(args.prompt), None)

def move(model, share):
    """Moves each weight by a share of its parameter's standard deviation, or of 0.01 where all are equal, as at first."""
    for parameter in model.parameters():
        scale = parameter.std(correction=0).clamp(min=0.01)
        parameter.data += share * scale * torch.randn_like(parameter)

def weight_syncs(dtype, sleep):
    """Each weight sync is followed by the exact comparison, 32 responses and the comparison of log-probs."""
    if sleep and not CUDA:
        raise LeftOut("vLLM sleeps on a GPU only")
    folder, gaps, noticed = ROOT / "data/arithmetic/base_model", [], []
    model = align.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="packed").to(DEVICE)
    flags = f"--preset tiny --sampler vllm --dtype {dtype} --vllm_sleep {sleep} --gpu_memory_utilization 0.2"
    run = make_run(model, align.AutoTokenizer.from_pretrained(folder), f"{flags} --model {folder}")
    texts = [align.format_prompt("tiny", f"What is {i + 1}+5-3+{i + 2}-2?") for i in range(8)]
    problems = [{"prompt_ids": ids} for ids in run.tokenizer(texts)["input_ids"]]
    started = now()
    for _ in range(10):
        move(model, 0.2)
        align.sample(run, problems, 4, 0, "train", 1.0)         # raises where a comparison fails
        metrics = run.step_metrics()
        gaps.append((metrics["train/sampler_gap"], metrics["train/sampler_gap_max"]))
    seconds, rpc = (now() - started) / 10, run.sampler.llm.collective_rpc

    def all_but_the_sync(method, *rest, **options):
        return None if method == "reload_weights" else rpc(method, *rest, **options)

    for share in (0.01, 0.2):       # 1 % shows in the exact comparison alone
        move(model, share)
        try:
            with mock.patch.object(run.sampler.llm, "collective_rpc", all_but_the_sync):
                align.sample(run, problems, 4, 0, "train", 1.0)
        except align.UserError as error:
            noticed.append(str(error))
    (mean, largest), limits = map(max, zip(*gaps)), align.GAP_LIMITS["bfloat16" if CUDA else dtype]
    return (f"10 right, {seconds:.2f} s each with 32 responses, log-prob gap {mean:.1e} nats, {largest:.1e} at most; "
            f"{len(noticed)} of 2 skipped ones noticed", f"10; {limits[0]:g}, {limits[1]:g}; 2", len(noticed) == 2)

# ---- step: of the math preset, with random weights of Qwen2.5-1.5B's shape -----------

@functools.cache
def step_run():
    """(run, the ids to train on: 8 responses to a prompt, 600 tokens on average)."""
    sizes = (1536, 28, 12, 8960, 151936) if CUDA else (192, 6, 6, 1120, 49152)
    width, layers, heads, inner, vocab = sizes
    n, longest, prompt = (256, 1024, 168) if CUDA else (32, 64, 12)
    config = transformers.Qwen2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
        intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=4096,
        rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=0)
    with torch.device(DEVICE):
        model = align.AutoModelForCausalLM.from_config(config, attn_implementation="packed").eval()
    run = make_run(model, made_up_tokenizer(vocab), (
        f"--preset math --sampler torch --dtype bfloat16 --rollout_batch_size {n} --train_batch_size {n} "
        f"--sampling_max_tokens {longest} --tokens_per_microbatch {3072 if CUDA else 512}"))
    run.last_step = 4
    run.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=CUDA)
    rng = random.Random(0)

    def ids(shortest, longest):
        return [rng.randrange(1, vocab) for _ in range(rng.randint(shortest, longest))]

    prompts = [ids(prompt // 2, 3 * prompt // 2) for _ in range(n // 8)]
    signs = torch.tensor([[(-1.0)**i] for i in range(n)], device=DEVICE)    # every response teaches something
    return run, {"pairs": [(prompts[i // 8], ids(longest * 176 // 1024, longest)) for i in range(n)],
                 "raw_rewards": signs, "advantages": signs, "sampler_log_probs": None, "old_log_probs": None}

def training_step(after_vllm=False):
    """The second of two updates (the first one warms up), made as a run makes it."""
    run, batch = step_run()
    if after_vllm and not isinstance(run.sampler, align.VLLMSampler):
        raise LeftOut("no vLLM beside it")
    rows, times, flash_calls = range(len(batch["pairs"])), [], []
    optimizer_step, flash_attn_func = align.optimizer_step, align.flash_attn_func

    def timed_optimizer_step(*arguments):
        times.append(now())
        optimizer_step(*arguments)
        times.append(now())

    def counted_flash_attn_func(*arguments, **options):
        flash_calls.append(1)
        return flash_attn_func(*arguments, **options)

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.multiple(align, optimizer_step=timed_optimizer_step,
                             flash_attn_func=flash_attn_func and counted_flash_attn_func):
        for step in (1, 2):
            times[:] = [now()]
            align.grpo_update(run, batch, list(rows), step)
    n = len(align.microbatches(run.args, batch["pairs"], rows))
    result = f"{n} microbatches of {(times[1] - times[0]) / n:.3f} s, optimizer {times[2] - times[1]:.3f} s"
    right = run.step_metrics()["train/skipped_updates"] == 0
    if not CUDA:
        return f"{result}; {run.model.num_parameters() / 1e6:.0f}M parameters, for a CPU", "", right
    right &= bool(flash_calls) == bool(flash_attn_func)
    free, total = torch.cuda.mem_get_info()
    peak, room = torch.cuda.max_memory_allocated(), total * (1 if after_vllm else 1 - run.args.gpu_memory_utilization)
    result += f", {'flash-attn' if flash_calls else 'sdpa'}; peak {peak / 1e9:.1f} GB, free {free / 1e9:.1f}"
    return result, f"0.07 to 0.10 s estimated; flash-attn if installed; {room / 1e9:.0f} GB", right and peak <= room

def step_sampling():
    """vLLM starts beside the model, its gradients' room and the optimizer; a sync; a step's responses."""
    if not installed("vllm"):
        raise LeftOut("vLLM is not installed")
    run, batch = step_run()
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: parameter.detach().bfloat16() for name, parameter in run.model.named_parameters()}
        run.model.save_pretrained(folder, state_dict=weights)
        run.tokenizer.save_pretrained(folder)
        run.args.model, run.args.sampler, run.sampler = folder, "vllm", None
        run.sampler = align.make_sampler(run.args, run.tokenizer)
    del weights
    move(run.model, 0.01)
    times = [now()]
    run.sampler.load_weights(run.model)
    times.append(now())
    problems = [{"prompt_ids": prompt} for prompt, _ in batch["pairs"][::8]]
    rollouts, _ = align.sample(run, problems, 8, 0, "train", 1.0)
    times.append(now())
    tokens, gap = sum(len(rollout.response_ids) for rollout in rollouts), run.step_metrics()["train/sampler_gap"]
    return (f"weight sync {times[1] - times[0]:.2f} s; {len(rollouts)} responses, {tokens} tokens in "
            f"{times[2] - times[1]:.1f} s with another sync and its checks; gap {gap:.1e} nats{SMALLER}",
            "0.3 s, 10 to 20 s estimated", True)

# ---- The table -----------------------------------------------------------------------

KERNELS = [("sdpa", "float32"), ("sdpa", "bfloat16"), ("flash-attn", "bfloat16")]
GROUPS = {      # rows (title, check, its arguments); a check returns (result, limit, whether it is right)
    "kernels": [
        ("log-probs through the head, bfloat16", log_probs, ()),
        ("torch sampler", sampled_frequencies, ()),
        *[(f"attention, {', '.join(kind)}", attention, kind) for kind in KERNELS],
        *[(f"packed update, {', '.join(kind)}", packed_update, kind) for kind in KERNELS]],
    "tiny": [("tiny preset, GRPO", tiny_preset, ())],
    "step": [
        ("training step, 1.5B", training_step, ()),
        ("sampling with vLLM, 1.5B", step_sampling, ()),
        ("training step beside vLLM, 1.5B", training_step, (True,))]}
for dtype, sleep in (("bfloat16", False), ("bfloat16", True), ("float32", False), ("float32", True)):
    title = f"weight syncs, vLLM, {dtype}{', sleep' * sleep}"
    GROUPS[f"vllm_{dtype}{'_sleep' * sleep}"] = [(title, weight_syncs, (dtype, sleep))]

def make_checks(group, file):
    """Makes the checks of a group in this process; writes the cells of each one's row as a line of JSON."""
    for title, check, arguments in GROUPS[group]:
        started, result, limit = time.perf_counter(), "", ""
        try:
            result, limit, right = check(*arguments)
            verdict = "ok" if right else "FAILED"
        except LeftOut as reason:
            verdict = f"left out: {reason}"
        except (Exception, SystemExit) as error:
            result, verdict = f"{type(error).__name__}: {align.short_message(error)}"[:200], "FAILED"
        row = [title, result, limit, f"{time.perf_counter() - started:.1f}", verdict]
        with open(file, "a") as rows:
            rows.write(json.dumps(row) + "\n")
        if CUDA:
            torch.cuda.empty_cache()        # vLLM counts what is free

def rows_of(group, seconds):
    """The rows of a group from a process of its own; those that it does not live to write are FAILED."""
    titles = [title for title, *_ in GROUPS[group]]
    if group.startswith("vllm") and not installed("vllm"):
        return [[title, "", "", "", "left out: vLLM is not installed"] for title in titles]
    if seconds < 20:
        return [[title, "", "", "", f"left out: {DEADLINE} s are over"] for title in titles]
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "rows"), Path(folder, "log")
        file.touch()
        with open(log, "w") as output:
            child = subprocess.Popen([sys.executable, __file__, group, "--rows", file], stdout=output, stderr=output)
            try:
                end = f"exit code {child.wait(seconds)}"
            except subprocess.TimeoutExpired:
                child.kill()
                end = f"killed: {DEADLINE} s are over"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:150]
    return rows + [[title, f"{end}; {last}", "", "", "FAILED"] for title in titles[len(rows):]]

def heading():
    """GPU, driver, versions and commit."""
    def output_of(*command):
        with contextlib.suppress(OSError):
            return " ".join(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split())

    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    words = [f"{gpu} (driver)" if gpu else "no GPU"]
    for package in ("torch", "transformers", "vllm", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            words.append(f"{package} {importlib.metadata.version(package)}")
    return "; ".join([*words, f"commit {output_of('git', 'describe', '--always', '--dirty') or 'unknown'}"])

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", default=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--rows", help=argparse.SUPPRESS)       # where a group's own process writes
    options, failed, end = parser.parse_args(), False, time.monotonic() + DEADLINE
    if options.rows:
        return make_checks(options.groups[0], options.rows)
    print(f"{heading()}\n\n| check | result | limit or reference | seconds | |\n|---|---|---|---|---|", flush=True)
    for group in options.groups:
        for row in rows_of(group, end - time.monotonic()):
            print("|", " | ".join(cell.replace("|", "/") for cell in row), "|", flush=True)
            failed |= row[-1] == "FAILED"
    sys.exit(int(failed))

if __name__ == "__main__":
    main()
