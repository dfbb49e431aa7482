"""The options of the update: against the oracle, against PyTorch where it has them, and together with each other."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import BACKENDS, IS_INTERPRETED, many, num_examples
from gradients import coo_of
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleTable, read_state
from saving import through_a_file
from snapshot import bits, snapshot
from torch import Tensor
from torch.nn import Parameter

from sparseadam import SparseAdam, update
from sparseadam.update import native

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = ("bfloat16", "float16")
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")

# Each option by itself, and all that go together.
OPTION_SETS: dict[str, dict[str, Any]] = {
    "none": {},
    "maximize": {"maximize": True, "torch_eps": True},
    "decay of touched rows": {"weight_decay": 0.1},
    "exact decay": {"weight_decay": 0.1, "weight_decay_mode": "exact"},
    "amsgrad": {"amsgrad": True},
    "bias correction by row": {"bias_correction": "row"},
    "second moment by row": {"second_moment": "row"},
    "bfloat16 moments": {"moment_dtype": torch.bfloat16},
    "8-bit moments": {"moment_dtype": torch.uint8},
    "skip": {"nonfinite": "skip"},
    "error": {"nonfinite": "error"},
    "all in full precision": {
        "weight_decay": 0.1,
        "weight_decay_mode": "exact",
        "amsgrad": True,
        "bias_correction": "row",
        "second_moment": "row",
        "nonfinite": "skip",
        "maximize": True,
        "torch_eps": True,
    },
    "all in 8 bits": {
        "weight_decay": 0.1,
        "weight_decay_mode": "exact",
        "bias_correction": "row",
        "second_moment": "row",
        "moment_dtype": torch.uint8,
        "nonfinite": "skip",
    },
}
# For half-precision tables only.
ROUNDED_SETS: dict[str, dict[str, Any]] = {
    "stochastic rounding": {"stochastic_rounding": True},
    "stochastic rounding, exact decay, bfloat16 moments": {
        "stochastic_rounding": True,
        "weight_decay": 0.1,
        "weight_decay_mode": "exact",
        "bias_correction": "row",
        "moment_dtype": torch.bfloat16,
    },
    "stochastic rounding, 8-bit moments": {"stochastic_rounding": True, "moment_dtype": torch.uint8},
}
CASES = [
    *(pytest.param("float32", options, id=f"float32, {name}") for name, options in OPTION_SETS.items()),
    *(
        pytest.param("bfloat16", options, id=f"bfloat16, {name}")
        for name, options in {**OPTION_SETS, **ROUNDED_SETS}.items()
    ),
]


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Tests say for themselves when they want more: on a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def warned_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the native module is missing, that is no matter of every test here."""
    monkeypatch.setattr(update, "_warned_slow", True)


