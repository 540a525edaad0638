"""Align a language model to reason: zero-shot baseline, SFT, expert iteration, GRPO with verified rewards.

    python align.py --algo eval               # how good is the base model?
    python align.py --algo grpo               # make it better; sft and ei do it in other ways
    python align.py --algo grpo --model sft_output/final_model

Without a GPU this trains a tiny model on arithmetic in minutes (--preset tiny), with an 80 GB GPU
Qwen2.5-Math-1.5B on MATH (--preset math), by the same code. The setting is that of Stanford CS336's
assignment 5; the functions of sections 5 to 7 carry its handout's names and signatures.

Symbols:  B sequences in a batch    T tokens (labels: shifted by one)     V vocabulary
          G rollouts per prompt     N rollouts per step = prompts × G
          π the policy (the model)  r reward in {0, 1}    A advantage     ρ = π(token) / π_old(token)

Sources:  [R1] arXiv:2501.12948     [GRPO] arXiv:2402.03300    [DrGRPO] arXiv:2503.20783
          [PPO] arXiv:1707.06347    [EI] arXiv:1705.05439      [pass@k] arXiv:2107.03374
          [IMPALA] arXiv:1802.01561 [TIS] Yao et al. 2025, "Your efficient RL framework secretly
                                    brings you off-policy RL training"

Where this departs from the papers, on purpose:
  1. No KL penalty and no reference model: a verified reward has no model to over-optimise ([DrGRPO]).
  2. The gradient uses the ids that were sampled: text tokenised again can give other tokens.
  3. With one update per rollout batch π_old is π, ρ = 1: no second forward pass.
  4. Log-probs are those of the sampling distribution: training divides by the temperature, too.
  5. The SFT loss is divided by the batch's mean response length, so that it reads as nats per token.
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
import torch.distributed
import torch.nn.functional as F
from latex2sympy2_extended import NormalizationConfig
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, StopStringCriteria
from transformers.utils import logging as transformers_logging


class UserError(ValueError):
    """Something that the user can mend: one sentence on stderr and exit code 2."""


def short_message(error):
    """What an exception says, on one line: the first two lines of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:500] or type(error).__name__


@contextlib.contextmanager
def exit_cleanly(program):
    """What the user can mend ends the program in one sentence instead of a traceback."""
    try:
        yield
        return
    except (UserError, OSError) as error:   # OSError: no space, no permission, a folder that vanished
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except RuntimeError as error:           # on a CPU a lack of memory has no class of its own
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message, code = "out of memory; --tokens_per_microbatch bounds training, --sampler_batch_size sampling", 2
    if RANK > 0:                            # rank 0 speaks for all; another is heard if it lives on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    sys.stdout.flush()
    print(f"{program}: {message}. What was saved before is intact.", file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:
        os._exit(code)                      # the other ranks may wait for this one for ever
    sys.exit(code)


# Many GPUs: `torchrun --nproc_per_node N align.py …` starts N of these programs, the ranks. Each samples,
# grades and trains on its share of the work and holds its share of the weights (`shard`, section 6).
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def all_gather(value):
    """A list of what each rank passes here, in their order. All of them have to call it."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def map_over_ranks(function, items):
    """function(items), a list of one result per item, each rank computing its share of it."""
    share = items[RANK::WORLD_SIZE]
    shares = all_gather(function(share) if share else [])
    return [shares[i % WORLD_SIZE][i // WORLD_SIZE] for i in range(len(items))]


def join_ranks():
    """Under torchrun: finds the other ranks and takes a GPU. From here on rank 0 alone prints."""
    if WORLD_SIZE > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = datetime.timedelta(hours=2)      # rank 0 may be saving, or making the data
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        torch.distributed.init_process_group(backend, timeout=patience)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def leave_ranks(code=0):
    """Ends this process, if it is one of several, once all of them are here."""
    if WORLD_SIZE > 1:
        all_gather(None)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)                      # gloo's threads now and then crash the usual end


# ---- 1. Settings: every knob, declared once ------------------------------------------------------

# Under the algorithms that use them: (flag, value, help), or (flag, tiny preset, math preset, help). A
# tuple holds a value for each algorithm of its heading, a list the choices, the default first. A flag has
# its value's type. A number must be above zero, or may be zero where it is so or the help explains "0:".
ALGOS = ("eval", "sft", "ei", "grpo")
SETTINGS = {
    "eval sft ei grpo": [
        ("preset", ["auto", "tiny", "math"], "defaults of the rest; auto: math on a GPU"),
        ("model", "data/arithmetic/base_model", "Qwen/Qwen2.5-Math-1.5B", "hub id or folder"),
        ("prompt", "tiny", "r1_zero", "a name in PROMPTS (section 2)"),
        ("val_data", "data/arithmetic/test.jsonl", "data/MATH/test.jsonl", "problems to evaluate on"),
        ("validation_size", (0, 512, 512, 512), (0, 1024, 1024, 1024), "so many of them; 0: all"),
        ("output_dir", tuple(f"{algo}_output" for algo in ALGOS), "where the run writes"),
        ("overwrite", False, "replace the run that output_dir holds"),
        ("seed", 0, "of every random draw"),
        ("dtype", ["auto", "float32", "bfloat16"], "of matrix products; auto: bfloat16 on a GPU"),
        ("sampler", ["auto", "vllm", "torch"], "generates responses; auto: vllm on a GPU"),
        ("sampler_batch_size", 512, "responses that the torch sampler holds at a time"),
        ("gpu_memory_utilization", 0.3, "share of the GPU's memory that vLLM takes"),
        ("vllm_sleep", False, "give vLLM's memory to training while it does not sample"),
        ("sampling_min_tokens", 4, "no response ends before; 0: off"),
        ("sampling_max_tokens", 64, 1024, "responses are cut after so many tokens"),
        ("eval_temperature", 1.0, "0: greedy"),
    ],
    "eval": [
        ("eval_samples", 1, "responses per problem, for pass@k"),
        ("question", "", "answer this question, print the answer and stop"),
    ],
    "sft ei grpo": [
        ("learning_rate", (3e-4, 3e-4, 6e-4), 1e-5, "of AdamW"),
        ("lr_schedule", ["linear", "constant"], ["constant", "linear"], "linear: down to zero"),
        ("weight_decay", 0.0, "of AdamW; 0: off"),
        ("max_grad_norm", 1.0, "bound on the gradient's norm; inf: off"),
        ("train_batch_size", (32, 64, 512), (64, 64, 256), "sequences per optimizer update"),
        ("tokens_per_microbatch", 4096, "in a forward pass; less takes less memory, same update"),
        ("gradient_accumulation_steps", 0, "microbatches per update instead; 0: off"),
        ("validation_frequency", (8, 1, 5), (50, 1, 10), "in steps; 0: first and last only"),
        ("save_frequency", (500, 4, 50), (500, 1, 50), "steps between checkpoints; 0: none"),
        ("keep_checkpoints", 0, "only the newest so many; 0: all"),
        ("resume", False, "go on from output_dir's newest checkpoint, with its settings"),
        ("wandb_project", "", "log to this Weights & Biases project as well"),
    ],
    "sft": [
        ("sft_data", "data/arithmetic/sft.jsonl", "data/MATH/sft.jsonl", "reasoning traces"),
        ("n_sft_examples", 0, "use so many of them, drawn at random; 0: all"),
        ("max_length", 256, 2048, "drop traces of more tokens, prompt included"),
    ],
    "sft ei": [
        ("sft_epochs", (16, 2), (3, 1), "passes over the traces or, in ei, the correct samples"),
    ],
    "ei grpo": [
        ("train_data", "data/arithmetic/train.jsonl", "data/MATH/train.jsonl", "problems"),
        ("sampling_temperature", 1.0, "1: sample from the policy itself"),
    ],
    "ei": [
        ("n_ei_steps", 8, 5, "rounds of sample, filter, fine-tune"),
        ("ei_batch_size", 256, 1024, "problems per round"),
        ("num_rollouts", 4, "responses per problem"),
    ],
    "grpo": [
        ("n_grpo_steps", 50, 200, "rollout batches"),
        ("rollout_batch_size", 512, 256, "N, responses per step"),
        ("group_size", 8, "G, responses per problem"),
        ("epochs_per_rollout_batch", 1, "passes over each rollout batch; above 1: off-policy"),
        ("loss_type", ["reinforce_with_baseline", "no_baseline", "grpo_clip", "grpo_no_clip"], "§7"),
        ("cliprange", 0.2, "ε of grpo_clip"),
        ("use_std_normalization", True, "divide advantages by the group's standard deviation"),
        ("advantage_eps", 1e-6, "added to that standard deviation; 0: nothing"),
        ("tis_cap", 0.0, "cap of π_old / π_sampler as a token's weight, 2 is usual; 0: off"),
        ("loss_aggregation", ["masked_mean", "masked_normalize"],
         "a response's token losses: divided by their number, or by sampling_max_tokens ([DrGRPO])"),
    ],
}


def preset_values(preset, algo):
    """{flag: default} of an algorithm in a preset."""
    chosen = {}
    for heading, settings in SETTINGS.items():
        if algo in heading.split():
            for flag, *values, _ in settings:
                value = values[-1] if preset == "math" else values[0]
                value = value[heading.split().index(algo)] if isinstance(value, tuple) else value
                chosen[flag] = value[0] if isinstance(value, list) else value
    return chosen


def build_parser():
    """The parser. It returns the flags that were typed, without defaults."""
    def boolean(text):
        return bool(("false", "true").index(text.lower()))      # else a ValueError, which argparse reports

    parser = argparse.ArgumentParser("align.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--algo", choices=ALGOS, help="which of the four to run")
    for heading, settings in SETTINGS.items():
        group = parser.add_argument_group(f"used by {heading}")
        for flag, *values, help in settings:
            example = values[0][0] if isinstance(values[0], (tuple, list)) else values[0]
            options = {"type": type(example)}
            if isinstance(values[0], list):
                options = {"choices": values[0]}
            elif isinstance(example, bool):
                options = {"type": boolean, "nargs": "?", "const": True}
            shown = " | math: ".join(str(value).strip("()") for value in values)
            group.add_argument(f"--{flag}", help=f"{help} ({shown})", **options)
    group = parser.add_argument_group("pictures and comparisons")
    group.add_argument("--plot", nargs="+", metavar="DIR", help="draw runs into compare.png")
    group.add_argument("--compare", metavar="FLAG=A,B,…", help="run each value with each seed, in folders of "
                       "output_dir, into a picture and a table; finished runs are not run again")
    group.add_argument("--seeds", type=int, help="of --compare: so many, from 0 on (3)")
    group.add_argument("--target", type=float, help="the accuracy whose time is told (0.8)")
    return parser


def read_settings(folder):
    """The settings of the run that a folder holds; {} where there is none."""
    path = Path(folder, "args.json")
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {short_message(error)}") from error


def parse_args(argv):
    """The run's settings. Raises UserError for a flag that is wrong or that the run would not use."""
    def complain(message):
        raise UserError(message)

    parser = build_parser()
    parser.error = complain
    # --group-size=4 means --group_size=4
    argv = [re.sub(r"^--[\w-]+(?==|$)", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    args = argparse.Namespace(plot=None, compare="", seeds=3, target=0.8)
    typed = vars(parser.parse_args(argv))
    given = {name: typed.pop(name) for name in vars(args) if name in typed}
    if given.get("plot") or given.get("compare"):
        return argparse.Namespace(**vars(args) | given | typed)
    if "algo" not in typed:
        raise UserError("say what to run: --algo eval, sft, ei or grpo")
    algo, cuda = typed["algo"], torch.cuda.is_available()
    users = {flag: heading for heading, settings in SETTINGS.items() for flag, *_ in settings}
    for flag in typed:
        if algo not in users.get(flag, algo).split():
            raise UserError(f"--{flag} is not used by --algo {algo} (it is for {users[flag]})")

    output_dir = typed.get("output_dir", f"{algo}_output")
    before = read_settings(output_dir) if typed.get("resume") else {}
    if before.get("algo", algo) != algo:
        raise UserError(f"--algo {algo} cannot resume {output_dir}, a run of --algo {before['algo']}")
    preset = typed.get("preset", before.get("preset", "auto"))
    if preset == "auto":
        preset = "math" if cuda else "tiny"
        print(f"preset {preset}: {'a GPU is' if cuda else 'no GPU'} here (--preset chooses)")
    chosen = preset_values(preset, algo)
    chosen |= {flag: value for flag, value in before.items() if flag in chosen and flag != "overwrite"}
    args = argparse.Namespace(**chosen | typed | {"preset": preset, "device": "cuda" if cuda else "cpu"})
    if args.dtype == "auto":
        args.dtype = "bfloat16" if cuda else "float32"
    check_settings(args)
    return args


def check_settings(args):
    """Raises UserError for settings with which the run would go wrong, perhaps in silence."""
    may_be_zero = {flag for settings in SETTINGS.values() for flag, *values, help in settings
                   if "0:" in help or 0 in values}
    for flag, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and flag in may_be_zero):
            raise UserError(f"--{flag} {value} is not above zero")
    for total, part in (("train_batch_size", "gradient_accumulation_steps"), ("rollout_batch_size", "group_size"),
                        ("rollout_batch_size", "train_batch_size")):
        size, divisor = getattr(args, total, 0), getattr(args, part, 0)
        if divisor and size % divisor:
            raise UserError(f"--{part} {divisor} does not divide --{total} {size}")
    if args.sampling_min_tokens > args.sampling_max_tokens:
        raise UserError(f"--sampling_min_tokens {args.sampling_min_tokens} is above --sampling_max_tokens")
    if args.algo == "grpo" and args.group_size == 1 and args.loss_type != "no_baseline":
        raise UserError("--group_size 1 leaves no group to compare with: every advantage is 0")
    if getattr(args, "resume", False) and args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces it: give one of them")


# ---- 2. Prompts ----------------------------------------------------------------------------------

# r1_zero and question_only are the handout's. tiny is r1_zero without the preamble: a base model of 0.7M
# parameters cannot read instructions, and every token of a prompt is paid for in every rollout.
PROMPTS = {
    "r1_zero": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User "
        "with the answer. The reasoning process is enclosed within <think> </think> and answer is enclosed "
        "within <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
        "<answer> answer here </answer>.\nUser: {question}\nAssistant: <think>"
    ),
    "question_only": "{question}",
    "tiny": "User: {question}\nAssistant: <think>",
}


def format_prompt(name, question):
    """The named prompt with the question in it."""
    if name not in PROMPTS:
        raise UserError(f"--prompt {name} is none of {', '.join(PROMPTS)}")
    return PROMPTS[name].replace("{question}", question)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Grading: the reward is the objective, so a wrong reward is trained towards
# ----------------------------------------------------------------------------------------------------------------------

CHARACTERS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "±": r"\pm ", "π": r"\pi ",
                            "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in ", "≤": r"\le ", "≥": r"\ge ", "∅": r"\emptyset "})
