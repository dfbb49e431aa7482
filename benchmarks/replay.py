"""What replaying missed steps costs: catching up on a batch's rows and the step, against a step that skips them."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from time import perf_counter

from common import Script, add_rounds_flag, reaching, run, within

from sparseadam import SparseAdam
from sparseadam.bench.cases import CASES, FUSED_WITH_GRADIENT, case_named
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import FusedAdam, Seconds, SparseStep, spread_of, take_rounds
from sparseadam.bench.report import Column, Record, figure, spread_figures
from sparseadam.bench.workload import NUM_GRADIENTS, Workload

# Times a step that skips, and times faster than dense fused Adam with its gradient made.
LIMITS = {"zipf": 1.8, "uniform": 1.8}
TARGETS = {"big": 50.0}

SKIP, REPLAY, CATCH_UP = "skip", "replay", "catch_up"


class ReplayStep:
    """``catch_up()`` on the rows of a batch, as an attached model does it, and ``step()`` on its gradient."""

    warm_up_steps = 2 * NUM_GRADIENTS

    def __init__(self, workload: Workload) -> None:
        """Build the optimizer over the tables of ``workload``."""
        self.optimizer = SparseAdam(workload.tables, missed_steps="replay")
        self._workload = workload

    def step(self, number: int) -> Seconds:
        """Time both, and the first alone."""
        gradient = self._workload.give_gradients(number)
        started = perf_counter()
        for table, rows in zip(self._workload.tables, gradient.rows, strict=True):
            self.optimizer.catch_up(table, rows)
        caught_up = perf_counter()
        self.optimizer.step()
        done = perf_counter()
        self._workload.clear_gradients()
        return {CATCH_UP: caught_up - started, REPLAY: done - started}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    default = [*LIMITS, *TARGETS]
    parser.add_argument("--case", action="append", choices=names, help=f"otherwise {', '.join(default)}")
    add_rounds_flag(parser)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    for name in options.case or [*LIMITS, *TARGETS]:
        workload = Workload(case_named(name))
        replaying = ReplayStep(workload)
        skipping = SparseStep(SKIP, SparseAdam(workload.tables), workload)
        dense = [FusedAdam(workload)] if name in TARGETS else []
        rounds = take_rounds([skipping, replaying, *dense], options.rounds)
        state_bytes = {SKIP: skipping.optimizer.moment_bytes(), REPLAY: replaying.optimizer.moment_bytes()}
        yield {
            **facts(),
            "case": name,
            "rounds": len(rounds),
            "ms": {key: spread_of([1e3 * seconds[key] for seconds in rounds])._asdict() for key in rounds[0]},
            "times_skip": statistics.median(seconds[REPLAY] / seconds[SKIP] for seconds in rounds),
            "times_dense": (
                statistics.median(seconds[FUSED_WITH_GRADIENT] / seconds[REPLAY] for seconds in rounds)
                if dense
                else None
            ),
            "state_bytes": state_bytes,
            "num_slots": sum(len(state["rows"]) for state in replaying.optimizer.state.values()),
        }


def _times_skip(record: Record) -> str:
    return within(record["times_skip"], LIMITS.get(record["case"]), f"{record['times_skip']:.2f}x")


def _times_dense(record: Record) -> str:
    if record["times_dense"] is None:
        return ""
    return reaching(record["times_dense"], TARGETS[record["case"]], f"{figure(record['times_dense'])}x")


def _bytes_a_row(record: Record) -> str:
    more = record["state_bytes"][REPLAY] - record["state_bytes"][SKIP]
    return f"{more / record['num_slots']:.1f}"


COLUMNS = (
    Column("case", "name of the case", lambda record: str(record["case"])),
    Column(
        "skip, ms",
        "a step that skips: median (20th to 80th percentile)",
        lambda record: spread_figures(record["ms"][SKIP]),
    ),
    Column("replay, ms", "catching up and the step", lambda record: spread_figures(record["ms"][REPLAY])),
    Column("of it catching up", "the first of the two", lambda record: spread_figures(record["ms"][CATCH_UP])),
    Column("times skip", "median of the rounds' ratios; the limit in brackets", _times_skip),
    Column("faster than dense", "than dense fused Adam with its gradient made; the target in brackets", _times_dense),
    Column("more bytes a touched row", "of state, the numbers of the steps included", _bytes_a_row),
)

SCRIPT = Script("replay", "What replaying missed steps costs", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
