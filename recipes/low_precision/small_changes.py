"""Half-precision weights whose updates are smaller than half the distance to the next weight."""

from dataclasses import dataclass

import torch
from torch import nn

from sparseadam import SparseAdam

NUM_ROWS, WIDTH = 64, 16
NUM_STEPS = 256
START = 1.75
# A step, in distances between neighbouring weights: rounding to nearest needs more than half of one to move.
STEP_IN_SPACINGS = 1 / 16


@dataclass(frozen=True)
class SmallChanges:
    """How far weights went down, in distances between neighbouring ones, after each step.

    Attributes:
        dtype: of the table.
        stochastic_rounding: whether it was rounded stochastically.
        mean: over all weights, ``[NUM_STEPS]``; what it should be is ``STEP_IN_SPACINGS`` times the step.
        low: the tenth percentile.
        high: the ninetieth.
    """

    dtype: torch.dtype
    stochastic_rounding: bool
    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def name(self) -> str:
        """The dtype and how it is rounded."""
        return f"{str(self.dtype).removeprefix('torch.')}, {'stochastic' if self.stochastic_rounding else 'nearest'}"


def measure_small_changes(dtype: torch.dtype, *, stochastic_rounding: bool, seed: int = 0) -> SmallChanges:
    """Step a table with a gradient of ones, to which Adam's answer is the learning rate itself.

    All weights start at 1.75 and should end at 1.75 less 16 spacings. From 1 to 2 neighbouring weights of a dtype are
    ``torch.finfo(dtype).eps`` apart throughout, and they do not leave that range.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        stochastic_rounding: how the optimizer rounds the table.
        seed: of the rounding.
    """
    spacing = torch.finfo(dtype).eps
    table = nn.Parameter(torch.full((NUM_ROWS, WIDTH), START, dtype=dtype))
    optimizer = SparseAdam(
        [table],
        lr=STEP_IN_SPACINGS * spacing,
        stochastic_rounding=stochastic_rounding,
        generator=torch.Generator().manual_seed(seed),
    )
    table.grad = torch.ones_like(table).to_sparse(1)
    quantiles = torch.tensor([0.1, 0.9])
    changes = SmallChanges(dtype, stochastic_rounding, [], [], [])
    for _ in range(NUM_STEPS):
        optimizer.step()
        moved = (START - table.detach().float()) / spacing
        low, high = moved.quantile(quantiles).tolist()
        changes.mean.append(moved.mean().item())
        changes.low.append(low)
        changes.high.append(high)
    return changes


def measure_all() -> list[SmallChanges]:
    """Measure both half-precision dtypes, rounded to nearest and stochastically."""
    return [
        measure_small_changes(dtype, stochastic_rounding=stochastic)
        for dtype in (torch.bfloat16, torch.float16)
        for stochastic in (False, True)
    ]
