"""Checkpoints of sharded tables and of what an optimizer keeps for them, for any number of ranks, one included.

They are ``torch.distributed.checkpoint``'s, of ``{"model": model.state_dict(), "optim": optimizer.state_dict()}`` as
one process would write it: a shard is a part of a whole tensor. Of tables that is plain. Of compact state, the slots of
all ranks are one list: ``rows`` numbers rows of the whole table, ranks stand in their order, and each rank's slots are
sorted by row, so that all of them are. A rank that loads takes the slots of its own rows, wherever they stand.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .. import _validate
from .parts import Part, Saved, Stretch, write
from .ranks import Ranks
from .sharded import ShardedTable, sharded_tables

_COMPLETE = re.compile(r"step-(\d{12})")
_PARTIAL = "partial-"

# Counted by each rank for its own rows; everything else that is kept for a whole table is the same on all ranks.
_COUNTED = "num_skipped"


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a model and its optimizer to a new folder in ``folder``, wholly or not at all; every rank must call it.

    All is written to a folder of another name, which is renamed when every rank has written its part and the disk has
    it. What a save leaves that was cut short is never loaded, and the next one removes it. Earlier checkpoints stay.

    Args:
        folder: where checkpoints are, on a file system that all ranks see.
        step: the checkpoint's number, in [0, 10^12).
        model: with sharded tables, or without any. All other parameters and buffers are taken to be the same on all
            ranks, and are written once.
        optimizer: a :class:`sparseadam.SparseAdam`, or one whose state of sharded tables has the same form: ``rows``,
            and tensors with an entry for each of them.
        process_group: the ranks that save together; None for all, or for a process that is alone.

    Returns:
        The folder of this checkpoint: of step 20 it is ``step-000000000020``.

    Raises:
        TypeError: ``step`` is not an int.
        ValueError: ``step`` is outside its range.
        RuntimeError: there is such a checkpoint already, the ranks are at different steps, a state is not as said, or a
            rank cannot write or does not answer. Earlier checkpoints are whole.
    """
    ranks = Ranks(process_group)
    tables = _tables_of(optimizer, model)
    failure: Exception | None = None
    try:
        step = _validate.check_checkpoint_step(step)
        state = optimizer.state_dict()
        own = _Said(step, _unfit(model, state["state"], tables), *_describe(state["state"], tables))
    except Exception as caught:  # raised when the other ranks know of it
        failure, own = caught, _Said(step, _validate.reason_of(caught), {}, None)
    said: list[_Said] = ranks.gather(own, "beginning a checkpoint")
    if failure is not None:
        raise failure
    _validate.check_ready_to_save(said)
    final = Path(folder) / f"step-{step:012d}"
    partial = final.with_name(_PARTIAL + final.name)
    problem = ranks.gather(_make_room(final, partial) if ranks.rank == 0 else None, "beginning a checkpoint")[0]
    if problem is not None:
        raise _validate.unwritten_checkpoint_error(str(final), [problem])
    state["state"] = _state_entries(state["state"], tables, [each.counts for each in said], ranks.rank)
    write({"model": _model_entries(model), "optim": state}, partial, ranks)
    problem = _complete(partial, final) if ranks.rank == 0 else None
    problem = ranks.gather(problem, "completing a checkpoint")[0]
    if problem is not None:
        raise _validate.unwritten_checkpoint_error(str(partial), [problem])
    return final


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> int | None:
    """Load the last complete checkpoint into a model and its optimizer; every rank must call it.

    It may have been written by any number of ranks, or by one process with an ``nn.Embedding`` in the place of each
    sharded table, and loads into either. Slots come in the order in which they stand in the file.

    Args:
        folder: where :func:`save_checkpoint` wrote.
        model: with the same names and sizes as the one that was saved.
        optimizer: with the same groups.
        process_group: the ranks that load together; None for all, or for a process that is alone.

    Returns:
        The step of the checkpoint, or None where there is none, and nothing has been changed.

    Raises:
        ValueError: the checkpoint does not fit; neither model nor optimizer of this rank has been changed.
        RuntimeError: a file that cannot be read, or another rank that could not load or does not answer. Build model
            and optimizer anew.
    """
    ranks = Ranks(process_group)
    found = _last_complete(Path(folder)) if ranks.rank == 0 else (None, None)
    name, problem = ranks.gather(found, "looking for a checkpoint")[0]
    if problem is not None:
        raise _validate.unread_checkpoint_error(str(folder), [problem])
    if name is None:
        return None
    error: Exception | None = None
    try:
        _load(Saved(Path(folder) / name), model, optimizer)
    except Exception as caught:  # raised when the other ranks know of it
        error = caught
    have_failed = ranks.gather(error is not None, "loading a checkpoint")
    if error is not None:
        raise error
    if any(have_failed):
        raise _validate.failed_elsewhere_error(ranks.rank, [rank for rank, failed in enumerate(have_failed) if failed])
    return int(name.removeprefix("step-"))


