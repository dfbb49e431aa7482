"""Dense gradients: PyTorch's own AdamW, on a state that the moments of a table turn into and are made from again.

A parameter is dense here while its gradient is strided and its group says ``dense_gradients="adam"``. Its state is then
a plain dict as :class:`torch.optim.AdamW` keeps it: ``step`` (a float32 tensor), ``exp_avg``, ``exp_avg_sq`` and, of
amsgrad, ``max_exp_avg_sq``, with the parameter's shape, dtype and layout. So checkpoints of it interchange with
PyTorch's, and a parameter whose gradient is dense in one step and sparse in the next carries one state through both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from . import _validate, checkpoint
from ._validate import GroupOptions, Place
from .gradient import check_fit
from .moments import Moments, StateLayout, moment_dtype
from .update import report_writes

_KEYS = ("step", "exp_avg", "exp_avg_sq")
_KEYS_OF_AMSGRAD = (*_KEYS, "max_exp_avg_sq")


class DenseParameter(NamedTuple):
    """A parameter and a state of its that AdamW can take.

    ``is_fused`` tells that PyTorch's one-pass kernel updates it; how it updates others, PyTorch decides.
    """

    place: Place
    parameter: Tensor
    state: dict[str, Any]
    is_fused: bool


# One parameter's part in a step, with its gradient: all about it is checked, and nothing of it is written yet.
DenseUpdate = tuple[DenseParameter, Tensor]


def is_dense(grad: Tensor, options: GroupOptions) -> bool:
    """Whether a gradient is for AdamW."""
    return grad.layout is torch.strided and options.dense_gradients == "adam"


def takes_dense(options: GroupOptions) -> bool:
    """Whether a group takes dense gradients, and refuses none for another of its options."""
    return options.dense_gradients == "adam" and _refused_option(options) is None


def check_update(
    parameter: Tensor, grad: Tensor, state: Mapping[str, Any] | None, place: Place, options: GroupOptions
) -> DenseUpdate:
    """Check a parameter's dense gradient, options and state; changes nothing.

    Args:
        parameter: strided, real floating point, of any shape and layout.
        grad: its strided gradient.
        state: what the optimizer holds of it: nothing yet, a dense state, or moments of earlier sparse gradients that
            fit it.
        place: its place.
        options: of its group.

    Returns:
        The parameter with a state that fits it, made anew where it has none or another, and its gradient, laid out like
        the parameter where that matters.

    Raises:
        RuntimeError: a gradient whose shape, dtype or device is not the parameter's, or with an infinity or a NaN where
            that is an error; an option that only tables know; a parameter whose elements share memory; a state made
            under other options, or for another shape or dtype.
        ValueError: a state put there from outside that is none.
    """
    check_fit(parameter, grad, place)
    refused = _refused_option(options)
    if refused is not None:
        raise _validate.dense_option_error(place, refused)
    if options.nonfinite == "error" and not _is_finite(grad):
        bad = (~grad.isfinite()).nonzero()
        raise _validate.dense_nonfinite_error(place, bad[0].tolist(), len(bad))
    is_fused = _is_fused(parameter)
    if is_fused and not _has_layout_of(parameter, grad):
        grad = _laid_out(grad, parameter)
    fitting = _fitting_state(state, parameter, is_fused, place, options.layout)
    return DenseParameter(place, parameter, fitting, is_fused), grad


@torch.no_grad()
def update_parameters(updates: Iterable[tuple[DenseParameter, Tensor | None]], options: Sequence[GroupOptions]) -> None:
    """Update parameters and their states in place by PyTorch's AdamW, whose weight decay is the decoupled one.

    Args:
        updates: parameters that were checked, with their gradients; those without one are passed over.
        options: of each group.
    """
    batches: dict[tuple[int, bool], list[DenseUpdate]] = {}
    for dense, grad in updates:
        if grad is not None:
            # PyTorch's foreach and fused operations do not take a view that negates what lies in memory.
            batch = batches.setdefault((dense.place.group_index, dense.is_fused), [])
            batch.append((dense, grad.resolve_neg()))
    for (group_index, is_fused), batch in batches.items():
        _update_batch(batch, options[group_index], is_fused)


def _update_batch(batch: Sequence[DenseUpdate], options: GroupOptions, is_fused: bool) -> None:
    parameters = [dense.parameter for dense, _ in batch]
    states = [dense.state for dense, _ in batch]
    amsgrad = options.layout.amsgrad
    adamw(
        parameters,
        [grad for _, grad in batch],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
        [state["step"] for state in states],
        fused=True if is_fused else None,
        amsgrad=amsgrad,
        beta1=options.beta1,
        beta2=options.beta2,
        lr=options.lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=options.maximize,
    )
    if is_fused:  # of which PyTorch does not tell autograd
        report_writes(parameters)


# Steady steps -------------------------------------------------------------------------------------


def list_parameters(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], options: Sequence[GroupOptions]
) -> list[DenseParameter]:
    """List the parameters of a step just taken whose next dense gradient needs no other check than of its looks."""
    listed = []
    for group_index, group in enumerate(groups):
        if not takes_dense(options[group_index]):
            continue
        keys = _keys(options[group_index].layout.amsgrad)
        for position, parameter in enumerate(group["params"]):
            is_fused = _is_fused(parameter)
            if _is_fitting(state.get(parameter), keys, parameter, is_fused):
                place = Place(group, group_index, position)
                listed.append(DenseParameter(place, parameter, state[parameter], is_fused))
    return listed


def are_finite_where_asked(parameters: Sequence[DenseParameter], options: Sequence[GroupOptions]) -> bool:
    """Whether no dense gradient has an infinity or a NaN, in groups where that is an error."""
    asked = [group.nonfinite == "error" for group in options] if parameters else []
    if not any(asked):
        return True
    grads = (each.parameter.grad for each in parameters if asked[each.place.group_index])
    return all(grad is None or grad.layout is not torch.strided or _is_finite(grad) for grad in grads)


# States -------------------------------------------------------------------------------------------


def is_dense_state(state: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a state, of whatever origin, is that of dense gradients and not of a table."""
    return isinstance(state, Mapping) and not isinstance(state, Moments) and "exp_avg" in state and "rows" not in state


