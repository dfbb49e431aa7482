"""Every error: raised before anything is written, saying where it is, what was found and what to do.

The cases that a step can meet run with four tables in two groups, the faulty one last, after some steps: were anything
written before the last table was checked, the other three would show it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import BACKENDS, many
from gradients import coo, raw
from snapshot import bits, snapshot
from torch.nn import Parameter

import sparseadam
from sparseadam import SparseAdam, update
from sparseadam._memory import ReservedArray
from sparseadam.moments import Moments
from sparseadam.update import native, reference

needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="this installation has no native module")
# Without the native module backend=None warns, which a test of its own looks at.
CHOICES = [None, *BACKENDS] if "native" in BACKENDS else BACKENDS
NAMED_PLACE = r"'target' \(group 1, parameter 1\)"
# Lookups enough for several threads.
MANY = many(70_000)
PLACE = r"(?<!\()group 1, parameter 1"
# The steps before a fault, and the seed of the tables; gradients are seeded by their step.
STEPS_BEFORE = 3


@pytest.fixture(autouse=True)
def warned_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the native module is missing, that is no matter of every test here."""
    monkeypatch.setattr(update, "_warned_slow", True)


class Run:
    """Four tables in two groups, the last of them ``target``, with the same gradients in every run."""

    def __init__(
        self,
        backend: str | None,
        *,
        sparse_dim: int = 1,
        named: bool = True,
        target_shape: tuple[int, int] = (40, 4),
        num_lookups: int = 20,
        bare: bool = False,
    ) -> None:
        """Begin and take the steps before the fault, unless ``bare``."""
        generator = torch.Generator().manual_seed(11)
        shapes = {"users": (50, 8), "items": (30, 3), "words": (20, 8), "target": target_shape}
        self.tables = {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        self.target = self.tables["target"]
        self.sparse_dims = {name: 1 for name in shapes} | {"target": sparse_dim}
        self.num_lookups = num_lookups
        self.steps_taken = 0
        items = list(self.tables.items()) if named else list(self.tables.values())
        groups = [{"params": items[:2]}, {"params": items[2:], "lr": 0.05, "betas": (0.8, 0.95)}]
        self.optimizer = SparseAdam(groups, lr=0.1, backend=backend)
        for _ in range(0 if bare else STEPS_BEFORE):
            self.step()

    def set_gradients(self) -> None:
        """Give every table the gradient of the coming step."""
        generator = torch.Generator().manual_seed(self.steps_taken)
        for name, table in self.tables.items():
            sparse_dim = self.sparse_dims[name]
            sizes = table.shape[:sparse_dim]
            indices = torch.stack([torch.randint(size, (self.num_lookups,), generator=generator) for size in sizes])
            row_shape = table.shape[sparse_dim:]
            values = torch.randn(self.num_lookups, *row_shape, generator=generator)
            table.grad = raw(indices, values, table.shape)

    def step(self) -> None:
        """Take the next step."""
        self.set_gradients()
        self.optimizer.step()
        self.steps_taken += 1


def begun_natively(backend: str | None) -> Run:
    """Begin a run natively and leave it to a backend to go on: until then all such runs hold the same bits."""
    run = Run("native")
    run.optimizer._backend = backend
    return run


Repair = Callable[[], None]


class Fault(NamedTuple):
    """A fault that a step meets: how to bring it about (returning how to end it), and what is then raised."""

    name: str
    inject: Callable[[Run], Repair | None]
    error: type[Exception]
    pattern: str
    sparse_dim: int = 1
    backends: tuple[str | None, ...] = (None, "native", "reference")


class Foreign(Parameter):
    """A parameter whose gradient is what a test says, past the checks of ``p.grad = ...``."""

    grad = property(lambda self: self.foreign_grad)  # type: ignore[assignment]


def give_foreign(make: Callable[[torch.Tensor], Any]) -> Callable[[Run], Repair]:
    """A fault: the target's gradient is ``make(target)``, which torch would not let stand there."""

    def inject(run: Run) -> Repair:
        table = run.target

        def repair() -> None:
            table.__class__ = Parameter

        foreign_grad = make(table)
        table.__class__ = Foreign
        table.foreign_grad = foreign_grad  # type: ignore[attr-defined]
        return repair

    return inject


def give_gradient(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Run], None]:
    """A fault: the target's gradient is ``make(target)``."""

    def inject(run: Run) -> None:
        run.target.grad = make(run.target)

    return inject


def give_index(index: int, *, dim: int = 0, position: int = 7) -> Callable[[Run], None]:
    """A fault: one index of the target's gradient is ``index``."""

    def inject(run: Run) -> None:
        grad = run.target.grad
        assert grad is not None
        indices = grad._indices().clone()
        indices[dim, position] = index
        run.target.grad = raw(indices, grad._values(), grad.shape)

    return inject


def set_option(name: str, value: Any) -> Callable[[Run], Repair]:
    """A fault: an option of the last group is ``value``."""

    def inject(run: Run) -> Repair:
        group = run.optimizer.param_groups[1]
        before = dict(group)

        def repair() -> None:
            group.clear()
            group.update(before)

        group[name] = value
        return repair

    return inject


def change_data(change: Callable[[torch.Tensor], torch.Tensor], *, keep_grad: bool) -> Callable[[Run], Repair]:
    """A fault: the target's memory is exchanged, with its gradient as it was or one that fits the new memory."""

    def inject(run: Run) -> Repair:
        table, before = run.target, run.target.data
        grad = table.grad
        assert grad is not None
        if not keep_grad:
            table.grad = None
        table.data = change(before)
        if not keep_grad:
            table.grad = raw(grad._indices(), grad._values().to(table.dtype), table.shape)

        def repair() -> None:
            table.grad = None
            table.data = before

        return repair

    return inject


