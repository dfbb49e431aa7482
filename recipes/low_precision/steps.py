"""All variants on the same gradients, turn about: time of a step, and how far its moments are from float32 ones."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from sparseadam.moments import Moments

from ..word_vectors.comparison import WARM_UP_ROUNDS, Contender
from ..word_vectors.corpus import Batch
from ..word_vectors.model import SkipGram
from .variants import BASELINE, TIMED


@dataclass(frozen=True)
class MomentErrors:
    """How the moments of a variant differ from float32 ones that saw the same gradients.

    Over both tables' elements in the rows that the last step touched.

    Attributes:
        exp_avg_error: root mean square of the difference of first moments, as a share of theirs.
        longer_steps: mean of ``sqrt(v32 / v) - 1``: by which share the second moment makes steps longer.
        step_spread: standard deviation of ``sqrt(v32 / v)``.
    """

    exp_avg_error: float
    longer_steps: float
    step_spread: float


@dataclass(frozen=True)
class StepComparison:
    """What the rounds gave.

    Attributes:
        step_ms: milliseconds of each timed step, by variant.
        moment_errors: by variant, of those that store every second moment in fewer bits.
    """

    step_ms: dict[str, list[float]]
    moment_errors: dict[str, MomentErrors]


def compare_steps(model: SkipGram, batches: Iterable[Batch], *, rounds: int, lr: float, seed: int) -> StepComparison:
    """Step all variants through the same gradients, in one process; who goes first rotates.

    Each starts without moments on a clone of the model's tables. A round computes one gradient on the model, which
    itself is not changed, and hands it to all, rounded to half precision for half tables. The first rounds, in which
    most rows are new, are not timed.

    Args:
        model: trained, of float32.
        batches: at least ``rounds`` and the warm-up rounds before them.
        rounds: rounds to time, at least 1.
        lr: learning rate of all.
        seed: of stochastic rounding.
    """
    contenders = {}
    for variant in TIMED:
        tables = [nn.Parameter(table.detach().to(variant.table_dtype, copy=True)) for table in model.parameters()]
        contenders[variant.name] = Contender(tables, variant.build_optimizer(tables, lr, seed))
    order = deque(contenders.values())
    gradients: list[Tensor] = []
    for batch in islice(batches, WARM_UP_ROUNDS + rounds):
        gradients = _gradients(model, batch)
        for contender in order:
            contender.take_step([gradient.to(contender.tables[0].dtype) for gradient in gradients])
        order.rotate(1)
    touched = [gradient.coalesce().indices()[0] for gradient in gradients]
    return StepComparison(
        {name: contender.step_ms[WARM_UP_ROUNDS:] for name, contender in contenders.items()},
        {
            variant.name: _moment_errors(contenders[BASELINE.name], contenders[variant.name], touched)
            for variant in TIMED
            if variant.stores_codes_of_v
        },
    )


def _gradients(model: SkipGram, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    model(batch).backward()
    return [table.grad for table in model.parameters() if table.grad is not None]


def _moment_errors(baseline: Contender, other: Contender, touched: list[Tensor]) -> MomentErrors:
    squares = difference_squares = 0.0
    lengths = []
    for table, other_table, rows in zip(baseline.tables, other.tables, touched, strict=True):
        exact, rounded = baseline.optimizer.state[table], other.optimizer.state[other_table]
        exp_avg, exp_avg_sq = _read(exact, rows)
        rounded_exp_avg, rounded_exp_avg_sq = _read(rounded, rows)
        squares += exp_avg.square().sum().item()
        difference_squares += (rounded_exp_avg - exp_avg).square().sum().item()
        lengths.append((exp_avg_sq / rounded_exp_avg_sq).sqrt()[exp_avg_sq > 0])
    length = torch.cat(lengths)
    return MomentErrors((difference_squares / squares) ** 0.5, length.mean().item() - 1, length.std().item())


def _read(moments: Moments, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return both moments of rows as numbers, float64 ``[len(rows), width]``, in the order of the slots."""
    slots = torch.isin(moments["rows"], rows).nonzero().squeeze(1)
    return moments.read("exp_avg", slots).double(), moments.read("exp_avg_sq", slots).double()
