"""Gradient tools for lists of parameters whose gradients are dense, sparse (COO) or None, in any mixture.

PyTorch's own know dense gradients only. Sparse ones are read as lookups, like everywhere here: ``is_coalesced()`` is
passed on but never relied on. What is computed in between grows with the lookups, never with the table.

A gradient stays the object that it is, and gets memory of its own before it is written to: autograd lets sparse
gradients share their values. Two embeddings whose outputs are added receive one tensor between them, and
``out.backward(g)`` puts ``g`` itself into the table's gradient.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import utils

from . import _validate
from .moments import moment_dtype
from .update import coalesce_rows


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Clip the norm of all gradients together, as :func:`torch.nn.utils.clip_grad_norm_` does for dense ones.

    With the gradients seen as one vector :math:`g`, each sparse one as the dense gradient that it stands for (a row
    looked up twice contributes the norm of its sum), and :math:`p` for ``norm_type``, every gradient is multiplied by

    .. math::
        \min\!\left(1, \frac{\mathrm{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\right)

    The product with a sum is the sum of the products, so lookups are scaled one by one, and an uncoalesced gradient
    stays uncoalesced. A parameter that is listed twice counts twice and is scaled twice, as in PyTorch.

    Args:
        parameters: parameters of any shape, or a single one; those whose gradient is None are passed over. Sparse
            gradients are float32, float64, bfloat16 or float16, with any ``sparse_dim``.
        max_norm: the largest norm that is left as it is; at least 0.
        norm_type: :math:`p`, any number or ``inf``, ``"inf"`` too.
        error_if_nonfinite: raise where the total norm is infinite or NaN; otherwise the gradients are multiplied by
            what the formula gives then, 0 or NaN.
        foreach: how *dense* gradients are gone through, as in PyTorch; sparse ones are always taken one by one.

    Returns:
        The total norm before clipping, 0-dim, on the device of the first gradient; 0.0 where there is none. It is
        float64 where a gradient is, and otherwise float32. Norms of half-precision gradients, and the sums before
        them, are computed in float32: float16 ends at 65504, which a sum of lookups or a norm soon exceeds, and
        rounding a norm to bfloat16 is worth up to 0.4 % of every gradient.

    Raises:
        RuntimeError: a gradient that is neither dense nor COO, is sparse and of another dtype, or was made in inference
            mode; a total norm that is not finite, with ``error_if_nonfinite``. No gradient has been changed.
        IndexError: a row outside its table. No gradient has been changed.
        ValueError: ``max_norm`` is negative, which would turn gradients round, or NaN.
        TypeError: ``max_norm`` or ``norm_type`` is not a number.

    Example:
        >>> table = torch.nn.Parameter(torch.zeros(10, 2))
        >>> table.grad = torch.sparse_coo_tensor([[7, 7]], [[1.0, 2.0], [2.0, 2.0]], (10, 2), check_invariants=True)
        >>> clip_grad_norm_([table], max_norm=1.0)  # of (3, 4), the sum
        tensor(5.)

    References:
        Pascanu, Mikolov and Bengio, *On the difficulty of training recurrent neural networks*, 2013, Algorithm 1,
        https://arxiv.org/abs/1211.5063; the :math:`10^{-6}` is PyTorch's.
    """
    max_norm = _validate.check_max_norm(max_norm)
    norm_type = _validate.check_norm_type(norm_type)
    params = _as_list(parameters)
    if isinstance(parameters, types.GeneratorType) and not params:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    grads = _checked_gradients(params)
    parts = [_as_part_of_norm(grad, norm_type) for grad in grads]
    total_norm: Tensor = utils.get_total_norm(parts, norm_type, error_if_nonfinite, foreach)
    utils.clip_grads_with_norm_(_with_dense_gradient(params), max_norm, total_norm, foreach)
    sparse = [grad for grad in grads if grad.is_sparse]
    if sparse:
        coefficient = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
        if coefficient != 1.0:
            for grad in sparse:
                _scale(grad, coefficient)
    return total_norm


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient, as :func:`torch.nn.utils.clip_grad_value_` does for dense ones.

    What is clamped is the sum of a row's lookups, since the clamped lookups could add up to more. Sparse gradients
    are therefore coalesced: ``p.grad`` is the same object as before, with one lookup for each touched row. Sums are
    taken and clamped in float32 for half-precision gradients, and rounded once.

    Args:
        parameters: as in :func:`clip_grad_norm_`. Without a gradient among them nothing is done.
        clip_value: elements are clamped to ``[-clip_value, clip_value]``; at least 0. NaNs stay.
        foreach: how *dense* gradients are gone through, as in PyTorch; sparse ones are always taken one by one.

    Raises:
        ValueError: ``clip_value`` is negative, which would give rows a gradient that nobody looked up, or NaN.
        TypeError: ``clip_value`` is not a number.
        RuntimeError: a gradient that is neither dense nor COO, is sparse and of another dtype, or was made in inference
            mode. No gradient has been changed.
        IndexError: a row outside its table. No gradient has been changed.
    """
    clip_value = _validate.check_clip_value(clip_value)
    params = _as_list(parameters)
    grads = _checked_gradients(params)
    dense = _with_dense_gradient(params)
    if dense:
        utils.clip_grad_value_(dense, clip_value, foreach)
    for grad in grads:
        if grad.is_sparse:
            indices, summed = _sum_lookups(grad)
            _write(grad, indices, summed.clamp_(-clip_value, clip_value), is_coalesced=True)


@torch.no_grad()
def coalesce_grads_(parameters: Tensor | Iterable[Tensor]) -> None:
    """Sum the repeated rows of every sparse gradient; dense ones are left alone.

    For gradient accumulation: autograd adds the lookups of each backward pass to those in ``p.grad`` without summing
    repeated rows, so it grows with every pass. Called after each ``backward()``, this keeps it at one lookup for each
    touched row.
    ``p.grad`` is the same object as before. Rows are summed in lookup order, in float32 for half-precision gradients,
    whose sums are rounded once in each call.

    Args:
        parameters: as in :func:`clip_grad_norm_`.

    Raises:
        RuntimeError: a gradient that is neither dense nor COO, is sparse and of another dtype, or was made in inference
            mode. No gradient has been changed.
        IndexError: a row outside its table. No gradient has been changed.

    Example:
        >>> table = torch.nn.Embedding(1000, 8, sparse=True)
        >>> for _ in range(5):
        ...     table(torch.tensor([3, 7, 3])).sum().backward()
        ...     coalesce_grads_(table.parameters())
        >>> table.weight.grad.indices()
        tensor([[3, 7]])
    """
    for grad in _checked_gradients(_as_list(parameters)):
        if grad.is_sparse:
            indices, summed = _sum_lookups(grad)
            _write(grad, indices, summed, is_coalesced=True)


# Checks -------------------------------------------------------------------------------------------


def _as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _checked_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that there are, in order; every fault of every one is found before any is written."""
    grads = []
    for position, param in enumerate(params):
        grad = param.grad
        if grad is None:
            continue
        place = f"parameter {position}"
        if grad.is_sparse:
            _check_lookups(grad, place)
        elif grad.layout is not torch.strided:
            raise _validate.clip_layout_error(place, grad.layout)
        if grad.is_inference() and not torch.is_inference_mode_enabled():
            raise _validate.clip_inference_error(place)
        grads.append(grad)
    return grads


