"""Makes what align.py reads: problems, reasoning traces for SFT, and (for the tiny preset) the base model.

    python prepare_data.py                                      # data/arithmetic/, with the base model; a minute
    python prepare_data.py --dataset math                       # data/MATH/ from the Hugging Face hub
    python prepare_data.py --dataset math --from_path MATH      # the same from a copy that you have
    python prepare_data.py --dataset gsm8k --traces solutions   # data/GSM8K/, its own solutions as traces (or mawps)

What is there already is left alone; files appear whole or not at all, and manifest.json says where each came from,
with its checksum. So a killed run is started again with the same command, and no answer of a teacher is paid twice.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from align import (PROMPTS, UserError, check, exit_cleanly, extract_answer, grade_responses, last_boxed,
                   r1_zero_reward_fn, read_jsonl, short_message)

# ------------------------ 1. Files ------------------------

def read_manifest(folder):
    """{file name: {"records", "source", "sha256"}} of a folder; empty where there is none."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

def write_jsonl(folder, files, source):
    """Writes {file name: records}, whole or not at all, and their number, source and checksum to manifest.json."""
    texts, manifest = {"manifest.json": ""}, read_manifest(folder)
    for name, records in files.items():
        texts[name] = "".join(json.dumps(record) + "\n" for record in records)
        sha256 = hashlib.sha256(texts[name].encode()).hexdigest()
        manifest[name] = {"records": len(records), "source": source, "sha256": sha256}
    texts["manifest.json"] = json.dumps(manifest, indent=2) + "\n"
    try:
        for name, text in texts.items():
            (folder / f"{name}.partial").write_text(text, encoding="utf-8")
        for name in texts:
            os.replace(folder / f"{name}.partial", folder / name)
    except OSError as error:
        for other in texts:
            (folder / f"{other}.partial").unlink(missing_ok=True)
        raise UserError(f"{folder / name} cannot be written ({error.strerror}); what was there is intact") from error
    for name, records in files.items():
        print(f"{folder / name}: {len(records)} records")

def files_to_make(folder, names, source, force):
    """The files that are not there, or with `force` all. Raises UserError where one is from another source."""
    if force:
        return names
    there = [name for name in names if (folder / name).exists()]
    for name in there:
        entry = read_manifest(folder).get(name)
        if entry and entry["source"] != source:
            raise UserError(f"{folder / name} is there already, from {entry['source']}; --force replaces it")
        if not entry and len(there) < len(names):       # a whole set of somebody's own is taken as it is
            raise UserError(f"{folder / name} is there already, not made by prepare_data.py; --force replaces it")
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        since = ", changed since" if entry and entry["sha256"] != sha256 else ""
        print(f"{folder / name} is there already{since}; --force makes it again")
    return [name for name in names if name not in there]

def report(left_out):
    """Prints how much was left out by {reason: items}, with examples. Returns all of it as records."""
    for reason, items in left_out.items():
        print(f"  {len(items)} × {reason}, for example: {' '.join(str(items[0]).split())[:120]}")
    return [{"reason": reason, "what": str(item)} for reason, items in left_out.items() for item in items]

# ------------------- 2. The tiny preset -------------------

RESPONSE = " {} </think> <answer> {} </answer>"     # in the r1_zero format; it continues the prompt's <think>
N_OPERATIONS = 4
N_TRAIN, N_TEST, N_SFT = 8192, 1024, 64     # problems for RL, unseen problems for evaluation, clean traces for SFT

# The tiny base model behaves like a real one before alignment. It has read arithmetic by authors of mixed habits, so
# at temperature 1 it follows the format half of the time and is right a quarter of the time. What alignment has to
# bring out (write the steps, make no slips, answer in the format) is in there already.
P_CHAT, P_FORMAT = 0.7, 0.5     # the tiny prompt, not question_only's; the prompt's answer format, not plain words
P_STEPS, P_SLIP = 0.65, 0.07    # written steps, not a guess; a step is wrong

