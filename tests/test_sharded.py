"""Sharded tables with Gloo: two, three and four processes train like one that has the whole tables and the whole batch.

Where sums of gradients are exact in any order, they are the same bits; where not, within rounding.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import join_group, leave_report, spawn
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from sparseadam import SparseAdam
from sparseadam.distributed import ShardedEmbedding, ShardedEmbeddingBag, load_checkpoint, replicate, save_checkpoint

WORLD_SIZES = (2, 3, 4)
NUM_STEPS, NUM_EXAMPLES = 8, 24
# Where the tanh of a sum is taken: float32 ends 8 steps of lr 0.1 within 2e-5 here, all from sums in another order,
# which Adam passes on undamped where a row's gradient nearly cancels.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-11}


# Models -------------------------------------------------------------------------------------------


class MaxBag(nn.Embedding):
    """What nn.EmbeddingBag(mode="max") is, which has no sparse gradients."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the largest of each bag."""
        rows = super().forward(ids)
        return rows.max(1).values if len(ids) > 0 else rows.sum(1)


class Model(nn.Module):
    """A table of each kind; ``words`` crosses blocks of drawing, and four ranks do not all have a row of ``places``."""

    def __init__(self, is_sharded: bool, dtype: torch.dtype, **options: Any) -> None:
        """Make the tables; those of a whole model are filled later."""
        super().__init__()
        embedding, bag, max_bag = (
            partial(nn.Embedding, sparse=True),
            partial(nn.EmbeddingBag, sparse=True),
            partial(MaxBag, sparse=True),
        )
        if is_sharded:
            embedding, bag = partial(ShardedEmbedding, **options), partial(ShardedEmbeddingBag, **options)
            max_bag = partial(bag, mode="max")
        self.words = embedding(2500, 3, padding_idx=7, dtype=dtype)
        self.tags = bag(23, 3, mode="sum", padding_idx=-21, dtype=dtype)
        self.places = bag(5, 3, mode="mean", include_last_offset=True, dtype=dtype)
        self.topics = max_bag(11, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(2))  # dense, and the same in all processes
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def tables(self) -> dict[str, nn.Module]:
        """All but what is dense."""
        return {name: getattr(self, name) for name in ("words", "tags", "places", "topics")}

    def forward(self, examples: Sequence[dict[str, Any]], loss: str) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of some examples, of which there may be none, and the weights of their tags."""
        dtype = self.words.weight.dtype
        words = torch.tensor([each["words"] for each in examples], dtype=torch.int64).reshape(-1, 2)
        topics = torch.tensor([each["topics"] for each in examples], dtype=torch.int32).reshape(-1, 3)
        tags, tag_ends = flat(examples, "tags")
        places, place_ends = flat(examples, "places")
        tag_weights = torch.tensor([w for each in examples for w in each["tag weights"]], dtype=dtype)
        tag_weights.requires_grad_()
        outputs = [
            self.words(words).sum(1),
            self.tags(tags, tag_ends[:-1], tag_weights),
            self.places(places, place_ends),
            self.topics(topics),
        ]
        targets = torch.tensor([each["target"] for each in examples], dtype=dtype)
        joined = torch.stack(outputs)
        joined = joined.tanh() * joined.sum(0).tanh() if loss == "tanh" else joined
        return (joined.sum((0, 2)) * targets).sum(), tag_weights


def flat(examples: Sequence[dict[str, Any]], key: str) -> tuple[Tensor, Tensor]:
    """Return all ids of bags one after the other, and where bags begin, the end included."""
    sizes = torch.tensor([0, *(len(each[key]) for each in examples)])
    return torch.tensor([i for each in examples for i in each[key]], dtype=torch.int64), sizes.cumsum(0)


def joined_batch(step: int) -> list[dict[str, Any]]:
    """Return the examples of all processes; whole numbers, and means of 1, 2 or 4, so that linear losses are exact."""
    generator = torch.Generator().manual_seed(step)

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    examples = []
    for _ in range(NUM_EXAMPLES):
        num_tags = 0 if step == 5 else draw(4, 1)[0]
        examples.append(
            {
                "words": draw(10, 1) + draw(2500, 1),  # of few, padding among them, and of many
                "tags": draw(23, num_tags),
                "tag weights": draw(3, num_tags),
                "places": draw(5, 2 ** draw(3, 1)[0]),
                "topics": draw(11, 3),
                "target": draw(7, 1)[0] - 3,
            }
        )
    return examples


def own_part(step: int, rank: int, world_size: int) -> list[dict[str, Any]]:
    """Return a process's part of the joined batch: even, uneven, none for the last, none for the first, all for it."""
    cuts = [NUM_EXAMPLES * i // world_size for i in range(1, world_size)]
    if step % 5 == 1:
        cuts = [cut - 3 for cut in cuts]
    elif step % 5 == 2:
        cuts[-1] = NUM_EXAMPLES
    elif step % 5 == 3:
        cuts[0] = 0
    elif step % 5 == 4:
        cuts = [NUM_EXAMPLES] * (world_size - 1)
    ends = [0, *cuts, NUM_EXAMPLES]
    return joined_batch(step)[ends[rank] : ends[rank + 1]]


class Run(NamedTuple):
    """What is trained, and how."""

    dtype: torch.dtype = torch.float32
    loss: str = "linear"
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


ALL_OPTIONS = {
    "weight_decay": 0.05,
    "weight_decay_mode": "exact",
    "amsgrad": True,
    "bias_correction": "row",
    "second_moment": "row",
}
FOR_DENSE = {"bias_correction": "table", "second_moment": "element", "missed_steps": "skip"}
RUNS = {
    "linear": Run(),
    "linear, options": Run(options=ALL_OPTIONS),
    "linear, replay": Run(options={"missed_steps": "replay", "weight_decay": 0.05}),
    "linear, bfloat16": Run(dtype=torch.bfloat16),
    "linear, float16": Run(dtype=torch.float16),
    "tanh": Run(loss="tanh"),
    "tanh, replay": Run(loss="tanh", options={"missed_steps": "replay"}),
    "tanh, float64": Run(loss="tanh", dtype=torch.float64),
}


def build(run: Run, is_sharded: bool, **options: Any) -> tuple[Model, SparseAdam]:
    model = Model(is_sharded, run.dtype, **options)
    groups = [
        {"params": [table.weight for table in model.tables.values()]},
        {"params": [model.scale], "dense_gradients": "adam", **FOR_DENSE},
    ]
    optimizer = SparseAdam(groups, lr=0.1, **run.options)
    optimizer.attach(model)
    return model, optimizer


def take_step(model: Model, optimizer: SparseAdam, examples: Sequence[dict[str, Any]], loss: str) -> Tensor:
    """Take a step and return the gradient of the tags' weights."""
    model.zero_grad()
    total, tag_weights = model(examples, loss)
    total.backward()
    model.scale.grad = torch.full((2,), 0.5)
    optimizer.step()
    model.seen += NUM_EXAMPLES
    return tag_weights.grad


def by_row(table: nn.Module, optimizer: SparseAdam) -> dict[str, Any]:
    """Return a table and its state with slots in the order of rows; of a sharded one what is here."""
    state = dict(optimizer.state[table.weight])
    order = state["rows"].argsort()
    parts = {key: value[order].clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    parts["rows"] += getattr(table, "row_start", 0)
    return {"weight": table.weight.detach().clone(), **parts}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join what ranks have of a table; what is no tensor they must all have alike."""
    whole = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        assert isinstance(value, Tensor) or values == [value] * len(values), key
        whole[key] = torch.cat(values) if isinstance(value, Tensor) else value
    return whole


def everything(model: Model, optimizer: SparseAdam) -> dict[str, Any]:
    """Return all tables and states by row."""
    return {name: by_row(table, optimizer) for name, table in model.tables.items()}


def everything_joined(model: Model, optimizer: SparseAdam) -> dict[str, Any]:
    """Return the same of all ranks together."""
    own = everything(model, optimizer)
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, own)
    return {name: joined([each[name] for each in all_ranks]) for name in own}


# What each process does ---------------------------------------------------------------------------


def work(rank: int, world_size: int, port: int, folder: Path, checkpoints: Path) -> None:
    """Do everything and write down what came of it; runs in a process of its own."""
    join_group(rank, world_size, port)
    report = {
        "runs": {name: train(run, rank, world_size) for name, run in RUNS.items()},
        "checkpoint": train_from_checkpoint(rank, world_size, checkpoints),
        "traffic": count_traffic(rank, world_size),
        "mean": train_with_data_parallel(rank, world_size),
        "read hooks": read_with_hooks(rank),
        "errors": collect_errors(rank),
        "two names": save_under_two_names(folder),
        "copy": read_a_copy(rank),
        "skipped": count_skipped(folder / "skipped"),
        "replicas": save_replicas(rank, world_size, folder / "replicas"),
    }
    leave_report(report, folder, rank)
    dist.destroy_process_group()


def train(run: Run, rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(0 if rank == 0 else 1)  # the first rank's counts
    model, optimizer = build(run, is_sharded=True)
    parts = [each.weight.detach().clone() for each in model.tables.values()]
    all_parts: list[Any] = [None] * world_size
    dist.all_gather_object(all_parts, parts)
    begin = {name: torch.cat(each) for name, each in zip(model.tables, zip(*all_parts, strict=True), strict=True)}
    steps, weight_grads = [], []
    for step in range(NUM_STEPS):
        weight_grads.append(take_step(model, optimizer, own_part(step, rank, world_size), run.loss))
        steps.append(everything_joined(model, optimizer))
    return {"begin": begin, "steps": steps, "gradients of weights": weight_grads}


def train_from_checkpoint(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Go on for two steps from the last checkpoint there is, and leave another."""
    model, optimizer = build(RUNS["linear, options"], is_sharded=True)
    begin = load_checkpoint(folder, model, optimizer)
    loaded = everything_joined(model, optimizer)
    for step in range(begin, begin + 2):
        take_step(model, optimizer, own_part(step, rank, world_size), "linear")
    path = save_checkpoint(folder, begin + 2, model, optimizer)
    return {"begin": begin, "loaded": loaded, "path": path, "seen": int(model.seen)}


def count_traffic(rank: int, world_size: int) -> dict[str, Any]:
    """Look up known ids, and say what was sent."""
    table = ShardedEmbedding(8, 5, padding_idx=0, dtype=torch.float64)
    ids = [torch.tensor([0, 7, 7, 3, 3, 3]), torch.tensor([[7], [0]]), torch.tensor([], dtype=torch.int64)]
    own = ids[rank] if rank < 3 else torch.arange(8)
    table(own).sum().backward()
    grad = table.weight.grad
    return {
        "traffic": vars(table.traffic) | {"total": table.traffic.total},
        "rows": (grad._indices()[0] + table.row_start).tolist(),
        "range": (table.row_start, table.row_end),
        "ids": own.flatten().tolist(),
        "values": grad._values().tolist(),
    }


def train_with_data_parallel(rank: int, world_size: int) -> dict[str, Any]:
    """Train a model with a sharded table beside what DistributedDataParallel averages."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "sharded": ShardedEmbedding(40, 4, gradient_reduction="mean"),
            "replicated": nn.Embedding(40, 4, sparse=True),
            "head": nn.Linear(4, 1),
        }
    )
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    whole = [None] * world_size
    dist.all_gather_object(whole, begin["sharded.weight"])
    begin["sharded.weight"] = torch.cat(whole)
    parallel = replicate(Scored(model))
    optimizer = SparseAdam(model.parameters(), lr=0.1, dense_gradients="adam")
    for step in range(4):
        parallel.zero_grad()
        ids = score_batch(step).tensor_split([3] if world_size == 2 else [3, 3, 9][: world_size - 1])[rank]
        (parallel(ids) * world_size).backward()
        optimizer.step()
    dist.all_gather_object(whole, model["sharded"].weight.detach())
    return {"begin": begin, "end": {**model.state_dict(), "sharded.weight": torch.cat(whole)}}


class Scored(nn.Module):
    """Sums a score of ids."""

    def __init__(self, tables: nn.ModuleDict) -> None:
        """Take the tables and the head."""
        super().__init__()
        self.tables = tables

    def forward(self, ids: Tensor) -> Tensor:
        """Return the sum, zero for none."""
        looked_up = self.tables["sharded"](ids) + self.tables["replicated"](ids)
        return self.tables["head"](looked_up.tanh()).square().sum()


def score_batch(step: int) -> Tensor:
    return torch.randint(40, (12,), generator=torch.Generator().manual_seed(step))


def read_with_hooks(rank: int) -> dict[str, Any]:
    """Have a hook write to rows before they are read."""
    table = ShardedEmbedding(9, 2)
    before = table.weight.detach().clone()
    seen = []

    def catch_up(weight: nn.Parameter, rows: Tensor) -> None:
        assert weight is table.weight
        seen.append(rows)
        with torch.no_grad():
            weight[rows] = 5.0

    handle = table.register_read_hook(catch_up)
    found = table(torch.tensor([1, 8, 1]) if rank == 0 else torch.tensor([4]))
    handle.remove()
    table(torch.tensor([0]))
    changed = (table.weight.detach() != before).all(1).nonzero()[:, 0] + table.row_start
    return {"found": found.detach(), "changed": changed.tolist(), "seen": seen, "num_local": len(before)}


def collect_errors(rank: int) -> dict[str, list[str] | str]:
    """Return what is said about each mistake; all ranks learn of each at once, and go on."""
    table = ShardedEmbedding(10, 2)
    bags = ShardedEmbeddingBag(10, 2)
    wrong = {"an id too large": torch.tensor([3, 10]), "a negative id": torch.tensor([-1])}
    wrong |= {
        "ids of floats": torch.tensor([1.0]),
        "a list": [1],
        "ids elsewhere": torch.empty(1, device="meta").long(),
    }
    errors = {what: said(lambda i=ids: table(i if rank == 1 else torch.tensor([1]))) for what, ids in wrong.items()}
    errors["then"] = said(lambda: table(torch.tensor([9])).sum().backward())
    errors["another table"] = said(lambda: (table if rank == 0 else bags)(torch.tensor([[1]])))
    errors["another size"] = said(lambda: ShardedEmbedding(10 + rank, 2))
    errors["another dtype"] = said(lambda: ShardedEmbedding(10, 2, dtype=torch.float64 if rank else torch.float32))
    table = ShardedEmbedding(10, 2)
    lost = table(torch.tensor([1])).sum()
    errors["no backward"] = said(lambda: table(torch.tensor([1])) if rank == 1 else lost.backward())
    table = ShardedEmbedding(10, 2)
    table(torch.tensor([1]))
    optimizer = torch.optim.SGD([table.weight], lr=0.1, momentum=0.9)
    folder = Path("never-made")
    errors["other steps"] = said(lambda: save_checkpoint(folder, rank, table, optimizer))
    optimizer.state[table.weight]["momentum_buffer"] = torch.zeros_like(table.weight)
    errors["no rows"] = said(lambda: save_checkpoint(folder, 1, table, optimizer))
    if rank == 0:
        optimizer.state.clear()
    errors["state of some"] = said(lambda: save_checkpoint(folder, 1, table, optimizer))
    errors["a bad step of one"] = said(lambda: save_checkpoint(folder, -1 if rank == 1 else 1, table, optimizer))
    own = SparseAdam([table.weight], nonfinite="error")
    for value in (1.0, math.nan if rank == 0 else 1.0):
        own.zero_grad()
        (table(torch.tensor([0, 9])) * torch.tensor([[value], [1.0]])).sum().backward()
        refused = said(own.step)
    assert ("not finite" in refused) == (rank == 0)
    errors["other counts"] = said(lambda: save_checkpoint(folder, 1, table, own))
    own = SparseAdam([nn.Parameter(table.weight.detach())])
    alias = nn.Module()
    alias.table, alias.weight = table, own.param_groups[0]["params"][0]
    errors["a shard outside"] = said(lambda: save_checkpoint(folder, 1, alias, own))
    copied = deepcopy(table)
    errors["a copy"] = said(lambda: (table if rank == 0 else copied)(torch.tensor([1])))
    errors["a long name"] = said(lambda: load_checkpoint(Path("n" * 5000), table, own))
    return errors


def save_under_two_names(folder: Path) -> dict[str, Any]:
    """Save a table that a model has under two names, and load it into another such model."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        table = ShardedEmbedding(10, 2)
        models.append(nn.ModuleDict({"a": table, "b": table}))
    saved, loaded = models
    save_checkpoint(folder / "two names", 1, saved, SparseAdam(saved.parameters()))
    load_checkpoint(folder / "two names", loaded, SparseAdam(loaded.parameters()))
    return {"saved": saved["a"].weight.detach(), "loaded": loaded["a"].weight.detach()}


def read_a_copy(rank: int) -> dict[str, Any]:
    """Copy a table that is attached to an optimizer, and read both."""
    table = ShardedEmbedding(9, 2)
    optimizer = SparseAdam([table.weight], lr=0.1, missed_steps="replay")
    optimizer.attach(table)
    table(torch.arange(9)).sum().backward()
    optimizer.step()
    copied = deepcopy(table)
    behind = copied.weight.detach().clone()
    copied(torch.arange(9))
    table(torch.tensor([rank]))
    for _ in range(5):
        table = deepcopy(table)
    table(torch.tensor([rank]))
    return {"is_left_alone": torch.equal(copied.weight.detach(), behind), "num_hooks": len(copied._read_hooks)}


def count_skipped(folder: Path) -> int:
    """Skip a row on each rank, twice, with a checkpoint after each; return how many are counted here in the end."""
    for step in (1, 2, None):
        table = ShardedEmbedding(10, 2)
        optimizer = SparseAdam(table.parameters(), nonfinite="skip")
        load_checkpoint(folder, table, optimizer)
        if step is not None:
            values = torch.tensor([[math.nan, 1.0]])
            table.weight.grad = torch.sparse_coo_tensor([[0]], values, table.weight.shape, check_invariants=True)
            optimizer.step()
            save_checkpoint(folder, step, table, optimizer)
    return optimizer.state[table.weight].get("num_skipped", 0)


def save_replicas(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Train replicas of a table whose rows get slots when they are read, and save and load them."""

    def built() -> tuple[nn.Embedding, SparseAdam]:
        torch.manual_seed(3)
        table = nn.Embedding(40, 3, sparse=True)
        return table, SparseAdam(table.parameters(), lr=0.1, missed_steps="replay", weight_decay=0.1)

    table, optimizer = built()
    optimizer.attach(table)
    replicas = replicate(table)
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        ids = torch.randint(40, (world_size, 4), generator=generator)
        optimizer.zero_grad()
        replicas(ids[rank]).square().sum().backward()
        optimizer.catch_up(table.weight, table.weight.grad._indices()[0])
        optimizer.step()
    if rank == world_size - 1:  # which evaluates, alone
        table(torch.arange(20))
    save_checkpoint(folder, 6, table, optimizer)
    loaded, loaded_optimizer = built()
    load_checkpoint(folder, loaded, loaded_optimizer)
    return {"saved": by_row(table, optimizer), "loaded": by_row(loaded, loaded_optimizer)}


def said(attempt: Callable[[], Any]) -> str:
    """Return the error of an attempt, with its type."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# Tests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint after two steps of one process, from a file of torch.save."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, optimizer = train_alone(RUNS["linear, options"], range(2))
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, folder / "single.pt")
    torch_save_to_dcp(folder / "single.pt", folder / "step-000000000002")
    return folder


@pytest.fixture(scope="module")
def all_reports(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the processes of each size of group wrote down; each size goes on from the checkpoint of the one before."""
    return {size: spawn(work, size, tmp_path_factory.mktemp("reports"), checkpoints) for size in WORLD_SIZES}


@pytest.fixture(params=WORLD_SIZES, ids="{} processes".format)
def reports(request: pytest.FixtureRequest, all_reports: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same for one size."""
    return all_reports[request.param]


@pytest.fixture
def in_a_group(tmp_path: Path) -> Iterator[None]:
    """As the only rank of it."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start_alone(run: Run) -> tuple[Model, SparseAdam]:
    """Build a whole model with tables of its own."""
    model, optimizer = build(run, is_sharded=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for table in model.tables.values():
            table.weight.normal_(generator=generator)
    return model, optimizer


def train_alone(run: Run, steps: range) -> tuple[Model, SparseAdam]:
    model, optimizer = start_alone(run)
    for step in steps:
        take_step(model, optimizer, joined_batch(step), run.loss)
    return model, optimizer


def assert_same(found: dict[str, Any], want: dict[str, Any], tolerance: float, what: str) -> None:
    """Compare tables and states by row, each row by its largest value; a tolerance of zero asks for the same bits."""
    assert set(found) == set(want)
    for key, value in want.items():
        if not isinstance(value, Tensor) or value.dtype in (torch.int64, torch.int32):
            assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, (what, key)
            continue
        assert found[key].dtype is value.dtype and found[key].shape == value.shape, (what, key)
        if tolerance == 0.0:
            assert torch.equal(found[key], value), (what, key)
        elif value.numel() > 0:
            largest = value.abs().reshape(len(value), -1).amax(1, keepdim=True)
            worst = ((found[key] - value).abs().reshape(len(value), -1) / largest.clamp(min=1e-6)).max()
            assert worst <= tolerance, (what, key, float(worst))


def test_parts_cover_the_batch_and_some_are_empty() -> None:
    for size in WORLD_SIZES:
        parts = [[own_part(step, rank, size) for rank in range(size)] for step in range(NUM_STEPS)]
        assert [list(chain(*each)) for each in parts] == [joined_batch(step) for step in range(NUM_STEPS)]
        assert {rank for each in parts for rank, part in enumerate(each) if not part} == set(range(size))


@pytest.mark.parametrize("name", RUNS)
def test_processes_train_like_one_at_every_step(name: str, reports: list[dict[str, Any]]) -> None:
    run = RUNS[name]
    found = reports[0]["runs"][name]
    model, optimizer = build(run, is_sharded=False)
    with torch.no_grad():
        for table, begin in found["begin"].items():
            model.tables[table].weight.copy_(begin)
    for step in range(NUM_STEPS):
        weight_grad = take_step(model, optimizer, joined_batch(step), run.loss)
        tolerance = TOLERANCES[run.dtype] if run.loss == "tanh" else 0.0
        for table, want in everything(model, optimizer).items():
            assert_same(found["steps"][step][table], want, tolerance, f"step {step}, {table}")
        parts = [each["runs"][name]["gradients of weights"][step] for each in reports]
        torch.testing.assert_close(torch.cat(parts), weight_grad, rtol=1e-3, atol=1e-3)


def test_tables_begin_the_same_for_any_number_of_processes(all_reports: dict[int, list[dict[str, Any]]]) -> None:
    begins = [reports[0]["runs"]["linear"]["begin"] for reports in all_reports.values()]
    for name, begin in begins[0].items():
        assert all(torch.equal(other[name], begin) for other in begins[1:])
    words = begins[0]["words"]
    assert torch.equal(words[7], torch.zeros(3))
    drawn = words[torch.arange(2500) != 7]
    assert len(drawn.unique(dim=0)) == len(drawn)  # no block is drawn twice
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05


def test_rows_are_cut_as_dtensor_cuts_them(reports: list[dict[str, Any]]) -> None:
    chunks = torch.arange(8).chunk(len(reports))
    ranges = [tuple(each["traffic"]["range"]) for each in reports]
    assert ranges == [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]


def test_each_distinct_row_travels_once_and_its_gradient_too(reports: list[dict[str, Any]]) -> None:
    size, width = len(reports), 5 * 8
    reports = [report["traffic"] for report in reports]
    wanted = [set(report["ids"]) for report in reports]
    for rank, report in enumerate(reports):
        here = set(range(*report["range"]))
        elsewhere = [wanted[other] & here for other in range(size) if other != rank]
        traffic = {
            "headers": 2 * 32 * (size - 1),
            "ids": 4 * len(wanted[rank] - here),
            "rows": width * sum(map(len, elsewhere)),
            "gradients": width * len(wanted[rank] - here - {0}),
        }
        assert report["traffic"] == traffic | {"total": sum(traffic.values())}
        asked = [sorted(each & here - {0}) for each in wanted]
        assert report["rows"] == list(chain(*asked))  # rank after rank, each of its rows once
        counts = [float(reports[r]["ids"].count(row)) for r, rows in enumerate(asked) for row in rows]
        assert report["values"] == [[count] * 5 for count in counts]


def test_beside_data_parallel_the_mean_is_the_joined_batch(reports: list[dict[str, Any]]) -> None:
    begin = reports[0]["mean"]["begin"]
    tables = {name: nn.Embedding(40, 4, sparse=True) for name in ("sharded", "replicated")}
    model = nn.ModuleDict({**tables, "head": nn.Linear(4, 1)})
    model.load_state_dict(begin)
    optimizer = SparseAdam(model.parameters(), lr=0.1, dense_gradients="adam")
    for step in range(4):
        model.zero_grad()
        Scored(model)(score_batch(step)).backward()
        optimizer.step()
    for report in reports:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(report["mean"]["end"][name], value, rtol=1e-4, atol=1e-5)


def test_read_hooks_are_called_by_the_owner_before_it_reads(reports: list[dict[str, Any]]) -> None:
    reports = [report["read hooks"] for report in reports]
    assert sorted(row for report in reports for row in report["changed"]) == [1, 4, 8]
    for rank, report in enumerate(reports):
        assert torch.equal(report["found"], torch.full((3 if rank == 0 else 1, 2), 5.0))
        (rows,) = report["seen"]  # once, and no more when it was removed
        assert rows.dtype is torch.int64 and all(0 <= row < report["num_local"] for row in rows.tolist())


SAID = {
    "an id too large": (
        "RuntimeError: rank {} cannot look up rows, because rank 1 refused",
        "IndexError: id 10 is out",
    ),
    "a negative id": ("RuntimeError: rank {} cannot look up rows, because rank 1 refused", "IndexError: id -1 is out"),
    "ids of floats": ("RuntimeError: rank {} cannot", "TypeError: ids must be a torch.int64 or torch.int32 tensor"),
    "a list": ("RuntimeError: rank {} cannot", "TypeError: ids must be a torch.int64 or torch.int32 tensor, got list"),
    "ids elsewhere": ("RuntimeError: rank {} cannot", "RuntimeError: ids are on meta, and the table is on cpu"),
    "then": ("nothing", "nothing"),
    "another table": ("RuntimeError: the ranks are out of step, as rank {} sees it: rank 0 is in the forward pass",)
    * 2,
    "another size": ("ValueError: the ranks build a sharded table with different num_embeddings: 10 on rank 0, 11",)
    * 2,
    "another dtype": ("ValueError: the ranks build a sharded table with different dtype: 0 on rank 0, 1 on rank 1",)
    * 2,
    "no backward": ("RuntimeError: the ranks are out of step, as rank {} sees it: rank 0 is in the backward pass",) * 2,
    "other steps": ("RuntimeError: no checkpoint was written: the ranks are at steps 0, 1",) * 2,
    "no rows": ("RuntimeError: no checkpoint was written: on rank 0, the optimizer's state of parameter 0, a sharded",)
    * 2,
    "a bad step of one": (
        "RuntimeError: no checkpoint was written: on rank 1, Invalid step: -1",
        "ValueError: Invalid step: -1",
    ),
    "other counts": ("RuntimeError: no checkpoint was written: step of parameter 0 is 1 on rank 0, 2 on rank 1",) * 2,
    "a shard outside": (
        "RuntimeError: no checkpoint was written: on rank 0, 'weight' of the model's state dict is a s",
    )
    * 2,
    "a copy": ("RuntimeError: the ranks are out of step, as rank {} sees it: rank 0 is in the forward pass of lookup",)
    * 2,
    "a long name": ("RuntimeError: the checkpoint in nnn",) * 2,
    "state of some": ("RuntimeError: no checkpoint was written: on rank 1, ",) * 2,
}


def test_mistakes_of_one_process_are_errors_in_all(reports: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(reports):
        assert set(report["errors"]) == set(SAID)
        for what, words in SAID.items():
            assert report["errors"][what].startswith(words[rank == 1].format(rank)), report["errors"][what]
    assert not Path("never-made").exists()
    assert "state for different parameters: [] on rank 0; [0] on rank 1" in reports[0]["errors"]["state of some"]


def test_a_copy_is_a_table_of_its_own_and_not_attached(reports: list[dict[str, Any]]) -> None:
    assert all(report["copy"]["is_left_alone"] for report in reports)
    for report in reports:
        assert ("copy 1 of sharded table" in report["errors"]["a copy"]) and "cannot look" not in report["errors"][
            "a copy"
        ]


# Checkpoints --------------------------------------------------------------------------------------


def test_a_table_of_two_names_is_saved_and_loaded(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert torch.equal(report["two names"]["loaded"], report["two names"]["saved"])


def test_checkpoints_go_from_one_process_to_two_to_three_to_four_and_back(
    all_reports: dict[int, list[dict[str, Any]]], checkpoints: Path
) -> None:
    run = RUNS["linear, options"]
    undisturbed, undisturbed_optimizer = start_alone(run)
    for step in range(NUM_STEPS):
        for reports in all_reports.values():
            if reports[0]["checkpoint"]["begin"] == step:
                for table, want in everything(undisturbed, undisturbed_optimizer).items():
                    assert_same(reports[0]["checkpoint"]["loaded"][table], want, 0.0, f"loaded at {step}, {table}")
        take_step(undisturbed, undisturbed_optimizer, joined_batch(step), "linear")
    assert [reports[0]["checkpoint"]["begin"] for reports in all_reports.values()] == [2, 4, 6]

    model, optimizer = build(run, is_sharded=False)
    assert load_checkpoint(checkpoints, model, optimizer) == 8
    torch_file = checkpoints / "four.pt"
    dcp_to_torch_save(all_reports[4][0]["checkpoint"]["path"], torch_file)
    saved = torch.load(torch_file, weights_only=True)
    other, other_optimizer = build(run, is_sharded=False)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optim"])
    for found, found_optimizer in ((model, optimizer), (other, other_optimizer)):
        for table, want in everything(undisturbed, undisturbed_optimizer).items():
            assert_same(by_row(found.tables[table], found_optimizer), want, 0.0, table)
        assert int(found.seen) == NUM_STEPS * NUM_EXAMPLES
        assert torch.equal(found.scale, undisturbed.scale)
        state, want_state = (
            o.state[m.scale] for o, m in ((found_optimizer, found), (undisturbed_optimizer, undisturbed))
        )
        assert all(torch.equal(state[key], want_state[key]) for key in want_state)


def test_a_file_holds_touched_rows_only_and_each_once(all_reports: dict[int, list[dict[str, Any]]]) -> None:
    """Sharded tensors of the checkpoint: as many parts as ranks have rows."""
    path = all_reports[4][0]["checkpoint"]["path"]
    with open(path / ".metadata", "rb") as file:
        saved = pickle.load(file).state_dict_metadata
    num_touched = len(everything(*train_alone(RUNS["linear, options"], range(NUM_STEPS)))["words"]["rows"])
    assert saved["model.words.weight"].size == torch.Size([2500, 3])
    assert len(saved["model.words.weight"].chunks) == 4
    assert saved["optim.state.0.exp_avg"].size == torch.Size([num_touched, 3])
    assert [tuple(chunk.sizes) for chunk in saved["model.places.weight"].chunks] == [(2, 3), (2, 3), (1, 3)]


def test_skipped_rows_of_all_ranks_are_counted_once_in_a_checkpoint(reports: list[dict[str, Any]]) -> None:
    """The rank of the first row goes on counting for all."""
    assert [report["skipped"] for report in reports] == [2 * len(reports), *[0] * (len(reports) - 1)]


def test_a_checkpoint_of_replicas_is_that_of_one_of_them(reports: list[dict[str, Any]]) -> None:
    """Each rank has its rows in an order of its own: moments of one came beside the rows of another."""
    want = reports[0]["replicas"]["saved"]
    for report in reports:
        assert_same(report["replicas"]["loaded"], want, 0.0, "loaded")


def test_one_process_saves_and_loads(tmp_path: Path) -> None:
    run = RUNS["linear, options"]
    model, optimizer = train_alone(run, range(3))
    other, other_optimizer = build(run, is_sharded=False)
    assert load_checkpoint(tmp_path, other, other_optimizer) is None
    assert save_checkpoint(tmp_path, 3, model, optimizer) == tmp_path / "step-000000000003"
    assert load_checkpoint(tmp_path, other, other_optimizer) == 3
    for table, want in everything(model, optimizer).items():
        assert_same(by_row(other.tables[table], other_optimizer), want, 0.0, table)


def test_a_save_removes_what_a_save_left_and_nothing_else(tmp_path: Path) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    for name in ("partial-step-000000000001", "partial-results", "partial-step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "partial-notes").touch()
    save_checkpoint(tmp_path, 2, model, SparseAdam(model.parameters()))
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"partial-results", "partial-step-1", "partial-notes", "step-000000000002"}


@pytest.mark.parametrize("betas", [[0.8, 0.9], (0.8, 0.9), [torch.tensor(0.8), torch.tensor(0.9)]])
def test_options_come_back_as_lists_where_they_were_lists(tmp_path: Path, betas: Any) -> None:
    """Lists of tensors came back as dicts, which are no betas."""
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = SparseAdam(model.parameters())
    optimizer.param_groups[0]["betas"] = betas
    optimizer.param_groups[0]["own"] = {"names": ["a", torch.ones(2), ["b", torch.zeros(1)]], "kind": "words"}
    save_checkpoint(tmp_path, 1, model, optimizer)
    loaded = SparseAdam(model.parameters())
    load_checkpoint(tmp_path, model, loaded)
    assert {key: str(value) for key, value in loaded.param_groups[0].items()} == {
        key: str(value) for key, value in optimizer.param_groups[0].items()
    }


@pytest.mark.parametrize("other", [torch.optim.SparseAdam, partial(SparseAdam, dense_gradients="adam")])
def test_a_state_of_another_form_does_not_load_into_a_sharded_table(
    tmp_path: Path, other: Any, in_a_group: None
) -> None:
    model = nn.Embedding(9, 2, sparse=other is torch.optim.SparseAdam)
    optimizer = other(model.parameters())
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, model, optimizer)
    table = ShardedEmbedding(9, 2)
    with pytest.raises(ValueError, match="state of parameter 0, a sharded table: rows missing, found step, exp_avg"):
        load_checkpoint(tmp_path, table, SparseAdam(table.parameters()))


def test_checkpoints_that_cannot_be_are_refused(tmp_path: Path) -> None:
    model, optimizer = nn.Embedding(5, 2, sparse=True), None
    optimizer = SparseAdam(model.parameters())
    save_checkpoint(tmp_path, 3, model, optimizer)
    with pytest.raises(RuntimeError, match=r"checkpoint in .*step-000000000003 was not completed: it is there already"):
        save_checkpoint(tmp_path, 3, model, optimizer)
    with pytest.raises(ValueError, match=r"Invalid step: -1. step must lie in \[0, 10\*\*12\)"):
        save_checkpoint(tmp_path, -1, model, optimizer)
    with pytest.raises(TypeError, match=r"step must be an int, got 1.0"):
        save_checkpoint(tmp_path, 1.0, model, optimizer)
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"was not completed: cannot write to .*: Not a directory. Earlier"):
        save_checkpoint(tmp_path / "file" / "folder", 1, model, optimizer)
    for other in (nn.Embedding(6, 2), nn.Embedding(5, 2, dtype=torch.float64)):
        before = other.weight.detach().clone()
        with pytest.raises(
            ValueError, match=r"does not fit this model: model.weight is torch.float32 \[5, 2\], torch.flo"
        ):
            load_checkpoint(tmp_path, other, SparseAdam(other.parameters()))
        assert torch.equal(other.weight, before)
    with pytest.raises(
        ValueError, match=r"model.bias missing; model.weight is .*expected. Build the model that was saved"
    ):
        load_checkpoint(tmp_path, nn.Linear(2, 5, dtype=torch.float64), optimizer)
    (next(tmp_path.glob("step-*/*.distcp"))).write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"the checkpoint in .*step-000000000003 cannot be read: .* on rank 0"):
        load_checkpoint(tmp_path, model, optimizer)


# Arguments ----------------------------------------------------------------------------------------

WRONG = {
    "max_norm": (
        lambda: ShardedEmbedding(5, 2, max_norm=1.0),
        ValueError,
        "max_norm=1.0 is not supported by a sharded",
    ),
    "max_norm of bags": (lambda: ShardedEmbeddingBag(5, 2, max_norm=1.0), ValueError, "max_norm=1.0 is not supported"),
    "frequencies": (
        lambda: ShardedEmbedding(5, 2, scale_grad_by_freq=True),
        ValueError,
        "scale_grad_by_freq=True is no",
    ),
    "dense": (lambda: ShardedEmbedding(5, 2, sparse=False), ValueError, "sparse=False is not .* Pass True"),
    "no rows": (lambda: ShardedEmbedding(0, 2), ValueError, "Invalid num_embeddings: 0. It must be at least 1"),
    "no columns": (lambda: ShardedEmbedding(5, 0), ValueError, "Invalid embedding_dim: 0"),
    "half a row": (lambda: ShardedEmbedding(2.5, 2), TypeError, "num_embeddings must be an int, got 2.5"),
    "padding": (lambda: ShardedEmbedding(5, 2, -6), ValueError, r"Invalid padding_idx: -6. .* in \[-5, 5\)"),
    "padding of floats": (
        lambda: ShardedEmbedding(5, 2, 1.0),
        TypeError,
        "padding_idx must be an int or None, got 1.0",
    ),
    "median": (lambda: ShardedEmbeddingBag(5, 2, mode="median"), ValueError, "Invalid mode: 'median'. Choose one of"),
    "reduction": (
        lambda: ShardedEmbedding(5, 2, gradient_reduction="max"),
        ValueError,
        "Invalid gradient_reduction: 'max'. Choose one of 'sum', 'mean'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_arguments_that_cannot_be_are_refused(what: str) -> None:
    make, error, words = WRONG[what]
    with pytest.raises(error, match=words):
        make()


def test_a_dtype_that_no_table_has_is_refused(in_a_group: None) -> None:
    with pytest.raises(ValueError, match=r"Invalid dtype: torch.complex64. Choose one of float32, "):
        ShardedEmbedding(5, 2, dtype=torch.complex64)
    table = ShardedEmbeddingBag(5, 2, padding_idx=-1, gradient_reduction="mean")  # of one rank, which has it all
    assert repr(table) == "ShardedEmbeddingBag(5, 2, rows 0 to 5 here, padding_idx=4, mode='mean')"
