"""The command line: train every method with every learning rate, and show what was found."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sparseadam.bench.arguments import whole_number
from sparseadam.bench.report import origin

from ..command_line import RecipeError, check_writable, exit_code
from .measure import measure
from .methods import DENSE
from .pictures import draw
from .report import build_sheets
from .results import Results, ResultsFile
from .tasks import EPOCHS, TASKS, build_task

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DEFAULT_TASKS, QUICK_TASKS = ("retail-2048", "retail-256", "wn18rr"), ("retail-2048", "codex-s")
RATES, QUICK_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (3e-3, 1e-2)
NUM_SEEDS, QUICK_SEEDS = 3, 1
QUICK_EPOCHS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return the exit code."""
    return exit_code("missed_steps", lambda: run(parse_arguments(arguments)), stopped="stopped; run it again to go on.")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; argparse ends the program where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.missed_steps",
        description="Train with dense Adam and with SparseAdam, its missed steps skipped and replayed, and show what "
        "differs. Runs are kept as they end: what --out has already is not trained again.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, help=f"what to train (default: {', '.join(DEFAULT_TASKS)})")
    add("--seeds", type=whole_number(1, 1000), help=f"runs at the best learning rate (default: {NUM_SEEDS})")
    add("--epochs", type=whole_number(1, 10_000), help=f"times the data is read in each run (default: {EPOCHS})")
    add("--quick", action="store_true", help="a few runs on small tasks, to see that it works")
    add("--data", type=Path, default=DATA, help="directory of the data (default: shared/data beside the checkout)")
    add("--out", type=Path, default=Path("demo_output"), help="directory for the files written (default: demo_output)")
    add("--report", type=Path, help="show what this file of results holds, and train nothing")
    add("--threads", type=whole_number(1, 1024), help="threads of torch (default: as many as it takes itself)")
    options = parser.parse_args(arguments)
    if options.report is not None:
        for flag in ("tasks", "seeds", "epochs", "quick", "threads"):
            if getattr(options, flag):
                parser.error(f"argument --{flag}: not allowed with --report, which trains nothing")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, then report on the terminal and in the files of the output directory."""
    console = Console()
    check_writable(options.out)
    if options.report is not None:
        if not options.report.is_file():
            raise RecipeError(f"there is no file {options.report}; pass --report with the results of an earlier run.")
        file = ResultsFile(options.report)
        all_results = list(file)
        if not all_results:
            raise RecipeError(f"{options.report} holds no results; pass --report with those of an earlier run.")
        for results in all_results:
            if DENSE.name not in results.methods():
                raise RecipeError(f"{options.report} has no run of {DENSE.name} on {results.name}; train it first.")
    else:
        file = ResultsFile(options.out / "missed_steps.jsonl")
        all_results = train_all(console, file, options)
    for record in file.origins[:1]:
        console.print(origin(record))
    show(console, all_results, options.out)


def train_all(console: Console, file: ResultsFile, options: argparse.Namespace) -> list[Results]:
    """Train what the flags ask for and the file lacks."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = options.tasks or (QUICK_TASKS if options.quick else DEFAULT_TASKS)
    epochs = options.epochs or (QUICK_EPOCHS if options.quick else EPOCHS)
    num_seeds = options.seeds or (QUICK_SEEDS if options.quick else NUM_SEEDS)
    rates = QUICK_RATES if options.quick else RATES
    # All data is read first: what is missing is said before hours of work.
    tasks = [build_task(name, options.data, epochs) for name in dict.fromkeys(names)]
    return [measure(task, file, rates, num_seeds, console.print) for task in tasks]


def show(console: Console, all_results: list[Results], directory: Path) -> None:
    """Print all tables, and write them and the picture."""
    text_path, picture_path = directory / "missed_steps.md", directory / "missed_steps.png"
    sheets = build_sheets(all_results)
    for sheet in sheets:
        console.print(sheet.to_terminal())
    try:
        text_path.write_text("\n\n".join(f"{sheet.title}\n\n{sheet.to_markdown()}" for sheet in sheets) + "\n", "utf-8")
        draw(all_results, picture_path)
    except OSError as error:
        raise RecipeError(f"cannot write to {directory}: {error.strerror or error}.") from error
    console.print(f"Wrote {text_path} and {picture_path}")
