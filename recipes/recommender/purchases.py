"""What customers bought: the file, what of it is held out, and batches that any number of processes can share."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..command_line import RecipeError

FILE = "interactions.txt.gz"
HELD_OUT_SHARE = 10  # one in so many of a customer's items, the last ones, at least one
MAX_ITEM = 2**31 - 1  # there is a row for each number up to the largest
FEWEST_ITEMS = 5  # of a customer of whom any are held out


@dataclass(frozen=True)
class Purchases:
    """Pairs of a customer and an item, each once.

    Attributes:
        customers, items: int64 ``[num_pairs]``, those to train on.
        held_out: for each customer the items held out, in order; none of a customer with few.
        num_items: how many different items there are.
    """

    customers: Tensor
    items: Tensor
    held_out: list[list[int]]
    num_items: int

    @property
    def num_customers(self) -> int:
        """How many customers there are."""
        return len(self.held_out)


def read_purchases(folder: Path) -> Purchases:
    """Read a customer a line: its number, then the numbers of its items, in the order of their first purchase.

    Raises:
        RecipeError: the file is not there or is not such a file.
    """
    path = folder / FILE
    customers, items, held_out = [], [], []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                customer, *bought = map(int, line.split())
                if customer != number or min(bought, default=-1) < 0 or max(bought) > MAX_ITEM:
                    raise RecipeError(f"{path}: line {number + 1} is not that of customer {number} and its items.")
                bought = list(dict.fromkeys(bought))
                num_kept = len(bought)
                if num_kept >= FEWEST_ITEMS:
                    num_kept -= max(1, num_kept // HELD_OUT_SHARE)
                customers += [customer] * num_kept
                items += bought[:num_kept]
                held_out.append(bought[num_kept:])
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}. This recipe is for the UCI data set "
            "Online Retail (number 352), as a customer a line: its number, then its items' numbers; pass --data FOLDER."
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: line {len(held_out) + 1} is no list of whole numbers.") from error
    if not any(held_out):
        raise RecipeError(f"{path}: no customer has {FEWEST_ITEMS} items, so none can be held out.")
    num_items = 1 + max(max(items), max(map(max, filter(None, held_out))))
    return Purchases(torch.tensor(customers), torch.tensor(items), held_out, num_items)


@dataclass(frozen=True)
class Batch:
    """Pairs of a step, and the items that each of them is told apart from.

    Attributes:
        customers, items: int64 ``[num_pairs]``.
        negatives: int64 ``[num_negatives]``, drawn as often as they are bought.
    """

    customers: Tensor
    items: Tensor
    negatives: Tensor

    def part(self, rank: int, world_size: int) -> "Batch":
        """Return a process's share of the pairs; the negatives are everyone's."""
        customers, items = (pairs.tensor_split(world_size)[rank] for pairs in (self.customers, self.items))
        return Batch(customers, items, self.negatives)


class Batches:
    """Batches by the number of their step, the same in every process and in every start of a run."""

    def __init__(self, purchases: Purchases, size: int, num_negatives: int, seed: int) -> None:
        """Fix what the batches depend on."""
        self._purchases, self._size, self._num_negatives, self._seed = purchases, size, num_negatives, seed
        self._epoch, self._order = -1, torch.empty(0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches until every pair has been taken once."""
        return -(-len(self._purchases.items) // self._size)

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._purchases.items), generator=generator)
        pairs = self._order[place * self._size : (place + 1) * self._size]
        generator = torch.Generator().manual_seed(self._seed + 2**32 + step)
        drawn = torch.randint(len(self._purchases.items), (self._num_negatives,), generator=generator)
        return Batch(self._purchases.customers[pairs], self._purchases.items[pairs], self._purchases.items[drawn])
