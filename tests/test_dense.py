"""Dense gradients: torch's own AdamW beside the tables, in one optimizer, with one state for both kinds of gradient."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import needs_steady_steps
from gradients import coo
from saving import through_a_file
from snapshot import bits, snapshot, state_bits
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW

from sparseadam import SparseAdam
from sparseadam.moments import Moments


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Small steps wake all threads in PyTorch's own operations, which a busy machine pays for."""
    torch.set_num_threads(1)


def dense_adam(parameters: Any, **options: Any) -> SparseAdam:
    return SparseAdam(parameters, **{"dense_gradients": "adam"} | options)


def assert_same(got: torch.optim.Optimizer, want: torch.optim.Optimizer) -> None:
    """Compare parameters and states bit for bit."""
    for got_group, want_group in zip(got.param_groups, want.param_groups, strict=True):
        for mine, other in zip(got_group["params"], want_group["params"], strict=True):
            assert bits(mine) == bits(other)
            assert state_bits(got, mine) == state_bits(want, other)


def set_dense(parameter: Tensor, seed: int) -> None:
    """Give a parameter a strided gradient drawn from a seed, laid out as the parameter is."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(grad)


def set_sparse(table: Tensor, seed: int, num_lookups: int = 7) -> None:
    """Give a table a few lookups drawn from a seed, rows repeated among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(table), (1, num_lookups), generator=generator)
    values = torch.randn(num_lookups, *table.shape[1:], generator=generator).to(table.dtype)
    table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=False)


# AdamW's numbers ----------------------------------------------------------------------------------

# Both modes of weight decay mean the same to a dense gradient.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.1},
    "exact weight decay": {"weight_decay": 0.1, "weight_decay_mode": "exact"},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.01},
    "everything": {"betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True, "maximize": True},
}


def of_adamw(options: dict[str, Any]) -> dict[str, Any]:
    """The same options as torch's AdamW has them."""
    return {"weight_decay": 0.0} | {name: value for name, value in options.items() if name != "weight_decay_mode"}


