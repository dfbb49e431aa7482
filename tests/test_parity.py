"""Agreement with ``torch.optim.SparseAdam`` under ``torch_eps=True``, and with ``torch.optim.Adam`` where due.

Two optimizers are fed the same gradients; the table, both moments and ``step`` are compared after every step, and rows
that no gradient names must keep their bits. Half-precision tables have a test of their own at the end: PyTorch keeps
half-precision moments for them and this package float32 ones, so there the partner is PyTorch's float32 run.

How far apart the two may be is computed beside the run and not guessed. Gradients are multiples of a power of two, so
the sum over a row's lookups is exact in any order, and all that parts the two computations is their rounding. With u
the unit roundoff of the dtype, the usual model (each operation is exact times 1 + d, |d| <= u) gives per element:

* ``exp_avg``: ours has two rounded constants, two products, one sum, 4u in all; PyTorch's form ``m + (1-b1)*(g-m)`` has
  a difference, a constant, a product and a sum, also 4u; each of at most ``|m| + (1-b1)*|g|``. What was there before
  is multiplied by b1.
* ``exp_avg_sq``: the same and one square, 5u each, of ``v + (1-b2)*g*g``.
* the change: what the moments bring along, and 8u each for three constants, root, product, sum, quotient, product.
* the table: u each for the last subtraction.

Measured, moments part by 0.3 of that bound at most and tables by 0.83. Two tests below show that the comparison notices
the other place of eps, and a factor that is wrong by 1e-5.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from gradients import coo
from torch import Tensor, nn

from sparseadam import SparseAdam

DTYPES = [torch.float32, torch.float64]
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
PARTS = ("exp_avg", "exp_avg_sq")

needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Values of which hundreds can be summed exactly in float32; ``scale`` is a power of two."""
    return (torch.randint(-128, 129, shape) / 64 * scale).to(dtype)


def lookups(table: Tensor, rows: Any, scale: float = 1.0) -> Tensor:
    """An uncoalesced gradient with a random value vector for each of ``rows``."""
    return coo(rows, exact(len(rows), *table.shape[1:], dtype=table.dtype, scale=scale), table.shape)


def named_elements(grad: Tensor) -> Tensor:
    """Which elements of the table belong to a row that the gradient names."""
    indices = grad._indices()
    named = torch.zeros(grad.shape[: len(indices)], dtype=torch.bool)
    named[tuple(indices)] = True
    return named.reshape(*named.shape, *[1] * (grad.dim() - named.dim())).expand(grad.shape)


def summed(grad: Tensor) -> Tensor:
    """The gradient as a dense float64 tensor, without asking it whether it is coalesced."""
    dense = torch.zeros(grad.shape, dtype=torch.float64)
    return dense.index_put(tuple(grad._indices()), grad._values().double(), accumulate=True)


