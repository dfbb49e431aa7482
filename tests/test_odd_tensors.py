"""Tensors that PyTorch has ways to make and hardly anybody meets, and uses as rare: refused in time, or done right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import snapshot
from torch import Tensor, nn

import sparseadam
from sparseadam import SparseAdam, clip_grad_norm_, clip_grad_value_, coalesce_grads_


def gradient(rows: list[int], table: Tensor) -> Tensor:
    """Ones for some rows of a table."""
    values = torch.ones(len(rows), *table.shape[1:], dtype=table.dtype)
    return torch.sparse_coo_tensor([rows], values, table.shape, check_invariants=True)


# Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "give_memory",
    [
        lambda module, _: module.double(),
        lambda module, _: setattr(module.weight, "data", torch.zeros(4, 2)),
        lambda module, optimizer: optimizer.resize(module.weight, 5),
    ],
    ids=["double", "data", "resize"],
)
def test_a_table_made_in_inference_mode_is_refused_with_other_memory_too(
    backend: str, give_memory: Callable[[Any, Any], Any]
) -> None:
    with torch.inference_mode():
        module = nn.Embedding(4, 2, sparse=True)
    other = nn.Parameter(torch.zeros(4, 2))
    optimizer = SparseAdam([other, module.weight], backend=backend)
    give_memory(module, optimizer)
    for table in (other, module.weight):
        table.grad = gradient([1], table)
    with pytest.raises(RuntimeError, match=r"group 0, parameter 1 was made in torch\.inference_mode\(\)"):
        optimizer.step()
    assert not other.any()
    assert not optimizer.state


@pytest.mark.parametrize(
    "options", [{}, {"missed_steps": "replay"}, {"weight_decay": 0.1, "weight_decay_mode": "exact"}]
)
def test_a_table_that_negates_its_memory_moves_as_any_other(options: dict[str, Any]) -> None:
    """As ``z.conj().imag`` is; the native backend leaves it to the reference."""
    results = []
    for table in (nn.Parameter(-torch.ones(4, 2)), nn.Parameter(torch._neg_view(torch.ones(4, 2)))):
        optimizer = SparseAdam([table], lr=0.1, **options)
        for _ in range(3):
            optimizer.catch_up(table, torch.tensor([1]))
            table.grad = gradient([1], table)
            optimizer.step()
        optimizer.flush()
        results.append(table.detach().resolve_neg())
    assert table.is_neg()
    torch.testing.assert_close(results[1], results[0])
    assert (results[0][1] < -1.0).all()


def test_a_table_that_begins_to_negate_its_memory_is_not_taken_for_what_it_was() -> None:
    """Its address, shape and strides are the same."""
    results = []
    for is_negated in (False, True):
        table = nn.Parameter(torch.ones(4, 2))
        optimizer = SparseAdam([table], lr=0.1, missed_steps="replay")
        for _ in range(3):
            optimizer.catch_up(table, torch.tensor([1]))
            table.grad = gradient([1], table)
            optimizer.step()
        # The same weights in both: negated as they are read, or in memory.
        weights = table.data
        table.data = torch._neg_view(weights) if is_negated else -weights
        optimizer.catch_up(table, torch.tensor([1]))
        results.append(table.detach().resolve_neg())
    torch.testing.assert_close(results[1], results[0])


def test_a_table_that_negates_its_memory_cannot_be_stepped_natively() -> None:
    table = nn.Parameter(torch._neg_view(torch.ones(4, 2)))
    table.grad = gradient([1], table)
    if not any(each.name == "native" and each.available for each in sparseadam.backends()):
        pytest.skip("this installation has no native module")
    with pytest.raises(RuntimeError, match=r'backend="native" cannot update .*negates.*resolve_neg\(\)'):
        SparseAdam([table], backend="native").step()
    assert (table == -1.0).all()


@pytest.mark.parametrize(
    "part",
    [
        lambda table: table[10:20],
        lambda table: table.view(-1),
        lambda table: table.t(),
        lambda table: table.view(50, 8),
    ],
    ids=["rows", "flat", "transposed", "wider"],
)
def test_parts_of_tables_in_files_are_refused(part: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Their row numbers are not those of the file."""
    table = sparseadam.memory_mapped(tmp_path / "a.table", 100, 4, init=("normal", 1.0))
    model = nn.Module()
    model.weight = nn.Parameter(part(table))
    for attempt in (lambda: SparseAdam(model.parameters()), lambda: sparseadam.initialize_on_read(model)):
        with pytest.raises(ValueError, match="is a part or another view of the memory-mapped table"):
            attempt()
    optimizer = SparseAdam([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="group 1, parameter 0 is a part or another view"):
        optimizer.add_param_group({"params": [model.weight]})
    assert len(optimizer.param_groups) == 1
    SparseAdam([nn.Parameter(table)])


def test_a_table_that_got_into_two_groups_is_stepped_once_each_time(backend: str) -> None:
    table, expected = (nn.Parameter(torch.zeros(40, 2)) for _ in range(2))
    other = nn.Parameter(torch.zeros(4, 2))
    optimizer = SparseAdam([{"params": [table]}, {"params": [other]}], lr=0.1, backend=backend)
    optimizer.param_groups[1]["params"].append(table)  # which add_param_group() would refuse
    peer = SparseAdam([expected], lr=0.1, backend=backend)
    for step in range(4):
        for each in (table, expected):
            each.grad = gradient([1 + step], each)
        optimizer.step()
        peer.step()
    assert torch.equal(table, expected)
    assert optimizer.state[table]["step"] == 4
    assert optimizer.state[table]["rows"].tolist() == [1, 2, 3, 4]


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_dense_gradient_that_negates_its_memory_is_taken_at_its_word(fused: bool) -> None:
    table = nn.Parameter(torch.zeros(4, 2))
    bias, expected = (nn.Parameter(torch.ones(3, 2, dtype=torch.float32 if fused else torch.float64)) for _ in range(2))
    optimizer = SparseAdam([table, bias], lr=0.1, dense_gradients="adam")
    peer = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.0)
    for sign in (1.0, -1.0, -1.0):
        table.grad = gradient([1], table)
        expected.grad = torch.full_like(expected, sign)
        bias.grad = torch._neg_view(torch.full_like(bias, -sign))
        optimizer.step()
        peer.step()
    torch.testing.assert_close(bias, expected)
    assert optimizer.state[table]["step"] == 3


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")
def test_a_gradient_of_another_dtype_by_request_is_refused_by_what_asked_for_it(backend: str) -> None:
    module = nn.Embedding(5, 2, sparse=True, dtype=torch.bfloat16)
    module.weight.grad_dtype = torch.float32
    module(torch.tensor([1])).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.dtype is torch.float32
    optimizer = SparseAdam(module.parameters(), backend=backend)
    with pytest.raises(
        RuntimeError, match=r"dtype torch\.float32, as its grad_dtype asks, .* set grad_dtype to torch\.b"
    ):
        optimizer.step()
    module.zero_grad()
    module.weight.grad_dtype = torch.bfloat16
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert optimizer.state[module.weight]["step"] == 1


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")
def test_a_steady_step_meets_a_gradient_of_another_dtype(backend: str) -> None:
    module = nn.Embedding(5, 2, sparse=True, dtype=torch.bfloat16)
    optimizer = SparseAdam(module.parameters(), backend=backend)
    for _ in range(3):
        module.zero_grad()
        module(torch.tensor([1])).sum().backward()
        optimizer.step()
    before = snapshot(optimizer)
    module.zero_grad()
    module.weight.grad_dtype = torch.float32
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="as its grad_dtype asks"):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda params: clip_grad_norm_(params, 0.1),
        lambda params: clip_grad_value_(params, 0.1),
        coalesce_grads_,
    ],
    ids=["norm", "value", "coalesce"],
)
def test_gradients_made_in_inference_mode_are_refused_before_any_is_changed(change: Callable[..., Any]) -> None:
    dense, first, second = (nn.Parameter(torch.zeros(4, 2)) for _ in range(3))
    dense.grad = torch.ones(4, 2)
    first.grad = gradient([1, 1], first)
    with torch.inference_mode():
        second.grad = gradient([2, 2], second)
    with pytest.raises(RuntimeError, match=r"parameter 2 was made in torch\.inference_mode\(\)"):
        change([dense, first, second])
    assert (dense.grad == 1.0).all()
    assert first.grad._values().tolist() == [[1.0, 1.0]] * 2
    with torch.inference_mode():
        change([second])
    optimizer = SparseAdam([second])
    optimizer.step()  # which only reads
    assert optimizer.state[second]["rows"].tolist() == [2]


