"""Checks of what users pass in; messages that a user can see are born here, but for those of a state as a mapping.

Messages say what is wrong with the value found, what is required, and what to do. Where PyTorch has a message for the
same fault, ours begins with PyTorch's words, so that code matching on them keeps working.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .history import MAX_WINDOW, window
from .moments import StateLayout

TABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)

# In the order of the constructor.
GROUP_OPTIONS = (
    "lr",
    "betas",
    "eps",
    "maximize",
    "weight_decay",
    "weight_decay_mode",
    "amsgrad",
    "bias_correction",
    "second_moment",
    "moment_dtype",
    "moment_device",
    "stochastic_rounding",
    "dense_gradients",
    "nonfinite",
    "missed_steps",
    "torch_eps",
)
# An option too, where a group rounds stochastically; below 2**53, so that every number type holds it.
SEED = "seed"
SEED_END = 2**53

# What a string option may be.
CHOICES = {
    "weight_decay_mode": ("touched", "exact"),
    "bias_correction": ("table", "row"),
    "second_moment": ("element", "row"),
    "dense_gradients": ("error", "adam"),
    "nonfinite": ("propagate", "error", "skip"),
    "missed_steps": ("skip", "replay"),
}
# The same of a sharded table.
SHARDED_CHOICES = {"gradient_reduction": ("sum", "mean"), "mode": ("sum", "mean", "max")}
MOMENT_DTYPES = (torch.bfloat16, torch.uint8)

_LR_ROUNDING = 1e-12

# Options of other Adams that change nothing at these values; at any other they would be ignored, so they are refused.
_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "foreach": (False, None),
    "fused": (False, None),
    "capturable": (False, None),
    "differentiable": (False, None),
}

# Arguments of the constructor that are the whole optimizer's; in a group they would be ignored, so they are refused.
_NO_GROUP_OPTIONS = ("generator", "moment_dir", "backend", "strict")


class Place(NamedTuple):
    """Where a parameter stands in an optimizer: its group, for messages, and its position there."""

    group: Mapping[str, Any]
    group_index: int
    position: int

    @property
    def stream(self) -> int:
        """Tells this parameter's random bits from those of others."""
        return self.group_index * 2**32 + self.position

    def __str__(self) -> str:
        """Return the words for this parameter in a message; its own name where the user gave named parameters."""
        place = f"group {self.group_index}, parameter {self.position}"
        names = self.group.get("param_names")
        # Parameters put into the group's list by hand have no name.
        return f"{names[self.position]!r} ({place})" if names and self.position < len(names) else place


class GroupOptions(NamedTuple):
    """The options of one parameter group at one step.

    ``layout`` stands for the options that shape the state; ``seed`` is None where nothing is rounded stochastically.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    maximize: bool
    torch_eps: bool
    weight_decay: float
    nonfinite: str
    stochastic_rounding: bool
    seed: int | None
    dense_gradients: str
    moment_device: str | None
    layout: StateLayout

    def device_of_moments(self, table: Tensor) -> torch.device:
        """Return where the moments of a table are kept."""
        return table.device if self.moment_device is None else torch.device(self.moment_device)


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


def check_flag(value: object, name: str) -> bool:
    """Return an option that is a bool."""
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


def check_weight_decay(value: object) -> float:
    """Return ``weight_decay`` as a float in [0, inf)."""
    weight_decay = _as_number(value, "weight_decay")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}. weight_decay must lie in [0, inf).")
    return weight_decay


def check_choice(value: object, name: str) -> str:
    """Return an option that is one of a few strings."""
    return _check_one_of(value, name, CHOICES[name])


def _check_one_of(value: object, name: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"Invalid {name}: {value!r}. Choose one of {names}."
        )
    return value


def check_moment_dtype(value: object) -> torch.dtype | None:
    """Return ``moment_dtype``: None, or one with fewer bits than moments are computed with."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"moment_dtype must be a torch.dtype or None, got {value!r}.")
    if value is not None and value not in MOMENT_DTYPES:
        known = ", ".join(map(str, MOMENT_DTYPES))
        raise ValueError(
            f"Invalid moment_dtype: {value}. Choose one of {known} (8-bit codes), or None for the table's own dtype, "
            "float32 for half-precision tables."
        )
    return value


def check_moment_device(value: object) -> str | None:
    """Return ``moment_device``: None or ``"cpu"``."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"moment_device must be 'cpu' or None, got {value!r}.")
    if value not in (None, "cpu"):
        raise ValueError(f"Invalid moment_device: {value!r}. Choose 'cpu', or None for the table's own device.")
    return value


def rounds_stochastically(group: Mapping[str, Any]) -> bool:
    """Whether a group with these options needs a seed."""
    return group["stochastic_rounding"] is True or group["moment_dtype"] is not None


def check_group(group: Mapping[str, Any], group_index: int) -> GroupOptions:
    """Read a group's options as they stand now: schedulers and users change them between steps.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a number outside its range, options that exclude each other, or one that this optimizer would have
            to ignore.
    """
    try:
        lr, betas, eps, maximize, weight_decay, *others = map(group.__getitem__, GROUP_OPTIONS)
    except KeyError:
        missing = ", ".join(name for name in GROUP_OPTIONS if name not in group)
        raise ValueError(f"{missing} missing from parameter group {group_index}. Set it to its default.") from None
    values = (
        _as_it_stands(lr),
        tuple(map(_as_it_stands, betas)) if isinstance(betas, (list, tuple)) else betas,
        _as_it_stands(eps),
        maximize,
        _as_it_stands(weight_decay),
        *others,
        group.get(SEED),
    )
    try:
        _check_neutral(group)
        try:
            return _remembered_options(*values)
        except TypeError:  # of a wrong type, which may be why it cannot be looked up either
            return _read_options(*values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} Found in parameter group {group_index}.") from None


def _as_it_stands(value: Any) -> Any:
    """Return the number that an object stands for now: what is remembered of options must not change later."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else value
    if isinstance(value, (bool, int, float)) or not hasattr(type(value), "__float__"):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value  # which is refused for what it is