def make_problem(rng):
    """(question, terms), e.g. ("What is 7+5-3+6?", [7, 5, -3, 6]). No running total is negative."""
    terms = [rng.randint(1, 9)]
    for _ in range(N_OPERATIONS):
        operand = rng.randint(1, 9)
        operator = rng.choice("+-") if sum(terms) >= operand else "+"
        terms.append(operand if operator == "+" else -operand)
    rest = "".join(f"{term:+d}" for term in terms[1:])
    return f"What is {terms[0]}{rest}?", terms

def work_out(terms, slips=None):
    """The steps to the answer, and the answer. `slips`, a random generator, makes a step wrong now and then.

    >>> work_out([7, 5, -3, 6])
    ('7+5=12, 12-3=9, 9+6=15', 15)
    """
    total, steps = terms[0], []
    for term in terms[1:]:
        result = total + term
        if slips and slips.random() < P_SLIP:           # and all that follow from it
            result = max(0, result + slips.choice([-2, -1, 1, 2]))
        steps.append(f"{total}{term:+d}={result}")
        total = result
    return ", ".join(steps), total

def make_document(rng, test_questions):
    """(prompt, continuation) as some author on the internet would have written it; never a test question."""
    question, terms = make_problem(rng)
    while question in test_questions:
        question, terms = make_problem(rng)
    if rng.random() < P_STEPS:
        reasoning, total = work_out(terms, slips=rng)
    else:
        total = max(0, sum(terms) + rng.randint(-4, 4))
        reasoning = f"I guess {total}"
    prompt = "tiny" if rng.random() < P_CHAT else "question_only"
    if rng.random() >= P_FORMAT:
        continuation = f" {reasoning}. So it is {total}."
    elif prompt == "tiny":
        continuation = RESPONSE.format(reasoning, total)
    else:
        continuation = rf" {reasoning}. So it is \boxed{{{total}}}."
    return PROMPTS[prompt].format(question=question), continuation

def train_tokenizer(documents, vocab_size=320):
    """A byte-level BPE tokenizer in which every digit is a token of its own, as in Qwen2.5's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")

def pretrain(tokenizer, make_document, rng, test_questions, steps=500, batch_size=32, learning_rate=8e-3, seed=0):
    """Next-token prediction over whole documents, learning rate annealed to zero. Returns the model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    # Muon for the matrices reaches AdamW's loss in half the steps; embedding and norms are AdamW's.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    bar = tqdm(range(steps), desc="pretraining the tiny base model", unit="step", mininterval=1.0)
    for step in bar:
        texts = ["".join(make_document(rng, test_questions)) + tokenizer.eos_token for _ in range(batch_size)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = model(batch["input_ids"]).logits       # (B, T, V); right padding needs no attention mask
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 30) * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f} nats", refresh=False)
    return model

def prepare_arithmetic(folder, seed=0, force=False):
    """Writes train.jsonl, test.jsonl, sft.jsonl and base_model/; what is there already stays unless `force`."""
    folder, source, rng = Path(folder), f"seed {seed}", random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    terms_of = {}                                       # by question, so that train and test share none
    while len(terms_of) < N_TRAIN + N_TEST:
        question, terms = make_problem(rng)
        terms_of[question] = terms
    problems = [{"problem": question, "answer": str(sum(terms))} for question, terms in terms_of.items()]
    train, test, sft = problems[:N_TRAIN], problems[N_TRAIN:], []
    for question, terms in list(terms_of.items())[:N_SFT]:
        steps, answer = work_out(terms)
        sft.append({"problem": question, "response": RESPONSE.format(steps, answer), "answer": str(answer)})
    files = {"train.jsonl": train, "test.jsonl": test, "sft.jsonl": sft}
    for name in files_to_make(folder, files, source, force):
        write_jsonl(folder, {name: files[name]}, source)
    base_model, partial = folder / "base_model", folder / "base_model.partial"
    if base_model.exists() and not force:
        return
    test_questions = {p["problem"] for p in test}
    tokenizer = train_tokenizer("".join(make_document(rng, test_questions)) for _ in range(2000))
    model = pretrain(tokenizer, make_document, rng, test_questions, seed=seed)
    shutil.rmtree(partial, ignore_errors=True)
    logging.disable_progress_bar()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(base_model, ignore_errors=True)
    os.replace(partial, base_model)
    print(f"{base_model}: {model.num_parameters() / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}")

# -- 3. MATH, GSM8K, MAWPS: problems with their final answers --

SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
# Of MATH's training problems a handful are left out as duplicates; of the 7,473 of one copy in circulation 10.
DATASETS = {    # folder, repository on the hub, its configurations, problems in the full sets
    "math": (Path("data/MATH"), "EleutherAI/hendrycks_math", SUBJECTS, {"train": 7500, "test": 5000}),
    "gsm8k": (Path("data/GSM8K"), "openai/gsm8k", ["main"], {"train": 7473, "test": 1319}),
    "mawps": (Path("data/MAWPS"), "MU-NLPC/Calc-mawps", ["original-splits"], {"train": 3636, "test": 520}),
}

def to_problem(record):
    """{"problem", "answer"[, "solution", "level", "subject"]} of a record of these sets. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("not a record")
    text = record.get("problem") or record.get("question")
    answer, solution = record.get("answer"), record.get("solution")
    steps = re.findall(r"<gadget[^>]*>(.*?)</gadget>\s*<output>(.*?)</output>", str(record.get("chain")), re.DOTALL)
    if steps:                                           # MAWPS: what a calculator is asked, and what it says
        solution = ", ".join(f"{asked.strip()} = {said.strip()}" for asked, said in steps).replace("_", "")
        answer = str(record.get("result") or "").replace("_", "")       # of thousands
    if "####" in str(solution or answer):               # GSM8K: the solution has marks for a calculator
        solution, _, answer = re.sub(r"<<.*?>>", "", str(solution or answer)).rpartition("####")
        answer = answer.replace(",", "")
    elif not isinstance(answer, (str, int, float)) or not str(answer).strip():      # MATH: the solution's last box
        boxed = re.sub(r"\\(?:fbox|boxed)\s*\{", r"\\boxed{", str(solution))
        answer = last_boxed(re.sub(r"\\(?:fbox|boxed)\s*(\w)", r"\\boxed{\1}", boxed)) or ""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no problem text")
    if not str(answer).strip():
        raise ValueError("no final answer")
    problem = {"problem": text.strip(), "answer": str(answer).strip(), "solution": str(solution or "").strip(),
               "level": record.get("level"), "subject": record.get("subject") or record.get("type")}
    return {key: value for key, value in problem.items() if value}

def read_records(path, left_out):
    """The records of a file of any of the kinds below; what cannot be read is left out by file and line."""
    import pyarrow.parquet
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".arrow":
            return pyarrow.ipc.open_stream(path).read_all().to_pylist()
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        left_out["unreadable file"].append(f"{path}: {short_message(error)}")
        return []
    try:
        document = json.loads(text)
        return document if isinstance(document, list) else [document]
    except ValueError:
        records = []                                    # not one document: a document a line
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            left_out["not valid JSON"].append(f"{path}, line {number}: {error}")
    return records

def find_files(path):
    """(file, "train" or "test") pairs of a folder or of one file, by what its name or nearest folder says."""
    # The first kind that is there counts: a hub repository, save_to_disk, JSON lines, the tree of MATH.tar.
    for suffix in (".parquet", ".arrow", ".jsonl", ".json"):
        files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
        names = {file: file.relative_to(path.parent).as_posix() for file in files}
        splits = {file: re.findall(r"(?:^|[/_.-])(train|test)(?=[/_.-])", name) for file, name in names.items()}
        if any(splits.values()):
            return [(file, found[-1]) for file, found in splits.items() if found]
    raise UserError(f"--from_path {path}: no .json, .jsonl, .parquet or .arrow file there that says train or test")

def hub_rows(name, *config, split):
    """The rows of a data set of the Hugging Face hub. Raises UserError where it cannot be had."""
    import datasets
    try:
        return datasets.load_dataset(name, *config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name} cannot be had from the Hugging Face hub ({short_message(error)}): connect, name a "
                        "mirror (HF_ENDPOINT=https://…), or give your copy to --from_path or --traces") from error

def read_dataset(dataset, paths, left_out):
    """(split, origin, record) of all records in these files or folders or, without any, on the hub."""
    _, repository, configs, splits = DATASETS[dataset]
    for path in paths:
        for file, split in tqdm(find_files(path), desc=f"reading {path}", unit="file", mininterval=1.0):
            for record in read_records(file, left_out):
                yield split, file, record
    if not paths:
        for split in splits:
            for config in configs:
                for record in hub_rows(repository, config, split=split):
                    yield split, config, record

def text_key(text):
    """A problem's text without what differs between copies: case, spaces, dollar signs, layout."""
    layout = r"\\(left|right|displaystyle|[,;:! ])|(?<=\\)[dt](?=frac)|[\s${}~]"
    return re.sub(layout, "", text.casefold()).rstrip(".?:")

