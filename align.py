"""Align a language model to reason: zero-shot baseline, SFT, expert iteration, GRPO.

    python align.py --algo eval         # how good is the base model?
    python align.py --algo grpo         # make it better; sft and ei do it in other ways
    python align.py --algo grpo --model sft_output/final_model

The same code trains a tiny model on arithmetic, on a CPU in minutes (--preset tiny).
It is written for Qwen2.5-Math-1.5B on MATH, on an 80 GB GPU (--preset math). Sections 5
to 7 have the names and arguments of the handout of Stanford CS336's assignment 5; some
functions take more.

Symbols:  B sequences in a batch    T tokens (labels: shifted by one)  V vocabulary
          G rollouts per prompt     N rollouts per step = prompts × G
          M packed tokens           D size of a hidden state, in attention of a head
          π the policy (the model)  ρ = π(token) / π_old(token)
          r reward in {0, 1}        A advantage

Sources:  [R1] arXiv:2501.12948     [GRPO] arXiv:2402.03300    [DrGRPO] arXiv:2503.20783
          [EI] arXiv:1705.05439     [PPO] arXiv:1707.06347     [pass@k] arXiv:2107.03374
          [IMPALA] arXiv:1802.01561 [TIS] Yao et al. 2025, "Your efficient RL framework secretly
                                          brings you off-policy RL training"

Where this departs from the papers, on purpose:
  1. No KL penalty, no reference model: no reward model is over-optimised ([DrGRPO]).
  2. The gradient uses the ids that were sampled: text tokenised again can differ.
  3. With one update per rollout batch π_old is π, ρ = 1: no second forward pass.
  4. Log-probs are of the sampling distribution: training divides by the temperature.
  5. The SFT loss is divided by the batch's mean response length: nats per token.
"""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import math_verify
import pebble
import sympy
import torch
import torch.nn.functional as F
from latex2sympy2_extended import NormalizationConfig
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, StopStringCriteria
from transformers.utils import logging as hf_logging

try:
    from flash_attn import flash_attn_func
except (ImportError, OSError, RuntimeError) as error:  # not installed, or for another torch
    flash_attn_func, flash_attn_error = None, error

class UserError(ValueError):
    """Something that the user can mend: one sentence on stderr and exit code 2."""

def check(condition, complaint):
    """Raises UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(complaint)

def short_message(error):
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__

# Many GPUs: `torchrun --nproc_per_node N align.py …` starts N of these programs, the
# ranks. Each has the whole model, samples, grades and trains on its share of the work;
# an update adds up their gradients.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

@contextlib.contextmanager
def exit_cleanly(program):
    """Turns what the user can mend into one sentence and an exit code."""
    try:
        yield
    except (UserError, OSError, RuntimeError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted"
        if isinstance(error, RuntimeError):
            # On a CPU a lack of memory has no class of its own.
            if not re.search("out of memory|can't allocate memory", message):
                raise
            message = "out of memory; lower --tokens_per_microbatch or, sampling, --sampler_batch_size"
        if RANK > 0:
            # Rank 0 speaks for all: if it failed, too, torchrun ends this rank here.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        sys.stdout.flush()
        print(f"{program}: {message}. What was saved before is intact.", file=sys.stderr)
        leave = os._exit if WORLD_SIZE > 1 else sys.exit  # the other ranks may wait for it
        leave(130 if isinstance(error, KeyboardInterrupt) else 2)

def all_gather(value):
    """What each rank passes here, as a list in their order. All must call it."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(values, value)
    return values

