"""Training runs that differ in nothing but the optimizer: same first tables, same batches, same negatives."""

import math
import time
from dataclasses import dataclass

import torch

from sparseadam import SparseAdam

from ..command_line import RecipeError
from .methods import Method
from .task import Task


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        method: name of the method.
        lr: learning rate of all steps.
        seed: of tables, batches and negatives.
        losses: mean loss of a row of the training part, by epoch, as it was when its batch came.
        valid: what the trained model's judgement is, on the validation part.
        test: the same on the test part.
        seconds: wall time of an epoch, without judging, their mean.
    """

    method: str
    lr: float
    seed: int
    losses: list[float]
    valid: dict[str, float]
    test: dict[str, float]
    seconds: float


def train(task: Task, method: Method, lr: float, seed: int) -> Run:
    """Train from the start, and judge the tables at the end.

    Raises:
        RecipeError: the loss stops being a finite number.
    """
    torch.manual_seed(seed)
    model = task.build_model(sparse=method.sparse)
    optimizer = method.build_optimizer(model, lr)
    losses = []
    started = time.perf_counter()
    for epoch in range(task.epochs):
        loss_sum = 0.0
        for batch in task.batches(seed, epoch):
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(batch[0])
        losses.append(loss_sum / len(task.data.train))
        if not math.isfinite(losses[-1]):
            raise RecipeError(f"{task.name}: the loss of {method.name} became {losses[-1]} with a rate of {lr:g}.")
    seconds = (time.perf_counter() - started) / task.epochs
    if isinstance(optimizer, SparseAdam):
        optimizer.flush()  # the judgement reads whole tables
    return Run(method.name, lr, seed, losses, task.judge(model, "valid"), task.judge(model, "test"), seconds)
