"""Makes what align.py reads: problems, reasoning traces for SFT, and (for the embedded setting) the tiny base model.

    python prepare_data.py                                    # data/arithmetic/: problems, traces, the tiny base model; a minute on two cores
    python prepare_data.py --dataset math                     # data/MATH/{train,test}.jsonl from the Hugging Face hub
    python prepare_data.py --dataset math --from_path MATH    # the same from a copy that you have
    python prepare_data.py --dataset gsm8k --traces solutions # data/GSM8K/, with the set's own solutions as traces for SFT

What is there already is left alone; files appear whole or not at all, and manifest.json says where each came from, with its checksum.
So a killed run is started again with the same command, and what a teacher model was paid for is not paid for twice.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from align import (PROMPTS, UserError, extract_answer, grade_responses, last_boxed, one_sentence, r1_zero_reward_fn,
                   read_jsonl, reason, sha256, use_hub_or_cache)

# ----------------------------------------------------------------------------------------------------------------------
# 1. Files
# ----------------------------------------------------------------------------------------------------------------------


def write_text(path, text):
    """Writes aside and renames, so that the file is never seen half-written. Raises UserError where it cannot; the old file stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); what was there before is intact") from error


def write_jsonl(path, records, source):
    """Writes the records, and their number, source and checksum to the manifest.json beside them."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_text(path, text)
    manifest = read_manifest(path.parent)
    manifest[path.name] = {"records": len(records), "source": source, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_text(path.parent / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    print(f"{path}: {len(records)} records")


def read_manifest(folder):
    """{file name: {"records", "source", "sha256"}} of a folder; empty where there is none."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_there(path, source):
    """Is the file there already, from this source? Says so. Raises UserError where it is there from another one."""
    if not path.exists():
        return False
    entry = read_manifest(path.parent).get(path.name, {"source": source})
    if entry["source"] != source:
        raise UserError(f"{path} is there already, from {entry['source']}; --force replaces it")
    changed = "sha256" in entry and sha256(path) != entry["sha256"]
    print(f"{path} is there already{', changed since it was made' if changed else ''}; --force makes it again")
    return True


def spare_others(folder, names):
    """Raises UserError where one of these files is there and was not made by this program."""
    for name in names:
        if (folder / name).exists() and name not in read_manifest(folder):
            raise UserError(f"{folder / name} is there already and was not made by prepare_data.py; --force replaces it")


# ----------------------------------------------------------------------------------------------------------------------
# 2. The embedded setting: problems and traces
# ----------------------------------------------------------------------------------------------------------------------

N_OPERATIONS = 4
N_TRAIN, N_TEST, N_SFT = 8192, 1024, 64    # problems for RL, unseen problems for evaluation, clean traces for SFT


def make_problem(rng):
    """(question, steps, answer), e.g. ("What is 7+5-3+6?", ["7+5=12", "12-3=9", "9+6=15"], 15). No running total is negative."""
    total = rng.randint(1, 9)
    expression, steps = str(total), []
    for _ in range(N_OPERATIONS):
        operand = rng.randint(1, 9)
        operator = rng.choice("+-") if total >= operand else "+"
        result = total + operand if operator == "+" else total - operand
        steps.append(f"{total}{operator}{operand}={result}")
        expression, total = f"{expression}{operator}{operand}", result
    return f"What is {expression}?", steps, total


def make_trace(steps, answer):
    """A clean response in the r1_zero format. It continues the prompt, which ends in <think>."""
    return f" {', '.join(steps)} </think> <answer> {answer} </answer>"


# ----------------------------------------------------------------------------------------------------------------------
# 3. The corpus of its base model: right format or not, steps or a guess, slips
# ----------------------------------------------------------------------------------------------------------------------

# The tiny base model is meant to behave like a real one before alignment. It has read a lot of arithmetic by authors of mixed habits:
# some answer in the <think>/<answer> format and some do not, some write down every step and some blurt out a guess, and now and then a
# step is wrong. So at temperature 1 it follows the format about half of the time and is right about a quarter of the time, and the skill
# that alignment has to bring out (write the steps, make no slips, answer in the format) is in there already.
P_CHAT, P_TAGS, P_STEPS, P_SLIP = 0.7, 0.5, 0.65, 0.07