def some_parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of several sizes, one without dimensions and one without elements."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4,), (), (2, 3, 4, 5), (0, 3)]
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step_on_dense(optimizer: torch.optim.Optimizer, seeds: range, scheduler: Any = None) -> None:
    for seed in seeds:
        for group in optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                set_dense(parameter, seed * 100 + position)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense_parameters_take_the_steps_of_torchs_adamw_bit_for_bit(
    backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    ours = dense_adam(some_parameters(dtype), lr=0.1, backend=backend, **options)
    theirs = AdamW(some_parameters(dtype), lr=0.1, fused=True, **of_adamw(options))
    for optimizer in (ours, theirs):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 30, cycle_momentum=False)
        step_on_dense(optimizer, range(30), scheduler)
    assert_same(ours, theirs)
    assert not torch.equal(ours.param_groups[0]["params"][0], some_parameters(dtype)[0])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_decay_they_are_the_steps_of_torchs_adam(backend: str, amsgrad: bool) -> None:
    ours = dense_adam(some_parameters(), lr=0.1, backend=backend, amsgrad=amsgrad)
    theirs = torch.optim.Adam(some_parameters(), lr=0.1, amsgrad=amsgrad, fused=True)
    for optimizer in (ours, theirs):
        step_on_dense(optimizer, range(30), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    assert_same(ours, theirs)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_lr_is_read_at_each_step(backend: str, lr_dtype: torch.dtype) -> None:
    lrs = [torch.tensor(0.1, dtype=lr_dtype) for _ in range(2)]
    ours = dense_adam(some_parameters(), lr=lrs[0], weight_decay=0.1, backend=backend)
    theirs = AdamW(some_parameters(), lr=lrs[1], weight_decay=0.1, fused=True)
    for seed in range(6):
        for lr, optimizer in zip(lrs, (ours, theirs), strict=True):
            step_on_dense(optimizer, range(seed, seed + 1))
            lr.mul_(0.5)
    assert_same(ours, theirs)


def test_each_group_has_its_own_options(backend: str) -> None:
    def groups() -> list[dict[str, Any]]:
        first, second, *rest = some_parameters()
        return [
            {"params": [first], "lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.0},
            {"params": [second], "amsgrad": True},
            {"params": rest},
        ]

    ours = dense_adam(groups(), lr=0.1, weight_decay=0.1, backend=backend)
    theirs = AdamW(groups(), lr=0.1, weight_decay=0.1, fused=True)
    for optimizer in (ours, theirs):
        step_on_dense(optimizer, range(5))
    assert_same(ours, theirs)


class Marked(Parameter):
    """A parameter of a type that PyTorch knows nothing of."""


def test_a_parameter_of_another_type_takes_the_steps_that_torch_chooses_for_it(backend: str) -> None:
    ours, theirs = (Marked(torch.ones(5, 3)) for _ in range(2))
    our_optimizer = dense_adam([ours], lr=0.1, weight_decay=0.1, backend=backend)
    their_optimizer = AdamW([theirs], lr=0.1, weight_decay=0.1)
    for optimizer in (our_optimizer, their_optimizer):
        step_on_dense(optimizer, range(10))
    assert_same(our_optimizer, their_optimizer)


# Layouts ------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda values: values.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda values: values.to(memory_format=torch.channels_last),
    "every second element": lambda values: torch.stack((values, values), dim=-1)[..., 0],
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_parameter_and_gradient_steps_right(backend: str, layout: str, grad_layout: str) -> None:
    """PyTorch's fused AdamW takes the CPU's memory as it comes, and would mix elements up."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, 3, 4, 5, generator=generator)
    ours, theirs = Parameter(LAYOUTS[layout](values)), Parameter(values.clone())
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    our_optimizer, their_optimizer = dense_adam([ours], backend=backend, **options), AdamW([theirs], **options)
    for _ in range(4):
        grad = torch.randn(values.shape, generator=generator)
        ours.grad, theirs.grad = LAYOUTS[grad_layout](grad), grad
        our_optimizer.step()
        their_optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == LAYOUTS[layout](values).stride()


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_a_parameter_whose_dimensions_are_permuted_is_fused_too(backend: str, layout: str) -> None:
    optimizers = []
    for make in (dense_adam, AdamW):
        values = torch.randn(8, 9, 10, 11, generator=torch.Generator().manual_seed(1))
        parameter = Parameter(LAYOUTS[layout](values))
        options = {"backend": backend} if make is dense_adam else {"fused": True}
        optimizers.append(make([parameter], lr=0.1, weight_decay=0.1, **options))
        step_on_dense(optimizers[-1], range(5))
    assert_same(*optimizers)


def test_memory_between_the_elements_of_a_parameter_is_left_alone(backend: str) -> None:
    whole = torch.ones(4, 6)
    parameter = Parameter(whole[:, ::2])
    optimizer = dense_adam([parameter], backend=backend)
    step_on_dense(optimizer, range(3))
    assert torch.equal(whole[:, 1::2], torch.ones(4, 3))
    assert not torch.equal(whole[:, ::2], torch.ones(4, 3))


def test_a_parameter_that_changes_its_layout_keeps_its_moments(backend: str) -> None:
    ours, theirs = (Parameter(torch.ones(2, 3, 4, 5)) for _ in range(2))
    our_optimizer, their_optimizer = dense_adam([ours], backend=backend), AdamW([theirs], weight_decay=0.0, fused=True)
    for seed in range(6):
        if seed == 3:
            ours.data = ours.data.to(memory_format=torch.channels_last)
        set_dense(ours, seed)
        set_dense(theirs, seed)
        our_optimizer.step()
        their_optimizer.step()
    assert torch.equal(ours, theirs)


# With tables --------------------------------------------------------------------------------------


class Mixed:
    """Two tables and three dense parameters, in two groups, with gradients drawn from a seed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start from the same values every time."""
        generator = torch.Generator().manual_seed(0)
        shapes = {"users": (20, 4), "weight": (3, 4), "bias": (3,), "items": (30, 2), "scale": ()}
        self.parameters = {
            name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
        }

    def groups(self, *names: str) -> list[dict[str, Any]]:
        """The named ones, or all, the last two of all in a group of their own."""
        named = {name: self.parameters[name] for name in names or self.parameters}
        first = [(name, named[name]) for name in ("users", "weight", "bias") if name in named]
        second = [(name, named[name]) for name in ("items", "scale") if name in named]
        return [{"params": first}, {"params": second, "lr": 0.3, "betas": (0.5, 0.9)}]

    def set_gradients(self, seed: int) -> None:
        """Give every parameter a gradient, the tables sparse ones."""
        for position, (name, parameter) in enumerate(self.parameters.items()):
            (set_sparse if name in ("users", "items") else set_dense)(parameter, seed * 100 + position)


class Run:
    """A mixed model with its optimizer; counts the steps that go the general way."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Build both."""
        self.model = Mixed(dtype)
        self.optimizer = dense_adam(self.model.groups(), **{"lr": 0.1, **options})
        self.num_general = 0
        general = self.optimizer._step_generally

        def counted(options: Any) -> None:
            self.num_general += 1
            general(options)

        self.optimizer._step_generally = counted  # type: ignore[method-assign]

    def __getitem__(self, name: str) -> Parameter:
        """Return a parameter."""
        return self.model.parameters[name]

    def steps(self, seeds: range) -> Run:
        """Take a step for each seed."""
        for seed in seeds:
            self.model.set_gradients(seed)
            self.optimizer.step()
        return self


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_mixed_model_takes_the_steps_of_an_adamw_and_a_sparse_adam(backend: str, options: dict[str, Any]) -> None:
    mixed = Run(backend=backend, **options)
    apart = Mixed()
    tables = SparseAdam(apart.groups("users", "items"), lr=0.1, backend=backend, **options)
    others = AdamW(apart.groups("weight", "bias", "scale"), lr=0.1, fused=True, **of_adamw(options))
    for seed in range(12):
        for optimizer in (mixed.optimizer, tables, others):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + seed)
        mixed.steps(range(seed, seed + 1))
        apart.set_gradients(seed)
        tables.step()
        others.step()
    for name, parameter in apart.parameters.items():
        assert bits(mixed[name]) == bits(parameter), name
        state = state_bits(tables if parameter in tables.state else others, parameter)
        assert state_bits(mixed.optimizer, mixed[name]) == state, name


def test_parameters_without_a_gradient_stay_as_they_are_and_count_no_step(backend: str) -> None:
    run = Run(backend=backend, weight_decay=0.1).steps(range(3))
    run.model.set_gradients(3)
    run["weight"].grad = run["users"].grad = None
    before = {name: bits(run[name]) for name in ("weight", "users")}
    run.optimizer.step()
    assert {name: bits(run[name]) for name in before} == before
    assert [int(run.optimizer.state[run[name]]["step"]) for name in ("weight", "users", "bias")] == [3, 3, 4]


def without_steady_steps(run: Run) -> Run:
    run.optimizer.__dict__["_steady_step"] = None
    return run


@needs_steady_steps
def test_the_tables_of_a_mixed_model_are_still_read_natively_with_the_same_result() -> None:
    steady, general = Run(weight_decay=0.1).steps(range(1)), Run(weight_decay=0.1).steps(range(1))
    for seed in range(1, 5):
        steady.steps(range(seed, seed + 1))
        without_steady_steps(general).steps(range(seed, seed + 1))
    assert (steady.num_general, general.num_general) == (1, 5)
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


def exchange_memory(run: Run) -> None:
    run["weight"].data = run["weight"].data.t().contiguous().t()


def exchange_a_moment(run: Run) -> None:
    state = run.optimizer.state[run["weight"]]
    state["exp_avg"] = state["exp_avg"].clone()


def exchange_the_memory_of_a_moment(run: Run) -> None:
    moment = run.optimizer.state[run["weight"]]["exp_avg"]
    moment.data = moment.data.t().contiguous().t()


def forget_state(run: Run) -> None:
    del run.optimizer.state[run["scale"]]


def write_state_as_numbers(run: Run) -> None:
    state = run.optimizer.state[run["scale"]]
    state["step"] = int(state["step"])


def load_other_state(run: Run) -> None:
    run.optimizer.load_state_dict(Run().steps(range(7, 9)).optimizer.state_dict())


def add_dense_parameter(run: Run) -> None:
    run.model.parameters["added"] = Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [("added", run["added"])]})


