"""Embeddings whose rows are shared out over the ranks of a process group, each rank holding a range of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _validate
from ..initial import Init
from ..moments import moment_dtype
from ..reading import ReadCallback
from .exchange import DistinctRows, Exchange, Traffic

# Rows that are drawn at once, which bounds the memory beside the table that it takes.
_BLOCK = 1 << 16


class _Fetched(NamedTuple):
    """The distinct rows of a lookup, and for each of its ids the place among them.

    ``rows`` are in the dtype that their gradients are to be summed in; ``padding`` is the place of ``padding_idx``.
    """

    rows: Tensor
    places: Tensor
    padding: int | None


class ShardedTable(nn.Module):
    """A table with a range of its rows on each rank, and the fetching of rows."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        refused: Mapping[str, object],
        gradient_reduction: str,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        """Build the local rows, when all ranks mean the same table."""
        super().__init__()
        _validate.check_sharded_table(num_embeddings, embedding_dim, refused)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = _validate.check_padding_idx(padding_idx, num_embeddings)
        self.gradient_reduction = _validate.check_sharded_choice(gradient_reduction, "gradient_reduction")
        world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        if rank < 0:
            raise _validate.not_in_group_error()
        # As torch.chunk and DTensor's Shard(0) cut: all ranges are of one length but the last ones.
        rows_per_rank = -(-num_embeddings // world_size)
        self.row_start = min(rank * rows_per_rank, num_embeddings)
        self.row_end = min(self.row_start + rows_per_rank, num_embeddings)
        shard = torch.empty(self.row_end - self.row_start, embedding_dim, device=device, dtype=dtype)
        _validate.check_table_dtype(shard.dtype)
        self.weight = nn.Parameter(shard)
        self._divisor = world_size if gradient_reduction == "mean" else 1
        facts = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "padding_idx": -1 if self.padding_idx is None else self.padding_idx,
            "gradient_reduction": self._divisor,
            "dtype": _validate.TABLE_DTYPES.index(shard.dtype),
        }
        self._exchange = Exchange(process_group, facts, max(rows_per_rank, 1), shard.device)
        self._read_hooks: OrderedDict[int, ReadCallback] = OrderedDict()
        self.reset_parameters()

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the table; None for all."""
        return self._exchange.process_group

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to others for this table so far."""
        return self._exchange.traffic

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all rows from a standard normal distribution, and set that of ``padding_idx`` to zero.

        The table depends on the first rank's ``torch.manual_seed`` and not on the number of ranks: a row's values are
        those of :class:`sparseadam.initial.Init`, functions of seed, row and column. Every rank must call it, and draws
        one number from PyTorch's generator.
        """
        own_seed = int(torch.randint(2**31, (), device="cpu"))
        ((seed,), *_) = self._exchange.gather([own_seed], "drawing a seed")
        init = Init("normal", 1.0, seed)
        for start in range(self.row_start, self.row_end, _BLOCK):
            rows = torch.arange(start, min(start + _BLOCK, self.row_end), device="cpu")
            values = init.values(rows, self.embedding_dim, self.weight.dtype)
            self.weight[start - self.row_start : start - self.row_start + len(rows)] = values
        if self.padding_idx is not None and self.row_start <= self.padding_idx < self.row_end:
            self.weight[self.padding_idx - self.row_start] = 0

    def register_read_hook(self, callback: ReadCallback) -> RemovableHandle:
        """Have a function called on the owner of rows before they are read.

        It gets the local table, and the rows of it that are about to be read, int64 ``[num_asked]``, in which rows may
        repeat. It may change them.

        Args:
            callback: what to call, at every forward pass.

        Returns:
            A handle whose ``remove()`` takes the function out again.
        """
        handle = RemovableHandle(self._read_hooks)
        self._read_hooks[handle.id] = callback
        return handle

    def _fetch(self, ids: Tensor) -> _Fetched:
        """Get each distinct row once, from its owner; every rank takes part."""
        try:
            _validate.check_ids(ids, self.num_embeddings, self.weight.device)
        except (IndexError, TypeError, RuntimeError):
            self._exchange.refuse()
            raise
        distinct, places = torch.unique(ids.to(torch.int64), return_inverse=True)
        lookup = self._exchange.ask(distinct, self.padding_idx)
        for hook in self._read_hooks.values():
            hook(self.weight, lookup.asked)
        rows: Tensor = DistinctRows.apply(  # type: ignore[no-untyped-call]
            self.weight, self._exchange, lookup, self._divisor
        )
        padding = None
        if lookup.wanted_with_grad is not None and not lookup.wanted_with_grad.all():
            padding = int((~lookup.wanted_with_grad).nonzero())
        # Gradients of repeated ids are summed in float32 where the table has fewer bits, and rounded once.
        return _Fetched(rows.to(moment_dtype(rows.dtype)), places, padding)

    def extra_repr(self) -> str:
        """Say what the module was built with, and which rows are here."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rows {self.row_start} to {self.row_end} here"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return text if self._divisor == 1 else f"{text}, gradient_reduction={self.gradient_reduction!r}"