FUNCTION = r"(?:(?:arc)?(?:sin|cos|tan)|sec|csc|cot|log|ln|sqrt)(?![a-zA-Z])"
NO_UNIT = (rf"(?!\s*(?:{FUNCTION}|(?:and|or|not|more|less|plus|minus|times|over|squared|cubed|"
           r"hundred|thousand|million|billion|dozen)\b))")
UNIT = NO_UNIT + r"(?:[a-zA-Z]{3,}|[ckm]m|[km]g|ft|in|lb|mi|hr|oz|ml|sq)(?![a-zA-Z])"
# Spellings that math-verify does not know, or takes for something else: pattern and replacement, in this order.
REWRITES = [
    (r"(?<=\d)(\{,\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))", ""),                              # 1{,}234 and 1,\!234
    (r"(?<![\d.,(\[{])(?<![(\[{,]-)\d{1,3}(,\d{3})+(?![\d,]|,\s)", lambda match: match[0].replace(",", "")),
    (r"(?<!\\)\\[,;:! ]|~|\\(left|right|displaystyle|q?quad|[bB]igg?[lr]?|approx)(?![a-zA-Z])", " "),     # layout
    (r"\\?[$%°]|\^\s*(\\circ|\{\s*\\circ\s*\})(\s*[CF]\b)?|\\degrees?(?![a-zA-Z])|(?<!\\)\\[\[\]()]", ""),
    (r"<=|\\leq(slant)?(?![a-z])", r"\\le "), (r">=|\\geq(slant)?(?![a-z])", r"\\ge "), (r"\\varnothing", r"\\emptyset "),
    (r"^\s*[a-zA-Z]\s*\\in(?![a-zA-Z])", ""),                                           # x \in [0,3)
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "), (r"(?<![\\a-zA-Z])inf(ini)?ty(?![a-zA-Z])", r"\\infty "),
    (r"(?<![\\a-zA-Z])i(?![a-zA-Z])", " I "),                                           # the imaginary unit
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\\[a-zA-Z]+|\w))\s*(?:\{([^{}]*)\}|(\\[a-zA-Z]+|\w))", r"\\frac{\1\2}{\3\4}"),
    (r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}"),
    # Units: 12\text{ cm}^2 and 12 square cm
    (rf"(?<=[\d}})i])\s*\\(text\w*|mbox|mathrm)\s*\{{{NO_UNIT}[^{{}}]*\}}\s*(\^\s*\{{?\d+\}}?)?\s*[.]?\s*$", ""),
    (r"\\(text\w*|mbox|math(rm|bf|it)|operatorname)\s*\{([^{}]*)\}", r" \3 "),
    (rf"^(\s*[-+]?[\d.,/]+|.*\}}|.*\\pi)\s+{UNIT}[a-zA-Z ,'./-]*(\^\s*\{{?\d+\}}?)?\s*$", r"\1"),
    (r",?\s+(and|or)\s+|\s*[;,]\s*", ", "),                                             # lists
    (r"(?<![\w.}/^])(\d+)\s*/\s*(\d+)(?![\d/]|\.\d)", r"\\frac{\1}{\2}"),               # 3/4\pi is \frac{3}{4}\pi
    (r"\s+", " "), (r"\. ?$| (?=[)\]}])|(?<=[(\[{]) |(?<=^[-+]) ", ""), (r"(\d|log) ?_ ?\{(\d+)\}", r"\1_\2"),
    (r"(?<=\d) ?(\\times|\\cdot|\*) ?10 ?\^ ?\{?(-?\d{1,3})\}?$", r"e\2"),              # 2\times 10^{-3}
    (r"^10 ?\^ ?\{?(-?\d{1,3})\}?$", r"1e\1"),
    (r"^\\\{(.*)\\\}$", r"\1"),                                                         # a set is the list of its items
    (r"([^,]*)\\(?:pm|mp)(?![a-z])([^,]*)", r"\1+\2, \1-\2"),                           # a \pm b is two items
]
WORD = rf"(?<![\\a-zA-Z])(?!{FUNCTION}|[pb]matrix)[a-zA-Z]{{4,}}"
UNSAFE_FOR_SYMPY = re.compile(
    rf"\d ?[_:] ?\d|(?<![_\d])\d+ \d|\.\d*\.|{WORD}|__|['\"]|<<|[^\x00-\x7f]|\\(i*int|sum|prod|lim)(?![a-z])|"
    r"\*\*.*\*\*|\^\s*[{(]*\s*-?(\d+\s*(\^|!|\*\*)|\d{5})|\d{3,}\s*!|!\s*\)+\s*!")
PARSE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError,
                SyntaxError, TypeError, ValueError)
LATEX = [math_verify.LatexExtractionConfig(normalization_config=NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="all", equations=False))]
logging.getLogger("math_verify").setLevel(logging.CRITICAL)     # it logs whole responses


def blank_brackets(text):
    """The text with blanks for what stands inside of brackets: blank_brackets("(1,2]+3") == "(   ]+3"."""
    depth, characters = 0, []
    for character in text:
        depth -= character in ")]}"
        characters.append(character if depth == 0 else " ")
        depth += character in "([{"
    return "".join(characters)


def last_boxed(text):
    r"""The content of the last \boxed{…} with balanced braces, or None."""
    boxed = text[text.rfind(r"\boxed{"):]
    match = re.match(r"\\boxed\{( *)[)\]}]", blank_brackets(boxed))
    return boxed[match.start(1):match.end(1)] if match else None