def map_over_ranks(function, items):
    """function(items), one result per item, each rank computing its share."""
    share = items[RANK::WORLD_SIZE]
    shares = all_gather(function(share) if share else [])
    return [shares[i % WORLD_SIZE][i // WORLD_SIZE] for i in range(len(items))]

def join_ranks():
    """Finds the other ranks and takes a GPU. From here on rank 0 alone prints."""
    if WORLD_SIZE > 1:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        patience = datetime.timedelta(hours=2)  # rank 0 may be saving
        torch.distributed.init_process_group(backend, timeout=patience)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")

def leave_ranks(code=0):
    """Ends this process, if it is one of several, once all of them are here."""
    if WORLD_SIZE > 1:
        all_gather(None)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # gloo's threads now and then crash the usual end

# ---- 1. Settings: every knob, declared once ------------------------------------------

# Under the algorithms that use them: (flag, value, help) or (flag, tiny preset, math
# preset, help). A tuple holds a value for each algorithm of its heading, a list the
# choices, the default first. A flag has its value's type. A number is above zero, or
# may be zero if its default is or the help explains "0:".
SETTINGS = {
    "eval sft ei grpo": [
        ("preset", ["auto", "tiny", "math"], "defaults of the rest; auto: math on a GPU"),
        ("model", "data/arithmetic/base_model", "Qwen/Qwen2.5-Math-1.5B", "hub id or folder"),
        ("prompt", "tiny", "r1_zero", "a name in PROMPTS (section 2)"),
        ("val_data", "data/arithmetic/test.jsonl", "data/MATH/test.jsonl", "problems to evaluate on"),
        ("validation_size", (0, 512, 512, 512), "so many of them; 0: all"),
        ("output_dir", ("eval_output", "sft_output", "ei_output", "grpo_output"), "where the run writes"),
        ("overwrite", False, "replace the run that output_dir holds"),
        ("seed", 0, "of every random draw"),
        ("dtype", ["auto", "float32", "bfloat16"], "of matrix products; auto: bfloat16 on a GPU"),
        ("sampler", ["auto", "vllm", "torch"], "generates responses; auto: vllm on a GPU"),
        ("sampler_batch_size", 512, "responses at a time in the torch sampler"),
        ("gpu_memory_utilization", 0.3, "vLLM's share of the GPU's memory"),
        ("vllm_sleep", False, "give vLLM's memory to training in between"),
        ("sampling_min_tokens", 4, "no response ends before; 0: off"),
        ("sampling_max_tokens", 64, 1024, "responses are cut after so many tokens"),
        ("eval_temperature", 1.0, "0: greedy")],
    "eval": [
        ("eval_samples", 1, "responses per problem, for pass@k"),
        ("question", "", "answer this question and stop")],
    "sft ei grpo": [
        ("learning_rate", (3e-4, 3e-4, 6e-4), 1e-5, "of AdamW"),
        ("lr_schedule", ["linear", "constant"], ["constant", "linear"], "linear: down to zero"),
        ("weight_decay", 0.0, "of AdamW; 0: off"),
        ("max_grad_norm", 1.0, "bound of the gradient's norm; inf: off"),
        ("train_batch_size", (32, 64, 512), (64, 64, 256), "sequences per optimizer update"),
        ("tokens_per_microbatch", 4096, 3072, "about so many in a pass; less: less memory, same update"),
        ("gradient_accumulation_steps", 0, "microbatches per update instead; 0: off"),
        ("validation_frequency", (8, 1, 5), (100, 1, 20), "in steps; 0: first and last only"),
        ("save_frequency", (500, 4, 50), (500, 1, 50), "steps between checkpoints; 0: none"),
        ("keep_checkpoints", 2, "only the newest so many; 0: all"),
        ("resume", False, "go on with output_dir's run and its settings"),
        ("wandb_project", "", "log to this Weights & Biases project, too")],
    "sft": [
        ("sft_data", "data/arithmetic/sft.jsonl", "data/MATH/sft.jsonl", "reasoning traces"),
        ("n_sft_examples", 0, "use so many of them, drawn at random; 0: all"),
        ("max_length", 256, 2048, "drop traces of more tokens, prompt included")],
    "sft ei": [("sft_epochs", (16, 2), (3, 1), "passes over the traces or (ei) the correct samples")],
    "ei grpo": [
        ("train_data", "data/arithmetic/train.jsonl", "data/MATH/train.jsonl", "problems to sample on"),
        ("sampling_temperature", 1.0, "1: sample from the policy itself")],
    "ei": [
        ("n_ei_steps", 8, 5, "rounds of sample, filter, fine-tune"),
        ("ei_batch_size", 256, 1024, "problems per round"),
        ("num_rollouts", 4, "responses per problem")],
    "grpo": [
        ("n_grpo_steps", 50, 200, "rollout batches"),
        ("rollout_batch_size", 512, 256, "N, responses per step"),
        ("group_size", 8, "G, responses per problem"),
        ("epochs_per_rollout_batch", 1, "passes over each rollout batch; above 1: off-policy"),
        ("loss_type", ["reinforce_with_baseline", "no_baseline", "grpo_clip", "grpo_no_clip"], "section 7"),
        ("cliprange", 0.2, "ε of grpo_clip"),
        ("use_std_normalization", True, "divide advantages by the group's standard deviation"),
        ("advantage_eps", 1e-6, "added to that standard deviation; 0: nothing"),
        ("tis_cap", 0.0, "cap of a token's weight π_old / π_sampler, say 2; 0: off"),
        ("loss_aggregation", ["masked_mean", "masked_normalize"], "over a response, or sum / sampling_max_tokens")],
}

def build_parser():
    """The parser of all flags. What is not given is None."""
    parser = argparse.ArgumentParser("align.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.register("type", bool, lambda text: ("false", "true").index(text.lower()) == 1)
    parser.error = lambda message: check(False, f"{message}; --help lists the flags")
    parser.add_argument("--algo", choices=["eval", "sft", "ei", "grpo"], help="which of the four to run")
    parser.add_argument("--plot", nargs="+", metavar="DIR", help="draw runs into compare.png")
    parser.add_argument("--compare", metavar="FLAG=A,B,…", help="run each value with each seed; draw them")
    parser.add_argument("--seeds", type=int, default=3, help="of --compare: so many, from 0 on (3)")
    for users, settings in SETTINGS.items():
        group = parser.add_argument_group(f"used by {users}")
        for flag, *values, help in settings:
            value = values[0][0] if isinstance(values[0], tuple) else values[0]
            options = {"choices": value} if isinstance(value, list) else {"type": type(value)}
            if isinstance(value, bool):
                options |= {"nargs": "?", "const": True}
            shown = " | math: ".join(str(value).strip("()[]") for value in values)
            group.add_argument(f"--{flag}", help=f"{help} ({shown})".replace("%", "%%"), **options)
    return parser

def read_settings(folder):
    """The settings of the run that a folder holds; {} where there is none."""
    path = Path(folder, "args.json")
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {short_message(error)}") from error

def parse_args(argv):
    """The run's settings. UserError for a flag that is wrong or not used."""
    # --group-size=4 means --group_size=4
    argv = [re.sub(r"^--[\w-]+(?==|$)", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    given = build_parser().parse_args(argv)
    if given.plot or given.compare:
        return given
    algo, cuda = given.algo, torch.cuda.is_available()
    check(algo, "say what to run: --algo eval, sft, ei or grpo")
    folder = given.output_dir or f"{algo}_output"
    before = read_settings(folder) | {"overwrite": False} if given.resume else {}
    check(before.get("algo", algo) == algo, f"{folder} holds a run of --algo {before.get('algo')}, not {algo}")
    if given.preset in (None, "auto"):
        given.preset = before.get("preset", "math" if cuda else "tiny")
        print(f"preset {given.preset} (--preset chooses)")

    # A flag that is given counts first, then the resumed run, then the preset.
    args = argparse.Namespace(algo=algo, device="cuda" if cuda else "cpu", resume=False, question="")
    for heading, settings in SETTINGS.items():
        users = heading.split()
        for flag, *values, help in settings:
            value = getattr(given, flag)
            if algo not in users:
                check(value is None, f"--{flag} is not used by --algo {algo}")
                continue
            default = values[-1] if given.preset == "math" else values[0]
            if isinstance(default, tuple):
                default = default[users.index(algo)]
            if value is None:
                value = before.get(flag, default[0] if isinstance(default, list) else default)
            if type(value) in (int, float):
                may_be_zero = "0:" in help or 0 in values
                check(value > 0 or value == 0 and may_be_zero, f"--{flag} {value} is not above zero")
            setattr(args, flag, value)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if cuda else "float32"

    # With these the run would go wrong, perhaps in silence.
    for total, part in (("train_batch_size", "gradient_accumulation_steps"),
                        ("rollout_batch_size", "group_size"), ("rollout_batch_size", "train_batch_size")):
        size, divisor = getattr(args, total, 0), getattr(args, part, 0)
        check(not divisor or size % divisor == 0, f"--{part} {divisor} does not divide --{total} {size}")
    low, high = args.sampling_min_tokens, args.sampling_max_tokens
    check(low <= high, f"--sampling_min_tokens {low} is above --sampling_max_tokens {high}")
    lonely = algo == "grpo" and args.group_size == 1 and args.loss_type != "no_baseline"
    check(not lonely, "--group_size 1 leaves no group to compare with: every advantage is 0")
    check(not given.resume or not args.overwrite, "--resume continues, --overwrite replaces: give one of them")
    return args

# ---- 2. Prompts ----------------------------------------------------------------------

# r1_zero and question_only are the handout's. tiny is r1_zero without the preamble: a
# base model of 0.7M parameters cannot read instructions, and a long prompt costs time.
PROMPTS = {"question_only": "{question}", "tiny": "User: {question}\nAssistant: <think>"}
PROMPTS["r1_zero"] = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n" + PROMPTS["tiny"])

def format_prompt(name, question):
    """The named prompt with the question in it."""
    check(name in PROMPTS, f"--prompt {name} is none of {', '.join(PROMPTS)}")
    return PROMPTS[name].replace("{question}", question)

# ---- 3. Grading: the reward is the objective, so a wrong reward is trained towards ---

DEADLINE, WORKER_MEMORY = 3.0, 2 << 30  # seconds and bytes that grading one response may take
CHARACTERS = str.maketrans({"−": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
                            "∪": r"\cup ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "∈": r"\in "})
UNIT = r"(?!(and|or|not|more|sin|cos|log|thousand|\w*illion|dozen)\b)([a-zA-Z]{2,}|m)\b[a-zA-Z\s,'./-]*(\^\s*\{?\d\}?)?"
REWRITES = [  # what math-verify misreads -> what it reads; the order matters
    # \[ \boxed{5} \] -> 5
    (r"^(\\[(\[]|\$|\s)+|(\\[)\]]|\$|\s)+$", ""), (r"^\\f?boxed\{(.*)\}$", r"\1"),
    # $5, 5\%, 5^\circ -> 5;  1,\!000 -> 1,000
    (r"\\?[$%°]|\^\s*(\\circ|\{\s*\\circ\s*\})", ""), (r"\{,\}|,\s*\\!", ","),
    # 1,234,567 -> 1234567, but not where a bracket begins: (1,234) is a pair
    (r"(?<![\d,.(\[])(?<![(\[,]-)(?<!\\\{)(\d{1,3}),(\d{3})(?:,(\d{3}))?(?![\d,])", r"\1\2\3"),
    # spaces, \left, ~ and \approx -> a space;  x \in [0,1] -> [0,1]
    (r"(?<!\\)\\[,;:! ]|~|\\(left|right|quad|approx)(?![a-z])|^\s*[a-z]\s*\\in(?![a-z])", " "),
    # pi, infinity, i, >= and <=, as they are typed
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "), (r"infinity", r"\\infty "),
    (r"(?<![\\a-zA-Z])i(?![a-zA-Z])", " I "), (r">=", r"\\ge "), (r"<=", r"\\le "),
    # √2 and sqrt(2) -> \sqrt{2}
    (r"(?:√|(?<!\\)sqrt)\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}"),
    # \frac12 -> \frac{1}{2};  1 1/2 -> 1\frac{1}{2}
    (r"\\[dt]?frac\s*(\d|\\pi)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    # 1e3 -> 1\times 10^{3};  506_{7} -> 506_7
    (r"(\d)e([+-]?\d+)$", r"\1\\times 10^{\2}"), (r"(\d)_\{(\d+)\}", r"\1_\2"),
    # \text{even} -> even;  5 cm^2 -> 5
    (r"\\(text\w*|mbox|math(rm|bf|it)|operatorname)\s*\{([^{}]*)\}", r" \3 "),
    (rf"^(\s*[-+]?[\d.,/]+|.*\}}|.*\\pi)\s+{UNIT}\s*$", r"\1"),
    # 1 and 2 -> 1, 2;  1; 2 -> 1, 2;  5. -> 5
    (r"\s*,?\s+(and|or)\s+|\s*;\s*|\s*,\s+", ", "), (r"[\s.]*$", ""),
    # 0.5 -> \frac{05}{10}, exactly
    (r"(?<![.\d])(\d*)\.(\d+)(?![.\d])", lambda m: rf"\frac{{{m[1] + m[2]}}}{{1{'0' * len(m[2])}}}"),
    # \frac{1}{2} alone -> 1/2;  \{1, 2\} -> 1, 2;  a \pm b -> a+b, a-b
    (r"^\s*(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    (r"^\s*\\?\{((?:(?!\\\}).)*)\\?\}$", r"\1"),
    (r"([^,]*)\\(?:pm|mp)(?![a-z])([^,]*)", r"\1+\2, \1-\2")]
UNSAFE_FOR_SYMPY = re.compile("|".join([  # sympy would hang, or math-verify misread it
    # 506_7, 3:5, two numbers, words of four letters, other alphabets
    r"\d ?[_:] ?\d|(?<![_\d])\d+\s+\d|\.\d|(?<![\\a-zA-Z])(?!arc|sqrt|[pb]matrix)[a-zA-Z]{4}|[^\x00-\x7f]",
    # code, sums, integrals, limits, huge powers, large or nested factorials
    r"__|['\"]|<<|\*\*|\\(i*int|sum|prod|lim)(?![a-z])|\^[{( ]*-?(\d+ ?[\^!]|\d{5})|\d{3} ?!|! ?\)+ ?!",
    # a list with an equation whose left side is not just letters
    r",.*[^a-zA-Z =,][^,=]*=|[^a-zA-Z =,][^,=]*=.*,"]))
LATEX = math_verify.LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True))
PARSE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError,
                ValueError, sympy.polys.polyerrors.BasePolynomialError)
logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs whole responses

def last_boxed(text):
    r"""The content of the last \boxed{…}, which may hold braces, or None."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for end, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:end]

def normalize_answer(text):
    r"""An answer in one spelling: normalize_answer(r"$\dfrac12$ cm") == "1/2"."""
    text = text.translate(CHARACTERS)
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.strip()

def word_key(text):
    """For comparing words: no case, no article, no space except between digits."""
    return re.sub(r"^(an?|the) (?=[a-z]{3})|\s(?!\d)|(?<!\d)\s", "", text.casefold())

def bracket_shape(text):
    """The number of commas, and their brackets: math-verify takes (1,2) for 1,2."""
    text = re.sub(r"\([^(),]*\)", "", text)
    return text.count(","), sorted(re.findall(r"([(\[])[^()\[\]]*,[^()\[\]]*([)\]])", text))

def parse_latex(text):
    """The sympy object of a normalised answer, None where its braces do not match."""
    boxed = r"\boxed{%s}" % text.replace(", ", r",\ ")  # 100, 200 would be 100200
    if boxed == r"\boxed{%s}" % last_boxed(boxed):
        return math_verify.parse(boxed, [LATEX], fallback_mode="no_fallback", parsing_timeout=None)[0]

def grade(answer, truth):
    """True where `answer`, the model's, means the same as `truth` (LaTeX or plain)."""
    if max(len(answer), len(truth)) > 400:  # no answer is so long
        return answer.strip() == truth.strip() != ""
    answer, truth = normalize_answer(answer), normalize_answer(truth)
    if "" in (answer, truth):
        return False
    if answer.count("=") != truth.count("="):
        # f(x) = 2x is 2x, but 7 = 2x is not.
        name = r"^\\?[a-zA-Z]+(_\w)?\s*(\([^=]*\))?\s*=\s*"
        answer, truth = re.sub(name, "", answer), re.sub(name, "", truth)
    # Words, or formulas that are spelled alike.
    if word_key(answer) == word_key(truth):
        return True
    # Whole numbers and fractions, exactly.
    if all(re.fullmatch(r"[+-]?\d+(/0*[1-9]\d*)?", text) for text in (answer, truth)):
        return Fraction(answer) == Fraction(truth)
    if any(UNSAFE_FOR_SYMPY.search(text) for text in (answer, truth)):
        return False
    relations = [re.search(r"[<>]|\\[lg]e", text) is not None for text in (answer, truth)]
    # Both shape and kind agree, or neither does, as with x > 5 and (5,\infty).
    if (bracket_shape(answer) == bracket_shape(truth)) != (relations[0] == relations[1]):
        return False
    try:
        if "=" in answer + truth and "," not in answer + truth:
            # Is one equation a multiple of the other?
            answer, truth = (parse_latex("{}-({})".format(*text.split("=", 1))) for text in (answer, truth))
            ratio = sympy.cancel(answer / truth)
            return bool(ratio.is_number and ratio.is_nonzero)
        answer, truth = parse_latex(answer), parse_latex(truth)
        values = [v for v in (answer, truth) if isinstance(v, sympy.Expr)]
        if len(values) == 2 and all(v.is_number and v.is_finite for v in values):
            # Other numbers: the same to 40 decimal places.
            return bool(abs(sympy.N(answer - truth, 50)) < 1e-40)
        # Formulas, sets, intervals, tuples, matrices.
        return math_verify.verify(
            truth, answer, allow_set_relation_comp=True, timeout_seconds=None)
    except PARSE_ERRORS:
        return False

def extract_answer(response):
    """"12" of " 7+5=12 </think> <answer> 12 </answer>"; else None."""
    if any(response.count(tag) != 1 for tag in ("</think>", "<answer>", "</answer>")):
        return None
    match = re.search(r"</think> <answer>(.*)</answer>\s*$", response, re.DOTALL)
    return match[1].strip() if match else None

def reward_dict(answer, truth):
    """The rewards of an answer; None: there is none. [R1] 2.2.2, no format bonus."""
    right = float(answer is not None and grade(answer, truth))
    return {"reward": right, "format_reward": float(answer is not None), "answer_reward": right}

def r1_zero_reward_fn(response, ground_truth):
    """Stricter than CS336's grader: each tag once; (1, 2) is not [1, 2] or (2, 1)."""
    return reward_dict(extract_answer(response), ground_truth)

def question_only_reward_fn(response, ground_truth):
    r"""The same for the bare question: the answer is in the last \boxed{}."""
    return reward_dict(last_boxed(response), ground_truth)

def reward_fn_and_stop(prompt_name):
    """(reward function, stop string); None: a response ends with EOS alone."""
    if prompt_name == "question_only":
        return question_only_reward_fn, None
    return r1_zero_reward_fn, "</answer>"

def start_worker():
    """Bounds a new worker's memory. It ignores signals and dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches every process,
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # and so does a scheduler's SIGTERM
    if sys.platform == "linux":
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

@functools.cache
def grading_pool():
    """Worker processes: one in which sympy hangs is killed."""
    pebble.CONSTS.term_timeout = 0.1  # seconds from SIGTERM, which workers ignore, to SIGKILL
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = max(1, min(os.cpu_count() // WORLD_SIZE, 16))
    pool = pebble.ProcessPool(workers, initializer=start_worker, context=context)
    atexit.register(lambda: (pool.stop(), pool.join()))
    return pool

def grade_responses(reward_fn, responses, truths):
    """(reward dicts, how many responses could not be graded: those score 0)."""
    def grade_share(pairs):
        if not grading_pool().active:
            grading_pool.cache_clear()
        futures = [grading_pool().schedule(reward_fn, args=pair, timeout=DEADLINE) for pair in pairs]
        results = [repr(f.exception()) if f.exception() else f.result() for f in futures]
        # A worker that died while idle has ended the pool: start another, grade again.
        return results if grading_pool().active else grade_share(pairs)

    pickle.dumps(reward_fn)  # an error here says why it cannot go to a worker
    results = map_over_ranks(grade_share, list(zip(responses, truths, strict=True)))
    errors = [result for result in results if isinstance(result, str)]
    hopeless = len(errors) == len(results) >= 32
    check(not hopeless, f"the reward function failed on all responses, first with {errors[:1]}")
    return [reward_dict(None, "") if isinstance(r, str) else r for r in results], len(errors)

# ---- 4. Data: JSON lines in, dicts out -----------------------------------------------

def read_jsonl(path, required):
    """The dicts of a JSON-lines file, with their "line". Each needs text under all keys
    of one tuple in `required`; an "answer" may be empty."""
    records, wanted = [], " or ".join(" and ".join(map(repr, keys)) for keys in required)
    for i, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {i}: not valid JSON ({error})") from error
        found = record.items() if isinstance(record, dict) else []
        texts = [k for k, text in found if isinstance(text, str) and (text.strip() or k == "answer")]
        complete = any(set(keys) <= set(texts) for keys in required)
        check(complete, f"{path}, line {i}: needs non-empty strings under {wanted}")
        records.append(record | {"line": i})
    check(records, f"{path}: holds no records")
    return records

def load_problems(run, path, at_least=1):
    """Problems with "prompt_ids"; those without an answer are left out. run: see Run,
    section 10."""
    problems, unusable, tokens = [], [], run.args.sampling_max_tokens
    most = getattr(run.model.config, "max_position_embeddings", None) or math.inf
    records = read_jsonl(path, [("problem", "answer")])
    prompts = [format_prompt(run.args.prompt, record["problem"]) for record in records]
    for problem, ids in zip(records, run.tokenizer(prompts)["input_ids"]):
        problem["prompt_ids"] = ids
        check(len(ids) + tokens <= most, f"{path}, line {problem['line']}: a prompt of {len(ids)} tokens "
              f"and --sampling_max_tokens {tokens} exceed the model's context of {most}")
        (problems if normalize_answer(problem["answer"]) else unusable).append(problem)
    if unusable:
        print(f"{path}: left out line {', '.join(str(p['line']) for p in unusable)}: no answer")
    check(len(problems) >= at_least, f"{path}: {len(problems)} usable problems, a step needs {at_least}")
    return problems

def load_traces(path, prompt_name, reward_fn):
    """Traces {"prompt", "response"}; a "problem" gets the prompt that RL uses."""
    traces = read_jsonl(path, [("problem", "response"), ("prompt", "response")])
    for trace in traces:
        check(reward_fn(trace["response"], "")["format_reward"],
              f"{path}, line {trace['line']}: the response has not the answer format of {prompt_name}")
        trace.setdefault("prompt", format_prompt(prompt_name, trace.get("problem", "")))
    return traces

# ---- 5. Tokens and masks -------------------------------------------------------------

def batch_token_ids(prompt_ids, response_ids, pad_id):
    """Pads B prompts and responses (lists of ids) to (B, T), T = longest prompt +
    response, less 1 for the shift:

        prompt [5, 6], response [7, 8]     input_ids      5  6  7
                                           labels         6  7  8
                                           response_mask  0  1  1     the labels that the policy chose

    The mask comes from the lengths: a pad id is a token like any other. Attention is
    causal: no real token looks at the padding on its right, so no attention mask is
    needed.
    """
    pairs = list(zip(prompt_ids, response_ids, strict=True))
    ids = [torch.tensor(prompt + response) for prompt, response in pairs]
    mask = [torch.arange(len(prompt + response)) >= len(prompt) for prompt, response in pairs]
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)  # (B, T + 1)
    mask = pad_sequence(mask, batch_first=True)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}

def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """batch_token_ids of texts, tokenised apart: no token spans their border."""
    prompt_ids = tokenizer(prompt_strs)["input_ids"]
    output_ids = tokenizer(output_strs, add_special_tokens=False)["input_ids"]
    pad_id = tokenizer.pad_token_id
    return batch_token_ids(prompt_ids, output_ids, tokenizer.eos_token_id if pad_id is None else pad_id)

# ---- 6. Log-probs and entropy: what the policy thinks of each token ------------------

def compute_entropy(logits):
    """Entropy of the next token in nats: (B, T, V) -> (B, T), float32."""
    p = logits.float().softmax(dim=-1)
    return torch.special.entr(p).sum(dim=-1)  # entr(p) = −p log p

def get_response_log_probs(model, input_ids, labels, return_token_entropy=False, temperature=1.0):
    """log π(label | tokens before it), (B, T) in nats, at prompt and padding, too: mask
    them in the loss. The definition; training uses get_packed_log_probs, the same for
    less work."""
    logits = model(input_ids, use_cache=False).logits.float() / temperature  # (B, T, V)
    log_probs = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if not return_token_entropy:
        return {"log_probs": log_probs}
    return {"log_probs": log_probs, "token_entropy": compute_entropy(logits.detach())}

def pack(pairs, device):
    """Packs B pairs (prompt ids, response ids) into M tokens without padding, a prompt
    once for all of its responses, though each is trained on as prompt + response:

        prompt [5, 6] with responses [7, 8] and [9, 4, 2]
        packed: the tokens that go through the model          5  6  7  9  4
        rows: each row's tokens, as indices into packed       [0, 1, 2, -], [0, 1, 3, 4]
        places: each packed token's index in rows, flattened  0  1  2  6  7

    Attention alone sees rows; all else works token by token. A response's last token
    predicts nothing: left out. Returns the model's arguments and the packed indices
    that predict a response token."""
    ids, row_and_position, rows, predictors, prompts = [], [], [], [], {}
    for i, (prompt, response) in enumerate(pairs):
        known = prompts.get(tuple(prompt), [])  # packed indices of this prompt, if any
        start = len(ids)
        ids += (prompt + response[:-1])[len(known):]
        row = known + list(range(start, len(ids)))
        prompts[tuple(prompt)] = row[:len(prompt)]
        # The token before it predicts a response token.
        predictors += row[len(prompt) - 1:][:len(response)]
        row_and_position += [(i, t) for t in range(len(known), len(row))]
        rows.append(torch.tensor(row))
    rows = pad_sequence(rows, batch_first=True)             # (B, longest)
    row_of, positions = torch.tensor(row_and_position).T    # (M,)
    packed = {"input_ids": torch.tensor([ids]), "position_ids": positions[None], "rows": rows,
              "places": row_of * rows.shape[1] + positions}
    packed = {name: tensor.to(device) for name, tensor in packed.items()}
    return packed, torch.tensor(predictors, device=device)

def use_flash_attn(query):
    """Whether FlashAttention computes this: its kernels are for GPUs and bfloat16."""
    return flash_attn_func and query.is_cuda and query.dtype == torch.bfloat16

def packed_attention(module, query, key, value, *_, scaling=None, rows=None, places=None, cache=None, **more):
    """Attention as transformers calls it in each layer: of packed tokens with rows,
    (1, heads, M, D) -> (1, M, heads, D); without rows of whole sequences, (B, heads,
    T, D), or, given a PrefixCache, of each response's newest token."""
    other = [name for name in ("softcap", "s_aux") if more.get(name) is not None]
    check(not other, f"--model has attention with {other}, which section 6 does not compute")
    # Autocast leaves queries and keys, which have been rotated, in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if rows is None and cache is not None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None
    if rows is not None:  # -> (B, heads, longest, D)
        query, key, value = (tensor[0].transpose(0, 1).index_select(0, rows.flatten())
                             .unflatten(0, rows.shape).transpose(1, 2) for tensor in (query, key, value))
    if cache is not None:  # sampling begins: these are the prompts
        cache.prompts[module.layer_idx] = key, value
    if use_flash_attn(query):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = flash_attn_func(query, key, value, softmax_scale=scaling, causal=True)
    else:
        groups = query.shape[1] // key.shape[1]  # query heads that share a key head
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        # On a CPU the backward pass in bfloat16 is slow.
        wide = torch.float32 if query.device.type == "cpu" else query.dtype
        with torch.autocast(query.device.type, enabled=False):
            output = F.scaled_dot_product_attention(
                query.to(wide), key.to(wide), value.to(wide), is_causal=True, scale=scaling)
        output = output.to(query.dtype).transpose(1, 2)  # (B, longest, heads, D)
    if rows is not None:  # -> (1, M, heads, D)
        output = output.flatten(0, 1).index_select(0, places)[None]
    return output, None

AttentionInterface.register("packed", packed_attention)
torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew for each new shape
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}  # that ChunkedLogProbs holds at a time

def head_logits(hidden, head):
    """hidden · headᵀ, (n, V), float32: bfloat16 would round a 30 by up to 0.06."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).float()

class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden · headᵀ)[label] and its entropy, without ever holding all
    logits, by far the largest tensor of a run. The backward pass computes them again:
    ∂ log p(label) / ∂ logit = 1[label] − p."""

    @staticmethod
    def chunks(hidden, head):
        """Yields slices and their logits, (chunk, V)."""
        size = max(1, MAX_LOGITS[hidden.device.type] // len(head))
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            yield chunk, head_logits(hidden[chunk], head)

    @staticmethod
    def forward(ctx, hidden, head, labels):
        """(n, D), (V, D), (n,) -> log-probs (n,), and entropies without gradient."""
        normalizers, label_logits, entropies = torch.empty(3, len(hidden), device=hidden.device)
        for chunk, logits in ChunkedLogProbs.chunks(hidden, head.to(hidden.dtype)):
            label_logits[chunk] = logits.gather(1, labels[chunk, None]).squeeze(1)
            largest = logits.amax(dim=1)
            exp = logits.sub_(largest[:, None]).exp()
            total = exp.sum(dim=1)  # p = exp / total
            normalizers[chunk] = largest + total.log()
            entropies[chunk] = total.log() - exp.mul_(logits).sum(dim=1) / total
        ctx.save_for_backward(hidden, head, labels, normalizers)
        ctx.mark_non_differentiable(entropies)
        return label_logits - normalizers, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, labels, normalizers = ctx.saved_tensors
        cast_head = head.to(hidden.dtype)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for chunk, logits in ChunkedLogProbs.chunks(hidden, cast_head):
            p = logits.sub_(normalizers[chunk, None]).exp_()
            grad_logits = p.mul_(-grad[chunk, None])  # −p, and 1 − p at the label
            grad_logits.scatter_add_(1, labels[chunk, None], grad[chunk, None])
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, cast_head, out=grad_hidden[chunk])
            if hidden.dtype == head.dtype:
                grad_head.addmm_(grad_logits.T, hidden[chunk])
            else:  # sums stay float32
                grad_head += grad_logits.T @ hidden[chunk]
        return grad_hidden, grad_head, None

def get_packed_log_probs(model, pairs, temperature=1.0, dtype="float32"):
    """get_response_log_probs of B pairs (prompt ids, response ids) at the responses'
    tokens alone, with matrix products in `dtype`. Returns log-probs, entropies and
    their mask, (B, longest response)."""
    device, dtype = model.device, getattr(torch, dtype)
    packed, predictors = pack(pairs, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = model.base_model(use_cache=False, **packed).last_hidden_state[0]
    # (n, D) for the n response tokens. Dividing hidden divides the logits.
    hidden = hidden.index_select(0, predictors) / temperature
    labels = torch.tensor([token for _, response in pairs for token in response], device=device)
    values = ChunkedLogProbs.apply(hidden.to(dtype), model.get_output_embeddings().weight, labels)
    ones = [torch.ones(len(response), dtype=torch.bool) for _, response in pairs]
    mask = pad_sequence(ones, batch_first=True).to(device)
    log_probs, entropy = (torch.zeros(mask.shape, device=device).masked_scatter(mask, v) for v in values)
    return log_probs, entropy, mask

# ---- 7. Losses: which tokens to push, and how hard -----------------------------------

# RL maximises the expected reward E[r] of a response that π samples. Its gradient is
# E[r · Σ ∇ log π(token)], over the tokens of the response: sample, grade, and push
# every token of a response up in proportion to the response's reward (REINFORCE). To
# subtract from r what does not depend on the response changes nothing on average and
# takes noise away. The mean reward of G responses to the same prompt is such a
# baseline, but for a factor: the response is one of the G, which makes the gradient 1 −
# 1/G of the true one. r less the baseline is the advantage A. SFT pushes given tokens
# up as if each had A = 1; expert iteration does so with its own right responses, which
# is r with no baseline.

def masked_normalize(tensor, mask, normalize_constant, dim=None):
    """Sum of the elements under the mask over `dim` (all if None), divided by a
    constant."""
    # Not tensor * mask: a masked inf would become nan.
    return torch.where(mask.bool(), tensor, 0).sum(dim) / normalize_constant

def masked_mean(tensor, mask, dim=None):
    """Mean of the elements under the mask over `dim` (all if None); nan where the mask
    is empty."""
    return torch.where(mask.bool(), tensor, 0).sum(dim) / mask.bool().sum(dim)

def sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    """Backward of the negative log-likelihood of the responses. Its gradient pushes
    every response token up equally.

    Args: policy_log_probs and response_mask (B, T). gradient_accumulation_steps:
    microbatches per update; with b of the n sequences of a train batch pass n / b, and
    the microbatches' losses add up to the train batch's mean.
    Returns (loss, metadata): the scaled loss that was back-propagated, a scalar, and
    the number of response tokens.
    """
    per_sequence = masked_normalize(-policy_log_probs, response_mask, normalize_constant, dim=-1)  # (B,)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum()}

def compute_group_normalized_rewards(reward_fn, rollout_responses, repeated_ground_truths, group_size, advantage_eps,
                                     normalize_by_std):
    """Grades N responses and compares each with the G responses to the same prompt,
    which stand next to each other.

        A = (r − mean of the group) / (standard deviation of the group + advantage_eps)     [GRPO] section 4.1.2
        A = r − mean of the group                                      [DrGRPO], without normalize_by_std

    The standard deviation is the unbiased one (n − 1). A group of equal rewards has
    advantage 0: it says nothing about what to prefer. Returns (advantages (N,),
    raw_rewards (N,), metadata): the mean rewards, the numbers of groups of equal
    rewards and of failed gradings, and "rewards", the N reward dicts. Raises ValueError
    if N is no multiple of G, or for the standard deviation of a group of one.
    """
    if group_size < 1 or len(rollout_responses) % group_size or (normalize_by_std and group_size == 1):
        raise ValueError(f"{len(rollout_responses)} responses cannot be normalised in groups of {group_size}")
    rewards, failures = grade_responses(reward_fn, rollout_responses, repeated_ground_truths)
    raw_rewards = torch.tensor([reward["reward"] for reward in rewards])
    groups = raw_rewards.view(-1, group_size)  # (prompts, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages /= groups.std(dim=1, keepdim=True) + advantage_eps
    # The mean of equal floats can be off by an ulp and their std is 0, so these
    # advantages are set to 0, not computed.
    equal = groups.amax(dim=1) == groups.amin(dim=1)
    advantages[equal] = 0.0
    metadata = {f"{key}_mean": statistics.fmean(reward[key] for reward in rewards) for key in rewards[0]}
    metadata |= {"equal_groups": int(equal.sum()), "grading_failures": failures, "rewards": rewards}
    return advantages.flatten(), raw_rewards, metadata

def require_column(weights):
    """Raises ValueError unless the per-sequence weights are (B, 1): (B,) would spread
    over the tokens."""
    if weights.shape[1:] != (1,):
        raise ValueError(f"rewards and advantages are (B, 1), not {tuple(weights.shape)}")

def compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    """−A · log π per token, (B, T), of advantages (B, 1): its gradient is REINFORCE's,
    the score function weighted by the advantage."""
    require_column(raw_rewards_or_advantages)
    return -raw_rewards_or_advantages * policy_log_probs

def compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    """−min(ρA, clip(ρ, 1−ε, 1+ε)A) per token, (B, T), with ρ = π/π_old ([PPO] equation
    7, [GRPO] equation 3). Where the clipped branch decides, the gradient is zero: the
    policy has already moved far enough on this token.
    Args: advantages (B, 1); both log-probs (B, T), the old ones without a gradient;
    cliprange ε.
    Returns (loss, metadata): "clipped" (B, T) is true where the clipped branch
    decided."""
    require_column(advantages)
    ratio = torch.exp(policy_log_probs - old_log_probs)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(unclipped, clipped), {"clipped": clipped.detach() < unclipped.detach()}

def compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None, old_log_probs=None,
                                 cliprange=None):
    """The per-token loss (B, T) of the given type, and its metadata.

        no_baseline               −r · log π                     REINFORCE with the raw reward
        reinforce_with_baseline   −A · log π                     the group's mean as the baseline: less noise
        grpo_clip                 −min(ρA, clip(ρ, 1−ε, 1+ε)A)   several updates per rollout batch, kept close to π_old
        grpo_no_clip              −ρA                            the same without the bound

    Raises ValueError for an unknown type, a missing argument, and rewards or advantages
    that are not (B, 1).
    """
    needs = {"no_baseline": {"raw_rewards": raw_rewards}, "reinforce_with_baseline": {"advantages": advantages},
             "grpo_clip": {"advantages": advantages, "old_log_probs": old_log_probs, "cliprange": cliprange},
             "grpo_no_clip": {"advantages": advantages, "old_log_probs": old_log_probs}}
    if loss_type not in needs:
        raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(needs)}")
    missing = [name for name, value in needs[loss_type].items() if value is None]
    if missing:
        raise ValueError(f"loss_type {loss_type} needs {', '.join(missing)}")
    if loss_type in ("no_baseline", "reinforce_with_baseline"):
        weights = raw_rewards if loss_type == "no_baseline" else advantages
        return compute_naive_policy_gradient_loss(weights, policy_log_probs), {}
    cliprange = cliprange if loss_type == "grpo_clip" else math.inf
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)

def importance_weights(old_log_probs, sampler_log_probs, cap):
    """min(π_old / π_sampler, cap) per token, (B, T): truncated importance sampling
    ([IMPALA] section 4.1, [TIS]). A sampler with the trainer's weights but other
    kernels or precision samples from a slightly other distribution. The ratio makes the
    gradient's expectation right again, and the cap bounds what it adds in variance."""
    return (old_log_probs - sampler_log_probs).exp().clamp(max=cap)

def grpo_microbatch_train_step(
        policy_log_probs, response_mask, gradient_accumulation_steps, loss_type, raw_rewards=None, advantages=None,
        old_log_probs=None, cliprange=None, normalize_constant=None, token_weights=None):
    """Backward of the policy-gradient loss: per token, then per response, then the mean
    over the batch.

    A response's loss is its mean over its tokens ([GRPO] equation 3) or, given a
    normalize_constant, its sum divided by that constant, which weighs every token alike
    whatever the length of its response ([DrGRPO]). An empty response counts as a loss
    of 0. token_weights (B, T) multiply the per-token loss: see importance_weights.
    Other arguments and returns: as in sft_microbatch_train_step and
    compute_policy_gradient_loss.
    """
    per_token, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange)
    if token_weights is not None:
        per_token = per_token * token_weights
    if normalize_constant is None:
        per_sequence = masked_mean(per_token, response_mask, dim=-1)  # (B,)
        per_sequence = torch.where(response_mask.bool().any(dim=-1), per_sequence, 0)  # an empty mean is 0/0
    else:
        per_sequence = masked_normalize(per_token, response_mask, normalize_constant, dim=-1)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), metadata