# Folders ------------------------------------------------------------------------------------------


def _make_room(final: Path, partial: Path) -> str | None:
    """Prepare the folder of a checkpoint; return what is in its way."""
    try:
        if final.exists():
            return "it is there already"
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.iterdir():
            if re.fullmatch(_PARTIAL + _COMPLETE.pattern, left.name):
                shutil.rmtree(left)
        partial.mkdir()
    except OSError as error:
        return f"cannot write to {error.filename}: {error.strerror}"
    return None


def _complete(partial: Path, final: Path) -> str | None:
    """Give a checkpoint its name, and have the disk know it; return what went wrong."""
    try:
        os.rename(partial, final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        return f"cannot rename it to {final}: {error.strerror}"
    return None


def _last_complete(folder: Path) -> tuple[str | None, str | None]:
    """Return the name of the last complete checkpoint, if any, and what keeps a folder from being looked into."""
    try:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        return None, f"cannot look into {error.filename}: {error.strerror}"
    return max((name for name in names if _COMPLETE.fullmatch(name)), default=None), None


# Names --------------------------------------------------------------------------------------------


def _tables_by_key(model: nn.Module) -> dict[str, ShardedTable]:
    """Return the sharded tables by their keys in the model's state dict."""
    return {f"{name}.weight" if name else "weight": table for name, table in sharded_tables(model)}


def _tables_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, ShardedTable]:
    """Return the sharded tables by the numbers of their parameters in the optimizer's state dict."""
    tables = {id(table.weight): table for _, table in sharded_tables(model)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: tables[id(each)] for number, each in enumerate(parameters) if id(each) in tables}


# Writing ------------------------------------------------------------------------------------------


class _Said(NamedTuple):
    """What ranks tell each other before they write.

    Attributes:
        step: of the checkpoint.
        problem: what keeps this rank from writing.
        counts: slots and skipped rows of the sharded tables that have a state, by the number of their parameter.
        shared: of the same tables, what is kept for each as a whole: its step, what it owes. None where that was not
            found out.
    """

    step: object
    problem: str | None
    counts: dict[int, tuple[int, int]]
    shared: dict[int, dict[str, Any]] | None


def _unfit(model: nn.Module, states: Mapping[int, Any], tables: Mapping[int, ShardedTable]) -> str | None:
    """Return what of a model or its optimizer cannot be written, or not be loaded again."""
    keys = _tables_by_key(model)
    shards = {table.weight.data_ptr() for table in keys.values() if table.weight.numel() > 0}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            return f"{name!r} of the model's state dict is no tensor, but a {type(value).__name__}"
        if name not in keys and value.data_ptr() in shards:
            return f"{name!r} of the model's state dict is a shard's memory outside of its sharded table"
    for number in tables:
        if number in states and "rows" not in states[number]:
            found = ", ".join(map(str, states[number])) or "nothing"
            return f"the optimizer's state of parameter {number}, a sharded table, has no 'rows', but {found}"
    return None


def _describe(
    states: Mapping[int, Any], tables: Mapping[int, ShardedTable]
) -> tuple[dict[int, tuple[int, int]], dict[int, dict[str, Any]]]:
    """Return ``counts`` and ``shared`` of what ranks tell each other."""
    found = {number: states[number] for number in tables if number in states}
    counts = {number: (len(state.get("rows", ())), state.get(_COUNTED, 0)) for number, state in found.items()}
    shared = {}
    for number, state in found.items():
        numbers = {key: value.item() for key, value in state.items() if isinstance(value, Tensor) and value.dim() == 0}
        plain = {key: value for key, value in state.items() if not isinstance(value, Tensor) and key != _COUNTED}
        shared[number] = numbers | plain
    return counts, shared


def _model_entries(model: nn.Module) -> dict[str, Any]:
    entries = dict(model.state_dict())
    for key, table in _tables_by_key(model).items():
        entries[key] = Part(entries[key], table.row_start, table.num_embeddings)
    return entries


def _state_entries(
    states: Mapping[int, Any],
    tables: Mapping[int, ShardedTable],
    counts: Sequence[Mapping[int, tuple[int, int]]],
    rank: int,
) -> dict[int, Any]:
    """Return the states, those of sharded tables as parts of whole ones."""
    entries = dict(states)
    for number, (num_slots, _) in counts[rank].items():
        offset = sum(each[number][0] for each in counts[:rank])
        total = sum(each[number][0] for each in counts)
        num_skipped = sum(each[number][1] for each in counts)
        rows = states[number]["rows"]
        order = rows.argsort()
        entry = {**states[number], "rows": rows + tables[number].row_start}
        for key, value in entry.items():
            if isinstance(value, Tensor) and _is_per_slot(value.shape, num_slots):
                entry[key] = Part(value, offset, total, order)
        entries[number] = entry | ({_COUNTED: num_skipped} if num_skipped else {})
    return entries


def _is_per_slot(shape: Sequence[int], num_slots: int) -> bool:
    """Whether a tensor of a compact state has an entry for each slot."""
    return len(shape) > 0 and shape[0] == num_slots


