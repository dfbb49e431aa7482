"""Training on a table three times as large as the memory that a control group allows, beside the same steps in memory.

Each figure is taken in a process of its own. The limit is that of a memory control group, which counts the pages of
files that the process keeps in memory: whatever it allocates once Python and PyTorch are loaded, and all that it may
keep of table and moments, have to fit. Every row of the table is touched first, so all of it, and moments of all rows,
are on the disk; then lookups are drawn at random, and a step is the forward pass, the backward pass and the optimizer's
step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from common import Script, fits_in_memory, record_of_process, run
from torch import Tensor, nn

import sparseadam
from sparseadam.bench.control_group import ControlGroup, limited_memory, own_group
from sparseadam.bench.machine import facts
from sparseadam.bench.report import Column, Record, figure

WIDTH = 64
INIT = ("normal", 0.01)
MEMORY, FILES, LIMITED = "memory", "files", "limited"
NAMES = {MEMORY: "in memory", FILES: "in files", LIMITED: "in files, memory limited"}
DRAWN = ("zipf", "uniform")
TABLES_A_LIMIT = 3
ROWS_A_STRETCH = 1 << 16
# How many times the table's size a run in memory needs: the table, its moments, the index, and some room.
TABLES_NEEDED = 3.3


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, default=160, help="MiB that the control group allows")
    parser.add_argument("--lookups", type=int, default=4096, help="in a step")
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--steps-a-checkpoint", type=int, default=10, help="between two commits")
    parser.add_argument(
        "--directory", type=Path, help="where files go, on the disk to measure; a temporary one otherwise"
    )
    parser.add_argument("--where", nargs="+", choices=NAMES, default=list(NAMES), help="which to measure")
    parser.add_argument("--drawn", nargs="+", choices=DRAWN, default=list(DRAWN), help="how ids are drawn")
    parser.add_argument("--here", action="store_true", help="measure the first in this very process")
    parser.add_argument("--group", type=Path, help="with --here: a memory control group to enter")


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    if options.here:
        yield _measure_here(options)
        return
    for drawn in options.drawn:
        for where in options.where:
            if where == MEMORY and not fits_in_memory(int(TABLES_NEEDED * _num_rows(options) * WIDTH * 4)):
                print(f"larger_than_memory: {NAMES[where]} is left out: it does not fit", file=sys.stderr)
                continue
            yield _measure_apart(options, where, drawn)


def _num_rows(options: argparse.Namespace) -> int:
    return int(TABLES_A_LIMIT * options.limit * 2**20 // (WIDTH * 4))


def _measure_apart(options: argparse.Namespace, where: str, drawn: str) -> Record:
    command = [sys.executable, __file__, "--json", "/dev/stdout", "--here", "--where", where, "--drawn", drawn]
    for flag in ("limit", "lookups", "steps", "steps-a-checkpoint"):
        command += [f"--{flag}", str(getattr(options, flag.replace("-", "_")))]
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        command += ["--directory", directory]
        with limited_memory(options.limit * 2**20) if where == LIMITED else nullcontext() as group:
            if group is not None:
                command += ["--group", str(group.path)]
            record: Record = record_of_process(NAMES[where], command)
    return record


# A run ----------------------------------------------------------------------------------------------------------------


def _measure_here(options: argparse.Namespace) -> Record:
    _warm_up()
    group = own_group() if options.group is None else ControlGroup(options.group, own_group().is_first_version)
    if options.group is not None:
        group.enter()
    where, drawn, num_rows = options.where[0], options.drawn[0], _num_rows(options)
    is_in_memory = where == MEMORY
    path, moment_dir = options.directory / "items.table", options.directory / "moments"
    if is_in_memory:
        table = torch.empty(num_rows, WIDTH)
        for rows in _stretches(num_rows):
            table[rows] = sparseadam.initial.Init(*INIT, seed=0).values(rows, WIDTH, table.dtype)
    else:
        table = sparseadam.memory_mapped(path, num_rows, WIDTH, init=INIT)
    embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    if not is_in_memory:
        sparseadam.initialize_on_read(embedding)
    optimizer = sparseadam.SparseAdam(embedding.parameters(), moment_dir=None if is_in_memory else moment_dir)

    def step(ids: Tensor) -> None:
        optimizer.zero_grad()
        (embedding(ids).sum() * 0.5).backward()
        optimizer.step()

    def commit() -> float:
        begin = time.perf_counter()
        if not is_in_memory:
            optimizer.checkpoint()
        return time.perf_counter() - begin

    begin = time.perf_counter()
    for rows in _stretches(num_rows):
        step(rows)
    commit()
    touching = time.perf_counter() - begin
    generator = torch.Generator().manual_seed(0)
    seconds, commits, log_bytes, distinct = [], [], [], 0
    for number in range(options.steps):
        ids = _draw(drawn, options.lookups, num_rows, generator)
        distinct += len(ids.unique())
        begin = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - begin)
        if (number + 1) % options.steps_a_checkpoint == 0 and not is_in_memory:
            log_bytes.append(sum(log.stat().st_size for log in moment_dir.glob("undo-*.log")))
            commits.append(commit())
    files = [path, *moment_dir.rglob("*")] if not is_in_memory else []
    return {
        **facts(),
        "where": where,
        "drawn": drawn,
        "rows": num_rows,
        "dim": WIDTH,
        "lookups": options.lookups,
        "limit_bytes": options.limit * 2**20 if where == LIMITED else None,
        "peak_bytes": group.peak_bytes() if where == LIMITED else None,
        "table_bytes": num_rows * WIDTH * 4,
        "disk_bytes": sum(file.stat().st_blocks * 512 for file in files),
        "touching_seconds": touching,
        "step_seconds": statistics.median(seconds),
        "rows_a_second": distinct / sum(seconds),
        "commit_seconds": statistics.median(commits) if commits else None,
        "log_bytes_a_row": sum(log_bytes) / distinct if log_bytes else None,
    }


def _warm_up() -> None:
    """Have code loaded and threads started."""
    embedding = nn.Embedding(1000, WIDTH, sparse=True)
    optimizer = sparseadam.SparseAdam(embedding.parameters())
    for _ in range(3):
        embedding(torch.arange(1000)).sum().backward()
        optimizer.step()


def _stretches(num_rows: int) -> Iterator[Tensor]:
    for begin in range(0, num_rows, ROWS_A_STRETCH):
        yield torch.arange(begin, min(begin + ROWS_A_STRETCH, num_rows))


def _draw(drawn: str, num_lookups: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw ids: all alike, or with a frequency that falls with their rank, the ranks scattered over the table."""
    if drawn == "uniform":
        return torch.randint(num_rows, (num_lookups,), generator=generator)
    ranks = (float(num_rows) ** torch.rand(num_lookups, generator=generator, dtype=torch.float64)).to(torch.int64)
    return ranks * 2_654_435_761 % num_rows