def _read_options(
    lr: object,
    betas: object,
    eps: object,
    maximize: object,
    weight_decay: object,
    weight_decay_mode: object,
    amsgrad: object,
    bias_correction: object,
    second_moment: object,
    moment_dtype: object,
    moment_device: object,
    stochastic_rounding: object,
    dense_gradients: object,
    nonfinite: object,
    missed_steps: object,
    torch_eps: object,
    seed: object,
) -> GroupOptions:
    beta1, beta2 = check_betas(betas)
    replays = check_choice(missed_steps, "missed_steps") == "replay"
    decays_exactly = check_choice(weight_decay_mode, "weight_decay_mode") == "exact"
    layout = StateLayout(
        stored_dtype=check_moment_dtype(moment_dtype),
        one_exp_avg_sq_a_row=check_choice(second_moment, "second_moment") == "row",
        amsgrad=check_flag(amsgrad, "amsgrad"),
        row_steps=check_choice(bias_correction, "bias_correction") == "row",
        owes_decay=decays_exactly and not replays,  # which decays rows for every step as it is
        replays=replays,
    )
    options = GroupOptions(
        lr=check_lr(lr, allow_zero=True),
        beta1=beta1,
        beta2=beta2,
        eps=check_eps(eps),
        maximize=check_flag(maximize, "maximize"),
        torch_eps=check_flag(torch_eps, "torch_eps"),
        weight_decay=check_weight_decay(weight_decay),
        nonfinite=check_choice(nonfinite, "nonfinite"),
        stochastic_rounding=check_flag(stochastic_rounding, "stochastic_rounding"),
        seed=None if seed is None else check_seed(seed),
        dense_gradients=check_choice(dense_gradients, "dense_gradients"),
        moment_device=check_moment_device(moment_device),
        layout=layout,
    )
    _check_together(options)
    return options


def check_seed(value: object) -> int:
    """Return ``seed`` as an int in [0, 2**53)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an int, got {value!r}.")
    if not 0 <= value < SEED_END:
        raise ValueError(f"Invalid seed: {value}. seed must lie in [0, 2**53).")
    return value


def _check_together(options: GroupOptions) -> None:
    layout = options.layout
    if layout.amsgrad and layout.stored_dtype is not None:
        raise ValueError(
            f"amsgrad=True with moment_dtype={layout.stored_dtype} is not supported: the largest of values that are "
            "rounded at random grows beyond all of them. Use moment_dtype=None."
        )
    if (layout.owes_decay or layout.replays) and options.lr * options.weight_decay >= 1.0:
        option = "missed_steps='replay'" if layout.replays else "weight_decay_mode='exact'"
        raise ValueError(
            f"lr * weight_decay is {options.lr * options.weight_decay}: {option} needs it below 1, or a row would "
            "change its sign with each step. Use a smaller weight_decay."
        )
    if layout.replays:
        _check_replays(options)
    if options.seed is None and (options.stochastic_rounding or layout.stored_dtype is not None):
        raise ValueError(
            "seed missing: stochastic rounding needs one, which the optimizer draws when it is built or a group is "
            "added. Pass stochastic_rounding and moment_dtype there. (Later, stochastic_rounding can be set with the "
            "group's seed; moment_dtype cannot, where moments have been made.)"
        )


def _check_replays(options: GroupOptions) -> None:
    layout = options.layout
    others = {
        "amsgrad=True": layout.amsgrad,
        f"moment_dtype={layout.stored_dtype}": layout.stored_dtype is not None,
        "second_moment='row'": layout.one_exp_avg_sq_a_row,
        "bias_correction='row'": layout.row_steps,
    }
    other = next((option for option, is_set in others.items() if is_set), None)
    if other is not None:
        raise ValueError(
            f"missed_steps='replay' with {other} is not supported: it replays the steps of plain Adam and AdamW. Use "
            "missed_steps='skip', or leave the other option at its default."
        )
    num_steps = window(options.beta1, options.beta2)
    if num_steps > MAX_WINDOW:
        reason = "without end" if math.isinf(num_steps) else f"for {num_steps} steps"
        raise ValueError(
            f"missed_steps='replay' with betas=({options.beta1}, {options.beta2}) is not supported: a row that is not "
            f"touched would go on moving {reason}. The first beta must be below the root of the second, and so far "
            f"that their quotient's power of {MAX_WINDOW} is negligible."
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
    for name in _NO_GROUP_OPTIONS:
        if name in group:
            raise ValueError(
                f"{name} is set for a group, and is the whole optimizer's. Pass it to SparseAdam itself, or build an "
                "optimizer of its own for these parameters."
            )


def check_defaults(options: Mapping[str, Any]) -> None:
    """Check the constructor's own arguments, in the order of its signature; ``seed`` may still be missing."""
    check_lr(options["lr"], allow_zero=False)
    seed = 0 if rounds_stochastically(options) else None
    values = [*(options[name] for name in GROUP_OPTIONS), seed]
    _read_options(*values)


def check_generator(generator: object) -> None:
    """Refuse what is no generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}.")


def check_max_norm(value: object) -> float:
    """Return ``max_norm`` as a float in [0, inf]."""
    max_norm = _as_number(value, "max_norm")
    if not max_norm >= 0.0:
        raise ValueError(f"Invalid max_norm: {max_norm}. max_norm must be at least 0.")
    return max_norm


def check_norm_type(value: object) -> float:
    """Return ``norm_type`` as a float, whatever it is; PyTorch's ``"inf"`` too."""
    return math.inf if value == "inf" else _as_number(value, "norm_type")


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
    sparse, complex_, other, wide = [], [], [], []
    for group_index, group in enumerate(param_groups, first_group):
        for index, param in enumerate(group["params"]):
            if param.layout is not torch.strided:
                sparse.append([group_index, index])
            elif param.is_complex():
                complex_.append([group_index, index])
            elif param.dtype not in TABLE_DTYPES:
                other.append(f"{[group_index, index]} ({_dtype_text(param.dtype)})")
            elif group["stochastic_rounding"] and param.dtype not in HALF_DTYPES:
                wide.append(f"{[group_index, index]} ({_dtype_text(param.dtype)})")
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
        raise ValueError(
            f"Params of an unsupported dtype at indices {', '.join(other)}: "
            f"SparseAdam updates floating point tables ({_TABLE_DTYPE_NAMES}). Convert the table, or leave it out."
        )
    if wide:
        raise ValueError(
            f"stochastic_rounding=True for params at indices {', '.join(wide)}: only bfloat16 and float16 tables are "
            "rounded. Leave it at False for the others, in groups of their own."
        )


