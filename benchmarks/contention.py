"""A step while another process keeps one of the cores busy, against a quiet machine, in interleaved phases."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter

import torch
from common import Script, run, within

from sparseadam.bench.cases import CASES, TORCH_SPARSE, case_named
from sparseadam.bench.errors import BenchError
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import OURS, SparseStep, our_optimizer, percentile
from sparseadam.bench.report import Column, Record, figure
from sparseadam.bench.workload import Workload

# How many times its quiet median a step of ours may take while a core is busy.
LIMIT = 2.5
# Spins on the core that it is told, until it is ended or its parent is gone.
SPINNER = """
import os, sys
parent = os.getppid()
os.sched_setaffinity(0, {int(sys.argv[1])})
print("spinning", flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="otherwise words and zipf")
    parser.add_argument("--phases", type=int, default=8, help="quiet and busy phases of each optimizer")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a phase")


@contextmanager
def _busy_core() -> Iterator[None]:
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", SPINNER, str(core)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it spins from here on
        yield
    finally:
        process.kill()
        process.communicate()


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    if not hasattr(os, "sched_setaffinity"):
        raise BenchError("this needs os.sched_setaffinity, which this system does not have.")
    for name in options.case or ("words", "zipf"):
        workload = Workload(case_named(name))
        theirs = workload.with_other_tables()
        steps = (
            SparseStep(OURS, our_optimizer(workload), workload),
            SparseStep(TORCH_SPARSE, torch.optim.SparseAdam(theirs.tables), theirs),
        )
        for step in steps:
            for number in range(step.warm_up_steps):
                step.step(number)
        times: dict[tuple[str, str], list[float]] = {(s.name, c): [] for s in steps for c in ("quiet", "busy")}
        for _ in range(options.phases):
            for step in steps:
                for condition in ("quiet", "busy"):
                    with _busy_core() if condition == "busy" else nullcontext():
                        times[step.name, condition] += _phase(step, options.seconds)
        for step in steps:
            yield {
                **facts(),
                "case": name,
                "contender": step.name,
                **{condition: _summary(times[step.name, condition]) for condition in ("quiet", "busy")},
                "limit": LIMIT if step.name == OURS else None,
            }


def _phase(step: SparseStep, seconds: float) -> list[float]:
    taken: list[float] = []
    started = perf_counter()
    while perf_counter() - started < seconds:
        taken.append(step.step(len(taken))[step.name])
    return taken


def _summary(seconds: list[float]) -> dict[str, float]:
    median, late = statistics.median(seconds), percentile(seconds, 99)
    return {"steps": len(seconds), "median": median, "percentile_99": late}


def _milliseconds(record: Record, condition: str) -> str:
    summary = record[condition]
    return f"{figure(1e3 * summary['median'])} / {figure(1e3 * summary['percentile_99'])}"


def _slowdown(record: Record) -> str:
    slowdown = record["busy"]["median"] / record["quiet"]["median"]
    return within(slowdown, record["limit"], f"{slowdown:.2f}x")


COLUMNS = (
    Column("case", "name of the case", lambda record: str(record["case"])),
    Column("optimizer", "who steps", lambda record: {OURS: "sparseadam", TORCH_SPARSE: "torch"}[record["contender"]]),
    Column("quiet, ms", "median / 99th percentile of a step", lambda record: _milliseconds(record, "quiet")),
    Column("one core busy, ms", "the same while a process spins", lambda record: _milliseconds(record, "busy")),
    Column("medians", "how many times longer; the limit in brackets", _slowdown),
)

SCRIPT = Script("contention", "A step while another process spins on one core", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
