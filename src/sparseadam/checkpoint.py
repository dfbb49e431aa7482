"""State dicts in and out: ours, and the dense ones of PyTorch.

PyTorch's own loader casts every tensor of a state to the parameter's dtype, which would round row numbers and the
float32 moments of half-precision tables. So states are read here, exactly, and checked before anything is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from . import _validate
from ._validate import GROUP_OPTIONS, SEED, GroupOptions, Place, check_state_dict_type, checkpoint_error, shape_text
from .moments import CLOCKS, LARGEST_CLOCK, Moments, StateLayout, moment_dtype

# Written beside the state; raised when a file of the old form could no longer be read.
FORMAT_KEY = "sparseadam_format"
FORMAT = 1

# Far beyond any run; a float beyond it no longer counts single steps.
_MAX_STEP = 2**53

_DENSE_KEYS = ("step", "exp_avg", "exp_avg_sq")

# What PyTorch's SparseAdam has of our options.
_TORCH_OPTIONS = ("lr", "betas", "eps", "maximize")

# What its Adam has beside them.
_ADAM_OPTIONS = ("weight_decay", "amsgrad")

# How PyTorch's Adam was to compute, not what; a checkpoint of it loads whatever these say.
_IMPLEMENTATION_OPTIONS = (
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "decoupled_weight_decay",
)


def check_format(state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no state dict, or one from a later version.

    Raises:
        TypeError: it, or a part of it, is of another type than PyTorch's.
        ValueError: a part is missing, or the format is not one that this version knows.
    """
    check_state_dict_type(state_dict, Mapping, "a state dict", "a dict")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            found = ", ".join(map(str, state_dict)) or "nothing"
            raise checkpoint_error("all parameters", f"{key} missing, found {found}")
    check_state_dict_type(state_dict["state"], Mapping, "state", "a dict")
    check_state_dict_type(state_dict["param_groups"], Sequence, "param_groups", "a list of dicts")
    for index, group in enumerate(state_dict["param_groups"]):
        check_state_dict_type(group, Mapping, f"param_groups[{index}]", "a dict")
        check_state_dict_type(group.get("params", []), Sequence, f"param_groups[{index}]['params']", "a list")
    version = state_dict.get(FORMAT_KEY, FORMAT)
    if version != FORMAT:
        raise checkpoint_error(
            "all parameters", f"{FORMAT_KEY} is {version!r}, and this version of sparseadam reads {FORMAT}"
        )


def write_state(moments: Moments) -> dict[str, Any]:
    """Return a table's state as plain values and tensors; the tensors are live views, as in PyTorch.

    A table that replays missed steps has been brought up to date, so its clocks all show its step and are left out.
    """
    return {name: part for name, part in moments.parts().items() if name not in CLOCKS}


def write_torch_state(moments: Moments) -> dict[str, Any]:
    """Return a table's state as :class:`torch.optim.SparseAdam` keeps it, dense."""
    return {"step": moments.step, **moments.to_dense()}


def check_torch_group(options: GroupOptions, group_index: int) -> None:
    """Refuse to write for :class:`torch.optim.SparseAdam` what it could not go on with."""
    layout = options.layout
    lacking = {
        "weight_decay": options.weight_decay != 0.0,
        "amsgrad": layout.amsgrad,
        "bias_correction='row'": layout.row_steps,
        "second_moment='row'": layout.one_exp_avg_sq_a_row,
    }
    found = ", ".join(option for option, is_set in lacking.items() if is_set)
    if found:
        raise _validate.not_torchs_error(group_index, found)


def torch_group(packed: Mapping[str, Any], *, for_adam: bool) -> dict[str, Any]:
    """Return a group of a state dict with the options that PyTorch's SparseAdam has, or its Adam and AdamW have."""
    own = {*GROUP_OPTIONS, SEED} - {*_TORCH_OPTIONS} - {*(_ADAM_OPTIONS if for_adam else ())}
    group = {key: value for key, value in packed.items() if key not in own}
    return group | {"decoupled_weight_decay": True} if for_adam else group


