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
import difflib
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
import ssl
import statistics
import sys
import threading
import time
import urllib.error
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


# What goes wrong ends the program with one sentence, not with a traceback.


def fail(program, message, code):
    """Ends the program with one sentence. Of several ranks rank 0 speaks; what another one has to say is heard where rank 0 lives on."""
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)       # which torchrun sends as soon as a rank has ended
        time.sleep(2)
    sys.stdout.flush()
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    sys.exit(code) if world_size() == 1 else os._exit(code)       # at once: the others may wait for this one for ever


def out_of_memory(error):
    """Is this exception PyTorch's way to say so? (On a CPU it is a plain RuntimeError.)"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def one_sentence(program):
    """What goes wrong inside and is not the program's own fault ends it with one sentence on stderr and an exit code."""
    handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]       # stop_on_signals changes them
    try:
        yield
    except UserError as error:
        fail(program, error, 2)
    except OSError as error:                    # no space, no permission, a folder that vanished
        fail(program, f"{error}; what was saved before is intact", 2)
    except RuntimeError as error:
        if out_of_memory(error):
            fail(program, "out of memory; --tokens_per_microbatch bounds training, --sampler_batch_size and --gpu_memory_utilization bound sampling; "
                          "what was saved before is intact", 2)
        if not re.search(r"gloo|NCCL|TCPStore", str(error)):
            raise
        fail(program, f"another rank is gone ({reason(error)}); what was saved before is intact", 1)
    except KeyboardInterrupt:
        fail(program, "interrupted; what was saved before is intact", 130)
    finally:
        for handler in handlers:
            signal.signal(*handler)


def use_hub_or_cache():
    """Where the Hugging Face hub does not answer, its client is set to use the cache alone, instead of trying again for a minute."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:      # an answer of a kind
        pass
    except OSError as error:            # but for certificates that this Python has not: the hub's client brings its own
        huggingface_hub.constants.HF_HUB_OFFLINE = not isinstance(getattr(error, "reason", None), ssl.SSLError)
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT {huggingface_hub.constants.ENDPOINT}: {reason(error)}") from error


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
        model="data/arithmetic/base_model", prompt="tiny", train_data="data/arithmetic/train.jsonl",
        val_data="data/arithmetic/test.jsonl", sft_data="data/arithmetic/sft.jsonl",
        sampling_max_tokens=64, validation_size=512, lr_schedule="linear", max_length=256, tokens_per_microbatch=4096,
        eval=dict(validation_size=0),
        sft=dict(learning_rate=3e-4, train_batch_size=32, sft_epochs=16, validation_frequency=8, save_frequency=500),
        ei=dict(learning_rate=3e-4, train_batch_size=64, n_ei_steps=8, ei_batch_size=256, num_rollouts=4, sft_epochs=2,
                validation_frequency=1, save_frequency=4),
        grpo=dict(learning_rate=6e-4, n_grpo_steps=50, rollout_batch_size=512, train_batch_size=512, group_size=8,
                  validation_frequency=5, save_frequency=50),
    ),
    # Qwen2.5-Math-1.5B on MATH with the handout's hyperparameters; one 80 GB GPU, hours.
    "math": dict(
        model="Qwen/Qwen2.5-Math-1.5B", prompt="r1_zero", train_data="data/MATH/train.jsonl",
        val_data="data/MATH/test.jsonl", sft_data="data/MATH/sft.jsonl",
        sampling_max_tokens=1024, validation_size=1024, lr_schedule="constant", max_length=2048, tokens_per_microbatch=2048,
        eval=dict(validation_size=0),
        sft=dict(learning_rate=1e-5, train_batch_size=64, sft_epochs=3,
                 validation_frequency=50, save_frequency=500),
        ei=dict(learning_rate=1e-5, train_batch_size=64, n_ei_steps=5, ei_batch_size=1024,
                num_rollouts=4, sft_epochs=1, validation_frequency=1, save_frequency=1),
        grpo=dict(learning_rate=1e-5, n_grpo_steps=200, rollout_batch_size=256, train_batch_size=256, group_size=8,
                  validation_frequency=10, save_frequency=50),
    ),
}


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float between `low` and `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:        # false for nan, too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}" if high < math.inf else f"{text} is below {low}")
        return value
    parse.__name__ = kind.__name__          # argparse's "invalid int value" takes the name from here
    return parse


def boolean(text):
    """An argparse type: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def build_parser():
    """(parser, {flag: the algorithms that use it}). Groups name the algorithms that a flag is for."""
    parser = argparse.ArgumentParser(prog="align.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    users = {}

    def group(title, *algos):
        section = parser.add_argument_group(f"{title} ({', '.join(algos)})")
        users[section] = algos
        return section

    g = group("what to run", *ALGOS)
    g.add_argument("--algo", choices=ALGOS, default=None, help="which of the four to run")
    g.add_argument("--preset", choices=("auto", *PRESETS), default="auto", help="defaults for the rest; auto: math where there is CUDA, else tiny")
    g.add_argument("--model", help="a Hugging Face id or a folder, such as sft_output/final_model")
    g.add_argument("--prompt", help="a name in PROMPTS (section 2)")
    g.add_argument("--val_data", help="JSON lines of problems to evaluate on")
    g.add_argument("--output_dir", help="where the run writes; by default one folder per algorithm")
    g.add_argument("--overwrite", type=boolean, nargs="?", const=True, default=False, help="replace the run that output_dir holds")
    g.add_argument("--seed", type=int, default=0, help="of every random draw")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the matrix products (autocast; the weights stay float32); auto: bfloat16 on a GPU")
    g.add_argument("--plot", nargs="+", metavar="DIR", help="draw these runs into one picture, compare.png, and stop")
    g.add_argument("--compare", metavar="FLAG=A,B,…", help="run once with each value of the flag and each seed, the runs in folders of output_dir "
                   "(compare_output), and put them into one picture and one table; finished runs are not run again")
    g.add_argument("--seeds", type=number(int, 1), default=3, help="with --compare: runs of each variant, with seeds 0, 1, …")
    g.add_argument("--target", type=number(float, 0, 1), default=0.8, help="with --compare: the accuracy whose time is measured")

    g = group("sampling and evaluation", *ALGOS)
    g.add_argument("--sampler", choices=("auto", "vllm", "torch"), default="auto", help="what generates the responses; auto: vllm on a GPU, else torch")
    g.add_argument("--sampler_batch_size", type=number(int, 1), default=512, help="sequences that the torch sampler holds at a time")
    g.add_argument("--gpu_memory_utilization", type=number(float, 0.01, 1), default=0.3, help="share of the GPU's memory that vLLM takes for itself")
    g.add_argument("--vllm_sleep", type=boolean, nargs="?", const=True, default=False, help="give vLLM's memory to training while it does not sample")
    g.add_argument("--sampling_min_tokens", type=number(int, 0), default=4, help="no response ends before; 0: off")
    g.add_argument("--sampling_max_tokens", type=number(int, 1), help="responses are cut after so many tokens")
    g.add_argument("--eval_temperature", type=number(float, 0), default=1.0, help="0: greedy")
    g.add_argument("--validation_size", type=number(int, 0), help="problems to evaluate on, always the same ones; 0: all")

    g = group("evaluation only", "eval")
    g.add_argument("--eval_samples", type=number(int, 1), default=1, help="responses per problem, for pass@k")
    g.add_argument("--question", help="answer this question, print the answer and stop")

    g = group("training", "sft", "ei", "grpo")
    g.add_argument("--learning_rate", type=number(float, 0), help="of AdamW")
    g.add_argument("--lr_schedule", choices=("constant", "linear"), help="linear: down to zero over the run")
    g.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="of AdamW; 0: off")
    g.add_argument("--gradient_clip_value", type=number(float, 1e-9), default=1.0, help="bound on the gradient's norm; inf: off")
    g.add_argument("--train_batch_size", type=number(int, 1), help="sequences per optimizer update")
    g.add_argument("--tokens_per_microbatch", type=number(int, 1), help="prompt and response tokens that go through the model at a time, of sequences of "
                   "similar length; less takes less memory and makes the same update")
    g.add_argument("--gradient_accumulation_steps", type=number(int, 0), default=0,
                   help="split a train batch into so many equal microbatches instead (CS336: 128 for GRPO, 32 for SFT); 0: off")
    g.add_argument("--validation_frequency", type=number(int, 0), help="steps between validations; 0: first and last step only")
    g.add_argument("--save_frequency", type=number(int, 0), help="steps between checkpoints; 0: the final model only")
    g.add_argument("--keep_checkpoints", type=number(int, 0), default=0, help="only the newest so many; 0: all")
    g.add_argument("--resume", type=boolean, nargs="?", const=True, default=False,
                   help="go on from the newest checkpoint in output_dir, with that run's settings where no flag says otherwise")
    g.add_argument("--wandb_project", help="log to this Weights & Biases project as well")

    g = group("supervised data", "sft")
    g.add_argument("--sft_data", help="JSON lines of reasoning traces")
    g.add_argument("--n_sft_examples", type=number(int, 0), default=0, help="use so many traces, drawn at random; 0: all")
    g.add_argument("--max_length", type=number(int, 1), help="traces longer than this, prompt included, are dropped (tokens)")

    g = group("supervised updates", "sft", "ei")
    g.add_argument("--sft_epochs", type=number(int, 1), help="passes over the traces (ei: over each step's correct samples)")

    g = group("sampling for training", "ei", "grpo")
    g.add_argument("--train_data", help="JSON lines of problems to sample on")
    g.add_argument("--sampling_temperature", type=number(float, 1e-3), default=1.0, help="1: sample from the policy itself")

    g = group("expert iteration", "ei")
    g.add_argument("--n_ei_steps", type=number(int, 1), help="rounds of sample, filter, fine-tune")
    g.add_argument("--ei_batch_size", type=number(int, 1), help="problems per round")
    g.add_argument("--num_rollouts", type=number(int, 1), help="responses per problem")

    g = group("GRPO", "grpo")
    g.add_argument("--n_grpo_steps", type=number(int, 1), help="rollout batches")
    g.add_argument("--rollout_batch_size", type=number(int, 1), help="N, responses per step")
    g.add_argument("--group_size", type=number(int, 1), help="G, responses per problem")
    g.add_argument("--epochs_per_rollout_batch", type=number(int, 1), default=1, help="passes over each rollout batch; above 1: off-policy")
    g.add_argument("--loss_type", choices=LOSS_TYPES, default="reinforce_with_baseline", help="see section 7")
    g.add_argument("--cliprange", type=number(float, 0), default=0.2, help="ε of grpo_clip")
    g.add_argument("--use_std_normalization", type=boolean, nargs="?", const=True, default=True,
                   help="divide a group's advantages by its standard deviation; false: as [DrGRPO]")
    g.add_argument("--advantage_eps", type=number(float, 0), default=1e-6, help="added to that standard deviation")
    g.add_argument("--is_correction", type=number(float, 0), default=0.0, metavar="CAP",
                   help="weigh each token by min(π_old / π_sampler, CAP), which corrects for a sampler of other numerics; 2 is usual, 0: off")
    g.add_argument("--length_normalization", choices=("masked_mean", "masked_normalize"), default="masked_mean",
                   help="divide a response's loss by its own length, or by sampling_max_tokens as [DrGRPO]")

    users = {action.dest: algos for section, algos in users.items() for action in section._group_actions}
    for action in parser._actions:          # say in --help what the presets put in
        if action.dest in users:
            for name, preset in PRESETS.items():
                values = {str(v) for v in [preset.get(action.dest), *(preset[a].get(action.dest) for a in ALGOS)] if v is not None}
                action.help += f" [{name}: {' | '.join(sorted(values))}]" if values else ""
            action.help += " (default: %(default)s)" if action.default is not None and "[tiny" not in action.help else ""
    return parser, users


