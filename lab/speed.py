"""What lab/measure.py measures of the parts of align.py: speed, memory, grading. `options` are those of measure.py.

Each measurement runs in a process of its own, so that nothing is left from another (`alone`, which starts this file).
What is compared is measured in turn, several times, and the median counts.
"""

import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # for `import align`

def alone(function, *arguments, start=(sys.executable,)):
    """What a function of this file returns in a new process, or in several ranks."""
    command = [*start, __file__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

def python_on(ranks):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [sys.executable, *torchrun] if ranks > 1 else [sys.executable]

def installed(module):
    return importlib.util.find_spec(module) is not None

def leave_out(name, needed):
    print(f"{name} is left out: it needs {needed}")
    return []

def seconds_of(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

def alternate(rounds, **measurements):
    """Makes the measurements in turn, several times; the median of each, in their order."""
    results = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measurement in measurements.items():
            results[name].append(measurement())
    return [statistics.median(values) for values in results.values()]

def memory(name):
    """Megabytes of this process: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000

def peak_of(function):
    Path("/proc/self/clear_refs").write_text("5")       # forgets the peak so far
    function()
    return memory("VmHWM")

# ---------------------------------------------------------------------------------------------------------------
# A step of GRPO, against TRL
# ---------------------------------------------------------------------------------------------------------------

def coin_reward_fn(response, ground_truth):
    """As good as random, so that every group has something to learn, whatever the model."""
    reward = float(len(response) % 2)
    return {"reward": reward, "format_reward": reward, "answer_reward": reward}

def trl(options):
    if not installed("trl"):
        return leave_out("trl", "pip install trl==1.16.0")
    rows = []
    # TRL's batch is the fastest of those tried
    for title, model, prompt, prompts, tokens, trl_batch, steps in (
            ("tiny model", "data/arithmetic/base_model", "tiny", 32, 40, 64, 6),
            ("SmolLM2-135M", options.smollm2, "r1_zero", 8, 111, 8, 1)):
        if model is None:
            leave_out(title, "--smollm2 FOLDER")
            continue
        questions = [f"How much is {i + 20} sheep and {i + 3} sheep and {i + 2} sheep?" for i in range(prompts)]
        ours, theirs = alternate(
            options.rounds, ours=lambda: alone(align_step, model, prompt, questions, tokens, steps),
            theirs=lambda: alone(trl_step, model, prompt, questions, tokens, steps, trl_batch))
        rows.append([f"GRPO step, {title}, float32, {prompts} × 8 responses of {tokens} tokens",
                     f"{ours:.2f} s", f"{theirs:.2f} s, TRL", f"{theirs / ours:.1f} times as fast"])
    return rows

def align_step(model, prompt, questions, tokens, steps):
    """Median seconds of align.py's GRPO steps; where there are several the first one warms up."""
    import align
    align.reward_fn_and_stop = lambda prompt: (coin_reward_fn, None)
    folder, n = Path(tempfile.mkdtemp()), 8 * len(questions)
    problems = [json.dumps({"problem": question, "answer": "1"}) for question in questions]
    (folder / "problems.jsonl").write_text("\n".join(problems))
    align.main([*f"""--algo grpo --preset tiny --model {model} --prompt {prompt} --tokens_per_microbatch 2048
        --train_data {folder}/problems.jsonl --val_data {folder}/problems.jsonl --validation_size 1
        --validation_frequency 0 --n_grpo_steps {steps} --rollout_batch_size {n} --train_batch_size {n} --group_size 8
        --sampling_min_tokens {tokens} --sampling_max_tokens {tokens} --output_dir {folder}/align_output""".split()])
    records = [json.loads(line) for line in open(folder / "align_output/metrics.jsonl")][1:]        # step 0 validates
    times = [record["time/sampling"] + record["time/grading"] + record["time/training"] for record in records]
    return statistics.median(times[steps > 1:])

def trl_step(model, prompt, questions, tokens, steps, batch):
    """The same of TRL: one generation of 8 responses to each prompt, one update on all of them."""
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import align
    n, ends = 8 * len(questions), []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

    config = GRPOConfig(
        tempfile.mkdtemp(), model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=8, generation_batch_size=n,
        per_device_train_batch_size=batch, gradient_accumulation_steps=n // batch, max_steps=steps,
        shuffle_dataset=False, max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens},
        temperature=1.0, top_p=1.0, top_k=0, loss_type="grpo", beta=0.0, num_iterations=1, scale_rewards="group",
        learning_rate=6e-4, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False)
    prompts = [{"prompt": align.format_prompt(prompt, question)} for question in questions]
    trainer = GRPOTrainer(
        str(model), lambda completions, **_: [coin_reward_fn(text, "")["reward"] for text in completions],
        args=config, train_dataset=datasets.Dataset.from_list(prompts * steps), callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    times = [after - before for before, after in zip(ends, ends[1:])]
    return statistics.median(times[steps > 1:])

# ---------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------

def sampling(options):
    if not options.smollm2:
        return leave_out("sampling", "--smollm2 FOLDER")
    rows = []
    for dtype in ("float32", "bfloat16"):
        speeds = alone(sampling_speeds, options.smollm2, dtype, options.rounds)
        ours = speeds.pop("align.py")
        rows.append([f"sampling, SmolLM2-135M, {dtype}, 8 × 8 × 128 tokens", f"{ours:.0f} tokens/s",
                     ", ".join(f"{speed:.0f}, {name}" for name, speed in speeds.items()),
                     ", ".join(f"{ours / speed:.2f} times" for speed in speeds.values())])
    return rows

def sampling_speeds(folder, dtype, rounds):
    """Tokens per second of each sampler."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import align
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model_of(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    question = "Ann has {} boxes of {} pens each and gives {} pens away. How many are left?"
    prompts = [align.format_prompt("r1_zero", question.format(i + 3, i + 12, i)) for i in range(8)]
    prompt_ids = tokenizer(prompts)["input_ids"]
    padded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    works = {"model.generate": lambda: plain.generate(
        **padded, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=8, min_new_tokens=128, max_new_tokens=128)}
    samplers = {"align.py": align.TorchSampler(tokenizer, 512, dtype)}
    if installed("vllm"):
        flags = f"--algo eval --preset math --sampler vllm --dtype {dtype} --model {folder}"
        samplers["vLLM"] = align.VLLMSampler(align.parse_args(flags.split()), tokenizer)
    for name, sampler in samplers.items():
        sampler.load_weights(model)
        works[name] = lambda sampler=sampler: sampler.generate(
            prompt_ids, 8, list(range(8)), temperature=1.0, max_tokens=128, min_tokens=128, stop=None)
    seconds = alternate(rounds, **{name: lambda work=work: seconds_of(work) for name, work in works.items()})
    return {name: 8 * 8 * 128 / each for name, each in zip(works, seconds)}

# ---------------------------------------------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------------------------------------------

def model_of(folder):
    import torch
    from transformers import AutoModelForCausalLM

    import align  # noqa: F401, for its attention
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="packed")

def update_seconds(model, prompts, responses, at_a_time):
    """Seconds of forward and backward over lists of token ids, with 8 responses to each prompt."""
    import align
    started = time.perf_counter()
    pairs = list(zip([prompt for prompt in prompts for _ in range(8)], responses))
    for first in range(0, len(pairs), at_a_time):
        log_probs, _, _ = align.get_packed_log_probs(model, pairs[first:first + at_a_time])
        log_probs.mean().backward()
    model.zero_grad()
    return time.perf_counter() - started

def training_rate(options):
    if not options.smollm2:
        return leave_out("training_rate", "--smollm2 FOLDER")
    ours, matrix, seconds = alone(training_rates, options.smollm2, options.rounds)
    return [["forward and backward, SmolLM2-135M, float32, 8 × 8 responses of 111 tokens",
             f"{ours:.0f} GFLOP/s, {seconds:.1f} s", f"{matrix:.0f}, a 2048³ matrix product", f"{ours / matrix:.0%}"]]

def training_rates(folder, rounds):
    """GFLOP/s of a pass and of a large matrix product, and the seconds of the pass."""
    import torch
    model = model_of(folder)
    prompts = [list(range(50 + i, 200 + i)) for i in range(8)]
    responses = [list(range(i, 111 + i)) for i in range(64)]
    a, b = torch.randn(2, 2048, 2048)
    update_seconds(model, prompts[:1], responses[:8], 8)        # warms up
    seconds, matrix = alternate(
        rounds, update=lambda: update_seconds(model, prompts, responses, 8),
        matrix=lambda: statistics.median(seconds_of(lambda: a @ b) for _ in range(20)))
    head = model.get_output_embeddings().weight.numel()         # sees the response tokens only
    work = 6 * ((model.num_parameters() - head) * (8 * 150 + 64 * 111) + head * 64 * 111)
    return work / seconds / 1e9, 2 * 2048**3 / matrix / 1e9, seconds

def linear(options):
    costs = alone(costs_per_token, options.rounds)
    return [["an update at 1, 2, 4, 8 times the tokens (9,000 … 72,000), tiny model",
             ", ".join(f"{cost:.1f}" for cost in costs) + " µs per token", "",
             f"equal within {max(costs) / min(costs) - 1:.0%}"]]

def costs_per_token(rounds):
    model, costs = model_of(ROOT / "data/arithmetic/base_model"), []
    for times in (1, 2, 4, 8):
        prompts = [list(range(10 + i % 200, 32 + i % 200)) for i in range(32 * times)]
        responses = [list(range(10, 30 + i % 30)) for i in range(256 * times)]
        update_seconds(model, prompts, responses, 64)           # warms up
        seconds = statistics.median(update_seconds(model, prompts, responses, 64) for _ in range(rounds))
        costs.append(seconds / sum(map(len, prompts + responses)) * 1e6)
    return costs

# ---------------------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------------------

def grading(options):
    return alone(grading_rows, options.rounds, options.labelled)

def grading_rows(rounds, labelled):
    import align
    from test_align import FAMILIES as SAME, HOSTILE
    same = [align.grade(answer, truth) for family in SAME for answer in family for truth in family]
    others = [align.grade(a[0], b[0]) for a in SAME for b in SAME if not set(a) & set(b)]
    rows = [[f"pairs of spellings of one meaning, {len(SAME)} families", f"{sum(same)} of {len(same)} equal"],
            ["pairs of different meanings", f"{sum(others)} of {len(others)} equal"]]
    for path in sorted(ROOT.glob("data/MATH/t*.jsonl")):
        answers = [json.loads(line)["answer"] for line in open(path)]
        right = sum(align.grade(answer, answer) for answer in answers)
        rows.append([f"answers of MATH's {path.name} against themselves", f"{right} of {len(answers)} equal"])
        called = [align.grade(answer, after) for answer, after in zip(answers, answers[1:]) if answer != after]
        rows.append(["each of them against the next one, if another", f"{sum(called)} of {len(called)} equal"])
    if labelled:
        cases = [json.loads(line) for line in open(labelled)]
        cases = [case for case in cases if not case["debatable"]]
        found = [align.r1_zero_reward_fn(case["response"], case["ground_truth"])["reward"] == 1 for case in cases]
        right = sum(reward == case["expected"] for reward, case in zip(found, cases))
        wrong = sum(reward and not case["expected"] for reward, case in zip(found, cases))
        rows.append([f"{len(cases)} hand-labelled responses", f"{right} right, {wrong} false positives"])

    def grade_all(responses, truths):
        rewards, _ = align.grade_responses(align.r1_zero_reward_fn, responses, truths)
        return sum(reward["reward"] for reward in rewards)

    hostile = [f" </think> <answer> {answer} </answer>" for answer in HOSTILE]
    started = time.perf_counter()
    earned = grade_all(hostile, ["5"] * len(hostile))
    rows.append([f"{len(hostile)} hostile outputs (towers of powers, code, deep nesting)",
                 f"reward {earned:.0f}, {time.perf_counter() - started:.0f} s in all"])

    rng, responses, truths = random.Random(0), [], []
    for i in range(2048):
        family = rng.choice(SAME)
        truths.append(rng.choice([*family, *rng.choice(SAME)]))
        responses.append(f"</think> <answer> {rng.choice(family)} </answer>" if i % 3 == 0 else "Let me think. " * 60)
    ours, theirs = alternate(
        rounds, ours=lambda: seconds_of(lambda: grade_all(responses, truths)),
        theirs=lambda: seconds_of(lambda: grade_by_math_verify(align, responses, truths)))
    rows.append(["2,048 responses, a third of them in the format",
                 f"{ours:.1f} s; math-verify on each, in process: {theirs:.1f} s"])
    return rows

def grade_by_math_verify(align, responses, truths):
    from math_verify import parse, verify
    for response, truth in zip(responses, truths):
        answer = align.extract_answer(response)
        if answer is not None:
            verify(parse(rf"\boxed{{{truth}}}"), parse(rf"\boxed{{{answer}}}"))

# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------

def log_probs(options):
    rows = []
    for vocabulary in (49152, 151936):
        found = {"chunks": [], "all logits": []}
        for _ in range(options.rounds):
            for how in found:
                found[how].append(alone(log_probs_once, vocabulary, how))
        (peak, seconds), (plain_peak, plain_seconds) = [map(statistics.median, zip(*each)) for each in found.values()]
        rows.append([f"log-probs and entropy, forward and backward, 8 × 512 tokens, vocabulary {vocabulary:,}",
                     f"{peak:.2f} GB, {seconds:.1f} s",
                     f"{plain_peak:.2f} GB, {plain_seconds:.1f} s, all logits at once",
                     f"{peak / plain_peak:.2f} of the memory, {seconds / plain_seconds:.2f} of the time"])
    return rows

def log_probs_once(vocabulary, how):
    """How many GB the peak of memory is above the model's own, and the median seconds of three passes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import align
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, attn_implementation="packed"))
    ids = torch.randint(vocabulary, (8, 513))
    pairs = list(zip(ids[:, :1].tolist(), ids[:, 1:].tolist()))

    def work():
        if how == "chunks":
            log_probs, _, _ = align.get_packed_log_probs(model, pairs)
        else:
            log_probs = align.get_response_log_probs(model, ids[:, :-1], ids[:, 1:], True)["log_probs"]
        log_probs.mean().backward()
        model.zero_grad()

    before, times = memory("VmRSS"), []
    peak = peak_of(lambda: times.extend(seconds_of(work) for _ in range(3)))
    return (peak - before) / 1000, statistics.median(times)

