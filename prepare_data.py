"""Makes what align.py reads: problems, reasoning traces for SFT, and (for the embedded setting) the tiny base model.

    python prepare_data.py             # data/arithmetic/{train,test,sft}.jsonl and data/arithmetic/base_model/, about a minute on two cores
    python prepare_data.py --force     # make them again

Everything follows from --seed. What is there already is left alone, and files appear whole or not at all, so that a killed run
leaves nothing half-written behind.

The tiny base model is meant to behave like a real one before alignment. It has read a lot of arithmetic by authors of mixed habits:
some answer in the <think>/<answer> format and some do not, some write down every step and some blurt out a guess, and now and then a
step is wrong. So at temperature 1 it follows the format about half of the time and is right about a quarter of the time, and the skill
that alignment has to bring out (write the steps, make no slips, answer in the format) is in there already.
"""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from align import PROMPTS

# ----------------------------------------------------------------------------------------------------------------------
# 1. Problems and traces
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
# 2. The corpus of the base model: right format or not, steps or a guess, slips
# ----------------------------------------------------------------------------------------------------------------------

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
# 3. The tokenizer and the base model
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
# 4. The files
# ----------------------------------------------------------------------------------------------------------------------


def write_jsonl(path, records):
    """Writes aside and renames, so that the file is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(partial, path)
    print(f"{path}: {len(records)} records")


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
        if force or not (folder / name).exists():
            write_jsonl(folder / name, records)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the corpus and the initial weights")
    parser.add_argument("--force", action="store_true", help="make again what is there already")
    args = parser.parse_args()
    prepare_arithmetic("data/arithmetic", seed=args.seed, force=args.force)


if __name__ == "__main__":
    main()
