"""DistributedDataParallel with Gloo: several processes train like one on the joined batch, and hold the same bits.

That is asked of PyTorch's own exchange of sparse gradients and of ``sparseadam.distributed.gather_rows_hook``. What is
said here of PyTorch was found with torch 2.13.0 and is said to users in docs/training.md.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import join_group, leave_report, spawn, torchrun
from snapshot import snapshot
from test_training_patterns import BLOCKS, PLAIN, SEVERAL_PROCESSES, assert_like_plain, outcome, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseadam import SparseAdam
from sparseadam.distributed import replicate

WRAPPERS: dict[str, Callable[..., DistributedDataParallel]] = {
    "PyTorch's exchange": DistributedDataParallel,
    "gathered rows": replicate,
}
NUM_STEPS, NUM_EXAMPLES = 6, 24


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


def make_optimizers(model: Model, **options: Any) -> list[torch.optim.Optimizer]:
    return [SparseAdam(model.tables.values(), lr=0.1, **options), torch.optim.Adam(model.head.parameters(), lr=0.1)]


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
    join_group(rank, world_size, port)
    reports = {name: train(rank, world_size, wrap) for name, wrap in WRAPPERS.items()}
    for name, wrap in WRAPPERS.items():
        reports[name]["replayed"] = train(rank, world_size, wrap, missed_steps="replay")
    reports["gathered rows"]["shared gradients"] = average_shared_gradients()
    for name, wrap in WRAPPERS.items():
        reports[name]["refused"] = {what: refusal(attempt, wrap) for what, attempt in ATTEMPTS.items()}
    leave_report(reports, folder, rank)
    dist.destroy_process_group()


def train(rank: int, world_size: int, wrap: Callable[..., DistributedDataParallel], **options: Any) -> dict[str, Any]:
    model = Model(seed=rank)  # the first process's parameters are handed to all
    parallel = wrap(model)
    optimizers = make_optimizers(model, **options)
    optimizers[0].attach(model)
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
        for table in model.tables.values():  # as docs/replay.md says; nothing is behind where steps are skipped
            optimizers[0].catch_up(table, table.grad._indices()[0])
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


class AddedTables(nn.Module):
    """Two tables whose outputs are added, so that autograd gives both one tensor of values for their gradient."""

    def __init__(self) -> None:
        """Make the tables."""
        super().__init__()
        self.words, self.positions = (nn.Embedding(5, 2, sparse=True) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        """Sum the rows looked up, with a gradient of ones."""
        return (torch.ones(2) * (self.words(ids) + self.positions(ids))).sum()


def average_shared_gradients() -> list[list[float]]:
    """Return the gradients' values of two passes, the second without ids, that are the same in all processes."""
    parallel = replicate(AddedTables())
    with parallel.no_sync():
        parallel(torch.tensor([3])).backward()
    parallel(torch.tensor([], dtype=torch.int64)).backward()
    return [parameter.grad.coalesce().values().flatten().tolist() for parameter in parallel.parameters()]


def attempt_backward(wrap: Callable[..., nn.Module], model: nn.Module, **options: Any) -> None:
    parallel = wrap(model, **options)
    parallel(torch.tensor([1, 3])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


ATTEMPTS: dict[str, Callable[[Callable[..., nn.Module]], None]] = {
    "a functional embedding": lambda wrap: attempt_backward(wrap, OwnTable()),
    "a table that is not used": lambda wrap: attempt_backward(wrap, TwoTables(asks=False), find_unused_parameters=True),
    "a float16 table": lambda wrap: attempt_backward(wrap, nn.Embedding(5, 2, sparse=True, dtype=torch.float16)),
    "a bfloat16 table": lambda wrap: attempt_backward(wrap, nn.Embedding(5, 2, sparse=True, dtype=torch.bfloat16)),
    "a table that is asked for no rows": lambda wrap: attempt_backward(wrap, TwoTables(asks=True)),
}


def refusal(attempt: Callable[..., None], wrap: Callable[..., nn.Module]) -> str | None:
    """Return the message with which an attempt fails, or None."""
    try:
        attempt(wrap)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return None


# Tests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3, 4], ids="{} processes".format)
def all_reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several processes wrote down."""
    return spawn(train_as_one_of_many, request.param, tmp_path_factory.mktemp("reports"))


@pytest.fixture(params=WRAPPERS)
def reports(request: pytest.FixtureRequest, all_reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for one way to exchange sparse gradients."""
    return [report[request.param] for report in all_reports]


def joined_rows(step: int) -> dict[str, list[int]]:
    examples = joined_batch(step)
    return {
        "words": [each["word"] for each in examples],
        "authors": [each["author"] for each in examples],
        "tags": [tag for each in examples for tag in each["tags"]],
    }


def test_parts_are_uneven_and_cover_the_batch() -> None:
    for world_size in (2, 3, 4):
        sizes = []
        for step in range(NUM_STEPS):
            parts = [own_part(step, rank, world_size) for rank in range(world_size)]
            assert [each for part in parts for each in part] == joined_batch(step)
            sizes.append([len(part) for part in parts])
        assert [0 in each for each in sizes] == [False, False, True, False, False, False]
        assert [len(set(each)) > 1 for each in sizes] == [False, True, True, False, True, True]


@pytest.mark.parametrize("missed_steps", ["skip", "replay"])
def test_processes_train_like_one_on_the_joined_batch(reports: list[dict[str, Any]], missed_steps: str) -> None:
    model = Model(seed=0)
    optimizers = make_optimizers(model, missed_steps=missed_steps)
    optimizers[0].attach(model)
    if missed_steps == "replay":
        reports = [report["replayed"] for report in reports]
    assert all(report["bits"] == reports[0]["bits"] for report in reports)
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


def test_gathered_gradients_that_share_memory_are_averaged_once(all_reports: list[dict[str, Any]]) -> None:
    """After a pass without ids, whose sum with the gradient before it is that gradient's own memory.

    PyTorch divides it in place once for each table, while it may be on its way to others: no two runs need agree.
    """
    for report in all_reports:
        assert report["gathered rows"]["shared gradients"] == [[1.0, 1.0], [1.0, 1.0]]


REFUSALS = {
    "a functional embedding": "Cannot access storage of SparseTensorImpl",
    "a table that is not used": "Expected sparse gradient to be defined.",
    "a float16 table": "\"cadd_sparse\" not implemented for 'Half'",
    "a bfloat16 table": None,
    "a table that is asked for no rows": None,
}


def test_what_the_page_says_is_refused_is_refused_and_its_ways_out_are_not(all_reports: list[dict[str, Any]]) -> None:
    for report in all_reports:
        for name in WRAPPERS:
            refusals = REFUSALS | ({"a float16 table": None} if name == "gathered rows" else {})
            assert set(report[name]["refused"]) == set(refusals)
            for what, words in refusals.items():
                message = report[name]["refused"][what]
                assert message is None if words is None else words in (message or ""), (name, what, message)


def test_the_block_of_the_page_trains_like_its_plain_loop(tmp_path: Path) -> None:
    report = f"""
import pickle, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_patterns import outcome
pickle.dump(outcome(globals()), open(f"{{rank}}.pickle", "wb"))
"""
    (tmp_path / "train.py").write_text(BLOCKS[PLAIN] + BLOCKS[SEVERAL_PROCESSES] + report, encoding="utf-8")
    torchrun(["--nproc-per-node", "2", "train.py"], tmp_path)
    found = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert_like_plain(found[0], outcome(run(PLAIN)), tolerance=1e-3)