def read_settings(args):
    """The settings of the run that is to be resumed; {} where it was stopped before it wrote any."""
    path = Path(args.output_dir or OUTPUT_DIRS[args.algo], "args.json")
    if not path.exists():
        return {}
    try:
        settings = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read, so that the run cannot be resumed: {reason(error)}") from error
    if settings.get("algo") != args.algo:
        raise UserError(f"{path.parent} holds a run of --algo {settings.get('algo')}, which --algo {args.algo} cannot resume")
    return {flag: value for flag, value in settings.items() if flag not in ("resume", "overwrite")}


def parse_args(argv):
    """The run's settings. Raises UserError for a flag that is wrong, that contradicts another or that the run would not use."""
    parser, users = build_parser()

    def complain(message):
        unknown = re.search(r"unrecognized arguments: --(\w+)", message)
        near = difflib.get_close_matches(unknown[1], users, n=1) if unknown else []
        raise UserError(message + (f" (did you mean --{near[0]}?)" if near else ""))

    parser.error = complain
    argv = list(argv)
    for i, word in enumerate(argv):         # --group-size=4 means --group_size=4
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in users:
            argv[i] = "--" + name[2:].replace("-", "_") + equals + value
    # argparse fills in a default only where the namespace has no such attribute, so None marks what was not typed.
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(users)))
    typed = {flag for flag in users if getattr(args, flag) is not None}
    if args.plot or args.compare:
        args.seeds, args.target = (getattr(args, flag) if flag in typed else parser.get_default(flag) for flag in ("seeds", "target"))
        return args
    if args.algo is None:
        raise UserError("say what to run: --algo eval, sft, ei or grpo")
    for flag in sorted(typed):
        if args.algo not in users[flag]:
            raise UserError(f"--{flag} is not used by --algo {args.algo} (it is for {', '.join(users[flag])})")

    settings = read_settings(args) if args.resume else {}
    requested = args.preset or settings.get("preset", "auto")
    args.preset = requested if requested != "auto" else "math" if torch.cuda.is_available() else "tiny"
    preset = PRESETS[args.preset] | PRESETS[args.preset][args.algo] | settings
    for flag in users:
        if args.algo not in users[flag]:
            delattr(args, flag)
        elif flag not in typed and flag != "preset":
            setattr(args, flag, preset.get(flag, parser.get_default(flag)))
    if requested == "auto":
        print(f"preset {args.preset}: {'a GPU is' if torch.cuda.is_available() else 'no GPU'} here (--preset chooses)")
    args.output_dir = args.output_dir or OUTPUT_DIRS[args.algo]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"

    def require(condition, message):
        if not condition:
            raise UserError(message)

    require(args.sampling_min_tokens <= args.sampling_max_tokens,
            f"--sampling_min_tokens {args.sampling_min_tokens} is above --sampling_max_tokens {args.sampling_max_tokens}")
    if args.algo != "eval":
        require(not (args.resume and args.overwrite), "--resume goes on with a run, --overwrite removes it: one of the two")
        require(not args.gradient_accumulation_steps or args.train_batch_size % args.gradient_accumulation_steps == 0,
                f"--gradient_accumulation_steps {args.gradient_accumulation_steps} does not divide --train_batch_size {args.train_batch_size}")
    vllm = args.sampler == "vllm" or (args.sampler == "auto" and args.device == "cuda")
    useful = [("seeds", False, "--compare"), ("target", False, "--compare"), ("gpu_memory_utilization", vllm, "--sampler vllm"),
              ("vllm_sleep", vllm, "--sampler vllm"), ("sampler_batch_size", args.sampler != "vllm", "--sampler torch")]
    if args.algo != "eval":
        useful += [("tokens_per_microbatch", not args.gradient_accumulation_steps, "--gradient_accumulation_steps 0")]
    if args.algo == "grpo":
        require(args.rollout_batch_size % args.group_size == 0,
                f"--group_size {args.group_size} does not divide --rollout_batch_size {args.rollout_batch_size}")
        require(args.rollout_batch_size % args.train_batch_size == 0,
                f"--train_batch_size {args.train_batch_size} does not divide --rollout_batch_size {args.rollout_batch_size}")
        require(args.loss_type == "no_baseline" or args.group_size > 1, "--group_size 1 leaves no group to compare with: every advantage is 0")
        baseline = args.loss_type != "no_baseline"
        useful += [("cliprange", args.loss_type == "grpo_clip", "--loss_type grpo_clip"), ("use_std_normalization", baseline, "a loss with a baseline"),
                   ("advantage_eps", baseline and args.use_std_normalization, "--use_std_normalization")]
    for flag, is_useful, where in useful:
        require(is_useful or flag not in typed, f"--{flag} is only used with {where}")
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
    (r",?\s+(and|or)\s+", ", "), (r"(?<![\w.}/^])(\d+)\s*/\s*(\d+)(?![\d./])", r"\\frac{\1}{\2}"),          # 3/4\pi is \frac{3}{4}\pi
    (r"\s+", " "), (r"\. ?$| (?=[,)\]}])|(?<=[,(\[{]) ", ""), (r"(\d) ?_ ?\{(\d+)\}", r"\1_\2"),              # 506_{7}
    (r"^10(?= ?\^)", r"1\\times 10"), (r"^ ?([-+]?[\d.]+) ?(\\times|\\cdot|\*) ?10 ?\^ ?\{?([-+]?\d{1,3})\}? ?$", r"\1e\3"),
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
    r"""The exact value of a plain number, as 1234.5, \frac{3}{4}, 1\frac{3}{4} or 2.5e-3; else None."""
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
    if len(items) > 1:
        return all(any(same(a, t) for a in items) for t in true_items) and all(any(same(a, t) for t in true_items) for a in items)
    return same_value(answer, truth)


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
    problems = [record | {"prompt": format_prompt(prompt_name, record["problem"])} for record in records if normalize_answer(record["answer"])]
    unusable = [str(record["line"]) for record in records if not normalize_answer(record["answer"])]
    if not problems:
        raise UserError(f"{path}: no problem has a usable answer")
    if unusable:
        print(f"{path}, line {', '.join(unusable)}: left out, since the answer is empty but for spelling; {len(unusable)} of {len(records)} problems")
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
    """Prompts and responses (B lists of ids each) as one right-padded batch for next-token prediction.

    Returns {"input_ids", "labels", "response_mask"}, each (B, T), where T = longest prompt + response, less one for the shift.

        prompt [5, 6], response [7, 8]     input_ids      5  6  7
                                           labels         6  7  8
                                           response_mask  0  1  1     the labels that the policy chose

    The mask comes from the lengths: a pad id is a token like any other. Attention is causal and padding stands on the right, so no real
    token ever looks at padding and the model needs no attention mask.
    """
    longest = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    ids = torch.full((len(prompt_ids), longest), pad_id)                            # (B, T+1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompt_ids, response_ids)):
        ids[i, :len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[i, len(prompt):len(prompt) + len(response)] = True
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}   # (B, T) each


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """Texts to {"input_ids", "labels", "response_mask"}, each (B, T); see batch_token_ids.

    Prompt and output are tokenised apart, so that the border between them is a token border, as it is when sampling.
    """
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
        ctx.dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        normalizers, label_logits, entropies = torch.empty(3, len(hidden), device=hidden.device)
        for rows, logits in LabelLogProbs.chunk_logits(hidden.to(ctx.dtype), head.to(ctx.dtype), temperature):
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
        cast_hidden, cast_head = hidden.to(ctx.dtype), head.to(ctx.dtype)
        grad_hidden, grad_head = torch.empty_like(cast_hidden), torch.zeros_like(head)
        for rows, logits in LabelLogProbs.chunk_logits(cast_hidden, cast_head, ctx.temperature):
            grad_logits = logits.sub_(normalizers[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, labels[rows, None], grad[rows, None])
            grad_logits = grad_logits.div_(ctx.temperature).to(ctx.dtype)
            torch.mm(grad_logits, cast_head, out=grad_hidden[rows])
            if ctx.dtype == head.dtype:
                grad_head.addmm_(grad_logits.T, cast_hidden[rows])
            else:                           # sums stay float32
                grad_head += grad_logits.T @ cast_hidden[rows]
        return grad_hidden.to(hidden.dtype), grad_head, None, None


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
        with torch.no_grad():
            entropy = compute_entropy(logits) if return_token_entropy else None
    else:
        hidden = hidden_states(model, input_ids, **context)                         # (B, T, D)
        values = LabelLogProbs.apply(hidden[response_mask], model.get_output_embeddings().weight, labels[response_mask], temperature)
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

    def __init__(self, model, prompt_ids, tokens_at_a_time=math.inf):
        device, self.config = model.device, model.config
        self.lengths = torch.tensor([len(ids) - 1 for ids in prompt_ids], device=device)                    # (P,)
        self.longest = int(self.lengths.max())
        ids = torch.tensor([ids[:-1] + [0] * (self.longest - len(ids) + 1) for ids in map(list, prompt_ids)], device=device)
        caches, self.outputs = [], []
        for some in ids.split(max(1, int(min(len(ids), tokens_at_a_time / self.longest)))) if self.longest else ():
            caches.append(DynamicCache(config=self.config))
            self.outputs.append(hidden_states(model, some, past_key_values=caches[-1], use_cache=True))     # no token looks at padding on its right
        self.states = [tuple(torch.cat(parts) for parts in zip(*((layer.keys, layer.values) for layer in layers)))
                       for layers in zip(*(cache.layers for cache in caches))]      # (P, heads, longest, D) for each layer
        self.copies = [tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in pair) for pair in self.states]

    def context(self, numbers, width):
        """What the model's forward needs to know of the prompts with these numbers (b,) when its inputs, (b, width), follow them."""
        cache = DynamicCache(config=self.config)
        for layer, (keys, values) in zip(cache.layers, self.copies):
            layer.update(keys.index_select(0, numbers), values.index_select(0, numbers))
        is_prompt = torch.arange(self.longest, device=numbers.device) < self.lengths[numbers, None]         # (b, longest)
        return {"past_key_values": cache, "use_cache": True,
                "attention_mask": torch.cat([is_prompt, is_prompt.new_ones(len(numbers), width)], dim=1),
                "position_ids": self.lengths[numbers, None] + torch.arange(width, device=numbers.device)}

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
# depend on the response changes nothing on average and takes noise away. The mean reward of G responses to the same prompt is such a
# baseline, but for a factor: the response is one of the G, which makes the gradient 1 − 1/G of the true one. r less the baseline is the
# advantage A.
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
    Returns (advantages (N,), raw_rewards (N,), metadata): the three mean rewards as floats, the number of groups of equal rewards and of
    failed gradings, and "rewards", the N reward dicts. Raises ValueError if N is not a multiple of G, or if a group of one is to be
    divided by its standard deviation.
    """
    if group_size < 1 or len(rollout_responses) % group_size or (normalize_by_std and group_size == 1):
        raise ValueError(f"{len(rollout_responses)} responses cannot be normalised in groups of {group_size}")
    rewards, failed = grade_responses(reward_fn, rollout_responses, repeated_ground_truths)
    raw_rewards = torch.tensor([r["reward"] for r in rewards], dtype=torch.float32)
    groups = raw_rewards.view(-1, group_size)                                       # (prompts, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps)
    # The mean of equal floats can be off by an ulp and their std is 0, so equal rewards are set to advantage 0, not computed to it.
    equal = groups.amax(dim=1) == groups.amin(dim=1)
    advantages[equal] = 0.0
    means = {f"{key}_mean": sum(r[key] for r in rewards) / len(rewards) for key in ("reward", "format_reward", "answer_reward")}
    metadata = {**means, "equal_reward_groups": int(equal.sum()), "grading_timeouts": failed, "rewards": rewards}
    return advantages.flatten(), raw_rewards, metadata


def require_column(weights):
    """Raises ValueError unless the per-sequence weights are (B, 1)."""
    if weights.ndim != 2 or weights.shape[1] != 1:
        raise ValueError(f"rewards and advantages are (B, 1), one per sequence, not {tuple(weights.shape)}")


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    """−A · log π per token, (B, T): its gradient is REINFORCE's, the score function weighted by the advantage.

    Args: raw_rewards_or_advantages (B, 1), policy_log_probs (B, T). Raises ValueError for (B,), which would broadcast over tokens.
    """
    require_column(raw_rewards_or_advantages)
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    """−min(ρA, clip(ρ, 1−ε, 1+ε)A) per token, (B, T), with ρ = π/π_old ([PPO] equation 7, [GRPO] equation 3).

    Where the clipped branch decides, the gradient is zero: the policy has already moved far enough on this token.
    Args: advantages (B, 1); both log-probs (B, T), the old ones without a gradient; cliprange ε.
    Returns (loss, metadata): "ratio" ρ (B, T) and "clipped" (B, T), true where the clipped branch decided.
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

    Raises ValueError for an unknown type or an argument that the type needs and did not get.
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

    The sampler has the same weights as the trainer but other kernels and often other precision, so it samples from a slightly other
    distribution. The ratio makes the gradient's expectation right again, and the cap bounds what it adds in variance.
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
    if normalize_constant is None:
        filled = response_mask.bool().any(dim=-1)                                   # an empty mean would be 0/0
        per_sequence = masked_mean(per_token[filled], response_mask[filled], dim=-1)
    else:
        per_sequence = masked_normalize(per_token, response_mask, normalize_constant, dim=-1)
    loss = per_sequence.sum() / len(per_token) / gradient_accumulation_steps
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