def normalize_answer(text):
    r"""An answer in one spelling: normalize_answer(r"$\dfrac12$ cm") == r"\frac{1}{2}"."""
    text = re.sub(r"^(\\[(\[]|\$|\s)+|(\\[)\]]|\$|\s)+$", "", text)
    while re.fullmatch(r"(\\f?boxed)?\{ *\}", blank_brackets(text)):
        text = text[text.index("{") + 1:-1].strip(" $")
    text = text.translate(CHARACTERS)
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def exact_number(text):
    r"""The value of a plain number such as 12.5, 2.5e-3 or \frac{3}{4}; None for anything else."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"[+-]?(\d+/0*[1-9]\d*|(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?)", text):
        return Fraction(text)


def word_key(text):
    """For comparing words: no case, no article, no space except between digits."""
    return re.sub(r"^(an?|the) (?=[a-z]{3})|\s(?!\d)|(?<!\d)\s", "", text.casefold())


def bracket_shape(text):
    """The brackets around commas, which math-verify takes lightly: (1,2] has some, 2(x+1) has none."""
    shape, before = re.sub(r"[^()\[\],]", "", text), None
    while shape != before:
        before, shape = shape, re.sub(r"\(\)|\[\]", "", shape)
    return sorted(shape)


def parse_latex(text):
    """[the sympy object] of a normalised answer, or []."""
    text = text.replace(", ", r",\ ")           # 100, 200 would be 100200
    text = re.sub(r"(\d*)\.(\d+)", lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", text)
    return math_verify.parse(r"\boxed{%s}" % text, LATEX, fallback_mode="no_fallback", parsing_timeout=None)


def equivalent(answer, truth):
    """Do two normalised answers mean the same?"""
    if word_key(answer) == word_key(truth):
        return answer != ""
    numbers = exact_number(answer), exact_number(truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    (left, _, right), (true_left, _, true_right) = answer.rpartition("="), truth.rpartition("=")
    is_name = re.fullmatch(r"\\?[a-zA-Z]+(_\{?\w+\}?)?\s*(\([^=]*\))?\s*", left + true_left)
    if word_key(left) == word_key(true_left) != "" or is_name and "" in (left, true_left):
        return equivalent(right.strip(), true_right.strip())      # x = 5 is 5 and f(x) = 2x is 2x, but 7 = 2x is not 2x
    if UNSAFE_FOR_SYMPY.search(answer) or UNSAFE_FOR_SYMPY.search(truth):
        return False
    if "=" in answer + truth and "," not in answer + truth:
        if answer.count("=") != 1 or truth.count("=") != 1:
            return False
        try:
            left, right = (parse_latex("{}-({})".format(*text.split("=")))[0] for text in (answer, truth))
            ratio = sympy.cancel(left / right)
            return bool(ratio.is_number and ratio.is_finite and ratio != 0)
        except PARSE_ERRORS:
            return False
    if re.search(r"[^a-zA-Z =,][^=,]*=", f"{answer},{truth}"):
        return False
    is_relation = [bool(re.search(r"[<>]|\\[lg]e", text)) for text in (answer, truth)]
    shapes = bracket_shape(answer), bracket_shape(truth)
    if (is_relation[0] == is_relation[1]) != (shapes[0] == shapes[1]):      # x > 5 is (5,\\infty)
        return False
    return math_verify.verify(parse_latex(truth), parse_latex(answer), numeric_precision=50, timeout_seconds=None,
                              allow_set_relation_comp=True)


def grade(answer, truth):
    """True where `answer` means the same as `truth` (strings, LaTeX or plain)."""
    if max(len(answer), len(truth)) > 400:          # longer than any answer: not worth the risk
        return answer.strip() == truth.strip() != ""
    return equivalent(normalize_answer(answer), normalize_answer(truth))


def extract_answer(response):
    """The answer in " 7+5=12 </think> <answer> 12 </answer>", here "12"; None but for this format, each tag once and nothing after the end."""
    if any(response.count(tag) != 1 for tag in ("</think>", "<answer>", "</answer>")):
        return None
    match = re.search(r"</think> <answer>(.*)</answer>\s*$", response, re.DOTALL)
    return match[1].strip() if match else None


def reward_dict(answer, truth):
    """The reward dict of an extracted answer, or of None where the format was not followed. [R1] section 2.2.2, without a format bonus."""
    right = float(answer is not None and grade(answer, truth))
    return {"reward": right, "format_reward": float(answer is not None), "answer_reward": right}


def r1_zero_reward_fn(response, ground_truth):
    """{"reward", "format_reward", "answer_reward"}, each 0.0 or 1.0, of a response to the r1_zero prompt."""
    return reward_dict(extract_answer(response), ground_truth)


def question_only_reward_fn(response, ground_truth):
    r"""The same for a response to the bare question: the answer is the last \boxed{}."""
    return reward_dict(last_boxed(response), ground_truth)


def reward_fn_and_stop(prompt_name):
    """(reward function, stop string) that go with a prompt; without a stop string a response ends with the end-of-sequence token."""
    return (question_only_reward_fn, None) if prompt_name == "question_only" else (r1_zero_reward_fn, "</answer>")


# Grading a batch, in worker processes: sympy can hang in C code, where no signal reaches it, or take all memory. A process can be killed.
DEADLINE = 3.0              # seconds for one response
WORKER_MEMORY = 2 << 30     # bytes that a worker may take


def start_worker():
    """What a worker does first: bound its memory, leave signals to the parent, and end when the parent is killed."""
    import resource
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C in a terminal and a scheduler's SIGTERM go to every process
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # SIGKILL ends it at a deadline
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + WORKER_MEMORY, taken + WORKER_MEMORY))
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG


@functools.cache
def grading_pool():
    """The worker processes, started once. They wait while the model computes, and end with this process."""
    pebble.CONSTS.term_timeout = 0.1        # seconds from SIGTERM, which the workers ignore, to SIGKILL
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = max(1, min(os.cpu_count() // WORLD_SIZE, 16))
    pool = pebble.ProcessPool(max_workers=workers, initializer=start_worker, context=context)
    atexit.register(lambda: (pool.stop(), pool.join()))
    return pool


def grade_responses(reward_fn, responses, truths):
    """Grades every response, with all workers at once. Returns (the reward dicts, how many could not be graded: those score 0)."""
    pickle.dumps(reward_fn)         # fails here, with an error that says why, if it cannot go to a worker

    def grade_share(pairs):
        for _ in range(2):                          # twice where a worker that had no work was killed, and with it the pool
            if not grading_pool().active:
                grading_pool.cache_clear()
            futures = [grading_pool().schedule(reward_fn, args=pair, timeout=DEADLINE) for pair in pairs]
            rewards = [repr(future.exception()) if future.exception() else future.result() for future in futures]
            if grading_pool().active:
                break
        return rewards

    rewards = map_over_ranks(grade_share, list(zip(responses, truths, strict=True)))
    errors = [reward for reward in rewards if isinstance(reward, str)]
    if len(errors) == len(rewards) >= 32:
        raise UserError(f"the reward function failed on every one of {len(rewards)} responses, first with {errors[0]}")
    no_reward = {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
    return [no_reward if isinstance(reward, str) else reward for reward in rewards], len(errors)


# ---- 4. Data: JSON lines in, dicts out -----------------------------------------------------------


def read_jsonl(path, required, may_be_blank=None):
    """The dicts of a JSON-lines file, each with its "line". Raises UserError naming file and line.

    required: alternatives of keys that must hold non-empty strings (but for `may_be_blank`), such as
    [("problem", "answer")].
    """
    def has_text(record, key):
        value = record.get(key)
        return isinstance(value, str) and (key == may_be_blank or value.strip() != "")

    wanted = " or ".join(" and ".join(map(repr, keys)) for keys in required)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines ({short_message(error)})") from error
    records = []
    for i, line in enumerate(text.split("\n"), start=1):    # splitlines() would split at a U+2028, too
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {i}: not valid JSON ({error})") from error
        if not isinstance(record, dict) or not any(all(has_text(record, k) for k in keys) for keys in required):
            raise UserError(f"{path}, line {i}: needs non-empty strings under {wanted}")
        records.append(record | {"line": i})
    if not records:
        raise UserError(f"{path}: holds no records")
    return records


def load_problems(run, path, at_least=1):
    """Problems {"problem", "answer", "prompt_ids", …}. One whose answer nothing could equal is left out.
    Raises UserError where they are too few, or too long for the model's context."""
    records = read_jsonl(path, [("problem", "answer")], may_be_blank="answer")
    problems = [record for record in records if normalize_answer(record["answer"])]
    if len(problems) < len(records):
        lines = [str(record["line"]) for record in records if record not in problems]
        print(f"{path}: left out line {', '.join(lines)}, whose answer is empty but for spelling")
    if len(problems) < at_least:
        raise UserError(f"{path} has {len(problems)} usable problems, where a step needs {at_least}")
    prompts = [format_prompt(run.args.prompt, problem["problem"]) for problem in problems]
    context = getattr(run.model.config, "max_position_embeddings", None) or math.inf
    for problem, ids in zip(problems, run.tokenizer(prompts)["input_ids"]):
        problem["prompt_ids"] = ids
        if len(ids) + run.args.sampling_max_tokens > context:
            raise UserError(f"{path}, line {problem['line']}: a prompt of {len(ids)} tokens and "
                            f"--sampling_max_tokens exceed the model's context of {context}")
    return problems


def load_traces(path, prompt_name, reward_fn):
    """SFT traces {"prompt", "response"}, with the prompt formatted here, so that it is RL's.

    A trace is {"problem", "response"}, or {"prompt", "response"} with a ready prompt. A response continues
    the prompt: with r1_zero it starts after <think>. Raises UserError where its format earns nothing.
    """
    traces = read_jsonl(path, [("problem", "response"), ("prompt", "response")])
    for trace in traces:
        if reward_fn(trace["response"], "")["format_reward"] != 1:
            raise UserError(f"{path}, line {trace['line']}: the response has not the answer format of "
                            f"prompt {prompt_name}, which {reward_fn.__name__} looks for")
        trace.setdefault("prompt", format_prompt(prompt_name, trace.get("problem", "")))
    return traces


# ---- 5. Tokens and masks -------------------------------------------------------------------------


def batch_token_ids(prompt_ids, response_ids, pad_id):
    """B prompts and responses (lists of ids) as one right-padded batch, three tensors (B, T), where
    T = longest prompt + response, less one for the shift to the next token:

        prompt [5, 6], response [7, 8]     input_ids      5  6  7
                                           labels         6  7  8
                                           response_mask  0  1  1     the labels that the policy chose

    The mask comes from the lengths: a pad id is a token like any other. Attention is causal and padding
    stands on the right, so no real token looks at padding and the model needs no attention mask.
    """
    pairs = list(zip(prompt_ids, response_ids, strict=True))
    ids = [torch.tensor(prompt + response) for prompt, response in pairs]
    mask = [torch.tensor([False] * len(prompt) + [True] * len(response)) for prompt, response in pairs]
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)         # (B, T + 1)
    mask = pad_sequence(mask, batch_first=True)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """Texts to {"input_ids", "labels", "response_mask"}, see batch_token_ids. Prompt and output are
    tokenised apart, so that the border between them is a token border, as it is when sampling."""
    prompt_ids = [tokenizer(text)["input_ids"] for text in prompt_strs]
    output_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in output_strs]
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return batch_token_ids(prompt_ids, output_ids, pad_id)


# ---- 6. Log-probs and entropy: what the policy thinks of each token ------------------------------


def compute_entropy(logits):
    """Entropy of the next-token distribution in nats: (B, T, V) -> (B, T), float32."""
    return torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)       # entr(p) = -p log p


def get_response_log_probs(model, input_ids, labels, return_token_entropy=False, temperature=1.0):
    """log π(label | tokens before it) at every position, prompt and padding included: mask them.

    Args: input_ids, labels (B, T); the sampling temperature, so that these are log-probs of the sampling
    distribution. Returns {"log_probs": (B, T)} and, if asked for, {"token_entropy": (B, T)} without a
    gradient; nats, float32. This is the definition; get_packed_log_probs is the same for less work.
    """
    logits = model(input_ids, use_cache=False).logits.float() / temperature     # (B, T, V)
    log_probs = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if not return_token_entropy:
        return {"log_probs": log_probs}
    return {"log_probs": log_probs, "token_entropy": compute_entropy(logits.detach())}


MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}      # that ChunkedLogProbs holds at a time


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden · headᵀ / temperature)[label] and that softmax's entropy, chunk by chunk.

    The logits of a batch, (positions, V) in float32, would be a run's largest tensor by far. Here a chunk of
    them is computed, reduced to three numbers per position (the label's logit, the normaliser, the
    entropy) and dropped; the backward pass computes it again: ∂ log p(label) / ∂ logit = 1[label] − p.
    """

    @staticmethod
    def chunks(hidden, head, temperature):
        """Yields (rows, their logits in float32), rows being slices."""
        size = max(1, MAX_LOGITS[hidden.device.type] // len(head))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = (hidden[rows] @ head.T).float()                            # (chunk, V)
            yield rows, logits if temperature == 1 else logits.div_(temperature)

    @staticmethod
    def forward(ctx, hidden, head, labels, temperature):
        """hidden (M, D), head (V, D), labels (M,) -> log-probs, entropies (M,); gradient of the former."""
        normalizers, label_logits, entropies = torch.empty(3, len(hidden), device=hidden.device)
        for rows, logits in ChunkedLogProbs.chunks(hidden, head.to(hidden.dtype), temperature):
            label_logits[rows] = logits.gather(1, labels[rows, None]).squeeze(1)
            largest = logits.amax(dim=1)
            exp = logits.sub_(largest[:, None]).exp()
            total = exp.sum(dim=1)
            normalizers[rows] = largest + total.log()
            entropies[rows] = total.log() - exp.mul_(logits).sum(dim=1) / total     # p = exp / total
        ctx.save_for_backward(hidden, head, labels, normalizers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return label_logits - normalizers, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, labels, normalizers = ctx.saved_tensors
        cast_head = head.to(hidden.dtype)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for rows, logits in ChunkedLogProbs.chunks(hidden, cast_head, ctx.temperature):
            grad_logits = logits.sub_(normalizers[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, labels[rows, None], grad[rows, None])
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad_logits, cast_head, out=grad_hidden[rows])
            if hidden.dtype == head.dtype:
                grad_head.addmm_(grad_logits.T, hidden[rows])
            else:                                   # sums stay float32
                grad_head += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_head, None, None


# The packed forward pass. All tokens of a microbatch go through the model as one sequence without padding,
# a prompt once for all of its responses, though each is trained on as prompt + response:
#
#     prompt [5, 6] with responses [7, 8] and [9, 4, 2]       packed  5  6  7  9  4
#     rows: the packed place of each token of a row           [0, 1, 2, -]  and  [0, 1, 3, 4]
#     places: where in rows, flat, each packed token stands   0  1  2  6  7
#
# All of a transformer but attention works token by token. Attention has to see rows: it puts them together
# from the packed tokens by index, and takes each token's output from a row that the token stands in.
# Autograd sums up the gradients of a shared token. A response's last token predicts nothing: left out.


def pack(prompt_ids, response_ids, device):
    """Packs B prompts and responses (lists of ids) into M tokens that go through the model.

    Returns (arguments for the model: input_ids, position_ids (1, M), rows (B, longest), places (M,);
    predictors (n,): the packed places of the tokens that predict the n response tokens).
    """
    ids, positions, row_of, rows, predictors, prompts = [], [], [], [], [], {}
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        known = prompts.get(tuple(prompt), [])              # empty at a prompt's first response
        new = (prompt + response[:-1])[len(known):]
        row = known + list(range(len(ids), len(ids) + len(new)))
        prompts[tuple(prompt)] = row[:len(prompt)]
        ids += new
        positions += range(len(known), len(row))
        row_of += [len(rows)] * len(new)
        rows.append(torch.tensor(row))
        predictors += row[len(prompt) - 1:]
    rows, positions = pad_sequence(rows, batch_first=True), torch.tensor(positions)
    packed = {"input_ids": torch.tensor([ids]), "position_ids": positions[None], "rows": rows,
              "places": torch.tensor(row_of) * rows.shape[1] + positions}
    packed = {name: tensor.to(device) for name, tensor in packed.items()}
    return packed, torch.tensor(predictors, device=device)


def packed_attention(module, query, key, value, attention_mask, scaling=None, rows=None, places=None,
                     cache=None, **kwargs):
    """What transformers calls in each layer: q, k, v (1, heads, M, D) -> ((1, M, heads, D), None).
    Without rows they are whole sequences, (B, heads, T, D); without rows but with a PrefixCache (section 8)
    the newest tokens of responses."""
    if cache is not None and rows is None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None
    if rows is not None:                            # (1, heads, M, D) -> (B, heads, longest, D)
        query, key, value = (tensor[0].transpose(0, 1).index_select(0, rows.flatten())
                             .unflatten(0, rows.shape).transpose(1, 2) for tensor in (query, key, value))
    if cache is not None:
        cache.prompts[module.layer_idx] = key, value
    output = causal_attention(query, key, value, scaling)                       # (B, longest, heads, D)
    if rows is not None:
        output = output.flatten(0, 1).index_select(0, places)[None]
    return output, None


AttentionInterface.register("packed", packed_attention)


def causal_attention(query, key, value, scaling):
    """Each token attends to itself and those before it: (B, heads, T, D) -> (B, T, heads, D)."""
    if query.is_cuda and query.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return flash_attn_func(query, key, value, softmax_scale=scaling, causal=True)
    groups = query.shape[1] // key.shape[1]         # query heads that share a key head
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)


def hidden_states(model, **packed):
    """What the output head turns into logits, (M, D)."""
    base_model = getattr(model, "sharded_base", model.base_model)               # see shard
    return base_model(use_cache=False, **packed).last_hidden_state[0]


def get_packed_log_probs(model, prompt_ids, response_ids, temperature=1.0):
    """get_response_log_probs of B prompts and responses (lists of ids), at the response tokens alone.

    Returns (log_probs, token_entropy, response_mask), each (B, T), T the longest response; 0 off the mask.
    """
    packed, predictors = pack(prompt_ids, response_ids, model.device)
    hidden = hidden_states(model, **packed).index_select(0, predictors)         # (n, D)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    labels = torch.tensor([token for ids in response_ids for token in ids], device=model.device)
    values = ChunkedLogProbs.apply(hidden, model.get_output_embeddings().weight, labels, temperature)
    lengths = torch.tensor([len(ids) for ids in response_ids], device=model.device)
    mask = torch.arange(max(map(len, response_ids)), device=model.device) < lengths[:, None]
    log_probs, entropy = (torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, v) for v in values)
    return log_probs, entropy, mask


def shard(model, dtype):
    """Leaves each rank one part in N of every parameter, its gradient and AdamW's state (FSDP2).

    A layer's weights are all-gathered where a pass needs them and dropped again; gradients are averaged
    over the ranks. With dtype "bfloat16" weights travel in bfloat16. All ranks make the same passes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    # The head stands beside the base model, so a call of the latter must count as one of the whole model.
    model.sharded_base = lambda *args, **kwargs: model.base_model(*args, **kwargs)
    register_fsdp_forward_method(model, "sharded_base")


