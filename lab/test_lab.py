"""Tests of the laboratory: pytest lab/test_lab.py, four minutes: a short run of each patch, gpu_check.py on a CPU.

Each patch of lab/mistakes/ fits align.py as it is, and a copy with it runs or ends in the error that it names.
Each patch of lab/variants/ fits and runs, too, and its formula gives what was derived by hand.
Where a patch does not fit any more, make the change again by hand and write it with `git diff`.

    pytest lab/test_lab.py -k "not run"     # seconds
"""

import functools
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

LAB = Path(__file__).resolve().parent
ROOT = LAB.parent
sys.path[:0] = [str(LAB), str(ROOT)]

import gpu_check  # noqa: E402
import measure  # noqa: E402
import speed  # noqa: E402
from test_align import (  # noqa: E402
    GROUPED, PAIRS, WEIGHTS, align, close, gradients, make_run, plain_log_probs, random_model, weights_of)

PATCHES = sorted(LAB.glob("mistakes/*.patch"))
VARIANTS = sorted(LAB.glob("variants/*.patch"))
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

def test_the_page_has_the_commands_of_the_word_problems_and_align_py_takes_them():
    page = " ".join((LAB / "README.md").read_text().replace("\\\n", " ").split())
    for stage, flags in measure.WORDS.items():
        assert flags in page
        if stage != "all":
            algo = "grpo" if stage == "no_baseline" else stage
            assert align.parse_args(f"{measure.WORDS['all']} {flags}".split()).algo == algo

def test_the_operations_and_the_steps_of_a_response():
    assert measure.follow("27 + 42 = 79, 79 - 11 = 68 </think> <answer> 68 </answer>") == ([False, True], 58)
    assert measure.follow("9 – 3 = 6, 3 * 6 = 18, 18 / 4 = 4.5") == ([True, True, True], 4.5)
    assert measure.follow("5 / 0 = 5, 5 + 1 = 6") == ([False], None)
    assert measure.follow("the answer is 7") == ([], None)

def test_the_pictures_and_patches_that_the_page_names_are_there():
    page = (LAB / "README.md").read_text()
    for name in re.findall(r"\((\w+\.png)\)", page) + re.findall(r"mistakes/\w+\.patch", page):
        assert (LAB / name).exists(), name

# ---------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------

def run_patched(patch, folder, steps):
    """Some tiny GRPO steps of a copy of align.py with a patch, in folder/out."""
    script = measure.patched_copy(patch, folder)
    assert script.read_text() != (ROOT / "align.py").read_text()
    return run_script(script, measure.notes_of(patch).get("Flags", ""), steps)

def run_script(script, more_flags, steps, ranks=1):
    """The same of a script, in its folder's out."""
    flags = f"--algo grpo --preset tiny --n_grpo_steps {steps} --rollout_batch_size 32 --train_batch_size 32 " \
            "--group_size 4 --validation_size 8 --validation_frequency 0 --save_frequency 0 --sampling_max_tokens 48"
    command = measure.command_of(f"{flags} {more_flags}", script.parent / "out", script=script, ranks=ranks)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_mistake_can_be_made_and_runs_or_ends_in_its_error(patch, tmp_path):
    notes = measure.notes_of(patch)
    done = run_patched(patch, tmp_path, steps=2)
    if "Error" in notes:
        assert done.returncode != 0 and notes["Error"] in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert len(measure.values_of(tmp_path / "out", "train/reward")) == 2
    assert notes["Mistake"] and notes["Symptom"]

# ---------------------------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("patch", VARIANTS, ids=lambda patch: patch.stem)
def test_a_variant_fits_and_runs_and_names_its_paper(patch, tmp_path):
    notes = measure.notes_of(patch)
    assert notes["Variant"] and notes["Source"]
    if {"Data", "Needs", "Ranks"} & set(notes):
        pytest.skip("has a test of its own below")
    done = run_patched(patch, tmp_path, steps=3)
    assert done.returncode == 0, done.stderr
    rewards = measure.values_of(tmp_path / "out", "train/reward")
    losses = measure.values_of(tmp_path / "out", "train/loss")
    assert len(rewards) == len(losses) == 3 and all(map(math.isfinite, rewards + losses))

