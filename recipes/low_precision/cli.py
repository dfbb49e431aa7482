"""The command line: train every variant, and show what it saves and costs."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sparseadam.bench.arguments import HelpWithDefaults, whole_number

from ..command_line import RecipeError, check_writable, exit_code
from ..word_vectors.cli import WORDNET, build_batches
from ..word_vectors.cli import parse_arguments as parse_word_vector_arguments
from ..word_vectors.corpus import read_corpus
from ..word_vectors.model import SkipGram
from ..word_vectors.vectors import find_wordsim, read_judged_pairs
from .pictures import draw
from .results import Results, by_variant, correlation_differences, gains, loss_differences, step_ratio, write_json
from .runs import Run, Task, continue_variant, losses_without_training, mean_of_last, train_variant
from .small_changes import NUM_STEPS, STEP_IN_SPACINGS, SmallChanges, measure_all
from .steps import StepComparison, compare_steps
from .variants import BASELINE, CONTINUED, TRAINED

# Flags of the word-vector recipe; what is not named here is as it is there.
QUICK = ["--dim", "32", "--batch", "1024", "--steps", "60"]
ROUNDS, QUICK_ROUNDS = 300, 10
CONTINUED_STEPS, QUICK_CONTINUED_STEPS = 260, 30  # 260: half an epoch
CONTINUED_LR = 0.0003  # a fiftieth of the recipe's
COMPARISON_SEED_OFFSET = 20_000  # batches that no run was trained on
NUM_SEEDS = 3
EPOCHS = 2  # the word-vector recipe itself takes 6
NOT_MEASURED = "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return the exit code."""
    return exit_code("low_precision", lambda: run(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; argparse ends the program where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.low_precision",
        description="Train word vectors with moments and tables of fewer bits, and show what that saves and costs.",
        formatter_class=HelpWithDefaults,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=whole_number(1, 1000), default=NUM_SEEDS, help="runs of each variant")
    add("--epochs", type=whole_number(1, 10_000), default=EPOCHS, help="times the text is read in each run")
    add("--quick", action="store_true", help="one seed and a few small steps, to see that it works")
    add("--out", type=Path, default=Path("demo_output"), help="directory for the files written")
    add("--threads", type=whole_number(1, 1024), help="threads of torch (default: as many as it takes itself)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, then report on the terminal and in the files of the output directory."""
    console = Console()
    check_writable(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    flags = QUICK if options.quick else ["--epochs", str(options.epochs)]
    settings = parse_word_vector_arguments([*flags, "--corpus", str(WORDNET)])
    corpus = read_corpus(settings.corpus, settings.min_count)
    wordsim = find_wordsim()
    task = Task(corpus, settings, read_judged_pairs(wordsim) if wordsim else None)
    print_task(console, task)

    results = measure(console, task, 1 if options.quick else options.seeds, is_quick=options.quick)
    print_quality(console, results.trained)
    print_cost(console, results.trained, results.steps)
    print_moment_errors(console, results.steps)
    print_continued(console, results)
    print_small_changes(console, results.small_changes)
    write_files(console, results, task, options.out)


def measure(console: Console, task: Task, num_seeds: int, *, is_quick: bool) -> Results:
    """Train every variant with every seed, train on from each baseline, and time the steps on the last one."""
    trained: list[Run] = []
    continued: list[Run] = []
    untrained_losses: list[list[float]] = []
    continued_steps = QUICK_CONTINUED_STEPS if is_quick else CONTINUED_STEPS
    for seed in range(num_seeds):
        for variant in TRAINED:
            console.print(f"seed {seed}, {variant.name}")
            outcome, model = train_variant(task, variant, seed)
            trained.append(outcome)
            if variant is BASELINE:
                baseline = model
        untrained_losses.append(losses_without_training(task, baseline, seed, continued_steps))
        for variant in CONTINUED:
            console.print(f"seed {seed}, training on with a small learning rate, {variant.name}")
            continued.append(
                continue_variant(task, variant, baseline, seed, lr=CONTINUED_LR, num_steps=continued_steps)
            )
    steps = time_steps(task, baseline, QUICK_ROUNDS if is_quick else ROUNDS)
    return Results(trained, continued, untrained_losses, steps, measure_all())


def time_steps(task: Task, model: SkipGram, rounds: int) -> StepComparison:
    """Step all variants through batches that no run has seen."""
    batches = build_batches(task.corpus, task.settings, COMPARISON_SEED_OFFSET)
    return compare_steps(model, batches, rounds=rounds, lr=task.settings.lr, seed=0)


# --- What came of it ----------------------------------------------------------------------------


def print_task(console: Console, task: Task) -> None:
    """Say what is trained."""
    settings = task.settings
    length = f"{settings.epochs} epochs" if settings.steps is None else f"{settings.steps} steps"
    console.print(
        f"[bold]{settings.corpus.name}[/]: {len(task.corpus.vocabulary):,} words in the vocabulary, vectors of "
        f"{settings.dim}, {length}, lr {settings.lr:g}, {torch.get_num_threads()} threads"
    )
    if task.judged_pairs is None:
        console.print("WordSim-353 is not here, so the vectors go unjudged: it comes with gensim (pip install gensim).")


def print_quality(console: Console, runs: list[Run]) -> None:
    """Print the quality of every variant trained from the start."""
    num_seeds = len({run.seed for run in runs})
    table = _table(
        f"Trained from the start for {len(runs[0].losses):,} steps, seeds: {num_seeds}; means, and differences from "
        "float32 at the same seed ± half their range",
        ("final loss", "difference", "WordSim-353", "difference"),
    )
    losses, correlations = loss_differences(runs), correlation_differences(runs)
    for name, those in by_variant(runs).items():
        table.add_row(
            name,
            f"{statistics.fmean(run.final_loss for run in those):.4f}",
            _spread(losses[name]),
            _mean_correlation(those),
            _spread(correlations[name]),
        )
    console.print(table)


def print_cost(console: Console, runs: list[Run], steps: StepComparison) -> None:
    """Print bytes and time of every variant."""
    table = _table(
        f"What it takes: bytes at the end of training, time over {len(steps.step_ms[BASELINE.name])} interleaved steps",
        ("tables, MB", "state, MB", "step, ms", "ratio"),
    )
    for name, those in by_variant(runs).items():
        table.add_row(
            name,
            _megabytes(those[0].table_bytes),
            _megabytes(statistics.fmean(run.moment_bytes for run in those)),
            *_step_time(steps, name),
        )
    console.print(table)


def print_moment_errors(console: Console, steps: StepComparison) -> None:
    """Say what fewer bits do to the moments and, through the second one, to the length of steps."""
    for name, errors in steps.moment_errors.items():
        console.print(
            f"{name}: first moments {errors.exp_avg_error:.1%} off (root mean square); second moments make steps "
            f"{errors.longer_steps:+.2%} longer on average, with a standard deviation of {errors.step_spread:.1%}"
        )


def print_continued(console: Console, results: Results) -> None:
    """Print what training on with a small learning rate gains for tables of half precision."""
    runs = results.continued
    untrained = statistics.fmean(map(mean_of_last, results.untrained_losses))
    table = _table(
        f"Trained on from float32 for {len(runs[0].losses)} steps, lr {CONTINUED_LR:g} at the start; without, the "
        f"final loss is {untrained:.4f}",
        ("final loss", "gain", "of float32's", "tables, MB", "step, ms", "ratio"),
    )
    found = gains(results)
    float32_gain = statistics.fmean(found[BASELINE.name])
    for name, those in by_variant(runs).items():
        gain = statistics.fmean(found[name])
        table.add_row(
            name,
            f"{statistics.fmean(run.final_loss for run in those):.4f}",
            _spread(found[name]),
            f"{gain / float32_gain:.0%}",
            _megabytes(those[0].table_bytes),
            *_step_time(results.steps, name),
        )
    console.print(table)


def print_small_changes(console: Console, all_changes: list[SmallChanges]) -> None:
    """Print how far weights came whose updates are a sixteenth of the distance to the next weight."""
    table = _table(
        f"{NUM_STEPS} steps of {STEP_IN_SPACINGS:g} of the distance to the next weight: distances moved, of "
        f"{NUM_STEPS * STEP_IN_SPACINGS:g}",
        ("mean", "10 to 90 % of weights"),
    )
    for changes in all_changes:
        table.add_row(changes.name, f"{changes.mean[-1]:.2f}", f"{changes.low[-1]:.1f} to {changes.high[-1]:.1f}")
    console.print(table)


def write_files(console: Console, results: Results, task: Task, directory: Path) -> None:
    """Write the figures and the picture."""
    json_path, picture_path = directory / "low_precision.json", directory / "low_precision.png"
    try:
        write_json(results, task, json_path)
        draw(results, picture_path)
    except OSError as error:
        raise RecipeError(f"cannot write to {directory}: {error.strerror or error}.") from error
    console.print(f"Wrote {json_path} and {picture_path}")


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("variant", style="bold", min_width=16)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")  # nothing is lost in a narrow terminal
    return table


def _spread(differences: list[float]) -> str:
    if not differences:
        return NOT_MEASURED
    half_range = (max(differences) - min(differences)) / 2
    return f"{statistics.fmean(differences):+.4f} ± {half_range:.4f}"


def _mean_correlation(runs: list[Run]) -> str:
    found = [run.correlation for run in runs if run.correlation is not None]
    return f"{statistics.fmean(found):.4f}" if found else NOT_MEASURED


def _step_time(steps: StepComparison, name: str) -> tuple[str, str]:
    return f"{statistics.median(steps.step_ms[name]):.2f}", f"{step_ratio(steps, name):.2f}"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f}"