def reshard(model):
    """Drops again what the last forward pass has all-gathered, where the model is sharded."""
    if hasattr(model, "sharded_base"):
        model.reshard()


def full_tensor(tensor):
    """A sharded tensor all-gathered, on every rank (all have to call this); another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- 7. Losses: which tokens to push, and how hard -----------------------------------------------

# RL maximises the expected reward E[r] of a response that π samples. Its gradient is E[r · Σ ∇ log π(token)],
# over the tokens of the response: sample, grade, and push every token of a response up in proportion to the
# response's reward (REINFORCE). To subtract from r what does not depend on the response changes nothing on
# average and takes noise away. The mean reward of G responses to the same prompt is such a baseline, but for
# a factor: the response is one of the G, which makes the gradient 1 − 1/G of the true one. r less the
# baseline is the advantage A. SFT pushes given tokens up as if each had A = 1; expert iteration does so with
# its own right responses, which is r with no baseline.


def masked_normalize(tensor, mask, normalize_constant, dim=None):
    """Sum of the elements under the mask over `dim` (all if None), divided by a constant."""
    # where, not *: a masked inf must not become nan
    return torch.where(mask.bool(), tensor, 0).sum(dim) / normalize_constant


def masked_mean(tensor, mask, dim=None):
    """Mean of the elements under the mask over `dim` (all if None); nan where the mask is empty."""
    return torch.where(mask.bool(), tensor, 0).sum(dim) / mask.bool().sum(dim)


def sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    """Backward of the negative log-likelihood: it pushes every response token's log-prob up equally.

    Args: policy_log_probs and response_mask (B, T). gradient_accumulation_steps: microbatches per update;
    with b of the n sequences of a train batch pass n / b, and the losses add up to the train batch's mean.
    Returns (loss, metadata): the scaled loss that was back-propagated, and the number of response tokens.
    """
    per_sequence = masked_normalize(-policy_log_probs, response_mask, normalize_constant, dim=-1)       # (B,)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum()}


def compute_group_normalized_rewards(reward_fn, rollout_responses, repeated_ground_truths, group_size,
                                     advantage_eps, normalize_by_std):
    """Grades N responses and compares each with the G responses to the same prompt, which stand together.

        A = (r − mean of the group) / (standard deviation of the group + advantage_eps)  [GRPO] section 4.1.2
        A = r − mean of the group                                 without normalize_by_std, [DrGRPO]

    The standard deviation is the unbiased one (n − 1). A group of equal rewards has advantage 0: it says
    nothing about what to prefer. Returns (advantages (N,), raw_rewards (N,), metadata): mean rewards, numbers
    of groups of equal rewards and of failed gradings, and "rewards", the N reward dicts. Raises ValueError if
    N is no multiple of G, or for the standard deviation of a group of one.
    """
    if group_size < 1 or len(rollout_responses) % group_size or (normalize_by_std and group_size == 1):
        raise ValueError(f"{len(rollout_responses)} responses cannot be normalised in groups of {group_size}")
    rewards, failures = grade_responses(reward_fn, rollout_responses, repeated_ground_truths)
    raw_rewards = torch.tensor([reward["reward"] for reward in rewards])
    groups = raw_rewards.view(-1, group_size)                               # (prompts, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages /= groups.std(dim=1, keepdim=True) + advantage_eps
    # The mean of equal floats can be off by an ulp and their std is 0: set these to 0, do not compute them.
    equal = groups.amax(dim=1) == groups.amin(dim=1)
    advantages[equal] = 0.0
    metadata = {"equal_groups": int(equal.sum()), "failures": failures, "rewards": rewards}
    for key in ("reward", "format_reward", "answer_reward"):
        metadata[f"{key}_mean"] = statistics.fmean(reward[key] for reward in rewards)
    return advantages.flatten(), raw_rewards, metadata


def require_column(weights):
    """Raises ValueError unless the weights are (B, 1), one per sequence: (B,) would spread over tokens."""
    if weights.ndim != 2 or weights.shape[1] != 1:
        raise ValueError(f"rewards and advantages are (B, 1), not {tuple(weights.shape)}")


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    """−A · log π per token, (B, T), of advantages (B, 1): its gradient is REINFORCE's, the score function
    weighted by the advantage."""
    require_column(raw_rewards_or_advantages)
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    """−min(ρA, clip(ρ, 1−ε, 1+ε)A) per token, (B, T), with ρ = π/π_old ([PPO] eq. 7, [GRPO] eq. 3).

    Where the clipped branch decides, the gradient is zero: the policy has moved far enough on this token.
    Args: advantages (B, 1); both log-probs (B, T), the old ones without a gradient; cliprange ε.
    Returns (loss, metadata): "clipped" (B, T) is true where the clipped branch decided.
    """
    require_column(advantages)
    ratio = torch.exp(policy_log_probs - old_log_probs)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(unclipped, clipped), {"clipped": clipped.detach() < unclipped.detach()}


def compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None,
                                 old_log_probs=None, cliprange=None):
    """The per-token loss (B, T) of the given type, and its metadata.

        no_baseline               −r · log π                    REINFORCE with the raw reward
        reinforce_with_baseline   −A · log π                    the group's mean as baseline: same gradient on
                                                                average, less noise
        grpo_clip                 −min(ρA, clip(ρ, 1−ε, 1+ε)A)  several updates per batch, kept close to π_old
        grpo_no_clip              −ρA                           the same without the bound

    Raises ValueError for an unknown type, a missing argument, and weights that are not (B, 1).
    """
    needs = {"no_baseline": {"raw_rewards": raw_rewards},
             "reinforce_with_baseline": {"advantages": advantages},
             "grpo_clip": {"advantages": advantages, "old_log_probs": old_log_probs, "cliprange": cliprange},
             "grpo_no_clip": {"advantages": advantages, "old_log_probs": old_log_probs}}
    if loss_type not in needs:
        raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(needs)}")
    missing = [name for name, value in needs[loss_type].items() if value is None]
    if missing:
        raise ValueError(f"loss_type {loss_type} needs {', '.join(missing)}")
    if loss_type == "no_baseline":
        return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
    if loss_type == "reinforce_with_baseline":
        return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
    cliprange = cliprange if loss_type == "grpo_clip" else math.inf
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)


def importance_weights(old_log_probs, sampler_log_probs, cap):
    """min(π_old / π_sampler, cap) per token, (B, T): truncated importance sampling ([IMPALA] 4.1, [TIS]).

    A sampler with the trainer's weights but other kernels or precision samples from a slightly other
    distribution. The ratio makes the gradient's expectation right again, the cap bounds its variance.
    """
    return (old_log_probs - sampler_log_probs).exp().clamp(max=cap)


def grpo_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, loss_type,
                               raw_rewards=None, advantages=None, old_log_probs=None, cliprange=None,
                               normalize_constant=None, token_weights=None):
    """Backward of the policy-gradient loss: per token, then per response, then the mean over the batch.

    A response's loss is its mean over its tokens ([GRPO] eq. 3) or, given a normalize_constant, its sum
    divided by that, which weighs every token alike whatever the length of its response ([DrGRPO]). An empty
    response has loss 0. token_weights (B, T) multiply the per-token loss: see importance_weights. Args and
    returns otherwise as in sft_microbatch_train_step and compute_policy_gradient_loss.
    """
    per_token, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange)
    if token_weights is not None:
        per_token = per_token * token_weights
    if normalize_constant is None:
        per_sequence = masked_mean(per_token, response_mask, dim=-1)        # (B,)
        per_sequence = torch.where(response_mask.bool().any(dim=-1), per_sequence, 0)
    else:
        per_sequence = masked_normalize(per_token, response_mask, normalize_constant, dim=-1)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), metadata


# ---- 8. Sampling ---------------------------------------------------------------------------------


def seed_for(seed, step, purpose):
    """A seed for one random draw: step k depends on weights, optimizer state, seed and k alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()[:7], "big")


@dataclasses.dataclass
class Rollout:
    """One sampled response."""
    prompt_ids: list        # token ids
    response_ids: list      # the ids that were sampled, end-of-sequence included; training uses these
    log_probs: list         # of those tokens under the sampling distribution, nats
    text: str               # what they decode to, up to and including the stop string; for grading
    finish_reason: str      # "stop": ended by itself; "length": cut at max_tokens


def make_rollout(tokenizer, stop, prompt_ids, response_ids, log_probs, finish_reason):
    """A Rollout with its text, which ends with the stop string even if the last token does not."""
    text = tokenizer.decode(response_ids, skip_special_tokens=True)
    if finish_reason == "stop" and response_ids[-1] != tokenizer.eos_token_id:
        text = text[:text.rindex(stop) + len(stop)]
    return Rollout(prompt_ids, response_ids, log_probs, text, finish_reason)