# State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"missed_steps": "replay"}, {"missed_steps": "skip"}),
        ({"weight_decay": 0.1, "weight_decay_mode": "exact"}, {"weight_decay_mode": "touched"}),
        ({}, {"amsgrad": True}),
    ],
    ids=["missed_steps", "weight_decay_mode", "amsgrad"],
)
@pytest.mark.parametrize("save", [SparseAdam.flush, SparseAdam.state_dict, SparseAdam.to_torch_state_dict])
def test_an_option_that_shapes_the_state_is_not_changed_unnoticed(
    options: dict[str, Any], changed: dict[str, Any], save: Callable[[SparseAdam], Any], backend: str
) -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = SparseAdam([table], lr=0.1, backend=backend, **options)
    for _ in range(2):
        optimizer.catch_up(table, torch.tensor([0]))
        table.grad = gradient([0], table)
        optimizer.step()
    optimizer.param_groups[0].update(changed)
    if save is SparseAdam.to_torch_state_dict:
        optimizer.param_groups[0].update(weight_decay=0.0)
    before = snapshot(optimizer)
    message = "torch.optim.SparseAdam has no amsgrad|changed after its moments were made"
    with pytest.raises((RuntimeError, ValueError), match=message):
        save(optimizer)
    assert snapshot(optimizer) == before
    optimizer.param_groups[0].update(SparseAdam([nn.Parameter(torch.ones(1))], **options).defaults | {"lr": 0.1})
    optimizer.flush()