def make_document(rng, test_questions):
    """(prompt, continuation) as some author on the internet would have written it; never a test question."""
    question, steps, answer = make_problem(rng)
    while question in test_questions:
        question, steps, answer = make_problem(rng)
    if rng.random() < P_STEPS:              # this author writes down the steps, and carries a slip on to the end
        total, written = int(steps[0][0]), []
        for step in steps:
            operand = int(step.split("=")[0][-1])
            operator = "+" if "+" in step else "-"
            result = total + operand if operator == "+" else total - operand
            if rng.random() < P_SLIP:
                result = max(0, result + rng.choice([-2, -1, 1, 2]))
            written.append(f"{total}{operator}{operand}={result}")
            total = result
        reasoning = ", ".join(written)
    else:                                   # this one guesses
        total = max(0, answer + rng.randint(-4, 4))
        reasoning = f"I guess {total}"
    if rng.random() < P_CHAT:               # half of the chats end in the answer format, half in plain words
        tagged = f" {reasoning} </think> <answer> {total} </answer>"
        return PROMPTS["tiny"].format(question=question), tagged if rng.random() < P_TAGS else f" {reasoning}. So it is {total}."
    boxed = rf" {reasoning}. So it is \boxed{{{total}}}."
    return PROMPTS["question_only"].format(question=question), boxed if rng.random() < P_TAGS else f" {reasoning}. So it is {total}."


# ----------------------------------------------------------------------------------------------------------------------
# 4. Its tokenizer and base model
# ----------------------------------------------------------------------------------------------------------------------


def train_tokenizer(documents, vocab_size=320):
    """A byte-level BPE tokenizer in which every digit is a token of its own, as in Qwen2.5's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def pretrain(tokenizer, rng, test_questions, steps=500, batch_size=32, learning_rate=8e-3, seed=0):
    """Next-token prediction over whole documents, learning rate annealed to zero. Returns the model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    # Muon for the matrices reaches AdamW's loss in half the steps; the rest (embedding, norms) is AdamW's, at the same scale of step.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    bar = tqdm(range(steps), desc="pretraining the tiny base model", unit="step", mininterval=1.0)
    for step in bar:
        texts = ["".join(make_document(rng, test_questions)) + tokenizer.eos_token for _ in range(batch_size)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = model(batch["input_ids"]).logits               # (B, T, V); right padding needs no attention mask
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 30) * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f} nats")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# 5. Its files
# ----------------------------------------------------------------------------------------------------------------------