def prepare_problems(dataset, from_path=None, force=False):
    """Writes train.jsonl and test.jsonl of such a set; no problem of the first is in the second."""
    folder, repository, _, full_set = DATASETS[dataset]
    source = " ".join(from_path) if from_path else f"hub:{repository}"
    if not files_to_make(folder, ["train.jsonl", "test.jsonl"], source, force):
        return
    problems, left_out, counts = {"train": [], "test": []}, defaultdict(list), Counter()
    for split, origin, record in read_dataset(dataset, [Path(path) for path in from_path or ()], left_out):
        counts[split] += 1
        try:
            problems[split].append(to_problem(record))
        except ValueError as error:
            left_out[f"{split}: {error}"].append(f"{origin}: {record}")
    # Test problems all stay, as everybody's accuracy is over all of them.
    seen, train = {text_key(p["problem"]): "a test problem, too" for p in problems["test"]}, []
    for problem in problems["train"]:
        key = text_key(problem["problem"])
        if key in seen:
            left_out[f"train: {seen[key]}"].append(problem["problem"])
        else:
            train.append(problem)
            seen[key] = "twice in the training set"
    files = {"test.jsonl": problems["test"], "train.jsonl": train, "left_out.jsonl": report(left_out)}
    for split, count in full_set.items():
        check(files[f"{split}.jsonl"], f"{source}: no {split} problems; give a folder with both, or two files")
        if counts[split] != count:
            print(f"{split}: {counts[split]} records, where the full set has {count}")
    write_jsonl(folder, files, source)

# ----- 4. Traces: what a teacher thought and answered -----

P_VALIDATION = 0.05     # share of the problems whose traces go to sft_val.jsonl
DEEPSEEKS_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."

def read_answers(path, model):
    """What a teacher has answered so far, without the half line that a kill can leave."""
    with open(path, "a+b") as file:
        file.seek(0)
        whole_lines = file.read().rfind(b"\n") + 1
        file.truncate(whole_lines)
    answers = read_jsonl(path, [("problem", "model")]) if whole_lines else []
    return [answer for answer in answers if answer["model"] == model]

async def ask(client, slots, problem, sample, args):
    """One answer as a record of teacher.jsonl, or the exception where there is none."""
    import openai
    thoughts, content, finish_reason = "", "", None
    try:
        async with slots:       # streamed, so that a server that hangs is told from one that thinks
            stream = await client.chat.completions.create(
                messages=[{"role": "user", "content": DEEPSEEKS_PROMPT.format(problem=problem)}], stream=True,
                model=args.teacher_model, temperature=args.teacher_temperature, max_tokens=args.teacher_max_tokens)
            async for chunk in stream:
                for choice in chunk.choices:
                    delta = choice.delta    # the reasoning has a field of its own, by either name, or is in the text
                    thoughts += getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""
                    content += delta.content or ""
                    finish_reason = choice.finish_reason or finish_reason
    except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:    # the latter three: no completion
        return error
    if finish_reason is None:
        return ValueError("the answer broke off")
    response = f"<think>{thoughts}</think>{content}" if thoughts else content
    return {"problem": problem, "sample": sample, "model": args.teacher_model, "finish_reason": finish_reason,
            "response": response}

