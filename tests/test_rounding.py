"""Rounding that is right on average: moments of low precision, and half-precision tables.

The grids are the oracle's, written from the formats. Whatever is random here starts from a fixed seed, so a test gives
the same numbers each time; five standard errors are what a mean may be off, which a right one exceeds once in a
million.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from gradients import coo_of
from oracle import (
    EXP_AVG_SHARES,
    EXP_AVG_SQ_SHARES,
    Array,
    OracleTable,
    block_maxima,
    float_neighbours,
    read_state,
    spacing,
)
from saving import through_a_file
from snapshot import bits, snapshot
from torch import Tensor
from torch.nn import Parameter

from sparseadam import SparseAdam, update

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOW = {"bfloat16": torch.bfloat16, "uint8": torch.uint8}
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")
each_moment_dtype = pytest.mark.parametrize("moment_dtype", LOW.values(), ids=LOW)
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
SIGMAS = 5


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread unless a test wants more; and a missing native module is no matter of every test here."""
    torch.set_num_threads(1)
    monkeypatch.setattr(update, "_warned_slow", True)
    yield


def optimizer_of(*tables: Tensor, seed: int = 1, **options: Any) -> SparseAdam:
    return SparseAdam(list(tables), generator=torch.Generator().manual_seed(seed), **options)


def step_all_rows(optimizer: SparseAdam, table: Tensor, gradient: Any) -> None:
    """Take a step on which every row has the same gradient ``[width]``, or one each ``[num_rows, width]``."""
    values = torch.as_tensor(gradient).to(table.dtype).expand(table.shape)
    table.grad = coo_of(np.arange(len(table)), values, table)
    optimizer.step()


def moments_of(optimizer: SparseAdam, table: Tensor) -> tuple[Array, Array]:
    """Both moments as numbers, by row."""
    parts = read_state(optimizer.state[table], *table.shape)
    return parts["exp_avg"], parts["exp_avg_sq"]


def assert_mean(stored: Array, exact: Array, what: str) -> None:
    """Each column's mean is its exact value's ``[width]``, but for chance and float32's last bit."""
    error = abs(stored.mean(axis=0) - exact)
    allowed = SIGMAS * stored.std(axis=0) / math.sqrt(len(stored)) + 2.0**-20 * abs(exact)
    assert (error <= allowed).all(), f"{what}: off by {(error / allowed).max() * SIGMAS:.1f} standard errors"


# Moments: the neighbours --------------------------------------------------------------------------


@each_moment_dtype
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 5, 127, 128, 129, 300])
def test_moments_are_stored_as_one_of_two_neighbours(
    backend: str, width: int, dtype: torch.dtype, moment_dtype: torch.dtype
) -> None:
    """Over twelve powers of ten within a row, so that codes of all exponents are met, and several steps."""
    rng = np.random.default_rng(width)
    num_rows, name = 30, str(dtype).removeprefix("torch.")
    start = rng.integers(-128, 129, (num_rows, width)) / 64.0
    table = Parameter(torch.as_tensor(start).to(dtype))
    oracle = OracleTable(start, name, moment_dtype=str(moment_dtype).removeprefix("torch."))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    optimizer = optimizer_of(table, **options, moment_dtype=moment_dtype, backend=backend)
    for step in range(4):
        rows = np.flatnonzero(rng.random(num_rows) < 0.7)
        # Powers of two times few bits: exact in every dtype, float16's subnormals included.
        values = rng.integers(-8, 9, (len(rows), width)) * 2.0 ** rng.integers(-20, 8, (len(rows), width))
        table.grad = coo_of(rows, values, table)
        optimizer.step()
        oracle.step(rows, values, **options)
        oracle.assert_step(table.detach().double().numpy(), read_state(optimizer.state[table], num_rows, width))
        assert optimizer.state[table]["step"] == step + 1


@each_moment_dtype
def test_both_neighbours_are_met(backend: str, moment_dtype: torch.dtype) -> None:
    """Rounding to nearest gives neighbours as well, and always the same."""
    table = Parameter(torch.zeros(500, 6))
    optimizer = optimizer_of(table, moment_dtype=moment_dtype, backend=backend)
    step_all_rows(optimizer, table, [1.0, 0.29, -0.29, 0.01, 0.7, 1e-4])
    for moment in moments_of(optimizer, table):
        assert [len(np.unique(column)) for column in moment.T[1:]] == [2] * 5