# ---- 8. Sampling ---------------------------------------------------------------------

def seed_for(seed, step, purpose):
    """A seed for one draw. So a checkpoint holds no state of a random generator."""
    return int(hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).hexdigest()[:14], 16)

@dataclasses.dataclass
class Rollout:
    """One sampled response."""
    prompt_ids: list        # token ids
    response_ids: list      # the sampled ids with EOS; training uses these
    log_probs: list         # of these ids when they were sampled, nats
    text: str               # up to the stop string's end; grading uses this
    finish_reason: str      # "stop": ended by itself; "length": cut

class PrefixCache:
    """Keys and values of P prompts, each once, and of n responses to each."""

    def __init__(self, n, prompt_lengths):
        self.n, self.t = n, 0       # t: the place of the responses' newest token
        self.prompts = {}           # layer: keys and values, (P, kv_heads, longest, D)
        self.responses = {}         # layer: the same, (2, P, kv_heads, n, room, D)
        columns = torch.arange(int(prompt_lengths.max()), device=prompt_lengths.device)
        self.padding = columns >= prompt_lengths.view(-1, 1, 1, 1, 1)   # (P, 1, 1, 1, longest)

    def attend(self, layer, query, key, value, scaling):
        """Attention of the newest tokens: (1, heads, P·n, D) -> (1, P·n, heads, D)."""
        prompt_keys, prompt_values = self.prompts[layer]
        n_prompts, kv_heads, longest, width = prompt_keys.shape
        # (P, kv_heads, n, heads that share a key head, D)
        query, key, value = (tensor.view(kv_heads, -1, n_prompts, self.n, width).permute(2, 0, 3, 1, 4)
                             for tensor in (query, key, value))
        new = torch.stack([key, value])
        if self.t % 64 == 0:  # make room for 64 more tokens
            self.responses[layer] = F.pad(self.responses.get(layer, new[..., :0, :]), (0, 0, 0, 64))
        self.responses[layer][..., self.t:self.t + 1, :] = new
        keys, values = self.responses[layer][..., :self.t + 1, :]
        # One product for all responses to a prompt, one softmax over both parts.
        scores = (query.flatten(2, 3) @ prompt_keys.mT).unflatten(2, query.shape[2:4])
        scores = torch.cat([scores.masked_fill_(self.padding, -math.inf), query @ keys.mT], dim=-1)
        prompt_weights, weights = scores.mul_(scaling).softmax(dim=-1).tensor_split([longest], dim=-1)
        output = (prompt_weights.flatten(2, 3) @ prompt_values).unflatten(2, query.shape[2:4])
        return (output + weights @ values).permute(0, 2, 1, 3, 4).reshape(1, n_prompts * self.n, -1, width)

    def drop_finished(self, live):
        """Drops finished responses if that frees a quarter of the rows. All prompts keep
        as many as the one with most live ones. live (P·n,). Returns the rows to keep."""
        live = live.view(-1, self.n)
        prompts = live.any(dim=1).nonzero()[:, 0]  # (P',)
        most = int(live.sum(dim=1).max())
        if not self.responses or len(prompts) * most > 0.75 * live.numel():
            return slice(None)  # all
        # Of each prompt its live responses, then finished ones to fill up.
        columns = live[prompts].sort(dim=1, descending=True, stable=True).indices[:, :most]
        for layer, room in self.responses.items():
            self.prompts[layer] = [tensor[prompts] for tensor in self.prompts[layer]]
            self.responses[layer] = room.transpose(2, 3)[:, prompts[:, None], columns].transpose(2, 3)
        kept = prompts[:, None] * self.n + columns  # (P', n')
        self.n, self.padding = most, self.padding[prompts]
        return kept.flatten()

