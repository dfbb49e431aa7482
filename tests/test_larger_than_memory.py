"""Tables and moments in files: the same bits as in memory, commits, what goes wrong, and what is not lost by it."""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from gradients import coo
from signals import answering
from snapshot import bits, snapshot
from torch import Tensor, nn

import sparseadam
from sparseadam import (
    SparseAdam,
    initialize_on_read,
    initialize_rows,
    mapped_table,
    memory_mapped,
    moment_directory,
    replay,
)
from sparseadam._mapped_file import Bits
from sparseadam.bench.control_group import limited_memory
from sparseadam.bench.errors import BenchError
from sparseadam.initial import Init
from sparseadam.moments import Moments
from sparseadam.undo_log import Records, UndoLog, log_path, roll_back

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files need posix_fallocate, so Linux")

NUM_ROWS, DIM = 500, 6
INIT = ("normal", 0.1)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "8 bits": {"moment_dtype": torch.uint8},
    "by row": {"bias_correction": "row", "second_moment": "row"},
    "exact decay": {"weight_decay": 0.1, "weight_decay_mode": "exact"},
    "replay": {"missed_steps": "replay", "weight_decay": 0.1},
    "half": {"stochastic_rounding": True, "moment_dtype": torch.bfloat16},
}


class Training:
    """One table and a dense layer; in memory, or with files in ``place``."""

    def __init__(self, place: Path | None = None, options: Mapping[str, Any] | None = None, backend: str | None = None):
        """Build it, or open what is there."""
        options = options or {}
        dtype = torch.bfloat16 if options.get("stochastic_rounding") else torch.float32
        if place is None:
            table = Init(*INIT, seed=3).values(torch.arange(NUM_ROWS), DIM, dtype)
        else:
            table = memory_mapped(place / "a.table", NUM_ROWS, DIM, dtype, init=INIT, seed=3)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
        if place is not None:
            initialize_on_read(self.embedding)
        self.dense = nn.Parameter(torch.ones(DIM))
        groups = [{"params": [self.embedding.weight], **options}, {"params": [self.dense], "dense_gradients": "adam"}]
        generator = torch.Generator().manual_seed(1)
        moment_dir = None if place is None else place / "moments"
        self.optimizer = SparseAdam(groups, lr=0.05, generator=generator, backend=backend, moment_dir=moment_dir)
        if options.get("missed_steps") == "replay":
            self.optimizer.attach(self.embedding)

    @property
    def table(self) -> nn.Parameter:
        """The table."""
        return self.embedding.weight

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        state = self.optimizer.state.get(self.table)
        return state["step"] if state else 0

    def step(self, count: int = 1) -> None:
        """Take some steps, each with ids that follow from its number."""
        for _ in range(count):
            ids = torch.randint(0, NUM_ROWS, (30,), generator=torch.Generator().manual_seed(self.num_steps))
            self.optimizer.zero_grad()
            (self.embedding(ids).float() * self.dense).sin().sum().backward()
            self.optimizer.step()

    def everything(self) -> dict[str, Any]:
        """All that there is, bit for bit, with all rows of the table initialized."""
        if sparseadam.mapped_table.find(self.table) is not None:
            initialize_rows(self.table, torch.arange(NUM_ROWS))
        return snapshot(self.optimizer)


@cache
def run_in_memory() -> tuple[Training, list[dict[str, Any]]]:
    """A run in memory, and what it had after each of its steps so far."""
    training = Training()
    return training, [training.everything()]


def in_memory(num_steps: int) -> dict[str, Any]:
    """What a run in memory has after so many steps."""
    training, found = run_in_memory()
    while len(found) <= num_steps:
        training.step()
        found.append(training.everything())
    return found[num_steps]


def paths_of(place: Path) -> dict[str, bytes]:
    """The content of all files, as far as they are small; the others' beginning."""
    return {str(path): path.read_bytes()[: 1 << 20] for path in sorted(place.rglob("*")) if path.is_file()}


def disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


# Tables -------------------------------------------------------------------------------------------