def prepare_arithmetic(folder, seed=0, force=False):
    """Writes train.jsonl, test.jsonl, sft.jsonl and base_model/ into `folder`; what is there already stays unless `force`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    problems = {}
    while len(problems) < N_TRAIN + N_TEST:     # keyed by question, so that train and test share none
        question, steps, answer = make_problem(rng)
        problems[question] = (steps, answer)
    items = list(problems.items())
    train, test = items[:N_TRAIN], items[N_TRAIN:]
    files = {
        "train.jsonl": [{"problem": question, "answer": str(answer)} for question, (_, answer) in train],
        "test.jsonl": [{"problem": question, "answer": str(answer)} for question, (_, answer) in test],
        "sft.jsonl": [{"problem": question, "response": make_trace(steps, answer), "answer": str(answer)}
                      for question, (steps, answer) in train[:N_SFT]],
    }
    for name, records in files.items():
        if force or not is_there(folder / name, f"seed {seed}"):
            write_jsonl(folder / name, records, f"seed {seed}")
    if force or not (folder / "base_model").exists():
        test_questions = {question for question, _ in test}
        tokenizer = train_tokenizer("".join(make_document(rng, test_questions)) for _ in range(2000))
        model = pretrain(tokenizer, rng, test_questions, seed=seed)
        partial = folder / "base_model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        transformers_logging.disable_progress_bar()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder / "base_model", ignore_errors=True)
        os.replace(partial, folder / "base_model")
        print(f"{folder / 'base_model'}: {model.num_parameters() / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}")


# ----------------------------------------------------------------------------------------------------------------------
# 6. MATH and GSM8K: problems with their final answers
# ----------------------------------------------------------------------------------------------------------------------

DATASETS = {    # folder, repository on the hub, its configurations
    "math": ("data/MATH", "EleutherAI/hendrycks_math", ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                                                        "prealgebra", "precalculus")),
    "gsm8k": ("data/GSM8K", "openai/gsm8k", ("main",)),
}
EXPECTED = {"math": {"train": 7500, "test": 5000}, "gsm8k": {"train": 7473, "test": 1319}}     # problems in the full sets


class LeftOut(collections.defaultdict):
    """{reason: what was left out for it}."""

    def __init__(self):
        super().__init__(list)

    def report(self, path):
        """Prints the counts with an example each, and lists everything in a file."""
        for why, items in self.items():
            print(f"  {len(items)} × {why}, for example: {' '.join(str(items[0]).split())[:120]}")
        write_text(path, "".join(json.dumps({"reason": why, "what": str(item)}) + "\n" for why, items in self.items() for item in items))


def final_answer(record):
    r"""The final answer that a record states, or that its solution ends with as `\boxed{…}` or `#### …`; None without one."""
    solution = str(record.get("solution") or record.get("answer") or "")
    if "####" in solution:
        return solution.rpartition("####")[2].strip().replace(",", "") or None
    if isinstance(record.get("answer"), (str, int, float)) and str(record["answer"]).strip():
        return str(record["answer"]).strip()
    return last_boxed(re.sub(r"\\(?:fbox|boxed)\s*(?:\{|(\w))", lambda match: r"\boxed{" + (f"{match[1]}}}" if match[1] else ""), solution)) or None


def to_problem(record):
    """{"problem", "answer"} and, where known, "solution", "level" and "subject", of a record in MATH's or GSM8K's layout. Raises ValueError."""
    text, answer = record.get("problem") or record.get("question"), final_answer(record)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no problem text")
    if answer is None:
        raise ValueError("no final answer")
    solution = record.get("solution") or (record["answer"] if "####" in str(record["answer"]) else None)
    optional = {"solution": solution and re.sub(r"<<.*?>>", "", solution).partition("####")[0].strip(), "level": record.get("level"),
                "subject": record.get("subject") or record.get("type")}
    return {"problem": text.strip(), "answer": answer} | {key: value for key, value in optional.items() if value}


def read_records(path, left_out):
    """The dicts of a .json, .jsonl, .parquet or .arrow file; what cannot be read is left out by file and line."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".arrow":
            import pyarrow
            return pyarrow.ipc.open_stream(path).read_all().to_pylist()
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        left_out["unreadable file"].append(f"{path}: {reason(error)}")
        return []
    try:
        records = json.loads(text)
        return records if isinstance(records, list) else [records]
    except ValueError:
        pass                # not one document: a document a line
    records = []
    for i, line in enumerate(text.split("\n"), start=1):       # as align.read_jsonl
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            left_out["not valid JSON"].append(f"{path}, line {i}: {error}")
    return records


def local_records(paths, left_out):
    """{"train": records, "test": records} of files, or of folders of files, whose names or folders say train or test."""
    splits = {"train": [], "test": []}
    for path in map(Path, paths):
        for suffix in (".parquet", ".arrow", ".jsonl", ".json"):        # a clone of a hub repository, save_to_disk, JSON lines, the MATH.tar tree
            files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
            named = [(file, re.findall(r"(?:^|[/_.-])(train|test)(?=[/_.-])", file.relative_to(path.parent).as_posix())) for file in files]
            named = [(file, splits_named[-1]) for file, splits_named in named if splits_named]
            if named:
                break
        else:
            raise UserError(f"--from_path {path}: no .json, .jsonl, .parquet or .arrow file whose name or folder says train or test")
        for file, split in tqdm(named, desc=f"reading {path}", unit="file", mininterval=1.0):
            splits[split] += [(record, file) for record in read_records(file, left_out)]
    for split, records in splits.items():
        if not records:
            raise UserError(f"--from_path {' '.join(paths)}: no {split} problems; give a folder with train and test in it, or two files")
    return splits