def response_text(tokenizer, response_ids, finish_reason, stop):
    """What a response decodes to. Where the stop string ended it, the text ends with that string: the last token may reach beyond it."""
    text = tokenizer.decode(response_ids, skip_special_tokens=True)
    ended_by_stop = finish_reason == "stop" and response_ids[-1] != tokenizer.eos_token_id
    return text[:text.rindex(stop) + len(stop)] if ended_by_stop else text


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
        self.is_initialized = layer.is_initialized
        if self.is_initialized:
            self.keys, self.values = layer.keys, layer.values
        self.room = [None, None]

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self._append(0, self.keys, key_states), self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, i, old, new):
        (rows, heads, length, width), added, room = old.shape, new.shape[2], self.room[i]
        if room is None or old.data_ptr() != room.data_ptr() or length + added > room.shape[2]:     # rows were dropped, or it is full
            room = self.room[i] = old.new_empty(rows, heads, length + added + 64, width)
            room[:, :, :length] = old
        room[:, :, length:length + added] = new
        return room[:, :, :length + added]


class TorchSampler:
    """Samples through transformers alone, the same on a laptop and on a GPU: with the training model itself where it is whole and of the
    sampler's dtype, else with a copy."""

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
        # Token t of response i is where the uniform number draws[i, t] falls in the cumulated distribution. So a response depends on
        # its prompt's seed and its own number alone, not on which others share its batch or when they end.
        draws = torch.cat([torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        per_batch = max(1, self.batch_size // n)
        rollouts = []
        for i in range(0, len(prompt_ids), per_batch):
            rollouts += self._generate_batch(prompt_ids[i:i + per_batch], n, temperature, max_tokens, min_tokens, stop,
                                             draws[i * n:(i + per_batch) * n])
        return rollouts

    def _generate_batch(self, prompt_ids, n, temperature, max_tokens, min_tokens, stop, draws):
        device, tokenizer = self.model.device, self.tokenizer
        draws = draws.to(device).clamp(max=1 - 1e-6)
        # Only a token that holds the stop string's last character can complete it; the text is looked at after those alone.
        may_stop = torch.zeros(len(self.model.get_output_embeddings().weight), dtype=torch.bool, device=device)     # often more than the tokenizer's
        may_stop[:len(self.token_strings)] = torch.tensor([stop is not None and stop[-1] in (s or "") for s in self.token_strings], device=device)
        rows = torch.arange(len(prompt_ids) * n, device=device)             # which response each row of the batch holds
        ids = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=device)
        log_probs, lengths = torch.zeros(ids.shape, device=device), torch.full_like(rows, max_tokens)
        stopped = torch.zeros_like(rows, dtype=torch.bool)
        shared = SharedPrompts(self.model, prompt_ids, tokens_at_a_time=4096)       # activations take memory
        context = shared.context(rows // n, max_tokens)
        cache, mask, positions = context["past_key_values"], context["attention_mask"], context["position_ids"]
        cache.layers = [RoomyLayer(layer) for layer in cache.layers]
        token = torch.tensor([prompt[-1] for prompt in prompt_ids], device=device)[rows // n]
        for t in range(max_tokens):
            logits = self.model(token[:, None], attention_mask=mask[:, :shared.longest + t + 1], position_ids=positions[:, t:t + 1],
                                past_key_values=cache, use_cache=True).logits[:, -1].float()        # (rows, V)
            scaled = logits / (temperature or 1.0)
            normalizer = scaled.logsumexp(dim=-1)           # before the ban below: log-probs are the model's own
            if t < min_tokens:
                scaled[:, tokenizer.eos_token_id] = -math.inf
            if temperature == 0:
                token = scaled.argmax(dim=-1)
            else:
                cumulated = scaled.softmax(dim=-1).cumsum(dim=-1)
                token = torch.searchsorted(cumulated, draws[rows, t:t + 1] * cumulated[:, -1:], right=True).squeeze(1)
            ids[rows, t], log_probs[rows, t] = token, scaled.gather(1, token[:, None]).squeeze(1) - normalizer
            ends = token == tokenizer.eos_token_id
            if stop is not None and t + 1 >= min_tokens:
                for k in may_stop[token].nonzero().flatten().tolist():
                    tail = ids[rows[k], max(0, t - 31):t + 1].tolist()
                    with_token, without = (tokenizer.decode(part, skip_special_tokens=True) for part in (tail, tail[:-1]))
                    ends[k] |= with_token.count(stop) > without.count(stop)                         # this token completed it
            ends &= ~stopped[rows]
            lengths[rows[ends]], stopped[rows[ends]] = t + 1, True
            live = ~stopped[rows]
            n_live = int(live.sum())
            if n_live == 0:
                break
            if n_live < 0.75 * len(rows):                   # finished rows leave the batch once they are many
                cache.batch_select_indices(live.nonzero().flatten())
                rows, token, mask, positions = rows[live], token[live], mask[live], positions[live]
        rollouts = []
        for i, (length, ended) in enumerate(zip(lengths.tolist(), stopped.tolist())):
            response, finish_reason = ids[i, :length].tolist(), "stop" if ended else "length"
            text = response_text(tokenizer, response, finish_reason, stop)
            rollouts.append(Rollout(prompt_ids[i // n], response, log_probs[i, :length].tolist(), text, finish_reason))
        return rollouts


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
    # The CPU build cannot rewind a request's generator, which a prompt cut into chunks needs; and compiling costs it a minute.
    settings = dict(enable_chunked_prefill=False, enforce_eager=True) if on_cpu else {}
    if world_size() > 1:
        settings["distributed_executor_backend"] = "external_launcher"      # one engine per rank, on the rank's own GPU
    try:
        # processed_logprobs are those of the distribution that is sampled from, after temperature. generation_config="vllm" keeps the
        # model's generation_config.json from adding a top-k, ignore_eos in generate from adding another end of sequence.
        llm = vllm.LLM(model=model, dtype=dtype, gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=sleeps,
                       logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True, **settings)
        llm.generate([{"prompt_token_ids": [0]}], vllm.SamplingParams(max_tokens=1), use_tqdm=False)       # does it run?
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        raise UserError(f"vLLM {vllm.__version__} cannot serve {model}: {reason(error)}; too little memory is mended by "
                        f"--gpu_memory_utilization (now {gpu_memory_utilization}; on a CPU by VLLM_CPU_KVCACHE_SPACE, in GiB), "
                        "an unsupported model by --sampler torch") from error
    if sleeps:
        llm.sleep(level=2)          # level 2 drops the weights (level 1 would keep a copy): every hand-over brings new ones
    return llm


class VLLMSampler:
    """Samples with vLLM in this process, beside the training model. All that depends on vLLM's version is in here and above; tested with 0.32.0."""

    def __init__(self, args, tokenizer):
        self.tokenizer, self.sleeps, self.on_cpu = tokenizer, args.vllm_sleep, args.device == "cpu"
        self.llm = vllm_engine(args.model, args.dtype, args.gpu_memory_utilization, self.sleeps, self.on_cpu)
        import vllm
        self.vllm = vllm

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
            raise UserError(f"vLLM {self.vllm.__version__} has not the weight hand-over of 0.32.0 ({reason(error)}): install "
                            "vllm==0.32.0, or use --sampler torch") from error
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def generate(self, prompt_ids, n, seeds, temperature, max_tokens, min_tokens, stop):
        """As TorchSampler.generate. Every response is a request with a seed of its own; prefix caching computes a shared prompt once."""
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        params = [self.vllm.SamplingParams(temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens, logprobs=0,
                                           stop=[stop] if stop else [], include_stop_str_in_output=True, seed=seed_for(seed, i, "request"),
                                           ignore_eos=True, stop_token_ids=[self.tokenizer.eos_token_id])
                  for seed in seeds for i in range(n)]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=2)
        rollouts = []
        for ids, output in zip(prompts, (request.outputs[0] for request in outputs), strict=True):
            response_ids = list(output.token_ids)
            log_probs = [step[token].logprob for step, token in zip(output.logprobs, response_ids, strict=True)]
            text = response_text(self.tokenizer, response_ids, output.finish_reason, stop)
            rollouts.append(Rollout(ids, response_ids, log_probs, text, output.finish_reason))
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
    truths = [p["answer"] for p in problems for _ in range(n)]
    texts = [r.text for r in rollouts]
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
        "grading_timeouts": failed,
        "problems": len(problems), "responses": len(rollouts),
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

    def show(names, form, scale=1.0):
        value = lookup(record, (names,) if isinstance(names, str) else names)
        return format("-" if value is None else format(value * scale, form), f">{len(format(0.0, form))}")

    head = f"{record['step']:4d}/{last_step}"
    if "time_training" in record:
        print(f"step {head} | reward {show(REWARD, '.3f')} fmt {show('train_reward_format', '.3f')} | loss {show(LOSS, '+.4f')} | "
              f"ent {show('token_entropy', '.3f')} clip {show('clip_fraction', '.1f', 100)}% | len {show('response_length', '5.1f')} "
              f"trunc {show('truncated_fraction', '3.0f', 100)}% | gnorm {show('grad_norm', '.2f')} | lr {show(LEARNING_RATE, '.1e')} | "
              f"{show('time', '.1f')}s (gen {show('time_sampling', '.1f')}s)", flush=True)
    if lookup(record, ACCURACY) is not None:
        print(f"eval {head} | acc {show(ACCURACY, '.3f')} ±{show('eval_stderr', '.3f')} (n={record['eval_problems']}) fmt {show(FORMAT, '.3f')} "
              f"lenient {show('eval_lenient_accuracy', '.3f')} | len {show('eval_response_length', '5.1f')} "
              f"trunc {show('eval_truncated_fraction', '3.0f', 100)}%", flush=True)


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
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("validation accuracy (±1 standard error or, of several seeds, standard deviation)", ACCURACY), ("training reward", REWARD),
              ("token entropy (nats)", ("token_entropy",)), ("response length (tokens)", ("response_length", "eval_response_length"))]
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 9), sharex=True, layout="constrained")
    for label, folders in runs.items():
        records = [record for folder in folders for record in read_metrics(folder)]
        for axis, (title, names) in zip(axes, panels):
            steps = sorted({record["step"] for record in records if lookup(record, names) is not None})
            at_step = [[record for record in records if record["step"] == step] for step in steps]
            means = [statistics.fmean(lookup(record, names) for record in some) for some in at_step]
            places = [statistics.fmean(record[against] for record in some) for some in at_step]
            [line] = axis.plot(places, means, marker="o" if len(steps) < 30 else None, markersize=3, label=label)
            if names is ACCURACY and len(folders) == 1:
                errors = [record["eval_stderr"] for [record] in at_step]
                formats = [lookup(record, FORMAT) for [record] in at_step]
                axis.plot(places, formats, linestyle="--", color=line.get_color(), linewidth=1, label=f"{label}, format")
            else:
                errors = [statistics.stdev(lookup(record, names) for record in some) if len(some) > 1 else 0 for some in at_step]
            axis.fill_between(places, [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)], alpha=0.2)
            axis.set_title(title, fontsize=9, loc="left")
    for axis, (_, names) in zip(axes, panels):
        axis.grid(alpha=0.3)
        if names is ACCURACY or names is REWARD:
            axis.set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel(against)
    partial = f"{path}.partial.png"
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    os.replace(partial, path)


def sha256(path):
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path):
    """Removes a folder, under a name first that nobody takes for a complete one."""
    if path.exists():
        os.replace(path, removed := Path(f"{path}.removed.partial"))
        shutil.rmtree(removed)


def flush(path):
    """Returns when the disk has a file, or the list of a folder's files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(path, model, tokenizer, optimizer=None, step=None):
    """A Hugging Face folder, which from_pretrained and `vllm serve` open, plus the trainer's state and SHA256SUMS (`sha256sum -c` checks it).

    Written aside, flushed to the disk, then renamed. Raises UserError where it cannot be written; what was saved before is not touched.
    """
    def gather(tensors):
        """Sharded tensors put together one after the other, which every rank takes part in, and kept on rank 0."""
        return {name: tensor.cpu() for name, tensor in ((name, whole(tensor.detach())) for name, tensor in tensors) if rank() == 0}

    reshard(model)          # else what the last forward pass has put together stands there, in bfloat16 perhaps
    weights = gather(model.named_parameters()) if hasattr(model, "sharded_base") else None      # None: its own
    state = {i: gather(tensors.items()) for i, tensors in optimizer.state_dict()["state"].items()} if optimizer else None
    if rank() > 0:
        return
    partial = Path(f"{path}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        if optimizer:
            torch.save({"optimizer": {"state": state}, "step": step}, partial / "trainer_state.pt")
        sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir()))
        (partial / "SHA256SUMS").write_text(sums)
        for file in (*partial.iterdir(), partial):
            flush(file)
        remove(Path(path))              # there only if it is damaged, or the final model of fewer steps
        os.replace(partial, path)
        flush(partial.parent)
    except (OSError, RuntimeError, SafetensorError) as error:       # safetensors and torch.save do not raise OSError on a full disk
        free = shutil.disk_usage(partial.parent).free / 1e6
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path} cannot be written ({free:.0f} MB free on its disk): {reason(error)}; what was saved before is intact") from error


def checkpoints(folder):
    """The folder's checkpoints as (step, path), newest first."""
    found = [(re.search(r"[-_](\d+)$", path.name), path) for path in Path(folder).glob("checkpoint*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_checkpoint(folder):
    """The newest checkpoint whose files are as they were written, as (step, path), or (0, None). A damaged one is named and passed over."""
    for step, path in checkpoints(folder):
        try:
            sums = dict(line.split("  ", 1)[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
            if "trainer_state.pt" in sums and all(sha256(path / name) == checksum for name, checksum in sums.items()):
                return step, path
        except (OSError, ValueError):       # a file that is missing; a line that is not "checksum  name"
            pass
        print(f"{path} is incomplete or damaged: passed over", flush=True)
    return 0, None


def load_trainer_state(path, optimizer):
    """Gives the optimizer what a checkpoint holds of its state, to each rank its shards of it."""
    state = torch.load(path / "trainer_state.pt", map_location="cpu", weights_only=True, mmap=True)["optimizer"]["state"]
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if isinstance(parameter, DTensor) and i in state:      # no state before the first update
            state[i] = {name: distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if tensor.ndim else tensor
                        for name, tensor in state[i].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})     # settings come from the flags


def cut_back(path, step):
    """Takes the records of later steps, and half a line at the end, off a JSON-lines file whose records hold "step"."""
    if not path.exists():
        return
    partial = Path(f"{path}.partial")
    with open(path, encoding="utf-8", errors="replace") as old, open(partial, "w", encoding="utf-8") as new:
        for line in old:
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):
                break
            new.write(line)
    os.replace(partial, path)


def open_output_dir(args, step=0):
    """Makes output_dir and writes args.json. A run that is there already is left alone, or removed with --overwrite, or with --resume cut
    back to the step that it goes on from; step 0 is the start."""
    folder = Path(args.output_dir)
    names = ("args.json", "metrics.jsonl", "samples.jsonl", "curves.png", "baseline_results_summary.json", "checkpoint*", "final_model*", "wandb")
    old = [path for name in names for path in folder.glob(name)]
    resume = getattr(args, "resume", False)
    if old and not args.overwrite and not resume:
        raise UserError(f"{folder} holds a run already; go on with it by --resume, choose another --output_dir, or replace it with --overwrite")
    model = Path(args.model).resolve()
    if args.overwrite and any(model == path.resolve() for path in old):
        raise UserError(f"--overwrite would remove --model {args.model}; choose another --output_dir")
    for path in old:
        if args.overwrite or path.name.endswith(".partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_back(folder / name, step if step else -1)
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
    stop: str | None
    optimizer: torch.optim.Optimizer | None = None
    val_problems: list | None = None
    step: int = 0               # steps done, when a run is resumed
    last_step: int = 0
    next_plot: float = dataclasses.field(default_factory=lambda: time.monotonic() + 60)     # when the curves are drawn again
    signal: int = 0             # SIGINT or SIGTERM, once it has come
    skipped: int = 0            # updates in a row whose gradient was not finite
    halved: bool = False        # memory ran out before


def find_data(args):
    """Makes data/arithmetic/ where it is used and not complete. Raises UserError for any other data file that is not there."""
    data_files = [vars(args)[flag] for flag in ("train_data", "val_data", "sft_data") if flag in vars(args) and not vars(args).get("question")]
    if rank() == 0 and any(path.startswith("data/arithmetic/") and not Path(path).exists() for path in (args.model, *data_files)):
        print("data/arithmetic/ is not complete yet: making it with prepare_data.py", flush=True)
        sys.modules.setdefault("align", sys.modules[__name__])          # this file, so that prepare_data's UserError is this one's
        from prepare_data import prepare_arithmetic
        prepare_arithmetic("data/arithmetic")
    from_all_ranks(None)        # waits for rank 0
    for path in data_files:
        if not Path(path).is_file():
            known = {"data/MATH": "math", "data/GSM8K": "gsm8k"}.get(str(Path(path).parent))
            traces = " --traces SOURCE (--help lists the sources)" if Path(path).name.startswith("sft") else ""
            raise UserError(f"{path} is not there; " + (f"make it with: python prepare_data.py --dataset {known}{traces}" if known else
                                                        "it holds JSON lines, as README.md describes"))


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
    return Run(args, model, tokenizer, make_sampler(args, tokenizer), *reward_fn_and_stop(args.prompt))


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
    """A Run with its optimizer, its validation problems and its output directory."""
    # Rank 0's finding counts. A run that was stopped before its first checkpoint begins again.
    step, checkpoint = from_all_ranks(newest_checkpoint(args.output_dir) if args.resume and rank() == 0 else (0, None))[0]
    run = load_run(args, checkpoint)
    run.step, run.val_problems = step, load_val_problems(run)
    reshard(run.model)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    if checkpoint:
        load_trainer_state(checkpoint, run.optimizer)
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
    """Yields this rank's share of a train batch (of make_batch) in microbatches with their "context", the argument of get_response_log_probs.

    Each prompt goes through the model once; when the responses to it have been through, forward and backward, its own backward pass follows.
    """
    args, prompt_of = run.args, batch["prompt"].flatten().tolist()
    lengths = batch["response_mask"].sum(dim=1).tolist()

    def plan(rows):
        """[(prompts, [the rows of each microbatch of responses to them])]"""
        if args.gradient_accumulation_steps:
            n = math.ceil(args.train_batch_size / args.gradient_accumulation_steps / world_size())
            return [(sorted({prompt_of[i] for i in part}), [part]) for part in (rows[i:i + n] for i in range(0, len(rows), n))]
        return [(some, split_by_tokens([i for i in rows if prompt_of[i] in some], lengths, args.tokens_per_microbatch))
                for some in split_by_tokens(sorted({prompt_of[i] for i in rows}), [len(ids) for ids in prompts], args.tokens_per_microbatch)]

    # A rank has the responses to every N-th prompt. It makes as many passes as the busiest rank, since those fetch its weights: where it has
    # nothing left to do, with a response of which nothing counts.
    plans = [plan([i for i, p in enumerate(prompt_of) if p % world_size() == r]) for r in range(world_size())]
    for group in range(max(map(len, plans))):
        groups = [plan[group] if group < len(plan) else (prompt_of[:1], []) for plan in plans]
        some, parts = groups[rank()]
        with autocast(args):
            shared = SharedPrompts(run.model, [prompts[p] for p in some])
        for i in range(max(len(parts) for _, parts in groups)):
            part = parts[i] if i < len(parts) else [parts[0][0] if parts else 0]
            micro = take(batch, torch.tensor(part, device=args.device))
            if i >= len(parts):
                micro["response_mask"] = torch.zeros_like(micro["response_mask"])
            numbers = torch.tensor([some.index(prompt_of[row]) for row in part], device=args.device)
            yield micro | {"context": shared.context(numbers, micro["labels"].shape[1])}
        shared.backward()


def through_the_model(run, batch, prompts, temperature, train_step):
    """Sends a train batch through the model: train_step(micro, log_probs) computes the loss of a microbatch and its gradient, and returns
    (loss, metadata). Returns the sums over all microbatches and ranks of loss, entropy (nats) and clipped tokens."""
    sums = torch.zeros(3, dtype=torch.float64)
    for micro in microbatches(run, batch, prompts):
        mask = micro["response_mask"]
        with autocast(run.args):
            out = get_response_log_probs(run.model, micro["input_ids"], micro["labels"], True, temperature, mask, **micro["context"])
        loss, metadata = train_step(micro, out["log_probs"])
        clipped = metadata["clipped"] & mask if "clipped" in metadata else torch.zeros(())
        sums += torch.tensor([loss.item() / world_size(), masked_normalize(out["token_entropy"], mask, 1.0).item(), clipped.sum().item()])
    return sum(from_all_ranks(sums)).tolist()


def train_on(run, batch, prompts, temperature, train_step):
    """through_the_model. Where memory runs out it begins again, once in a run, with half the --tokens_per_microbatch."""
    try:
        return through_the_model(run, batch, prompts, temperature, train_step)
    except RuntimeError as error:
        if not out_of_memory(error) or run.halved or run.args.gradient_accumulation_steps or world_size() > 1:
            raise
    run.halved = True               # here, not in the except clause: there the exception still holds the failed attempt's tensors
    run.args.tokens_per_microbatch //= 2
    print(f"out of memory: from here on with --tokens_per_microbatch {run.args.tokens_per_microbatch}", flush=True)
    if torch.is_grad_enabled():
        run.optimizer.zero_grad()
    return through_the_model(run, batch, prompts, temperature, train_step)


def accumulation_steps(batch, mask):
    """The steps' argument gradient_accumulation_steps for a microbatch with this mask: n / b, see there. FSDP averages over the ranks."""
    return len(batch["labels"]) / len(mask) / world_size()


MAX_SKIPPED = 5             # updates in a row without a finite gradient that end a run


def optimizer_step(run, learning_rate, loss):
    """Clips the accumulated gradient and applies it, unless it or the loss is not finite. Returns its norm before clipping."""
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
    if run.skipped == MAX_SKIPPED:
        raise UserError(f"the gradient of {MAX_SKIPPED} updates in a row was not finite (last norm {grad_norm}, loss {loss}), so none of them was "
                        "applied: the weights or the log-probs have overflowed; a lower --learning_rate may help. What was saved before is intact")
    return grad_norm


def learning_rate_at(args, step, last_step):
    """The learning rate of step 1 … last_step."""
    return args.learning_rate * (1 - (step - 1) / last_step if args.lr_schedule == "linear" else 1)


def update_metrics(updates):
    """Averages the metrics of a step's updates: entropy and clipping over all their response tokens, loss and norm over the updates that were
    applied. The gap to the sampler is the first update's, before the weights moved."""
    tokens = sum(u["tokens"] for u in updates)
    applied = [u for u in updates if math.isfinite(u["grad_norm"] + u["loss"])]
    means = {name: sum(u[name] for u in applied) / len(applied) if applied else None for name in ("loss", "grad_norm")}
    return {**means, "token_entropy": sum(u["entropy_sum"] for u in updates) / tokens, "clip_fraction": sum(u["clipped"] for u in updates) / tokens,
            "skipped_updates": len(updates) - len(applied), **updates[0].get("gap", {})}


def sampling_settings(run, temperature):
    """What a sampler's generate needs to know besides prompts and seed."""
    return {"temperature": temperature, "max_tokens": run.args.sampling_max_tokens, "min_tokens": run.args.sampling_min_tokens, "stop": run.stop}


def sampling_metrics(rollouts, seconds):
    """Lengths and speed of a batch of rollouts."""
    tokens = sum(len(r.response_ids) for r in rollouts)
    return {"response_length": tokens / len(rollouts), "tokens_per_second": tokens / seconds,
            "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)}


# How far a sampler's log-probs may be from the trainer's, in nats: (mean, max). Beyond, its weights are not the trainer's. On a GPU float32 counts
# as bfloat16: vLLM's attention multiplies it in TF32 there.
GAP_LIMITS = {"float32": (1e-3, 1e-2), "bfloat16": (0.2, math.inf)}


def place_log_probs(rollouts, response_mask):
    """The rollouts' log-probs in the places of their tokens, (N, T); nan elsewhere."""
    placed = torch.full(response_mask.shape, math.nan, device=response_mask.device)
    placed[response_mask] = torch.tensor([value for r in rollouts for value in r.log_probs], device=response_mask.device)
    return placed


def logprob_gap(log_probs, sampler_log_probs, response_mask, min_tokens):
    """|log π − log π_sampler| of the response tokens, flat. The first min_tokens are left out: end-of-sequence is banned there, and vLLM's
    log-probs are those of the tokens that are left."""
    counted = response_mask & (response_mask.cumsum(dim=1) > min_tokens)
    return (log_probs - sampler_log_probs)[counted].abs()


def check_gap(args, gaps):
    """The metrics of a flat tensor of gaps. Raises UserError where they are too large: the most expensive silent bug of this field is a
    sampler with stale weights."""
    mean, largest = (gaps.mean().item(), gaps.max().item()) if len(gaps) else (0.0, 0.0)
    limits = GAP_LIMITS["bfloat16" if args.device == "cuda" else args.dtype]
    if not (mean <= limits[0] and largest <= limits[1]):        # nan, too
        raise UserError(f"the sampler's log-probs differ from the trainer's by {mean:.2g} nats on average and {largest:.2g} at most (limits for "
                        f"{args.dtype}: {limits[0]:g} and {limits[1]:g}): it samples with stale or wrong weights. The step was not applied; "
                        "checkpoints saved before it are intact")
    return {"logprob_gap_mean": mean, "logprob_gap_max": largest}


def check_sampler(run, rollouts, temperature):
    """check_gap on a few rollouts, for the loops that do not compute the sampled tokens' log-probs anyway."""
    rollouts = rollouts[:16]
    batch = batch_token_ids([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], 0)
    ids, labels, mask = (tensor.to(run.args.device) for tensor in batch.values())
    with torch.no_grad(), autocast(run.args):
        log_probs = get_response_log_probs(run.model, ids, labels, temperature=temperature, response_mask=mask)["log_probs"]
    return check_gap(run.args, logprob_gap(log_probs, place_log_probs(rollouts, mask), mask, run.args.sampling_min_tokens))


def sample_for_training(run, problems, count, n, step):
    """n rollouts for each of `count` problems, drawn without replacement, from the policy as it is now. Returns them and their problems."""
    args = run.args
    drawn = random.Random(seed_for(args.seed, step, "problems")).sample(problems, count)
    run.sampler.load_weights(run.model)
    rollouts = sample(run.sampler, [p["prompt_ids"] for p in drawn], n, seed_for(args.seed, step, "rollouts"),
                      **sampling_settings(run, args.sampling_temperature))
    return rollouts, [p for p in drawn for _ in range(n)]


def evaluate_run(run, problems, n, step):
    """`evaluate` with the run's settings and the weights as they are now; the generations go to samples.jsonl."""
    args = run.args
    run.sampler.load_weights(run.model)
    metrics, rollouts, rewards = evaluate(run.sampler, problems, run.reward_fn, n, seed_for(args.seed, step, "evaluation"),
                                          **sampling_settings(run, args.eval_temperature))
    if args.eval_temperature > 0:
        check_sampler(run, rollouts, args.eval_temperature)
    log_generations(Path(args.output_dir, "samples.jsonl"), step, "evaluation", rollouts, rewards, [p for p in problems for _ in range(n)])
    return metrics


EVAL_NAMES = {      # each algorithm's names for what `evaluate` measures
    "sft": {"eval/accuracy": "accuracy", "eval/format_reward": "format_reward"},
    "ei": {"ei/eval_accuracy": "accuracy", "ei/eval_format_reward": "format_reward"},
    "grpo": {"val_reward_total": "reward", "val_reward_format": "format_reward", "val_reward_answer": "accuracy"},
}


def finish_run(run):
    """Saves the final model and says what came out."""
    folder = run.args.output_dir
    save_checkpoint(Path(folder, "final_model"), run.model, run.tokenizer)
    if rank() == 0:
        validated = [record for record in read_metrics(folder) if lookup(record, ACCURACY) is not None]
        first, last = (lookup(validated[i], ACCURACY) for i in (0, -1))
        print(f"done: accuracy {first:.3f} -> {last:.3f} on {validated[-1]['eval_problems']} unseen problems; "
              f"{folder}/final_model, curves.png, metrics.jsonl, samples.jsonl")


def finish_step(run, record, checkpoint):
    """Validates the weights as they are after the update, logs the step's dict, and saves, each as often as asked for."""
    args, step = run.args, record["step"]

    def due(frequency):
        return step == run.last_step or (frequency and step % frequency == 0)

    if step == 0 or due(args.validation_frequency):
        started = time.perf_counter()
        metrics = evaluate_run(run, run.val_problems, 1, step)
        record |= {name: metrics[key] for name, key in EVAL_NAMES[args.algo].items()}
        record |= {"eval_stderr": metrics["accuracy_stderr"], "eval_problems": metrics["problems"],
                   "eval_lenient_accuracy": metrics["lenient_accuracy"], "eval_response_length": metrics["response_length"],
                   "eval_truncated_fraction": metrics["truncated_fraction"], "time_evaluation": time.perf_counter() - started}
    log_step(args, record, run.last_step)
    if rank() == 0 and (step == run.last_step or (lookup(record, ACCURACY) is not None and time.monotonic() > run.next_plot)):
        plot_runs({args.output_dir: [args.output_dir]}, Path(args.output_dir, "curves.png"))
        run.next_plot = time.monotonic() + 60           # drawing takes half a second: not at every validation
    stopping = max(from_all_ranks(run.signal))
    if step and ((stopping and step < run.last_step) or (args.save_frequency and step % args.save_frequency == 0)):
        save_checkpoint(Path(args.output_dir, checkpoint), run.model, run.tokenizer, run.optimizer, step)
        if args.keep_checkpoints and rank() == 0:
            for _, path in checkpoints(args.output_dir)[args.keep_checkpoints:]:
                remove(path)
    if step == run.last_step:
        finish_run(run)
    if stopping:
        print(f"stopped after step {step}, as {signal.Signals(stopping).name} asked for; --resume goes on from there", flush=True)
        leave_ranks(128 + stopping)
        sys.exit(128 + stopping)


def stop_on_signals(run):
    """Ctrl-C and SIGTERM let the current step end and be saved (finish_step); a second one ends the program at once."""
    def handler(number, frame):
        if run.signal:
            os._exit(128 + number)
        run.signal = number
        if rank() == 0:
            os.write(2, b"align.py: stopping after this step; a second signal stops at once\n")     # print is not safe in a handler

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def start_logging(run, last_step):
    """Called when every input has been read and found good: opens the output directory, validates the weights before step 1 and returns
    the numbers of the steps to do, which in a resumed run are those after its checkpoint."""
    args, run.last_step = run.args, last_step
    if args.resume and Path(args.output_dir, "final_model").exists():
        done = read_metrics(args.output_dir)[-1]["step"]
        if done >= last_step:
            print(f"{args.output_dir}: this run is finished")
            return range(0)
        if run.step == 0:
            raise UserError(f"{args.output_dir} is a finished run of {done} steps without a checkpoint that --resume could go on from")
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_project needs Weights & Biases: pip install wandb")
    if rank() == 0:
        open_output_dir(args, run.step)
        if args.wandb_project:
            import wandb
            # "auto" goes on with a run that was cut off; a run before this one in the same process (--compare) is finished
            wandb.init(project=args.wandb_project, config=vars(args), dir=args.output_dir, resume="auto", reinit="finish_previous")
    stop_on_signals(run)
    if run.step == 0:
        finish_step(run, {"step": 0}, checkpoint=None)
    elif run.step >= last_step:
        finish_run(run)
    return range(run.step + 1, last_step + 1)


# ----------------------------------------------------------------------------------------------------------------------
# 11. Supervised fine-tuning
# ----------------------------------------------------------------------------------------------------------------------


def sft_update(run, examples, learning_rate):
    """One optimizer update on (prompt_ids, response_ids) pairs. Returns the update's metrics; its loss is in nats per token."""
    batch, prompts = make_batch(run, [p for p, _ in examples], [r for _, r in examples])
    tokens = int(batch["response_mask"].sum())

    def train_step(micro, log_probs):
        mask = micro["response_mask"]
        return sft_microbatch_train_step(log_probs, mask, accumulation_steps(batch, mask), normalize_constant=tokens / len(examples))

    loss, entropy_sum, _ = train_on(run, batch, prompts, 1.0, train_step)
    return {"loss": loss, "entropy_sum": entropy_sum, "clipped": 0, "tokens": tokens, "grad_norm": optimizer_step(run, learning_rate, loss)}


def train_sft(args):
    """Supervised fine-tuning on reasoning traces; an end-of-sequence after each teaches the model to stop."""
    run = start_training(args)
    traces = load_traces(args.sft_data, args.prompt, run.reward_fn)
    if args.n_sft_examples > len(traces):
        raise UserError(f"--n_sft_examples {args.n_sft_examples}: {args.sft_data} has {len(traces)}")
    if args.n_sft_examples:
        traces = random.Random(seed_for(args.seed, 0, "traces")).sample(traces, args.n_sft_examples)
    prompt_ids = run.tokenizer([t["prompt"] for t in traces])["input_ids"]
    response_ids = run.tokenizer([t["response"] for t in traces], add_special_tokens=False)["input_ids"]
    examples = [(p, r + [run.tokenizer.eos_token_id]) for p, r in zip(prompt_ids, response_ids) if len(p) + len(r) < args.max_length]
    print(f"{len(examples)} traces from {args.sft_data}; {len(traces) - len(examples)} longer than {args.max_length} tokens dropped")
    if not examples:
        raise UserError(f"{args.sft_data}: every trace is longer than --max_length {args.max_length} tokens")
    per_epoch = math.ceil(len(examples) / args.train_batch_size)

    for step in start_logging(run, args.sft_epochs * per_epoch):
        started = time.perf_counter()
        epoch, i = divmod(step - 1, per_epoch)      # a new order in each epoch, which a resumed run finds again by its seed
        shuffled = random.Random(seed_for(args.seed, epoch, "order of traces")).sample(examples, len(examples))
        learning_rate = learning_rate_at(args, step, run.last_step)
        metrics = update_metrics([sft_update(run, shuffled[i * args.train_batch_size:(i + 1) * args.train_batch_size], learning_rate)])
        seconds = time.perf_counter() - started
        metrics["train/loss"] = metrics.pop("loss")
        finish_step(run, {"step": step, "time": seconds, "time_training": seconds, "train/learning_rate": learning_rate, **metrics},
                    checkpoint=f"checkpoint-{step}")


# ----------------------------------------------------------------------------------------------------------------------
# 12. Expert iteration: sample, keep what is right, fine-tune on it, repeat
# ----------------------------------------------------------------------------------------------------------------------


def train_expert_iteration(args):
    """The handout's Algorithm 2. Fine-tuning on correct samples alone is a policy gradient with reward 0 or 1 and no baseline."""
    run = start_training(args)
    problems = load_sampling_problems(run, args.train_data, at_least=args.ei_batch_size)

    for step in start_logging(run, args.n_ei_steps):
        # 1. Sample a few responses to each of some problems, from the policy as it is now.
        started = time.perf_counter()
        rollouts, repeated = sample_for_training(run, problems, args.ei_batch_size, args.num_rollouts, step)
        sampled = time.perf_counter()
        gap = check_sampler(run, rollouts, args.sampling_temperature)

        # 2. Grade the text, keep the token ids of what is right.
        rewards, failed = grade_responses(run.reward_fn, [r.text for r in rollouts], [p["answer"] for p in repeated])
        graded = time.perf_counter()
        log_generations(Path(args.output_dir, "samples.jsonl"), step, "training", rollouts, rewards, repeated)
        correct = [(r.prompt_ids, r.response_ids) for r, reward in zip(rollouts, rewards) if reward["reward"] == 1]

        # 3. Fine-tune on it. The optimizer's state goes on from step to step.
        learning_rate = learning_rate_at(args, step, run.last_step)
        updates = []
        for epoch in range(args.sft_epochs):
            shuffled = random.Random(seed_for(args.seed, step, f"epoch {epoch}")).sample(correct, len(correct))
            for i in range(0, len(correct), args.train_batch_size):
                updates.append(sft_update(run, shuffled[i:i + args.train_batch_size], learning_rate))
        metrics = update_metrics(updates) if updates else {"loss": None}
        if not updates:
            print(f"step {step}: none of {len(rollouts)} samples is right, so there is nothing to learn from")
        trained = time.perf_counter()

        # 4. Validate, log and save.
        metrics["ei/sft_loss"] = metrics.pop("loss")
        finish_step(run, {"step": step, "time": trained - started, "time_sampling": sampled - started, "time_grading": graded - sampled,
                          "time_training": trained - graded, "ei/avg_reward": sum(r["reward"] for r in rewards) / len(rewards),
                          "train_reward_format": sum(r["format_reward"] for r in rewards) / len(rewards),
                          "ei/filtered_samples": len(correct), "grading_timeouts": failed, "learning_rate": learning_rate,
                          **sampling_metrics(rollouts, sampled - started), **gap, **metrics},
                    checkpoint=f"checkpoint_ei_step_{step}")


# ----------------------------------------------------------------------------------------------------------------------
# 13. GRPO: sample a group per question, compare within the group, policy gradient
# ----------------------------------------------------------------------------------------------------------------------


def grpo_update(run, batch, prompts, learning_rate):
    """One optimizer update on a train batch: make_batch's with "sampler_log_probs" and, off-policy, "old_log_probs", each (B, T), and
    "raw_rewards" and "advantages" (B, 1). Returns the update's metrics. Raises UserError, before the update, for a stale sampler."""
    args, gaps = run.args, []

    def train_step(micro, log_probs):
        mask = micro["response_mask"]
        old_log_probs = micro.get("old_log_probs", log_probs.detach())              # on-policy the old policy is this one
        gaps.append(logprob_gap(old_log_probs, micro["sampler_log_probs"], mask, args.sampling_min_tokens))
        if not torch.is_grad_enabled():
            return torch.zeros(()), {}
        return grpo_microbatch_train_step(
            log_probs, mask, accumulation_steps(batch, mask), args.loss_type, micro["raw_rewards"], micro["advantages"], old_log_probs,
            args.cliprange, args.sampling_max_tokens if args.length_normalization == "masked_normalize" else None,
            importance_weights(old_log_probs, micro["sampler_log_probs"], args.is_correction) if args.is_correction else None)

    # A response of weight 0 has gradient 0: it goes forward, for the metrics, but not backward.
    teaches = (batch["raw_rewards" if args.loss_type == "no_baseline" else "advantages"] != 0).flatten()
    sums = torch.zeros(3)
    for rows, backward in ((teaches.nonzero().flatten(), True), ((~teaches).nonzero().flatten(), False)):
        if len(rows):
            with torch.set_grad_enabled(backward):
                sums += torch.tensor(train_on(run, take(batch, rows), prompts, args.sampling_temperature, train_step))
    loss, entropy_sum, clipped = sums.tolist()
    gap = check_gap(args, torch.cat(from_all_ranks(torch.cat(gaps).cpu())))
    return {"loss": loss, "entropy_sum": entropy_sum, "clipped": clipped, "tokens": int(batch["response_mask"].sum()), "gap": gap,
            "grad_norm": optimizer_step(run, learning_rate, loss)}


def train_grpo(args):
    """The handout's Algorithm 3. One step: N rollouts, then one update per train batch and epoch; more than one makes it off-policy."""
    run = start_training(args)
    prompts_per_step = args.rollout_batch_size // args.group_size
    problems = load_sampling_problems(run, args.train_data, at_least=prompts_per_step)
    off_policy = args.epochs_per_rollout_batch * (args.rollout_batch_size // args.train_batch_size) > 1

    for step in start_logging(run, args.n_grpo_steps):
        # 1. Sample a group of G responses to each of some problems, from the policy as it is now: after this it is π_old.
        started = time.perf_counter()
        rollouts, repeated = sample_for_training(run, problems, prompts_per_step, args.group_size, step)
        sampled = time.perf_counter()

        # 2. Grade them and compare each with its group.
        advantages, raw_rewards, reward_metadata = compute_group_normalized_rewards(
            run.reward_fn, [r.text for r in rollouts], [p["answer"] for p in repeated], args.group_size, args.advantage_eps,
            args.use_std_normalization and args.group_size > 1)
        time_grading = time.perf_counter() - sampled
        log_generations(Path(args.output_dir, "samples.jsonl"), step, "training", rollouts, reward_metadata["rewards"], repeated)

        # 3. Put the rollouts, their advantages and the sampler's log-probs into tensors, a row for each response.
        batch, prompts = make_batch(run, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
        batch |= {"raw_rewards": raw_rewards[:, None].to(args.device), "advantages": advantages[:, None].to(args.device),        # (N, 1) each
                  "sampler_log_probs": place_log_probs(rollouts, batch["response_mask"])}
        if off_policy:          # from the second update on π is not π_old any more: the latter's log-probs are computed now, for all rollouts
            # train_on makes the forward passes; in the place of a loss `keep` writes each microbatch's log-probs into its rows. A rank fills the
            # rows of its own prompts only, and it trains on those alone.
            old_log_probs = torch.zeros(batch["labels"].shape, device=args.device)
            batch["row"] = torch.arange(len(rollouts), device=args.device)[:, None]

            def keep(micro, log_probs):
                rows, positions = micro["response_mask"].nonzero(as_tuple=True)
                old_log_probs[micro["row"].flatten()[rows], positions] = log_probs[rows, positions]
                return torch.zeros(()), {}

            with torch.no_grad():
                train_on(run, batch, prompts, args.sampling_temperature, keep)
            batch["old_log_probs"] = old_log_probs

        # 4. Update the policy: once on-policy, or once for each train batch in each epoch.
        learning_rate, updates = learning_rate_at(args, step, run.last_step), []
        for epoch in range(args.epochs_per_rollout_batch):
            order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(seed_for(args.seed, step, f"epoch {epoch}")))
            for rows in order.split(args.train_batch_size):
                updates.append(grpo_update(run, take(batch, rows), prompts, learning_rate))
        finished = time.perf_counter()

        # 5. Validate, log and save.
        finish_step(run, {"step": step, "time": finished - started, "time_sampling": sampled - started, "time_grading": time_grading,
                          "time_training": finished - sampled - time_grading, "train_reward_total": reward_metadata["reward_mean"],
                          "train_reward_format": reward_metadata["format_reward_mean"], "train_reward_answer": reward_metadata["answer_reward_mean"],
                          "advantage_std": advantages.std(correction=0).item(), "equal_reward_groups": reward_metadata["equal_reward_groups"],
                          "grading_timeouts": reward_metadata["grading_timeouts"],
                          "learning_rate": learning_rate, **sampling_metrics(rollouts, sampled - started), **update_metrics(updates)},
                    checkpoint=f"checkpoint_step_{step}")


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
                              **sampling_settings(run, args.eval_temperature)):
            print(rollout.text.strip())
        return
    problems = load_val_problems(run)
    if rank() == 0:
        open_output_dir(args)
    summary = {"model": args.model, "prompt": args.prompt, "temperature": args.eval_temperature, "seed": args.seed}
    summary |= evaluate_run(run, problems, args.eval_samples, 0)
    if rank() > 0:
        return
    Path(args.output_dir, "baseline_results_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    counts = summary["categories"]
    print(f"accuracy {summary['accuracy']:.3f} ±{summary['accuracy_stderr']:.3f} (n={summary['problems']}), right answer in any format "
          f"{summary['lenient_accuracy']:.3f}, format {summary['format_reward']:.3f}, length {summary['response_length']:.1f} tokens, "
          f"cut off {summary['truncated_fraction']:.1%}")
    print(f"format and answer right: {counts['format_and_answer']}   format only: {counts['format_only']}   neither: {counts['neither']}")
    print("   ".join(f"pass@{k} {value:.3f}" for k, value in summary["pass_at_k"].items()))
    print(f"{args.output_dir}/baseline_results_summary.json, samples.jsonl")


ALGORITHMS = {"eval": run_eval, "sft": train_sft, "ei": train_expert_iteration, "grpo": train_grpo}


def table_row(folders, target):
    """What came of some runs, as the cells of a row of compare's table: mean ± standard deviation over the runs."""
    def cell(values, form):
        values = [value for value in values if value is not None and math.isfinite(value)]
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        share = f" ({len(values)} of {len(folders)})" if len(values) < len(folders) else ""
        return f"{statistics.fmean(values):{form}}{spread}{share}" if values else "–"

    runs = [read_metrics(folder) for folder in folders]
    ends = [[record for record in run if lookup(record, ACCURACY) is not None][-1] for run in runs]
    reached = [next((i for i, record in enumerate(run) if (lookup(record, ACCURACY) or 0) >= target), None) for run in runs]
    return [cell([100 * lookup(end, ACCURACY) for end in ends], ".1f"), cell([100 * lookup(end, FORMAT) for end in ends], ".1f"),
            *(cell([None if i is None else run[i][key] for i, run in zip(reached, runs)], ".0f") for key in ("step", "seconds")),
            cell([end["seconds"] for end in ends], ".0f"), cell([end["sampled_tokens"] / 1e3 for end in ends], ".0f"),
            cell([run[-1].get("token_entropy") for run in runs], ".3f"), cell([end["eval_response_length"] for end in ends], ".1f"),
            cell([statistics.fmean([r["grad_norm"] for r in run if r.get("grad_norm") is not None] or [math.nan]) for run in runs], ".2f")]


def compare(args, argv):
    """Runs every variant of --compare with every seed, as main would, and rank 0 writes compare.png and compare.md."""
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--compare", "--seeds", "--target", "--output_dir"):
        others.add_argument(flag)
    rest, folder = others.parse_known_args(argv)[1], Path(args.output_dir or "compare_output")
    flag, equals, values = args.compare.partition("=")
    if not equals or not values:
        raise UserError(f"--compare {args.compare} should be FLAG=A,B,…")
    variants = {}
    for value in values.split(","):             # all of them, before the first one runs
        for seed in range(args.seeds):
            output_dir = folder / f"{flag}={value}".replace("/", "_") / f"seed{seed}"
            with contextlib.redirect_stdout(None):
                run = parse_args([*rest, f"--{flag}={value}", "--seed", str(seed), "--output_dir", str(output_dir)])
            if run.algo == "eval" or run.overwrite:
                raise UserError("--compare compares training runs, --algo sft, ei or grpo, and goes on with those that are there: no --overwrite")
            run.resume = True
            for key, before in read_settings(run).items():
                if key != "output_dir" and vars(run).get(key) != before:
                    raise UserError(f"{output_dir} holds a run with --{key} {before}, not {vars(run).get(key)}; choose another --output_dir")
            variants.setdefault(f"{flag}={value}", []).append(run)
    for runs in variants.values():
        for run in runs:
            print(f"--- {run.output_dir}", flush=True)
            with one_sentence("align.py"):          # which gives the signals their handlers back
                ALGORITHMS[run.algo](run)
    if rank() > 0:
        return
    folders = {label: [run.output_dir for run in runs] for label, runs in variants.items()}
    plot_runs(folders, folder / "compare.png", against="seconds" if flag == "algo" else "step")       # a step of theirs is not one thing
    header = ["", "accuracy %", "in the format %", f"steps to {args.target:.0%}", f"seconds to {args.target:.0%}", "seconds",
              "sampled tokens, thousands", "entropy at the end", "length at the end", "gradient norm"]
    rows = [header, ["---"] * len(header), *([label, *table_row(runs, args.target)] for label, runs in folders.items())]
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