async def ask_teacher(problems, path, args, left_out):
    """Appends each answer to `path` as it comes; what is there already is not asked for.

    openai's client tries again, with growing pauses, where the server is overloaded or fails. What still fails, or
    breaks off, is left out and asked for by another run. Raises UserError where the server is gone.
    """
    import openai
    asked = {(answer["problem"], answer["sample"]) for answer in read_answers(path, args.teacher_model)}
    wanted = [(p["problem"], sample) for p in problems for sample in range(args.teacher_samples)]
    todo = [item for item in wanted if item not in asked]
    print(f"{args.teacher_model}: {len(wanted) - len(todo)} answers are there, {len(todo)} to ask for")
    slots, failures_in_a_row = asyncio.Semaphore(args.teacher_concurrency), 0
    bar = tqdm(total=len(todo), desc="asking the teacher", unit="answer", mininterval=1.0)
    url, timeout = args.teacher_url, args.teacher_timeout
    key = os.environ.get("DEEPSEEK_API_KEY" if "deepseek.com" in url else "OPENAI_API_KEY") or "none"
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=6, timeout=timeout)
    with bar, open(path, "a", encoding="utf-8") as file:
        for task in asyncio.as_completed([ask(client, slots, *item, args) for item in todo]):
            answer = await task
            bar.update()
            if isinstance(answer, dict):
                file.write(json.dumps(answer) + "\n")
                file.flush()
                failures_in_a_row = 0
                continue
            message = f"{type(answer).__name__}: {short_message(answer)}"
            left_out["no answer (the same command with --force asks again)"].append(message)
            status = getattr(answer, "status_code", None)
            failures_in_a_row += status not in (400, 422)           # which are about this request alone
            if failures_in_a_row == 3 or status in (401, 403, 404):
                raise UserError(f"the teacher at {url} fails ({message}); the same command goes on from {path}")
    await client.close()

def to_response(text):
    """A response in the r1_zero format of what a model wrote. Raises ValueError: what the text lacks."""
    thoughts, _, after = text.strip().removeprefix("<think>").rpartition("</think>")
    tagged = re.search(r"<answer>(.*)</answer>", after, re.DOTALL)
    answer = last_boxed(after) or (tagged[1].strip() if tagged else "")
    response = RESPONSE.format(thoughts.strip(), answer.strip())
    if not thoughts.strip():
        raise ValueError("no reasoning that ends in </think>")
    if not answer:
        raise ValueError("no final answer after </think>")
    if extract_answer(response) is None:
        raise ValueError("a tag of the format inside the reasoning or the answer")
    return response

def record_texts(record):
    """(problem, [what a model wrote, …]) of a record as of OpenR1-Math-220k or CS336. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("not a record")
    problem = record.get("problem") or record.get("question")
    if problem is None and "User: " in str(record.get("prompt")):
        problem = record["prompt"].rpartition("User: ")[2].rpartition("\nAssistant:")[0]
    texts = record.get("generations") or [record.get("response") or record.get("generation")]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in [problem, *texts]):
        raise ValueError("no problem, or no text under generations or response")
    return problem, texts

def read_traces(args, folder, train, left_out):
    """The records of --traces, in any of record_texts' layouts."""
    kind, _, name = args.traces.partition(":")
    if kind == "hub" and name:
        return tqdm(hub_rows(name, split="train"), desc=f"reading {name}", unit="record", mininterval=1.0)
    if args.traces == "teacher":
        random.Random(args.seed).shuffle(train)
        asyncio.run(ask_teacher(train[:args.teacher_problems or None], folder / "teacher.jsonl", args, left_out))
        return read_answers(folder / "teacher.jsonl", args.teacher_model)
    if args.traces == "solutions":
        return [p | {"response": f"{p.get('solution', '')}</think><answer>{p['answer']}</answer>"} for p in train]
    if Path(args.traces).is_file():
        return read_records(Path(args.traces), left_out)
    raise UserError(f"--traces {args.traces} is neither hub:DATASET, teacher, solutions nor a file")