class TorchSampler:
    """Samples with the training model, or with a copy of it in another dtype."""

    def __init__(self, tokenizer, batch_size, dtype):
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.dtype, self.model = getattr(torch, dtype), None

    def load_weights(self, model):
        """The weight sync. Returns what it samples with now, {name: tensor}."""
        if model.dtype == self.dtype:
            self.model = model
        else:
            if self.model is None:
                with model.device:
                    self.model = AutoModelForCausalLM.from_config(model.config, dtype=self.dtype).eval()
            self.model.load_state_dict(model.state_dict())
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """n Rollouts for each prompt (a list of ids), those of one prompt together.
        seeds: one per prompt; temperature 0: greedy; stop: a string or None."""
        size = max(1, self.batch_size // n)
        if len(prompt_ids) > size:
            return [rollout for i in range(0, len(prompt_ids), size) for rollout in self.generate(
                prompt_ids[i:i + size], n, seeds[i:i + size], temperature, max_tokens, min_tokens, stop)]
        device, eos = self.model.device, self.tokenizer.eos_token_id
        completes = stop and StopStringCriteria(self.tokenizer, [stop])
        # For each response a uniform number per token: these depend on its prompt's
        # seed and its number among the prompt's responses, not on the batch.
        draws = [torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        draws = torch.cat(draws).to(device).clamp(max=1 - 1e-6)
        ids, log_probs = torch.zeros_like(draws, dtype=torch.long), torch.zeros_like(draws)
        rows = torch.arange(len(draws), device=device)  # the response in each row
        lengths = torch.zeros_like(rows)  # of responses; 0: not ended
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompt_ids], device=device)
        # 1. Each prompt goes through the model once; pack drops the response [0].
        cache = PrefixCache(n, prompt_lengths)
        packed, last = pack([(prompt, [0]) for prompt in prompt_ids], device)
        hidden = self.model.base_model(use_cache=False, cache=cache, **packed).last_hidden_state[0]
        hidden = hidden[last].repeat_interleave(n, dim=0)   # (rows, D)
        head = self.model.get_output_embeddings().weight    # (V, D)
        for t in range(max_tokens):
            # 2. Draw token t: where the uniform number falls in the cumulated distribution.
            logits = head_logits(hidden, head) / (temperature or 1.0)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)  # before EOS is banned
            if t < min_tokens:
                logits[:, eos] = -math.inf
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)  # (rows, 1)
            else:
                # In float32 a GPU's sum of 150,000 entries would not rise at each.
                cumulated = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
                token = torch.searchsorted(cumulated, draws[rows, t:t + 1] * cumulated[:, -1:], right=True)
            ids[rows, t:t + 1] = token
            log_probs[rows, t:t + 1] = logits.gather(1, token) - normalizer
            # 3. A response ends with EOS or the stop string.
            ends = token[:, 0] == eos
            if stop and t + 1 >= min_tokens:
                ends |= completes(ids[rows, max(0, t + 1 - len(stop)):t + 1], None)
            lengths[rows[ends & (lengths[rows] == 0)]] = t + 1
            if t + 1 == max_tokens or lengths.all():
                break
            # 4. Go on with the others.
            kept = cache.drop_finished(lengths[rows] == 0)
            rows, token = rows[kept], token[kept]
            positions = prompt_lengths[rows // n] + t
            cache.t = t
            hidden = self.model.base_model(token.T, position_ids=positions[None], use_cache=False,
                                           cache=cache).last_hidden_state[0]
        rollouts = []
        for i, length in enumerate(lengths.tolist()):
            response = ids[i, :length or max_tokens].tolist()
            text = self.tokenizer.decode(response, skip_special_tokens=True)
            if length and response[-1] != eos:
                text = text[:text.rindex(stop) + len(stop)]  # the last token may go on
            rollouts.append(Rollout(prompt_ids[i // n], response, log_probs[i, :len(response)].tolist(),
                                    text, "stop" if length else "length"))
        return rollouts

class VLLMSampler:
    """Samples with vLLM 0.32.0 in this process."""

    def __init__(self, args, tokenizer):
        self.tokenizer, self.sleeps, on_cpu = tokenizer, args.vllm_sleep, args.device == "cpu"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights go over in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # leave training its threads
        try:
            import vllm
            self.llm = vllm.LLM(
                args.model, dtype=args.dtype, enable_sleep_mode=self.sleeps,
                gpu_memory_utilization=args.gpu_memory_utilization,
                logprobs_mode="processed_logprobs",  # of the distribution sampled from
                generation_config="vllm",  # not the model's own top-k
                enable_chunked_prefill=False if on_cpu else None,  # it cannot rewind a generator there
                enforce_eager=on_cpu,  # compiling costs a minute there
                distributed_executor_backend="external_launcher" if WORLD_SIZE > 1 else None)
            self.llm.generate("1", vllm.SamplingParams(max_tokens=1), use_tqdm=False)
        except (ImportError, AssertionError, ValueError, RuntimeError, OSError) as error:
            raise UserError(f"vLLM cannot serve {args.model}: {short_message(error)}; see --gpu_memory_utilization "
                            "(CPU: VLLM_CPU_KVCACHE_SPACE), pip install vllm==0.32.0, --sampler torch") from error

    def load_weights(self, model):
        """The weight sync, in memory. Returns what it samples with now."""
        self.llm.wake_up(tags=["weights"])  # first: it would undo the sync; no-op if awake
        try:
            weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if model.device.type == "cpu" and model.config.tie_word_embeddings:
                # There vLLM multiplies by a packed copy of the head: pack it again.
                self.llm.apply_model(
                    lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        except (AttributeError, TypeError, NotImplementedError) as error:
            raise UserError(f"the weight sync needs vllm==0.32.0: {short_message(error)}") from error
        self.llm.wake_up(tags=["kv_cache"])
        check(self.llm.reset_prefix_cache(), "vLLM kept its prefix cache after a weight sync")
        return self.llm.apply_model(lambda model: dict(model.named_parameters()))[0]

    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """As TorchSampler.generate; each response is a request of its own."""
        from vllm import SamplingParams
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids for _ in range(n)]
        params = [SamplingParams(
            seed=seed_for(seed, i, "request"), temperature=temperature, max_tokens=max_tokens,
            min_tokens=min_tokens, logprobs=0, flat_logprobs=True, stop=stop, include_stop_str_in_output=True,
            stop_token_ids=[self.tokenizer.eos_token_id], ignore_eos=True)  # the model may list more ends
            for seed in seeds for i in range(n)]
        requests = self.llm.generate(prompts, params, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=2)  # drops the weights: each sync brings new ones
        return [Rollout(request.prompt_token_ids, list(output.token_ids), output.logprobs.logprobs,
                        output.text, output.finish_reason)
                for request in requests for output in request.outputs]

def make_sampler(args, tokenizer):
    """The sampler that --sampler names."""
    choice = args.sampler
    if choice == "auto":
        choice = "vllm" if args.device == "cuda" and importlib.util.find_spec("vllm") else "torch"
        print(f"sampler {choice} (--sampler chooses; vllm is for a GPU and has to be installed)")
    if choice == "vllm":
        return VLLMSampler(args, tokenizer)
    return TorchSampler(tokenizer, args.sampler_batch_size, args.dtype)

def pad_log_probs(rollouts):
    """The sampler's log-probs of the responses, (N, longest response)."""
    return pad_sequence([torch.tensor(rollout.log_probs) for rollout in rollouts], batch_first=True)

# A sampler with stale weights raises no error and ruins the run. So its weights are
# compared with the trainer's, and its log-probs up to (mean, max) nats.
GAP_LIMITS = {"float32": (1e-3, 1e-2), "bfloat16": (0.15, math.inf)}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"],    # by vLLM
         "gate_up_proj": ["gate_proj", "up_proj"]}

def check_weights(model, served):
    """UserError unless the weights that load_weights returned are the trainer's, cast
    to their dtype, to the last bit."""
    ours, compared = dict(model.named_parameters()), 0
    for name, own in served.items():
        layer = name.split(".")[-2]
        names = [name] + [name.replace(layer, part) for part in FUSED.get(layer, [])]
        weights = [ours[name] for name in names if name in ours]
        heights = list(map(len, weights))
        total = sum(heights)
        # vLLM pads the vocabulary, and on a CPU it repacks matrices.
        if total and own[:total].shape == (total, *weights[0].shape[1:]):
            parts = zip(own[:total].split(heights), weights)
            same = all(torch.equal(part, weight.to(own.dtype)) for part, weight in parts)
            check(same, f"the sampler has stale or wrong weights: its {name} is not the trainer's")
            compared += 1
    if not compared:
        print("the sampler's weights have other names: only its log-probs are compared")

def check_sampler(run, rollouts, temperature):
    """(mean, max) of |log π − log π_sampler|, in nats; UserError if too large."""
    pairs = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    with torch.no_grad():
        ours, _, mask = get_packed_log_probs(run.model, pairs, temperature, run.args.dtype)
    # While EOS is banned, vLLM's are those of a distribution without it.
    mask[:, :run.args.sampling_min_tokens] = False
    gaps = (ours - pad_log_probs(rollouts).to(ours.device))[mask].abs()
    mean, largest = (gaps.mean().item(), gaps.max().item()) if len(gaps) else (0.0, 0.0)
    # On a GPU vLLM multiplies even float32 in TF32.
    limits = GAP_LIMITS["bfloat16" if run.args.device == "cuda" else run.args.dtype]
    close = mean <= limits[0] and largest <= limits[1]  # false for nan, too
    check(close, f"the sampler has stale or wrong weights: log-probs off by {mean=:.2g} {largest=:.2g} nats")
    return mean, largest

def sample(run, problems, n, step, purpose, temperature):
    """n Rollouts per problem from the policy as it is now, and the problem of each.
    purpose: "train" or "eval", the first part of metrics' names."""
    args = run.args

    def sample_share(numbers):
        prompt_ids = [problems[i]["prompt_ids"] for i in numbers]
        seeds = [seed_for(args.seed, step, f"{purpose} {i}") for i in numbers]
        rollouts = run.sampler.generate(prompt_ids, n, seeds, temperature, args.sampling_max_tokens,
                                        args.sampling_min_tokens, run.stop)
        return [rollouts[i:i + n] for i in range(0, len(rollouts), n)]

    check_weights(run.model, run.sampler.load_weights(run.model))
    rollouts = sum(map_over_ranks(sample_share, range(len(problems))), [])
    if temperature > 0:
        few = rollouts[::n][:max(4, WORLD_SIZE)]  # at least one of each rank's sampler
        mean, largest = check_sampler(run, few, temperature)
        run.log(f"{purpose}/sampler_gap", mean)
        run.log(f"{purpose}/sampler_gap_max", largest)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    run.log(f"{purpose}/length", lengths)
    run.log(f"{purpose}/tokens", sum(lengths))
    run.log(f"{purpose}/truncated", [rollout.finish_reason == "length" for rollout in rollouts])
    return rollouts, [problem for problem in problems for _ in range(n)]

# ---- 9. Evaluation -------------------------------------------------------------------

def lenient_reward_fn(response, ground_truth):
    """1 where the right answer is in the last tag, box or number, in whatever format.
    If accuracy rises and this does not, only the format has improved."""
    end = response[-2000:]
    numbers = re.findall(r"(?<!\d)-?\d(?:[\d,]*\d)?(?:\.\d+)?(?:/\d+)?", end)
    tags = [part.partition("</answer>")[0] for part in end.split("<answer>")[1:]]
    candidates = [*numbers[-1:], *tags[-1:], last_boxed(end)]
    right = float(any(grade(candidate, ground_truth) for candidate in filter(None, candidates)))
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}

