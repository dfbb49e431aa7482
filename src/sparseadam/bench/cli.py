"""The command line of ``python -m sparseadam``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from .._memory import is_out_of_memory
from .._validate import TABLE_DTYPES
from .arguments import whole_number
from .cases import CASES, Case, case_named, row_source
from .errors import BenchError, UsageError
from .machine import facts
from .measure import SECONDS_PER_CASE, Result, measure
from .report import COLUMNS, HOW, Record, notes, origin, record_of, write_csv, write_json_lines
from .terminal import TerminalTable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TABLE_DTYPES}
_DISTRIBUTIONS = ("zipf", "uniform")
# What describes the user's own case, and what is taken where only some of it is given.
_OWN = {"tables": 1, "rows": 1_000_000, "dim": 64, "lookups": 65_536, "distribution": "zipf", "dtype": "float32"}
# Where output goes to a file or a pipe, lines are not broken at the width of a terminal that is not there.
_WIDTH_OF_FILES = 180


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 for what went wrong, 2 for what was asked wrongly."""
    try:
        run_bench(parse_arguments(arguments))
    except BenchError as error:
        print(f"sparseadam: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sparseadam: stopped.", file=sys.stderr)
        return 130
    return 0


# What was asked -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help.")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check every flag; ``cases`` of what is returned holds the cases to measure.

    Raises:
        UsageError: a flag is unknown, or its value cannot be.
    """
    parser = _Parser(prog="python -m sparseadam", description="Adam for embedding tables.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure a step on this machine",
        description="Measure a step of sparseadam.SparseAdam against torch.optim.SparseAdam, against "
        "torch.optim.Adam(fused=True) on a dense gradient, and against the time that the memory of this machine takes "
        "to move the bytes that must move. Without arguments, all cases of the project's own table are measured; that "
        "takes some minutes.",
    )
    _add_flags(bench)
    options = parser.parse_args(arguments)
    options.cases = _cases(options)
    for path in (options.json, options.csv, options.plot):
        _check_writable(path)
    return options


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="measure this case only; may be repeated")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the tables are, and all that is compared; cuda is PyTorch's name for ROCm devices too (default: "
        "cpu, for which alone aims are shown)",
    )
    parser.add_argument(
        "--threads", type=whole_number(1, 1024), help="threads of torch, which are ours (default: torch's)"
    )
    rounds = f"rounds a case (default: what {SECONDS_PER_CASE} seconds allow)"
    parser.add_argument("--rounds", type=whole_number(1, 100_000), help=rounds)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a JSON line a case")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the same as CSV")
    parser.add_argument("--plot", type=_png, metavar="FILE.png", help="draw a plot")
    own = parser.add_argument_group("your own case", "any of these measures a case of your own instead of the table")
    add = own.add_argument
    add(
        "--tables",
        type=whole_number(1, 10_000),
        metavar="N",
        help=f"tables stepped at once (default: {_OWN['tables']})",
    )
    add("--rows", type=whole_number(1, 2**40), metavar="N", help=f"rows of each (default: {_OWN['rows']})")
    add("--dim", type=whole_number(1, 2**24), metavar="N", help=f"elements of a row (default: {_OWN['dim']})")
    add("--lookups", type=whole_number(1, 2**31), metavar="N", help=f"lookups into each (default: {_OWN['lookups']})")
    add("--dtype", choices=_DTYPES, help=f"of the tables (default: {_OWN['dtype']})")
    add(
        "--distribution",
        metavar="zipf|uniform|FILE",
        help="how lookups fall on rows: zipf (exponent 1.05), uniform, or as in a text file of row numbers separated "
        "by white space, taken in order, by every table from the start and at the end from the start again "
        f"(default: {_OWN['distribution']})",
    )


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


def _cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that were asked for, those of a user's own with their rows checked."""
    given = {name: getattr(options, name) for name in _OWN if getattr(options, name) is not None}
    if not given:
        return [case_named(name) for name in dict.fromkeys(options.case)] if options.case else list(CASES)
    if options.case:
        raise UsageError(f"--case cannot be combined with --{next(iter(given))}; ask for one of the two.")
    own = {**_OWN, **given}
    if own["distribution"] not in _DISTRIBUTIONS:
        row_source(own["distribution"], own["rows"], seed=0)
    case = Case(
        "own", own["tables"], own["rows"], own["dim"], own["lookups"], own["distribution"], _DTYPES[own["dtype"]]
    )
    return [case]


def _check_writable(path: Path | None) -> None:
    """Prove that a file can be written before minutes are spent on what it is to hold."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror or error}.") from None


# What is done -------------------------------------------------------------------------------------


def require(module: str) -> None:
    """Refuse where an optional dependency is missing.

    Raises:
        BenchError: it is; the message says what to install.
    """
    try:
        importlib.import_module(module)
    except ImportError:
        raise BenchError(
            f"this needs {module.partition('.')[0]}, which is not installed; run pip install rich matplotlib."
        ) from None


def run_bench(options: argparse.Namespace) -> None:
    """Measure, show, and write the files that were asked for.

    Raises:
        BenchError: what the user can do something about.
    """
    require("rich")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(
            "PyTorch finds no CUDA or ROCm device; install a build of it that does, or measure without --device cuda."
        )
    if options.plot is not None:
        require("matplotlib.figure")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    records = _measure_all(options.cases, options.rounds, options.json, device)
    _show(records)
    if options.csv is not None:
        _write(options.csv, write_csv, records)
    if options.plot is not None:
        from .plot import draw

        _write(options.plot, lambda path, drawn: draw(drawn, path), records)


def _measure_all(
    cases: Sequence[Case], num_rounds: int | None, json_path: Path | None, device: torch.device
) -> list[Record]:
    """Measure one case after the other; what is done is in the file even if a later one fails."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[case]}"), TimeElapsedColumn())
    records: list[Record] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases), case="")
        for case in cases:
            progress.update(task, case=case.name)
            result = _measure(case, num_rounds, partial(_advance, progress, task, len(records)), device)
            records.append(record_of(result, facts(device)))
            if json_path is not None:
                _write(json_path, write_json_lines, records)
    return records


def _write(path: Path, write: Callable[[Path, Sequence[Record]], None], records: Sequence[Record]) -> None:
    """Write a file that could be written to when the measurement began."""
    try:
        write(path, records)
    except OSError as error:
        raise BenchError(f"cannot write to {path}: {error.strerror or error}.") from None


def _advance(progress: Progress, task: TaskID, num_done: int, share: float) -> None:
    progress.update(task, completed=num_done + share)


def _measure(case: Case, num_rounds: int | None, on_progress: Callable[[float], None], device: torch.device) -> Result:
    if device.type != "cpu":  # what the cases are to reach was set for the CPU
        case = dataclasses.replace(case, targets={})
    try:
        return measure(case, num_rounds, on_progress, device=device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise BenchError(f"there is not enough memory for case {case.name}.") from None


def _show(records: Sequence[Record]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES, highlight=False)
    console.print(origin(records[0]), markup=False)
    console.print(TerminalTable(COLUMNS, records))
    heading_width = max(len(column.heading) for column in COLUMNS)
    legend = [f"{column.heading:{heading_width}}  {column.legend}" for column in COLUMNS]
    bandwidths = [record["copy_bytes_per_second"]["median"] / 1e9 for record in records]
    low, high = math.floor(10 * min(bandwidths)) / 10, math.ceil(10 * max(bandwidths)) / 10
    copying = f"A copy moved {low:.1f} to {high:.1f} GB/s, read and written, in the same rounds."
    console.print("\n".join([*legend, *HOW, copying, *notes(records)]), markup=False)
