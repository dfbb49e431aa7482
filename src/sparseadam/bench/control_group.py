"""A limit on memory that counts all of it: the pages of files that a process has the system keep, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BenchError


class ControlGroup:
    """A memory control group of version 1 or 2, which differ in names only."""

    def __init__(self, path: Path, is_first_version: bool) -> None:
        """Stand for the group at ``path``."""
        self.path = path
        self.is_first_version = is_first_version

    def limit(self, num_bytes: int) -> None:
        """Allow the group so much memory, and no swapping in place of it."""
        if self.is_first_version:
            self._write("memory.limit_in_bytes", num_bytes)
            self._write("memory.memsw.limit_in_bytes", num_bytes)
        else:
            self._write("memory.max", num_bytes)
            self._write("memory.swap.max", 0)

    def enter(self) -> None:
        """Put this process into the group. What it has in memory by then stays with the group it was in."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """Return the most memory that the group has used, where the system keeps that."""
        name = self.path / ("memory.max_usage_in_bytes" if self.is_first_version else "memory.peak")
        return int(name.read_text()) if name.exists() else None

    def _write(self, name: str, value: int) -> None:
        if (self.path / name).exists():  # not where the kernel counts no swap
            (self.path / name).write_text(str(value))


def own_group() -> ControlGroup:
    """Return the group that this process is in.

    Raises:
        BenchError: the system has no memory control groups.
    """
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return ControlGroup(Path("/sys/fs/cgroup/memory") / path[1:], is_first_version=True)
    for number, _, path in lines:
        if number == "0":
            return ControlGroup(Path("/sys/fs/cgroup") / path[1:], is_first_version=False)
    raise BenchError("this system has no memory control groups.")


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[ControlGroup]:
    """Make a group below this process's own that allows so much memory, for children to enter; they must have ended.

    Raises:
        BenchError: no such group can be made here.
    """
    own = own_group()
    group = ControlGroup(own.path / f"sparseadam-{os.getpid()}", is_first_version=own.is_first_version)
    try:
        group.path.mkdir()
        group.limit(num_bytes)
    except OSError as error:
        raise BenchError(
            f"no limit of memory can be set here ({error}). It needs root, or a delegated group."
        ) from None
    try:
        yield group
    finally:
        group.path.rmdir()