def hub_rows(dataset, *config, split):
    """The rows of a data set of the Hugging Face hub (or a local copy of one). Raises UserError where it cannot be had."""
    use_hub_or_cache()
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    try:
        return load_dataset(dataset, *config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(f"{dataset} cannot be had from the Hugging Face hub ({reason(error)}). Three ways out: connect this machine and run the "
                        "command again, it goes on where it stopped; name a mirror, HF_ENDPOINT=https://…; or give a copy that you have to "
                        "--from_path (--traces FILE for traces)") from error


def text_key(text):
    """A problem's text without what differs between copies of it: case, spaces, dollar signs, layout commands."""
    return re.sub(r"\\(left|right|displaystyle|[,;:! ])|(?<=\\)[dt](?=frac)|[\s${}~]", "", text.casefold()).rstrip(".?:")


def prepare_problems(dataset, folder, from_path=None, force=False):
    """Writes train.jsonl and test.jsonl of MATH or GSM8K; no problem of the first is in the second."""
    _, repository, configs = DATASETS[dataset]
    source = " ".join(from_path) if from_path else f"hub:{repository}"
    train_path, test_path = folder / "train.jsonl", folder / "test.jsonl"
    for path in from_path or ():
        if not Path(path).exists():
            raise UserError(f"--from_path {path} is not there")
    if not force:
        if all([is_there(path, source) for path in (train_path, test_path)]):
            return
        spare_others(folder, ("train.jsonl", "test.jsonl"))
    left_out = LeftOut()
    if from_path:
        splits = local_records(from_path, left_out)
    else:
        splits = {split: [(row, f"{repository} {config}") for config in configs for row in hub_rows(repository, config, split=split)]
                  for split in ("test", "train")}
    problems = {}
    for split, records in splits.items():
        problems[split] = []
        for record, origin in records:
            try:
                problems[split].append(to_problem(record))
            except (ValueError, AttributeError, TypeError) as error:    # the latter two: not a dict, or not of strings
                left_out[f"{split}: {error if type(error) is ValueError else 'not a record of strings'}"].append(f"{origin}: {record}")
        if len(records) != EXPECTED[dataset][split]:
            print(f"{split}: {len(records)} records, where the full set has {EXPECTED[dataset][split]}")
    # Test problems all stay, as everybody's accuracy is over all of them. A training problem goes if it is a test problem or there already.
    seen, train = {text_key(problem["problem"]): "a test problem, too" for problem in problems["test"]}, []
    for problem in problems["train"]:
        key = text_key(problem["problem"])
        if key in seen:
            left_out[f"train: {seen[key]}"].append(problem["problem"])
        else:
            train.append(problem)
        seen.setdefault(key, "twice in the training set")
    if not train or not problems["test"]:
        left_out.report(folder / "left_out.jsonl")
        raise UserError(f"{source}: no usable problems; {folder / 'left_out.jsonl'} says why")
    write_jsonl(test_path, problems["test"], source)        # the test set first: training problems are never there without it
    write_jsonl(train_path, train, source)
    left_out.report(folder / "left_out.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Traces: what a stronger model (or the data set itself) thought and answered
# ----------------------------------------------------------------------------------------------------------------------

P_VALIDATION = 0.05     # share of the problems whose traces go to sft_val.jsonl


def to_response(text):
    r"""A response that continues the r1_zero prompt, of what a model wrote. Raises ValueError saying what the text lacks.

    >>> to_response("<think>\n2 and 2.\n</think>\n\nIt is \\boxed{4}.")
    ' 2 and 2. </think> <answer> 4 </answer>'
    """
    thoughts, end, after = text.strip().removeprefix("<think>").rpartition("</think>")
    if not end:
        raise ValueError("no </think>")
    if not thoughts.strip():
        raise ValueError("no reasoning")
    tagged = re.search(r"<answer>(.*)</answer>", after, re.DOTALL)
    answer = last_boxed(after) or (tagged and tagged[1].strip())
    if not answer:
        raise ValueError("no final answer after </think>")
    response = f" {thoughts.strip()} </think> <answer> {answer.strip()} </answer>"
    if extract_answer(response) is None:
        raise ValueError("a tag of the format inside the reasoning or the answer")
    return response


def record_texts(record):
    """(problem, [what a model wrote, …]) of a record: {"problem", "generations"} as OpenR1-Math-220k, {"problem", "response"}, or CS336's
    {"prompt", "response"}. Raises ValueError."""
    problem = record.get("problem") or record.get("question")
    if problem is None and "User: " in record.get("prompt", ""):
        problem = record["prompt"].rpartition("User: ")[2].rpartition("\nAssistant:")[0]
    texts = record.get("generations") or [record.get("response") or record.get("generation")]
    if not isinstance(problem, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("no problem, or no text under generations or response")
    return problem, texts


TEACHER_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."       # as DeepSeek recommends


async def ask_teacher(problems, path, args):
    """Asks an OpenAI-compatible server for --teacher_samples answers to each problem and appends each to `path` as it comes.

    What the file holds already is not asked for again. Rate limits, failing servers and connections that do not come about are tried again with
    growing pauses (openai's client does that); what still fails, or breaks off, is counted and left for another run. Raises UserError where
    the server is gone.
    """
    import openai
    key = os.environ.get("DEEPSEEK_API_KEY" if "deepseek.com" in args.teacher_url else "OPENAI_API_KEY")
    client = openai.AsyncOpenAI(base_url=args.teacher_url, api_key=key or "none", max_retries=6, timeout=args.teacher_timeout)
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):       # a kill can leave half a line
        write_text(path, data[:data.rfind(b"\n") + 1].decode())
    paid = read_jsonl(path, [("problem", "model")]) if path.exists() and path.stat().st_size else []
    asked = {(r["problem"], r["sample"]) for r in paid if r["model"] == args.teacher_model}
    wanted = [(p["problem"], k) for p in problems for k in range(args.teacher_samples)]
    todo = [item for item in wanted if item not in asked]
    print(f"{args.teacher_model}: {len(wanted) - len(todo)} answers are there, {len(todo)} to ask for")
    slots, failures, refused, lost = asyncio.Semaphore(args.teacher_concurrency), 0, [], []

    async def ask(problem, sample):
        async with slots:
            stream = await client.chat.completions.create(
                model=args.teacher_model, messages=[{"role": "user", "content": TEACHER_PROMPT.format(problem=problem)}],
                temperature=args.teacher_temperature, max_tokens=args.teacher_max_tokens, stream=True)
            thoughts, content, finish_reason = "", "", None
            async for chunk in stream:      # streamed, so that a server that hangs is told from one that thinks
                for choice in chunk.choices:
                    # Servers differ in where the reasoning is: in a field of its own, by either of two names, or in the text.
                    thoughts += getattr(choice.delta, "reasoning_content", None) or getattr(choice.delta, "reasoning", None) or ""
                    content += choice.delta.content or ""
                    finish_reason = choice.finish_reason or finish_reason
        if finish_reason is None:
            raise openai.OpenAIError("the answer broke off")
        return {"problem": problem, "sample": sample, "model": args.teacher_model, "finish_reason": finish_reason,
                "response": f"<think>{thoughts}</think>{content}" if thoughts else content}

    tasks = [asyncio.ensure_future(ask(*item)) for item in todo]
    try:
        with open(path, "a", encoding="utf-8") as file, tqdm(total=len(todo), desc="asking the teacher", unit="answer", mininterval=1.0) as bar:
            for task in asyncio.as_completed(tasks):
                try:
                    file.write(json.dumps(await task) + "\n")
                    file.flush()
                    failures = 0
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:      # this request; others may do
                    refused.append(reason(error))
                except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:    # the latter three: not a completion
                    failures += 1           # in a row
                    lost.append(reason(error))
                    if failures >= 3 or isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)):
                        raise UserError(f"the teacher at {args.teacher_url} fails ({type(error).__name__}: {reason(error)}); the answers so far are "
                                        f"in {path}, and the same command goes on from there") from error
                bar.update()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
    if refused:
        print(f"  {len(refused)} × refused by the teacher, for example: {refused[0]}")
    if lost:
        print(f"  {len(lost)} × no answer, for example: {lost[0]}; the same command with --force asks for them again")


