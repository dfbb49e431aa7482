"""PyTorch's own tests of its SparseAdam, with this package's class in the place of theirs.

The configurations, schedulers and error cases are read at run time from the entry of ``torch.optim.SparseAdam`` in
``torch.testing._internal.common_optimizers`` of the installed PyTorch; they were last looked through for 2.13.0. Of the
entry of ``torch.optim.AdamW`` come those with options that PyTorch's SparseAdam lacks: weight decay and AMSGrad. The
tests below say in their own words what PyTorch's ``test/test_optim.py`` (class ``TestOptimRenewed``, which wheels lack)
asserts of each optimizer, and where "does not raise" is all that it asks, something more.

Left out, because there is nothing of it here:

* CUDA, several GPUs, MPS: this machine-independent suite runs on the CPU.
* ``foreach``, ``fused``, ``capturable``, ``differentiable``: PyTorch's SparseAdam has none of them. What is asked there
  of one implementation against another is asked here of one backend against another.
* complex parameters: SparseAdam refuses them, which is among the error cases.
* ``torch.compile``: PyTorch's SparseAdam is skipped there too.
* second-order optimizers that need a closure.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from sparseadam import SparseAdam

(INFO,) = (info for info in optim_db if info.optim_cls is torch.optim.SparseAdam)
(ADAMW_INFO,) = (info for info in optim_db if info.optim_cls is torch.optim.AdamW)
# Options of AdamW's that PyTorch's SparseAdam lacks, and so do its configurations.
ADAMW_OPTIONS = {"weight_decay", "amsgrad"}


def read_configs() -> dict[str, dict[str, Any]]:
    """Keyword arguments of each configuration."""
    configs = {config.desc: config.kwargs for config in INFO.optim_inputs_func(device="cpu")}
    of_adamw = (c for c in ADAMW_INFO.optim_inputs_func(device="cpu") if ADAMW_OPTIONS & set(c.kwargs))
    return configs | {f"AdamW's {config.desc}": config.kwargs for config in of_adamw}


def read_error_cases() -> list[tuple[type[torch.optim.Optimizer], Any]]:
    """Error cases, each with the class of PyTorch's that it is a case of."""
    kwargs: Any = {"device": "cpu", "dtype": torch.float32}
    cases: list[Any] = [(INFO.optim_cls, case) for case in INFO.optim_error_inputs_func(**kwargs)]
    of_adamw = (c for c in ADAMW_INFO.optim_error_inputs_func(**kwargs) if is_of_adamw_alone(c.optimizer_error_input))
    return cases + [(ADAMW_INFO.optim_cls, case) for case in of_adamw]


def is_of_adamw_alone(error_input: Any) -> bool:
    return bool(ADAMW_OPTIONS & set(error_input.kwargs))


CONFIGS = list(read_configs())
ADAMW_CONFIGS = [config for config in CONFIGS if config.startswith("AdamW's ")]
ERROR_CASES = read_error_cases()

Make = Callable[..., SparseAdam]

each_config = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """PyTorch's sparse additions wake all threads whatever the size, which a busy machine pays for."""
    torch.set_num_threads(1)


@pytest.fixture(params=[None, "native", "reference"], ids=str)
def make(request: pytest.FixtureRequest) -> Make:
    """The constructor with each backend, as PyTorch's class would be called."""
    backend = request.param
    if (backend or "native") not in BACKENDS:
        pytest.skip("this installation has no native module")

    def build(params: Any, *args: Any, **kwargs: Any) -> SparseAdam:
        return SparseAdam(params, *args, backend=backend, **kwargs)

    return build


def options_of(config: str) -> dict[str, Any]:
    """Keyword arguments of a configuration, made anew: a learning rate may be a tensor that schedulers write to."""
    return dict(read_configs()[config])


def make_sparse(*params: Tensor) -> None:
    for param in params:
        if param.grad is not None:
            param.grad = param.grad.to_sparse()


