"""Checks of what users pass in; every message that a user can see is born here.

Messages say what is wrong with the value found, what is required, and what to do. Where PyTorch has a message for the
same fault, ours begins with PyTorch's words, so that code matching on them keeps working.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_GROUP_OPTIONS = ("lr", "betas", "eps", "maximize", "torch_eps")

_LR_ROUNDING = 1e-12

# Options of other Adams that change nothing at these values; at any other they would be ignored, so they are refused.
_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0, None),
    "amsgrad": (False, None),
    "foreach": (False, None),
    "fused": (False, None),
    "capturable": (False, None),
    "differentiable": (False, None),
}


class Place(NamedTuple):
    """Where a parameter stands in an optimizer: its group, for messages, and its position there."""

    group: Mapping[str, Any]
    group_index: int
    position: int

    def __str__(self) -> str:
        """Return the words for this parameter in a message; its own name where the user gave named parameters."""
        place = f"group {self.group_index}, parameter {self.position}"
        names = self.group.get("param_names")
        return f"{names[self.position]!r} ({place})" if names else place


class GroupOptions(NamedTuple):
    """The numbers of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    maximize: bool
    torch_eps: bool


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as ``[1000, 64]``."""
    return str(list(shape))


# Options ------------------------------------------------------------------------------------------


def _as_number(value: object, name: str) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"Tensor {name} must be 1-element, got shape {shape_text(value.shape)}. "
                f"Use one parameter group for each value."
            )
    try:
        if isinstance(value, (str, bytes)):  # which float() would parse
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a one-element Tensor, got {type(value).__name__}.") from None


def _check_flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def check_lr(value: object, *, allow_zero: bool) -> float:
    """Return ``lr`` as a float; zero stands still, which a schedule may want but a default cannot mean.

    A schedule that ends at zero may miss it by a rounding error, as LinearLR does: that much below zero is let pass.
    """
    lr = _as_number(value, "lr")
    if not (-_LR_ROUNDING <= lr < math.inf) if allow_zero else not (0.0 < lr < math.inf):
        interval = "[0, inf)" if allow_zero else "(0, inf)"
        raise ValueError(f"Invalid learning rate: {lr}. lr must lie in {interval}.")
    return lr


def check_eps(value: object) -> float:
    """Return ``eps`` as a float in (0, inf)."""
    eps = _as_number(value, "eps")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"Invalid epsilon value: {eps}. eps must lie in (0, inf).")
    return eps


def check_betas(value: object) -> tuple[float, float]:
    """Return ``betas`` as two floats in [0, 1)."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"Invalid betas: {value!r}. betas must be a pair such as (0.9, 0.999).")
    if len(value) != 2:
        raise ValueError(f"Invalid betas: {value!r}. betas must be a pair such as (0.9, 0.999).")
    betas = _as_number(value[0], "betas[0]"), _as_number(value[1], "betas[1]")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}. Both betas must lie in [0, 1).")
    return betas


def check_group(group: Mapping[str, Any], group_index: int) -> GroupOptions:
    """Read a group's options as they stand now: schedulers and users change them between steps.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a number outside its range, or an option that this optimizer would have to ignore.
    """
    missing = [name for name in _GROUP_OPTIONS if name not in group]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing from parameter group {group_index}. Set it to its default.")
    lr, betas = group["lr"], group["betas"]
    values = (
        float(lr) if isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_complex() else lr,
        tuple(betas) if isinstance(betas, list) else betas,
        group["eps"],
        group["maximize"],
        group["torch_eps"],
    )
    try:
        _check_neutral(group)
        try:
            return _remembered_options(*values)
        except TypeError:  # of a wrong type, which may be why it cannot be looked up either
            return _read_options(*values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} Found in parameter group {group_index}.") from None