def pass_at_k(n, c, k):
    """The unbiased estimate of P(one of k samples is right) from n samples, c of them
    right ([pass@k] eq. 1).

    >>> pass_at_k(n=4, c=1, k=2)        # two of four: 3 of the 6 pairs hold the right one
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def log_generations(run, purpose, step, rollouts, problems, rewards, failures):
    """Logs mean rewards; adds problems, responses and rewards to samples.jsonl."""
    run.log(f"{purpose}/reward", [reward["reward"] for reward in rewards])
    run.log(f"{purpose}/format", [reward["format_reward"] for reward in rewards])
    run.log(f"{purpose}/grading_failures", failures)
    path = Path(run.args.output_dir, "samples.jsonl") if RANK == 0 else os.devnull
    with open(path, "a", encoding="utf-8") as file:
        for rollout, problem, reward in zip(rollouts, problems, rewards, strict=True):
            line = {"step": step, "purpose": purpose, "problem": problem["problem"],
                    "response": rollout.text, "answer": problem["answer"], **reward,
                    "length": len(rollout.response_ids), "finish_reason": rollout.finish_reason}
            file.write(json.dumps(line) + "\n")

def evaluate(run, n, step):
    """Samples n responses to each validation problem, grades and logs them."""
    rollouts, repeated = sample(run, run.val_problems, n, step, "eval", run.args.eval_temperature)
    texts, truths = [r.text for r in rollouts], [problem["answer"] for problem in repeated]
    rewards, failures = grade_responses(run.reward_fn, texts, truths)
    log_generations(run, "eval", step, rollouts, repeated, rewards, failures)
    right = torch.tensor([reward["answer_reward"] for reward in rewards]).view(-1, n)
    run.log("eval/accuracy", right)     # (problems, n)
    # The error over problems: responses to the same one are not independent.
    by_problem = right.mean(dim=1)
    run.log("eval/stderr", by_problem.std(correction=0) / math.sqrt(len(right)))
    run.log("eval/problems", len(right))
    for k in [2**i for i in range(9) if 2**i < n] + [n]:
        run.log(f"eval/pass@{k}", [pass_at_k(n, int(c), k) for c in right.sum(dim=1)])
    # What is right in the strict format is right in any.
    wrong = [i for i, reward in enumerate(rewards) if reward["reward"] == 0]
    lenient, _ = grade_responses(lenient_reward_fn, [texts[i] for i in wrong], [truths[i] for i in wrong])
    run.log("eval/lenient", [r["reward"] for r in lenient] + [1.0] * (len(rewards) - len(wrong)))

# ---- 10. A run: metrics, pictures, checkpoints, start, finish, update --------------

@dataclasses.dataclass
class Run:
    """What a run holds in memory. `model` is the policy."""
    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    sampler: object             # TorchSampler or VLLMSampler
    reward_fn: object           # (response, ground truth) -> reward dict
    stop: str                   # the string that ends a response, or None
    checkpoint: Path            # the folder to resume from, or None
    val_problems: list = None
    optimizer: object = None
    last_step: int = 0
    sums: dict = dataclasses.field(default_factory=dict)    # name: (sum, count)
    clock: float = 0.0          # when the last lap ended
    signal: int = 0             # SIGINT or SIGTERM, once it has come
    skipped: int = 0            # updates in a row whose gradient was not finite

    def log(self, name, values, mask=None):
        """Takes numbers or a tensor. A metric is the mean of a step's values."""
        values = torch.as_tensor(values, dtype=torch.float64).detach()
        mask = torch.ones_like(values).bool() if mask is None else mask
        # Sums stay on the device: nothing waits for them.
        total, count = self.sums.get(name, (0, 0))
        self.sums[name] = total + torch.where(mask, values, 0).sum(), count + mask.sum()

    def lap(self, name=None):
        """Logs the seconds since the last call as time/name."""
        before, self.clock = self.clock, time.perf_counter()
        if name:
            self.log(f"time/{name}", self.clock - before)

    def step_metrics(self):
        """{name: mean} of what was logged since the last call, by any rank."""
        every = all_gather({name: (float(total), int(count)) for name, (total, count) in self.sums.items()})
        self.sums, names = {}, dict.fromkeys(name for sums in every for name in sums)
        sums = {name: map(sum, zip(*(one[name] for one in every if name in one))) for name in names}
        return {name: total / count for name, (total, count) in sums.items() if count}