def test_fsdp_on_two_ranks_is_the_run_of_one_process_and_another_number_resumes_it(tmp_path):
    script = measure.patched_copy(LAB / "variants/fsdp.patch", tmp_path / "sharded")
    whole = tmp_path / "whole/align.py"
    whole.parent.mkdir()
    shutil.copy(ROOT / "align.py", whole)
    flags = "--loss_type grpo_clip --train_batch_size 16 --save_frequency 1"
    assert run_script(whole, flags, steps=3).returncode == 0
    done = run_script(script, flags, steps=3, ranks=2)
    assert done.returncode == 0, done.stderr
    for later in ("final_model", "checkpoint-2"):
        shutil.rmtree(tmp_path / "sharded/out" / later)
    done = run_script(script, f"{flags} --resume", steps=3, ranks=3)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "sharded/out/final_model", tmp_path / "whole/out/final_model"]
    models = map(AutoModelForCausalLM.from_pretrained, [*folders, ROOT / "data/arithmetic/base_model"])
    sharded, expected, before = map(weights_of, models)
    assert (sharded - expected).norm() < 1e-4 * (expected - before).norm()
    samples = [(tmp_path / name / "out/samples.jsonl").read_bytes() for name in ("sharded", "whole")]
    assert samples[0] == samples[1]

def test_the_four_patches_of_dapo_fit_together_and_run(tmp_path):
    names = ["clip_higher", "dynamic_sampling", "token_level_loss", "overlong_punishment"]
    patches = [LAB / f"variants/{name}.patch" for name in names]
    script = measure.patched_copy(patches[0], tmp_path)
    outside_of_git = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply", *patches[1:]], cwd=tmp_path, env=outside_of_git, check=True)
    flags = " ".join(measure.notes_of(patch).get("Flags", "") for patch in patches)
    done = run_script(script, flags, steps=2)
    assert done.returncode == 0, done.stderr
    for metric in ("clip_fraction", "mixed_groups", "overlong_punishment"):
        assert len(measure.values_of(tmp_path / "out", f"train/{metric}")) == 2