def test_a_table_of_a_billion_rows_costs_nothing_to_create(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", 10**9, 64, init=INIT)
    assert table.shape == (10**9, 64)
    assert disk_bytes(tmp_path / "a.table") <= 1 << 16
    initialize_rows(table, torch.tensor([5, 999_999_999]))
    assert table[999_999_999].any()
    assert disk_bytes(tmp_path / "a.table") <= 1 << 16  # a page for each row, and one for each one's bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_stored_is_there_when_the_table_is_opened_again(tmp_path: Path, dtype: torch.dtype) -> None:
    table = memory_mapped(tmp_path / "a.table", 9, 5, dtype)
    values = torch.randn(9, 5).to(dtype)
    table.copy_(values)
    del table
    opened = memory_mapped(tmp_path / "a.table")
    assert opened.dtype is dtype
    assert torch.equal(opened, values)


def test_a_table_is_an_ordinary_parameters_tensor(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", 9, 5)
    embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    assert embedding.weight.data_ptr() == nn.Parameter(table).data_ptr() == table.data_ptr()


def mix(z: int) -> int:
    """SplitMix64's finaliser, from the paper."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def initial_value(kind: str, scale: float, seed: int, row: int, column: int) -> float:
    golden = 0x9E3779B97F4A7C15
    row_key = mix((mix((seed + golden) % 2**64) + golden * (row + 1)) % 2**64)
    probability = ((mix((row_key + golden * (column + 1)) % 2**64) >> 32) + 0.5) / 2**32
    return scale * (statistics.NormalDist().inv_cdf(probability) if kind == "normal" else 2 * probability - 1)


@pytest.mark.parametrize("init", [("normal", 0.5), ("uniform", 3.0)])
def test_initial_values_are_those_of_the_formula(tmp_path: Path, init: tuple[str, float]) -> None:
    rows = torch.tensor([0, 1, 2, 77, 10**9 - 1])
    table = memory_mapped(tmp_path / "a.table", 10**9, 40, torch.float64, init=init, seed=2**53 - 1)
    initialize_rows(table, rows)
    expected = [[initial_value(*init, 2**53 - 1, row, column) for column in range(40)] for row in rows.tolist()]
    # Python's quantiles are those of AS 241, too, in another order of operations.
    torch.testing.assert_close(table[rows], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [("normal", 0.3), ("uniform", 7.0)])
def test_initial_values_are_those_of_the_definition_bit_for_bit(init: tuple[str, float], dtype: torch.dtype) -> None:
    rows = torch.arange(0, 10**12, 10**9)[::2]
    found = Init(*init, seed=11).values(rows, 50, dtype)
    assert torch.equal(found, Init(*init, seed=11).reference_values(rows, 50).to(dtype))


def test_initial_values_do_not_depend_on_which_other_rows_are_made() -> None:
    init = Init("normal", 0.1, 5)
    together = init.values(torch.arange(1000), 33, torch.float64)
    for row in (0, 1, 500, 999):
        assert torch.equal(init.values(torch.tensor([row]), 33, torch.float64)[0], together[row])


def test_the_normal_distribution_is_met_in_its_tails_too() -> None:
    values = Init("normal", 2.0, 0).values(torch.arange(100_000), 20, torch.float64) / 2.0
    expected = statistics.NormalDist()
    for point in (-4.0, -3.0, -1.0, 0.0, 0.5, 2.0, 3.5):
        share = expected.cdf(point)
        found = (values < point).double().mean().item()
        assert abs(found - share) < 5 * (share * (1 - share) / values.numel()) ** 0.5


def test_rows_get_their_values_when_a_module_reads_them_and_others_stay_untouched(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM, init=INIT, seed=3)
    embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    bag = nn.EmbeddingBag.from_pretrained(table, freeze=False, sparse=True, mode="sum")
    handle = initialize_on_read(nn.ModuleList([embedding, bag]))
    expected = Init(*INIT, seed=3).values(torch.arange(NUM_ROWS), DIM, torch.float32)
    assert torch.equal(embedding(torch.tensor([[4, 9], [9, 4]]))[1], expected[[9, 4]])
    assert torch.equal(bag(torch.tensor([[7]]))[0], expected[7])
    assert table.any(1).nonzero()[:, 0].tolist() == [4, 7, 9]
    handle.remove()
    assert not embedding(torch.tensor([5])).any()


def test_rows_that_were_written_keep_what_they_have_when_they_are_read(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM, init=INIT)
    initialize_rows(table, torch.tensor([4]))
    table[4] = 1.0
    del table
    table = memory_mapped(tmp_path / "a.table")
    initialize_rows(table, torch.tensor([4, 5]))
    assert torch.equal(table[4], torch.ones(DIM))


def test_ids_outside_the_table_are_for_the_module_to_refuse(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM, init=INIT)
    embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    initialize_on_read(embedding)
    with pytest.raises(IndexError, match="index out of range"):
        embedding(torch.tensor([NUM_ROWS]))


def test_rows_that_nobody_initialized_before_they_were_read_are_refused(tmp_path: Path) -> None:
    table = nn.Parameter(memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM, init=INIT))
    optimizer = SparseAdam([table])
    table.grad = torch.sparse_coo_tensor([[7]], torch.ones(1, DIM), table.shape, check_invariants=True)
    with pytest.raises(RuntimeError, match=r"row 7 .* used before it had its initial values.*initialize_on_read"):
        optimizer.step()
    assert not optimizer.state
    initialize_rows(table, torch.tensor([7]))
    before = table[7].clone()
    optimizer.step()
    assert not torch.equal(table[7], before)


def test_rows_of_a_gradient_from_elsewhere_get_their_values_before_they_move(tmp_path: Path) -> None:
    # As in distributed training, where gradients name rows that other processes have read.
    table = nn.Parameter(memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM, init=INIT, seed=3))
    initialize_rows(table, torch.tensor([1]))
    table.grad = torch.sparse_coo_tensor([[7]], torch.zeros(1, DIM), table.shape, check_invariants=True)
    SparseAdam([table]).step()
    assert torch.equal(table[7], Init(*INIT, seed=3).values(torch.tensor([7]), DIM, torch.float32)[0])


def test_a_table_is_locked_while_a_tensor_of_it_lives(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM)
    parameter = nn.Parameter(table)
    del table
    with pytest.raises(RuntimeError, match="is open in another process, or in this one"):
        memory_mapped(tmp_path / "a.table")
    del parameter
    assert memory_mapped(tmp_path / "a.table").shape == (NUM_ROWS, DIM)


def open_with(**options: Any) -> Callable[[Path], Tensor]:
    return lambda path: memory_mapped(path, **{"num_rows": 5, "dim": 3, **options})


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (open_with(num_rows=0), ValueError, "Invalid num_rows: 0"),
        (open_with(dim=0), ValueError, "Invalid dim: 0"),
        (open_with(dim=None), TypeError, "dim must be an int, got None"),
        (open_with(num_rows=None), TypeError, "num_rows must be an int, got None"),
        (open_with(num_rows=True), TypeError, "num_rows must be an int, got True"),
        (open_with(num_rows=2.0), TypeError, "num_rows must be an int, got 2.0"),
        (open_with(dtype=torch.int64), ValueError, "Invalid dtype: torch.int64"),
        (open_with(dtype="float32"), TypeError, "dtype must be a torch.dtype"),
        (open_with(init="normal"), ValueError, "Invalid init: 'normal'"),
        (open_with(init=("xavier", 1.0)), ValueError, "Invalid init: .*xavier"),
        (open_with(init=("normal", 0.0)), ValueError, r"must lie in \(0, inf\)"),
        (open_with(init=("normal", float("nan"))), ValueError, r"must lie in \(0, inf\)"),
        (open_with(init=("normal", "x")), TypeError, "the number in init must be a number"),
        (open_with(init=0.1), TypeError, "init must be 'zeros' or a pair"),
        (open_with(seed=-1), ValueError, "Invalid seed: -1"),
        (open_with(seed=1.5), TypeError, "seed must be an int"),
        (lambda path: memory_mapped(path), FileNotFoundError, "there is no table at .* Pass num_rows and dim"),
        (
            lambda path: memory_mapped(path.parent / "no" / "a", 5, 3),
            FileNotFoundError,
            "there is no directory for .*/no/a",
        ),
        (lambda path: initialize_rows(torch.ones(3), torch.tensor([0])), ValueError, "the table is not in a file"),
        (lambda path: initialize_on_read(nn.Embedding(3, 3)), ValueError, "none of the model's parameters"),
    ],
)
def test_arguments_are_checked_before_anything_is_made(
    tmp_path: Path, call: Callable[[Path], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(tmp_path / "a.table")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 6}, "has num_rows 5 in place of 6"),
        ({"dim": 4}, "has dim 3 in place of 4"),
        ({"dtype": torch.float64}, "has dtype float32 in place of float64"),
        ({"init": "zeros"}, "has init and seed .'normal', 0.1, 0. in place of .'zeros', 0.0, 0."),
        ({"seed": 1, "dim": 9}, "has dim 3 in place of 9, init and seed"),
    ],
)
def test_a_table_is_not_opened_as_something_else(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    open_with(init=INIT)(tmp_path / "a.table")
    before = paths_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_with(**{"init": INIT, **options})(tmp_path / "a.table")
    assert paths_of(tmp_path) == before
    assert open_with(init=INIT)(tmp_path / "a.table").shape == (5, 3)


def test_rows_and_tables_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    table = memory_mapped(tmp_path / "a.table", 5, 3, init=INIT)
    with pytest.raises(IndexError, match="row 5 is outside the 5 rows of the table in"):
        initialize_rows(table, torch.tensor([0, 5]))
    with pytest.raises(TypeError, match=r"rows of the table in .* must be a one-dimensional torch.int64 tensor"):
        initialize_rows(table, torch.tensor([0.0]))
    assert not table.any()
    with pytest.raises(ValueError, match="module 'inner' has a max_norm"):
        embedding = nn.Embedding.from_pretrained(table, freeze=False, max_norm=1.0)
        initialize_on_read(nn.ModuleDict({"inner": embedding}))
    model = nn.ModuleList([nn.Embedding.from_pretrained(table, freeze=False)])
    model.max_norm = 1.0  # for clipping, say: a model's own, which has no weight
    initialize_on_read(model).remove()
    with pytest.raises(ValueError, match="is a part or another view of the memory-mapped table"):
        SparseAdam([nn.Parameter(table[:4])], moment_dir=tmp_path / "moments")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite(begin: int, content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(begin)
            file.write(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "is damaged: .* bytes in place of"),
        (lambda path: os.truncate(path, 100), "does not hold a table of sparseadam"),
        (lambda path: path.write_bytes(b""), "does not hold a table of sparseadam"),
        (lambda path: path.write_bytes(b"PK" * 5000), "does not hold a table of sparseadam"),
        (overwrite(16, b"\2\0\0\0"), "has version 2 of its format, and this version of sparseadam reads 1"),
        (overwrite(30, b"\xff"), "is damaged: a header that does not match its checksum"),
    ],
)
def test_a_file_that_is_no_whole_table_is_refused_and_left_alone(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    open_with()(tmp_path / "a.table")
    change(tmp_path / "a.table")
    before = paths_of(tmp_path)
    for options in ({}, {"num_rows": 5, "dim": 3}):
        with pytest.raises(ValueError, match=message):
            memory_mapped(tmp_path / "a.table", **options)
    assert paths_of(tmp_path) == before


# The same bits as in memory -----------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_in_files_goes_as_one_in_memory_and_comes_back_to_its_commit(
    tmp_path: Path, options: dict[str, Any], backend: str
) -> None:
    files, memory = Training(tmp_path, options, backend), Training(None, options, backend)
    for step in range(12):
        files.step()
        memory.step()
        if step == 4:
            for training in (files, memory):
                training.optimizer.forget(training.table, torch.arange(0, NUM_ROWS, 3))
        if step in (2, 8):
            files.optimizer.checkpoint()
            committed = copy.deepcopy(memory)
        if step == 10:
            for training in (files, memory):
                training.optimizer.flush()
                training.optimizer.forget(training.table, torch.arange(0, NUM_ROWS, 2))
    assert files.everything() == memory.everything()
    del files
    files = Training(tmp_path, options, backend)
    if options.get("missed_steps") == "replay":
        committed.optimizer.attach(committed.embedding)
    assert files.everything() == committed.everything()
    for training in (files, committed):
        training.step(3)
        training.optimizer.flush()
    assert files.everything() == committed.everything()


def test_moments_in_files_of_a_table_in_memory_and_of_gradients_of_other_sparse_dims(tmp_path: Path) -> None:
    def make(moment_dir: Path | None) -> SparseAdam:
        return SparseAdam([nn.Parameter(torch.ones(4, 3, 2))], moment_dir=moment_dir)

    def step(optimizer: SparseAdam, sparse_dim: int) -> None:
        table = optimizer.param_groups[0]["params"][0]
        table.grad = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(sparse_dim)).to_sparse(sparse_dim)
        optimizer.step()

    files, memory = make(tmp_path / "moments"), make(None)
    for sparse_dim in (2, 1, 3):
        step(files, sparse_dim)
        step(memory, sparse_dim)
        files.checkpoint()
    assert snapshot(files) == snapshot(memory)
    step(files, 1)
    del files
    files = make(tmp_path / "moments")
    assert snapshot(files) == snapshot(memory)
    step(files, 2)
    step(memory, 2)
    assert snapshot(files) == snapshot(memory)


def test_a_table_of_which_every_row_is_touched_is_logged_in_every_step(tmp_path: Path) -> None:
    # Its moments grow no more, so that of a table in memory steady steps would be taken.
    def build() -> SparseAdam:
        table = memory_mapped(tmp_path / "a.table", 5, 2)
        return SparseAdam([nn.Parameter(table)], moment_dir=tmp_path / "moments")

    def step(optimizer: SparseAdam) -> None:
        table = optimizer.param_groups[0]["params"][0]
        table.grad = torch.sparse_coo_tensor([[4, 0, 1, 2, 3]], torch.ones(5, 2), table.shape, check_invariants=True)
        optimizer.step()

    optimizer = build()
    for _ in range(3):
        step(optimizer)
    optimizer.checkpoint()
    committed = snapshot(optimizer)
    for _ in range(3):
        step(optimizer)
    del optimizer
    assert snapshot(build()) == committed


def test_a_table_in_a_file_with_moments_in_memory(tmp_path: Path) -> None:
    table = nn.Parameter(memory_mapped(tmp_path / "a.table", NUM_ROWS, DIM))
    copied = nn.Parameter(table.detach().clone())
    optimizers = [SparseAdam([each]) for each in (table, copied)]
    for _ in range(3):
        grad = torch.sparse_coo_tensor([[1, 400, 1]], torch.rand(3, DIM), table.shape, check_invariants=True)
        for optimizer in optimizers:
            optimizer.param_groups[0]["params"][0].grad = grad
            optimizer.step()
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])
    with pytest.raises(RuntimeError, match="this optimizer has no moment_dir"):
        optimizers[0].checkpoint()


def test_files_hold_no_more_than_what_was_touched(tmp_path: Path) -> None:
    table = nn.Parameter(memory_mapped(tmp_path / "a.table", 10**8, 64))
    optimizer = SparseAdam([table], moment_dir=tmp_path / "moments")
    rows = torch.arange(0, 10**8, 10**6)
    table.grad = torch.sparse_coo_tensor(rows[None], torch.ones(100, 64), table.shape, check_invariants=True)
    optimizer.step()
    optimizer.checkpoint()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 10**10
    # A page for each row and one for its place in the index; its moments lie together.
    assert sum(map(disk_bytes, files)) < 2 * 100 * 4096 + 100 * 64 * 8 + (1 << 18)


# Commits ------------------------------------------------------------------------------------------


def test_before_the_first_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    del training
    training = Training(tmp_path)
    assert not training.optimizer.state.get(training.table)
    assert training.everything() == in_memory(0)


def test_a_table_opened_by_itself_is_as_of_the_last_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    training.step(2)
    del training
    table = memory_mapped(tmp_path / "a.table")
    initialize_rows(table, torch.arange(NUM_ROWS))
    assert bits(table) == in_memory(2)["tables"][0][0]


def test_table_and_moments_may_be_moved_together(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    training = Training(tmp_path / "here")
    training.step(2)
    training.optimizer.checkpoint()
    training.step(1)
    del training
    (tmp_path / "here").rename(tmp_path / "there")
    assert Training(tmp_path / "there").everything() == in_memory(2)


def test_a_table_without_its_moments_opens_if_nothing_has_to_be_taken_back(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    del training
    (tmp_path / "moments").rename(tmp_path / "gone")
    table = memory_mapped(tmp_path / "a.table")
    del table
    (tmp_path / "gone").rename(tmp_path / "moments")
    training = Training(tmp_path)
    training.step(1)
    del training
    (tmp_path / "moments").rename(tmp_path / "gone")
    before = paths_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="the log that takes them back is gone with the moments"):
        memory_mapped(tmp_path / "a.table")
    assert paths_of(tmp_path) == before
    (tmp_path / "gone").rename(tmp_path / "moments")
    assert Training(tmp_path).everything() == in_memory(2)


def test_a_group_that_is_added_is_committed(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    other = nn.Parameter(memory_mapped(tmp_path / "b.table", 7, 2))
    training.optimizer.add_param_group({"params": [other], "lr": 0.5})
    other.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), other.shape, check_invariants=True)
    training.optimizer.step()
    training.step(1)
    del training, other
    table, other = memory_mapped(tmp_path / "a.table"), memory_mapped(tmp_path / "b.table")
    assert not other.any()
    dense = nn.Parameter(torch.zeros(DIM))
    groups = [[table], [dense], [other]]
    optimizer = SparseAdam(
        [{"params": [nn.Parameter(each) for each in group]} for group in groups], moment_dir=tmp_path / "moments"
    )
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 2


def test_a_loaded_state_goes_into_files_with_the_next_checkpoint(tmp_path: Path) -> None:
    source = Training()
    source.step(5)
    saved = copy.deepcopy(source.optimizer.state_dict())
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    training.optimizer.load_state_dict(saved)
    assert snapshot(training.optimizer)["states"] == snapshot(source.optimizer)["states"]
    training.step(1)
    del training
    training = Training(tmp_path)
    assert training.everything() == in_memory(2)
    training.optimizer.load_state_dict(saved)
    training.optimizer.checkpoint()
    del training
    training = Training(tmp_path)
    assert snapshot(training.optimizer)["states"] == snapshot(source.optimizer)["states"]
    assert len(list((tmp_path / "moments").glob("moments-*"))) == 1


def test_a_state_dict_is_the_one_of_a_run_in_memory(tmp_path: Path) -> None:
    files, memory = Training(tmp_path), Training()
    files.step(3)
    memory.step(3)
    torch.save(files.optimizer.state_dict(), tmp_path / "state.pt")
    memory_state, file_state = (
        {key: {name: bits(part) for name, part in state.items()} for key, state in saved["state"].items()}
        for saved in (memory.optimizer.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True))
    )
    assert file_state == memory_state


def test_a_copy_of_the_optimizer_keeps_its_moments_in_memory(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    copied = copy.deepcopy(training)
    copied.step(1)
    assert snapshot(copied.optimizer) != snapshot(training.optimizer)
    with pytest.raises(RuntimeError, match="no moment_dir"):
        copied.optimizer.checkpoint()
    assert training.everything() == in_memory(2)


def test_moments_that_are_dropped_start_anew(tmp_path: Path) -> None:
    files, memory = Training(tmp_path), Training()
    for training in (files, memory):
        training.step(2)
    files.optimizer.checkpoint()
    for training in (files, memory):
        del training.optimizer.state[training.table]
        training.step(2)
    files.optimizer.checkpoint()
    del files
    assert Training(tmp_path).everything() == memory.everything()


def test_what_no_commit_names_is_removed(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    names = sorted(path.name for path in (tmp_path / "moments").iterdir())
    assert names == ["commit.json", "moments-1", "undo-1.log", "values-1.pt"]
    training.step(1)
    del training
    Training(tmp_path)
    names = sorted(path.name for path in (tmp_path / "moments").iterdir())
    assert names == ["commit.json", "moments-1", "undo-2.log", "values-2.pt"]
    (tmp_path / "moments" / "moments-9").mkdir()
    for stray in ("moments-9/rows", "undo-7.log", "values-3.pt", "commit.json.new"):
        (tmp_path / "moments" / stray).write_text("of a commit that was not made")
    Training(tmp_path)
    assert sorted(path.name for path in (tmp_path / "moments").iterdir()) == names


def test_what_cannot_be_removed_now_is_removed_by_the_next_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    training.step(2)

    def refused(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        training.optimizer.checkpoint()
    training.step(1)
    training.optimizer.checkpoint()
    names = sorted(path.name for path in (tmp_path / "moments").iterdir())
    assert names == ["commit.json", "moments-1", "undo-2.log", "values-2.pt"]
    del training
    assert Training(tmp_path).everything() == in_memory(3)


def note_calls(monkeypatch: pytest.MonkeyPatch, place: Path) -> list[str]:
    """Note what of a place is synced from now on, replaced, or gone: removed, or opened to be written anew."""
    calls: list[str] = []
    fsync, replace, unlink, opened = os.fsync, os.replace, os.unlink, os.open

    def note_sync(fd: int) -> None:
        calls.append(f"sync {os.path.relpath(os.readlink(f'/proc/self/fd/{fd}'), place)}")
        fsync(fd)

    def note_replace(source: str, target: str) -> None:
        calls.append(f"replace {os.path.relpath(target, place)}")
        replace(source, target)

    def note_unlink(path: str) -> None:
        calls.append(f"gone {os.path.relpath(path, place)}")
        unlink(path)

    def note_open(path: str, flags: int, *rest: Any) -> int:
        if flags & os.O_TRUNC:
            calls.append(f"gone {os.path.relpath(path, place)}")
        return opened(path, flags, *rest)

    for name, noting in {"fsync": note_sync, "replace": note_replace, "unlink": note_unlink, "open": note_open}.items():
        monkeypatch.setattr(os, name, noting)
    return calls


# Killed processes do not show the following two, since what they stored stays in the system's memory.


def test_all_of_a_commit_is_on_the_disk_before_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    training.step(2)
    calls = note_calls(monkeypatch, tmp_path)
    training.optimizer.checkpoint()
    at = calls.index("replace moments/commit.json")
    moments = {f"moments/{name}" for name in ("moments-1/rows", "moments-1/moments", "moments-1", "values-1.pt")}
    others = {"a.table", "moments/undo-1.log", "moments/commit.json.new"}
    assert {f"sync {name}" for name in moments | others} <= set(calls[:at])
    assert calls[at + 1] == "sync moments"
    assert set(calls[at + 2 :]) == {"gone moments/undo-0.log", "gone moments/values-0.pt"}


def test_what_was_taken_back_is_on_the_disk_before_its_log_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path)
    gc.collect()
    calls = note_calls(monkeypatch, tmp_path)
    Training(tmp_path)
    at = calls.index("gone moments/undo-1.log")
    taken_back = {"a.table", "moments/moments-1/rows", "moments/moments-1/moments"}
    assert {f"sync {name}" for name in {*taken_back, "moments"}} <= set(calls[:at])


def test_rounding_goes_on_with_the_seed_of_the_commit(tmp_path: Path) -> None:
    def build(seed: int, moment_dir: Path | None) -> SparseAdam:
        generator = torch.Generator().manual_seed(seed)
        table = nn.Parameter(torch.ones(9, 4))
        return SparseAdam([table], moment_dtype=torch.uint8, generator=generator, moment_dir=moment_dir)

    def step(optimizer: SparseAdam) -> None:
        table = optimizer.param_groups[0]["params"][0]
        table.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 4) / 3, table.shape, check_invariants=True)
        optimizer.step()

    memory, files = build(1, None), build(1, tmp_path / "moments")
    step(files)
    files.checkpoint()
    del files
    files = build(2, tmp_path / "moments")
    step(memory)
    for _ in range(5):
        step(memory)
        step(files)
    assert snapshot(files) == snapshot(memory)


# Interrupts -----------------------------------------------------------------------------------------


def is_interrupted_at(line: int, act: Callable[[], Any]) -> bool:
    """Have a Ctrl-C come at a line that moments in files execute; return whether there were so many."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num_lines
        if not frame.f_code.co_filename.endswith("moment_directory.py"):
            return None
        if event == "line":
            num_lines += 1
            if num_lines == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    with answering(signal.default_int_handler, signal.SIGINT), suppress(KeyboardInterrupt):
        sys.settrace(trace)
        try:
            act()
        finally:
            sys.settrace(before)
    return num_lines >= line


@pytest.fixture
def quick_to_collect() -> Iterator[None]:
    """What there was before the test is not looked at, each time that something is to be gone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a file that was just opened
@pytest.mark.parametrize("act", ["checkpoint", "step"])
def test_a_run_that_was_interrupted_and_went_on_comes_back_to_its_commit(
    tmp_path: Path, act: str, quick_to_collect: None
) -> None:
    """Rows were written that the log of the commit did not have, and came back as they had been last."""
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        place = tmp_path / str(line)
        place.mkdir()
        training = Training(place)
        training.step(2)
        training.optimizer.checkpoint()
        if act == "checkpoint":
            training.step()
            was_interrupted = is_interrupted_at(line, training.optimizer.checkpoint)
            training.step(2)
        else:
            was_interrupted = is_interrupted_at(line, training.step)
            training.step(3 - training.num_steps)
        del training
        gc.collect()
        training = Training(place)
        assert training.num_steps in ([2, 3] if act == "checkpoint" else [2]), line
        assert training.everything() == in_memory(training.num_steps), line
        del training
        gc.collect()
    assert line > 20


@pytest.mark.parametrize("act", ["step", "catch_up"])
def test_a_handler_that_commits_finds_what_is_logged_of_the_same_commit(
    tmp_path: Path, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows were in the log of the commit before, and written after the handler's."""

    def take(training: Training) -> None:
        training.step() if act == "step" else training.optimizer.catch_up(training.table, torch.arange(NUM_ROWS))

    training, want = Training(tmp_path, OPTIONS["replay"]), Training(options=OPTIONS["replay"])
    for each in (training, want):
        each.step(2)
    training.optimizer.checkpoint()
    before_writing = moment_directory.MomentDirectory.before_writing

    def interrupted(self: moment_directory.MomentDirectory, writes: Any) -> None:
        before_writing(self, writes)
        signal.raise_signal(signal.SIGUSR1)

    def save(optimizer: SparseAdam, *_: Any) -> None:
        optimizer.checkpoint()

    with answering(partial(save, training.optimizer), signal.SIGUSR1), monkeypatch.context() as patch:
        patch.setattr(moment_directory.MomentDirectory, "before_writing", interrupted)
        take(training)
    take(want)
    del training
    gc.collect()
    again = Training(tmp_path, OPTIONS["replay"])
    for each in (again, want):
        each.step(2)
        each.optimizer.flush()
    assert again.everything() == want.everything()


def test_a_handler_that_saves_while_rows_get_their_values_does_not_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for ever, for the lock that what it had interrupted held."""
    training = Training(tmp_path, OPTIONS["replay"])
    training.step()
    saved = []
    values = Init.values

    def interrupted(self: Init, *arguments: Any) -> Tensor:
        monkeypatch.undo()
        made = values(self, *arguments)
        signal.raise_signal(signal.SIGUSR1)
        return made

    monkeypatch.setattr(Init, "values", interrupted)
    with answering(lambda *_: saved.append(training.optimizer.state_dict()), signal.SIGUSR1):
        initialize_rows(training.table, torch.arange(NUM_ROWS))
    assert len(saved) == 1


def test_a_commit_that_finds_no_memory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged was told too late for which memory had to be found, and rows were then logged no more."""
    reserved = Bits.reserved
    for number in range(3):
        place = tmp_path / str(number)
        place.mkdir()
        training = Training(place)
        training.step(2)
        training.optimizer.checkpoint()
        training.step()
        with monkeypatch.context() as patch:
            calls = itertools.count()

            def refuse(num_bits: int, calls: Iterator[int] = calls, number: int = number) -> Any:
                if next(calls) == number:
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
                return reserved(num_bits)

            patch.setattr(Bits, "reserved", refuse)
            with suppress(OSError):
                training.optimizer.checkpoint()
        training.step(2)
        del training
        gc.collect()
        training = Training(place)
        assert training.num_steps == (2 if number < 2 else 3)
        assert training.everything() == in_memory(training.num_steps)
        del training
        gc.collect()


# A disk that is full, and other refusals of the system --------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], number: int) -> list[str]:
    """Have the call ``number`` of some of ``os`` fail as on a full disk, writes half done; return what failed."""
    calls = 0
    failed: list[str] = []
    for name in names:

        def call(*args: Any, name: str, original: Callable[..., Any], **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number + 1:
                failed.append(name)
                if name in ("write", "pwrite"):
                    original(args[0], args[1][: len(args[1]) // 2], *args[2:])
                # As the system does, which names a file where it is given one by name.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *args[:1] if name == "open" else ())
            return original(*args, **options)

        monkeypatch.setattr(os, name, partial(call, name=name, original=getattr(os, name)))
    return failed


def until_none_fails(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], attempt: Callable[[], None]
) -> Iterator[str]:
    """Have each call of ``attempt`` fail once, and yield what the errors say; in the end it has gone through."""
    number = 0
    while True:
        with monkeypatch.context() as patch:
            failed = fail_at(patch, names, number)
            message = None
            try:
                attempt()
            except OSError as error:
                assert error.errno == errno.ENOSPC
                message = str(error)
        assert (message is None) == (not failed)
        if message is None:
            return
        yield message
        number += 1


def test_a_step_without_room_on_the_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    training.step(1)
    ids = torch.randint(0, NUM_ROWS, (30,), generator=torch.Generator().manual_seed(3))
    training.optimizer.zero_grad()
    (training.embedding(ids) * training.dense).sin().sum().backward()
    gc.collect()
    before = snapshot(training.optimizer)
    messages = []
    step = training.optimizer.step
    for message in until_none_fails(monkeypatch, ("posix_fallocate", "pwrite"), step):
        assert snapshot(training.optimizer) == before
        messages.append(message)
    assert any(
        re.search(r"no room for \d+ more bytes of '.*undo-1.log'.*Nothing was changed", each) for each in messages
    )
    assert any(re.search(r"no room for \d+ more bytes of '.*moments-1/moments'", each) for each in messages)
    assert training.everything() == in_memory(4)
    del training, step
    assert Training(tmp_path).everything() == in_memory(2)


def test_a_history_that_the_disk_has_no_room_to_end_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is taken when all rows are to be brought up to date after it, so it is none that failed."""
    options = {"missed_steps": "replay", "weight_decay": 0.1}
    monkeypatch.setattr(replay, "_MAX_STEPS", 4)
    monkeypatch.setattr(replay, "_ROWS_A_STEP", NUM_ROWS)
    files, memory = Training(tmp_path, options), Training(None, options)
    files.step(3)
    with monkeypatch.context() as patch:
        patch.setattr(SparseAdam, "_before_writing_all", full_disk)
        files.step(2)
    state = files.optimizer.state[files.table]
    assert (state.step, state.history.num_steps) == (5, 5)
    files.step(1)
    assert state.history.num_steps == 0
    monkeypatch.setattr(replay, "_MAX_STEPS", 6)
    memory.step(6)
    files.optimizer.flush()
    memory.optimizer.flush()
    assert files.everything() == memory.everything()


def test_rows_that_the_disk_has_no_room_for_are_not_initialized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = memory_mapped(tmp_path / "a.table", 10**6, 64, init=INIT)
    rows = torch.arange(0, 10**6, 10**5)
    messages = list(until_none_fails(monkeypatch, ("posix_fallocate",), lambda: initialize_rows(table, rows)))
    assert len(messages) > len(rows)
    assert all("no room for 4096 more bytes of" in message for message in messages)
    assert torch.equal(table[rows], Init(*INIT, seed=0).values(rows, 64, torch.float32))


@pytest.mark.parametrize("ends", [False, True], ids=["the run goes on", "the process ends"])
def test_a_checkpoint_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    committed = 2
    replaced = 0
    for number in itertools.count():
        training.step(1)
        num_steps = training.num_steps
        with monkeypatch.context() as patch:
            failed = fail_at(patch, ("open", "write", "fsync", "replace"), number)
            message = ""
            try:
                training.optimizer.checkpoint()
            except OSError as error:
                message = str(error)
        if not failed:
            break
        assert str(tmp_path) in message
        assert training.everything() == in_memory(num_steps)
        if ends:
            del training
            training = Training(tmp_path)
            # What failed may have been the last fsync, after commit.json was replaced: the message tells.
            if "has been replaced, but the disk may not have that yet" in message:
                assert "What was committed before is as it was" not in message
                committed = num_steps
                replaced += 1
            assert training.num_steps == committed
            assert training.everything() == in_memory(committed)
    assert number > 10
    assert (replaced > 0) == ends
    del training
    assert Training(tmp_path).everything() == in_memory(num_steps)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mounting, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    gc.collect()
    # At once for the names, and as soon as nothing is open any more for the rest: a failed test holds on to files.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    training = Training(small_disk)
    training.step(2)
    training.optimizer.checkpoint()
    training.everything()  # so that no row gets its initial values in a step that fails
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 512)
    failed = 0
    for _ in range(30):
        before = snapshot(training.optimizer)
        try:
            training.step(1)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert snapshot(training.optimizer) == before
            failed += 1
            break
    assert failed
    with pytest.raises(OSError, match="could not be written: "):
        training.optimizer.checkpoint()
    num_steps = training.num_steps
    ballast.unlink()
    assert training.everything() == in_memory(num_steps)
    training.step(1)
    training.optimizer.checkpoint()
    training.step(1)
    del training
    training = Training(small_disk)
    assert training.everything() == in_memory(num_steps + 1)
    del training


# What does not go together ------------------------------------------------------------------------


def trained(place: Path) -> None:
    training = Training(place)
    training.step(2)
    training.optimizer.checkpoint()
    training.step(1)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name not in ("plain", "half")])
def test_options_that_shape_the_state_are_refused_by_name(tmp_path: Path, options: str) -> None:
    names = {
        "amsgrad": "amsgrad",
        "8 bits": "moment_dtype",
        "by row": "second_moment, bias_correction",
        "exact decay": "weight_decay_mode",
        "replay": "missed_steps",
    }
    trained(tmp_path)
    with pytest.raises(ValueError, match=f"^{names[options]} of group 0, parameter 0 is not what it was at the commit"):
        Training(tmp_path, OPTIONS[options])
    gc.collect()
    assert Training(tmp_path).everything() == in_memory(2)


def other_optimizer(place: Path, *groups: Any, table: Tensor | None = None) -> None:
    table = memory_mapped(place / "a.table") if table is None else table
    SparseAdam([{"params": [nn.Parameter(table)]}, *groups], moment_dir=place / "moments")


def dense_group(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.zeros(shape, dtype=dtype))], "dense_gradients": "adam"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda place: other_optimizer(place), "has 2 groups of 1, 1 parameters, and the optimizer 1 groups of 1"),
        (
            lambda place: other_optimizer(place, dense_group(5)),
            r"group 1, parameter 0: shape \[6\] expected, shape \[5\]",
        ),
        (
            lambda place: other_optimizer(place, dense_group(DIM, dtype=torch.float64)),
            "dtype torch.float32 expected, dtype torch.float64 found",
        ),
        (
            lambda place: other_optimizer(place, dense_group(DIM), table=torch.zeros(NUM_ROWS, DIM)),
            "a memory-mapped table expected, its table in memory found",
        ),
        (
            lambda place: other_optimizer(
                place, dense_group(DIM), table=memory_mapped(place / "b.table", NUM_ROWS, DIM)
            ),
            "the table in .*b.table' is not the one that was in .*a.table'",
        ),
        (
            lambda place: SparseAdam([nn.Parameter(memory_mapped(place / "a.table"))]),
            "is committed together with the moments in .* Pass moment_dir=",
        ),
    ],
)
def test_an_optimizer_that_does_not_fit_a_commit_is_refused(
    tmp_path: Path, build: Callable[[Path], Any], message: str
) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)
    gc.collect()
    assert Training(tmp_path).everything() == in_memory(2)


def test_a_table_with_new_moments_leaves_the_old_ones(tmp_path: Path) -> None:
    trained(tmp_path)
    table = nn.Parameter(memory_mapped(tmp_path / "a.table"))
    SparseAdam([table], moment_dir=tmp_path / "others")
    del table
    gc.collect()
    with pytest.raises(ValueError, match=r"the table in .* was committed with those in .*others' since"):
        Training(tmp_path)


def test_a_commit_file_that_is_not_ours_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    commit = tmp_path / "moments" / "commit.json"
    content = commit.read_text()
    for changed, message in (
        (content[: len(content) // 2], "does not hold a commit of moments"),
        ('{"magic": "other"}', "does not hold a commit of moments"),
        (json.dumps({**json.loads(content), "version": 2}), "has version 2 of its format"),
        (
            json.dumps({"magic": "sparseadam moments", "version": 1}),
            "is damaged: a commit without commit, id, next_number",
        ),
    ):
        commit.write_text(changed)
        before = paths_of(tmp_path)
        with pytest.raises(ValueError, match=message):
            Training(tmp_path)
        assert paths_of(tmp_path) == before
    commit.write_text(content)
    gc.collect()
    assert Training(tmp_path).everything() == in_memory(2)


@pytest.mark.parametrize("name", ["undo-1.log", "values-1.pt", "moments-1/moments", "moments-1/rows"])
def test_a_file_of_the_commit_that_is_gone_or_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    trained(tmp_path)
    path = tmp_path / "moments" / name
    path.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"{name}.* is missing"):
        Training(tmp_path)
    (tmp_path / "gone").rename(path)
    if name.startswith("moments"):
        content = path.read_bytes()
        os.truncate(path, 100)
        with pytest.raises(ValueError, match="is damaged: 100 bytes in place of"):
            Training(tmp_path)
        path.write_bytes(content)
    gc.collect()
    assert Training(tmp_path).everything() == in_memory(2)


def assert_refused_until_restored(
    place: Path, path: Path, content: bytes, error: type[Exception], message: str
) -> None:
    """Opening changes nothing, and once a file has its content again, all is as it was committed after two steps."""
    before = paths_of(place)
    with pytest.raises(error, match=message):
        Training(place)
    assert paths_of(place) == before
    path.write_bytes(content)
    gc.collect()
    assert Training(place).everything() == in_memory(2)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"garbage"])
def test_damaged_values_of_a_commit_are_refused_before_anything_is_changed(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    trained(tmp_path)
    path = tmp_path / "moments" / "values-1.pt"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    memory_mapped(tmp_path / "a.table")  # taken back by itself
    gc.collect()
    assert_refused_until_restored(tmp_path, path, content, ValueError, r"values-1\.pt' is damaged: ")


def test_a_lost_commit_is_not_taken_for_a_beginning(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    del training
    gc.collect()
    commit = tmp_path / "moments" / "commit.json"
    content = commit.read_bytes()
    commit.unlink()
    assert_refused_until_restored(tmp_path, commit, content, FileNotFoundError, r"commit\.json.* is missing")


def test_a_first_commit_that_failed_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a table that was committed in a directory of that name before."""
    trained(tmp_path)
    memory_mapped(tmp_path / "a.table")  # taken back
    gc.collect()
    shutil.rmtree(tmp_path / "moments")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(moment_directory, "write_commit", full_disk)
        Training(tmp_path)
    gc.collect()
    assert {path.name for path in (tmp_path / "moments").iterdir()} == {"undo-0.log", "values-0.pt"}
    assert not Training(tmp_path).optimizer.state


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tables_of_no_group_are_no_longer_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of a group that was taken out nor those of one that could not be added."""
    tables = [nn.Parameter(memory_mapped(tmp_path / f"{name}.table", 6, 2)) for name in "abc"]
    optimizer = SparseAdam([{"params": [tables[0]]}, {"params": [tables[1]]}], moment_dir=tmp_path / "moments")
    del optimizer.param_groups[1]
    optimizer.checkpoint()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(moment_directory, "write_commit", full_disk)
        optimizer.add_param_group({"params": [tables[2]]})
    others = SparseAdam(tables[1:], moment_dir=tmp_path / "others")
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 2))]})
    for each in (optimizer, others):
        for table in each.param_groups[0]["params"]:
            table.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), table.shape, check_invariants=True)
        each.step()
        each.checkpoint()


def test_a_table_that_was_committed_but_not_told_so_is_told_when_the_directory_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the first process ends between the two; rows that are written after must be taken back as any others."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(mapped_table.MappedTable, "pair", full_disk)
        Training(tmp_path)
    gc.collect()
    training = Training(tmp_path)
    training.step(1)
    del training
    gc.collect()
    table = memory_mapped(tmp_path / "a.table")
    initialize_rows(table, torch.arange(NUM_ROWS))
    assert torch.equal(table, Init(*INIT, seed=3).values(torch.arange(NUM_ROWS), DIM, torch.float32))


def test_a_table_that_has_its_moments_in_files_is_not_added_to_an_optimizer_without_them(tmp_path: Path) -> None:
    trained(tmp_path)
    optimizer = SparseAdam([nn.Parameter(torch.zeros(3, 2))])
    with pytest.raises(ValueError, match=r"is committed together with the moments in .* Pass moment_dir="):
        optimizer.add_param_group({"params": [nn.Parameter(memory_mapped(tmp_path / "a.table"))]})
    assert len(optimizer.param_groups) == 1


def test_a_group_that_cannot_be_committed_is_not_added(tmp_path: Path) -> None:
    """Whatever the reason: here a table that has other memory than it had, which is found as all is committed anew."""
    tables = [nn.Parameter(memory_mapped(tmp_path / f"{name}.table", 6, 2)) for name in "ab"]
    optimizer = SparseAdam([tables[0]], moment_dir=tmp_path / "moments")
    mapped = tables[0].data
    tables[0].data = mapped.clone()
    with pytest.raises(RuntimeError, match="has other memory than when the optimizer was built"):
        optimizer.add_param_group({"params": [tables[1]]})
    assert len(optimizer.param_groups) == 1
    tables[0].data = mapped
    optimizer.add_param_group({"params": [tables[1]]})
    for table in tables:
        table.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), table.shape, check_invariants=True)
    optimizer.step()
    optimizer.checkpoint()


def test_a_damaged_note_of_the_moments_is_no_reason_to_leave_rows_as_they_are(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.optimizer.checkpoint()
    training.step(1)
    del training
    gc.collect()
    with open(tmp_path / "a.table", "r+b") as file:
        file.seek(2048 + 12)
        file.write(b"??")
    with pytest.raises(ValueError, match="is damaged: a note of its moments"):
        memory_mapped(tmp_path / "a.table")


def test_what_is_written_to_a_table_opened_alone_stays(tmp_path: Path) -> None:
    trained(tmp_path)
    gc.collect()
    table = memory_mapped(tmp_path / "a.table")
    table.fill_(7.0)
    del table
    gc.collect()
    table = memory_mapped(tmp_path / "a.table")
    assert (table == 7.0).all()
    del table
    gc.collect()
    assert (Training(tmp_path).table == 7.0).all()


@pytest.mark.parametrize("replace", [lambda p: p.data.clone(), lambda p: p.data.double().float()])
def test_a_table_whose_memory_was_replaced_is_neither_stepped_nor_committed(
    tmp_path: Path, replace: Callable[[Tensor], Tensor]
) -> None:
    training = Training(tmp_path)
    training.step(2)
    training.optimizer.checkpoint()
    mapped = training.table.data
    training.table.data = replace(training.table)
    before = snapshot(training.optimizer)
    for attempt in (training.optimizer.checkpoint, training.step):
        with pytest.raises(
            RuntimeError, match=r"a parameter has other memory than when the optimizer was built: it was the ta"
        ):
            attempt()
        assert snapshot(training.optimizer) == before
    training.table.data = mapped
    del mapped, attempt, training
    gc.collect()
    assert Training(tmp_path).everything() == in_memory(2)


def test_moments_put_there_from_outside_go_into_files_wherever_they_are_used(tmp_path: Path) -> None:
    for number, options in enumerate(({"weight_decay": 0.1, "weight_decay_mode": "exact"}, {"missed_steps": "replay"})):
        table = nn.Parameter(torch.ones(20, 3))
        optimizer = SparseAdam([table], moment_dir=tmp_path / str(number), **options)
        table.grad = coo([3, 5], torch.ones(2, 3), table.shape)
        optimizer.step()
        optimizer.flush()
        before = snapshot(optimizer)
        for use in (
            optimizer.flush,
            partial(optimizer.catch_up, table, torch.tensor([3])),
            partial(optimizer.forget, table, torch.arange(0)),
            optimizer.checkpoint,
        ):
            optimizer.state[table] = copy.deepcopy(dict(optimizer.state[table]))
            use()
            assert snapshot(optimizer) == before


def test_a_dense_step_can_be_taken_back_where_rows_owe_decay(tmp_path: Path) -> None:
    def opened(place: Path) -> tuple[nn.Parameter, SparseAdam]:
        table = nn.Parameter(torch.ones(20, 3))
        decay = {"weight_decay": 0.1, "weight_decay_mode": "exact"}
        return table, SparseAdam([table], lr=0.1, dense_gradients="adam", moment_dir=place, **decay)

    table, optimizer = opened(tmp_path / "moments")
    for rows in ([3, 5], [5]):
        table.grad = coo(rows, torch.ones(len(rows), 3), table.shape)
        optimizer.step()
    optimizer.checkpoint()
    committed = snapshot(optimizer)
    table.grad = torch.ones(20, 3)
    optimizer.step()
    # What a process that is killed now leaves behind.
    shutil.copytree(tmp_path / "moments", tmp_path / "left")
    _, reopened = opened(tmp_path / "left")
    assert snapshot(reopened) == committed


def in_threads(*calls: Callable[[], Any]) -> None:
    """Make calls at once, each in a thread; raise what one of them raised."""
    with ThreadPoolExecutor(len(calls)) as threads:
        for future in [threads.submit(call) for call in calls]:
            future.result()


def test_threads_that_read_the_same_new_rows_initialize_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = nn.Embedding.from_pretrained(memory_mapped(tmp_path / "a.table", 64, 2, init=INIT), sparse=True)
    initialize_on_read(embedding)
    values, made = Init.values, []

    def slow_values(self: Init, rows: Tensor, *others: Any) -> Tensor:
        made.extend(rows.tolist())
        time.sleep(0.05)
        return values(self, rows, *others)

    monkeypatch.setattr(Init, "values", slow_values)
    ids = [torch.arange(0, 40, 2), torch.arange(0, 40)]
    in_threads(*(partial(embedding, each) for each in ids for _ in range(2)))
    assert sorted(made) == list(range(40))
    mapped = mapped_table.find(embedding.weight)
    assert mapped is not None
    assert mapped.without_values(torch.arange(64)).tolist() == list(range(40, 64))
    assert torch.equal(embedding.weight[:40], values(Init(*INIT, seed=0), torch.arange(40), 2, torch.float32))


def test_threads_take_turns_at_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that replay, steps, commits and rows forgotten."""
    training = Training(tmp_path, OPTIONS["replay"])
    training.step(3)
    training.optimizer.checkpoint()
    directory = training.optimizer._directory
    assert directory is not None
    at_work: list[str] = []

    def alone(name: str) -> Callable[..., None]:
        call = getattr(directory, name)

        def wrapper(*arguments: Any) -> None:
            assert not at_work
            at_work.append(name)
            time.sleep(0.02)
            call(*arguments)
            at_work.pop()

        return wrapper

    for name in ("before_writing", "before_forgetting", "commit"):
        monkeypatch.setattr(directory, name, alone(name))
    rows = training.optimizer.state[training.table]["rows"].clone()
    in_threads(
        partial(training.embedding, rows),
        partial(training.embedding, rows),
        training.step,
        training.optimizer.checkpoint,
        partial(training.optimizer.forget, training.table, rows[:4]),
        training.optimizer.flush,
    )
    assert not at_work


def test_moments_of_a_table_that_changed_its_dtype_are_not_committed(tmp_path: Path) -> None:
    def opened() -> tuple[nn.Parameter, SparseAdam]:
        table = nn.Parameter(torch.ones(20, 3))
        return table, SparseAdam([table], moment_dir=tmp_path / "moments")

    table, optimizer = opened()
    table.grad = coo([3, 5], torch.ones(2, 3), table.shape)
    optimizer.step()
    optimizer.checkpoint()
    committed = optimizer.state[table]["exp_avg"].clone()
    table.grad = None
    table.data = table.data.double()
    with pytest.raises(RuntimeError, match=r"have dtype torch\.float32, but the table now has dtype torch\.float64"):
        optimizer.checkpoint()
    del optimizer
    gc.collect()
    table, optimizer = opened()
    assert torch.equal(optimizer.state[table]["exp_avg"], committed)


def test_an_optimizer_whose_table_another_one_took_over_goes_no_further(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(1)
    SparseAdam([training.table], moment_dir=tmp_path / "others")
    for attempt in (training.optimizer.checkpoint, training.step):
        with pytest.raises(
            RuntimeError, match=r"is committed with other moments than those in .* since another optimizer"
        ):
            attempt()


def test_a_table_larger_than_files_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a table of [0-9]+ bytes is larger than a file can be"):
        memory_mapped(tmp_path / "a.table", 2**62, 64)
    assert not paths_of(tmp_path)


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "moments").mkdir()
    (tmp_path / "moments" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"has no commit of moments, and holds 'thesis.tex'.*new or empty directory"):
        SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=tmp_path / "moments")
    assert [path.name for path in (tmp_path / "moments").iterdir()] == ["thesis.tex"]
    with pytest.raises(NotADirectoryError):
        SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=tmp_path / "moments" / "thesis.tex")
    with pytest.raises(FileNotFoundError):
        SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=tmp_path / "no" / "moments")
    with pytest.raises(TypeError, match="moment_dir must be a path or None, got 3"):
        SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=3)  # type: ignore[arg-type]


