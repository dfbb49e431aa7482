"""Where a step's time goes: Python, the check and partition of lookups, and the walk over the rows.

The native call of a steady step is timed from within ``step()``. With a gradient whose last index is outside the table
it ends after the check and partition, so that is the time of those; what is left of a good one's is the walk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from common import Script, run

from sparseadam.bench.cases import Case, case_named
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import our_optimizer
from sparseadam.bench.report import Column, Record, figure
from sparseadam.bench.workload import NUM_GRADIENTS, Workload
from sparseadam.update import native

CASES = ("seed", "small", "words", "zipf", "uniform", "wide-zipf", "many-tables")
PARTS = ("python", "partition", "walk")


class TimedSteps:
    """The native listing of steady steps with a clock around its run."""

    def __init__(self, steady: Any, seconds: list[float]) -> None:
        """Wrap a listing; each run adds to ``seconds``."""
        self._steady = steady
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        """Pass on what is not timed."""
        return getattr(self._steady, name)

    def run(self, *arguments: Any) -> Any:
        """Step, or find out that it cannot be done, and note how long it took."""
        started = perf_counter()
        result = self._steady.run(*arguments)
        self._seconds.append(perf_counter() - started)
        return result


class TimedModule:
    """The native module, whose steady steps are timed."""

    def __init__(self) -> None:
        """Start with no calls."""
        self._module: Any = native.module()
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        """Pass on what is not timed."""
        return getattr(self._module, name)

    def steady_step(self, tensor_type: object) -> TimedSteps:
        """Return an empty listing."""
        return TimedSteps(self._module.steady_step(tensor_type), self.seconds)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="cycles through the gradients of each case")


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    module = TimedModule()
    native._module = lambda: module  # type: ignore[assignment,return-value]
    for name in CASES:
        yield {**facts(), "case": name, "milliseconds": _parts(case_named(name), options.rounds, module)}


def _parts(case: Case, num_rounds: int, module: TimedModule) -> dict[str, float]:
    workload = Workload(case)
    optimizer = our_optimizer(workload)
    for number in range(NUM_GRADIENTS):
        _step(optimizer, workload, number, is_bad=False)
    python, native_call, partition = [], [], []
    for number in range(num_rounds * NUM_GRADIENTS):
        total = _step(optimizer, workload, number, is_bad=False)
        native_call.append(module.seconds[-1])
        python.append(total - module.seconds[-1])
        _step(optimizer, workload, number, is_bad=True)
        partition.append(module.seconds[-1])
    medians = {"python": statistics.median(python), "partition": statistics.median(partition)}
    medians["walk"] = statistics.median(native_call) - medians["partition"]
    return {part: 1e3 * seconds for part, seconds in medians.items()}


def _step(optimizer: torch.optim.Optimizer, workload: Workload, number: int, *, is_bad: bool) -> float:
    """Step on a gradient, or fail on one whose last index lies outside the last table; return the seconds."""
    last_row = workload.give_gradients(number).rows[-1][-1:]
    kept = last_row.clone()
    if is_bad:
        last_row.fill_(workload.case.num_rows)
    started = perf_counter()
    try:
        optimizer.step()
    except IndexError:
        assert is_bad
    seconds = perf_counter() - started
    last_row.copy_(kept)
    workload.clear_gradients()
    return seconds


def _cell(record: Record, part: str) -> str:
    parts = record["milliseconds"]
    return f"{figure(parts[part])} ({parts[part] / sum(parts.values()):.0%})"


COLUMNS = (
    Column("case", "a case of the table above", lambda record: str(record["case"])),
    Column(
        "Python, ms",
        "step() outside the native call, with the clocks that were put around that",
        lambda record: _cell(record, "python"),
    ),
    Column(
        "read, check and partition, ms", "to the point where all is known to be good", lambda r: _cell(r, "partition")
    ),
    Column("sort and walk, ms", "sort in cache, slots, sums, moments and table rows", lambda r: _cell(r, "walk")),
)

SCRIPT = Script("step_profile", "Where a step's time goes", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
