"""What each option costs in time and saves in memory, against a step with default options."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from common import Script, add_rounds_flag, run

from sparseadam import SparseAdam
from sparseadam.bench.cases import CASES, case_named
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import SparseStep, spread_of, take_rounds
from sparseadam.bench.report import Column, Record, figure, spread_figures
from sparseadam.bench.workload import Workload

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    'weight_decay, "touched"': {"weight_decay": 0.01},
    'weight_decay, "exact"': {"weight_decay": 0.01, "weight_decay_mode": "exact"},
    "amsgrad": {"amsgrad": True},
    'bias_correction="row"': {"bias_correction": "row"},
    'second_moment="row"': {"second_moment": "row"},
    "moment_dtype=torch.bfloat16": {"moment_dtype": torch.bfloat16},
    "moment_dtype=torch.uint8": {"moment_dtype": torch.uint8},
    'nonfinite="error"': {"nonfinite": "error"},
    'nonfinite="skip"': {"nonfinite": "skip"},
}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=[case.name for case in CASES], default="zipf", help="case to step")
    add_rounds_flag(parser)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    workload = Workload(case_named(options.case))
    optimizers = {name: SparseAdam(workload.tables, **chosen) for name, chosen in OPTIONS.items()}
    contenders = [SparseStep(name, optimizer, workload) for name, optimizer in optimizers.items()]
    rounds = take_rounds(contenders, options.rounds)
    for name, optimizer in optimizers.items():
        yield {
            **facts(),
            "case": options.case,
            "option": name,
            "rounds": len(rounds),
            "ms": spread_of([1e3 * seconds[name] for seconds in rounds])._asdict(),
            "times_defaults": statistics.median(seconds[name] / seconds["defaults"] for seconds in rounds),
            "state_bytes": optimizer.moment_bytes(),
        }


COLUMNS = (
    Column("option", "all others at their defaults", lambda record: record["option"]),
    Column("step, ms", "median (20th to 80th percentile)", lambda record: spread_figures(record["ms"])),
    Column(
        "times the defaults'", "median of the rounds' ratios", lambda record: f"{figure(record['times_defaults'])}x"
    ),
    Column("state, MB", "moments, row numbers and index", lambda record: figure(record["state_bytes"] / 1e6)),
)

SCRIPT = Script("options", "What options cost and save", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