def keeps_state(state: object, parameter: Tensor, options: GroupOptions) -> TypeGuard[Mapping[str, Any]]:
    """Whether a state, loaded ones included, stays dense until a sparse gradient comes.

    Float32 moments of half-precision parameters do not: PyTorch keeps none, and rounding them is no part of loading.
    """
    if not takes_dense(options) or not is_dense_state(state):
        return False
    return getattr(state["exp_avg"], "dtype", None) is parameter.dtype


def read_state(state: Mapping[str, Any], parameter: Tensor, place: Place, *, amsgrad: bool) -> dict[str, Any]:
    """Copy a dense state, laid out as AdamW takes it.

    Args:
        state: ``step``, ``exp_avg``, ``exp_avg_sq`` and, of amsgrad, ``max_exp_avg_sq``, on any device and in any
            layout, in the parameter's dtype or, for half-precision ones, in float32.
        parameter: whose it is.
        place: its place.
        amsgrad: an option of its group.

    Raises:
        ValueError: the state does not fit the parameter or the option; the message says what was found and expected.
    """
    step = checkpoint.check_dense_state(state, parameter, place, StateLayout(amsgrad=amsgrad))
    moments = [_laid_out(state[key], parameter) for key in _keys(amsgrad)[1:]]
    return _make_state(step, moments, parameter)


def state_bytes(state: Mapping[str, Any]) -> int:
    """Return how many bytes the tensors of a dense state take."""
    return sum(part.nbytes for part in state.values() if isinstance(part, Tensor))


def forget(state: Mapping[str, Any], rows: Tensor) -> None:
    """Take from rows all that is kept for them; the step is the parameter's."""
    for key, part in state.items():
        if key != "step":
            (part if part.dim() > 0 else part[None])[rows.to(part.device)] = 0


