"""Customers and items: matrix factorisation by Bayesian personalised ranking, judged by Recall@20.

References:
    Rendle, Freudenthaler, Gantner and Schmidt-Thieme, *BPR: Bayesian Personalized Ranking from Implicit Feedback*,
    2009, https://arxiv.org/abs/1205.2618
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .data import Interactions, Rows
from .task import Task

STANDARD_DEVIATION = 0.1
LENGTH_OF_LIST = 20


class Factorisation(nn.Module):
    """A vector a customer and a vector an item; their dot product ranks items."""

    def __init__(self, num_customers: int, num_items: int, dim: int, *, sparse: bool) -> None:
        """Draw both tables."""
        super().__init__()
        self.customers = nn.Embedding(num_customers, dim, sparse=sparse)
        self.items = nn.Embedding(num_items, dim, sparse=sparse)
        for table in self.parameters():
            nn.init.normal_(table, std=STANDARD_DEVIATION)

    def forward(self, customers: Tensor, liked: Tensor, negatives: Tensor) -> Tensor:
        """Return the mean of ``-log(sigmoid(score of liked - score of negative))``; all arguments are ``[batch]``."""
        liked_vectors, negative_vectors = self.items(torch.cat((liked, negatives))).chunk(2)
        margins = (self.customers(customers) * (liked_vectors - negative_vectors)).sum(1)
        return -functional.logsigmoid(margins).mean()


@dataclass(frozen=True)
class Recommender(Task):
    """Items that a customer bought are to rank above those that the customer did not."""

    data: Interactions
    metrics: ClassVar = (f"Recall@{LENGTH_OF_LIST}",)

    def draw_negatives(self, rows: Rows, random: np.random.Generator) -> Rows:
        """Draw an item for each interaction, uniformly among those that the customer has not in the training part."""
        customers = rows[:, 0]
        negatives = random.integers(self.data.num_items, size=len(rows))
        while len(drawn_again := np.flatnonzero(self._trained_on[customers, negatives])):
            negatives[drawn_again] = random.integers(self.data.num_items, size=len(drawn_again))
        return negatives

    def build_model(self, *, sparse: bool) -> Factorisation:
        """Build the tables of customers and of items."""
        return Factorisation(self.data.num_customers, self.data.num_items, self.dim, sparse=sparse)

    @torch.no_grad()
    def judge(self, model: Factorisation, part: str) -> dict[str, float]:
        """Return which share of a customer's held out items is among the first 20, the mean over customers with any.

        What the customer is known to have does not take a place on the list: the training part and, for the test, the
        validation part.
        """
        known, held_out = self._trained_on, _matrix(self.data, getattr(self.data, part))
        if part == "test":
            known = known | _matrix(self.data, self.data.valid)
        scores = model.customers.weight @ model.items.weight.T
        scores.masked_fill_(torch.from_numpy(known), -torch.inf)
        listed = scores.topk(min(LENGTH_OF_LIST, self.data.num_items)).indices
        found = torch.from_numpy(held_out).gather(1, listed).sum(1).numpy()
        num_held_out = held_out.sum(1)
        is_judged = num_held_out > 0
        return {self.metrics[0]: float((found[is_judged] / num_held_out[is_judged]).mean())}

    @cached_property
    def _trained_on(self) -> NDArray[np.bool_]:
        return _matrix(self.data, self.data.train)


def _matrix(data: Interactions, pairs: Rows) -> NDArray[np.bool_]:
    """Return ``[num_customers, num_items]``, true for the pairs."""
    matrix = np.zeros((data.num_customers, data.num_items), dtype=np.bool_)
    matrix[pairs[:, 0], pairs[:, 1]] = True
    return matrix