def wide_table_error(place: Place, dtype: torch.dtype) -> ValueError:
    """Make the error for stochastic rounding that was set, or loaded, for a table that it is not for."""
    return ValueError(
        f"stochastic_rounding=True for {place} ({_dtype_text(dtype)}): only bfloat16 and float16 tables are rounded. "
        "Nothing was changed. Set it to False in that group, or give such tables groups of their own."
    )


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_TABLE_DTYPE_NAMES = ", ".join(map(_dtype_text, TABLE_DTYPES))


def unknown_parameter_error(param: object) -> ValueError:
    """Make the error for a parameter that is in no group."""
    found = f"a parameter of shape {shape_text(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
    return ValueError(f"{found} is not one of this optimizer's. Pass one of its groups' own parameters.")


def check_rows(rows: object, place: Place | str) -> None:
    """Refuse what does not list rows.

    Raises:
        TypeError: not an int64 tensor of one dimension.
    """
    if not isinstance(rows, Tensor) or rows.dtype is not torch.int64 or rows.dim() != 1:
        found = f"{rows.dtype} {shape_text(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows of {place} must be a one-dimensional torch.int64 tensor, got {found}.")


def check_row_range(rows: Tensor, num_rows: int, place: Place | str, *, is_known: bool = True) -> None:
    """Refuse rows outside a table, of which it may be unknown how many of at most ``num_rows`` it has.

    Raises:
        IndexError: naming the first one.
    """
    if bool(((rows < 0) | (rows >= num_rows)).any()):
        raise row_range_error(rows, num_rows, place, is_known=is_known)


def row_range_error(rows: Tensor, num_rows: int, place: Place | str, *, is_known: bool = True) -> IndexError:
    """Make the error for rows of which at least one is outside a table."""
    first = rows[(rows < 0) | (rows >= num_rows)][0]
    return IndexError(
        f"row {int(first)} is outside the {'' if is_known else 'at most '}{num_rows} rows of {place}, numbered from 0. "
        "Nothing was changed. Check the row numbers, or build the table with more rows."
    )


def check_resize(param: Tensor, num_rows: object, place: Place) -> None:
    """Refuse to resize a table that has no rows or has a gradient, or to no whole number.

    Raises:
        TypeError: ``num_rows`` is not an int.
        ValueError: it is negative, or the table has no dimension.
        RuntimeError: the table has a gradient.
    """
    if isinstance(num_rows, bool) or not isinstance(num_rows, int):
        raise TypeError(f"num_rows must be an int, got {num_rows!r}.")
    if num_rows < 0:
        raise ValueError(f"Invalid num_rows: {num_rows}. It must be at least 0.")
    if param.dim() == 0:
        raise ValueError(f"{place} has no dimensions, so no rows to add. Resize a table of at least one dimension.")
    if param.grad is not None:
        raise RuntimeError(
            f"{place} has a gradient, which would not fit it any more. Call zero_grad() before resize()."
        )


# Gradients ----------------------------------------------------------------------------------------


def dense_gradient_error(place: Place, shape: Sequence[int]) -> RuntimeError:
    """Make the error for a strided gradient."""
    return RuntimeError(
        "SparseAdam does not support dense gradients, please consider Adam instead. "
        f"The gradient of {place}, shape {shape_text(shape)}, is dense. Likely causes: a layer built without "
        "sparse=True, as in nn.Embedding(..., sparse=True); a table tied to a dense layer, such as an output "
        "projection; or a penalty on all of the table's weights. Make every use of the table sparse, pass "
        'dense_gradients="adam" to have this parameter updated as torch.optim.AdamW does, or give it to '
        "torch.optim.Adam."
    )


def dense_option_error(place: Place, option: str) -> RuntimeError:
    """Make the error for a dense gradient in a group with an option that only sparse ones can have."""
    return RuntimeError(
        f"the gradient of {place} is dense, and {option} is for sparse gradients only. "
        "Put this parameter into a group without it, or make every use of the parameter sparse."
    )


def dense_nonfinite_error(place: Place, first: Sequence[int], count: int) -> RuntimeError:
    """Make the error for a dense gradient with an infinity or a NaN."""
    return RuntimeError(
        f"the gradient of {place} is not finite, first at {shape_text(first)} and in {count} elements, and "
        "nonfinite='error'. No parameter was changed. Look for what made it so, or clip gradients."
    )


def check_state_dict_type(value: object, expected: type, what: str, expected_text: str) -> None:
    """Refuse a state dict, or a part of one, of another type than PyTorch's.

    Raises:
        TypeError: saying what was found and expected.
    """
    if not isinstance(value, expected):
        raise TypeError(
            f"{what} is {type(value).__name__}, {expected_text} expected, as state_dict() returns it. "
            "The optimizer is unchanged."
        )


def clock_error(place: Place, step: int) -> RuntimeError:
    """Make the error for a table that has replayed as many steps as its rows' clocks can count."""
    return RuntimeError(
        f"{place} is at step {step}, the last one that missed_steps='replay' can count. Nothing was changed. Call "
        "optimizer.flush(), and go on with a new optimizer."
    )


def inference_error(place: Place) -> RuntimeError:
    """Make the error for a parameter that was made in inference mode."""
    return RuntimeError(
        f"{place} was made in torch.inference_mode() and cannot be updated. Make the model outside of it, or the "
        "parameter of a clone made outside of it."
    )