@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """variant(name): a copy of align.py with that patch, as a module."""
    @functools.cache
    def load(name):
        script = measure.patched_copy(LAB / f"variants/{name}.patch", tmp_path_factory.mktemp(name))
        spec = importlib.util.spec_from_file_location(f"align_{name}", script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        align.AttentionInterface.register("packed", align.packed_attention)     # the module has registered its own
        return module

    return load

def near(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    return True

def grpo_update(align, monkeypatch, log_probs, advantages, flags="", old=None, entropy=None, **more):
    """One GRPO update where log_probs, a list for each response, stand in for the model.
    Returns the loss and its gradient with respect to each log-prob, both padded with 0."""
    def pad(rows):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    lengths = [len(row) for row in log_probs]
    policy, losses = pad(log_probs).requires_grad_(), []
    mask, entropies = pad([[True] * n for n in lengths]), torch.zeros_like(policy) if entropy is None else pad(entropy)
    monkeypatch.setattr(align, "get_packed_log_probs", lambda model, pairs, temperature, dtype: [
        values[[prompt[0] for prompt, _ in pairs]] for values in (policy, entropies, mask)])
    monkeypatch.setattr(align, "optimizer_step", lambda run, step, loss: losses.append(loss))
    args = align.parse_args(f"--algo grpo --preset tiny {flags}".split())
    run = SimpleNamespace(args=args, model=None, log=lambda *_: None)
    batch = {"pairs": [([i], [7] * n) for i, n in enumerate(lengths)],
             "advantages": torch.tensor(advantages)[:, None], "raw_rewards": torch.tensor(advantages)[:, None],
             "old_log_probs": None if old is None else pad(old)} | {key: pad(rows) for key, rows in more.items()}
    align.grpo_update(run, batch, list(range(len(lengths))), 1)
    return losses[0], policy.grad

def log(*ratios):
    """The log-probs of tokens whose ratio to an old log-prob of 0 is this."""
    return [math.log(ratio) for ratio in ratios]

def advantages_of(align, monkeypatch, rewards, group_size, by_std=True, **more):
    """Advantages of given rewards, without the grading."""
    graded = [{"reward": float(reward), "format_reward": 1.0, "answer_reward": float(reward)} for reward in rewards]
    monkeypatch.setattr(align, "grade_responses", lambda *_: (graded, 0))
    texts = [""] * len(rewards)
    return align.compute_group_normalized_rewards(None, texts, texts, group_size, 1e-6, by_std, **more)[0]

def test_kl_penalty_is_r_less_log_r_less_1_and_pulls_every_row(variant, monkeypatch):
    align = variant("kl_penalty")
    ratios = torch.tensor([0.5, 1.0, 2.0])                              # π_ref / π
    assert near(align.kl_penalty(torch.zeros(3), ratios.log()), [math.log(2) - 0.5, 0.0, 1 - math.log(2)])
    draws = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert (align.kl_penalty(*draws) >= 0).all()
    # ∂ (r − log r − 1) / ∂ log π = 1 − r. Two responses, two tokens: β / 4 each, also at an advantage of 0.
    loss, grad = grpo_update(align, monkeypatch, [[0.0, 0.0], [0.0, 0.0]], [1.0, 0.0], "--kl_coef 0.4",
                             ref_log_probs=[log(2, 1), log(0.5, 3)])
    assert near(grad, [[-0.25 - 0.1, -0.25], [0.05, -0.2]])
    k3 = 1 - math.log(2) + math.log(2) - 0.5 + 2 - math.log(3)
    assert near(loss, 0.1 * k3)

def test_kl_penalty_is_the_divergence_on_average(variant):
    # Over tokens that π samples, the mean of r − log r − 1 is Σ π log(π / π_ref).
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean = (policy * variant("kl_penalty").kl_penalty(policy.log(), reference.log())).sum()
    assert near(mean, 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3))

@pytest.mark.parametrize("advantage, ratio, loss, gradient", [
    (1.0, 1.25, -1.25, -1.25),      # above 1 + 0.2, below 1 + 0.28: it may go on
    (1.0, 1.3, -1.28, 0.0),
    (1.0, 0.7, -0.7, -0.7),         # a right token that fell is always pulled back
    (-1.0, 0.85, 0.85, 0.85),
    (-1.0, 0.75, 0.8, 0.0),         # below 1 − 0.2: the lower bound stays
    (-1.0, 1.5, 1.5, 1.5)])
def test_clip_higher_bounds(advantage, ratio, loss, gradient, variant, monkeypatch):
    flags = "--loss_type grpo_clip --epochs_per_rollout_batch 2"
    found = grpo_update(variant("clip_higher"), monkeypatch, [log(ratio)], [advantage], flags, old=[[0.0]])
    assert near(found[0], loss) and near(found[1], [[gradient]])      # ∂ρ / ∂ log π = ρ
    flags = flags.replace("grpo_clip", "grpo_no_clip")
    found = grpo_update(variant("clip_higher"), monkeypatch, [log(ratio)], [advantage], flags, old=[[0.0]])
    assert near(found[1], [[-ratio * advantage]])

@pytest.mark.parametrize("tokens_per_microbatch", [1000, 2])
def test_token_level_loss_is_the_mean_over_all_tokens(tokens_per_microbatch, variant, monkeypatch):
    align, flags = variant("token_level_loss"), f"--tokens_per_microbatch {tokens_per_microbatch}"
    loss, grad = grpo_update(align, monkeypatch, [[-2.0], [-1.0, -3.0, -5.0]], [1.0, -1.0], flags)
    assert near(loss, (2 - 1 - 3 - 5) / 4) and near(grad, [[-1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]])
    # A response of advantage 0 has no gradient, but its four tokens count.
    _, grad = grpo_update(align, monkeypatch, [[-2.0], [-1.0, -3.0, -5.0], [-1.0] * 4], [1.0, -1.0, 0.0], flags)
    assert near(grad[:2], [[-1 / 8, 0, 0, 0], [1 / 8, 1 / 8, 1 / 8, 0]])

def mixed_groups(align, monkeypatch, is_mixed):
    """The problems, responses and draws of a step of 3 groups of 2, out of 60 problems."""
    draws = []

    def sample(run, problems, n, step, purpose, temperature):
        draws.append(step)
        texts = [text for problem in problems for text in (["1", "0"] if is_mixed(problem) else ["1", "1"])]
        return [SimpleNamespace(text=text) for text in texts], [problem for problem in problems for _ in range(n)]

    monkeypatch.setattr(align, "sample", sample)
    monkeypatch.setattr(align, "grade_responses", lambda _, texts, truths: ([{"reward": float(t)} for t in texts], 0))
    flags = "--algo grpo --preset tiny --group_size 2 --rollout_batch_size 6 --train_batch_size 6"
    problems = [{"number": i, "answer": "1"} for i in range(60)]
    run = SimpleNamespace(args=align.parse_args(flags.split()), reward_fn=None, log=lambda *_: None)
    rollouts, repeated = align.sample_mixed_groups(run, problems, 3, 1)
    return [problem["number"] for problem in repeated], [rollout.text for rollout in rollouts], draws

def test_dynamic_sampling_drops_equal_groups_and_fills_up(variant, monkeypatch):
    align = variant("dynamic_sampling")
    numbers, texts, draws = found = mixed_groups(align, monkeypatch, lambda problem: problem["number"] % 3 == 0)
    assert texts == ["1", "0"] * 3 and numbers[::2] == numbers[1::2]    # groups stay together
    assert len(set(numbers)) == 3 and all(number % 3 == 0 for number in numbers)
    assert 1 < len(draws) == len(set(draws)) <= 10                      # each draw has its own random numbers
    assert mixed_groups(align, monkeypatch, lambda problem: problem["number"] % 3 == 0) == found

def test_dynamic_sampling_draws_once_where_it_can_and_gives_up_after_ten(variant, monkeypatch):
    align = variant("dynamic_sampling")
    assert len(mixed_groups(align, monkeypatch, lambda problem: True)[2]) == 1
    numbers, texts, draws = mixed_groups(align, monkeypatch, lambda problem: False)
    assert len(draws) == 10 and texts == ["1"] * 6 and len(set(numbers)) == 3

def test_overlong_punishment_falls_from_0_to_minus_1(variant, monkeypatch):
    align = variant("overlong_punishment")
    lengths = torch.tensor([40, 48, 52, 64])                            # L_max 64, L_cache 16
    assert near(align.overlong_punishment(lengths, 64, 16), [0.0, 0.0, -0.25, -1.0])
    # Two right responses of which one is too long are no longer equal.
    punishments = torch.tensor([0.0, -1.0, 0.0, 0.0])
    found = advantages_of(align, monkeypatch, [1, 1, 0, 0], 2, by_std=False, punishments=punishments)
    assert near(found, [0.5, -0.5, 0.0, 0.0])

def test_gspo_ratio_is_the_geometric_mean(variant):
    align = variant("gspo")
    policy, mask = torch.tensor([log(2, 8, 100), log(3, 100, 100)]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    found = align.sequence_log_ratio(policy, torch.zeros(2, 3), mask).exp()
    assert near(found, [[math.sqrt(2 * 8)], [3.0]])

def test_gspo_clips_whole_responses(variant, monkeypatch):
    align, flags = variant("gspo"), "--loss_type grpo_clip --epochs_per_rollout_batch 2"
    # s = √(1.44 · 1) = 1.2: ∂s / ∂ log π = s / |y|, for each token alike
    responses, old = [log(1.44, 1), log(0.9)], [[0.0, 0.0], [0.0]]
    loss, grad = grpo_update(align, monkeypatch, responses, [1.0, -2.0], f"{flags} --cliprange 0.3", old=old)
    assert near(loss, (-1.2 + 1.8) / 2) and near(grad, [[-0.3, -0.3], [0.9, 0.0]])
    # Clipped, the first response has no gradient at all, not even at the token whose own ratio is 1.
    loss, grad = grpo_update(align, monkeypatch, responses, [1.0, -2.0], f"{flags} --cliprange 0.1", old=old)
    assert near(loss, (-1.1 + 1.8) / 2) and near(grad[0], [0.0, 0.0])

def test_gspo_of_a_response_that_does_not_count_is_no_nan(variant):
    policy, mask = torch.zeros(2, 2, requires_grad=True), torch.tensor([[True, True], [False, False]])
    variant("gspo").grpo_microbatch_train_step(
        policy, mask, 1, "grpo_clip", advantages=torch.ones(2, 1), old_log_probs=torch.zeros(2, 2), cliprange=0.2)
    assert near(policy.grad, [[-0.25, -0.25], [0.0, 0.0]])

def test_cispo_has_reinforces_gradient_with_a_bounded_weight(variant, monkeypatch):
    # In the first two PPO's gradient is 0. −sg(min(ρ, 1.2)) · A for each token
    ratios, advantages = [1.5, 0.5, 1.1, 3.0], [1.0, -1.0, 2.0, -1.0]
    flags = "--loss_type grpo_clip --epochs_per_rollout_batch 2 --cliprange 0.2"
    _, grad = grpo_update(variant("cispo"), monkeypatch, [log(ratio) for ratio in ratios], advantages, flags,
                          old=[[0.0]] * 4)
    assert near(4 * grad, [[-1.2], [0.5], [-2.2], [1.2]])
    column = torch.tensor(advantages)[:, None]
    _, metadata = variant("cispo").compute_grpo_clip_loss(column, torch.tensor(ratios)[:, None].log(), 0.0, 0.2)
    assert metadata["clipped"].flatten().tolist() == [True, False, False, True]

def test_rloo_compares_with_the_other_responses(variant, monkeypatch):
    found = advantages_of(variant("rloo"), monkeypatch, [1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], 4, by_std=False)
    assert near(found, [1.0, -1 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1 / 3, -1.0, 0.0, 0.0, 0.0, 0.0])
    assert near(found[:4], [4 / 3 * (reward - 1 / 4) for reward in (1, 0, 0, 0)])

def test_reinforce_plus_plus_normalises_over_the_batch(variant, monkeypatch):
    align = variant("reinforce_plus_plus")
    # mean ½, variance 4 · ¼ / 3; groups of equal rewards teach
    assert near(advantages_of(align, monkeypatch, [1, 1, 0, 0], 2), [math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2)
    found = advantages_of(align, monkeypatch, [1, 0, 0, 0, 1, 1, 0, 1], 4)
    assert near(found.mean(), 0.0) and near(found.std(), 1.0)
    assert advantages_of(align, monkeypatch, [0.1] * 8, 2).tolist() == [0.0] * 8     # float32: the mean is not 0.1

def test_maxrl_divides_by_the_mean(variant, monkeypatch):
    found = advantages_of(variant("maxrl"), monkeypatch, [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1], 4)
    assert near(found, [3.0, -1, -1, -1, 1, 1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0])

def test_entropy_bonus_is_the_entropys_gradient_on_average(variant):
    from transformers import AutoModelForCausalLM, LlamaConfig
    align = variant("entropy_bonus")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         initializer_range=0.4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed").eval()
    prompt = [1, 2, 3]
    logits = model(torch.tensor([prompt])).logits[0, -1].float()
    (-0.5 * align.compute_entropy(logits)).backward()               # a loss of −β H
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    # The mean over the token that π samples: each of the 7, with its probability
    model.zero_grad()
    log_probs, entropy, _ = align.get_packed_log_probs(model, [(prompt, [token]) for token in range(7)])
    probabilities = logits.detach().softmax(dim=-1)[:, None]
    (0.5 * probabilities * align.entropy_loss(log_probs, entropy)).sum().backward()
    assert max(grad.abs().max() for grad in expected) > 0.01
    for parameter, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)

def test_entropy_bonus_pushes_up_what_surprises_also_at_advantage_0(variant, monkeypatch):
    _, grad = grpo_update(variant("entropy_bonus"), monkeypatch, [[-3.0, -1.0]], [0.0], "--entropy_coef 0.1",
                          entropy=[[1.0, 1.5]])
    assert near(grad, [[-0.1 * (3 - 1) / 2, 0.1 * (1.5 - 1) / 2]])    # −β · (−log π − H) / |y|

# ---------------------------------------------------------------------------------------------------------------
# Variants: Countdown, LoRA
# ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def countdown_reward(variant):
    """The reward function of a copy of align.py with countdown.patch in it."""
    reward_fn, stop = variant("countdown").reward_fn_and_stop("countdown")
    assert stop == "</answer>"
    return reward_fn

def run_variant(name, flags, steps, folder):
    """A run of a patched copy of align.py in folder/out, which is returned."""
    done = run_script(measure.patched_copy(LAB / f"variants/{name}.patch", folder), flags, steps)
    assert done.returncode == 0, done.stderr
    return folder / "out"

@pytest.mark.parametrize("expression, truth, reward", [
    ("3+5+7", "3 5 7 = 15", 1),
    ("7 + (5 + 3)", "3 5 7 = 15", 1),
    ("(7-5)*3", "3 5 7 = 6", 1),
    ("7-5*3", "3 5 7 = -8", 1),             # * before -
    ("8/(3-8/3)", "3 3 8 8 = 24", 1),       # 8 / (1/3), which is 23.999999999999989 in floats
    ("3+5-7", "3 5 7 = 15", 0),             # it is 1
    ("3+5", "3 5 7 = 8", 0),                # without the 7
    ("3+5+7-7", "3 5 7 = 8", 0),            # the 7 twice
    ("5+5", "5 5 = 10", 1),                 # two fives are given
    ("5+5", "3 5 = 10", 0),
    ("35-7", "3 5 7 = 28", 0),              # 35 is not given
    ("15", "3 5 7 = 15", 0),
    ("3+5+7=15", "3 5 7 = 15", 0),
    ("-3+5+7", "3 5 7 = 9", 0),             # a sign is none of the operations
])
def test_countdown_wants_the_target_from_each_number_once(countdown_reward, expression, truth, reward):
    grades = countdown_reward(f" 1+1=3 </think> <answer> {expression} </answer>", truth)
    assert grades == {"reward": reward, "format_reward": 1, "answer_reward": reward}

@pytest.mark.parametrize("expression", [
    "9**9**9**9", "9" * 5000, "9" * 100, "*".join("9" * 5000), "(" * 2000 + "3" + ")" * 2000, "(" * 49 + "3" + ")" * 49,
    "-" * 90 + "3", "3/(5-5)", "3//5", "3%5", "3<<5", "3 5 7", "3(5)(7)", "(3, 5, 7)", "3.0+5+7", "1e99", "0x3", "007",
    "３+5+7", "3\n+5+7", "3+5+7\x00", "3+5+7#", "\ud800", "print(3)", "__import__('os').abort()", "lambda: 3",
    "[3 for _ in iter(int, 1)]", "a", "'3'", ")", "+", "()", "", "   ", "15 if 3+5+7 else 0", "3+5+7;", "x:=15"])
def test_countdown_gives_hostile_answers_nothing_and_raises_nothing(countdown_reward, expression):
    for truth in ("3 5 7 = 15", "3 5 5 = 1", "3 = 3.5", ""):
        assert countdown_reward(f" </think> <answer> {expression} </answer>", truth)["reward"] == 0

def test_countdown_wants_the_answer_format(countdown_reward):
    assert countdown_reward(" So it is 3+5+7.", "3 5 7 = 15") == {
        "reward": 0, "format_reward": 0, "answer_reward": 0}
    # load_traces asks for the format alone, with no truth
    assert countdown_reward(" </think> <answer> 3+5+7 </answer>", "")["format_reward"] == 1

def test_every_problem_of_countdown_has_an_answer_and_its_documents_know_it(countdown_reward):
    sys.path.insert(0, str(LAB / "variants"))
    import countdown
    assert countdown.expressions((1, 1, 5)) == {
        "1+1+5": ("1+1=2+5", 7), "1+5+1": ("1+5=6+1", 7), "5+1+1": ("5+1=6+1", 7), "5-1-1": ("5-1=4-1", 3),
        "1-1+5": ("1-1=0+5", 5), "1+5-1": ("1+5=6-1", 5), "5+1-1": ("5+1=6-1", 5), "5-1+1": ("5-1=4+1", 5)}
    problems = countdown.make_problems()
    assert len({problem["problem"] for problem in problems}) == len(problems)
    for problem in problems[:100]:
        numbers, _, target = problem["answer"].partition(" = ")
        values = countdown.expressions(tuple(int(number) for number in numbers.split()))
        for text, (_, value) in values.items():
            right = countdown_reward(f" </think> <answer> {text} </answer>", problem["answer"])["reward"]
            assert right == (value == int(target))
        assert int(target) in [value for _, value in values.values()]

def test_countdown_runs(tmp_path):
    problem = '{"problem": "15 from 3, 5, 7", "answer": "3 5 7 = 15"}\n'
    (tmp_path / "problems.jsonl").write_text(problem * 8)
    data = f"--train_data {tmp_path}/problems.jsonl --val_data {tmp_path}/problems.jsonl"
    out = run_variant("countdown", f"--prompt countdown {data}", 1, tmp_path)
    assert len(measure.values_of(out, "train/reward")) == 1

LORA_RUN = "--save_frequency 1 --weight_decay 0.1"       # the decay would show in weights that should not be trained

@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """Three steps with adapters."""
    pytest.importorskip("peft")
    return run_variant("lora", LORA_RUN, 3, tmp_path_factory.mktemp("lora"))

def test_lora_samples_from_the_merged_weights(lora_run):
    gaps = measure.values_of(lora_run, "train/sampler_gap_max")
    assert len(gaps) == 3 and max(gaps) < 1e-4
    assert min(measure.values_of(lora_run, "train/grad_norm")) > 0

def test_lora_changes_each_matrix_by_rank_8_and_nothing_else(lora_run):
    from transformers import AutoModelForCausalLM
    base = dict(AutoModelForCausalLM.from_pretrained(ROOT / "data/arithmetic/base_model").named_parameters())
    for folder in ("checkpoint-1", "final_model"):
        merged = dict(AutoModelForCausalLM.from_pretrained(lora_run / folder).named_parameters())
        assert merged.keys() == base.keys()
        for name, weight in merged.items():
            if "proj" in name:
                sizes = torch.linalg.svdvals((weight - base[name]).double())
                assert sizes[7] > 100 * sizes[8], name      # below are rounding errors
            else:
                assert torch.equal(weight, base[name]), name

def test_lora_resumes_exactly(lora_run):
    whole = measure.content(lora_run)
    shutil.rmtree(lora_run / "final_model")
    shutil.rmtree(lora_run / "checkpoint-2")
    run_variant("lora", f"{LORA_RUN} --resume", 3, lora_run.parent)
    assert measure.content(lora_run) == whole

# ---------------------------------------------------------------------------------------------------------------
# The check for a GPU, on a CPU
# ---------------------------------------------------------------------------------------------------------------

def checked(script, *groups, code):
    """{title: (result, verdict)} of gpu_check.py as a process."""
    done = subprocess.run([sys.executable, script, *groups], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    return {row[0]: (row[1], row[-1]) for row in rows}

def test_all_that_gpu_check_checks_is_right_or_left_out():
    rows = checked(LAB / "gpu_check.py", code=0)
    assert list(rows) == [title for group in gpu_check.GROUPS.values() for title, *_ in group]
    right = [title for title, (_, verdict) in rows.items() if verdict == "ok"]
    assert len(right) >= 8 and all(rows[title][1].startswith("left out: ") for title in set(rows) - set(right))

@pytest.mark.parametrize("file, right, wrong, failed, untouched", [
    ("align.py", "is_causal=True, scale", "is_causal=False, scale", "attention", "log-probs"),
    ("align.py", "scale=scaling)", "scale=1.1 * scaling)", "attention", "log-probs"),
    ("align.py", "largest = logits.amax(dim=1)", "raise MemoryError('no room')", "log-probs", "attention"),
    ("lab/gpu_check.py", "choose_attention(kernel)\n", "__import__('os')._exit(3)\n", "attention", "log-probs")])
def test_gpu_check_sees_what_is_wrong_and_goes_on(file, right, wrong, failed, untouched, tmp_path):
    """`failed`, `untouched`: how the titles of rows begin that must be FAILED or ok."""
    (tmp_path / "lab").mkdir()
    for name in ("align.py", "lab/gpu_check.py", "lab/speed.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / file).read_text()
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong))
    rows = checked(tmp_path / "lab/gpu_check.py", "kernels", code=1)
    assert list(rows) == [title for title, *_ in gpu_check.GROUPS["kernels"]]
    for title, (result, verdict) in rows.items():
        if title.startswith(untouched):
            assert verdict == "ok" or verdict.startswith("left out: "), result
        elif title.startswith(failed):
            assert verdict == "FAILED" or verdict.startswith("left out: "), result
    verdicts = {verdict for _, verdict in rows.values()}
    assert verdicts >= {"ok", "FAILED"}
    assert ("no room" in wrong) == ("MemoryError: no room" in rows["log-probs through the head, bfloat16"][0])

# ---------------------------------------------------------------------------------------------------------------
# What only a GPU does, as far as a CPU can show it
# ---------------------------------------------------------------------------------------------------------------

def flash_attention_by_hand(half_only):
    """flash_attn.flash_attn_func in plain torch, by its documentation: (B, T, heads, D), the key heads' number divides
    the query heads', the causal mask is aligned to the bottom right corner, and it takes half precision only."""
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):
        if half_only and {q.dtype, k.dtype, v.dtype} not in ({torch.float16}, {torch.bfloat16}):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        assert k.shape == v.shape and q.shape[2] % k.shape[2] == 0 and q.stride(-1) == 1 and dropout_p == softcap == 0
        heads = torch.arange(q.shape[2]) // (q.shape[2] // k.shape[2])      # the key head of each query head
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k[:, :, heads].float())
        scores = scores * (q.shape[-1]**-0.5 if softmax_scale is None else softmax_scale)
        if causal:
            row, column = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
            scores = scores.masked_fill(column > row + k.shape[1] - q.shape[1], -math.inf)
        weights = scores.softmax(dim=-1)
        flash_attn_func.calls += 1
        return torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :, heads].float()).to(q.dtype)

    flash_attn_func.calls = 0
    return flash_attn_func

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pairs", [PAIRS, [([3], [4, 5, 6])], [([3], [4, 1])] * 9,
                                   [([1, 2, 4], [4 + i % 5] * (i + 1)) for i in range(9)]])