def collect_texts(args, folder, train, left_out):
    """(problem text, what somebody wrote) pairs from --traces."""
    kind, _, name = args.traces.partition(":")
    if args.traces == "solutions":
        for problem in train:
            if "solution" in problem:
                yield problem["problem"], f"{problem['solution']}</think><answer>{problem['answer']}</answer>"
            else:
                left_out["no solution in the data set"].append(problem["problem"])
        return
    if kind == "hub" and name:
        records = tqdm(hub_rows(name, split="train"), desc=f"reading {name}", unit="record", mininterval=1.0)
    elif args.traces == "teacher":
        path, problems = folder / "teacher.jsonl", list(train)
        random.Random(args.seed).shuffle(problems)
        asyncio.run(ask_teacher(problems[:args.teacher_problems or None], path, args))
        records = [r for r in read_records(path, left_out) if r["model"] == args.teacher_model]
    elif Path(args.traces).is_file():
        records = read_records(Path(args.traces), left_out)
    else:
        raise UserError(f"--traces {args.traces} is neither hub:DATASET, teacher, solutions nor a file")
    for record in records:
        try:
            problem, texts = record_texts(record)
            yield from ((problem, text) for text in texts)
        except (ValueError, AttributeError, TypeError):
            left_out["not a trace"].append(record)


