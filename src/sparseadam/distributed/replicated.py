"""Tables of which every rank has a copy: ``DistributedDataParallel`` on backends that cannot sum sparse tensors."""

# No ``from __future__ import annotations``: DDP compares the annotations of a hook with types, not with their names.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ..moments import moment_dtype
from ..update import coalesce_rows
from .sharded import sharded_tables


def replicate(
    model: nn.Module, *, process_group: dist.ProcessGroup | None = None, **options: Any
) -> DistributedDataParallel:
    """Wrap a model in ``DistributedDataParallel`` so that its sparse gradients pass through any backend.

    Tables of ``nn.Embedding(sparse=True)`` and ``nn.EmbeddingBag(sparse=True)`` have a copy on each rank, and their
    gradients are exchanged by :func:`gather_rows_hook`. Sharded tables in the model are left alone: their rows are
    different on each rank, and they exchange gradients themselves, as the *sum* over ranks unless they were built with
    ``gradient_reduction="mean"``. All other parameters are ``DistributedDataParallel``'s, which averages.

    Args:
        model: on the device of the process group.
        process_group: what replicated gradients pass through; None makes a new group of all ranks, so that what
            ``DistributedDataParallel`` sends and what sharded tables send need no common order.
        options: further arguments of ``DistributedDataParallel``.

    Returns:
        The wrapped model, whose hook for communication is taken.
    """
    sharded = [f"{prefix}.weight" if prefix else "weight" for prefix, _ in sharded_tables(model)]
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *sharded]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, ignored
    )
    group = dist.new_group() if process_group is None else process_group
    parallel = DistributedDataParallel(model, process_group=group, **options)
    parallel.register_comm_hook(group, gather_rows_hook)
    return parallel


def gather_rows_hook(
    process_group: dist.ProcessGroup | None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average gradients over ranks, sparse ones by gathering their rows and values: a hook for DDP's communication.

    For ``parallel.register_comm_hook(process_group, gather_rows_hook)``. NCCL cannot sum sparse tensors; all that this
    sends is dense. Each rank sums its repeated rows, sends the rows and their sums to all, and adds what it has got in
    the order of ranks, so that all hold the same bits, then divides by the number of ranks. Sums are taken in float32
    for half-precision tables, and rounded before they are sent and in the end. Dense gradients are averaged as without
    a hook.

    Gathered parts are padded to the longest of any rank's: what is sent grows with the ranks times the largest batch.

    Args:
        process_group: the ranks that share the model; None for all.
        bucket: what DDP has ready: gradients of dense parameters, or one sparse gradient.

    Returns:
        A future of the averaged gradient, coalesced if it is sparse.
    """
    grad = bucket.buffer()
    if not grad.is_sparse:
        return allreduce_hook(process_group, bucket)  # type: ignore[arg-type]  # None is all ranks to it too
    # Numbers of rows must be known before rows can be received, so this waits; dense buckets go on meanwhile.
    gathered = _average_rows(grad, process_group)
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[grad.device] if grad.is_cuda else None)
    future.set_result(gathered)
    return future


def _average_rows(grad: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    world_size = dist.get_world_size(process_group)
    sparse_shape, dtype = grad.shape[: grad.sparse_dim()], moment_dtype(grad.dtype)
    rows, sums = coalesce_rows(grad._indices(), grad._values(), sparse_shape, dtype)
    own_count = torch.tensor([len(rows)], dtype=torch.int64, device=grad.device)
    counts = [torch.empty_like(own_count) for _ in range(world_size)]
    dist.all_gather(counts, own_count, group=process_group)
    sizes = torch.cat(counts).tolist()
    all_rows = _gather(rows, sizes, process_group)
    all_sums = _gather(sums.to(grad.dtype), sizes, process_group)
    touched, summed = coalesce_rows(all_rows[None], all_sums, [sparse_shape.numel()], dtype)
    average = summed.div_(world_size).to(grad.dtype)
    indices = torch.stack(torch.unravel_index(touched, sparse_shape))
    return torch.sparse_coo_tensor(
        indices, average, grad.shape, device=grad.device, is_coalesced=True, check_invariants=False
    )


def _gather(part: Tensor, sizes: list[int], process_group: dist.ProcessGroup | None) -> Tensor:
    """Return all ranks' parts, which have ``sizes`` rows, one after the other."""
    longest = max(sizes)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=process_group)
    return torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)])