COLUMNS = (
    Column("ids", "drawn uniformly, or with a frequency of 1/rank", lambda record: record["drawn"]),
    Column("table and moments", "where they are", lambda record: NAMES[record["where"]]),
    Column("limit, MB", "of the control group", lambda record: _megabytes(record["limit_bytes"])),
    Column(
        "its peak, MB", "most memory in use, pages of files included", lambda record: _megabytes(record["peak_bytes"])
    ),
    Column("table, MB", "all of it touched", lambda record: _megabytes(record["table_bytes"])),
    Column("on disk, MB", "table, moments and index", lambda record: _megabytes(record["disk_bytes"] or None)),
    Column("all rows once, s", "steps over the whole table", lambda record: figure(record["touching_seconds"])),
    Column("step, ms", "median of forward, backward, step", lambda record: figure(record["step_seconds"] * 1e3)),
    Column("rows/s", "distinct rows updated", lambda record: f"{record['rows_a_second']:,.0f}"),
    Column(
        "checkpoint(), ms",
        "median",
        lambda record: "" if record["commit_seconds"] is None else figure(record["commit_seconds"] * 1e3),
    ),
    Column(
        "log, bytes a row",
        "of the distinct rows of steps; a row is logged once between two commits",
        lambda record: "" if record["log_bytes_a_row"] is None else f"{record['log_bytes_a_row']:.0f}",
    ),
)


def _megabytes(num_bytes: float | None) -> str:
    return "" if num_bytes is None else figure(num_bytes / 1e6)


SCRIPT = Script("larger_than_memory", "Training on a table larger than memory", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