def prepare_traces(args, folder):
    """Writes sft.jsonl, its split by problem into sft_train.jsonl and sft_val.jsonl, and of the former those whose answer is right."""
    problems_sum = "-".join(sha256(folder / name)[:8] for name in ("train.jsonl", "test.jsonl"))
    source = f"{f'teacher:{args.teacher_model}' if args.traces == 'teacher' else args.traces}, for the problems {problems_sum}"
    if not args.force:
        if is_there(folder / "sft_train_filtered.jsonl", source):
            return
        spare_others(folder, ("sft.jsonl", "sft_train.jsonl", "sft_val.jsonl"))
    train, test = ({text_key(p["problem"]): p for p in read_jsonl(folder / name, [("problem", "answer")])} for name in ("train.jsonl", "test.jsonl"))
    left_out, traces, strangers = LeftOut(), [], 0
    for problem, text in collect_texts(args, folder, train.values(), left_out):
        key = text_key(problem)
        if key in test:
            left_out["a test problem"].append(problem)
        elif key not in train:
            strangers += 1
        else:
            try:
                traces.append({"problem": train[key]["problem"], "response": to_response(text), "answer": train[key]["answer"]})
            except ValueError as error:
                left_out[str(error)].append(f"{problem} → {text[-200:]}")
    print(f"{len(traces)} traces of {len({t['problem'] for t in traces})} problems; {strangers} traces of other problems than {folder / 'train.jsonl'}'s")
    left_out.report(folder / "sft_left_out.jsonl")
    if not traces:
        raise UserError(f"--traces {args.traces}: no usable trace of a training problem; {folder / 'sft_left_out.jsonl'} says why")
    problems = sorted({trace["problem"] for trace in traces})
    random.Random(args.seed).shuffle(problems)
    validation = set(problems[:round(P_VALIDATION * len(problems))])
    random.Random(args.seed).shuffle(traces)
    sft_train = [trace for trace in traces if trace["problem"] not in validation]
    rewards, _ = grade_responses(r1_zero_reward_fn, [t["response"] for t in sft_train], [t["answer"] for t in sft_train])
    write_jsonl(folder / "sft.jsonl", traces, source)
    write_jsonl(folder / "sft_train.jsonl", sft_train, source)
    write_jsonl(folder / "sft_val.jsonl", [trace for trace in traces if trace["problem"] in validation], source)
    write_jsonl(folder / "sft_train_filtered.jsonl", [t for t, reward in zip(sft_train, rewards) if reward["reward"] == 1], source)


