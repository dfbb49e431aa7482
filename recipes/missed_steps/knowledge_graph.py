"""A knowledge graph: DistMult with sampled negatives, judged by the rank of the entity that a triple leaves out.

References:
    Yang, Yih, He, Gao and Deng, *Embedding Entities and Relations for Learning and Inference in Knowledge Bases*, 2015,
    https://arxiv.org/abs/1412.6575
    Lacroix, Usunier and Obozinski, *Canonical Tensor Decomposition for Knowledge Base Completion*, 2018, for inverse
    relations, https://arxiv.org/abs/1806.07297
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Rows, Triples
from .task import Task

QUERIES_AT_ONCE = 512
LENGTH_OF_LIST = 10


class DistMult(nn.Module):
    """A vector an entity, and two a relation: the score of a triple is ``sum(head * relation * tail)``.

    A triple asks two questions: which tail belongs to the head and the relation, and which head to the tail and the
    inverse of the relation, which has a row of its own.
    """

    def __init__(self, num_entities: int, num_relations: int, dim: int, *, sparse: bool) -> None:
        """Draw the entities with standard deviation ``dim**-0.5``, the relations with 1."""
        super().__init__()
        self.num_relations = num_relations
        self.entities = nn.Embedding(num_entities, dim, sparse=sparse)
        self.relations = nn.Embedding(2 * num_relations, dim, sparse=sparse)
        nn.init.normal_(self.entities.weight, std=dim**-0.5)
        nn.init.normal_(self.relations.weight)

    def forward(self, heads: Tensor, relations: Tensor, tails: Tensor, negatives: Tensor) -> Tensor:
        """Return the mean cross entropy of the right answers among the negatives, over both questions.

        Args:
            heads: ``[batch]``.
            relations: ``[batch]``.
            tails: ``[batch]``.
            negatives: ``[num_negatives]`` entities, wrong answers to all questions of the batch.
        """
        vectors = self.entities(torch.cat((heads, tails, negatives)))
        head_vectors, tail_vectors, negative_vectors = vectors.split((len(heads), len(tails), len(negatives)))
        relation_vectors = self.relations(torch.cat((relations, relations + self.num_relations)))
        questions = torch.cat((head_vectors, tail_vectors)) * relation_vectors
        right = (questions * torch.cat((tail_vectors, head_vectors))).sum(1, keepdim=True)
        scores = torch.cat((right, questions @ negative_vectors.T), 1)
        return functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


@dataclass(frozen=True)
class KnowledgeGraph(Task):
    """Entities that a triple holds are to rank above others in their place.

    Attributes:
        negatives: entities drawn for each batch, uniformly; right answers among them are not taken out.
    """

    data: Triples
    negatives: int
    metrics: ClassVar = ("MRR", f"Hits@{LENGTH_OF_LIST}")

    def draw_negatives(self, rows: Rows, random: np.random.Generator) -> Rows:
        """Draw the entities that all questions of the batch share."""
        return random.integers(self.data.num_entities, size=self.negatives)

    def build_model(self, *, sparse: bool) -> DistMult:
        """Build the tables of entities and of relations."""
        return DistMult(self.data.num_entities, self.data.num_relations, self.dim, sparse=sparse)

    @torch.no_grad()
    def judge(self, model: DistMult, part: str) -> dict[str, float]:
        """Return the mean reciprocal rank of the right answers, and which share of them is among the first ten.

        All entities are ranked but the other right answers, of any part ("filtered"). Equal scores share the mean of
        their ranks.
        """
        subjects, relations, answers = self._ask(getattr(self.data, part)).T
        ranks = []
        for start in range(0, len(answers), QUERIES_AT_ONCE):
            block = slice(start, start + QUERIES_AT_ONCE)
            questions = model.entities.weight[subjects[block]] * model.relations.weight[relations[block]]
            scores = questions @ model.entities.weight.T
            right = scores.gather(1, torch.from_numpy(answers[block, None]))
            scores[self._right_answers(subjects[block], relations[block])] = -torch.inf
            ranks.append(1 + (scores > right).sum(1) + (scores == right).sum(1) / 2)
        rank = torch.cat(ranks).double()
        return {"MRR": (1 / rank).mean().item(), self.metrics[1]: (rank <= LENGTH_OF_LIST).double().mean().item()}

    def _ask(self, triples: Rows) -> Rows:
        """Return both questions of each triple with their answers: ``[2 * num_triples, 3]``."""
        heads, relations, tails = triples.T
        return np.concatenate(
            (triples, np.stack((tails, relations + self.data.num_relations, heads), axis=1)),
        )

    def _right_answers(self, subjects: Rows, relations: Rows) -> tuple[Rows, Rows]:
        """Return the place of each right answer in a matrix of scores: number of the question, and entity."""
        keys, answers = self._known
        asked = subjects * 2 * self.data.num_relations + relations
        first, last = np.searchsorted(keys, asked, side="left"), np.searchsorted(keys, asked, side="right")
        counts = last - first
        question = np.repeat(np.arange(len(asked)), counts)
        place = np.arange(len(question)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        return question, answers[place]

    @cached_property
    def _known(self) -> tuple[Rows, Rows]:
        """A number for each question of all parts, ascending, and the answer to it."""
        questions = self._ask(np.concatenate((self.data.train, self.data.valid, self.data.test)))
        keys = questions[:, 0] * 2 * self.data.num_relations + questions[:, 1]
        order = np.argsort(keys, kind="stable")
        return keys[order], questions[order, 2]
