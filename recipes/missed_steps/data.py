"""Real data: customers and the items they bought, and triples of a knowledge graph."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..command_line import RecipeError

MAX_NUMBER = 2**31 - 1
HELD_OUT_SHARE = 0.1  # of a customer's items, once for validation and once for the test
SPLIT_SEED = 0  # one split for all seeds, so that their spread is that of training

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Rows of a data set, each in one of three parts.

    Attributes:
        train: ``[num_train, columns]``.
        valid: held out, to choose learning rates by.
        test: held out, to report.
    """

    train: Rows
    valid: Rows
    test: Rows


@dataclass(frozen=True)
class Interactions(Split):
    """Rows are a customer and an item; a customer with fewer than ten items has none held out.

    Attributes:
        num_customers: customers are 0 to this, exclusive.
        num_items: items are 0 to this, exclusive.
    """

    num_customers: int
    num_items: int


@dataclass(frozen=True)
class Triples(Split):
    """Rows are a head, a relation and a tail.

    Attributes:
        num_entities: heads and tails are 0 to this, exclusive.
        num_relations: relations are 0 to this, exclusive.
    """

    num_entities: int
    num_relations: int


def read_interactions(path: Path) -> Interactions:
    """Read a customer a line, then the items that they bought, as whole numbers; split them.

    Numbers are taken as they come: those that do not occur are rows that no batch touches.

    Raises:
        RecipeError: the file cannot be read, is not of that form, or leaves nothing to train on or to judge by.
    """
    pairs: dict[tuple[int, int], None] = {}
    for number, words in _lines(path):
        try:
            customer, *items = map(int, words)
        except ValueError:
            raise RecipeError(f"line {number} of {path} is not a customer and items, all whole numbers.") from None
        if not all(0 <= each <= MAX_NUMBER for each in (customer, *items)):
            raise RecipeError(
                f"line {number} of {path} has a number outside [0, {MAX_NUMBER}]; customers and items count from 0, "
                "and have a row each up to the largest."
            )
        pairs.update(dict.fromkeys((customer, item) for item in items))
    if not pairs:
        raise RecipeError(f"{path} holds no interactions; give a line a customer: its number, then items.")
    table = np.array(list(pairs), dtype=np.int64)
    num_customers, num_items = (table.max(axis=0) + 1).tolist()
    bought = np.bincount(table[:, 0], minlength=num_customers)
    if bought.max() == num_items:
        raise RecipeError(
            f"customer {bought.argmax()} of {path} has all {num_items} items, which leaves none to rank below them; "
            "leave that customer out."
        )
    train, valid, test = _hold_out(table, bought)
    if not len(valid):
        raise RecipeError(f"no customer of {path} has ten items, so none can be held out; take more data.")
    return Interactions(train, valid, test, num_customers, num_items)


def _hold_out(pairs: Rows, bought: Rows) -> tuple[Rows, Rows, Rows]:
    """Shuffle each customer's items and cut off the first two tenths, rounded down."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
    pairs = pairs[order][np.argsort(pairs[order, 0], kind="stable")]
    customers = pairs[:, 0]
    position = np.arange(len(pairs)) - (np.cumsum(bought) - bought)[customers]
    held_out = (HELD_OUT_SHARE * bought[customers]).astype(np.int64)
    is_valid, is_test = position < held_out, (held_out <= position) & (position < 2 * held_out)
    return pairs[~is_valid & ~is_test], pairs[is_valid], pairs[is_test]


def read_triples(directory: Path) -> Triples:
    """Read ``train``, ``valid`` and ``test`` (``.txt`` or ``.txt.gz``): head, relation and tail on a line.

    Entities and relations are numbered as they are met.

    Raises:
        RecipeError: a file cannot be read, is not of that form, or is empty.
    """
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    parts = []
    for name in ("train", "valid", "test"):
        plain = directory / f"{name}.txt"
        path = plain if plain.exists() else directory / f"{name}.txt.gz"
        rows = []
        for number, words in _lines(path):
            if len(words) != 3:
                raise RecipeError(f"line {number} of {path} has {len(words)} words, not a head, a relation and a tail.")
            head, relation, tail = words
            rows.append(
                (
                    entities.setdefault(head, len(entities)),
                    relations.setdefault(relation, len(relations)),
                    entities.setdefault(tail, len(entities)),
                )
            )
        if not rows:
            raise RecipeError(f"{path} holds no triples; give a head, a relation and a tail a line.")
        parts.append(np.array(rows, dtype=np.int64))
    return Triples(*parts, len(entities), len(relations))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of each line that has any."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if words := line.split():
                    yield number, words
    except FileNotFoundError as error:
        raise RecipeError(
            f"there is no {path}; pass --data with the directory that has rec/ and kg/ in it (docs/missed_steps.md "
            "says what they hold)."
        ) from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise RecipeError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