def autocast(args):
    """Matrix products in bfloat16 where --dtype says so; weights, log-probs, losses stay float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


class PrefixCache:
    """Keys and values of all layers while P prompts get n responses each. A prompt's stand here once, for
    all of its responses. The responses are all equally long, so theirs need no mask."""

    def __init__(self, n, lengths):
        self.n, self.t = n, 0                   # t: tokens that the responses have so far
        self.prompts = {}                       # layer: keys and values, (P, kv_heads, longest, D)
        self.responses = {}                     # layer: the same, (P, kv_heads, n, room, D)
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        self.padding = (columns >= lengths[:, None])[:, None, None, None]       # (P, 1, 1, 1, longest)

    def attend(self, layer, query, key, value, scaling):
        """Attention of each response's newest token: (1, heads, P·n, D) -> (1, P·n, heads, D)."""
        prompt_keys, prompt_values = self.prompts[layer]
        n_prompts, kv_heads, longest, width = prompt_keys.shape
        # (P, kv_heads, n, heads that share a key head, D)
        query, key, value = (tensor.view(kv_heads, -1, n_prompts, self.n, width).permute(2, 0, 3, 1, 4)
                             for tensor in (query, key, value))
        rooms = self.responses.get(layer) or (key[:, :, :, :0], value[:, :, :, :0])
        if rooms[0].shape[3] == self.t:         # full: make room for 64 more tokens
            rooms = tuple(F.pad(room, (0, 0, 0, 64)) for room in rooms)
        self.responses[layer] = rooms
        for room, new in zip(rooms, (key, value)):
            room[:, :, :, self.t] = new[:, :, :, 0]
        keys, values = (room[:, :, :, :self.t + 1] for room in rooms)
        # All responses to a prompt read its keys in one product; one softmax goes over both parts.
        prompt_scores = (query.flatten(2, 3) @ prompt_keys.mT).unflatten(2, query.shape[2:4])
        prompt_scores.masked_fill_(self.padding, -math.inf)
        weights = torch.cat([prompt_scores, query @ keys.mT], dim=-1).mul_(scaling).softmax(dim=-1)
        prompt_weights, weights = weights.split((longest, self.t + 1), dim=-1)
        output = (prompt_weights.flatten(2, 3) @ prompt_values).unflatten(2, query.shape[2:4])
        return (output + weights @ values).permute(0, 2, 1, 3, 4).reshape(1, n_prompts * self.n, -1, width)

    def keep(self, prompts, columns):
        """Keeps these prompts, (P',), and of each these responses, (P', n')."""
        self.n, self.padding = columns.shape[1], self.padding[prompts]
        for layer, rooms in self.responses.items():
            self.prompts[layer] = tuple(tensor[prompts] for tensor in self.prompts[layer])
            self.responses[layer] = tuple(room.transpose(1, 2)[prompts[:, None], columns].transpose(1, 2)
                                          for room in rooms)


class TorchSampler:
    """Samples through transformers alone: with the training model itself, or with a copy of it where that
    is sharded or of another dtype."""

    def __init__(self, tokenizer, batch_size, dtype):
        self.tokenizer, self.batch_size, self.dtype = tokenizer, batch_size, getattr(torch, dtype)
        self.model = None

    @torch.no_grad()
    def load_weights(self, model):
        """Takes over the model's weights as they are now."""
        if model.dtype == self.dtype and not hasattr(model, "sharded_base"):
            self.model = model
            return
        if self.model is None:
            config = AutoConfig.for_model(**model.config.to_dict())         # a copy: from_config writes into it
            with model.device:
                self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype,
                                                              attn_implementation="packed").eval()
        for own, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(full_tensor(parameter))

    @torch.no_grad()
    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """n responses to each prompt (lists of ids): P × n Rollouts, those of one prompt together.

        seeds: one for each prompt. temperature 0 is greedy. No end-of-sequence before min_tokens.
        stop: a string that ends a response, or None.
        """
        rest, most = (temperature, max_tokens, min_tokens, stop), max(1, self.batch_size // n)
        if len(prompt_ids) > most:
            first = self.generate(prompt_ids[:most], n, seeds[:most], *rest)
            return first + self.generate(prompt_ids[most:], n, seeds[most:], *rest)
        device, eos, head = self.model.device, self.tokenizer.eos_token_id, self.model.get_output_embeddings()
        stops = StopStringCriteria(self.tokenizer, [stop]) if stop else None
        # Token t of response i is where the uniform number draws[i, t] falls in the cumulated distribution.
        # So a response depends on its prompt's seed and its own number, not on what shares its batch.
        draws = [torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        draws = torch.cat(draws).to(device).clamp(max=1 - 1e-6)
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompt_ids], device=device)
        cache = PrefixCache(n, prompt_lengths)
        packed, last = pack(prompt_ids, [[0]] * len(prompt_ids), device)        # its last token is left out
        hidden = hidden_states(self.model, cache=cache, **packed)[last].repeat_interleave(n, dim=0)
        positions = prompt_lengths.repeat_interleave(n)
        rows = torch.arange(len(draws), device=device)          # the response that each row of the batch holds
        ids = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=device)
        log_probs, lengths = torch.zeros(ids.shape, device=device), torch.zeros_like(rows)
        for t in range(max_tokens):
            logits = head(hidden).float() / (temperature or 1.0)                # (rows, V)
            normalizer = logits.logsumexp(dim=-1)           # before the ban: the model's own log-probs
            if t < min_tokens:
                logits[:, eos] = -math.inf
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                cumulated = logits.softmax(dim=-1).cumsum(dim=-1)
                drawn = draws[rows, t:t + 1] * cumulated[:, -1:]
                token = torch.searchsorted(cumulated, drawn, right=True).squeeze(1)
            ids[rows, t] = token
            log_probs[rows, t] = logits.gather(1, token[:, None]).squeeze(1) - normalizer
            ends = token == eos
            if stop and t + 1 >= min_tokens:                # did this token complete the stop string?
                ends |= stops(ids[rows, max(0, t + 1 - len(stop)):t + 1], None)
            lengths[rows[ends & (lengths[rows] == 0)]] = t + 1
            if t + 1 == max_tokens or bool(lengths.all()):
                break
            kept = self.drop_finished(cache, lengths[rows] == 0)
            rows, token = rows[kept], token[kept]
            hidden = hidden_states(self.model, input_ids=token[None], cache=cache,
                                   position_ids=(positions[rows] + t)[None])
            cache.t += 1
        rollouts = []
        for i, length in enumerate(lengths.tolist()):
            end, reason = (length, "stop") if length else (max_tokens, "length")
            rollouts.append(make_rollout(self.tokenizer, stop, prompt_ids[i // n], ids[i, :end].tolist(),
                                         log_probs[i, :end].tolist(), reason))
        return rollouts

    def drop_finished(self, cache, live):
        """Finished responses leave the batch once they are many: of each prompt as many stay as the prompt with
        most has left. Returns the rows that stay."""
        by_prompt = live.view(-1, cache.n)                  # (P, n)
        prompts = by_prompt.any(dim=1).nonzero().flatten()
        most = int(by_prompt.sum(dim=1).max())
        if len(prompts) * most > 0.75 * len(live):
            return torch.arange(len(live), device=live.device)
        columns = by_prompt[prompts].sort(dim=1, descending=True, stable=True).indices[:, :most]
        kept = (prompts[:, None] * cache.n + columns).flatten()
        cache.keep(prompts, columns)
        return kept


class VLLMSampler:
    """Samples with vLLM in this process. All that depends on vLLM's version, 0.32.0, is in here."""

    def __init__(self, args, tokenizer):
        self.tokenizer, self.sleeps, self.on_cpu = tokenizer, args.vllm_sleep, args.device == "cpu"
        # vLLM reads these on import: weights go over within this process; the last two are for CPUs.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")                # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")        # leave training its threads
        import vllm
        try:
            self.llm = vllm.LLM(
                model=args.model, dtype=args.dtype, gpu_memory_utilization=args.gpu_memory_utilization,
                enable_sleep_mode=self.sleeps,
                logprobs_mode="processed_logprobs",         # of the distribution that is sampled from
                generation_config="vllm",                   # not the model's own top-k
                enable_chunked_prefill=False if self.on_cpu else None,      # cannot rewind a generator there
                enforce_eager=self.on_cpu,                  # compiling costs a minute there
                distributed_executor_backend="external_launcher" if WORLD_SIZE > 1 else None)
            self.llm.generate([{"prompt_token_ids": [0]}], vllm.SamplingParams(max_tokens=1), use_tqdm=False)
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(
                f"vLLM {vllm.__version__} cannot serve {args.model}: {short_message(error)}; for too little "
                f"memory see --gpu_memory_utilization (now {args.gpu_memory_utilization}; on a CPU "
                "VLLM_CPU_KVCACHE_SPACE, in GiB), for an unsupported model --sampler torch") from error
        if self.sleeps:
            self.llm.sleep(level=2)         # level 2 drops the weights: every weight sync brings new ones

    def load_weights(self, model):
        """The weight sync, parameter by parameter in memory; keys and values of old weights are dropped."""
        if self.sleeps:                     # first the memory: waking up later would bring old weights back
            self.llm.wake_up(tags=["weights"])
        try:
            weights = ((name, full_tensor(p.detach())) for name, p in model.named_parameters())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self.on_cpu and model.config.tie_word_embeddings:
                # The CPU build multiplies by a packed copy of the head; a sync of tied weights leaves it.
                self.llm.apply_model(lambda served: served.lm_head.quant_method.process_weights_after_loading(
                    served.lm_head))
        except (AttributeError, TypeError, NotImplementedError) as error:
            raise UserError(f"this vLLM has not the weight sync of 0.32.0 ({short_message(error)}): install "
                            "that version, or use --sampler torch") from error
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise UserError("vLLM did not reset its prefix cache after a weight sync: samples would be stale")

    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """As TorchSampler.generate. Each response is a request; prefix caching shares the prompts."""
        from vllm import SamplingParams
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        params = [SamplingParams(
            temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens, logprobs=0,
            stop=stop, include_stop_str_in_output=True, seed=seed_for(seed, i, "request"),
            ignore_eos=True, stop_token_ids=[self.tokenizer.eos_token_id])      # this end, no other
            for seed in seeds for i in range(n)]
        requests = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=2)
        rollouts = []
        for ids, request in zip(prompts, requests, strict=True):
            output = request.outputs[0]
            response = list(output.token_ids)
            log_probs = [step[token].logprob for step, token in zip(output.logprobs, response, strict=True)]
            rollouts.append(make_rollout(self.tokenizer, stop, ids, response, log_probs, output.finish_reason))
        return rollouts


def make_sampler(args, tokenizer):
    """The sampler that --sampler names; prints the choice that auto makes."""
    choice, installed = args.sampler, importlib.util.find_spec("vllm") is not None
    install = "pip install vllm==0.32.0"
    if choice == "auto":
        choice = "vllm" if installed and args.device == "cuda" else "torch"
        hint = f"; faster with: {install}" if args.device == "cuda" and not installed else ""
        print(f"sampler {choice}{hint} (--sampler chooses)")
    if choice == "torch":
        return TorchSampler(tokenizer, args.sampler_batch_size, args.dtype)
    if not installed:
        raise UserError(f"--sampler vllm needs vLLM: {install}")
    return VLLMSampler(args, tokenizer)


# How far a sampler's log-probs may be from the trainer's, in nats: (mean, max). Beyond, its weights are not
# the trainer's. On a GPU float32 counts as bfloat16: vLLM's attention multiplies it in TF32 there.
GAP_LIMITS = {"float32": (1e-3, 1e-2), "bfloat16": (0.2, math.inf)}


