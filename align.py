"""Align a language model to reason: zero-shot baseline, SFT, expert iteration and GRPO with verified rewards, in one file.

    python align.py --algo eval                       # how good is the base model?
    python align.py --algo grpo                       # make it better; --algo sft and --algo ei do it in other ways
    python align.py --algo grpo --model sft_output/final_model

On a machine without a GPU this trains a tiny model on arithmetic in minutes (--preset tiny); with an 80 GB GPU it trains
Qwen2.5-Math-1.5B on MATH (--preset math). Both go through the same code below. The setting is that of Stanford CS336's assignment 5,
the functions of sections 5 to 7 carry the names and signatures of its handout, and `python align.py --help` lists every knob.

Symbols:  B sequences in a batch    T tokens (labels, that is, shifted by one)    V vocabulary
          G rollouts per prompt     N rollouts per step = prompts × G
          π the policy (the model)  r reward in {0, 1}    A advantage    ρ = π(token) / π_old(token)

Sources, cited as [name] below:
  [R1] DeepSeek-R1, arXiv:2501.12948          [GRPO] DeepSeekMath, arXiv:2402.03300     [PPO] arXiv:1707.06347
  [DrGRPO] arXiv:2503.20783                   [EI] Expert iteration, arXiv:1705.05439   [pass@k] Codex, arXiv:2107.03374
  [IMPALA] arXiv:1802.01561                   [TIS] Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025

Where this departs from the papers, on purpose:
  1. No KL penalty and no reference model: with a verified reward there is no reward model to over-optimise ([DrGRPO] does the same).
  2. The gradient uses the token ids that were sampled. Text decoded and tokenised again can come back as other tokens.
  3. When a rollout batch serves for one update only, the old log-probs are the new ones, so ρ = 1 without a second forward pass.
  4. Log-probs are those of the sampling distribution: logits are divided by the sampling temperature in training too.
  5. The SFT loops normalise by the mean response length of the batch, so that the loss reads as nats per token.
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
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
import sys
import threading
import time
import urllib.request
from fractions import Fraction
from pathlib import Path

import huggingface_hub
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
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging


class UserError(ValueError):
    """Something that the user can mend: `main` prints it as one sentence and exits with code 2."""


def reason(error):
    """What an exception says, on one line: the first two lines of its message."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:500] or type(error).__name__


# Many GPUs: `torchrun --nproc_per_node N align.py …` starts N of these programs, the ranks. Each samples, grades and trains on its share
# of the work and holds its share of the weights (`shard`, section 6). One process alone is rank 0 of 1.


def rank():
    """The number of this process among the ranks."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size():
    """How many ranks there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def from_all_ranks(value):
    """What each rank passes here, in order, on every rank. They all have to call it."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def by_all_ranks(function, items):
    """function(items), a list of one result per item, each rank computing its share of it."""
    share, size = items[rank()::world_size()], world_size()
    shares = from_all_ranks(function(share) if share else [])
    return [shares[i % size][i // size] for i in range(len(items))]


def join_ranks():
    """Under torchrun: finds the other ranks and takes a GPU. From here on rank 0 alone prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                             timeout=datetime.timedelta(hours=2))       # rank 0 may be saving, or making the data
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def leave_ranks(code=0):
    """Ends this process, if it is one of several, once all of them are here. At once: the threads of a process group crash the usual end."""
    if world_size() > 1:
        from_all_ranks(None)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def out_of_memory(error):
    """Is this exception PyTorch's way to say so? (On a CPU it is a plain RuntimeError.)"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def one_sentence(program):
    """What goes wrong inside and is not the program's own fault ends it with one sentence on stderr and an exit code, not with a traceback."""
    handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]       # stop_on_signals changes them
    message = None
    try:
        yield
    except UserError as error:
        message, code = str(error), 2
    except OSError as error:                    # no space, no permission, a folder that vanished
        message, code = f"{error}; what was saved before is intact", 2
    except RuntimeError as error:
        if out_of_memory(error):
            message, code = ("out of memory; --tokens_per_microbatch bounds training, --sampler_batch_size and --gpu_memory_utilization bound "
                             "sampling; what was saved before is intact"), 2
        elif re.search(r"gloo|NCCL|TCPStore", str(error)):
            message, code = f"another rank is gone ({reason(error)}); what was saved before is intact", 1
        else:
            raise
    except KeyboardInterrupt:
        message, code = "interrupted; what was saved before is intact", 130
    finally:
        if message:
            if int(os.environ.get("RANK", 0)) > 0:      # rank 0 speaks for all; what another one has to say is heard where rank 0 lives on
                signal.signal(signal.SIGTERM, signal.SIG_DFL)       # which torchrun sends as soon as a rank has ended
                time.sleep(2)
            sys.stdout.flush()
            print(f"{program}: {message}", file=sys.stderr, flush=True)
        for handler in handlers:
            signal.signal(*handler)
    if message:
        sys.exit(code) if world_size() == 1 else os._exit(code)       # at once: the others may wait for this one for ever


