"""Training: the optimizer chosen by one name, the loop, and what it leaves behind."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from ..command_line import RecipeError
from .corpus import Batch
from .model import SkipGram

OPTIMIZERS = ("sparseadam", "torch")
FINAL_LR_FACTOR = 1e-4  # where word2vec stops, too
LOSS_SMOOTHING = 0.98


@dataclass
class History:
    """What happened at each step of training.

    Attributes:
        losses: mean loss of a pair.
        step_ms: milliseconds spent in ``optimizer.step()``.
        num_words: words of the text that the steps stand for.
        seconds: wall time of the whole loop.
    """

    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    num_words: float = 0.0
    seconds: float = 0.0


def build_optimizer(
    name: str, tables: Iterable[nn.Parameter], lr: float, *, torch_eps: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer of that name over the tables.

    Args:
        name: ``"sparseadam"`` or ``"torch"``.
        tables: what it updates.
        lr: learning rate at the start.
        torch_eps: whether sparseadam, too, places ``eps`` where torch does.

    Raises:
        RecipeError: sparseadam is asked for and cannot be imported.
    """
    if name == "torch":
        return torch.optim.SparseAdam(list(tables), lr=lr)
    try:
        from sparseadam import SparseAdam
    except ImportError as error:
        raise RecipeError(
            f"sparseadam cannot be imported ({error}); run `pip install .` at the root of the "
            "repository, or pass --optimizer torch."
        ) from error
    return SparseAdam(list(tables), lr=lr, torch_eps=torch_eps)


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of both moments of all tables and, of ours, of what says which rows they are of."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        moments = ("exp_avg", "exp_avg_sq")
        return sum(state[name].nbytes for state in optimizer.state.values() for name in moments)
    return optimizer.moment_bytes()


def train(
    model: SkipGram,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    total_steps: int,
    words_per_step: float,
) -> History:
    """Train with a learning rate that falls linearly, showing loss and speed as it goes.

    Args:
        model: the tables.
        optimizer: what updates them.
        batches: at least ``total_steps`` of them.
        total_steps: steps to take.
        words_per_step: words of the text that one step stands for, those subsampled away included.

    Raises:
        RecipeError: the loss stops being a finite number.
    """
    scheduler = LinearLR(optimizer, 1.0, FINAL_LR_FACTOR, total_iters=total_steps)
    history = History()
    smooth_loss = None
    started = time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("training", total=total_steps, loss=0.0, speed=0.0)
        for step, batch in enumerate(islice(batches, total_steps), start=1):
            loss, step_ms = _take_step(model, optimizer, batch)
            scheduler.step()
            if not loss < float("inf"):
                raise RecipeError(f"the loss became {loss} at step {step}; pass a smaller --lr.")
            history.losses.append(loss)
            history.step_ms.append(step_ms)
            history.num_words += words_per_step
            history.seconds = time.perf_counter() - started
            smooth_loss = loss if smooth_loss is None else _smooth(smooth_loss, loss)
            speed = history.num_words / history.seconds
            progress.update(task, advance=1, loss=smooth_loss, speed=speed)
    return history


def _take_step(model: SkipGram, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    """Take one step; return the mean loss of a pair and the milliseconds of the update alone."""
    optimizer.zero_grad()
    loss = model(batch)
    loss.backward()
    started = time.perf_counter()
    optimizer.step()
    step_ms = 1000 * (time.perf_counter() - started)
    return loss.item() / len(batch.centers), step_ms


def _smooth(average: float, value: float) -> float:
    return LOSS_SMOOTHING * average + (1 - LOSS_SMOOTHING) * value


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} words/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