def with_one_table_for_the_reference(name: str) -> Callable[[Run], Repair]:
    """A fault: the target names a bad row, in a step that the two backends share; ``name`` is the reference's table."""

    def inject(run: Run) -> Repair:
        table = run.tables[name]
        before = table.data
        table.data = before.t().contiguous().t()
        give_index(40)(run)

        def repair() -> None:
            table.data = before

        return repair

    return inject


def replace_state(run: Run) -> Repair:
    """A fault: code that walks the state has left something in it that is no moment."""
    before = run.optimizer.state[run.target]

    def repair() -> None:
        run.optimizer.state[run.target] = before

    run.optimizer.state[run.target] = {**before, "exp_avg": [1.0, 2.0]}
    return repair


def to_meta(table: torch.Tensor) -> torch.Tensor:
    values = torch.ones(2, table.shape[1], device="meta")
    return raw(torch.zeros(1, 2, dtype=torch.int64, device="meta"), values, table.shape)


def unfitting_values(num_values: int, width: int) -> Callable[[torch.Tensor], Any]:
    """A gradient made by hand: torch's own constructors let none through whose parts do not fit together."""
    return lambda table: SimpleNamespace(
        layout=torch.sparse_coo,
        shape=table.shape,
        dtype=table.dtype,
        device=table.device,
        _indices=lambda: torch.zeros(1, 3, dtype=torch.int64),
        _values=lambda: torch.ones(num_values, width),
    )


def compressed(layout: torch.layout) -> Callable[[torch.Tensor], torch.Tensor]:
    blocksize = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return lambda table: torch.ones(table.shape).to_sparse(layout=layout, blocksize=blocksize)


ROWS = "its table has rows 0 to 39.*Check the ids"
GROUP = r".*parameter group 1\."

TABLE_FAULTS = [
    Fault(
        "dense gradient",
        give_gradient(torch.ones_like),
        RuntimeError,
        "does not support dense gradients, please consider Adam instead"
        r".*\[40, 4\].*sparse=True.*tied.*penalty.*Adam",
    ),
    *(
        Fault(
            f"{layout} gradient",
            give_foreign(compressed(layout)),
            RuntimeError,
            rf"COO.*layout {layout}.*to_sparse_coo\(\)",
        )
        for layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    ),
    *(
        Fault(f"row {row}", give_index(row), IndexError, f"names row {row}, but {ROWS}")
        for row in (-1, -40, -(2**63), 40, 41, 2**31, 2**32, 2**40, 2**63 - 1)
    ),
    *(
        Fault(
            f"index {index} in dimension {dim}",
            give_index(index, dim=dim),
            IndexError,
            f"names index {index} in dimension {dim}, but its table has size {size} there.*Check the ids",
            sparse_dim=2,
        )
        for dim, size, indices in (
            (0, 40, (-1, 40, 2**40, -(2**63))),
            # 4 and -1 stand for a row inside the table once both dimensions are made one number.
            (1, 4, (-1, 4, 5, 2**40, -(2**40))),
        )
        for index in indices
    ),
    *(
        Fault(
            f"bad row while the reference updates {name}",
            with_one_table_for_the_reference(name),
            IndexError,
            f"names row 40, but {ROWS}",
            backends=(None,),
        )
        for name in ("target", "users")
    ),
    Fault(
        "gradient of another shape",
        change_data(lambda data: torch.cat([data, data]), keep_grad=True),
        RuntimeError,
        r"has shape \[40, 4\], but its table has shape \[80, 4\].*zero_grad\(\)",
    ),
    Fault(
        "gradient of another width",
        change_data(lambda data: data[:, :2].clone(), keep_grad=True),
        RuntimeError,
        r"has shape \[40, 4\], but its table has shape \[40, 2\].*zero_grad\(\)",
    ),
    Fault(
        "gradient of another dtype",
        change_data(lambda data: data.double(), keep_grad=True),
        RuntimeError,
        r"has dtype torch.float32, but its table has dtype torch.float64.*zero_grad\(\)",
    ),
    Fault(
        "gradient on another device",
        give_foreign(to_meta),
        RuntimeError,
        r"has device meta, but its table has device cpu.*zero_grad\(\)",
    ),
    Fault(
        "fewer values than indices",
        give_foreign(unfitting_values(2, 4)),
        RuntimeError,
        r"has values of shape \[2, 4\].*\[3, 4\].*check_invariants=True",
    ),
    Fault(
        "values of another width",
        give_foreign(unfitting_values(3, 5)),
        RuntimeError,
        r"has values of shape \[3, 5\].*\[3, 4\].*check_invariants=True",
    ),
    Fault(
        "more rows than its moments were made for",
        change_data(lambda data: torch.cat([data, data]), keep_grad=False),
        RuntimeError,
        r"made for a table of shape \[40, 4\], but the table now has shape \[80, 4\].*new optimizer",
    ),
    Fault(
        "a dtype that its moments were not made for",
        change_data(lambda data: data.double(), keep_grad=False),
        RuntimeError,
        r"(?<!of dtype with) torch.float32\b(?!.*of dtype with).*torch.float64.*new optimizer",
    ),
    Fault(
        "a state that is none",
        replace_state,
        ValueError,
        "exp_avg is a list, a strided tensor expected",
    ),
    Fault(
        "a table that the named backend cannot update",
        change_data(lambda data: data.t().contiguous().t(), keep_grad=False),
        RuntimeError,
        r'backend="native" cannot update .*: .*shape \[40, 4\] with strides \[1, 40\]'
        '.*backend=None.*backend="reference"',
        backends=("native",),
    ),
]