def test_the_update_through_flash_attention_is_the_one_of_eager_attention(dtype, pairs, monkeypatch):
    flash_attention = flash_attention_by_hand(half_only=dtype == "bfloat16")
    monkeypatch.setattr(align, "flash_attn_func", flash_attention)
    dtypes, found = [], {}
    monkeypatch.setattr(align, "use_flash_attn", lambda tensor: dtypes.append(tensor.dtype) or True)
    for kind, function, attention, autocast in (
            ("exact", plain_log_probs, "eager", False), ("rounded", plain_log_probs, "eager", dtype == "bfloat16"),
            ("packed", functools.partial(align.get_packed_log_probs, dtype=dtype), "packed", False)):
        model = random_model(11, attention=attention, **GROUPED)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            log_probs, _, mask = function(model, pairs)
        log_probs[mask].square().sum().backward()
        found[kind] = log_probs.detach(), gradients(model)
    assert flash_attention.calls == 2 and dtypes == [getattr(torch, dtype)] * 2     # once in each layer
    for exact, rounded, packed in zip(*found.values()):
        if dtype == "float32":
            assert close(packed, exact)
        else:       # no further off than whole rows in bfloat16
            assert (packed - exact).norm() <= 2 * (rounded - exact).norm()

class CountWaits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations for which a program waits until a GPU has computed their arguments."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function.name() == "aten::index.Tensor" and any(i.dtype == torch.bool for i in args[1] if i is not None)
        self.count += by_mask or function.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        return function(*args, **(kwargs or {}))

def test_an_update_waits_for_the_device_at_most_once_per_microbatch():
    waits = {}
    for n in (1, 6):
        run = make_run(random_model(11), None, loss_type="grpo_clip", gradient_accumulation_steps=n)
        batch = {"pairs": PAIRS, "raw_rewards": WEIGHTS, "advantages": WEIGHTS + 2}
        batch["old_log_probs"] = align.compute_old_log_probs(run, PAIRS)
        with CountWaits() as waits[n]:
            align.grpo_update(run, batch, [3, 0, 5, 1, 4, 2], step=1)
    assert 0 < waits[6].count <= waits[1].count + 5

@pytest.mark.parametrize("vllm", [
    "raise ImportError('undefined symbol')", "def LLM(*_, **__): raise AssertionError('memory profiling')"])
def test_binaries_that_do_not_fit_end_in_one_sentence(tmp_path, vllm):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")    # training goes without it
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info/METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    (tmp_path / "vllm.py").write_text(vllm)
    done = subprocess.run(
        [sys.executable, "align.py", "--algo", "eval", "--preset", "tiny", "--sampler", "vllm"], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.match("align.py: vLLM cannot serve .*(undefined symbol|memory profiling).*--sampler torch", done.stderr)