def test_owed_decay_is_paid_before_pytorch_gets_the_state(backend: str) -> None:
    """A schedule of weight decay may have ended: what is owed of before is owed still."""
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = SparseAdam([table], lr=0.1, weight_decay=0.5, weight_decay_mode="exact", backend=backend)
    for _ in range(10):
        table.grad = gradient([0], table)
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.to_torch_state_dict()
    torch.testing.assert_close(table[3], torch.full((2,), (1 - 0.1 * 0.5) ** 10))


@pytest.mark.parametrize("step", [-1, 2**62, 2**63])
def test_a_count_that_cannot_be_one_is_refused(step: int, backend: str) -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = SparseAdam([table], backend=backend)
    table.grad = gradient([0], table)
    optimizer.step()
    with pytest.raises(ValueError, match=rf"step must be at least 0, and less than 2\*\*62, got {step}"):
        optimizer.state[table]["step"] = step
    assert optimizer.state[table]["step"] == 1


def test_a_scalar_with_a_dense_gradient_is_forgotten() -> None:
    scalar = nn.Parameter(torch.tensor(2.0))
    optimizer = SparseAdam([scalar], dense_gradients="adam")
    scalar.grad = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.state[scalar]["exp_avg"] != 0.0
    optimizer.forget(scalar, torch.tensor([0]))
    assert optimizer.state[scalar]["exp_avg"] == 0.0
    with pytest.raises(IndexError, match="row 1 is outside the 1 rows"):
        optimizer.forget(scalar, torch.tensor([1]))


def test_threads_that_step_one_optimizer_take_turns(backend: str) -> None:
    """As Hogwild does: each row has one slot afterwards, and all steps are counted."""
    table = nn.Parameter(torch.zeros(20_000, 4))
    optimizer = SparseAdam([table], lr=0.1, backend=backend)
    generator = torch.Generator().manual_seed(0)
    table.grad = gradient([0], table)
    optimizer.step()
    together = threading.Barrier(2)

    def step_together() -> None:
        together.wait()
        optimizer.step()

    for number in range(2, 10, 2):
        rows = torch.randint(20_000, (4_000,), generator=generator)
        table.grad = torch.sparse_coo_tensor(rows[None], torch.ones(4_000, 4), table.shape, check_invariants=True)
        threads = [threading.Thread(target=step_together) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = optimizer.state[table]
        assert state["step"] == number + 1
        assert len(state["rows"].unique()) == len(state["rows"])
        assert torch.equal(state.slot_of_row[state["rows"]] - 1, torch.arange(len(state["rows"]), dtype=torch.int32))
