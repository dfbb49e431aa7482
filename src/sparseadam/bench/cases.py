"""What is measured: the cases, what a step of each must reach, and where their rows come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import UsageError

ZIPF_EXPONENT = 1.05

# What a step of ours is compared with; these names are the keys of results.
TORCH_SPARSE = "torch_sparse_adam"
FUSED_STEP = "fused_adam_step"
FUSED_WITH_GRADIENT = "fused_adam_with_gradient"
FLOOR = "floor"

# Draws the rows of the next lookups, int64 ``[count]``.
RowSource = Callable[[int], Tensor]


@dataclass(frozen=True)
class Case:
    """A step's shape.

    Attributes:
        name: how it is called on the command line and in tables.
        num_tables: tables stepped at once, all alike.
        num_rows: rows of each.
        width: elements of a row.
        num_lookups: lookups into each table.
        distribution: ``"zipf"``, ``"uniform"`` or the path of a text file of row numbers.
        dtype: of the tables and their gradients.
        targets: the least median ratio that each comparison must show.
    """

    name: str
    num_tables: int
    num_rows: int
    width: int
    num_lookups: int
    distribution: str
    dtype: torch.dtype = torch.float32
    targets: Mapping[str, float] = field(default_factory=dict)


def _case(
    name: str,
    shape: tuple[int, int, int],
    num_lookups: int,
    distribution: str,
    torch_sparse: float,
    **more_targets: float,
) -> Case:
    # Wherever up to all rows are touched, ours is to be no slower than a dense embedding's gradient and step.
    targets = {TORCH_SPARSE: torch_sparse, FUSED_WITH_GRADIENT: 1.0, **more_targets}
    return Case(name, *shape, num_lookups, distribution, targets=targets)


CASES = (
    _case("seed", (1, 1_000, 50), 20, "uniform", 8),
    _case("small", (1, 100_000, 16), 65_536, "zipf", 10, fused_adam_step=1),
    _case("words", (1, 1_000_000, 64), 4_096, "zipf", 9, floor=0.6),
    _case("zipf", (1, 1_000_000, 64), 65_536, "zipf", 12, floor=0.75),
    _case("uniform", (1, 1_000_000, 64), 65_536, "uniform", 12, floor=0.8),
    _case("wide-zipf", (1, 1_000_000, 128), 262_144, "zipf", 9, floor=0.75),
    _case("wide-uniform", (1, 1_000_000, 128), 262_144, "uniform", 18, floor=0.85),
    _case("many-tables", (26, 100_000, 16), 2_048, "zipf", 15),
    _case("big", (1, 10_000_000, 64), 65_536, "zipf", 12, floor=0.6),
)


def case_named(name: str) -> Case:
    """Return one of the cases above."""
    return next(case for case in CASES if case.name == name)


def row_source(distribution: str, num_rows: int, seed: int) -> RowSource:
    """Return what draws rows in ``[0, num_rows)``; the same seed draws the same rows.

    Args:
        distribution: ``"zipf"`` (exponent 1.05 over a random permutation of the rows), ``"uniform"``, or the path of a
            text file of row numbers separated by white space, taken in order and from the start again at its end.
        num_rows: rows of the table.
        seed: fixes all chance; a file leaves none.

    Raises:
        UsageError: the file cannot be read, holds no row, or holds something that is not a row of the table.
    """
    generator = torch.Generator().manual_seed(seed)
    if distribution == "uniform":
        return lambda count: torch.randint(num_rows, (count,), generator=generator)
    if distribution == "zipf":
        return _zipf_source(num_rows, generator)
    return _repeating_source(read_rows(Path(distribution), num_rows))


def _zipf_source(num_rows: int, generator: torch.Generator) -> RowSource:
    """Sample by inverting the cumulative distribution; rank r has weight ``r ** -ZIPF_EXPONENT``."""
    cumulative = torch.arange(1, num_rows + 1, dtype=torch.float64).pow_(-ZIPF_EXPONENT).cumsum_(0)
    row_of_rank = torch.randperm(num_rows, generator=generator)

    def draw(count: int) -> Tensor:
        position = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative[-1]
        # Rounding may carry the largest positions past the end.
        return row_of_rank[torch.searchsorted(cumulative, position, right=True).clamp_(max=num_rows - 1)]

    return draw


def _repeating_source(rows: Tensor) -> RowSource:
    next_place = 0

    def draw(count: int) -> Tensor:
        nonlocal next_place
        places = torch.arange(next_place, next_place + count) % len(rows)
        next_place = (next_place + count) % len(rows)
        return rows[places]

    return draw


@cache  # every table of a case reads the same file
def read_rows(path: Path, num_rows: int) -> Tensor:
    """Read row numbers separated by white space, int64, each in ``[0, num_rows)``.

    Raises:
        UsageError: the file cannot be read, holds no row, or holds something that is not a row of the table.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file; it must hold row numbers separated by white space.") from None
    except OSError as error:
        raise UsageError(f"cannot read the row numbers in {path}: {error.strerror or error}.") from None
    if not words:
        raise UsageError(f"{path} holds no row numbers; it must hold at least one.")
    return torch.tensor([_row(word, place, path, num_rows) for place, word in enumerate(words, start=1)])


def _row(word: str, place: int, path: Path, num_rows: int) -> int:
    try:
        row = int(word)
    except ValueError:
        raise UsageError(f"{path} holds {word[:40]!r} at place {place}, which is not a row number.") from None
    if not 0 <= row < num_rows:
        raise UsageError(
            f"{path} names row {row} at place {place}, but the table has rows 0 to {num_rows - 1}; "
            "pass --rows with the size of the table that it was recorded from."
        )
    return row