def take_dense_parameter_out(run: Run) -> None:
    group = run.optimizer.param_groups[0]
    group["params"] = group["params"][:2]
    group["param_names"] = group["param_names"][:2]


CHANGES = [
    exchange_memory,
    exchange_a_moment,
    exchange_the_memory_of_a_moment,
    forget_state,
    write_state_as_numbers,
    load_other_state,
    add_dense_parameter,
    take_dense_parameter_out,
]


@needs_steady_steps
@pytest.mark.parametrize("change", CHANGES)
def test_a_dense_parameter_that_looks_otherwise_sends_one_step_the_general_way(change: Callable[[Run], None]) -> None:
    steady, general = Run().steps(range(2)), Run().steps(range(2))
    for run in (steady, general):
        change(run)
        run.num_general = 0
    for seed in range(2, 5):
        steady.steps(range(seed, seed + 1))
        without_steady_steps(general).steps(range(seed, seed + 1))
    assert (steady.num_general, general.num_general) == (1, 3)
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


@needs_steady_steps
def test_options_are_read_anew_in_a_steady_step() -> None:
    steady, general = Run().steps(range(2)), Run().steps(range(2))
    for run in (steady, general):
        run.optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), eps=1e-3, maximize=True, weight_decay=0.5)
    steady.steps(range(2, 4))
    for seed in range(2, 4):
        without_steady_steps(general).steps(range(seed, seed + 1))
    assert steady.num_general == 1
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


# One state for both kinds of gradient -------------------------------------------------------------


def set_all_rows(table: Tensor, grad: Tensor, is_sparse: bool) -> None:
    """Give a table the same gradient as all of its rows or as a dense one."""
    table.grad = grad.to_sparse(1) if is_sparse else grad.clone()


