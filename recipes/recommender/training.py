"""Training and what came of it: the loop of every process, recall, and what was sent."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from sparseadam.distributed import load_checkpoint, save_checkpoint

from ..command_line import RecipeError
from .model import Factors
from .purchases import Batches, Purchases

FINAL_LR_FACTOR = 0.05
TOP = 20


@dataclass(frozen=True)
class Outcome:
    """What training took and gave, of all processes together.

    Attributes:
        first_step: 0, or that of the checkpoint it went on from.
        losses: mean loss of a pair, by step.
        seconds: of the loop.
        sent: bytes to other processes in the loop, by what they were.
    """

    first_step: int
    losses: list[float]
    seconds: float
    sent: dict[str, int]


def train(
    model: Factors,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    total_steps: int,
    checkpoints: Path | None,
    save_every: int,
    on_step: Callable[[int, float], None],
) -> Outcome:
    """Train with a learning rate that falls linearly, from the last checkpoint if there is one.

    Args:
        model: the tables.
        optimizer: what updates them.
        batches: for all processes together.
        total_steps: steps of the run, those before the checkpoint included.
        checkpoints: the folder for them, or None.
        save_every: steps between two.
        on_step: called with the number of steps taken and the mean loss of a pair.

    Raises:
        RecipeError: the loss stops being a finite number.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first_lrs = [group["lr"] for group in optimizer.param_groups]  # a checkpoint's are those of its step
    first_step = (load_checkpoint(checkpoints, model, optimizer) if checkpoints else None) or 0
    losses: list[float] = []
    sent_before = _sent(model)
    started = time.perf_counter()
    for step in range(first_step, total_steps):
        batch = batches.at(step)
        for group, first_lr in zip(optimizer.param_groups, first_lrs, strict=True):
            group["lr"] = first_lr * _lr_factor(step, total_steps)
        optimizer.zero_grad()
        loss = model(batch.part(rank, world_size))
        loss.backward()
        optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / len(batch.items))
        if not losses[-1] < float("inf"):
            raise RecipeError(f"the loss became {losses[-1]} at step {step + 1}; pass a smaller --lr.")
        on_step(step + 1, losses[-1])
        if checkpoints and (step + 1) % save_every == 0:
            save_checkpoint(checkpoints, step + 1, model, optimizer)
    seconds = time.perf_counter() - started
    sent = {what: num_bytes - sent_before[what] for what, num_bytes in _sent(model).items()}
    return Outcome(first_step, losses, seconds, sent)


def _lr_factor(step: int, total_steps: int) -> float:
    return 1 - (1 - FINAL_LR_FACTOR) * step / total_steps


def _sent(model: Factors) -> dict[str, int]:
    """Return what all processes have sent for both tables so far."""
    tables = (model.customers, model.items)
    names = ("headers", "ids", "rows", "gradients")
    sums = torch.tensor([sum(getattr(table.traffic, name) for table in tables) for name in names])
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


@torch.no_grad()
def measure_recall(model: Factors, purchases: Purchases) -> float:
    """Return the mean over customers of how many of their items held out are among the ``TOP`` ranked first.

    A customer's recall is the found ones' share of the most that could be: all that were held out, or ``TOP``. Items
    that it is known to have bought are not ranked.
    """
    scores_of = _scores_by_model(model, purchases)
    return _mean_recall(purchases, scores_of)


def measure_popular_recall(purchases: Purchases) -> float:
    """Return the recall of ranking items by how often they are bought, for everyone alike."""
    counts = torch.bincount(purchases.items, minlength=purchases.num_items).float()
    return _mean_recall(purchases, lambda customers: counts.expand(len(customers), -1))


def _scores_by_model(model: Factors, purchases: Purchases) -> Callable[[torch.Tensor], torch.Tensor]:
    items = model.items(torch.arange(purchases.num_items))
    return lambda customers: model.customers(customers) @ items.T


def _mean_recall(purchases: Purchases, scores_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Judge this process's share of the customers, and add up what all found."""
    tested = torch.tensor([number for number, held_out in enumerate(purchases.held_out) if held_out])
    own = tested.tensor_split(dist.get_world_size())[dist.get_rank()]
    scores = scores_of(own).clone()
    place_of = torch.full((purchases.num_customers,), -1)
    place_of[own] = torch.arange(len(own))
    is_own = place_of[purchases.customers] >= 0
    scores[place_of[purchases.customers[is_own]], purchases.items[is_own]] = -torch.inf
    best = scores.topk(min(TOP, purchases.num_items)).indices.tolist()
    total = torch.zeros(1, dtype=torch.float64)
    for customer, ranked in zip(own.tolist(), best, strict=True):
        held_out = set(purchases.held_out[customer])
        total += len(held_out.intersection(ranked)) / min(len(held_out), TOP)
    dist.all_reduce(total)
    return total.item() / len(tested)