def check_sampler(run, rollouts, temperature):
    """(mean, max) of |log π − log π_sampler| over the tokens of a few rollouts, in nats. Raises UserError
    where it is too large: the most expensive silent bug of this field is a sampler with stale weights.

    The first tokens are left out: end-of-sequence is banned there, and vLLM's log-probs know of the ban.
    """
    prompt_ids, response_ids = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    with torch.no_grad(), autocast(run.args):
        ours, _, mask = get_packed_log_probs(run.model, prompt_ids, response_ids, temperature)
    mask[:, :run.args.sampling_min_tokens] = False
    gaps = (ours - pad_log_probs(rollouts).to(ours.device))[mask].abs()
    if len(gaps) == 0:
        return 0.0, 0.0
    mean, largest = gaps.mean().item(), gaps.max().item()
    limits = GAP_LIMITS["bfloat16" if run.args.device == "cuda" else run.args.dtype]
    if not (mean <= limits[0] and largest <= limits[1]):        # nan, too
        raise UserError(f"the sampler's log-probs differ from the trainer's by {mean:.2g} nats on average and "
                        f"{largest:.2g} at most (limits {limits}): it has stale or wrong weights")
    return mean, largest


def pad_log_probs(rollouts):
    """The log-probs of the rollouts' sampler, (N, T)."""
    return pad_sequence([torch.tensor(rollout.log_probs) for rollout in rollouts], batch_first=True)


def sample(run, problems, n, step, purpose, temperature):
    """n Rollouts for each problem from the policy as it is now, each rank sampling for its share.

    purpose: "train" or "eval", the first part of the metrics' names. Returns the rollouts, those of one
    problem together, and the problem of each. Raises UserError where the sampler is not the policy.
    """
    def groups(numbers):
        seeds = [seed_for(run.args.seed, step, f"{purpose} {i}") for i in numbers]
        prompt_ids = [problems[i]["prompt_ids"] for i in numbers]
        rollouts = run.sampler.generate(prompt_ids, n, seeds, temperature, run.args.sampling_max_tokens,
                                        run.args.sampling_min_tokens, run.stop)
        return [rollouts[i:i + n] for i in range(0, len(rollouts), n)]

    run.sampler.load_weights(run.model)
    rollouts = [rollout for group in map_over_ranks(groups, range(len(problems))) for rollout in group]
    if temperature > 0:
        mean, largest = check_sampler(run, rollouts[::n][:max(4, WORLD_SIZE)], temperature)
        run.log(f"{purpose}/sampler_gap", mean)
        run.log(f"{purpose}/sampler_gap_max", largest)
    run.log(f"{purpose}/length", [len(rollout.response_ids) for rollout in rollouts])
    run.log(f"{purpose}/tokens", sum(len(rollout.response_ids) for rollout in rollouts))
    run.log(f"{purpose}/truncated", [rollout.finish_reason == "length" for rollout in rollouts])
    return rollouts, [problem for problem in problems for _ in range(n)]


# ---- 9. Evaluation -------------------------------------------------------------------------------


def lenient_reward_fn(response, ground_truth):
    """1 where the right answer is in the answer tags, the last box or the last number, in any format.

    For evaluation: a rise in accuracy that this does not share is a gain in format, not in reasoning.
    """
    end = response[-2000:]
    candidates = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", end)[-1:]
    if "<answer>" in end:
        candidates.append(end.rpartition("<answer>")[2].partition("</answer>")[0])
    if last_boxed(end) is not None:
        candidates.append(last_boxed(end))
    right = float(any(grade(candidate, ground_truth) for candidate in candidates))
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}


def pass_at_k(n, c, k):
    """The unbiased estimate of P(one of k samples is right) from n samples, c right ([pass@k] eq. 1).

    >>> pass_at_k(n=4, c=1, k=2)        # two of four: 3 of the 6 pairs hold the right one
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(run, n, step):
    """Samples n responses to each validation problem and grades them, as the model wrote them.

    Logs eval/accuracy and the like. The standard error is over problems: responses to one problem are not
    independent.
    """
    rollouts, repeated = sample(run, run.val_problems, n, step, "eval", run.args.eval_temperature)
    texts, truths = [rollout.text for rollout in rollouts], [problem["answer"] for problem in repeated]
    rewards, failures = grade_responses(run.reward_fn, texts, truths)
    log_generations(run, "eval", step, rollouts, repeated, rewards, failures)
    right = torch.tensor([reward["answer_reward"] for reward in rewards]).view(-1, n)   # (problems, n)
    run.log("eval/accuracy", right)
    run.log("eval/stderr", right.mean(dim=1).std(correction=0) / math.sqrt(len(right)))
    run.log("eval/problems", len(right))
    for k in [2**i for i in range(9) if 2**i < n] + [n]:
        run.log(f"eval/pass@{k}", [pass_at_k(n, int(c), k) for c in right.sum(dim=1)])
    lenient, _ = grade_responses(lenient_reward_fn, texts, truths)
    run.log("eval/lenient", [max(a["reward"], b["reward"]) for a, b in zip(rewards, lenient)])


def log_generations(run, purpose, step, rollouts, problems, rewards, failures):
    """Logs graded rollouts: their mean reward, and in samples.jsonl what was asked, written and paid."""
    run.log(f"{purpose}/reward", [reward["reward"] for reward in rewards])
    run.log(f"{purpose}/format", [reward["format_reward"] for reward in rewards])
    run.log(f"{purpose}/grading_failures", failures)
    if RANK > 0:
        return
    with open(Path(run.args.output_dir, "samples.jsonl"), "a", encoding="utf-8") as file:
        for rollout, problem, reward in zip(rollouts, problems, rewards, strict=True):
            line = {"step": step, "purpose": purpose, "problem": problem["problem"], "response": rollout.text,
                    "answer": problem["answer"], **reward, "length": len(rollout.response_ids),
                    "finish_reason": rollout.finish_reason}
            file.write(json.dumps(line) + "\n")


# ---- 10. A run: metrics, pictures, checkpoints, start and finish ---------------------------------


@dataclasses.dataclass
class Run:
    """What a run holds in memory. Sampler, evaluation and updates all refer to `model`, the policy."""
    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    sampler: object
    reward_fn: object
    stop: str                   # the string that ends a response, or None
    checkpoint: Path            # the folder to resume from, or None
    val_problems: list = None
    optimizer: object = None
    last_step: int = 0
    sums: dict = dataclasses.field(default_factory=dict)
    clock: float = 0.0
    drawn: float = 0.0          # when the curves were last drawn
    signal: int = 0             # SIGINT or SIGTERM, once it has come
    skipped: int = 0            # updates in a row whose gradient was not finite

    def log(self, name, values):
        """Takes numbers or a tensor. A step's metric is the mean of them all, over all ranks."""
        values = torch.as_tensor(values, dtype=torch.float64).detach()
        pair = torch.stack([values.sum(), torch.ones_like(values).sum()])
        self.sums[name] = self.sums.get(name, 0) + pair

    def lap(self, name=None):
        """Logs the seconds since the last call as time/name."""
        before, self.clock = self.clock, time.perf_counter()
        if name:
            self.log(f"time/{name}", self.clock - before)

    def step_metrics(self):
        """{name: mean} of what was logged since the last call."""
        gathered = all_gather({name: pair.cpu() for name, pair in self.sums.items()})
        self.sums, means = {}, {}
        for name in dict.fromkeys(name for sums in gathered for name in sums):
            total, count = sum(sums[name] for sums in gathered if name in sums).tolist()
            if count:
                means[name] = total / count
        return means


# What a step prints of its metrics.
SHOWN = {
    "train/reward": "reward {:.3f}", "train/format": "fmt {:.3f}", "train/loss": "loss {:+.4f}",
    "train/entropy": "ent {:.3f}", "train/clip_fraction": "clip {:.1%}", "train/length": "len {:.1f}",
    "train/grad_norm": "gnorm {:.2f}", "train/learning_rate": "lr {:.1e}", "time/sampling": "gen {:.1f}s",
    "time/training": "train {:.1f}s", "eval/accuracy": "eval acc {:.3f}", "eval/stderr": "±{:.3f}",
    "eval/format": "fmt {:.3f}", "eval/lenient": "lenient {:.3f}", "eval/length": "len {:.1f}",
}
PANELS = ("eval/accuracy", "eval/format", "train/reward", "train/entropy", "train/length")


def read_metrics(folder):
    """A run's steps, each with all "seconds" of training and sampled "tokens" up to it."""
    records, seconds, tokens = read_jsonl(Path(folder, "metrics.jsonl"), [()]), 0.0, 0.0
    for record in records:
        seconds += sum(record.get(f"time/{part}", 0) for part in ("sampling", "grading", "training"))
        tokens += record.get("train/tokens", 0)
        record |= {"seconds": seconds, "tokens": tokens}
    return records


def report(runs, picture, against="step", target=0.8):
    """Draws the curves of runs into a picture and returns what came of them, a Markdown table.

    runs: {label: folders}, the folders being seeds of one thing: each has its own curve, of one colour,
    and the table gives their mean ± standard deviation. against: "step" or "seconds".
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 10), layout="constrained")
    axes = figure.subplots(len(PANELS), sharex=True)
    table = []
    for i, (label, folders) in enumerate(runs.items()):
        seeds = [read_metrics(folder) for folder in folders]
        for axis, name in zip(axes, PANELS):
            for records in seeds:
                records = [record for record in records if name in record]
                places, values = [r[against] for r in records], [r[name] for r in records]
                axis.plot(places, values, f"C{i}", label=label if records and axis is axes[0] else None)
                label = label if axis is not axes[0] else None
            axis.set_title(name, fontsize=9, loc="left")
            axis.grid(alpha=0.3)
        table.append(outcome(list(runs)[i], seeds, target))
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel(against)
    figure.savefig(f"{picture}.partial", dpi=110, format="png")
    os.replace(f"{picture}.partial", picture)
    lines = [list(table[0]), ["---"] * len(table[0])] + [row.values() for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def outcome(label, seeds, target):
    """What came of the seeds of one thing: {column of the table: its cell}."""
    def cell(values, digits=1):
        there = [value for value in values if value is not None]
        if not there:
            return "–"
        spread = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
        share = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
        return f"{statistics.fmean(there):.{digits}f}{spread}{share}"

    ends = [[record for record in records if "eval/accuracy" in record][-1] for records in seeds]
    reached = [next((r for r in records if r.get("eval/accuracy", 0) >= target), {}) for records in seeds]
    norms = [[r["train/grad_norm"] for r in records if "train/grad_norm" in r] for records in seeds]
    return {
        "": label,
        "accuracy %": cell([100 * end["eval/accuracy"] for end in ends]),
        "in the format %": cell([100 * end["eval/format"] for end in ends]),
        f"steps to {target:.0%}": cell([record.get("step") for record in reached]),
        f"seconds to {target:.0%}": cell([record.get("seconds") for record in reached]),
        "seconds": cell([end["seconds"] for end in ends]),
        "sampled tokens, thousands": cell([end["tokens"] / 1000 for end in ends]),
        "entropy at the end": cell([end.get("train/entropy") for end in ends], 3),
        "length at the end": cell([end["eval/length"] for end in ends]),
        "gradient norm": cell([statistics.fmean(some) if some else None for some in norms], 3),
    }


def flush(path):
    """Returns when the disk has a file, or the list of a folder's files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def replace_text(path, text):
    """Writes aside and renames, so that the file is never half-written."""
    aside = path.with_name("partial.txt")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def save_checkpoint(run, path, step):
    """Writes a Hugging Face folder, which from_pretrained and `vllm serve` open, with the trainer's state:
    aside, flushed to the disk, then renamed. Raises UserError where it cannot be written."""
    def gather(tensors):
        """Sharded tensors all-gathered, one after the other, and kept on rank 0."""
        whole = ((name, full_tensor(tensor.detach())) for name, tensor in tensors)
        return {name: tensor.cpu() for name, tensor in whole if RANK == 0}

    reshard(run.model)
    weights = gather(run.model.named_parameters()) if WORLD_SIZE > 1 else None      # None: its own
    state = {i: gather(tensors.items()) for i, tensors in run.optimizer.state_dict()["state"].items()}
    if RANK > 0:
        return
    partial = path.with_name("partial")
    try:
        run.model.save_pretrained(partial, state_dict=weights)
        run.tokenizer.save_pretrained(partial)
        torch.save({"optimizer": state, "step": step}, partial / "trainer_state.pt")
        for file in (*partial.iterdir(), partial, *path.parent.glob("*.jsonl")):
            flush(file)
        os.replace(partial, path)
        flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:       # torch.save raises no OSError
        free = shutil.disk_usage(path.parent).free / 1e6
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path} cannot be written ({free:.0f} MB free): {short_message(error)}") from error