# What a step prints of its metrics, and what is drawn and tabulated of a run.
SHOWN = ("train/reward", "train/format", "train/loss", "train/entropy", "train/clip_fraction",
         "train/length", "train/grad_norm", "train/learning_rate", "time/sampling", "time/training",
         "eval/accuracy", "eval/stderr", "eval/format", "eval/lenient", "eval/length")
PANELS = ("eval/accuracy", "eval/format", "train/reward", "train/entropy", "train/length")
COLUMNS = (*PANELS, "seconds", "tokens", "step to 80%", "seconds to 80%")

def read_metrics(folder):
    """A run's steps, each with the "seconds" and sampled "tokens" up to it."""
    records, seconds, tokens = read_jsonl(Path(folder, "metrics.jsonl"), [()]), 0.0, 0.0
    for record in records:
        seconds += sum(record.get(f"time/{part}", 0) for part in ("sampling", "grading", "training"))
        tokens += record.get("train/tokens", 0)
        record |= {"seconds": seconds, "tokens": tokens}
    return records

def mean_and_spread(values):
    """"0.85 ± 0.02 (2 of 3)": mean ± standard deviation of the known ones."""
    known = [value for value in values if value is not None]
    text = f"{statistics.fmean(known):.4g}" if known else "–"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.2g}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"

def report(runs, picture, against="step"):
    """Draws runs, {label: folders of its seeds}, against "step" or "seconds".
    Returns a Markdown table of how they ended, mean ± spread over seeds."""
    from matplotlib.figure import Figure
    figure, table = Figure(figsize=(7, 10), layout="constrained"), []
    axes = figure.subplots(len(PANELS), sharex=True)
    for i, (label, folders) in enumerate(runs.items()):
        ends = []
        for folder in folders:
            records = read_metrics(folder)
            for axis, name in zip(axes, PANELS):
                known = [record for record in records if name in record]
                axis.plot([r[against] for r in known], [r[name] for r in known], f"C{i}")
                axis.set_title(name, fontsize=9, loc="left")
            # The table's row: the last validation, and the first of at least 80 %.
            validated = [record for record in records if "eval/accuracy" in record]
            first = next((r for r in validated if r["eval/accuracy"] >= 0.8), {})
            times = {"step to 80%": first.get("step"), "seconds to 80%": first.get("seconds")}
            ends.append([(validated[-1] | times).get(name) for name in COLUMNS])
        axes[0].lines[-1].set_label(label)
        table.append([label, *map(mean_and_spread, zip(*ends))])
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel(against)
    figure.savefig(picture, dpi=110)
    table = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *table]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)

def replace_text(path, text):
    """Writes aside and renames, so that the file is never half-written."""
    aside = path.with_name("partial.txt")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)

def save_checkpoint(run, path, step):
    """Writes model, tokenizer and trainer's state: aside, flushed, then renamed."""
    partial, state = path.with_name("partial"), run.optimizer.state_dict()["state"]
    try:
        run.model.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        torch.save({"optimizer": state, "step": step}, partial / "trainer_state.pt")
        for file in (*partial.iterdir(), *path.parent.glob("*.jsonl")):
            with open(file) as opened:
                os.fsync(opened)  # raises if the disk did not take it all
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save raises RuntimeError where the disk is full.
        free = shutil.disk_usage(path.parent).free >> 20
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path} cannot be written ({free} MiB free): {short_message(error)}") from error