# ----------------------------------------------------------------------------------------------------------------------
# 8. main
# ----------------------------------------------------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", choices=("arithmetic", *DATASETS), default="arithmetic", help="arithmetic: the embedded setting")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--force", action="store_true", help="make again what is there already (never the answers of a teacher)")
    g = parser.add_argument_group("MATH and GSM8K")
    g.add_argument("--from_path", nargs="+", metavar="PATH", help="a copy of the data set instead of the hub: the unpacked MATH.tar, a folder or two "
                   "files of JSON lines, JSON or parquet; file or folder names say train or test")
    g.add_argument("--traces", metavar="SOURCE", help="also make traces for SFT from: hub:DATASET (R1 traces laid out as open-r1/OpenR1-Math-220k), "
                   "teacher (a model behind an OpenAI-compatible server), solutions (the data set's own), or a file of JSON lines")
    g = parser.add_argument_group("--traces teacher (the key is DEEPSEEK_API_KEY for deepseek.com, OPENAI_API_KEY for all others)")
    g.add_argument("--teacher_url", default="https://api.deepseek.com", help="of the server; http://localhost:8000/v1 for `vllm serve`")
    g.add_argument("--teacher_model", default="deepseek-reasoner", help="its name on that server")
    g.add_argument("--teacher_problems", type=int, default=0, help="ask about so many problems, drawn at random; 0: all")
    g.add_argument("--teacher_samples", type=int, default=1, help="answers per problem")
    g.add_argument("--teacher_max_tokens", type=int, default=16384, help="tokens of an answer, reasoning included")
    g.add_argument("--teacher_temperature", type=float, default=0.6, help="0.6 is what R1 was made for")
    g.add_argument("--teacher_timeout", type=float, default=120.0, help="seconds without a sign of life after which a request has failed")
    g.add_argument("--teacher_concurrency", type=int, default=16, help="requests at a time")
    return parser


def main(argv=None):
    """Runs the command line. A user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_sentence("prepare_data.py"):
        for flag, value in vars(args).items():
            if flag.startswith("teacher_") and args.traces != "teacher" and value != parser.get_default(flag):
                raise UserError(f"--{flag} is for --traces teacher")
        if args.dataset == "arithmetic":
            if args.from_path or args.traces:
                raise UserError("--from_path and --traces are for --dataset math and gsm8k")
            return prepare_arithmetic("data/arithmetic", seed=args.seed, force=args.force)
        folder = Path(DATASETS[args.dataset][0])
        folder.mkdir(parents=True, exist_ok=True)
        # New problems only where they are asked for: `--traces …` alone goes with the problems that are there, wherever they are from.
        if args.from_path or not args.traces or not all((folder / name).exists() for name in ("train.jsonl", "test.jsonl")):
            prepare_problems(args.dataset, folder, args.from_path, args.force)
        if args.traces:
            prepare_traces(args, folder)


if __name__ == "__main__":
    main()


# What to expect (data/…/manifest.json has the numbers of your files):
#   MATH     7,500 training and 5,000 test problems on the hub; a handful of training problems are left out, being duplicates of each other
#            or of test problems. The 7,473 of one copy in circulation: 7,463 (4 without an answer, 3 test problems, 3 duplicates).
#   GSM8K    7,473 training and 1,319 test problems, none left out; --traces solutions: 7,473 traces, 7,099 of them in sft_train.jsonl.
