r"""Missed steps replayed: tables end where dense Adam and AdamW end, whenever their rows are brought up to date.

What is compared with is dense Adam in float64, written from Kingma & Ba's Algorithm 1 and Loshchilov & Hutter's decay,
with every row updated in every step. How far replaying may stray from it, beside rounding:

A row that moves by :math:`n` missed steps is moved by a sum whose terms are at most
:math:`\mathrm{lr}\,r^j |m|/\sqrt v`, :math:`r = \beta_1/\sqrt{\beta_2}` (both corrections together shorten a step,
never lengthen it, for the betas here). The row's own step comes first, as one that it missed, with :math:`j = 0` but
counted as 1. Steps with :math:`r^{j+1}` below 1e-9 are left out, and the others are off by a share of 1e-9 of their sum
in float64 and 2**-22 in float32, so each time a row catches up it strays by at most

.. math:: (10^{-9}/r + \mathrm{share})\,\frac{\mathrm{lr}}{1-r}\,\frac{|m|}{\sqrt v}, \qquad
    \frac{|m|}{\sqrt v} \le \frac{1-\beta_1}{\sqrt{(1-\beta_2)(1-\beta_1^2/\beta_2)}}

the last by the Cauchy-Schwarz inequality over the gradients that both moments are sums of.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import BACKENDS, needs_steady_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from saving import through_a_file
from snapshot import bits, snapshot
from torch import Tensor, nn

from sparseadam import SparseAdam, _memory, replay
from sparseadam.update import native

Array = npt.NDArray[np.float64]

NEGLIGIBLE = 1e-9
SHARE = {torch.float64: 1e-9, torch.float32: 2.0**-22}
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="the native module is missing; make fallback")


@dataclass
class DenseAdam:
    """Dense Adam in float64, and a bound on how far a table that replays may stray from it."""

    theta: Array
    dtype: torch.dtype
    t: int = 0
    m: Array = field(init=False)
    v: Array = field(init=False)
    summed: Array = field(init=False)  # as m, but of sizes: what its rounding is in proportion to
    error: Array = field(init=False)

    def __post_init__(self) -> None:
        """Start with zero moments."""
        self.m, self.v, self.summed, self.error = (np.zeros_like(self.theta) for _ in range(4))

    def step(
        self,
        grad: Array,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        maximize: bool = False,
        torch_eps: bool = False,
    ) -> None:
        """Update every element, gradient or not."""
        self.t += 1
        b1, b2 = betas
        self.m = b1 * self.m + (1 - b1) * (-grad if maximize else grad)
        self.v = b2 * self.v + (1 - b2) * grad * grad
        self.summed = b1 * self.summed + (1 - b1) * abs(grad)
        correction1, correction2 = 1 - b1**self.t, 1 - b2**self.t
        if torch_eps:
            change = lr * math.sqrt(correction2) / correction1 * self.m / (np.sqrt(self.v) + eps)
        else:
            change = lr * (self.m / correction1) / (np.sqrt(self.v / correction2) + eps)
        self.theta = (1 - lr * weight_decay) * self.theta - change
        # Each step rounds weights, moments and what comes of them, a few times each; all of it is small beside this.
        unit = torch.finfo(self.dtype).eps
        self.error += 8 * unit * (abs(self.theta) + lr * (1 + 10 * unit * self.t)) + self._strayed(lr, b1, b2)

    def _strayed(self, lr: float, b1: float, b2: float) -> float:
        """What catching up after every step would add."""
        ratio = b1 / math.sqrt(b2)
        largest = (1 - b1) / math.sqrt((1 - b2) * (1 - ratio * ratio))
        left_out = NEGLIGIBLE / ratio if b1 >= 0.5 else NEGLIGIBLE  # where the own step is not in the sums
        return (left_out + SHARE[self.dtype]) * lr / (1 - ratio) * largest

    def assert_close(self, theta: Tensor) -> None:
        """Compare a table that is up to date."""
        difference = abs(theta.detach().double().numpy() - self.theta)
        assert (difference <= self.error).all(), f"off by {difference.max():.3g} after step {self.t}"


def give_gradient(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Give a table an uncoalesced sparse gradient."""
    table.grad = torch.sparse_coo_tensor(rows[None], values.to(table.dtype), table.shape, check_invariants=True)


def dense_gradient(rows: Tensor, values: Tensor, shape: tuple[int, int]) -> Array:
    """Return what a sparse gradient stands for."""
    dense = np.zeros(shape)
    np.add.at(dense, rows.numpy(), values.double().numpy())
    return dense