def test_a_directory_is_locked_while_its_optimizer_lives(tmp_path: Path) -> None:
    optimizer = SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=tmp_path / "moments")
    with pytest.raises(RuntimeError, match="is open in another process, or in this one"):
        SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=tmp_path / "moments")
    del optimizer
    SparseAdam([nn.Parameter(torch.zeros(3, 2))], moment_dir=tmp_path / "moments")


def test_what_would_write_a_whole_table_or_resize_a_file_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(1)
    before = snapshot(training.optimizer)
    for _ in range(2):  # with a gradient, which is not what is wrong, and without
        with pytest.raises(RuntimeError, match="is for tables and moments in memory"):
            training.optimizer.resize(training.table, 600)
        training.optimizer.zero_grad()
    training.table.grad = torch.zeros(NUM_ROWS, DIM)
    for dense_gradients in ("error", "adam"):  # neither of which would do
        training.optimizer.param_groups[0]["dense_gradients"] = dense_gradients
        with pytest.raises(RuntimeError, match=r"is dense, and a step would write all of the table in .*a.table"):
            training.optimizer.step()
    training.optimizer.param_groups[0]["dense_gradients"] = "error"
    assert snapshot(training.optimizer) == before


def test_a_table_in_memory_is_resized_beside_one_in_a_file(tmp_path: Path) -> None:
    mapped = nn.Parameter(memory_mapped(tmp_path / "a.table", 6, 2))
    table = nn.Parameter(torch.ones(5, 2))
    optimizer = SparseAdam([mapped, table])
    optimizer.resize(table, 7)
    assert table.shape == (7, 2)
    with pytest.raises(RuntimeError, match=r"parameter 0 .*is for tables and moments in memory"):
        optimizer.resize(mapped, 8)
    assert mapped.shape == (6, 2)