OPTION_FAULTS = [
    *(
        Fault(
            f"lr={lr!r}",
            set_option("lr", lr),
            ValueError,
            rf"^Invalid learning rate: {shown}\. lr must lie in \[0, inf\)\.{GROUP}",
        )
        for lr, shown in (
            (-0.1, "-0.1"),
            (-math.inf, "-inf"),
            (math.inf, "inf"),
            (math.nan, "nan"),
            (torch.tensor(-0.5), "-0.5"),
            (torch.tensor([math.nan]), "nan"),
        )
    ),
    Fault(
        "lr of two elements",
        set_option("lr", torch.tensor([0.1, 0.2])),
        ValueError,
        rf"^Tensor lr must be 1-element, got shape \[2\].*one parameter group for each value{GROUP}",
    ),
    *(
        Fault(
            f"{name}={value!r}",
            set_option(name, value),
            TypeError,
            f"^{name} must be a number or a one-element Tensor, got {kind}.{GROUP}",
        )
        for name in ("lr", "eps", "weight_decay")
        for value, kind in ((None, "NoneType"), ("fast", "str"), ("0.1", "str"), ([0.1], "list"))
    ),
    *(
        Fault(
            f"eps={eps!r}",
            set_option("eps", eps),
            ValueError,
            rf"^Invalid epsilon value: {eps}\. eps must lie in \(0, inf\)\.{GROUP}",
        )
        for eps in (0.0, -1e-8, math.inf, math.nan)
    ),
    *(
        Fault(
            f"weight_decay={weight_decay!r}",
            set_option("weight_decay", weight_decay),
            ValueError,
            rf"^Invalid weight_decay value: {weight_decay}\. weight_decay must lie in \[0, inf\)\.{GROUP}",
        )
        for weight_decay in (-0.01, -math.inf, math.inf, math.nan)
    ),
    *(
        Fault(
            f"betas={betas!r}",
            set_option("betas", betas),
            ValueError,
            rf"^Invalid beta parameter at index {index}: {betas[index]}\. "
            rf"Both betas must lie in \[0, 1\)\.{GROUP}",
        )
        for index, betas in (
            (0, (1.0, 0.999)),
            (0, (-0.1, 0.999)),
            (0, (math.nan, 0.999)),
            (0, (math.inf, 0.999)),
            (1, (0.9, 1.0)),
            (1, (0.9, -0.1)),
            (1, (0.9, math.nan)),
            (1, (0.9, -math.inf)),
        )
    ),
    *(
        Fault(
            f"betas={betas!r}",
            set_option("betas", betas),
            error,
            rf"{re.escape(repr(betas))}\. betas must be a pair such as \(0\.9, 0\.999\)\.{GROUP}",
        )
        for betas, error in (
            ((), ValueError),
            ((0.9,), ValueError),
            ((0.9, 0.99, 0.999), ValueError),
            (0.9, TypeError),
            (None, TypeError),
            ("09", TypeError),
        )
    ),
    Fault(
        "betas=(0.9, '0.999')",
        set_option("betas", (0.9, "0.999")),
        TypeError,
        rf"^betas\[1\] must be a number or a one-element Tensor, got str\.{GROUP}",
    ),
    *(
        Fault(
            f"{name}={value!r}",
            set_option(name, value),
            TypeError,
            f"^{name} must be True or False, got {value!r}.{GROUP}",
        )
        for name in ("maximize", "torch_eps", "amsgrad", "stochastic_rounding")
        for value in (1, 0, None, "no")
    ),
    *(
        Fault(
            f"{name}={value!r}",
            set_option(name, value),
            ValueError,
            f"^{name}={value!r} is not supported by SparseAdam.*set it to False.{GROUP}",
        )
        for name, value in (
            ("foreach", True),
            ("fused", True),
            ("capturable", True),
            ("differentiable", True),
        )
    ),
    *(
        Fault(
            f"{name}={value!r} once there are moments",
            set_option(name, value),
            RuntimeError,
            rf"^{name} of 'words' \(group 1, parameter 0\) changed after its moments were made.*"
            r"Set it back, or delete optimizer\.state\[param\]",
        )
        for name, value in (
            ("amsgrad", True),
            ("bias_correction", "row"),
            ("second_moment", "row"),
            ("weight_decay_mode", "exact"),
        )
    ),
]

FAULTS = [*TABLE_FAULTS, *OPTION_FAULTS]
FAULT_CASES = [
    pytest.param(fault, backend, id=f"{fault.name}-{backend}")
    for fault in FAULTS
    for backend in CHOICES
    if backend in fault.backends
]


def assert_refused_and_unchanged(run: Run, error: type[Exception], pattern: str) -> str:
    """Step, and see that it raises what it should and that nothing has changed. Returns the message."""
    before = snapshot(run.optimizer)
    versions = [table._version for table in run.tables.values()]
    with pytest.raises(error, match=pattern) as raised:
        run.optimizer.step()
    assert type(raised.value) is error
    assert snapshot(run.optimizer) == before
    assert [table._version for table in run.tables.values()] == versions
    return str(raised.value)


def assert_goes_on_alike(disturbed: Run, undisturbed: Run) -> None:
    """Take two more steps in both runs and compare them bit for bit."""
    for _ in range(2):
        disturbed.step()
        undisturbed.step()
        assert snapshot(disturbed.optimizer) == snapshot(undisturbed.optimizer)


