"""Gradient tools: against PyTorch's own on the dense gradients that the sparse ones stand for, and a float64 oracle.

Gradients are multiples of 1/64, so that a row's sum over its lookups is exact in any order and in any type, and what
remains is the rounding of a norm and of one product. With n elements under the norm and u the unit roundoff, powers and
sum are off by at most (n + 2)u relatively and the root makes that no larger; with n < 5,000 the tolerances below leave
room for that: float32 1e-3 at worst and 1e-5 in fact, since errors of a sum mostly cancel.
"""

from __future__ import annotations

import doctest
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gradients import coo, raw
from hypothesis import given
from hypothesis import strategies as st
from oracle import OracleTable
from snapshot import bits
from torch import Tensor, nn
from torch.nn import Parameter

import sparseadam
from sparseadam import SparseAdam, clip_grad_norm_, clip_grad_value_, coalesce_grads_

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = [torch.bfloat16, torch.float16]
RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NORM_TYPES = [1.0, 2.0, 3.0, math.inf]
TOOLS: dict[str, Callable[[Any], Any]] = {
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 0.5),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 0.5),
    "coalesce_grads_": coalesce_grads_,
}
each_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


def with_grad(grad: Tensor | None) -> Parameter:
    """A parameter that holds no memory of its own, with this gradient."""
    if grad is None:
        return Parameter(torch.zeros(3))
    param = Parameter(torch.zeros((), dtype=grad.dtype).expand(grad.shape))
    param.grad = grad
    return param


def summed(grad: Tensor) -> Tensor:
    """A gradient as a dense float64 tensor, without asking it whether it is coalesced."""
    if not grad.is_sparse:
        return grad.to(torch.float64, copy=True)
    dense = torch.zeros(grad.shape, dtype=torch.float64)
    return dense.index_put(tuple(grad._indices()), grad._values().double(), accumulate=True)


def dense_twin(param: Tensor) -> Parameter:
    """A parameter with the dense gradient that a sparse one stands for, in the same dtype."""
    return with_grad(None if param.grad is None else summed(param.grad).to(param.dtype))


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def grad_bits(params: Sequence[Tensor]) -> list[Any]:
    """All that the gradients hold, to compare bit for bit."""
    held = []
    for grad in (grad_of(param) for param in params):
        is_coo = grad.layout is torch.sparse_coo
        held.append([bits(grad._indices()), bits(grad._values())] if is_coo else [bits(grad.to_dense())])
    return held


def assert_touched_rows(grad: Tensor, names: Tensor) -> None:
    """A gradient is coalesced in fact, and names the rows among ``names`` and no others."""
    assert grad.is_coalesced()
    want = torch.unique(names, dim=1) if names.shape[1] else names
    assert torch.equal(grad._indices(), want)


