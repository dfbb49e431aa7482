"""Checkpoints: resumed as if never stopped, exchanged with PyTorch, and refused whole where they do not fit."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from gradients import coo
from processes import leave_report, spawn
from saving import through_a_file
from snapshot import bits, snapshot, state_bits
from torch.nn import Parameter

from sparseadam import SparseAdam

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FIXTURE = Path(__file__).parent / "data" / "checkpoint_format_1.pt"
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")

# Between two ways of ordering the same operations, over the ten steps or fewer that these tests take.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-14}}


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Take torch's own steps on one thread: on a busy machine its teams wait for each other, for seconds at times."""
    torch.set_num_threads(1)


class Run:
    """Three tables in two groups, the last with element-wise gradients; a step's gradients are the same in all runs."""

    def __init__(
        self,
        backend: str = "reference",
        dtype: torch.dtype = torch.float32,
        *,
        tensor_lr: bool = False,
        named: bool = False,
        scheduled: bool = False,
        dense: bool = False,
        make: Callable[..., torch.optim.Optimizer] = SparseAdam,
        **options: Any,
    ) -> None:
        """Build the optimizer; with ``dense`` gradients are strided, zero where nothing is looked up."""
        generator = torch.Generator().manual_seed(5)
        shapes = {"users": (40, 8), "words": (25, 3), "cells": (6, 5)}
        self.tables = {
            name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
        }
        self.sparse_dims = {"users": 1, "words": 1, "cells": 2}
        self.dense = dense
        self.steps_taken = 0
        params: list[Any] = list(self.tables.items()) if named else list(self.tables.values())
        lrs: list[Any] = [torch.tensor(lr, dtype=torch.float64) for lr in (0.1, [0.03])] if tensor_lr else [0.1, 0.03]
        groups = [
            {"params": params[:1], "lr": lrs[0]},
            {"params": params[1:], "lr": lrs[1], "betas": (0.8, 0.95), "maximize": True},
        ]
        if make is SparseAdam:
            options = {"backend": backend, **options}
        self.optimizer: Any = make(groups, **options)
        self.schedulers: list[Any] = []
        if scheduled:
            self.schedulers = [
                torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5),
                torch.optim.lr_scheduler.LinearLR(self.optimizer, start_factor=0.5, total_iters=6),
            ]

    def steps(self, count: int) -> Run:
        """Take some steps."""
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.steps_taken)
            for name, table in self.tables.items():
                sizes = table.shape[: self.sparse_dims[name]]
                # Rows of the upper half are never looked up, and some of the lower half only late.
                indices = [torch.randint((size + 1) // 2, (8,), generator=generator) for size in sizes]
                row_shape = table.shape[len(sizes) :]
                values = torch.randn(8, *row_shape, generator=generator).to(table.dtype)
                grad = coo(torch.stack(indices), values, table.shape)
                table.grad = grad.to_dense() if self.dense else grad
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
            self.steps_taken += 1
        return self

    def take_over(self, other: Run, state_dict: Any = None) -> Run:
        """Go on where another run stands, by way of a file."""
        for table, theirs in zip(self.tables.values(), other.tables.values(), strict=True):
            table.data.copy_(theirs.detach())
        self.optimizer.load_state_dict(
            through_a_file(other.optimizer.state_dict() if state_dict is None else state_dict)
        )
        for scheduler, theirs_ in zip(self.schedulers, other.schedulers, strict=True):
            scheduler.load_state_dict(through_a_file(theirs_.state_dict()))
        self.steps_taken = other.steps_taken
        return self


def dense_moments(optimizer: torch.optim.Optimizer, table: torch.Tensor) -> list[torch.Tensor]:
    """The moments at the table's shape, of our state or of torch's: two, or three of AMSGrad."""
    state = optimizer.state[table]
    keys = [key for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if key in state]
    if "rows" not in state:
        return [state[key] for key in keys]
    spread = []
    for key in keys:
        row_shape = state[key].shape[1:]
        num_rows = table.numel() // math.prod(row_shape)
        moment = torch.zeros(num_rows, *row_shape, dtype=state[key].dtype)
        moment[state["rows"]] = state[key]
        spread.append(moment.reshape(table.shape))
    return spread


def assert_close(ours: Run, theirs: Run) -> None:
    """Compare tables, moments and step counts of two runs within rounding."""
    for name, table in ours.tables.items():
        other = theirs.tables[name]
        tolerance = TOLERANCE[table.dtype]
        torch.testing.assert_close(table.detach(), other.detach(), **tolerance)
        moments = dense_moments(ours.optimizer, table), dense_moments(theirs.optimizer, other)
        for mine, their in zip(*moments, strict=True):
            torch.testing.assert_close(mine, their, **tolerance)
        assert int(ours.optimizer.state[table]["step"]) == int(theirs.optimizer.state[other]["step"])


# Saved and resumed -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "Tensor lr"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_equals_one_that_never_stopped(backend: str, dtype: torch.dtype, tensor_lr: bool) -> None:
    options = {"tensor_lr": tensor_lr, "scheduled": True}
    unstopped = Run(backend, dtype, **options).steps(9)
    stopped = Run(backend, dtype, **options).steps(4)
    at_stop = snapshot(stopped.optimizer)
    resumed = Run(backend, dtype, **options).take_over(stopped)
    assert snapshot(resumed.optimizer) == at_stop
    resumed.steps(5)
    assert snapshot(resumed.optimizer) == snapshot(unstopped.optimizer)
    assert snapshot(stopped.optimizer) == at_stop
    assert [s.state_dict() for s in resumed.schedulers] == [s.state_dict() for s in unstopped.schedulers]


def test_a_checkpoint_replaces_state_and_options_that_are_there(backend: str) -> None:
    """As when training is set back: rows touched since must be as if never touched."""
    run = Run(backend).steps(3)
    tables = {name: table.detach().clone() for name, table in run.tables.items()}
    saved, at_save = through_a_file(run.optimizer.state_dict()), snapshot(run.optimizer)
    run.steps(5)
    run.optimizer.param_groups[0]["lr"] = 7.0
    after = snapshot(run.optimizer)
    for name, table in run.tables.items():
        table.data.copy_(tables[name])
    run.optimizer.load_state_dict(saved)
    assert snapshot(run.optimizer) == at_save
    run.steps_taken = 3
    run.steps(5)
    run.optimizer.param_groups[0]["lr"] = 7.0
    assert snapshot(run.optimizer) == after


def test_a_table_that_has_not_been_stepped_has_no_state_before_and_after(backend: str) -> None:
    tables = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = SparseAdam(tables, backend=backend)
    tables[1].grad = coo([[2]], torch.ones(1, 2), (4, 2))
    optimizer.step()
    resumed = SparseAdam([Parameter(table.detach().clone()) for table in tables], backend=backend)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert snapshot(resumed) == snapshot(optimizer)
    assert len(resumed.state) == 1


def test_a_state_without_touched_rows_keeps_its_step_count(backend: str) -> None:
    table = Parameter(torch.ones(4, 2))
    optimizer = SparseAdam([table], backend=backend)
    for _ in range(3):
        table.grad = coo(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 2), (4, 2))
        optimizer.step()
    resumed = SparseAdam([Parameter(torch.ones(4, 2))], backend=backend)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert snapshot(resumed) == snapshot(optimizer)
    assert next(iter(resumed.state.values()))["step"] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_numbers_that_no_narrow_float_could_hold_come_through(backend: str, dtype: torch.dtype) -> None:
    """PyTorch's loader would cast them to the table's dtype: float32 holds no odd number above 2**24."""
    num_rows = 2**25
    rows = torch.tensor([2**24 + 1, 2**25 - 1, 3, 2**24 + 3, 2049, 2**24])

    def build() -> tuple[Parameter, SparseAdam]:
        memory = torch.empty(num_rows, 1, dtype=dtype)  # committed where it is touched
        memory[rows] = 1.0
        table = Parameter(memory)
        return table, SparseAdam([table], backend=backend)

    def step(table: Parameter, optimizer: SparseAdam, which: torch.Tensor) -> None:
        table.grad = coo(which[None], torch.arange(1.0, len(which) + 1)[:, None].to(dtype), table.shape)
        optimizer.step()

    table, optimizer = build()
    step(table, optimizer, rows[:4])
    resumed_table, resumed = build()
    resumed_table.data[rows] = table.detach()[rows]
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.state[resumed_table]["rows"].tolist() == sorted(rows[:4].tolist())
    for one in (table, optimizer), (resumed_table, resumed):
        step(*one, rows)
    assert state_bits(resumed, resumed_table) == state_bits(optimizer, table)
    assert bits(resumed_table.detach()[rows]) == bits(table.detach()[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_moments_of_half_precision_tables_come_through_exactly(backend: str, dtype: torch.dtype) -> None:
    stopped = Run(backend, dtype).steps(4)
    resumed = Run(backend, dtype).take_over(stopped)
    for name, table in stopped.tables.items():
        want = stopped.optimizer.state[table]
        got = resumed.optimizer.state[resumed.tables[name]]
        for key in ("exp_avg", "exp_avg_sq"):
            assert got[key].dtype is torch.float32
            assert bits(got[key]) == bits(want[key])
            assert not torch.equal(want[key], want[key].to(dtype).float())  # there was something to lose


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("first", "second"), [("native", "reference"), ("reference", "native")])
def test_a_checkpoint_of_one_backend_resumes_under_the_other(first: str, second: str, dtype: torch.dtype) -> None:
    unstopped = Run(first, dtype).steps(8)
    resumed = Run(second, dtype).take_over(Run(first, dtype).steps(4)).steps(4)
    assert_close(resumed, unstopped)
    for name, table in unstopped.tables.items():
        rows = resumed.optimizer.state[resumed.tables[name]]["rows"]
        assert torch.equal(rows, unstopped.optimizer.state[table]["rows"])


def test_a_file_is_as_large_as_the_touched_rows_need(backend: str) -> None:
    num_rows, width, num_touched = 200_000, 32, 2000
    table = Parameter(torch.zeros(num_rows, width))
    optimizer = SparseAdam([table], backend=backend)
    rows = torch.arange(num_touched) * 99
    table.grad = coo(rows[None], torch.ones(num_touched, width), table.shape)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    needed = num_touched * (2 * width * 4 + 8)
    assert needed < file.tell() < needed + 5000


def test_tensors_of_a_state_dict_are_views_and_loading_copies_them(backend: str) -> None:
    run = Run(backend).steps(2)
    table = run.tables["users"]
    packed = run.optimizer.state_dict()
    loaded = Run(backend)
    loaded.optimizer.load_state_dict(packed)
    at_load = snapshot(loaded.optimizer)["states"]
    held, state = packed["state"][0], run.optimizer.state[table]
    assert type(held) is dict
    for key in ("rows", "exp_avg", "exp_avg_sq"):
        assert held[key].data_ptr() == state[key].data_ptr()
    before = bits(held["exp_avg"])

    run.steps(3)
    assert bits(held["exp_avg"]) != before
    num_held = len(held["exp_avg"])
    assert bits(held["exp_avg"]) == bits(run.optimizer.state[table]["exp_avg"][:num_held])
    assert snapshot(loaded.optimizer)["states"] == at_load

    held["exp_avg"].fill_(float("nan"))
    assert snapshot(loaded.optimizer)["states"] == at_load


def test_a_tensor_lr_of_a_checkpoint_is_copied() -> None:
    run = Run(tensor_lr=True).steps(1)
    packed = run.optimizer.state_dict()
    loaded = Run()
    loaded.optimizer.load_state_dict(packed)
    packed["param_groups"][0]["lr"].fill_(9.0)
    assert loaded.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_a_copied_state_dict_is_the_same_and_stands_apart(backend: str, copy: Callable[[Any], Any]) -> None:
    stopped = Run(backend).steps(4)
    copied = copy(stopped.optimizer.state_dict())
    resumed = Run(backend).take_over(stopped, copied)
    assert snapshot(resumed.optimizer) == snapshot(stopped.optimizer)
    before = {key: bits(value) for key, value in copied["state"][0].items()}
    stopped.steps(2)
    assert {key: bits(value) for key, value in copied["state"][0].items()} == before
    resumed.steps(2)
    assert snapshot(resumed.optimizer) == snapshot(stopped.optimizer)


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_a_copied_run_goes_on_alike_and_alone(backend: str, copy: Callable[[Any], Any]) -> None:
    run = Run(backend).steps(4)
    copied = copy(run)
    before = snapshot(run.optimizer)
    assert snapshot(copied.optimizer) == before
    copied.steps(3)
    assert snapshot(run.optimizer) == before
    run.steps(3)
    assert snapshot(copied.optimizer) == snapshot(run.optimizer)


def look_and_go_on(rank: int, world_size: int, port: int, folder: Path, run: Run) -> None:
    """Report, as a process that was started with a run, what has come of it, and of two steps more."""
    torch.set_num_threads(1)
    passed = snapshot(run.optimizer)
    leave_report([passed, snapshot(run.steps(2).optimizer)], folder, rank)


def test_a_run_is_passed_to_a_process_that_is_started(backend: str, tmp_path: Path) -> None:
    """PyTorch passes the file descriptors of tensors, which must outlive the pickling."""
    run = Run(backend).steps(4)
    (found,) = spawn(look_and_go_on, 1, tmp_path, run)
    assert found[0]["states"] == snapshot(run.optimizer)["states"]
    assert found[1]["states"] == snapshot(run.steps(2).optimizer)["states"]


def test_a_copied_moment_mapping_stands_apart(backend: str) -> None:
    run = Run(backend).steps(3)
    table = run.tables["words"]
    copied = deepcopy(run.optimizer.state[table])
    before = {key: bits(value) for key, value in copied.items()}
    assert before == state_bits(run.optimizer, table)
    run.steps(1)
    assert {key: bits(value) for key, value in copied.items()} == before


def test_a_state_put_back_as_a_plain_dict_still_steps_right(backend: str) -> None:
    run, untouched = Run(backend).steps(3), Run(backend).steps(3)
    for table in run.tables.values():
        run.optimizer.state[table] = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in run.optimizer.state[table].items()
        }
    assert snapshot(run.optimizer) == snapshot(untouched.optimizer)
    packed = run.optimizer.state_dict()
    assert snapshot(Run(backend).take_over(run, packed).optimizer) == snapshot(untouched.optimizer)
    run.steps(3)
    untouched.steps(3)
    assert snapshot(run.optimizer) == snapshot(untouched.optimizer)


# PyTorch's checkpoints ---------------------------------------------------------------------------


def rows_with_moments(run: Run, table: torch.Tensor) -> list[int]:
    """The rows of torch's dense moments that are not zero."""
    state = run.optimizer.state[table]
    return ((state["exp_avg"] != 0) | (state["exp_avg_sq"] != 0)).any(1).nonzero()[:, 0].tolist()


def assert_only_touched_rows_are_kept(ours: Run, theirs: Run) -> None:
    for name, table in ours.tables.items():
        rows = ours.optimizer.state[table]["rows"].tolist()
        assert rows == rows_with_moments(theirs, theirs.tables[name])
        assert 0 < len(rows) < len(table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_checkpoint_of_torch_sparse_adam_goes_on_with_the_same_numbers(backend: str, dtype: torch.dtype) -> None:
    theirs = Run(dtype=dtype, make=torch.optim.SparseAdam).steps(5)
    ours = Run(backend, dtype, torch_eps=True).take_over(theirs)
    assert_only_touched_rows_are_kept(ours, theirs)
    for name, table in ours.tables.items():
        their_moments = dense_moments(theirs.optimizer, theirs.tables[name])
        for mine, their in zip(dense_moments(ours.optimizer, table), their_moments, strict=True):
            assert torch.equal(mine, their)
    assert [group["betas"] for group in ours.optimizer.param_groups] == [(0.9, 0.999), (0.8, 0.95)]
    assert ours.optimizer.param_groups[1]["maximize"] is True
    assert ours.optimizer.param_groups[1]["torch_eps"] is True  # torch's checkpoint says nothing of it
    for _ in range(4):
        ours.steps(1)
        theirs.steps(1)
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_moments_of_torch_are_taken_over_as_float32(backend: str, dtype: torch.dtype) -> None:
    theirs = Run(dtype=dtype, make=torch.optim.Adam, dense=True).steps(3)
    ours = Run(backend, dtype).take_over(theirs)
    assert_only_touched_rows_are_kept(ours, theirs)
    for name, table in ours.tables.items():
        their_moments = dense_moments(theirs.optimizer, theirs.tables[name])
        for mine, their in zip(dense_moments(ours.optimizer, table), their_moments, strict=True):
            assert mine.dtype is torch.float32
            assert torch.equal(mine, their.float())
    ours.steps(2)


ADAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "Adam fused": (torch.optim.Adam, {"fused": True}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True}),
    "Adam not foreach": (torch.optim.Adam, {"foreach": False, "capturable": False}),
    "Adam differentiable": (torch.optim.Adam, {"differentiable": False, "amsgrad": False}),
    "Adam Tensor lr": (torch.optim.Adam, {"tensor_lr": True}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "Adam decoupled": (torch.optim.Adam, {"weight_decay": 0.5, "decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW without decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "AdamW amsgrad": (torch.optim.AdamW, {"weight_decay": 0.5, "amsgrad": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("make", "options"), ADAMS.values(), ids=ADAMS)
def test_a_checkpoint_of_torch_adam_goes_on_with_the_same_moments(
    backend: str, make: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Dense Adam also moves rows without a gradient; so the same rows have one at every step here."""
    # Adam's own update order differs little enough for the tolerance of ten steps.
    theirs = Run(dtype=dtype, make=make, dense=True, **options).steps(5)
    ours = Run(backend, dtype).take_over(theirs)
    assert_only_touched_rows_are_kept(ours, theirs)
    for group, their_group in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        for name in ("lr", "betas", "eps", "maximize", "weight_decay", "amsgrad"):
            assert group[name] == their_group[name]
        assert group["weight_decay_mode"] == "touched"  # torch's checkpoint says nothing of it
    for name, table in ours.tables.items():
        assert ours.optimizer.state[table]["step"] == 5
        their_moments = dense_moments(theirs.optimizer, theirs.tables[name])
        for mine, their in zip(dense_moments(ours.optimizer, table), their_moments, strict=True):
            assert torch.equal(mine, their)

    generator = torch.Generator().manual_seed(99)
    for _ in range(3):
        for name, table in ours.tables.items():
            grad = torch.randn(table.shape, generator=generator).to(dtype)
            theirs.tables[name].grad = grad
            table.grad = grad.to_sparse(1)
        ours.optimizer.step()
        theirs.optimizer.step()
        assert_close(ours, theirs)


@pytest.mark.parametrize("is_said", [True, False], ids=["not decoupled", "of an older torch"])
def test_a_checkpoint_of_an_adam_whose_weight_decay_is_in_its_gradients_is_refused(backend: str, is_said: bool) -> None:
    saved = Run(make=torch.optim.Adam, dense=True, weight_decay=0.1).steps(2).optimizer.state_dict()
    for group in saved["param_groups"]:
        assert group["decoupled_weight_decay"] is False
        if not is_said:
            del group["decoupled_weight_decay"]
    pattern = r"weight_decay=0\.1 of a torch\.optim\.Adam .*set it to 0.* or, .*decoupled_weight_decay to True"
    assert_refused(Run(backend).steps(3), saved, pattern)


def test_the_ways_out_of_that_refusal_load(backend: str) -> None:
    """As the message has it: without the decay, or with it for the decoupled one that an older AdamW meant."""
    theirs = Run(make=torch.optim.Adam, dense=True, weight_decay=0.1).steps(2)
    for way_out, weight_decay in (({"weight_decay": 0}, 0), ({"decoupled_weight_decay": True}, 0.1)):
        saved = deepcopy(theirs.optimizer.state_dict())
        for group in saved["param_groups"]:
            group.update(way_out)
        ours = Run(backend).take_over(theirs, saved)
        assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [weight_decay] * 2
        ours.steps(1)


@pytest.mark.parametrize(
    "options",
    [{"bias_correction": "row"}, {"second_moment": "row"}, {"moment_dtype": torch.bfloat16}],
    ids=str,
)
def test_dense_moments_are_refused_where_ours_are_kept_otherwise(backend: str, options: dict[str, Any]) -> None:
    saved = Run(make=torch.optim.Adam, dense=True).steps(2).optimizer.state_dict()
    with pytest.raises(ValueError, match=f"PyTorch's found, which load only .*{next(iter(options))}.* unchanged"):
        Run(backend, **options).optimizer.load_state_dict(saved)


def test_a_state_of_amsgrad_is_refused_though_its_group_says_otherwise(backend: str) -> None:
    saved = Run(make=torch.optim.Adam, dense=True, amsgrad=True).steps(2).optimizer.state_dict()
    for group in saved["param_groups"]:
        group["amsgrad"] = False
    assert_refused(Run(backend).steps(3), saved, "max_exp_avg_sq not understood")


def test_a_state_without_the_maximum_is_refused_where_its_group_says_amsgrad(backend: str) -> None:
    saved = Run(make=torch.optim.Adam, dense=True).steps(2).optimizer.state_dict()
    for group in saved["param_groups"]:
        group["amsgrad"] = True
    assert_refused(Run(backend).steps(3), saved, "max_exp_avg_sq missing, found step, exp_avg, exp_avg_sq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torch_sparse_adam_goes_on_from_our_checkpoint_with_the_same_numbers(backend: str, dtype: torch.dtype) -> None:
    ours = Run(backend, dtype, torch_eps=True).steps(5)
    before = snapshot(ours.optimizer)
    theirs = Run(dtype=dtype, make=torch.optim.SparseAdam)
    theirs.take_over(ours, ours.optimizer.to_torch_state_dict())
    assert snapshot(ours.optimizer) == before
    assert set(theirs.optimizer.param_groups[0]) == set(Run(make=torch.optim.SparseAdam).optimizer.param_groups[0])
    for _ in range(4):
        assert_close(ours, theirs)
        ours.steps(1)
        theirs.steps(1)
    back = Run(backend, dtype, torch_eps=True).take_over(theirs)
    back.steps(2)
    theirs.steps(2)
    assert_close(back, theirs)


def test_torch_sparse_adam_loads_our_checkpoint_of_tables_that_were_not_all_stepped() -> None:
    tables = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = SparseAdam(tables, backend="reference")
    tables[1].grad = coo([[2]], torch.ones(1, 2), (4, 2))
    optimizer.step()
    saved = through_a_file(optimizer.to_torch_state_dict())
    assert set(saved) == {"state", "param_groups"}
    torch_optimizer = torch.optim.SparseAdam([Parameter(torch.ones(4, 2)) for _ in range(2)])
    torch_optimizer.load_state_dict(saved)
    assert len(torch_optimizer.state) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_may_change_between_rows_and_elements(backend: str, dtype: torch.dtype) -> None:
    """Moments follow from rows of ``sparse_dim=1`` to elements and back, as torch's dense ones need not."""
    ours = Run(backend, dtype, torch_eps=True)
    theirs = Run(dtype=dtype, make=torch.optim.SparseAdam)
    for sparse_dims in ((1, 1, 2), (2, 1, 1), (2, 2, 2), (1, 2, 1), (1, 1, 1), (2, 1, 2)):
        for run in (ours, theirs):
            run.sparse_dims = dict(zip(run.tables, sparse_dims, strict=True))
            run.steps(1)
        assert_close(ours, theirs)
        resumed = Run(backend, dtype, torch_eps=True).take_over(ours)
        assert snapshot(resumed.optimizer) == snapshot(ours.optimizer)
    # The last table's gradients name few elements, and its moments came from rows: more elements than were ever named.
    assert len(ours.optimizer.state[ours.tables["cells"]]["rows"]) % 5 == 0


def test_a_dense_state_meets_element_wise_gradients(backend: str) -> None:
    theirs = Run(dtype=torch.float64, make=torch.optim.SparseAdam).steps(3)
    ours = Run(backend, torch.float64, torch_eps=True).take_over(theirs)
    assert ours.optimizer.state[ours.tables["cells"]]["exp_avg"].dim() == 2
    ours.steps(1)
    theirs.steps(1)
    assert ours.optimizer.state[ours.tables["cells"]]["exp_avg"].dim() == 1
    assert_close(ours, theirs)


# Checkpoints that do not fit ---------------------------------------------------------------------


def assert_refused(run: Run, saved: Any, pattern: str, error: type[Exception] = ValueError) -> None:
    """Load, see that it raises and changes nothing, and that the run goes on as if nothing had been tried."""
    before, steps_taken = snapshot(run.optimizer), run.steps_taken
    states = dict(run.optimizer.state)
    with pytest.raises(error, match=pattern) as raised:
        run.optimizer.load_state_dict(saved)
    assert type(raised.value) is error
    assert snapshot(run.optimizer) == before
    assert all(run.optimizer.state[table] is state for table, state in states.items())

    undisturbed = Run(run.optimizer._backend).steps(steps_taken + 2)
    run.steps(2)
    assert snapshot(run.optimizer) == snapshot(undisturbed.optimizer)


Change = Callable[[dict[str, Any]], Any]


def put(**parts: Any) -> Change:
    """A checkpoint's last state with parts exchanged; callables are given the part as it was."""

    def change(saved: dict[str, Any]) -> None:
        state = saved["state"][2]
        for key, part in parts.items():
            state[key] = part(state[key]) if callable(part) else part

    return change


def drop(key: str) -> Change:
    return lambda saved: saved["state"][2].pop(key)


def put_row(row: int) -> Change:
    def change(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[-1] = row
        return rows

    return put(rows=change)


def repeat_row(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[:-1], rows[:1]])


def touch_all_rows(run: Run) -> None:
    for table in run.tables.values():
        table.grad = torch.ones_like(table).to_sparse(1)
    run.optimizer.step()


MISFITS: dict[str, tuple[Change, str]] = {
    "step missing": (drop("step"), "step missing, found rows, exp_avg, exp_avg_sq"),
    "rows missing": (drop("rows"), "rows missing"),
    "exp_avg missing": (drop("exp_avg"), "exp_avg missing, found step, rows, exp_avg_sq"),
    "exp_avg_sq missing": (drop("exp_avg_sq"), "exp_avg_sq missing, found step, rows, exp_avg"),
    "extra key": (put(max_exp_avg_sq=1), "max_exp_avg_sq not understood"),
    "step negative": (put(step=-1), "step is -1, a whole number"),
    "step a fraction": (put(step=2.5), "step is 2.5, a whole number"),
    "step nan": (put(step=math.nan), "step is nan, a whole number"),
    "step inf": (put(step=math.inf), "step is inf, a whole number"),
    "step nan tensor": (put(step=torch.tensor(math.nan)), r"step is .*nan.*, a whole number"),
    "step None": (put(step=None), "step is None, a whole number"),
    "step str": (put(step="3"), "step is '3', a whole number"),
    "step bool": (put(step=True), "step is True, a whole number"),
    "step of two": (put(step=torch.tensor([3, 3])), r"step is tensor\(\[3, 3\]\), a whole number"),
    "row too large": (put_row(30), "row 30 is outside the table's 30 rows"),
    "row far too large": (put_row(2**40), f"row {2**40} is outside the table's 30 rows"),
    "row negative": (put_row(-1), "row -1 is outside the table's 30 rows"),
    "row repeated": (put(rows=repeat_row), r"row \d+ is there more than once"),
    "rows int32": (put(rows=lambda rows: rows.int()), r"rows is torch\.int32 .*torch\.int64 .*expected"),
    "rows float": (put(rows=lambda rows: rows.float()), r"rows is torch\.float32 .*torch\.int64 .*expected"),
    "rows a list": (put(rows=lambda rows: rows.tolist()), "rows is (a )?list, .*torch.int64 .*expected"),
    "rows 2-D": (put(rows=lambda rows: rows[None]), r"rows is torch\.int64 \[1, \d+\], .*expected"),
    # The last state has nine slots.
    "a row too few": (put(rows=lambda rows: rows[1:]), "8 rows for 9 rows of exp_avg"),
    "a row too many": (put(rows=lambda rows: torch.cat([rows, rows[:1]])), "10 rows for 9 rows of exp_avg"),
    "exp_avg too short": (put(exp_avg=lambda m: m[1:]), "9 rows for 8 rows of exp_avg"),
    "exp_avg_sq too short": (
        put(exp_avg_sq=lambda v: v[1:]),
        r"exp_avg_sq is torch\.float32 \[8\], torch\.float32 \[9\] expected",
    ),
    "exp_avg_sq of another shape": (
        put(exp_avg_sq=lambda v: v[:, None]),
        r"exp_avg_sq is torch\.float32 \[9, 1\], torch\.float32 \[9\] expected",
    ),
    "moments of other rows": (
        put(exp_avg=lambda m: m[:, None].expand(-1, 4), exp_avg_sq=lambda v: v[:, None].expand(-1, 4)),
        r"exp_avg has shape \[\d+, 4\], .*\[6, 5\]",
    ),
    "moments of a point": (put(exp_avg=torch.tensor(1.0), exp_avg_sq=torch.tensor(1.0)), r"exp_avg has shape \[\]"),
    "moments of too many dimensions": (
        put(exp_avg=lambda m: m[:, None, None, None], exp_avg_sq=lambda v: v[:, None, None, None]),
        r"exp_avg has shape \[\d+, 1, 1, 1\], .*\[6, 5\]",
    ),
    "exp_avg float64": (
        put(exp_avg=lambda m: m.double()),
        r"exp_avg has dtype torch\.float64, torch\.float32 expected",
    ),
    "exp_avg_sq bfloat16": (
        put(exp_avg_sq=lambda v: v.bfloat16()),
        r"exp_avg_sq has dtype torch\.bfloat16, torch\.float32 expected",
    ),
    "exp_avg a list": (put(exp_avg=lambda m: m.tolist()), "exp_avg is a list, a strided tensor expected"),
    "exp_avg None": (put(exp_avg=None), "exp_avg is a NoneType, a strided tensor expected"),
    "exp_avg sparse": (
        put(exp_avg=lambda m: m.to_sparse()),
        r"exp_avg .*torch\.sparse_coo.*, a strided tensor expected",
    ),
    "num_skipped negative": (put(num_skipped=-1), "num_skipped is -1, an int of at least 0 expected"),
    "num_skipped a float": (put(num_skipped=2.0), r"num_skipped is 2\.0, an int of at least 0 expected"),
    "num_skipped a flag": (put(num_skipped=True), "num_skipped is True, an int of at least 0 expected"),
}


@pytest.mark.parametrize(("change", "pattern"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_is_refused_though_it_is_the_last_of_several(
    backend: str, change: Change, pattern: str
) -> None:
    saved = deepcopy(Run(backend).steps(4).optimizer.state_dict())
    change(saved)
    whole = (
        r"^the checkpoint does not fit this optimizer: state of group 1, parameter 1: "
        rf".*{pattern}.* The optimizer is unchanged\.$"
    )
    assert_refused(Run(backend).steps(2), saved, f"(?s){whole}")


def test_a_state_without_rows_is_not_taken_for_a_dense_one_where_all_rows_were_touched(backend: str) -> None:
    """Its moments have the table's shape then, in the order of first touch: dense they would be those of other rows."""
    table = Parameter(torch.zeros(4, 2))
    optimizer = SparseAdam([table], backend=backend)
    for row in (3, 1, 0, 2):
        table.grad = coo([[row]], torch.full((1, 2), row + 1.0), (4, 2))
        optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["rows"]
    loaded = SparseAdam([Parameter(torch.zeros(4, 2))], backend=backend)
    with pytest.raises(ValueError, match="rows missing"):
        loaded.load_state_dict(saved)


DENSE_MISFITS: dict[str, tuple[Change, str]] = {
    "step missing": (drop("step"), "step missing, found exp_avg, exp_avg_sq"),
    "exp_avg missing": (drop("exp_avg"), "exp_avg missing"),
    "exp_avg_sq missing": (drop("exp_avg_sq"), "exp_avg_sq missing"),
    "extra key": (put(momentum_buffer=1), "momentum_buffer not understood"),
    "other shape": (put(exp_avg=torch.zeros(6, 4)), r"exp_avg has shape \[6, 4\], the table's \[6, 5\] expected"),
    "transposed": (put(exp_avg_sq=lambda v: v.t()), r"exp_avg_sq has shape \[5, 6\], the table's \[6, 5\] expected"),
    "other dtype": (put(exp_avg=lambda m: m.double()), r"exp_avg has dtype torch\.float64, torch\.float32 expected"),
    "step negative": (put(step=torch.tensor(-1.0)), r"step is tensor\(-1\.\), a whole number"),
    "step a fraction": (put(step=torch.tensor(1.5)), r"step is tensor\(1\.5.*\), a whole number"),
}


@pytest.mark.parametrize(("change", "pattern"), DENSE_MISFITS.values(), ids=DENSE_MISFITS)
def test_a_dense_state_that_does_not_fit_is_refused(backend: str, change: Change, pattern: str) -> None:
    saved = deepcopy(Run(make=torch.optim.SparseAdam).steps(4).optimizer.state_dict())
    change(saved)
    assert_refused(Run(backend).steps(2), saved, f"state of group 1, parameter 1: {pattern}.*unchanged")


def test_a_named_parameter_is_named_when_its_state_does_not_fit(backend: str) -> None:
    saved = deepcopy(Run(backend, named=True).steps(1).optimizer.state_dict())
    saved["state"][2]["step"] = -1
    with pytest.raises(ValueError, match=r"state of 'cells' \(group 1, parameter 1\): step is -1"):
        Run(backend, named=True).optimizer.load_state_dict(saved)


def drop_group(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def drop_param(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


def in_last_group(**options: Any) -> Change:
    return lambda saved: saved["param_groups"][1].update(options)


def at_top(**parts: Any) -> Change:
    return lambda saved: saved.update(parts)


WHOLE_MISFITS: dict[str, tuple[Change, type[Exception], str]] = {
    "states in a list": (at_top(state=[]), TypeError, "state is list, a dict expected"),
    "no groups": (at_top(param_groups=None), TypeError, "param_groups is NoneType, a list of dicts expected"),
    "a group that is none": (at_top(param_groups=[{}, 3]), TypeError, r"param_groups\[1\] is int, a dict expected"),
    "one number for all": (
        in_last_group(params=3),
        TypeError,
        r"param_groups\[1\]\['params'\] is int, a list expected",
    ),
    "a group too few": (drop_group, ValueError, "1, and the optimizer has 2"),
    "a parameter too few": (drop_param, ValueError, "1 parameters? for the 2 of group 1"),
    "a newer format": (
        at_top(sparseadam_format=2),
        ValueError,
        "sparseadam_format is 2, and this version of sparseadam reads 1",
    ),
    "lr negative": (in_last_group(lr=-1.0), ValueError, "Invalid learning rate: -1.0.*parameter group 1"),
    "lr nan": (in_last_group(lr=math.nan), ValueError, "Invalid learning rate: nan.*parameter group 1"),
    "lr None": (in_last_group(lr=None), TypeError, "lr must be a number.*parameter group 1"),
    "eps zero": (in_last_group(eps=0.0), ValueError, "Invalid epsilon value: 0.0.*parameter group 1"),
    "beta one": (in_last_group(betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1.*parameter group 1"),
    "maximize int": (in_last_group(maximize=1), TypeError, "maximize must be True or False.*parameter group 1"),
    "weight_decay negative": (
        in_last_group(weight_decay=-0.1),
        ValueError,
        "Invalid weight_decay value: -0.1.*parameter group 1",
    ),
    "weight_decay_mode unknown": (
        in_last_group(weight_decay_mode="sometimes"),
        ValueError,
        "Invalid weight_decay_mode: 'sometimes'.*parameter group 1",
    ),
    "amsgrad int": (in_last_group(amsgrad=1), TypeError, "amsgrad must be True or False.*parameter group 1"),
    # What the state of a group's first table lacks for its options.
    "amsgrad": (in_last_group(amsgrad=True), ValueError, "group 1, parameter 0: max_exp_avg_sq missing, found"),
    "row steps": (in_last_group(bias_correction="row"), ValueError, "group 1, parameter 0: row_steps missing, found"),
    "exact decay": (
        in_last_group(weight_decay_mode="exact"),
        ValueError,
        "group 1, parameter 0: paid_log_decay, log_decay missing, found",
    ),
    "one second moment a row": (
        in_last_group(second_moment="row"),
        ValueError,
        r"group 1, parameter 0: exp_avg_sq is torch\.float32 \[\d+, 3\], torch\.float32 \[\d+\] expected",
    ),
    "moments of fewer bits": (
        in_last_group(moment_dtype=torch.bfloat16, seed=0),
        ValueError,
        r"group 1, parameter 0: exp_avg has dtype torch\.float32, torch\.bfloat16 expected",
    ),
}


@pytest.mark.parametrize(("change", "error", "pattern"), WHOLE_MISFITS.values(), ids=WHOLE_MISFITS)
def test_a_checkpoint_whose_groups_do_not_fit_is_refused(
    backend: str, change: Change, error: type[Exception], pattern: str
) -> None:
    saved = deepcopy(Run(backend).steps(4).optimizer.state_dict())
    change(saved)
    assert_refused(Run(backend).steps(2), saved, pattern, error)


@pytest.mark.parametrize("saved", [None, 3, []], ids=str)
def test_what_is_no_state_dict_is_refused(backend: str, saved: Any) -> None:
    assert_refused(Run(backend).steps(2), saved, f"a state dict is {type(saved).__name__}, a dict expected", TypeError)


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_a_state_dict_without_one_of_its_two_parts_is_refused(backend: str, key: str) -> None:
    saved = deepcopy(Run(backend).steps(4).optimizer.state_dict())
    del saved[key]
    assert_refused(Run(backend).steps(2), saved, f"{key} missing, found ", ValueError)


@pytest.mark.parametrize("change", [drop_group, drop_param], ids=["groups", "parameters"])
def test_groups_that_do_not_match_are_refused_beginning_with_the_words_of_torch(change: Change) -> None:
    messages = []
    for make in (SparseAdam, torch.optim.SparseAdam):
        run = Run(make=make)
        saved = run.optimizer.state_dict()
        change(saved)
        with pytest.raises(ValueError) as raised:
            run.optimizer.load_state_dict(saved)
        messages.append(str(raised.value))
    assert messages[0].startswith(messages[1])


# Hooks and names ---------------------------------------------------------------------------------


def test_state_dict_hooks_run_and_may_replace_the_dict(backend: str) -> None:
    run = Run(backend).steps(2)
    calls: list[str] = []

    def after(optimizer: Any, packed: dict[str, Any]) -> dict[str, Any]:
        calls.append("after")
        assert optimizer is run.optimizer
        # What a hook sees is what a file would hold.
        assert all(type(state) is dict for state in packed["state"].values())
        assert packed["sparseadam_format"] == 1
        return {**packed, "note": "kept"}

    run.optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("before"))
    run.optimizer.register_state_dict_post_hook(after)
    packed = run.optimizer.state_dict()
    assert calls == ["before", "after"]
    assert packed["note"] == "kept"
    assert run.optimizer.state_dict()["note"] == "kept"  # no hook of ours is left behind or lost
    assert calls == ["before", "after"] * 2
    assert len(run.optimizer._optimizer_state_dict_post_hooks) == 1
    assert snapshot(Run(backend).take_over(run, packed).optimizer) == snapshot(run.optimizer)


def test_a_state_dict_hook_that_raises_leaves_no_hook_behind() -> None:
    run = Run().steps(1)

    def fail(optimizer: Any, packed: dict[str, Any]) -> None:
        raise RuntimeError("no")

    handle = run.optimizer.register_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        run.optimizer.state_dict()
    handle.remove()
    assert not run.optimizer._optimizer_state_dict_post_hooks


def test_load_hooks_run_and_may_replace_the_dict(backend: str) -> None:
    saved = Run(backend).steps(4).optimizer.state_dict()
    given = {"wrapped": saved}
    run = Run(backend)
    calls: list[str] = []

    def before(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        assert optimizer is run.optimizer
        unwrapped: dict[str, Any] = state_dict.pop("wrapped")
        return unwrapped

    def look(optimizer: Any, state_dict: dict[str, Any]) -> None:
        calls.append("look")
        assert "state" in state_dict

    def after(optimizer: Any) -> None:
        calls.append("after")
        assert optimizer.state[run.tables["users"]]["step"] == 4

    run.optimizer.register_load_state_dict_pre_hook(before)
    run.optimizer.register_load_state_dict_pre_hook(look)
    run.optimizer.register_load_state_dict_post_hook(after)
    run.optimizer.load_state_dict(given)
    assert calls == ["before", "look", "after"]
    assert "wrapped" in given  # a hook is given a copy
    at_load = snapshot(run.optimizer)

    saved["state"][2]["step"] = -1
    with pytest.raises(ValueError, match="step is -1"):
        run.optimizer.load_state_dict(given)
    assert calls == ["before", "look", "after", "before", "look"]
    assert snapshot(run.optimizer) == at_load


@pytest.mark.parametrize("names_here", [True, False], ids=["named here", "unnamed here"])
@pytest.mark.parametrize("names_saved", [True, False], ids=["named in file", "unnamed in file"])
def test_names_of_parameters_are_handled_as_torch_handles_them(names_here: bool, names_saved: bool) -> None:
    found = []
    for make in (SparseAdam, torch.optim.SparseAdam):
        saved = through_a_file(Run(make=make, named=names_saved).steps(2).optimizer.state_dict())
        if names_saved:
            saved["param_groups"][1]["param_names"] = ["renamed", "cells"]
        run = Run(make=make, named=names_here)
        run.optimizer.load_state_dict(saved)
        found.append(
            (
                [group.get("param_names") for group in saved["param_groups"]],
                [group.get("param_names") for group in run.optimizer.param_groups],
            )
        )
    assert found[0] == found[1]
    assert (found[0][1][1] is not None) == (names_here or names_saved)


def test_states_of_no_parameter_are_kept_as_torch_keeps_them() -> None:
    kept = []
    for make in (SparseAdam, torch.optim.SparseAdam):
        saved = Run(make=make).steps(2).optimizer.state_dict()
        saved["state"]["shared"] = {"counter": [1, 2]}
        run = Run(make=make)
        run.optimizer.load_state_dict(saved)
        kept.append((run.optimizer.state["shared"], run.optimizer.state_dict()["state"]["shared"]))
        run.steps(1)
    assert kept[0] == kept[1] == ({"counter": [1, 2]}, {"counter": [1, 2]})


# Old files ---------------------------------------------------------------------------------------


class SmallRun:
    """What the fixture was made from: exact in binary, so that its values can be written down."""

    def __init__(self, backend: str = "reference", **options: Any) -> None:
        """Build what has not been stepped yet."""
        self.tables = {
            "float_table": Parameter(torch.zeros(5, 2)),
            "half_table": Parameter(torch.zeros(4, 1, dtype=torch.bfloat16)),
            "cells": Parameter(torch.zeros(2, 3, dtype=torch.float64)),
        }
        items = list(self.tables.items())
        groups = [
            {"params": items[:2]},
            {"params": items[2:], "lr": torch.tensor(0.25), "maximize": True, "torch_eps": True},
        ]
        self.optimizer = SparseAdam(groups, lr=0.125, betas=(0.5, 0.75), eps=0.5, backend=backend, **options)

    def step(self, row: int) -> None:
        """Take a step that looks up ``row`` of the first table, and the same of the others in all steps."""
        float_table, half_table, cells = self.tables.values()
        float_table.grad = coo([[row, 2]], torch.tensor([[2.0, -4.0], [1.0, 0.0]]), (5, 2))
        half_table.grad = coo([[3]], torch.ones(1, 1, dtype=torch.bfloat16), (4, 1))
        cells.grad = coo([[0, 1], [2, 0]], torch.tensor([8.0, 16.0], dtype=torch.float64), (2, 3))
        self.optimizer.step()


def small_run(backend: str = "reference") -> SmallRun:
    """The run as it stood when the fixture was written."""
    run = SmallRun(backend)
    for row in (4, 1):
        run.step(row)
    return run


def write_fixture() -> None:
    """Write the fixture, as it was written once by the first version; its values are in the test below.

    To be run again for no reason but a new format, and then into a file of that format's number.
    """
    FIXTURE.parent.mkdir(exist_ok=True)
    torch.save(small_run().optimizer.state_dict(), FIXTURE)


def test_a_file_of_format_1_loads_to_what_was_saved() -> None:
    saved = torch.load(FIXTURE, weights_only=True)
    assert saved["sparseadam_format"] == 1
    tables = {
        "float_table": Parameter(torch.zeros(5, 2)),
        "half_table": Parameter(torch.zeros(4, 1, dtype=torch.bfloat16)),
        "cells": Parameter(torch.zeros(2, 3, dtype=torch.float64)),
    }
    names = list(tables)
    groups = [{"params": [tables[name] for name in names[:2]]}, {"params": [tables["cells"]]}]
    optimizer = SparseAdam(groups, backend="reference")
    defaults = dict(optimizer.defaults)
    optimizer.load_state_dict(saved)

    first, second = optimizer.param_groups
    assert (first["lr"], first["betas"], first["eps"]) == (0.125, (0.5, 0.75), 0.5)
    assert (first["maximize"], first["torch_eps"]) == (False, False)
    assert torch.equal(second["lr"], torch.tensor(0.25))
    assert (second["maximize"], second["torch_eps"]) == (True, True)
    assert first["param_names"] + second["param_names"] == names
    newer = set(defaults) - set(saved["param_groups"][0])
    assert newer >= {"weight_decay", "amsgrad", "bias_correction", "second_moment", "moment_dtype", "nonfinite"}
    for group in (first, second):
        assert {name: group[name] for name in newer} == {name: defaults[name] for name in newer}

    want: dict[str, dict[str, Any]] = {
        "float_table": {
            "step": 2,
            "rows": torch.tensor([2, 4, 1]),
            "exp_avg": torch.tensor([[0.75, 0.0], [1.0, -2.0], [1.0, -2.0]]),
            "exp_avg_sq": torch.tensor([[0.4375, 0.0], [1.0, 4.0], [1.0, 4.0]]),
        },
        "half_table": {
            "step": 2,
            "rows": torch.tensor([3]),
            "exp_avg": torch.tensor([[0.75]]),
            "exp_avg_sq": torch.tensor([[0.4375]]),
        },
        "cells": {
            "step": 2,
            "rows": torch.tensor([2, 3]),
            "exp_avg": torch.tensor([-6.0, -12.0], dtype=torch.float64),
            "exp_avg_sq": torch.tensor([28.0, 112.0], dtype=torch.float64),
        },
    }
    for name, table in tables.items():
        state: Mapping[str, Any] = optimizer.state[table]
        assert {key: bits(value) for key, value in state.items()} == {
            key: bits(value) for key, value in want[name].items()
        }


def test_a_run_of_format_1_goes_on_bit_for_bit(backend: str) -> None:
    unstopped, resumed = small_run(backend), SmallRun(backend)
    for name, table in resumed.tables.items():
        table.data.copy_(unstopped.tables[name].detach())
    resumed.optimizer.load_state_dict(torch.load(FIXTURE, weights_only=True))
    assert snapshot(resumed.optimizer) == snapshot(unstopped.optimizer)
    for row in (1, 0, 3):
        for run in (unstopped, resumed):
            run.step(row)
        assert snapshot(resumed.optimizer) == snapshot(unstopped.optimizer)


def test_options_newer_than_a_file_keep_what_they_are_set_to(backend: str) -> None:
    run = SmallRun(backend, weight_decay=0.25, nonfinite="skip")
    run.optimizer.load_state_dict(torch.load(FIXTURE, weights_only=True))
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.25, 0.25]
    assert [group["nonfinite"] for group in run.optimizer.param_groups] == ["skip", "skip"]


def test_files_are_still_written_as_format_1_was() -> None:
    """Should this fail, old versions may misread new files: that asks for a new format number.

    Options that they do not know may be there, if they then mean what was done before there was a choice.
    """
    old = torch.load(FIXTURE, weights_only=True)
    run = small_run()
    new = through_a_file(run.optimizer.state_dict())
    assert list(new) == list(old)
    assert list(new["state"]) == list(old["state"])
    for key, state in old["state"].items():
        assert [(name, bits(value)) for name, value in new["state"][key].items()] == [
            (name, bits(value)) for name, value in state.items()
        ]
    for new_group, old_group in zip(new["param_groups"], old["param_groups"], strict=True):
        assert {name: bits(new_group[name]) for name in old_group} == {
            name: bits(value) for name, value in old_group.items()
        }
        added = set(new_group) - set(old_group)
        assert {name: bits(new_group[name]) for name in added} == {
            name: bits(run.optimizer.defaults[name]) for name in added
        }
        # The first version knew these two as options of other Adams, and read no other value of them.
        assert (new_group["weight_decay"], new_group["amsgrad"]) == (0.0, False)
