"""The same batches through both optimizers: time of a step and bytes of moments."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from .corpus import Batch
from .model import SkipGram
from .training import OPTIMIZERS, build_optimizer, moment_bytes

WARM_UP_ROUNDS = 20


@dataclass
class Contender:
    """One optimizer on tables of its own.

    Attributes:
        tables: clones of the model's tables.
        optimizer: what updates them.
        step_ms: milliseconds of each timed step.
    """

    tables: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    step_ms: list[float] = field(default_factory=list)

    def take_step(self, gradients: list[Tensor]) -> None:
        """Step once on gradients computed elsewhere and note the time it took."""
        for table, gradient in zip(self.tables, gradients, strict=True):
            table.grad = gradient
        started = time.perf_counter()
        self.optimizer.step()
        self.step_ms.append(1000 * (time.perf_counter() - started))


@dataclass(frozen=True)
class Comparison:
    """The outcome for both optimizers.

    Attributes:
        step_ms: milliseconds of the timed steps of each optimizer.
        first_moment_bytes: bytes of the moments of each optimizer after the first round.
        last_moment_bytes: the same after the last round.
        relative_difference: distance between their tables, as a share of how far those moved.
        num_lookups: lookups of a step in both tables, on average.
        num_touched: distinct rows among them, on average.
    """

    step_ms: dict[str, list[float]]
    first_moment_bytes: dict[str, int]
    last_moment_bytes: dict[str, int]
    relative_difference: float
    num_lookups: float
    num_touched: float


def compare_optimizers(model: SkipGram, batches: Iterable[Batch], *, rounds: int, lr: float) -> Comparison:
    """Step both optimizers through the same gradients, turn about, in one process.

    Each optimizer starts without moments on a clone of the tables. A round computes one gradient
    on the model, which itself is not changed, and hands it to both; who goes first alternates. The
    first rounds are not timed: in them most rows are new, and what is timed is making room for
    moments.
    Summing the lookups of a repeated row is inside the timed part for both, and both place ``eps``
    where torch does, so that their tables may differ by rounding alone.

    Args:
        model: where the gradients come from.
        batches: at least ``rounds`` and the warm-up rounds before them.
        rounds: rounds to time.
        lr: learning rate of both.
    """
    contenders = {name: _enter(name, model, lr) for name in OPTIMIZERS}
    order = list(contenders.values())
    first_moment_bytes: dict[str, int] = {}
    num_lookups = num_touched = 0
    for batch in islice(batches, WARM_UP_ROUNDS + rounds):
        gradients = _gradients(model, batch)
        for contender in order:
            contender.take_step(gradients)
        order.reverse()
        first_moment_bytes = first_moment_bytes or _moment_bytes(contenders)
        num_lookups += sum(gradient._nnz() for gradient in gradients)
        num_touched += sum(gradient._indices().unique().numel() for gradient in gradients)
    return Comparison(
        step_ms={name: entry.step_ms[WARM_UP_ROUNDS:] for name, entry in contenders.items()},
        first_moment_bytes=first_moment_bytes,
        last_moment_bytes=_moment_bytes(contenders),
        relative_difference=_relative_difference(model, contenders),
        num_lookups=num_lookups / (WARM_UP_ROUNDS + rounds),
        num_touched=num_touched / (WARM_UP_ROUNDS + rounds),
    )


def _enter(name: str, model: SkipGram, lr: float) -> Contender:
    tables = [nn.Parameter(table.detach().clone()) for table in model.parameters()]
    return Contender(tables, build_optimizer(name, tables, lr, torch_eps=True))


def _moment_bytes(contenders: dict[str, Contender]) -> dict[str, int]:
    return {name: moment_bytes(entry.optimizer) for name, entry in contenders.items()}


def _gradients(model: SkipGram, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    model(batch).backward()
    return [table.grad for table in model.parameters() if table.grad is not None]


def _relative_difference(model: SkipGram, contenders: dict[str, Contender]) -> float:
    """Measure over whole tables: single entries say little where a gradient cancels to nearly 0.

    Adam takes the sign of such an entry from rounding and still moves it by the learning rate.
    """
    start = nn.utils.parameters_to_vector(model.parameters())
    ours, theirs = (nn.utils.parameters_to_vector(contenders[name].tables) for name in ("sparseadam", "torch"))
    return ((ours - theirs).norm() / (theirs - start).norm()).item()
