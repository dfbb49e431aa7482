"""Text in, training pairs out: vocabulary, subsampling, windows and negative samples.

Everything past reading the file is a handful of NumPy operations on whole arrays, so that training
waits for the tables and not for Python.

References:
    Mikolov, Sutskever, Chen, Corrado and Dean, *Distributed Representations of Words and Phrases
    and their Compositionality*, 2013, https://arxiv.org/abs/1310.4546
"""

import gzip
import io
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..command_line import RecipeError

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
GZIP_MAGIC = b"\x1f\x8b"
BYTES_LOOKED_AT = 1024
FEWEST_ROWS = 50
WORDS_PER_BLOCK = 2_000_000

Rows = NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """A text as rows of the tables.

    Attributes:
        vocabulary: the word of each row, most frequent first.
        counts: how often each word occurs, ``[num_rows]`` int64.
        rows: the text as rows in reading order, ``[num_words]`` int32; rare words are left out.
        lines: the line that each word stands on, ``[num_words]`` int32; no window crosses a line.
    """

    vocabulary: list[str]
    counts: NDArray[np.int64]
    rows: Rows
    lines: Rows


@dataclass(frozen=True)
class Batch:
    """Pairs of one step, and the negative samples that go with them.

    Attributes:
        centers: rows of the words in the middle of their windows, ``[num_pairs]`` int64.
        contexts: rows of the words seen beside them, ``[num_pairs]`` int64.
        negatives: rows drawn at random, ``[num_groups, negatives]`` int64; the pairs of a group,
            which are neighbours in the batch, share them.
    """

    centers: NDArray[np.int64]
    contexts: NDArray[np.int64]
    negatives: NDArray[np.int64]


