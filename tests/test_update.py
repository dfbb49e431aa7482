"""The update of rows, in every backend, against the float64 oracle and against itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, many
from gradients import coo
from hypothesis import given
from hypothesis import strategies as st
from oracle import OracleTable

from sparseadam import SparseAdam
from sparseadam.update import native

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTHS = [1, 3, 7, 8, 9, 31, 64, 129]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")


def exact_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values of which hundreds can be summed exactly in float32, and each is exact in bfloat16 and float16."""
    return rng.integers(-128, 129, shape) / 64.0


def dense_state(optimizer: SparseAdam, table: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both moments of a table, spread out by row, from the public state alone."""
    state = optimizer.state[table]
    dense = []
    for name in ("exp_avg", "exp_avg_sq"):
        moment = torch.zeros(table.shape, dtype=torch.float64)
        if state:
            moment[state["rows"]] = state[name].double()
        dense.append(moment.numpy())
    return dense[0], dense[1]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Several tables in several groups, and for each step what each table's gradient looks up."""
    num_tables = draw(st.integers(1, 3))
    tables, options = [], []
    for _ in range(num_tables):
        tables.append((draw(st.integers(1, 40)), draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(list(DTYPES)))))
        options.append(
            {
                "lr": draw(st.sampled_from([1e-3, 0.1, 1.0])),
                "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.1), (0.99, 0.9)])),
                "eps": draw(st.sampled_from([1e-8, 1e-3])),
                "maximize": draw(st.booleans()),
                "torch_eps": draw(st.booleans()),
            }
        )
    steps = []
    for _ in range(draw(st.integers(1, 10))):
        lookups: list[list[int] | None] = []
        for num_rows, _, _ in tables:
            rows = st.lists(st.integers(0, num_rows - 1), max_size=30)
            lookups.append(draw(st.none() | rows))
        steps.append((draw(st.sampled_from([1.0, 0.0, 0.3])), lookups))
    return {"tables": tables, "options": options, "steps": steps, "seed": draw(st.integers(0, 2**32 - 1))}


@pytest.mark.parametrize("backend", BACKENDS)
@given(run=runs())
def test_every_step_agrees_with_the_oracle(backend: str, run: dict[str, Any]) -> None:
    rng = np.random.default_rng(run["seed"])
    tables, oracles, groups = [], [], []
    for (num_rows, width, dtype), options in zip(run["tables"], run["options"], strict=True):
        start = exact_values(rng, (num_rows, width))
        tables.append(torch.nn.Parameter(torch.as_tensor(start).to(DTYPES[dtype])))
        oracles.append(OracleTable(start, dtype))
        groups.append({"params": [tables[-1]], **options})
    optimizer = SparseAdam(groups, backend=backend)

    for lr_factor, lookups in run["steps"]:
        for table, oracle, options, group, rows in zip(
            tables, oracles, run["options"], optimizer.param_groups, lookups, strict=True
        ):
            table.grad = None
            group["lr"] = options["lr"] * lr_factor
            if rows is None:
                continue
            named = np.array(rows, dtype=np.int64)
            values = exact_values(rng, (len(rows), table.shape[1]))
            table.grad = coo(named, values, tuple(table.shape), table.dtype)
            oracle.step(named, values, **{**options, "lr": group["lr"]})
        before = [table.detach().clone() for table in tables]
        optimizer.step()
        for table, old, oracle, rows in zip(tables, before, oracles, lookups, strict=True):
            m, v = dense_state(optimizer, table)
            oracle.assert_close(table.detach().double().numpy(), m, v)
            unnamed = np.setdiff1d(np.arange(len(table)), rows or [])
            assert torch.equal(table.detach()[unnamed], old[unnamed])
            assert optimizer.state[table].get("step", 0) == oracle.t