def checkpoints(folder):
    """The folder's checkpoints, newest first."""
    return sorted(Path(folder).glob("checkpoint-[0-9]*"), key=lambda path: -int(path.name.split("-")[1]))

def files_of_a_run(args):
    """A run's files in output_dir. UserError unless it may be replaced or resumed."""
    names = "args.json metrics.jsonl samples.jsonl curves.png summary.json checkpoint-[0-9]* final_model partial*"
    old = [path for name in names.split() for path in Path(args.output_dir).glob(name)]
    check(not old or args.overwrite or args.resume,
          f"{args.output_dir} holds a run already: --resume it, --overwrite it, or choose another --output_dir")
    precious = args.overwrite and Path(args.model).resolve() in [path.resolve() for path in old]
    check(not precious, f"--overwrite would remove --model {args.model}; choose another --output_dir")
    return old

def open_output_dir(args, step):
    """Makes output_dir. --overwrite removes its run, --resume cuts its logs back."""
    folder = Path(args.output_dir)
    for path in files_of_a_run(args):
        if args.overwrite or path.name.startswith("partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.suffix == ".jsonl":
            # Lines after the step are not of this run, and the last may be torn.
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
            replace_text(path, "".join(kept))
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "args.json", json.dumps(vars(args), indent=2) + "\n")

def find_data(args):
    """Makes data/arithmetic/ if needed. UserError for other missing files."""
    files = [Path(value) for flag, value in vars(args).items() if flag.endswith("_data") and not args.question]
    tiny = [path for path in (Path(args.model), *files) if path.is_relative_to("data/arithmetic")]
    if RANK == 0 and not all(path.exists() for path in tiny):
        print("data/arithmetic/ is not complete yet: making it with prepare_data.py", flush=True)
        subprocess.run([sys.executable, Path(__file__).with_name("prepare_data.py")])
    all_gather(None)  # waits for rank 0
    for path in files:
        check(path.is_file(), f"{path} is not there; see `python prepare_data.py --help`")
    if RANK == 0 and files:
        files_of_a_run(args)  # before a model is loaded

def load_run(args):
    """Loads all that a run holds; to resume, from the newest checkpoint."""
    find_data(args)
    grading_pool().schedule(int)  # starts the workers before there is a model
    if args.device == "cpu" and sys.platform == "linux":
        # Keep freed memory in the process: to fetch it anew costs a fifth of a step.
        ctypes.CDLL(None).mallopt(-4, 0)            # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD
    if Path(args.model).is_dir():
        hf_logging.disable_progress_bar()  # only a download needs one
    checkpoint = next(iter(checkpoints(args.output_dir)), None) if args.resume else None
    source = checkpoint or args.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # float32 master weights even on a GPU: at lr 1e-5 most AdamW steps are below
        # half a bfloat16 ulp of the weight. No train(): dropout would make π differ
        # from the policy that sampled.
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="packed")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {source} cannot be loaded: {short_message(error)}") from error
    hf_logging.disable_progress_bar()
    check(tokenizer.eos_token_id is not None, f"--model {source} has no end-of-sequence token")
    # Without layer_types in the config its sliding_window holds for every layer.
    kind = "sliding_window" if getattr(model.config, "sliding_window", None) else "full_attention"
    other = set(getattr(model.config, "layer_types", None) or [kind]) - {"full_attention"}
    check(not other, f"--model {source} has layers of {other}, which section 6 does not compute")
    # Two responses to one prompt, packed and not. They differ where layers other than
    # attention mix tokens, or the logits are not just hidden · headᵀ.
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    with torch.no_grad():
        plain = get_response_log_probs(model, ids[:, :-1], ids[:, 1:])["log_probs"]
        packed, _, _ = get_packed_log_probs(model, [([1, 2], [3, 4]), ([1, 2], [5, 6])])
    same = torch.allclose(plain[:, 1:], packed, atol=1e-3)
    check(same, f"--model {source} has layers or logits that section 6 computes wrongly")
    model.to(args.device)
    size = f"{model.num_parameters() / 1e6:.1f}M parameters"
    print(f"model {source}: {size}, {WORLD_SIZE} × {args.device}, {args.dtype}", flush=True)
    if args.device == "cuda" and not flash_attn_func:
        print(f"attention is torch's, flash-attn cannot be imported: {short_message(flash_attn_error)}")
    run = Run(args, model, tokenizer, make_sampler(args, tokenizer), *reward_fn_and_stop(args.prompt), checkpoint)
    run.val_problems = [] if args.question else load_problems(run, args.val_data)
    if 0 < args.validation_size < len(run.val_problems):
        # The same for every seed, from the whole file: MATH's is sorted by subject.
        run.val_problems = random.Random(0).sample(run.val_problems, args.validation_size)
    return run

def finish_step(run, step):
    """Validates, logs and saves, each when it is due; stops on a signal."""
    args, folder, is_last = run.args, Path(run.args.output_dir), step == run.last_step
    if is_last or step % (args.validation_frequency or run.last_step) == 0:
        evaluate(run, 1, step)
        run.lap("evaluation")
    metrics, stopping = run.step_metrics(), max(all_gather(run.signal))
    saving = step and (is_last or stopping or step % (args.save_frequency or run.last_step) == 0)
    if RANK == 0:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        shown = [f"{name.removeprefix('train/')} {metrics[name]:.3g}" for name in SHOWN if name in metrics]
        print(f"step {step:4d}/{run.last_step} |", " | ".join(shown), flush=True)
        if args.wandb_project:
            import wandb
            wandb.log(metrics, step=step)
        if saving:
            save_checkpoint(run, folder / ("final_model" if is_last else f"checkpoint-{step}"), step)
            for path in checkpoints(folder)[args.keep_checkpoints or sys.maxsize:]:
                # Renamed first: half a folder is no checkpoint.
                shutil.rmtree(path.rename(folder / "partial"))
            report({args.output_dir: [folder]}, folder / "curves.png")
    if is_last:
        accuracy, n = metrics["eval/accuracy"], len(run.val_problems)
        print(f"done: accuracy {accuracy:.3f} on {n} unseen problems; {folder}/final_model, curves.png")
    elif stopping:
        print(f"stopped after step {step}; --resume goes on from there")
        leave_ranks(128 + stopping)
        sys.exit(128 + stopping)
    run.lap()

