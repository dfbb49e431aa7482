"""State dicts in and out: ours, and the dense ones of PyTorch.

PyTorch's own loader casts every tensor of a state to the parameter's dtype, which would round row numbers and the
float32 moments of half-precision tables. So states are read here, exactly, and checked before anything is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ._validate import Place, checkpoint_error, shape_text
from .moments import STATE_KEYS, Moments, moment_dtype

# Written beside the state; raised when a file of the old form could no longer be read.
FORMAT_KEY = "sparseadam_format"
FORMAT = 1

# Far beyond any run; a float beyond it no longer counts single steps.
_MAX_STEP = 2**53

_DENSE_KEYS = ("step", "exp_avg", "exp_avg_sq")

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
        ValueError: a part is missing, or the format is not one that this version knows.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            found = ", ".join(map(str, state_dict)) or "nothing"
            raise checkpoint_error("all parameters", f"{key} missing, found {found}")
    version = state_dict.get(FORMAT_KEY, FORMAT)
    if version != FORMAT:
        raise checkpoint_error(
            "all parameters", f"{FORMAT_KEY} is {version!r}, and this version of sparseadam reads {FORMAT}"
        )


def write_state(moments: Moments) -> dict[str, Any]:
    """Return a table's state as plain values and tensors; the tensors are live views, as in PyTorch."""
    return moments.parts()


def write_torch_state(moments: Moments) -> dict[str, Any]:
    """Return a table's state as :class:`torch.optim.SparseAdam` keeps it, dense."""
    exp_avg, exp_avg_sq = moments.to_dense()
    return {"step": moments.step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def read_group(saved: Mapping[str, Any], group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with the saved options and the present parameters.

    Options and names that the checkpoint lacks keep their present values, as does everything that only steers how
    PyTorch's own Adam computes.
    """
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


def read_state(state: Any, table: Tensor, place: Place, *, is_compact: bool) -> Moments:
    """Build moments from a table's saved state.

    Args:
        state: the saved parts by name. A dense state of :class:`torch.optim.SparseAdam` or :class:`torch.optim.Adam`
            keeps the rows that have a non-zero moment.
        table: the table it is for.
        place: the table's place, for messages.
        is_compact: whether the state is known to be ours. Otherwise it is ours if it has ``rows``.

    Raises:
        ValueError: the state does not fit the table; the message says what was found and expected.
    """
    if not isinstance(state, Mapping):
        raise checkpoint_error(place, f"a {type(state).__name__} found, a dict expected")
    is_compact = is_compact or "rows" in state
    wanted = STATE_KEYS if is_compact else _DENSE_KEYS
    missing = [key for key in wanted if key not in state]
    if missing:
        raise checkpoint_error(place, f"{', '.join(missing)} missing, found {', '.join(map(str, state))}")
    extra = [str(key) for key in state if key not in wanted]
    if extra:
        raise checkpoint_error(place, f"{', '.join(extra)} not understood by SparseAdam")
    step = _read_step(state["step"], place)
    for key in ("exp_avg", "exp_avg_sq"):
        _check_moment(state[key], key, table, place, dense=not is_compact)
    if state["exp_avg"].shape != state["exp_avg_sq"].shape:
        shapes = " and ".join(shape_text(state[key].shape) for key in ("exp_avg", "exp_avg_sq"))
        raise checkpoint_error(place, f"exp_avg and exp_avg_sq have different shapes, {shapes}")
    if is_compact:
        return _read_compact(step, state, table, place)
    return _read_dense(step, state, table)


def _read_step(step: object, place: Place) -> int:
    """Return a step count, which is an int here and in SparseAdam, and a one-element tensor in Adam."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_STEP:
        raise checkpoint_error(place, f"step is {step!r}, a whole number of at least 0 expected")
    return value


def _check_moment(moment: object, key: str, table: Tensor, place: Place, *, dense: bool) -> None:
    if not isinstance(moment, Tensor):
        raise checkpoint_error(place, f"{key} is a {type(moment).__name__}, a strided tensor expected")
    if moment.layout is not torch.strided or moment.is_meta:
        found = "no data, on the meta device" if moment.is_meta else f"layout {moment.layout}"
        raise checkpoint_error(place, f"{key} has {found}, a strided tensor expected")
    allowed = {moment_dtype(table.dtype)}
    if dense:
        allowed.add(table.dtype)  # PyTorch keeps the moments of half-precision tables in half precision
    if moment.dtype not in allowed:
        wanted = " or ".join(sorted(map(str, allowed)))
        raise checkpoint_error(place, f"{key} has dtype {moment.dtype}, {wanted} expected")
    if dense and moment.shape != table.shape:
        raise checkpoint_error(
            place,
            f"{key} has shape {shape_text(moment.shape)}, the table's {shape_text(table.shape)} expected",
        )


def _read_dense(step: int, state: Mapping[str, Any], table: Tensor) -> Moments:
    sparse_dim = min(table.dim(), 1)
    moments = Moments(table.shape, sparse_dim, moment_dtype(table.dtype), table.device)
    by_row = (moments.num_rows, *moments.row_shape)
    exp_avg, exp_avg_sq = (state[key].reshape(by_row) for key in ("exp_avg", "exp_avg_sq"))
    per_row = (moments.num_rows, moments.width)
    is_touched = (exp_avg != 0).reshape(per_row).any(1) | (exp_avg_sq != 0).reshape(per_row).any(1)
    rows = is_touched.nonzero()[:, 0]
    moments.fill(step, rows, exp_avg[rows], exp_avg_sq[rows])
    return moments


def _read_compact(step: int, state: Mapping[str, Any], table: Tensor, place: Place) -> Moments:
    rows, exp_avg, exp_avg_sq = state["rows"], state["exp_avg"], state["exp_avg_sq"]
    sparse_dim = table.dim() - (exp_avg.dim() - 1)
    row_shape = table.shape[sparse_dim:] if 0 <= sparse_dim <= table.dim() else None
    if exp_avg.dim() == 0 or row_shape is None or exp_avg.shape[1:] != row_shape:
        raise checkpoint_error(
            place,
            f"exp_avg has shape {shape_text(exp_avg.shape)}, whose rows are not rows of the table's shape "
            f"{shape_text(table.shape)}",
        )
    _check_rows(rows, len(exp_avg), math.prod(table.shape[:sparse_dim]), place)
    moments = Moments(table.shape, sparse_dim, moment_dtype(table.dtype), table.device)
    moments.fill(step, rows, exp_avg, exp_avg_sq)
    return moments


def _check_rows(rows: object, num_slots: int, num_rows: int, place: Place) -> None:
    if not isinstance(rows, Tensor) or rows.dtype is not torch.int64 or rows.dim() != 1:
        found = f"{rows.dtype} {shape_text(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise checkpoint_error(place, f"rows is {found}, a one-dimensional torch.int64 tensor expected")
    if len(rows) != num_slots:
        raise checkpoint_error(place, f"{len(rows)} rows for {num_slots} rows of moments")
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside) > 0:
        raise checkpoint_error(place, f"row {int(outside[0])} is outside the table's {num_rows} rows")
    ordered = rows.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated) > 0:
        raise checkpoint_error(place, f"row {int(repeated[0])} is there more than once")
