"""What users of ``torch.optim`` do: build, group, schedule, hook, copy, pickle, and look at the state."""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
import io
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from saving import through_a_file
from snapshot import bits, snapshot
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sparseadam
from sparseadam import SparseAdam, update
from sparseadam.update import native

needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """PyTorch's sparse additions wake all threads whatever the size, which a busy machine pays for."""
    torch.set_num_threads(1)


def tensor_lr(lr: float) -> Tensor:
    """A learning rate of which PyTorch makes a step size in float64, as of a number."""
    return torch.tensor(lr, dtype=torch.float64)


class Model(nn.Module):
    """Two tables; a seed names the lookups and the gradient of a batch, whatever the tables hold."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start from the same tables every time."""
        super().__init__()
        torch.manual_seed(0)
        self.users = nn.Embedding(20, 4, sparse=True, dtype=dtype)
        self.items = nn.Embedding(30, 3, sparse=True, dtype=dtype)

    def loss(self, seed: int) -> Tensor:
        """A loss linear in the tables, so that its gradient depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros((), dtype=self.users.weight.dtype)
        for table in (self.users, self.items):
            ids = torch.randint(table.num_embeddings - 1, (8,), generator=generator)
            weights = torch.randn(8, table.embedding_dim, generator=generator)
            loss = loss + (table(ids) * weights.to(loss.dtype)).sum()
        return loss

    def backward(self, seed: int) -> Tensor:
        """Replace the gradients by those of a batch."""
        self.zero_grad()
        loss = self.loss(seed)
        loss.backward()
        return loss

    @property
    def tables(self) -> list[Tensor]:
        """Both parameters."""
        return [self.users.weight, self.items.weight]


def train(model: Model, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        model.backward(seed)
        optimizer.step()


def assert_equal_models(got: Model, want: Model) -> None:
    for one, other in zip(got.tables, want.tables, strict=True):
        assert torch.equal(one, other)


def assert_equal_states(got: SparseAdam, want: SparseAdam) -> None:
    params = ([param for group in each.param_groups for param in group["params"]] for each in (got, want))
    for one, other in zip(*params, strict=True):
        assert (one in got.state) == (other in want.state)
        if one in got.state:
            for key, value in want.state[other].items():
                same = torch.equal if isinstance(value, Tensor) else int.__eq__
                assert same(got.state[one][key], value), key


def sparse_ones(table: Tensor, *rows: int) -> Tensor:
    values = torch.ones(len(rows), *table.shape[1:], dtype=table.dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, table.shape, check_invariants=True)


# Ways to name parameters --------------------------------------------------------------------------

WAYS: dict[str, Callable[[Model], Any]] = {
    "list": lambda model: list(model.parameters()),
    "tuple": lambda model: tuple(model.parameters()),
    "generator": lambda model: model.parameters(),
    "filter": lambda model: filter(lambda p: p.requires_grad, model.parameters()),
    "dict values": lambda model: dict(model.named_parameters()).values(),
    "named_parameters": lambda model: model.named_parameters(),
    "named list": lambda model: list(model.named_parameters()),
    "one group": lambda model: [{"params": model.parameters()}],
    "one group, named": lambda model: [{"params": model.named_parameters()}],
    "a group each": lambda model: [{"params": p} for p in model.parameters()],
    "groups from a generator": lambda model: ({"params": [p]} for p in model.parameters()),
}


@pytest.mark.parametrize("way", WAYS)
def test_parameters_may_be_given_in_every_way_of_torch_optim(backend: str, way: str) -> None:
    model, twin = Model(), Model()
    optimizer = SparseAdam(WAYS[way](model), lr=0.1, backend=backend)
    twin_optimizer = SparseAdam(twin.tables, lr=0.1, backend=backend)
    train(model, optimizer, range(4))
    train(twin, twin_optimizer, range(4))
    assert not torch.equal(model.users.weight, Model().users.weight)
    assert_equal_models(model, twin)
    assert_equal_states(optimizer, twin_optimizer)


@pytest.mark.parametrize("way", ["named_parameters", "named list", "one group, named"])
def test_names_are_kept_and_used_in_messages(backend: str, way: str) -> None:
    model = Model()
    optimizer = SparseAdam(WAYS[way](model), backend=backend)
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["param_names"] == ["users.weight", "items.weight"]
    model.items.weight.grad = torch.ones_like(model.items.weight)
    with pytest.raises(RuntimeError, match=r"'items\.weight' \(group 0, parameter 1\)"):
        optimizer.step()


# Groups -------------------------------------------------------------------------------------------


def test_each_group_has_its_own_options(backend: str) -> None:
    torch.manual_seed(1)
    own = [
        {},
        {"lr": 0.2},
        {"betas": (0.5, 0.7)},
        {"eps": 0.5},
        {"maximize": True},
        {"torch_eps": True, "eps": 0.1},
        {"weight_decay": 0.5},
        {"amsgrad": True},
    ]
    tables = [nn.Parameter(torch.randn(6, 3)) for _ in own]
    twins = [nn.Parameter(table.detach().clone()) for table in tables]
    defaults = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "backend": backend}
    pairs = zip(tables, own, strict=True)
    optimizer = SparseAdam([{"params": [table], **options} for table, options in pairs], **defaults)
    alone = [SparseAdam([twin], **{**defaults, **o}) for twin, o in zip(twins, own, strict=True)]
    grad = sparse_ones(tables[0], 1, 4, 1)
    starts = copy.deepcopy(tables)
    for scale in (1.0, 0.25, -4.0):  # of a constant gradient, betas would make nothing
        for table, twin, each in zip(tables, twins, alone, strict=True):
            table.grad, twin.grad = grad * scale, grad * scale
            each.step()
        optimizer.step()
    changes = [table - start for table, start in zip(tables, starts, strict=True)]
    for index, (table, twin, options) in enumerate(zip(tables, twins, own, strict=True)):
        assert torch.equal(table, twin), options
        is_like_default = torch.allclose(changes[index], changes[0], rtol=1e-4, atol=1e-5)
        assert is_like_default == (index == 0), f"{options} does something"


@pytest.mark.parametrize(
    "neutral",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 0},
        {"amsgrad": False},
        {"foreach": None, "fused": None},
        {"capturable": False, "differentiable": False},
    ],
    ids=str,
)
def test_groups_may_carry_options_of_other_adams_that_change_nothing(backend: str, neutral: Any) -> None:
    model, twin = Model(), Model()
    optimizer = SparseAdam([{"params": model.tables, **neutral}], backend=backend)
    train(model, optimizer, range(3))
    train(twin, SparseAdam(twin.tables, backend=backend), range(3))
    assert_equal_models(model, twin)


# Of other optimizers, and of this one as a whole.
REFUSED = [
    *({name: True} for name in ("foreach", "fused", "capturable", "differentiable")),
    *({name: None} for name in ("generator", "moment_dir", "backend", "strict")),
]


@pytest.mark.parametrize("option", REFUSED, ids=str)
def test_options_that_would_have_to_be_ignored_are_refused_wherever_they_come_in(backend: str, option: Any) -> None:
    model = Model()
    ((name, value),) = option.items()
    words = rf"{name}(={value!r} is not supported by SparseAdam| is set for a group, and is the whole optimizer's)"
    with pytest.raises(ValueError, match=words):
        SparseAdam([{"params": model.tables, **option}], backend=backend)
    optimizer = SparseAdam([model.users.weight], backend=backend)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [model.items.weight], **option})
    optimizer.param_groups[0].update(option)
    model.backward(0)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert_equal_models(model, Model())
    assert not optimizer.state


def test_a_group_may_carry_keys_of_the_users_own(backend: str) -> None:
    model = Model()
    groups = [{"params": [model.users.weight], "title": "users"}, {"params": [model.items.weight], "title": "items"}]
    optimizer = SparseAdam(groups, backend=backend)
    train(model, optimizer, range(2))
    titles = [group["title"] for group in optimizer.state_dict()["param_groups"]]
    assert titles == ["users", "items"]


def test_an_added_group_is_stepped_from_then_on(backend: str) -> None:
    model = Model()
    optimizer = SparseAdam([model.users.weight], lr=0.1, backend=backend)
    train(model, optimizer, range(3))
    assert torch.equal(model.items.weight, Model().items.weight)
    optimizer.add_param_group({"params": [model.items.weight], "lr": 0.5})
    optimizer.add_param_group({"params": nn.Parameter(torch.randn(3, 2))})
    train(model, optimizer, range(3, 5))
    assert [state["step"] for state in optimizer.state.values()] == [5, 2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.1]
    twin = Model()
    twin_optimizer = SparseAdam([twin.items.weight], lr=0.5, backend=backend)
    train(twin, twin_optimizer, range(3, 5))
    assert torch.equal(model.items.weight, twin.items.weight)


def new_table(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape or (3, 2), **options)


BAD_GROUPS: dict[str, tuple[Callable[[Model], Any], type[Exception], str]] = {
    "a table it has": (lambda m: {"params": [m.users.weight]}, ValueError, "more than one parameter group"),
    "no dict": (lambda m: [new_table()], TypeError, "param_group must be a dict"),
    "a set": (lambda m: {"params": {new_table()}}, TypeError, "ordered collections"),
    "no tensor": (lambda m: {"params": [3]}, TypeError, "can only optimize Tensors"),
    "a non-leaf": (
        lambda m: {"params": [new_table(requires_grad=True) * 2]},
        ValueError,
        "can't optimize a non-leaf",
    ),
    "a sparse table": (
        lambda m: {"params": [new_table(), new_table().to_sparse()]},
        ValueError,
        r"Sparse params at indices \[\[1, 1\]\]: SparseAdam requires dense parameter tensors",
    ),
    "a complex table": (
        lambda m: {"params": [new_table(dtype=torch.complex64)]},
        ValueError,
        r"Complex params at indices \[\[1, 0\]\]: SparseAdam does not support complex parameters",
    ),
    "an integer table": (
        lambda m: {"params": [new_table(dtype=torch.int64)]},
        ValueError,
        r"unsupported dtype at indices \[1, 0\] \(int64\)",
    ),
    "negative lr": (lambda m: {"params": [new_table()], "lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "lr of two": (
        lambda m: {"params": [new_table()], "lr": torch.ones(2)},
        ValueError,
        "Tensor lr must be 1-element",
    ),
    "lr of a wrong type": (lambda m: {"params": [new_table()], "lr": "fast"}, TypeError, "lr must be a number"),
    "beta of 1": (
        lambda m: {"params": [new_table()], "betas": (0.9, 1.0)},
        ValueError,
        "Invalid beta parameter at index 1: 1.0",
    ),
    "one beta": (lambda m: {"params": [new_table()], "betas": (0.9,)}, ValueError, "Invalid betas"),
    "eps of 0": (lambda m: {"params": [new_table()], "eps": 0.0}, ValueError, "Invalid epsilon value: 0.0"),
    "maximize of a wrong type": (
        lambda m: {"params": [new_table()], "maximize": "yes"},
        TypeError,
        "maximize must be True or False",
    ),
    "negative weight decay": (
        lambda m: {"params": [new_table()], "weight_decay": -0.1},
        ValueError,
        "Invalid weight_decay value: -0.1",
    ),
    "amsgrad of a wrong type": (
        lambda m: {"params": [new_table()], "amsgrad": "yes"},
        TypeError,
        "amsgrad must be True or False",
    ),
    "an option that would be ignored": (
        lambda m: {"params": [new_table()], "differentiable": True},
        ValueError,
        "differentiable=True is not supported",
    ),
    "named among unnamed": (
        lambda m: {"params": [("new", new_table())]},
        ValueError,
        "all optimizer param groups should be with/without names",
    ),
}


@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_a_bad_group_leaves_the_optimizer_as_it_was(backend: str, bad: str) -> None:
    make_group, exception, words = BAD_GROUPS[bad]
    model, twin = Model(), Model()
    optimizer, twin_optimizer = (SparseAdam(each.tables, lr=0.1, backend=backend) for each in (model, twin))
    train(model, optimizer, range(2))
    train(twin, twin_optimizer, range(2))
    groups = [dict(group) for group in optimizer.param_groups]
    defaults = dict(optimizer.defaults)
    with pytest.raises(exception, match=words):
        optimizer.add_param_group(make_group(model))
    assert optimizer.defaults == defaults
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.param_groups[0]) == set(groups[0])
    assert all(optimizer.param_groups[0][key] is value for key, value in groups[0].items())
    assert_equal_states(optimizer, twin_optimizer)
    train(model, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert_equal_models(model, twin)
    optimizer.add_param_group({"params": [new_table()]})


# Learning rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("is_group", [False, True], ids=["default", "in a group"])
def test_a_tensor_lr_is_read_at_each_step(backend: str, shape: tuple[int, ...], is_group: bool) -> None:
    model, twin = Model(), Model()
    lr = torch.full(shape, 0.5)
    params = [{"params": model.tables, "lr": lr}] if is_group else model.tables
    optimizer = SparseAdam(params, backend=backend) if is_group else SparseAdam(params, lr, backend=backend)
    twin_optimizer = SparseAdam(twin.tables, 0.5, backend=backend)
    for seed, value in enumerate((0.5, 0.25, 0.0, 2.0)):
        lr.fill_(value)
        twin_optimizer.param_groups[0]["lr"] = value
        train(model, optimizer, range(seed, seed + 1))
        train(twin, twin_optimizer, range(seed, seed + 1))
        assert_equal_models(model, twin)
        assert optimizer.param_groups[0]["lr"] is lr and lr.flatten().tolist() == [value]
    assert_equal_states(optimizer, twin_optimizer)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
    ids=str,
)
def test_an_option_set_outside_its_range_between_steps_is_refused_and_can_be_mended(
    backend: str, option: Any, words: str
) -> None:
    model, twin = Model(), Model()
    optimizer, twin_optimizer = (SparseAdam(each.tables, backend=backend) for each in (model, twin))
    train(model, optimizer, range(2))
    train(twin, twin_optimizer, range(2))
    (group,) = optimizer.param_groups
    right = {key: group[key] for key in option}
    group.update(option)
    model.backward(2)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert_equal_models(model, twin)
    assert_equal_states(optimizer, twin_optimizer)
    group.update(right)
    train(model, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert_equal_models(model, twin)


# Schedulers ---------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (1 + e)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=13),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
}
MORE_SCHEDULES: dict[str, Callable[[Any], LRScheduler]] = {
    "zero from the start": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.0),
    "warm-up from zero": lambda o: lr_scheduler.LambdaLR(o, lambda e: e / 5),
    # The last product of this chain rounds to something like -2e-20 and not to 0.
    "LinearLR down to zero": lambda o: lr_scheduler.LinearLR(o, end_factor=0.0),
    "CyclicLR from zero": lambda o: lr_scheduler.CyclicLR(o, 0.0, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR in three phases": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=13, three_phase=True),
    "plateau of a maximum": lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=0),
}


def test_every_scheduler_of_this_torch_is_tried() -> None:
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, LRScheduler) and not name.startswith("_")
    }
    assert set(SCHEDULERS) == classes - {"LRScheduler"}
    assert set(lr_scheduler.__all__) <= classes


def options_of(optimizer: torch.optim.Optimizer) -> list[tuple[float, tuple[float, float]]]:
    return [(float(group["lr"]), group["betas"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("make_lr", [float, tensor_lr], ids=["float", "Tensor"])
@pytest.mark.parametrize("name", [*SCHEDULERS, *MORE_SCHEDULES])
def test_a_schedule_gives_the_trajectory_of_torchs_sparse_adam(
    backend: str, name: str, make_lr: Callable[[float], Any]
) -> None:
    schedule = (SCHEDULERS | MORE_SCHEDULES)[name]
    model, twin = Model(torch.float64), Model(torch.float64)
    optimizer = SparseAdam(
        [{"params": [table], "lr": make_lr(lr)} for table, lr in zip(model.tables, (0.1, 0.02), strict=True)],
        torch_eps=True,
        backend=backend,
    )
    partner = torch.optim.SparseAdam(
        [{"params": [table], "lr": make_lr(lr)} for table, lr in zip(twin.tables, (0.1, 0.02), strict=True)]
    )
    schedulers = schedule(optimizer), schedule(partner)
    start = options_of(optimizer)
    seen = [start]
    for seed in range(12):
        for each, its_optimizer, scheduler in zip((model, twin), (optimizer, partner), schedulers, strict=True):
            train(each, its_optimizer, range(seed, seed + 1))
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert options_of(optimizer) == options_of(partner)
        seen.append(options_of(optimizer))
        for table, other in zip(model.tables, twin.tables, strict=True):
            # At most 8u and more of each of twelve changes, which are below the numbers of the table.
            torch.testing.assert_close(table, other, rtol=1e-13, atol=1e-14)
    if name != "zero from the start":
        assert any(options != start for options in seen), "the schedule changes something"
        assert not torch.equal(model.users.weight, Model(torch.float64).users.weight)
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({betas for options in seen for _, betas in options}) > 3, "betas are cycled too"
    assert optimizer.state[model.users.weight]["step"] == 12


def test_rows_keep_their_place_while_lr_is_zero_and_moments_go_on(backend: str) -> None:
    model, twin = Model(), Model()
    optimizer = SparseAdam(model.tables, lr=0.1, backend=backend)
    twin_optimizer = SparseAdam(twin.tables, lr=0.1, backend=backend)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda e: 0.0 if e < 3 else 1.0)
    for seed in range(3):
        assert optimizer.param_groups[0]["lr"] == 0.0
        train(model, optimizer, range(seed, seed + 1))
        train(twin, twin_optimizer, range(seed, seed + 1))
        scheduler.step()
        assert_equal_models(model, Model())
        # Moments and steps are those of a run with any other learning rate.
        assert_equal_states(optimizer, twin_optimizer)
        assert optimizer.state[model.users.weight]["step"] == seed + 1
    train(model, optimizer, range(3, 4))
    assert not torch.equal(model.users.weight, Model().users.weight)


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "CyclicLR", "LinearLR down to zero"])
def test_optimizer_and_scheduler_resume_from_a_file(backend: str, name: str) -> None:
    schedule = (SCHEDULERS | MORE_SCHEDULES)[name]
    model = Model()
    groups = [{"params": [table]} for table in model.tables]
    optimizer = SparseAdam(groups, lr=0.1, backend=backend)
    scheduler = schedule(optimizer)
    for seed in range(5):
        train(model, optimizer, range(seed, seed + 1))
        scheduler.step()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    saved = through_a_file({key: part.state_dict() for key, part in parts.items()})
    twin = Model()
    twin_optimizer = SparseAdam([{"params": [table]} for table in twin.tables], lr=0.1, backend=backend)
    twin_scheduler = schedule(twin_optimizer)
    twin.load_state_dict(saved["model"])
    twin_optimizer.load_state_dict(saved["optimizer"])
    twin_scheduler.load_state_dict(saved["scheduler"])
    for seed in range(5, 10):
        for each, its, its_scheduler in (
            (model, optimizer, scheduler),
            (twin, twin_optimizer, twin_scheduler),
        ):
            train(each, its, range(seed, seed + 1))
            its_scheduler.step()
        assert options_of(optimizer) == options_of(twin_optimizer)
        assert_equal_models(twin, model)
    assert_equal_states(twin_optimizer, optimizer)


# Closures, gradients, hooks -----------------------------------------------------------------------


def test_a_closure_is_called_once_with_gradients_on_and_its_value_returned(backend: str) -> None:
    model, twin = Model(), Model()
    optimizer = SparseAdam(model.tables, backend=backend)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return model.backward(0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss, twin.loss(0))
    train(twin, SparseAdam(twin.tables, backend=backend), range(1))
    assert_equal_models(model, twin)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert optimizer.step() is None


def test_a_closure_that_raises_changes_nothing(backend: str) -> None:
    model = Model()
    optimizer = SparseAdam(model.tables, backend=backend)

    def closure() -> float:
        model.backward(0)
        raise KeyError("no more batches")

    with pytest.raises(KeyError, match="no more batches"):
        optimizer.step(closure)
    assert_equal_models(model, Model())
    assert not optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_means_what_it_means_to_torchs_sparse_adam(backend: str, set_to_none: bool) -> None:
    model, twin = Model(torch.float64), Model(torch.float64)
    optimizer = SparseAdam(model.tables, lr=0.1, torch_eps=True, backend=backend)
    partner = torch.optim.SparseAdam(twin.tables, lr=0.1)
    for seed in range(4):
        for each, its in ((model, optimizer), (twin, partner)):
            each.loss(seed).backward()
            its.step()
            its.zero_grad(set_to_none=set_to_none)
            grads = [table.grad for table in each.tables]
            assert all((grad is None) if set_to_none else (grad._nnz() == 0) for grad in grads)
            # Nothing was looked up: with None that is no step, with an empty gradient it is one.
            its.step()
        for table, other in zip(model.tables, twin.tables, strict=True):
            torch.testing.assert_close(table, other, rtol=1e-13, atol=1e-14)
            assert optimizer.state[table]["step"] == partner.state[other]["step"]
    assert optimizer.state[model.users.weight]["step"] == (4 if set_to_none else 8)


def test_step_hooks_see_and_change_the_step(backend: str) -> None:
    model, twin = Model(), Model()
    optimizer = SparseAdam(model.tables, lr=0.5, backend=backend)
    before, after = [], []

    def halve_lr(opt: SparseAdam, args: Any, kwargs: Any) -> None:
        assert opt is optimizer
        before.append(model.users.weight.detach().clone())
        opt.param_groups[0]["lr"] /= 2

    optimizer.register_step_pre_hook(halve_lr)
    optimizer.register_step_post_hook(lambda *_: after.append(model.users.weight.detach().clone()))
    train(model, optimizer, range(1))
    train(twin, SparseAdam(twin.tables, lr=0.25, backend=backend), range(1))
    assert_equal_models(model, twin)
    assert torch.equal(before[0], Model().users.weight)
    assert torch.equal(after[0], twin.users.weight)


HOOKS: dict[str, Callable[[SparseAdam, Callable[..., None]], Any]] = {
    "before": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "after": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    "before, of all optimizers": lambda _, hook: register_optimizer_step_pre_hook(hook),
    "after, of all optimizers": lambda _, hook: register_optimizer_step_post_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_of_any_kind_runs_where_there_is_no_other(kind: str) -> None:
    """Each kind is looked for by itself; with one of another kind beside it, nobody would see that it is not."""
    model, calls = Model(), []
    optimizer = SparseAdam(model.tables)
    handle = HOOKS[kind](optimizer, lambda *_: calls.append(kind))
    try:
        train(model, optimizer, range(2))
    finally:
        handle.remove()
    train(model, optimizer, range(2))
    assert calls == [kind] * 2


@pytest.mark.parametrize("wraps", [lambda step: step, functools.wraps(SparseAdam.step)], ids=["plain", "wraps"])
def test_hooks_run_once_for_a_subclass_with_a_step_of_its_own(backend: str, wraps: Callable[[Any], Any]) -> None:
    class Own(SparseAdam):
        @wraps
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = Model()
    optimizer = Own(model.tables, backend=backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


# State made in inference mode could not be updated outside of it.
@pytest.mark.parametrize("options", [{}, {"dense_gradients": "adam"}, {"missed_steps": "replay", "weight_decay": 0.1}])
def test_steps_and_reads_in_inference_mode_are_as_any_others(backend: str, options: dict[str, Any]) -> None:
    if backend == "triton" and "missed_steps" in options:
        pytest.skip("its kernels refuse to replay missed steps")
    model, twin = Model(), Model()
    for each in (model, twin):
        each.bias = nn.Parameter(torch.zeros(3))
        parameters = [*each.tables, *([each.bias] if "dense_gradients" in options else [])]
        optimizer = SparseAdam(parameters, backend=backend, **options)
        optimizer.attach(each)
        for seed in range(4):
            optimizer.zero_grad()
            each.backward(seed)
            each.bias.grad = torch.ones(3)
            with torch.inference_mode(each is model and seed % 2 == 0):
                optimizer.step()
                each.loss(seed + 1)
        optimizer.flush()
    assert_equal_models(model, twin)
    assert torch.equal(model.bias, twin.bias)


def test_a_parameter_made_in_inference_mode_is_refused_before_anything_is_written(backend: str) -> None:
    with torch.inference_mode():
        made_there = nn.Parameter(torch.zeros(5, 2), requires_grad=False)
    table = nn.Parameter(torch.zeros(5, 2))
    optimizer = SparseAdam([table, made_there], backend=backend)
    for each in (table, made_there):
        each.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match=r"group 0, parameter 1 was made in torch\.inference_mode\(\)"):
        optimizer.step()
    assert not table.any()
    assert not optimizer.state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"missed_steps": "replay", "weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decay_mode": "exact"},
        {"dense_gradients": "adam"},
        {"moment_dtype": torch.uint8},
    ],
    ids=str,
)
def test_tables_on_the_cpu_do_not_care_for_the_default_device(backend: str, options: dict[str, Any]) -> None:
    """As where everything else of a model is on a GPU; the meta device stands for one."""
    if backend == "triton" and "missed_steps" in options:
        pytest.skip("its kernels refuse to replay missed steps")
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = Model()
        ids = torch.arange(3)
        calls = [(seed, torch.Generator().manual_seed(seed)) for seed in range(5)]
        gradients = []
        for seed, _ in calls:
            model.zero_grad()
            model.backward(seed)
            gradients.append([table.grad for table in model.tables])
        gradients[2] = [grad * 0 for grad in gradients[2]]
        empty = torch.zeros(1, 0, dtype=torch.int64)
        gradients[3] = [
            torch.sparse_coo_tensor(empty, torch.zeros(0, table.shape[1]), table.shape, check_invariants=True)
            for table in model.tables
        ]
        with torch.device(device):
            optimizer = SparseAdam(model.tables, backend=backend, **options)
            for number, given in enumerate(gradients):
                for table, grad in zip(model.tables, given, strict=True):
                    optimizer.catch_up(table, grad._indices()[0])
                    table.grad = grad
                sparseadam.clip_grad_norm_(model.tables, 1.0)
                if number % 2 == 0:
                    sparseadam.clip_grad_value_(model.tables, 0.1)
                    sparseadam.coalesce_grads_(model.tables)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.flush()
            model.zero_grad()
            optimizer.forget(model.tables[0], ids)
            optimizer.resize(model.tables[0], 40)
            optimizer.resize(model.tables[1], 10)
            for part in optimizer.state_dict()["state"][1].values():
                assert not isinstance(part, Tensor) or part.device.type == "cpu"
        results.append([table.detach() for table in model.tables])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_state_dict_hooks_see_plain_values(backend: str) -> None:
    model = Model()
    optimizer = SparseAdam(model.tables, backend=backend)
    train(model, optimizer, range(2))
    seen = []

    def note(opt: SparseAdam, state_dict: dict[str, Any]) -> None:
        seen.append(state_dict["state"][0])

    optimizer.register_state_dict_post_hook(note)
    for get in (optimizer.state_dict, optimizer.to_torch_state_dict):
        state = get()["state"][0]
        assert seen.pop() is state
        assert type(state) is dict
        assert isinstance(state["exp_avg"], Tensor) and type(state["step"]) is int
    train(model, optimizer, range(2, 3))
    assert len(seen) == 0, "hooks run when a state dict is asked for, and only then"


def test_repr_shows_every_option_of_every_group(backend: str) -> None:
    model = Model()
    groups = [{"params": [model.users.weight], "lr": 0.25}, {"params": [model.items.weight]}]
    optimizer = SparseAdam(groups, betas=(0.5, 0.75), torch_eps=True, backend=backend)
    train(model, optimizer, range(1))
    lines = repr(optimizer).splitlines()
    assert lines[0] == "SparseAdam ("
    for line, count in {
        "    lr: 0.25": 1,
        "    lr: 0.001": 1,
        "    betas: (0.5, 0.75)": 2,
        "    eps: 1e-08": 2,
        "    maximize: False": 2,
        "    torch_eps: True": 2,
    }.items():
        assert lines.count(line) == count, line
    assert not any("params" in line for line in lines)


# Copies -------------------------------------------------------------------------------------------


def by_deepcopy(pair: Any) -> Any:
    return copy.deepcopy(pair)


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


each_way_to_copy = pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save])


@each_way_to_copy
def test_a_copy_is_independent_and_goes_on_to_the_same_bits(backend: str, duplicate: Any) -> None:
    model = Model()
    groups = [{"params": [model.users.weight], "lr": 0.3}, {"params": [model.items.weight]}]
    optimizer = SparseAdam(groups, betas=(0.5, 0.75), torch_eps=True, backend=backend)
    train(model, optimizer, range(3))
    twin, twin_optimizer = duplicate((model, optimizer))
    assert type(twin_optimizer) is SparseAdam
    assert twin_optimizer.param_groups[0]["params"][0] is twin.users.weight
    assert_equal_states(twin_optimizer, optimizer)
    at_copy = copy.deepcopy(twin.state_dict())
    moments = {key: value for key, value in optimizer.state_dict()["state"][0].items() if key != "step"}
    moments = copy.deepcopy(moments)
    train(model, optimizer, range(3, 6))
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in at_copy.items())
    twin_state = twin_optimizer.state[twin.users.weight]
    assert twin_state["step"] == 3
    assert all(torch.equal(twin_state[key], value) for key, value in moments.items())
    train(twin, twin_optimizer, range(3, 6))
    assert_equal_models(twin, model)
    assert_equal_states(twin_optimizer, optimizer)
    # Groups can be added to a copy, and are checked there as well.
    with pytest.raises(ValueError, match="Complex params at indices"):
        twin_optimizer.add_param_group({"params": [new_table(dtype=torch.complex64)]})
    twin_optimizer.add_param_group({"params": [new_table()]})


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tables each call of the native backend was given; all steps are general ones."""
    calls: list[int] = []
    real = native.update_rows

    def count(updates: Any) -> None:
        calls.append(len(updates))
        real(updates)

    monkeypatch.setattr(native, "update_rows", count)
    monkeypatch.setattr(native, "list_tables", lambda *_: None)
    yield calls