def shared_memory_error(place: Place, shape: Sequence[int], strides: Sequence[int]) -> RuntimeError:
    """Make the error for a parameter several elements of which are one number in memory."""
    return RuntimeError(
        f"elements of {place} share memory (shape {shape_text(shape)}, strides {shape_text(strides)}), so it cannot be "
        "updated in place. Make the parameter of a copy, such as tensor.contiguous()."
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


def grad_dtype_error(place: Place, found: torch.dtype, wanted: torch.dtype) -> RuntimeError:
    """Make the error for a gradient whose dtype is as the parameter's ``grad_dtype`` asks, and not the parameter's."""
    return RuntimeError(
        f"the gradient of {place} has dtype {found}, as its grad_dtype asks, and the parameter has dtype {wanted}. "
        f"Call zero_grad(), set grad_dtype to {wanted} and run the backward pass again: lookups of half-precision "
        "tables are summed in float32 anyway."
    )


def values_error(place: Place, found: Sequence[int], wanted: Sequence[int]) -> RuntimeError:
    """Make the error for a hand-made COO gradient whose parts do not fit together."""
    return RuntimeError(
        f"the gradient of {place} has values of shape {shape_text(found)}, but its indices and its table ask for "
        f"{shape_text(wanted)}. Build it with torch.sparse_coo_tensor(..., check_invariants=True)."
    )


def check_indices(indices: Tensor, sparse_shape: Sequence[int], place: Place | str) -> None:
    """Refuse lookups outside their table.

    Raises:
        IndexError: naming the first index that is, in the order of the dimensions.
    """
    for dim, (size, index) in enumerate(zip(sparse_shape, indices, strict=True)):
        is_bad = (index < 0) | (index >= size)
        if is_bad.any():
            raise row_error(place, sparse_shape, dim, int(index[is_bad][0]))


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


def row_assertion(place: Place) -> str:
    """Write what a device-side assertion says of an index outside a table."""
    return (
        f"the gradient of {place} names a row outside its table. Pass strict=True to SparseAdam, which waits for the "
        "device before each step, to be told which."
    )


def clip_layout_error(place: str, layout: torch.layout) -> RuntimeError:
    """Make the error for a gradient to be clipped or coalesced that is neither dense nor COO."""
    return RuntimeError(
        f"the gradient of {place} has layout {layout}, but it must be dense or sparse in COO layout. "
        "No gradient was changed. Convert it with grad.to_sparse_coo()."
    )


def clip_inference_error(place: str) -> RuntimeError:
    """Make the error for a gradient that was made in inference mode, and cannot be written outside of it."""
    return RuntimeError(
        f"the gradient of {place} was made in torch.inference_mode() and cannot be changed outside of it. No gradient "
        "was changed. Make it outside, or clip in that mode too."
    )


def clip_dtype_error(place: str, dtype: torch.dtype) -> RuntimeError:
    """Make the error for a sparse gradient to be clipped or coalesced of a dtype that no table has."""
    return RuntimeError(
        f"the sparse gradient of {place} has dtype {dtype}, but it must be one of {_TABLE_DTYPE_NAMES}. "
        "No gradient was changed. Convert the parameter, or leave it out of the list."
    )


# State --------------------------------------------------------------------------------------------


def moment_shape_error(place: Place, found: Sequence[int], wanted: Sequence[int]) -> RuntimeError:
    """Make the error for a table that changed its shape under its moments."""
    return RuntimeError(
        f"the moments of {place} were made for a table of shape {shape_text(found)}, but the table now has shape "
        f"{shape_text(wanted)}. Build a new optimizer after changing a table's shape, or let resize() change it."
    )


def moment_dtype_error(place: Place, found: torch.dtype, table_dtype: torch.dtype, wanted: torch.dtype) -> RuntimeError:
    """Make the error for a table that changed its dtype under its moments."""
    return RuntimeError(
        f"the moments of {place} have dtype {found}, but the table now has dtype {table_dtype}, which needs {wanted} "
        "moments. Build a new optimizer after changing a table's dtype."
    )


# Which option shapes what of a state.
OPTION_OF_LAYOUT = {
    "stored_dtype": "moment_dtype",
    "one_exp_avg_sq_a_row": "second_moment",
    "amsgrad": "amsgrad",
    "row_steps": "bias_correction",
    "owes_decay": "weight_decay_mode",
    "replays": "missed_steps",
}


def _changed_options(found: StateLayout, wanted: StateLayout) -> str:
    changed = [name for name in StateLayout._fields if getattr(found, name) != getattr(wanted, name)]
    return ", ".join(OPTION_OF_LAYOUT[name] for name in changed)


def layout_change_error(place: Place, found: StateLayout, wanted: StateLayout) -> RuntimeError:
    """Make the error for an option that shapes the state and was changed after a table's first step."""
    return RuntimeError(
        f"{_changed_options(found, wanted)} of {place} changed after its moments were made, and shapes them. Set it "
        "back, or delete optimizer.state[param] to start that table's moments anew."
    )


def regrouping_error(place: Place, found: int, wanted: int) -> RuntimeError:
    """Make the error for a gradient of another sparse_dim where moments of rows cannot be cut or joined."""
    return RuntimeError(
        f"the gradient of {place} has sparse_dim {wanted}, and the one before had {found}. What is kept for whole rows "
        "(bias_correction='row', second_moment='row', weight_decay_mode='exact', missed_steps='replay', "
        "moment_dtype=torch.uint8) cannot be regrouped. Keep to one sparse_dim."
    )


def nonfinite_error(place: Place, rows: Sequence[int]) -> RuntimeError:
    """Make the error for rows whose summed gradient has an infinity or a NaN."""
    named = ", ".join(map(str, rows))
    return RuntimeError(
        f"the gradient of {place} is not finite, first in rows {named} (repeated rows summed), and nonfinite='error'. "
        "No row was changed. Look for what made it so, clip gradients, or pass nonfinite='skip' to leave such rows."
    )


def behind_error(place: Place, rows: Sequence[int]) -> RuntimeError:
    """Make the error for a gradient of rows that had not been brought up to date when they were read."""
    named = ", ".join(map(str, rows))
    return RuntimeError(
        f"the gradient of {place} names rows that are behind, first {named}: missed_steps='replay', and they were not "
        "brought up to date since the last step, so the gradient is that of old weights. Nothing was changed. Call "
        "optimizer.attach(model) before training, which does it whenever nn.Embedding or nn.EmbeddingBag looks rows "
        "up (and torch.compiler.reset() where it has been compiled before), or optimizer.catch_up(param, rows) before "
        "your own module reads them. Rows that other replicas of a model have read, which DistributedDataParallel adds "
        "to the gradient: catch up on all of its rows before step()."
    )


def dense_behind_error(place: Place) -> RuntimeError:
    """Make the error for a dense gradient of a table with rows that had not been brought up to date."""
    return RuntimeError(
        f"the gradient of {place} is dense, and rows of it are behind: missed_steps='replay', and they were not "
        "brought up to date before the table was read as a whole. Nothing was changed. Call optimizer.flush() before "
        "each such forward pass."
    )


def backend_error(place: Place, backend: str, reason: str) -> RuntimeError:
    """Make the error for a named backend that cannot update a table."""
    return RuntimeError(
        f'backend="{backend}" cannot update {place}: {reason}. Pass backend=None to let each table take the fastest '
        'backend that can update it, or backend="reference".'
    )


def host_moments_error(place: Place, reason: str) -> RuntimeError:
    """Make the error for a table on a device that cannot have its moments on the host."""
    return RuntimeError(
        f'moment_device="cpu" cannot be had for {place}: {reason}. Leave moment_device at None for this table.'
    )


def missing_backend_error(backend: str, reason: str) -> ImportError:
    """Make the error for a named backend that this installation lacks."""
    return ImportError(f'backend="{backend}" is not available: {reason}. Or pass backend="reference".')


def num_groups_error(num_saved: int, num_groups: int) -> ValueError:
    """Make the error for a checkpoint with another number of groups."""
    return ValueError(
        f"loaded state dict has a different number of parameter groups: {num_saved}, and the optimizer has "
        f"{num_groups}. The optimizer is unchanged. Build it with the groups that were saved."
    )


def group_size_error(group_index: int, num_saved: int, num_parameters: int) -> ValueError:
    """Make the error for a checkpoint with another number of parameters in a group."""
    return ValueError(
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
        f"{num_saved} parameters for the {num_parameters} of group {group_index}. The optimizer is unchanged. Build it "
        "with the parameters that were saved."
    )


def not_torchs_error(group_index: int, options: str) -> ValueError:
    """Make the error for a state that PyTorch's SparseAdam cannot carry on."""
    return ValueError(
        f"torch.optim.SparseAdam has no {options}, which parameter group {group_index} uses. Save with state_dict(), "
        "and keep parameters that are torch.optim.AdamW's in groups without tables."
    )


def checkpoint_error(place: Place | str, problem: str) -> ValueError:
    """Make the error for a checkpoint that does not fit."""
    return ValueError(
        f"the checkpoint does not fit this optimizer: state of {place}: {problem}. The optimizer is unchanged."
    )


# Files --------------------------------------------------------------------------------------------

INIT_KINDS = ("zeros", "normal", "uniform")


def check_size(value: object, name: str, advice: str = "") -> int:
    """Return a size of a table, an int of at least 1; ``advice`` ends the message for another type."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.{advice}")
    if value < 1:
        raise ValueError(f"Invalid {name}: {value}. It must be at least 1.")
    return value


def check_mapped_size(value: object, name: str) -> int:
    """Return ``num_rows`` or ``dim`` of a table in a file, which may be left out where there is one."""
    return check_size(value, name, " Leave out num_rows and dim to open a file as it is.")


def check_file_size(num_bytes: int) -> None:
    """Refuse a table whose file would be larger than files can be."""
    if num_bytes >= 2**63:
        raise ValueError(
            f"a table of {num_bytes} bytes is larger than a file can be. Choose fewer rows, or a smaller dim."
        )


def check_table_dtype(value: object) -> torch.dtype:
    """Return the dtype of a table."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {value!r}.")
    if value not in TABLE_DTYPES:
        raise ValueError(f"Invalid dtype: {value}. Choose one of {_TABLE_DTYPE_NAMES}.")
    return value