class Problem:
    """A least-squares problem, of which PyTorch makes the gradients sparse."""

    def __init__(self, *, contiguous: bool = True, sizes: tuple[int, int] = (10, 5)) -> None:
        """Start from random parameters."""
        torch.manual_seed(0)
        rows, columns = sizes
        if contiguous:
            self.weight = Parameter(torch.randn(rows, columns))
            self.bias = Parameter(torch.randn(rows))
        else:
            self.weight = Parameter(torch.randn(rows, columns, 2)[..., 0])
            self.bias = Parameter(torch.randn(rows, 2)[..., 0])
            assert not self.weight.is_contiguous() and not self.bias.is_contiguous()
        self.input = torch.randn(columns)

    @property
    def params(self) -> list[Parameter]:
        """Both parameters."""
        return [self.weight, self.bias]

    def copy(self) -> Problem:
        """The same problem at the same point, with parameters of its own."""
        return copy.deepcopy(self)

    def loss(self) -> Tensor:
        """What is to be minimized, without gradients."""
        with torch.no_grad():
            return (self.weight.mv(self.input) + self.bias).pow(2).sum()

    def backward(self) -> Tensor:
        """Set both gradients, sparse, and return the loss."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        make_sparse(*self.params)
        return loss.detach()


def step_schedulers(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))


def assert_right_direction(before: Tensor, after: Tensor, config: str) -> None:
    if options_of(config).get("maximize", False):
        assert after > before
    else:
        assert after < before


def assert_same(got: Any, want: Any, where: str = "state dict") -> None:
    """Compare nested state dicts exactly: types, keys, dtypes, shapes and bits."""
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for key in want:
            assert_same(got[key], want[key], f"{where}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(want, Tensor):
        assert got.dtype is want.dtype and torch.equal(got, want), where
    else:
        assert got == want, where


def test_the_entry_is_what_these_tests_were_written_for() -> None:
    assert INFO.only_supports_sparse_grads and not INFO.supports_complex
    assert not INFO.supported_impls and not INFO.has_capturable_arg
    assert INFO.supports_param_groups and not INFO.step_requires_closure
    of_adamw = ["AdamW's nonzero weight_decay", "AdamW's maximize", "AdamW's amsgrad"]
    assert ADAMW_CONFIGS == of_adamw
    assert CONFIGS == ["default", "non-default lr", "Tensor lr", "maximize", *of_adamw]
    assert len(ERROR_CASES) >= 11
    assert {cls for cls, _ in ERROR_CASES} == {torch.optim.SparseAdam, torch.optim.AdamW}
    for config in CONFIGS:
        of_both = {"lr", "maximize"}
        assert set(options_of(config)) <= (of_both | ADAMW_OPTIONS if config in of_adamw else of_both)
        assert (config in of_adamw) == (options_of(config).get("weight_decay", 0.0) > 0.0)
    assert options_of("AdamW's amsgrad")["amsgrad"] and options_of("AdamW's maximize")["maximize"]


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_class", "case"), ERROR_CASES, ids=[case.optimizer_error_input.desc for _, case in ERROR_CASES]
)
def test_errors(make: Make, torch_class: Any, case: Any) -> None:
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR, "no other kind in the entry"
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            optimizer = make(params, **kwargs)
        # With the warning given, it works, and steps such a parameter once.
        (param, _) = params
        before = param.detach().clone()
        param.grad = torch.ones_like(param).to_sparse()
        optimizer.step()
        assert optimizer.state[param]["step"] == 1
        assert torch.allclose(before - param, torch.tensor(1e-3), rtol=1e-3)
    else:
        with pytest.raises(case.error_type, match=case.error_regex) as ours:
            make(params, **kwargs)
        with pytest.raises(case.error_type) as theirs:
            torch_class(params, **kwargs)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value).startswith(str(theirs.value).rstrip(".")), "PyTorch's words open ours"


def test_an_empty_parameter_list_is_an_error(make: Make) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make([])


def test_dense_gradients_are_an_error(make: Make) -> None:
    param = Parameter(torch.randn(3, 2))
    param.grad = torch.ones_like(param)
    optimizer = make([param])
    words = "SparseAdam does not support dense gradients, please consider Adam instead"
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()


# Direction ----------------------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "not contiguous"])
@pytest.mark.parametrize("schedulers", [None, *INFO.scheduler_inputs], ids=["constant lr", "schedulers"])
def test_goes_in_the_right_direction(make: Make, config: str, contiguous: bool, schedulers: Any) -> None:
    problem = Problem(contiguous=contiguous)
    optimizer = make(problem.params, **options_of(config))
    schedulers = [schedule(optimizer) for schedule in schedulers or []]
    before = problem.loss()
    for _ in range(20):
        loss = problem.backward()
        optimizer.step()
        step_schedulers(schedulers, loss)
    assert_right_direction(before, problem.loss(), config)


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=["schedulers"])
def test_groups_with_schedulers_go_in_the_right_direction(make: Make, schedulers: Any) -> None:
    problem = Problem()
    optimizer = make([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
    schedulers = [schedule(optimizer) for schedule in schedulers]
    before = problem.loss()
    for _ in range(20):
        loss = optimizer.step(problem.backward)
        step_schedulers(schedulers, loss)
    assert problem.loss() < before
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == pytest.approx([1e-3 * 0.81, 0.01 * 0.81]), "StepLR has fallen twice, each group from its own"


@pytest.mark.parametrize("config", ADAMW_CONFIGS)
@pytest.mark.parametrize("mode", ["touched", "exact"])
def test_where_every_row_is_touched_it_goes_as_adamw_goes(make: Make, config: str, mode: str) -> None:
    # So fast, and with such short a memory, that second moments fall as the minimum comes near.
    options = {"lr": 0.1, "betas": (0.9, 0.5), **options_of(config)}

    def run(build: Any, **more: Any) -> tuple[Problem, torch.optim.Optimizer]:
        problem = Problem()
        optimizer = build(problem.params, **{**options, **more})
        for _ in range(20):
            problem.backward()
            if build is torch.optim.AdamW:
                for param in problem.params:
                    param.grad = param.grad.to_dense()
            optimizer.step()
        return problem, optimizer

    (problem, optimizer), (theirs, partner) = run(make, weight_decay_mode=mode), run(torch.optim.AdamW)
    torch.testing.assert_close(problem.params, theirs.params)
    for param, their_param in zip(problem.params, theirs.params, strict=True):
        state, their_state = optimizer.state[param], partner.state[their_param]
        assert state["rows"].tolist() == list(range(param.numel()))  # PyTorch's gradients name elements here
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.get("amsgrad") else [])):
            torch.testing.assert_close(state[key].reshape(param.shape), their_state[key])
    for option in ADAMW_OPTIONS & set(options):
        without, _ = run(make, **{option: type(options[option])(0)})
        assert not torch.allclose(without.weight, problem.weight), f"{option} does something"


@each_config
def test_groups_with_their_own_weight_decay_of_zero(make: Make, config: str) -> None:
    problem = Problem()
    optimizer = make(
        [
            {"params": [problem.weight], **options_of(config)},
            {"params": [problem.bias], **options_of(config), "weight_decay": 0.0},
        ]
    )
    before = problem.loss()
    for _ in range(20):
        problem.backward()
        optimizer.step()
    assert_right_direction(before, problem.loss(), config)


@each_config
def test_groups_with_their_own_lr(make: Make, config: str) -> None:
    problem = Problem()
    irrelevant = Parameter(torch.randn(2))
    untouched = irrelevant.detach().clone()
    options = {"lr": 1e-3, **options_of(config)}
    optimizer = make([{"params": problem.params, **options}, {"params": [irrelevant]}], lr=1e-28)
    before = problem.loss()
    for _ in range(20):
        problem.backward()
        irrelevant.grad = torch.rand_like(irrelevant).to_sparse()
        optimizer.step()
    assert_right_direction(before, problem.loss(), config)
    assert torch.equal(irrelevant, untouched)
    assert optimizer.state[irrelevant]["step"] == 20


def rosenbrock(point: Tensor) -> Tensor:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rosenbrock_slope(point: Tensor) -> Tensor:
    x, y = point.detach()
    return torch.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])


@pytest.mark.parametrize("maximize", [False, True])
def test_rosenbrock_by_uncoalesced_coordinates(make: Make, maximize: bool) -> None:
    options, schedulers = INFO.metadata_for_sparse
    assert not schedulers
    start = torch.tensor([1.5, 1.5])
    point, theirs = Parameter(start.clone()), Parameter(start.clone())
    optimizer = make([point], maximize=maximize, torch_eps=True, **options)
    partner = torch.optim.SparseAdam([theirs], maximize=maximize, **options)
    for i in range(1800):
        row = 1 - i % 2

        def closure(point: Parameter = point, row: int = row) -> Tensor:
            slope = rosenbrock_slope(point)[row]
            values = torch.stack([slope / 4, slope - slope / 4])
            point.grad = torch.sparse_coo_tensor([[row, row]], values, (2,), check_invariants=True)
            return rosenbrock(point)

        loss = optimizer.step(closure)
        assert loss is not None and loss.isfinite()
        if i < 10:
            # Near the start the two runs are together; later rounding sends them different ways.
            partner.step(lambda closure=closure: closure(theirs))
            torch.testing.assert_close(point, theirs)
    solution = torch.ones(2)
    if maximize:
        assert rosenbrock(point) >= rosenbrock(start)
    else:
        assert point.dist(solution) <= start.dist(solution)
        assert point.dist(solution) < 0.1, "where PyTorch's class gets, too"


@each_config
@pytest.mark.parametrize("num_dims", [0, 1, 2])
def test_a_tensor_lr_is_worth_its_number(make: Make, config: str, num_dims: int) -> None:
    problem, twin = Problem(), Problem()
    options = options_of(config) | {"lr": 1e-3}
    optimizer = make(problem.params, **options)
    options["lr"] = torch.tensor(1e-3).reshape([1] * num_dims)
    twin_optimizer = make(twin.params, **options)
    for _ in range(5):
        problem.backward()
        optimizer.step()
        twin.backward()
        twin_optimizer.step()
        # 1e-3 in float32 and in float64 part in the eighth digit.
        torch.testing.assert_close(twin.params, problem.params, rtol=1e-6, atol=1e-6)
    assert not torch.equal(problem.weight, Problem().weight)


# Steps that do nothing ----------------------------------------------------------------------------


@each_config
def test_a_step_without_gradients_does_nothing(make: Make, config: str) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = copy.deepcopy(params)
    optimizer = make(params, **options_of(config))
    loss = torch.tensor([1.0])
    assert optimizer.step(lambda: loss) is loss
    assert_same(params, before)
    assert not optimizer.state


@each_config
def test_a_step_with_an_empty_gradient_moves_nothing(make: Make, config: str) -> None:
    param = torch.randn(5, 1, requires_grad=True)
    before = param.detach().clone()
    optimizer = make([param], **options_of(config))
    # Values of two dimensions: of one, the case is easier (pytorch/pytorch#82486). PyTorch's floating indices, too.
    param.grad = torch.sparse_coo_tensor(torch.empty(1, 0), torch.empty(0, 1), (5, 1), check_invariants=True)
    optimizer.step(lambda: torch.tensor([1.0]))
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


# State dicts --------------------------------------------------------------------------------------


def named(params: list[Parameter], is_named: bool) -> list[Any]:
    return [(f"name{i}", param) for i, param in enumerate(params)] if is_named else params


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


@each_config
@pytest.mark.parametrize("is_named", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_state_dicts_are_deterministic(make: Make, config: str, is_named: tuple[bool, bool]) -> None:
    problem = Problem(sizes=(2, 3))
    optimizer = make(named(problem.params, is_named[0]), **options_of(config))
    for _ in range(10):
        problem.backward()
        optimizer.step()
    twin = problem.copy()
    twin_optimizer = make(named(twin.params, is_named[1]), **options_of(config))
    state_dict = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(state_dict)
    twin_optimizer.load_state_dict(given)
    for _ in range(10):
        for each, its_optimizer in ((problem, optimizer), (twin, twin_optimizer)):
            each.backward()
            its_optimizer.step()
        assert torch.equal(problem.weight, twin.weight) and torch.equal(problem.bias, twin.bias)
    assert_same(given, state_dict, "what was loaded, which is only read")
    ours, other = (without_names(each.state_dict()) for each in (optimizer, twin_optimizer))
    assert ours["state"][0]["step"] == 20
    assert_same(other, ours)
    # Repeated parameters are packed the same way (pytorch/pytorch#36831).
    twin_optimizer.param_groups.extend(twin_optimizer.param_groups)
    repeated = without_names(twin_optimizer.state_dict())["param_groups"]
    assert len(repeated) == 2
    assert_same(repeated[-1], ours["param_groups"][-1])


@each_config
@pytest.mark.parametrize("is_named", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_names_pass_between_state_dicts(make: Make, config: str, is_named: tuple[bool, bool]) -> None:
    problem = Problem()
    optimizer = make(named(problem.params, is_named[0]), **options_of(config))
    problem.backward()
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    other = make(named(problem.params, is_named[1]), **options_of(config))
    other.load_state_dict(state_dict)
    problem.backward()
    other.step()
    (group,) = other.state_dict()["param_groups"]
    assert group.get("param_names") == (["name0", "name1"] if any(is_named) else None)


@each_config
def test_older_state_dicts_without_newer_options_load(make: Make, config: str) -> None:
    problem = Problem()
    optimizer = make(problem.params, **options_of(config))
    for _ in range(3):
        problem.backward()
        optimizer.step()
    old = copy.deepcopy(optimizer.state_dict())
    (group,) = old["param_groups"]
    present = {option: value for option, value in group.items() if option != "params"}
    for option in present:
        if option not in ("lr", "betas", "eps"):
            del group[option]
    assert not {*INFO.not_og_supported_flags, *ADAMW_OPTIONS, "torch_eps"} & set(group)
    for each in (optimizer, make(problem.params, **options_of(config))):
        each.load_state_dict(copy.deepcopy(old))
        loaded = {option: value for option, value in each.param_groups[0].items() if option != "params"}
        assert loaded == present
        assert loaded["maximize"] is options_of(config).get("maximize", False)
        problem.backward()
        each.step()
        assert each.state[problem.weight]["step"] == 4


@each_config
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("load_options", [{}, {"weights_only": True}, {"weights_only": False}], ids=str)
def test_saved_state_dicts_load_equal(make: Make, config: str, is_named: bool, load_options: dict[str, bool]) -> None:
    problem = Problem(sizes=(2, 3))
    optimizer = make(named(problem.params, is_named), **options_of(config))
    for _ in range(3):
        optimizer.step(problem.backward)
    state_dict = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded = torch.load(file, **load_options)
    assert_same(loaded, state_dict)
    make(named(problem.params, is_named)).load_state_dict(loaded)


@each_config
@pytest.mark.parametrize("step_type", [int, float, torch.tensor])
def test_a_step_of_any_type_loads(make: Make, config: str, step_type: Callable[[int], Any]) -> None:
    problem = Problem()
    problem.backward()
    optimizer = make(problem.params, **options_of(config))
    for _ in range(3):
        optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = step_type(state["step"])
    optimizer.load_state_dict(state_dict)
    optimizer.step()
    assert [state["step"] for state in optimizer.state.values()] == [4, 4]


@each_config
def test_no_state_is_empty_after_a_step(make: Make, config: str) -> None:
    model = nn.Linear(5, 5)
    optimizer = make(model.parameters(), **options_of(config))
    optimizer.zero_grad()
    model(torch.rand(2, 5)).sum().backward()
    make_sparse(*model.parameters())
    optimizer.step()
    assert len(optimizer.state) == 2
    assert all(len(state) > 0 for state in optimizer.state.values())


@each_config
def test_deepcopy_copies_all_public_attributes(make: Make, config: str) -> None:
    problem = Problem()
    problem.backward()
    optimizer = make(problem.params, **options_of(config))
    for _ in range(3):
        optimizer.step()

    def public(each: object) -> set[str]:
        return {name for name in vars(each) if not name.startswith("_")}

    assert public(optimizer) == public(copy.deepcopy(optimizer)) == {"defaults", "state", "param_groups"}


@each_config
def test_it_can_be_printed(make: Make, config: str) -> None:
    text = repr(make([Parameter(torch.randn(2, 3)) for _ in range(2)], **options_of(config)))
    assert text.startswith("SparseAdam (\nParameter Group 0\n")
    for option in ("lr", "betas", "eps", "maximize", *ADAMW_OPTIONS):
        assert f"    {option}: " in text
    for option, value in options_of(config).items():
        assert f"    {option}: {value}\n" in text


# Hooks --------------------------------------------------------------------------------------------


def add_test_entry(optimizer: Any) -> None:
    optimizer.state["test"] = 1


def take_test_entry(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["ran_pre_hook"] = state_dict["state"].pop("test", None) == 1
    return state_dict


@pytest.fixture
def stepped(make: Make) -> Iterator[SparseAdam]:
    """An optimizer of one parameter that has been stepped once."""
    param = torch.rand(2, 3, requires_grad=True)
    param.grad = torch.ones(2, 3).to_sparse()
    optimizer = make([param])
    optimizer.step()
    yield optimizer


def test_state_dict_pre_hook(stepped: SparseAdam) -> None:
    stepped.register_state_dict_pre_hook(add_test_entry)
    state = stepped.state_dict()["state"]
    assert state["test"] == 1
    assert state[0]["step"] == 1


def test_state_dict_post_hook(stepped: SparseAdam) -> None:
    stepped.register_state_dict_post_hook(take_test_entry)
    assert stepped.state_dict()["ran_pre_hook"] is False


def test_state_dict_pre_and_post_hooks(stepped: SparseAdam) -> None:
    stepped.register_state_dict_pre_hook(add_test_entry)
    stepped.register_state_dict_post_hook(take_test_entry)
    state_dict = stepped.state_dict()
    assert "test" not in state_dict["state"]
    assert state_dict["ran_pre_hook"] is True


def write_lr_in_place(optimizer: Any, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def return_another_lr(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


def note_what_was_loaded(optimizer: Any) -> None:
    optimizer.state["lr when loaded"] = optimizer.param_groups[0]["lr"]


def test_load_state_dict_pre_hooks_and_their_order(stepped: SparseAdam) -> None:
    state_dict = stepped.state_dict()
    stepped.register_load_state_dict_pre_hook(write_lr_in_place)
    stepped.load_state_dict(state_dict)
    assert stepped.param_groups[0]["lr"] == 0.002
    handle = stepped.register_load_state_dict_pre_hook(return_another_lr, prepend=True)
    stepped.load_state_dict(state_dict)
    assert stepped.param_groups[0]["lr"] == 0.002, "the other hook comes after"
    handle.remove()
    stepped.register_load_state_dict_pre_hook(return_another_lr)
    stepped.load_state_dict(state_dict)
    assert stepped.param_groups[0]["lr"] == 0.003, "the other hook came before"


def test_load_state_dict_post_hook(stepped: SparseAdam) -> None:
    stepped.register_load_state_dict_post_hook(note_what_was_loaded)
    stepped.load_state_dict(stepped.state_dict())
    assert stepped.state["lr when loaded"] == 1e-3


def test_load_state_dict_pre_and_post_hooks(stepped: SparseAdam) -> None:
    stepped.register_load_state_dict_pre_hook(return_another_lr)
    stepped.register_load_state_dict_post_hook(note_what_was_loaded)
    stepped.load_state_dict(stepped.state_dict())
    assert stepped.state["lr when loaded"] == 0.003


@each_config
@pytest.mark.parametrize("when", ["pre", "post"])
def test_step_hooks_run_until_they_are_removed(make: Make, config: str, when: str) -> None:
    optimizer = make([torch.tensor([1.0, 1.0])], **options_of(config))
    calls = []
    register = getattr(optimizer, f"register_step_{when}_hook")
    handle = register(lambda *args: calls.append(args))
    optimizer.step()
    optimizer.step()
    assert calls == [(optimizer, (optimizer,), {})] * 2
    handle.remove()
    optimizer.step()
    assert len(calls) == 2


@each_config
def test_all_step_hooks_run_in_order(make: Make, config: str) -> None:
    params = [torch.tensor([1.0, 1.0])]
    optimizer, other = make(params, **options_of(config)), torch.optim.SGD(params)
    calls: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
    ]
    try:
        for each in (optimizer, other):
            handles.append(each.register_step_pre_hook(lambda *_: calls.append(1)))
            handles.append(each.register_step_post_hook(lambda *_: calls.append(2)))
        for i, each in enumerate((optimizer, other, optimizer), 1):
            each.step()
            assert calls == [0, 1, 2, 5] * i
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    other.step()
    assert calls == [0, 1, 2, 5] * 3


# One implementation against another ---------------------------------------------------------------

needs_two_backends = pytest.mark.skipif(len(BACKENDS) < 2, reason="this installation has one backend")


def run_of_a_model(config: str, backend: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Seven steps: the third without gradients, the next two with a frozen layer; one parameter has no dimension."""
    torch.manual_seed(1)
    layers = (nn.Linear(*sizes, dtype=dtype) for sizes in ((2, 3), (3, 1)))
    model = nn.Sequential(next(layers), nn.Sigmoid(), next(layers), nn.Sigmoid())
    scalar = torch.rand((), dtype=dtype, requires_grad=True)
    params = [*model.parameters(), scalar]
    optimizer = SparseAdam(params, backend=backend, **options_of(config))
    inputs = (torch.arange(1, 7, dtype=dtype) / 10).reshape(3, 2)
    record = []
    for i in range(7):
        optimizer.zero_grad()
        model[2].requires_grad_(i not in (3, 4))
        if i != 2:
            (model(inputs).sum() * scalar).backward()
            make_sparse(*params)
        optimizer.step()
        states = [dict(optimizer.state[param]) if param in optimizer.state else {} for param in params]
        record.append(copy.deepcopy({"params": [param.detach() for param in params], "states": states}))
    return record


