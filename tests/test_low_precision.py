"""The low-precision recipe: what it compares is equal but for the variant, its figures by hand, a short run."""

import gzip
import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for package in ("numpy", "scipy", "sklearn", "matplotlib", "adjustText", "rich"):
    pytest.importorskip(package, reason="needs the recipes extra: pip install '.[recipes]'")

import torch  # noqa: E402  (after the skip)

from recipes.command_line import RecipeError  # noqa: E402
from recipes.low_precision import cli, results, small_changes, steps, variants  # noqa: E402
from recipes.low_precision.results import Run  # noqa: E402
from recipes.low_precision.runs import Task, continue_variant, losses_without_training, train_variant  # noqa: E402
from recipes.low_precision.steps import StepComparison, compare_steps  # noqa: E402
from recipes.low_precision.variants import BASELINE, Variant  # noqa: E402
from recipes.word_vectors import training  # noqa: E402
from recipes.word_vectors.cli import WORDNET, build_batches, build_model, parse_arguments  # noqa: E402
from recipes.word_vectors.comparison import Contender  # noqa: E402
from recipes.word_vectors.corpus import read_corpus  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LINES_OF_SLICE = 3000
SETTINGS = ["--dim", "16", "--batch", "512", "--lr", "0.05", "--steps", "40"]
JUDGED_PAIRS = [("animal", "plant", 5.0), ("person", "animal", 4.0), ("person", "water", 1.0)]
BY_NAME = {variant.name: variant for variant in variants.TIMED}


@pytest.fixture(scope="module")
def text_slice(tmp_path_factory):
    """Cut a small real text from the one the recipes ship."""
    path = tmp_path_factory.mktemp("text") / "slice.txt"
    with gzip.open(WORDNET, "rt", encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, LINES_OF_SLICE)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(text_slice):
    return Task(read_corpus(text_slice, min_count=2), parse_arguments(SETTINGS), JUDGED_PAIRS)


@pytest.fixture(scope="module")
def trained(task):
    """Every variant that is trained from the start: its run and its model."""
    return {variant.name: train_variant(task, variant, seed=0) for variant in variants.TRAINED}


# --- Runs ---------------------------------------------------------------------------------------


def test_the_baseline_is_the_word_vector_recipe_itself(task, trained):
    torch.manual_seed(0)
    model = build_model(task.corpus, task.settings.dim)
    optimizer = training.build_optimizer("sparseadam", model.parameters(), task.settings.lr)
    batches = build_batches(task.corpus, task.settings, 0)
    history = training.train(model, optimizer, batches, total_steps=40, words_per_step=1)
    run, ours = trained[BASELINE.name]
    assert run.losses == history.losses
    assert torch.equal(ours.centers.weight, model.centers.weight)
    assert run.moment_bytes == optimizer.moment_bytes()


def test_variants_differ_in_nothing_but_precision(trained):
    baseline = trained[BASELINE.name][0]
    for run, _ in trained.values():
        # The first loss is log(2) for each of 17 dot products with contexts of zero, whatever the centers.
        assert run.losses[0] == baseline.losses[0]
        # The next ones come from the same batches: other batches would make a difference of several percent.
        assert run.losses[1] == pytest.approx(baseline.losses[1], rel=5e-3)
        assert run.losses[-1] < 0.9 * run.losses[0]
    # And each of them is a variant indeed.
    assert len({tuple(run.losses) for run, _ in trained.values()}) == len(variants.TRAINED)


def test_other_seeds_give_other_batches(task, trained):
    assert train_variant(task, BASELINE, seed=1)[0].losses != trained[BASELINE.name][0].losses


def test_the_seed_fixes_stochastic_rounding(task, trained):
    name = "bfloat16 table, stochastic"
    assert train_variant(task, BY_NAME[name], seed=0)[0] == trained[name][0]