@pytest.mark.parametrize("first_is_sparse", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_that_alternate_between_dense_and_all_rows_take_the_steps_of_adamw(
    backend: str, options: dict[str, Any], first_is_sparse: bool
) -> None:
    """Both rules are the same where every row is named; they round apart, which float64 keeps small."""
    ours, theirs = (Parameter(torch.ones(6, 3, dtype=torch.float64)) for _ in range(2))
    our_optimizer = dense_adam([ours], lr=0.1, backend=backend, **options)
    their_optimizer = AdamW([theirs], lr=0.1, **of_adamw(options))
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        grad = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        is_sparse = (step // 2 % 2 == 0) == first_is_sparse
        set_all_rows(ours, grad, is_sparse)
        theirs.grad = grad
        our_optimizer.step()
        their_optimizer.step()
        state = our_optimizer.state[ours]
        assert (type(state) is Moments) == is_sparse
        assert int(state["step"]) == step + 1
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    moments = state.to_dense() if isinstance(state, Moments) else state
    for key, moment in their_optimizer.state[theirs].items():
        if key != "step":
            torch.testing.assert_close(moments[key], moment, rtol=1e-12, atol=1e-12)


class TiedModel(nn.Module):
    """A table that is looked up and, in some steps, projects onto as well: its gradient is then dense."""

    def __init__(self) -> None:
        """Start from the same values every time."""
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 4, sparse=True, dtype=torch.float64)
        self.hidden = nn.Linear(4, 4, dtype=torch.float64)

    def loss(self, seed: int, projects: bool) -> Tensor:
        """A loss of words that name some rows, or of a prediction over all."""
        ids = torch.randint(11, (6,), generator=torch.Generator().manual_seed(seed))
        hidden = self.hidden(self.embedding(ids))
        if projects:
            return nn.functional.cross_entropy(hidden @ self.embedding.weight.t(), ids.roll(1))
        return hidden.tanh().pow(2).sum()


def test_tied_weights_go_on_with_one_state_through_both_kinds_of_gradient(backend: str) -> None:
    """A table's moments become AdamW's and back: as if a SparseAdam and an AdamW had handed each other their states."""
    model, twin = TiedModel(), TiedModel()
    optimizer = dense_adam(model.parameters(), lr=0.05, backend=backend)
    for seed in range(12):
        projects = seed % 3 == 1
        for each in (model, twin):
            each.zero_grad()
            each.loss(seed, projects).backward()
        assert (model.embedding.weight.grad.layout is torch.strided) == projects
        if seed == 0:
            tables = SparseAdam([twin.embedding.weight], lr=0.05, backend=backend)
            others = AdamW(twin.hidden.parameters(), lr=0.05, weight_decay=0.0, fused=True)
            tied = AdamW([twin.embedding.weight], lr=0.05, weight_decay=0.0, fused=True)
        if projects:
            tied.load_state_dict(tied.state_dict() | {"state": tables.to_torch_state_dict()["state"]})
            tied.step()
            tables.load_state_dict(tied.state_dict())
        else:
            tables.step()
        others.step()
        optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert bits(mine) == bits(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_moments_are_as_torch_keeps_them_while_dense_and_float32_while_sparse(
    backend: str, dtype: torch.dtype
) -> None:
    table = Parameter(torch.ones(5, 2, dtype=dtype))
    optimizer = dense_adam([table], backend=backend)
    set_sparse(table, 0)
    optimizer.step()
    before = optimizer.to_torch_state_dict()["state"][0]
    assert optimizer.state[table]["exp_avg"].dtype is torch.float32
    table.grad = torch.zeros(5, 2, dtype=dtype)
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    optimizer.step()
    state = optimizer.state[table]
    assert bits(state["exp_avg"]) == bits(before["exp_avg"].to(dtype) * 0.5)
    set_sparse(table, 1)
    optimizer.step()
    assert optimizer.state[table]["exp_avg"].dtype is torch.float32
    assert optimizer.state[table]["step"] == 3


def test_owed_decay_is_paid_before_a_dense_step_and_none_is_owed_after_it(backend: str) -> None:
    """A row that no sparse gradient names and whose dense gradient is zero shows the decay alone."""
    table = Parameter(torch.ones(5, 2, dtype=torch.float64))
    options: dict[str, Any] = {"weight_decay": 0.25, "weight_decay_mode": "exact", "backend": backend}
    optimizer = dense_adam([table], lr=0.5, **options)
    is_sparse = [True, True, False, False, True, True, True]
    paid = [0, 0, 3, 4, 4, 4, 4]
    for step, (sparse, num_paid) in enumerate(zip(is_sparse, paid, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
        grad = torch.zeros(5, 2, dtype=torch.float64)
        grad[:3] = 1.0
        table.grad = torch.sparse_coo_tensor([[0, 1, 2]], grad[:3], (5, 2), check_invariants=True) if sparse else grad
        optimizer.step()
        torch.testing.assert_close(table[3:], torch.full((2, 2), decays(num_paid), dtype=torch.float64))
    optimizer.flush()
    torch.testing.assert_close(table[3:], torch.full((2, 2), decays(7), dtype=torch.float64))


def decays(num_steps: int) -> float:
    return math.prod(1.0 - 0.5 / (1 + step) * 0.25 for step in range(num_steps))


@pytest.mark.parametrize("is_dense", [True, False])
def test_rows_that_are_forgotten_and_rows_that_are_added_start_anew(backend: str, is_dense: bool) -> None:
    """Whether their moments are AdamW's at that time or a table's."""
    ours, whole = (Parameter(torch.ones(6, 2)) for _ in range(2))
    optimizer, other = (dense_adam([table], lr=0.1, backend=backend) for table in (ours, whole))
    for table, each in ((ours, optimizer), (whole, other)):
        table.grad = torch.ones(6, 2) if is_dense else torch.ones(6, 2).to_sparse(1)
        each.step()
        table.grad = None
    moved = ours.detach().clone()
    optimizer.forget(ours, torch.tensor([1, 4, 1]))
    optimizer.resize(ours, 8)
    ours.grad, whole.grad = torch.zeros(8, 2), torch.zeros(6, 2)
    optimizer.step()
    other.step()
    fresh = torch.tensor([1, 4])
    assert torch.equal(ours[fresh], moved[fresh])
    assert torch.equal(ours[6:], torch.zeros(2, 2))
    kept = torch.tensor([0, 2, 3, 5])
    assert bits(ours[kept]) == bits(whole[kept])
    ours.grad = None
    optimizer.resize(ours, 3)
    ours.grad = torch.zeros(3, 2)
    optimizer.step()
    assert optimizer.state[ours]["exp_avg"].shape == (3, 2)


# Refusals -----------------------------------------------------------------------------------------


def assert_refused(run: Run, error: type[Exception], pattern: str) -> None:
    """Step, and see that it raises and changes nothing, and that the next step is as if it had not been."""
    before = snapshot(run.optimizer)
    versions = {name: parameter._version for name, parameter in run.model.parameters.items()}
    with pytest.raises(error, match=pattern):
        run.optimizer.step()
    assert snapshot(run.optimizer) == before
    assert {name: parameter._version for name, parameter in run.model.parameters.items()} == versions


WEIGHT = r"'weight' \(group 0, parameter 1\)"


def test_without_the_option_a_dense_gradient_is_refused_and_the_message_names_it(backend: str) -> None:
    run = Run(backend=backend, dense_gradients="error")
    run.model.set_gradients(0)
    assert_refused(run, RuntimeError, rf'does not support dense gradients.*{WEIGHT}.*dense_gradients="adam"')


TABLES_ONLY: dict[str, dict[str, Any]] = {
    "bias_correction='row'": {"bias_correction": "row"},
    "second_moment='row'": {"second_moment": "row"},
    "moment_dtype=torch.bfloat16": {"moment_dtype": torch.bfloat16},
    "moment_dtype=torch.uint8": {"moment_dtype": torch.uint8},
    "stochastic_rounding=True": {"stochastic_rounding": True},
    "nonfinite='skip'": {"nonfinite": "skip"},
    "torch_eps=True": {"torch_eps": True},
}


@pytest.mark.parametrize("option", TABLES_ONLY)
def test_options_that_only_tables_know_are_refused_by_name_for_a_dense_gradient(backend: str, option: str) -> None:
    run = Run(torch.bfloat16, backend=backend, **TABLES_ONLY[option])
    run.model.set_gradients(0)
    assert_refused(run, RuntimeError, rf"{WEIGHT} is dense, and {option} is for sparse gradients only")
    for name in ("weight", "bias", "scale"):
        run[name].grad = None
    run.optimizer.step()
    assert len(run.optimizer.state) == 2


@pytest.mark.parametrize("option", ["nonfinite='skip'", "torch_eps=True"])
def test_such_an_option_set_between_steps_is_refused_too(backend: str, option: str) -> None:
    run = Run(backend=backend).steps(range(2))
    run.optimizer.param_groups[0].update(TABLES_ONLY[option])
    run.model.set_gradients(2)
    assert_refused(run, RuntimeError, rf"{WEIGHT} is dense, and {option}")


def test_amsgrad_set_after_the_first_step_is_refused(backend: str) -> None:
    run = Run(backend=backend).steps(range(2))
    run["users"].grad = run["items"].grad = None
    run.optimizer.param_groups[0]["amsgrad"] = True
    assert_refused(run, RuntimeError, rf"amsgrad of {WEIGHT} changed after its moments were made")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_dense_gradient_that_is_not_finite_is_refused_where_asked(backend: str, value: float, num_steps: int) -> None:
    run = Run(backend=backend, nonfinite="error").steps(range(num_steps))
    run.model.set_gradients(num_steps)
    assert run["weight"].grad is not None
    run["weight"].grad[1, 2] = run["weight"].grad[2, 0] = value
    assert_refused(run, RuntimeError, rf"{WEIGHT} is not finite, first at \[1, 2\] and in 2 elements")
    twin = Run(backend=backend, nonfinite="error").steps(range(num_steps + 2))
    run.steps(range(num_steps, num_steps + 2))
    assert snapshot(run.optimizer) == snapshot(twin.optimizer)


@pytest.mark.parametrize("position", range(3))
def test_a_steady_step_looks_at_every_dense_gradient(backend: str, position: int) -> None:
    parameters = [Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = dense_adam(parameters, nonfinite="error", backend=backend)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(4)
        optimizer.step()
    assert parameters[position].grad is not None
    parameters[position].grad[2] = float("nan")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"group 0, parameter {position} is not finite, first at \[2\]"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_finite_gradients_whose_sum_is_not_are_let_pass(backend: str) -> None:
    parameter = Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = dense_adam([parameter], nonfinite="error", backend=backend)
    parameter.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    optimizer.step()
    assert int(optimizer.state[parameter]["step"]) == 1


def test_without_asking_what_is_not_finite_goes_on_into_the_parameter(backend: str) -> None:
    run = Run(backend=backend).steps(range(2))
    run.model.set_gradients(2)
    assert run["weight"].grad is not None
    run["weight"].grad[1, 2] = float("nan")
    run.optimizer.step()
    assert torch.isnan(run["weight"]).sum() == 1


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_bad_row_in_a_table_leaves_dense_parameters_as_they_were(backend: str, num_steps: int) -> None:
    run = Run(backend=backend).steps(range(num_steps))
    run.model.set_gradients(num_steps)
    assert run["items"].grad is not None
    run["items"].grad._indices()[0, 3] = 30
    assert_refused(run, IndexError, r"'items' \(group 1, parameter 0\) names row 30")


def outgrow_its_gradient(run: Run) -> None:
    run["weight"].data = torch.ones(4, 3)


def outgrow_its_moments(run: Run) -> None:
    run["weight"].data = torch.ones(4, 3)
    run["weight"].grad = torch.ones(4, 3)


def become_wider(run: Run) -> None:
    run["weight"].data = run["weight"].data.double()
    set_dense(run["weight"], 0)


def repeat_one_row(run: Run) -> None:
    run["weight"].data = torch.ones(1, 4).expand(3, 4)


def break_its_state(run: Run) -> None:
    del run.optimizer.state[run["weight"]]["exp_avg_sq"]


CHANGED: dict[str, tuple[Callable[[Run], None], type[Exception], str]] = {
    "shape": (outgrow_its_gradient, RuntimeError, rf"gradient of {WEIGHT} has shape \[3, 4\]"),
    "shape, gradient too": (outgrow_its_moments, RuntimeError, rf"moments of {WEIGHT} were made for .* \[3, 4\]"),
    "dtype": (become_wider, RuntimeError, rf"moments of {WEIGHT} have dtype torch\.float32"),
    "shared memory": (repeat_one_row, RuntimeError, rf"elements of {WEIGHT} share memory"),
    "state": (break_its_state, ValueError, rf"{WEIGHT}: exp_avg_sq missing"),
}


@pytest.mark.parametrize(("change", "error", "pattern"), CHANGED.values(), ids=CHANGED)
def test_a_parameter_that_changed_under_its_gradient_or_moments_is_refused(
    backend: str, change: Callable[[Run], None], error: type[Exception], pattern: str
) -> None:
    run = Run(backend=backend).steps(range(2))
    run.model.set_gradients(2)
    change(run)
    assert_refused(run, error, pattern)


@pytest.mark.parametrize(("value", "error"), [("Adam", ValueError), (True, TypeError), (None, TypeError)])
def test_another_value_of_the_option_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Invalid dense_gradients: .*'error', 'adam'"):
        SparseAdam(some_parameters(), dense_gradients=value)


# Checkpoints --------------------------------------------------------------------------------------


def resumed(run: Run, saved: dict[str, Any], **options: Any) -> Run:
    """A new run that takes over the parameters of one and a state dict."""
    other = Run(**options)
    for name, parameter in run.model.parameters.items():
        other[name].data = parameter.data.clone()
    other.optimizer.load_state_dict(saved)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_equals_one_that_never_stopped(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    run = Run(dtype, backend=backend, **options).steps(range(3))
    saved = through_a_file(run.optimizer.state_dict())
    assert [group["dense_gradients"] for group in saved["param_groups"]] == ["adam", "adam"]
    other = resumed(run, saved, dtype=dtype, backend=backend, dense_gradients="error")
    run.steps(range(3, 6))
    other.steps(range(3, 6))
    assert snapshot(other.optimizer) == snapshot(run.optimizer)


def test_loading_copies_dense_states_and_state_dicts_view_them(backend: str) -> None:
    run = Run(backend=backend).steps(range(2))
    saved = run.optimizer.state_dict()
    other = resumed(run, saved, backend=backend)
    moment = other.optimizer.state[other["weight"]]["exp_avg"].clone()
    saved["state"][1]["exp_avg"].zero_()
    assert torch.equal(other.optimizer.state[other["weight"]]["exp_avg"], moment)
    assert not run.optimizer.state[run["weight"]]["exp_avg"].any()


THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdamW fused": (AdamW, {"fused": True}),
    "AdamW foreach": (AdamW, {"foreach": True}),
    "AdamW everything": (AdamW, {**of_adamw(OPTIONS["everything"]), "fused": True}),
    "Adam": (torch.optim.Adam, {"fused": True}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "options"), THEIRS.values(), ids=THEIRS)
def test_a_checkpoint_of_torchs_adams_goes_on_bit_for_bit(
    backend: str, make: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    theirs = make(some_parameters(dtype), lr=0.1, **options)
    step_on_dense(theirs, range(4))
    ours = dense_adam([p.detach().clone().requires_grad_() for p in theirs.param_groups[0]["params"]], backend=backend)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert_same(ours, theirs)
    theirs.param_groups[0].update(fused=True, foreach=None)
    for optimizer in (ours, theirs):
        step_on_dense(optimizer, range(4, 8))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_torchs_adams_go_on_from_our_checkpoint_bit_for_bit(
    backend: str, make: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Adam too: torch's own key tells it that the decay is decoupled."""
    ours = dense_adam(some_parameters(dtype), lr=0.1, backend=backend, **options)
    step_on_dense(ours, range(4))
    theirs = make([p.detach().clone().requires_grad_() for p in ours.param_groups[0]["params"]])
    theirs.load_state_dict(through_a_file(ours.to_torch_state_dict()))
    theirs.param_groups[0]["fused"] = True
    for optimizer in (ours, theirs):
        step_on_dense(optimizer, range(4, 8))
    assert_same(ours, theirs)


def test_a_mixed_models_groups_go_to_torchs_two_optimizers(backend: str) -> None:
    """As the documentation of to_torch_state_dict() has it."""

    def groups(model: Mixed) -> list[dict[str, Any]]:
        parameters = model.parameters
        return [
            {"params": [parameters["users"], parameters["items"]]},
            {"params": [parameters[name] for name in ("weight", "bias", "scale")], "weight_decay": 0.1},
        ]

    model, twin = Mixed(torch.float64), Mixed(torch.float64)
    optimizer = dense_adam(groups(model), lr=0.1, backend=backend)
    for seed in range(3):
        model.set_gradients(seed)
        optimizer.step()
    for name, parameter in twin.parameters.items():
        parameter.data = model.parameters[name].data.clone()
    saved = through_a_file(optimizer.to_torch_state_dict())
    tables, others = groups(twin)
    theirs = [torch.optim.SparseAdam(tables["params"]), AdamW(others["params"])]
    for each, group in zip(theirs, saved["param_groups"], strict=True):
        state = {number: saved["state"][number] for number in group["params"]}
        each.load_state_dict({"state": state, "param_groups": [group]})
    optimizer.param_groups[0]["torch_eps"] = True
    for seed in range(3, 6):
        for each_model in (model, twin):
            each_model.set_gradients(seed)
        for each in (optimizer, *theirs):
            each.step()
    for mine, other in zip(model.parameters.values(), twin.parameters.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_group_with_tables_is_not_written_for_torch_with_what_its_sparse_adam_lacks(backend: str) -> None:
    run = Run(backend=backend, weight_decay=0.1).steps(range(1))
    with pytest.raises(ValueError, match=r"has no weight_decay, which parameter group 0 uses.*groups without tables"):
        run.optimizer.to_torch_state_dict()


def test_a_dense_state_that_turns_out_to_be_a_tables_goes_on_as_one(backend: str) -> None:
    """A checkpoint of torch's does not say which parameters are tables; the first gradient does."""
    theirs = Mixed()
    donor = torch.optim.SparseAdam([theirs.parameters["users"], theirs.parameters["items"]], lr=0.1)
    theirs.set_gradients(0)
    donor.step()
    optimizers = []
    for mode in ("adam", "error"):
        model = Mixed()
        tables = [model.parameters["users"], model.parameters["items"]]
        optimizers.append(SparseAdam(tables, dense_gradients=mode, backend=backend))
        optimizers[-1].load_state_dict(donor.state_dict())
        model.set_gradients(1)
        optimizers[-1].step()
    got, want = map(snapshot, optimizers)
    assert {key: got[key] for key in ("tables", "states")} == {key: want[key] for key in ("tables", "states")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_moments_of_half_precision_tables_are_not_rounded_by_loading(backend: str, dtype: torch.dtype) -> None:
    optimizers = [dense_adam([Mixed(dtype).parameters["users"]], backend=backend) for _ in range(2)]
    (table,) = optimizers[0].param_groups[0]["params"]
    set_sparse(table, 0)
    optimizers[0].step()
    optimizers[1].load_state_dict(through_a_file(optimizers[0].to_torch_state_dict()))
    (other,) = optimizers[1].param_groups[0]["params"]
    states = [optimizer.state[each].to_dense() for optimizer, each in zip(optimizers, (table, other), strict=True)]
    assert bits(states[0]["exp_avg"]) == bits(states[1]["exp_avg"])


def change_shape(state: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(4, 3)


def change_dtype(state: dict[str, Any]) -> None:
    state["exp_avg_sq"] = state["exp_avg_sq"].double()


def drop_moment(state: dict[str, Any]) -> None:
    del state["exp_avg_sq"]


def add_part(state: dict[str, Any]) -> None:
    state["momentum"] = torch.zeros(3, 4)


def break_step(state: dict[str, Any]) -> None:
    state["step"] = torch.tensor(1.5)


def add_small_maximum(state: dict[str, Any]) -> None:
    state["max_exp_avg_sq"] = torch.zeros(2)


UNFIT: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "shape": (change_shape, r"exp_avg has shape \[4, 3\]"),
    "dtype": (change_dtype, r"exp_avg_sq has dtype torch\.float64"),
    "missing": (drop_moment, r"exp_avg_sq missing"),
    "extra": (add_part, r"momentum not understood"),
    "step": (break_step, r"step is tensor\(1\.5"),
    "maximum": (add_small_maximum, r"max_exp_avg_sq has shape \[2\]"),
}


@pytest.mark.parametrize(("change", "pattern"), UNFIT.values(), ids=UNFIT)
def test_a_dense_state_that_does_not_fit_is_refused(
    backend: str, change: Callable[[dict[str, Any]], None], pattern: str
) -> None:
    run = Run(backend=backend, amsgrad="max_exp_avg_sq" in pattern).steps(range(2))
    saved = copy.deepcopy(run.optimizer.state_dict())
    change(saved["state"][1])
    before = snapshot(run.optimizer)
    with pytest.raises(ValueError, match=rf"{WEIGHT}: {pattern}"):
        run.optimizer.load_state_dict(saved)
    assert snapshot(run.optimizer) == before


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_dense_state_is_refused_that_lacks_or_has_what_amsgrad_keeps(backend: str, amsgrad: bool) -> None:
    saved = Run(amsgrad=not amsgrad).steps(range(1)).optimizer.state_dict()
    for group in saved["param_groups"]:
        group["amsgrad"] = amsgrad
    run = Run(backend=backend)
    saved["state"] = {1: saved["state"][1]}
    with pytest.raises(ValueError, match=rf"{WEIGHT}: max_exp_avg_sq {'missing' if amsgrad else 'not understood'}"):
        run.optimizer.load_state_dict(saved)


# Habits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_goes_on_to_the_same_bits_and_alone(backend: str, duplicate: Callable[[Any], Any]) -> None:
    run = Run(backend=backend, weight_decay=0.1).steps(range(3))
    del run.optimizer.__dict__["_step_generally"]
    other = duplicate(run)
    before = snapshot(other.optimizer)
    assert before == snapshot(run.optimizer)
    run.steps(range(3, 6))
    assert snapshot(other.optimizer) == before
    other.steps(range(3, 6))
    assert snapshot(other.optimizer) == snapshot(run.optimizer)


class TrainedModel(nn.Module):
    """A table and a layer behind it."""

    def __init__(self) -> None:
        """Start from the same values every time."""
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4, sparse=True)
        self.head = nn.Linear(4, 1)

    def loss(self, seed: int) -> Tensor:
        """The loss of a batch."""
        ids = torch.randint(20, (6,), generator=torch.Generator().manual_seed(seed))
        return self.head(self.embedding(ids)).pow(2).mean()


def test_a_closure_is_called_once_with_gradients_on(backend: str) -> None:
    model, twin = TrainedModel(), TrainedModel()
    optimizer, other = (dense_adam(each.parameters(), lr=0.1, backend=backend) for each in (model, twin))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model.loss(len(calls))
        loss.backward()
        return loss

    for seed in (1, 2, 3):
        value = optimizer.step(closure)
        other.zero_grad()
        loss = twin.loss(seed)
        loss.backward()
        other.step()
        assert torch.equal(value, loss)
    assert calls == [True] * 3
    assert_same(optimizer, other)


def test_a_grad_scaler_scales_both_kinds_and_skips_both(backend: str) -> None:
    """A scale that is a power of two changes no bit."""
    model, twin = TrainedModel(), TrainedModel()
    optimizer, other = (dense_adam(each.parameters(), lr=0.1, backend=backend) for each in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for seed in range(5):
        optimizer.zero_grad()
        scaler.scale(model.loss(seed)).backward()
        if seed == 3:
            model.head.bias.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        if seed != 3:
            other.zero_grad()
            twin.loss(seed).backward()
            other.step()
    assert_same(optimizer, other)


def test_step_hooks_see_the_step(backend: str) -> None:
    run = Run(backend=backend).steps(range(2))
    seen = []
    weight = run["weight"]
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(bits(weight)))
    run.optimizer.register_step_post_hook(lambda *_: seen.append(bits(weight)))
    before = bits(weight)
    run.steps(range(2, 3))
    assert seen == [before, bits(weight)] and seen[0] != seen[1]


@pytest.mark.parametrize("layout", ["contiguous", "every second element"])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_step_makes_older_graphs_stale(backend: str, layout: str, num_steps: int) -> None:
    """PyTorch's own fused step does not."""
    parameter = Parameter(LAYOUTS[layout](torch.ones(2, 3)))
    optimizer = dense_adam([parameter], backend=backend)
    step_on_dense(optimizer, range(num_steps))
    loss = (parameter * parameter).sum()
    step_on_dense(optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moment_bytes_counts_dense_states(backend: str) -> None:
    run = Run(backend=backend)
    for name in ("users", "items", "scale"):
        del run.model.parameters[name]
    run.steps(range(1))
    assert run.optimizer.moment_bytes() == (12 + 3) * 2 * 4 + 2 * 4


@pytest.mark.parametrize("order", [list, reversed])
def test_a_state_put_back_as_a_plain_dict_goes_on(backend: str, order: Callable[[Any], Any]) -> None:
    run, twin = Run(backend=backend).steps(range(2)), Run(backend=backend).steps(range(4))
    state = run.optimizer.state[run["weight"]]
    run.optimizer.state[run["weight"]] = {key: state[key].clone() for key in order(list(state))}
    run.steps(range(2, 4))
    assert snapshot(run.optimizer) == snapshot(twin.optimizer)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "weight_decay_mode": "exact"}])
def test_moments_put_back_as_a_plain_dict_go_on_with_a_dense_gradient(backend: str, options: dict[str, Any]) -> None:
    """They were taken for a dense state, of another shape or of a checkpoint that does not fit."""
    found = []
    for put_back in (lambda state: state, dict):
        table = Parameter(torch.ones(10, 2))
        optimizer = dense_adam([table], backend=backend, **options)
        for _ in range(2):
            table.grad = coo([1, 4], torch.ones(2, 2), table.shape)
            optimizer.step()
        optimizer.state[table] = put_back(optimizer.state[table])
        table.grad = torch.ones(10, 2)
        optimizer.step()
        found.append(snapshot(optimizer))
    assert found[0] == found[1]


def test_deleting_a_dense_state_starts_anew(backend: str) -> None:
    run = Run(backend=backend).steps(range(3))
    del run.optimizer.state[run["weight"]]
    run.steps(range(3, 4))
    assert int(run.optimizer.state[run["weight"]]["step"]) == 1
    assert int(run.optimizer.state[run["bias"]]["step"]) == 4


def test_a_parameter_listed_twice_is_stepped_once(backend: str) -> None:
    ours, theirs = (Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = dense_adam([ours, ours], backend=backend)
    other = dense_adam([theirs], backend=backend)
    for _ in range(3):
        ours.grad = theirs.grad = torch.ones(3)
        optimizer.step()
        other.step()
    assert bits(ours) == bits(theirs)