@needs_two_backends
@each_config
def test_backends_agree_over_seven_steps(config: str) -> None:
    native, reference = (run_of_a_model(config, backend, torch.float64) for backend in ("native", "reference"))
    steps = [state["step"] for state in native[-1]["states"]]
    assert steps == [6, 6, 4, 4, 6]
    for ours, theirs in zip(native, reference, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_two_backends
@each_config
def test_backends_agree_over_parameters_of_all_dtypes(config: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    runs = []
    for backend in ("native", "reference"):
        torch.manual_seed(2)
        params = [torch.rand(2, 3, dtype=dtype, requires_grad=True) for dtype in dtypes]
        for param in params:
            param.grad = torch.rand_like(param).to_sparse(1)
        before = copy.deepcopy(params)
        optimizer = SparseAdam(params, backend=backend, **options_of(config))
        for _ in range(7):
            optimizer.step()
        assert not any(torch.equal(param, was) for param, was in zip(params, before, strict=True))
        runs.append((params, [dict(optimizer.state[param]) for param in params]))
    for dtype, *pair in zip(dtypes, *(zip(*run, strict=True) for run in runs), strict=True):
        # As PyTorch's test of mixed dtypes has it: five times what the dtype's own comparisons allow.
        rtol, atol = torch.testing._comparison.get_tolerances(dtype, rtol=None, atol=None)
        torch.testing.assert_close(*pair, rtol=5 * rtol, atol=5 * atol)


@each_config
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_does_not_matter(backend: str, config: str, default: torch.dtype) -> None:
    want = run_of_a_model(config, backend, torch.float64)
    lr = options_of(config).get("lr")
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = run_of_a_model(config, backend, torch.float64)
    finally:
        torch.set_default_dtype(before)
    assert [state["step"] for state in got[-1]["states"]] == [6, 6, 4, 4, 6]
    if not isinstance(lr, Tensor):
        # The rest of the run is the same; a tensor's number depends on the dtype that it was made in.
        assert_same([step["states"] for step in got], [step["states"] for step in want])
