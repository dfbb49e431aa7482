"""Parts of whole tensors in ``torch.distributed.checkpoint``: one rank's part written, any stretch read.

Its ``DTensor`` knows shards that are cut evenly. Slots of compact state are not: each rank has as many as rows of its
shard were touched. So the planners, through which it is told what to write and read, are our own.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .. import _validate
from .ranks import Ranks, answered


class Part(NamedTuple):
    """A rank's entries of a whole tensor: ``[offset, offset + len(source))`` of ``total`` along the first dimension.

    ``order`` is the order to write them in, or None for that of ``source``.
    """

    source: Tensor
    offset: int
    total: int
    order: Tensor | None = None


def write(entries: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Write a nested dict with :class:`Part` among its tensors to a folder, each rank its own.

    Raises:
        RuntimeError: a rank could not write, or does not answer.
    """
    try:
        with answered(ranks.rank, ranks.size, "writing a checkpoint"), warnings.catch_warnings():
            _ignore_that_there_is_no_group()
            state_dict_saver.save(
                entries, checkpoint_id=folder, planner=_SavePlanner(), process_group=ranks.process_group
            )
    except CheckpointException as error:  # a BaseException, of what went wrong on which rank
        raise _validate.unwritten_checkpoint_error(str(folder), _causes(error)) from error


def _ignore_that_there_is_no_group() -> None:
    """Ignore what PyTorch warns of where ranks write or read by themselves, in words that differ by version."""
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")


def _causes(error: CheckpointException) -> list[str]:
    return [f"{type(cause).__name__} on rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()]


class _SavePlanner(DefaultSavePlanner):
    """Writes parts as such, and all else as PyTorch does, on the first rank.

    Shared out among ranks, the tensors of one state would come from several of them, and replicas of a table do not
    have their slots in the same order: with ``missed_steps="replay"`` rows get them as they are read.
    """

    def create_local_plan(self) -> SavePlan:
        """Plan to write what is here. A tensor without entries is the first rank's to write."""
        self._parts = {name: value for name, value in self.state_dict.items() if isinstance(value, Part)}
        others = {name: value for name, value in self.state_dict.items() if name not in self._parts}
        self.state_dict = others if self.is_coordinator else {}
        plan = super().create_local_plan()
        items = [
            _write_item(name, part)
            for name, part in self._parts.items()
            if len(part.source) > 0 or (part.total == 0 and self.is_coordinator)
        ]
        return SavePlan([*plan.items, *items], plan.storage_data, plan.planner_data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return what is to be written; a copy in another order exists for one part at a time."""
        if index.fqn not in self._parts:
            return super().lookup_object(index)
        part = self._parts[index.fqn]
        return part.source if part.order is None else part.source[part.order]


def _write_item(name: str, part: Part) -> WriteItem:
    other_sizes = part.source.shape[1:]
    offsets = torch.Size([part.offset, *[0] * len(other_sizes)])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=part.source.shape),
        properties=TensorProperties(dtype=part.source.dtype),
        size=torch.Size([part.total, *other_sizes]),
    )
    return WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data)


class Stretch(NamedTuple):
    """Where entries of a saved tensor are to go, from ``offset`` on, as many as ``target`` has."""

    name: str
    offset: int
    target: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The same in PyTorch's words."""
        offsets = [self.offset, *[0] * self.target.dim()][: self.target.dim()]
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=self.target.shape)


class Saved:
    """A checkpoint in a folder, which every rank reads for itself.

    Args:
        folder: where it is.

    Attributes:
        tensors: what there is: its size, dtype and chunks, by the names of PyTorch's flattened dicts.
        keys: the keys in nested dicts and lists of everything, by the same names.
    """

    def __init__(self, folder: Path) -> None:
        """Read what there is."""
        self._folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # of whatever a damaged file makes of unpickling
            raise _validate.unread_checkpoint_error(
                str(folder), [f".metadata: {_validate.reason_of(error)}"]
            ) from error
        self._saved = metadata.state_dict_metadata
        self.tensors = {name: each for name, each in self._saved.items() if isinstance(each, TensorStorageMetadata)}
        self.keys: dict[str, tuple[Any, ...]] = metadata.planner_data

    def read(self, stretches: Sequence[Stretch]) -> None:
        """Fill the targets."""
        self._read(_LoadPlanner(self._saved, stretches, []))

    def values(self, prefix: str) -> dict[str, Any]:
        """Return everything that is no tensor and has a name that begins so."""
        is_value = {name: isinstance(each, BytesStorageMetadata) for name, each in self._saved.items()}
        planner = _LoadPlanner(
            self._saved, [], [name for name in is_value if is_value[name] and name.startswith(prefix)]
        )
        self._read(planner)
        return planner.values

    def _read(self, planner: _LoadPlanner) -> None:
        try:
            with warnings.catch_warnings():
                _ignore_that_there_is_no_group()
                if "no_dist" in inspect.signature(state_dict_loader.load).parameters:
                    state_dict_loader.load({}, checkpoint_id=self._folder, planner=planner, no_dist=True)
                else:  # PyTorch 2.6, where only this reads for itself what is in a group
                    warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
                    state_dict_loader.load_state_dict({}, FileSystemReader(self._folder), no_dist=True, planner=planner)
        except CheckpointException as error:
            raise _validate.unread_checkpoint_error(str(self._folder), _causes(error)) from error


class _LoadPlanner(LoadPlanner):
    """Reads stretches of tensors into memory that is there, and values by name."""

    def __init__(self, saved: dict[str, Any], stretches: Sequence[Stretch], names_of_values: Sequence[str]) -> None:
        self._saved = saved
        self._stretches = {(each.name, each.chunk.offsets): each for each in stretches if each.target.numel() > 0}
        self._names_of_values = names_of_values
        self.values: dict[str, Any] = {}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing to do: what was saved is known."""

    def create_local_plan(self) -> LoadPlan:
        """Plan to read what was asked for."""
        nowhere = torch.Size([0])
        items = [
            ReadItem(LoadItemType.BYTE_IO, MetadataIndex(name), nowhere, MetadataIndex(name), nowhere, nowhere)
            for name in self._names_of_values
        ]
        for each in self._stretches.values():
            items += create_read_items_for_chunk_list(each.name, self._saved[each.name], [each.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Leave them as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Leave it as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value: numbers, strings, dtypes and what is made of them, and no code."""
        self.values[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the memory for what is read next."""
        index = read_item.dest_index
        assert index.offset is not None
        target = self._stretches[index.fqn, index.offset].target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: it is the target's own memory."""