@each_way_to_copy
def test_a_copy_keeps_its_backend(backend: str, duplicate: Any, native_calls: list[int]) -> None:
    model = Model()
    optimizer = SparseAdam(model.tables, backend=backend)
    train(model, optimizer, range(2))
    twin, twin_optimizer = duplicate((model, optimizer))
    native_calls.clear()
    train(twin, twin_optimizer, range(2))
    assert native_calls == ([2, 2] if backend == "native" else [])


@needs_native
@each_way_to_copy
def test_a_copy_of_the_native_backend_goes_on_refusing(duplicate: Any) -> None:
    table = nn.Parameter(torch.randn(4, 6).t())
    _, optimizer = duplicate((table, SparseAdam([table], backend="native")))
    (table,) = optimizer.param_groups[0]["params"]
    table.data = torch.randn(4, 6).t()
    table.grad = sparse_ones(table, 1)
    with pytest.raises(RuntimeError, match='backend="native" cannot update'):
        optimizer.step()


@pytest.mark.parametrize("strict", [False, True])
@each_way_to_copy
def test_a_copy_looks_at_row_numbers_as_strictly(duplicate: Any, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that means shows on a CUDA device only; here, what backends are told."""
    told = []
    monkeypatch.setattr(update, "update_rows", lambda *_, strict: told.append(strict))
    optimizer = duplicate(SparseAdam([nn.Parameter(torch.zeros(5, 2))], strict=strict))
    (table,) = optimizer.param_groups[0]["params"]
    table.grad = sparse_ones(table, 1)
    optimizer.step()
    assert told == [strict]


@each_way_to_copy
def test_a_group_added_to_a_copy_has_the_seed_of_the_others(duplicate: Any) -> None:
    options = {"moment_dtype": torch.bfloat16}
    optimizer = SparseAdam([new_table()], generator=torch.Generator().manual_seed(3), **options)
    copied = duplicate(optimizer)
    copied.add_param_group({"params": [new_table()]})
    assert copied.param_groups[1]["seed"] == optimizer.param_groups[0]["seed"]


def test_a_group_added_after_loading_has_the_seed_of_the_others() -> None:
    options = {"moment_dtype": torch.bfloat16}
    optimizer = SparseAdam([new_table()], generator=torch.Generator().manual_seed(3), **options)
    resumed = SparseAdam([new_table()], **options)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.add_param_group({"params": [new_table()]})
    assert resumed.param_groups[1]["seed"] == optimizer.param_groups[0]["seed"]


def test_a_copy_draws_what_a_generator_would_have_given() -> None:
    """Also where no group has asked for it before the copy was made."""
    optimizer = SparseAdam([new_table()], generator=torch.Generator().manual_seed(3))
    seeds = []
    for each in (copy.deepcopy(optimizer), optimizer, copy.deepcopy(optimizer)):
        each.add_param_group({"params": [new_table()], "moment_dtype": torch.bfloat16})
        seeds.append(each.param_groups[1]["seed"])
    other = SparseAdam([new_table()], generator=torch.Generator().manual_seed(3), moment_dtype=torch.bfloat16)
    assert seeds == [other.param_groups[0]["seed"]] * 3


# State --------------------------------------------------------------------------------------------


def test_the_state_of_a_table_is_a_mapping(backend: str) -> None:
    table = nn.Parameter(torch.randn(6, 3))
    optimizer = SparseAdam([table], backend=backend)
    assert len(optimizer.state) == 0 and table not in optimizer.state
    assert len(optimizer.state[table]) == 0, "looking before the first step does no harm"
    table.grad = sparse_ones(table, 4, 1, 4)
    optimizer.step()
    state = optimizer.state[table]
    assert list(state) == list(state.keys()) == ["step", "rows", "exp_avg", "exp_avg_sq"]
    assert len(state) == 4 and "exp_avg" in state and "max_exp_avg_sq" not in state
    assert state["step"] == 1 and type(state["step"]) is int
    assert state["rows"].tolist() == [1, 4] and state["rows"].dtype is torch.int64
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (2, 3)
    torch.testing.assert_close(state["exp_avg"], torch.tensor([[0.1] * 3, [0.2] * 3]))
    assert state.get("nothing") is None and state.get("step") == 1
    with pytest.raises(KeyError, match="nothing"):
        state["nothing"]
    assert [value if key == "step" else tuple(value.shape) for key, value in state.items()] == [1, (2,), (2, 3), (2, 3)]
    assert [len(value) for value in optimizer.state.values()] == [4]


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (lambda state: state.update(exp_avg=torch.ones(3)), ValueError, r"exp_avg has shape \[2, 3\], got \[3\]"),
        (lambda state: state.update(exp_avg_sq=torch.ones(2, 1)), ValueError, r"exp_avg_sq has shape \[2, 3\], got"),
        (lambda state: state.update(rows=torch.tensor([1, 5])), ValueError, "rows cannot be reassigned"),
        (lambda state: state.update(row_steps=torch.ones(2)), KeyError, "row_steps"),
        (lambda state: state.pop("exp_avg"), TypeError, "exp_avg cannot be removed"),
    ],
    ids=["a shape that spreads", "another shape that does", "other rows", "a part that is not kept", "removing"],
)
def test_what_a_state_cannot_be_is_not_written_to_it(
    backend: str, write: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    table = nn.Parameter(torch.randn(6, 3))
    optimizer = SparseAdam([table], backend=backend)
    table.grad = sparse_ones(table, 4, 1)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        write(optimizer.state[table])
    assert snapshot(optimizer) == before


def test_moving_every_tensor_of_the_state_to_a_device_changes_nothing(backend: str) -> None:
    model, twin = Model(), Model()
    optimizer, twin_optimizer = (SparseAdam(each.tables, backend=backend) for each in (model, twin))
    device = torch.device("cpu")
    for seed in range(4):
        train(model, optimizer, range(seed, seed + 1))
        train(twin, twin_optimizer, range(seed, seed + 1))
        for state in optimizer.state.values():
            for k, v in state.items():
                if torch.is_tensor(v):
                    state[k] = v.to(device)
        assert_equal_states(optimizer, twin_optimizer)
    for state in optimizer.state.values():
        for k, v in state.items():
            if torch.is_tensor(v):
                state[k] = v.clone()
    train(model, optimizer, range(4, 6))
    train(twin, twin_optimizer, range(4, 6))
    assert_equal_models(model, twin)
    assert_equal_states(optimizer, twin_optimizer)


def test_a_state_put_back_as_a_plain_dict_goes_on(backend: str) -> None:
    model, twin = Model(), Model()
    optimizer, twin_optimizer = (SparseAdam(each.tables, backend=backend) for each in (model, twin))
    train(model, optimizer, range(3))
    train(twin, twin_optimizer, range(3))
    for table in model.tables:
        state = optimizer.state[table]
        optimizer.state[table] = {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
    train(model, optimizer, range(3, 5))
    train(twin, twin_optimizer, range(3, 5))
    assert_equal_models(model, twin)
    assert_equal_states(optimizer, twin_optimizer)


def test_a_state_put_back_as_a_plain_dict_is_what_it_was_before_the_next_step(backend: str) -> None:
    """PyTorch's SparseAdam loaded the moments of touched rows as those of all, where all were touched."""
    model = Model()
    optimizer = SparseAdam(model.tables, backend=backend)
    train(model, optimizer, range(3))
    num_bytes, saved = optimizer.moment_bytes(), copy.deepcopy(optimizer.to_torch_state_dict())

    def put_back() -> None:
        for table in model.tables:
            optimizer.state[table] = dict(optimizer.state[table])

    put_back()
    assert optimizer.moment_bytes() == num_bytes
    put_back()
    found = optimizer.to_torch_state_dict()
    for number, state in saved["state"].items():
        assert {key: bits(value) for key, value in found["state"][number].items()} == {
            key: bits(value) for key, value in state.items()
        }


def test_values_written_to_the_state_are_used(backend: str) -> None:
    table = nn.Parameter(torch.zeros(5, 2))
    optimizer = SparseAdam([table], lr=1.0, betas=(0.5, 0.5), eps=1e-12, backend=backend)
    table.grad = sparse_ones(table, 2)
    optimizer.step()
    state = optimizer.state[table]
    state["exp_avg"].zero_()
    state["exp_avg_sq"].fill_(2.0)
    state["step"] = 9
    before = table.detach().clone()
    optimizer.step()
    # Halved, plus a half of the gradient: 0.5 and 1.5, corrected by 1 - 0.5**10.
    correction = 1 - 0.5**10
    want = before[2] - (0.5 / correction) / (1.5 / correction) ** 0.5
    torch.testing.assert_close(table[2], want)
    assert state["step"] == 10


@pytest.mark.parametrize("forget", ["del", "clear", "new"])
def test_deleting_the_state_starts_anew(backend: str, forget: str) -> None:
    model, twin = Model(), Model()
    optimizer = SparseAdam(model.tables, backend=backend)
    train(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    if forget == "del":
        for table in model.tables:
            del optimizer.state[table]
    elif forget == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict)
    train(model, optimizer, range(3, 5))
    twin_optimizer = SparseAdam(twin.tables, backend=backend)
    train(twin, twin_optimizer, range(3, 5))
    assert_equal_models(model, twin)
    assert_equal_states(optimizer, twin_optimizer)


def test_moment_bytes_counts_touched_rows_and_the_index(backend: str) -> None:
    single = nn.Parameter(torch.randn(1000, 8))
    double = nn.Parameter(torch.randn(50, 2, dtype=torch.float64))
    half = nn.Parameter(torch.randn(10, 4).bfloat16())
    optimizer = SparseAdam([single, double, half], backend=backend)
    assert optimizer.moment_bytes() == 0
    single.grad = sparse_ones(single, 3, 900, 3)
    optimizer.step()
    # Of each slot two moments and a row number; of each row of the table four bytes of index.
    wanted = 2 * (2 * 8 * 4 + 8) + 1000 * 4
    assert optimizer.moment_bytes() == wanted
    assert wanted < 2 * single.numel() * single.itemsize / 15, "a fraction of two dense moments"
    single.grad = None
    double.grad, half.grad = sparse_ones(double, 0), sparse_ones(half, 0, 1, 2)
    optimizer.step()
    wanted += (2 * 2 * 8 + 8) + 50 * 4 + 3 * (2 * 4 * 4 + 8) + 10 * 4
    assert optimizer.moment_bytes() == wanted
    optimizer.step()
    assert optimizer.moment_bytes() == wanted, "rows that were touched before take nothing new"


# Autograd -----------------------------------------------------------------------------------------


def test_a_step_makes_older_graphs_stale(backend: str) -> None:
    model = Model()
    users, items = model.tables
    optimizer = SparseAdam([users, items], backend=backend)
    stale, fresh = (users * users).sum(), (items * items).sum()
    versions = users._version, items._version
    users.grad = sparse_ones(users, 1)
    optimizer.step()
    assert users._version > versions[0]
    assert items._version == versions[1], "a table without a gradient was not written"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    fresh.backward()


def test_a_step_that_writes_no_row_leaves_older_graphs_alone(backend: str) -> None:
    table = nn.Parameter(torch.randn(6, 3))
    optimizer = SparseAdam([table], backend=backend)
    loss = (table * table).sum()
    table.grad = sparse_ones(table)
    optimizer.step()
    assert optimizer.state[table]["step"] == 1
    table.grad = None
    loss.backward()
    torch.testing.assert_close(table.grad, 2 * table.detach())


def test_a_step_leaves_gradients_as_they_were(backend: str) -> None:
    for maximize in (False, True):
        table = nn.Parameter(torch.randn(6, 3))
        optimizer = SparseAdam([table], maximize=maximize, backend=backend)
        grad = table.grad = sparse_ones(table, 4, 1, 4)
        optimizer.step()
        assert table.grad is grad
        assert not grad.is_coalesced()
        assert grad._indices().tolist() == [[4, 1, 4]]
        assert torch.equal(grad._values(), torch.ones(3, 3))


def test_the_table_stays_the_leaf_that_it_was(backend: str) -> None:
    model = Model()
    (users, items), pointers = model.tables, [table.data_ptr() for table in model.tables]
    optimizer = SparseAdam([users, items], backend=backend)
    train(model, optimizer, range(3))
    assert [users.data_ptr(), items.data_ptr()] == pointers
    assert all(table.is_leaf and table.requires_grad and table.grad_fn is None for table in (users, items))


# Documentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("documented", [SparseAdam, sparseadam.backends], ids=["SparseAdam", "backends"])
def test_examples_in_docstrings_run(documented: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the native module the example would give the one warning that says so, as it should.
    monkeypatch.setattr(sparseadam.update, "_warned_slow", True)
    names = dict(vars(sys.modules[documented.__module__]))
    tests = doctest.DocTestFinder(recurse=False).find(documented, globs=names)
    runner = doctest.DocTestRunner()
    output: list[str] = []
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(output)


def test_a_profile_shows_the_step_under_its_name() -> None:
    """step() leaves torch's mark itself, and only where somebody looks."""
    table = nn.Embedding(10, 2, sparse=True)
    optimizer = SparseAdam(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#SparseAdam.step" in {event.key for event in profile.key_averages()}


def test_step_shows_its_own_signature() -> None:
    assert list(inspect.signature(SparseAdam.step).parameters) == ["self", "closure"]
