"""A case made real: its tables, a handful of distinct gradients, and the bytes that a step on each must move."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..moments import moment_dtype
from .cases import Case, row_source
from .machine import HOST

# Enough that a step does not find the rows of the last one still in cache, few enough to be held in memory.
NUM_GRADIENTS = 8


def floor_bytes(num_touched: int, num_lookups: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes that a step must move at least.

    A touched row's table entries and both of its moments are read and written once, each lookup's values are read
    once: ``24*U*D + 4*L*D`` for float32, with U touched rows, L lookups and width D.

    Example:
        >>> floor_bytes(num_touched=3, num_lookups=5, width=2, dtype=torch.float32)
        184
    """
    row = width * (2 * dtype.itemsize + 4 * moment_dtype(dtype).itemsize)
    return num_touched * row + num_lookups * width * dtype.itemsize


@dataclass(frozen=True)
class Gradient:
    """One step's lookups into every table.

    Attributes:
        rows: int64 ``[num_lookups]`` for each table, with repeats.
        values: ``[num_lookups, width]`` for each table.
        num_touched: distinct rows, over all tables.
        floor_bytes: what a step must move at least, over all tables.
    """

    rows: list[Tensor]
    values: list[Tensor]
    num_touched: int
    floor_bytes: int


class Workload:
    """The tables of a case and the gradients that are cycled through them.

    How long a step takes does not depend on the tables' values, so contenders may step the same ones.
    """

    def __init__(self, case: Case, seed: int = 0, device: torch.device = HOST) -> None:
        """Draw everything from ``seed``, the same for every device."""
        self.case = case
        self.device = device
        # Before the tables are there: drawing takes much memory itself where tables are long.
        self.gradients = _draw_gradients(case, seed, device)
        self.tables = _make_tables(case, device)

    def with_other_tables(self) -> Workload:
        """Return the same gradients for other tables, made alike."""
        other = copy(self)
        other.tables = _make_tables(self.case, self.device)
        return other

    def give_gradients(self, number: int) -> Gradient:
        """Put a gradient on the tables as a sparse embedding's backward pass does: uncoalesced, in tensors made anew.

        What PyTorch or an optimizer keeps with a tensor it has seen before would flatter the next step on it.
        """
        gradient = self.gradients[number % NUM_GRADIENTS]
        for table, rows, values in zip(self.tables, gradient.rows, gradient.values, strict=True):
            table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)
        return gradient

    def clear_gradients(self) -> None:
        """Leave no gradient behind on the tables."""
        for table in self.tables:
            table.grad = None


def _make_tables(case: Case, device: torch.device) -> list[nn.Parameter]:
    shape = (case.num_rows, case.width)
    # Written and not merely reserved, as an initialised embedding is.
    return [nn.Parameter(torch.full(shape, 0.01, dtype=case.dtype, device=device)) for _ in range(case.num_tables)]


def _draw_gradients(case: Case, seed: int, device: torch.device) -> list[Gradient]:
    rows_of_table = [list(_draw_rows(case, seed + table)) for table in range(case.num_tables)]
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for rows in zip(*rows_of_table, strict=True):
        shape = (case.num_lookups, case.width)
        values = [torch.empty(shape, dtype=case.dtype).uniform_(-1, 1, generator=generator) for _ in rows]
        drawn = [row.to(device) for row in rows], [value.to(device) for value in values]
        gradients.append(make_gradient(case, *drawn))
    return gradients


def _draw_rows(case: Case, seed: int) -> Iterator[Tensor]:
    draw = row_source(case.distribution, case.num_rows, seed)
    return (draw(case.num_lookups) for _ in range(NUM_GRADIENTS))


def make_gradient(case: Case, rows: list[Tensor], values: list[Tensor]) -> Gradient:
    """Put the lookups of every table together."""
    num_touched = [len(torch.unique(table_rows)) for table_rows in rows]
    num_bytes = sum(floor_bytes(count, case.num_lookups, case.width, case.dtype) for count in num_touched)
    return Gradient(rows, values, sum(num_touched), num_bytes)
