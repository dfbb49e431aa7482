"""What the ranks of a group say to each other about one sharded table: ids there, rows back, and gradients there.

A lookup is five messages of every rank to every other:

    forward    places and counts  ->  ids     ->  rows
    backward   places             ->  gradients of those rows

*Places* come first, of one size always: which table a rank is at, which lookup, and whether forward or backward. Ranks
that are not at the same place would otherwise wait for each other for ever, or take one message for another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _validate
from .ranks import answered

_table_numbers = itertools.count()
# Copies are numbered from here on, without a word between ranks: each rank makes the same ones in the same order.
_FIRST_COPY = 1 << 20


@dataclass
class Traffic:
    """Bytes that this rank has sent to others for one table, by what they were; transport's own not counted.

    Attributes:
        headers: places and counts, 32 bytes a message.
        ids: the rows asked for, 4 bytes each (8 where a shard has more than 2^31 - 1 rows).
        rows: their weights, sent to those who asked.
        gradients: one row's gradient for each row that this rank asked for.
    """

    headers: int = 0
    ids: int = 0
    rows: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.headers + self.ids + self.rows + self.gradients


class Stage(IntEnum):
    """Where in a lookup a rank is."""

    FORWARD = 0
    BACKWARD = 1
    REFUSED = 2


class Whereabouts(NamedTuple):
    """What a rank says of itself before anything else."""

    table: int
    lookup: int
    stage: int

    def __str__(self) -> str:
        """Return the words for it in a message."""
        stage = ("the forward pass", "the backward pass", "refused ids")[self.stage]
        table = f"sharded table {self.table}"
        if self.table >= _FIRST_COPY:
            original, copy_number = divmod(self.table, _FIRST_COPY)
            table = f"copy {copy_number} of sharded table {original - 1}"
        return f"{stage} of lookup {self.lookup} of {table}"


class Lookup(NamedTuple):
    """One lookup, when all ranks know who wants what.

    Attributes:
        number: how many lookups of this table were before it.
        asked: rows of the local table that ranks want, int64 ``[num_asked]``, rank after rank; a rank names each once.
        num_asked: how many each rank wants here.
        num_wanted: how many this rank wants of each.
        asked_with_grad: which of ``asked`` get a gradient: None for all, else a mask.
        wanted_with_grad: the same of the rows that this rank wants.
    """

    number: int
    asked: Tensor
    num_asked: list[int]
    num_wanted: list[int]
    asked_with_grad: Tensor | None
    wanted_with_grad: Tensor | None


class Exchange:
    """The talk of one table's ranks.

    Args:
        process_group: the ranks that share the table; None for all.
        facts: numbers that must be the same on all ranks, by name, for an error to name.
        rows_per_rank: rows of each shard but the last ones.
        device: where the table is, and so what travels.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None, facts: dict[str, int], rows_per_rank: int, device: torch.device
    ) -> None:
        """Make sure that all ranks build the same table."""
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        self.rows_per_rank = rows_per_rank
        self.device = device
        self.traffic = Traffic()
        self._id_dtype = torch.int32 if rows_per_rank < 2**31 else torch.int64
        self._num_lookups = 0
        self._copy_numbers = itertools.count(1)
        gathered = self.gather([next(_table_numbers), *facts.values()], "building a sharded table")
        self._table = gathered[0][0]
        _validate.check_same_on_all_ranks(list(facts), [each[1:] for each in gathered])

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """Return the talk of a copy of the table, which every rank must make; the ranks are the same ones."""
        copied = copy(self)  # copies of copies count on with their original
        original = self._table // _FIRST_COPY - 1 if self._table >= _FIRST_COPY else self._table
        copied._table = (original + 1) * _FIRST_COPY + next(self._copy_numbers)
        copied._num_lookups = 0
        copied.traffic = Traffic()
        return copied

    def gather(self, numbers: Sequence[int], doing: str) -> list[list[int]]:
        """Return the same few whole numbers of every rank, in the order of ranks."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        with answered(self.rank, self.world_size, doing):
            dist.all_gather(gathered, own, group=self.process_group)
        return [each.tolist() for each in gathered]

    def refuse(self) -> None:
        """Tell the others that this rank will not look up what it was given, so that they need not wait for it."""
        self._meet(self._next_number(), Stage.REFUSED, [0] * self.world_size)

    def ask(self, rows: Tensor, row_without_grad: int | None) -> Lookup:
        """Tell the owners which rows are wanted here, and hear what others want.

        Args:
            rows: of the whole table, int64 ``[num_wanted]``, distinct and ascending.
            row_without_grad: one that gets no gradient, whoever looks it up.
        """
        number = self._next_number()
        bounds = torch.arange(1, self.world_size, device=self.device) * self.rows_per_rank
        ends = torch.searchsorted(rows, bounds).tolist()
        num_wanted = [end - start for start, end in zip([0, *ends], [*ends, len(rows)], strict=True)]
        num_asked = self._meet(number, Stage.FORWARD, num_wanted)
        asked = rows.new_empty(sum(num_asked), dtype=self._id_dtype)
        local = (rows % self.rows_per_rank).to(self._id_dtype)
        self.traffic.ids += self._send(local, num_wanted, asked, num_asked, "exchanging ids")
        asked = asked.to(torch.int64)
        masks: list[Tensor | None] = [None, None]
        if row_without_grad is not None:
            masks = [asked + self.rank * self.rows_per_rank != row_without_grad, rows != row_without_grad]
        return Lookup(number, asked, num_asked, num_wanted, *masks)

    def fetch(self, table: Tensor, lookup: Lookup) -> Tensor:
        """Return the rows that this rank asked for, ``[num_wanted, width]``, and send those that others did."""
        rows = table.index_select(0, lookup.asked)
        fetched = rows.new_empty(sum(lookup.num_wanted), *table.shape[1:])
        self.traffic.rows += self._send(rows, lookup.num_asked, fetched, lookup.num_wanted, "exchanging rows")
        return fetched

    def give_back(self, grad: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
        """Send the gradients of rows to their owners.

        Args:
            grad: of what ``fetch`` returned.
            lookup: the same as then.

        Returns:
            Rows of the local table, ``[num_lookups]``, and their gradients, ``[num_lookups, width]``, in the order of
            the ranks that looked them up.
        """
        rows, num_sent, num_got = lookup.asked, lookup.num_wanted, lookup.num_asked
        if lookup.wanted_with_grad is not None and lookup.asked_with_grad is not None:
            num_sent = _masked_sizes(lookup.wanted_with_grad, num_sent)
            num_got = _masked_sizes(lookup.asked_with_grad, num_got)
            grad, rows = grad[lookup.wanted_with_grad], rows[lookup.asked_with_grad]
        self._meet(lookup.number, Stage.BACKWARD, num_sent)
        got = grad.new_empty(len(rows), *grad.shape[1:])
        self.traffic.gradients += self._send(grad.contiguous(), num_sent, got, num_got, "exchanging gradients")
        return rows, got

    def _next_number(self) -> int:
        self._num_lookups += 1
        return self._num_lookups - 1

    def _meet(self, number: int, stage: Stage, counts: list[int]) -> list[int]:
        """Tell every rank one count and hear one of each, when all are at the same place."""
        place = Whereabouts(self._table, number, stage)
        own = torch.tensor([[*place, count] for count in counts], dtype=torch.int64, device=self.device)
        heard = torch.empty_like(own)
        ones = [1] * self.world_size
        self.traffic.headers += self._send(own, ones, heard, ones, f"beginning {place}")
        places, their_counts = zip(*((Whereabouts(*each[:3]), each[3]) for each in heard.tolist()), strict=True)
        if stage is not Stage.REFUSED:  # the reason is the caller's to raise
            refusing = [rank for rank, each in enumerate(places) if each.stage == Stage.REFUSED]
            if refusing:
                raise _validate.refused_elsewhere_error(self.rank, refusing)
            if any(each != place for each in places):
                raise _validate.out_of_step_error(self.rank, [str(each) for each in places])
        return list(their_counts)

    def _send(self, source: Tensor, sizes: list[int], target: Tensor, target_sizes: list[int], doing: str) -> int:
        """Send each rank its part and take theirs; return the bytes that left this rank."""
        with answered(self.rank, self.world_size, doing):
            dist.all_to_all_single(target, source, target_sizes, sizes, group=self.process_group)
        width = source[0:1].numel() if len(source) else 0
        return (sum(sizes) - sizes[self.rank]) * width * source.itemsize


def _masked_sizes(mask: Tensor, sizes: list[int]) -> list[int]:
    return [int(part.sum()) for part in torch.split(mask, sizes)]


class DistinctRows(torch.autograd.Function):
    """Rows that a rank asked for; their gradients go back to the owners, each a sparse gradient of its local table."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, exchange: Exchange, lookup: Lookup, divisor: int) -> Tensor:
        """Fetch the rows, ``[num_wanted, width]``."""
        ctx.exchange, ctx.lookup, ctx.divisor, ctx.shape = exchange, lookup, divisor, table.shape
        return exchange.fetch(table, lookup)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Give the gradients back; every rank must come here, one that wanted nothing too."""
        rows, values = ctx.exchange.give_back(grad, ctx.lookup)
        if ctx.divisor != 1:
            values.div_(ctx.divisor)
        sparse = torch.sparse_coo_tensor(rows[None], values, ctx.shape, device=values.device, check_invariants=False)
        return sparse, None, None, None