def read_corpus(path: Path, min_count: int) -> Corpus:
    """Read a UTF-8 text, plain or gzip-compressed, and number its words by frequency.

    Args:
        path: the text, one sentence or paragraph a line.
        min_count: words that occur less often than this are dropped from the text.

    Raises:
        RecipeError: the file cannot be read, is not text, or holds too few words to train on.
    """
    try:
        return _number_words(_text_lines(path), min_count)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason}.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecipeError(f"{path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}.") from error
    except RecipeError as error:
        raise RecipeError(f"{path} {error}") from error


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text; compression is told by content, because names mislead."""
    with open(path, "rb") as file:
        compressed = file.peek(2).startswith(GZIP_MAGIC)
        stream = gzip.GzipFile(fileobj=file) if compressed else file
        with io.TextIOWrapper(stream, encoding="utf-8") as lines:
            # Looked at first, because a binary file may be one endless line.
            _refuse_binary(b"\0" in stream.peek(BYTES_LOOKED_AT))
            for line in lines:
                _refuse_binary("\0" in line)
                yield line


def _refuse_binary(has_nul: bool) -> None:
    if has_nul:
        raise RecipeError("is not text: it contains NUL bytes.")


def _number_words(lines: Iterator[str], min_count: int) -> Corpus:
    first_seen: dict[str, int] = {}
    numbers, words_per_line = array("i"), array("i")
    for line in lines:
        words = WORD.findall(line.lower())
        numbers.extend(first_seen.setdefault(word, len(first_seen)) for word in words)
        words_per_line.append(len(words))
    if not numbers:
        raise RecipeError("holds no words.")

    text = np.frombuffer(numbers, dtype=np.int32)
    counts = np.bincount(text, minlength=len(first_seen))
    by_frequency = np.argsort(-counts, kind="stable")
    by_frequency = by_frequency[counts[by_frequency] >= min_count]
    if len(by_frequency) < FEWEST_ROWS:
        raise RecipeError(
            f"is too small: {len(by_frequency)} words occur at least {min_count} times, "
            f"and training needs {FEWEST_ROWS}."
        )

    row_of = np.full(len(first_seen), -1, dtype=np.int32)
    row_of[by_frequency] = np.arange(len(by_frequency), dtype=np.int32)
    rows = row_of[text]
    line_of = np.repeat(np.arange(len(words_per_line), dtype=np.int32), words_per_line)
    spelling = list(first_seen)
    return Corpus(
        vocabulary=[spelling[number] for number in by_frequency],
        counts=counts[by_frequency],
        rows=rows[rows >= 0],
        lines=line_of[rows >= 0],
    )


def keep_probability(counts: NDArray[np.int64], threshold: float) -> NDArray[np.float64]:
    r"""Chance that an occurrence of each word survives the subsampling of frequent words.

    It is :math:`\min(1, \sqrt{t / f})`, where :math:`t` is ``threshold`` and :math:`f` the share of
    the text that the word makes up.
    """
    return np.minimum(1.0, np.sqrt(threshold * counts.sum() / counts))


def draw_pairs(
    rows: Rows, lines: Rows, keep: NDArray[np.float64], window: int, rng: np.random.Generator
) -> tuple[Rows, Rows]:
    """Pair each word with the words around it on its line, in shuffled order.

    Frequent words are thinned out first, which lets windows reach over the gaps. Each center then
    looks a distance drawn from 1 to ``window`` to either side, so that near words count for more.

    Args:
        rows: the text, ``[num_words]``.
        lines: the line of each word, ``[num_words]``.
        keep: chance of each row to survive subsampling, ``[num_rows]``.
        window: the farthest that a context may be from its center, at least 1.
        rng: the source of all three kinds of chance.

    Returns:
        The centers and the contexts, both ``[num_pairs]``.
    """
    kept = rng.random(len(rows)) < keep[rows]
    rows, lines = rows[kept], lines[kept]
    reach = rng.integers(1, window + 1, size=len(rows))

    centers, contexts = [], []
    for distance in range(1, window + 1):
        left, right = rows[:-distance], rows[distance:]
        same_line = lines[:-distance] == lines[distance:]
        forward = same_line & (reach[:-distance] >= distance)
        backward = same_line & (reach[distance:] >= distance)
        centers += [left[forward], right[backward]]
        contexts += [right[forward], left[backward]]

    order = rng.permutation(sum(map(len, centers)))
    return np.concatenate(centers)[order], np.concatenate(contexts)[order]


class BatchStream:
    """Batches without end: the text over and over, with fresh chance in every epoch."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch: int,
        group: int,
        negatives: int,
        window: int,
        subsample: float,
        seed: int,
    ) -> None:
        """Describe the batches; none is drawn yet.

        Args:
            corpus: what to read.
            batch: pairs in a batch, a multiple of ``group``.
            group: neighbouring pairs that share their negatives. Sharing turns many small dot
                products into a few matrix products, and looks up fewer rows.
            negatives: negatives of a pair.
            window: the farthest that a context may be from its center.
            subsample: threshold of :func:`keep_probability`.
            seed: fixes every batch.
        """
        self._corpus = corpus
        self._batch = batch
        self._negatives_shape = (batch // group, negatives)
        self._window = window
        self._keep = keep_probability(corpus.counts, subsample)
        self._noise = np.cumsum(corpus.counts**0.75)
        self._seed = seed

    def steps_per_epoch(self) -> float:
        """Estimate how many batches one reading of the text gives, from its first block."""
        rows = self._corpus.rows[:WORDS_PER_BLOCK]
        lines = self._corpus.lines[:WORDS_PER_BLOCK]
        rng = np.random.default_rng(self._seed)
        centers, _ = draw_pairs(rows, lines, self._keep, self._window, rng)
        if not len(centers):
            raise RecipeError("the corpus gives no training pairs: no line holds two words.")
        return len(centers) / len(rows) * len(self._corpus.rows) / self._batch

    def __iter__(self) -> Iterator[Batch]:
        """Start from the seed again."""
        rng = np.random.default_rng(self._seed)
        centers = contexts = np.empty(0, dtype=np.int32)
        for block in self._blocks():
            drawn = draw_pairs(*block, self._keep, self._window, rng)
            centers = np.concatenate([centers, drawn[0]])
            contexts = np.concatenate([contexts, drawn[1]])
            while len(centers) >= self._batch:
                yield Batch(
                    centers=centers[: self._batch].astype(np.int64),
                    contexts=contexts[: self._batch].astype(np.int64),
                    negatives=self._draw_negatives(rng),
                )
                centers, contexts = centers[self._batch :], contexts[self._batch :]

    def _blocks(self) -> Iterator[tuple[Rows, Rows]]:
        """Cut the text so that the pairs held at one time stay bounded, however long it is."""
        while True:
            for start in range(0, len(self._corpus.rows), WORDS_PER_BLOCK):
                block = slice(start, start + WORDS_PER_BLOCK)
                yield self._corpus.rows[block], self._corpus.lines[block]

    def _draw_negatives(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw rows with probability proportional to ``count ** 0.75``."""
        points = rng.random(self._negatives_shape) * self._noise[-1]
        return np.searchsorted(self._noise, points, side="right")