def large_case(width: int, num_lookups: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A table and three gradients with hot rows, rows looked up once, and rows never looked up."""
    num_rows = 5000
    rng = np.random.default_rng(width * 100_003 + num_lookups)
    table = torch.as_tensor(rng.standard_normal((num_rows, width))).to(dtype)
    grads = []
    for _ in range(3):
        rows = np.minimum(rng.zipf(1.2, num_lookups), num_rows - 1) * 7 % num_rows
        grads.append(coo(rows, rng.standard_normal((num_lookups, width)), (num_rows, width), dtype))
    return table, grads


def run_steps(table: torch.Tensor, grads: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """The table and its state after a step with each gradient."""
    param = torch.nn.Parameter(table.clone())
    optimizer = SparseAdam([param], lr=0.1, backend=backend)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    state = optimizer.state[param]
    return [param.detach(), state["rows"].clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_lookups", [0, 1, 17, 20_000])
@pytest.mark.parametrize("width", WIDTHS)
def test_same_bits_for_any_thread_count_and_instruction_set(
    width: int, num_lookups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    table, grads = large_case(width, num_lookups, dtype)
    expected = None
    for instruction_set in native._module().instruction_sets():
        monkeypatch.setattr(native, "instruction_set", lambda name=instruction_set: name)
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            got = run_steps(table, grads, "native")
            expected = expected or got
            for part, (one, other) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(one, other), (instruction_set, num_threads, part)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("width", "num_lookups"), [(1, 20_000), (9, 20_000), (64, 20_000), (1601, 1_000)])
def test_native_agrees_with_reference_on_large_steps(width: int, num_lookups: int, dtype: torch.dtype) -> None:
    """Both sum in lookup order and in the same type, so only the last roundings of the update may differ.

    The widest rows have more than 3 KiB in every dtype: those are prefetched as on other processors, on all.
    """
    table, grads = large_case(width, num_lookups, dtype)
    native_run, reference_run = run_steps(table, grads, "native"), run_steps(table, grads, "reference")
    assert torch.equal(native_run[1], reference_run[1])
    unit = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    for got, want in zip(native_run[2:], reference_run[2:], strict=True):
        scale = want.abs().amax(dim=1, keepdim=True)
        assert ((got - want).abs() <= 16 * unit * scale).all()
    table_unit = torch.finfo(dtype).eps
    difference = (native_run[0].double() - reference_run[0].double()).abs()
    assert (difference <= 3 * table_unit * reference_run[0].abs().double() + 64 * unit).all()


def test_rows_beside_one_looked_up_more_often_than_a_thread_sorts_in_its_own_memory(backend: str) -> None:
    """Some of its neighbours are new in each step, so that they wait for slots among entries that are kept apart."""
    num_rows, width, most_in_own_memory = 4000, 3, 65_536
    rng = np.random.default_rng(5)
    start = exact_values(rng, (num_rows, width))
    table, oracle = torch.nn.Parameter(torch.as_tensor(start).float()), OracleTable(start, "float32")
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    optimizer = SparseAdam([table], **options, backend=backend)
    hot = np.full(most_in_own_memory + 5000, 7)
    for some_neighbours in (20, 60):
        named = rng.permutation(
            np.concatenate([hot, rng.integers(0, some_neighbours, 500), rng.integers(0, 4000, 500)])
        )
        values = exact_values(rng, (len(named), width))
        table.grad = coo(named, values, (num_rows, width), torch.float32)
        optimizer.step()
        oracle.step(named, values, **options)
    oracle.assert_close(table.detach().double().numpy(), *dense_state(optimizer, table))


def test_unnamed_rows_and_memory_around_the_table_keep_their_bits(backend: str) -> None:
    """NaNs with payloads around and between the named rows would show any stray read or write."""
    payload = torch.tensor(0x7FC0BEEF, dtype=torch.int32).view(torch.float32)
    memory = payload.expand(40, 9).clone()
    rows = torch.tensor([3, 8, 3, 21])
    table = torch.nn.Parameter(memory[5:35])
    with torch.no_grad():
        table[rows] = 1.0
    optimizer = SparseAdam([table], backend=backend)
    for _ in range(3):
        table.grad = coo(rows, torch.ones(4, 9), (30, 9), torch.float32)
        optimizer.step()
    is_named = torch.zeros(40, dtype=torch.bool)
    is_named[rows + 5] = True
    assert torch.equal(memory[~is_named].view(torch.int32), payload.expand(37, 9).contiguous().view(torch.int32))
    assert (memory[is_named] < 1.0).all()


def test_order_among_rows_does_not_matter(backend: str) -> None:
    """Only the order of a row's own lookups may: here it stays, and every bit with it."""
    table, grads = large_case(8, many(3000), torch.float32)
    moved = []
    for grad in grads:
        rows, values = grad._indices()[0], grad._values()
        order = torch.argsort(rows * 7919 % 5003, stable=True)
        moved.append(coo(rows[order], values[order], grad.shape, torch.float32))
    for got, want in zip(run_steps(table, moved, backend), run_steps(table, grads, backend), strict=True):
        assert torch.equal(got, want)


@given(cut=st.integers(1, 4999))
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_rows_step_as_the_whole_table_does(backend: str, cut: int) -> None:
    table, grads = large_case(3, 200, torch.float32)
    whole = run_steps(table, grads, backend)[0]
    for begin, end in ((0, cut), (cut, 5000)):
        parts = []
        for grad in grads:
            rows, values = grad._indices()[0], grad._values()
            is_here = (rows >= begin) & (rows < end)
            parts.append(coo(rows[is_here] - begin, values[is_here], (end - begin, 3), torch.float32))
        assert torch.equal(run_steps(table[begin:end], parts, backend)[0], whole[begin:end])


def test_splitting_a_lookup_in_two_does_not_matter_beyond_rounding(backend: str) -> None:
    table, grads = large_case(8, many(3000), torch.float64)
    halves = []
    for grad in grads:
        rows, values = grad._indices()[0], grad._values()
        parts = torch.cat([values * 0.25, values * 0.75])
        halves.append(coo(torch.cat([rows, rows]), parts, grad.shape, torch.float64))
    for got, want in zip(run_steps(table, halves, backend), run_steps(table, grads, backend), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@needs_native
def test_overlapping_views_are_updated_one_after_the_other(restore_threads: None) -> None:
    """Two tables that share rows: with threads racing, the shared rows would get one of two results."""
    rng = np.random.default_rng(0)
    results = []
    for num_threads in (1, 2, 2, 2):
        torch.set_num_threads(num_threads)
        memory = torch.zeros(20_000, 16)
        tables = [torch.nn.Parameter(memory[:15_000]), torch.nn.Parameter(memory[5_000:])]
        optimizer = SparseAdam(tables, lr=0.1, backend="native")
        rng = np.random.default_rng(0)
        for _ in range(3):
            for table in tables:
                rows = rng.integers(0, 15_000, 40_000)
                table.grad = coo(rows, rng.standard_normal((40_000, 16)), (15_000, 16), torch.float32)
            optimizer.step()
        results.append(memory)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("shape", "strides"), [((200, 4), (0, 1)), ((100, 4), (2, 1)), ((5, 5), (1, 1))], ids=str)
def test_a_table_whose_rows_share_memory_is_refused(
    backend: str, shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    memory = torch.ones(300)
    table = torch.nn.Parameter(memory.as_strided(shape, strides))
    optimizer = SparseAdam([table], backend=backend)
    table.grad = coo(np.array([1, 2]), np.ones((2, shape[1])), shape, torch.float32)
    with pytest.raises(RuntimeError, match="elements of group 0, parameter 0 share memory"):
        optimizer.step()
    assert (memory == 1).all()


def test_a_dimension_of_one_shares_no_memory_whatever_its_stride(backend: str) -> None:
    memory = torch.ones(40)
    table = torch.nn.Parameter(memory.as_strided((5, 1, 4), (8, 2, 1)))
    assert not table.is_contiguous()
    optimizer = SparseAdam([table], backend=backend)
    table.grad = torch.sparse_coo_tensor([[2]], torch.ones(1, 1, 4), table.shape, check_invariants=True)
    optimizer.step()
    assert (memory != 1).nonzero()[:, 0].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("is_first_step", [True, False])
def test_tables_on_one_memory_are_updated_in_their_order(backend: str, is_first_step: bool) -> None:
    """Also where rows are new to the first of them and known to the second."""
    memory = torch.ones(8, 4)
    tables = [torch.nn.Parameter(memory), torch.nn.Parameter(memory)]
    optimizer = SparseAdam(tables, lr=0.1, weight_decay=0.5, backend=backend)
    expected = torch.ones(8, 4)
    if not is_first_step:
        tables[1].grad = coo(np.arange(8), np.ones((8, 4)), (8, 4), torch.float32)
        optimizer.step()
        expected = memory.clone()
    for table, slope in zip(tables, (-1.0, 1.0), strict=True):
        table.grad = coo(np.arange(8), np.full((8, 4), slope), (8, 4), torch.float32)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * slope  # gradients of one size make steps of lr
    optimizer.step()
    torch.testing.assert_close(memory, expected, rtol=0, atol=1e-6)


@needs_native
def test_values_in_the_table_itself_are_read_before_they_are_written(restore_threads: None) -> None:
    torch.set_num_threads(2)
    start = torch.randn(40_001, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for backend in ("native", "reference"):
        table = torch.nn.Parameter(start.clone())
        optimizer = SparseAdam([table], lr=0.1, backend=backend)
        for _ in range(2):
            rows = torch.arange(1, 40_001)[None]
            table.grad = torch.sparse_coo_tensor(rows, table.data[:-1], table.shape, check_invariants=True)
            optimizer.step()
        found.append(table.detach())
    torch.testing.assert_close(found[0], found[1])


@needs_native
@pytest.mark.parametrize("layout", ["columns", "a table within it"])
def test_values_near_the_end_of_a_table_are_read_before_they_are_written(layout: str) -> None:
    """Where its rows lie apart, and where another table begins behind its begin and ends before."""
    start = torch.randn(4000, 8, generator=torch.Generator().manual_seed(4))
    found = []
    for backend in ("native", "reference"):
        memory = start.clone()
        tables = [torch.nn.Parameter(memory[:, :4] if layout == "columns" else memory)]
        if layout != "columns":
            tables.append(torch.nn.Parameter(memory[100:200]))
        optimizer = SparseAdam(tables, lr=0.1, backend=backend)
        width = tables[0].shape[1]
        for _ in range(2):
            rows = torch.arange(3001, 4000)
            values = memory[3000:3999].view(-1, width)[: len(rows)]
            tables[0].grad = torch.sparse_coo_tensor(rows[None], values, tables[0].shape, check_invariants=True)
            for inner in tables[1:]:
                inner.grad = coo(np.array([3, 9]), np.ones((2, width)), tuple(inner.shape), torch.float32)
            optimizer.step()
        found.append(memory)
    torch.testing.assert_close(found[0], found[1])


@needs_native
def test_numbers_flushed_to_zero_are_so_on_any_number_of_threads(restore_threads: None) -> None:
    """A thread has its own setting; those that help take the caller's."""
    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()  # torch's threads are there, without the setting
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            table = torch.nn.Parameter(torch.zeros(50_000, 64))
            optimizer = SparseAdam([table])
            table.grad = torch.sparse_coo_tensor(
                torch.arange(50_000)[None],
                torch.full((50_000, 64), 1e-19),
                table.shape,
                check_invariants=True,
            )
            optimizer.step()
            assert not optimizer.state[table]["exp_avg_sq"].view(torch.int32).any(), f"{num_threads} threads"
    finally:
        torch.set_flush_denormal(False)
    small = torch.full((1 << 20,), 1e-39)
    assert (small * 1.5).view(torch.int32).all(), "torch's threads have kept the setting"


@needs_native
def test_a_row_of_millions_of_lookups_is_sorted_as_any_other(restore_threads: None) -> None:
    """Partitions this large are sorted in other memory than small ones."""
    rng = np.random.default_rng(5)
    rows = np.where(rng.random(150_000) < 0.7, 777, rng.integers(0, 2000, 150_000))
    values = torch.from_numpy(rng.standard_normal((150_000, 3)))
    grad = coo(rows, values, (2000, 3), torch.float64)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        got = run_steps(torch.ones(2000, 3, dtype=torch.float64), [grad, grad], "native")
        want = run_steps(torch.ones(2000, 3, dtype=torch.float64), [grad, grad], "reference")
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_gradient_that_lies_about_being_coalesced_is_summed(backend: str) -> None:
    rows, values = torch.tensor([[4, 1, 4]]), torch.tensor([[1.0], [2.0], [3.0]])
    liar = torch.sparse_coo_tensor(rows, values, (6, 1), is_coalesced=True, check_invariants=False)
    honest = coo(rows[0], values, (6, 1), torch.float32)
    for got, want in zip(
        run_steps(torch.ones(6, 1), [liar], backend), run_steps(torch.ones(6, 1), [honest], backend), strict=True
    ):
        assert torch.equal(got, want)


def test_non_finite_gradients_spread_to_their_own_rows_only(backend: str) -> None:
    grad = coo(np.array([0, 2]), np.array([[np.nan], [np.inf]]), (3, 1), torch.float32)
    table = run_steps(torch.ones(3, 1), [grad], backend)[0]
    assert table[0].isnan() and table[2].isnan() and table[1] == 1.0


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_to_the_same_bits(restore_threads: None) -> None:
    """GNU OpenMP waits for ever in a child of a process that has used it: the child must not ask for its threads."""
    torch.set_num_threads(2)
    table, grads = large_case(16, 20_000, torch.float32)
    expected = run_steps(table, grads, "native")[0]
    param = torch.nn.Parameter(table.clone())
    optimizer = SparseAdam([param], lr=0.1, backend="native")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for grad in grads:
                param.grad = grad
                optimizer.step()
            torch.set_num_threads(1)  # torch's own operations would wait for ever
            os._exit(0 if torch.equal(param.detach(), expected) else 1)
        os._exit(2)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_before_the_first_step_steps() -> None:
    """In a process of its own, where torch has used its threads and this library has not."""
    script = """if True:
        import os, torch
        from sparseadam import SparseAdam
        torch.set_num_threads(2)
        torch.ones(1 << 22).sum()
        table = torch.nn.Parameter(torch.zeros(50_000, 64))
        optimizer = SparseAdam([table], backend="native")
        rows = torch.arange(50_000)[None]
        table.grad = torch.sparse_coo_tensor(rows, torch.ones(50_000, 64), table.shape, check_invariants=True)
        child = os.fork()
        if child == 0:
            optimizer.step()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


@needs_native
def test_optimizers_may_step_in_several_python_threads_at_once(restore_threads: None) -> None:
    torch.set_num_threads(2)
    cases = [large_case(width, 20_000, torch.float32) for width in (7, 8, 9, 16)]
    expected = [run_steps(table, grads, "native")[0] for table, grads in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda case: run_steps(*case, "native")[0], cases))
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