def checkpoints(folder):
    """The folder's checkpoints, newest first."""
    return sorted(Path(folder).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def open_output_dir(args, step):
    """Makes output_dir and writes args.json. A run that is there already is left alone, or removed with
    --overwrite, or with --resume cut back to what it had written up to this step."""
    folder = Path(args.output_dir)
    names = ("args.json", "*.jsonl", "*.png", "summary.json", "checkpoint-*", "final_model", "partial*")
    old = [path for name in names for path in folder.glob(name)]
    if old and not args.overwrite and not getattr(args, "resume", False):
        raise UserError(f"{folder} holds a run already; go on with it by --resume, choose another "
                        "--output_dir, or replace it with --overwrite")
    if args.overwrite and Path(args.model).resolve() in [path.resolve() for path in old]:
        raise UserError(f"--overwrite would remove --model {args.model}; choose another --output_dir")
    for path in old:
        if args.overwrite or path.name.startswith("partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("}\n")]                # the last one may be torn
            replace_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "args.json", json.dumps(vars(args), indent=2) + "\n")


def find_data(args):
    """Makes data/arithmetic/ where it is needed and not there; another missing file is a UserError."""
    flags = [flag for flag in ("train_data", "val_data", "sft_data") if hasattr(args, flag)]
    needed = [Path(getattr(args, flag)) for flag in flags]
    tiny = [path for path in (Path(args.model), *needed) if str(path).startswith("data/arithmetic/")]
    if RANK == 0 and not all(path.exists() for path in tiny):
        print("data/arithmetic/ is not complete yet: making it with prepare_data.py", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name("prepare_data.py")]).returncode:
            raise UserError("prepare_data.py did not finish")
    all_gather(None)            # waits for rank 0
    for path in needed:
        if not path.is_file():
            raise UserError(f"{path} is not there; `python prepare_data.py --help` says how data/ is made")


def load_run(args):
    """Model, tokenizer, sampler and validation problems of a run; the weights are the newest checkpoint's
    where it is to be resumed. Raises UserError where the model or the data cannot be had."""
    find_data(args)
    grading_pool().schedule(int)        # starts the workers now, before this process holds a model
    if args.device == "cpu" and sys.platform == "linux":
        # Freed memory stays with the process: fetching it anew from the system costs a fifth of a step.
        for option, value in ((-4, 0), (-1, 2**31 - 1)):            # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if Path(args.model).is_dir():
        transformers_logging.disable_progress_bar()                 # only a download needs one
    found = checkpoints(args.output_dir)[:1] if getattr(args, "resume", False) else []
    checkpoint = (all_gather(found)[0] or [None])[0]                # what rank 0 has found
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        # float32 masters even on a GPU: at lr 1e-5 most steps are below half a bfloat16 ulp of the weight.
        # The model stays in evaluation mode: dropout would make π differ from the policy that sampled.
        model = AutoModelForCausalLM.from_pretrained(checkpoint or args.model, dtype=torch.float32,
                                                     attn_implementation="packed")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {args.model} cannot be loaded: {short_message(error)}") from error
    transformers_logging.disable_progress_bar()
    if WORLD_SIZE > 1 and args.algo != "eval":
        shard(model, args.dtype)
    else:
        model.to(args.device)
    check_model(args, model, tokenizer)
    print(f"model {args.model}: {model.num_parameters() / 1e6:.1f}M parameters on {WORLD_SIZE} × "
          f"{args.device}, {args.dtype}", flush=True)
    reward_fn, stop = reward_fn_and_stop(args.prompt)
    run = Run(args, model, tokenizer, make_sampler(args, tokenizer), reward_fn, stop, checkpoint)
    run.val_problems = load_problems(run, args.val_data)
    if 0 < args.validation_size < len(run.val_problems):
        # Always the same ones, whatever the seed, from the whole file: files come sorted by subject.
        run.val_problems = random.Random(0).sample(run.val_problems, args.validation_size)
    return run


def check_model(args, model, tokenizer):
    """Raises UserError for a model that section 6 would compute wrongly."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no end-of-sequence token")
    if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise UserError(f"--model {args.model} has layers without full attention (a sliding window, a "
                        "recurrent state): section 6 leaves them out")
    ids = list(range(min(16, model.config.vocab_size)))
    inputs = torch.tensor([ids], device=args.device)
    with torch.no_grad(), autocast(args):
        plain = get_response_log_probs(model, inputs[:, :-1], inputs[:, 1:])["log_probs"]
        packed, _, _ = get_packed_log_probs(model, [ids[:1]], [ids[1:]])
    if not torch.allclose(plain, packed, atol=0.05):
        raise UserError(f"--model {args.model} does more to its logits than multiply by the output head (a "
                        "soft cap, say): section 6 leaves that out")


def start_training(run, last_step):
    """Opens output_dir, makes the optimizer and validates the weights as they come, or takes the run up
    where its checkpoint left it. Returns the number of the first step. All input has been read by now."""
    args, run.last_step, step = run.args, last_step, 0
    reshard(run.model)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95),
                                      weight_decay=args.weight_decay)
    if run.checkpoint:
        saved = torch.load(run.checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True, mmap=True)
        step, state = saved["step"], saved["optimizer"]
        for i, parameter in enumerate(run.model.parameters()):
            if isinstance(parameter, DTensor) and i in state:       # each rank takes its shards
                for name in ("exp_avg", "exp_avg_sq"):
                    state[i][name] = distribute_tensor(state[i][name], parameter.device_mesh, parameter.placements)
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})    # settings: the flags'
        print(f"resumed from {run.checkpoint}", flush=True)
    if RANK == 0:
        open_output_dir(args, step if run.checkpoint else -1)
        if args.wandb_project:
            import wandb
            wandb.init(project=args.wandb_project, config=vars(args), dir=args.output_dir, resume="auto")

    def stop_after_step(number, frame):
        """Ctrl-C and SIGTERM let the current step end and be saved; a second one stops at once."""
        run.signal = number
        signal.signal(number, signal.SIG_DFL)
        if RANK == 0:           # print is not safe here
            os.write(2, b"align.py: stopping after this step; a second signal stops at once\n")

    signal.signal(signal.SIGINT, stop_after_step)
    signal.signal(signal.SIGTERM, stop_after_step)
    if not run.checkpoint:
        finish_step(run, 0)
    run.lap()
    return step + 1


def finish_step(run, step):
    """Validates the weights as they are after the update, where it is time to, logs the step, saves, and
    stops where a signal asked for it. After the last step it saves the final model."""
    args, folder, is_last = run.args, Path(run.args.output_dir), step == run.last_step
    if step == 0 or is_last or (args.validation_frequency and step % args.validation_frequency == 0):
        run.lap()
        evaluate(run, 1, step)
        run.lap("evaluation")
    metrics, stopping = run.step_metrics(), max(all_gather(run.signal))
    if RANK == 0:
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        shown = [form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics]
        print(f"step {step:4d}/{run.last_step} | {' | '.join(shown)}", flush=True)
        if args.wandb_project:
            import wandb
            wandb.log(metrics, step=step)
        if is_last or time.monotonic() > run.drawn + 60:            # drawing takes half a second
            report({args.output_dir: [folder]}, folder / "curves.png")
            run.drawn = time.monotonic()
    if is_last:
        save_checkpoint(run, folder / "final_model", step)
        print(f"done: accuracy {metrics['eval/accuracy']:.3f} on {len(run.val_problems)} unseen problems; "
              f"{folder}/final_model, curves.png, metrics.jsonl, samples.jsonl")
    elif step and (stopping or (args.save_frequency and step % args.save_frequency == 0)):
        save_checkpoint(run, folder / f"checkpoint-{step}", step)
        if RANK == 0 and args.keep_checkpoints:
            for path in checkpoints(folder)[args.keep_checkpoints:]:
                shutil.rmtree(path.rename(folder / "partial"))      # half a folder is no checkpoint
    if stopping and not is_last:
        print(f"stopped after step {step}; --resume goes on from there", flush=True)
        leave_ranks(128 + stopping)
        sys.exit(128 + stopping)
    run.lap()


# What the three loops share: microbatches, forward pass, optimizer step.


def microbatches(args, prompt_ids, response_ids, rows):
    """This rank's share of the rows of a train batch: [(rows of a microbatch, whether they count)].

    The responses to a prompt stay on one rank and, as far as --tokens_per_microbatch allows, together. All
    ranks make equally many passes, for each all-gathers weights: one with less to do repeats a row.
    """
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(prompt_ids[i]) for i in rows))}
    number = {i: prompts[tuple(prompt_ids[i])] for i in rows}           # of each row's prompt
    steps = args.gradient_accumulation_steps
    most_rows = math.ceil(args.train_batch_size / steps / WORLD_SIZE) if steps else math.inf
    most_tokens = math.inf if steps else args.tokens_per_microbatch
    plans, tokens = [[] for _ in range(WORLD_SIZE)], [0] * WORLD_SIZE
    for i in sorted(rows, key=lambda i: (number[i], -len(response_ids[i]))):
        rank = number[i] % WORLD_SIZE
        plan, whole = plans[rank], len(prompt_ids[i]) + len(response_ids[i])
        shared = plan and number[plan[-1][-1]] == number[i]             # its prompt is there already
        tokens[rank] += len(response_ids[i]) if shared else whole
        if not plan or tokens[rank] > most_tokens or len(plan[-1]) == most_rows:
            plan.append([])
            tokens[rank] = whole
        plan[-1].append(i)
    idle = max(map(len, plans)) - len(plans[RANK])
    return [(part, True) for part in plans[RANK]] + [(rows[:1], False)] * idle


def forward(run, prompt_ids, response_ids, rows, counts, temperature):
    """get_packed_log_probs of some rows of a train batch; under an empty mask where they do not count."""
    some_prompts, some_responses = [prompt_ids[i] for i in rows], [response_ids[i] for i in rows]
    with autocast(run.args):
        log_probs, entropy, mask = get_packed_log_probs(run.model, some_prompts, some_responses, temperature)
    return log_probs, entropy, mask & counts


def optimizer_step(run, step, loss):
    """Clips the accumulated gradient and applies it, unless it or the update's loss is not finite."""
    args, learning_rate = run.args, run.args.learning_rate
    if args.lr_schedule == "linear":
        learning_rate *= 1 - (step - 1) / run.last_step
    reshard(run.model)
    parameters = list(run.model.parameters())
    for parameter in parameters:
        if parameter.grad is None:          # no row had anything to teach: AdamW's momentum moves on
            parameter.grad = torch.zeros_like(parameter)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)).item()
    loss = statistics.fmean(all_gather(float(loss)))
    is_finite = math.isfinite(norm) and math.isfinite(loss)
    if is_finite:
        run.optimizer.param_groups[0]["lr"] = learning_rate
        run.optimizer.step()
        run.log("train/loss", loss)
        run.log("train/grad_norm", norm)
    run.optimizer.zero_grad()
    run.log("train/learning_rate", learning_rate)
    run.log("train/skipped_updates", not is_finite)
    run.skipped = 0 if is_finite else run.skipped + 1
    if run.skipped == 5:
        raise UserError(f"the gradient of 5 updates in a row was not finite (norm {norm}, loss {loss}), so none of "
                        "them was applied; a lower --learning_rate may help")


# ---- 11. Supervised fine-tuning ------------------------------------------------------------------


def sft_update(run, examples, step):
    """One optimizer update on (prompt_ids, response_ids) pairs; the loss is in nats per token."""
    prompt_ids, response_ids = zip(*examples)
    mean_length = sum(map(len, response_ids)) / len(examples)
    total_loss = 0.0
    for rows, counts in microbatches(run.args, prompt_ids, response_ids, range(len(examples))):
        log_probs, entropy, mask = forward(run, prompt_ids, response_ids, rows, counts, 1.0)
        loss_divisor = len(examples) / len(rows) / WORLD_SIZE       # FSDP averages gradients over the ranks
        loss, _ = sft_microbatch_train_step(log_probs, mask, loss_divisor, normalize_constant=mean_length)
        total_loss += loss
        run.log("train/entropy", entropy[mask])
    optimizer_step(run, step, total_loss)