def check_init(value: object) -> tuple[str, float]:
    """Return how the rows of a table begin: a kind and its scale, which is 0 of zeros."""
    if value == "zeros":
        return "zeros", 0.0
    if not isinstance(value, (str, tuple, list)):
        raise TypeError(f"init must be 'zeros' or a pair such as ('normal', 0.01), got {value!r}.")
    if isinstance(value, str) or len(value) != 2 or value[0] not in INIT_KINDS[1:]:
        raise ValueError(
            f"Invalid init: {value!r}. Choose 'zeros', ('normal', standard_deviation) or ('uniform', bound)."
        )
    scale = _as_number(value[1], "the number in init")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"Invalid init: {value!r}. Its number must lie in (0, inf).")
    return value[0], scale


def check_moment_dir(value: object) -> None:
    """Refuse what is no path."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"moment_dir must be a path or None, got {value!r}.")


def check_same_table(path: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to open a table as something else than it was created as.

    Raises:
        ValueError: naming all that differs.
    """
    names = {"num_rows": "num_rows", "dim": "dim", "dtype": "dtype", "init": "init and seed"}
    differing = [
        f"{name} {found[key]} in place of {wanted[key]}" for key, name in names.items() if found[key] != wanted[key]
    ]
    if differing:
        raise ValueError(
            f"the table in {path!r} has {', '.join(differing)}. It was left as it is. Open it with the arguments it "
            "was created with, or by its path alone."
        )


def file_error(path: str, problem: str, error: Exception) -> OSError:
    """Make the error for a file that the system refuses."""
    number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.EIO
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OSError(number, f"{path!r} {problem}: {reason}. What was committed before is as it was.")


def replaced_file_error(path: str, error: OSError) -> OSError:
    """Make the error for a file that is the new one already, of which the disk may not know yet."""
    return OSError(
        error.errno,
        f"{path!r} has been replaced, but the disk may not have that yet: {error.strerror}. The new one stands, unless "
        "the machine stops before the disk has taken it. Save again once the disk is well.",
    )


def disk_full_error(path: str, num_bytes: int, error: OSError) -> OSError:
    """Make the error for a disk that has no room for what is about to be written."""
    return OSError(
        error.errno,
        f"no room for {num_bytes} more bytes of {path!r}: {error.strerror}. Nothing was changed. Make room on that "
        "disk, and take the step again; checkpoint() removes the log of what was written since the last one, if there "
        "is room for what it writes itself.",
    )