@st.composite
def gradients(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Gradients of several parameters: sparse of one to three dimensions, dense, or none."""
    grads: list[Tensor | None] = []
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for _ in range(draw(st.integers(1, 4))):
        kind, dtype = draw(st.sampled_from(["sparse", "sparse", "dense", "none"])), draw(st.sampled_from(dtypes))
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        scale = draw(st.sampled_from([1.0, 2.0**-6, 8.0]))
        if kind == "none":
            grads.append(None)
        elif kind == "dense":
            grads.append(torch.as_tensor(rng.integers(-64, 65, shape) / 64 * scale).to(dtype))
        else:
            sparse_dim, num_lookups = draw(st.integers(1, len(shape))), draw(st.integers(0, 12))
            indices = np.stack([rng.integers(0, size, num_lookups) for size in shape[:sparse_dim]])
            values = rng.integers(-64, 65, (num_lookups, *shape[sparse_dim:])) / 64 * scale
            grads.append(coo(indices, torch.as_tensor(values).to(dtype), shape))
    return grads


def oracle_norm(params: Sequence[Tensor], norm_type: float) -> float:
    """The norm of all elements as one vector, in float64 NumPy."""
    elements = [summed(param.grad).flatten().numpy() for param in params if param.grad is not None]
    return float(np.linalg.norm(np.concatenate(elements), norm_type)) if elements else 0.0


# The norm -----------------------------------------------------------------------------------------


def test_the_signature_is_pytorchs() -> None:
    ours, theirs = (inspect.signature(module.clip_grad_norm_) for module in (sparseadam, nn.utils))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@given(
    grads=gradients([torch.float32, torch.float64]),
    norm_type=st.sampled_from(NORM_TYPES),
    max_norm=st.sampled_from([1e-3, 0.5, 3.0, 1e4]),
    foreach=st.sampled_from([None, True, False]),
)
def test_clipping_by_norm_is_pytorchs_on_the_dense_gradients(
    grads: list[Tensor | None], norm_type: float, max_norm: float, foreach: bool | None
) -> None:
    params = [with_grad(grad) for grad in grads]
    twins = [dense_twin(param) for param in params]
    wanted_norm = oracle_norm(params, norm_type)
    coefficient = min(1, max_norm / (wanted_norm + 1e-6))
    before = [None if grad is None else (summed(grad), summed(abs_lookups(grad))) for grad in grads]

    norm = clip_grad_norm_(params, max_norm, norm_type, foreach=foreach)
    twin_norm = nn.utils.clip_grad_norm_(twins, max_norm, norm_type, foreach=foreach)
    assert norm.dtype is twin_norm.dtype and norm.shape == ()
    is_single = any(grad is not None and grad.dtype is torch.float32 for grad in grads)
    relative = RELATIVE[torch.float32 if is_single or norm.dtype is torch.float32 else torch.float64]
    torch.testing.assert_close(norm, twin_norm, rtol=relative, atol=0)
    assert float(norm) == pytest.approx(wanted_norm, rel=relative, abs=0)
    for param, grad, twin, old in zip(params, grads, twins, before, strict=True):
        assert param.grad is grad, "the gradient is the object that it was"
        if grad is not None and old is not None:
            error = coefficient * relative * old[1]
            assert ((summed(grad) - coefficient * old[0]).abs() <= error).all()
            assert ((summed(grad) - grad_of(twin)).abs() <= 2 * error).all()
            assert max_norm < wanted_norm + 1e-5 or torch.equal(summed(grad), old[0]), "below, not a bit changes"


@given(
    grads=gradients(list(DTYPES.values())),
    norm_type=st.sampled_from(NORM_TYPES),
    max_norm=st.sampled_from([1e-2, 0.5, 1e4]),
)
def test_half_precision_in_the_mixture_agrees_with_the_oracle(
    grads: list[Tensor | None], norm_type: float, max_norm: float
) -> None:
    params = [with_grad(grad) for grad in grads]
    wanted_norm = oracle_norm(params, norm_type)
    before = [None if grad is None else (summed(grad), summed(abs_lookups(grad))) for grad in grads]
    norm = clip_grad_norm_(params, max_norm, norm_type)
    has_double = any(grad is not None and grad.dtype is torch.float64 for grad in grads)
    assert norm.dtype is (torch.float64 if has_double else torch.float32)
    assert float(norm) == pytest.approx(wanted_norm, rel=1e-5, abs=0)
    coefficient = min(1, max_norm / (wanted_norm + 1e-6))
    for grad, old in zip(grads, before, strict=True):
        if grad is not None and old is not None:
            # Each lookup is rounded once; float16 ends in subnormals, of which the half spacing is 2**-25.
            error = coefficient * old[1] * RELATIVE[grad.dtype] + 12 * 2.0**-25
            assert ((summed(grad) - coefficient * old[0]).abs() <= error).all()


def abs_lookups(grad: Tensor) -> Tensor:
    """The gradient with every value made positive: its sums bound the rounding of each lookup."""
    return coo(grad._indices(), grad._values().abs(), grad.shape) if grad.is_sparse else grad.abs()


def test_a_row_looked_up_twice_contributes_the_norm_of_its_sum() -> None:
    together = with_grad(coo([1, 3, 1], [[3.0, 1.0], [0.0, 0.0], [0.0, 3.0]], (5, 2)))
    assert float(clip_grad_norm_(together, 100.0)) == 5.0
    against = with_grad(coo([1, 1], [[3.0, 1.0], [-3.0, -1.0]], (5, 2)))
    assert float(clip_grad_norm_(against, 100.0)) == 0.0


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -math.inf, 0.5, 7.0, "inf"])
@pytest.mark.parametrize("rows", [[0, 2, 0, 1], [0, 0], []], ids=["every row", "one row", "no lookups"])
def test_other_orders_of_the_norm_are_pytorchs_too(norm_type: Any, rows: list[int]) -> None:
    """To those below zero the zeros of rows that were not looked up matter; to 0 the number of gradients does."""
    values = torch.arange(1.0, 2 * len(rows) + 1).reshape(len(rows), 2)
    params = [with_grad(coo(rows, values, (3, 2))), with_grad(torch.tensor([2.0, -3.0]))]
    twins = [dense_twin(param) for param in params]
    norm = clip_grad_norm_(params, 0.1, norm_type)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twins, 0.1, norm_type))
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(grad_of(param).to_dense(), grad_of(twin))


@pytest.mark.parametrize("norm_type", [*NORM_TYPES, 0.0, -1.0])
@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_a_gradient_without_lookups_has_no_norm_and_stays_empty(norm_type: float, sparse_dim: int) -> None:
    grad = coo(torch.zeros(sparse_dim, 0), torch.zeros(0, *(4, 3)[sparse_dim - 1 :][1:]), (4, 3))
    param = with_grad(grad)
    assert float(clip_grad_norm_(param, 1e-9, norm_type)) == 0.0
    assert param.grad is grad and grad._nnz() == 0


def test_no_gradients_have_norm_zero_as_in_pytorch() -> None:
    for parameters in ([], [Parameter(torch.ones(2))], Parameter(torch.ones(2)), iter([])):
        norm = clip_grad_norm_(parameters, 1.0)
        assert norm.shape == () and norm.dtype is torch.float32 and float(norm) == 0.0


def test_an_empty_generator_is_warned_of_as_in_pytorch() -> None:
    found = []
    for function in (clip_grad_norm_, nn.utils.clip_grad_norm_):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert float(function((p for p in []), 1.0)) == 0.0
        found.append([(str(warning.message), warning.filename) for warning in caught])
    assert found[0] == found[1] and found[0][0][1] == __file__


@each_tool
def test_a_generator_is_gone_through_once_and_a_single_parameter_is_a_list_of_one(tool: Callable[[Any], Any]) -> None:
    results = []
    for wrap in (lambda p: [p], lambda p: p, lambda p: (each for each in [p]), lambda p: {"table": p}.values()):
        param = with_grad(coo([2, 0, 2], [[3.0], [1.0], [4.0]], (5, 1)))
        result = tool(wrap(param))
        results.append((bits(result), grad_bits([param])))
    assert results == [results[0]] * 4
    assert results[0][1] != grad_bits([with_grad(coo([2, 0, 2], [[3.0], [1.0], [4.0]], (5, 1)))])


def test_a_parameter_listed_twice_counts_twice_as_in_pytorch() -> None:
    param = with_grad(coo([1, 1], [[1.0, 2.0], [2.0, 2.0]], (3, 2)))
    twin = dense_twin(param)
    norm = clip_grad_norm_([param, param], 1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_([twin, twin], 1.0))
    torch.testing.assert_close(grad_of(param).to_dense(), grad_of(twin))


def test_foreach_reaches_the_dense_gradients() -> None:
    """PyTorch refuses it on the meta device, where it has no such code; without it the device is served."""
    dense = Parameter(torch.zeros(3, device="meta"))
    for tool in (clip_grad_norm_, clip_grad_value_):
        dense.grad = torch.zeros(3, device="meta")
        with pytest.raises(RuntimeError, match="foreach=True was passed"):
            tool([dense], 1.0, foreach=True)
        tool([dense], 1.0)


@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_is_obeyed_in_both_halves_of_clipping(foreach: bool) -> None:
    params = [with_grad(torch.ones(3)), with_grad(coo([1], [[1.0]], (3, 1)))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        clip_grad_norm_(params, 1.0, foreach=foreach)
    called = {event.key for event in profile.key_averages()}
    assert ("aten::_foreach_norm" in called, "aten::_foreach_mul_" in called) == (foreach, foreach)


def test_foreach_leaves_sparse_gradients_alone() -> None:
    results = []
    for foreach in (None, True, False):
        params = [with_grad(coo([1, 1], [[1.0], [2.0]], (3, 1))), with_grad(torch.tensor([4.0]))]
        norm = clip_grad_norm_(params, 1.0, foreach=foreach)
        clip_grad_value_(params, 0.25, foreach=foreach)
        results.append((bits(norm), grad_bits(params)))
    assert results == [results[0]] * 3


# Numbers that are not finite, or hardly ----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("is_sparse", [True, False], ids=["in the sparse one", "in the dense one"])
def test_infinities_and_nans_spread_as_in_pytorch(bad: float, is_sparse: bool) -> None:
    values, dense = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 2.0])
    (values[0] if is_sparse else dense)[0] = bad
    params = [with_grad(coo([1, 4, 1], values, (6, 2))), with_grad(dense)]
    twins = [dense_twin(param) for param in params]
    norm, twin_norm = clip_grad_norm_(params, 1.0), nn.utils.clip_grad_norm_(twins, 1.0)
    assert bits(norm) == bits(twin_norm) and not norm.isfinite()
    # A row that was not looked up has no elements to become NaN.
    touched = torch.tensor([1, 4])
    got, want = summed(grad_of(params[0]))[touched], grad_of(twins[0]).double()[touched]
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(params[1].grad, twins[1].grad, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_error_if_nonfinite_changes_nothing_and_says_what_pytorch_says(bad: float) -> None:
    params = [
        with_grad(coo([1, 4, 1], [[3.0], [4.0], [5.0]], (6, 1))),
        with_grad(torch.tensor([7.0, 8.0])),
        with_grad(coo([0, 0], [[bad], [1.0]], (6, 1))),
    ]
    twins, before = [dense_twin(param) for param in params], grad_bits(params)
    messages = []
    for function, group in ((clip_grad_norm_, params), (nn.utils.clip_grad_norm_, twins)):
        with pytest.raises(RuntimeError, match="is non-finite") as caught:
            function(group, 1.0, error_if_nonfinite=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert grad_bits(params) == before
    clip_grad_norm_(params[:2], 1.0, error_if_nonfinite=True)
    assert grad_bits(params) != before, "a finite norm is clipped"


def test_sums_and_norms_beyond_float16_do_not_overflow() -> None:
    sparse = with_grad(coo([1, 1], torch.tensor([[60000.0], [60000.0]]).half(), (3, 1)))
    dense = with_grad(torch.tensor([60000.0, 60000.0]).half())
    norm = clip_grad_norm_([sparse, dense], 1.0, error_if_nonfinite=True)
    want = math.sqrt(120000.0**2 + 2 * 60000.0**2)
    assert float(norm) == pytest.approx(want, rel=1e-6)
    # A coefficient of 7e-6 is subnormal in float16; had it been rounded to that, this would be off by 0.5 %.
    np.testing.assert_allclose(summed(grad_of(sparse))[1], 120000.0 / want, rtol=1e-3)
    np.testing.assert_allclose(summed(grad_of(dense)), 60000.0 / want, rtol=1e-3)
    sparse = with_grad(coo([1, 1], torch.tensor([[60000.0], [60000.0]]).half(), (3, 1)))
    clip_grad_value_(sparse, 2.0)
    assert grad_of(sparse)._values().tolist() == [[2.0]]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_lookups_of_half_precision_are_not_lost_in_a_large_sum(dtype: torch.dtype) -> None:
    """Added one by one in bfloat16, 1/8 would not move 64, nor in float16 256."""
    start, num_small = (64.0, 512) if dtype is torch.bfloat16 else (256.0, 2048)
    values = torch.full((num_small + 1, 1), 0.125).to(dtype)
    values[0] = start
    want = start + num_small / 8
    param = with_grad(coo([2] * len(values), values, (4, 1)))
    assert float(clip_grad_norm_(param, 1e9)) == want
    coalesce_grads_(param)
    assert grad_of(param)._values().tolist() == [[want]]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_norm_of_half_precision_gradients_is_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    for grad in (torch.ones(3, 1, dtype=dtype), coo([0, 1, 2], torch.ones(3, 1, dtype=dtype), (3, 1))):
        norm = clip_grad_norm_(with_grad(grad), 1e9)
        assert norm.dtype is torch.float32 and float(norm) == pytest.approx(math.sqrt(3), rel=1e-6)


# What is written, and where -----------------------------------------------------------------------


def test_an_uncoalesced_gradient_keeps_its_lookups_and_a_coalesced_one_stays_coalesced() -> None:
    grad = coo([4, 1, 4], [[1.0], [2.0], [3.0]], (5, 1))
    clip_grad_norm_(with_grad(grad), 1.0)
    assert grad._indices().tolist() == [[4, 1, 4]] and not grad.is_coalesced()
    coalesced = coo([4, 1, 4], [[1.0], [2.0], [3.0]], (5, 1)).coalesce()
    clip_grad_norm_(with_grad(coalesced), 1.0)
    assert coalesced.indices().tolist() == [[1, 4]]


@each_tool
def test_a_claim_to_be_coalesced_is_not_relied_on(tool: Callable[[Any], Any]) -> None:
    rows, values = [4, 1, 4], [[3.0], [1.0], [3.0]]
    honest = with_grad(coo(rows, values, (5, 1)))
    claimed = with_grad(coo(rows, values, (5, 1), is_coalesced=True, check_invariants=False))
    assert bits(tool(honest)) == bits(tool(claimed))
    assert grad_bits([honest]) == grad_bits([claimed])


def shared_gradients() -> tuple[nn.Embedding, nn.Embedding, Tensor]:
    """Two embeddings whose gradients are one tensor, the one given to ``backward()``."""
    words, positions = nn.Embedding(6, 2, sparse=True), nn.Embedding(4, 2, sparse=True)
    upstream = torch.tensor([[3.0, 1.0], [2.0, 4.0], [5.0, 1.0]])
    (words(torch.tensor([5, 1, 5])) + positions(torch.tensor([0, 1, 2]))).backward(upstream)
    return words, positions, upstream


def test_autograd_lets_gradients_share_their_values() -> None:
    """Why each must get memory of its own; where torch ends this, the copy can go."""
    words, positions, upstream = shared_gradients()
    pointers = [grad_of(table.weight)._values().data_ptr() for table in (words, positions)]
    assert pointers == [upstream.data_ptr()] * 2


@each_tool
def test_gradients_that_share_their_values_are_each_changed_once(tool: Callable[[Any], Any]) -> None:
    words, positions, upstream = shared_gradients()
    params = [words.weight, positions.weight]
    apart = [with_grad(grad_of(param).clone()) for param in params]
    tool(params)
    tool(apart)
    assert grad_bits(params) == grad_bits(apart)
    assert upstream.tolist() == [[3.0, 1.0], [2.0, 4.0], [5.0, 1.0]], "and what was given to backward() is left alone"


@each_tool
def test_values_without_memory_of_their_own_are_handled(tool: Callable[[Any], Any]) -> None:
    """``out.sum().backward()`` expands one number to all values; such memory cannot be written to in place."""
    expanded = with_grad(coo([1, 3, 1], torch.ones(1, 1).expand(3, 2), (5, 2)))
    plain = with_grad(coo([1, 3, 1], torch.ones(3, 2), (5, 2)))
    transposed = with_grad(coo([1, 3, 1], torch.ones(2, 3).t(), (5, 2)))
    for param in (expanded, plain, transposed):
        tool(param)
    torch.testing.assert_close(summed(grad_of(expanded)), summed(grad_of(plain)), rtol=0, atol=0)
    torch.testing.assert_close(summed(grad_of(transposed)), summed(grad_of(plain)), rtol=0, atol=0)


@each_tool
def test_nothing_is_made_that_grows_with_the_table(tool: Callable[[Any], Any]) -> None:
    """One bit for each of these rows would be more than a process can address."""
    num_rows = 2**50
    param = with_grad(coo([num_rows - 1, 3, num_rows - 1], torch.ones(3, 8), (num_rows, 8)))
    with pytest.raises(RuntimeError):
        torch.empty(num_rows // 8, dtype=torch.uint8)
    tool(param)
    assert set(grad_of(param)._indices()[0].tolist()) == {3, num_rows - 1}


# Clamping values ----------------------------------------------------------------------------------


@given(
    grads=gradients([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    clip_value=st.sampled_from([0.0, 0.25, 0.3, 2.0, math.inf]),
    foreach=st.sampled_from([None, True, False]),
)
def test_clipping_by_value_is_pytorchs_on_the_dense_gradients(
    grads: list[Tensor | None], clip_value: float, foreach: bool | None
) -> None:
    params = [with_grad(grad) for grad in grads]
    twins = [with_grad(None if grad is None else summed(grad)) for grad in grads]
    names = [grad._indices().clone() if grad is not None and grad.is_sparse else None for grad in grads]
    clip_grad_value_(params, clip_value, foreach)
    if any(grad is not None for grad in grads):
        nn.utils.clip_grad_value_(twins, clip_value, foreach)
    for param, grad, twin, named in zip(params, grads, twins, names, strict=True):
        assert param.grad is grad
        if grad is not None:
            want = grad_of(twin).to(grad.dtype)
            assert torch.equal(grad.to_dense(), want)
        if grad is not None and named is not None:
            assert_touched_rows(grad, named)


def test_what_is_clamped_is_the_sum() -> None:
    param = with_grad(coo([1, 1, 2, 2], [[0.8], [0.8], [3.0], [-2.75]], (4, 1)))
    clip_grad_value_(param, 1.0)
    assert grad_of(param).to_dense().tolist() == [[0.0], [1.0], [0.25], [0.0]]


def test_nans_stay_when_values_are_clamped() -> None:
    param = with_grad(coo([1, 1, 2], [[1.0], [math.nan], [-math.inf]], (4, 1)))
    clip_grad_value_(param, 2.0)
    values = grad_of(param)._values()
    assert values[0].isnan() and values[1] == -2.0


def test_clipping_values_of_nothing_does_nothing() -> None:
    param = Parameter(torch.full((2,), 5.0))
    for parameters in ([], [param], (p for p in [])):
        clip_grad_value_(parameters, 1.0)
    assert param.grad is None
    assert param.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ((-1.0,), ValueError, r"Invalid max_norm: -1\.0\. max_norm must be at least 0\."),
        ((math.nan,), ValueError, "Invalid max_norm: nan"),
        (("1.0",), TypeError, "max_norm must be a number or a one-element Tensor, got str"),
        ((1.0, "two"), TypeError, "norm_type must be a number or a one-element Tensor, got str"),
    ],
)
def test_a_norm_that_cannot_be_one_is_refused(arguments: Any, error: type[Exception], pattern: str) -> None:
    params = [with_grad(torch.ones(2)), with_grad(coo([1], [[5.0]], (3, 1)))]
    with pytest.raises(error, match=pattern):
        clip_grad_norm_(params, *arguments)
    assert grad_of(params[0]).tolist() == [1.0, 1.0]
    assert grad_of(params[1])._values().tolist() == [[5.0]]


@pytest.mark.parametrize(
    ("max_norm", "norm_type"), [(torch.tensor(2.0), math.inf), (2, "inf"), (2.0, torch.tensor(math.inf))]
)
def test_norms_are_given_as_pytorch_takes_them(max_norm: Any, norm_type: Any) -> None:
    params = [with_grad(torch.tensor([1.0, -4.0])), with_grad(coo([1], [[2.0]], (3, 1)))]
    assert clip_grad_norm_(params, max_norm, norm_type) == 4.0
    assert torch.allclose(grad_of(params[0]), torch.tensor([0.5, -2.0]))
    assert torch.allclose(grad_of(params[1])._values(), torch.tensor([[1.0]]))


@pytest.mark.parametrize(
    ("clip_value", "error", "pattern"),
    [
        (-1.0, ValueError, r"Invalid clip_value: -1\.0\. clip_value must be at least 0\."),
        (math.nan, ValueError, "Invalid clip_value: nan"),
        ("1.0", TypeError, "clip_value must be a number"),
    ],
)
def test_a_bound_that_cannot_be_one_is_refused(clip_value: Any, error: type[Exception], pattern: str) -> None:
    params = [with_grad(torch.ones(2)), with_grad(coo([1], [[5.0]], (3, 1)))]
    before = grad_bits(params)
    with pytest.raises(error, match=pattern):
        clip_grad_value_(params, clip_value)
    assert grad_bits(params) == before


# Summing repeated rows ----------------------------------------------------------------------------


@given(grads=gradients(list(DTYPES.values())))
def test_coalescing_sums_each_row_and_leaves_dense_gradients_alone(grads: list[Tensor | None]) -> None:
    params = [with_grad(grad) for grad in grads]
    before = [None if grad is None else (summed(grad), bits(grad.to_dense()), grad._version) for grad in grads]
    names = [grad._indices().clone() if grad is not None and grad.is_sparse else None for grad in grads]
    coalesce_grads_(params)
    for param, grad, old, named in zip(params, grads, before, names, strict=True):
        assert param.grad is grad
        if grad is not None and old is not None and named is not None:
            assert torch.equal(summed(grad), old[0].to(grad.dtype).double())
            assert_touched_rows(grad, named)
        elif grad is not None and old is not None:
            assert (bits(grad), grad._version) == old[1:]


def test_sums_are_taken_in_lookup_order() -> None:
    """Large, small, minus large: only in this order is the small one lost."""
    param = with_grad(coo([1, 0, 1, 1], [[1e8], [5.0], [1.0], [-1e8]], (2, 1)))
    coalesce_grads_(param)
    assert grad_of(param).to_dense().tolist() == [[5.0], [0.0]]


def test_accumulation_does_not_grow_beyond_the_touched_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    table, left_alone, dense = (nn.Embedding(1000, 4, sparse=is_sparse).double() for is_sparse in (True, True, False))
    touched: set[int] = set()
    for _ in range(8):
        ids = torch.randint(0, 60, (500,), generator=generator) * 16
        weights = (torch.randint(-64, 65, (500, 4), generator=generator) / 64).double()
        for each in (table, left_alone, dense):
            (each(ids) * weights).sum().backward()
        touched.update(ids.tolist())
        coalesce_grads_(table.weight)
        grad = grad_of(table.weight)
        assert grad._nnz() == len(touched) <= 60
        assert grad._values().untyped_storage().nbytes() == len(touched) * 4 * 8
    for accumulated in (table, left_alone):
        torch.testing.assert_close(summed(grad_of(accumulated.weight)), grad_of(dense.weight), rtol=0, atol=0)
    assert grad_of(left_alone.weight)._nnz() > 60 * len(touched), "autograd alone would have let it grow"


def test_a_gradient_that_was_read_before_is_seen_to_change() -> None:
    grad = coo([1, 1], [[1.0], [2.0]], (3, 1))
    for tool in TOOLS.values():
        version = grad._version
        tool(with_grad(grad))
        assert grad._version > version


# Faults -------------------------------------------------------------------------------------------


class Foreign(Parameter):
    """A parameter whose gradient is what a test says, past the checks of ``p.grad = ...``."""

    grad = property(lambda self: self.foreign_grad)  # type: ignore[assignment]


def foreign(grad: Tensor) -> Parameter:
    param = Parameter(torch.zeros(grad.shape))
    param.__class__ = Foreign
    param.foreign_grad = grad  # type: ignore[attr-defined]
    return param


FAULTS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "csr": (
        lambda: torch.ones(4, 3).to_sparse_csr(),
        RuntimeError,
        r"the gradient of parameter 3 has layout torch\.sparse_csr, .* Convert it with grad\.to_sparse_coo\(\)",
    ),
    "row too high": (
        lambda: raw([[1, 4]], torch.ones(2, 3), (4, 3)),
        IndexError,
        "the gradient of parameter 3 names row 4, but its table has rows 0 to 3",
    ),
    "row below zero": (
        lambda: raw([[1, -1]], torch.ones(2, 3), (4, 3)),
        IndexError,
        "the gradient of parameter 3 names row -1, but its table has rows 0 to 3",
    ),
    "second index too high": (
        lambda: raw([[1, 2], [0, 3]], torch.ones(2), (4, 3)),
        IndexError,
        "the gradient of parameter 3 names index 3 in dimension 1, but its table has size 3",
    ),
    "row of a table without rows": (
        lambda: raw([[0]], torch.ones(1, 3), (0, 3)),
        IndexError,
        "the gradient of parameter 3 names row 0, but its table has no rows",
    ),
    "complex": (
        lambda: raw([[1, 1]], torch.ones(2, 3, dtype=torch.complex64), (4, 3)),
        RuntimeError,
        r"the sparse gradient of parameter 3 has dtype torch\.complex64, but it must be one of float32, float64",
    ),
}


# PyTorch says once in a process that the CSR layout is young.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@each_tool
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_before_anything_is_written(fault: str, tool: Callable[[Any], Any]) -> None:
    make, error, pattern = FAULTS[fault]
    good = [with_grad(coo([1, 1], [[3.0], [4.0]], (3, 1))), with_grad(torch.tensor([9.0]))]
    later = with_grad(coo([2, 2], [[3.0], [4.0]], (3, 1)))
    before = grad_bits([*good, later])
    with pytest.raises(error, match=pattern):
        tool([*good, with_grad(None), foreign(make()), later])
    assert grad_bits([*good, later]) == before
    tool([*good, later])
    assert grad_bits([*good, later]) != before, "without the faulty one they are written"


# With the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["norm", "value", "norm after accumulation"])
def test_a_step_on_clipped_gradients_is_the_oracles_on_clipped_dense_ones(backend: str, by: str) -> None:
    rng = np.random.default_rng(8)
    shapes = [(30, 5), (12, 3)]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8}
    starts = [rng.standard_normal(shape) for shape in shapes]
    tables = [Parameter(torch.as_tensor(start)) for start in starts]
    oracles = [OracleTable(start, "float64") for start in starts]
    optimizer = SparseAdam(tables, backend=backend, **options)
    for _ in range(4):
        twins = []
        for table in tables:
            rows, values = rng.integers(0, len(table), 20), rng.standard_normal((20, table.shape[1]))
            table.grad = coo(rows, values, table.shape)
            twins.append(dense_twin(table))
        touched = [np.unique(grad_of(table)._indices().numpy()) for table in tables]
        if by == "value":
            clip_grad_value_(tables, 0.5)
            nn.utils.clip_grad_value_(twins, 0.5)
        else:
            if by == "norm after accumulation":
                coalesce_grads_(tables)
            clip_grad_norm_(tables, 0.5)
            nn.utils.clip_grad_norm_(twins, 0.5)
        optimizer.step()
        for table, oracle, twin, rows in zip(tables, oracles, twins, touched, strict=True):
            oracle.step(rows, grad_of(twin).numpy()[rows], **options)
            state = optimizer.state[table]
            np.testing.assert_allclose(table.detach().numpy(), oracle.theta, rtol=1e-12, atol=1e-14)
            for name, want in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
                np.testing.assert_allclose(state[name].numpy(), want[state["rows"].numpy()], rtol=1e-11, atol=1e-15)


# Documentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("documented", [clip_grad_norm_, coalesce_grads_])
def test_examples_in_docstrings_run(documented: Any) -> None:
    tests = doctest.DocTestFinder().find(documented, globs=dict(vars(sys.modules[documented.__module__])))
    runner, output = doctest.DocTestRunner(), []  # type: ignore[var-annotated]
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(output)