def test_a_table_that_came_later_is_refused(tmp_path: Path) -> None:
    table = nn.Parameter(torch.zeros(5, 2))
    optimizer = SparseAdam([table], moment_dir=tmp_path / "moments")
    table.data = memory_mapped(tmp_path / "a.table", 5, 2)
    table.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), table.shape, check_invariants=True)
    with pytest.raises(RuntimeError, match="is not among those that this optimizer commits"):
        optimizer.step()
    assert not table.any()


def test_a_row_outside_the_table_is_refused_as_elsewhere(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(1)
    before = snapshot(training.optimizer)
    shape = training.table.shape
    training.table.grad = torch.sparse_coo_tensor([[NUM_ROWS]], torch.ones(1, DIM), shape, check_invariants=False)
    with pytest.raises(IndexError, match=f"names row {NUM_ROWS}, but its table has rows 0 to {NUM_ROWS - 1}"):
        training.optimizer.step()
    assert snapshot(training.optimizer) == before


def test_the_page_on_it_can_be_run_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "larger_than_memory.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(block.replace("100)", "25)"), names)
    names.clear()
    exec(block.replace("100)", "40)"), names)
    assert names["first"] == 20
    found = what_a_page_has(names)
    names.clear()
    (tmp_path / "undisturbed").mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    torch.manual_seed(0)
    exec(block.replace("100)", "40)"), names)
    assert found == what_a_page_has(names)