def foreign_error(path: str, what: str) -> ValueError:
    """Make the error for a file that is something else."""
    return ValueError(f"{path!r} does not hold {what} of sparseadam. It was left as it is. Choose another path.")


def foreign_directory_error(path: str, name: str) -> ValueError:
    """Make the error for a directory of moments that holds something else."""
    return ValueError(
        f"the directory {path!r} has no commit of moments, and holds {name!r}. It was left as it is. Choose a new or "
        "empty directory for moment_dir."
    )


def version_error(path: str, found: object, known: int) -> ValueError:
    """Make the error for a file of a later version."""
    return ValueError(
        f"{path!r} has version {found!r} of its format, and this version of sparseadam reads {known}. It was left as "
        "it is. Use the version of sparseadam that wrote it."
    )


def damaged_error(path: str, problem: str) -> ValueError:
    """Make the error for a file that was cut short or overwritten."""
    return ValueError(f"{path!r} is damaged: {problem} found. It was left as it is. Restore it from a copy.")


def missing_table_error(path: str) -> FileNotFoundError:
    """Make the error for a table that is to be opened and is not there."""
    return FileNotFoundError(
        errno.ENOENT, f"there is no table at {path!r}. Pass num_rows and dim to create one, or correct the path"
    )


def missing_place_error(path: str) -> FileNotFoundError:
    """Make the error for a file or directory that is to be made in a directory that is not there."""
    return FileNotFoundError(
        errno.ENOENT, f"there is no directory for {path!r} to be made in. Make {os.path.dirname(path)!r} first"
    )


def missing_part_error(directory: str, path: str) -> FileNotFoundError:
    """Make the error for a file of a commit that is gone."""
    return FileNotFoundError(
        errno.ENOENT,
        f"{path!r} is missing, which the commit in {directory!r} needs. Nothing was changed. Restore it from a copy, "
        "or choose an empty moment_dir to start the moments anew",
    )


def lost_moments_error(path: str, directory: str) -> FileNotFoundError:
    """Make the error for a table that was being trained with moments that are gone."""
    return FileNotFoundError(
        errno.ENOENT,
        f"rows of the table in {path!r} were written since its last checkpoint(), and the log that takes them back is "
        f"gone with the moments in {directory!r}. The table was left as it is. Restore that directory, where it was "
        "or in the same place as seen from the table",
    )


def locked_error(path: str) -> RuntimeError:
    """Make the error for a file that is open elsewhere."""
    return RuntimeError(
        f"{path!r} is open in another process, or in this one. Wait for the other to end, or drop all that uses it "
        "here: tensors, models, optimizers. Of processes that were forked, the last one counts."
    )


def platform_error() -> OSError:
    """Make the error for a system without what files need."""
    return OSError(
        errno.ENOSYS,
        "tables and moments in files need posix_fallocate, which Python has on Linux only, and a little-endian "
        "machine. Keep them in memory here",
    )


def long_path_error(directory: str) -> ValueError:
    """Make the error for a path that does not fit a table's header."""
    return ValueError(
        f"the path of the moments, {directory!r}, is too long for a table's header. Choose a shorter one."
    )


def not_mapped_error() -> ValueError:
    """Make the error for a tensor that is no memory-mapped table."""
    return ValueError(
        "the table is not in a file. Pass what memory_mapped() returned, or a parameter that shares its memory; what "
        ".to(), .clone() and the like return does not."
    )


def no_mapped_table_error() -> ValueError:
    """Make the error for a model without memory-mapped tables."""
    return ValueError(
        "none of the model's parameters is a memory-mapped table. Build its embedding with "
        "nn.Embedding.from_pretrained(table, freeze=False, sparse=True), and do not move or convert the model after."
    )


def max_norm_error(name: str) -> ValueError:
    """Make the error for a module that writes to the rows it reads."""
    module = f"module {name!r}" if name else "the module"
    return ValueError(
        f"{module} has a max_norm, so that reading rows of its memory-mapped table writes to them, which no log "
        "would take back. Use max_norm=None."
    )


def unannounced_reads_error(path: str, row: int, kind: str) -> RuntimeError:
    """Make the error for rows that a model read as zeros."""
    return RuntimeError(
        f"row {row} of the table in {path!r} was used before it had its initial values (init {kind!r}), so as zeros. "
        "No row was changed. Call sparseadam.initialize_on_read(model) once, or initialize_rows(table, rows) before "
        "rows are read."
    )


def partial_table_error(place: Place | str, path: str) -> ValueError:
    """Make the error for a parameter that is a part of a memory-mapped table."""
    return ValueError(
        f"{place} is a part or another view of the memory-mapped table in {path!r}. Make the parameter of the whole "
        "table."
    )


def unknown_table_error(path: str) -> RuntimeError:
    """Make the error for a memory-mapped table that came after the optimizer was built."""
    return RuntimeError(
        f"the table in {path!r} is not among those that this optimizer commits. No row was changed. Give it to the "
        "optimizer when that is built, or in add_param_group()."
    )


def taken_table_error(path: str, directory: str) -> RuntimeError:
    """Make the error for a table that another optimizer has been built with."""
    return RuntimeError(
        f"the table in {path!r} is committed with other moments than those in {directory!r} since another optimizer "
        "was built with it. Nothing was changed. Go on with that one, and drop this."
    )


def replaced_memory_error(wanted: str | None, found: str | None) -> RuntimeError:
    """Make the error for a parameter whose memory is another one than when its optimizer was built."""
    was, is_now = ("ordinary memory" if path is None else f"the table in {path!r}" for path in (wanted, found))
    return RuntimeError(
        f"a parameter has other memory than when the optimizer was built: it was {was} and is {is_now}, as after "
        "share_memory(), .to() or an assignment to .data. Nothing was changed. Copy its values into the table that "
        "memory_mapped() returned, make that the parameter's memory again, or build a new optimizer with an empty "
        "moment_dir."
    )


def unpaired_optimizer_error(path: str, directory: str) -> ValueError:
    """Make the error for a table whose moments are in a directory, in an optimizer without one."""
    return ValueError(
        f"the table in {path!r} is committed together with the moments in {directory!r}, which would no longer fit it. "
        f"Pass moment_dir={directory!r}, or another, empty directory to start its moments anew."
    )