# Compressed layouts announce in every process that they are in beta.
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.parametrize(("fault", "backend"), FAULT_CASES)
def test_a_step_that_raises_changes_nothing_and_the_next_is_as_if_it_had_not_been(
    fault: Fault, backend: str | None
) -> None:
    disturbed = Run(backend, sparse_dim=fault.sparse_dim)
    disturbed.set_gradients()
    repair = fault.inject(disturbed)

    message = assert_refused_and_unchanged(disturbed, fault.error, f"(?s){fault.pattern}")
    if fault in TABLE_FAULTS:
        assert re.search(NAMED_PLACE, message)

    if repair is not None:
        repair()
    assert_goes_on_alike(disturbed, Run(backend, sparse_dim=fault.sparse_dim))


@pytest.mark.parametrize("backend", CHOICES)
@pytest.mark.parametrize("fault", [TABLE_FAULTS[0], TABLE_FAULTS[5]], ids=lambda fault: fault.name)
def test_a_parameter_without_a_name_is_told_by_its_group_and_index(fault: Fault, backend: str | None) -> None:
    run = Run(backend, named=False)
    run.set_gradients()
    fault.inject(run)
    assert_refused_and_unchanged(run, fault.error, PLACE)


@pytest.mark.parametrize("backend", CHOICES)
def test_a_first_step_that_raises_leaves_no_state_behind(backend: str | None) -> None:
    run = Run(backend, bare=True)
    run.set_gradients()
    give_index(40)(run)
    assert_refused_and_unchanged(run, IndexError, "names row 40")
    assert not run.optimizer.state
    assert_goes_on_alike(run, Run(backend, bare=True))