def prepare_traces(args, folder):
    """Writes sft.jsonl, split by problem into sft_train and sft_val, and the right ones of sft_train."""
    texts = (folder / "train.jsonl").read_bytes() + (folder / "test.jsonl").read_bytes()
    origin = f"teacher:{args.teacher_model}" if args.traces == "teacher" else args.traces
    source = f"{origin}, for the problems {hashlib.sha256(texts).hexdigest()[:8]}"
    names = ["sft.jsonl", "sft_train.jsonl", "sft_val.jsonl", "sft_train_filtered.jsonl"]
    if not files_to_make(folder, names, source, args.force):
        return
    train = {text_key(p["problem"]): p for p in read_jsonl(folder / "train.jsonl", [("problem", "answer")])}
    test = {text_key(p["problem"]) for p in read_jsonl(folder / "test.jsonl", [("problem", "answer")])}
    traces, strangers, left_out = [], 0, defaultdict(list)
    for record in read_traces(args, folder, list(train.values()), left_out):
        try:
            problem, texts = record_texts(record)
        except ValueError as error:
            left_out[f"not a trace: {error}"].append(record)
            continue
        key = text_key(problem)
        if key in test:
            left_out["a test problem"].append(problem)
        elif key not in train:
            strangers += 1
        else:
            known = train[key]
            for text in texts:
                try:
                    traces.append({"problem": known["problem"], "response": to_response(text),
                                   "answer": known["answer"]})
                except ValueError as error:
                    left_out[str(error)].append(f"{problem} → {text[-200:]}")
    problems = sorted({trace["problem"] for trace in traces})
    print(f"{len(traces)} traces of {len(problems)} problems; {strangers} records of problems not in train.jsonl")
    left_out = report(left_out)
    check(traces, f"--traces {args.traces}: no usable trace of a training problem")
    random.Random(args.seed).shuffle(problems)
    validation = set(problems[:round(P_VALIDATION * len(problems))])
    random.Random(args.seed).shuffle(traces)
    sft_train = [trace for trace in traces if trace["problem"] not in validation]
    sft_val = [trace for trace in traces if trace["problem"] in validation]
    responses, answers = [trace["response"] for trace in sft_train], [trace["answer"] for trace in sft_train]
    rewards, _ = grade_responses(r1_zero_reward_fn, responses, answers)
    right = [trace for trace, reward in zip(sft_train, rewards) if reward["reward"] == 1]
    files = dict(zip(names, [traces, sft_train, sft_val, right]))
    write_jsonl(folder, files | {"sft_left_out.jsonl": left_out}, source)

# ------------------------ 5. main -------------------------

FLAGS = [       # (flag, default, help)
    ("seed", 0, "of everything that is drawn"),
    ("traces", "", "also make traces for SFT, from hub:DATASET (laid out as open-r1/OpenR1-Math-220k), teacher (an "
     "OpenAI-compatible server), solutions (the data set's own) or a file of JSON lines"),
    ("teacher_url", "https://api.deepseek.com", "its key is DEEPSEEK_API_KEY, any other server's OPENAI_API_KEY"),
    ("teacher_model", "deepseek-reasoner", "its name on that server"),
    ("teacher_problems", 0, "ask about so many problems, drawn at random; 0: all"),
    ("teacher_samples", 1, "answers per problem"),
    ("teacher_max_tokens", 16384, "tokens of an answer, reasoning included"),
    ("teacher_temperature", 0.6, "0.6 is what R1 was made for"),
    ("teacher_timeout", 120.0, "seconds without a sign of life after which a request has failed"),
    ("teacher_concurrency", 16, "requests at a time"),
]

def main(argv=None):
    """Runs the command line. A user's mistake ends in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", choices=["arithmetic", *DATASETS], default="arithmetic", help="tiny: arithmetic")
    parser.add_argument("--force", action="store_true", help="make again what is there (never a teacher's answers)")
    parser.add_argument("--from_path", nargs="+", metavar="PATH", help="your copy of the data set: the unpacked "
                        "MATH.tar, a folder or two files of JSON lines, JSON or parquet that say train or test")
    for flag, default, text in FLAGS:
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    with exit_cleanly("prepare_data.py"):
        if args.dataset == "arithmetic":
            check(not args.from_path and not args.traces, "--from_path and --traces are not for the tiny data set")
            return prepare_arithmetic("data/arithmetic", args.seed, args.force)
        folder = DATASETS[args.dataset][0]
        folder.mkdir(parents=True, exist_ok=True)
        # `--traces …` alone goes with the problems that are there, wherever they are from.
        complete = all((folder / name).exists() for name in ("train.jsonl", "test.jsonl"))
        if args.from_path or not args.traces or not complete:
            prepare_problems(args.dataset, args.from_path, args.force)
        if args.traces:
            prepare_traces(args, folder)

if __name__ == "__main__":
    main()