def check_committed_places(path: str, saved: Sequence[tuple[int, int]], present: Sequence[Place]) -> None:
    """Refuse to go on from a commit of other groups.

    Raises:
        ValueError: saying how many parameters the groups have and had.
    """
    if saved != [(place.group_index, place.position) for place in present]:
        raise ValueError(
            f"the commit in {path!r} has {_group_sizes([group for group, _ in saved])}, and the optimizer "
            f"{_group_sizes([place.group_index for place in present])}. Nothing was changed. Build the optimizer with "
            "all the parameters and groups that it had."
        )


def _group_sizes(groups: Sequence[int]) -> str:
    sizes = [groups.count(group) for group in sorted(set(groups))]
    return f"{len(sizes)} groups of {', '.join(map(str, sizes))} parameters"


def committed_parameter_error(path: str, place: Place, wanted: str, found: str) -> ValueError:
    """Make the error for a parameter that is not what a commit has in its place."""
    return ValueError(
        f"the commit in {path!r} does not fit {place}: {wanted} expected, {found} found. Nothing was changed. Build "
        "the optimizer as it was, or choose an empty moment_dir."
    )


def committed_table_error(path: str, place: Place, wanted: str, found: str) -> ValueError:
    """Make the error for another table than the one of a commit."""
    return ValueError(
        f"the commit in {path!r} does not fit {place}: the table in {found!r} is not the one that was in {wanted!r}. "
        "Nothing was changed. Restore that file, or choose an empty moment_dir to start moments anew."
    )


def repaired_table_error(path: str, place: Place, table: str, pairing: Mapping[str, str] | None) -> ValueError:
    """Make the error for a table that was trained with other moments since."""
    since = "others" if pairing is None else f"those in {pairing['path']!r}"
    return ValueError(
        f"the moments in {path!r} no longer fit {place}: the table in {table!r} was committed with {since} since. "
        "Nothing was changed. Use those, or choose an empty moment_dir to start moments anew."
    )


def committed_layout_error(path: str, place: Place, found: StateLayout, wanted: StateLayout) -> ValueError:
    """Make the error for an option that shapes the state and is not what it was at a commit."""
    return ValueError(
        f"{_changed_options(found, wanted)} of {place} is not what it was at the commit in {path!r}, and shapes "
        "moments. Nothing was changed. Set it back, or choose an empty moment_dir to start moments anew."
    )


def moment_device_error(place: Place, device: torch.device) -> RuntimeError:
    """Make the error for moments that no file can hold."""
    return RuntimeError(
        f"{place} is on {device}, and moment_dir keeps moments of tables on the CPU. Nothing was changed. Keep the "
        "table there, or give it to an optimizer without moment_dir."
    )


def mapped_dense_error(place: Place, path: str) -> RuntimeError:
    """Make the error for a dense gradient of a table in a file."""
    return RuntimeError(
        f"the gradient of {place} is dense, and a step would write all of the table in {path!r}. No parameter was "
        "changed. Make every use of the table sparse."
    )


def resize_files_error(place: Place) -> RuntimeError:
    """Make the error for resizing what is in files."""
    return RuntimeError(
        f"resize() of {place} is for tables and moments in memory, and this table or its moments are in a file, whose "
        "size is fixed. Create the table with as many rows as it can come to have: those not touched cost nothing."
    )


def no_directory_error() -> RuntimeError:
    """Make the error for a commit without files."""
    return RuntimeError(
        "checkpoint() commits tables and moments in files, and this optimizer has no moment_dir. Pass one when it is "
        "built, or save state_dict()."
    )


# Several processes --------------------------------------------------------------------------------

# Options of nn.Embedding that a sharded one has by name only: what they must be, and why nothing else is possible.
_SHARDED_REFUSALS: dict[str, tuple[Any, str]] = {
    "max_norm": (None, "the rows that are looked up lie on other ranks, which would have to rewrite them"),
    "scale_grad_by_freq": (False, "the counts of the batch are spread over the ranks"),
    "sparse": (True, "the gradient of a shard holds the rows that were looked up and no others"),
}


def check_sharded_choice(value: object, name: str) -> str:
    """Return an option of a sharded table that is one of a few strings."""
    return _check_one_of(value, name, SHARDED_CHOICES[name])


def check_sharded_table(num_embeddings: object, embedding_dim: object, refused: Mapping[str, object]) -> None:
    """Refuse a table without rows or columns, and options that a sharded table cannot have.

    Raises:
        TypeError: a size that is not an int.
        ValueError: a size below 1, or an option with another value than the only one supported.
    """
    for name, size in {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}.items():
        check_size(size, name)
    for name, value in refused.items():
        supported, reason = _SHARDED_REFUSALS[name]
        if value is not supported:
            raise ValueError(f"{name}={value!r} is not supported by a sharded table: {reason}. Pass {supported!r}.")


def check_padding_idx(padding_idx: object, num_embeddings: int) -> int | None:
    """Return ``padding_idx`` counted from the start.

    Raises:
        TypeError: it is no int.
        ValueError: it is outside the table.
    """
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r}.")
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"Invalid padding_idx: {padding_idx}. It must name a row, in [{-num_embeddings}, {num_embeddings})."
        )
    return padding_idx % num_embeddings


def check_ids(ids: object, num_embeddings: int, device: torch.device) -> None:
    """Refuse ids that cannot be looked up in a sharded table.

    Raises:
        TypeError: no int64 or int32 tensor.
        RuntimeError: on another device than the table.
        IndexError: outside the table.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        found = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a torch.int64 or torch.int32 tensor, got {found}.")
    if ids.device != device:
        raise RuntimeError(f"ids are on {ids.device}, and the table is on {device}. Move the ids there.")
    outside = ids[(ids < 0) | (ids >= num_embeddings)]
    if len(outside) > 0:
        raise IndexError(
            f"id {int(outside[0])} is outside the table's rows 0 to {num_embeddings - 1}. "
            "No rank has looked anything up. Check the ids, or build the table with more rows."
        )


def check_same_on_all_ranks(names: Sequence[str], found: Sequence[Sequence[int]]) -> None:
    """Refuse to share a table that ranks build differently."""
    for name, values in zip(names, zip(*found, strict=True), strict=True):
        if len(set(values)) > 1:
            each = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(
                f"the ranks build a sharded table with different {name}: {each}. Build the same tables in the same "
                "order on all ranks."
            )


def refused_elsewhere_error(rank: int, refusing: Sequence[int]) -> RuntimeError:
    """Make the error of a rank whose lookup was fine where another one's was not."""
    others = ", ".join(map(str, refusing))
    return RuntimeError(
        f"rank {rank} cannot look up rows, because rank {others} refused its ids. "
        f"No rank has looked anything up. The error there says why."
    )


