"""Ranks that die or hang: the others end with a clear error, the last checkpoint is whole, and torchrun goes on."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import join_group, leave_report, spawn, torchrun
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from sparseadam import SparseAdam
from sparseadam.distributed import ShardedEmbedding, checkpoint, load_checkpoint, save_checkpoint

PAGE = Path(__file__).parents[1] / "docs" / "sharding.md"
PATIENCE = 3.0


def die() -> None:
    """End as a process that the kernel or an operator ends: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def take_step(table: nn.Module, optimizer: SparseAdam, step: int) -> None:
    optimizer.zero_grad()
    table(torch.arange(step, 12)).square().sum().backward()
    optimizer.step()


# A rank is lost while training --------------------------------------------------------------------


def lose_the_last(rank: int, world_size: int, port: int, folder: Path, how: str) -> None:
    """Train until the last rank is lost, and leave what the others then say."""
    join_group(rank, world_size, port, PATIENCE)
    table = ShardedEmbedding(12, 2)
    optimizer = SparseAdam(table.parameters())
    take_step(table, optimizer, 0)
    loss = table(torch.arange(12)).sum()
    if rank == world_size - 1:
        while how == "hangs" and len(list(folder.glob("*.pickle"))) < world_size - 1:
            time.sleep(0.05)  # until the others have given it up
        die()
    try:
        loss.backward()
    except RuntimeError as error:
        leave_report(str(error), folder, rank)
        die()  # as the error says; leaving the group would wait for the others


@pytest.mark.parametrize(("world_size", "how"), [(2, "dies"), (3, "hangs")])
def test_a_lost_rank_ends_the_others_with_a_clear_error(world_size: int, how: str, tmp_path: Path) -> None:
    *reports, none = spawn(lose_the_last, world_size, tmp_path, how, may_die=True)
    assert none is None
    for rank, said in enumerate(reports):
        assert re.match(
            rf"rank {rank} of {world_size} lost another rank while beginning the backward pass of lookup 1 of sharded "
            r"table 0: .*\. Either that rank has ended, .* start all from the last checkpoint",
            said,
        )


# A rank is lost while saving ----------------------------------------------------------------------


def before_writing(rank: int) -> None:
    if rank == 1:
        FileSystemWriter.write_data = lambda *_: die()


def after_writing(rank: int) -> None:
    write_data = FileSystemWriter.write_data

    def write_and_die(*arguments: Any) -> None:
        write_data(*arguments).wait()
        die()

    if rank == 1:
        FileSystemWriter.write_data = write_and_die


def before_the_name(rank: int) -> None:
    if rank == 0:
        checkpoint._complete = lambda *_: die()


def half_a_file(rank: int) -> None:
    """As with a full disk, or a file system that went away."""

    def write_half(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        FileSystemWriter.write_data = write_half


LOSSES: dict[str, Callable[[int], None]] = {
    each.__name__.replace("_", " "): each for each in (before_writing, after_writing, before_the_name, half_a_file)
}


def save_and_be_lost(rank: int, world_size: int, port: int, folder: Path, how: str) -> None:
    """Save twice, the second time with a rank that is lost, and leave what the other says."""
    join_group(rank, world_size, port, PATIENCE)
    table = ShardedEmbedding(12, 2)
    optimizer = SparseAdam(table.parameters())
    take_step(table, optimizer, 0)
    save_checkpoint(folder / "checkpoints", 1, table, optimizer)
    saved = table.weight.detach().clone(), optimizer.state[table.weight]["exp_avg"].clone()
    leave_report({"saved": saved, "said": None}, folder, rank)
    take_step(table, optimizer, 1)
    LOSSES[how](rank)
    try:
        save_checkpoint(folder / "checkpoints", 2, table, optimizer)
    except RuntimeError as error:
        leave_report({"saved": saved, "said": str(error)}, folder, rank)
    die()


@pytest.mark.parametrize("how", LOSSES)
def test_a_rank_lost_while_saving_leaves_the_checkpoint_before(how: str, tmp_path: Path) -> None:
    reports = spawn(save_and_be_lost, 2, tmp_path, how, may_die=True)
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step-000000000001", "partial-step-000000000002"}
    assert [report["said"] is None for report in reports] == {
        "before the name": [True, False],
        "half a file": [False, False],
    }.get(how, [False, True])
    for report in reports:
        if how == "half a file":
            assert re.search(
                "was not completed: OSError on rank 1: .*No space left .*Earlier checkpoints are whole", report["said"]
            )
        elif report["said"] is not None:
            assert re.match(r"rank \d of 2 lost another rank while (writing|completing) a checkpoint: ", report["said"])
    table = nn.Embedding(12, 2, sparse=True)
    optimizer = SparseAdam(table.parameters())
    assert load_checkpoint(folder, table, optimizer) == 1
    weight, exp_avg = (torch.cat(each) for each in zip(*(report["saved"] for report in reports), strict=True))
    assert torch.equal(table.weight, weight)
    assert torch.equal(optimizer.state[table.weight]["exp_avg"], exp_avg)
    save_checkpoint(folder, 2, table, optimizer)  # what was cut short is in nobody's way, and goes
    assert {path.name for path in folder.iterdir()} == {"step-000000000001", "step-000000000002"}


# torchrun goes on ---------------------------------------------------------------------------------

# Added to the page's program: in one of torchrun's rounds a rank kills itself, three steps behind a checkpoint.
FAULT = """
    if step == 13 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == os.environ["DIES_IN_ROUND"]:
        os.kill(os.getpid(), signal.SIGKILL)
"""
REPORT = """
state = optimizer.state[items.weight]
order = state["rows"].argsort()  # slots that were loaded stand in this order
ends = [items.weight.detach(), *(state[name][order] for name in ("rows", "exp_avg", "exp_avg_sq"))]
pickle.dump({"resumed from": resumed_from, "ends": ends}, open(f"{rank}.pickle", "wb"))
"""


def test_torchrun_goes_on_from_the_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (program,) = [block for block in blocks if "load_checkpoint" in block]
    (loop,) = re.findall(r"^for step in .*$", program, re.MULTILINE)
    last = "dist.destroy_process_group()"
    program = "import os, pickle, signal\n" + program.replace(loop, loop + FAULT).replace(last, REPORT + last)
    ends = {}
    for name, dies_in_round in {"undisturbed": "none", "disturbed": "0"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.py").write_text(program, encoding="utf-8")
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "DIES_IN_ROUND": dies_in_round}  # as the page says
        torchrun(["--nproc-per-node", "2", "--max-restarts", "1", "train.py"], folder, **environment)
        ends[name] = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for undisturbed, disturbed in zip(*ends.values(), strict=True):
        assert (undisturbed["resumed from"], disturbed["resumed from"]) == (None, 10)
        assert all(torch.equal(*pair) for pair in zip(undisturbed["ends"], disturbed["ends"], strict=True))