def exact_values(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Values of which hundreds can be summed exactly in float32, and each is exact in bfloat16 and float16."""
    return rng.integers(-128, 129, tuple(shape)) / 64.0


def message_of(call: Callable[[], object], *errors: type[Exception]) -> str:
    with pytest.raises(errors) as raised:
        call()
    return str(raised.value)


# Any options, against the oracle ------------------------------------------------------------------

SHAPING = ("amsgrad", "bias_correction", "second_moment", "weight_decay_mode")


@st.composite
def options_of(draw: st.DrawFn, dtype: str) -> dict[str, Any]:
    """Options that go together, for a table of ``dtype``."""
    moment_dtype = draw(st.sampled_from([None, torch.bfloat16, torch.uint8]))
    return {
        "lr": draw(st.sampled_from([1e-3, 0.1, 1.0])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.1), (0.99, 0.9)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "maximize": draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.5])),
        "weight_decay_mode": draw(st.sampled_from(["touched", "exact"])),
        "amsgrad": moment_dtype is None and draw(st.booleans()),
        "bias_correction": draw(st.sampled_from(["table", "row"])),
        "second_moment": draw(st.sampled_from(["element", "row"])),
        "moment_dtype": moment_dtype,
        "stochastic_rounding": dtype in HALVES and draw(st.booleans()),
        "nonfinite": draw(st.sampled_from(["propagate", "skip", "error"])),
        "torch_eps": draw(st.booleans()),
    }


class Case(NamedTuple):
    """A table of a run, and its group's options."""

    sparse_shape: tuple[int, ...]
    row_shape: tuple[int, ...]
    dtype: str
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sparse_shape = tuple(draw(st.lists(st.integers(1, 6), max_size=2)))
    width = draw(st.integers(1, 40) | st.sampled_from([127, 128, 129, 256, 300]))
    row_shape = draw(st.sampled_from([(), (width,), (1, width), (width, 2)]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    return Case(sparse_shape, row_shape, dtype, draw(options_of(dtype)))


class Turn(NamedTuple):
    """What happens in a step: the factor of the learning rates, and each table's lookups, or None for no gradient.

    A lookup is a number that stands for a row, whatever the number of rows. ``idle`` steps without lookups follow,
    then a flush.
    """

    lr_factor: float
    lookups: list[list[int] | None]
    bad_lookup: int | None
    idle: int
    is_flushed: bool


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Case], list[Turn], int]:
    tables = draw(st.lists(cases(), min_size=1, max_size=2))
    turn = st.builds(
        Turn,
        st.sampled_from([1.0, 0.0, 0.3]),
        st.lists(st.none() | st.lists(st.integers(0, 35), max_size=12), min_size=2, max_size=2),
        st.none() | st.integers(0, 11),
        st.sampled_from([0, 0, 0, 1, 40]),
        st.booleans(),
    )
    return tables, draw(st.lists(turn, min_size=1, max_size=8)), draw(st.integers(0, 2**32 - 1))


class Judged:
    """A table, its oracle, and the comparison of both."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        """Start both from the same values."""
        self.case, self.options = case, case.options
        self.num_rows, self.width = math.prod(case.sparse_shape), math.prod(case.row_shape)
        start = exact_values(rng, (self.num_rows, self.width))
        shape = case.sparse_shape + case.row_shape
        self.table = Parameter(torch.as_tensor(start).to(DTYPES[case.dtype]).reshape(shape))
        moment_dtype = self.options["moment_dtype"]
        self.oracle = OracleTable(
            start,
            case.dtype,
            **{name: self.options[name] for name in SHAPING},
            moment_dtype=moment_dtype and str(moment_dtype).removeprefix("torch."),
            stochastic_rounding=self.options["stochastic_rounding"],
        )

    def give_gradient(self, lookups: list[int] | None, bad: int | None, lr: float, rng: np.random.Generator) -> None:
        """Set the gradient, or none, and move the oracle on it."""
        self.table.grad = None
        if lookups is None:
            return
        rows = np.array(lookups, dtype=np.int64) % self.num_rows
        values = exact_values(rng, (len(rows), self.width))
        if bad is not None and len(rows) and self.options["nonfinite"] == "skip":
            values[bad % len(rows), bad % self.width] = (np.nan, np.inf, -np.inf)[bad % 3]
        sparse_shape = self.case.sparse_shape
        # A table of one row may have a gradient without sparse dimensions.
        indices = np.array(np.unravel_index(rows, sparse_shape)) if sparse_shape else np.zeros((0, len(rows)))
        self.table.grad = coo_of(indices, values.reshape(-1, *self.case.row_shape), self.table)
        stepped = ("betas", "eps", "maximize", "torch_eps", "weight_decay", "nonfinite")
        self.oracle.step(rows, values, lr=lr, **{name: self.options[name] for name in stepped})

    def assert_close(self, optimizer: SparseAdam) -> None:
        """Compare everything that the table and its state hold."""
        state = optimizer.state.get(self.table, {})
        parts = read_state(state, self.num_rows, self.width)
        theta = self.table.detach().double().reshape(self.num_rows, self.width).numpy()
        self.oracle.assert_step(theta, parts)
        assert state.get("step", 0) == self.oracle.t
        assert state.get("num_skipped", 0) == self.oracle.num_skipped
        if self.oracle.t == 0:
            return
        assert set(state) == self.expected_keys()
        assert sorted(state["rows"].tolist()) == np.flatnonzero(self.oracle.counts).tolist()
        if self.options["weight_decay_mode"] == "exact":
            self.oracle.assert_owed(state["log_decay"], parts["paid_log_decay"])
        self.assert_forms(state)

    def expected_keys(self) -> set[str]:
        """Return the keys of the state: the others are there only where their option is on."""
        options, oracle = self.options, self.oracle
        has_codes = options["moment_dtype"] is torch.uint8
        return {"step", "rows", "exp_avg", "exp_avg_sq"} | {
            key
            for key, is_there in {
                "max_exp_avg_sq": options["amsgrad"],
                "row_steps": options["bias_correction"] == "row",
                "log_decay": options["weight_decay_mode"] == "exact",
                "paid_log_decay": options["weight_decay_mode"] == "exact",
                "exp_avg_scale": has_codes,
                "exp_avg_sq_scale": has_codes and options["second_moment"] == "element",
                "num_skipped": oracle.num_skipped > 0,
            }.items()
            if is_there
        }

    def assert_forms(self, state: Any) -> None:
        """Compare dtypes and shapes with those of the design."""
        options, num_slots, row_shape = self.options, len(state["rows"]), self.case.row_shape
        accumulated = torch.float64 if self.case.dtype == "float64" else torch.float32
        moment_dtype = options["moment_dtype"] or accumulated
        by_row = options["second_moment"] == "row"
        second = (accumulated, ()) if by_row else (moment_dtype, row_shape)
        num_blocks = -(-self.width // 128)
        forms = {
            "rows": (torch.int64, ()),
            "exp_avg": (moment_dtype, row_shape),
            "exp_avg_sq": second,
            "max_exp_avg_sq": second,
            "row_steps": (torch.int32, ()),
            "paid_log_decay": (torch.float64, ()),
            "exp_avg_scale": (torch.float32, (num_blocks,)),
            "exp_avg_sq_scale": (torch.float32, (num_blocks,)),
        }
        for key in set(state) & set(forms):
            dtype, rest = forms[key]
            assert (key, state[key].dtype, tuple(state[key].shape)) == (key, dtype, (num_slots, *rest))
        assert type(state["step"]) is int
        assert type(state.get("num_skipped", 0)) is int
        assert type(state.get("log_decay", 0.0)) is float


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=num_examples(60))
@given(run=runs())
def test_any_options_agree_with_the_oracle_after_every_step_and_flush(
    backend: str, run: tuple[list[Case], list[Turn], int]
) -> None:
    tables, turns, seed = run
    rng = np.random.default_rng(seed)
    judged = [Judged(case, rng) for case in tables]
    generator = torch.Generator().manual_seed(seed)
    groups = [{"params": [each.table], **each.options} for each in judged]
    optimizer = SparseAdam(groups, generator=generator, backend=backend)

    for turn in turns:
        before = [(each.table.detach().clone(), each.oracle.counts.copy()) for each in judged]
        for each, group, lookups in zip(judged, optimizer.param_groups, turn.lookups, strict=False):
            group["lr"] = each.options["lr"] * turn.lr_factor
            each.give_gradient(lookups, turn.bad_lookup, group["lr"], rng)
        optimizer.step()
        for each, (old, counts) in zip(judged, before, strict=True):
            each.assert_close(optimizer)
            is_kept = torch.as_tensor(each.oracle.counts == counts)
            by_row = (each.num_rows, each.width)
            assert torch.equal(each.table.detach().reshape(by_row)[is_kept], old.reshape(by_row)[is_kept])
        for _ in range(turn.idle):
            for each in judged:
                each.give_gradient([], None, each.options["lr"] * turn.lr_factor, rng)
            optimizer.step()
        for each in judged if turn.idle else []:
            each.assert_close(optimizer)
        if turn.is_flushed:
            unflushed = [bits(each.table) for each in judged]
            optimizer.flush()
            for each, old_bits in zip(judged, unflushed, strict=True):
                each.oracle.flush()
                each.assert_close(optimizer)
                if each.options["weight_decay_mode"] == "touched":
                    assert bits(each.table) == old_bits


# Large steps: threads, backends -------------------------------------------------------------------


LARGE = many(6000)


class Large(NamedTuple):
    """A table, gradients with hot rows, rows looked up once and rows never looked up, and what came of them."""

    table: Parameter
    optimizer: SparseAdam
    grads: list[Tensor]

    def run(self, begin: int = 0, end: int | None = None) -> dict[str, Any]:
        """Step on some of the gradients, flush, and return everything as bits."""
        for grad in self.grads[begin:end]:
            self.table.grad = grad
            self.optimizer.step()
        self.optimizer.flush()
        return snapshot(self.optimizer)


@functools.cache
def large_data(dtype: str, width: int, num_lookups: int, has_bad_rows: bool) -> tuple[Tensor, list[Tensor]]:
    rng = np.random.default_rng(width)
    num_rows = 1500
    table = torch.as_tensor(rng.standard_normal((num_rows, width))).to(DTYPES[dtype])
    grads = []
    for step in range(4):
        rows = np.minimum(rng.zipf(1.2, num_lookups), num_rows - 1) * 7 % num_rows
        values = rng.standard_normal((num_lookups, width))
        if has_bad_rows:
            values[step :: num_lookups // 3, step] = np.nan
        grads.append(coo_of(rows, values, table))
    return table, grads


def large(
    dtype: str, options: dict[str, Any], backend: str, *, width: int = 40, num_lookups: int = LARGE, seed: int = 5
) -> Large:
    start, grads = large_data(dtype, width, num_lookups, options.get("nonfinite") == "skip")
    table = Parameter(start.clone())
    generator = torch.Generator().manual_seed(seed)
    return Large(table, SparseAdam([table], lr=0.1, **options, generator=generator, backend=backend), list(grads))


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_same_bits_for_any_thread_count(backend: str, dtype: str, options: dict[str, Any]) -> None:
    results = []
    # For threads of torch's own seven are as two, and take long on few cores.
    for num_threads in (1, 2, 7) if backend == "native" else (1, 2):
        torch.set_num_threads(num_threads)
        results.append(large(dtype, options, backend).run(end=2))
    assert all(result == results[0] for result in results)


@needs_native
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_same_bits_for_any_instruction_set(
    dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (13, 200):
        results = []
        for instruction_set in native._module().instruction_sets():
            monkeypatch.setattr(native, "instruction_set", lambda name=instruction_set: name)
            results.append(large(dtype, options, "native", width=width).run(end=2))
        assert all(result == results[0] for result in results)


@needs_native
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_native_agrees_with_reference_on_large_steps(dtype: str, options: dict[str, Any]) -> None:
    """Both sum in lookup order and in the same type, so only the last roundings of an update may differ.

    Where rounding is stochastic, values that differ in their last bit may be rounded apart, seldom, and no further
    than to the next number; so there a share of the elements must be equal.
    """
    ours, theirs = (large(dtype, options, backend) for backend in ("native", "reference"))
    ours.run(end=2), theirs.run(end=2)
    state, expected = (each.optimizer.state[each.table] for each in (ours, theirs))
    assert list(state) == list(expected)
    unit = torch.finfo(torch.float32).eps
    is_low = options.get("moment_dtype") is not None
    for key, part in state.items():
        other = expected[key]
        if not isinstance(part, Tensor) or key in ("rows", "row_steps"):
            assert bits(part) == bits(other), key
        elif part.dtype in (torch.float32, torch.float64) and not is_low:
            scale = other.abs().reshape(len(other), -1).amax(dim=1).reshape(-1, *[1] * (other.dim() - 1))
            assert ((part - other).abs() <= 16 * unit * scale).all(), key
        elif part.dtype in (torch.bfloat16, torch.uint8):
            assert (part == other).double().mean() > 0.98, key
    table, other = ours.table.detach().double(), theirs.table.detach().double()
    if options.get("stochastic_rounding") or is_low:
        near = (table - other).abs() <= 3 * torch.finfo(DTYPES[dtype]).eps * other.abs() + 64 * unit
        assert near.double().mean() > 0.95
    else:
        assert ((table - other).abs() <= 3 * torch.finfo(DTYPES[dtype]).eps * other.abs() + 64 * unit).all()


# Weight decay -------------------------------------------------------------------------------------


def schedule(step: int) -> float:
    """A learning rate that rises, falls and rests at zero at times."""
    return 0.0 if step % 7 == 6 else 0.05 * (1 + math.sin(step))


def zero_gradient_adamw(start: Tensor, weight_decay: float, num_steps: int) -> Tensor:
    """PyTorch's AdamW on gradients that are zero: its decay alone."""
    table = Parameter(start.clone())
    partner = torch.optim.AdamW([table], lr=1.0, weight_decay=weight_decay)
    for step in range(num_steps):
        partner.param_groups[0]["lr"] = schedule(step)
        table.grad = torch.zeros_like(table)
        partner.step()
    return table.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_decay_and_flush_are_adamws_on_rows_never_touched(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = torch.randn(12, 5, dtype=dtype)
    table = Parameter(start.clone())
    optimizer = SparseAdam([table], weight_decay=0.3, weight_decay_mode="exact", backend=backend)
    for step in range(40):
        optimizer.param_groups[0]["lr"] = schedule(step)
        rows = [step % 3, 1] if step % 4 else []
        table.grad = coo_of(rows, torch.randn(len(rows), 5, dtype=dtype), table)
        optimizer.step()
        assert torch.equal(table.detach()[3:], start[3:]), "rows that were not touched keep their bits until flush()"
    optimizer.flush()
    expected = zero_gradient_adamw(start, 0.3, 40)
    assert (expected[3:] - start[3:]).abs().min() > 1e-3
    # AdamW rounds each of its 40 products, and 1 - lr*wd.
    torch.testing.assert_close(table.detach()[3:], expected[3:], rtol=80 * torch.finfo(dtype).eps, atol=0)


def test_exact_decay_is_adamws_on_rows_touched_now_and_then(backend: str) -> None:
    """Decay does not reach the moments, so what a step takes from a row can be had from a run without decay."""
    torch.manual_seed(1)
    start = torch.randn(30, 4, dtype=torch.float64)
    decayed, plain = Parameter(start.clone()), Parameter(start.clone())
    options = {"maximize": True, "backend": backend}
    with_decay = SparseAdam([decayed], weight_decay=0.3, weight_decay_mode="exact", **options)
    without = SparseAdam([plain], **options)
    expected = start.clone()
    for step in range(60):
        rows = (torch.rand(8) ** 3 * 29).long()
        grad = coo_of(rows, torch.randn(8, 4, dtype=torch.float64), plain)
        before = plain.detach().clone()
        for table, optimizer in ((decayed, with_decay), (plain, without)):
            optimizer.param_groups[0]["lr"] = schedule(step)
            table.grad = grad
            optimizer.step()
        expected = expected * (1 - schedule(step) * 0.3) - (before - plain.detach())
        # A touched row has paid all that it owed; one that was not may owe.
        torch.testing.assert_close(decayed.detach()[rows], expected[rows], rtol=1e-12, atol=1e-13)
        if step % 25 == 24:
            with_decay.flush()
            torch.testing.assert_close(decayed.detach(), expected, rtol=1e-12, atol=1e-13)
    with_decay.flush()
    torch.testing.assert_close(decayed.detach(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["touched", "exact"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_it_is_adamw_where_every_row_is_touched_at_every_step(
    backend: str, mode: str, amsgrad: bool, maximize: bool
) -> None:
    torch.manual_seed(2)
    start = torch.randn(9, 5, dtype=torch.float64)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    shared = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": amsgrad, "maximize": maximize}
    optimizer = SparseAdam([ours], **shared, weight_decay_mode=mode, backend=backend)
    partner = torch.optim.AdamW([theirs], **shared, lr=1.0)
    for step in range(30):
        # Gradients that grow and shrink, so that the largest second moment is often not the present one.
        ours.grad = coo_of(torch.randperm(9), torch.randn(9, 5, dtype=torch.float64) * 4 ** math.cos(step / 3), ours)
        theirs.grad = ours.grad.to_dense()
        for each in (optimizer, partner):
            each.param_groups[0]["lr"] = schedule(step)
            each.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-13)
    state = optimizer.state[ours]
    if amsgrad:
        largest = partner.state[theirs]["max_exp_avg_sq"][state["rows"]]
        torch.testing.assert_close(state["max_exp_avg_sq"], largest, rtol=1e-12, atol=0)
        assert (state["max_exp_avg_sq"] > state["exp_avg_sq"] * 1.1).any(), "the maximum never mattered"


def test_decay_of_touched_rows_is_paid_once_a_touch(backend: str) -> None:
    """With gradients that are zero nothing but decay moves a row."""
    table = Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = SparseAdam([table], lr=0.5, weight_decay=0.5, backend=backend)
    for rows in ([0, 0, 1], [], [0], [2, 0]):
        table.grad = coo_of(rows, torch.zeros(len(rows), 3), table)
        optimizer.step()
    optimizer.flush()
    assert table.detach()[:, 0].tolist() == [0.75**3, 0.75, 0.75, 1.0]


def test_maximize_does_not_turn_the_decay_round(backend: str) -> None:
    for mode in ("touched", "exact"):
        table = Parameter(torch.ones(2, 3))
        optimizer = SparseAdam(
            [table], lr=0.5, weight_decay=0.5, weight_decay_mode=mode, maximize=True, backend=backend
        )
        table.grad = coo_of([0], torch.zeros(1, 3), table)
        optimizer.step()
        optimizer.flush()
        assert table.detach()[:, 0].tolist() == ([0.75, 1.0] if mode == "touched" else [0.75, 0.75])


def test_exact_decay_counts_a_step_without_lookups_and_none_without_a_gradient(backend: str) -> None:
    table = Parameter(torch.ones(2, 3))
    optimizer = SparseAdam([table], lr=0.5, weight_decay=0.5, weight_decay_mode="exact", backend=backend)
    for rows in ([0], None, [], None):
        table.grad = None if rows is None else coo_of(rows, torch.zeros(len(rows), 3), table)
        optimizer.step()
    optimizer.flush()
    assert table.detach()[:, 0].tolist() == pytest.approx([0.75**2] * 2, rel=1e-6)


def test_flushing_twice_and_before_the_first_step_changes_nothing(backend: str) -> None:
    table = Parameter(torch.randn(5, 3))
    optimizer = SparseAdam([table], lr=0.5, weight_decay=0.5, weight_decay_mode="exact", backend=backend)
    before = snapshot(optimizer)
    optimizer.flush()
    assert snapshot(optimizer) == before
    table.grad = coo_of([1, 2], torch.randn(2, 3), table)
    optimizer.step()
    optimizer.flush()
    before = snapshot(optimizer)
    optimizer.flush()
    assert snapshot(optimizer) == before


def test_a_flush_that_raises_has_changed_nothing(backend: str) -> None:
    tables = [Parameter(torch.ones(2, 3)) for _ in range(2)]
    options = {"lr": 0.5, "weight_decay": 0.5, "weight_decay_mode": "exact"}
    optimizer = SparseAdam([{"params": [table]} for table in tables], **options, backend=backend)
    for table in tables:
        table.grad = coo_of([0], torch.ones(1, 3), table)
    optimizer.step()
    optimizer.param_groups[1]["eps"] = -1.0
    before = snapshot(optimizer)
    assert "group 1" in message_of(optimizer.flush, ValueError)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("is_transposed", [False, True], ids=["contiguous", "transposed"])
def test_flush_reaches_every_row_of_a_large_table(is_transposed: bool, restore_threads: None) -> None:
    """With the backend that is chosen by itself, on two threads, and rows that have paid among those that have not."""
    torch.set_num_threads(2)
    num_rows = 150_001
    start = torch.randn(3, num_rows).t() if is_transposed else torch.randn(num_rows, 3)
    table = Parameter(start.clone(memory_format=torch.preserve_format))
    assert table.is_contiguous() != is_transposed
    optimizer = SparseAdam([table], lr=0.5, weight_decay=0.5, weight_decay_mode="exact")
    paid = torch.arange(0, num_rows, 7)
    for rows in (torch.tensor([0]), paid, torch.tensor([5])):
        table.grad = coo_of(rows, torch.zeros(len(rows), 3), table)
        optimizer.step()
    optimizer.flush()
    torch.testing.assert_close(table.detach(), start * 0.75**3, rtol=1e-6, atol=0)
    state = optimizer.state[table]
    assert state["log_decay"] == 0.0 and not state["paid_log_decay"].any()


def test_flush_tells_autograd_of_its_writes(backend: str) -> None:
    table = Parameter(torch.ones(5, 3))
    optimizer = SparseAdam([table], lr=0.5, weight_decay=0.5, weight_decay_mode="exact", backend=backend)
    table.grad = coo_of([], torch.zeros(0, 3), table)
    optimizer.step()
    loss = table.pow(2).sum()
    optimizer.flush()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Bias correction and second moments by row --------------------------------------------------------


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_a_row_first_touched_at_step_1000_moves_as_at_step_1_of_adam(backend: str, second_moment: str) -> None:
    torch.manual_seed(3)
    start = torch.randn(4, 6)
    options = {"lr": 0.1, "second_moment": second_moment, "backend": backend}
    late, early, by_table = (Parameter(start.clone()) for _ in range(3))
    optimizers = [
        SparseAdam([late], **options, bias_correction="row"),
        SparseAdam([early], **options),
        SparseAdam([by_table], **options),
    ]
    steps_before = 99 if IS_INTERPRETED else 999
    for table, optimizer in ((late, optimizers[0]), (by_table, optimizers[2])):
        for step in range(steps_before):
            rows = [0] if step % 3 else []
            table.grad = coo_of(rows, torch.ones(len(rows), 6), table)
            optimizer.step()
    for count in range(1, 13):
        grad = coo_of([2], torch.randn(1, 6), early)
        for table, optimizer in zip((late, early, by_table), optimizers, strict=True):
            table.grad = grad
            optimizer.step()
        assert torch.equal(late[2], early[2]), f"touch {count}"
        if count == 1 and second_moment == "element":
            torch.testing.assert_close((start - late.detach())[2].abs(), torch.full((6,), 0.1), rtol=1e-5, atol=0)
    assert not torch.allclose(by_table[2], early[2], rtol=1e-2), "the table's count gives another result"
    state = optimizers[0].state[late]
    touches = dict(zip(state["rows"].tolist(), state["row_steps"].tolist(), strict=True))
    assert touches == {0: steps_before // 3 * 2, 2: 12}
    assert state["step"] == steps_before + 12


def test_touches_are_counted_up_to_what_an_int32_holds(backend: str) -> None:
    """A count that went on would be negative, and its correction not a number."""
    table = Parameter(torch.zeros(2, 3))
    optimizer = SparseAdam([table], lr=0.1, bias_correction="row", backend=backend)
    for number, expected in enumerate((1, 2**31 - 1, 2**31 - 1)):
        table.grad = coo_of([1], torch.ones(1, 3), table)
        optimizer.step()
        state = optimizer.state[table]
        assert state["row_steps"].tolist() == [expected]
        # Without a correction, moments and the step that they make grow from (1-b1)*g and (1-b2)*g**2.
        m, v = 1 - 0.9 ** (number + 1), 1 - 0.999 ** (number + 1)
        move = 0.1 if number == 0 else 0.1 * m / v**0.5
        torch.testing.assert_close(table.detach()[1], torch.full((3,), -move), rtol=1e-4, atol=0)
        table.data.zero_()
        if number == 0:
            state["row_steps"].fill_(2**31 - 2)


def test_one_second_moment_a_row_is_the_mean_of_the_squares(backend: str) -> None:
    table = Parameter(torch.zeros(3, 2, 2, dtype=torch.float64))
    optimizer = SparseAdam([table], lr=1.0, betas=(0.0, 0.5), eps=1e-12, second_moment="row", backend=backend)
    table.grad = coo_of([1], torch.tensor([[[1.0, 3.0], [0.0, -2.0]]]), table)
    optimizer.step()
    state = optimizer.state[table]
    assert state["exp_avg_sq"].tolist() == [0.5 * 14 / 4]
    expected = -torch.tensor([[1.0, 3.0], [0.0, -2.0]], dtype=torch.float64) / math.sqrt(14 / 4)
    torch.testing.assert_close(table.detach()[1], expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("options", "bytes_of_slot"),
    [
        ({}, 2 * 64 * 4),
        ({"second_moment": "row"}, 64 * 4 + 4),
        ({"moment_dtype": torch.bfloat16}, 2 * 64 * 2),
        ({"moment_dtype": torch.uint8}, 2 * (64 + 4)),
        ({"moment_dtype": torch.uint8, "second_moment": "row"}, 64 + 4 + 4),
        ({"amsgrad": True}, 3 * 64 * 4),
        ({"amsgrad": True, "second_moment": "row"}, 64 * 4 + 2 * 4),
        ({"bias_correction": "row"}, 2 * 64 * 4 + 4),
        ({"weight_decay_mode": "exact"}, 2 * 64 * 4 + 8),
    ],
    ids=str,
)
def test_the_state_takes_as_many_bytes_as_its_option_needs(
    backend: str, options: dict[str, Any], bytes_of_slot: int
) -> None:
    """A slot has its row's number besides, and may be padded to some bytes; the table's index has 4 bytes a row."""
    table = Parameter(torch.zeros(500, 64))
    optimizer = SparseAdam([table], **options, backend=backend)
    table.grad = coo_of(range(400), torch.ones(400, 64), table)
    optimizer.step()
    needed = 400 * (bytes_of_slot + 8) + 500 * 4
    assert needed <= optimizer.moment_bytes() <= needed + 400 * 8
    held = sum(part.numel() * part.itemsize for part in optimizer.state[table].values() if isinstance(part, Tensor))
    assert held == 400 * (bytes_of_slot + 8)


@pytest.mark.parametrize(
    "options",
    [
        {"second_moment": "row"},
        {"bias_correction": "row"},
        {"weight_decay": 0.1, "weight_decay_mode": "exact"},
        {"moment_dtype": torch.uint8},
    ],
    ids=str,
)
def test_what_is_kept_for_whole_rows_is_not_regrouped_but_refused(backend: str, options: dict[str, Any]) -> None:
    table = Parameter(torch.ones(4, 6))
    optimizer = SparseAdam([table], **options, backend=backend)
    table.grad = coo_of([1, 3], torch.ones(2, 6), table)
    optimizer.step()
    before = snapshot(optimizer)
    table.grad = coo_of([[1, 3], [0, 5]], torch.ones(2), table)
    message = message_of(optimizer.step, RuntimeError)
    assert "group 0, parameter 0" in message
    assert snapshot(optimizer) == before
    table.grad = coo_of([1, 2], torch.ones(2, 6), table)
    optimizer.step()


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"moment_dtype": torch.bfloat16}], ids=str)
def test_moments_of_single_elements_are_regrouped_bit_for_bit(backend: str, options: dict[str, Any]) -> None:
    table = Parameter(torch.ones(4, 6))
    optimizer = SparseAdam([table], **options, backend=backend)
    table.grad = coo_of([1, 3], torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), table)
    optimizer.step()
    by_row = read_state(optimizer.state[table], 4, 6)
    assert len(by_row) == (3 if "amsgrad" in options else 2)
    for sparse_dim in (2, 0, 1):
        row_shape = table.shape[sparse_dim:]
        table.grad = coo_of(torch.zeros(sparse_dim, 0), torch.zeros(0, *row_shape), table)
        optimizer.step()
        assert optimizer.state[table]["exp_avg"].shape[1:] == row_shape
        for key, part in read_state(optimizer.state[table], 24 // row_shape.numel(), row_shape.numel()).items():
            assert np.array_equal(part.reshape(4, 6), by_row[key]), (key, sparse_dim)


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
@pytest.mark.parametrize("shape", [(5, 0), (0, 3)], ids=str)
def test_tables_without_elements_are_stepped_and_saved(
    backend: str, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    table = Parameter(torch.ones(shape))
    optimizer = SparseAdam([table], **options, backend=backend)
    for rows in ([1, 3], []) if shape[0] else ([], []):
        table.grad = coo_of(rows, torch.zeros(len(rows), shape[1]), table)
        optimizer.step()
    optimizer.flush()
    state = optimizer.state[table]
    assert state["step"] == 2
    assert all(part.double().isfinite().all() for part in state.values() if isinstance(part, Tensor))
    forms = {key: getattr(part, "shape", part) for key, part in state.items()}
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert {key: getattr(part, "shape", part) for key, part in optimizer.state[table].items()} == forms


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_number_held_in_a_tensor_is_read_at_each_step(backend: str, name: str) -> None:
    """Whoever keeps it may write to it; that it was checked once must not keep its old value."""
    held = torch.tensor(0.1)
    table = Parameter(torch.ones(2, 3))
    optimizer = SparseAdam([table], **{"lr": 0.5, "weight_decay": 0.5, name: held}, backend=backend)
    weights = 1.0
    for value in (0.1, 0.7, 0.1):
        held.fill_(value)
        table.grad = coo_of([0], torch.zeros(1, 3), table)
        optimizer.step()
        weights *= 1 - value * 0.5
        assert table[0, 0].item() == pytest.approx(weights, rel=1e-6)


# Gradients that are not finite --------------------------------------------------------------------


class Named:
    """Three tables in two groups; the last is ``target``, 20 x 4, and has been stepped on rows 0 to 9."""

    def __init__(self, backend: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Take two steps."""
        generator = torch.Generator().manual_seed(7)
        self.tables = {
            name: Parameter(torch.randn(20, 4, generator=generator).to(dtype)) for name in ("users", "items", "target")
        }
        self.target = self.tables["target"]
        items = list(self.tables.items())
        self.optimizer = SparseAdam(
            [{"params": items[:1]}, {"params": items[1:], **options}], lr=0.1, generator=generator, backend=backend
        )
        for seed in range(2):
            self.step(seed)

    def give_gradients(self, seed: int) -> None:
        """Give every table a gradient on some of rows 0 to 9."""
        generator = torch.Generator().manual_seed(seed)
        for table in self.tables.values():
            rows = torch.cat([torch.arange(10), torch.randint(10, (5,), generator=generator)])
            table.grad = coo_of(rows, torch.randn(15, 4, generator=generator), table)

    def add_lookups(self, rows: list[int], values: Any) -> None:
        """Add lookups to the target's gradient."""
        grad = self.target.grad
        assert grad is not None
        values = torch.as_tensor(values, dtype=torch.float64).to(grad.dtype)
        self.target.grad = coo_of(
            torch.cat([grad._indices()[0], torch.tensor(rows)]), torch.cat([grad._values(), values]), grad
        )

    def step(self, seed: int) -> None:
        """Take a step on finite gradients."""
        self.give_gradients(seed)
        self.optimizer.step()


NAN, INF = math.nan, math.inf
BAD_VALUES = {
    "NaN": ([3], [[1.0, NAN, 1.0, 1.0]]),
    "inf": ([3], [[INF, 1.0, 1.0, 1.0]]),
    "-inf": ([3], [[1.0, 1.0, 1.0, -INF]]),
    "inf and -inf": ([3, 3], [[1.0, INF, 1.0, 1.0], [1.0, -INF, 1.0, 1.0]]),
    "a sum that overflows": ([3, 3], [[3e38, 1.0, 1.0, 1.0], [3e38, 1.0, 1.0, 1.0]]),
    "a sum that overflows downwards": ([3, 3], [[1.0, 1.0, -2e38, 1.0], [1.0, 1.0, -3e38, 1.0]]),
}
each_bad_value = pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
LOW_PRECISION = {
    "full": {},
    "second moment by row": {"second_moment": "row"},
    "bfloat16": {"moment_dtype": torch.bfloat16},
    "8 bits": {"moment_dtype": torch.uint8},
    "exact decay": {"weight_decay": 0.1, "weight_decay_mode": "exact", "bias_correction": "row"},
}
each_precision = pytest.mark.parametrize("options", LOW_PRECISION.values(), ids=LOW_PRECISION)


@each_bad_value
@each_precision
def test_error_names_parameter_and_row_and_changes_nothing(
    backend: str, bad: tuple[list[int], Any], options: dict[str, Any]
) -> None:
    run, undisturbed = (Named(backend, nonfinite="error", **options) for _ in range(2))
    before = snapshot(run.optimizer)
    run.give_gradients(2)
    run.add_lookups(*bad)
    message = message_of(run.optimizer.step, RuntimeError)
    assert re.search(r"'target' \(group 1, parameter 1\)", message)
    assert re.search(r"\brows? 3\b", message)
    assert snapshot(run.optimizer) == before
    # Nothing is left behind: it goes on like a run in which this never happened.
    for each in (run, undisturbed):
        each.step(2)
    assert snapshot(run.optimizer) == snapshot(undisturbed.optimizer)


def test_error_names_the_first_of_many_bad_rows(backend: str) -> None:
    run = Named(backend, nonfinite="error")
    run.give_gradients(2)
    run.add_lookups([17, 5, 11], [[NAN] * 4] * 3)
    message = message_of(run.optimizer.step, RuntimeError)
    numbers = [int(number) for number in re.findall(r"\d+", message)]
    places = [numbers.index(row) for row in (5, 11, 17)]
    assert places == sorted(places)
    run.add_lookups(list(range(20)), [[INF] * 4] * 20)
    message = message_of(run.optimizer.step, RuntimeError)
    assert len(message) < 600, "not all rows of a large table can be named"


def test_error_names_the_same_rows_on_any_number_of_threads(restore_threads: None) -> None:
    data = large_data("float32", 40, 6000, has_bad_rows=False)
    rows = data[1][0]._indices()[0].unique()
    bad = rows[len(rows) // 3 :: 7]
    values = data[1][0]._values().clone()
    values[torch.isin(data[1][0]._indices()[0], bad), 7] = NAN
    messages = []
    for backend in BACKENDS:
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            table = Parameter(data[0].clone())
            table.grad = coo_of(data[1][0]._indices(), values, table)
            messages.append(message_of(SparseAdam([table], nonfinite="error", backend=backend).step, RuntimeError))
            assert torch.equal(table.detach(), data[0])
    assert set(messages) == {messages[0]}
    named = [int(number) for number in re.findall(r"\d+", messages[0])]
    assert [row for row in named if row in bad][:3] == bad[:3].tolist()


def test_error_in_the_first_step_leaves_no_state(backend: str) -> None:
    table = Parameter(torch.ones(5, 2))
    optimizer = SparseAdam([table], nonfinite="error", backend=backend)
    before = snapshot(optimizer)
    table.grad = coo_of([4, 1], [[1.0, 2.0], [NAN, 1.0]], table)
    assert re.search(r"group 0, parameter 0.*\brows? 1\b", message_of(optimizer.step, RuntimeError))
    assert snapshot(optimizer) == before


def test_error_in_one_table_keeps_another_from_skipping(backend: str) -> None:
    tables = [Parameter(torch.ones(5, 2)) for _ in range(2)]
    groups = [{"params": tables[:1], "nonfinite": "skip"}, {"params": tables[1:], "nonfinite": "error"}]
    optimizer = SparseAdam(groups, backend=backend)
    for step in range(2):
        before = snapshot(optimizer)
        for table in tables:
            table.grad = coo_of([1, 3], [[NAN, 1.0], [1.0, 1.0]], table)
        assert re.search(r"group 1, parameter 0.*\brows? 1\b", message_of(optimizer.step, RuntimeError))
        assert snapshot(optimizer) == before, f"step {step}"
        for table in tables:
            table.grad = coo_of([1, 3], torch.ones(2, 2), table)
        optimizer.step()


def test_error_names_rows_of_the_first_faulty_table_only(backend: str) -> None:
    tables = [Parameter(torch.ones(40, 2)) for _ in range(3)]
    optimizer = SparseAdam(tables, nonfinite="error", backend=backend)
    for table, bad_row in zip(tables, (None, 31, 17), strict=True):
        table.grad = coo_of([5, bad_row or 6], [[1.0, 1.0], [1.0 if bad_row is None else NAN, 1.0]], table)
    message = message_of(optimizer.step, RuntimeError)
    assert re.search(r"group 0, parameter 1.*\brows? 31\b", message)
    assert "17" not in message


@needs_native
@pytest.mark.parametrize("faulty", [0, 1], ids=["native", "reference"])
def test_error_is_found_in_a_step_that_both_backends_share_before_either_writes(faulty: int) -> None:
    """A table whose rows are not adjacent in memory goes to the reference."""
    tables = [Parameter(torch.ones(6, 4)), Parameter(torch.ones(4, 6).t())]
    optimizer = SparseAdam(tables, nonfinite="error", weight_decay=0.1, weight_decay_mode="exact")
    for is_faulty in (False, True):
        before = snapshot(optimizer)
        for index, table in enumerate(tables):
            values = torch.ones(2, 4)
            if is_faulty and index == faulty:
                values[1, 2] = INF
            table.grad = coo_of([5, 2], values, table)
        if is_faulty:
            message = message_of(optimizer.step, RuntimeError)
            assert re.search(rf"group 0, parameter {faulty}.*\brows? 2\b", message)
            assert snapshot(optimizer) == before
        else:
            optimizer.step()


def test_an_index_outside_the_table_is_found_before_a_row_is_skipped(backend: str) -> None:
    run = Named(backend, nonfinite="skip")
    before = snapshot(run.optimizer)
    run.give_gradients(2)
    run.add_lookups([3], [[NAN] * 4])
    grad = run.target.grad
    assert grad is not None
    indices = grad._indices().clone()
    indices[0, 0] = 20
    run.target.grad = torch.sparse_coo_tensor(indices, grad._values(), grad.shape, check_invariants=False)
    assert "names row 20" in message_of(run.optimizer.step, IndexError)
    assert snapshot(run.optimizer) == before


def test_a_half_precision_sum_overflows_only_where_float32_does(backend: str) -> None:
    run = Named(backend, dtype=torch.float16, nonfinite="error")
    run.give_gradients(2)
    run.add_lookups([3, 3, 3], [[6e4] * 4, [6e4] * 4, [-6e4] * 4])
    run.optimizer.step()
    run = Named(backend, dtype=torch.bfloat16, nonfinite="error")
    run.give_gradients(2)
    run.add_lookups([3, 3], [[3e38] * 4] * 2)
    assert re.search(r"\brows? 3\b", message_of(run.optimizer.step, RuntimeError))


def test_a_finite_gradient_whose_square_overflows_is_finite(backend: str) -> None:
    for mode in ("error", "skip"):
        run = Named(backend, nonfinite=mode)
        run.give_gradients(2)
        run.add_lookups([3], [[1e30] * 4])
        run.optimizer.step()
        state = run.optimizer.state[run.target]
        assert "num_skipped" not in state
        assert state["rows"][3] == 3
        assert (state["exp_avg"][3] > 1e28).all() and state["exp_avg_sq"][3].isinf().all()
        assert run.target.isfinite().all()


@each_bad_value
@each_precision
def test_skip_is_a_step_without_the_bad_rows(backend: str, bad: tuple[list[int], Any], options: dict[str, Any]) -> None:
    """Bit for bit, in all tables and all parts of the state; but for the count of what was skipped."""
    skipping, without = (Named(backend, nonfinite="skip", **options) for _ in range(2))
    rows, values = bad
    for seed, row in enumerate((3, 15, 3, 15), 2):  # a row that has moments, and one that has none
        for run in (skipping, without):
            run.give_gradients(seed)
            grad = run.target.grad
            assert grad is not None
            kept = grad._indices()[0] != row
            run.target.grad = coo_of(grad._indices()[:, kept], grad._values()[kept], grad)
        skipping.add_lookups([row] * len(rows), values)
        skipping.optimizer.step()
        without.optimizer.step()
        assert 15 not in skipping.optimizer.state[skipping.target]["rows"]
        assert skipping.optimizer.state[skipping.target]["num_skipped"] == seed - 1
        got, expected = snapshot(skipping.optimizer), snapshot(without.optimizer)
        assert got["states"][1][1].pop("num_skipped") == ("int", str(seed - 1))
        assert got == expected
    for run in (skipping, without):
        run.step(9)
        run.add_lookups([15], [[1.0] * 4])
        run.optimizer.step()
        run.optimizer.flush()
    got, expected = snapshot(skipping.optimizer), snapshot(without.optimizer)
    assert got["states"][1][1].pop("num_skipped") == ("int", "4")
    assert got == expected


def test_skip_leaves_a_step_whose_rows_are_all_bad_empty(backend: str) -> None:
    table = Parameter(torch.ones(5, 2))
    optimizer = SparseAdam([table], nonfinite="skip", backend=backend)
    for count in (1, 2):
        table.grad = coo_of([1, 4, 1], torch.full((3, 2), NAN), table)
        optimizer.step()
        state = optimizer.state[table]
        assert (state["step"], len(state["rows"]), state["num_skipped"]) == (count, 0, 2 * count)
        assert torch.equal(table.detach(), torch.ones(5, 2))


def test_the_count_of_skipped_rows_goes_on_when_gradients_name_elements(backend: str) -> None:
    table = Parameter(torch.ones(5, 2))
    optimizer = SparseAdam([table], nonfinite="skip", backend=backend)
    table.grad = coo_of([1, 4], [[NAN, 1.0], [1.0, 1.0]], table)
    optimizer.step()
    table.grad = torch.sparse_coo_tensor([[4, 0], [1, 0]], [1.0, NAN], table.shape, check_invariants=True)
    optimizer.step()
    assert optimizer.state[table]["num_skipped"] == 2


def test_skip_finds_bad_rows_in_large_steps_as_an_empty_gradient_would(backend: str) -> None:
    """Many rows, some bad, some new, on several threads."""
    torch.set_num_threads(2)
    skipping = large("float32", {"nonfinite": "skip"}, backend)
    without = large("float32", {"nonfinite": "skip"}, backend)
    num_skipped = 0
    for index, grad in enumerate(without.grads):
        rows, values = grad._indices()[0], grad._values()
        bad = rows[~values.isfinite().all(dim=1)].unique()
        num_skipped += len(bad)
        kept = ~torch.isin(rows, bad)
        without.grads[index] = coo_of(rows[kept], values[kept], grad)
    got, expected = skipping.run(), without.run()
    assert num_skipped > 3
    assert got["states"][0][0].pop("num_skipped") == ("int", str(num_skipped))
    assert got == expected


@each_bad_value
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_propagate_makes_nan_of_what_torch_makes_nan_of(
    backend: str, bad: tuple[list[int], Any], amsgrad: bool
) -> None:
    torch.manual_seed(4)
    start = torch.randn(6, 4)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    optimizer = SparseAdam([ours], lr=0.1, amsgrad=amsgrad, backend=backend)
    partner = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, amsgrad=amsgrad)
    for step in range(4):
        rows, values = (*range(6),), torch.randn(6, 4)
        if step == 1:
            rows, values = (*rows, *bad[0]), torch.cat([values, torch.tensor(bad[1])])
        ours.grad = coo_of(rows, values, ours)
        theirs.grad = ours.grad.to_dense()
        optimizer.step()
        partner.step()
        assert ours.isnan().sum() == (0 if step == 0 else 1)
        torch.testing.assert_close(ours.detach(), theirs.detach(), equal_nan=True, rtol=1e-4, atol=1e-5)
        state, expected = optimizer.state[ours], partner.state[theirs]
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
            # An infinite first moment stays so by our form of the rule and is NaN by PyTorch's, m + (1-b1)*(g-m).
            is_finite = state[key].isfinite()
            assert torch.equal(is_finite, expected[key].isfinite())
            torch.testing.assert_close(state[key][is_finite], expected[key][is_finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_a_largest_second_moment_that_is_nan_stays_so(backend: str, second_moment: str) -> None:
    """As torch.maximum says: nothing is the larger of a number and none."""
    table = Parameter(torch.ones(2, 3))
    optimizer = SparseAdam([table], amsgrad=True, second_moment=second_moment, backend=backend)
    for _ in range(2):
        table.grad = coo_of([0, 1], torch.ones(2, 3), table)
        optimizer.step()
        optimizer.state[table]["max_exp_avg_sq"][0] = NAN
    table.grad = coo_of([0, 1], torch.ones(2, 3), table)
    optimizer.step()
    largest = optimizer.state[table]["max_exp_avg_sq"]
    assert largest[0].isnan().all() and largest[1].isfinite().all()
    assert table.detach()[0].isnan().all() and table.detach()[1].isfinite().all()


# Saving -------------------------------------------------------------------------------------------


def run_unflushed(case: Large, begin: int, end: int) -> None:
    for grad in case.grads[begin:end]:
        case.table.grad = grad
        case.optimizer.step()


def resumed(first: Large, dtype: str, options: dict[str, Any], backend: str, way: str) -> Large:
    """Carry a run over to another optimizer."""
    if way in ("pickle", "deepcopy"):
        copied = pickle.loads(pickle.dumps(first.optimizer)) if way == "pickle" else copy.deepcopy(first.optimizer)
        return Large(copied.param_groups[0]["params"][0], copied, first.grads)
    saved, table = through_a_file((first.optimizer.state_dict(), first.table.detach()))
    built = {} if way == "into defaults" else options
    second = large(dtype, built, backend, width=first.table.shape[1], seed=6)
    with torch.no_grad():
        second.table.copy_(table)
    second.optimizer.load_state_dict(saved)
    return second._replace(grads=first.grads)


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_a_resumed_run_gives_the_same_bits(backend: str, dtype: str, options: dict[str, Any]) -> None:
    """Resumed after two of four steps, with decay owed; and then flushed."""
    whole, first = (large(dtype, options, backend, width=130, num_lookups=300) for _ in range(2))
    run_unflushed(first, 0, 2)
    run_unflushed(whole, 0, 4)
    unflushed = snapshot(whole.optimizer)
    whole.optimizer.flush()
    flushed = snapshot(whole.optimizer)
    for way in ("into the same options", "into defaults", "pickle", "deepcopy"):
        second = resumed(first, dtype, options, backend, way)
        assert snapshot(second.optimizer) == snapshot(first.optimizer), way
        run_unflushed(second, 2, 4)
        assert snapshot(second.optimizer) == unflushed, way
        second.optimizer.flush()
        assert snapshot(second.optimizer) == flushed, way


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"amsgrad": True}, "max_exp_avg_sq"),
        ({"bias_correction": "row"}, "row_steps"),
        ({"weight_decay": 0.1, "weight_decay_mode": "exact"}, "log_decay"),
        ({"weight_decay": 0.1, "weight_decay_mode": "exact"}, "paid_log_decay"),
        ({"moment_dtype": torch.uint8}, "exp_avg_scale"),
        ({"moment_dtype": torch.uint8}, "exp_avg_sq_scale"),
    ],
    ids=str,
)
def test_a_checkpoint_without_a_part_that_its_options_need_is_refused(
    backend: str, options: dict[str, Any], missing: str
) -> None:
    run = Named(backend, **options)
    saved = through_a_file(run.optimizer.state_dict())
    del saved["state"][2][missing]
    before = snapshot(run.optimizer)
    message = message_of(lambda: run.optimizer.load_state_dict(saved), ValueError)
    assert re.search(rf"'target' \(group 1, parameter 1\).*\b{missing}\b", message)
    assert snapshot(run.optimizer) == before


# Refusals -----------------------------------------------------------------------------------------

BAD_OPTIONS = [
    *(("weight_decay", value) for value in (-0.1, NAN, INF, "0.1", [0.1], torch.ones(2))),
    *(("weight_decay_mode", value) for value in ("exactly", "", 1, True)),
    *(("amsgrad", value) for value in (1, "yes")),
    *(("bias_correction", value) for value in ("rows", None, True)),
    *(("second_moment", value) for value in ("rows", None, True)),
    *(("moment_dtype", value) for value in (torch.float16, torch.float32, torch.int8, "bfloat16", 8)),
    *(("stochastic_rounding", value) for value in (1, None, "yes")),
    *(("dense_gradients", value) for value in ("adamw", None, True)),
    *(("nonfinite", value) for value in ("ignore", None, False)),
]
each_bad_option = pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=str)


@each_bad_option
def test_the_constructor_refuses_a_bad_option(name: str, value: Any) -> None:
    table = Parameter(torch.zeros(3, 2))
    assert name in message_of(lambda: SparseAdam([table], **{name: value}), TypeError, ValueError)
    groups = [{"params": [Parameter(torch.zeros(3, 2))]}, {"params": [table], name: value}]
    message = message_of(lambda: SparseAdam(groups), TypeError, ValueError)
    assert name in message
    assert "parameter group 1" in message


@each_bad_option
def test_a_bad_option_of_a_new_group_is_refused_and_nothing_added(name: str, value: Any) -> None:
    run = Named("reference")
    before = snapshot(run.optimizer)
    group = {"params": [("more", Parameter(torch.zeros(3, 2)))], name: value}
    message = message_of(lambda: run.optimizer.add_param_group(group), TypeError, ValueError)
    assert name in message
    assert "parameter group 2" in message
    assert snapshot(run.optimizer) == before


@each_bad_option
def test_a_bad_option_between_steps_is_refused_before_anything_is_written(backend: str, name: str, value: Any) -> None:
    run = Named(backend)
    run.give_gradients(2)
    run.optimizer.param_groups[1][name] = value
    before = snapshot(run.optimizer)
    message = message_of(run.optimizer.step, TypeError, ValueError, RuntimeError)
    assert name in message
    assert "group 1" in message
    assert snapshot(run.optimizer) == before


def test_a_checkpoint_with_a_bad_option_is_refused(backend: str) -> None:
    run = Named(backend, weight_decay=0.1, weight_decay_mode="exact")
    saved = through_a_file(run.optimizer.state_dict())
    saved["param_groups"][1]["weight_decay_mode"] = "exactly"
    before = snapshot(run.optimizer)
    assert "weight_decay_mode" in message_of(lambda: run.optimizer.load_state_dict(saved), TypeError, ValueError)
    assert snapshot(run.optimizer) == before


@pytest.mark.parametrize("generator", [7, "cpu", torch.manual_seed], ids=str)
def test_what_is_no_generator_is_refused(generator: Any) -> None:
    def build() -> SparseAdam:
        return SparseAdam([Parameter(torch.zeros(3, 2))], moment_dtype=torch.uint8, generator=generator)

    assert "generator" in message_of(build, TypeError)


@pytest.mark.parametrize("seed", [-1, 2**53, 1.5, "x", True], ids=str)
def test_a_seed_out_of_range_is_refused(backend: str, seed: Any) -> None:
    run = Named(backend, moment_dtype=torch.uint8)
    run.give_gradients(2)
    run.optimizer.param_groups[1]["seed"] = seed
    before = snapshot(run.optimizer)
    assert "seed" in message_of(run.optimizer.step, TypeError, ValueError)
    assert snapshot(run.optimizer) == before


@pytest.mark.parametrize("moment_dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_amsgrad_with_moments_of_low_precision_is_refused(moment_dtype: torch.dtype) -> None:
    """A maximum of numbers that are rounded at random only climbs."""
    table = Parameter(torch.zeros(3, 2))
    message = message_of(lambda: SparseAdam([table], amsgrad=True, moment_dtype=moment_dtype), ValueError)
    assert "amsgrad" in message and "moment_dtype" in message
    groups = [{"params": [table], "moment_dtype": moment_dtype}]
    assert "amsgrad" in message_of(lambda: SparseAdam(groups, amsgrad=True), ValueError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stochastic_rounding_of_a_table_that_is_not_rounded_is_refused(dtype: torch.dtype) -> None:
    table, half = Parameter(torch.zeros(3, 2, dtype=dtype)), Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    message = message_of(lambda: SparseAdam([half, table], stochastic_rounding=True), ValueError)
    assert "stochastic_rounding" in message and str(dtype).removeprefix("torch.") in message
    optimizer = SparseAdam([half], stochastic_rounding=True)
    message = message_of(lambda: optimizer.add_param_group({"params": [table]}), ValueError)
    assert "stochastic_rounding" in message
    assert len(optimizer.param_groups) == 1


def test_exact_decay_of_all_that_there_is_is_refused(backend: str) -> None:
    """The logarithm of what is left would be that of zero or less; touched rows may be decayed by as much."""
    run = Named(backend, weight_decay=2.0, weight_decay_mode="exact")
    for lr in (0.5, 0.6, 100.0):
        run.give_gradients(2)
        run.optimizer.param_groups[1]["lr"] = lr
        before = snapshot(run.optimizer)
        message = message_of(run.optimizer.step, ValueError)
        assert "weight_decay" in message and "lr" in message and "group 1" in message
        assert snapshot(run.optimizer) == before
    run.optimizer.param_groups[1]["lr"] = 0.499
    run.optimizer.step()
    touched = Named(backend, weight_decay=2.0)
    touched.optimizer.param_groups[1]["lr"] = 0.6
    touched.step(2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("amsgrad", True),
        ("bias_correction", "row"),
        ("second_moment", "row"),
        ("moment_dtype", torch.bfloat16),
        ("moment_dtype", torch.uint8),
        ("weight_decay_mode", "exact"),
    ],
    ids=str,
)
def test_an_option_that_shapes_the_state_stays_once_there_is_one(backend: str, name: str, value: Any) -> None:
    """In both directions; and what else the option needs, a seed, is there already."""
    rounding = {"moment_dtype": torch.bfloat16} if value is torch.uint8 else {}
    default = {"amsgrad": False, "bias_correction": "table", "second_moment": "element", "weight_decay_mode": "touched"}
    for first, second in ((default.get(name), value), (value, default.get(name))):
        run = Named(backend, **{**rounding, name: first})
        run.give_gradients(2)
        before = snapshot(run.optimizer)
        options = dict(run.optimizer.param_groups[1])
        run.optimizer.param_groups[1][name] = second
        if value in (torch.bfloat16, torch.uint8):
            run.optimizer.param_groups[1].setdefault("seed", 3)
        message = message_of(run.optimizer.step, RuntimeError, ValueError)
        assert name in message and "group 1" in message
        assert "new optimizer" in message or "state[" in message or "Set it back" in message or "load" in message
        run.optimizer.param_groups[1].clear()
        run.optimizer.param_groups[1].update(options)
        assert snapshot(run.optimizer) == before
        run.optimizer.step()


def test_an_option_that_shapes_the_state_may_change_before_there_is_one(backend: str) -> None:
    tables = [Parameter(torch.ones(4, 3)) for _ in range(2)]
    changed, built = SparseAdam([tables[0]], backend=backend), SparseAdam([tables[1]], amsgrad=True, backend=backend)
    changed.param_groups[0]["amsgrad"] = True
    for table, optimizer in zip(tables, (changed, built), strict=True):
        table.grad = coo_of([1, 2], torch.ones(2, 3), table)
        optimizer.step()
    assert snapshot(changed) == snapshot(built)


def test_other_options_may_change_between_steps(backend: str) -> None:
    run, undisturbed = Named(backend), Named(backend)
    run.optimizer.param_groups[1].update(weight_decay=0.5, nonfinite="skip", lr=0.2)
    for each in (run, undisturbed):
        each.step(2)
    assert not torch.equal(run.target, undisturbed.target)
    run.give_gradients(3)
    run.add_lookups([3], [[NAN] * 4])
    run.optimizer.step()
    assert run.optimizer.state[run.target]["num_skipped"] == 1


def test_an_optimizer_that_does_not_round_draws_nothing_and_has_no_seed() -> None:
    """Runs that were seeded before this option existed give what they gave."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    optimizer = SparseAdam([Parameter(torch.zeros(3, 2))], weight_decay=0.1, amsgrad=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert "seed" not in optimizer.param_groups[0]
    optimizer = SparseAdam([Parameter(torch.zeros(3, 2))], moment_dtype=torch.bfloat16)
    assert type(optimizer.param_groups[0]["seed"]) is int
    assert 0 <= optimizer.param_groups[0]["seed"] < 2**53


# Dense gradients ----------------------------------------------------------------------------------


def test_dense_gradients_get_adamws_update(backend: str) -> None:
    torch.manual_seed(12)
    ours, theirs = Parameter(torch.randn(7, 3)), Parameter(torch.empty(7, 3))
    theirs.data.copy_(ours.detach())
    table = Parameter(torch.randn(9, 4))
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1, "maximize": True, "amsgrad": True}
    optimizer = SparseAdam([ours, table], **options, dense_gradients="adam", backend=backend)
    partner = torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = torch.randn(7, 3)
        theirs.grad = ours.grad.clone()
        table.grad = coo_of([1, 5, 1], torch.randn(3, 4), table)
        optimizer.step()
        partner.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert optimizer.state[table]["rows"].tolist() == [1, 5]
