"""What the tasks have in common: tables to train, batches, and a judgement."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .data import Rows, Split

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task(ABC):
    """A model with its data.

    Attributes:
        name: what the report calls it.
        data: what is trained on and judged by.
        dim: length of a vector.
        batch: rows of the training part in a step.
        epochs: times the training part is read.
        metrics: what :meth:`judge` measures, the one that decides first.
    """

    name: str
    data: Split
    dim: int
    batch: int
    epochs: int
    metrics: ClassVar[tuple[str, ...]]

    def settings(self) -> dict[str, Any]:
        """Return all that a run of this task depends on, as plain values; the data as its checksum."""
        parts = (self.data.train, self.data.valid, self.data.test)
        checksum = zlib.crc32(b"".join(part.tobytes() for part in parts))
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "data"}
        return numbers | {"data": f"{checksum:08x}"}

    def batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, their negatives included: a function of both numbers and nothing else."""
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(self.data.train)
        for start in range(0, len(shuffled), self.batch):
            rows = shuffled[start : start + self.batch]
            yield (*map(torch.from_numpy, rows.T.copy()), torch.from_numpy(self.draw_negatives(rows, random)))

    @abstractmethod
    def draw_negatives(self, rows: Rows, random: np.random.Generator) -> Rows:
        """Draw what the rows of a batch are to be told from."""

    @abstractmethod
    def build_model(self, *, sparse: bool) -> nn.Module:
        """Build the tables with torch's default generator; called with a batch, the model returns its mean loss.

        All tables are ``nn.Embedding`` modules that ``forward`` calls, so that hooks see every lookup.
        """

    @abstractmethod
    def judge(self, model: nn.Module, part: str) -> dict[str, float]:
        """Rank all candidates for what was held out in ``"valid"`` or in ``"test"``; the tables are read directly."""