def moments_of(optimizer: SparseAdam, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return both moments of every row, zero where it has none."""
    state = optimizer.state[table]
    dense = [torch.zeros_like(table, dtype=state["exp_avg"].dtype) for _ in range(2)]
    for part, name in zip(dense, ("exp_avg", "exp_avg_sq"), strict=True):
        part[state["rows"]] = state[name]
    return dense[0].detach(), dense[1].detach()


SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda t: 1.0,
    "warm-up": lambda t: min(1.0, t / 50),
    "cosine": lambda t: 0.5 * (1 + math.cos(t / 30)),
    "stretches of zero": lambda t: float(t // 40 % 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_any_run_ends_where_dense_adam_ends(dtype: torch.dtype, data: st.DataObject) -> None:
    """Random tables, gaps, schedules, reads in between and flushes, in both backends; compared at every flush."""
    backend = data.draw(st.sampled_from(BACKENDS), "backend")
    betas = data.draw(st.sampled_from([(0.9, 0.999), (0.9, 0.99), (0.5, 0.9), (0.95, 0.9999), (0.0, 0.9)]), "betas")
    schedule = SCHEDULES[data.draw(st.sampled_from(sorted(SCHEDULES)), "schedule")]
    seed = data.draw(st.integers(0, 2**16), "seed")
    options: dict[str, Any] = {
        "betas": betas,
        "eps": data.draw(st.sampled_from([1e-8, 1e-12, 1e-3]), "eps"),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1]), "weight_decay"),
        "maximize": data.draw(st.booleans(), "maximize"),
        "torch_eps": data.draw(st.booleans(), "torch_eps"),
    }
    scale = data.draw(st.sampled_from([1.0, 2.0**-20, 2.0**-30]), "scale of gradients")
    stretches = data.draw(
        st.lists(st.sampled_from([1, 2, 7, 60, 210]), min_size=1, max_size=4), "steps without lookups"
    )
    shape = data.draw(st.tuples(st.integers(1, 12), st.sampled_from([1, 3, 8, 17])), "shape")

    generator = torch.Generator().manual_seed(seed)
    table = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    optimizer = SparseAdam([table], lr=0.01, missed_steps="replay", backend=backend, **options)
    oracle = DenseAdam(table.detach().double().numpy().copy(), dtype)

    def step(num_lookups: int) -> None:
        rows = torch.randint(shape[0], (num_lookups,), generator=generator)
        values = torch.randint(-8, 9, (num_lookups, shape[1]), generator=generator) * scale
        optimizer.param_groups[0]["lr"] = lr = 0.01 * schedule(oracle.t)
        optimizer.catch_up(table, rows)
        give_gradient(table, rows, values)
        optimizer.step()
        oracle.step(dense_gradient(rows, values, shape), lr=lr, **options)

    for stretch in stretches:
        step(int(torch.randint(1, 6, (), generator=generator)))
        for _ in range(stretch):
            step(0)
            if torch.rand((), generator=generator) < 0.02:  # as an evaluation reads
                optimizer.catch_up(table, torch.randint(shape[0], (3,), generator=generator))
        if torch.rand((), generator=generator) < 0.5:
            optimizer.flush()
            oracle.assert_close(table)
    optimizer.flush()
    oracle.assert_close(table)
    exp_avg, exp_avg_sq = moments_of(optimizer, table)
    tiny = 1e-38  # what float32 loses to underflow
    for got, want, size in ((exp_avg, oracle.m, oracle.summed), (exp_avg_sq, oracle.v, oracle.v)):
        unit = 8 * torch.finfo(dtype).eps * (oracle.t + 1)
        assert (abs(got.double().numpy() - want) <= unit * size + tiny).all()


# What missed steps are summed in, by when a row was touched, its betas, and the eps of even steps and of odd ones. With
# two of them each step is a block of its own, and those of the larger gaps are too many and are walked.
WAYS: dict[str, tuple[int, tuple[float, float], tuple[float, float]]] = {
    "one block": (2000, (0.9, 0.999), (1e-8, 1e-8)),
    "blocks of the first steps": (0, (0.9, 0.999), (1e-8, 1e-8)),
    "blocks of a low beta2": (500, (0.9, 0.95), (1e-8, 1e-8)),
    "walked": (500, (0.9, 0.99), (1e-8, 1e-7)),
}


@needs_native
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("gap", [1, 30, 90, 250])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-12])
@pytest.mark.parametrize("way", WAYS)
def test_one_pass_does_what_step_by_step_would_do(way: str, scale: float, gap: int, weight_decay: float) -> None:
    """The native backend sums up what the reference walks, in float64, whatever gradients are beside eps."""
    steps_before, betas, eps = WAYS[way]
    start = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8)
    gradient = torch.randn(2, 8, generator=torch.Generator().manual_seed(gap), dtype=torch.float64) * scale
    tables = {}
    for backend in ("native", "reference"):
        table = tables[backend] = nn.Parameter(start.clone())
        optimizer = SparseAdam(
            [table], lr=0.01, betas=betas, weight_decay=weight_decay, missed_steps="replay", backend=backend
        )
        give_gradient(table, torch.tensor([0]), torch.zeros(1, 8))
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["step"] = steps_before
        optimizer.load_state_dict(saved)
        optimizer.catch_up(table, torch.tensor([1, 2]))
        give_gradient(table, torch.tensor([1, 2]), gradient)
        optimizer.step()
        touched = table.detach()[1].clone()
        for step in range(gap):
            optimizer.param_groups[0]["eps"] = eps[step % 2]
            give_gradient(table, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8))
            optimizer.step()
        optimizer.catch_up(table, torch.tensor([1]))
        assert (table.detach()[1] != touched).all()
    native_row, reference_row = (tables[backend].detach() for backend in ("native", "reference"))
    ratio = betas[0] / math.sqrt(betas[1])
    torch.testing.assert_close(native_row, reference_row, rtol=1e-13, atol=2e-9 * 0.01 / (1 - ratio) * 8)


@pytest.mark.parametrize("beta1", [0.0, 1e-12, 2e-9, 1e-5, 0.1, 0.6])
def test_steps_of_a_larger_beta1_move_what_one_of_a_small_one_wrote(backend: str, beta1: float) -> None:
    """A row steps once with a small beta1 and then misses steps whose beta1 is the usual one."""
    start = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 8)
    gradient = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = nn.Parameter(start.clone())
    optimizer = SparseAdam([table], lr=0.01, betas=(beta1, 0.999), missed_steps="replay", backend=backend)
    oracle = DenseAdam(start.numpy().copy(), torch.float64)
    for step in range(300):
        is_first = step == 0
        optimizer.param_groups[0]["betas"] = betas = (beta1 if is_first else 0.9, 0.999)
        rows, values = torch.tensor([0] * is_first, dtype=torch.int64), gradient[:is_first]
        give_gradient(table, rows, values)
        optimizer.step()
        oracle.step(dense_gradient(rows, values, (2, 8)), lr=0.01, betas=betas, eps=1e-8)
    optimizer.flush()
    # With a small beta1, |m|/sqrt(v) is up to 1/sqrt(1-beta2), and ten steps' worth of that follows the first step.
    atol = 2e-9 * 0.01 * 10 / math.sqrt(0.001)
    torch.testing.assert_close(table.detach(), torch.from_numpy(oracle.theta), rtol=0, atol=atol)


def test_thousands_of_steps_with_a_schedule_and_decay_equal_adamw(backend: str) -> None:
    """Against torch.optim.AdamW on dense gradients, in float64, at six flushes.

    The reference walks every missed step, which takes its time, so its thousands are hundreds.
    """
    num_steps = 3000 if backend == "native" else 300
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    ours, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = SparseAdam([ours], lr=0.01, weight_decay=0.05, missed_steps="replay", backend=backend)
    peer = torch.optim.AdamW([dense], lr=0.01, weight_decay=0.05)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.02, total_steps=num_steps + 1) for each in (optimizer, peer)
    ]
    for step in range(num_steps):
        # The rarest rows come once in some thousand steps.
        rows = (torch.rand(3, generator=generator) ** 4 * 200).long()
        values = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        optimizer.catch_up(ours, rows)
        give_gradient(ours, rows, values)
        dense.grad = torch.zeros_like(dense).index_add_(0, rows, values)
        for each in (optimizer, peer, *schedules):
            each.step()
        if (step + 1) % (num_steps // 6) == 0:
            optimizer.flush()
            torch.testing.assert_close(ours, dense, rtol=0, atol=5e-9)
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments_of(optimizer, ours), strict=True):
                torch.testing.assert_close(moment, peer.state[dense][name], rtol=1e-9, atol=1e-30)
    assert (start - dense.detach()).abs().max() > 0.1


def test_in_float32_it_is_as_near_to_the_truth_as_dense_float32_adam(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(50, 16, generator=generator)
    ours, single, double = (nn.Parameter(start.clone().to(dtype)) for dtype in (*[torch.float32] * 2, torch.float64))
    optimizer = SparseAdam([ours], lr=0.01, missed_steps="replay", backend=backend)
    peers = [torch.optim.Adam([single], lr=0.01), torch.optim.Adam([double], lr=0.01)]
    for _ in range(600 if backend == "native" else 100):
        rows = (torch.rand(4, generator=generator) ** 3 * 50).long()
        values = torch.randn(4, 16, generator=generator)
        optimizer.catch_up(ours, rows)
        give_gradient(ours, rows, values)
        for dense in (single, double):
            dense.grad = torch.zeros_like(dense).index_add_(0, rows, values.to(dense.dtype))
        for each in (optimizer, *peers):
            each.step()
    optimizer.flush()
    our_error, their_error = ((table.detach().double() - double.detach()).norm() for table in (ours, single))
    assert our_error < 2 * their_error


# What catching up does and does not ---------------------------------------------------------------


@dataclass
class Setting:
    """A table of which half the rows have been touched and are behind."""

    table: nn.Parameter
    optimizer: SparseAdam


def behind(backend: str | None, dtype: torch.dtype = torch.float32, **options: Any) -> Setting:
    """Touch rows 0 to 9 of 20, then step three times on row 0 alone, which is up to date."""
    generator = torch.Generator().manual_seed(5)
    table = nn.Parameter(torch.randn(20, 6, generator=generator).to(dtype))
    optimizer = SparseAdam([("words", table)], lr=0.1, missed_steps="replay", backend=backend, **options)
    give_gradient(table, torch.arange(10), torch.randn(10, 6, generator=generator))
    optimizer.step()
    for _ in range(3):
        optimizer.catch_up(table, torch.tensor([0]))
        give_gradient(table, torch.tensor([0]), torch.randn(1, 6, generator=generator))
        optimizer.step()
    optimizer.catch_up(table, torch.tensor([0]))
    return Setting(table, optimizer)


def test_catching_up_moves_the_rows_it_is_told_and_no_others(backend: str) -> None:
    setting = behind(backend)
    before = setting.table.detach().clone()
    parts = {name: part.clone() for name, part in setting.optimizer.state[setting.table].items() if name != "step"}
    setting.optimizer.catch_up(setting.table, torch.tensor([4, 0, 15, 4]))
    is_same = (setting.table.detach() == before).all(1)
    assert is_same.tolist() == [row != 4 for row in range(20)]  # 0 is up to date and 15 was never touched
    for name, part in parts.items():
        if name != "weight_steps":
            assert torch.equal(setting.optimizer.state[setting.table][name], part), name
    once = setting.table.detach().clone()
    setting.optimizer.catch_up(setting.table, torch.arange(20)[[4]])
    assert torch.equal(setting.table.detach(), once)


def test_weights_take_a_step_when_they_are_next_read(backend: str) -> None:
    setting = behind(backend, weight_decay=0.1)
    peer = torch.optim.AdamW([nn.Parameter(setting.table.detach().clone())], lr=0.1, weight_decay=0.1)
    (dense,) = peer.param_groups[0]["params"]
    setting.optimizer.flush()
    dense.data = setting.table.detach().clone()
    peer.load_state_dict(setting.optimizer.to_torch_state_dict())
    give_gradient(setting.table, torch.tensor([4, 15]), torch.ones(2, 6))
    dense.grad = setting.table.grad.to_dense()
    before = setting.table.detach().clone()
    setting.optimizer.step()
    peer.step()
    assert bits(setting.table) == bits(before)
    setting.optimizer.catch_up(setting.table, torch.arange(20))
    torch.testing.assert_close(setting.table, dense, rtol=1e-6, atol=1e-7)


def test_rows_never_touched_decay_as_well(backend: str) -> None:
    setting = behind(backend, weight_decay=0.5)
    before = setting.table.detach().clone()
    setting.optimizer.catch_up(setting.table, torch.tensor([15]))
    torch.testing.assert_close(setting.table.detach()[15], before[15] * (1 - 0.1 * 0.5) ** 4)
    assert 15 in setting.optimizer.state[setting.table]["rows"]
    slots = len(setting.optimizer.state[setting.table]["rows"])
    setting.optimizer.flush()
    assert len(setting.optimizer.state[setting.table]["rows"]) == slots  # of the others none needs one
    torch.testing.assert_close(setting.table.detach()[16], before[16] * (1 - 0.1 * 0.5) ** 4)


def test_flushing_does_what_catching_up_on_all_rows_does(backend: str) -> None:
    flushed, read = behind(backend, weight_decay=0.01), behind(backend, weight_decay=0.01)
    flushed.optimizer.flush()
    read.optimizer.catch_up(read.table, torch.arange(20).flip(0))
    # Rows never touched have no slot in the one and have one in the other, with other roundings of what decays them.
    touched = slice(0, 10)
    torch.testing.assert_close(flushed.table, read.table, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    if backend == "native":
        assert bits(flushed.table.detach()[touched]) == bits(read.table.detach()[touched])


@needs_native
@pytest.mark.parametrize("width", [1, 7, 8, 33, 64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_any_number_of_threads_and_any_instructions_give_the_same_bits(
    width: int, weight_decay: float, monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    num_rows, num_lookups = 20_000, 30_000
    outcomes = []
    for instruction_set in native.module().instruction_sets():  # type: ignore[union-attr]
        for threads in (1, 2, 7):
            monkeypatch.setattr(native, "instruction_set", lambda chosen=instruction_set: chosen)
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(width)
            table = nn.Parameter(torch.randn(num_rows, width, generator=generator))
            optimizer = SparseAdam([table], weight_decay=weight_decay, missed_steps="replay", backend="native")
            for _ in range(4):
                rows = torch.randint(num_rows, (num_lookups,), generator=generator)
                optimizer.catch_up(table, rows)
                give_gradient(table, rows, torch.randn(num_lookups, width, generator=generator))
                optimizer.step()
            optimizer.catch_up(table, torch.randint(num_rows, (num_lookups,), generator=generator))
            outcomes.append(snapshot(optimizer))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_a_table_of_several_row_dimensions_is_read_by_flat_row(backend: str) -> None:
    """With sparse_dim = 2 row numbers are those of the table viewed as [num_rows, width]."""
    start = torch.arange(24.0).reshape(2, 4, 3) / 10
    ours, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = SparseAdam([ours], missed_steps="replay", backend=backend)
    peer = torch.optim.Adam([dense])
    for row in (1, 6, 1, 1, 6):
        index = torch.tensor([[row // 4], [row % 4]])
        optimizer.catch_up(ours, torch.tensor([row]))
        ours.grad = torch.sparse_coo_tensor(index, torch.ones(1, 3), ours.shape, check_invariants=True)
        dense.grad = ours.grad.to_dense()
        optimizer.step()
        peer.step()
    optimizer.flush()
    torch.testing.assert_close(ours, dense)


def test_the_pages_block_runs() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "replay.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(block, names)
    optimizer, table = names["optimizer"], names["model"][0].weight
    assert (optimizer.state[table]["weight_steps"] == 3).all()


# Refusals -----------------------------------------------------------------------------------------


def test_a_step_on_rows_that_are_behind_is_refused_and_changes_nothing(backend: str) -> None:
    setting = behind(backend)
    other = nn.Parameter(torch.ones(4, 6))
    setting.optimizer.add_param_group({"params": [("tags", other)]})
    give_gradient(setting.table, torch.tensor([0, 7, 15, 4, 7]), torch.ones(5, 6))
    give_gradient(other, torch.tensor([1]), torch.ones(1, 6))
    before = snapshot(setting.optimizer)
    with pytest.raises(RuntimeError, match=r"'words' \(group 0, parameter 0\) names rows that are behind, first 4, 7:"):
        setting.optimizer.step()
    assert snapshot(setting.optimizer) == before
    setting.optimizer.catch_up(setting.table, torch.tensor([7, 4]))
    setting.optimizer.step()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_table_that_changed_its_dtype_is_not_caught_up_on(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    was, becomes = dtypes
    setting = behind(backend, was)
    table, optimizer = setting.table, setting.optimizer
    table.grad = None
    table.data = table.data.to(becomes)
    before = snapshot(optimizer)
    for attempt in (
        lambda: optimizer.catch_up(table, torch.tensor([4, 7])),
        lambda: optimizer.forget(table, torch.tensor([4])),
        optimizer.flush,
        optimizer.state_dict,
    ):
        with pytest.raises(RuntimeError, match=rf"'words' .* have dtype {was}, but the table now has dtype {becomes}"):
            attempt()
        assert snapshot(optimizer) == before
    table.data = table.data.to(was)
    optimizer.flush()


def test_the_step_that_rows_count_theirs_from_cannot_be_set(backend: str) -> None:
    setting = behind(backend)
    state = setting.optimizer.state[setting.table]
    before, step = snapshot(setting.optimizer), state["step"]
    for other in (0, step - 1, step + 1):
        with pytest.raises(ValueError, match=rf"step is {step} and cannot be set to {other}: with missed_steps='repl"):
            state["step"] = other
    state["step"] = step
    assert snapshot(setting.optimizer) == before


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_on_the_lookups_just_read_is_that_on_rows_found_anew(
    backend: str, weight_decay: float, nonfinite: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    tables = [nn.Parameter(torch.full((700, 6), 0.5)) for _ in range(2)]
    optimizers = [
        SparseAdam(
            [table], lr=0.1, missed_steps="replay", backend=backend, weight_decay=weight_decay, nonfinite=nonfinite
        )
        for table in tables
    ]
    for number in range(8):
        rows = torch.randint(100 + 70 * number, (3000,), generator=generator)
        values = torch.randn(3000, 6, generator=generator)
        values[rows == 3] = math.nan if nonfinite == "skip" else 1.0
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.catch_up(table, rows)
            if optimizer is optimizers[1]:  # forgets what was found
                optimizer.catch_up(table, rows[:1])
            give_gradient(table, rows.clone(), values)
            optimizer.step()
    assert bits(tables[0]) == bits(tables[1])
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])


def test_rows_just_read_are_found_for_one_step_and_for_those_lookups_alone(backend: str) -> None:
    setting = behind(backend)
    setting.optimizer.catch_up(setting.table, torch.tensor([1, 2]))
    give_gradient(setting.table, torch.tensor([1, 4]), torch.ones(2, 6))
    with pytest.raises(RuntimeError, match="rows that are behind, first 4:"):
        setting.optimizer.step()
    setting.optimizer.catch_up(setting.table, torch.tensor([1, 4]))
    setting.optimizer.step()
    give_gradient(setting.table, torch.tensor([0]), torch.ones(1, 6))
    setting.optimizer.catch_up(setting.table, torch.tensor([0]))
    setting.optimizer.step()
    give_gradient(setting.table, torch.tensor([1, 4]), torch.ones(2, 6))
    with pytest.raises(RuntimeError, match="rows that are behind, first 1, 4:"):
        setting.optimizer.step()


def test_a_step_on_rows_that_could_not_be_read_is_refused_as_well(backend: str) -> None:
    """Those read before them were as many, and what was found of them is no longer there."""
    setting = behind(backend)
    setting.optimizer.catch_up(setting.table, torch.tensor([1, 4]))
    bad = torch.tensor([1, len(setting.table)])
    with pytest.raises(IndexError):
        setting.optimizer.catch_up(setting.table, bad)
    setting.table.grad = torch.sparse_coo_tensor(
        bad[None], torch.ones(2, 6), setting.table.shape, check_invariants=False
    )
    before = snapshot(setting.optimizer)
    with pytest.raises(IndexError, match=f"names row {len(setting.table)}"):
        setting.optimizer.step()
    assert snapshot(setting.optimizer) == before


def test_rows_just_read_whose_gradient_is_not_finite_are_refused_and_nothing_changes(backend: str) -> None:
    setting = behind(backend, nonfinite="error")
    rows = torch.tensor([4, 0, 15, 4])
    setting.optimizer.catch_up(setting.table, rows)
    values = torch.ones(4, 6)
    values[3, 2] = math.inf
    give_gradient(setting.table, rows, values)
    before = snapshot(setting.optimizer)
    with pytest.raises(RuntimeError, match="is not finite, first in rows 4"):
        setting.optimizer.step()
    assert snapshot(setting.optimizer) == before
    give_gradient(setting.table, rows, torch.ones(4, 6))
    setting.optimizer.step()
    assert len(setting.optimizer.state[setting.table]["rows"]) == 11


def test_several_threads_may_read_at_once(backend: str) -> None:
    every_row = torch.arange(5000)
    reads = [torch.randint(5000, (20000,), generator=torch.Generator().manual_seed(seed)) for seed in range(32)]
    tables = [nn.Parameter(torch.zeros(5000, 4)) for _ in range(2)]
    optimizers = [SparseAdam([table], lr=0.1, missed_steps="replay", backend=backend) for table in tables]
    for table, optimizer in zip(tables, optimizers, strict=True):
        give_gradient(table, every_row, torch.ones(5000, 4))
        optimizer.step()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda rows: optimizers[0].catch_up(tables[0], rows), reads))
    for rows in reads:
        optimizers[1].catch_up(tables[1], rows)
    assert (tables[1] != 0).all()
    assert bits(tables[0]) == bits(tables[1])
    give_gradient(tables[0], every_row, torch.ones(5000, 4))
    optimizers[0].step()
    assert len(optimizers[0].state[tables[0]]["rows"]) == 5000


def test_a_thread_may_read_while_another_one_steps(backend: str) -> None:
    """Both give slots to new rows: each row has one of its own afterwards."""
    table = nn.Parameter(torch.zeros(3000, 2))
    optimizer = SparseAdam([table], lr=0.1, weight_decay=0.1, missed_steps="replay", backend=backend)
    generator = torch.Generator().manual_seed(1)
    reads = [torch.randint(3000, (400,), generator=generator) for _ in range(100)]
    with ThreadPoolExecutor(1) as thread:
        reading = thread.map(lambda rows: optimizer.catch_up(table, rows), reads)
        for _ in range(100):
            rows = torch.randint(3000, (20,), generator=generator)
            give_gradient(table, rows, torch.ones(20, 2))
            with replay.TURNS:  # as rows that are read are those of the gradient that follows
                optimizer.catch_up(table, rows)
                optimizer.step()
        list(reading)
    rows = optimizer.state[table]["rows"]
    assert len(rows.unique()) == len(rows)
    optimizer.flush()
    assert table.isfinite().all()


@pytest.mark.parametrize("is_steady", [False, pytest.param(True, marks=needs_steady_steps)])
def test_an_interrupted_step_is_a_step(is_steady: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt arrives when rows are written: what is written then is known to be written."""
    settings = [behind("native", weight_decay=0.1) for _ in range(2)]
    rows = torch.tensor([1, 3, 15])
    owner, name = (torch._C, "_increment_version") if is_steady else (native, "update_rows")
    function = getattr(owner, name)

    def interrupted(*arguments: Any) -> None:
        function(*arguments)
        raise KeyboardInterrupt

    for setting in settings:
        if not is_steady:
            setting.optimizer.__dict__["_steady_step"] = None
        setting.optimizer.catch_up(setting.table, rows)
        give_gradient(setting.table, rows, torch.ones(3, 6))
        if setting is settings[0]:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, name, interrupted)
                setting.optimizer.step()
        else:
            setting.optimizer.step()
    for setting in settings:
        setting.optimizer.catch_up(setting.table, rows)
        give_gradient(setting.table, rows, torch.ones(3, 6))
        setting.optimizer.step()
    assert snapshot(settings[0].optimizer) == snapshot(settings[1].optimizer)


