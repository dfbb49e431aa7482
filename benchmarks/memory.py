"""The resident memory of an optimizer's own state: final, at its peak while growing, and what a step takes on top.

Each figure is taken in a process of its own that has the table, all of it resident, before it looks. 1 % of the rows
are touched, 1,000 in a step. ``VmHWM``, the peak that the kernel keeps, is reset before the steps that it is read for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Script, fits_in_memory, record_of_process, run, within
from torch import Tensor, nn

from sparseadam import SparseAdam
from sparseadam.bench.cases import TORCH_SPARSE
from sparseadam.bench.errors import BenchError
from sparseadam.bench.machine import facts, fastest_backend
from sparseadam.bench.measure import OURS, state_bytes
from sparseadam.bench.report import Column, Record, figure

DENSE = "fused_adam"
NAMES = {OURS: "sparseadam", TORCH_SPARSE: "torch.optim.SparseAdam", DENSE: "torch.optim.Adam(fused=True)"}
WIDTH = 64
ROWS_PER_STEP = 1000
# What ours may take: this many times the moments of touched rows, and so many bytes a row of the table; and at its peak
# this many times what it takes in the end.
MOMENTS_LIMIT, BYTES_PER_ROW_LIMIT, PEAK_LIMIT = 1.15, 8, 1.3
# How many times the table's size each needs: the table, dense moments, a dense gradient, and some room.
TABLES_NEEDED = {OURS: 1.2, TORCH_SPARSE: 3.2, DENSE: 4.2}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table; 1 %% of them are touched")
    parser.add_argument("--only", choices=NAMES, help="measure one in this very process and print its record")
    parser.add_argument("--touched", type=int, help="rows touched with --only; otherwise 1 %% of the table's")


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    if not Path("/proc/self/clear_refs").exists():
        raise BenchError("this reads the resident set and its peak from /proc, which this system does not have.")
    touched = options.touched or options.rows // 100
    if options.only:
        yield _measure_here(options.only, options.rows, touched)
        return
    # Ours on smaller tables with as many rows touched as well: what a step takes may not depend on the table.
    smaller = [(OURS, options.rows // 100), (OURS, options.rows // 10)]
    for name, num_rows in [*smaller, *((name, options.rows) for name in NAMES)]:
        if fits_in_memory(int(TABLES_NEEDED[name] * num_rows * WIDTH * 4)):
            yield _measure_apart(name, num_rows, touched)
        else:
            print(f"memory: {NAMES[name]} is left out: it does not fit", file=sys.stderr)


def _measure_apart(name: str, num_rows: int, touched: int) -> Record:
    command = [sys.executable, __file__, "--json", "/dev/stdout", "--only", name]
    command += ["--rows", str(num_rows), "--touched", str(touched)]
    record: Record = record_of_process(f"{NAMES[name]} on {num_rows:,} rows could not be measured", command)
    return record


def _measure_here(name: str, num_rows: int, touched: int) -> Record:
    _run_steps(name, _table(ROWS_PER_STEP), torch.arange(ROWS_PER_STEP))  # code is loaded, threads are started
    table = _table(num_rows)
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:touched].clone()
    growing, steady, optimizer = _run_steps(name, table, rows)
    moments = touched * 2 * WIDTH * table.element_size()
    return {
        **facts(),
        "contender": name,
        "rows": num_rows,
        "dim": WIDTH,
        "touched": touched,
        "moment_bytes_of_touched_rows": moments,
        "state_bytes": state_bytes(optimizer),
        "resident_bytes": growing.after - growing.before,
        "peak_bytes": growing.peak - growing.before,
        "step_bytes": steady.peak - steady.before,
        "limit_bytes": MOMENTS_LIMIT * moments + BYTES_PER_ROW_LIMIT * num_rows if name == OURS else None,
    }


def _table(num_rows: int) -> nn.Parameter:
    return nn.Parameter(torch.full((num_rows, WIDTH), 0.01))


class _Watch:
    """The resident set before and after some work, and its peak on the way."""

    def __init__(self, work: Callable[[], None]) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        self.before, _ = _resident()
        work()
        self.after, self.peak = _resident()


def _resident() -> tuple[int, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def _run_steps(name: str, table: nn.Parameter, rows: Tensor) -> tuple[_Watch, _Watch, torch.optim.Optimizer]:
    """Touch all ``rows``, some in each step, then step on the first of them some times more."""
    optimizer: torch.optim.Optimizer
    if name == DENSE:
        optimizer = torch.optim.Adam([table], fused=True)
        table.grad = torch.full_like(table, 0.5)  # not the optimizer's own, so it is there before
        return _Watch(lambda: optimizer.step()), _Watch(lambda: optimizer.step()), optimizer
    if name == OURS:
        optimizer = SparseAdam([table], backend=fastest_backend().name)
    else:
        optimizer = torch.optim.SparseAdam([table])

    def step(rows_of_step: Tensor) -> None:
        values = torch.ones(len(rows_of_step), WIDTH)
        table.grad = torch.sparse_coo_tensor(rows_of_step[None], values, table.shape, check_invariants=True)
        optimizer.step()
        table.grad = None

    parts = rows.split(ROWS_PER_STEP)
    growing = _Watch(lambda: [step(part) for part in parts] and None)
    return growing, _Watch(lambda: [step(part) for part in parts[:10]] and None), optimizer


def _megabytes(num_bytes: float) -> str:
    return figure(num_bytes / 1e6)


def _resident_cell(record: Record) -> str:
    limit = record["limit_bytes"]
    return within(
        record["resident_bytes"] / 1e6,
        None if limit is None else round(limit / 1e6),
        _megabytes(record["resident_bytes"]),
    )


def _peak_cell(record: Record) -> str:
    share = record["peak_bytes"] / max(record["resident_bytes"], 1)
    limit = PEAK_LIMIT if record["contender"] == OURS else None
    return within(share, limit, f"{share:.2f}x")


COLUMNS = (
    Column("optimizer", "who steps", lambda record: NAMES[record["contender"]]),
    Column("rows", f"of a table {WIDTH} wide", lambda record: f"{record['rows']:,}"),
    Column("touched", f"rows, {ROWS_PER_STEP:,} in a step", lambda record: f"{record['touched']:,}"),
    Column(
        "their moments, MB",
        "two float32 moments of each touched row",
        lambda record: _megabytes(record["moment_bytes_of_touched_rows"]),
    ),
    Column("resident, MB", "what the optimizer's state adds; the limit in brackets", _resident_cell),
    Column("peak", "while growing, in terms of the final size; the limit in brackets", _peak_cell),
    Column(
        "a step on top, MB",
        "peak of ten further steps over what is resident between them",
        lambda record: _megabytes(record["step_bytes"]),
    ),
)

SCRIPT = Script("memory", "The resident memory of an optimizer's own state", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
