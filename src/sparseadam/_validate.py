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
MOMENT_DTYPES = (torch.bfloat16, torch.uint8)

_LR_ROUNDING = 1e-12

# Options of other Adams that change nothing at these values; at any other they would be ignored, so they are refused.
_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
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

    @property
    def stream(self) -> int:
        """Tells this parameter's random bits from those of others."""
        return self.group_index * 2**32 + self.position

    def __str__(self) -> str:
        """Return the words for this parameter in a message; its own name where the user gave named parameters."""
        place = f"group {self.group_index}, parameter {self.position}"
        names = self.group.get("param_names")
        return f"{names[self.position]!r} ({place})" if names else place


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
    layout: StateLayout


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


def check_weight_decay(value: object) -> float:
    """Return ``weight_decay`` as a float in [0, inf)."""
    weight_decay = _as_number(value, "weight_decay")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}. weight_decay must lie in [0, inf).")
    return weight_decay


def check_choice(value: object, name: str) -> str:
    """Return an option that is one of a few strings."""
    if not isinstance(value, str) or value not in CHOICES[name]:
        names = ", ".join(repr(choice) for choice in CHOICES[name])
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
        tuple(betas) if isinstance(betas, list) else betas,
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
    """Return the number that a one-element tensor holds now: what is remembered of options must not change later."""
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() else value


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
        amsgrad=_check_flag(amsgrad, "amsgrad"),
        row_steps=check_choice(bias_correction, "bias_correction") == "row",
        owes_decay=decays_exactly and not replays,  # which decays rows for every step as it is
        replays=replays,
    )
    options = GroupOptions(
        lr=check_lr(lr, allow_zero=True),
        beta1=beta1,
        beta2=beta2,
        eps=check_eps(eps),
        maximize=_check_flag(maximize, "maximize"),
        torch_eps=_check_flag(torch_eps, "torch_eps"),
        weight_decay=check_weight_decay(weight_decay),
        nonfinite=check_choice(nonfinite, "nonfinite"),
        stochastic_rounding=_check_flag(stochastic_rounding, "stochastic_rounding"),
        seed=None if seed is None else _check_seed(seed),
        dense_gradients=check_choice(dense_gradients, "dense_gradients"),
        layout=layout,
    )
    _check_together(options)
    return options


def _check_seed(value: object) -> int:
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
            "added. Pass stochastic_rounding and moment_dtype there, or set the group's seed too."
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
        supported = ", ".join(_dtype_text(dtype) for dtype in TABLE_DTYPES)
        raise ValueError(
            f"Params of an unsupported dtype at indices {', '.join(other)}: "
            f"SparseAdam updates floating point tables ({supported}). Convert the table, or leave it out."
        )
    if wide:
        raise ValueError(
            f"stochastic_rounding=True for params at indices {', '.join(wide)}: only bfloat16 and float16 tables are "
            "rounded. Leave it at False for the others, in groups of their own."
        )


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unknown_parameter_error(param: object) -> ValueError:
    """Make the error for a parameter that is in no group."""
    found = f"a parameter of shape {shape_text(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
    return ValueError(f"{found} is not one of this optimizer's. Pass one of its groups' own parameters.")


def check_rows(rows: object, place: Place) -> None:
    """Refuse what does not list rows.

    Raises:
        TypeError: not an int64 tensor of one dimension.
    """
    if not isinstance(rows, Tensor) or rows.dtype is not torch.int64 or rows.dim() != 1:
        found = f"{rows.dtype} {shape_text(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows of {place} must be a one-dimensional torch.int64 tensor, got {found}.")


def check_row_range(rows: Tensor, num_rows: int, place: Place) -> None:
    """Refuse rows outside a table.

    Raises:
        IndexError: naming the first one.
    """
    if bool(((rows < 0) | (rows >= num_rows)).any()):
        raise row_range_error(rows, num_rows, place)


def row_range_error(rows: Tensor, num_rows: int, place: Place) -> IndexError:
    """Make the error for rows of which at least one is outside a table."""
    first = rows[(rows < 0) | (rows >= num_rows)][0]
    return IndexError(f"row {int(first)} is outside the {num_rows} rows of {place}. Nothing was changed.")


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
        f"{shape_text(wanted)}. Build a new optimizer after changing a table's shape, or let resize() change it."
    )


def moment_dtype_error(place: Place, found: torch.dtype, table_dtype: torch.dtype, wanted: torch.dtype) -> RuntimeError:
    """Make the error for a table that changed its dtype under its moments."""
    return RuntimeError(
        f"the moments of {place} have dtype {found}, but the table now has dtype {table_dtype}, which needs {wanted} "
        "moments. Build a new optimizer after changing a table's dtype."
    )


def layout_change_error(place: Place, found: StateLayout, wanted: StateLayout) -> RuntimeError:
    """Make the error for an option that shapes the state and was changed after a table's first step."""
    options = {
        "stored_dtype": "moment_dtype",
        "one_exp_avg_sq_a_row": "second_moment",
        "amsgrad": "amsgrad",
        "row_steps": "bias_correction",
        "owes_decay": "weight_decay_mode",
        "replays": "missed_steps",
    }
    changed = [options[name] for name in StateLayout._fields if getattr(found, name) != getattr(wanted, name)]
    return RuntimeError(
        f"{', '.join(changed)} of {place} changed after its moments were made, and shapes them. Set it back, or delete "
        "optimizer.state[param] to start that table's moments anew."
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
        "up, or optimizer.catch_up(param, rows) before your own module reads them."
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


def missing_backend_error(backend: str, reason: str) -> ImportError:
    """Make the error for a named backend that this installation lacks."""
    return ImportError(f'backend="{backend}" is not available: {reason}. Or pass backend="reference".')


def checkpoint_error(place: Place | str, problem: str) -> ValueError:
    """Make the error for a checkpoint that does not fit."""
    return ValueError(
        f"the checkpoint does not fit this optimizer: state of {place}: {problem}. The optimizer is unchanged."
    )
