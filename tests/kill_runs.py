"""Training runs that are killed, each in a process of its own; run as a program, which prints what happened as JSON.

A run opens the tables and moments that the last one left, compares them bit for bit with what a run in memory has at
that step, and trains on, with a checkpoint every few steps. What runs report stands in memory that they share with the
program, since they get no chance to say anything at the end.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from snapshot import bits
from torch import nn

import sparseadam
from sparseadam.initial import Init

STEPS = 120
STEPS_A_CHECKPOINT = 3
NUM_ROWS, DIM = 3000, 5
OPENING, STEPPING, COMMITTING, DONE = range(4)
PHASES = ("opening", "stepping", "committing", "done")

# Calls that change files, at each of which a run can be killed; half of a write has happened then.
CALLS = ("pwrite", "write", "fsync", "replace", "ftruncate", "posix_fallocate", "unlink", "mkdir")


class Report:
    """What runs share with the program: a phase, and the steps last committed, begun to be, and found on opening."""

    _FIELDS = struct.Struct("<4q")

    def __init__(self) -> None:
        """Begin with nothing committed."""
        self._memory = mmap.mmap(-1, self._FIELDS.size)
        self.set(phase=OPENING, committed=0, begun=0, found=-1)

    def get(self) -> dict[str, int]:
        """Return all of it by name."""
        return dict(zip(("phase", "committed", "begun", "found"), self._FIELDS.unpack(self._memory[:]), strict=True))

    def set(self, **fields: int) -> None:
        """Change some of it."""
        self._memory[:] = self._FIELDS.pack(*{**(self.get() if len(fields) < 4 else {}), **fields}.values())


class Training:
    """Two tables, one of them with moments of 8 bits that are rounded at random, and a dense layer."""

    def __init__(self, directory: Path | None) -> None:
        """Build it in memory, or open or create its files."""
        torch.manual_seed(0)
        inits = [("normal", 0.1), ("uniform", 0.2)]
        if directory is None:
            rows = torch.arange(NUM_ROWS)
            tables = [Init(*init, seed=7).values(rows, DIM, torch.float32) for init in inits]
        else:
            tables = [
                sparseadam.memory_mapped(directory / f"{number}.table", NUM_ROWS, DIM, init=init, seed=7)
                for number, init in enumerate(inits)
            ]
        self.embeddings = nn.ModuleList(
            nn.Embedding.from_pretrained(table, freeze=False, sparse=True) for table in tables
        )
        self.dense = nn.Linear(DIM, 1)
        if directory is not None:
            sparseadam.initialize_on_read(self.embeddings)
        self.optimizer = sparseadam.SparseAdam(
            [
                {"params": [self.embeddings[0].weight, *self.dense.parameters()], "dense_gradients": "adam"},
                {"params": [self.embeddings[1].weight], "moment_dtype": torch.uint8, "bias_correction": "row"},
            ],
            lr=0.01,
            generator=torch.Generator().manual_seed(3),
            moment_dir=None if directory is None else directory / "moments",
        )

    @property
    def step_count(self) -> int:
        """Steps so far."""
        state = self.optimizer.state.get(self.embeddings[0].weight)
        return state["step"] if state else 0

    def step(self) -> None:
        """Take a step, with ids that follow from its number."""
        generator = torch.Generator().manual_seed(self.step_count)
        ids = torch.randint(0, NUM_ROWS, (2, 40), generator=generator) ** 2 // NUM_ROWS  # some rows often
        self.optimizer.zero_grad()
        loss = sum((self.dense(table(ids[i])) - 1.0).pow(2).mean() for i, table in enumerate(self.embeddings))
        loss.backward()
        self.optimizer.step()

    def bits(self) -> list[Any]:
        """All that there is. Rows that were never read are brought in: a table in files must not have them yet."""
        rows = torch.arange(NUM_ROWS)
        for embedding in self.embeddings:
            if sparseadam.mapped_table.find(embedding.weight) is not None:
                sparseadam.initialize_rows(embedding.weight, rows)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = [self.optimizer.state.get(parameter) or {} for parameter in parameters]
        return [*map(bits, parameters), *({key: bits(state[key]) for key in sorted(state)} for state in states)]


def expected_bits() -> list[list[Any]]:
    """What an undisturbed run in memory has after each number of steps."""
    training = Training(None)
    expected = [training.bits()]
    for _ in range(STEPS):
        training.step()
        expected.append(training.bits())
    return expected


def run(directory: Path, report: Report, expected: list[list[Any]]) -> None:
    training = Training(directory)
    found = training.step_count
    before = report.get()
    assert found in (before["committed"], before["begun"]), f"step {found} was opened, committed were {before}"
    assert training.bits() == expected[found], f"the state opened at step {found} is not that of an undisturbed run"
    report.set(phase=STEPPING, committed=found, found=found)
    while training.step_count < STEPS:
        for _ in range(STEPS_A_CHECKPOINT):
            training.step()
        report.set(phase=COMMITTING, begun=training.step_count)
        training.optimizer.checkpoint()
        report.set(phase=STEPPING, committed=training.step_count)
    assert training.bits() == expected[STEPS], "the state at the end is not that of an undisturbed run"
    report.set(phase=DONE)


def fork(body: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        body()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def wait(child: int) -> bool:
    """Whether a run was killed; one that failed ends the program."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"a run ended by signal {os.WTERMSIG(status)}"
        return True
    if os.WEXITSTATUS(status) != 0:
        sys.exit("a run failed; see above")
    return False