def read_group(saved: Mapping[str, Any], group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with the saved options and the present parameters.

    Options and names that the checkpoint lacks keep their present values, as does everything that only steers how
    PyTorch's own Adam computes.
    """
    if saved.get("weight_decay") and "weight_decay_mode" not in saved and not saved.get("decoupled_weight_decay"):
        raise checkpoint_error(
            "all parameters",
            f"weight_decay={saved['weight_decay']} of a torch.optim.Adam that adds it to gradients. Here it is "
            "decoupled, as in torch.optim.AdamW; set it to 0 in the checkpoint's groups, or, if an older PyTorch's "
            "AdamW wrote them, decoupled_weight_decay to True",
        )
    read = {key: deepcopy(value) for key, value in saved.items() if key not in _IMPLEMENTATION_OPTIONS}
    kept = {key: group[key] for key in (*defaults, "param_names") if key in group}
    return {**kept, **read, "params": group["params"]}


def by_number(states: Mapping[Any, Any], numbers: Iterable[Any]) -> dict[Any, Any]:
    """Put states back under their parameters' numbers, which ``torch.distributed.checkpoint`` makes strings.

    Where it loads in place, it leaves tensors under the number and puts everything else, the step, under the string:
    what was read stands there.
    """
    states = dict(states)
    for number in numbers:
        if isinstance(number, int) and str(number) in states:
            read, in_place = states.pop(str(number)), states.get(number)
            if isinstance(read, Mapping) and isinstance(in_place, Mapping):
                read = {**in_place, **read}
            states[number] = read
    return states


def read_state(state: Any, table: Tensor, place: Place, options: GroupOptions, *, is_compact: bool) -> Moments:
    """Build moments from a table's saved state.

    Args:
        state: the saved parts by name. A dense state of :class:`torch.optim.SparseAdam` or :class:`torch.optim.Adam`
            keeps the rows that have a non-zero moment.
        table: the table it is for.
        place: the table's place, for messages.
        options: of its group, which say what is kept, and where.
        is_compact: whether the state is known to be ours. Otherwise it is ours if it has ``rows``.

    Raises:
        ValueError: the state does not fit the table or the options; the message says what was found and expected.
    """
    if not isinstance(state, Mapping):
        raise checkpoint_error(place, f"a {type(state).__name__} found, a dict expected")
    layout, device = options.layout, options.device_of_moments(table)
    if not is_compact and "rows" not in state:
        return _read_dense(check_dense_state(state, table, place, layout), state, table, layout, device)
    optional = [name for name in ("num_skipped", *(CLOCKS if layout.replays else ())) if name in state]
    _check_keys(state, [*_compact_keys(layout), *optional], place)
    step = _read_step(state["step"], place, layout)
    _check_clocks(state, step, place)
    for key in _DENSE_KEYS[1:]:
        _check_moment(state[key], key, table, place, layout, dense=False)
    return _read_compact(step, state, table, place, layout, device)


def check_dense_state(state: Mapping[str, Any], parameter: Tensor, place: Place, layout: StateLayout) -> int:
    """Refuse a dense state that does not fit its parameter or the options.

    Returns:
        Its step.

    Raises:
        ValueError: the message says what was found and expected.
    """
    wanted = _dense_keys(layout, place)
    _check_keys(state, wanted, place)
    for key in wanted[1:]:
        _check_moment(state[key], key, parameter, place, layout, dense=True)
    return _read_step(state["step"], place, layout)


def _check_keys(state: Mapping[Any, Any], wanted: Sequence[str], place: Place) -> None:
    missing = [key for key in wanted if key not in state]
    if missing:
        raise checkpoint_error(place, f"{', '.join(missing)} missing, found {', '.join(map(str, state))}")
    extra = [str(key) for key in state if key not in wanted]
    if extra:
        raise checkpoint_error(place, f"{', '.join(extra)} not understood by SparseAdam")


def _compact_keys(layout: StateLayout) -> list[str]:
    parts = [name for name in layout.parts(torch.Size(), torch.float32) if name not in CLOCKS]
    return ["step", *parts, *(["log_decay"] if layout.owes_decay else [])]


def _dense_keys(layout: StateLayout, place: Place) -> list[str]:
    if layout != StateLayout(amsgrad=layout.amsgrad, owes_decay=layout.owes_decay, replays=layout.replays):
        raise checkpoint_error(
            place,
            "dense moments of PyTorch's found, which load only where moments are kept as PyTorch keeps them "
            "(moment_dtype, second_moment and bias_correction at their defaults)",
        )
    return [*_DENSE_KEYS, *(["max_exp_avg_sq"] if layout.amsgrad else [])]


def _read_step(step: object, place: Place, layout: StateLayout) -> int:
    """Return a step count, which is an int here and in SparseAdam, and a one-element tensor in Adam."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_STEP:
        raise checkpoint_error(place, f"step is {step!r}, a whole number of at least 0 expected")
    if layout.replays and value > LARGEST_CLOCK:
        raise checkpoint_error(place, f"step is {value}, at most {LARGEST_CLOCK} expected with missed_steps='replay'")
    return value


def _check_has_data(part: Tensor, key: str, place: Place) -> None:
    if part.layout is not torch.strided or part.is_meta:
        found = "no data, on the meta device" if part.is_meta else f"layout {part.layout}"
        raise checkpoint_error(place, f"{key} has {found}, a strided tensor expected")


def _check_moment(moment: object, key: str, table: Tensor, place: Place, layout: StateLayout, *, dense: bool) -> None:
    if not isinstance(moment, Tensor):
        raise checkpoint_error(place, f"{key} is a {type(moment).__name__}, a strided tensor expected")
    _check_has_data(moment, key, place)
    allowed = {layout.parts(torch.Size(), moment_dtype(table.dtype))[key].dtype}
    if dense:
        allowed.add(table.dtype)  # PyTorch keeps the moments of half-precision tables in half precision
    if moment.dtype not in allowed:
        wanted = " or ".join(sorted(map(str, allowed)))
        raise checkpoint_error(
            place,
            f"{key} has dtype {moment.dtype}, {wanted} expected; where the table's dtype was changed on purpose, "
            "convert the checkpoint's moments with .to() before loading it",
        )
    if dense and moment.shape != table.shape:
        raise checkpoint_error(
            place,
            f"{key} has shape {shape_text(moment.shape)}, the table's {shape_text(table.shape)} expected",
        )


def _read_dense(
    step: int, state: Mapping[str, Any], table: Tensor, layout: StateLayout, device: torch.device
) -> Moments:
    sparse_dim = min(table.dim(), 1)
    moments = Moments(table.shape, sparse_dim, moment_dtype(table.dtype), device, layout)
    by_row = (moments.num_rows, *moments.row_shape)
    dense = {key: part.reshape(by_row) for key, part in state.items() if key != "step"}
    is_touched = torch.zeros(moments.num_rows, dtype=torch.bool, device=state["exp_avg"].device)
    for part in dense.values():
        is_touched |= (part != 0).reshape(moments.num_rows, moments.width).any(1)
    rows = is_touched.nonzero()[:, 0]
    if layout.owes_decay:  # in PyTorch's steps all rows have paid
        dense["paid_log_decay"] = torch.zeros(moments.num_rows, dtype=torch.float64, device=rows.device)
    moments.fill({"step": step, "rows": rows, **{key: part[rows] for key, part in dense.items()}})
    return moments


def _read_compact(
    step: int, state: Mapping[str, Any], table: Tensor, place: Place, layout: StateLayout, device: torch.device
) -> Moments:
    rows, exp_avg = state["rows"], state["exp_avg"]
    sparse_dim = table.dim() - (exp_avg.dim() - 1)
    row_shape = table.shape[sparse_dim:] if 0 <= sparse_dim <= table.dim() else None
    if exp_avg.dim() == 0 or row_shape is None or exp_avg.shape[1:] != row_shape:
        raise checkpoint_error(
            place,
            f"exp_avg has shape {shape_text(exp_avg.shape)}, whose rows are not rows of the table's shape "
            f"{shape_text(table.shape)}",
        )
    _check_rows(rows, len(exp_avg), math.prod(table.shape[:sparse_dim]), place)
    for name, part in layout.parts(row_shape, moment_dtype(table.dtype)).items():
        if name in CLOCKS:
            continue
        _check_part(state[name], name, (len(exp_avg), *part.shape), part.dtype, place)
    counters = {key: state[key] for key in ("log_decay", "num_skipped") if key in state}
    _check_counters(counters, place)
    moments = Moments(table.shape, sparse_dim, moment_dtype(table.dtype), device, layout)
    moments.fill({**state, **counters, "step": step})
    return moments


def _check_clocks(state: Mapping[str, Any], step: int, place: Place) -> None:
    """Refuse the live state of a table with rows that are behind: what they missed is not in it."""
    for name in CLOCKS:
        if name in state and not bool((torch.as_tensor(state[name], device="cpu") == step).all()):
            raise checkpoint_error(
                place,
                f"{name} shows rows that are behind step {step}. Call flush() before a state is taken out of an "
                "optimizer with missed_steps='replay', or take it from state_dict()",
            )


def _check_part(part: object, name: str, shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> None:
    if not isinstance(part, Tensor) or part.dtype is not dtype or part.shape != shape:
        found = f"{part.dtype} {shape_text(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
        raise checkpoint_error(place, f"{name} is {found}, {dtype} {shape_text(shape)} expected")


def _check_counters(counters: Mapping[str, Any], place: Place) -> None:
    for name, value in counters.items():
        kind = float if name == "log_decay" else int
        is_fitting = type(value) is kind and (value <= 0.0 if kind is float else value >= 0)
        if not is_fitting:
            expected = "a float of at most 0" if kind is float else "an int of at least 0"
            raise checkpoint_error(place, f"{name} is {value!r}, {expected} expected")


def _check_rows(rows: object, num_slots: int, num_rows: int, place: Place) -> None:
    if isinstance(rows, Tensor):
        _check_has_data(rows, "rows", place)
    if not isinstance(rows, Tensor) or rows.dtype is not torch.int64 or rows.dim() != 1:
        found = f"{rows.dtype} {shape_text(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise checkpoint_error(place, f"rows is {found}, a one-dimensional torch.int64 tensor expected")
    if len(rows) != num_slots:
        raise checkpoint_error(place, f"{len(rows)} rows for {num_slots} rows of exp_avg")
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside) > 0:
        raise checkpoint_error(place, f"row {int(outside[0])} is outside the table's {num_rows} rows")
    ordered = rows.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated) > 0:
        raise checkpoint_error(place, f"row {int(repeated[0])} is there more than once")