def test_a_value_on_the_grid_keeps_its_bits(backend: str) -> None:
    """What needs no rounding is not rounded, whatever the random bits: bfloat16 first."""
    table = Parameter(torch.zeros(300, 4))
    optimizer = optimizer_of(table, betas=(0.5, 0.75), moment_dtype=torch.bfloat16, backend=backend)
    gradient = [1.0, -0.75, 2.0**-40, 96.0]
    step_all_rows(optimizer, table, gradient)
    m, v = moments_of(optimizer, table)
    assert (m == np.array(gradient) * 0.5).all()
    assert (v == np.array(gradient) ** 2 * 0.25).all()


def test_the_largest_of_a_block_is_its_scale(backend: str) -> None:
    table = Parameter(torch.zeros(300, 4))
    optimizer = optimizer_of(table, betas=(0.5, 0.75), moment_dtype=torch.uint8, backend=backend)
    step_all_rows(optimizer, table, [1.0, -3.0, 0.5, 0.0])
    state = optimizer.state[table]
    assert (state["exp_avg_scale"] == 1.5).all()
    assert (state["exp_avg_sq_scale"] == 2.25).all()
    m, v = moments_of(optimizer, table)
    # The reciprocal of the scale is rounded, and so one in a million of the largest may fall one code short.
    assert (m[:, 1] == -1.5).mean() > 0.99
    assert (v[:, 1] == 2.25).mean() > 0.99
    assert (m[:, 3] == 0).all() and (v[:, 3] == 0).all()


def test_codes_are_as_the_design_lays_them_out(backend: str) -> None:
    """Written over by hand: a decoded code is what the next step starts from."""
    table = Parameter(torch.zeros(1, 128, dtype=torch.float64))
    for codes_of_exp_avg in (True, False):
        optimizer = optimizer_of(table, betas=(0.5, 0.5), moment_dtype=torch.uint8, backend=backend)
        for half in (0, 128):
            step_all_rows(optimizer, table, torch.ones(128))
            codes = torch.arange(half, half + 128).to(torch.uint8)[None]
            state = optimizer.state[table]
            name = "exp_avg" if codes_of_exp_avg else "exp_avg_sq"
            state[name] = codes
            state[f"{name}_scale"] = torch.full((1, 1), 8.0)
            expected = read_state(state, 1, 128)[name] * 0.5
            step_all_rows(optimizer, table, torch.zeros(128))
            got = read_state(state, 1, 128)[name]
            shares = EXP_AVG_SHARES if codes_of_exp_avg else EXP_AVG_SQ_SHARES
            scale = block_maxima(expected)
            np.testing.assert_allclose(read_state(state, 1, 128)[f"{name}_scale"], scale, rtol=1e-6)
            # To half the scale with half the value is the same code, unless rounding moved it to the next.
            assert (abs(got - expected) <= np.diff(shares).max() * scale).all()
            is_large = abs(expected) > scale * shares[9]
            assert (abs(got - expected)[is_large] <= abs(expected)[is_large] / 8).all()
            assert (np.sign(got) == np.sign(expected))[is_large].all()


# Moments: right on average ------------------------------------------------------------------------


@each_moment_dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_moments_are_right_on_average(backend: str, dtype: torch.dtype, moment_dtype: torch.dtype) -> None:
    """Through ten steps: an expectation is passed on by a moment's rule, which is linear in what was stored.

    The smallest are below the smallest normal code of first moments and above that of second moments.
    """
    table = Parameter(torch.zeros(4000, 8, dtype=dtype))
    gradient = torch.tensor([1.0, 0.61, -0.33, 0.1, -0.017, 2e-3, 1e-4, 3e-5]).to(dtype)
    betas = (0.9, 0.99)
    optimizer = optimizer_of(table, betas=betas, moment_dtype=moment_dtype, backend=backend)
    g = gradient.double().numpy()
    m, v = np.zeros(8), np.zeros(8)
    for step in range(1, 11):
        factor = -0.5 if step % 3 == 0 else 1.0
        step_all_rows(optimizer, table, gradient * factor)
        m = betas[0] * m + (1 - betas[0]) * g * factor
        v = betas[1] * v + (1 - betas[1]) * (g * factor) ** 2
        stored = moments_of(optimizer, table)
        assert_mean(stored[0], m, f"exp_avg at step {step}")
        assert_mean(stored[1], v, f"exp_avg_sq at step {step}")
        assert (stored[0].std(axis=0) > 0).any()


