"""Vocabularies that change: ``resize`` and ``forget`` do what they say to their rows, and nothing to any other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import BACKENDS, many, needs_steady_steps, num_examples
from gradients import coo
from hypothesis import given, settings
from hypothesis import strategies as st
from saving import through_a_file
from snapshot import bits, snapshot, state_bits
from torch import Tensor, nn
from torch.nn import Parameter

from sparseadam import SparseAdam, _memory

NUM_ROWS = 12
MOST_ROWS = 20
# Two blocks of 8-bit codes, so that a row has two scales.
WIDTH = 130
NUM_LOOKUPS = 60

EXACT = {"weight_decay": 0.5, "weight_decay_mode": "exact"}
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {}),
    "amsgrad, decay": (torch.float64, {"amsgrad": True, "weight_decay": 0.5}),
    "exact decay": (torch.float32, EXACT),
    "row-wise": (torch.float32, {"bias_correction": "row", "second_moment": "row"}),
    "bfloat16 moments": (torch.float16, {"moment_dtype": torch.bfloat16}),
    "uint8 moments": (torch.float32, {"moment_dtype": torch.uint8}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "amsgrad, row-wise, exact decay": (
        torch.float64,
        {"amsgrad": True, "bias_correction": "row", "second_moment": "row", **EXACT},
    ),
    "all but amsgrad": (
        torch.bfloat16,
        {
            "bias_correction": "row",
            "second_moment": "row",
            "moment_dtype": torch.uint8,
            "stochastic_rounding": True,
            **EXACT,
        },
    ),
}
each_case = pytest.mark.parametrize("case", CASES)
each_memory = pytest.mark.usefixtures("memory")
# Of the same twelve rows, named by one index or by two.
FLAT, DEEP = (NUM_ROWS,), (NUM_ROWS // 3, 3)


@pytest.fixture(params=["reserved", "growing"], scope="module")
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """Moments in reserved address space, and in memory that grows by reallocation, as where that is refused."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Cannot allocate memory")

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "growing":
            patch.setattr(_memory, "ReservedArray", refuse)
        yield request.param


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Small operations gain nothing from threads, which a busy machine makes wait for each other."""
    torch.set_num_threads(1)


def owes_decay(case: str) -> bool:
    return CASES[case][1].get("weight_decay_mode") == "exact"


class Run:
    """A table ``words`` and another that nothing is done to; a step's lookups are the same in all runs."""

    def __init__(self, backend: str, case: str = "plain", sparse_shape: tuple[int, ...] = FLAT) -> None:
        """Build what has not been stepped. Beyond the first ``NUM_ROWS`` rows the table is zero."""
        dtype, options = CASES[case]
        generator = torch.Generator().manual_seed(3)
        first = torch.randn(NUM_ROWS, WIDTH, generator=generator)
        weights = torch.zeros(math.prod(sparse_shape), WIDTH)
        num_first = min(len(weights), NUM_ROWS)
        weights[:num_first] = first[:num_first]
        self.table = Parameter(weights.reshape(*sparse_shape, WIDTH).to(dtype))
        self.other = Parameter(torch.randn(7, 3, generator=generator).to(dtype))
        self.sparse_dim = len(sparse_shape)
        self.steps_taken = 0
        undecayed = {"weight_decay": 0.0, "weight_decay_mode": "touched"}
        self.optimizer = SparseAdam(
            [{"params": [("other", self.other)], **undecayed}, {"params": [("words", self.table)]}],
            lr=0.1,
            generator=torch.Generator().manual_seed(8),
            backend=backend,
            **options,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the table as it is now."""
        return math.prod(self.table.shape[: self.sparse_dim])

    @property
    def weights(self) -> Tensor:
        """The table's rows, ``[num_rows, WIDTH]``; writing to them writes the table."""
        return self.table.data.view(-1, WIDTH)

    def step(self, count: int = 1, among: Sequence[int] | None = None) -> Run:
        """Take steps, whose lookups of rows not ``among`` those given, or not in the table, are left out."""
        among = range(self.num_rows) if among is None else among
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.steps_taken)
            rows = torch.randint(MOST_ROWS, (NUM_LOOKUPS,), generator=generator)
            values = torch.randn(NUM_LOOKUPS, WIDTH, generator=generator).to(self.table.dtype)
            is_meant = torch.isin(rows, torch.tensor(list(among), dtype=torch.int64))
            self.table.grad = self.gradient(rows[is_meant], values[is_meant])
            other_values = torch.randn(4, 3, generator=generator).to(self.other.dtype)
            self.other.grad = coo(torch.randint(7, (1, 4), generator=generator), other_values, self.other.shape)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps_taken += 1
        return self

    def gradient(self, rows: Tensor, values: Tensor) -> Tensor:
        """A gradient of the table that names rows by all of its sparse dimensions."""
        indices = torch.stack(torch.unravel_index(rows, self.table.shape[: self.sparse_dim]))
        return coo(indices, values, self.table.shape)

    def forget(self, *rows: int) -> Run:
        """Forget rows of the table."""
        self.optimizer.forget(self.table, torch.tensor(rows, dtype=torch.int64))
        return self

    def resize(self, num_rows: int) -> Run:
        """Give the table as many rows, by its first dimension."""
        inner = math.prod(self.table.shape[1 : self.sparse_dim])
        assert num_rows % inner == 0
        self.optimizer.resize(self.table, num_rows // inner)
        return self

    def renew(self, *rows: int) -> Run:
        """Give rows other weights, as a new owner would."""
        for row in rows:
            self.weights[row] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(100 + row))
        return self

    def flush(self) -> Run:
        """Make all rows pay the decay they owe, if any."""
        self.optimizer.flush()
        return self

    def contents(self, among: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
        """What is kept for each row that has a slot."""
        state = self.optimizer.state.get(self.table, {"rows": torch.empty(0, dtype=torch.int64)})
        parts = {name: part for name, part in state.items() if isinstance(part, Tensor) and name != "rows"}
        slots = enumerate(state["rows"].tolist())
        return {
            row: {name: bits(part[slot]) for name, part in parts.items()}
            for slot, row in slots
            if among is None or row in among
        }

    def weight_bits(self, among: Sequence[int] | None = None) -> dict[int, Any]:
        """The weights of rows."""
        return {row: bits(self.weights[row]) for row in (range(self.num_rows) if among is None else among)}

    def rest(self) -> Any:
        """What neither call has to do with: the other table, its state, and the steps of this one."""
        return bits(self.other), state_bits(self.optimizer, self.other), self.optimizer.state[self.table]["step"]


WHICH = {"some": (7, 2, 9), "first slots": (0, 1, 2), "last slots": (10, 5), "all": tuple(range(NUM_ROWS))}
each_choice = pytest.mark.parametrize(
    ("which", "sparse_shape"),
    [("some", FLAT), ("first slots", DEEP), ("last slots", FLAT), ("all", DEEP)],
    ids=lambda value: value if isinstance(value, str) else str(value),
)


def step_with_late_rows(run: Run, among: Sequence[int] = range(NUM_ROWS)) -> Run:
    run.step(2, among=[row for row in among if row not in (5, 10)])
    return run.step(2, among=among)


@each_memory
@each_choice
@each_case
def test_forgetting_takes_all_that_is_kept_for_its_rows_and_nothing_else(
    backend: str, case: str, which: str, sparse_shape: tuple[int, ...]
) -> None:
    run = step_with_late_rows(Run(backend, case, sparse_shape))
    before, weights, rest, version = run.contents(), run.weight_bits(), run.rest(), run.table._version
    assert set(before) == set(range(NUM_ROWS))
    run.forget(*WHICH[which])
    after = run.contents()
    state = run.optimizer.state[run.table]
    if owes_decay(case):  # what they have paid is all that is kept for them
        for row in WHICH[which]:
            slot = state["rows"].tolist().index(row)
            assert after[row]["paid_log_decay"] == bits(torch.tensor(state["log_decay"], dtype=torch.float64))
            assert not any(
                part[slot].any() for name, part in state.items() if name in after[row] and name[:4] != "paid"
            )
    else:
        assert not set(WHICH[which]) & set(after)
    for row in set(before) - set(WHICH[which]):
        assert after.pop(row) == before[row]
    assert set(after) <= set(WHICH[which])
    assert (run.weight_bits(), run.rest(), run.table._version) == (weights, rest, version)


@pytest.mark.parametrize("which", WHICH)
@each_case
def test_rows_that_are_not_forgotten_go_on_as_if_none_were(backend: str, case: str, which: str) -> None:
    rest = [row for row in range(NUM_ROWS) if row not in WHICH[which]]
    forgetful, undisturbed = (step_with_late_rows(Run(backend, case)) for _ in range(2))
    forgetful.forget(*WHICH[which])
    for run in (forgetful, undisturbed):
        run.step(3)
    assert forgetful.contents(rest) == undisturbed.contents(rest)
    assert forgetful.weight_bits(rest) == undisturbed.weight_bits(rest)
    assert forgetful.rest() == undisturbed.rest()


@each_memory
@each_choice
@each_case
def test_forgotten_rows_step_as_rows_never_touched(
    backend: str, case: str, which: str, sparse_shape: tuple[int, ...]
) -> None:
    """All rows, in fact: those whose slots were moved too. Decay is paid first, so that none is owed in either run."""
    rows = WHICH[which]
    forgetful = step_with_late_rows(Run(backend, case, sparse_shape)).flush().forget(*rows).renew(*rows)
    rest = [row for row in range(NUM_ROWS) if row not in rows]
    never = step_with_late_rows(Run(backend, case, sparse_shape), among=rest).flush().renew(*rows)
    for _ in range(3):
        for run in (forgetful, never):
            run.step()
        assert forgetful.weight_bits() == never.weight_bits()
    assert set(never.contents()) == set(range(NUM_ROWS))
    assert forgetful.contents() == never.contents()
    assert forgetful.rest() == never.rest()
    remembering = step_with_late_rows(Run(backend, case, sparse_shape)).flush().renew(*rows).step(3)
    assert remembering.weight_bits(rows) != never.weight_bits(rows), "there was something to forget"


def test_forgotten_rows_owe_no_decay_of_the_steps_before(backend: str) -> None:
    """Of rows 0 (touched) and 1 (never touched) half the weights are lost in each step after; row 2 lost all along."""
    table = Parameter(torch.ones(4, 2, dtype=torch.float64))
    optimizer = SparseAdam([table], lr=0.5, weight_decay=1.0, weight_decay_mode="exact", backend=backend)

    def step(*rows: int) -> None:
        table.grad = coo([rows], torch.zeros(len(rows), 2, dtype=torch.float64), table.shape)
        optimizer.step()

    step(0, 3)
    step(3)
    step()
    optimizer.forget(table, torch.tensor([0, 1]))
    assert table[:, 0].tolist() == [0.5, 1.0, 1.0, 0.25]  # weights are left alone
    table.data[:2] = 1.0
    step()
    step(1)
    torch.testing.assert_close(table[:2, 0].tolist(), [1.0, 0.25], rtol=1e-14, atol=0)
    optimizer.flush()
    torch.testing.assert_close(table[:, 0].tolist(), [0.25, 0.25, 2.0**-5, 2.0**-5], rtol=1e-14, atol=0)
    state = optimizer.state[table]
    assert sorted(state["rows"].tolist()) == [0, 1, 3]
    assert not state["paid_log_decay"].any() and state["log_decay"] == 0.0


@pytest.mark.parametrize("case", ["plain", "uint8 moments", "all but amsgrad"])
def test_a_row_named_several_times_is_forgotten_once(backend: str, case: str) -> None:
    repeated, once = (step_with_late_rows(Run(backend, case)) for _ in range(2))
    repeated.forget(9, 2, 9, 9, 2, 7, 9)
    once.forget(2, 7, 9)
    assert snapshot(repeated.optimizer) == snapshot(once.optimizer)
    repeated.step(2)
    once.step(2)
    assert snapshot(repeated.optimizer) == snapshot(once.optimizer)


@each_case
def test_forgetting_no_rows_changes_nothing(backend: str, case: str) -> None:
    run = Run(backend, case).step(2)
    before = snapshot(run.optimizer)
    run.forget()
    assert snapshot(run.optimizer) == before
    assert snapshot(run.step(2).optimizer) == snapshot(Run(backend, case).step(4).optimizer)


@each_case
def test_forgetting_a_row_never_touched_gives_it_nothing_but_freedom_from_decay(backend: str, case: str) -> None:
    run = Run(backend, case).step(2, among=[1, 4, 8])
    before, contents, weights = snapshot(run.optimizer), run.contents(), run.weight_bits()
    run.forget(0, 11, 4, 0)
    del contents[4]
    kept = run.contents()
    assert {row: kept[row] for row in contents} == contents
    assert run.weight_bits() == weights
    assert (set(kept) - set(contents)) == ({0, 4, 11} if owes_decay(case) else set())
    assert snapshot(run.optimizer)["options"] == before["options"]


@each_case
def test_before_the_first_step_there_is_nothing_to_forget(backend: str, case: str) -> None:
    run = Run(backend, case)
    before = snapshot(run.optimizer)
    run.forget(0, 3, 3)
    assert snapshot(run.optimizer) == before
    assert len(run.optimizer.state) == 0
    assert snapshot(run.step(2).optimizer) == snapshot(Run(backend, case).step(2).optimizer)


def test_a_table_of_a_single_number_can_be_forgotten(backend: str) -> None:
    scalar = Parameter(torch.tensor(2.0))
    optimizer = SparseAdam([scalar], backend=backend)
    none = torch.tensor([0])
    optimizer.forget(scalar, none)
    assert len(optimizer.state) == 0
    scalar.grad = torch.tensor(1.0).to_sparse()
    optimizer.step()
    assert optimizer.state[scalar]["rows"].tolist() == [0]
    optimizer.forget(scalar, none)
    assert optimizer.state[scalar]["rows"].tolist() == []
    with pytest.raises(IndexError, match="row 1 is outside the 1 rows"):
        optimizer.forget(scalar, torch.tensor([1]))


def test_rows_without_elements_can_be_named_before_their_first_gradient(backend: str) -> None:
    table = Parameter(torch.zeros(5, 0))
    optimizer = SparseAdam([table], missed_steps="replay", backend=backend)
    for call in (optimizer.forget, optimizer.catch_up):
        call(table, torch.tensor([4]))
        with pytest.raises(IndexError, match="row 5 is outside the at most 5 rows"):
            call(table, torch.tensor([5]))


def test_many_rows_are_forgotten_among_many(backend: str) -> None:
    """Enough for reserved pages, and for native code to walk them in many partitions."""
    num_rows = 60_000
    generator = torch.Generator().manual_seed(0)
    table = Parameter(torch.zeros(num_rows, 4))
    optimizer = SparseAdam([table], lr=0.5, amsgrad=True, backend=backend)

    def step(rows: Tensor) -> None:
        table.grad = coo(rows[None], torch.randn(len(rows), 4, generator=generator), table.shape)
        optimizer.step()

    def by_row() -> dict[str, Tensor]:
        state = optimizer.state[table]
        order = state["rows"].argsort()
        return {name: part[order].clone() for name, part in state.items() if isinstance(part, Tensor)}

    for _ in range(3):
        step(torch.randint(num_rows, (many(20_000),), generator=generator))
    before, weights = by_row(), table.detach().clone()
    forgotten = torch.randint(num_rows, (30_000,), generator=generator)
    optimizer.forget(table, forgotten)
    after, is_left = by_row(), ~torch.isin(before["rows"], forgotten)
    assert 0 < is_left.sum() < len(is_left)
    for name, part in before.items():
        assert torch.equal(after[name], part[is_left])
    assert torch.equal(table, weights)

    step(torch.arange(num_rows))
    last = by_row()
    assert torch.equal(last["rows"], torch.arange(num_rows))
    is_new = ~torch.isin(last["rows"], after["rows"])
    grad = table.grad._values()  # type: ignore[union-attr]
    torch.testing.assert_close(last["exp_avg"][is_new], 0.1 * grad[is_new])
    torch.testing.assert_close(last["max_exp_avg_sq"][is_new], 0.001 * grad[is_new] ** 2)


# Resizing -----------------------------------------------------------------------------------------


@each_memory
@pytest.mark.parametrize(
    ("num_rows", "sparse_shape"),
    [(MOST_ROWS, FLAT), (MOST_ROWS - 2, DEEP), (NUM_ROWS, FLAT), (5, FLAT), (6, DEEP), (0, FLAT)],
    ids=str,
)
@each_case
def test_resizing_keeps_the_rows_that_stay_and_all_that_is_kept_for_them(
    backend: str, case: str, num_rows: int, sparse_shape: tuple[int, ...]
) -> None:
    run, flushed = (step_with_late_rows(Run(backend, case, sparse_shape)) for _ in range(2))
    flushed.flush()  # exact decay is paid first, other decay is none of a row's debts
    rest, shape, version = run.rest(), run.table.shape, run.table._version
    table = run.table
    run.resize(num_rows)
    assert table is run.table is run.optimizer.param_groups[1]["params"][0]
    assert table.is_leaf and table.requires_grad and table.grad is None
    assert table.shape == (num_rows * shape[0] // NUM_ROWS, *shape[1:])
    assert table.dtype is CASES[case][0] and table._version >= version
    stay = range(min(num_rows, NUM_ROWS))
    assert run.contents() == flushed.contents(stay)
    assert run.weight_bits(stay) == flushed.weight_bits(stay)
    assert not run.weights[NUM_ROWS:].any()
    assert run.rest() == rest
    rows = run.optimizer.state[table]["rows"].tolist()
    assert rows == [row for row in flushed.optimizer.state[flushed.table]["rows"].tolist() if row in stay]


@each_memory
@each_case
def test_a_table_that_grew_is_as_one_that_was_large_from_the_start(backend: str, case: str) -> None:
    grown, large = Run(backend, case), Run(backend, case, (MOST_ROWS,))
    for run in (grown, large):
        run.step(3, among=range(NUM_ROWS))
    grown.resize(MOST_ROWS)
    large.flush()
    assert snapshot(grown.optimizer) == snapshot(large.optimizer)
    for run in (grown, large):
        run.step(3)
    assert max(grown.contents()) == MOST_ROWS - 1
    assert snapshot(grown.optimizer) == snapshot(large.optimizer)
    assert grown.optimizer.moment_bytes() == large.optimizer.moment_bytes()


@each_memory
@each_case
def test_a_table_that_shrank_is_as_one_that_was_small_from_the_start(backend: str, case: str) -> None:
    shrunk, small = Run(backend, case), Run(backend, case, (5,))
    for run in (shrunk, small):
        run.step(3)
    shrunk.resize(5)
    small.flush()
    assert snapshot(shrunk.optimizer) == snapshot(small.optimizer)
    for run in (shrunk, small):
        run.step(3)
    assert snapshot(shrunk.optimizer) == snapshot(small.optimizer)
    assert shrunk.optimizer.moment_bytes() == small.optimizer.moment_bytes()


@each_memory
@pytest.mark.parametrize("sparse_shape", [FLAT, DEEP], ids=str)
@each_case
def test_rows_that_were_cut_off_come_back_as_new_ones(backend: str, case: str, sparse_shape: tuple[int, ...]) -> None:
    cut = Run(backend, case, sparse_shape).step(3)
    stay = range(6)
    never = Run(backend, case, sparse_shape).step(3, among=stay)
    cut.resize(6).resize(NUM_ROWS)
    never.flush().weights[6:] = 0
    assert snapshot(cut.optimizer) == snapshot(never.optimizer)
    cut.step(3)
    never.step(3)
    assert snapshot(cut.optimizer) == snapshot(never.optimizer)


@each_case
def test_a_table_without_state_is_resized_too(backend: str, case: str) -> None:
    grown = Run(backend, case).resize(MOST_ROWS)
    assert len(grown.optimizer.state) == 0
    large = Run(backend, case, (MOST_ROWS,))
    assert snapshot(grown.step(2).optimizer) == snapshot(large.step(2).optimizer)


def test_a_table_whose_gradient_names_no_row_is_resized(backend: str) -> None:
    """Its one row is the whole table; what is kept of its elements stays with them."""
    table = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = SparseAdam([table], backend=backend)
    for num_rows in (5, 7, 3):
        optimizer.resize(table, num_rows)
        shape = (num_rows, 2)
        no_rows = torch.zeros(0, 1, dtype=torch.int64)
        table.grad = torch.sparse_coo_tensor(no_rows, torch.ones(1, *shape), shape, check_invariants=True)
        optimizer.step()
        table.grad = None
    assert optimizer.state[table]["exp_avg"].shape == (1, 3, 2)
    torch.testing.assert_close(optimizer.state[table]["exp_avg"], torch.full((1, 3, 2), 1 - 0.9**3))


def test_a_table_of_any_strides_is_resized(backend: str) -> None:
    """It is contiguous afterwards, so that native code can take it, which it could not before."""
    torch.manual_seed(0)
    table = Parameter(torch.randn(5, 6).t())
    weights = table.detach().clone()
    optimizer = SparseAdam([table], backend="reference")
    table.grad = coo([[1, 4]], torch.ones(2, 5), table.shape)
    optimizer.step()
    stepped = table.detach().clone()
    table.grad = None
    optimizer.resize(table, 8)
    assert table.is_contiguous()
    assert torch.equal(table[:6], stepped) and not torch.equal(stepped, weights)
    resumed = SparseAdam([table], backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    table.grad = coo([[1, 7]], torch.ones(2, 5), table.shape)
    resumed.step()
    assert resumed.state[table]["rows"].tolist() == [1, 4, 7]


def test_state_takes_as_much_as_its_rows_after_each_call(backend: str) -> None:
    table = Parameter(torch.zeros(10, 3))
    optimizer = SparseAdam([table], backend=backend)
    table.grad = coo([[1, 4, 8]], torch.ones(3, 3), table.shape)
    optimizer.step()
    table.grad = None
    slot = 2 * 3 * 4 + 8
    assert optimizer.moment_bytes() == 3 * slot + 10 * 4
    optimizer.forget(table, torch.tensor([4]))
    assert optimizer.moment_bytes() == 2 * slot + 10 * 4
    optimizer.resize(table, 100)
    assert optimizer.moment_bytes() == 2 * slot + 100 * 4
    optimizer.resize(table, 8)
    assert optimizer.moment_bytes() == slot + 8 * 4


# What is refused ----------------------------------------------------------------------------------

WORDS = r"'words' \(group 1, parameter 0\)"
NO_ROWS = rf"^rows of {WORDS} must be a one-dimensional torch\.int64 tensor, got {{}}\.$"
OUTSIDE = rf"^row {{}} is outside the 12 rows of {WORDS}, numbered from 0\. Nothing was changed\. Check the row"
STRANGER = "not one of this optimizer's"


def forget(rows: Any) -> Callable[[Run], None]:
    return lambda run: run.optimizer.forget(run.table, rows)


def resize(num_rows: Any) -> Callable[[Run], None]:
    return lambda run: run.optimizer.resize(run.table, num_rows)


def resize_with_a_gradient(run: Run) -> None:
    run.table.grad = run.gradient(torch.tensor([2]), torch.ones(1, WIDTH, dtype=run.table.dtype))
    try:
        run.optimizer.resize(run.table, 20)
    finally:
        run.table.grad = None


def twin_of(table: Tensor) -> Tensor:
    return Parameter(table.detach().clone())


REFUSALS: dict[str, tuple[Callable[[Run], None], type[Exception], str]] = {
    "rows a list": (forget([2]), TypeError, NO_ROWS.format("list")),
    "rows an int": (forget(2), TypeError, NO_ROWS.format("int")),
    "rows None": (forget(None), TypeError, NO_ROWS.format("NoneType")),
    "rows an array": (forget(np.array([2])), TypeError, NO_ROWS.format("ndarray")),
    "rows int32": (forget(torch.tensor([2], dtype=torch.int32)), TypeError, NO_ROWS.format(r"torch\.int32 \[1\]")),
    "rows float": (forget(torch.tensor([2.0])), TypeError, NO_ROWS.format(r"torch\.float32 \[1\]")),
    "rows a mask": (forget(torch.ones(12, dtype=torch.bool)), TypeError, NO_ROWS.format(r"torch\.bool \[12\]")),
    "rows of two dimensions": (forget(torch.tensor([[2], [3]])), TypeError, NO_ROWS.format(r"torch\.int64 \[2, 1\]")),
    "rows of no dimension": (forget(torch.tensor(2)), TypeError, NO_ROWS.format(r"torch\.int64 \[\]")),
    "row -1": (forget(torch.tensor([-1])), IndexError, OUTSIDE.format(-1)),
    "row 12": (forget(torch.tensor([12])), IndexError, OUTSIDE.format(12)),
    "row 2**40": (forget(torch.tensor([2**40])), IndexError, OUTSIDE.format(2**40)),
    "a bad row after good ones": (forget(torch.tensor([2, 7, 12, 13])), IndexError, OUTSIDE.format(12)),
    "forget a stranger": (
        lambda run: run.optimizer.forget(twin_of(run.table), torch.tensor([2])),
        ValueError,
        rf"^a parameter of shape \[.*130\] is {STRANGER}",
    ),
    "forget a name": (
        lambda run: run.optimizer.forget("words", torch.tensor([2])),  # type: ignore[arg-type]
        ValueError,
        f"^str is {STRANGER}",
    ),
    "num_rows a float": (resize(20.0), TypeError, r"^num_rows must be an int, got 20\.0\.$"),
    "num_rows a bool": (resize(True), TypeError, r"^num_rows must be an int, got True\.$"),
    "num_rows None": (resize(None), TypeError, r"^num_rows must be an int, got None\.$"),
    "num_rows a shape": (resize((20, WIDTH)), TypeError, r"^num_rows must be an int, got \(20, 130\)\.$"),
    "num_rows a tensor": (resize(torch.tensor(20)), TypeError, r"^num_rows must be an int, got tensor\(20\)\.$"),
    "num_rows negative": (resize(-1), ValueError, r"^Invalid num_rows: -1\. It must be at least 0\.$"),
    "with a gradient": (resize_with_a_gradient, RuntimeError, rf"^{WORDS} has a gradient.*Call zero_grad\(\) before"),
    "resize a stranger": (
        lambda run: run.optimizer.resize(twin_of(run.table), 20),
        ValueError,
        rf"^a parameter of shape \[.*130\] is {STRANGER}",
    ),
    "resize None": (
        lambda run: run.optimizer.resize(None, 20),  # type: ignore[arg-type]
        ValueError,
        f"^NoneType is {STRANGER}",
    ),
}


@pytest.mark.parametrize(("case", "sparse_shape"), [("plain", FLAT), ("exact decay", DEEP)], ids=str)
@pytest.mark.parametrize(("call", "error", "pattern"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_changes_nothing(
    backend: str,
    call: Callable[[Run], None],
    error: type[Exception],
    pattern: str,
    case: str,
    sparse_shape: tuple[int, ...],
) -> None:
    run = Run(backend, case, sparse_shape).step(2)
    before, version = snapshot(run.optimizer), run.table._version
    with pytest.raises(error, match=pattern) as raised:
        call(run)
    assert type(raised.value) is error
    assert snapshot(run.optimizer) == before
    assert run.table._version == version
    assert snapshot(run.step(2).optimizer) == snapshot(Run(backend, case, sparse_shape).step(4).optimizer)


@pytest.mark.parametrize(
    "call", [forget(torch.tensor([-1])), forget(torch.tensor([2**40])), forget([2]), resize(-1)], ids=range(4)
)
def test_what_is_refused_before_the_first_step_leaves_no_state(backend: str, call: Callable[[Run], None]) -> None:
    run = Run(backend)
    with pytest.raises((IndexError, TypeError, ValueError)):
        call(run)
    assert len(run.optimizer.state) == 0


def test_a_table_without_dimensions_has_no_rows_to_add(backend: str) -> None:
    scalar = Parameter(torch.tensor(2.0))
    optimizer = SparseAdam([scalar], backend=backend)
    with pytest.raises(ValueError, match=r"^group 0, parameter 0 has no dimensions, so no rows to add"):
        optimizer.resize(scalar, 2)
    assert scalar.shape == () and scalar.item() == 2.0


CALLS: dict[str, Callable[[Run], None]] = {
    "forget": forget(torch.tensor([2])),
    "resize": resize(20),
    "flush": lambda run: run.optimizer.flush(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_moments_of_another_shape_or_option_are_refused_as_a_step_refuses_them(
    backend: str, call: Callable[[Run], None]
) -> None:
    run = Run(backend, "exact decay").step(2)
    weights = run.table.data
    run.table.data = weights[:9].clone()
    before = snapshot(run.optimizer)
    with pytest.raises(
        RuntimeError, match=rf"moments of {WORDS} were made for .*\[12, 130\].* now has shape \[9, 130\]"
    ):
        call(run)
    assert snapshot(run.optimizer)["tables"] == before["tables"]
    assert run.contents() == Run(backend, "exact decay").step(2).contents()
    run.table.data = weights
    run.optimizer.param_groups[1]["amsgrad"] = True
    before = snapshot(run.optimizer)
    with pytest.raises(RuntimeError, match=r"^amsgrad of .* changed after its moments were made"):
        call(run)
    assert snapshot(run.optimizer) == before


@each_case
@pytest.mark.parametrize("name", CALLS)
def test_a_state_put_back_as_a_plain_dict_is_read(backend: str, case: str, name: str) -> None:
    """As code leaves it that moves states between devices. Once, both calls passed over it, and rows kept it all."""
    run, untouched = Run(backend, case).step(2), Run(backend, case).step(2)
    run.optimizer.state[run.table] = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in run.optimizer.state[run.table].items()
    }
    for each in (run, untouched):
        CALLS[name](each)
    assert snapshot(run.optimizer) == snapshot(untouched.optimizer)
    assert snapshot(run.step(2).optimizer) == snapshot(untouched.step(2).optimizer)


# What goes on afterwards --------------------------------------------------------------------------


def grow_and_forget(run: Run) -> None:
    run.resize(MOST_ROWS - 2).forget(3, 8, 0).renew(3, 8, 0, 15)


def forget_and_shrink(run: Run) -> None:
    run.forget(3, 8, 0, 11).resize(9)


CHANGES = [grow_and_forget, forget_and_shrink]


def copy_by_file(run: Run, backend: str, case: str, sparse_shape: tuple[int, ...]) -> Run:
    resumed = Run(backend, case, run.table.shape[: run.sparse_dim])
    resumed.table.data.copy_(run.table.detach())
    resumed.other.data.copy_(run.other.detach())
    resumed.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    resumed.steps_taken = run.steps_taken
    return resumed


@each_memory
@pytest.mark.parametrize(
    ("way", "change", "sparse_shape"),
    [("file", grow_and_forget, FLAT), ("file", forget_and_shrink, DEEP), ("deepcopy", grow_and_forget, DEEP)],
    ids=str,
)
@each_case
def test_a_run_resumed_after_both_gives_the_same_bits(
    backend: str, case: str, way: str, change: Callable[[Run], None], sparse_shape: tuple[int, ...]
) -> None:
    run = Run(backend, case, sparse_shape).step(3)
    change(run)
    run.step(1, among=[0, 2, 4])
    resumed = copy_by_file(run, backend, case, sparse_shape) if way == "file" else copy.deepcopy(run)
    assert snapshot(resumed.optimizer) == snapshot(run.optimizer)
    for _ in range(3):
        run.step()
        resumed.step()
        assert snapshot(resumed.optimizer) == snapshot(run.optimizer)


def count_general_steps(run: Run) -> list[None]:
    """Return a list that gets longer with every step that goes the general way."""
    calls: list[None] = []
    general = run.optimizer._step_generally

    def counted(options: Any) -> None:
        calls.append(None)
        general(options)

    run.optimizer._step_generally = counted  # type: ignore[method-assign]
    return calls


@needs_steady_steps
@pytest.mark.parametrize("change", [*CHANGES, Run.flush, lambda run: run.resize(NUM_ROWS), lambda run: run.forget(4)])
@each_case
def test_steps_are_steady_again_after_one(case: str, change: Callable[[Run], None], memory: str) -> None:
    """A table is looked at anew once, if at all; what is not reserved may grow at each step, and is each time."""
    steady, general = Run("native", case).step(3), Run("native", case).step(3)
    calls = count_general_steps(steady)
    steady.step()
    general.step()
    assert not calls
    change(steady)
    change(general)
    for num_steps in range(1, 4):
        general.optimizer.__dict__["_steady_step"] = None
        steady.step()
        general.step()
        assert snapshot(steady.optimizer) == snapshot(general.optimizer)
        assert len(calls) <= (1 if memory == "reserved" else num_steps)


@each_case
def test_backends_agree_after_both(case: str) -> None:
    """As closely as over the same steps without either: what is rounded at random may fall to either side."""
    if len(BACKENDS) < 2:
        pytest.skip("this installation has one backend")
    runs = [Run(backend, case).step(3) for backend in BACKENDS]
    for run in runs:
        grow_and_forget(run)
        run.step(3)
    first, second = runs
    assert first.optimizer.state[first.table]["rows"].tolist() == second.optimizer.state[second.table]["rows"].tolist()
    assert first.optimizer.state[first.table]["step"] == second.optimizer.state[second.table]["step"]
    dtype, options = CASES[case]
    is_rounded = dtype in (torch.bfloat16, torch.float16) or "moment_dtype" in options
    torch.testing.assert_close(
        first.weights.double(), second.weights.double(), **({"rtol": 0.1, "atol": 0.1} if is_rounded else {})
    )


# In a model ---------------------------------------------------------------------------------------


class Reader(nn.Module):
    """An embedding and a loss that only its rows lessen."""

    def __init__(self, num_words: int, dtype: torch.dtype) -> None:
        """Start from zero, as new words do."""
        super().__init__()
        self.words = nn.Embedding(num_words, 4, sparse=True, dtype=dtype)
        nn.init.zeros_(self.words.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return how far the words are from where they shall go, which is another place for each."""
        goals = torch.arange(4) + ids[:, None]
        return (self.words(ids) - goals).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_embedding_goes_on_training_with_new_words(backend: str, dtype: torch.dtype) -> None:
    grown, large = Reader(5, dtype), Reader(9, dtype)
    optimizers = [SparseAdam(model.parameters(), lr=0.1, backend=backend) for model in (grown, large)]
    hooked: list[torch.Size] = []
    grown.words.weight.register_post_accumulate_grad_hook(lambda weight: hooked.append(weight.grad.shape))

    def train(ids: list[int], num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            for model, optimizer in zip((grown, large), optimizers, strict=True):
                optimizer.zero_grad()
                loss = model(torch.tensor(ids))
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        return losses

    train([0, 3, 3, 4], 4)
    optimizers[0].zero_grad()
    optimizers[0].resize(grown.words.weight, 9)
    grown.words.num_embeddings = 9
    losses = train([8, 3, 5, 1], 20)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(grown.words.weight, large.words.weight)
    assert hooked == [torch.Size([5, 4])] * 4 + [torch.Size([9, 4])] * 20
    assert optimizers[0].state[grown.words.weight]["rows"].tolist() == [0, 3, 4, 1, 5, 8]
    assert repr(grown.words) == "Embedding(9, 4, sparse=True)"
    clone = Reader(9, dtype)
    clone.load_state_dict(through_a_file(grown.state_dict()))
    assert torch.equal(clone.words.weight, large.words.weight)


@pytest.mark.parametrize("num_rows", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_loss_of_before_that_is_still_held_does_not_stop_training(
    backend: str, dtype: torch.dtype, num_rows: int
) -> None:
    """Autograd keeps a parameter's shape with a live graph: new gradients were refused as of a wrong shape by it."""
    model = Reader(5, dtype)
    optimizer = SparseAdam(model.parameters(), lr=0.1, backend=backend)
    held = model(torch.tensor([0, 2]))
    held.backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.resize(model.words.weight, num_rows)
    loss = model(torch.tensor([0, num_rows - 1]))
    loss.backward()
    optimizer.step()
    assert optimizer.state[model.words.weight]["step"] == 2
    assert model(torch.tensor([0, num_rows - 1])) < loss
    assert held.grad_fn is not None


def test_a_gradient_by_a_graph_of_before_is_refused(backend: str) -> None:
    model = Reader(5, torch.float32)
    optimizer = SparseAdam(model.parameters(), lr=0.1, backend=backend)
    stale = model(torch.tensor([0, 4]))
    optimizer.resize(model.words.weight, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="shape"):
        stale.backward()
        optimizer.step()
    assert snapshot(optimizer) == before


# Against a dict of rows ---------------------------------------------------------------------------

Array = npt.NDArray[np.float64]
BETAS, EPS, WEIGHT_DECAY = (0.5, 0.75), 1e-3, 0.25
SHAPE = np.array([1.0, -0.5, 2.0])


class RowModel:
    """The rule, written out for a row at a time, in float64; what a row owes is a product, not a sum of logarithms."""

    def __init__(self, table: Array, options: dict[str, Any]) -> None:
        """Start with no moments."""
        self.weights: list[Array] = list(table)
        self.owed = [1.0] * len(table)
        self.kept: dict[int, dict[str, Any]] = {}
        self.options = options
        self.is_exact = options.get("weight_decay_mode") == "exact"
        self.t = 0

    def step(self, lookups: list[tuple[int, Array]], lr: float) -> None:
        """Update the rows that are looked up."""
        self.t += 1
        decay = 1 - lr * self.options.get("weight_decay", 0.0)
        self.owed = [factor * decay if self.is_exact else 1.0 for factor in self.owed]
        summed: dict[int, Array] = {}
        for row, values in lookups:
            summed[row] = summed.get(row, np.zeros(len(SHAPE))) + values
        for row, grad in summed.items():
            self.update(row, grad, lr, self.owed[row] if self.is_exact else decay)
            self.owed[row] = 1.0

    def update(self, row: int, grad: Array, lr: float, decay: float) -> None:
        """Move one row."""
        (b1, b2), by_row = BETAS, self.options.get("second_moment") == "row"
        kept = self.kept.setdefault(row, self.nothing())
        square = np.mean(grad**2) if by_row else grad**2
        kept["exp_avg"] = b1 * kept["exp_avg"] + (1 - b1) * grad
        kept["exp_avg_sq"] = b2 * kept["exp_avg_sq"] + (1 - b2) * square
        kept["max_exp_avg_sq"] = np.maximum(kept["max_exp_avg_sq"], kept["exp_avg_sq"])
        kept["row_steps"] += 1
        n = kept["row_steps"] if self.options.get("bias_correction") == "row" else self.t
        second = kept["max_exp_avg_sq" if self.options.get("amsgrad") else "exp_avg_sq"]
        change = lr * kept["exp_avg"] / (1 - b1**n) / (np.sqrt(second / (1 - b2**n)) + EPS)
        self.weights[row] = decay * self.weights[row] - change

    @staticmethod
    def nothing() -> dict[str, Any]:
        """What is kept for a row at first."""
        return {"exp_avg": np.zeros(len(SHAPE)), "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0, "row_steps": 0}

    def flush(self) -> None:
        """Make all rows pay."""
        self.weights = [factor * row for factor, row in zip(self.owed, self.weights, strict=True)]
        self.owed = [1.0] * len(self.weights)

    def resize(self, num_rows: int) -> None:
        """Cut rows off, or add zero ones."""
        self.flush()
        missing = max(num_rows - len(self.weights), 0)
        self.weights = self.weights[:num_rows] + [np.zeros(len(SHAPE))] * missing
        self.owed = [1.0] * num_rows
        self.kept = {row: kept for row, kept in self.kept.items() if row < num_rows}

    def forget(self, rows: Sequence[int]) -> None:
        """Take all that is kept for rows; where decay may be owed, that they owe none is kept."""
        for row in rows:
            self.kept.pop(row, None)
            self.owed[row] = 1.0
            if self.is_exact and self.t > 0:
                self.kept[row] = self.nothing()

    def assert_holds(self, optimizer: SparseAdam, table: Tensor) -> None:
        """Compare all that is there."""
        close = {"rtol": 1e-9, "atol": 1e-12}
        want = np.array(self.weights).reshape(len(self.weights), len(SHAPE))
        np.testing.assert_allclose(table.detach().reshape(want.shape).numpy(), want, **close)
        if self.t == 0:
            assert len(optimizer.state) == 0
            return
        state = optimizer.state[table]
        assert state["step"] == self.t
        rows = state["rows"].tolist()
        assert sorted(rows) == sorted(self.kept)
        for slot, row in enumerate(rows):
            for name, value in self.kept[row].items():
                if name in state:
                    np.testing.assert_allclose(
                        state[name][slot].numpy(), np.broadcast_to(value, state[name][slot].shape)
                    )


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "touched decay, amsgrad": {"weight_decay": WEIGHT_DECAY, "amsgrad": True},
    "row-wise": {"bias_correction": "row", "second_moment": "row"},
    "exact decay": {"weight_decay": WEIGHT_DECAY, "weight_decay_mode": "exact"},
    "exact decay, row-wise, amsgrad": {
        "weight_decay": WEIGHT_DECAY,
        "weight_decay_mode": "exact",
        "bias_correction": "row",
        "second_moment": "row",
        "amsgrad": True,
    },
}
some_rows = st.integers(0, 2**10)
steps = st.tuples(
    st.just("step"),
    st.lists(st.tuples(some_rows, st.integers(-8, 8)), max_size=10),
    st.sampled_from([0.5, 0.125, 0.0]),
)
calls = st.one_of(
    steps,
    steps,
    st.tuples(st.just("forget"), st.lists(some_rows, max_size=6)),
    st.tuples(st.just("resize"), st.integers(0, 8)),
    st.just(("flush",)),
)


@each_memory
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=num_examples(100))
@given(
    rule=st.sampled_from(sorted(RULES)),
    num_rows=st.integers(0, 8),
    inner=st.sampled_from([(), (2,)]),
    sequence=st.lists(calls, max_size=14),
)
def test_any_sequence_agrees_with_rows_kept_one_by_one(
    backend: str, rule: str, num_rows: int, inner: tuple[int, ...], sequence: list[Any]
) -> None:
    """``inner`` is a second dimension that names rows; rows are drawn at large and taken modulo those of the table."""
    start = np.linspace(-2, 2, num_rows * math.prod(inner) * len(SHAPE)).reshape(-1, len(SHAPE))
    table = Parameter(torch.from_numpy(start.copy()).reshape(num_rows, *inner, len(SHAPE)))
    optimizer = SparseAdam([table], betas=BETAS, eps=EPS, backend=backend, **RULES[rule])
    model = RowModel(start, RULES[rule])
    for name, *arguments in sequence:
        num_now = len(model.weights)
        if name == "step":
            lookups = [(row % num_now, value * SHAPE) for row, value in arguments[0] if num_now > 0]
            rows = torch.tensor([row for row, _ in lookups], dtype=torch.int64)
            values = torch.from_numpy(np.array([value for _, value in lookups]).reshape(-1, len(SHAPE)))
            sparse_shape = table.shape[: 1 + len(inner)]
            indices = (
                torch.stack(torch.unravel_index(rows, sparse_shape)) if num_now else rows.expand(len(sparse_shape), 0)
            )
            table.grad = coo(indices, values, table.shape)
            optimizer.param_groups[0]["lr"] = arguments[1]
            optimizer.step()
            table.grad = None
            model.step(lookups, arguments[1])
        elif name == "forget":
            forgotten = [row % num_now for row in arguments[0] if num_now > 0]
            optimizer.forget(table, torch.tensor(forgotten, dtype=torch.int64))
            model.forget(forgotten)
        elif name == "resize":
            optimizer.resize(table, arguments[0])
            model.resize(arguments[0] * math.prod(inner))
        else:
            optimizer.flush()
            model.flush()
        model.assert_holds(optimizer, table)
