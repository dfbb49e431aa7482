"""What the scripts in this directory share: flags, a table on the terminal, JSON lines in ``results``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseadam.bench.arguments import HelpWithDefaults
from sparseadam.bench.cli import require
from sparseadam.bench.errors import BenchError
from sparseadam.bench.machine import available_bytes
from sparseadam.bench.measure import SECONDS_PER_CASE
from sparseadam.bench.report import Column, Record, origin, write_json_lines
from sparseadam.bench.terminal import TerminalTable

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Script:
    """A measurement with its presentation.

    Attributes:
        name: of the script and of its file in ``results``.
        title: one line on what it shows.
        measure: takes the flags and yields records, each as soon as it is known.
        columns: the table of those records.
        add_flags: adds the script's own flags.
    """

    name: str
    title: str
    measure: Callable[[argparse.Namespace], Iterable[Record]]
    columns: Sequence[Column]
    add_flags: Callable[[argparse.ArgumentParser], None]


def add_rounds_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--rounds``, for measurements that take rounds."""
    parser.add_argument("--rounds", type=int, help=f"rounds a case; otherwise what {SECONDS_PER_CASE} seconds allow")


def run(script: Script) -> int:
    """Measure, show and write; return the exit code."""
    parser = argparse.ArgumentParser(description=script.title, formatter_class=HelpWithDefaults)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{script.name}.jsonl", help="where JSON lines go")
    script.add_flags(parser)
    options = parser.parse_args()
    try:
        require("rich")
        _measure(script, options)
    except BenchError as error:
        print(f"{script.name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{script.name}: stopped.", file=sys.stderr)
        return 130
    return 0


def _measure(script: Script, options: argparse.Namespace) -> None:
    from rich.console import Console

    options.json.parent.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for record in script.measure(options):
        records.append(record)
        write_json_lines(options.json, records)
        cells = (f"{column.heading} {column.cell(record)}" for column in script.columns)
        print(f"{script.name}: {', '.join(cells)}", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(origin(records[0]), markup=False)
    console.print(TerminalTable(script.columns, records, script.title))


def record_of_process(what: str, command: Sequence[str], **options: Any) -> Any:
    """Run a command and return the first line of its output, read as JSON; where it fails, say so of ``what``."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise BenchError(f"{what}: {done.stderr.strip()[-500:] or f'it ended with {done.returncode}'}")
    return json.loads(done.stdout.partition("\n")[0])


def within(value: float, limit: float | None, text: str) -> str:
    """Write a figure that may not exceed its limit, where there is one; say so where it does."""
    if limit is None:
        return text
    return f"{text} ({limit:g})" if value <= limit else f"{text} (MISSED {limit:g})"


def reaching(value: float, target: float, text: str) -> str:
    """Write a figure that is to reach its target; say so where it does not."""
    return f"{text} ({target:g})" if value >= target else f"{text} (MISSED {target:g})"


def fits_in_memory(num_bytes: int) -> bool:
    """Whether this much can be had beside what is in use."""
    available = available_bytes()
    return available is None or num_bytes < available