@each_moment_dtype
def test_no_two_choices_depend_on_each_other(backend: str, moment_dtype: torch.dtype) -> None:
    """Each element, row, step, table and moment has random bits of its own.

    Every value lies in the middle between two neighbours, where both are as likely, and of two choices half agree.
    """
    tables = [Parameter(torch.zeros(6000, 5)) for _ in range(2)]
    optimizer = optimizer_of(*tables, betas=(0.0, 0.0), moment_dtype=moment_dtype, backend=backend)
    # In the middle for the first moment (m = g): 1 + 2**-8 for bfloat16; for codes the scale is 1.875 in column 0.
    middle = 1 + 2.0**-8 if moment_dtype is torch.bfloat16 else 1 + 2.0**-4
    first = torch.tensor([1.875, middle, middle, middle, middle])
    # And for the second (v = g * g): its root.
    second = torch.tensor([1.875, *[middle] * 4]).sqrt()
    choices = {}
    for step in range(3):
        for table in tables:
            gradient = first if step < 2 else second
            table.grad = coo_of(np.arange(6000), gradient.expand(6000, 5), table)
        optimizer.step()
        for index, table in enumerate(tables):
            stored = moments_of(optimizer, table)[0 if step < 2 else 1]
            choices[index, step] = stored[:, 1:] > middle
    for name, choice in choices.items():
        assert abs(choice.mean() - 0.5) < SIGMAS * 0.5 / math.sqrt(choice.size), name
    pairs = {
        "elements": (choices[0, 0][:, 0], choices[0, 0][:, 1]),
        "elements two apart": (choices[0, 0][:, 0], choices[0, 0][:, 2]),
        "rows": (choices[0, 0][1:], choices[0, 0][:-1]),
        "rows and elements": (choices[0, 0][1:, 1:], choices[0, 0][:-1, :-1]),
        "steps": (choices[0, 0], choices[0, 1]),
        "steps and rows": (choices[0, 0][1:], choices[0, 1][:-1]),
        "steps and elements": (choices[0, 0][:, 1:], choices[0, 1][:, :-1]),
        "tables": (choices[0, 0], choices[1, 0]),
        "tables and steps": (choices[0, 1], choices[1, 0]),
        "moments": (choices[0, 1], choices[0, 2]),
    }
    for name, (one, other) in pairs.items():
        agreement = (one == other).mean()
        assert abs(agreement - 0.5) < SIGMAS * 0.5 / math.sqrt(one.size), f"{name}: {agreement:.3f} agree"


@each_moment_dtype
def test_first_and_second_moment_of_one_step_are_rounded_apart(backend: str, moment_dtype: torch.dtype) -> None:
    """With g in the middle for m = g, and g * g anywhere for v: the choices are no function of each other."""
    middle = 1 + 2.0**-8 if moment_dtype is torch.bfloat16 else 1 + 2.0**-4
    table = Parameter(torch.zeros(20_000, 2))
    optimizer = optimizer_of(table, betas=(0.0, 0.0), moment_dtype=moment_dtype, backend=backend)
    step_all_rows(optimizer, table, [1.875, middle])
    m, v = (moment[:, 1] > moment[:, 1].min() for moment in moments_of(optimizer, table))
    assert 0 < v.mean() < 1
    assert abs(np.corrcoef(m, v)[0, 1]) < SIGMAS / math.sqrt(len(table))


# Moments: blocks and corners ----------------------------------------------------------------------