def assert_within(got: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    error = (got.double() - want.double()).abs()
    is_near = error <= bound
    if not is_near.all():
        worst = (error / bound.clamp_min(1e-300)).nan_to_num(nan=math.inf).max()
        raise AssertionError(
            f"{what}: {int((~is_near).sum())} elements differ by up to {error.max():.3g}, "
            f"{worst:.3g} times what rounding explains"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """For PyTorch's part: its sparse additions wake all threads whatever the size, which a busy machine pays for."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class Errors:
    """What rounding may have parted in one table so far."""

    def __init__(self, table: Tensor) -> None:
        """Start with equal tables and zero moments."""
        self.table, self.exp_avg, self.exp_avg_sq = (torch.zeros(table.shape, dtype=torch.float64) for _ in range(3))

    def add_step(self, grad: Tensor, before: dict[str, Tensor], after: dict[str, Any], group: dict[str, Any]) -> None:
        """Add a step's roundings; ``before`` and ``after`` are PyTorch's state and table."""
        u = UNIT_ROUNDOFF[grad.dtype]
        (beta1, beta2), step = group["betas"], int(after["step"])
        named, g = named_elements(grad), summed(grad).abs()
        m, v = before["exp_avg"].double().abs(), before["exp_avg_sq"].double()
        exp_avg = beta1 * self.exp_avg + 8 * u * (m + (1 - beta1) * g)
        exp_avg_sq = beta2 * self.exp_avg_sq + 10 * u * (v + (1 - beta2) * g * g)
        m, v = after["exp_avg"].double().abs(), after["exp_avg_sq"].double()
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        # Where eps stands hardly changes how roundings are passed on; the smaller denominator passes on more.
        denom = (v / correction2).sqrt() + group["eps"]
        per_exp_avg = float(group["lr"]) / correction1 / denom
        change = per_exp_avg * m
        relative = torch.where(v > 0, exp_avg_sq / (2 * v), 0.0)
        changed = per_exp_avg * exp_avg + change * (relative + 16 * u)
        changed = changed + 2 * u * after["table"].double().abs()
        self.exp_avg = torch.where(named, exp_avg, self.exp_avg)
        self.exp_avg_sq = torch.where(named, exp_avg_sq, self.exp_avg_sq)
        self.table = torch.where(named, self.table + changed, self.table)


class Twins:
    """Our optimizer and PyTorch's over equal tables, stepped together and compared after every step.

    ``groups`` are ``(our parameters, their parameters, options)``.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], dict[str, Any]]],
        backend: str | None,
        *,
        torch_eps: bool = True,
        partner: type[torch.optim.Optimizer] = torch.optim.SparseAdam,
    ) -> None:
        """Build both optimizers."""
        self.ours = SparseAdam(
            [{"params": list(ours), **options} for ours, _, options in groups],
            torch_eps=torch_eps,
            backend=backend,
        )
        self.theirs = partner([{"params": list(theirs), **o} for _, theirs, o in groups])
        self.our_tables = [table for ours, _, _ in groups for table in ours]
        self.their_tables = [table for _, theirs, _ in groups for table in theirs]
        self.errors = [Errors(table) for table in self.their_tables]

    @classmethod
    def of(cls, table: Tensor, backend: str | None, **options: Any) -> Twins:
        """Twins of one table that has a copy made."""
        ours, theirs = (nn.Parameter(table.detach().clone()) for _ in range(2))
        return cls([([ours], [theirs], {"lr": 0.05, **options})], backend)

    def set_option(self, group_index: int, **options: Any) -> None:
        """Change options of a group of both, as a user does between steps."""
        self.ours.param_groups[group_index].update(options)
        self.theirs.param_groups[group_index].update(options)

    def step(self, *grads: Tensor | None) -> None:
        """Step both with ``grads``, or with those the tables have where none are given, and compare."""
        if grads:
            is_dense = not isinstance(self.theirs, torch.optim.SparseAdam)
            for ours, theirs, grad in zip(self.our_tables, self.their_tables, grads, strict=True):
                ours.grad = None if grad is None else grad.clone()
                theirs.grad = ours.grad.to_dense() if is_dense and grad is not None else ours.grad
        our_before, their_before = self._state_of(self.ours), self._state_of(self.theirs)
        self.ours.step()
        with one_thread():
            self.theirs.step()
        our_after, their_after = self._state_of(self.ours), self._state_of(self.theirs)
        groups = [group for group in self.theirs.param_groups for _ in group["params"]]
        for i, (table, group) in enumerate(zip(self.our_tables, groups, strict=True)):
            ours, theirs = our_after[i], their_after[i]
            assert ours["step"] == theirs["step"], f"step of table {i}"
            if table.grad is None:
                assert all(torch.equal(ours[k], our_before[i][k]) for k in ("table", *PARTS))
                continue
            self.errors[i].add_step(table.grad, their_before[i], theirs, group)
            unnamed = ~named_elements(table.grad)
            for part in ("table", *PARTS):
                what = f"{part} of table {i} at step {ours['step']}"
                assert_within(ours[part], theirs[part], getattr(self.errors[i], part), what)
                was = our_before[i][part]
                assert torch.equal(ours[part][unnamed], was[unnamed]), f"rows not named, {what}"

    def _state_of(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Copy each table and its state; one that has had no gradient has no state, which reads as zeros."""
        is_ours = isinstance(optimizer, SparseAdam)
        state_dict = optimizer.to_torch_state_dict() if is_ours else optimizer.state_dict()
        tables = self.our_tables if is_ours else self.their_tables
        states = []
        for i, table in enumerate(tables):
            state = state_dict["state"].get(i)
            if state is None:
                state = {"step": 0, **{part: torch.zeros_like(table) for part in PARTS}}
            assert set(state) == {"step", *PARTS}
            parts = {part: state[part].detach().clone() for part in PARTS}
            table = table.detach().clone()
            states.append({"table": table, "step": int(state["step"]), **parts})
        return states


# A run with everything in it ----------------------------------------------------------------------


def run_of_everything(backend: str | None, dtype: torch.dtype, *, torch_eps: bool = True) -> Twins:
    """Four tables in three groups through eleven steps; the last row of each table is never named."""
    torch.manual_seed(0)
    shapes = [(11, 5), (7,), (6, 2, 3), (9, 4)]
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [nn.Parameter(table.detach().clone()) for table in ours]
    groups = [
        (ours[:2], theirs[:2], {"lr": 0.05}),
        (ours[2:3], theirs[2:3], {"betas": (0.8, 0.95), "eps": 0.05, "maximize": True}),
        (ours[3:], theirs[3:], {"lr": 0.02, "betas": (0.0, 0.5), "eps": 1e-3}),
    ]
    twins = Twins(groups, backend, torch_eps=torch_eps)
    a, b, c, d = ours
    empty = coo([], torch.zeros(0, 5, dtype=dtype), a.shape)
    twins.step(lookups(a, [3, 7, 3]), lookups(b, [5, 0]), lookups(c, [1, 1, 1]), lookups(d, [0, 4]))
    twins.step(lookups(a, [9, 0, 3]).coalesce(), None, lookups(c, [4, 0]), lookups(d, [4, 0, 7]))
    twins.step(empty, lookups(b, [5, 5, 5, 1]), None, lookups(d, [7, 7, 7, 7, 2]))
    twins.step(lookups(a, [0]), lookups(b, [0]), lookups(c, [4]).coalesce(), lookups(d, [1]))
    twins.set_option(0, lr=0.3)
    # Gradients as small as eps, where its place is seen.
    tiny = 2.0**-24
    twins.step(lookups(a, [2, 2, 8], tiny), lookups(b, [3, 3], tiny), lookups(c, [2]), None)
    twins.step(None, None, None, None)
    twins.set_option(2, maximize=True, betas=(0.5, 0.9))
    twins.step(lookups(a, range(10)), lookups(b, range(6)), lookups(c, range(5)), lookups(d, [3]))
    # A stored zero is a lookup like any other: for a row that has moments, and for one that has none.
    zeros = coo([3, 5], torch.zeros(2, 5, dtype=dtype), a.shape)
    twins.step(zeros, lookups(b, [2, 5, 2]), lookups(c, [3, 1, 3, 1]), lookups(d, [5, 5, 0]))
    twins.set_option(0, lr=1e-3)
    twins.step(lookups(a, [3, 2, 8, 2, 3]), None, lookups(c, [0, 2, 4]), lookups(d, [6, 0, 6]))
    twins.step(lookups(a, [1, 3]), lookups(b, [0, 5]), lookups(c, [1]), lookups(d, [6]).coalesce())
    twins.step(empty, None, lookups(c, [1, 0]), lookups(d, [2, 0, 2]))
    return twins


@each_dtype
def test_a_run_with_everything_in_it_agrees_after_every_step(backend: str, dtype: torch.dtype) -> None:
    twins = run_of_everything(backend, dtype)
    steps = [twins.ours.state[table]["step"] for table in twins.our_tables]
    assert steps == [10, 7, 9, 9]
    for table in twins.our_tables:
        assert len(table) - 1 not in twins.ours.state[table]["rows"]


@needs_native
@each_dtype
def test_the_backend_that_is_taken_by_itself_agrees_too(dtype: torch.dtype) -> None:
    run_of_everything(None, dtype)


@each_dtype
def test_the_comparison_notices_the_other_place_of_eps(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="times what rounding explains"):
        run_of_everything(backend, dtype, torch_eps=False)


@each_dtype
@pytest.mark.parametrize("field", ["beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size"])
def test_the_comparison_notices_a_number_that_is_wrong_in_the_sixth_digit(
    backend: str, dtype: torch.dtype, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseadam import optimizer

    right = optimizer.step_scalars

    def wrong(*args: Any) -> Any:
        scalars = right(*args)
        return scalars._replace(**{field: getattr(scalars, field) * (1 + 1e-5)})

    monkeypatch.setattr(optimizer, "step_scalars", wrong)
    with pytest.raises(AssertionError, match="times what rounding explains"):
        run_of_everything(backend, dtype)


@each_dtype
def test_many_steps_over_a_larger_table_agree(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    twins = Twins.of(torch.randn(300, 17, dtype=dtype), backend, lr=0.01)
    for _ in range(30):
        # Squared so that some rows are named often and some hardly ever.
        rows = (torch.rand(400) ** 2 * 299).long()
        twins.step(lookups(twins.our_tables[0], rows))


@each_dtype
def test_stored_zeros_count_as_touched(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    twins = Twins.of(torch.randn(5, 3, dtype=dtype), backend)
    (table,) = twins.our_tables
    twins.step(lookups(table, [1]))
    before = table.detach().clone()
    twins.step(coo([1, 4], torch.zeros(2, 3, dtype=dtype), table.shape))
    assert twins.ours.state[table]["rows"].tolist() == [1, 4]
    assert (table[1] != before[1]).all(), "the moments of a row go on moving it"
    assert torch.equal(table[4], before[4])


@each_dtype
def test_an_empty_gradient_counts_a_step_and_writes_nothing(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    twins = Twins.of(torch.randn(5, 3, dtype=dtype), backend)
    (table,) = twins.our_tables
    before = table.detach().clone()
    for _ in range(3):
        twins.step(coo([], torch.zeros(0, 3, dtype=dtype), table.shape))
    assert twins.ours.state[table]["step"] == 3
    assert torch.equal(table, before)
    # Corrected for the fourth step, not for the first.
    twins.step(lookups(table, [2, 2]))


# Gradients of any sparse_dim ----------------------------------------------------------------------

SHAPES = [(13,), (7, 5), (5, 3, 4)]


def partly_zero(shape: Sequence[int], sparse_dim: int, dtype: torch.dtype) -> Tensor:
    """A dense gradient that is zero for about half of the rows that ``sparse_dim`` makes."""
    kept = torch.rand(shape[:sparse_dim]) < 0.5
    kept = kept.reshape(*kept.shape, *[1] * (len(shape) - sparse_dim))
    return torch.where(kept, exact(*shape, dtype=dtype), 0)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "sparse_dim"),
    [(shape, sparse_dim) for shape in SHAPES for sparse_dim in range(1, len(shape) + 1)],
    ids=str,
)
def test_to_sparse_gradients_agree(backend: str, dtype: torch.dtype, shape: tuple[int, ...], sparse_dim: int) -> None:
    torch.manual_seed(4)
    twins = Twins.of(torch.randn(shape, dtype=dtype), backend)
    for _ in range(7):
        twins.step(partly_zero(shape, sparse_dim, dtype).to_sparse(sparse_dim))
    assert twins.ours.state[twins.our_tables[0]]["exp_avg"].shape[1:] == shape[sparse_dim:]


@each_dtype
@pytest.mark.parametrize(("shape", "sparse_dim"), [((7, 5), 2), ((5, 3, 4), 2), ((5, 3, 4), 3)], ids=str)
def test_repeated_rows_of_several_indices_agree(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], sparse_dim: int
) -> None:
    torch.manual_seed(5)
    twins = Twins.of(torch.randn(shape, dtype=dtype), backend)
    for _ in range(7):
        indices = torch.stack([torch.randint(size, (20,)) for size in shape[:sparse_dim]])
        twins.step(coo(indices, exact(20, *shape[sparse_dim:], dtype=dtype), shape))


@each_dtype
def test_sparse_dim_may_change_from_step_to_step(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    shape = (5, 3, 4)
    twins = Twins.of(torch.randn(shape, dtype=dtype), backend)
    for sparse_dim in (1, 3, 2, 1, 2, 3, 1, 1):
        twins.step(partly_zero(shape, sparse_dim, dtype).to_sparse(sparse_dim))


# Tables of any layout -----------------------------------------------------------------------------

# What it is, the larger tensor's shape, the part that is the table, and whether rows lie together in memory.
VIEWS: list[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor], bool]] = [
    ("column slice", (9, 8), lambda whole: whole[:, 2:5], True),
    ("row slice", (9, 8), lambda whole: whole[3:7], True),
    ("every second row", (9, 8), lambda whole: whole[::2], True),
    ("one column", (9, 8), lambda whole: whole[:, 3], True),
    ("middle slice", (6, 4, 5), lambda whole: whole[:, 1:3], True),
    ("last slice", (6, 4, 5), lambda whole: whole[:, :, 1:3], False),
    ("transposed", (5, 7), lambda whole: whole.t(), False),
    ("permuted", (4, 3, 5), lambda whole: whole.permute(2, 0, 1), False),
    ("every second column", (9, 8), lambda whole: whole[:, ::2], False),
]


def twins_of_views(
    backend: str | None, dtype: torch.dtype, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]
) -> tuple[Twins, Tensor]:
    torch.manual_seed(7)
    wholes = [torch.randn(shape, dtype=dtype)]
    wholes.append(wholes[0].clone())
    ours, theirs = (nn.Parameter(take(whole)) for whole in wholes)
    assert ours.data_ptr() == take(wholes[0]).data_ptr()
    return Twins([([ours], [theirs], {"lr": 0.05})], backend), wholes[0]


VIEW_CASES = [
    pytest.param(name, view, id=f"{name}-{view[0]}", marks=needs_native if name is None else ())
    for name in (None, *BACKENDS)
    for view in VIEWS
    if view[3] or name not in ("native", "triton")  # these refuse the others, as the next test shows
]


@each_dtype
@pytest.mark.parametrize(("name", "view"), VIEW_CASES)
def test_a_table_inside_a_larger_tensor_agrees_and_the_rest_keeps_its_bits(
    name: str | None, dtype: torch.dtype, view: Any
) -> None:
    _, shape, take, _ = view
    twins, whole = twins_of_views(name, dtype, shape, take)
    (table,) = twins.our_tables
    rest = torch.ones(shape, dtype=torch.bool)
    take(rest)[...] = False
    before = whole.clone()
    for _ in range(7):
        twins.step(lookups(table, torch.randint(len(table), (6,))))
    assert torch.equal(whole[rest], before[rest])
    assert not torch.equal(whole[~rest], before[~rest])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("view", [view for view in VIEWS if not view[3]], ids=lambda view: view[0])
def test_backends_that_write_past_torch_refuse_rows_that_do_not_lie_together(view: Any, backend: str) -> None:
    _, shape, take, _ = view
    torch.manual_seed(8)
    whole = torch.randn(shape)
    table = nn.Parameter(take(whole))
    before = whole.clone()
    optimizer = SparseAdam([table], backend=backend)
    table.grad = lookups(table, [0, 1])
    with pytest.raises(RuntimeError, match="elements of a row must be adjacent in memory"):
        optimizer.step()
    assert torch.equal(whole, before)
    assert table not in optimizer.state


@each_dtype
def test_every_sparse_dim_of_a_slice_agrees(dtype: torch.dtype) -> None:
    for sparse_dim in (1, 2, 3):
        twins, _ = twins_of_views("reference", dtype, (5, 4, 6), lambda whole: whole.transpose(0, 2)[:, 1:])
        (table,) = twins.our_tables
        for _ in range(7):
            twins.step(partly_zero(table.shape, sparse_dim, dtype).to_sparse(sparse_dim))


# Gradients from layers ----------------------------------------------------------------------------


class Layer:
    """A layer with our optimizer, its copy with PyTorch's, and gradients of an exactly summable loss.

    The loss is linear in the table, so both have the same gradients for as long as they run.
    """

    def __init__(self, layer: nn.Module, backend: str) -> None:
        """Copy the layer."""
        self.layers = layer, copy.deepcopy(layer)
        ours, theirs = (list(each.parameters()) for each in self.layers)
        self.twins = Twins([(ours, theirs, {"lr": 0.05})], backend)

    def backward(self, *inputs: Tensor, **options: Tensor) -> None:
        """Run one backward pass through both layers."""
        weights = None
        for layer in self.layers:
            out = layer(*inputs, **options)
            weights = exact(*out.shape, dtype=out.dtype) if weights is None else weights
            (out * weights).sum().backward()

    def step(self) -> None:
        """Step and compare, and clear gradients."""
        self.twins.step()
        self.twins.ours.zero_grad()
        self.twins.theirs.zero_grad()


@each_dtype
def test_embedding_agrees(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    layer = Layer(nn.Embedding(12, 4, sparse=True, dtype=dtype), backend)
    for _ in range(7):
        layer.backward(torch.randint(11, (3, 5)))
        layer.step()


@each_dtype
def test_the_padding_row_keeps_its_bits(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    embedding = nn.Embedding(12, 4, padding_idx=3, sparse=True, dtype=dtype)
    nn.init.normal_(embedding.weight)
    before = embedding.weight.detach().clone()
    layer = Layer(embedding, backend)
    for _ in range(7):
        ids = torch.randint(12, (3, 5))
        ids[0, :2] = 3
        layer.backward(ids)
        layer.step()
    assert torch.equal(embedding.weight[3], before[3])
    assert 3 not in layer.twins.ours.state[embedding.weight]["rows"]


# Bags of 1, 2, 4 and 1 ids, so that a mean divides exactly.
OFFSETS = torch.tensor([0, 1, 3, 7])


@each_dtype
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_agrees(backend: str, dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(11)
    bag = nn.EmbeddingBag(12, 4, mode=mode, sparse=True, dtype=dtype)
    layer = Layer(bag, backend)
    for _ in range(7):
        layer.backward(torch.randint(11, (8,)), OFFSETS)
        layer.step()


@each_dtype
def test_embedding_bag_with_per_sample_weights_agrees(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(12)
    layer = Layer(nn.EmbeddingBag(12, 4, mode="sum", sparse=True, dtype=dtype), backend)
    for _ in range(7):
        weights = exact(8, dtype=dtype)
        layer.backward(torch.randint(11, (8,)), OFFSETS, per_sample_weights=weights)
        layer.step()


@each_dtype
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_with_a_padding_row_agrees(backend: str, dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(13)
    bag = nn.EmbeddingBag(12, 4, mode=mode, padding_idx=0, sparse=True, dtype=dtype)
    nn.init.normal_(bag.weight)
    before = bag.weight.detach().clone()
    layer = Layer(bag, backend)
    for _ in range(7):
        # Each bag has one, two or four ids beside the padding.
        ids = torch.randint(1, 12, (11,))
        ids[[0, 4, 9]] = 0
        layer.backward(ids, torch.tensor([0, 2, 5, 10]))
        layer.step()
    assert torch.equal(bag.weight[0], before[0])


class Shared(nn.Module):
    """One table used by two embeddings and a bag."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Tie the three."""
        super().__init__()
        self.words = nn.Embedding(12, 4, sparse=True, dtype=dtype)
        self.contexts = nn.Embedding(12, 4, sparse=True, dtype=dtype)
        self.bags = nn.EmbeddingBag(12, 4, mode="sum", sparse=True, dtype=dtype)
        self.contexts.weight = self.bags.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Use all three."""
        return torch.cat([self.words(ids), self.contexts(ids.flip(0)), self.bags(ids[:, None])])


@each_dtype
def test_a_table_shared_by_several_layers_agrees(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(14)
    layer = Layer(Shared(dtype), backend)
    assert len(layer.twins.our_tables) == 1
    for _ in range(7):
        layer.backward(torch.randint(11, (6,)))
        assert layer.twins.our_tables[0].grad._nnz() > 6, "more than one layer contributes"
        layer.step()


@each_dtype
def test_several_backward_passes_before_one_step_agree(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(15)
    layer = Layer(nn.Embedding(12, 4, sparse=True, dtype=dtype), backend)
    for passes in (3, 1, 2, 3, 2, 1, 4):
        for _ in range(passes):
            layer.backward(torch.randint(11, (5,)))
        layer.step()


@each_dtype
def test_several_tables_of_one_model_agree(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(16)
    tables = nn.ModuleList(nn.Embedding(n, 3, sparse=True, dtype=dtype) for n in (4, 12, 40))
    layers = tables, copy.deepcopy(tables)
    twins = Twins([(*(list(each.parameters()) for each in layers), {"lr": 0.05})], backend)
    for i in range(9):
        ids, weights = torch.randint(4, (6,)), exact(6, 3, dtype=dtype)
        for each in layers:
            each.zero_grad()
            # One table has no gradient in every third step.
            for k, embedding in enumerate(each):
                if (i + k) % 3:
                    (embedding(ids) * weights).sum().backward()
        twins.step()


# torch.optim.Adam ---------------------------------------------------------------------------------


def dense_run(backend: str, dtype: torch.dtype, *, torch_eps: bool) -> None:
    torch.manual_seed(17)
    ours = nn.Parameter(torch.randn(9, 5, dtype=dtype))
    theirs = nn.Parameter(ours.detach().clone())
    options = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-2}
    groups = [([ours], [theirs], options)]
    twins = Twins(groups, backend, torch_eps=torch_eps, partner=torch.optim.Adam)
    for i in range(10):
        # Every row at least once, some twice, in any order; gradients from far above eps to far below.
        rows = torch.cat([torch.randperm(9), torch.randint(9, (4,))])
        twins.step(lookups(ours, rows, scale=2.0 ** -(2 * i % 13)))
        twins.set_option(0, lr=0.05 / (i + 1), maximize=i % 4 == 3)


@each_dtype
def test_it_is_adam_where_every_row_is_looked_up_at_every_step(backend: str, dtype: torch.dtype) -> None:
    dense_run(backend, dtype, torch_eps=False)


@each_dtype
def test_it_is_not_adam_with_the_eps_of_torchs_sparse_adam(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match=r"table of table 0 at step 1: .* rounding explains"):
        dense_run(backend, dtype, torch_eps=True)


# Half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_table_is_torchs_float32_run_rounded_once_a_step(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(18)
    ours = nn.Parameter(torch.randn(40, 16).to(dtype))
    theirs = nn.Parameter(ours.detach().float())
    optimizer = SparseAdam([ours], lr=0.05, torch_eps=True, backend=backend)
    partner = torch.optim.SparseAdam([theirs], lr=0.05)
    differing = 0
    for _ in range(8):
        rows = torch.randint(39, (60,))
        ours.grad = lookups(ours, rows)
        theirs.grad = coo(rows, ours.grad._values().float(), theirs.shape)
        # Started from the same table at every step: a last bit that differs is then one, and not the sum of many.
        theirs.data.copy_(ours.detach())
        before = ours.detach().clone()
        optimizer.step()
        with one_thread():
            partner.step()
        want = theirs.detach().to(dtype)
        near = [want.nextafter(torch.full_like(want, end)) for end in (-math.inf, math.inf)]
        is_equal = ours == want
        assert (is_equal | sum((ours == each for each in near), torch.zeros_like(is_equal))).all()
        differing += int((~is_equal).sum())
        unnamed = ~named_elements(ours.grad)
        assert torch.equal(ours[unnamed], before[unnamed])
        state = optimizer.to_torch_state_dict()["state"][0]
        assert state["step"] == partner.state[theirs]["step"]
        # The moments are float32, and gradients are exact: 8u and 10u for each of at most eight steps.
        for part, roundings in (("exp_avg", 8), ("exp_avg_sq", 10)):
            got, wanted = state[part], partner.state[theirs][part]
            assert got.dtype is torch.float32
            bound = torch.full_like(wanted, 8 * roundings * 2.0**-24) * wanted.abs().max()
            assert_within(got, wanted, bound, part)
    # The two float32 results part at most now and then around the middle of two half-precision numbers.
    assert differing < 0.001 * 8 * ours.numel()