def resized(state: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """Return the state of a parameter of more rows, whose moments are zero, or of fewer."""
    changed = dict(state)
    for key, part in state.items():
        if key != "step":
            changed[key] = part.new_zeros((num_rows, *part.shape[1:]))
            changed[key][: len(part)] = part[:num_rows]
    return changed


def _fitting_state(
    state: Mapping[str, Any] | None, parameter: Tensor, is_fused: bool, place: Place, layout: StateLayout
) -> dict[str, Any]:
    """Return a state that AdamW can take: the parameter's own, converted or laid out anew where need be, or a new one.

    It enters the optimizer's state when its step is done.
    """
    keys = _keys(layout.amsgrad)
    if not state:
        zeros = [torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in keys[1:]]
        return _make_state(0, zeros, parameter)
    if isinstance(state, Moments):
        moments = state.to_dense()
        return _make_state(state.step, [_fitting_moment(moments[key], parameter) for key in keys[1:]], parameter)
    if _is_fitting(state, keys, parameter, is_fused):
        return state
    _check_change(state["exp_avg"] if "exp_avg" in state else None, parameter, place)
    found = StateLayout(amsgrad="max_exp_avg_sq" in state, owes_decay=layout.owes_decay, replays=layout.replays)
    if found != layout:
        raise _validate.layout_change_error(place, found, layout)
    return read_state(state, parameter, place, amsgrad=layout.amsgrad)


def _check_change(moment: object, parameter: Tensor, place: Place) -> None:
    """Refuse a parameter that changed under its moments."""
    if not isinstance(moment, Tensor):
        return
    if moment.shape != parameter.shape:
        raise _validate.moment_shape_error(place, moment.shape, parameter.shape)
    if moment.dtype not in (parameter.dtype, moment_dtype(parameter.dtype)):
        raise _validate.moment_dtype_error(place, moment.dtype, parameter.dtype, parameter.dtype)


def _fitting_moment(moment: Tensor, parameter: Tensor) -> Tensor:
    return moment if _is_alike(moment, parameter, is_fused=True) else _laid_out(moment, parameter)


def _keys(amsgrad: bool) -> tuple[str, ...]:
    return _KEYS_OF_AMSGRAD if amsgrad else _KEYS


def _is_fitting(state: object, keys: Sequence[str], parameter: Tensor, is_fused: bool) -> TypeGuard[dict[str, Any]]:
    """Whether AdamW can take a state as it is; anything may have been put there from outside."""
    if type(state) is not dict or tuple(state) != keys:
        return False
    step, *moments = state.values()
    if not isinstance(step, Tensor) or step.dtype is not torch.float32 or step.dim() != 0:
        return False
    for moment in moments:
        if not isinstance(moment, Tensor) or not _is_alike(moment, parameter, is_fused):
            return False
    return step.device == _step_device(parameter, is_fused)


def _is_alike(moment: Tensor, parameter: Tensor, is_fused: bool) -> bool:
    return (
        moment.shape == parameter.shape
        and moment.dtype is parameter.dtype
        and moment.device == parameter.device
        and (not is_fused or _has_layout_of(parameter, moment))
    )


def _make_state(step: int, moments: Sequence[Tensor], parameter: Tensor) -> dict[str, Any]:
    device = _step_device(parameter, _is_fused(parameter))
    counter = torch.tensor(float(step), dtype=torch.float32, device=device)
    return dict(zip(_KEYS_OF_AMSGRAD, (counter, *moments), strict=False))


def _step_device(parameter: Tensor, is_fused: bool) -> torch.device:
    """Return where AdamW looks for the step: the fused one beside the parameter, the others on the CPU."""
    return parameter.device if is_fused else torch.device("cpu")


# Memory -------------------------------------------------------------------------------------------


def _is_fused(parameter: Tensor) -> bool:
    """Whether the fused AdamW updates a parameter: PyTorch has one for it, and its memory is in one piece.

    The fused kernels walk through the memory of parameter, gradient and moments side by side, and the CPU's does not
    ask whether it meets the same elements there.
    """
    is_whole = parameter.is_contiguous() or _is_permuted(parameter)
    return is_whole and _has_fused_kernel(type(parameter), parameter.device.type)


@cache
def _has_fused_kernel(kind: type, device_type: str) -> bool:
    """Whether PyTorch's rule allows fusing; that a parameter is real floating point has been checked."""
    return kind in (Tensor, Parameter) and device_type in _get_fused_kernels_supported_devices()


def _is_permuted(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous but for the order of its dimensions, as channels_last ones are."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _has_layout_of(parameter: Tensor, tensor: Tensor) -> bool:
    return (parameter.is_contiguous() and tensor.is_contiguous()) or parameter.stride() == tensor.stride()


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor.detach())


# Options and values -------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _refused_option(options: GroupOptions) -> str | None:
    """Return the first option that a dense gradient leaves no room for, or None."""
    layout = options.layout
    refused = {
        "bias_correction='row'": layout.row_steps,
        "second_moment='row'": layout.one_exp_avg_sq_a_row,
        f"moment_dtype={layout.stored_dtype}": layout.stored_dtype is not None,
        "moment_device='cpu'": options.moment_device is not None,
        "stochastic_rounding=True": options.stochastic_rounding,
        "nonfinite='skip'": options.nonfinite == "skip",
        "torch_eps=True": options.torch_eps,
    }
    return next((option for option, is_set in refused.items() if is_set), None)


def _is_finite(grad: Tensor) -> bool:
    # The sum takes one pass and no mask; where finite numbers overflow in it, each is looked at.
    return math.isfinite(float(grad.sum())) or bool(grad.isfinite().all())