class ShardedEmbedding(ShardedTable):
    r"""An :class:`torch.nn.Embedding` with sparse gradients, its rows shared out over the ranks of a process group.

    Rank r of n holds the rows in ``[row_start, row_end)``, :math:`r \lceil N/n \rceil` to
    :math:`(r+1) \lceil N/n \rceil` of N (the last ranks fewer, or none), as an ordinary parameter ``weight``. A lookup
    asks the owners for each distinct id once; the backward pass sums gradients of repeated ids and sends one for each
    distinct id to its owner, where ``weight.grad`` becomes a sparse gradient of the local rows. An optimizer then steps
    the local rows alone.

    With ``gradient_reduction="sum"`` the gradient of a row is the sum over ranks of their losses' gradients: that of
    one process on the joined batch, where its loss is the sum of the ranks' losses.

    Every rank must call the module equally often, and run the backward pass of each call that needs one, also with no
    ids (``ids`` of shape ``[0]``, and ``output.sum()`` in the loss). Ranks that are not at the same lookup raise an
    error when they meet; one that never comes ends the others when the group's timeout is over.

    Args:
        num_embeddings: rows of the whole table, at least 1.
        embedding_dim: elements of a row, at least 1.
        padding_idx: a row that gets no gradient and starts as zero; negative ones count from the end.
        max_norm: refused unless None: rows would have to be rewritten where they are looked up.
        scale_grad_by_freq: refused unless False: the counts of a batch are spread over the ranks.
        sparse: refused unless True.
        gradient_reduction: ``"sum"`` over ranks, or ``"mean"``, which divides it by their number as
            ``DistributedDataParallel`` does: for a loss that is scaled for that.
        device: of the shard; that which the process group sends from (the CPU for Gloo, a GPU for NCCL).
        dtype: of the table: float32, float64, bfloat16 or float16.
        process_group: the ranks that share the table; None for all.

    Raises:
        ValueError: an option that is not supported, a number outside its range, another table on another rank, or a
            process that is not in the group.
        TypeError: an argument of the wrong type.
        RuntimeError: a rank that does not answer.

    Shape:
        ids: int64 or int32, any shape. Output: ``[*ids.shape, embedding_dim]``, of the table's dtype.

    Note:
        ``state_dict()`` holds the local rows. Checkpoints that load on any number of ranks, or in one process, are
        written by :func:`sparseadam.distributed.save_checkpoint`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        max_norm: float | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        gradient_reduction: str = "sum",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Build the local rows; every rank of the group must."""
        refused = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, refused, gradient_reduction, device, dtype, process_group
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of ids of the whole table.

        Args:
            ids: int64 or int32, of any shape, empty too, in ``[0, num_embeddings)``.

        Returns:
            ``[*ids.shape, embedding_dim]``.

        Raises:
            IndexError: an id outside the table; the other ranks raise a RuntimeError.
            TypeError: ids of another dtype.
            RuntimeError: ids on another device; ranks that are not at the same lookup; a rank that does not answer.
        """
        rows, places, padding = self._fetch(ids)
        return F.embedding(places, rows, padding).to(self.weight.dtype)


class ShardedEmbeddingBag(ShardedTable):
    """An :class:`torch.nn.EmbeddingBag` with sparse gradients, its rows shared out over the ranks of a process group.

    What is said of :class:`ShardedEmbedding` holds for it. Bags are reduced where they were asked for: what travels is
    each distinct row once, and the gradient of it.

    Args:
        num_embeddings: rows of the whole table, at least 1.
        embedding_dim: elements of a row, at least 1.
        max_norm: refused unless None.
        scale_grad_by_freq: refused unless False.
        mode: ``"sum"``, ``"mean"`` or ``"max"`` of a bag's rows; an empty bag gives zeros.
        sparse: refused unless True. ``mode="max"`` has sparse gradients too, unlike PyTorch's.
        include_last_offset: ``offsets`` has one element more, the number of ids.
        padding_idx: ids that are left out of their bags; negative ones count from the end.
        gradient_reduction: ``"sum"`` over ranks, or ``"mean"``.
        device: of the shard.
        dtype: of the table: float32, float64, bfloat16 or float16, the last two reduced in float32 and rounded once.
        process_group: the ranks that share the table; None for all.

    Raises:
        ValueError: as :class:`ShardedEmbedding`, or an unknown ``mode``.
        TypeError: an argument of the wrong type.
        RuntimeError: a rank that does not answer.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        max_norm: float | None = None,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        gradient_reduction: str = "sum",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Build the local rows; every rank of the group must."""
        mode = _validate.check_sharded_choice(mode, "mode")
        refused = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, refused, gradient_reduction, device, dtype, process_group
        )
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Reduce the rows of bags of ids of the whole table.

        Args:
            ids: int64 or int32, ``[num_bags, size]``, or ``[num_ids]`` with ``offsets``; in ``[0, num_embeddings)``.
            offsets: where each bag starts in one-dimensional ``ids``.
            per_sample_weights: of the shape of ``ids``, only with ``mode="sum"``; they get a gradient.

        Returns:
            ``[num_bags, embedding_dim]``.

        Raises:
            IndexError: an id outside the table; the other ranks raise a RuntimeError.
            TypeError: ids of another dtype.
            ValueError: what :func:`torch.nn.functional.embedding_bag` refuses.
            NotImplementedError: ``per_sample_weights`` with another mode than ``"sum"``, from the same.
            RuntimeError: ids on another device; ranks that are not at the same lookup; a rank that does not answer.
        """
        rows, places, padding = self._fetch(ids)
        bags = F.embedding_bag(
            places,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=None if per_sample_weights is None else per_sample_weights.to(rows.dtype),
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
        return bags.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Say what the module was built with, and which rows are here."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


def sharded_tables(model: nn.Module) -> list[tuple[str, ShardedTable]]:
    """Return the sharded modules of a model, with their names there: all of them, where one has several."""
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, ShardedTable)]
