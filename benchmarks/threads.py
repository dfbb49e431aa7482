"""Two threads against one on the large cases, and what a plain copy gains from the second."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from common import Script, add_rounds_flag, reaching, run

from sparseadam.bench.cases import CASES, case_named
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import (
    COPY,
    OURS,
    Contender,
    Copy,
    Seconds,
    SparseStep,
    our_optimizer,
    spread_of,
    take_rounds,
)
from sparseadam.bench.report import Column, Record, figure
from sparseadam.bench.workload import Workload

LARGE = ("zipf", "uniform", "wide-zipf", "wide-uniform", "big")
TARGET = 1.6


class OnThreads:
    """A contender on a number of threads of its own."""

    def __init__(self, contender: Contender, num_threads: int) -> None:
        """Let ``contender`` step on ``num_threads`` threads."""
        self._contender = contender
        self._num_threads = num_threads
        self.warm_up_steps = contender.warm_up_steps

    def step(self, number: int) -> Seconds:
        """Step once untimed, for the runtime to start or stop its threads, and once for the time."""
        torch.set_num_threads(self._num_threads)
        self._contender.step(number - 1)
        return {f"{name} {self._num_threads}": taken for name, taken in self._contender.step(number).items()}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help=f"otherwise {', '.join(LARGE)}")
    add_rounds_flag(parser)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    for name in options.case or LARGE:
        workload = Workload(case_named(name))
        step, copy = SparseStep(OURS, our_optimizer(workload), workload), Copy()
        contenders = [OnThreads(contender, count) for contender in (step, copy) for count in (1, 2)]
        rounds = take_rounds(contenders, options.rounds)
        yield {
            **facts(),
            "case": name,
            "rounds": len(rounds),
            "seconds": {key: spread_of([seconds[key] for seconds in rounds])._asdict() for key in rounds[0]},
            "gain": {
                key: spread_of([seconds[f"{key} 1"] / seconds[f"{key} 2"] for seconds in rounds])._asdict()
                for key in (OURS, COPY)
            },
            "target": TARGET,
        }


def _milliseconds(record: Record, num_threads: int) -> str:
    return figure(1e3 * record["seconds"][f"{OURS} {num_threads}"]["median"])


def _gain(record: Record) -> str:
    gain = record["gain"][OURS]["median"]
    return reaching(gain, record["target"], f"{gain:.2f}x")


COLUMNS = (
    Column("case", "name of the case", lambda record: str(record["case"])),
    Column("one thread, ms", "median of a step", lambda record: _milliseconds(record, 1)),
    Column("two threads, ms", "median of a step", lambda record: _milliseconds(record, 2)),
    Column("gain", "median ratio within rounds; the target in brackets", _gain),
    Column("gain of a copy", "the same of a copy", lambda record: f"{record['gain'][COPY]['median']:.2f}x"),
)

SCRIPT = Script("threads", "A step on two threads against one", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