@pytest.mark.parametrize("backend", CHOICES)
def test_a_gradient_of_another_sparse_dim_with_a_bad_index_leaves_the_moments_as_they_were(
    backend: str | None,
) -> None:
    run = Run(backend)
    run.set_gradients()
    run.target.grad = raw([[3, 3], [1, 4]], torch.ones(2), (40, 4))
    assert_refused_and_unchanged(run, IndexError, "names index 4 in dimension 1")
    assert_goes_on_alike(run, Run(backend))


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("backend", CHOICES)
@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("position", [0, MANY // 2, MANY - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("row", [-1, 5000, 2**40])
def test_a_bad_row_is_found_at_any_place_among_many_lookups(
    backend: str | None, num_threads: int, position: int, row: int
) -> None:
    torch.set_num_threads(num_threads)
    run = Run(backend, target_shape=(5000, 8), num_lookups=MANY, bare=True)
    run.step()
    run.set_gradients()
    give_index(row, position=position)(run)
    assert_refused_and_unchanged(run, IndexError, f"{NAMED_PLACE} names row {row}, but its table has rows 0 to 4999")


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("backend", CHOICES)
def test_of_several_bad_rows_the_first_is_named(backend: str | None) -> None:
    torch.set_num_threads(4)
    run = Run(backend, target_shape=(5000, 8), num_lookups=MANY, bare=True)
    run.set_gradients()
    for position in (MANY - 1, MANY // 2, MANY // 7):
        give_index(100_000 + position, position=position)(run)
    assert_refused_and_unchanged(run, IndexError, f"names row {100_000 + MANY // 7},")


@pytest.mark.parametrize("backend", CHOICES)
def test_a_table_without_rows_has_none_to_look_up(backend: str | None) -> None:
    table = Parameter(torch.empty(0, 4))
    table.grad = raw([[0]], torch.ones(1, 4), table.shape)
    optimizer = SparseAdam([table], backend=backend)
    with pytest.raises(IndexError, match="names row 0, but its table has no rows"):
        optimizer.step()
    table.grad = raw(torch.empty(1, 0, dtype=torch.int64), torch.ones(0, 4), table.shape)
    optimizer.step()
    assert optimizer.state[table]["step"] == 1


@pytest.mark.parametrize("backend", CHOICES)
def test_a_claim_to_be_coalesced_is_not_believed(backend: str | None) -> None:
    """Repeated rows are summed, whatever a flag set by hand says: no error, but a wrong step were it believed."""
    indices, values = [[3, 1, 3, 3]], torch.tensor([[1.0, 2.0], [4.0, -2.0], [0.5, 8.0], [-3.0, 2.0]])
    table = Parameter(torch.zeros(5, 2))
    table.grad = raw(indices, values, table.shape, is_coalesced=True)
    assert table.grad.is_coalesced()
    optimizer = SparseAdam([table], lr=0.5, betas=(0.5, 0.75), backend=backend)
    optimizer.step()

    summed = torch.tensor([[4.0, -2.0], [-1.5, 12.0]])
    state = optimizer.state[table]
    assert state["rows"].tolist() == [1, 3]
    assert torch.equal(state["exp_avg"], summed / 2)
    assert torch.equal(state["exp_avg_sq"], summed * summed / 4)
    # The first step of Adam moves each element by lr, but for eps.
    torch.testing.assert_close(table.detach()[[1, 3]], -0.5 * summed.sign())
    assert not table[[0, 2, 4]].any()


@pytest.mark.parametrize("backend", CHOICES)
def test_a_group_may_set_its_lr_to_zero_and_stand_still(backend: str | None) -> None:
    run = Run(backend)
    run.optimizer.param_groups[1]["lr"] = 0
    before = snapshot(run.optimizer)
    run.step()
    after = snapshot(run.optimizer)
    assert after["tables"][1] == before["tables"][1]
    assert after["tables"][0] != before["tables"][0]
    for place in (0, 1):
        assert after["states"][1][place]["step"] == bits(STEPS_BEFORE + 1)
        assert after["states"][1][place]["exp_avg"] != before["states"][1][place]["exp_avg"]

    made_with_zero = SparseAdam([{"params": [torch.zeros(2, 2)], "lr": 0.0}], backend=backend)
    assert made_with_zero.param_groups[0]["lr"] == 0.0


# Construction -------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """Arguments that are refused. Where ``torch_says`` so, torch refuses them too and our words begin with its own."""

    name: str
    options: dict[str, Any]
    error: type[Exception]
    pattern: str
    torch_says: bool = False


LR = r"lr must lie in "
BETAS = r"Both betas must lie in \[0, 1\)\."
PAIR = r"betas must be a pair such as \(0\.9, 0\.999\)\."

OPTION_REFUSALS = [
    Refusal("lr negative", {"lr": -0.1}, ValueError, f"Invalid learning rate: -0.1. {LR}", True),
    Refusal("lr nan", {"lr": math.nan}, ValueError, f"Invalid learning rate: nan. {LR}", True),
    Refusal("lr inf", {"lr": math.inf}, ValueError, f"Invalid learning rate: inf. {LR}"),
    Refusal("lr -inf", {"lr": -math.inf}, ValueError, f"Invalid learning rate: -inf. {LR}", True),
    Refusal("lr tensor", {"lr": torch.tensor(-1.5)}, ValueError, f"rate: -1.5. {LR}", True),
    Refusal("lr of two", {"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element.*\[2\]", True),
    Refusal("lr of none", {"lr": torch.ones(0)}, ValueError, r"Tensor lr must be 1-element.*\[0\]", True),
    Refusal("lr None", {"lr": None}, TypeError, "lr must be a number or .*, got NoneType"),
    Refusal("lr str", {"lr": "0.1"}, TypeError, "lr must be a number or .*, got str"),
    Refusal("lr complex", {"lr": 1j}, TypeError, "lr must be a number or .*, got complex"),
    Refusal("lr list", {"lr": [0.1]}, TypeError, "lr must be a number or .*, got list"),
    Refusal("eps zero", {"eps": 0.0}, ValueError, r"Invalid epsilon value: 0.0. eps must", True),
    Refusal("eps negative", {"eps": -1e-8}, ValueError, r"value: -1e-08. eps must lie in \(0", True),
    Refusal("eps nan", {"eps": math.nan}, ValueError, r"Invalid epsilon value: nan. eps must", True),
    Refusal("eps inf", {"eps": math.inf}, ValueError, r"Invalid epsilon value: inf. eps must lie in"),
    Refusal("eps str", {"eps": "1e-8"}, TypeError, "eps must be a number or .*, got str"),
    Refusal("eps None", {"eps": None}, TypeError, "eps must be a number or .*, got NoneType"),
    Refusal("beta1 one", {"betas": (1.0, 0.9)}, ValueError, f"at index 0: 1.0. {BETAS}", True),
    Refusal("beta1 negative", {"betas": (-0.5, 0.9)}, ValueError, f"at index 0: -0.5. {BETAS}", True),
    Refusal("beta1 nan", {"betas": (math.nan, 0.9)}, ValueError, f"at index 0: nan. {BETAS}", True),
    Refusal("beta2 one", {"betas": (0.9, 1.0)}, ValueError, f"at index 1: 1.0. {BETAS}", True),
    Refusal("beta2 inf", {"betas": (0.9, math.inf)}, ValueError, f"at index 1: inf. {BETAS}", True),
    Refusal("beta2 nan", {"betas": (0.9, math.nan)}, ValueError, f"at index 1: nan. {BETAS}", True),
    Refusal("no betas", {"betas": ()}, ValueError, rf"Invalid betas: \(\). {PAIR}"),
    Refusal("one beta", {"betas": (0.9,)}, ValueError, rf"Invalid betas: \(0.9,\). {PAIR}"),
    Refusal("three betas", {"betas": (0.9, 0.9, 0.9)}, ValueError, rf"0.9, 0.9, 0.9\). {PAIR}"),
    Refusal("betas number", {"betas": 0.9}, TypeError, f"0.9. {PAIR}"),
    Refusal("betas None", {"betas": None}, TypeError, f"None. {PAIR}"),
    Refusal("betas str", {"betas": "99"}, TypeError, f"'99'. {PAIR}"),
    Refusal("betas of str", {"betas": ("0.9", 0.9)}, TypeError, r"betas\[0\] must be a number"),
    Refusal("weight_decay negative", {"weight_decay": -1}, ValueError, r"decay value: -1.0. .*\[0, inf\)"),
    Refusal("weight_decay nan", {"weight_decay": math.nan}, ValueError, "Invalid weight_decay value: nan. "),
    Refusal("weight_decay str", {"weight_decay": "0"}, TypeError, "weight_decay must be a number or .*, got str"),
    Refusal("amsgrad int", {"amsgrad": 1}, TypeError, "amsgrad must be True or False, got 1"),
    Refusal("maximize int", {"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
    Refusal("maximize None", {"maximize": None}, TypeError, "maximize must be .*, got None"),
    Refusal("torch_eps int", {"torch_eps": 0}, TypeError, "torch_eps must be .*, got 0"),
    Refusal("torch_eps str", {"torch_eps": "yes"}, TypeError, "torch_eps must be .*, got 'yes'"),
]
CONSTRUCTOR_REFUSALS = [
    *OPTION_REFUSALS,
    Refusal("lr zero", {"lr": 0.0}, ValueError, r"rate: 0.0. lr must lie in \(0, inf\)", True),
    Refusal("lr int zero", {"lr": 0}, ValueError, r"rate: 0.* lr must lie in \(0, inf\)", True),
]


def names(cases: list[Any]) -> list[str]:
    return [case.name for case in cases]


def message_of(call: Callable[[], object], error: type[Exception] = Exception) -> str:
    with pytest.raises(error) as raised:
        call()
    assert error is Exception or type(raised.value) is error
    return str(raised.value)


@pytest.mark.parametrize("case", CONSTRUCTOR_REFUSALS, ids=names(CONSTRUCTOR_REFUSALS))
def test_the_constructor_refuses_an_option_out_of_range(case: Refusal) -> None:
    ours = message_of(lambda: SparseAdam([torch.zeros(3, 2)], **case.options), case.error)
    assert re.search(case.pattern, ours)
    if case.torch_says:
        theirs = message_of(lambda: torch.optim.SparseAdam([torch.zeros(3, 2)], **case.options))
        assert ours.startswith(theirs)


@pytest.mark.parametrize("case", OPTION_REFUSALS, ids=names(OPTION_REFUSALS))
def test_the_constructor_refuses_a_group_whose_option_is_out_of_range(case: Refusal) -> None:
    groups = [{"params": [torch.zeros(3, 2)]}, {"params": [torch.zeros(3, 2)], **case.options}]
    message = message_of(lambda: SparseAdam(groups), case.error)
    assert re.search(f"{case.pattern}.*parameter group 1", message)


@pytest.mark.parametrize("case", OPTION_REFUSALS, ids=names(OPTION_REFUSALS))
def test_add_param_group_refuses_an_option_out_of_range_and_adds_nothing(case: Refusal) -> None:
    run, undisturbed = Run("reference"), Run("reference")
    before = snapshot(run.optimizer)
    group: dict[str, Any] = {"params": [("more", Parameter(torch.zeros(3, 2)))], **case.options}
    message = message_of(lambda: run.optimizer.add_param_group(group), case.error)
    assert re.search(f"{case.pattern}.*parameter group 2", message)
    assert snapshot(run.optimizer) == before
    assert_goes_on_alike(run, undisturbed)


def sparse_table() -> Parameter:
    return Parameter(raw([[0]], torch.ones(1, 2), (3, 2), check_invariants=True))


def csr_table() -> Parameter:
    return Parameter(torch.eye(3).to_sparse_csr())


def table_of(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: Parameter(torch.zeros(3, 2).to(dtype), requires_grad=False)


class BadTable(NamedTuple):
    """A parameter that cannot be a table."""

    name: str
    make: Callable[[], torch.Tensor]
    pattern: str
    torch_says: bool = False


BAD_TABLES = [
    BadTable(
        "sparse",
        sparse_table,
        r"Sparse params at indices \[\[{0}, 1\]\]: SparseAdam requires dense .*Keep the table dense",
        True,
    ),
    BadTable("csr", csr_table, r"Sparse params at indices \[\[{0}, 1\]\].*Keep the table dense"),
    BadTable(
        "complex",
        table_of(torch.complex64),
        r"Complex params at indices \[\[{0}, 1\]\]: SparseAdam does not support complex .*view_as_real",
        True,
    ),
    *(
        BadTable(
            str(dtype),
            table_of(dtype),
            rf"at indices \[{{0}}, 1\] \({str(dtype).removeprefix('torch.')}\).*"
            r"float32, float64, bfloat16, float16.*Convert the table",
        )
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    ),
]


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.parametrize("case", BAD_TABLES, ids=names(BAD_TABLES))
def test_a_parameter_that_is_no_table_is_refused(case: BadTable) -> None:
    def build(optimizer: Any) -> Any:
        return optimizer([{"params": [torch.zeros(3, 2)]}, {"params": [torch.zeros(3, 2), case.make()]}])

    ours = message_of(lambda: build(SparseAdam), ValueError)
    assert re.search(case.pattern.format(1), ours)
    if case.torch_says:
        assert ours.startswith(message_of(lambda: build(torch.optim.SparseAdam)))


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.parametrize("case", BAD_TABLES, ids=names(BAD_TABLES))
def test_add_param_group_refuses_a_parameter_that_is_no_table_and_adds_nothing(
    case: BadTable,
) -> None:
    run, undisturbed = Run("reference"), Run("reference")
    before = snapshot(run.optimizer)
    params = [("good", Parameter(torch.zeros(3, 2))), ("bad", case.make())]
    message = message_of(lambda: run.optimizer.add_param_group({"params": params}), ValueError)
    assert re.search(case.pattern.format(2), message)
    assert snapshot(run.optimizer) == before
    assert_goes_on_alike(run, undisturbed)
    run.optimizer.add_param_group({"params": params[:1]})
    assert len(run.optimizer.param_groups) == 3


def test_all_parameters_with_the_same_fault_are_named_together() -> None:
    groups = [
        {"params": [sparse_table(), torch.zeros(3, 2)]},
        {"params": [torch.zeros(3, 2), sparse_table()]},
    ]
    ours = message_of(lambda: SparseAdam(groups), ValueError)
    assert ours.startswith(message_of(lambda: torch.optim.SparseAdam(groups)))
    assert "[[0, 0], [1, 1]]" in ours


def non_leaf() -> torch.Tensor:
    return torch.zeros(3, 2, requires_grad=True) * 2


TWICE = torch.zeros(3, 2)
PARAMS_REFUSALS: list[tuple[str, Callable[[], Any], type[Exception]]] = [
    ("non-leaf", lambda: [non_leaf()], ValueError),
    ("a tensor", lambda: torch.zeros(3, 2), TypeError),
    ("no tensor", lambda: [3.0], TypeError),
    ("none at all", lambda: [], ValueError),
    ("a set", lambda: [{"params": {torch.zeros(3, 2)}}], TypeError),
    ("in two groups", lambda: [{"params": [TWICE]}, {"params": [TWICE]}], ValueError),
    ("some named", lambda: [{"params": [("a", TWICE), torch.zeros(3)]}], Exception),
]


@pytest.mark.parametrize(
    ("make", "error"),
    [case[1:] for case in PARAMS_REFUSALS],
    ids=[case[0] for case in PARAMS_REFUSALS],
)
def test_params_that_torch_refuses_are_refused_in_its_words(make: Callable[[], Any], error: type[Exception]) -> None:
    ours = message_of(lambda: SparseAdam(make()), error)
    theirs = message_of(lambda: torch.optim.SparseAdam(make()), error)
    assert ours.startswith(theirs)


def test_a_dense_gradient_is_refused_beginning_with_the_words_of_torch() -> None:
    def step(optimizer: Any) -> None:
        table = Parameter(torch.zeros(3, 2))
        table.grad = torch.ones(3, 2)
        optimizer([table]).step()

    ours = message_of(lambda: step(SparseAdam), RuntimeError)
    assert ours.startswith(message_of(lambda: step(torch.optim.SparseAdam), RuntimeError))


# Backends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "Native", "", 1, ["native"]])
def test_an_unknown_backend_is_refused_with_those_there_are(backend: Any) -> None:
    pattern = rf"^Unknown backend: {re.escape(repr(backend))}\. .*'native', 'triton', 'reference', or None\.$"
    with pytest.raises(ValueError, match=pattern):
        SparseAdam([torch.zeros(3, 2)], backend=backend)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that was built without its native module, and has not yet warned of it."""
    native.instruction_set.cache_clear()
    monkeypatch.setattr(native, "_load", lambda: (None, "No module named 'sparseadam._native'"))
    monkeypatch.setattr(update, "_warned_slow", False)


@pytest.mark.usefixtures("without_native")
def test_the_native_backend_is_refused_with_the_reason_where_it_is_missing() -> None:
    with pytest.raises(ImportError, match=r'backend="native" is not available') as raised:
        SparseAdam([torch.zeros(3, 2)], backend="native")
    message = str(raised.value)
    assert "the native module is missing from this installation" in message
    assert "C++17 compiler" in message
    assert 'backend="reference"' in message
    listed = {backend.name: backend for backend in sparseadam.backends()}
    assert not listed["native"].available
    assert "missing" in listed["native"].detail


@pytest.mark.usefixtures("without_native")
def test_where_native_is_missing_no_backend_named_warns_once_and_runs_on_the_reference() -> None:
    with pytest.warns(UserWarning, match="slow reference backend") as warned:
        run = Run(None, bare=True)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    text = str(warned[0].message)
    assert "the native module is missing" in text
    assert 'backend="reference"' in text

    Run(None, bare=True)  # a second warning would be an error here
    Run("reference", bare=True)
    assert_goes_on_alike(run, Run("reference", bare=True))


@pytest.mark.usefixtures("without_native")
def test_a_named_reference_backend_never_warns_of_the_missing_one() -> None:
    Run("reference")
    with pytest.warns(UserWarning, match="slow reference backend"):
        Run(None)


def test_a_native_module_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"undefined symbol in {name}")

    monkeypatch.setattr(native.importlib, "import_module", fail)
    native._load.cache_clear()
    try:
        reason = native.missing_reason()
    finally:
        native._load.cache_clear()
    assert reason is not None
    assert "undefined symbol in sparseadam._native" in reason


@needs_native
def test_a_table_that_native_cannot_update_goes_to_the_reference_unless_native_is_named() -> None:
    runs = {choice: begun_natively(choice) for choice in (None, "native", "reference")}
    for run in runs.values():
        run.target.data = run.target.data.t().contiguous().t()
        run.set_gradients()
    message = assert_refused_and_unchanged(runs["native"], RuntimeError, NAMED_PLACE)
    assert 'backend="native" cannot update' in message
    runs[None].step()
    runs["reference"].step()
    assert bits(runs[None].target) == bits(runs["reference"].target)


@needs_native
def test_a_number_of_another_type_counts_as_it_stands(backend: str) -> None:
    class Rate:
        value = 0.5

        def __float__(self) -> float:
            return self.value

    rate = Rate()
    table = Parameter(torch.zeros(4, 2))
    optimizer = SparseAdam([table], lr=rate, eps=np.float32(1e-8), backend=backend)  # type: ignore[arg-type]
    table.grad = coo([1], torch.ones(1, 2), table.shape)
    for _ in range(3):
        optimizer.step()
    assert torch.allclose(table[1], torch.tensor(-1.5))
    rate.value = 0.0
    optimizer.step()
    assert torch.allclose(table[1], torch.tensor(-1.5))


def test_a_step_that_finds_no_memory_for_moments_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where it is asked for as slots are given out; training may go on with a smaller batch."""
    table = Parameter(torch.zeros(100, 2))
    optimizer = SparseAdam([table], lr=0.1, backend="reference", nonfinite="skip")
    table.grad = coo([0, 1], torch.ones(2, 2), table.shape)
    optimizer.step()
    table.grad = coo([5, 6, 7], torch.tensor([[1.0, 1.0], [math.nan, 1.0], [1.0, 1.0]]), table.shape)
    before = snapshot(optimizer)

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Moments, "grow", refuse)
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.step()
    assert optimizer.state[table]["rows"].tolist() == [0, 1, 5, 7]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("has_stepped", [False, True])
def test_a_table_whose_storage_was_freed_is_refused(backend: str, has_stepped: bool) -> None:
    """As code that shards parameters frees them between passes."""
    table = Parameter(torch.ones(100, 2))
    optimizer = SparseAdam([table], lr=0.1, backend=backend)
    table.grad = coo([3], torch.ones(1, 2), table.shape)
    for _ in range(2 * has_stepped):
        optimizer.step()
    table.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage has been freed|storage of size 0"):
        optimizer.step()
    table.untyped_storage().resize_(800)
    assert optimizer.state[table].get("step", 0) == 2 * has_stepped


def test_a_table_that_changes_layout_in_the_same_memory_is_looked_at_anew() -> None:
    """What the native module knows of a table is kept from step to step; an address alone does not tell it."""
    memory = torch.arange(16.0)
    table = Parameter(memory.view(4, 4))
    optimizer = SparseAdam([table], backend="native")
    table.grad = raw([[1]], torch.ones(1, 4), (4, 4))
    optimizer.step()
    before = memory.clone()
    table.data = memory.view(4, 4).t()
    with pytest.raises(RuntimeError, match=r'backend="native" cannot update'):
        optimizer.step()
    assert torch.equal(memory, before)


@needs_native
def test_a_table_that_changes_dtype_in_the_same_memory_is_looked_at_anew() -> None:
    """As when a model is converted and the allocator gives the old address again: float32 and half share moments."""
    tables = {}
    for backend in ("native", "reference"):
        memory = torch.ones(4, 4)
        table = tables[backend] = Parameter(memory)
        optimizer = SparseAdam([table], backend=backend)
        table.grad = raw([[1]], torch.ones(1, 4), (4, 4))
        optimizer.step()
        table.grad = None
        table.data = memory.view(torch.bfloat16)[:, :4].fill_(1.0)
        table.grad = raw([[1]], torch.ones(1, 4, dtype=torch.bfloat16), (4, 4))
        optimizer.step()
    torch.testing.assert_close(tables["native"].detach(), tables["reference"].detach())


@needs_native
def test_a_table_with_more_rows_than_fit_is_refused_or_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = {choice: begun_natively(choice) for choice in (None, "native", "reference")}
    # The native module, were its entries narrower than the first and the last table need.
    monkeypatch.setattr(native, "_ALWAYS_FITS", 40)
    monkeypatch.setattr(native.module(), "fits", lambda num_rows, num_lookups: False)
    for run in runs.values():
        run.optimizer._steady_step = None  # it asks the module's own
        run.set_gradients()
    first = r"'users' \(group 0, parameter 0\)"
    message = assert_refused_and_unchanged(runs["native"], RuntimeError, first)
    assert "50 rows and 20 lookups do not fit" in message
    assert "backend=None" in message
    assert 'backend="reference"' in message

    updated: list[int] = []
    monkeypatch.setattr(
        reference,
        "_update_table",
        lambda entry, summed, call=reference._update_table: updated.append(entry.place) or call(entry, summed),
    )
    runs[None].step()
    assert [str(place).split()[0] for place in updated] == ["'users'", "'target'"]
    runs["reference"].step()
    for name in ("users", "target"):
        assert bits(runs[None].tables[name]) == bits(runs["reference"].tables[name])


@needs_native
def test_the_native_module_says_that_rows_and_lookups_share_64_bits() -> None:
    fits = native.module().fits
    assert fits(2**31 + 10, 2**20)
    assert fits(2**40, 2**24)
    assert not fits(2**40 + 1, 2**24)
    assert not fits(2**63 - 1, 3)
    assert fits(1, 2**32 - 1), "lookups are counted in 32 bits"
    assert not fits(1, 2**32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_31_bits_are_updated_and_no_row_number_wraps(backend: str) -> None:
    """Memory is reserved and not touched but around the rows looked up, so this takes little of it."""
    num_rows = 2**31 + 10
    try:
        memory = torch.empty(num_rows, 1, dtype=torch.bfloat16)
        ReservedArray(2 * num_rows, torch.float32)
        ReservedArray(num_rows, torch.int64)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"{num_rows} rows cannot be reserved here: {error}")
    rows = torch.tensor([2**31 - 1, 2**31, 2**31 + 9, 7, 2**31, 2**31 + 1])
    touched = rows.unique()
    # Where a row number would land if it lost its high bit, or its moments were addressed in 32 bits; and neighbours.
    others = torch.tensor([0, 1, 2, 6, 8, 9, 10, 2**30 - 1, 2**30, 2**30 + 4, 2**31 - 2, 2**31 + 8])
    memory[touched] = 1.0
    memory[others] = 2.0
    small = Parameter(torch.ones(len(touched), 1, dtype=torch.bfloat16))
    large = Parameter(memory)
    optimizers = [SparseAdam([table], lr=0.1, backend=backend) for table in (large, small)]
    for step in range(3):
        values = (torch.arange(6)[:, None] - 2.5 + step).to(torch.bfloat16)
        large.grad = raw(rows[None], values, large.shape, check_invariants=True)
        small.grad = raw(torch.searchsorted(touched, rows)[None], values, small.shape)
        for optimizer in optimizers:
            optimizer.step()

    assert torch.equal(large.detach()[touched], small.detach())
    assert (small != 1.0).all()
    assert (large[others] == 2.0).all()
    state, small_state = optimizers[0].state[large], optimizers[1].state[small]
    assert torch.equal(state["rows"], touched)
    for key in ("exp_avg", "exp_avg_sq"):
        assert bits(state[key]) == bits(small_state[key])

    for bad in (num_rows, -1, 2**32 + 7):
        large.grad = raw([[7, bad]], torch.ones(2, 1, dtype=torch.bfloat16), large.shape)
        before = snapshot(optimizers[1]), bits(state["exp_avg"]), bits(large.detach()[touched])
        with pytest.raises(IndexError, match=f"names row {bad}, but its table has rows 0 to 2147483657"):
            optimizers[0].step()
        after = snapshot(optimizers[1]), bits(state["exp_avg"]), bits(large.detach()[touched])
        assert after == before
