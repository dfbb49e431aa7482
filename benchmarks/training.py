"""A whole step of training, the passes and the optimizer's step, by how freed memory is kept.

PyTorch frees a pass's tensors as soon as it can, and the C library gives large ones back to the system, so the next
pass gets its memory anew, page by page, which can take longer than all else. Environment variables change that. They
are read when a process starts, so each combination is measured in processes of its own, which take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from common import Script, record_of_process, run
from torch.nn import functional

from sparseadam.bench.cases import CASES, TORCH_SPARSE, case_named
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import OURS, our_optimizer
from sparseadam.bench.report import Column, Record, figure
from sparseadam.bench.workload import Workload

# PyTorch's own way of asking for huge pages, and the GNU C library's of never giving memory back.
AS_IT_IS = "as it is"
VARIABLES = {
    AS_IT_IS: {},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
WARM_UP_STEPS = 10
CHILD = """
import json, sys, training
print(json.dumps(training.measure_here(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="otherwise words, zipf and wide-uniform")
    parser.add_argument("--turns", type=int, default=3, help="processes of each combination")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure in each process")


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    for name in options.case or ("words", "zipf", "wide-uniform"):
        combinations = [(memory, optimizer) for memory in VARIABLES for optimizer in (OURS, TORCH_SPARSE)]
        taken: dict[tuple[str, str], list[dict[str, float]]] = {combination: [] for combination in combinations}
        for _ in range(options.turns):
            for memory, optimizer in combinations:
                taken[memory, optimizer].append(_measure_apart(optimizer, name, memory, options.seconds))
        seconds = {combination: _medians(turns) for combination, turns in taken.items()}
        for memory in VARIABLES:
            yield {
                **facts(),
                "case": name,
                "memory": memory,
                "variables": VARIABLES[memory],
                "turns": options.turns,
                "seconds": {optimizer: seconds[memory, optimizer] for optimizer in (OURS, TORCH_SPARSE)},
                "seconds_as_it_is": seconds[AS_IT_IS, TORCH_SPARSE],
            }


def _measure_apart(optimizer: str, case: str, memory: str, seconds: float) -> dict[str, float]:
    measured = {name for variables in VARIABLES.values() for name in variables}
    environment = {name: value for name, value in os.environ.items() if name not in measured} | VARIABLES[memory]
    command = [sys.executable, "-c", CHILD, optimizer, case, str(seconds)]
    what = f"{case} with memory {memory} could not be measured"
    medians: dict[str, float] = record_of_process(what, command, env=environment, cwd=Path(__file__).parent)
    return medians


def measure_here(optimizer: str, case: str, seconds: float) -> dict[str, float]:
    """Train in this process, looking up the rows of each of the case's gradients in turn; return medians in seconds."""
    workload = Workload(case_named(case))
    stepper = our_optimizer(workload) if optimizer == OURS else torch.optim.SparseAdam(workload.tables)
    passes: list[float] = []
    step: list[float] = []
    began = perf_counter()
    while len(passes) < 2 * WARM_UP_STEPS or perf_counter() - began < seconds:
        rows_of_tables = workload.gradients[len(passes) % len(workload.gradients)].rows
        before = perf_counter()
        pairs = zip(rows_of_tables, workload.tables, strict=True)
        losses = [functional.embedding(rows, table, sparse=True).pow(2).sum() for rows, table in pairs]
        torch.stack(losses).sum().backward()
        passed = perf_counter()
        stepper.step()
        step.append(perf_counter() - passed)
        passes.append(passed - before)
        stepper.zero_grad()
    return {"passes": statistics.median(passes[WARM_UP_STEPS:]), "step": statistics.median(step[WARM_UP_STEPS:])}


def _medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}


def _milliseconds(record: Record, optimizer: str, part: str) -> str:
    return figure(1e3 * record["seconds"][optimizer][part])


def _gain(record: Record, than: dict[str, float]) -> str:
    return f"{sum(than.values()) / sum(record['seconds'][OURS].values()):.2f}x"


COLUMNS = (
    Column("case", "a case of the first table, each batch looked up anew", lambda record: str(record["case"])),
    Column(
        "memory",
        "; ".join(
            f"{memory}: {' '.join(f'`{name}={value}`' for name, value in variables.items())}"
            for memory, variables in VARIABLES.items()
            if variables
        ),
        lambda record: str(record["memory"]),
    ),
    Column(
        "passes, ms",
        "lookups, the sum of their squares and the backward pass",
        lambda record: _milliseconds(record, OURS, "passes"),
    ),
    Column("ours, ms", "step() of sparseadam.SparseAdam", lambda record: _milliseconds(record, OURS, "step")),
    Column(
        "SparseAdam, ms",
        "step() of torch.optim.SparseAdam",
        lambda record: _milliseconds(record, TORCH_SPARSE, "step"),
    ),
    Column(
        "whole",
        "how many times faster passes and step are together than with torch.optim.SparseAdam",
        lambda record: _gain(record, record["seconds"][TORCH_SPARSE]),
    ),
    Column(
        f"whole, against {AS_IT_IS}",
        f"the same against torch.optim.SparseAdam with memory {AS_IT_IS}",
        lambda record: _gain(record, record["seconds_as_it_is"]),
    ),
)

SCRIPT = Script("training", "A whole step of training, by how freed memory is kept", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