def test_no_scale_spans_rows_or_more_than_128_elements(backend: str) -> None:
    """Rows and blocks a million times larger than their neighbours leave these their precision."""
    for width, num_blocks in ((1, 1), (40, 1), (128, 1), (129, 2), (300, 3)):
        table = Parameter(torch.zeros(6, width))
        optimizer = optimizer_of(table, betas=(0.5, 0.5), moment_dtype=torch.uint8, backend=backend)
        block = np.arange(width) // 128
        size = 10.0 ** (6 * ((np.arange(6)[:, None] + block) % 2) - 3) * (1 + np.arange(width) % 7)
        step_all_rows(optimizer, table, size)
        state = optimizer.state[table]
        assert state["exp_avg_scale"].shape == state["exp_avg_sq_scale"].shape == (6, num_blocks)
        m, v = moments_of(optimizer, table)
        assert (abs(m - size / 2) <= size / 2 / 8).all()
        assert (abs(v - size**2 / 2) <= size**2 / 2 / 8).all()
        np.testing.assert_allclose(state["exp_avg_scale"].double().numpy(), block_maxima(size / 2), rtol=1e-6)


def test_blocks_of_rows_of_several_dimensions_follow_their_elements(backend: str) -> None:
    tables = [Parameter(torch.zeros(4, *shape)) for shape in ((260,), (2, 130), (13, 4, 5))]
    values = torch.randn(4, 260, generator=torch.Generator().manual_seed(3)).exp()
    states = []
    for table in tables:
        optimizer = optimizer_of(table, moment_dtype=torch.uint8, backend=backend)
        table.grad = coo_of(range(4), values.reshape(table.shape), table)
        optimizer.step()
        states.append(optimizer.state[table])
    for state, table in zip(states, tables, strict=True):
        assert state["exp_avg"].shape == table.shape
        for key in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
            assert torch.equal(state[key].reshape(4, -1), states[0][key].reshape(4, -1)), key


@each_moment_dtype
def test_rows_whose_gradient_is_zero_stay_zero_and_go_on(backend: str, moment_dtype: torch.dtype) -> None:
    table = Parameter(torch.ones(4, 130))
    optimizer = optimizer_of(table, moment_dtype=moment_dtype, backend=backend)
    for _ in range(3):
        table.grad = coo_of([0, 2], torch.zeros(2, 130), table)
        optimizer.step()
    m, v = moments_of(optimizer, table)
    assert (m == 0).all() and (v == 0).all()
    assert torch.equal(table.detach(), torch.ones(4, 130))
    assert optimizer.state[table]["rows"].tolist() == [0, 2]
    table.grad = coo_of([0, 2], torch.ones(2, 130), table)
    optimizer.step()
    assert table.isfinite().all() and (table[0] < 1).all()
    # And back: what was there fades, and never turns into something else.
    for _ in range(3):
        table.grad = coo_of([0, 2], torch.zeros(2, 130), table)
        optimizer.step()
    m, v = moments_of(optimizer, table)
    assert (m[0] > 0).all() and (v[0] > 0).all() and table.isfinite().all()


@each_moment_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_gradients_stay_in_their_block(backend: str, bad: float, moment_dtype: torch.dtype) -> None:
    """The bad element is NaN ever after; with codes its block may be too, but no other block and no other row."""
    results = []
    for value in (bad, 1.0):
        table = Parameter(torch.ones(5, 300))
        optimizer = optimizer_of(table, moment_dtype=moment_dtype, backend=backend)
        for step in range(4):
            values = torch.randn(3, 300, generator=torch.Generator().manual_seed(step))
            if step == 1:
                values[1, 140] = value
            table.grad = coo_of([0, 2, 3], values, table)
            optimizer.step()
            if step > 0 and value is bad:
                assert table[2, 140].isnan()
        results.append((table.detach().clone(), *moments_of(optimizer, table)))
    (table, m, v), (whole, whole_m, whole_v) = results
    assert not np.isfinite(m[2, 140]) and not np.isfinite(v[2, 140])
    others = torch.ones(5, 300, dtype=torch.bool)
    others[2, 128:256] = False
    assert torch.equal(table[others], whole[others])
    assert table[others].isfinite().all()
    assert (m == whole_m)[others.numpy()].all() and (v == whole_v)[others.numpy()].all()
    if moment_dtype is torch.bfloat16:
        others = torch.ones(5, 300, dtype=torch.bool)
        others[2, 140] = False
        assert torch.equal(table[others], whole[others])