# Reading ------------------------------------------------------------------------------------------


def _load(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    stretches = _model_stretches(saved, model)
    optimizer.load_state_dict(_read_optimizer(saved, _tables_of(optimizer, model)))
    saved.read(stretches)


def _model_stretches(saved: Saved, model: nn.Module) -> list[Stretch]:
    """Return what to read into the model's own memory, when all of it fits."""
    tables = _tables_by_key(model)
    wanted, stretches = {}, []
    for key, tensor in model.state_dict().items():
        name, size, offset = f"model.{key}", tensor.shape, 0
        if key in tables:
            size, offset = torch.Size([tables[key].num_embeddings, *size[1:]]), tables[key].row_start
        wanted[name] = size, tensor.dtype
        stretches.append(Stretch(name, offset, tensor))
    found = {name: (each.size, each.properties.dtype) for name, each in saved.tensors.items()}
    _validate.check_saved_model({name: each for name, each in found.items() if name.startswith("model.")}, wanted)
    return stretches


class _Slots(NamedTuple):
    """Slots of a saved state: from ``start`` up to ``end``, those that ``places`` names, counted from ``start``."""

    start: int
    end: int
    places: Tensor


def _read_optimizer(saved: Saved, tables: Mapping[int, ShardedTable]) -> dict[str, Any]:
    """Return an optimizer's state dict, of sharded tables with the state of the rows that are here."""
    states: dict[int, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    state_dict: dict[str, Any] = {"state": states}
    slots = {number: _slots_here(saved, number, table) for number, table in tables.items()}
    entries = saved.values("optim.")
    for name, tensor in saved.tensors.items():
        _, *keys = saved.keys[name]
        if name.startswith("optim."):
            found = slots.get(int(keys[1])) if keys[0] == "state" else None
            entries[name] = _read_tensor(saved, name, tensor, found)
    for name, value in entries.items():
        _, *keys = saved.keys[name]
        if keys[0] == "state":
            states.setdefault(int(keys[1]), {})[keys[2]] = value
        elif keys[0] == "param_groups":
            _put(groups.setdefault(keys[1], {}), keys[2:], value)
        else:
            state_dict[keys[0]] = value
    for number, table in tables.items():
        if number in states:
            if "rows" not in states[number]:
                there = ", ".join(map(str, states[number]))
                raise _validate.checkpoint_error(f"parameter {number}, a sharded table", f"rows missing, found {there}")
            states[number]["rows"] -= table.row_start
            if table.row_start > 0:  # the rank of the first row goes on counting for all
                states[number].pop(_COUNTED, None)
    return state_dict | {"param_groups": [_with_lists(groups[index]) for index in sorted(groups)]}


def _put(nested: dict[Any, Any], keys: Sequence[Any], value: Any) -> None:
    """Put a value where it stood in nested dicts and lists, for which dicts by place stand."""
    *outer, last = keys
    for key in outer:
        nested = nested.setdefault(key, {})
    nested[last] = value


def _with_lists(nested: Any) -> Any:
    """Make lists of the dicts that stand for them; other dicts have no numbers for keys here."""
    if not isinstance(nested, dict):
        return nested
    values = {key: _with_lists(value) for key, value in nested.items()}
    is_list = len(values) > 0 and all(isinstance(key, int) for key in values)
    return [values[place] for place in sorted(values)] if is_list else values


def _slots_here(saved: Saved, number: int, table: ShardedTable) -> list[_Slots] | None:
    """Find the slots of a table's local rows, chunk by chunk: whatever order they were saved in."""
    name = f"optim.state.{number}.rows"
    if name not in saved.tensors:
        return None
    found = []
    for chunk in saved.tensors[name].chunks:
        rows = torch.empty(chunk.sizes, dtype=torch.int64, device="cpu")
        saved.read([Stretch(name, chunk.offsets[0], rows)])
        here = ((rows >= table.row_start) & (rows < table.row_end)).nonzero()[:, 0]
        if len(here) > 0:
            first, last = int(here[0]), int(here[-1])
            found.append(_Slots(chunk.offsets[0] + first, chunk.offsets[0] + last + 1, here - first))
    return found


def _read_tensor(saved: Saved, name: str, tensor: TensorStorageMetadata, slots: Sequence[_Slots] | None) -> Tensor:
    """Read a tensor of a state: whole, or some slots of it."""
    dtype = tensor.properties.dtype
    if slots is None:
        whole = torch.empty(tensor.size, dtype=dtype, device="cpu")
        saved.read([Stretch(name, 0, whole)])
        return whole
    parts = [torch.empty(0, *tensor.size[1:], dtype=dtype, device="cpu")]
    for start, end, places in slots:
        stretch = torch.empty(end - start, *tensor.size[1:], dtype=dtype, device="cpu")
        saved.read([Stretch(name, start, stretch)])
        parts.append(stretch[places])
    return torch.cat(parts)
