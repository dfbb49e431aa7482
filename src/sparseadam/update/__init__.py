"""The update of rows, and the only chooser among its backends.

Every backend exports ``update_rows(updates)`` with the same meaning: sum each row's lookups, give slots to new rows,
update moments and table in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _validate
from . import native, reference
from ._types import RowsRead, RowUpdate, StepScalars, step_scalars
from .native import SteadyStep, report_writes
from .reference import decay_untouched, pay_decay

__all__ = [
    "BACKENDS",
    "Backend",
    "RowUpdate",
    "RowsRead",
    "SteadyStep",
    "StepScalars",
    "backends",
    "catch_up",
    "check_backend",
    "coalesce_rows",
    "decay_untouched",
    "list_tables",
    "pay_decay",
    "report_writes",
    "step_scalars",
    "update_rows",
]

# Fastest first.
BACKENDS = ("native", "reference")

_warned_slow = False


class Backend(NamedTuple):
    """A backend of this installation: whether it can be used, and what it runs on or why it is missing."""

    name: str
    available: bool
    detail: str


def backends() -> list[Backend]:
    """List the backends, fastest first, with the reason where one is missing.

    Example:
        >>> [backend.name for backend in backends()]
        ['native', 'reference']
    """
    reason = native.missing_reason()
    return [
        Backend("native", reason is None, native.detail() if reason is None else reason),
        Backend("reference", True, "PyTorch operations, any device"),
    ]


def check_backend(backend: str | None) -> None:
    """Refuse a backend that is unknown or missing; warn once where only the slow one is there.

    Raises:
        ValueError: no such backend.
        ImportError: this installation lacks it; the message gives the reason.
    """
    _validate.check_backend_name(backend, BACKENDS)
    reason = native.missing_reason()
    if reason is None:
        return
    if backend == "native":
        raise _validate.missing_backend_error("native", reason)
    if backend is None:
        _warn_slow(reason)


def _warn_slow(reason: str) -> None:
    global _warned_slow
    if not _warned_slow:
        _warned_slow = True
        warnings.warn(
            f'sparseadam runs on its slow reference backend: {reason}. Pass backend="reference" to be rid of this '
            "warning.",
            stacklevel=4,
        )


def update_rows(updates: Sequence[RowUpdate], backend: str | None) -> None:
    """Update every table, each by the named backend or by the fastest that can.

    All that can be wrong is found before anything is written.

    Raises:
        IndexError: an index outside its table.
        RuntimeError: the named backend cannot update a table; the message says why.
    """
    native_updates: list[RowUpdate] = []
    reference_updates: list[RowUpdate] = []
    for update in updates:
        uses_native = _uses_native(update, backend)
        (native_updates if uses_native else reference_updates).append(update)
    reference.check_rows(reference_updates)
    if native_updates:
        native.update_rows(native_updates)
    if reference_updates:
        reference.update_rows(reference_updates)
    for update in updates:
        if update.moments.history is not None:
            update.moments.history.append(update.scalars)


def catch_up(read: RowsRead, backend: str | None) -> None:
    """Move rows by the steps they have missed, by the named backend or the fastest that can; no step is counted.

    Raises:
        IndexError: a row outside the table; nothing was written.
        RuntimeError: the named backend cannot update the table; the message says why.
    """
    reason = native.refusal(read) if native.module() is not None and backend != "reference" else ""
    if reason and backend == "native":
        raise _validate.backend_error(read.place, "native", reason)
    (native if reason is None else reference).catch_up(read)


def list_tables(
    groups: Sequence[Sequence[Tensor]], state: Mapping[Any, Any], dense: Collection[Tensor]
) -> SteadyStep | None:
    """List the parameters of a step just taken, for a next one that only native code reads, where that can be done.

    ``dense`` ones have a dict of tensors for their state, and are left for the caller to step.
    """
    return None if native.module() is None else native.list_tables(groups, state, dense)


def coalesce_rows(
    indices: Tensor, values: Tensor, sparse_shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the lookups of each row, in lookup order; indices have been checked.

    Returns:
        The touched rows, ascending, ``[num_touched]``, and their gradients ``[num_touched, *row_shape]`` in ``dtype``.
    """
    if native.module() is not None and native.can_coalesce(indices, values, sparse_shape, dtype):
        return native.coalesce_rows(indices, values, sparse_shape, dtype)
    return reference.coalesce_rows(indices, values, sparse_shape, dtype)


def _uses_native(update: RowUpdate, backend: str | None) -> bool:
    if backend == "reference" or native.module() is None:
        return False
    reason = native.prepare(update)
    if reason is not None and backend == "native":
        raise _validate.backend_error(update.place, "native", reason)
    return reason is None
