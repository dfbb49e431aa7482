"""The native step of the working tree against that of other revisions, on the same memory, in turns.

Where a machine is shared, two runs of one build differ by more than most changes bring, and so do two copies of a
table. Here the steps of all builds are loaded into one process and take turns on one set of tables. The base is loaded
twice: what the two differ by cannot be told from nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from common import Script, add_rounds_flag, run
from instructions import FLAGS, ROOT, SOURCES

from sparseadam import SparseAdam
from sparseadam.bench.cases import Case, case_named
from sparseadam.bench.errors import BenchError
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import Seconds, spread_of, take_rounds
from sparseadam.bench.report import Column, Record, spread_figures
from sparseadam.bench.workload import NUM_GRADIENTS, Workload

BUILD = ROOT / "build" / "builds"
AGAIN, TREE = "base again", "working tree"
CASES = ("small", "words", "zipf", "uniform", "wide-zipf", "wide-uniform", "many-tables", "big")
HUGE = Case("huge", 1, 100_000_000, 16, 16_384, "zipf")


class TableAndGradient(ctypes.Structure):
    """As in ``csrc/tests/step_library.cpp``."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("moment_stride", ctypes.c_int64),
        ("slot_of_row", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("num_lookups", ctypes.c_int64),
    )


class BuiltStep:
    """The step of one build."""

    warm_up_steps = 2 * NUM_GRADIENTS

    def __init__(self, name: str, library: Path, given: list[ctypes.Array[TableAndGradient]]) -> None:
        """Step on ``given``, the tables with each of the gradients."""
        self.name = name
        self._take_step = ctypes.CDLL(str(library)).take_step
        self._take_step.restype = ctypes.c_bool
        self._given = given

    def step(self, number: int) -> Seconds:
        """See :class:`sparseadam.bench.measure.Contender`."""
        given = self._given[number % NUM_GRADIENTS]
        started = perf_counter()
        is_done = self._take_step(given, ctypes.c_int64(len(given)), torch.get_num_threads())
        seconds = perf_counter() - started
        if not is_done:
            raise BenchError(f"{self.name} refused a gradient that the package has taken")
        return {self.name: seconds}


def _tables_with_gradients(workload: Workload, optimizer: SparseAdam) -> list[ctypes.Array[TableAndGradient]]:
    for number in range(NUM_GRADIENTS):
        workload.give_gradients(number)
        optimizer.step()
    workload.clear_gradients()
    given = []
    for gradient in workload.gradients:
        tables = (TableAndGradient * len(workload.tables))()
        for i, table in enumerate(workload.tables):
            moments = optimizer.state[table]
            parts = moments.slot_parts()
            tables[i] = TableAndGradient(
                table.data_ptr(),
                *table.shape,
                parts["exp_avg"].data_ptr(),
                parts["exp_avg_sq"].data_ptr(),
                parts["exp_avg"].stride(0),
                moments.slot_of_row.data_ptr(),
                moments.rows.data_ptr(),
                moments.num_slots,
                gradient.rows[i].data_ptr(),
                gradient.values[i].data_ptr(),
                workload.case.num_lookups,
            )
        given.append(tables)
    return given


def _build(name: str, sources: Path) -> Path:
    """Compile the step in ``sources``, a directory like ``csrc``, with the working tree's interface to it."""
    library = BUILD / f"{name}.so"
    files = [str(sources / source) for source in (*SOURCES[1:], "thread_team.cpp")]
    interface = str(ROOT / "csrc" / "tests" / "step_library.cpp")
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-fopenmp", "-fPIC", "-shared", f"-I{sources}", interface]
    done = subprocess.run([*command, *files, "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{name} does not compile against this tree's step_library.cpp:\n{done.stderr}")
    return library


def _build_revision(revision: str) -> Path:
    sources = BUILD / "base"
    sources.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", revision, "csrc"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        raise BenchError(f"git knows no csrc of {revision!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(sources)], input=archive.stdout, check=True)
    return _build("base", sources / "csrc")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [*CASES, HUGE.name]
    parser.add_argument("--base", default="HEAD", help="the revision to compare with")
    parser.add_argument("--case", action="append", choices=names, help=f"otherwise {', '.join(names)}")
    add_rounds_flag(parser)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    BUILD.mkdir(parents=True, exist_ok=True)
    base = options.base
    built = _build_revision(base)
    libraries = {
        base: built,
        AGAIN: Path(shutil.copy(built, BUILD / "base-again.so")),
        TREE: _build("tree", ROOT / "csrc"),
    }
    for name in options.case or (*CASES, HUGE.name):
        workload = Workload(HUGE if name == HUGE.name else case_named(name))
        optimizer = SparseAdam(workload.tables)
        given = _tables_with_gradients(workload, optimizer)
        rounds = take_rounds([BuiltStep(build, library, given) for build, library in libraries.items()], options.rounds)
        yield {
            **facts(),
            "case": name,
            "base": base,
            "rounds": len(rounds),
            "ms": {build: spread_of([1e3 * seconds[build] for seconds in rounds])._asdict() for build in libraries},
            "times_base": {
                build: statistics.median(seconds[build] / seconds[base] for seconds in rounds)
                for build in (AGAIN, TREE)
            },
        }


COLUMNS = (
    Column("case", "name of the case", lambda record: str(record["case"])),
    Column(
        "base, ms", "a step of the base: median (20th to 80th percentile)", lambda r: spread_figures(r["ms"][r["base"]])
    ),
    Column("tree, ms", "the same of the working tree", lambda record: spread_figures(record["ms"][TREE])),
    Column(
        "base again, times",
        "the base loaded once more: median of the rounds' ratios",
        lambda record: f"{record['times_base'][AGAIN]:.3f}x",
    ),
    Column("tree, times", "the working tree: the same", lambda record: f"{record['times_base'][TREE]:.3f}x"),
)

SCRIPT = Script("builds", "The native step of two revisions", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