def what_a_page_has(names: Mapping[str, Any]) -> list[Any]:
    """The state of the example's table, the rows that have one, and the rest of its model."""
    state = names["optimizer"].state[names["embedding"].weight]
    return [bits(names["table"][state["rows"]]), bits(names["head"].weight), {key: bits(state[key]) for key in state}]


# The parts ----------------------------------------------------------------------------------------


def test_the_log_is_read_up_to_what_is_torn(tmp_path: Path) -> None:
    parts = [torch.arange(40, dtype=torch.uint8).view(10, 4), torch.arange(20, dtype=torch.uint8).view(10, 2)]
    records = Records(7, parts)
    log = UndoLog(str(tmp_path), 3)
    log.append(records, torch.tensor([2, 5]))
    path = Path(log_path(str(tmp_path), 3))
    first = path.stat().st_size
    log.append(records, torch.tensor([9]))
    log.close()
    content = path.read_bytes()
    before = [part.clone() for part in parts]

    def put_back(changed: bytes) -> set[int]:
        """Write all records, and tell which ones come back."""
        path.write_bytes(changed)
        for part in parts:
            part.fill_(255)
        roll_back(str(tmp_path), 3, {7: records})
        came_back = {number for number in range(10) if not bool((parts[0][number] == 255).any())}
        for part, old in zip(parts, before, strict=True):
            expected = torch.full_like(part, 255)
            expected[sorted(came_back)] = old[sorted(came_back)]
            assert torch.equal(part, expected)
        return came_back

    assert put_back(content) == put_back(content + b"undo") == {2, 5, 9}
    for length in range(len(content)):
        assert put_back(content[:length]) == (set() if length < first else {2, 5})
    for place in range(first, len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x55
        assert put_back(bytes(changed)) == {2, 5}


def test_bits_are_set_one_by_one_in_any_order() -> None:
    each = Bits(torch.zeros(Bits.num_bytes(100), dtype=torch.uint8))
    chosen = torch.tensor([99, 0, 7, 8, 9, 15, 63, 64])
    each.set(chosen[:4])
    each.set(chosen[4:])
    assert each.are_set(torch.arange(100)).nonzero()[:, 0].tolist() == sorted(chosen.tolist())


def test_moments_do_not_leave_their_files_by_growing(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(1)
    state = training.optimizer.state[training.table]
    assert isinstance(state, Moments)
    address = state["exp_avg"].data_ptr()
    training.step(10)
    assert training.optimizer.state[training.table]["exp_avg"].data_ptr() == address


# Processes that are killed, and memory that is limited --------------------------------------------


def test_killed_at_random_and_at_every_call_a_run_comes_back_to_its_last_checkpoint(tmp_path: Path) -> None:
    program = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, str(program), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = json.loads(done.stdout)
    assert sum(kills["random"].values()) >= 50
    assert all(kills["calls"][phase] > 0 for phase in ("opening", "stepping", "committing"))


LIMITED_RUN = """
import sys
import zlib
from pathlib import Path
import torch
from torch import nn
import sparseadam
from sparseadam.bench.control_group import ControlGroup

torch.set_num_threads(1)
place, group, is_first_version, num_rows, dim, rows_a_step = sys.argv[1:]
num_rows, dim, rows_a_step = int(num_rows), int(dim), int(rows_a_step)

def train(table, moment_dir):
    embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    sparseadam.initialize_on_read(embedding)
    options = {"moment_dtype": torch.uint8, "second_moment": "row", "generator": torch.Generator().manual_seed(0)}
    optimizer = sparseadam.SparseAdam(embedding.parameters(), lr=0.1, moment_dir=moment_dir, **options)
    for begin in [*range(0, len(table), rows_a_step), 0]:
        optimizer.zero_grad()
        rows = torch.arange(begin, min(begin + rows_a_step, len(table)))
        (embedding(rows) * (rows % 7)[:, None]).sum().backward()
        optimizer.step()
        if begin % (8 * rows_a_step) == 0:
            optimizer.checkpoint()
    return embedding.weight.detach()

def open_table(name, num_rows):
    return sparseadam.memory_mapped(f"{place}/{name}.table", num_rows, dim, init=("normal", 1.0))

train(open_table("small", 100), f"{place}/small")  # code is loaded
limited = ControlGroup(Path(group), is_first_version=is_first_version == "True")
limited.enter()
table = train(open_table("large", num_rows), f"{place}/large")
sums = [zlib.crc32(table[begin : begin + rows_a_step].numpy()) for begin in range(0, num_rows, rows_a_step)]
print(limited.peak_bytes())
print(*sums)
"""


def test_training_on_a_table_three_times_the_memory_that_is_allowed(tmp_path: Path) -> None:
    limit, dim, rows_a_step = 48 << 20, 256, 2048
    num_rows = 3 * limit // (4 * dim)
    try:
        with limited_memory(limit) as group:
            arguments = [tmp_path, group.path, group.is_first_version, num_rows, dim, rows_a_step]
            command = [sys.executable, "-c", LIMITED_RUN, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True)
    except BenchError as error:
        pytest.skip(str(error))
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    peak, sums = done.stdout.splitlines()
    assert peak == "None" or int(peak) <= limit
    expected = Init("normal", 1.0, 0).values(torch.arange(num_rows), dim, torch.float32)
    table = nn.Parameter(expected)
    options = {"moment_dtype": torch.uint8, "second_moment": "row", "generator": torch.Generator().manual_seed(0)}
    optimizer = SparseAdam([table], lr=0.1, **options)
    for begin in [*range(0, num_rows, rows_a_step), 0]:
        rows = torch.arange(begin, min(begin + rows_a_step, num_rows))
        values = (rows % 7)[:, None].float().expand(-1, dim)
        table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)
        optimizer.step()
    stretches = [expected[begin : begin + rows_a_step] for begin in range(0, num_rows, rows_a_step)]
    assert sums.split() == [str(zlib.crc32(stretch.numpy())) for stretch in stretches]
