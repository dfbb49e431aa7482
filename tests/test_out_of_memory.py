"""Memory may run out anywhere: whatever raises then has changed nothing, and can be tried again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from gradients import coo
from snapshot import snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseadam import SparseAdam, moments, replay
from sparseadam.update import reference

ROWS, WIDTH = 24, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "exact": {"weight_decay": 0.1, "weight_decay_mode": "exact", "bias_correction": "row"},
    "amsgrad": {"amsgrad": True, "second_moment": "row"},
    "uint8": {"moment_dtype": torch.uint8},
    "bfloat16": {"moment_dtype": torch.bfloat16, "nonfinite": "skip"},
    "replay": {"missed_steps": "replay", "weight_decay": 0.1},
}


class OutOfMemory(TorchDispatchMode):
    """Refuses to make another tensor after so many, or that one only; what writes to tensors that there are goes on."""

    def __init__(self, num_tensors: int, *, only_once: bool = False) -> None:
        """Let so many be made."""
        super().__init__()
        self.num_left = num_tensors
        self.only_once = only_once

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Be asked before each operation."""
        makes_a_tensor = not func._schema.is_mutable and not func.is_view
        if makes_a_tensor:
            if self.num_left == 0:
                self.num_left -= self.only_once
                raise torch.OutOfMemoryError("out of memory")
            self.num_left -= 1
        return func(*args, **kwargs or {})


def trained(options: dict[str, Any]) -> tuple[nn.Parameter, SparseAdam]:
    """Return a table and its optimizer after three steps, some rows of which are behind where they can be."""
    table = nn.Parameter(torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH))
    generator = torch.Generator().manual_seed(0)
    optimizer = SparseAdam([table], lr=0.1, backend="reference", generator=generator, **options)
    for step in range(3):
        give_gradient(table, optimizer, torch.arange(step, ROWS, 5))
        optimizer.step()
    give_gradient(table, optimizer, torch.arange(3, ROWS, 2))
    return table, optimizer


def give_gradient(table: nn.Parameter, optimizer: SparseAdam, rows: torch.Tensor) -> None:
    """Have a gradient of rows, which are brought up to date."""
    optimizer.catch_up(table, rows)
    table.grad = coo(rows, torch.linspace(1, 2, len(rows) * WIDTH).view(len(rows), WIDTH), table.shape)


FORGOTTEN = torch.tensor([0, 1, 2, 11, 4])

ACTS: dict[str, Callable[[nn.Parameter, SparseAdam], Any]] = {
    "step": lambda _, optimizer: optimizer.step(),
    "catch_up": lambda table, optimizer: optimizer.catch_up(table, torch.tensor([0, 3, 1, 8, 0])),
    "forget": lambda table, optimizer: optimizer.forget(table, FORGOTTEN),
    "flush": lambda _, optimizer: optimizer.flush(),
    "state_dict": lambda _, optimizer: optimizer.state_dict(),
    "resize": lambda table, optimizer: optimizer.resize(table, ROWS + 2),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("act", ["step", "catch_up", "forget"])
def test_what_finds_no_memory_has_changed_nothing(act: str, options: str) -> None:
    """A step in which memory ran out had written moments and not the table; ``forget`` had cleared the index."""
    (undisturbed_table, undisturbed), (table, optimizer) = trained(OPTIONS[options]), trained(OPTIONS[options])
    if act == "forget":  # which does so first, and may
        undisturbed.catch_up(undisturbed_table, FORGOTTEN)
        optimizer.catch_up(table, FORGOTTEN)
    before = snapshot(optimizer)
    num_tensors = 0
    while True:
        try:
            with OutOfMemory(num_tensors):
                ACTS[act](table, optimizer)
            break
        except torch.OutOfMemoryError:
            assert snapshot(optimizer) == before, f"with memory for {num_tensors} tensors"
        num_tensors += 1
    ACTS[act](undisturbed_table, undisturbed)
    assert snapshot(optimizer) == snapshot(undisturbed)
    assert num_tensors > 0 or (act == "catch_up" and options != "replay")


PASSES = [
    *itertools.product(("flush", "resize"), ("exact", "replay")),
    ("state_dict", "replay"),
    ("step", "replay"),
]


@pytest.mark.parametrize(("act", "options"), PASSES)
def test_a_pass_over_a_table_that_finds_no_memory_does_each_row_once(
    act: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done of it was done again by the next one: rows decayed twice, and moments. A step ends in one here."""
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 8)
    monkeypatch.setattr(replay, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(moments, "ROWS_AT_ONCE", 4)
    if act == "step":
        monkeypatch.setattr(replay, "_MAX_STEPS", 4)
        monkeypatch.setattr(replay, "_ROWS_A_STEP", ROWS)

    def made_ready() -> tuple[nn.Parameter, SparseAdam]:
        table, optimizer = trained(OPTIONS[options])
        if act == "resize":
            table.grad = None
        return table, optimizer

    undisturbed_table, undisturbed = made_ready()
    ACTS[act](undisturbed_table, undisturbed)
    undisturbed.flush()
    num_tensors, was_refused = 0, True
    while was_refused:
        table, optimizer = made_ready()
        num_steps = optimizer.state[table]["step"]
        with OutOfMemory(num_tensors, only_once=True) as memory, suppress(torch.OutOfMemoryError):
            ACTS[act](table, optimizer)
        was_refused = memory.num_left < 0
        if act != "step" or optimizer.state[table]["step"] == num_steps:
            ACTS[act](table, optimizer)
        optimizer.flush()  # which a step that is taken leaves to the next one
        assert snapshot(optimizer) == snapshot(undisturbed), f"without the tensor after {num_tensors}"
        num_tensors += 1 + num_tensors // 16
    assert num_tensors > 20