def test_steps_beyond_what_clocks_can_count_are_refused(backend: str) -> None:
    table = nn.Parameter(torch.zeros(4, 2))
    optimizer = SparseAdam([table], missed_steps="replay", backend=backend)
    give_gradient(table, torch.tensor([1]), torch.ones(1, 2))
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 2**31
    with pytest.raises(ValueError, match="step is 2147483648, at most 2147483647 expected"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["step"] = 2**31 - 2
    optimizer.load_state_dict(saved)
    for is_last in (False, True):
        optimizer.catch_up(table, torch.tensor([1]))
        give_gradient(table, torch.tensor([1]), torch.ones(1, 2))
        if not is_last:
            optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="at step 2147483647, the last one"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_rows_never_touched_are_behind_only_where_weights_decay(backend: str) -> None:
    plain, decaying = behind(backend), behind(backend, weight_decay=0.1)
    for setting in (plain, decaying):
        give_gradient(setting.table, torch.tensor([15]), torch.ones(1, 6))
    plain.optimizer.step()
    with pytest.raises(RuntimeError, match="rows that are behind, first 15:"):
        decaying.optimizer.step()


def test_rows_behind_are_named_before_gradients_that_are_not_finite(backend: str) -> None:
    setting = behind(backend, nonfinite="error")
    give_gradient(setting.table, torch.tensor([0, 4]), torch.tensor([[math.inf], [1.0]]).expand(2, 6))
    with pytest.raises(RuntimeError, match="rows that are behind, first 4:"):
        setting.optimizer.step()
    setting.optimizer.catch_up(setting.table, torch.tensor([4]))
    with pytest.raises(RuntimeError, match="is not finite, first in rows 0"):
        setting.optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"moment_dtype": torch.bfloat16}, "moment_dtype=torch.bfloat16"),
        ({"second_moment": "row"}, "second_moment='row'"),
        ({"bias_correction": "row"}, "bias_correction='row'"),
        ({"betas": (0.95, 0.9)}, "go on moving without end"),
        ({"betas": (0.9, 0.81)}, "go on moving without end"),
        ({"betas": (0.5, 0.0)}, "go on moving without end"),
        ({"betas": (0.9998, 0.99999)}, "go on moving for"),
        ({"lr": 1.0, "weight_decay": 1.0}, "missed_steps='replay' needs it below 1"),
    ],
)
def test_options_that_cannot_be_replayed_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdam([torch.zeros(3, 2)], missed_steps="replay", **options)