def memory_per_rank(options):
    from measure import patched_copy
    rows, folder = [], tempfile.mkdtemp()
    patched_copy(ROOT / "lab/variants/fsdp.patch", Path(folder))
    for n in (1, 2, 4):
        freeing = ["env", "OMP_NUM_THREADS=1", "MALLOC_MMAP_THRESHOLD_=65536"]     # freed memory goes back at once
        size, training, sync = alone(rank_memory, folder, start=[*freeing, *python_on(n)])
        rows.append([f"with `fsdp`, a rank's memory, {n} in all, a model of {size:.0f} MB in float32",
                     f"{training:,.0f} MB at most in training, {sync:.0f} MB more in a weight sync"])
    return rows

def rank_memory(folder):
    """One of the ranks: weights, gradients and AdamW's state, with a batch too small to matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, folder)      # the patched one
    import align
    align.join_ranks()
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = memory("VmRSS")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12,
        attn_implementation="packed"))
    size = 4e-6 * sum(parameter.numel() for parameter in model.parameters())
    if align.WORLD_SIZE > 1:
        align.shard(model, "float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train():
        for _ in range(3):
            log_probs, _, _ = align.get_packed_log_probs(model, [([1, 2, 3], [4, 5, 6, 7])])
            log_probs.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def sync():
        for parameter in model.parameters():
            align.full_tensor(parameter.detach())

    training = peak_of(train) - before
    after = memory("VmRSS")
    peaks = align.all_gather((size, training, peak_of(sync) - after))
    return [max(column) for column in zip(*peaks)]

if __name__ == "__main__":
    function, arguments = sys.argv[1:]
    print(json.dumps(globals()[function](*json.loads(arguments))), flush=True)      # of several ranks one is heard
    from align import leave_ranks
    leave_ranks()
