"""Groups of processes on this machine, which talk over its loopback."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported what takes seconds to import, and done nothing else.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "sparseadam"]
)

# How long processes may take, which need five seconds on an idle machine, and wait for each other.
TIMEOUT, PATIENCE = 120, 60


def join_group(rank: int, world_size: int, port: int, patience: float = PATIENCE) -> None:
    """Make this process one of a Gloo group whose store the parent keeps."""
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]  # a host's own name need not lead anywhere
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=patience))


def leave_report(report: Any, folder: Path, rank: int) -> None:
    """Write down what the parent is to see, wholly or not at all."""
    unfinished = folder / f"{rank}.unfinished"
    unfinished.write_bytes(pickle.dumps(report))
    unfinished.rename(folder / f"{rank}.pickle")


def spawn(
    function: Callable[..., None], world_size: int, folder: Path, *arguments: Any, may_die: bool = False
) -> list[Any]:
    """Run ``function(rank, world_size, port, folder, *arguments)`` in processes of their own.

    Returns:
        By rank, what ``leave_report`` wrote; None of a process that left none, which only those do that may die.
        Otherwise an exception in one of them fails the test, as a delay always does.
    """
    # The port is the one that this process already listens on, so that nobody else can take it meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.start_processes(
        function, (world_size, store.port, folder, *arguments), nprocs=world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        if may_die:
            for process in context.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            assert all(process.exitcode is not None for process in context.processes), f"not done after {TIMEOUT} s"
        else:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    pytest.fail(f"{world_size} processes were not done after {TIMEOUT} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    paths = [folder / f"{rank}.pickle" for rank in range(world_size)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def torchrun(arguments: Sequence[str], folder: Path, **environment: str) -> str:
    """Run ``torchrun --standalone`` with these arguments in a folder, and return what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, cwd=folder, env=environment, **streams) as launched:
        try:
            output, _ = launched.communicate(timeout=TIMEOUT)
        finally:
            launched.terminate()  # told to end, torchrun ends the processes that it started
    assert launched.returncode == 0, output
    return str(output)