def test_the_choice_is_checked_and_cannot_change_once_there_are_moments(backend: str) -> None:
    with pytest.raises(ValueError, match="Invalid missed_steps: 'all'"):
        SparseAdam([torch.zeros(3, 2)], missed_steps="all")
    setting = behind(backend)
    setting.optimizer.param_groups[0]["missed_steps"] = "skip"
    give_gradient(setting.table, torch.tensor([0]), torch.ones(1, 6))
    with pytest.raises(RuntimeError, match=r"missed_steps of 'words' .* changed after its moments were made"):
        setting.optimizer.step()


def test_wrong_rows_and_parameters_are_refused_and_move_nothing(backend: str) -> None:
    setting = behind(backend)
    before = snapshot(setting.optimizer)
    for rows in (torch.tensor([4, 20]), torch.tensor([-1, 4])):
        with pytest.raises(IndexError, match="is outside the 20 rows of 'words'"):
            setting.optimizer.catch_up(setting.table, rows)
    with pytest.raises(TypeError, match="must be a one-dimensional"):
        setting.optimizer.catch_up(setting.table, torch.tensor([[4]]))
    with pytest.raises(ValueError, match="is not one of this optimizer's"):
        setting.optimizer.catch_up(torch.zeros(20, 6), torch.tensor([4]))
    assert snapshot(setting.optimizer) == before