def load_examples(run):
    """(prompt_ids, response_ids) of the traces to train on. An end-of-sequence teaches the model to stop."""
    args, eos = run.args, run.tokenizer.eos_token_id
    traces = load_traces(args.sft_data, args.prompt, run.reward_fn)
    if args.n_sft_examples > len(traces):
        raise UserError(f"--n_sft_examples {args.n_sft_examples}: {args.sft_data} has {len(traces)}")
    if args.n_sft_examples:
        traces = random.Random(seed_for(args.seed, 0, "traces")).sample(traces, args.n_sft_examples)
    prompts = run.tokenizer([trace["prompt"] for trace in traces])["input_ids"]
    responses = run.tokenizer([trace["response"] for trace in traces], add_special_tokens=False)["input_ids"]
    examples = [(p, r + [eos]) for p, r in zip(prompts, responses) if len(p) + len(r) < args.max_length]
    dropped = len(traces) - len(examples)
    print(f"{len(examples)} traces from {args.sft_data}; {dropped} longer than {args.max_length} tokens dropped")
    if not examples:
        raise UserError(f"{args.sft_data}: every trace is longer than --max_length {args.max_length} tokens")
    return examples


def train_sft(args):
    """Fine-tunes on reasoning traces of a stronger model."""
    run = load_run(args)
    examples = load_examples(run)
    per_epoch = math.ceil(len(examples) / args.train_batch_size)
    first = start_training(run, args.sft_epochs * per_epoch)
    for step in range(first, run.last_step + 1):
        # 1. Take the next train batch, in a new order in each epoch, which a resumed run finds by its seed.
        epoch, i = divmod(step - 1, per_epoch)
        order = random.Random(seed_for(args.seed, epoch, "order of traces"))
        batch = order.sample(examples, len(examples))[i * args.train_batch_size:(i + 1) * args.train_batch_size]

        # 2. Update the policy.
        sft_update(run, batch, step)
        run.lap("training")

        # 3. Validate, log, save.
        finish_step(run, step)


# ---- 12. Expert iteration: sample, keep what is right, fine-tune on it, repeat -------------------


def train_expert_iteration(args):
    """The handout's Algorithm 2 ([EI]). Fine-tuning on correct samples alone is a policy gradient with
    reward 0 or 1 and no baseline."""
    run = load_run(args)
    problems = load_problems(run, args.train_data, at_least=args.ei_batch_size)
    first = start_training(run, args.n_ei_steps)
    for step in range(first, run.last_step + 1):
        # 1. Sample a few responses to each of some problems, from the policy as it is now.
        drawn = random.Random(seed_for(args.seed, step, "problems")).sample(problems, args.ei_batch_size)
        rollouts, repeated = sample(run, drawn, args.num_rollouts, step, "train", args.sampling_temperature)
        run.lap("sampling")

        # 2. Grade the text, keep the token ids of what is right.
        texts, truths = [rollout.text for rollout in rollouts], [problem["answer"] for problem in repeated]
        rewards, failures = grade_responses(run.reward_fn, texts, truths)
        run.lap("grading")
        log_generations(run, "train", step, rollouts, repeated, rewards, failures)
        correct = [(rollout.prompt_ids, rollout.response_ids)
                   for rollout, reward in zip(rollouts, rewards) if reward["reward"] == 1]
        run.log("train/correct", len(correct))

        # 3. Fine-tune on it: no update where nothing is right. The optimizer's state goes on.
        for epoch in range(args.sft_epochs):
            order = random.Random(seed_for(args.seed, step, f"epoch {epoch}")).sample(correct, len(correct))
            for i in range(0, len(correct), args.train_batch_size):
                sft_update(run, order[i:i + args.train_batch_size], step)
        run.lap("training")

        # 4. Validate, log, save.
        finish_step(run, step)


# ---- 13. GRPO: sample a group per question, compare within the group, policy gradient ------------


def compute_old_log_probs(run, prompt_ids, response_ids):
    """log π of the sampled tokens under the policy as it is now, (N, T). Each rank fills in its own rows."""
    old_log_probs = torch.zeros(len(response_ids), max(map(len, response_ids)), device=run.args.device)
    with torch.no_grad():
        for rows, counts in microbatches(run.args, prompt_ids, response_ids, range(len(response_ids))):
            log_probs, _, mask = forward(run, prompt_ids, response_ids, rows, counts, run.args.sampling_temperature)
            old_log_probs[rows, :mask.shape[1]] = log_probs
    return old_log_probs


def grpo_update(run, batch, rows, step):
    """One optimizer update on some rows of the rollout batch."""
    args, prompt_ids, response_ids = run.args, batch["prompt_ids"], batch["response_ids"]
    # A row of weight 0 has gradient 0: it need not go through the model. The mean stays the train batch's.
    weight = batch["raw_rewards"] if args.loss_type == "no_baseline" else batch["advantages"]
    useful = [i for i in rows if weight[i] != 0]
    constant = args.sampling_max_tokens if args.loss_aggregation == "masked_normalize" else None
    total_loss = 0.0
    for micro, counts in microbatches(args, prompt_ids, response_ids, useful):
        log_probs, entropy, mask = forward(run, prompt_ids, response_ids, micro, counts, args.sampling_temperature)
        old_log_probs = log_probs.detach()                          # on-policy the old policy is this one
        if batch["old_log_probs"] is not None:
            old_log_probs = batch["old_log_probs"][micro, :mask.shape[1]]
        token_weights = None
        if args.tis_cap:
            sampler_log_probs = batch["sampler_log_probs"][micro, :mask.shape[1]]
            token_weights = importance_weights(old_log_probs, sampler_log_probs, args.tis_cap)
        loss_divisor = len(rows) / len(micro) / WORLD_SIZE          # FSDP averages gradients over the ranks
        loss, metadata = grpo_microbatch_train_step(
            log_probs, mask, loss_divisor, args.loss_type, batch["raw_rewards"][micro], batch["advantages"][micro],
            old_log_probs, args.cliprange, constant, token_weights)
        total_loss += loss
        run.log("train/entropy", entropy[mask])
        if "clipped" in metadata:
            run.log("train/clip_fraction", metadata["clipped"][mask])
    optimizer_step(run, step, total_loss)


def train_grpo(args):
    """The handout's Algorithm 3 ([GRPO]). One step: N rollouts, then one update per train batch and epoch;
    more than one makes it off-policy."""
    run = load_run(args)
    prompts_per_step = args.rollout_batch_size // args.group_size
    problems = load_problems(run, args.train_data, at_least=prompts_per_step)
    updates_per_step = args.epochs_per_rollout_batch * (args.rollout_batch_size // args.train_batch_size)
    first = start_training(run, args.n_grpo_steps)
    for step in range(first, run.last_step + 1):
        # 1. Sample a group of G responses to each of some problems. The policy is π_old from here on.
        drawn = random.Random(seed_for(args.seed, step, "problems")).sample(problems, prompts_per_step)
        rollouts, repeated = sample(run, drawn, args.group_size, step, "train", args.sampling_temperature)
        run.lap("sampling")

        # 2. Grade them and compare each with its group.
        texts, truths = [rollout.text for rollout in rollouts], [problem["answer"] for problem in repeated]
        advantages, raw_rewards, grades = compute_group_normalized_rewards(
            run.reward_fn, texts, truths, args.group_size, args.advantage_eps,
            args.use_std_normalization and args.group_size > 1)
        run.lap("grading")
        log_generations(run, "train", step, rollouts, repeated, grades["rewards"], grades["failures"])
        run.log("train/equal_groups", grades["equal_groups"])

        # 3. A row for each response: token ids, weights (N, 1), log-probs (N, T).
        batch = {"prompt_ids": [rollout.prompt_ids for rollout in rollouts],
                 "response_ids": [rollout.response_ids for rollout in rollouts],
                 "raw_rewards": raw_rewards[:, None].to(args.device),
                 "advantages": advantages[:, None].to(args.device),
                 "sampler_log_probs": pad_log_probs(rollouts).to(args.device), "old_log_probs": None}
        if updates_per_step > 1:        # from the second update on π is not π_old any more
            batch["old_log_probs"] = compute_old_log_probs(run, batch["prompt_ids"], batch["response_ids"])

        # 4. Update the policy: once on-policy, or once for each train batch in each epoch.
        for epoch in range(args.epochs_per_rollout_batch):
            order = random.Random(seed_for(args.seed, step, f"epoch {epoch}")).sample(range(len(rollouts)), len(rollouts))
            for i in range(0, len(order), args.train_batch_size):
                grpo_update(run, batch, order[i:i + args.train_batch_size], step)
        run.lap("training")

        # 5. Validate, log, save.
        finish_step(run, step)


# ---- 14. Evaluation as a run, comparisons, main --------------------------------------------------


def run_eval(args):
    """Evaluates a model, or answers one question. Writes summary.json and samples.jsonl."""
    run = load_run(args)
    if args.question:
        prompt = {"prompt_ids": run.tokenizer(format_prompt(args.prompt, args.question))["input_ids"]}
        rollouts, _ = sample(run, [prompt], args.eval_samples, 0, "eval", args.eval_temperature)
        for rollout in rollouts:
            print(rollout.text.strip())
        return
    if RANK == 0:
        open_output_dir(args, -1)
    evaluate(run, args.eval_samples, 0)
    metrics = run.step_metrics()
    if RANK == 0:
        summary = {"model": args.model, "prompt": args.prompt, "temperature": args.eval_temperature, **metrics}
        replace_text(Path(args.output_dir, "summary.json"), json.dumps(summary, indent=2) + "\n")
        for name, value in metrics.items():
            print(f"{name:24s} {value:.4g}")
        print(f"{args.output_dir}/summary.json, samples.jsonl")


ALGORITHMS = {"eval": run_eval, "sft": train_sft, "ei": train_expert_iteration, "grpo": train_grpo}


def compare(args, argv):
    """Runs every variant of --compare with every seed, each as a process of its own that resumes what is
    there, and writes compare.png and compare.md."""
    folder, (flag, _, values) = Path(getattr(args, "output_dir", "compare_output")), args.compare.partition("=")
    if not values or WORLD_SIZE > 1:
        raise UserError(f"--compare {args.compare} should be FLAG=A,B,…, and runs without torchrun")
    runs, commands = {}, {}
    for value in values.split(","):             # all of them are checked before the first one runs
        label = f"{flag}={value}"
        runs[label] = [folder / label.replace("/", "_") / f"seed{seed}" for seed in range(args.seeds)]
        for seed, output_dir in enumerate(runs[label]):
            # Of a flag given twice the last one counts, so this is a run, not a comparison.
            command = [*argv, "--compare=", f"--{label}", f"--seed={seed}", f"--output_dir={output_dir}"]
            settings, before = vars(parse_args(command)), read_settings(output_dir)
            different = [key for key in before if key != "resume" and settings.get(key) != before[key]]
            if settings["algo"] == "eval" or settings["overwrite"]:
                raise UserError("--compare compares training runs and goes on with those that are there")
            if different:
                raise UserError(f"{output_dir} holds a run with --{different[0]} {before[different[0]]}; "
                                "choose another --output_dir")
            commands[output_dir] = [*command, "--resume"]
    for output_dir, command in commands.items():
        print(f"--- {output_dir}", flush=True)
        child = subprocess.Popen([sys.executable, __file__, *command])
        # A terminal's Ctrl-C reaches the child by itself, which ends its step; a scheduler's SIGTERM does not.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        if child.wait() != 0:
            sys.exit(child.returncode)
    table = report(runs, folder / "compare.png", "seconds" if flag == "algo" else "step", args.target)
    replace_text(folder / "compare.md", f"`python align.py {' '.join(argv)}`\n\n{table}\n")
    print(f"{table}\n{folder}/compare.png, compare.md")


def main(argv=None):
    """Runs the command line. A user's mistake ends in one sentence and exit code 2."""
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
            ALGORITHMS[args.algo](args)
        leave_ranks()


if __name__ == "__main__":
    main()
