"""How many steps rows miss between two touches."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from .task import Task


@dataclass(frozen=True)
class Gaps:
    """The steps that the touched rows of one table had missed, over one run.

    A gap belongs to a row's touch and is the number of steps since its last one, less one; a first touch has none.

    Attributes:
        table: name of its module.
        num_rows: of the table.
        touched_share: distinct rows of a step, as a share of the table's, their mean.
        mean: of all gaps.
        median: the same.
        ninth_decile: nine tenths of all gaps are at most this.
        largest: of all gaps.
    """

    table: str
    num_rows: int
    touched_share: float
    mean: float
    median: float
    ninth_decile: float
    largest: int


def measure_gaps(task: Task, seed: int) -> list[Gaps]:
    """Look up what a run with this seed looks up, without training, and count.

    Returns:
        The gaps of each table of which some row is touched more than once.
    """
    model = task.build_model(sparse=True)
    counters = {name: _Counter(name, table) for name, table in model.named_modules() if isinstance(table, nn.Embedding)}
    with torch.no_grad():
        for batch in chain.from_iterable(task.batches(seed, epoch) for epoch in range(task.epochs)):
            model(*batch)
    return [counter.summarize() for counter in counters.values() if any(map(len, counter.gaps))]


class _Counter:
    """Sees every lookup into a table, which must be one a step."""

    def __init__(self, name: str, table: nn.Embedding) -> None:
        self.name = name
        self.last_touch = np.full(table.num_embeddings, -1)
        self.num_steps = self.num_touched = 0
        self.gaps: list[np.ndarray] = []
        table.register_forward_pre_hook(self._count)

    def _count(self, _table: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = np.unique(inputs[0].numpy())
        last = self.last_touch[rows]
        self.gaps.append((self.num_steps - last - 1)[last >= 0])
        self.last_touch[rows] = self.num_steps
        self.num_steps += 1
        self.num_touched += len(rows)

    def summarize(self) -> Gaps:
        gaps = np.concatenate(self.gaps)
        num_rows = len(self.last_touch)
        return Gaps(
            self.name,
            num_rows,
            self.num_touched / self.num_steps / num_rows,
            float(gaps.mean()),
            float(np.median(gaps)),
            float(np.quantile(gaps, 0.9)),
            int(gaps.max()),
        )
