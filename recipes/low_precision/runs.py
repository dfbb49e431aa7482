"""Training runs that differ in nothing but a variant: same first tables, same batches."""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import islice

import torch

from ..word_vectors.cli import build_batches, build_model
from ..word_vectors.corpus import BatchStream, Corpus
from ..word_vectors.model import SkipGram
from ..word_vectors.training import train
from ..word_vectors.vectors import WordVectors, measure_agreement
from .variants import Variant

FINAL_SHARE = 0.05  # of the steps, over which the final loss is averaged
CONTINUED_SEED_OFFSET = 10_000  # batches that no run was trained on


@dataclass(frozen=True)
class Task:
    """What all runs have in common.

    Attributes:
        corpus: the text.
        settings: the word-vector recipe's flags.
        judged_pairs: WordSim-353, or None where it is not here.
    """

    corpus: Corpus
    settings: argparse.Namespace
    judged_pairs: list[tuple[str, str, float]] | None


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        variant: name of the variant.
        seed: of tables, batches and rounding.
        losses: mean loss of a pair at each step.
        correlation: Spearman's, with WordSim-353; None where that is not here or knows too few of the words.
        moment_bytes: of the optimizer's whole state.
        table_bytes: of both tables.
    """

    variant: str
    seed: int
    losses: list[float]
    correlation: float | None
    moment_bytes: int
    table_bytes: int

    @property
    def final_loss(self) -> float:
        """Mean loss of a pair over the last steps."""
        return mean_of_last(self.losses)


def mean_of_last(losses: list[float]) -> float:
    """Return the mean over the last ``FINAL_SHARE`` of the steps."""
    return statistics.fmean(losses[-math.ceil(FINAL_SHARE * len(losses)) :])


def train_variant(task: Task, variant: Variant, seed: int) -> tuple[Run, SkipGram]:
    """Train from the start, as the settings say.

    Returns:
        What came of it, and the trained model.
    """
    settings = task.settings
    torch.manual_seed(seed)
    model = build_model(task.corpus, settings.dim)
    batches = build_batches(task.corpus, settings, seed)
    num_steps = min(math.ceil(settings.epochs * batches.steps_per_epoch()), settings.steps or sys.maxsize)
    return _train(task, variant, model, batches, seed, settings.lr, num_steps), model


def continue_variant(task: Task, variant: Variant, trained: SkipGram, seed: int, *, lr: float, num_steps: int) -> Run:
    """Store a trained model's tables as the variant does, and train on with a fresh optimizer.

    Args:
        task: what the model was trained on.
        variant: how tables and moments are stored.
        trained: a float32 model, which stays as it is.
        seed: of the run that it came from; the batches are others.
        lr: learning rate at the start.
        num_steps: steps to take.
    """
    model = build_model(task.corpus, task.settings.dim)
    model.load_state_dict(trained.state_dict())
    return _train(task, variant, model, _further_batches(task, seed), seed, lr, num_steps)


def losses_without_training(task: Task, trained: SkipGram, seed: int, num_steps: int) -> list[float]:
    """Return the mean loss of a pair in each batch that ``continue_variant`` trains on, the model left as it is."""
    with torch.no_grad():
        return [trained(batch).item() / len(batch.centers) for batch in islice(_further_batches(task, seed), num_steps)]


def _further_batches(task: Task, seed: int) -> BatchStream:
    return build_batches(task.corpus, task.settings, seed + CONTINUED_SEED_OFFSET)


def _train(
    task: Task, variant: Variant, model: SkipGram, batches: BatchStream, seed: int, lr: float, num_steps: int
) -> Run:
    variant.store_tables(model)
    optimizer = variant.build_optimizer(model.parameters(), lr, seed)
    words_per_step = len(task.corpus.rows) / batches.steps_per_epoch()
    history = train(model, optimizer, batches, total_steps=num_steps, words_per_step=words_per_step)
    table_bytes = sum(table.nbytes for table in model.parameters())
    return Run(variant.name, seed, history.losses, _correlation(task, model), optimizer.moment_bytes(), table_bytes)


def _correlation(task: Task, model: SkipGram) -> float | None:
    if task.judged_pairs is None:
        return None
    vectors = WordVectors(task.corpus.vocabulary, model.centers.weight.detach().float().numpy())
    agreement = measure_agreement(vectors, task.judged_pairs)
    return None if agreement is None else agreement.correlation