def test_a_second_moment_above_zero_is_never_stored_as_zero(backend: str) -> None:
    """Else its element would be moved by m / eps: over 26 powers of ten below the largest of its block."""
    table = Parameter(torch.zeros(200, 40))
    optimizer = optimizer_of(table, lr=0.1, moment_dtype=torch.uint8, backend=backend)
    gradient = 2.0 ** -torch.arange(40)
    for _ in range(3):
        step_all_rows(optimizer, table, gradient)
        assert (moments_of(optimizer, table)[1] > 0).all()
    for _ in range(20):
        step_all_rows(optimizer, table, torch.zeros(40))
        assert (moments_of(optimizer, table)[1] > 0).all()
    assert table.abs().max() < 2.0, "no step is much longer than the learning rate"


@pytest.mark.parametrize("largest", [1e-15, 1e-12, 1e12, 1e15, 1e18])
@each_moment_dtype
def test_very_small_and_very_large_gradients_keep_their_moments(
    backend: str, largest: float, moment_dtype: torch.dtype
) -> None:
    table = Parameter(torch.zeros(50, 3))
    optimizer = optimizer_of(table, betas=(0.5, 0.5), eps=1e-30, lr=1.0, moment_dtype=moment_dtype, backend=backend)
    gradient = np.array([1.0, -0.5, 0.25]) * largest
    step_all_rows(optimizer, table, gradient)
    m, v = moments_of(optimizer, table)
    np.testing.assert_allclose(m, np.broadcast_to(gradient / 2, m.shape), rtol=1 / 8)
    np.testing.assert_allclose(v, np.broadcast_to(gradient**2 / 2, v.shape), rtol=1 / 8)
    np.testing.assert_allclose(table.detach(), np.broadcast_to(-np.sign(gradient), v.shape), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@each_moment_dtype
def test_one_second_moment_a_row_is_kept_as_it_is(backend: str, dtype: torch.dtype, moment_dtype: torch.dtype) -> None:
    table = Parameter(torch.zeros(10, 3, dtype=dtype))
    optimizer = optimizer_of(table, betas=(0.5, 0.5), second_moment="row", moment_dtype=moment_dtype, backend=backend)
    step_all_rows(optimizer, table, [1.0, 2.0, 0.25])
    state = optimizer.state[table]
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32
    assert state["exp_avg_sq"].dtype is accumulated
    assert "exp_avg_sq_scale" not in state
    expected = torch.full((10,), 5.0625 / 6, dtype=torch.float64)
    torch.testing.assert_close(state["exp_avg_sq"].double(), expected, rtol=4 * torch.finfo(accumulated).eps, atol=0)


# Half-precision tables ----------------------------------------------------------------------------

# Starting points, and for each half-precision type what lies between two of its numbers there.
STARTS = [1.0, -1.0, 0.3, -37.0, 1e-3, 0.0]


@each_half
def test_a_table_is_rounded_to_one_of_two_neighbours_right_on_average(backend: str, dtype: torch.dtype) -> None:
    """The first step of Adam moves by lr, whatever the gradient; here by fractions of a spacing and by many."""
    name = str(dtype).removeprefix("torch.")
    start = torch.tensor(STARTS).to(dtype)
    for lr in (1e-5, 1e-4, 1e-3, 0.0333, 0.7):
        table = Parameter(start.expand(4000, len(STARTS)).clone())
        optimizer = optimizer_of(table, lr=lr, eps=1e-30, stochastic_rounding=True, backend=backend)
        gradient = torch.tensor([1.0, -2.0, 0.5, -1.0, -0.25, 1.0])
        step_all_rows(optimizer, table, gradient)
        exact = start.double().numpy() - lr * np.sign(gradient.numpy())
        stored = table.detach().double().numpy()
        error = 2.0**-21 * (abs(exact) + lr)
        low, high = float_neighbours(exact - error, exact + error, name)
        assert ((low <= stored) & (stored <= high)).all()
        # Of seldom choices, with hardly one among all rows, the deviation says little; so one of them more is allowed.
        deviation = np.sqrt(np.maximum((exact - low) * (high - exact), 0)) * SIGMAS / math.sqrt(len(stored))
        mean_error, allowed = abs(stored.mean(axis=0) - exact), deviation + SIGMAS * (high - low) / len(stored) + error
        assert (mean_error <= allowed).all(), f"lr={lr}: {mean_error} exceeds {allowed}"


@each_half
def test_small_updates_are_lost_without_it_and_kept_with_it(backend: str, dtype: torch.dtype) -> None:
    """Two hundred steps, each of a fortieth of the spacing."""
    step_length = spacing(np.array(0.99), str(dtype).removeprefix("torch.")).item() / 40
    drifts = {}
    for stochastic_rounding in (False, True):
        table = Parameter(torch.ones(2000, 8, dtype=dtype))
        optimizer = optimizer_of(
            table, lr=step_length, eps=1e-30, stochastic_rounding=stochastic_rounding, backend=backend
        )
        for _ in range(200):
            step_all_rows(optimizer, table, torch.ones(8))
        drifts[stochastic_rounding] = 1 - table.detach().double().numpy()
    assert (drifts[False] == 0).all()
    expected, drift = 200 * step_length, drifts[True]
    assert abs(drift.mean() - expected) <= SIGMAS * drift.std() / math.sqrt(drift.size) + 1e-4 * expected
    # A walk of 200 independent choices of a fortieth: were they dependent, rows would keep together or fly apart.
    assert drift.std() == pytest.approx(step_length * 40 * math.sqrt(200 * (1 / 40) * (39 / 40)), rel=0.1)


@each_half
def test_small_decays_are_kept_in_both_modes_and_by_flush(backend: str, dtype: torch.dtype) -> None:
    """Each decay is a fortieth of a spacing, so that rounding to nearest would lose every one."""
    weight_decay = 2.0**-8 / 40 if dtype is torch.bfloat16 else 2.0**-11 / 40
    for mode, is_touched in (("touched", True), ("exact", True), ("exact", False)):
        table = Parameter(torch.ones(400, 8, dtype=dtype))
        optimizer = optimizer_of(
            table, lr=1.0, weight_decay=weight_decay, weight_decay_mode=mode, stochastic_rounding=True, backend=backend
        )
        for _ in range(100):
            if is_touched:
                step_all_rows(optimizer, table, torch.zeros(8))
            else:
                table.grad = coo_of([], torch.zeros(0, 8), table)
                optimizer.step()
                optimizer.flush()
        drift = 1 - table.detach().double().numpy()
        expected = 1 - (1 - weight_decay) ** 100
        assert abs(drift.mean() - expected) <= SIGMAS * drift.std() / math.sqrt(drift.size) + 1e-3 * expected, mode


def rounded_run(
    backend: str, dtype: torch.dtype, generator: torch.Generator | None, **options: Any
) -> tuple[SparseAdam, Parameter]:
    """Three steps of a table of 600 x 9, large enough for several threads."""
    rng = np.random.default_rng(8)
    table = Parameter(torch.as_tensor(rng.standard_normal((600, 90))).to(dtype))
    optimizer = SparseAdam([table], lr=0.003, **options, generator=generator, backend=backend)
    for _ in range(3):
        rows = rng.integers(0, 600, 4000)
        table.grad = coo_of(rows, rng.standard_normal((4000, 90)), table)
        optimizer.step()
    return optimizer, table


ROUNDED = {
    "bfloat16 table": (torch.bfloat16, {"stochastic_rounding": True}),
    "float16 table": (torch.float16, {"stochastic_rounding": True}),
    "bfloat16 moments": (torch.float32, {"moment_dtype": torch.bfloat16}),
    "8-bit moments": (torch.float64, {"moment_dtype": torch.uint8}),
    "all": (torch.bfloat16, {"stochastic_rounding": True, "moment_dtype": torch.uint8}),
}
each_rounding = pytest.mark.parametrize(("dtype", "options"), ROUNDED.values(), ids=ROUNDED)


@each_rounding
def test_a_seed_gives_the_same_bits_and_another_seed_others(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    def state_after(generator: torch.Generator | None) -> Any:
        optimizer, _ = rounded_run(backend, dtype, generator, **options)
        return snapshot(optimizer)

    first, again, other = (state_after(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert first == again
    assert first["states"] != other["states"] or first["tables"] != other["tables"]
    assert first["options"] != other["options"], "the seed is an option of the group"
    # Without a generator it is torch's own that is drawn from.
    torch.manual_seed(7)
    one = state_after(None)
    other = state_after(None)
    torch.manual_seed(7)
    assert state_after(None) == one
    assert other["tables"] != one["tables"] or other["states"] != one["states"]


def test_two_tables_of_one_optimizer_are_rounded_apart(backend: str) -> None:
    tables = [Parameter(torch.ones(200, 8, dtype=torch.bfloat16)) for _ in range(3)]
    groups = [{"params": tables[:2]}, {"params": tables[2:]}]
    optimizer = SparseAdam(groups, lr=0.002, stochastic_rounding=True, generator=torch.Generator(), backend=backend)
    for table in tables:
        table.grad = coo_of(np.arange(200), torch.ones(200, 8), table)
    optimizer.step()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0.3 < (tables[one] == tables[other]).double().mean() < 0.8


@each_rounding
def test_the_same_bits_on_any_number_of_threads(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    results = []
    # For threads of torch's own seven are as two, and take long on few cores.
    for num_threads in (1, 2, 7) if backend == "native" else (1, 2):
        torch.set_num_threads(num_threads)
        optimizer, _ = rounded_run(backend, dtype, torch.Generator().manual_seed(5), **options)
        results.append(snapshot(optimizer))
    assert all(result == results[0] for result in results)


@needs_native
@each_rounding
def test_both_backends_choose_alike_where_what_they_round_is_the_same(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """In a first step: moments are then one product each, the same in both, and so must be all that is stored.

    What a table is rounded from is what a float32 table would be, if that too is the same in both.
    """
    rng = np.random.default_rng(9)
    start = torch.as_tensor(rng.standard_normal((500, 140))).to(dtype)
    rows, values = np.arange(500), torch.as_tensor(rng.standard_normal((500, 140))).to(dtype)
    stepped: dict[tuple[str, bool], tuple[SparseAdam, Parameter]] = {}
    for backend in BACKENDS:
        for is_rounded in (True, False):
            table = Parameter((start if is_rounded or dtype is torch.float64 else start.float()).clone())
            chosen = options if is_rounded else {}
            optimizer = optimizer_of(table, lr=0.003, **chosen, backend=backend)
            table.grad = coo_of(rows, values, table)
            optimizer.step()
            stepped[backend, is_rounded] = optimizer, table
    ours, theirs = (stepped[backend, True] for backend in ("native", "reference"))
    for key, part in ours[0].state[ours[1]].items():
        assert bits(part) == bits(theirs[0].state[theirs[1]][key]), key
    is_same = stepped["native", False][1] == stepped["reference", False][1]
    assert is_same.double().mean() > 0.5
    assert torch.equal(ours[1][is_same], theirs[1][is_same])


@each_rounding
def test_a_saved_run_is_resumed_with_the_same_bits(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Its seed and step come back with it, whatever the seed of the optimizer that loads."""
    optimizer, table = rounded_run(backend, dtype, torch.Generator().manual_seed(5), **options)
    saved, weights = through_a_file((optimizer.state_dict(), table.detach()))
    loaded = Parameter(weights)
    resumed = optimizer_of(loaded, seed=77, **options, backend=backend)
    unlike = optimizer_of(Parameter(weights.clone()), seed=77, **options, backend=backend)
    resumed.load_state_dict(saved)
    saved["param_groups"][0]["seed"] = unlike.param_groups[0]["seed"]
    unlike.load_state_dict(saved)
    rng = np.random.default_rng(10)
    for _ in range(2):
        rows, values = rng.integers(0, 600, 900), rng.standard_normal((900, 90))
        for each in (optimizer, resumed, unlike):
            (parameter,) = each.param_groups[0]["params"]
            parameter.grad = coo_of(rows, values, parameter)
            each.step()
    assert snapshot(resumed) == snapshot(optimizer)
    got, expected = snapshot(unlike), snapshot(optimizer)
    assert (got["states"], got["tables"]) != (expected["states"], expected["tables"])


def test_subnormal_numbers_of_float16_are_rounded_right(backend: str) -> None:
    """Below 2**-14 they are 2**-24 apart, and an update of a tenth of that is kept on average."""
    start = torch.tensor([2.0**-20, -(2.0**-15), 2.0**-24, 2.0**-14, 0.0], dtype=torch.float16)
    table = Parameter(start.expand(3000, 5).clone())
    lr = 2.0**-24 / 10
    optimizer = optimizer_of(table, lr=lr, eps=1e-30, stochastic_rounding=True, backend=backend)
    for step in range(1, 31):
        before = table.detach().double().numpy()
        step_all_rows(optimizer, table, torch.ones(5))
        stored = table.detach().double().numpy()
        exact = before - lr
        error = 1e-5 * lr + 2.0**-23 * abs(exact)
        low, high = float_neighbours(exact - error, exact + error, "float16")
        assert ((low <= stored) & (stored <= high)).all(), f"step {step}"
    drift = stored - start.double().numpy()
    assert_mean(drift, np.full(5, -30 * lr), "drift")


@each_half
def test_numbers_that_a_table_can_hold_stay_as_they_are(backend: str, dtype: torch.dtype) -> None:
    """Of float16's subnormal numbers the largest ones most of all: 1 in 2**15 was rounded up where bits were added."""
    numbers = torch.arange(1024 - 128, 1024, dtype=torch.float32) * 2.0**-24
    start = numbers.to(dtype).expand(4000, 128).clone()
    table = Parameter(start.clone())
    optimizer = optimizer_of(table, stochastic_rounding=True, backend=backend)
    step_all_rows(optimizer, table, torch.zeros(128))
    assert torch.equal(table, start)


@each_half
def test_numbers_near_the_largest_do_not_become_infinite_by_chance(backend: str, dtype: torch.dtype) -> None:
    """Updates towards infinity, each below half a spacing: to nearest, the largest number would stay what it is."""
    largest = torch.finfo(dtype).max
    before_largest = torch.tensor(largest, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype)).item()
    table = Parameter(torch.tensor([largest, -largest, before_largest], dtype=dtype).expand(2000, 3).clone())
    last_spacing = largest - before_largest
    optimizer = optimizer_of(table, lr=last_spacing / 5, eps=1e-30, stochastic_rounding=True, backend=backend)
    for _ in range(3):
        step_all_rows(optimizer, table, [-1.0, 1.0, -1.0])
        assert table.isfinite().all()
    assert (table[:, 0] == largest).all() and (table[:, 1] == -largest).all()
    assert 0.2 < (table[:, 2] == largest).double().mean() < 0.8


@pytest.mark.parametrize("way", ["set between steps", "loaded"])
def test_rounding_is_refused_for_wide_tables_wherever_it_comes_in(backend: str, way: str) -> None:
    rounded = SparseAdam([Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))], stochastic_rounding=True)
    table = Parameter(torch.ones(4, 2))
    optimizer = SparseAdam([table], backend=backend)
    for _ in range(2):  # the second is a steady step
        table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
        optimizer.step()
    before = snapshot(optimizer)
    if way == "loaded":
        with pytest.raises(ValueError, match=r"stochastic_rounding=True for params at indices.*float32"):
            optimizer.load_state_dict(rounded.state_dict())
    else:
        optimizer.param_groups[0].update(stochastic_rounding=True, seed=1)
        with pytest.raises(ValueError, match=r"stochastic_rounding=True for .*\(float32\): only bfloat16 and float16"):
            optimizer.step()
        optimizer.param_groups[0]["stochastic_rounding"] = False
        del optimizer.param_groups[0]["seed"]
    assert snapshot(optimizer) == before
