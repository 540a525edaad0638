"""Makes data/countdown/ for countdown.patch: problems, and a base model that has read some Countdown.

    git apply lab/variants/countdown.patch      # align.py then has the prompt
    python lab/variants/countdown.py            # two minutes on two cores

A problem is three numbers from 1 to 12 and a target that they reach with + and -, each used once. As with
arithmetic, the base model has read authors of mixed habits. Some try expression after expression and answer with the
one that fits, some answer with their first idea, and half of them do not use the answer format.
"""

import functools
import itertools
import os
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import prepare_data  # noqa: E402
from align import PROMPTS, UserError, exit_cleanly  # noqa: E402

FOLDER = Path("data/countdown")
N_TEST, LARGEST = 256, 12           # problems for evaluation; the largest number that is given
P_FORMAT, P_SEARCH = 0.5, 0.5       # the answer format, not plain words; tries until one fits, not the first idea alone
P_SLIP, MOST_TRIES = 0.02, 5        # the value of a try is wrong; tries at most

@functools.cache
def expressions(numbers):
    """{text: (steps, value)} of three numbers in any order with + and - between them: "3+5-7": ("3+5=8-7", 1). No
    running total is negative, and the value is above 0."""
    values = {}
    for a, b, c in itertools.permutations(numbers):
        for first, second in itertools.product((1, -1), repeat=2):
            total = a + first * b
            if total >= 0 and total + second * c > 0:
                ab, last = f"{a}{first * b:+d}", f"{second * c:+d}"
                values[ab + last] = f"{ab}={total}{last}", total + second * c
    return values

def make_problems():
    """All of them in a random order: {"problem": "8 from 3, 5, 7", "answer": "3 5 7 = 8"}."""
    problems = []
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), 3):
        for target in sorted({value for _, value in expressions(numbers).values()}):
            problem = f"{target} from {', '.join(map(str, numbers))}"
            problems.append({"problem": problem, "answer": f"{' '.join(map(str, numbers))} = {target}"})
    random.Random(0).shuffle(problems)
    return problems

def make_document(rng, problems):
    """(prompt, continuation) as some author would have written it, on one of these problems."""
    problem = rng.choice(problems)
    numbers, _, target = problem["answer"].partition(" = ")
    values = expressions(tuple(int(number) for number in numbers.split()))
    n_tries = MOST_TRIES if rng.random() < P_SEARCH else 1
    steps = []
    for text in rng.sample(list(values), min(len(values), n_tries)):
        work, value = values[text]
        if rng.random() < P_SLIP:
            value += rng.choice([-2, -1, 1, 2])
        steps.append(f"{work}={value}")
        if value == int(target):
            break
    reasoning = ", ".join(steps)        # the last try is the answer, whether it fits or not
    continuation = f" {reasoning}. So it is {text}."
    if rng.random() < P_FORMAT:
        continuation = prepare_data.RESPONSE.format(reasoning, text)
    return PROMPTS["countdown"].format(question=problem["problem"]), continuation

def main():
    if "countdown" not in PROMPTS:
        raise UserError("apply lab/variants/countdown.patch first: the prompt is in it")
    FOLDER.mkdir(parents=True, exist_ok=True)
    problems = make_problems()
    test, train = problems[:N_TEST], problems[N_TEST:]
    prepare_data.write_jsonl(FOLDER, {"train.jsonl": train, "test.jsonl": test}, "lab/variants/countdown.py")

    rng, partial, base_model = random.Random(0), FOLDER / "base_model.partial", FOLDER / "base_model"
    tokenizer = prepare_data.train_tokenizer("".join(make_document(rng, train)) for _ in range(2000))
    model = prepare_data.pretrain(tokenizer, make_document, rng, train)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(base_model, ignore_errors=True)
    os.replace(partial, base_model)

if __name__ == "__main__":
    with exit_cleanly("countdown.py"):
        main()