@pytest.mark.parametrize("missed_steps", ["skip", "replay"])
def test_rows_outside_are_refused_where_none_can_be_behind_too(backend: str, missed_steps: str) -> None:
    """Also before the first step, when it is not known yet whether rows are of one dimension or of two."""
    table = nn.Parameter(torch.zeros(5, 2))
    optimizer = SparseAdam([table], missed_steps=missed_steps, backend=backend)
    optimizer.catch_up(table, torch.tensor([4, 9]))
    with pytest.raises(IndexError, match="row 10 is outside the at most 10 rows of group 0, parameter 0"):
        optimizer.catch_up(table, torch.tensor([4, 10]))
    give_gradient(table, torch.tensor([1]), torch.ones(1, 2))
    optimizer.step()
    optimizer.catch_up(table, torch.tensor([4]))
    with pytest.raises(IndexError, match="row 5 is outside the 5 rows of group 0, parameter 0"):
        optimizer.catch_up(table, torch.tensor([4, 5]))


def test_moments_that_grow_have_room_for_rows_that_only_decay(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where address space cannot be reserved: such a row gets a slot when it is read, not when it is stepped."""
    settings = []
    for memory in (_memory.ReservedMemory, lambda rows, parts: _memory.GrowingMemory(rows, parts, torch.device("cpu"))):
        monkeypatch.setattr(_memory, "ReservedMemory", memory)
        setting = behind(backend, weight_decay=0.1)
        setting.optimizer.catch_up(setting.table, torch.arange(19, 3, -1))
        settings.append(setting)
    reserved, growing = settings
    assert isinstance(growing.optimizer.state[growing.table].memory, _memory.GrowingMemory)
    assert snapshot(growing.optimizer) == snapshot(reserved.optimizer)


@pytest.mark.parametrize("num_parts_grown", range(5))
def test_moments_that_found_no_memory_to_grow_are_used_where_they_are(
    backend: str, num_parts_grown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them had moved by then, and native code went on with the memory where they had been."""
    settings = []
    for memory in (_memory.ReservedMemory, lambda rows, parts: _memory.GrowingMemory(rows, parts, torch.device("cpu"))):
        monkeypatch.setattr(_memory, "ReservedMemory", memory)
        settings.append(behind(backend, weight_decay=0.1))
    undisturbed, growing = settings
    larger = itertools.chain([_memory._enlarged] * num_parts_grown, [refuse_memory])
    rows = torch.arange(20)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(_memory, "_enlarged", lambda *arguments: next(larger)(*arguments))
        growing.optimizer.catch_up(growing.table, rows)
    assert growing.optimizer.state[growing.table].native_table is None
    for setting in settings:
        setting.optimizer.catch_up(setting.table, rows)
    assert snapshot(growing.optimizer) == snapshot(undisturbed.optimizer)


def refuse_memory(*_: Any) -> Tensor:
    """Have none."""
    raise torch.OutOfMemoryError("out of memory")


@needs_native
def test_a_table_that_native_cannot_update_is_refused_or_goes_to_the_reference() -> None:
    settings_ = {backend: behind("native") for backend in (None, "native", "reference")}
    for backend, setting in settings_.items():
        setting.table.data = setting.table.data.t().contiguous().t()
        setting.optimizer._backend = backend
    with pytest.raises(RuntimeError, match='backend="native" cannot update'):
        settings_["native"].optimizer.catch_up(settings_["native"].table, torch.tensor([4]))
    for backend in (None, "reference"):
        settings_[backend].optimizer.catch_up(settings_[backend].table, torch.tensor([4]))
    assert bits(settings_[None].table) == bits(settings_["reference"].table)
    assert not torch.equal(settings_[None].table, settings_["native"].table)


# Models -------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Words, bags of tags that share a table with others, and a dense layer."""

    def __init__(self, *, sparse: bool, max_norm: float | None = None) -> None:
        """Start from the same parameters each time."""
        super().__init__()
        torch.manual_seed(7)
        self.words = nn.Embedding(40, 4, sparse=sparse, padding_idx=3, max_norm=max_norm)
        self.tags = nn.EmbeddingBag(30, 4, sparse=sparse, mode="sum", padding_idx=0)
        self.more_tags = nn.EmbeddingBag(30, 4, sparse=sparse, mode="sum", _weight=self.tags.weight)
        self.more_tags.weight = self.tags.weight
        self.head = nn.Linear(4, 1)

    def forward(self, words: Tensor, tags: Tensor, weights: Tensor) -> Tensor:
        """Score each example."""
        bags = self.tags(tags) + self.more_tags(input=tags.flip(0), per_sample_weights=weights)
        return self.head((self.words(words) + bags).tanh()).squeeze(1)


def batches(num_steps: int) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Yield rare words and tags, and targets."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(num_steps):
        words = (torch.rand(5, generator=generator) ** 3 * 40).long()
        tags = (torch.rand(5, 3, generator=generator) ** 3 * 30).long()
        weights = torch.rand(5, 3, generator=generator).requires_grad_()
        yield (words, tags, weights), torch.randn(5, generator=generator)


def train(model: Model, optimizer: torch.optim.Optimizer, num_steps: int = 60) -> list[float]:
    """Return the loss of every step."""
    losses = []
    for inputs, targets in batches(num_steps):
        optimizer.zero_grad()
        loss = (model(*inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


IDS = torch.tensor([[1, 7], [7, 30]])

TRANSFORMS: dict[str, Callable[[nn.Embedding], Any]] = {
    "grad": lambda words: torch.func.grad(lambda x: (words(IDS) * x).sum())(torch.ones(4)),
    "jacrev": lambda words: torch.func.jacrev(lambda x: (words(IDS) * x).sum(0))(torch.ones(4)),
    "vmap": lambda words: torch.vmap(words)(IDS),
    "vmap of vmap": lambda words: torch.vmap(torch.vmap(words))(IDS),
    "functionalize": lambda words: torch.func.functionalize(words)(IDS),
    "vmap of grad": lambda words: torch.vmap(torch.func.grad(lambda x, ids: (words(ids) * x).sum()))(
        torch.ones(2, 4), IDS
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rows_that_a_transform_reads_are_up_to_date(backend: str, transform: str) -> None:
    """Native code was given the transforms' own tensors, which have no memory."""
    found = []
    for reads_all_before in (True, False):
        model = Model(sparse=True)
        optimizer = SparseAdam([model.words.weight], lr=0.1, missed_steps="replay", weight_decay=0.1, backend=backend)
        optimizer.attach(model)
        for ids in ([1, 30], [2, 7], [2, 3]):
            optimizer.zero_grad()
            model.words(torch.tensor(ids)).square().sum().backward()
            optimizer.step()
        if reads_all_before:
            optimizer.flush()
        found.append(TRANSFORMS[transform](model.words))
        optimizer.flush()
        found[-1] = found[-1].detach(), model.words.weight.detach()
    (of_flushed, flushed), (of_read, read) = found
    torch.testing.assert_close(of_read, of_flushed)
    torch.testing.assert_close(read, flushed)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_nested_ids_are_read_one_by_one(backend: str, is_contiguous: bool) -> None:
    """Of bags; and where they are a part of what they lie in, the rest of it may be no row's."""
    bags = nn.EmbeddingBag(30, 4, mode="sum", sparse=True)
    optimizer = SparseAdam(bags.parameters(), lr=0.1, missed_steps="replay", backend=backend)
    optimizer.attach(bags)
    for _ in range(2):
        bags(torch.tensor([[1, 2, 5]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = bags.weight.detach().clone()
    if is_contiguous:
        ids = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([9])], layout=torch.jagged)
        assert bags(ids).shape == (2, 4)
    else:
        padded = torch.tensor([[1, 2, -1], [9, -1, -1]])
        ids = torch.nested.narrow(padded, 1, 0, torch.tensor([2, 1]), layout=torch.jagged)
        with pytest.raises(RuntimeError):  # PyTorch's own: such ids are for other modules
            bags(ids)
    has_moved = (bags.weight != before).any(1)
    assert has_moved.nonzero()[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_attached_model_trains_like_a_dense_one(backend: str, weight_decay: float, max_norm: float | None) -> None:
    dense, sparse = (Model(sparse=is_sparse, max_norm=max_norm) for is_sparse in (False, True))
    # The last dimension of chance: a row renormalised under max_norm may fall on either side of it.
    optimizer = SparseAdam(
        sparse.parameters(),
        lr=0.02,
        weight_decay=weight_decay,
        dense_gradients="adam",
        missed_steps="replay",
        backend=backend,
    )
    optimizer.attach(sparse)
    expected = train(dense, torch.optim.AdamW(dense.parameters(), lr=0.02, weight_decay=weight_decay))
    assert train(sparse, optimizer) == pytest.approx(expected, rel=1e-4)
    for (name, ours), theirs in zip(sparse.state_dict().items(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_evaluation_reads_rows_that_are_up_to_date(backend: str) -> None:
    dense, sparse = Model(sparse=False), Model(sparse=True)
    options: dict[str, Any] = {"dense_gradients": "adam", "missed_steps": "replay", "backend": backend}
    optimizer = SparseAdam(sparse.parameters(), lr=0.02, **options)
    optimizer.attach(sparse)
    train(dense, torch.optim.Adam(dense.parameters(), lr=0.02))
    train(sparse, optimizer)
    inputs = torch.arange(40)[:30], torch.arange(30)[:, None].expand(30, 3), torch.ones(30, 3)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(sparse.eval()(*inputs), dense.eval()(*inputs), rtol=1e-4, atol=1e-5)
    optimizer_state = optimizer.state[sparse.words.weight]
    assert not torch.equal(optimizer_state["weight_steps"], optimizer_state["moment_steps"])  # caught up, not stepped


def test_detached_and_copied_models_are_not_caught_up(backend: str) -> None:
    model = Model(sparse=True)
    optimizer = SparseAdam(model.parameters(), lr=0.02, dense_gradients="adam", missed_steps="replay", backend=backend)
    with optimizer.attach(model):
        train(model, optimizer, 20)
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        before = snapshot(optimizer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        inputs, _ = next(batches(1))
        for other in (copied, loaded):
            other(*inputs)
            other.state_dict()
        assert snapshot(optimizer) == before
    assert not any(replay.has_rows_behind(optimizer.state[each.weight]) for each in (model.words, model.tags))
    with pytest.raises(RuntimeError, match="rows that are behind"):
        train(model, optimizer, 20)


def test_detaching_without_replayed_tables_leaves_others_as_they_are(backend: str) -> None:
    table = nn.Embedding(20, 4, sparse=True)
    optimizer = SparseAdam(table.parameters(), weight_decay=0.1, weight_decay_mode="exact", backend=backend)
    with optimizer.attach(table):
        table(torch.tensor([3])).sum().backward()
        optimizer.step()
        before = snapshot(optimizer)
    assert snapshot(optimizer) == before


def test_a_state_dict_is_up_to_date_and_loading_one_leaves_nothing_to_catch_up(backend: str) -> None:
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True))
    optimizer = SparseAdam(model.parameters(), lr=0.1, weight_decay=0.1, missed_steps="replay", backend=backend)
    optimizer.attach(model)

    def step(rows: list[int]) -> None:
        optimizer.zero_grad()
        model(torch.tensor(rows)).square().sum().backward()
        optimizer.step()

    step([1, 2, 3])
    step([1])
    stale = model[0].weight.detach().clone()
    saved = copy.deepcopy(model.state_dict())
    assert not torch.equal(saved["0.weight"][2], stale[2])
    optimizer.flush()
    assert torch.equal(model[0].weight.detach(), saved["0.weight"])
    step([1])
    other = {"0.weight": torch.ones(20, 4)}
    model.load_state_dict(other)
    model(torch.arange(20))
    assert torch.equal(model[0].weight.detach(), other["0.weight"])


def test_skipping_is_not_changed_by_attaching(backend: str) -> None:
    losses = []
    for attaches in (False, True):
        model = Model(sparse=True)
        optimizer = SparseAdam(model.parameters(), lr=0.02, dense_gradients="adam", backend=backend)
        if attaches:
            optimizer.attach(model)
            optimizer.catch_up(model.words.weight, torch.tensor([1]))
        losses.append(train(model, optimizer, 10))
    assert losses[0] == losses[1]


def test_two_lookups_with_one_graph_between_them(backend: str) -> None:
    """Catching up for the second lookup must not spoil the graph of the first, which has saved the table."""
    model = Model(sparse=True)
    optimizer = SparseAdam(model.parameters(), lr=0.02, dense_gradients="adam", missed_steps="replay", backend=backend)
    optimizer.attach(model)
    train(model, optimizer, 20)
    (inputs, _), (more, _) = batches(2)
    loss = model(*inputs).sum()
    loss = loss + model(more[0].flip(0), 29 - more[1], more[2]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# Dynamo looks at the gradients of what is on the stack where it breaks the graph, and warns of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_a_compiled_model_catches_up(backend: str) -> None:
    expected, losses = [], []
    for compiles, taken in ((False, expected), (True, losses)):
        model = Model(sparse=True)
        optimizer = SparseAdam(
            model.parameters(), lr=0.02, dense_gradients="adam", missed_steps="replay", backend=backend
        )
        optimizer.attach(model)
        called = torch.compile(model, backend="eager") if compiles else model
        taken.extend(train(called, optimizer, 8))  # type: ignore[arg-type]
    assert losses == expected


# Saving, loading, and other changes of state ------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_run_that_was_saved_goes_on_with_the_same_bits(backend: str, weight_decay: float) -> None:
    setting = behind(backend, weight_decay=weight_decay)
    saved = {"optimizer": setting.optimizer.state_dict(), "table": setting.table.detach()}
    assert "weight_steps" not in saved["optimizer"]["state"][0]
    loaded = through_a_file(saved)
    table = nn.Parameter(loaded["table"])
    optimizer = SparseAdam([("words", table)], missed_steps="replay", weight_decay=weight_decay, backend=backend)
    optimizer.load_state_dict(loaded["optimizer"])
    for each, its_optimizer in ((setting.table, setting.optimizer), (table, optimizer)):
        for row in (3, 15, 3):
            its_optimizer.catch_up(each, torch.tensor([row]))
            give_gradient(each, torch.tensor([row]), torch.ones(1, 6))
            its_optimizer.step()
    assert snapshot(optimizer)["tables"] == snapshot(setting.optimizer)["tables"]
    assert snapshot(optimizer)["states"] == snapshot(setting.optimizer)["states"]


def test_a_copied_optimizer_has_its_own_history(backend: str) -> None:
    setting = behind(backend, weight_decay=0.1)
    table, optimizer = copy.deepcopy((setting.table, setting.optimizer))
    table = optimizer.param_groups[0]["params"][0]
    for each, its_optimizer in ((setting.table, setting.optimizer), (table, optimizer)):
        give_gradient(each, torch.tensor([0]), torch.ones(1, 6))
        its_optimizer.step()
        its_optimizer.flush()
    assert bits(table) == bits(setting.table)


def test_checkpoints_go_to_and_come_from_torchs_adamw(backend: str) -> None:
    setting = behind(backend, weight_decay=0.1)
    dense = nn.Parameter(torch.empty(20, 6))
    peer = torch.optim.AdamW([("words", dense)])
    peer.load_state_dict(setting.optimizer.to_torch_state_dict())
    dense.data = setting.table.detach().clone()
    back = nn.Parameter(dense.detach().clone())
    optimizer = SparseAdam([("words", back)], missed_steps="replay", backend=backend)
    optimizer.load_state_dict(peer.state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    for row in (3, 15, 3):
        for each, its_optimizer in ((setting.table, setting.optimizer), (back, optimizer)):
            its_optimizer.catch_up(each, torch.tensor([row]))
            give_gradient(each, torch.tensor([row]), torch.ones(1, 6))
            its_optimizer.step()
        dense.grad = setting.table.grad.to_dense()
        peer.step()
    setting.optimizer.flush()
    optimizer.flush()
    torch.testing.assert_close(setting.table, dense)
    torch.testing.assert_close(back, dense)


def test_a_live_state_taken_out_while_rows_are_behind_is_refused(backend: str) -> None:
    setting = behind(backend)
    live = dict(setting.optimizer.state[setting.table])
    setting.optimizer.state[setting.table] = live
    give_gradient(setting.table, torch.tensor([0]), torch.ones(1, 6))
    with pytest.raises(ValueError, match="shows rows that are behind step 4"):
        setting.optimizer.step()
    flushed = behind(backend)
    flushed.optimizer.flush()
    flushed.optimizer.state[flushed.table] = {
        name: part.clone() if isinstance(part, Tensor) else part
        for name, part in flushed.optimizer.state[flushed.table].items()
    }
    give_gradient(flushed.table, torch.tensor([0]), torch.ones(1, 6))
    flushed.optimizer.step()


def test_resizing_brings_all_rows_up_to_date_first(backend: str) -> None:
    setting, other = behind(backend, weight_decay=0.1), behind(backend, weight_decay=0.1)
    other.optimizer.flush()
    setting.table.grad = None
    setting.optimizer.resize(setting.table, 25)
    assert torch.equal(setting.table.detach()[:20], other.table.detach())
    give_gradient(setting.table, torch.tensor([4, 22]), torch.ones(2, 6))
    setting.optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_forgotten_rows_owe_nothing_and_others_are_as_they_were(backend: str, weight_decay: float) -> None:
    setting, other = behind(backend, weight_decay=weight_decay), behind(backend, weight_decay=weight_decay)
    setting.optimizer.forget(setting.table, torch.tensor([4, 15]))
    with torch.no_grad():
        setting.table[[4, 15]] = 1.0
    setting.optimizer.flush()
    other.optimizer.flush()
    assert (setting.table.detach()[[4, 15]] == 1.0).all()
    kept = [row for row in range(20) if row not in (4, 15)]
    assert torch.equal(setting.table.detach()[kept], other.table.detach()[kept])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_take_their_last_step_before_they_are_forgotten(backend: str, weight_decay: float) -> None:
    forgetting, reading = behind(backend, weight_decay=weight_decay), behind(backend, weight_decay=weight_decay)
    before = forgetting.table.detach().clone()
    forgetting.optimizer.forget(forgetting.table, torch.tensor([15, 4]))
    reading.optimizer.catch_up(reading.table, torch.tensor([15, 4]))
    assert (forgetting.table.detach()[4] != before[4]).all()
    assert bits(forgetting.table) == bits(reading.table)


def test_a_skipped_row_has_missed_the_step(backend: str) -> None:
    skipping, missing = behind(backend, nonfinite="skip"), behind(backend)
    for setting, rows in ((skipping, [0, 4]), (missing, [0])):
        setting.optimizer.catch_up(setting.table, torch.tensor([4]))
        values = torch.ones(len(rows), 6)
        values[1:] = math.nan
        give_gradient(setting.table, torch.tensor(rows), values)
        setting.optimizer.step()
        setting.optimizer.flush()
    assert bits(skipping.table) == bits(missing.table)
    assert skipping.optimizer.state[skipping.table]["num_skipped"] == 1


def test_a_dense_gradient_wants_the_whole_table_up_to_date(backend: str) -> None:
    setting = behind(backend, weight_decay=0.1, dense_gradients="adam")
    dense = nn.Parameter(torch.empty(20, 6))
    setting.table.grad = torch.ones(20, 6)
    before = snapshot(setting.optimizer)
    with pytest.raises(RuntimeError, match="is dense, and rows of it are behind"):
        setting.optimizer.step()
    assert snapshot(setting.optimizer) == before
    setting.optimizer.flush()
    peer = torch.optim.AdamW([("words", dense)])
    peer.load_state_dict(setting.optimizer.to_torch_state_dict())
    dense.data = setting.table.detach().clone()
    dense.grad = torch.ones(20, 6)
    setting.optimizer.step()
    peer.step()
    torch.testing.assert_close(setting.table, dense)
    give_gradient(setting.table, torch.tensor([4]), torch.ones(1, 6))  # and back
    dense.grad = setting.table.grad.to_dense()
    setting.optimizer.step()
    peer.step()
    setting.optimizer.flush()
    torch.testing.assert_close(setting.table, dense)


def up_to_date_where_touched(backend: str, weight_decay: float) -> Setting:
    """Return a setting with all rows up to date that were ever touched, and a dense gradient."""
    setting = behind(backend, weight_decay=weight_decay, dense_gradients="adam")
    setting.optimizer.catch_up(setting.table, torch.arange(10))
    setting.table.grad = torch.ones(20, 6)
    return setting


def test_a_dense_gradient_wants_rows_that_only_decay_up_to_date_too(backend: str) -> None:
    setting = up_to_date_where_touched(backend, 0.1)
    before = snapshot(setting.optimizer)
    with pytest.raises(RuntimeError, match="is dense, and rows of it are behind"):
        setting.optimizer.step()
    assert snapshot(setting.optimizer) == before


def test_a_dense_gradient_does_not_mind_rows_that_have_missed_nothing(backend: str) -> None:
    setting = up_to_date_where_touched(backend, 0.0)
    before = setting.table.detach().clone()
    setting.optimizer.step()
    assert (setting.table != before).all()
    assert setting.optimizer.state[setting.table]["exp_avg"].shape == (20, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tables_are_rounded_once_each_time(backend: str, dtype: torch.dtype) -> None:
    """Of a row that starts at zero, so that a weight's own size does not hide how far it moves."""
    wide, half = behind(backend), behind(backend, dtype)
    for setting in (wide, half):
        with torch.no_grad():
            setting.table[4] = 0.0
        setting.optimizer.catch_up(setting.table, torch.tensor([4]))
    difference = (wide.table.detach()[4] - half.table.detach()[4].float()).abs()
    # The gradient was rounded as well, which both moments feel alike.
    assert (difference <= 2 * torch.finfo(dtype).eps * wide.table.detach()[4].abs()).all()
    assert (wide.table.detach()[4] != 0).all()


def test_small_moves_of_half_precision_weights_add_up_where_rounding_is_stochastic(backend: str) -> None:
    """Catching up after each of many steps moves a weight by less than half its spacing each time."""
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        table = nn.Parameter(torch.full((2, 4096), 1.0, dtype=torch.bfloat16))
        optimizer = SparseAdam([table], lr=1e-3, missed_steps="replay", stochastic_rounding=stochastic, backend=backend)
        give_gradient(table, torch.tensor([1]), torch.ones(1, 4096))
        optimizer.step()
        optimizer.catch_up(table, torch.tensor([1]))
        with torch.no_grad():
            table.fill_(1.0)
        for _ in range(30):
            give_gradient(table, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4096))
            optimizer.step()
            optimizer.catch_up(table, torch.tensor([1]))
        moved[stochastic] = 1.0 - table.detach()[1].double().mean().item()
    exact = sum(
        1e-3 * (0.9**n * 0.1 / (1 - 0.9 ** (n + 1))) / math.sqrt(0.999**n * 0.001 / (1 - 0.999 ** (n + 1)))
        for n in range(1, 31)
    )
    assert moved[False] == 0.0
    # The spacing below 1 is 2**-8, so the mean of 4096 weights spreads by less than 2**-8 / 64.
    assert moved[True] == pytest.approx(exact, abs=4 * 2**-8 / 64)


def test_a_step_without_lookups_is_missed_by_whatever_the_next_one_names(backend: str) -> None:
    """Rows cannot be regrouped while they have moments; until then, steps are counted on."""
    runs = []
    for sparse_dim in (1, 2):
        table = nn.Parameter(torch.ones(5, 2))
        optimizer = SparseAdam([table], missed_steps="replay", backend=backend)
        none = torch.empty(sparse_dim, 0, dtype=torch.int64), torch.empty(0, *table.shape[sparse_dim:])
        table.grad = torch.sparse_coo_tensor(*none, table.shape, check_invariants=True)
        optimizer.step()
        table.grad = torch.sparse_coo_tensor([[4], [1]], [1.0], table.shape, check_invariants=True)
        optimizer.step()
        optimizer.flush()
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]


def test_another_seed_rounds_otherwise_what_rows_have_missed(backend: str) -> None:
    """Of rows that were touched, and of those that weight decay alone moves."""
    weights = []
    for seed in (1, 2, 1):
        table = nn.Parameter(torch.full((4, 256), 1.0, dtype=torch.bfloat16))
        generator = torch.Generator().manual_seed(seed)
        options = {"weight_decay": 0.1, "missed_steps": "replay", "stochastic_rounding": True}
        optimizer = SparseAdam([table], lr=0.01, generator=generator, backend=backend, **options)
        give_gradient(table, torch.tensor([1]), torch.ones(1, 256))
        optimizer.step()
        optimizer.flush()
        weights.append(table.detach().clone())
    assert torch.equal(weights[0], weights[2])
    assert (weights[0] != weights[1]).any(dim=1).all()


def test_a_long_history_ends_by_itself(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many steps all rows are brought up to date, and the run is dense Adam's all the same."""
    monkeypatch.setattr(replay, "_MAX_STEPS", 10)
    start = torch.randn(30, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = SparseAdam([ours], weight_decay=0.1, missed_steps="replay", backend=backend)
    peer = torch.optim.AdamW([dense], weight_decay=0.1)
    num_bytes = []
    for step in range(75):
        rows = torch.tensor([step * 7 % 30, step % 3])
        optimizer.catch_up(ours, rows)
        give_gradient(ours, rows, torch.ones(2, 3, dtype=torch.float64))
        dense.grad = ours.grad.to_dense()
        optimizer.step()
        peer.step()
        num_bytes.append(optimizer.moment_bytes())
    optimizer.flush()
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)
    assert max(num_bytes[60:]) <= num_bytes[60] + 10 * 64


def test_state_grows_by_eight_bytes_a_touched_row(backend: str) -> None:
    sizes = []
    for missed_steps in ("skip", "replay"):
        table = nn.Parameter(torch.zeros(1000, 4))
        optimizer = SparseAdam([table], missed_steps=missed_steps, backend=backend)
        give_gradient(table, torch.arange(500), torch.ones(500, 4))
        optimizer.step()
        sizes.append(optimizer.moment_bytes())
    assert sizes[1] - sizes[0] == 500 * 8 + 2 * 8 * 8  # and the numbers of the start and of one step
