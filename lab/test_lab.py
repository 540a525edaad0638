"""Tests of the laboratory: pytest lab/test_lab.py, two minutes, nearly all of it a short run of each mistake.

Each patch of lab/mistakes/ fits align.py as it is, and a copy with it runs or ends in the error that it names.
Where a patch does not fit any more, make the mistake again by hand and write it with `git diff`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parent
ROOT = LAB.parent
sys.path.insert(0, str(LAB))

import measure  # noqa: E402
import speed  # noqa: E402

PATCHES = sorted(LAB.glob("mistakes/*.patch"))
PAGE = """# A page

<!-- measure speed -->

| name | what | align.py |
|---|---|---|
| `trl` | a step | 1 s |
| `sampling` | float32 | 300 |
| `sampling` | bfloat16 | 600 |

- `trl`, `sampling`: an old machine

<!-- end -->

Commentary on `sampling`.

<!-- measure budget -->

| | accuracy |
|---|---|
| one `word` | 1 |

- `budget`: an old machine

<!-- end -->
"""


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_name_are_replaced_and_all_else_stays():
    text = measure.replace_rows(PAGE, "speed", "sampling", [["float32", "400"]], "a new machine")
    assert text == PAGE.replace(
        "| `sampling` | float32 | 300 |\n| `sampling` | bfloat16 | 600 |", "| `sampling` | float32 | 400 |"
    ).replace("- `trl`, `sampling`: an old machine", "- `sampling`: a new machine\n- `trl`: an old machine")


def test_a_new_name_takes_its_place_in_the_order_of_the_names():
    text = measure.replace_rows(PAGE, "speed", "tiny_step", [["a tiny step", "2 s"]], "an old machine")
    assert "|---|---|---|\n| `tiny_step` | a tiny step | 2 s |\n| `trl` |" in text
    assert "- `tiny_step`, `trl`, `sampling`: an old machine" in text


def test_a_table_of_one_name_is_replaced_below_its_heading():
    text = measure.replace_rows(PAGE, "budget", "budget", [["one", "2"], ["two", "3"]], "a new machine")
    assert "| | accuracy |\n|---|---|\n| one | 2 |\n| two | 3 |\n\n- `budget`: a new machine\n\n<!-- end -->" in text
    assert "word" not in text and text.startswith(PAGE[:PAGE.index("<!-- measure budget")])


def test_writing_the_same_rows_twice_changes_nothing_more():
    once = measure.replace_rows(PAGE, "speed", "linear", [["cost", "40"]], "a new machine")
    assert measure.replace_rows(once, "speed", "linear", [["cost", "40"]], "a new machine") == once


def test_every_marker_has_a_function_that_measures_it_and_every_table_has_a_marker():
    pages = [(ROOT / "README.md").read_text(), (LAB / "README.md").read_text()]
    found = []
    for page in pages:
        tables = re.findall(r"<!-- measure (\w+) -->\n\n\| .*\n\|---", page)
        assert page.count("<!-- measure") == page.count("<!-- end -->") == len(tables)
        found += tables
    assert sorted(found) == sorted(measure.TABLES)
    for names in measure.TABLES.values():
        for name in names:
            assert name in measure.EXPERIMENTS or hasattr(speed, name) or hasattr(measure, name)


def test_the_pictures_and_patches_that_the_page_names_are_there():
    page = (LAB / "README.md").read_text()
    for name in re.findall(r"\((\w+\.png)\)", page) + re.findall(r"mistakes/\w+\.patch", page):
        assert (LAB / name).exists(), name


# ---------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_mistake_can_be_made_and_runs_or_ends_in_its_error(patch, tmp_path):
    notes = measure.notes_of(patch)
    script = measure.patched_copy(patch, tmp_path)
    assert script.read_text() != (ROOT / "align.py").read_text()
    flags = "--algo grpo --preset tiny --n_grpo_steps 2 --rollout_batch_size 32 --train_batch_size 32 --group_size 4 " \
            "--validation_size 8 --validation_frequency 0 --save_frequency 0 --sampling_max_tokens 48"
    command = measure.command_of(f"{flags} {notes.get('Flags', '')}", tmp_path / "out", script=script)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "Error" in notes:
        assert done.returncode != 0 and notes["Error"] in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert len(measure.values_of(tmp_path / "out", "train/reward")) == 2
    assert notes["Mistake"] and notes["Symptom"]
