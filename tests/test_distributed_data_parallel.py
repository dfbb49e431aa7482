"""DistributedDataParallel with Gloo: several processes train like one on the joined batch, and hold the same bits.

What is said here of PyTorch was found with torch 2.13.0 and is said to users in docs/training.md.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from snapshot import snapshot
from test_training_patterns import BLOCKS, PLAIN, SEVERAL_PROCESSES, assert_like_plain, outcome, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseadam import SparseAdam

# How long processes may take, which need five seconds on an idle machine, and wait for each other.
TIMEOUT, PATIENCE = 120, 60
NUM_STEPS, NUM_EXAMPLES = 6, 12


class Model(nn.Module):
    """Two tables whose outputs are added, so that their gradients share memory, bags of any size, and a dense layer."""

    def __init__(self, seed: int) -> None:
        """Start from parameters that a seed names."""
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(40, 4, sparse=True)
        self.authors = nn.Embedding(20, 4, sparse=True)
        self.tags = nn.EmbeddingBag(30, 4, mode="sum", sparse=True)
        self.head = nn.Linear(8, 1)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The sparse part of the parameters."""
        return {name: getattr(self, name).weight for name in ("words", "authors", "tags")}

    @staticmethod
    def ids(numbers: Iterable[int]) -> Tensor:
        """Make a tensor of ids, of which there may be none."""
        return torch.tensor(list(numbers), dtype=torch.int64)

    def forward(self, examples: list[dict[str, Any]]) -> Tensor:
        """Return the sum of the losses of a list of examples, which may be empty."""
        words, authors = (self.ids(each[key] for each in examples) for key in ("word", "author"))
        sizes = torch.tensor([0, *(len(each["tags"]) for each in examples)])
        tags = self.ids(tag for each in examples for tag in each["tags"])
        bags = self.tags(tags, sizes.cumsum(0)[:-1])
        looked_up = torch.cat([self.words(words) + self.authors(authors), bags], dim=1)
        targets = torch.tensor([each["target"] for each in examples])
        return (self.head(looked_up.tanh()).squeeze(1) * targets).sum()


def joined_batch(step: int) -> list[dict[str, Any]]:
    """Return the examples of all processes; in the last step but one nobody has a tag."""
    generator = torch.Generator().manual_seed(step)

    def draw(high: int, count: int = 1) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    examples = []
    for _ in range(NUM_EXAMPLES):
        (word,), (author,), (size,), (target,) = draw(40), draw(20), draw(5), draw(7)
        tags = [] if step == NUM_STEPS - 2 else draw(30, size)
        examples.append({"word": word, "author": author, "tags": tags, "target": target - 3.5})
    return examples


def own_part(step: int, rank: int, world_size: int) -> list[dict[str, Any]]:
    """Return a process's part of the joined batch: even or uneven, and nothing for the last process in step 2."""
    sharers = world_size - 1 if step == 2 else world_size
    cuts = [NUM_EXAMPLES * i // sharers - step % 3 for i in range(1, sharers)]
    ends = [0, *cuts, NUM_EXAMPLES, NUM_EXAMPLES]
    return joined_batch(step)[ends[rank] : ends[rank + 1]]


def make_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    return [SparseAdam(model.tables.values(), lr=0.1), torch.optim.Adam(model.head.parameters(), lr=0.1)]


def gradient_rows(model: Model) -> dict[str, tuple[list[int], bool]]:
    """Return the row of each entry of each gradient, and whether it calls itself coalesced."""
    grads = {name: table.grad for name, table in model.tables.items()}
    return {name: (grad._indices()[0].tolist(), grad.is_coalesced()) for name, grad in grads.items()}


def describe(model: Model, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return all that is trained: as bits, and as tensors."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, table in model.tables.items():
        state = optimizers[0].state[table]
        tensors |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return {"bits": [snapshot(optimizer) for optimizer in optimizers], "tensors": tensors}


# What each process does ---------------------------------------------------------------------------


def train_as_one_of_many(rank: int, world_size: int, port: int, folder: Path) -> None:
    """Train on the own part of each batch and write down what came of it; runs in a process of its own."""
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]  # a host's own name need not lead anywhere
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE))
    report = train(rank, world_size)
    report["refused"] = {what: refusal(attempt) for what, attempt in ATTEMPTS.items()}
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(report))
    dist.destroy_process_group()


def train(rank: int, world_size: int) -> dict[str, Any]:
    model = Model(seed=rank)  # the first process's parameters are handed to all
    parallel = DistributedDataParallel(model)
    optimizers = make_optimizers(model)
    gradients, seen_by_hook = [], []
    hook = model.authors.weight.register_post_accumulate_grad_hook(
        lambda table: seen_by_hook.append(table.grad._indices()[0].tolist())
    )
    for step in range(NUM_STEPS):
        part = own_part(step, rank, world_size)
        model.zero_grad()
        # In the last step a part is taken in two passes, of which only the second exchanges gradients.
        passes = [part[:1], part[1:]] if step == NUM_STEPS - 1 else [part]
        for index, examples in enumerate(passes):
            with nullcontext() if index == len(passes) - 1 else parallel.no_sync():
                (parallel(examples) * world_size / NUM_EXAMPLES).backward()
        gradients.append(gradient_rows(model))
        for optimizer in optimizers:
            optimizer.step()
    hook.remove()
    return describe(model, optimizers) | {"gradients": gradients, "seen by hook": seen_by_hook}