def test_bytes_are_those_of_the_dtypes(trained):
    moments = {name: run.moment_bytes for name, (run, _) in trained.items()}
    run, model = trained[BASELINE.name]
    num_rows, dim = model.centers.weight.shape
    # Moments and an int64 row number for each slot, and an index of int32 for each row of both tables.
    num_slots = (run.moment_bytes - 2 * 4 * num_rows) // (2 * 4 * dim + 8)
    rest = num_slots * 8 + 2 * 4 * num_rows
    assert moments[BASELINE.name] == num_slots * 2 * 4 * dim + rest
    assert moments["bfloat16 moments"] == num_slots * 2 * 2 * dim + rest
    assert moments["8-bit moments"] == num_slots * 2 * (dim + 4) + rest
    assert moments["one v a row"] == num_slots * (4 * dim + 4) + rest
    assert moments["one v a row, 8-bit m"] == num_slots * (dim + 4 + 4) + rest
    assert moments["bfloat16 table, stochastic"] == moments[BASELINE.name]
    for name, (run, _) in trained.items():
        assert run.table_bytes == 2 * num_rows * dim * (2 if "table" in name else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tables_are_widened_for_the_loss(dtype, task):
    torch.manual_seed(0)
    model = build_model(task.corpus, task.settings.dim)
    Variant("half", dtype).store_tables(model)
    loss = model(next(iter(build_batches(task.corpus, task.settings, 0))))
    loss.backward()
    assert loss.dtype is torch.float32
    for table in model.parameters():
        assert table.dtype is table.grad.dtype is dtype


def test_training_on_starts_where_the_first_run_ended(task, trained):
    _, model = trained[BASELINE.name]
    before = [table.detach().clone() for table in model.parameters()]
    run = continue_variant(task, BASELINE, model, seed=0, lr=1e-4, num_steps=3)
    untrained = losses_without_training(task, model, seed=0, num_steps=3)
    assert run.losses[0] == untrained[0]
    assert len(run.losses) == len(untrained) == 3
    assert all(loss < other for loss, other in zip(run.losses[1:], untrained[1:], strict=True))
    first_batch = next(iter(build_batches(task.corpus, task.settings, 0)))
    assert model(first_batch).item() / len(first_batch.centers) not in untrained
    for table, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(table, kept)


def test_small_learning_rates_need_stochastic_rounding(task, trained):
    """What 60 steps with lr 2e-4 gain over none, on the same batches."""
    _, model = trained[BASELINE.name]
    names = (BASELINE.name, "bfloat16 table, stochastic", "bfloat16 table, nearest")
    runs = [continue_variant(task, BY_NAME[name], model, seed=0, lr=2e-4, num_steps=60) for name in names]
    untrained = losses_without_training(task, model, seed=0, num_steps=60)
    measured = results.Results([], runs, [untrained], StepComparison({}, {}), [])
    exact, stochastic, nearest = (gain for (gain,) in results.gains(measured).values())
    assert exact > 0
    assert stochastic == pytest.approx(exact, rel=0.05)
    assert nearest < 0.5 * exact


# --- Steps --------------------------------------------------------------------------------------


def test_steps_are_compared_on_the_same_gradients(task, trained):
    _, model = trained[BASELINE.name]
    before = [table.detach().clone() for table in model.parameters()]
    comparison = compare_steps(model, build_batches(task.corpus, task.settings, 1), rounds=4, lr=0.01, seed=0)
    assert {name: len(times) for name, times in comparison.step_ms.items()} == {name: 4 for name in BY_NAME}
    assert set(comparison.moment_errors) == {"bfloat16 moments", "8-bit moments"}
    # One rounding errs by sqrt(p(1-p)) <= 1/2 of a spacing, and a spacing is at most 2**-7 of a bfloat16 and 2**-3 of a
    # code; b1 = 0.9 leaves sqrt(1/(1 - 0.81)) = 2.3 times that.
    for name, spacing in (("bfloat16 moments", 2**-7), ("8-bit moments", 2**-3)):
        errors = comparison.moment_errors[name]
        assert spacing / 20 < errors.exp_avg_error < 2.3 * spacing / 2
        assert 0 < errors.step_spread < 24 * spacing / 2 / 2  # 24 roundings that hardly decay, of a root
        assert abs(errors.longer_steps) < errors.step_spread / 4
    for table, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(table, kept)


def test_longer_steps_are_those_of_the_root_of_the_second_moment():
    """A second moment set to a quarter makes steps twice as long, and a first one set to half is half off."""
    contenders = []
    for share in (1.0, 0.25):
        table = torch.nn.Parameter(torch.zeros(4, 3))
        optimizer = BASELINE.build_optimizer([table], lr=0.1, seed=0)
        table.grad = torch.ones(4, 3).to_sparse(1)
        optimizer.step()
        optimizer.state[table]["exp_avg_sq"].mul_(share)
        optimizer.state[table]["exp_avg"].mul_(share**0.5)
        contenders.append(Contender([table], optimizer))
    errors = steps._moment_errors(*contenders, touched=[torch.tensor([0, 2])])
    assert errors == steps.MomentErrors(
        exp_avg_error=pytest.approx(0.5), longer_steps=pytest.approx(1.0), step_spread=pytest.approx(0.0)
    )


def test_the_seed_is_the_optimizers_own():
    """What was drawn from torch's default generator before does not matter."""
    table = torch.nn.Parameter(torch.zeros(2, 2))
    seeds = [BY_NAME["8-bit moments"].build_optimizer([table], 0.1, seed).param_groups[0]["seed"] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_ratios_are_taken_within_rounds():
    # Ratios 2, 3 and 2: their median is neither their mean nor the ratio of the medians, 3.
    comparison = StepComparison({BASELINE.name: [1.0, 2.0, 4.0], "other": [2.0, 6.0, 8.0]}, {})
    assert results.step_ratio(comparison, "other") == 2.0
    assert results.step_ratio(comparison, BASELINE.name) == 1.0


# --- Small changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_changes_are_lost_to_nearest_and_kept_by_chance(dtype):
    nearest = small_changes.measure_small_changes(dtype, stochastic_rounding=False)
    stochastic = small_changes.measure_small_changes(dtype, stochastic_rounding=True)
    assert set(nearest.mean) == set(nearest.low) == set(nearest.high) == {0.0}
    # Each weight takes 256 chances of 1/16: 16 spacings, with a standard deviation of sqrt(256 * 1/16 * 15/16) = 3.87
    # and, over 1024 weights, one of 0.121 of the mean.
    assert stochastic.mean[-1] == pytest.approx(16, abs=4 * 0.121)
    # Of the binomial distribution, the tenth percentile is 11 and the ninetieth 21.
    assert stochastic.low[-1] == pytest.approx(11, abs=1)
    assert stochastic.high[-1] == pytest.approx(21, abs=1)


def test_small_changes_are_the_same_each_time_and_others_with_another_seed():
    first, again, other = (
        small_changes.measure_small_changes(torch.bfloat16, stochastic_rounding=True, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.mean != other.mean


# --- Results ------------------------------------------------------------------------------------


def made_up_run(name, seed, loss, correlation):
    return Run(name, seed, [9.0] * 95 + [loss] * 5, correlation, 1, 1)


def test_the_final_loss_is_the_mean_of_the_last_twentieth():
    run = Run("any", 0, [*range(100)], None, 1, 1)
    assert run.final_loss == statistics.fmean([95, 96, 97, 98, 99])
    assert Run("any", 0, [3.0, 2.0], None, 1, 1).final_loss == 2.0


def test_differences_are_taken_at_the_same_seed():
    runs = [
        made_up_run(BASELINE.name, 0, 3.0, 0.5),
        made_up_run("other", 0, 3.5, 0.75),
        made_up_run(BASELINE.name, 1, 5.0, 0.25),
        made_up_run("other", 1, 4.75, 0.75),
    ]
    assert results.loss_differences(runs) == {BASELINE.name: [0.0, 0.0], "other": [0.5, -0.25]}
    assert results.correlation_differences(runs) == {BASELINE.name: [0.0, 0.0], "other": [0.25, 0.5]}
    assert results.correlation_differences([made_up_run(BASELINE.name, 0, 3.0, None)]) == {BASELINE.name: []}


# --- The whole recipe ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, text_slice):
    """Make a quick run quicker still."""
    monkeypatch.setattr(cli, "WORDNET", text_slice)
    monkeypatch.setattr(cli, "QUICK", ["--dim", "8", "--batch", "256", "--steps", "4"])
    monkeypatch.setattr(cli, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(cli, "QUICK_CONTINUED_STEPS", 3)
    monkeypatch.setenv("COLUMNS", "200")


def test_a_quick_run_reports_and_writes_what_it_measured(quick, tmp_path, capsys):
    out = tmp_path / "made" / "for_it"
    assert cli.main(["--quick", "--out", str(out)]) == 0
    report = capsys.readouterr().out
    for part in (*BY_NAME, "float16, nearest", "standard deviation", "low_precision.png"):
        assert part in report
    assert (out / "low_precision.png").read_bytes().startswith(b"\x89PNG\r\n")

    written = (out / "low_precision.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in written
    content = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [record["variant"] for record in content["trained"]] == [variant.name for variant in variants.TRAINED]
    assert [record["variant"] for record in content["continued"]] == [variant.name for variant in variants.CONTINUED]
    assert {record["num_steps"] for record in content["trained"]} == {4}
    assert set(content["step_ms"]) == set(content["step_ratio"]) == set(BY_NAME)
    assert content["origin"]["torch"] == torch.__version__
    assert len(content["small_changes"]) == 4


def test_without_wordsim_the_vectors_go_unjudged(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_wordsim", lambda: None)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 0
    report = capsys.readouterr().out
    assert "pip install gensim" in report
    assert cli.NOT_MEASURED in report
    content = json.loads((tmp_path / "low_precision.json").read_text(encoding="utf-8"))
    assert {record["correlation"] for record in content["trained"]} == {None}


def test_every_seed_is_trained_with_every_variant(task, monkeypatch):
    trained, continued = [], []

    def train(task, variant, seed):
        trained.append((seed, variant.name))
        return made_up_run(variant.name, seed, 1.0, None), f"{variant.name} of seed {seed}"

    def train_on(task, variant, model, seed, **_):
        continued.append((seed, variant.name, model))
        return made_up_run(variant.name, seed, 1.0, None)

    monkeypatch.setattr(cli, "train_variant", train)
    monkeypatch.setattr(cli, "continue_variant", train_on)
    monkeypatch.setattr(cli, "losses_without_training", lambda task, model, seed, num_steps: [float(seed)])
    monkeypatch.setattr(cli, "time_steps", lambda task, model, rounds: model)
    monkeypatch.setattr(cli, "measure_all", list)
    measured = cli.measure(cli.Console(quiet=True), task, 2, is_quick=True)
    assert trained == [(seed, variant.name) for seed in (0, 1) for variant in variants.TRAINED]
    assert continued == [
        (seed, variant.name, f"{BASELINE.name} of seed {seed}") for seed in (0, 1) for variant in variants.CONTINUED
    ]
    assert measured.untrained_losses == [[0.0], [1.0]]
    assert measured.steps == f"{BASELINE.name} of seed 1"


# --- Complaints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--epochs", "-1"], ["--threads", "many"], ["--colour", "red"]])
def test_bad_flags_are_refused_by_name(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*flags, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_unwritable_output_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "read_corpus", lambda *_: pytest.fail("began to work"))
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["--quick", "--out", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"low_precision: cannot write to {file}: ")
    assert said.count("\n") == 1


def test_a_loss_that_is_not_finite_is_said_in_a_sentence(quick, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RecipeError("the loss became nan at step 1; pass a smaller --lr.")

    monkeypatch.setattr(cli, "train_variant", fail)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "low_precision: the loss became nan at step 1; pass a smaller --lr.\n"