def start_training(run, last_step):
    """Makes optimizer and output_dir; resumes, or validates. Returns the first step."""
    args, run.last_step, step = run.args, last_step, 0
    run.optimizer = torch.optim.AdamW(
        run.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95),
        weight_decay=args.weight_decay, fused=args.device == "cuda")    # less memory
    if run.checkpoint:
        # The optimizer's moments are the checkpoint's, its settings the flags'.
        saved = torch.load(run.checkpoint / "trainer_state.pt", map_location="cpu", mmap=True)
        step, state = saved["step"], {"state": saved["optimizer"]}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | state)
    if RANK == 0:
        open_output_dir(args, step if run.checkpoint else -1)
        if args.wandb_project:
            import wandb
            wandb.init(project=args.wandb_project, config=vars(args), dir=args.output_dir, resume="auto")

    def stop_after_step(number, frame):
        """Ctrl-C and SIGTERM let the step end and be saved; a second one does not."""
        run.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if RANK == 0:  # print is not safe here
            os.write(2, b"stopping after this step; a second signal stops at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_after_step)
    run.lap()
    if not run.checkpoint:
        finish_step(run, 0)
    return step + 1

def microbatches(args, pairs, rows):
    """This rank's share of the rows of a train batch, a list of microbatches. Responses
    to one prompt stand together: it goes through the model once."""
    rows = sorted(rows, key=lambda i: (pairs[i][0], -len(pairs[i][1])))
    # A row goes to a microbatch by the number of tokens (or rows) before it.
    starts, total, before = [], 0, None
    for prompt, response in (pairs[i] for i in rows):
        starts.append(total)
        tokens = len(response) + (len(prompt) if prompt != before else 0)
        total += 1 if args.gradient_accumulation_steps else tokens
        before = prompt
    wanted = min(args.gradient_accumulation_steps, len(rows)) or total / args.tokens_per_microbatch
    parts = [[] for _ in range(math.ceil(wanted / WORLD_SIZE) * WORLD_SIZE)]
    for i, start in zip(rows, starts):
        parts[int(start / total * len(parts))].append(i)
    return [part for part in parts[RANK::WORLD_SIZE] if part]

def optimizer_step(run, step, loss):
    """Clips the accumulated gradient and applies it, if all is finite."""
    decay = 1 - (step - 1) / run.last_step if run.args.lr_schedule == "linear" else 1
    group = run.optimizer.param_groups[0]
    group["lr"] = run.args.learning_rate * decay
    for parameter in group["params"]:
        if parameter.grad is None:  # no row of this rank had anything to teach
            parameter.grad = torch.zeros_like(parameter)
        if WORLD_SIZE > 1:          # the sum over the ranks
            torch.distributed.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(group["params"], run.args.max_grad_norm).item()
    loss = sum(all_gather(float(loss)))
    run.skipped = 0 if math.isfinite(norm + loss) else run.skipped + 1
    if not run.skipped:
        run.optimizer.step()
        run.log("train/loss", loss)
        run.log("train/grad_norm", norm)
    run.optimizer.zero_grad()
    run.log("train/learning_rate", group["lr"])
    run.log("train/skipped_updates", run.skipped > 0)
    check(run.skipped < 5, f"the gradient of 5 updates in a row was not finite ({norm=}, {loss=}): "
          "lower --learning_rate")

# ---- 11. Supervised fine-tuning ------------------------------------------------------

def sft_update(run, pairs, step):
    """One update on pairs (prompt ids, response ids). Loss: nats per token."""
    mean_length = statistics.fmean(len(response) for _, response in pairs)
    total_loss = 0.0
    for micro in microbatches(run.args, pairs, range(len(pairs))):
        log_probs, entropy, mask = get_packed_log_probs(
            run.model, [pairs[i] for i in micro], dtype=run.args.dtype)
        loss_divisor = len(pairs) / len(micro)  # so that all add up to the batch's mean
        loss, _ = sft_microbatch_train_step(log_probs, mask, loss_divisor, mean_length)
        total_loss += loss
        run.log("train/entropy", entropy, mask)
    optimizer_step(run, step, total_loss)

def load_examples(run):
    """Pairs (prompt ids, response ids) to train on. EOS teaches when to stop."""
    args, eos = run.args, run.tokenizer.eos_token_id
    traces = load_traces(args.sft_data, args.prompt, run.reward_fn)
    check(args.n_sft_examples <= len(traces), f"--n_sft_examples is above the {len(traces)} of {args.sft_data}")
    if args.n_sft_examples:
        traces = random.Random(seed_for(args.seed, 0, "traces")).sample(traces, args.n_sft_examples)
    prompts = run.tokenizer([trace["prompt"] for trace in traces])["input_ids"]
    responses = run.tokenizer([trace["response"] for trace in traces], add_special_tokens=False)["input_ids"]
    pairs = [(p, r + [eos]) for p, r in zip(prompts, responses) if len(p) + len(r) < args.max_length]
    print(f"{len(pairs)} of {len(traces)} traces are within --max_length {args.max_length}")
    check(pairs, f"{args.sft_data}: every trace is longer than --max_length {args.max_length}")
    return pairs

def train_sft(args):
    """Fine-tunes on reasoning traces of a stronger model."""
    run = load_run(args)
    examples = load_examples(run)
    per_epoch = math.ceil(len(examples) / args.train_batch_size)
    first = start_training(run, args.sft_epochs * per_epoch)
    for step in range(first, run.last_step + 1):
        # 1. Take the next train batch. Each epoch has its own order.
        epoch, i = divmod(step - 1, per_epoch)
        order = random.Random(seed_for(args.seed, epoch, "order of traces")).sample(examples, len(examples))
        batch = order[i * args.train_batch_size:(i + 1) * args.train_batch_size]
        # 2. Update the policy.
        sft_update(run, batch, step)
        run.lap("training")
        # 3. Validate, log, save.
        finish_step(run, step)

# ---- 12. Expert iteration: sample, keep what is right, fine-tune on it, repeat -------

def train_expert_iteration(args):
    """The handout's Algorithm 2 ([EI]): a policy gradient without a baseline."""
    run = load_run(args)
    problems = load_problems(run, args.train_data, at_least=args.ei_batch_size)
    first = start_training(run, args.n_ei_steps)
    for step in range(first, run.last_step + 1):
        # 1. Sample a few responses to each of some problems, from the policy as it is now.
        drawn = random.Random(seed_for(args.seed, step, "problems")).sample(problems, args.ei_batch_size)
        rollouts, repeated = sample(run, drawn, args.num_rollouts, step, "train", args.sampling_temperature)
        run.lap("sampling")
        # 2. Grade the text, keep the token ids of what is right.
        texts, truths = [r.text for r in rollouts], [problem["answer"] for problem in repeated]
        rewards, failures = grade_responses(run.reward_fn, texts, truths)
        run.lap("grading")
        log_generations(run, "train", step, rollouts, repeated, rewards, failures)
        graded = zip(rollouts, rewards)
        correct = [(r.prompt_ids, r.response_ids) for r, reward in graded if reward["reward"] == 1]
        run.log("train/correct", len(correct))
        # 3. Fine-tune on it: no update where nothing is right. The optimizer's state
        # goes on.
        for epoch in range(args.sft_epochs):
            order = random.Random(seed_for(args.seed, step, f"epoch {epoch}")).sample(correct, len(correct))
            for i in range(0, len(correct), args.train_batch_size):
                sft_update(run, order[i:i + args.train_batch_size], step)
        run.lap("training")
        # 4. Validate, log, save.
        finish_step(run, step)

# ---- 13. GRPO: sample a group per question, compare within it, policy gradient ------

@torch.no_grad()
def compute_old_log_probs(run, pairs):
    """log π of the sampled tokens under the present policy, (N, longest response)."""
    longest = max(len(response) for _, response in pairs)
    old_log_probs = torch.zeros(len(pairs), longest, device=run.args.device)
    for micro in microbatches(run.args, pairs, range(len(pairs))):
        log_probs, _, mask = get_packed_log_probs(
            run.model, [pairs[i] for i in micro], run.args.sampling_temperature, run.args.dtype)
        old_log_probs[micro, :mask.shape[1]] = log_probs
    # Each rank has filled in its own rows.
    return sum(all_gather(old_log_probs.cpu())).to(run.args.device)

def grpo_update(run, batch, rows, step):
    """One optimizer update on some rows of the rollout batch."""
    args, pairs = run.args, batch["pairs"]
    # A row of weight 0 has gradient 0 and need not go through the model. The divisor
    # counts it; entropy and clip_fraction do not. A loss with another term (a KL
    # penalty) needs all rows.
    weights = batch["raw_rewards" if args.loss_type == "no_baseline" else "advantages"].flatten().tolist()
    useful = [i for i in rows if weights[i] != 0]
    constant = args.sampling_max_tokens if args.loss_aggregation == "masked_normalize" else None
    total_loss = 0.0
    for micro in microbatches(args, pairs, useful):
        log_probs, entropy, mask = get_packed_log_probs(
            run.model, [pairs[i] for i in micro], args.sampling_temperature, args.dtype)
        old_log_probs, token_weights = log_probs.detach(), None  # π_old is π on-policy
        if batch["old_log_probs"] is not None:
            old_log_probs = batch["old_log_probs"][micro, :mask.shape[1]]
        if args.tis_cap:
            sampler_log_probs = batch["sampler_log_probs"][micro, :mask.shape[1]]
            token_weights = importance_weights(old_log_probs, sampler_log_probs, args.tis_cap)
        loss_divisor = len(rows) / len(micro)
        loss, metadata = grpo_microbatch_train_step(
            log_probs, mask, loss_divisor, args.loss_type, batch["raw_rewards"][micro], batch["advantages"][micro],
            old_log_probs, args.cliprange, constant, token_weights)
        total_loss += loss
        run.log("train/entropy", entropy, mask)
        if "clipped" in metadata:
            run.log("train/clip_fraction", metadata["clipped"], mask)
    optimizer_step(run, step, total_loss)

def train_grpo(args):
    """The handout's Algorithm 3 ([GRPO]); off-policy if a step has several updates."""
    run = load_run(args)
    n_prompts = args.rollout_batch_size // args.group_size
    problems = load_problems(run, args.train_data, at_least=n_prompts)
    first = start_training(run, args.n_grpo_steps)
    for step in range(first, run.last_step + 1):
        # 1. Sample a group of G responses to each of some problems. The policy is π_old
        # from here on.
        drawn = random.Random(seed_for(args.seed, step, "problems")).sample(problems, n_prompts)
        rollouts, repeated = sample(run, drawn, args.group_size, step, "train", args.sampling_temperature)
        run.lap("sampling")
        # 2. Grade them and compare each with its group.
        texts, truths = [r.text for r in rollouts], [problem["answer"] for problem in repeated]
        # A group of one, with no_baseline, has no standard deviation.
        by_std = args.use_std_normalization and args.group_size > 1
        advantages, raw_rewards, grades = compute_group_normalized_rewards(
            run.reward_fn, texts, truths, args.group_size, args.advantage_eps, by_std)
        run.lap("grading")
        log_generations(run, "train", step, rollouts, repeated, grades["rewards"], grades["grading_failures"])
        run.log("train/equal_groups", grades["equal_groups"])
        # 3. A row for each response: token ids, weights (N, 1), log-probs (N, T).
        batch = {"pairs": [(r.prompt_ids, r.response_ids) for r in rollouts], "old_log_probs": None,
                 "raw_rewards": raw_rewards[:, None].to(args.device),
                 "advantages": advantages[:, None].to(args.device),
                 "sampler_log_probs": pad_log_probs(rollouts).to(args.device)}
        off_policy = args.epochs_per_rollout_batch > 1 or args.train_batch_size < args.rollout_batch_size
        if off_policy and (args.loss_type.startswith("grpo") or args.tis_cap):  # a ratio to π_old is used
            batch["old_log_probs"] = compute_old_log_probs(run, batch["pairs"])
        # 4. Update the policy: once on-policy, or once for each train batch in each
        # epoch.
        for epoch in range(args.epochs_per_rollout_batch):
            order = list(range(len(rollouts)))
            random.Random(seed_for(args.seed, step, f"epoch {epoch}")).shuffle(order)
            for i in range(0, len(order), args.train_batch_size):
                grpo_update(run, batch, order[i:i + args.train_batch_size], step)
        run.lap("training")
        # 5. Validate, log, save.
        finish_step(run, step)

# ---- 14. Evaluation as a run, comparisons, main --------------------------------------

def run_eval(args):
    """Writes summary.json and samples.jsonl, or answers one question."""
    run = load_run(args)
    if args.question:
        prompt = {"prompt_ids": run.tokenizer(format_prompt(args.prompt, args.question))["input_ids"]}
        rollouts, _ = sample(run, [prompt], args.eval_samples, 0, "eval", args.eval_temperature)
        print(*(rollout.text.strip() for rollout in rollouts), sep="\n")
        return
    if RANK == 0:
        open_output_dir(args, -1)
    evaluate(run, args.eval_samples, 0)
    summary = {"model": args.model, "prompt": args.prompt, "temperature": args.eval_temperature}
    text = json.dumps(summary | run.step_metrics(), indent=2)
    if RANK == 0:
        replace_text(Path(args.output_dir, "summary.json"), text + "\n")
    print(f"{text}\n{args.output_dir}/summary.json, samples.jsonl")

def compare(args, argv):
    """Runs each value with each seed as a process, which resumes what is there."""
    folder = Path(args.output_dir or "compare_output")
    flag, _, values = args.compare.partition("=")
    ready = values and args.seeds > 0 and WORLD_SIZE == 1
    check(ready, "--compare wants FLAG=A,B,…, --seeds above 0 and no torchrun")
    runs, commands = {}, []
    for value in values.split(","):  # all of them are checked before the first one runs
        label = f"{flag}={value}"
        runs[label] = [folder / label.replace("/", "_") / f"seed{seed}" for seed in range(args.seeds)]
        for seed, output_dir in enumerate(runs[label]):
            # The last of a flag given twice counts: this is one run, no comparison.
            command = [*argv, "--compare=", f"--{label}", f"--seed={seed}", f"--output_dir={output_dir}"]
            settings, before = vars(parse_args(command)), read_settings(output_dir)
            different = [key for key in before if key != "resume" and settings.get(key) != before[key]]
            check(not different, f"{output_dir} holds a run with other {different}; choose another --output_dir")
            commands.append([*command, "--resume"])
    for command in commands:
        print("---", *command, flush=True)
        child = subprocess.Popen([sys.executable, __file__, *command])
        # The child ends its step. Ctrl-C reaches it by itself, SIGTERM is passed on.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        if child.wait() != 0:
            sys.exit(child.returncode)
    table = report(runs, folder / "compare.png", "seconds" if flag == "algo" else "step")
    replace_text(folder / "compare.md", f"`python align.py {' '.join(argv)}`\n\n{table}\n")
    print(f"{table}\n{folder}/compare.png, compare.md")

def main(argv=None):
    """Runs the command line."""
    with exit_cleanly("align.py"):
        join_ranks()
        argv = sys.argv[1:] if argv is None else list(map(str, argv))
        args = parse_args(argv)
        if getattr(args, "plot", None):
            runs = {folder: sorted(Path(folder).glob("seed*")) or [folder] for folder in args.plot}
            print(f"{report(runs, 'compare.png')}\ncompare.png")
        elif getattr(args, "compare", ""):
            compare(args, argv)
        elif getattr(args, "resume", False) and Path(args.output_dir, "final_model").exists():
            print(f"{args.output_dir}: this run is finished")
        else:
            loops = {"eval": run_eval, "sft": train_sft, "ei": train_expert_iteration, "grpo": train_grpo}
            loops[args.algo](args)
        leave_ranks()

if __name__ == "__main__":
    main()
