"""Instructions of fixed kernel calls, counted by callgrind, against stored figures.

A clock says something else every time and on every machine; a count of instructions hardly changes unless the code or
the compiler does, so it can guard every commit. It says nothing of memory: what a change gains, the clock must say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).resolve().with_suffix(".json")
BUILD = ROOT / "build" / "instructions"
# As the package is built, but without OpenMP, whose runtime would be counted too.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread")
SOURCES = (
    "tests/step_test.cpp",
    "step.cpp",
    "partition.cpp",
    "row_update.cpp",
    "plain_rows.cpp",
    "any_rows.cpp",
    "history.cpp",
    "catch_up.cpp",
    "catch_up_rows.cpp",
)

TOLERANCE = 0.03
OTHER_COMPILER_TOLERANCE = 0.15
STORE_HINT = "`make instructions ARGS=--store`"


class InstructionsError(Exception):
    """What keeps the instructions from being counted or compared, said to the user."""


@dataclass(frozen=True)
class Origin:
    """What counts depend on beside the code.

    Attributes:
        compiler: "gcc" or "clang".
        version: the compiler's, as "12.2.0".
        machine: the architecture, as "x86_64".
    """

    compiler: str
    version: str
    machine: str

    def __str__(self) -> str:
        """Name the compiler and the architecture."""
        return f"{self.compiler} {self.version} on {self.machine}"

    def is_like(self, other: Origin) -> bool:
        """Whether the compilers are of one kind and one major version."""
        return (self.compiler, self.version.split(".")[0]) == (other.compiler, other.version.split(".")[0])


@dataclass(frozen=True)
class Stored:
    """The figures to compare with, and what they were made with."""

    origin: Origin
    counts: dict[str, int]


def main() -> int:
    """Count, show and compare or store; return the exit code."""
    parser = argparse.ArgumentParser(description="Instructions of fixed kernel calls against stored figures.")
    parser.add_argument("--store", action="store_true", help=f"store what is found in {STORED.name}")
    options = parser.parse_args()
    try:
        return _run(options.store)
    except InstructionsError as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 1


def _run(store: bool) -> int:
    if shutil.which("valgrind") is None:
        raise InstructionsError(
            "valgrind is not installed: get it with `apt-get install valgrind` or your system's like"
        )
    compiler = os.environ.get("CXX", "g++")
    origin = _origin_of(compiler)
    stored = None if store else _read_stored()
    if stored is not None and stored.origin.machine != origin.machine:
        raise InstructionsError(
            f"the stored figures are from {stored.origin.machine} and this is {origin.machine}, which cannot be"
            f" compared; to guard this machine, store its own with {STORE_HINT}"
        )
    program = _build(compiler)
    counts = {case: _count(program, case) for case in _output_of([program, "cases"]).splitlines()}
    if stored is None:
        _print_table(counts, {})
        STORED.write_text(json.dumps({"origin": asdict(origin), "counts": counts}, indent=2) + "\n")
        print(f"Stored in {STORED.relative_to(ROOT)}, made with {origin}.")
        return 0
    _print_table(counts, stored.counts)
    sys.stdout.flush()  # the table stands before what is said of it, in a log too
    return _compare(counts, stored, origin)


def _compare(counts: dict[str, int], stored: Stored, origin: Origin) -> int:
    tolerance = TOLERANCE
    if not origin.is_like(stored.origin):
        tolerance = OTHER_COMPILER_TOLERANCE
        print(f"Stored with {stored.origin}, found with {origin}: compared with a tolerance of {tolerance:.0%}.")
    more, fewer = [], []
    for case, found in counts.items():
        if case not in stored.counts:
            more.append(f"{case}: no stored figure; found {found:,}; store it with {STORE_HINT}")
            continue
        change = found / stored.counts[case] - 1
        figures = f"{case}: {stored.counts[case]:,} stored, {found:,} found ({change:+.1%})"
        if change > tolerance:
            more.append(figures)
        elif change < -tolerance:
            fewer.append(figures)
    for case in sorted(stored.counts.keys() - counts.keys()):
        print(f"{case}: stored, but not known to this program or processor; not compared.")
    if fewer:
        print("Fewer instructions than stored:", *fewer, sep="\n  ")
        print(f"To guard the gain, store the new figures with {STORE_HINT}.")
    if more:
        print(f"Beyond the tolerance of {tolerance:.0%}:", *more, sep="\n  ", file=sys.stderr)
        print(f"If the change is worth it, store the new figures with {STORE_HINT}.", file=sys.stderr)
        return 1
    print(f"No case takes over {tolerance:.0%} more instructions than stored.")
    return 0


def _print_table(counts: dict[str, int], stored: dict[str, int]) -> None:
    width = max(map(len, counts))
    print(f"{'case':{width}}  {'stored':>13}  {'found':>13}  change")
    for case, found in counts.items():
        before = stored.get(case)
        if before is None:
            print(f"{case:{width}}  {'-':>13}  {found:13,}")
        else:
            print(f"{case:{width}}  {before:13,}  {found:13,}  {found / before - 1:+.2%}")


def _read_stored() -> Stored:
    if not STORED.exists():
        raise InstructionsError(f"no figures are stored yet; store them with {STORE_HINT}")
    try:
        read = json.loads(STORED.read_text())
        return Stored(Origin(**read["origin"]), dict(read["counts"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InstructionsError(f"{STORED} cannot be read ({error}); write it anew with {STORE_HINT}") from error


def _origin_of(compiler: str) -> Origin:
    banner = _output_of([compiler, "--version"]).splitlines()[0]
    versions = re.findall(r"\d+\.\d+(?:\.\d+)?", banner)
    if not versions:
        raise InstructionsError(f"`{compiler} --version` names no version: {banner}")
    return Origin("clang" if "clang" in banner else "gcc", versions[-1], platform.machine())


def _build(compiler: str) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "step_test"
    _output_of([compiler, *FLAGS, *(ROOT / "csrc" / source for source in SOURCES), "-o", program])
    return program


def _count(program: Path, case: str) -> int:
    out = BUILD / f"{case.replace(' ', '.')}.callgrind"
    options = ("--tool=callgrind", "--toggle-collect=counted_call", f"--callgrind-out-file={out}")
    _output_of(["valgrind", *options, program, "call", *case.split()])
    totals = re.search(r"^totals: (\d+)", out.read_text(), re.MULTILINE)
    if totals is None or int(totals[1]) == 0:
        raise InstructionsError(f"callgrind counted nothing for {case}; its output is {out}")
    return int(totals[1])


def _output_of(command: list[str | Path]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise InstructionsError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        text = " ".join(map(str, command))
        raise InstructionsError(f"`{text}` ended with code {error.returncode}:\n{error.stderr}") from error


if __name__ == "__main__":
    sys.exit(main())