def dawdle(chance: random.Random) -> None:
    """Have calls that change files take their time now and then, so that runs are killed among them as well."""
    for name in CALLS:

        def slow(*args: Any, call: Callable[..., Any], **options: Any) -> Any:
            if chance.random() < 0.05:
                time.sleep(chance.random() * 0.01)
            return call(*args, **options)

        setattr(os, name, partial(slow, call=getattr(os, name)))


def kill_at(number: int) -> None:
    """Have a run killed at its call ``number`` of those that change files, counted from now."""
    calls = 0
    for name in CALLS:

        def counted(*args: Any, name: str, call: Callable[..., Any], **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number:
                if name in ("write", "pwrite"):
                    call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        setattr(os, name, partial(counted, name=name, call=getattr(os, name)))


def at_random(directory: Path, expected: list[list[Any]], num_kills: int) -> dict[str, int]:
    """Kill runs after random times, and let the last one come to its end; one that comes to it before begins anew."""
    chance = random.Random(1)
    report = Report()
    kills = dict.fromkeys(PHASES, 0)

    def body(seed: float) -> None:
        dawdle(random.Random(seed))
        run(directory, report, expected)

    while sum(kills.values()) < num_kills:
        report.set(phase=OPENING)
        seed = chance.random()
        child = fork(lambda seed=seed: body(seed))
        time.sleep(chance.random() * 0.2)
        os.kill(child, signal.SIGKILL)
        if wait(child):
            kills[PHASES[report.get()["phase"]]] += 1
        else:
            shutil.rmtree(directory)
            directory.mkdir()
            report.set(phase=OPENING, committed=0, begun=0, found=-1)
    assert not wait(fork(lambda: run(directory, report, expected)))
    return kills


def at_every_call(directory: Path, expected: list[list[Any]]) -> dict[str, int]:
    """Kill runs at their first, second, third call and so on: through new ones, and through what takes back steps."""
    report = Report()
    kills = dict.fromkeys(PHASES, 0)

    def kill_while(is_going: Callable[[], bool]) -> None:
        number = 0

        def body() -> None:
            kill_at(number)
            run(directory, report, expected)

        while is_going():
            report.set(phase=OPENING)
            assert wait(fork(body)), "a run that was to be killed came to its end"
            kills[PHASES[report.get()["phase"]]] += 1
            number += 1

    kill_while(lambda: report.get()["found"] < 2 * STEPS_A_CHECKPOINT)
    assert report.get()["phase"] == STEPPING, "the last one was killed where there is something to take back"
    report.set(phase=OPENING)
    kill_while(lambda: report.get()["phase"] == OPENING)
    assert not wait(fork(lambda: run(directory, report, expected)))
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    want = expected_bits()
    place = Path(sys.argv[1])
    for each in ("random", "calls"):
        (place / each).mkdir()
    print(json.dumps({"random": at_random(place / "random", want, 60), "calls": at_every_call(place / "calls", want)}))
