"""One sparse gradient -> its lookups.

A lookup is one entry of a COO gradient: the indices that name a row of the table, and a value vector. Lookups are read
as the gradient holds them, uncoalesced: repeated rows are for the backend to sum, and ``is_coalesced()`` is never
asked, because it is a claim that can be set by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _validate
from ._validate import Place


def check_gradient(table: Tensor, grad: Tensor, place: Place) -> None:
    """Refuse a gradient that is not the sparse gradient of its table.

    Args:
        table: the parameter, strided, of any shape.
        grad: its gradient.
        place: the parameter's place, for messages.

    Raises:
        RuntimeError: a dense gradient, a layout other than COO, or a shape, dtype or device that is not the table's.
    """
    if grad.layout is torch.strided:
        raise _validate.dense_gradient_error(place, grad.shape)
    if grad.layout is not torch.sparse_coo:
        raise _validate.layout_error(place, grad.layout)
    check_fit(table, grad, place)


def check_fit(parameter: Tensor, grad: Tensor, place: Place) -> None:
    """Refuse a gradient, sparse or dense, that does not fit its parameter, or a parameter that cannot be updated.

    Raises:
        RuntimeError: another shape, dtype or device; a parameter made in inference mode, or whose elements share
            memory.
    """
    if grad.shape != parameter.shape:
        raise _validate.mismatch_error(place, "shape", list(grad.shape), list(parameter.shape))
    if grad.dtype is not parameter.dtype:
        if getattr(parameter, "grad_dtype", parameter.dtype) is not parameter.dtype:
            raise _validate.grad_dtype_error(place, grad.dtype, parameter.dtype)
        raise _validate.mismatch_error(place, "dtype", grad.dtype, parameter.dtype)
    if grad.device != parameter.device:
        raise _validate.mismatch_error(place, "device", grad.device, parameter.device)
    if _is_of_inference_mode(parameter):
        raise _validate.inference_error(place)
    if not parameter.is_contiguous() and _may_share_memory(parameter):
        raise _validate.shared_memory_error(place, parameter.shape, parameter.stride())


def _is_of_inference_mode(parameter: Tensor) -> bool:
    """Whether autograd cannot be told of writes; given other memory, such a parameter is one still, and denies it."""
    try:
        parameter._version  # noqa: B018
    except RuntimeError:
        return True
    return False


def _may_share_memory(parameter: Tensor) -> bool:
    """Whether several elements may be one number: whether a step along a dimension ends among those of smaller ones."""
    reach = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def check_values(values: Tensor, num_lookups: int, row_shape: Sequence[int], place: Place) -> None:
    """Refuse values that do not match a gradient's indices and its table.

    Raises:
        RuntimeError: the values are not ``[num_lookups, *row_shape]``.
    """
    if values.shape != (num_lookups, *row_shape):
        raise _validate.values_error(place, values.shape, (num_lookups, *row_shape))