def use_hub_or_cache():
    """Where the Hugging Face hub does not answer, its client is set to use the cache alone, instead of trying again for a minute."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except (OSError, ValueError) as error:      # an HTTP error is an answer, too; certificates that this Python has not the hub's client brings
        huggingface_hub.constants.HF_HUB_OFFLINE |= not re.search("HTTP Error|SSL", str(error))


# ----------------------------------------------------------------------------------------------------------------------
# 1. Arguments: every knob, declared once
# ----------------------------------------------------------------------------------------------------------------------

OUTPUT_DIRS = {"eval": "baseline_output", "sft": "sft_output", "ei": "expert_iteration_output", "grpo": "grpo_output"}
ALGOS = tuple(OUTPUT_DIRS)
LOSS_TYPES = ("no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip")

# A flag beats the preset's entry for the algorithm, which beats the preset's own entry, which beats the flag's default.
PRESETS = {
    # 0.7M parameters, chains of one-digit sums; two CPU cores, minutes.
    "tiny": dict(
        model="data/arithmetic/base_model", prompt="tiny", train_data="data/arithmetic/train.jsonl", val_data="data/arithmetic/test.jsonl",
        sft_data="data/arithmetic/sft.jsonl", sampling_max_tokens=64, validation_size=512, lr_schedule="linear", max_length=256,
        tokens_per_microbatch=4096,
        eval=dict(validation_size=0),
        sft=dict(learning_rate=3e-4, train_batch_size=32, sft_epochs=16, validation_frequency=8, save_frequency=500),
        ei=dict(learning_rate=3e-4, train_batch_size=64, n_ei_steps=8, ei_batch_size=256, sft_epochs=2, validation_frequency=1, save_frequency=4),
        grpo=dict(learning_rate=6e-4, n_grpo_steps=50, rollout_batch_size=512, train_batch_size=512, validation_frequency=5, save_frequency=50),
    ),
    # Qwen2.5-Math-1.5B on MATH with the handout's hyperparameters; one 80 GB GPU, hours.
    "math": dict(
        model="Qwen/Qwen2.5-Math-1.5B", prompt="r1_zero", train_data="data/MATH/train.jsonl", val_data="data/MATH/test.jsonl",
        sft_data="data/MATH/sft.jsonl", sampling_max_tokens=1024, validation_size=1024, lr_schedule="constant", max_length=2048,
        tokens_per_microbatch=2048, learning_rate=1e-5,
        eval=dict(validation_size=0),
        sft=dict(train_batch_size=64, sft_epochs=3, validation_frequency=50, save_frequency=500),
        ei=dict(train_batch_size=64, n_ei_steps=5, ei_batch_size=1024, sft_epochs=1, validation_frequency=1, save_frequency=1),
        grpo=dict(n_grpo_steps=200, rollout_batch_size=256, train_batch_size=256, validation_frequency=10, save_frequency=50),
    ),
}


def bounded(kind, low, high=math.inf):
    """An argparse type: an int or a float between `low` and `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:        # false for nan, too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return number


def boolean(text):
    """An argparse type: true or false."""
    return bool(("false", "true").index(text.lower()))      # a ValueError for any other word, which argparse reports


def build_parser():
    """(parser, {flag: the algorithms that use it}, {flag: its default}). The parser returns the flags that were typed, without defaults."""
    parser = argparse.ArgumentParser(prog="align.py", description=__doc__.split("\n\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    users, defaults = {}, {}

    def group(title, *algos):
        section = parser.add_argument_group(f"{title} ({', '.join(algos)})")

        def add(flag, help, default=None, **options):
            users[flag], defaults[flag] = algos, default
            help += f" (default: {default})" if default is not None else ""
            for name, preset in PRESETS.items():
                values = {str(entry[flag]) for entry in (preset, *map(preset.get, ALGOS)) if flag in entry}
                help += f" [{name}: {' | '.join(sorted(values))}]" if values else ""
            section.add_argument(f"--{flag}", help=help, **options)
        return add

    count, positive, real = bounded(int, 0), bounded(int, 1), bounded(float, 0)
    switch = dict(type=boolean, nargs="?", const=True)
    add = group("what to run", *ALGOS)
    add("algo", "which of the four to run", choices=ALGOS)
    add("preset", "defaults for the rest; auto: math where there is CUDA, else tiny", "auto", choices=("auto", *PRESETS))
    add("model", "a Hugging Face id or a folder, such as sft_output/final_model")
    add("prompt", "a name in PROMPTS (section 2)")
    add("val_data", "JSON lines of problems to evaluate on")
    add("output_dir", "where the run writes; by default one folder per algorithm")
    add("overwrite", "replace the run that output_dir holds", False, **switch)
    add("seed", "of every random draw", 0, type=int)
    add("dtype", "of the matrix products (autocast over float32 weights); auto: bfloat16 on a GPU", "auto", choices=("auto", "float32", "bfloat16"))
    add("plot", "draw these runs into one picture, compare.png, and stop", nargs="+", metavar="DIR")
    add("compare", "run with each value of the flag and each seed, in folders of output_dir (compare_output), into one picture and one table; "
        "finished runs are not run again", metavar="FLAG=A,B,…")
    add("seeds", "with --compare: runs of each variant, with seeds 0, 1, …", 3, type=positive)
    add("target", "with --compare: the accuracy whose time is measured", 0.8, type=bounded(float, 0, 1))

    add = group("sampling and evaluation", *ALGOS)
    add("sampler", "what generates the responses; auto: vllm on a GPU, else torch", "auto", choices=("auto", "vllm", "torch"))
    add("sampler_batch_size", "sequences that the torch sampler holds at a time", 512, type=positive)
    add("gpu_memory_utilization", "share of the GPU's memory that vLLM takes for itself", 0.3, type=bounded(float, 0.01, 1))
    add("vllm_sleep", "give vLLM's memory to training while it does not sample", False, **switch)
    add("sampling_min_tokens", "no response ends before; 0: off", 4, type=count)
    add("sampling_max_tokens", "responses are cut after so many tokens", type=positive)
    add("eval_temperature", "0: greedy", 1.0, type=real)
    add("validation_size", "problems to evaluate on, always the same ones; 0: all", type=count)

    add = group("evaluation only", "eval")
    add("eval_samples", "responses per problem, for pass@k", 1, type=positive)
    add("question", "answer this question, print the answer and stop")

    add = group("training", "sft", "ei", "grpo")
    add("learning_rate", "of AdamW", type=real)
    add("lr_schedule", "linear: down to zero over the run", choices=("constant", "linear"))
    add("weight_decay", "of AdamW; 0: off", 0.0, type=real)
    add("gradient_clip_value", "bound on the gradient's norm; inf: off", 1.0, type=bounded(float, 1e-9))
    add("train_batch_size", "sequences per optimizer update", type=positive)
    add("tokens_per_microbatch", "that go through the model at a time, prompts included; fewer take less memory for the same update", type=positive)
    add("gradient_accumulation_steps", "microbatches to split a train batch into instead (CS336: GRPO 128, SFT 32); 0: off", 0, type=count)
    add("validation_frequency", "steps between validations; 0: first and last step only", type=count)
    add("save_frequency", "steps between checkpoints; 0: the final model only", type=count)
    add("keep_checkpoints", "only the newest so many; 0: all", 0, type=count)
    add("resume", "go on from the newest checkpoint in output_dir, with that run's settings where no flag says otherwise", False, **switch)
    add("wandb_project", "log to this Weights & Biases project as well")

    add = group("supervised data", "sft")
    add("sft_data", "JSON lines of reasoning traces")
    add("n_sft_examples", "use so many traces, drawn at random; 0: all", 0, type=count)
    add("max_length", "traces longer than this, prompt included, are dropped (tokens)", type=positive)

    add = group("supervised updates", "sft", "ei")
    add("sft_epochs", "passes over the traces (ei: over each step's correct samples)", type=positive)

    add = group("sampling for training", "ei", "grpo")
    add("train_data", "JSON lines of problems to sample on")
    add("sampling_temperature", "1: sample from the policy itself", 1.0, type=bounded(float, 1e-3))

    add = group("expert iteration", "ei")
    add("n_ei_steps", "rounds of sample, filter, fine-tune", type=positive)
    add("ei_batch_size", "problems per round", type=positive)
    add("num_rollouts", "responses per problem", 4, type=positive)

    add = group("GRPO", "grpo")
    add("n_grpo_steps", "rollout batches", type=positive)
    add("rollout_batch_size", "N, responses per step", type=positive)
    add("group_size", "G, responses per problem", 8, type=positive)
    add("epochs_per_rollout_batch", "passes over each rollout batch; above 1: off-policy", 1, type=positive)
    add("loss_type", "see section 7", "reinforce_with_baseline", choices=LOSS_TYPES)
    add("cliprange", "ε of grpo_clip", 0.2, type=real)
    add("use_std_normalization", "divide a group's advantages by its standard deviation; false: as [DrGRPO]", True, **switch)
    add("advantage_eps", "added to that standard deviation", 1e-6, type=real)
    add("is_correction", "bound on a token's weight π_old / π_sampler, which corrects for other numerics; 2 is usual, 0: off", 0.0, type=real)
    add("length_normalization", "divide a response's loss by its own length, or by sampling_max_tokens as [DrGRPO]", "masked_mean",
        choices=("masked_mean", "masked_normalize"))
    return parser, users, defaults


def read_settings(folder):
    """The settings of the run that a folder holds; {} where it was stopped before it wrote any."""
    path = Path(folder, "args.json")
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read, so that the run cannot be resumed: {reason(error)}") from error


def parse_args(argv):
    """The run's settings. Raises UserError for a flag that is wrong, that contradicts another or that the run would not use."""
    parser, users, defaults = build_parser()

    def complain(message):
        raise UserError(message)

    parser.error = complain
    # --group-size=4 means --group_size=4
    argv = [re.sub(r"^--[\w-]+(?==|$)", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    typed = vars(parser.parse_args(argv))
    if "plot" in typed or typed.get("compare"):
        return argparse.Namespace(**defaults | typed)
    if "algo" not in typed:
        raise UserError("say what to run: --algo eval, sft, ei or grpo")
    algo, cuda = typed["algo"], torch.cuda.is_available()
    for flag in sorted(typed):
        if algo not in users[flag]:
            raise UserError(f"--{flag} is not used by --algo {algo} (it is for {', '.join(users[flag])})")

    output_dir = typed.get("output_dir", OUTPUT_DIRS[algo])
    before = read_settings(output_dir) | {"overwrite": False} if typed.get("resume") else {}
    if before.get("algo", algo) != algo:
        raise UserError(f"{output_dir} holds a run of --algo {before['algo']}, which --algo {algo} cannot resume")
    preset = typed.get("preset", before.get("preset", "auto"))
    if preset == "auto":
        preset = "math" if cuda else "tiny"
        print(f"preset {preset}: {'a GPU is' if cuda else 'no GPU'} here (--preset chooses)")
    values = defaults | PRESETS[preset] | PRESETS[preset][algo] | before | typed | {"preset": preset, "output_dir": output_dir}
    args = argparse.Namespace(**{flag: values[flag] for flag in users if algo in users[flag]}, device="cuda" if cuda else "cpu")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if cuda else "float32"

    vllm = args.sampler == "vllm" or (args.sampler == "auto" and cuda)
    baseline = values["loss_type"] != "no_baseline"
    for flag, is_used, where in (("seeds", "compare" in typed, "with --compare"), ("target", "compare" in typed, "with --compare"),
                                 ("overwrite", not values["resume"], "without --resume"), ("gpu_memory_utilization", vllm, "with --sampler vllm"),
                                 ("vllm_sleep", vllm, "with --sampler vllm"), ("sampler_batch_size", args.sampler != "vllm", "with --sampler torch"),
                                 ("tokens_per_microbatch", not values["gradient_accumulation_steps"], "with --gradient_accumulation_steps 0"),
                                 ("cliprange", values["loss_type"] == "grpo_clip", "with --loss_type grpo_clip"),
                                 ("use_std_normalization", baseline, "with a loss with a baseline"),
                                 ("advantage_eps", baseline and values["use_std_normalization"], "with --use_std_normalization")):
        if flag in typed and not is_used:
            raise UserError(f"--{flag} is only used {where}")
    for total, part in (("train_batch_size", "gradient_accumulation_steps"), ("rollout_batch_size", "group_size"),
                        ("rollout_batch_size", "train_batch_size")):
        if algo in users[total] and algo in users[part] and values[part] and values[total] % values[part]:
            raise UserError(f"--{part} {values[part]} does not divide --{total} {values[total]}")
    if args.sampling_min_tokens > args.sampling_max_tokens:
        raise UserError(f"--sampling_min_tokens {args.sampling_min_tokens} is above --sampling_max_tokens {args.sampling_max_tokens}")
    if baseline and "group_size" in args and args.group_size == 1:
        raise UserError("--group_size 1 leaves no group to compare with: every advantage is 0")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Prompts
# ----------------------------------------------------------------------------------------------------------------------

# r1_zero and question_only are the handout's. tiny is r1_zero without the preamble: a base model of 0.7M parameters
# cannot read instructions, and on a laptop every token of a prompt is paid for in every rollout.
PROMPTS = {
    "r1_zero": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant first "
        "thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process is "
        "enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
        "reasoning process here </think> <answer> answer here </answer>.\nUser: {question}\nAssistant: <think>"
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

# Step 1: one spelling for each meaning. A set or a union is spelled as the list of its parts.
CHARACTERS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": ","})
WORD = r"(?!(?:(?:arc)?(?:sin|cos|tan)|sec|csc|cot|log|ln|sqrt|pmatrix)(?![a-zA-Z]))[a-zA-Z]"       # where no function's name begins
SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in (
    (r"(?<=\d)(\{,\}|,\\!)\s*(?=\d{3}(?!\d))", ""),                                                         # thousands
    (r"(?<![\d.,(\[{])(?<![(\[{,]-)\d{1,3}(,\d{3})+(?![\d,])(?!,\s)", lambda match: match[0].replace(",", "")),
    (r"(?<!\\)\\[,;:! ]|~|\\(left|right|displaystyle|q?quad|[bB]igg?[lr]?|approx)(?![a-zA-Z])", " "),       # layout
    (r"\\?[$%°]|\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])|(?<!\\)\\[\[\](){}]", ""),      # $, %, degrees; delimiters, braces of a set
    (r"\\cup(?![a-zA-Z])", ","), (r"\\(pm|mp)(?![a-zA-Z])", "±"), (r"^\s*[a-zA-Z]\s*(∈|\\in(?![a-zA-Z]))\s*", ""),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "), (r"(?<![\\a-zA-Z])inf(ini)?ty(?![a-zA-Z])", r"\\infty "), (r"\{bmatrix\}", "{pmatrix}"),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\\[a-zA-Z]+|\w))\s*(?:\{([^{}]*)\}|(\\[a-zA-Z]+|\w))", r"\\frac{\1\2}{\3\4}"),       # \dfrac12
    (r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(?:\(([^()]*)\)|(\w+))|\\sqrt\s*(\d)", r"\\sqrt{\1\2\3}"),
    (r"(?<=[^\s,(])\s*\\(text\w*|mbox|mathrm)\s*\{(?!\s*(and|or)\b)[^{}]*\}\s*(\^\s*\{?\d+\}?)?\s*[.]?\s*$", ""),   # 12\text{ cm}^2
    (r"\\(text\w*|mbox|math(rm|bf|it)|operatorname)\s*\{([^{}]*)\}", r" \3 "),
    (rf"^(\s*[-+]?[\d.,/]+|.*\}}|.*\\pi)\s+{WORD}[a-zA-Z]+\.?(?: [a-zA-Z ,'.-]*)?(\^\s*\{{?\d+\}}?)?\s*$", r"\1"),  # 12 square cm
    (r",?\s+(and|or)\s+", ", "), (r"(?<![\w.}/^])(\d+)\s*/\s*(\d+)(?![\d/]|\.\d)", r"\\frac{\1}{\2}"),          # 3/4\pi is \frac{3}{4}\pi
    (r"\s+", " "), (r"\. ?$| (?=[,)\]}])|(?<=[,(\[{]) ", ""), (r"(\d) ?_ ?\{(\d+)\}", r"\1_\2"),              # 506_{7}
)]


def outline(text):
    """The text with blanks for what stands inside of brackets; intervals mix their kinds, so any closes any. outline("(1,2]+3") == "(   ]+3"."""
    depth, characters = 0, []
    for character in text:
        depth -= character in ")]}"
        characters.append(character if depth == 0 else " ")
        depth += character in "([{"
    return "".join(characters)


def last_boxed(text):
    r"""The content of the last \boxed{…} with balanced braces, or None. last_boxed(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"."""
    boxed = text[text.rfind(r"\boxed{"):]
    match = re.match(r"\\boxed\{( *)[)\]}]", outline(boxed))
    return boxed[match.start(1):match.end(1)] if match else None


def normalize_answer(text):
    r"""An answer in one spelling: normalize_answer(r"$\dfrac12$ cm") == r"\frac{1}{2}"."""
    text = re.sub(r"^(\\[(\[]|\$|\s)+|(\\[)\]]|\$|\s)+$", "", text)
    while re.fullmatch(r"(\\f?boxed)?\{ *\}", outline(text)):
        text = text[text.index("{") + 1:-1].strip(" $")
    text = text.translate(CHARACTERS)
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    return text.strip()


# Step 2: what can be decided exactly.
def as_number(text):
    r"""The exact value of a plain number, as 1234.5, \frac{3}{4}, 1\frac{3}{4}, 2.5e-3, 2.5\times 10^{-3} or 10^6; else None."""
    text = re.sub(r"(^|^([-+]?[\d.]+) ?(\\times|\\cdot|\*) ?)10 ?\^ ?\{?([-+]?\d{1,3})\}?$", lambda match: f"{match[2] or 1}e{match[4]}", text)
    mixed = re.fullmatch(r"([+-]?) ?(\d*) ?\\frac\{([+-]?\d+)\}\{0*([1-9]\d*)\}", text)
    if mixed:
        return int(mixed[1] + "1") * (int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4])))
    decimal = re.fullmatch(r"([+-]?) ?((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)", text)
    return Fraction(decimal[1] + decimal[2]) if decimal else None


def as_items(text):
    """(brackets, items) of a tuple or an interval; ("", items) of a list, and of a single value, which is a list of one."""
    is_tuple = re.fullmatch(r"[(\[] *[)\]]", outline(text)) and "," in outline(text[1:-1])
    brackets, inner = (text[0] + text[-1], text[1:-1]) if is_tuple else ("", text)
    commas = [i for i, character in enumerate(outline(inner)) if character == ","]
    items = [inner[start + 1:end].strip() for start, end in zip([-1] + commas, commas + [len(inner)])]
    return brackets, [item.replace("±", sign).lstrip("+ ") for item in items for sign in ("+-" if "±" in item else "+")]     # a ± b is two values


# Step 3: math-verify for the rest, behind a guard: it takes words, 506_7 and 3:5 for products, and towers of powers would take it forever.
FOREIGN = re.compile(rf"\d ?_|\d ?: ?\d|(?<![\\a-zA-Z]){WORD}[a-zA-Z]{{3,}}|__|['\"]|<<|\*\*.*\*\*|[^\x00-\x7f]|"
                     r"\^\s*[{(]*\s*-?\d+\s*(\^|!|\*\*)|\^\s*[{(]*\s*-?\d{5,}|\d{3,}\s*!|!\s*\)+\s*!")
NOT_MATHS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError, TypeError, ValueError)


def parse_math(text, seconds):
    """The sympy object of a LaTeX string; one of NOT_MATHS where math-verify finds none."""
    # Bare strings such as (3,-1) parse to nothing, \boxed{} ones do. units=True would eat trailing letters, as the b of a + b.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="all", equations=False)
    value = math_verify.parse(r"\boxed{%s}" % text, [math_verify.LatexExtractionConfig(normalization_config=rules)], parsing_timeout=seconds)[0]
    return value.subs({s: sympy.I if s.name == "i" else sympy.Symbol(s.name) for s in value.free_symbols})      # they come with odd assumptions


def same_value(answer, truth):
    """math-verify's verdict on two expressions; two equations are the same where one is a multiple of the other."""
    if FOREIGN.search(answer) or FOREIGN.search(truth):
        return False
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)     # it logs whole responses
    seconds = 2 if threading.current_thread() is threading.main_thread() else None      # an alarm signal: only a main thread can get it
    try:
        if "=" in answer + truth:       # math-verify compares solutions, and two equations without any compare as equal
            left, right = (parse_math("{}-({})".format(*text.split("=")), seconds) for text in (answer, truth))
            ratio = sympy.cancel(left / right)
            return bool(ratio.is_number and ratio.is_finite and ratio != 0)
        return math_verify.verify(parse_math(truth, seconds), parse_math(answer, seconds), timeout_seconds=seconds)     # truth first: not symmetric
    except NOT_MATHS:
        return False


# The three together.
def plain(text):
    """For comparing words: no case, no article, no space except between digits."""
    return re.sub(r"^(an?|the) |\s(?!\d)|(?<!\d)\s", "", text.casefold())


def same(answer, truth):
    """Do two normalised answers mean the same?"""
    numbers = as_number(answer), as_number(truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if plain(answer) == plain(truth):
        return answer != ""
    (left, _, right), (true_left, _, true_right) = answer.rpartition("="), truth.rpartition("=")
    is_name = re.fullmatch(r"\\?[a-zA-Z]+(_\{?\w+\}?)?\s*(\([^=]*\))?\s*", left + true_left)
    if plain(left) == plain(true_left) != "" or is_name and "" in (left, true_left):
        return same(right.strip(), true_right.strip())      # x = 5 is 5 and f(x) = 2x is 2x, but 7 = 2x is not 2x
    (brackets, items), (true_brackets, true_items) = as_items(answer), as_items(truth)
    if brackets != true_brackets or len(items) != len(true_items):
        return False
    if brackets:
        return all(same(a, t) for a, t in zip(items, true_items))
    if len(items) == 1:
        return same_value(answer, truth)
    for true_item in true_items:            # a list has no order: every item of the truth takes one of the answer's away
        match = next((item for item in items if same(item, true_item)), None)
        if match is None:
            return False
        items.remove(match)
    return True


def grade(answer, truth):
    """True where `answer` means the same as `truth` (strings, LaTeX or plain)."""
    if max(len(answer), len(truth)) > 400:          # longer than any answer: not worth the risk
        return answer.strip() == truth.strip() != ""
    return same(normalize_answer(answer), normalize_answer(truth))


def extract_answer(response):
    """The answer in " 7+5=12 </think> <answer> 12 </answer>", here "12"; None but for this format, each tag once and nothing after the end."""
    if any(response.count(tag) != 1 for tag in ("</think>", "<answer>", "</answer>")):
        return None
    match = re.search(r"</think> <answer>(.*)</answer>\s*$", response, re.DOTALL)
    return match[1].strip() if match else None


def score(answer, truth):
    """The reward dict of an extracted answer, or of None where the format was not followed. [R1] section 2.2.2, without a format bonus."""
    right = float(answer is not None and grade(answer, truth))
    return {"reward": right, "format_reward": float(answer is not None), "answer_reward": right}


def r1_zero_reward_fn(response, ground_truth):
    """{"reward", "format_reward", "answer_reward"}, each 0.0 or 1.0, of a response to the r1_zero prompt.

    Departures from CS336's grader: each tag once and nothing after the end (it takes the last of several answers, which pays for guessing
    twice); no answer inside a sentence or a longer text; exact arithmetic instead of float tolerance; percent and units are dropped;
    interval brackets, order and length of tuples count; equations are compared as equations; every comparison comes to an end.
    """
    return score(extract_answer(response), ground_truth)


def question_only_reward_fn(response, ground_truth):
    r"""The same for a response to the bare question: the answer is the last \boxed{}."""
    return score(last_boxed(response), ground_truth)


def reward_fn_and_stop(prompt_name):
    """(reward function, stop string) that go with a prompt; without a stop string a response ends with the end-of-sequence token."""
    return (question_only_reward_fn, None) if prompt_name == "question_only" else (r1_zero_reward_fn, "</answer>")


# Grading a batch, in worker processes: sympy can hang in C code, where no signal reaches it, or take all memory. A process can be killed.
DEADLINE = 3.0              # seconds for one response
WORKER_MEMORY = 2 << 30     # bytes that a worker may take
say_once = functools.cache(print)       # what was printed once is not printed again


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
    pool = pebble.ProcessPool(max_workers=max(1, min(os.cpu_count() // world_size(), 16)), initializer=start_worker, context=context)
    atexit.register(lambda: (pool.stop(), pool.join()))
    return pool


def grade_pairs(reward_fn, pairs):
    """The reward dict of each (response, truth) pair; the error's text for one whose grading crashed, raised or exceeded DEADLINE."""
    try:
        pickle.dumps(reward_fn)
    except (pickle.PicklingError, AttributeError, TypeError):
        say_once(f"{getattr(reward_fn, '__name__', reward_fn)} cannot be pickled: it grades in this process, without a deadline", flush=True)
        return [reward_fn(response, truth) for response, truth in pairs]
    for _ in range(2):                          # twice where a worker that had no work was killed, and with it the pool
        if not grading_pool().active:
            grading_pool.cache_clear()
        futures = [grading_pool().schedule(reward_fn, args=pair, timeout=DEADLINE) for pair in pairs]
        rewards = [repr(future.exception()) if future.exception() else future.result() for future in futures]
        if grading_pool().active:
            break
    return rewards


def grade_responses(reward_fn, responses, truths):
    """Grades every response, with all workers at once. Returns (the reward dicts, how many could not be graded: those score 0).

    reward_fn: any function of (response, ground_truth) that returns {"reward", "format_reward", "answer_reward"}.
    """
    rewards = by_all_ranks(functools.partial(grade_pairs, reward_fn), list(zip(responses, truths, strict=True)))
    errors = [reward for reward in rewards if isinstance(reward, str)]
    if len(errors) == len(rewards) >= 32:       # not a hard case here and there, but a reward function that does not work
        raise UserError(f"the reward function failed on every one of {len(rewards)} responses, first with {errors[0]}")
    no_reward = {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
    return [no_reward if isinstance(reward, str) else reward for reward in rewards], len(errors)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Data: JSON lines in, dicts out
# ----------------------------------------------------------------------------------------------------------------------


def read_jsonl(path, required, may_be_blank=None):
    """The dicts of a JSON-lines file, each checked to hold non-empty strings (but for `may_be_blank`) under the `required` keys.

    `required` lists alternatives, e.g. [("problem", "answer")]. Raises UserError naming the file and the line.
    """
    keys = " or ".join(" and ".join(map(repr, keys)) for keys in required)
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")         # splitlines() would split at a U+2028 inside of a string, too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); "
                        f"it should hold JSON lines with {keys or 'metrics'}") from error
    records = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:         # json's own error, or a number with more digits than Python converts
            raise UserError(f"{path}, line {i}: not valid JSON ({error})") from error
        if not isinstance(record, dict) or not any(
                all(isinstance(record.get(k), str) and (record[k].strip() or k == may_be_blank) for k in names) for names in required):
            raise UserError(f"{path}, line {i}: needs non-empty strings under {keys}")
        records.append(record | {"line": i})
    if not records:
        raise UserError(f"{path}: holds no records")
    return records


def load_problems(path, prompt_name):
    """Problems {"problem", "answer", "prompt", …} of a JSON-lines file. One whose answer nothing could equal is reported and left out."""
    records = read_jsonl(path, [("problem", "answer")], may_be_blank="answer")
    unusable = [record["line"] for record in records if not normalize_answer(record["answer"])]
    problems = [record | {"prompt": format_prompt(prompt_name, record["problem"])} for record in records if record["line"] not in unusable]
    if not problems:
        raise UserError(f"{path}: no problem has a usable answer")
    if unusable:
        print(f"{path}, line {', '.join(map(str, unusable))}: left out, since the answer is empty but for spelling; {len(unusable)} of {len(records)} problems")
    return problems


def load_traces(path, prompt_name, reward_fn):
    """SFT traces {"prompt", "response"}, with the prompt formatted here so that SFT and RL cannot drift apart.

    A trace is {"problem", "response", "answer"}, or {"prompt", "response"} with a ready prompt. A response continues the prompt: with
    r1_zero it starts after <think>. Raises UserError where it has not the answer format that `reward_fn` rewards.
    """
    traces = read_jsonl(path, [("problem", "response"), ("prompt", "response")])
    for trace in traces:
        if reward_fn(trace["response"], "")["format_reward"] != 1:
            raise UserError(f"{path}, line {trace['line']}: the response has not the answer format of prompt {prompt_name}, "
                            f"which {reward_fn.__name__} looks for")
        trace.setdefault("prompt", format_prompt(prompt_name, trace.get("problem", "")))
    return traces


# ----------------------------------------------------------------------------------------------------------------------
# 5. Tokens and masks
# ----------------------------------------------------------------------------------------------------------------------


def batch_token_ids(prompt_ids, response_ids, pad_id):
    """Prompts and responses (B lists of ids each) as one right-padded batch {"input_ids", "labels", "response_mask"}, each (B, T), where
    T = longest prompt + response, less one for the shift to the next token:

        prompt [5, 6], response [7, 8]     input_ids      5  6  7
                                           labels         6  7  8
                                           response_mask  0  1  1     the labels that the policy chose

    The mask comes from the lengths: a pad id is a token like any other. Attention is causal and padding stands on the right, so no real
    token ever looks at padding and the model needs no attention mask.
    """
    pairs = list(zip(prompt_ids, response_ids, strict=True))
    ids = pad_sequence([torch.tensor(p + r) for p, r in pairs], batch_first=True, padding_value=pad_id)     # (B, T+1)
    mask = pad_sequence([torch.tensor([False] * len(p) + [True] * len(r)) for p, r in pairs], batch_first=True)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}   # (B, T) each


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """Texts to {"input_ids", "labels", "response_mask"}, each (B, T), as batch_token_ids does with ids. Prompt and output are tokenised apart,
    so that the border between them is a token border, as it is when sampling."""
    prompt_ids = [tokenizer(text)["input_ids"] for text in prompt_strs]
    output_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in output_strs]
    return batch_token_ids(prompt_ids, output_ids, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Log-probs and entropy: what the policy thinks of each token
# ----------------------------------------------------------------------------------------------------------------------


def compute_entropy(logits):
    """Entropy of the next-token distribution in nats: (B, T, V) -> (B, T), float32."""
    return torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)           # entr(p) = -p log p, and 0 at p = 0


CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}      # logits held at a time


class LabelLogProbs(torch.autograd.Function):
    """log softmax(hidden · headᵀ / temperature)[label] and the entropy of that softmax, a chunk of positions at a time.

    The logits of a batch, (positions, V) in float32, would be the largest tensor of a run by far. Here a chunk of them is computed,
    reduced to three numbers per position (the label's log-prob, the normaliser, the entropy) and dropped; the backward pass computes
    it again, for the gradient of log softmax: ∂ log p(label) / ∂ logit = 1[label] − p.
    """

    @staticmethod
    def chunk_logits(hidden, head, temperature):
        """Yields (rows, their logits in float32), rows being slices."""
        size = max(1, CHUNK[hidden.device.type] // len(head))
        for rows in (slice(i, i + size) for i in range(0, len(hidden), size)):
            logits = (hidden[rows] @ head.T).float()                                # (chunk, V)
            yield rows, logits if temperature == 1 else logits.div_(temperature)

    @staticmethod
    def forward(ctx, hidden, head, labels, temperature):
        """hidden (M, D), head (V, D), labels (M,) -> log-probs and entropies (M,), float32. Only the former carry a gradient."""
        normalizers, label_logits, entropies = torch.empty(3, len(hidden), device=hidden.device)
        for rows, logits in LabelLogProbs.chunk_logits(hidden, head.to(hidden.dtype), temperature):
            label_logits[rows] = logits.gather(1, labels[rows, None]).squeeze(1)
            largest = logits.amax(dim=1)
            exp = logits.sub_(largest[:, None]).exp()
            total = exp.sum(dim=1)
            normalizers[rows] = largest + total.log()
            entropies[rows] = total.log() - exp.mul_(logits).sum(dim=1) / total     # −Σ p log p, with p = exp / total
        ctx.save_for_backward(hidden, head, labels, normalizers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return label_logits - normalizers, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, labels, normalizers = ctx.saved_tensors
        cast_head = head.to(hidden.dtype)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for rows, logits in LabelLogProbs.chunk_logits(hidden, cast_head, ctx.temperature):
            grad_logits = logits.sub_(normalizers[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, labels[rows, None], grad[rows, None])
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad_logits, cast_head, out=grad_hidden[rows])
            if hidden.dtype == head.dtype:
                grad_head.addmm_(grad_logits.T, hidden[rows])
            else:                           # sums stay float32
                grad_head += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_head, None, None


def hidden_states(model, input_ids, **context):
    """What the output head turns into logits, (B, T, D)."""
    return getattr(model, "sharded_base", model.base_model)(input_ids, **context).last_hidden_state         # see shard


def get_response_log_probs(model, input_ids, labels, return_token_entropy=False, temperature=1.0, response_mask=None, **context):
    """log π(label | tokens before it) for every position, prompt and padding included (mask them in the loss).

    Args: input_ids and labels (B, T). temperature: the sampling temperature, so that these are log-probs of the sampling distribution.
    response_mask (B, T): compute the positions under it alone, without ever holding (B, T, V) logits; the others are 0.
    context: further arguments of the model's forward, see SharedPrompts.
    Returns {"log_probs": (B, T)} and, if asked for, {"token_entropy": (B, T)} without a gradient; nats, float32.
    """
    if response_mask is None:
        logits = model(input_ids, **context).logits.float() / temperature           # (B, T, V)
        log_probs = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = compute_entropy(logits.detach()) if return_token_entropy else None
    else:
        hidden = hidden_states(model, input_ids, **context)[response_mask]          # (M, D), M response tokens
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        values = LabelLogProbs.apply(hidden, model.get_output_embeddings().weight, labels[response_mask], temperature)
        log_probs, entropy = (torch.zeros(labels.shape, device=labels.device).masked_scatter(response_mask, value) for value in values)
    return {"log_probs": log_probs, "token_entropy": entropy} if return_token_entropy else {"log_probs": log_probs}


def shard(model, dtype):
    """Leaves each rank with one part in N of every parameter, and so of its gradient and of AdamW's state (PyTorch's FSDP2).

    A layer's weights are put together where a forward or backward pass needs them and dropped again; gradients are averaged over the ranks.
    With dtype "bfloat16" weights travel in bfloat16. Every rank has to make the same forward and backward passes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for layer in next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    # The output head stands beside the base model, so FSDP must see a call of the latter as one of the whole model.
    model.sharded_base = lambda *args, **kwargs: model.base_model(*args, **kwargs)
    register_fsdp_forward_method(model, "sharded_base")


def reshard(model):
    """Drops again what the last forward pass has put together, where the model is sharded."""
    if hasattr(model, "sharded_base"):
        model.reshard()


def whole(tensor):
    """A sharded tensor put together, on every rank (all have to call this); another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class SharedPrompts:
    """The keys and values of some prompts, each computed once for all of the responses to it, in sampling and in training.

    A prompt's last token is left to its responses, whose first input it is: the model's output there is the first token's distribution.
    In training every microbatch of responses works on copies of the keys and values and leaves its gradient there; `backward` then carries
    the sum through the prompts. It is the same gradient as that of whole sequences, for a fraction of the work.
    """

    def __init__(self, model, prompt_ids, tokens_at_a_time=10**9):
        self.lengths = torch.tensor([len(ids) - 1 for ids in prompt_ids], device=model.device)[:, None]         # (P, 1)
        ids = pad_sequence([torch.tensor(ids[:-1] or [0]) for ids in prompt_ids], batch_first=True).to(model.device)         # (P, longest)
        self.longest = ids.shape[1]
        caches, self.outputs = [], []
        for some in ids.split(max(1, tokens_at_a_time // self.longest)):
            caches.append(DynamicCache())
            self.outputs.append(hidden_states(model, some, past_key_values=caches[-1], use_cache=True))     # no token looks at padding on its right
        self.states = [(torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]))
                       for layers in zip(*(cache.layers for cache in caches))]      # (P, heads, longest, D) for each layer
        self.copies = [tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in pair) for pair in self.states]

    def context(self, numbers, width):
        """What the model's forward needs to know of the prompts with these numbers (b,) when its inputs, (b, width), follow them."""
        cache = DynamicCache(tuple(copy.index_select(0, numbers) for copy in pair) for pair in self.copies)
        lengths = self.lengths[numbers]
        is_prompt = torch.arange(self.longest, device=lengths.device) < lengths             # (b, longest)
        return {"past_key_values": cache, "use_cache": True, "attention_mask": F.pad(is_prompt, (0, width), value=True),
                "position_ids": lengths + torch.arange(width, device=lengths.device)}

    def backward(self):
        """Carries the gradients on the keys and values back through the prompts, where there are any."""
        tensors = [(state, copy.grad) for pair in zip(self.states, self.copies) for state, copy in zip(*pair) if copy.grad is not None]
        if tensors and world_size() > 1:      # the hooks with which FSDP fetches weights hang on the outputs
            tensors += [(output, torch.zeros_like(output)) for output in self.outputs]
        if tensors:
            torch.autograd.backward(*zip(*tensors))


# ----------------------------------------------------------------------------------------------------------------------
# 7. Losses: which tokens to push, and how hard
# ----------------------------------------------------------------------------------------------------------------------

# RL maximises the expected reward E[r] of a response that π samples. Its gradient is E[r · Σ ∇ log π(token)], over the tokens of the response:
# sample, grade, and push every token of a response up in proportion to the response's reward (REINFORCE). To subtract from r what does not
# depend on the response changes nothing on average and takes noise away. The mean reward of G responses to the same prompt is such a baseline,
# but for a factor: the response is one of the G, which makes the gradient 1 − 1/G of the true one. r less the baseline is the advantage A.
# SFT pushes given tokens up as if each had A = 1; expert iteration does so with its own right responses, which is r with no baseline.


def masked_normalize(tensor, mask, normalize_constant, dim=None):
    """Sum of the elements under the mask over `dim` (all if None), divided by a constant."""
    return torch.where(mask.bool(), tensor, 0).sum(dim) / normalize_constant        # where, not *: a masked inf must not become nan


def masked_mean(tensor, mask, dim=None):
    """Mean of the elements under the mask over `dim` (all if None); nan where the mask is empty."""
    return torch.where(mask.bool(), tensor, 0).sum(dim) / mask.bool().sum(dim)


def sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    """Backward of the negative log-likelihood of the responses. Its gradient pushes every response token's log-prob up equally.

    Args: policy_log_probs and response_mask (B, T). gradient_accumulation_steps: microbatches per update; with b of the n sequences of
    a train batch pass n / b, and the microbatches' losses add up to the train batch's mean.
    Returns (loss, metadata): the scaled loss that was back-propagated, a scalar, and the number of response tokens.
    """
    per_sequence = masked_normalize(-policy_log_probs, response_mask, normalize_constant, dim=-1)       # (B,)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum()}


def compute_group_normalized_rewards(reward_fn, rollout_responses, repeated_ground_truths, group_size, advantage_eps, normalize_by_std):
    """Grades N responses and compares each with the G responses to the same prompt, which stand next to each other.

        A = (r − mean of the group) / (standard deviation of the group + advantage_eps)      [GRPO] section 4.1.2
        A = r − mean of the group                                                            without normalize_by_std, [DrGRPO]

    The standard deviation is the unbiased one (n − 1). A group of equal rewards has advantage 0: it says nothing about what to prefer.
    Returns (advantages (N,), raw_rewards (N,), metadata): the three mean rewards, the numbers of groups of equal rewards and of failed
    gradings, and "rewards", the N reward dicts. Raises ValueError if N is no multiple of G, or for the standard deviation of a group of one.
    """
    if group_size < 1 or len(rollout_responses) % group_size or (normalize_by_std and group_size == 1):
        raise ValueError(f"{len(rollout_responses)} responses cannot be normalised in groups of {group_size}")
    rewards, failed = grade_responses(reward_fn, rollout_responses, repeated_ground_truths)
    raw_rewards = torch.tensor([r["reward"] for r in rewards], dtype=torch.float32)
    groups = raw_rewards.view(-1, group_size)                                       # (prompts, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages /= groups.std(dim=1, keepdim=True) + advantage_eps
    # The mean of equal floats can be off by an ulp and their std is 0, so equal rewards are set to advantage 0, not computed to it.
    equal = groups.amax(dim=1) == groups.amin(dim=1)
    advantages[equal] = 0.0
    means = {f"{key}_mean": sum(r[key] for r in rewards) / len(rewards) for key in ("reward", "format_reward", "answer_reward")}
    return advantages.flatten(), raw_rewards, means | {"equal_reward_groups": int(equal.sum()), "grading_timeouts": failed, "rewards": rewards}


def require_column(weights):
    """Raises ValueError unless the per-sequence weights are (B, 1): (B,) would spread over the tokens."""
    if weights.ndim != 2 or weights.shape[1] != 1:
        raise ValueError(f"rewards and advantages are (B, 1), one per sequence, not {tuple(weights.shape)}")


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    """−A · log π per token, (B, T), of advantages (B, 1): its gradient is REINFORCE's, the score function weighted by the advantage."""
    require_column(raw_rewards_or_advantages)
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    """−min(ρA, clip(ρ, 1−ε, 1+ε)A) per token, (B, T), with ρ = π/π_old ([PPO] equation 7, [GRPO] equation 3).

    Where the clipped branch decides, the gradient is zero: the policy has already moved far enough on this token.
    Args: advantages (B, 1); both log-probs (B, T), the old ones without a gradient; cliprange ε.
    Returns (loss, metadata): "clipped" (B, T) is true where the clipped branch decided.
    """
    require_column(advantages)
    ratio = torch.exp(policy_log_probs - old_log_probs)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(unclipped, clipped), {"clipped": clipped.detach() < unclipped.detach()}


def compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None, old_log_probs=None, cliprange=None):
    """The per-token loss (B, T) of the given type, and its metadata.

        no_baseline               −r · log π                          REINFORCE with the raw reward
        reinforce_with_baseline   −A · log π                          the group's mean as the baseline: same gradient on average, less noise
        grpo_clip                 −min(ρA, clip(ρ, 1−ε, 1+ε)A)        several updates per rollout batch, kept close to π_old
        grpo_no_clip              −ρA                                 the same without the bound

    Raises ValueError for an unknown type, a missing argument, and rewards or advantages that are not (B, 1).
    """
    needs = {"no_baseline": dict(raw_rewards=raw_rewards), "reinforce_with_baseline": dict(advantages=advantages),
             "grpo_clip": dict(advantages=advantages, old_log_probs=old_log_probs, cliprange=cliprange),
             "grpo_no_clip": dict(advantages=advantages, old_log_probs=old_log_probs)}
    if loss_type not in needs:
        raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(needs)}")
    missing = [name for name, value in needs[loss_type].items() if value is None]
    if missing:
        raise ValueError(f"loss_type {loss_type} needs {', '.join(missing)}")
    if loss_type in ("no_baseline", "reinforce_with_baseline"):
        return compute_naive_policy_gradient_loss(raw_rewards if loss_type == "no_baseline" else advantages, policy_log_probs), {}
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange if loss_type == "grpo_clip" else math.inf)


def importance_weights(old_log_probs, sampler_log_probs, cap):
    """min(π_old / π_sampler, cap) per token, (B, T): truncated importance sampling ([IMPALA] section 4.1, [TIS]).

    A sampler with the trainer's weights but other kernels or precision samples from a slightly other distribution. The ratio makes the
    gradient's expectation right again, and the cap bounds what it adds in variance.
    """
    return (old_log_probs - sampler_log_probs).exp().clamp(max=cap)


def grpo_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, loss_type, raw_rewards=None, advantages=None,
                               old_log_probs=None, cliprange=None, normalize_constant=None, token_weights=None):
    """Backward of the policy-gradient loss: per token, then per response, then the mean over the batch.

    A response's loss is its mean over its tokens ([GRPO] equation 3) or, given a normalize_constant, its sum divided by that constant,
    which weighs every token alike whatever the length of its response ([DrGRPO]). An empty response counts as a loss of 0.
    token_weights (B, T), if given, multiply the per-token loss: see importance_weights.
    Args and returns: as sft_microbatch_train_step and compute_policy_gradient_loss; raw_rewards and advantages are (B, 1).
    """
    per_token, metadata = compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange)
    if token_weights is not None:
        per_token = per_token * token_weights
    if normalize_constant is None:      # an empty mean is 0/0
        per_sequence = torch.where(response_mask.bool().any(dim=-1), masked_mean(per_token, response_mask, dim=-1), 0)      # (B,)
    else:
        per_sequence = masked_normalize(per_token, response_mask, normalize_constant, dim=-1)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), metadata


# ----------------------------------------------------------------------------------------------------------------------
# 8. Sampling
# ----------------------------------------------------------------------------------------------------------------------


def seed_for(seed, step, purpose):
    """A seed for one random draw. Step k is a function of (weights, optimizer state, seed, k): nothing else feeds the generators."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()[:7], "big")


@dataclasses.dataclass
class Rollout:
    """One sampled response."""
    prompt_ids: list        # token ids
    response_ids: list      # the token ids that were sampled, end-of-sequence included; training uses these
    log_probs: list         # of those tokens under the sampling distribution, nats
    text: str               # what they decode to, up to and including the stop string; grading uses this
    finish_reason: str      # "stop": ended by itself; "length": cut at max_tokens


def autocast(args):
    """Matrix products in bfloat16 where --dtype says so; weights, log-probs and losses stay float32."""
    return torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()


def make_rollout(tokenizer, stop, prompt_ids, response_ids, log_probs, finish_reason):
    """A Rollout with its text. Where the stop string ended it, the text ends with that string: the last token may reach beyond it."""
    text = tokenizer.decode(response_ids, skip_special_tokens=True)
    if finish_reason == "stop" and response_ids[-1] != tokenizer.eos_token_id:
        text = text[:text.rindex(stop) + len(stop)]
    return Rollout(prompt_ids, response_ids, log_probs, text, finish_reason)


def grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of one new token per row, transformers' sdpa otherwise. The query heads that share a key head, (H / KV) of them, stand as
    so many queries of that head; sdpa with a mask would copy the whole cache H / KV times to give each its own."""
    rows, heads, n_queries, width = query.shape
    if n_queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    output = F.scaled_dot_product_attention(query.view(rows, key.shape[1], -1, width), key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_sdpa", grouped_sdpa)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A cache layer with room for more tokens at its end: a token is written there, where DynamicLayer copies everything to append it."""

    def __init__(self, layer):
        super().__init__()
        self.is_initialized, self.rooms = True, [layer.keys, layer.values]
        self.keys, self.values = self.rooms

    def update(self, key_states, value_states, *args, **kwargs):
        length, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for i, (old, new) in enumerate([(self.keys, key_states), (self.values, value_states)]):
            if end > self.rooms[i].shape[2] or len(old) < len(self.rooms[i]):           # it is full, or rows were dropped
                self.rooms[i] = F.pad(old, (0, 0, 0, end - length + 64))
            self.rooms[i][:, :, length:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


class TorchSampler:
    """Samples through transformers alone: with the training model itself where it is whole and of the sampler's dtype, else with a copy."""

    def __init__(self, tokenizer, batch_size, dtype):
        self.tokenizer, self.batch_size, self.dtype, self.model = tokenizer, batch_size, getattr(torch, dtype), None
        self.token_strings = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    @torch.no_grad()
    def load_weights(self, model):
        """Takes over the model's weights as they are now."""
        if model.dtype == self.dtype and not hasattr(model, "sharded_base"):
            self.model = model
            return
        if self.model is None:
            config = copy.deepcopy(model.config)            # from_config writes into it
            with model.device:
                self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="grouped_sdpa").eval()
        for own, parameter in zip(self.model.parameters(), model.parameters(), strict=True):       # one at a time
            own.copy_(whole(parameter))

    @torch.no_grad()
    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """n responses to each prompt (lists of token ids): a list of len(prompt_ids) × n Rollouts, those of one prompt together.

        seeds: one for each prompt. temperature 0 is greedy. No end-of-sequence before min_tokens. stop: a string that ends a response, or None.
        """
        per_batch = max(1, self.batch_size // n)
        if len(prompt_ids) > per_batch:
            return [rollout for i in range(0, len(prompt_ids), per_batch)
                    for rollout in self.generate(prompt_ids[i:i + per_batch], n, seeds[i:i + per_batch], temperature, max_tokens, min_tokens, stop)]
        device, eos = self.model.device, self.tokenizer.eos_token_id
        # Token t of response i is where the uniform number draws[i, t] falls in the cumulated distribution. So a response depends on
        # its prompt's seed and its own number alone, not on which others share its batch or when they end.
        draws = torch.cat([torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        draws = draws.to(device).clamp(max=1 - 1e-6)
        # Only a token that holds the stop string's last character can complete it; the text is looked at after those alone.
        may_stop = torch.zeros(len(self.model.get_output_embeddings().weight), dtype=torch.bool, device=device)     # rarely len(tokenizer)
        may_stop[[i for i, string in enumerate(self.token_strings[:len(may_stop)]) if stop and stop[-1] in (string or "")]] = True
        shared = SharedPrompts(self.model, prompt_ids, tokens_at_a_time=4096)       # activations take memory
        rows = torch.arange(len(prompt_ids) * n, device=device)             # which response each row of the batch holds
        context = shared.context(rows // n, max_tokens)
        cache, mask, positions = context["past_key_values"], context["attention_mask"], context["position_ids"]
        cache.layers = [RoomyLayer(layer) for layer in cache.layers]
        ids = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=device)
        log_probs, lengths = torch.zeros(ids.shape, device=device), torch.zeros_like(rows)          # length 0: not ended
        token = torch.tensor([prompt[-1] for prompt in prompt_ids], device=device)[rows // n]
        for t in range(max_tokens):
            logits = self.model(token[:, None], attention_mask=mask[rows, :shared.longest + t + 1], position_ids=positions[rows, t:t + 1],
                                past_key_values=cache, use_cache=True).logits[:, -1].float() / (temperature or 1.0)         # (rows, V)
            normalizer = logits.logsumexp(dim=-1)           # before the ban below: log-probs are the model's own
            if t < min_tokens:
                logits[:, eos] = -math.inf
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                cumulated = logits.softmax(dim=-1).cumsum(dim=-1)
                token = torch.searchsorted(cumulated, draws[rows, t:t + 1] * cumulated[:, -1:], right=True).squeeze(1)
            ids[rows, t], log_probs[rows, t] = token, logits.gather(1, token[:, None]).squeeze(1) - normalizer
            ends = token == eos
            if t + 1 >= min_tokens:
                for k in may_stop[token].nonzero().flatten().tolist():
                    tail = ids[rows[k], max(0, t + 1 - len(stop)):t + 1].tolist()           # a token holds a character of it at least
                    with_token, without = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (tail, tail[:-1]))
                    ends[k] |= with_token.count(stop) > without.count(stop)                         # this token completed it
            lengths[rows[ends & (lengths[rows] == 0)]] = t + 1
            live = lengths[rows] == 0
            n_live = int(live.sum())
            if n_live == 0:
                break
            if n_live < 0.75 * len(rows):                   # finished rows leave the batch once they are many
                cache.batch_select_indices(live.nonzero().flatten())
                rows, token = rows[live], token[live]
        return [make_rollout(self.tokenizer, stop, prompt_ids[i // n], ids[i, :length or max_tokens].tolist(),
                             log_probs[i, :length or max_tokens].tolist(), "stop" if length else "length")
                for i, length in enumerate(lengths.tolist())]


@functools.cache
def vllm_engine(model, dtype, gpu_memory_utilization, sleeps, on_cpu):
    """vLLM with a model, in this process, so that weights go over as tensors. One for all runs of a process (--compare): an engine that goes
    ends every process group, that of the ranks, too."""
    # vLLM reads these on import; the last two concern its CPU build alone.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")                # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")        # else it pins the threads that training needs, too
    import vllm
    try:
        # processed_logprobs are those of the distribution that is sampled from, after temperature. generation_config="vllm" keeps the
        # model's generation_config.json from adding a top-k, ignore_eos in generate from adding another end of sequence.
        # The CPU build cannot rewind a request's generator, which a prompt cut into chunks needs; and compiling costs it a minute.
        llm = vllm.LLM(model=model, dtype=dtype, gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=sleeps,
                       logprobs_mode="processed_logprobs", generation_config="vllm",
                       enable_chunked_prefill=False if on_cpu else None, enforce_eager=on_cpu,
                       distributed_executor_backend="external_launcher" if world_size() > 1 else None)      # an engine on each rank's own GPU
        llm.generate([{"prompt_token_ids": [0]}], vllm.SamplingParams(max_tokens=1), use_tqdm=False)       # does it run?
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        raise UserError(f"vLLM {vllm.__version__} cannot serve {model}: {reason(error)}; --gpu_memory_utilization (now {gpu_memory_utilization}; on "
                        "a CPU VLLM_CPU_KVCACHE_SPACE, in GiB) mends too little memory, --sampler torch an unsupported model") from error
    if sleeps:
        llm.sleep(level=2)          # level 2 drops the weights (level 1 would keep a copy): every hand-over brings new ones
    return llm


class VLLMSampler:
    """Samples with vLLM in this process, beside the training model. All that depends on vLLM's version is in here and above; tested with 0.32.0."""

    def __init__(self, args, tokenizer):
        self.tokenizer, self.sleeps, self.on_cpu = tokenizer, args.vllm_sleep, args.device == "cpu"
        self.llm = vllm_engine(args.model, args.dtype, args.gpu_memory_utilization, self.sleeps, self.on_cpu)

    def load_weights(self, model):
        """Hands the model's weights over, in memory, parameter by parameter, and forgets keys and values computed with the old ones."""
        if self.sleeps:         # the weights' memory first, and only then their values: waking up later would bring old weights back
            self.llm.wake_up(tags=["weights"])
        try:
            weights = ((name, whole(parameter.detach())) for name, parameter in model.named_parameters())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self.on_cpu and model.config.tie_word_embeddings:
                # The CPU build multiplies by a packed copy of the output head, which a hand-over of tied embeddings leaves as it was.
                self.llm.apply_model(lambda served: served.lm_head.quant_method.process_weights_after_loading(served.lm_head))
        except (AttributeError, TypeError, NotImplementedError) as error:
            raise UserError(f"this vLLM has not the weight hand-over of 0.32.0 ({reason(error)}): install that, or use --sampler torch") from error
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """As TorchSampler.generate. Every response is a request with a seed of its own; prefix caching computes a shared prompt once."""
        from vllm import SamplingParams
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        params = [SamplingParams(temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens, stop=stop, include_stop_str_in_output=True,
                                 ignore_eos=True, stop_token_ids=[self.tokenizer.eos_token_id], logprobs=0, seed=seed_for(seed, i, "request"))
                  for seed in seeds for i in range(n)]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=2)
        rollouts = []
        for ids, output in zip(prompts, (request.outputs[0] for request in outputs), strict=True):
            response_ids = list(output.token_ids)
            log_probs = [step[token].logprob for step, token in zip(output.logprobs, response_ids, strict=True)]
            rollouts.append(make_rollout(self.tokenizer, stop, ids, response_ids, log_probs, output.finish_reason))
        return rollouts


def make_sampler(args, tokenizer):
    """The sampler that --sampler names; prints the choice that auto makes."""
    choice, installed = args.sampler, importlib.util.find_spec("vllm") is not None
    if choice == "auto":
        choice = "vllm" if installed and args.device == "cuda" else "torch"
        hint = "; faster with: pip install vllm==0.32.0" if args.device == "cuda" and not installed else ""
        print(f"sampler {choice}{hint} (--sampler chooses)")
    if choice == "vllm" and not installed:
        raise UserError("--sampler vllm needs vLLM: pip install vllm==0.32.0")
    return VLLMSampler(args, tokenizer) if choice == "vllm" else TorchSampler(tokenizer, args.sampler_batch_size, args.dtype)


def sample(sampler, prompt_ids, n, seed, **settings):
    """n Rollouts for each prompt, those of one prompt together; settings go to the sampler's generate. Each rank samples for its prompts."""
    def groups(numbers):
        rollouts = sampler.generate([prompt_ids[i] for i in numbers], n, [seed_for(seed, i, "prompt") for i in numbers], **settings)
        return [rollouts[i:i + n] for i in range(0, len(rollouts), n)]

    return [rollout for group in by_all_ranks(groups, range(len(prompt_ids))) for rollout in group]


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation
# ----------------------------------------------------------------------------------------------------------------------


def lenient_reward_fn(response, ground_truth):
    """1 where the right answer is the answer tag's content, the last box or the last number, whatever the format around it.

    For evaluation only: a rise in accuracy that this does not share is a gain in format, not in reasoning.
    """
    end = response[-2000:]
    candidates = [end.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in end else None, last_boxed(end),
                  *re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", end)[-1:]]
    right = float(any(grade(candidate, ground_truth) for candidate in candidates if candidate is not None))
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}


def pass_at_k(n, c, k):
    """The unbiased estimate of P(at least one of k samples is right) from n samples of which c are right ([pass@k] equation 1).

    >>> pass_at_k(n=4, c=1, k=2)        # two of four: 3 of the 6 pairs hold the right one
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(sampler, problems, reward_fn, n, seed, **sampling):
    """Samples n responses to each problem and grades them, as the model wrote them; `sampling` goes to the sampler's generate.

    Returns (metrics, rollouts, rewards). The standard error is over problems: responses to one problem are not independent.
    """
    rollouts = sample(sampler, [p["prompt_ids"] for p in problems], n, seed, **sampling)
    texts, truths = [r.text for r in rollouts], [p["answer"] for p in problems for _ in range(n)]
    rewards, failed = grade_responses(reward_fn, texts, truths)
    wrong = [i for i, r in enumerate(rewards) if r["answer_reward"] == 0]
    lenient, _ = grade_responses(lenient_reward_fn, [texts[i] for i in wrong], [truths[i] for i in wrong])
    right = torch.tensor([r["answer_reward"] for r in rewards]).view(-1, n)                 # (problems, n)
    per_problem = right.mean(dim=1)
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < n] + [n]
    metrics = {
        "accuracy": per_problem.mean().item(),
        "accuracy_stderr": per_problem.std(correction=0).item() / math.sqrt(len(problems)),
        "reward": sum(r["reward"] for r in rewards) / len(rewards),
        "format_reward": sum(r["format_reward"] for r in rewards) / len(rewards),
        "lenient_accuracy": 1 - sum(r["reward"] == 0 for r in lenient) / len(rewards),
        "grading_timeouts": failed, "problems": len(problems), "responses": len(rollouts),
        "response_length": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "pass_at_k": {str(k): sum(pass_at_k(n, int(c), k) for c in right.sum(dim=1)) / len(problems) for k in powers},
        "categories": {     # the handout's three
            "format_and_answer": sum(r["format_reward"] == 1 and r["answer_reward"] == 1 for r in rewards),
            "format_only": sum(r["format_reward"] == 1 and r["answer_reward"] == 0 for r in rewards),
            "neither": sum(r["format_reward"] == 0 for r in rewards),
        },
    }
    return metrics, rollouts, rewards


def log_generations(path, step, purpose, rollouts, rewards, problems):
    """Appends one JSON line per rollout to `path`: what was asked, written, expected and paid. problems: one per rollout."""
    if rank() > 0:
        return
    with open(path, "a", encoding="utf-8") as file:
        for rollout, reward, problem in zip(rollouts, rewards, problems, strict=True):
            file.write(json.dumps({"step": step, "purpose": purpose, "problem": problem["problem"], "response": rollout.text,
                                   "answer": problem["answer"], **reward, "length": len(rollout.response_ids),
                                   "finish_reason": rollout.finish_reason}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# 10. Logging, plots, checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# What the algorithms call the same thing. The first name that a step's dict holds is the one shown.
REWARD = ("train_reward_total", "ei/avg_reward")
LOSS = ("loss", "train/loss", "ei/sft_loss")
LEARNING_RATE = ("learning_rate", "train/learning_rate")
ACCURACY = ("val_reward_answer", "eval/accuracy", "ei/eval_accuracy", "accuracy")
FORMAT = ("val_reward_format", "eval/format_reward", "ei/eval_format_reward", "format_reward")


def lookup(record, names):
    """The record's value under the first of the names that it holds, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def log_step(args, record, last_step):
    """Writes one step's dict to metrics.jsonl, to stdout as one line, and to W&B where asked for."""
    if rank() > 0:
        return
    with open(Path(args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if args.wandb_project:
        import wandb
        wandb.log(record, step=record["step"])

    def show(names, form):
        value = lookup(record, (names,) if isinstance(names, str) else names)
        return format("-" if value is None else format(value, form), f">{len(format(0.0, form))}")

    head = f"{record['step']:4d}/{last_step}"
    if "time_training" in record:
        print(f"step {head} | reward {show(REWARD, '.3f')} fmt {show('train_reward_format', '.3f')} | loss {show(LOSS, '+.4f')} | "
              f"ent {show('token_entropy', '.3f')} clip {show('clip_fraction', '.1%')} | len {show('response_length', '5.1f')} "
              f"trunc {show('truncated_fraction', '4.0%')} | gnorm {show('grad_norm', '.2f')} | lr {show(LEARNING_RATE, '.1e')} | "
              f"{show('time', '.1f')}s (gen {show('time_sampling', '.1f')}s)", flush=True)
    if lookup(record, ACCURACY) is not None:
        print(f"eval {head} | acc {show(ACCURACY, '.3f')} ±{show('eval_stderr', '.3f')} (n={record['eval_problems']}) fmt {show(FORMAT, '.3f')} "
              f"lenient {show('eval_lenient_accuracy', '.3f')} | len {show('eval_response_length', '5.1f')} "
              f"trunc {show('eval_truncated_fraction', '4.0%')}", flush=True)


def read_metrics(folder):
    """The dicts of a run's metrics.jsonl, each with the "seconds" and the "sampled_tokens" of all steps so far, without validations."""
    records, seconds, tokens = read_jsonl(Path(folder, "metrics.jsonl"), [()]), 0.0, 0.0
    for record in records:
        seconds += record.get("time", 0.0)
        tokens += record.get("tokens_per_second", 0.0) * record.get("time_sampling", 0.0)
        record |= {"seconds": seconds, "sampled_tokens": tokens}
    return records


def plot_runs(runs, path, against="step"):
    """Draws the curves of runs into one picture: validation on top, then training reward, entropy and length.

    runs: {label: folders}. Of several folders, seeds of one thing, it draws the mean ± one standard deviation. against: "step" or "seconds".
    """
    from matplotlib.figure import Figure

    panels = {"validation accuracy (±1 standard error or, of several seeds, standard deviation)": ACCURACY, "training reward": REWARD,
              "token entropy (nats)": ("token_entropy",), "response length (tokens)": ("response_length", "eval_response_length")}
    figure = Figure(figsize=(7, 9), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True)
    metrics = {label: [record for folder in folders for record in read_metrics(folder)] for label, folders in runs.items()}
    for axis, (title, names) in zip(axes, panels.items()):
        for label, folders in runs.items():
            records = [record for record in metrics[label] if lookup(record, names) is not None]
            at_step = [[record for record in records if record["step"] == step] for step in sorted({record["step"] for record in records})]
            values = [[lookup(record, names) for record in some] for some in at_step]
            means = [statistics.fmean(some) for some in values]
            errors = [statistics.stdev(some) if len(some) > 1 else 0 for some in values]
            places = [statistics.fmean(record[against] for record in some) for some in at_step]
            [line] = axis.plot(places, means, marker="o" if len(places) < 30 else None, markersize=3, label=label)
            if names is ACCURACY and len(folders) == 1:
                errors = [record["eval_stderr"] for record in records]
                axis.plot(places, [lookup(record, FORMAT) for record in records], color=line.get_color(), linestyle="--", linewidth=1,
                          label=f"{label}, format")
            axis.fill_between(places, [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)], alpha=0.2)
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(alpha=0.3)
        if names in (ACCURACY, REWARD):
            axis.set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel(against)
    partial = f"{path}.partial.png"
    figure.savefig(partial, dpi=110)
    os.replace(partial, path)


def sha256(path):
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path):
    """Removes a folder, under a name first that nobody takes for a complete one."""
    shutil.rmtree(path.rename(f"{path}.removed.partial"))


def flush(path):
    """Returns when the disk has a file, or the list of a folder's files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(path, model, tokenizer, optimizer=None, step=None):
    """Writes a Hugging Face folder, which from_pretrained and `vllm serve` open, with the trainer's state and SHA256SUMS (for `sha256sum -c`):
    aside, flushed to the disk, then renamed. Raises UserError where it cannot be written; what was saved before is not touched."""
    def gather(tensors):
        """Sharded tensors put together one after the other, which every rank takes part in, and kept on rank 0."""
        return {name: tensor.cpu() for name, tensor in ((name, whole(tensor.detach())) for name, tensor in tensors) if rank() == 0}

    reshard(model)          # else what the last forward pass has put together stands there, in bfloat16 perhaps
    weights = gather(model.named_parameters()) if hasattr(model, "sharded_base") else None      # None: its own
    state = {i: gather(tensors.items()) for i, tensors in optimizer.state_dict()["state"].items()} if optimizer else None
    if rank() > 0:
        return
    partial, logs = Path(f"{path}.partial"), list(path.parent.glob("*.jsonl"))
    try:
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        if optimizer:           # and how long the logs are, so that a resumed run can cut them back to this step
            log_sizes = {log.name: log.stat().st_size for log in logs}
            torch.save({"optimizer": state, "step": step, "log_sizes": log_sizes}, partial / "trainer_state.pt")
        (partial / "SHA256SUMS").write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir())))
        for file in (*partial.iterdir(), partial, *logs):
            flush(file)
        if path.exists():       # and is damaged
            remove(path)
        os.replace(partial, path)
        flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:       # safetensors and torch.save do not raise OSError on a full disk
        free = shutil.disk_usage(path.parent).free / 1e6
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path} cannot be written ({free:.0f} MB free on its disk): {reason(error)}; what was saved before is intact") from error


def checkpoints(folder):
    """The folder's checkpoints, newest first."""
    return sorted(Path(folder).glob("checkpoint*[0-9]"), key=lambda path: int(re.search(r"\d+$", path.name)[0]), reverse=True)


def newest_checkpoint(folder):
    """The newest checkpoint whose files are as they were written, or None. A damaged one is named and passed over."""
    for path in checkpoints(folder):
        try:
            sums = dict(line.split("  ", 1)[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
            if "trainer_state.pt" in sums and all(sha256(path / name) == checksum for name, checksum in sums.items()):
                return path
        except (OSError, ValueError):       # a file that is missing; a line that is not "checksum  name"
            pass
        print(f"{path} is incomplete or damaged: passed over", flush=True)


def open_output_dir(args, log_sizes):
    """Makes output_dir and writes args.json. A run that is there already is left alone, or removed with --overwrite, or with --resume its logs
    are cut back to `log_sizes`, the bytes that they had when the checkpoint was written; {}: it starts anew."""
    folder = Path(args.output_dir)
    names = ("args.json", "metrics.jsonl", "samples.jsonl", "curves.png", "baseline_results_summary.json", "checkpoint*", "final_model*", "wandb")
    old = [path for name in names for path in folder.glob(name)]
    if old and not args.overwrite and not vars(args).get("resume"):
        raise UserError(f"{folder} holds a run already; go on with it by --resume, choose another --output_dir, or replace it with --overwrite")
    if args.overwrite and Path(args.model).resolve() in [path.resolve() for path in old]:
        raise UserError(f"--overwrite would remove --model {args.model}; choose another --output_dir")
    for path in old:
        if args.overwrite or path.name.endswith(".partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.name.endswith(".jsonl"):
            os.truncate(path, min(log_sizes.get(path.name, 0), path.stat().st_size))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "args.json.partial"
    partial.write_text(json.dumps(vars(args), indent=2) + "\n")
    os.replace(partial, folder / "args.json")


# ----------------------------------------------------------------------------------------------------------------------
# What the three loops share: load, update, validate, finish a step
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a run holds in memory. The policy is `model`; sampler, evaluation and updates all refer to it."""
    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    sampler: object
    reward_fn: object
    sampling: dict              # what `generate` needs to know besides prompts, seeds and temperature
    optimizer: torch.optim.Optimizer | None = None
    val_problems: list | None = None
    first_step: int = 0         # 0: the validation before any update
    last_step: int = 0
    log_sizes: dict = dataclasses.field(default_factory=dict)               # see open_output_dir
    plotted: float = dataclasses.field(default_factory=time.monotonic)      # when the curves were last drawn
    signal: int = 0             # SIGINT or SIGTERM, once it has come
    skipped: int = 0            # updates in a row whose gradient was not finite
    halved: bool = False        # memory ran out before


def find_data(args):
    """Makes data/arithmetic/ where it is used and not complete. Raises UserError for any other data file that is not there."""
    paths = [Path(vars(args)[flag]) for flag in ("train_data", "val_data", "sft_data") if flag in vars(args) and not vars(args).get("question")]
    if rank() == 0 and any(str(path).startswith("data/arithmetic/") and not path.exists() for path in (Path(args.model), *paths)):
        print("data/arithmetic/ is not complete yet: making it with prepare_data.py", flush=True)
        sys.modules.setdefault("align", sys.modules[__name__])          # this file, so that prepare_data's UserError is this one's
        from prepare_data import prepare_arithmetic
        prepare_arithmetic("data/arithmetic")
    from_all_ranks(None)        # waits for rank 0
    for path in paths:
        if not path.is_file():
            traces = " --traces SOURCE (--help lists the sources)" if path.name.startswith("sft") else ""
            how = f"; make it with: python prepare_data.py --dataset {path.parent.name.lower()}{traces}"
            raise UserError(f"{path} is not there{how if str(path.parent) in ('data/MATH', 'data/GSM8K') else ''}")


def load_run(args, weights=None):
    """Model, tokenizer and sampler of a run, the weights from a checkpoint if one is given. Raises UserError where the model cannot be had."""
    find_data(args)                     # before a model is downloaded
    grading_pool().schedule(int)        # starts the workers now, before this process holds a model and a GPU
    if args.device == "cpu" and sys.platform == "linux":
        # Freed memory stays with the process: to give large tensors back to the system and fetch them again costs a fifth of a step.
        for option, value in ((-4, 0), (-1, 2**31 - 1)):        # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if Path(args.model).is_dir():
        transformers_logging.disable_progress_bar()     # only a download is slow enough to need one
    else:
        use_hub_or_cache()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        # float32 masters even on a GPU: at lr 1e-5 most AdamW steps are below half a bfloat16 ulp of the weight and would vanish.
        flash = args.device == "cuda" and args.dtype == "bfloat16" and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "grouped_sdpa"
        # It comes in evaluation mode and stays there: dropout would make π differ from the policy that sampled.
        model = AutoModelForCausalLM.from_pretrained(weights or args.model, dtype=torch.float32, attn_implementation=attention)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {args.model} cannot be loaded: {reason(error)}") from error
    transformers_logging.disable_progress_bar()
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no end-of-sequence token")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise UserError(f"--model {args.model} has layers other than full attention (a sliding window, a recurrent state): section 6 leaves them out")
    if world_size() > 1 and args.algo != "eval":
        shard(model, args.dtype)
    else:
        model.to(args.device)
    ids = torch.arange(min(16, len(tokenizer)), device=args.device)[None]
    with torch.no_grad(), autocast(args):
        theirs, ours = (get_response_log_probs(model, ids[:, :-1], ids[:, 1:], response_mask=mask)["log_probs"] for mask in (None, ids[:, 1:] >= 0))
    if not torch.allclose(theirs, ours, atol=0.05):
        raise UserError(f"--model {args.model} does more to its logits than multiply by the output head (a soft cap, say): section 6 leaves that out")
    print(f"model {args.model}: {model.num_parameters() / 1e6:.1f}M parameters on {world_size()} × {args.device}, {args.dtype}, "
          f"attention {attention}", flush=True)
    reward_fn, stop = reward_fn_and_stop(args.prompt)
    return Run(args, model, tokenizer, make_sampler(args, tokenizer), reward_fn,
               {"max_tokens": args.sampling_max_tokens, "min_tokens": args.sampling_min_tokens, "stop": stop})


def load_sampling_problems(run, path, at_least=1):
    """The problems of a file with "prompt_ids". Raises UserError where they are too few, or too long for the model's context."""
    problems = load_problems(path, run.args.prompt)
    if len(problems) < at_least:
        raise UserError(f"a step needs {at_least} problems and {path} has {len(problems)}")
    context = getattr(run.model.config, "max_position_embeddings", None) or math.inf
    for problem, ids in zip(problems, run.tokenizer([p["prompt"] for p in problems])["input_ids"]):
        if len(ids) + run.args.sampling_max_tokens > context:
            raise UserError(f"{path}, line {problem['line']}: a prompt of {len(ids)} tokens and {run.args.sampling_max_tokens} sampled ones "
                            f"(--sampling_max_tokens) exceed the model's context of {context}")
        problem["prompt_ids"] = ids
    return problems


def load_val_problems(run):
    """Always the same --validation_size problems, whatever the seed, drawn from the whole file: files come sorted by subject."""
    problems, size = load_sampling_problems(run, run.args.val_data), run.args.validation_size
    return random.Random(0).sample(problems, size) if 0 < size < len(problems) else problems


def start_training(args):
    """A Run with its optimizer and its validation problems, as the newest checkpoint left it where it is to be resumed."""
    # Rank 0's finding counts. A run that was stopped before its first checkpoint begins again.
    checkpoint = from_all_ranks(newest_checkpoint(args.output_dir) if args.resume and rank() == 0 else None)[0]
    run = load_run(args, checkpoint)
    run.val_problems = load_val_problems(run)
    reshard(run.model)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    if checkpoint:
        saved = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True, mmap=True)
        if "log_sizes" not in saved:
            raise UserError(f"{checkpoint} was written by an earlier align.py, whose runs this one cannot resume")
        run.first_step, run.log_sizes, state = saved["step"] + 1, saved["log_sizes"], saved["optimizer"]
        for i, parameter in enumerate(run.optimizer.param_groups[0]["params"]):
            if isinstance(parameter, DTensor) and i in state:       # each rank takes its shards; no state before the first update
                state[i] = {name: distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if tensor.ndim else tensor
                            for name, tensor in state[i].items()}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})        # the settings are those of the flags
        print(f"resumed from {checkpoint}", flush=True)
    return run


def make_batch(run, prompt_ids, response_ids):
    """(batch, prompts). prompts: the token ids of the distinct prompts. batch: batch_token_ids of each response behind its prompt's last token (the
    rest of the prompt comes from SharedPrompts) and "prompt" (N, 1), its place in prompts."""
    numbers = {}
    prompt = [[numbers.setdefault(tuple(ids), len(numbers))] for ids in prompt_ids]
    batch = batch_token_ids([ids[-1:] for ids in prompt_ids], response_ids, 0) | {"prompt": torch.tensor(prompt)}
    return {name: tensor.to(run.args.device) for name, tensor in batch.items()}, list(numbers)


def take(batch, rows):
    """The given rows of a dict of (N, T) and (N, 1) tensors, cut to the longest sequence among them."""
    width = int(batch["response_mask"][rows].any(dim=0).nonzero().max()) + 1
    return {name: tensor[rows, :width] for name, tensor in batch.items()}


def split_by_tokens(items, lengths, budget):
    """Lists of items of similar length, longest first, each of at most `budget` tokens when padded to its longest, or of a single item."""
    parts = []
    for item in sorted(items, key=lambda i: -lengths[i]):
        if not parts or (len(parts[-1]) + 1) * lengths[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(item)
    return parts


def microbatches(run, batch, prompts):
    """Yields this rank's share of a train batch (of make_batch) in microbatches, with their "rows" and get_response_log_probs's "context".

    Each prompt goes through the model once; when the responses to it have been through, forward and backward, its own backward pass follows.
    """
    args, prompt_of, lengths = run.args, batch["prompt"].flatten().tolist(), batch["response_mask"].sum(dim=1).tolist()

    def plan(rows):
        """[(prompts, [the rows of each microbatch of responses to them])]"""
        if args.gradient_accumulation_steps:
            n = math.ceil(args.train_batch_size / args.gradient_accumulation_steps / world_size())
            parts = [rows[i:i + n] for i in range(0, len(rows), n)]
            return [(sorted({prompt_of[i] for i in part}), [part]) for part in parts]
        together = split_by_tokens(sorted({prompt_of[i] for i in rows}), [len(ids) for ids in prompts], args.tokens_per_microbatch)
        return [(some, split_by_tokens([i for i in rows if prompt_of[i] in some], lengths, args.tokens_per_microbatch)) for some in together]

    # A rank has the responses to every N-th prompt. It makes as many passes as the busiest rank, since those fetch its weights: where it has
    # nothing left to do, with a response of which nothing counts.
    plans = [plan([i for i, p in enumerate(prompt_of) if p % world_size() == r]) for r in range(world_size())]
    for groups in itertools.zip_longest(*plans, fillvalue=(prompt_of[:1], [])):
        some, _ = groups[rank()]
        with autocast(args):
            shared = SharedPrompts(run.model, [prompts[p] for p in some])
        for turn in itertools.zip_longest(*(parts for _, parts in groups)):
            part = turn[rank()] or [prompt_of.index(some[0])]
            rows = torch.tensor(part, device=args.device)
            numbers = torch.tensor([some.index(prompt_of[i]) for i in part], device=args.device)
            micro = take(batch, rows)
            micro["response_mask"] &= turn[rank()] is not None
            yield micro | {"rows": rows, "context": shared.context(numbers, micro["labels"].shape[1])}
        shared.backward()


def train_on(run, batch, prompts, temperature, train_step):
    """Sends a train batch through the model: train_step(micro, log_probs) computes a microbatch's loss and its gradient, and returns
    (loss, metadata). Returns the sums over all microbatches and ranks of loss, entropy (nats), clipped tokens and tokens, (4,). Where memory runs
    out it begins again, once in a run, with half the --tokens_per_microbatch."""
    def attempt():
        sums = torch.zeros(4, dtype=torch.float64)
        for micro in microbatches(run, batch, prompts):
            mask = micro["response_mask"]
            with autocast(run.args):
                out = get_response_log_probs(run.model, micro["input_ids"], micro["labels"], True, temperature, mask, **micro["context"])
            loss, metadata = train_step(micro, out["log_probs"])
            entropy = masked_normalize(out["token_entropy"], mask, 1.0).item()
            clipped = (metadata["clipped"] & mask).sum().item() if "clipped" in metadata else 0
            sums += torch.tensor([loss.item() / world_size(), entropy, clipped, mask.sum().item()])
        return sum(from_all_ranks(sums))

    while True:         # the second attempt is not in the except clause: there the exception still holds the first one's tensors
        try:
            return attempt()
        except RuntimeError as error:
            if not out_of_memory(error) or run.halved or run.args.gradient_accumulation_steps or world_size() > 1:
                raise
            run.halved = True
            run.args.tokens_per_microbatch //= 2
            print(f"out of memory: from here on with --tokens_per_microbatch {run.args.tokens_per_microbatch}", flush=True)
            if torch.is_grad_enabled():
                run.optimizer.zero_grad()


def optimizer_step(run, learning_rate, sums):
    """Clips the accumulated gradient and applies it, unless it or the loss is not finite. Returns what update_metrics needs to know: the sums, which
    are train_on's, and the gradient's norm before clipping."""
    loss, entropy_sum, clipped, tokens = sums.tolist()
    reshard(run.model)
    parameters = run.optimizer.param_groups[0]["params"]
    for parameter in parameters:
        if parameter.grad is None:          # no response had anything to teach: the gradient is 0, and AdamW's momentum moves on
            parameter.grad = torch.zeros_like(parameter)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, run.args.gradient_clip_value)).item()
    run.optimizer.param_groups[0]["lr"] = learning_rate
    run.skipped = 0 if math.isfinite(grad_norm + loss) else run.skipped + 1
    if not run.skipped:
        run.optimizer.step()
    run.optimizer.zero_grad()
    if run.skipped == 5:
        raise UserError(f"the gradient of {run.skipped} updates in a row was not finite (last norm {grad_norm}, loss {loss}), so none of them was "
                        "applied; a lower --learning_rate may help. What was saved before is intact")
    return {"loss": loss, "grad_norm": grad_norm, "entropy_sum": entropy_sum, "clipped": clipped, "tokens": tokens}


def learning_rate_at(args, step, last_step):
    """The learning rate of step 1 … last_step."""
    return args.learning_rate * (1 - (step - 1) / last_step if args.lr_schedule == "linear" else 1)


def update_metrics(updates, loss_name="loss"):
    """Averages the metrics of a step's updates: entropy and clipping over all their response tokens, loss and norm over the updates that were
    applied. The gap to the sampler is the first update's, before the weights moved."""
    if not updates:
        return {loss_name: None}
    tokens = sum(u["tokens"] for u in updates)
    applied = [u for u in updates if math.isfinite(u["grad_norm"] + u["loss"])]
    loss, grad_norm = (sum(u[name] for u in applied) / len(applied) if applied else None for name in ("loss", "grad_norm"))
    return {loss_name: loss, "grad_norm": grad_norm, "token_entropy": sum(u["entropy_sum"] for u in updates) / tokens,
            "clip_fraction": sum(u["clipped"] for u in updates) / tokens, "skipped_updates": len(updates) - len(applied), **updates[0].get("gap", {})}


def rollout_metrics(rollouts, failed, started, sampled, graded):
    """The lengths of a step's rollouts, and how long its parts took. It ends now."""
    tokens, trained = sum(len(r.response_ids) for r in rollouts), time.perf_counter()
    return {"time": trained - started, "time_sampling": sampled - started, "time_grading": graded - sampled, "time_training": trained - graded,
            "tokens_per_second": tokens / (sampled - started), "response_length": tokens / len(rollouts), "grading_timeouts": failed,
            "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)}


# How far a sampler's log-probs may be from the trainer's, in nats: (mean, max). Beyond, its weights are not the trainer's. On a GPU float32 counts
# as bfloat16: vLLM's attention multiplies it in TF32 there.
GAP_LIMITS = {"float32": (1e-3, 1e-2), "bfloat16": (0.2, math.inf)}


def place_log_probs(rollouts, response_mask):
    """The rollouts' log-probs in the places of their tokens, (N, T); nan elsewhere."""
    placed = torch.full(response_mask.shape, math.nan, device=response_mask.device)
    placed[response_mask] = torch.tensor([value for r in rollouts for value in r.log_probs], device=response_mask.device)
    return placed


def check_gap(args, compared):
    """Mean and maximum, over all ranks, of |log π − log π_sampler| of the response tokens in `compared`: (log π, log π_sampler, response_mask) of
    each microbatch, (b, t) each. The first tokens are left out: end-of-sequence is banned there, and vLLM's log-probs are those of the others.
    Raises UserError where it is too large: the most expensive silent bug of this field is a sampler with stale weights."""
    gaps = [(ours - theirs)[mask & (mask.cumsum(dim=1) > args.sampling_min_tokens)].abs() for ours, theirs, mask in compared]
    gaps = torch.cat(from_all_ranks(torch.cat(gaps).cpu()))
    mean, largest = (gaps.mean().item(), gaps.max().item()) if len(gaps) else (0.0, 0.0)
    limits = GAP_LIMITS["bfloat16" if args.device == "cuda" else args.dtype]
    if not (mean <= limits[0] and largest <= limits[1]):        # nan, too
        raise UserError(f"the sampler's log-probs differ from the trainer's by {mean:.2g} nats on average and {largest:.2g} at most (limits "
                        f"{limits}): it samples with stale or wrong weights. The step was not applied; what was saved before is intact")
    return {"logprob_gap_mean": mean, "logprob_gap_max": largest}


def check_sampler(run, rollouts, temperature):
    """check_gap on a few rollouts, where the sampled tokens' log-probs are not computed anyway."""
    batch = batch_token_ids([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    ids, labels, mask = (tensor.to(run.args.device) for tensor in batch.values())
    with torch.no_grad(), autocast(run.args):
        log_probs = get_response_log_probs(run.model, ids, labels, temperature=temperature, response_mask=mask)["log_probs"]
    return check_gap(run.args, [(log_probs, place_log_probs(rollouts, mask), mask)])


def sample_for_training(run, problems, count, n, step):
    """n rollouts for each of `count` problems, drawn without replacement, from the policy as it is now. Returns them and their problems."""
    drawn = random.Random(seed_for(run.args.seed, step, "problems")).sample(problems, count)
    run.sampler.load_weights(run.model)
    rollouts = sample(run.sampler, [p["prompt_ids"] for p in drawn], n, seed_for(run.args.seed, step, "rollouts"),
                      temperature=run.args.sampling_temperature, **run.sampling)
    return rollouts, [p for p in drawn for _ in range(n)]


def evaluate_run(run, problems, n, step):
    """`evaluate` with the run's settings and the weights as they are now; the generations go to samples.jsonl."""
    run.sampler.load_weights(run.model)
    metrics, rollouts, rewards = evaluate(run.sampler, problems, run.reward_fn, n, seed_for(run.args.seed, step, "evaluation"),
                                          temperature=run.args.eval_temperature, **run.sampling)
    if run.args.eval_temperature > 0:
        check_sampler(run, rollouts[:16], run.args.eval_temperature)
    log_generations(Path(run.args.output_dir, "samples.jsonl"), step, "evaluation", rollouts, rewards, [p for p in problems for _ in range(n)])
    return metrics


EVAL_NAMES = {      # each algorithm's names for what `evaluate` measures
    "sft": {"eval/accuracy": "accuracy", "eval/format_reward": "format_reward"},
    "ei": {"ei/eval_accuracy": "accuracy", "ei/eval_format_reward": "format_reward"},
    "grpo": {"val_reward_total": "reward", "val_reward_format": "format_reward", "val_reward_answer": "accuracy"},
    "all": {"eval_stderr": "accuracy_stderr", "eval_problems": "problems", "eval_lenient_accuracy": "lenient_accuracy",
            "eval_response_length": "response_length", "eval_truncated_fraction": "truncated_fraction"},
}


def finish_step(run, record):
    """Validates the weights as they are after the update, where it is time to, and logs the step's dict."""
    args, step = run.args, record["step"]
    if step in (0, run.last_step) or (args.validation_frequency and step % args.validation_frequency == 0):
        started = time.perf_counter()
        metrics = evaluate_run(run, run.val_problems, 1, step)
        record |= {name: metrics[key] for name, key in (EVAL_NAMES[args.algo] | EVAL_NAMES["all"]).items()}
        record["time_evaluation"] = time.perf_counter() - started
    log_step(args, record, run.last_step)
    if rank() == 0 and (step == run.last_step or time.monotonic() > run.plotted + 60):      # drawing takes half a second: not at every step
        plot_runs({args.output_dir: [args.output_dir]}, Path(args.output_dir, "curves.png"))
        run.plotted = time.monotonic()


def stop_on_signals(run):
    """Ctrl-C and SIGTERM let the current step end and be saved; a second one ends the program at once."""
    def handler(number, frame):
        if run.signal:
            os._exit(128 + number)
        run.signal = number
        if rank() == 0:
            os.write(2, b"align.py: stopping after this step; a second signal stops at once\n")     # print is not safe in a handler

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def training_steps(run, last_step, checkpoint):
    """Yields the numbers of the steps to do. Begun when every input has been read and found good, it opens the output directory and validates the
    weights as they come; after each step it saves, where that is due, in `checkpoint`<step>; after the last it saves the final model."""
    args, folder, run.last_step = run.args, Path(run.args.output_dir), last_step
    if args.resume and (folder / "final_model").exists():
        done = read_metrics(folder)[-1]["step"]
        if done >= last_step:
            print(f"{folder}: this run is finished")
            return
        if run.first_step == 0:
            raise UserError(f"{folder} is a finished run of {done} steps without a checkpoint that --resume could go on from")
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_project needs Weights & Biases: pip install wandb")
    if rank() == 0:
        open_output_dir(args, run.log_sizes)
        if args.wandb_project:
            import wandb
            # "auto" goes on with a run that was cut off; a run before this one in the same process (--compare) is finished
            wandb.init(project=args.wandb_project, config=vars(args), dir=args.output_dir, resume="auto", reinit="finish_previous")
    stop_on_signals(run)
    for step in range(run.first_step, last_step + 1):
        if step == last_step and rank() == 0 and (folder / "final_model").exists():
            remove(folder / "final_model")          # of fewer steps: a run killed at its end would look finished with it
        if step == 0:
            finish_step(run, {"step": 0})
        else:
            yield step          # the loop's work, which ends in finish_step
        stopping = max(from_all_ranks(run.signal))
        if step and (stopping or (args.save_frequency and step % args.save_frequency == 0)):
            save_checkpoint(folder / f"{checkpoint}{step}", run.model, run.tokenizer, run.optimizer, step)
            if args.keep_checkpoints and rank() == 0:
                for path in checkpoints(folder)[args.keep_checkpoints:]:
                    remove(path)
        if stopping:
            print(f"stopped after step {step}, as {signal.Signals(stopping).name} asked for; --resume goes on from there", flush=True)
            leave_ranks(128 + stopping)
            sys.exit(128 + stopping)
    save_checkpoint(folder / "final_model", run.model, run.tokenizer)
    if rank() == 0:
        accuracies = [lookup(record, ACCURACY) for record in read_metrics(folder) if lookup(record, ACCURACY) is not None]
        print(f"done: accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f} on {len(run.val_problems)} unseen problems; "
              f"{folder}/final_model, curves.png, metrics.jsonl, samples.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# 11. Supervised fine-tuning
# ----------------------------------------------------------------------------------------------------------------------


def sft_update(run, examples, learning_rate):
    """One optimizer update on (prompt_ids, response_ids) pairs. Returns what update_metrics needs; the loss is in nats per token."""
    batch, prompts = make_batch(run, *zip(*examples))
    tokens = int(batch["response_mask"].sum())

    def train_step(micro, log_probs):
        steps = len(examples) / len(log_probs) / world_size()                       # n / b, and FSDP averages over the ranks
        return sft_microbatch_train_step(log_probs, micro["response_mask"], steps, normalize_constant=tokens / len(examples))

    return optimizer_step(run, learning_rate, train_on(run, batch, prompts, 1.0, train_step))


def train_sft(args):
    """Supervised fine-tuning on reasoning traces; an end-of-sequence after each teaches the model to stop."""
    run = start_training(args)
    traces = load_traces(args.sft_data, args.prompt, run.reward_fn)
    if args.n_sft_examples > len(traces):
        raise UserError(f"--n_sft_examples {args.n_sft_examples}: {args.sft_data} has {len(traces)}")
    traces = random.Random(seed_for(args.seed, 0, "traces")).sample(traces, args.n_sft_examples) if args.n_sft_examples else traces
    prompt_ids = run.tokenizer([t["prompt"] for t in traces])["input_ids"]
    response_ids = run.tokenizer([t["response"] for t in traces], add_special_tokens=False)["input_ids"]
    examples = [(p, r + [run.tokenizer.eos_token_id]) for p, r in zip(prompt_ids, response_ids) if len(p) + len(r) < args.max_length]
    print(f"{len(examples)} traces from {args.sft_data}; {len(traces) - len(examples)} longer than {args.max_length} tokens dropped")
    if not examples:
        raise UserError(f"{args.sft_data}: every trace is longer than --max_length {args.max_length} tokens")
    per_epoch = math.ceil(len(examples) / args.train_batch_size)

    for step in training_steps(run, args.sft_epochs * per_epoch, "checkpoint-"):
        started = time.perf_counter()
        epoch, i = divmod(step - 1, per_epoch)      # a new order in each epoch, which a resumed run finds again by its seed
        shuffled = random.Random(seed_for(args.seed, epoch, "order of traces")).sample(examples, len(examples))
        learning_rate = learning_rate_at(args, step, run.last_step)
        update = sft_update(run, shuffled[i * args.train_batch_size:(i + 1) * args.train_batch_size], learning_rate)
        seconds = time.perf_counter() - started
        finish_step(run, {"step": step, "time": seconds, "time_training": seconds, "train/learning_rate": learning_rate,
                          **update_metrics([update], "train/loss")})


# ----------------------------------------------------------------------------------------------------------------------
# 12. Expert iteration: sample, keep what is right, fine-tune on it, repeat
# ----------------------------------------------------------------------------------------------------------------------


def train_expert_iteration(args):
    """The handout's Algorithm 2. Fine-tuning on correct samples alone is a policy gradient with reward 0 or 1 and no baseline."""
    run = start_training(args)
    problems = load_sampling_problems(run, args.train_data, at_least=args.ei_batch_size)

    for step in training_steps(run, args.n_ei_steps, "checkpoint_ei_step_"):
        # 1. Sample a few responses to each of some problems, from the policy as it is now.
        started = time.perf_counter()
        rollouts, repeated = sample_for_training(run, problems, args.ei_batch_size, args.num_rollouts, step)
        sampled = time.perf_counter()
        gap = check_sampler(run, rollouts[:16], args.sampling_temperature)

        # 2. Grade the text, keep the token ids of what is right.
        rewards, failed = grade_responses(run.reward_fn, [r.text for r in rollouts], [p["answer"] for p in repeated])
        graded = time.perf_counter()
        log_generations(Path(args.output_dir, "samples.jsonl"), step, "training", rollouts, rewards, repeated)
        correct = [(r.prompt_ids, r.response_ids) for r, reward in zip(rollouts, rewards) if reward["reward"] == 1]

        # 3. Fine-tune on it: no update where nothing is right. The optimizer's state goes on from step to step.
        learning_rate, updates = learning_rate_at(args, step, run.last_step), []
        for epoch in range(args.sft_epochs):
            shuffled = random.Random(seed_for(args.seed, step, f"epoch {epoch}")).sample(correct, len(correct))
            for i in range(0, len(correct), args.train_batch_size):
                updates.append(sft_update(run, shuffled[i:i + args.train_batch_size], learning_rate))

        # 4. Validate and log.
        finish_step(run, {"step": step, "ei/avg_reward": sum(r["reward"] for r in rewards) / len(rewards), "ei/filtered_samples": len(correct),
                          "train_reward_format": sum(r["format_reward"] for r in rewards) / len(rewards), "learning_rate": learning_rate, **gap,
                          **rollout_metrics(rollouts, failed, started, sampled, graded), **update_metrics(updates, "ei/sft_loss")})


# ----------------------------------------------------------------------------------------------------------------------
# 13. GRPO: sample a group per question, compare within the group, policy gradient
# ----------------------------------------------------------------------------------------------------------------------


def compute_old_log_probs(run, batch, prompts):
    """log π of the sampled tokens under the policy as it is now, (N, T). A rank fills in the responses to its own prompts, the ones it trains on."""
    old_log_probs = torch.zeros(batch["labels"].shape, device=run.args.device)

    def keep(micro, log_probs):             # in the place of a loss
        i, t = micro["response_mask"].nonzero(as_tuple=True)
        old_log_probs[micro["rows"][i], t] = log_probs[i, t]
        return torch.zeros(()), {}

    with torch.no_grad():
        train_on(run, batch, prompts, run.args.sampling_temperature, keep)
    return old_log_probs


def grpo_update(run, batch, prompts, learning_rate):
    """One optimizer update on a train batch: make_batch's with "sampler_log_probs" and, off-policy, "old_log_probs", each (B, T), and "raw_rewards"
    and "advantages" (B, 1). Returns what update_metrics needs. Raises UserError, before the update, for a stale sampler."""
    args, compared, sums = run.args, [], torch.zeros(4)

    def train_step(micro, log_probs):
        mask, sampler_log_probs = micro["response_mask"], micro["sampler_log_probs"]
        old_log_probs = micro.get("old_log_probs", log_probs.detach())              # on-policy the old policy is this one
        compared.append((old_log_probs, sampler_log_probs, mask))
        if not torch.is_grad_enabled():
            return torch.zeros(()), {}
        steps = len(batch["labels"]) / len(log_probs) / world_size()                # n / b, and FSDP averages over the ranks
        return grpo_microbatch_train_step(
            log_probs, mask, steps, args.loss_type, micro["raw_rewards"], micro["advantages"], old_log_probs, args.cliprange,
            args.sampling_max_tokens if args.length_normalization == "masked_normalize" else None,
            importance_weights(old_log_probs, sampler_log_probs, args.is_correction) if args.is_correction else None)

    # A response of weight 0 has gradient 0: it goes forward, for the metrics, but not backward.
    weights = batch["raw_rewards" if args.loss_type == "no_baseline" else "advantages"].flatten()
    for rows, backward in ((weights.nonzero().flatten(), True), ((weights == 0).nonzero().flatten(), False)):
        if len(rows):
            with torch.set_grad_enabled(backward):
                sums += train_on(run, take(batch, rows), prompts, args.sampling_temperature, train_step).float()
    gap = check_gap(args, compared)
    return optimizer_step(run, learning_rate, sums) | {"gap": gap}


def train_grpo(args):
    """The handout's Algorithm 3. One step: N rollouts, then one update per train batch and epoch; more than one makes it off-policy."""
    run = start_training(args)
    prompts_per_step = args.rollout_batch_size // args.group_size
    problems = load_sampling_problems(run, args.train_data, at_least=prompts_per_step)
    off_policy = args.epochs_per_rollout_batch * (args.rollout_batch_size // args.train_batch_size) > 1

    for step in training_steps(run, args.n_grpo_steps, "checkpoint_step_"):
        # 1. Sample a group of G responses to each of some problems, from the policy as it is now: after this it is π_old.
        started = time.perf_counter()
        rollouts, repeated = sample_for_training(run, problems, prompts_per_step, args.group_size, step)
        sampled = time.perf_counter()

        # 2. Grade them and compare each with its group.
        advantages, raw_rewards, grades = compute_group_normalized_rewards(
            run.reward_fn, [r.text for r in rollouts], [p["answer"] for p in repeated], args.group_size, args.advantage_eps,
            args.use_std_normalization and args.group_size > 1)
        graded = time.perf_counter()
        log_generations(Path(args.output_dir, "samples.jsonl"), step, "training", rollouts, grades["rewards"], repeated)

        # 3. Put the rollouts, their advantages and the log-probs of sampler and old policy into tensors, a row for each response.
        batch, prompts = make_batch(run, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
        batch |= {"raw_rewards": raw_rewards[:, None].to(args.device), "advantages": advantages[:, None].to(args.device),        # (N, 1) each
                  "sampler_log_probs": place_log_probs(rollouts, batch["response_mask"])}
        if off_policy:          # from the second update on π is not π_old any more
            batch["old_log_probs"] = compute_old_log_probs(run, batch, prompts)

        # 4. Update the policy: once on-policy, or once for each train batch in each epoch.
        learning_rate, updates = learning_rate_at(args, step, run.last_step), []
        for epoch in range(args.epochs_per_rollout_batch):
            order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(seed_for(args.seed, step, f"epoch {epoch}")))
            for rows in order.split(args.train_batch_size):
                updates.append(grpo_update(run, take(batch, rows), prompts, learning_rate))

        # 5. Validate and log.
        finish_step(run, {"step": step, "train_reward_total": grades["reward_mean"], "train_reward_format": grades["format_reward_mean"],
                          "train_reward_answer": grades["answer_reward_mean"], "equal_reward_groups": grades["equal_reward_groups"],
                          "advantage_std": advantages.std(correction=0).item(), "learning_rate": learning_rate,
                          **rollout_metrics(rollouts, grades["grading_timeouts"], started, sampled, graded), **update_metrics(updates)})


# ----------------------------------------------------------------------------------------------------------------------
# 14. Evaluation as a run, and main
# ----------------------------------------------------------------------------------------------------------------------


def run_eval(args):
    """Evaluates a model, or answers one question. Writes baseline_results_summary.json and samples.jsonl."""
    run = load_run(args)
    if args.question is not None:
        run.sampler.load_weights(run.model)
        prompt_ids = run.tokenizer(format_prompt(args.prompt, args.question))["input_ids"]
        for rollout in sample(run.sampler, [prompt_ids], args.eval_samples, seed_for(args.seed, 0, "question"),
                              temperature=args.eval_temperature, **run.sampling):
            print(rollout.text.strip())
        return
    problems = load_val_problems(run)
    if rank() == 0:
        open_output_dir(args, run.log_sizes)
    summary = {"model": args.model, "prompt": args.prompt, "temperature": args.eval_temperature, "seed": args.seed}
    summary |= evaluate_run(run, problems, args.eval_samples, 0)
    if rank() > 0:
        return
    Path(args.output_dir, "baseline_results_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("accuracy {accuracy:.3f} ±{accuracy_stderr:.3f} (n={problems}), right answer in any format {lenient_accuracy:.3f}, "
          "format {format_reward:.3f}, length {response_length:.1f} tokens, cut off {truncated_fraction:.1%}\n"
          "format and answer right: {categories[format_and_answer]}   format only: {categories[format_only]}   "
          "neither: {categories[neither]}".format(**summary))
    print("   ".join(f"pass@{k} {value:.3f}" for k, value in summary["pass_at_k"].items()))
    print(f"{args.output_dir}/baseline_results_summary.json, samples.jsonl")


ALGORITHMS = {"eval": run_eval, "sft": train_sft, "ei": train_expert_iteration, "grpo": train_grpo}


def outcome(folder, target):
    """What came of a run: the values of the columns of compare's table, None or nan where there is no such value."""
    records = read_metrics(folder)
    end, reached = records[-1], next((record for record in records if (lookup(record, ACCURACY) or 0) >= target), {})
    norms = [record["grad_norm"] for record in records if record.get("grad_norm") is not None]
    return [100 * lookup(end, ACCURACY), 100 * lookup(end, FORMAT), reached.get("step"), reached.get("seconds"), end["seconds"],
            end["sampled_tokens"] / 1e3, end.get("token_entropy"), end["eval_response_length"], statistics.fmean(norms or [math.nan])]


def cell(values, form):
    """A cell of that table: mean ± standard deviation of the values that there are, and of how many runs they are."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    spread = f" ± {statistics.stdev(there):{form}}" if len(there) > 1 else ""
    share = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.fmean(there):{form}}{spread}{share}" if there else "–"


def compare(args, argv):
    """Runs every variant of --compare with every seed, as main would, and rank 0 writes compare.png and compare.md."""
    folder, (flag, _, values) = Path(args.output_dir or "compare_output"), args.compare.partition("=")
    if not values:
        raise UserError(f"--compare {args.compare} should be FLAG=A,B,…")
    variants = {f"{flag}={value}": [] for value in values.split(",")}
    for label, runs in variants.items():            # all of them are checked before the first one runs
        for seed in range(args.seeds):
            output_dir = folder / label.replace("/", "_") / f"seed{seed}"
            with contextlib.redirect_stdout(None):      # of a flag given twice the last one counts, so this is a run, not a comparison
                run = parse_args([*argv, "--compare=", f"--{label}", f"--seed={seed}", f"--output_dir={output_dir}"])
            if run.algo == "eval" or run.overwrite:
                raise UserError("--compare compares training runs, --algo sft, ei or grpo, and goes on with those that are there: no --overwrite")
            run.resume = True
            for key, before in read_settings(output_dir).items():
                if key not in ("output_dir", "compare", "seeds", "target") and vars(run).get(key) != before:
                    raise UserError(f"{output_dir} holds a run with --{key} {before}, not {vars(run).get(key)}; choose another --output_dir")
            runs.append(run)
    for runs in variants.values():
        for run in runs:
            print(f"--- {run.output_dir}", flush=True)
            with one_sentence("align.py"):          # which gives the signals their handlers back
                ALGORITHMS[run.algo](run)
    if rank() > 0:
        return
    folders = {label: [run.output_dir for run in runs] for label, runs in variants.items()}
    plot_runs(folders, folder / "compare.png", against="seconds" if flag == "algo" else "step")       # a step of theirs is not one thing
    columns = {"accuracy %": ".1f", "in the format %": ".1f", f"steps to {args.target:.0%}": ".0f", f"seconds to {args.target:.0%}": ".0f",
               "seconds": ".0f", "sampled tokens, thousands": ".0f", "entropy at the end": ".3f", "length at the end": ".1f", "gradient norm": ".2f"}
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for label in folders:
        outcomes = zip(*(outcome(each, args.target) for each in folders[label]))       # a tuple of the runs' values for each column
        rows.append([label, *map(cell, outcomes, columns.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    Path(folder, "compare.md").write_text(f"`python align.py {' '.join(argv)}`\n\n{table}\n", encoding="utf-8")
    print(f"{table}\n{folder}/compare.png, compare.md")


def main(argv=None):
    """Runs the command line. A user's mistake ends in one sentence and exit code 2."""
    with one_sentence("align.py"):
        join_ranks()
        argv = sys.argv[1:] if argv is None else list(map(str, argv))
        args = parse_args(argv)
        if args.plot:
            plot_runs({folder: [folder] for folder in args.plot}, "compare.png")
            print("compare.png")
        elif args.compare:
            compare(args, argv)
        else:
            ALGORITHMS[args.algo](args)
        leave_ranks()


if __name__ == "__main__":
    main()