def _check_lookups(grad: Tensor, place: str) -> None:
    if grad.dtype not in _validate.TABLE_DTYPES:
        raise _validate.clip_dtype_error(place, grad.dtype)
    indices = grad._indices()
    _validate.check_indices(indices, grad.shape[: len(indices)], place)


def _with_dense_gradient(params: Sequence[Tensor]) -> list[Tensor]:
    return [param for param in params if param.grad is not None and not param.grad.is_sparse]


# Arithmetic ---------------------------------------------------------------------------------------


def _as_part_of_norm(grad: Tensor, norm_type: float) -> Tensor:
    """Return a dense tensor whose norm is a gradient's: the gradient itself, or its norm where torch would do wrong."""
    if not grad.is_sparse:
        is_half = grad.dtype in _validate.HALF_DTYPES
        return torch.linalg.vector_norm(grad, norm_type, dtype=torch.float32) if is_half else grad
    _, summed = _sum_lookups(grad)
    zero = summed.new_zeros(())
    if summed.numel() == 0:
        return zero
    norm: Tensor = torch.linalg.vector_norm(summed, norm_type)
    if norm_type < 0 and summed.numel() < grad.numel():
        # To a norm of negative order the zeros of rows that were not looked up matter, and one is as good as many.
        norm = torch.linalg.vector_norm(torch.stack([norm, zero]), norm_type)
    return norm


def _sum_lookups(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the lookups of each row.

    Returns:
        Indices ``[sparse_dim, num_touched]``, distinct and in row order, and sums ``[num_touched, *row_shape]`` in
        float64 or, for all other gradients, in float32.
    """
    indices, values = grad._indices(), grad._values()
    dtype = moment_dtype(grad.dtype)
    if values.numel() == 0:  # no lookups, or rows without elements, which need not be named
        return indices[:, :0], values[:0].to(dtype)
    sparse_shape = grad.shape[: len(indices)]
    rows, summed = coalesce_rows(indices, values, sparse_shape, dtype)
    touched = indices.new_empty(len(sparse_shape), len(rows))
    for dim in reversed(range(len(sparse_shape))):
        touched[dim] = rows % sparse_shape[dim]
        rows = rows // sparse_shape[dim]
    return touched, summed


def _scale(grad: Tensor, coefficient: Tensor) -> None:
    # Written as it is, for memory that no other gradient shares.
    _write(grad, grad._indices(), grad._values(), is_coalesced=grad.is_coalesced())
    grad._values().mul_(coefficient.to(grad.device))


def _write(grad: Tensor, indices: Tensor, values: Tensor, *, is_coalesced: bool) -> None:
    """Give a gradient these lookups, in new memory and in its own dtype; other holders of the old memory keep it."""
    values = values.to(grad.dtype)
    lookups = torch.sparse_coo_tensor(
        indices, values, grad.shape, device=grad.device, is_coalesced=is_coalesced, check_invariants=False
    )
    grad.copy_(lookups)