def _read_options(lr: object, betas: object, eps: object, maximize: object, torch_eps: object) -> GroupOptions:
    beta1, beta2 = check_betas(betas)
    return GroupOptions(
        lr=check_lr(lr, allow_zero=True),
        beta1=beta1,
        beta2=beta2,
        eps=check_eps(eps),
        maximize=_check_flag(maximize, "maximize"),
        torch_eps=_check_flag(torch_eps, "torch_eps"),
    )


# Options seldom change from step to step, and to find them checked is faster than to check them.
_remembered_options = lru_cache(maxsize=1024, typed=True)(_read_options)


def _check_neutral(group: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL_OPTIONS.items():
        if name in group and group[name] not in neutral:
            raise ValueError(
                f"{name}={group[name]!r} is not supported by SparseAdam. "
                f"Remove it from the group, or set it to {neutral[0]!r}."
            )


def check_defaults(lr: object, betas: object, eps: object, maximize: object, torch_eps: object) -> None:
    """Check the constructor's own arguments, in the order of its signature."""
    check_lr(lr, allow_zero=False)
    check_betas(betas)
    check_eps(eps)
    _check_flag(maximize, "maximize")
    _check_flag(torch_eps, "torch_eps")


def check_clip_value(value: object) -> float:
    """Return ``clip_value`` as a float in [0, inf]."""
    clip_value = _as_number(value, "clip_value")
    if not clip_value >= 0.0:
        raise ValueError(f"Invalid clip_value: {clip_value}. clip_value must be at least 0.")
    return clip_value


def check_backend_name(backend: object, known: Sequence[str]) -> None:
    """Refuse a backend that no version of this package has."""
    if backend is not None and backend not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(f"Unknown backend: {backend!r}. Choose one of {names}, or None.")


# Parameters ---------------------------------------------------------------------------------------


def check_parameters(param_groups: Sequence[Mapping[str, Any]], first_group: int = 0) -> None:
    """Refuse parameters that cannot be tables, all faults of a kind in one message.

    Raises:
        ValueError: sparse, complex, integer or other unsupported parameters, by ``[group, index]``.
    """
    sparse, complex_, other = [], [], []
    for group_index, group in enumerate(param_groups, first_group):
        for index, param in enumerate(group["params"]):
            if param.layout is not torch.strided:
                sparse.append([group_index, index])
            elif param.is_complex():
                complex_.append([group_index, index])
            elif param.dtype not in TABLE_DTYPES:
                other.append(f"{[group_index, index]} ({_dtype_text(param.dtype)})")
    if sparse:
        raise ValueError(
            f"Sparse params at indices {sparse}: SparseAdam requires dense parameter tensors. "
            "Keep the table dense; only its gradient is sparse, as nn.Embedding(..., sparse=True) makes it."
        )
    if complex_:
        raise ValueError(
            f"Complex params at indices {complex_}: SparseAdam does not support complex parameters. "
            "Keep the real view, torch.view_as_real(table), as the parameter."
        )
    if other:
        supported = ", ".join(_dtype_text(dtype) for dtype in TABLE_DTYPES)
        raise ValueError(
            f"Params of an unsupported dtype at indices {', '.join(other)}: "
            f"SparseAdam updates floating point tables ({supported}). Convert the table, or leave it out."
        )


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Gradients ----------------------------------------------------------------------------------------


def dense_gradient_error(place: Place, shape: Sequence[int]) -> RuntimeError:
    """Make the error for a strided gradient."""
    return RuntimeError(
        "SparseAdam does not support dense gradients, please consider Adam instead. "
        f"The gradient of {place}, shape {shape_text(shape)}, is dense. Likely causes: a layer built without "
        "sparse=True, as in nn.Embedding(..., sparse=True); a table tied to a dense layer, such as an output "
        "projection; or a penalty on all of the table's weights. Make every use of the table sparse, or give this "
        "parameter to torch.optim.Adam."
    )


def layout_error(place: Place, layout: torch.layout) -> RuntimeError:
    """Make the error for a sparse gradient in a layout other than COO."""
    return RuntimeError(
        f"SparseAdam needs gradients in COO layout. The gradient of {place} has layout {layout}. "
        "Convert it with grad.to_sparse_coo()."
    )


def mismatch_error(place: Place, what: str, found: object, wanted: object) -> RuntimeError:
    """Make the error for a gradient whose shape, dtype or device is not the table's."""
    return RuntimeError(
        f"the gradient of {place} has {what} {found}, but its table has {what} {wanted}. "
        f"Call zero_grad() and run the backward pass again after changing a table's {what}."
    )


def values_error(place: Place, found: Sequence[int], wanted: Sequence[int]) -> RuntimeError:
    """Make the error for a hand-made COO gradient whose parts do not fit together."""
    return RuntimeError(
        f"the gradient of {place} has values of shape {shape_text(found)}, but its indices and its table ask for "
        f"{shape_text(wanted)}. Build it with torch.sparse_coo_tensor(..., check_invariants=True)."
    )


def row_error(place: Place | str, sparse_shape: Sequence[int], dim: int, index: int) -> IndexError:
    """Make the error for an index outside the table."""
    size = sparse_shape[dim]
    if len(sparse_shape) == 1:
        what = f"row {index}"
        held = "no rows" if size == 0 else f"rows 0 to {size - 1}"
    else:
        what = f"index {index} in dimension {dim}"
        held = f"size {size} there"
    return IndexError(
        f"the gradient of {place} names {what}, but its table has {held}. "
        "No row was changed. Check the ids that are looked up, or build the table with more rows."
    )


def clip_layout_error(place: str, layout: torch.layout) -> RuntimeError:
    """Make the error for a gradient to be clipped or coalesced that is neither dense nor COO."""
    return RuntimeError(
        f"the gradient of {place} has layout {layout}, but it must be dense or sparse in COO layout. "
        "No gradient was changed. Convert it with grad.to_sparse_coo()."
    )


def clip_dtype_error(place: str, dtype: torch.dtype) -> RuntimeError:
    """Make the error for a sparse gradient to be clipped or coalesced of a dtype that no table has."""
    supported = ", ".join(_dtype_text(dtype) for dtype in TABLE_DTYPES)
    return RuntimeError(
        f"the sparse gradient of {place} has dtype {dtype}, but it must be one of {supported}. "
        "No gradient was changed. Convert the parameter, or leave it out of the list."
    )


# State --------------------------------------------------------------------------------------------


def moment_shape_error(place: Place, found: Sequence[int], wanted: Sequence[int]) -> RuntimeError:
    """Make the error for a table that changed its shape under its moments."""
    return RuntimeError(
        f"the moments of {place} were made for a table of shape {shape_text(found)}, but the table now has shape "
        f"{shape_text(wanted)}. Build a new optimizer after changing a table's shape."
    )


def moment_dtype_error(place: Place, found: torch.dtype, table_dtype: torch.dtype, wanted: torch.dtype) -> RuntimeError:
    """Make the error for a table that changed its dtype under its moments."""
    return RuntimeError(
        f"the moments of {place} have dtype {found}, but the table now has dtype {table_dtype}, which needs {wanted} "
        "moments. Build a new optimizer after changing a table's dtype."
    )


def backend_error(place: Place, backend: str, reason: str) -> RuntimeError:
    """Make the error for a named backend that cannot update a table."""
    return RuntimeError(
        f'backend="{backend}" cannot update {place}: {reason}. Pass backend=None to let each table take the fastest '
        'backend that can update it, or backend="reference".'
    )


def missing_backend_error(backend: str, reason: str) -> ImportError:
    """Make the error for a named backend that this installation lacks."""
    return ImportError(f'backend="{backend}" is not available: {reason}. Or pass backend="reference".')


def checkpoint_error(place: Place | str, problem: str) -> ValueError:
    """Make the error for a checkpoint that does not fit."""
    return ValueError(
        f"the checkpoint does not fit this optimizer: state of {place}: {problem}. The optimizer is unchanged."
    )
