"""The update of rows, and the only chooser among its backends.

Every backend exports ``update_rows(updates, ...)`` with the same meaning: sum each row's lookups, give slots to new
rows, update moments and table in place. One that cannot find what is wrong with a gradient before its first row is
written exports ``check_rows(updates)`` too, called for the tables of all backends before, and is given what that
returned; one that cannot update every table exports ``prepare(update)``, which says why not.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _validate
from .._validate import GroupOptions
from . import host, native, reference, triton
from ._in_place import report_writes
from ._types import RowsRead, RowUpdate, StepScalars, layout_refusal, step_scalars
from .native import Replaying, SteadyStep
from .reference import check_range, decay_untouched, pay_decay, rows_behind, touched_rows

__all__ = [
    "BACKENDS",
    "Backend",
    "Replaying",
    "RowUpdate",
    "RowsRead",
    "SteadyStep",
    "StepScalars",
    "backends",
    "catch_up",
    "check_backend",
    "check_range",
    "coalesce_rows",
    "decay_untouched",
    "list_tables",
    "pay_decay",
    "report_writes",
    "rows_behind",
    "step_scalars",
    "touched_rows",
    "update_rows",
]

# Fastest first, each where it runs.
BACKENDS = ("native", "triton", "reference")

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
        ['native', 'triton', 'reference']
    """
    found = []
    for name, backend in (("native", native), ("triton", triton)):
        reason = backend.missing_reason()
        found.append(Backend(name, reason is None, backend.detail() if reason is None else reason))
    return [*found, Backend("reference", True, "PyTorch operations, any device")]


def check_backend(backend: str | None) -> None:
    """Refuse a backend that is unknown or missing; warn once where only the slow one is there.

    Raises:
        ValueError: no such backend.
        ImportError: this installation lacks it; the message gives the reason.
    """
    _validate.check_backend_name(backend, BACKENDS)
    if backend == "triton":
        reason = triton.missing_reason()
        if reason is not None:
            raise _validate.missing_backend_error("triton", reason)
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


def update_rows(updates: Sequence[RowUpdate], backend: str | None, *, strict: bool) -> None:
    """Update every table, each by the named backend or by the fastest that can.

    All that can be wrong is found before anything is written, but for rows outside a table on a CUDA device, which
    fail an assertion there unless ``strict``.

    Raises:
        IndexError: an index outside its table.
        RuntimeError: the named backend cannot update a table; the message says why.
    """
    updates_of: dict[str, list[RowUpdate]] = {name: [] for name in BACKENDS}
    visits = []
    for update in updates:
        if host.is_apart(update):
            if backend == "triton":
                reason = f"its kernels need the moments beside the table, and they are on {update.moments.device}"
                raise _validate.backend_error(update.place, "triton", reason)
            refusal = layout_refusal(update.moments.layout)
            if refusal is not None:
                raise _validate.host_moments_error(update.place, refusal)
            if update.num_lookups == 0:  # counts a step and moves nothing
                updates_of["reference"].append(update)
                continue
            visits.append(host.fetch_rows(update))
            update = visits[-1].update
        updates_of[_choose(update, backend)].append(update)
    summed = reference.check_rows(updates_of["reference"])
    touched = triton.check_rows(updates_of["triton"], strict=strict)
    try:
        if updates_of["native"]:
            native.update_rows(updates_of["native"])
        if updates_of["triton"]:
            triton.update_rows(updates_of["triton"], touched)
        if updates_of["reference"]:
            reference.update_rows(updates_of["reference"], summed)
        for visit in visits:
            host.bring_back(visit)
    finally:  # tables that were stepped before something went wrong have taken the step
        for update in updates:
            history = update.moments.history
            if history is not None and update.is_done():
                history.append(update.scalars)


def catch_up(read: RowsRead, backend: str | None) -> None:
    """Move rows by the steps that their weights have yet to take, by the named backend or the fastest that can.

    No step is counted.

    Raises:
        IndexError: a row outside the table; nothing was written.
        RuntimeError: the named backend cannot update the table; the message says why.
    """
    reason = native.refusal(read) if native.module() is not None and backend != "reference" else ""
    if reason and backend == "native":
        raise _validate.backend_error(read.place, "native", reason)
    (native if reason is None else reference).catch_up(read)


def list_tables(
    groups: Sequence[dict[str, Any]],
    options: Sequence[GroupOptions],
    state: Mapping[Any, Any],
    dense: Collection[Tensor],
) -> SteadyStep | None:
    """List the parameters of a step just taken, for a next one that only native code reads, where that can be done.

    ``dense`` ones have a dict of tensors for their state, and are left for the caller to step.
    """
    return None if native.module() is None else native.list_tables(groups, options, state, dense)


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


def _choose(update: RowUpdate, backend: str | None) -> str:
    """Return the backend that updates a table, which is made ready for it."""
    for name, candidate, is_there in (
        ("native", native, native.module() is not None),
        # Triton's interpreter only ever runs where it is named.
        ("triton", triton, update.table.device.type == "cuda" and triton.missing_reason() is None),
    ):
        if backend == name or (backend is None and is_there):
            reason = candidate.prepare(update)
            if reason is None:
                return name
            if backend == name:
                raise _validate.backend_error(update.place, name, reason)
    return "reference"