def out_of_step_error(rank: int, places: Sequence[str]) -> RuntimeError:
    """Make the error of ranks that meet at different places."""
    each = "; ".join(f"rank {other} is in {place}" for other, place in enumerate(places))
    return RuntimeError(
        f"the ranks are out of step, as rank {rank} sees it: {each}. Every rank must call each sharded table equally "
        "often and run the backward pass of each call, with no ids too. Give a rank that has none an empty tensor of "
        "ids, and add output.sum() to its loss."
    )


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error of others says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def lost_rank_error(rank: int, world_size: int, doing: str, error: RuntimeError) -> RuntimeError:
    """Make the error of a rank that others do not answer."""
    return RuntimeError(
        f"rank {rank} of {world_size} lost another rank while {doing}: {reason_of(error)}. "
        "Either that rank has ended, or it did not come here within the process group's timeout: every rank must call "
        "each sharded table equally often and run the backward pass of each call. See the first error that any rank "
        "printed; end this process, and start all from the last checkpoint, as torchrun --max-restarts does."
    )


def check_checkpoint_step(step: object) -> int:
    """Return a checkpoint's number, which its folder's name has room for."""
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int, got {step!r}.")
    if not 0 <= step < 10**12:
        raise ValueError(f"Invalid step: {step}. step must lie in [0, 10**12).")
    return step


class ReadyToSave(Protocol):
    """What a rank says of itself before a checkpoint is written."""

    @property
    def step(self) -> object:
        """Of the checkpoint."""

    @property
    def problem(self) -> str | None:
        """What keeps it from writing."""

    @property
    def shared(self) -> Mapping[int, Mapping[str, Any]] | None:
        """What must be the same on all ranks, by the number of its parameter; None where that was not found out."""


def check_ready_to_save(said: Sequence[ReadyToSave]) -> None:
    """Refuse to write a checkpoint that a rank cannot take part in, or in which ranks would not fit together.

    Args:
        said: by rank.

    Raises:
        RuntimeError: the same on all ranks. Nothing has been written.
    """
    found = [f"on rank {rank}, {each.problem}" for rank, each in enumerate(said) if each.problem]
    shared = [each.shared for each in said if each.shared is not None]
    if len(shared) == len(said):
        found += _differences_of_ranks([each.step for each in said], shared)
    if found:
        raise RuntimeError(
            f"no checkpoint was written: {'; '.join(found)}. Every rank must save at the same step, a model and an "
            "optimizer of the same kind."
        )


def _differences_of_ranks(steps: Sequence[object], shared: Sequence[Mapping[int, Mapping[str, Any]]]) -> list[str]:
    found = []
    if len(set(steps)) > 1:
        found.append(f"the ranks are at steps {', '.join(map(str, steps))}")
    if len({tuple(states) for states in shared}) > 1:
        by_rank = "; ".join(f"{list(states)} on rank {rank}" for rank, states in enumerate(shared))
        return [*found, f"the ranks have state for different parameters: {by_rank}"]
    for number, values in shared[0].items():
        for key in values:
            found_there = [states[number].get(key) for states in shared]
            if any(value != found_there[0] for value in found_there):
                each = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(found_there))
                found.append(f"{key} of parameter {number} is {each}")
    return found


def not_in_group_error() -> ValueError:
    """Make the error for a sharded table that is built by a process which is not to hold a part of it."""
    return ValueError(
        "this process is not in the process_group of the sharded table. Build it on the ranks of the group alone."
    )


def unwritten_checkpoint_error(folder: str, causes: Sequence[str]) -> RuntimeError:
    """Make the error for a checkpoint that some rank could not write."""
    return RuntimeError(
        f"the checkpoint in {folder} was not completed: {'; '.join(causes)}. Earlier checkpoints are whole. Remove the "
        "cause, or save elsewhere."
    )


def unread_checkpoint_error(folder: str, causes: Sequence[str]) -> RuntimeError:
    """Make the error for a checkpoint that cannot be read."""
    return RuntimeError(
        f"the checkpoint in {folder} cannot be read: {'; '.join(causes)}. Build model and optimizer anew, and move "
        "that folder away to load the one before."
    )


def failed_elsewhere_error(rank: int, failed: Sequence[int]) -> RuntimeError:
    """Make the error of a rank that has loaded a checkpoint which others could not load."""
    others = ", ".join(map(str, failed))
    return RuntimeError(
        f"rank {rank} has loaded the checkpoint, but rank {others} could not: the error there says why. "
        "Build model and optimizer anew on all ranks."
    )


def check_saved_model(
    found: Mapping[str, tuple[Sequence[int], torch.dtype]], wanted: Mapping[str, tuple[Sequence[int], torch.dtype]]
) -> None:
    """Refuse a checkpoint that is not of this model.

    Args:
        found: sizes and dtypes by name, of whole tensors, in the checkpoint.
        wanted: the same of the model.

    Raises:
        ValueError: naming all that does not fit. Nothing has been changed.
    """
    faults = [f"{name} missing" for name in wanted if name not in found]
    faults += [f"{name} not in the model" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        (size, dtype), (wanted_size, wanted_dtype) = found[name], wanted[name]
        if list(size) != list(wanted_size) or dtype is not wanted_dtype:
            faults.append(f"{name} is {dtype} {shape_text(size)}, {wanted_dtype} {shape_text(wanted_size)} expected")
    if faults:
        raise ValueError(
            f"the checkpoint does not fit this model: {'; '.join(sorted(faults))}. Build the model that was saved."
        )
