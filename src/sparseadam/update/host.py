"""Tables on a device whose moments stay on the host, for which the device has no room.

The touched rows of a table come to the host with their gradients, are updated there by a backend of the CPU as a small
table of their own, beside their moments, and go back. Nothing here knows what kind of device that is.

With U touched rows, L lookups, D elements a row of e bytes, a step carries

    to the host    U*(8 + e*D) bytes of rows, and U*e*D of summed gradients, or, of half-precision tables, whose sums
                   are in float32 and rounded only once, L*(8 + e*D) of lookups
    back           U*e*D bytes of rows

and the host waits for the device once. On a CUDA device all of it passes through pinned memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _validate
from . import reference
from ._types import RowUpdate


class Visit(NamedTuple):
    """Rows of a table that are on the host for a step.

    Attributes:
        origin: what the step was asked for.
        places: where the rows stand in the table, an index for each of its leading dimensions, on its device.
        update: the same step of a table of these rows alone.
    """

    origin: RowUpdate
    places: tuple[Tensor, ...]
    update: RowUpdate


def is_apart(update: RowUpdate) -> bool:
    """Whether a table and its moments are on different devices."""
    return update.moments.device != update.table.device


@torch.no_grad()
def fetch_rows(update: RowUpdate) -> Visit:
    """Copy the touched rows of a table, and their gradients, to where its moments are.

    Raises:
        IndexError: an index outside its table, named.
    """
    table, moments = update.table, update.moments
    sparse_shape = table.shape[: moments.sparse_dim]
    _validate.check_indices(update.indices, sparse_shape, update.place)
    if table.dtype is moments.dtype:
        rows, values = reference.coalesce_rows(update.indices, update.values, sparse_shape, table.dtype)
        lookups = torch.arange(len(rows), device=table.device)
    else:
        flat = reference.flatten_indices(update.indices, sparse_shape)
        rows, lookups = torch.unique(flat, return_inverse=True)
        values = update.values
    places = torch.unravel_index(rows, sparse_shape) if sparse_shape else (rows,)
    weights = table[places] if sparse_shape else table[None][places]
    rows_here, lookups_here, values_here, weights_here = _to_host(rows, lookups, values, weights)
    visiting = RowUpdate(
        update.place,
        weights_here,
        moments.of_rows(rows_here),
        lookups_here[None],
        values_here,
        len(lookups),
        update.scalars,
        update.stochastic_rounding,
    )
    return Visit(update, places, visiting)


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """Return copies on the host, in contiguous memory, having waited for them once."""
    device = tensors[0].device
    is_cuda = device.type == "cuda"
    copies = [torch.empty(each.shape, dtype=each.dtype, device="cpu", pin_memory=is_cuda) for each in tensors]
    for copy, each in zip(copies, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    if is_cuda:
        torch.cuda.current_stream(device).synchronize()
    return copies


@torch.no_grad()
def bring_back(visit: Visit) -> None:
    """Write the updated rows into their table, without waiting, and note the slots of new ones."""
    table = visit.origin.table
    weights = visit.update.table.to(table.device, non_blocking=True)
    if visit.origin.moments.sparse_dim > 0:
        table[visit.places] = weights
    elif len(weights) > 0:
        table.copy_(weights[0])
    visit.origin.moments.take_slots(visit.update.moments)