class OwnTable(nn.Module):
    """A table that is no nn.Embedding."""

    def __init__(self) -> None:
        """Make the table."""
        super().__init__()
        self.table = nn.Parameter(torch.ones(5, 2))

    def forward(self, ids: Tensor) -> Tensor:
        """Sum the rows looked up."""
        return F.embedding(ids, self.table, sparse=True).sum()


class TwoTables(nn.Module):
    """The second table is not used, or asked for no rows."""

    def __init__(self, asks: bool) -> None:
        """Make the tables."""
        super().__init__()
        self.used, self.unused = (nn.Embedding(5, 2, sparse=True) for _ in range(2))
        self.asks = asks

    def forward(self, ids: Tensor) -> Tensor:
        """Sum the rows looked up."""
        return self.used(ids).sum() + (self.unused(ids[:0]).sum() if self.asks else 0.0)


def attempt_backward(model: nn.Module, **options: Any) -> None:
    parallel = DistributedDataParallel(model, **options)
    parallel(torch.tensor([1, 3])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


ATTEMPTS: dict[str, Callable[[], None]] = {
    "a functional embedding": lambda: attempt_backward(OwnTable()),
    "a table that is not used": lambda: attempt_backward(TwoTables(asks=False), find_unused_parameters=True),
    "a float16 table": lambda: attempt_backward(nn.Embedding(5, 2, sparse=True, dtype=torch.float16)),
    "a bfloat16 table": lambda: attempt_backward(nn.Embedding(5, 2, sparse=True, dtype=torch.bfloat16)),
    "a table that is asked for no rows": lambda: attempt_backward(TwoTables(asks=True)),
}


def refusal(attempt: Callable[[], None]) -> str | None:
    """Return the message with which an attempt fails, or None."""
    try:
        attempt()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return None


# Tests --------------------------------------------------------------------------------------------


def spawn(function: Callable[..., None], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Run processes and return their reports; an exception in one of them, or a delay, fails the test."""
    # The port is the one that this process already listens on, so that nobody else can take it meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.start_processes(
        function, (world_size, store.port, folder), nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                pytest.fail(f"{world_size} processes were not done after {TIMEOUT} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several processes wrote down."""
    return spawn(train_as_one_of_many, request.param, tmp_path_factory.mktemp("reports"))


def joined_rows(step: int) -> dict[str, list[int]]:
    examples = joined_batch(step)
    return {
        "words": [each["word"] for each in examples],
        "authors": [each["author"] for each in examples],
        "tags": [tag for each in examples for tag in each["tags"]],
    }


def test_parts_are_uneven_and_cover_the_batch() -> None:
    for world_size in (2, 3):
        sizes = []
        for step in range(NUM_STEPS):
            parts = [own_part(step, rank, world_size) for rank in range(world_size)]
            assert [each for part in parts for each in part] == joined_batch(step)
            sizes.append([len(part) for part in parts])
        assert [0 in each for each in sizes] == [False, False, True, False, False, False]
        assert [len(set(each)) > 1 for each in sizes] == [False, True, True, False, True, True]


def test_all_processes_hold_the_same_bits(reports: list[dict[str, Any]]) -> None:
    for report in reports[1:]:
        assert report["bits"] == reports[0]["bits"]


def test_processes_train_like_one_on_the_joined_batch(reports: list[dict[str, Any]]) -> None:
    model = Model(seed=0)
    optimizers = make_optimizers(model)
    for step in range(NUM_STEPS):
        model.zero_grad()
        (model(joined_batch(step)) / NUM_EXAMPLES).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, want in describe(model, optimizers)["tensors"].items():
        found = reports[0]["tensors"][name]
        if want.dtype is torch.int64:
            assert torch.equal(found, want), name
        else:
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_each_process_gets_the_coalesced_lookups_of_all(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        for step, gradients in enumerate(report["gradients"]):
            wanted = {name: (sorted(set(rows)), True) for name, rows in joined_rows(step).items()}
            assert gradients == wanted


def test_a_hook_sees_the_lookups_of_its_own_process_only(reports: list[dict[str, Any]]) -> None:
    """So a step in backward, docs/training.md, would part the processes."""
    for rank, report in enumerate(reports):
        for step, rows in enumerate(report["seen by hook"][: NUM_STEPS - 1]):
            assert rows == [each["author"] for each in own_part(step, rank, len(reports))]


REFUSALS = {
    "a functional embedding": "Cannot access storage of SparseTensorImpl",
    "a table that is not used": "Expected sparse gradient to be defined.",
    "a float16 table": "\"cadd_sparse\" not implemented for 'Half'",
    "a bfloat16 table": None,
    "a table that is asked for no rows": None,
}


def test_what_the_page_says_is_refused_is_refused_and_its_ways_out_are_not(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert set(report["refused"]) == set(REFUSALS)
        for what, words in REFUSALS.items():
            message = report["refused"][what]
            assert message is None if words is None else words in (message or ""), (what, message)


def test_the_block_of_the_page_trains_like_its_plain_loop(tmp_path: Path) -> None:
    report = f"""
import pickle, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_patterns import outcome
pickle.dump(outcome(globals()), open(f"{{rank}}.pickle", "wb"))
"""
    (tmp_path / "train.py").write_text(BLOCKS[PLAIN] + BLOCKS[SEVERAL_PROCESSES] + report, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams) as launched:
        try:
            output, _ = launched.communicate(timeout=TIMEOUT)
        finally:
            launched.terminate()  # told to end, torchrun ends the processes that it started
    assert launched.returncode == 0, output
    found = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert_like_plain(found[0], outcome(run(PLAIN)), tolerance=1e-3)
