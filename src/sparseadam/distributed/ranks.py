"""The processes of a group, as far as they wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from .. import _validate


@contextmanager
def answered(rank: int, world_size: int, doing: str) -> Iterator[None]:
    """Say what it means when something that ranks do together fails."""
    try:
        yield
    except RuntimeError as error:
        raise _validate.lost_rank_error(rank, world_size, doing, error) from error


class Ranks:
    """The processes that save or load together; one that is alone needs no group.

    Args:
        process_group: which; None for all.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        """Find out which one this is."""
        self.process_group = process_group
        self.are_grouped = dist.is_initialized()
        self.rank = dist.get_rank(process_group) if self.are_grouped else 0
        self.size = dist.get_world_size(process_group) if self.are_grouped else 1

    def gather(self, value: Any, doing: str) -> list[Any]:
        """Return every rank's value, in their order."""
        values = [value] * self.size
        if self.are_grouped:
            with answered(self.rank, self.size, doing):
                dist.all_gather_object(values, value, group=self.process_group)
        return values
