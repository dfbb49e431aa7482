"""The fixed cost of ``step()``: one table with a handful of lookups, and what each further table adds."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence

import torch
from common import Script, add_rounds_flag, run, within

from sparseadam.bench.cases import TORCH_SPARSE, Case
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import OURS, Seconds, SparseStep, Spread, our_optimizer, spread_of, take_rounds
from sparseadam.bench.report import Column, Record, spread_figures
from sparseadam.bench.workload import Workload

NUM_TABLES = (1, 2, 4, 8, 16, 32, 64)
NUM_ROWS, WIDTH, LOOKUPS = 1000, 16, 8
# Microseconds that ours may take.
LIMITS = {"one_table": 20.0, "further_table": 2.0}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_rounds_flag(parser)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    contenders = []
    for count in NUM_TABLES:
        workload = Workload(Case("overhead", count, NUM_ROWS, WIDTH, LOOKUPS, "uniform"))
        contenders.append(SparseStep(f"{OURS} {count}", our_optimizer(workload), workload))
        torch_optimizer = torch.optim.SparseAdam(workload.tables)
        contenders.append(SparseStep(f"{TORCH_SPARSE} {count}", torch_optimizer, workload))
    rounds = take_rounds(contenders, options.rounds)
    for name in (OURS, TORCH_SPARSE):
        yield {
            **facts(),
            "contender": name,
            "rows": NUM_ROWS,
            "dim": WIDTH,
            "lookups": LOOKUPS,
            "rounds": len(rounds),
            "one_table": _micros([seconds[f"{name} 1"] for seconds in rounds])._asdict(),
            "further_table": _micros([_slope(seconds, name) for seconds in rounds])._asdict(),
            "limits": LIMITS if name == OURS else {},
        }


def _micros(seconds: Sequence[float]) -> Spread:
    return spread_of([1e6 * value for value in seconds])


def _slope(seconds: Seconds, name: str) -> float:
    """Fit a line to a round's times over the number of tables."""
    return statistics.linear_regression(NUM_TABLES, [seconds[f"{name} {count}"] for count in NUM_TABLES]).slope


def _cell(record: Record, name: str) -> str:
    spread = record[name]
    return within(spread["median"], record["limits"].get(name), spread_figures(spread))


COLUMNS = (
    Column("optimizer", "who steps", lambda record: {OURS: "sparseadam", TORCH_SPARSE: "torch"}[record["contender"]]),
    Column("one table, us", "step() of one table; the limit in brackets", lambda record: _cell(record, "one_table")),
    Column(
        "each further table, us",
        f"slope of a line through {NUM_TABLES[0]} to {NUM_TABLES[-1]} tables",
        lambda record: _cell(record, "further_table"),
    ),
)

SCRIPT = Script("overhead", f"The fixed cost of step(): {LOOKUPS} lookups a table", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
