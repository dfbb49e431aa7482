"""A step whose tables look as they did is read by native code alone; whatever looks otherwise is checked again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import needs_steady_steps
from gradients import coo
from snapshot import snapshot
from torch import nn

import sparseadam.optimizer
from sparseadam import SparseAdam

pytestmark = needs_steady_steps


class Run:
    """Three tables in two groups, one of them viewed as 4 x 3 rows, with an optimizer that has stepped twice."""

    def __init__(self, **options: Any) -> None:
        """Build them, with options of all groups, and take the two steps."""
        torch.manual_seed(0)
        self.tables = [
            nn.Parameter(torch.randn(20, 6)),
            nn.Parameter(torch.randn(9)),
            nn.Parameter(torch.randn(4, 3, 2)),
        ]
        self.sparse_dims = [1, 1, 2]
        self.optimizer = SparseAdam([{"params": self.tables[:2]}, {"params": self.tables[2:], "lr": 0.1}], **options)
        self.replays = options.get("missed_steps") == "replay"
        self.num_general = 0
        self._count_general_steps()
        for seed in range(2):
            self.step(seed)
        self.num_general = 0

    def _count_general_steps(self) -> None:
        general = self.optimizer._step_generally

        def counted(options: Any) -> None:
            self.num_general += 1
            general(options)

        self.optimizer._step_generally = counted  # type: ignore[method-assign]

    def set_gradients(self, seed: int) -> None:
        """Give each table seven lookups drawn from a seed; rows that are behind are read before."""
        torch.manual_seed(seed)
        for table, sparse_dim in zip(self.tables, self.sparse_dims, strict=True):
            sizes = torch.tensor(table.shape[:sparse_dim])
            indices = (torch.rand(sparse_dim, 7) * sizes[:, None]).long()
            values = torch.randn(7, *table.shape[sparse_dim:]).to(table.dtype)
            if self.replays:
                rows = indices[0] if sparse_dim == 1 else indices[0] * table.shape[1] + indices[1]
                self.optimizer.catch_up(table, rows)
            table.grad = torch.sparse_coo_tensor(indices, values, table.shape, check_invariants=False)

    def step(self, seed: int) -> None:
        """Step on the gradients of a seed."""
        self.set_gradients(seed)
        self.optimizer.step()


def without_steady_steps(run: Run) -> Run:
    run.optimizer.__dict__["_steady_step"] = None
    return run


def test_what_looks_the_same_is_read_natively_with_the_same_result() -> None:
    steady, general = Run(), Run()
    for seed in range(2, 6):
        steady.step(seed)
        without_steady_steps(general).step(seed)
    assert steady.num_general == 0 and general.num_general == 4
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


def test_gradients_that_record_a_graph_are_read_natively_too() -> None:
    steady, general = Run(), Run()
    for run in (steady, general):
        run.set_gradients(2)
        for table in run.tables:
            assert table.grad is not None
            table.grad.requires_grad_()
    steady.optimizer.step()
    without_steady_steps(general).optimizer.step()
    assert steady.num_general == 0
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


def test_autograd_is_back_after_a_step_and_after_an_error_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_back() -> bool:
        return not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView)

    def fail(*_: Any) -> None:
        raise RuntimeError("no numbers for this step")

    run = Run()
    run.step(2)
    assert is_back()
    monkeypatch.setattr(sparseadam.optimizer, "step_scalars", fail)
    with pytest.raises(RuntimeError, match="no numbers"):
        run.step(3)
    assert run.num_general == 0
    assert is_back()


def exchange_memory(run: Run) -> None:
    run.tables[0].data = run.tables[0].data.clone()


def set_other_sparse_dim(run: Run) -> None:
    run.sparse_dims[2] = 1


def load_other_state(run: Run) -> None:
    donor = Run()
    donor.step(9)
    run.optimizer.load_state_dict(donor.optimizer.state_dict())


def forget_state(run: Run) -> None:
    del run.optimizer.state[run.tables[1]]


def forget_the_last_state(run: Run) -> None:
    del run.optimizer.state[run.tables[2]]


def exchange_moments(run: Run) -> None:
    run.optimizer.state[run.tables[1]] = copy.deepcopy(run.optimizer.state[run.tables[1]])


def put_state_last(run: Run) -> None:
    run.optimizer.state[run.tables[0]] = run.optimizer.state.pop(run.tables[0])


def add_table(run: Run) -> None:
    run.tables.append(nn.Parameter(torch.ones(5, 2)))
    run.sparse_dims.append(1)
    run.optimizer.add_param_group({"params": [run.tables[-1]]})


def append_table(run: Run) -> None:
    run.tables.append(nn.Parameter(torch.ones(5, 2)))
    run.sparse_dims.append(1)
    run.optimizer.param_groups[0]["params"].append(run.tables[-1])


def take_table_out(run: Run) -> None:
    run.optimizer.param_groups[0]["params"] = run.optimizer.param_groups[0]["params"][:1]


def exchange_tables(run: Run) -> None:
    run.optimizer.param_groups[0]["params"].reverse()


@pytest.mark.parametrize(
    "change",
    [
        exchange_memory,
        set_other_sparse_dim,
        load_other_state,
        forget_state,
        forget_the_last_state,
        exchange_moments,
        put_state_last,
        add_table,
        append_table,
        take_table_out,
        exchange_tables,
    ],
)
def test_what_looks_otherwise_goes_the_general_way_once(change: Callable[[Run], None]) -> None:
    steady, general = Run(), Run()
    for run in (steady, general):
        change(run)
    for seed in range(2, 5):
        steady.step(seed)
        without_steady_steps(general).step(seed)
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)
    assert steady.num_general == 1


def share_memory(run: Run) -> None:
    run.tables[0].data = run.tables[0].data.clone().share_memory_()


def exchange_strides(run: Run) -> None:
    run.tables[0].data = torch.cat([run.tables[0].data] * 2, dim=1)[:, :6]


def exchange_dtype(run: Run) -> None:
    run.tables[0].data = run.tables[0].data.bfloat16()


@pytest.mark.parametrize("change", [exchange_memory, share_memory, exchange_strides, exchange_dtype])
def test_a_table_that_changed_before_a_general_step_of_others_is_looked_at(change: Callable[[Run], None]) -> None:
    """A general step lists every table anew, those without a gradient in it, too."""
    steady, general = Run(), Run()
    for run in (steady, general):
        change(run)
        run.set_gradients(2)
        run.tables[0].grad = None
        without_steady_steps(run).optimizer.step()
        run.num_general = 0
    for seed in range(3, 5):
        for run in (steady, general):
            run.set_gradients(seed)
        steady.optimizer.step()
        without_steady_steps(general).optimizer.step()
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)
    assert steady.num_general == 1


def test_an_option_of_a_table_that_changed_before_a_general_step_of_others_counts() -> None:
    taken = []
    for is_steady in (True, False):
        tables = [nn.Parameter(torch.ones(20, 64, dtype=torch.bfloat16)) for _ in range(2)]
        generator = torch.Generator().manual_seed(0)
        optimizer = SparseAdam(tables, lr=1e-4, generator=generator, stochastic_rounding=True)

        def step(which: int, tables: list[nn.Parameter] = tables, optimizer: SparseAdam = optimizer) -> None:
            optimizer.zero_grad()
            tables[which].grad = coo([[3]], torch.ones(1, 64, dtype=torch.bfloat16), (20, 64))
            optimizer.step()

        optimizer.param_groups[0]["stochastic_rounding"] = False
        step(0)
        optimizer.param_groups[0]["stochastic_rounding"] = True
        step(1)
        for _ in range(10):
            if not is_steady:
                optimizer.__dict__["_steady_step"] = None
            step(0)
        taken.append(tables[0].clone())
    assert torch.equal(*taken)
    assert not torch.equal(taken[0], torch.ones_like(taken[0]))  # lr is too small a step to nearest


def test_rows_that_lie_otherwise_in_the_same_memory_are_found() -> None:
    """The table begins where it did and has the shape that it had."""
    found = []
    for is_steady in (True, False):
        memory = torch.ones(20, 12)
        table = nn.Parameter(memory[:, :6])
        optimizer = SparseAdam([table], lr=0.1)
        for step in range(4):
            if step == 2:
                table.data = memory.view(-1)[:120].view(20, 6)
            if not is_steady:
                optimizer.__dict__["_steady_step"] = None
            table.grad = torch.sparse_coo_tensor([[3, 17]], torch.ones(2, 6), table.shape, check_invariants=True)
            optimizer.step()
        found.append(memory)
    assert torch.equal(found[0], found[1])


def test_what_changes_without_a_check_is_read_anew() -> None:
    steady, general = Run(), Run()
    for run in (steady, general):
        run.optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), eps=1e-3, maximize=True)
        run.optimizer.state[run.tables[0]]["step"] = 7
        run.optimizer.state[run.tables[2]]["exp_avg"].mul_(3)
    steady.step(3)
    without_steady_steps(general).step(3)
    assert steady.num_general == 0
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


def replaying_runs() -> tuple[Run, Run]:
    """Return two runs with missed steps replayed, the second of which never steps steadily."""
    return Run(weight_decay=0.1, missed_steps="replay"), Run(weight_decay=0.1, missed_steps="replay")


def assert_same_when_flushed(runs: tuple[Run, Run]) -> None:
    for is_flushed in (False, True):
        if is_flushed:
            for run in runs:
                run.optimizer.flush()
        assert snapshot(runs[0].optimizer) == snapshot(runs[1].optimizer)


def test_missed_steps_are_noted_in_steady_steps_too() -> None:
    """Rows miss some, at other learning rates, and a flush in between begins another history."""
    steady, general = replaying_runs()
    for seed in range(2, 40):
        for run in (steady, general):
            if seed == 20:
                run.optimizer.flush()
            run.set_gradients(seed)
            run.optimizer.param_groups[0]["lr"] = 0.01 * seed
            run.tables[seed % 2].grad = None
            if run is general:
                without_steady_steps(run)
            run.optimizer.step()
    assert steady.num_general == 0 and general.num_general == 38
    assert_same_when_flushed((steady, general))


def test_rows_that_are_behind_go_the_general_way_which_refuses_them() -> None:
    steady, general = replaying_runs()
    for run in (steady, general):
        run.step(2)
        before = snapshot(run.optimizer)
        run.tables[1].grad = coo(torch.arange(9)[None], torch.ones(9), (9,))
        with pytest.raises(RuntimeError, match="rows that are behind"):
            run.optimizer.step()
        assert snapshot(run.optimizer) == before
        without_steady_steps(general)
        run.step(3)
    assert steady.num_general == 1
    assert_same_when_flushed((steady, general))


def test_rows_catch_up_where_their_table_lies_by_now() -> None:
    """What native code was told of a table in its last general step may be of before."""
    moved, unmoved = replaying_runs()
    kept = [moved.tables[0].data]  # or the next memory might be the same
    for seed in (2, 3):
        kept.append(kept[-1].clone())
        moved.tables[0].data = kept[-1]
        moved.step(seed)
        unmoved.step(seed)
    assert_same_when_flushed((moved, unmoved))


def lower_lr(group: dict[str, Any]) -> None:
    group["lr"] /= 2


def lower_lr_in_place(group: dict[str, Any]) -> None:
    group["lr"].mul_(0.5)


def lower_beta_in_place(group: dict[str, Any]) -> None:
    group["betas"][0] *= 0.5


def lower_beta_in_a_tuple_in_place(group: dict[str, Any]) -> None:
    group["betas"][0].mul_(0.5)


LRS = (0.5, 0.25, 0.125)
BETAS = ((0.75, 0.875), (0.375, 0.875), (0.1875, 0.875))


@pytest.mark.parametrize(
    ("name", "value", "lower", "numbers"),
    [
        ("lr", 0.5, lower_lr, LRS),
        ("lr", torch.tensor(0.5), lower_lr_in_place, LRS),
        ("betas", [0.75, 0.875], lower_beta_in_place, BETAS),
        ("betas", (torch.tensor(0.75), torch.tensor(0.875)), lower_beta_in_a_tuple_in_place, BETAS),
    ],
)
def test_an_option_counts_as_it_stands(
    name: str, value: Any, lower: Callable[[dict[str, Any]], None], numbers: tuple[Any, ...]
) -> None:
    steady, general = Run(), Run()
    group = steady.optimizer.param_groups[0]
    group[name] = copy.deepcopy(value)
    for seed in range(2, 8):
        general.optimizer.param_groups[0][name] = numbers[(seed - 2) // 2]
        without_steady_steps(general).step(seed)
        steady.step(seed)
        if seed in (3, 5):
            lower(group)
    assert steady.num_general == 0
    for table, expected in zip(steady.tables, general.tables, strict=True):
        assert torch.equal(table, expected)


def set_to_nonsense(group: dict[str, Any]) -> None:
    group["eps"] = -1.0


def take_out(group: dict[str, Any]) -> None:
    del group["eps"]


def take_out_the_last(group: dict[str, Any]) -> None:
    assert group.popitem() == ("torch_eps", False)


def rename_the_last(group: dict[str, Any]) -> None:
    take_out_the_last(group)
    group["torch_epsilon"] = False


@pytest.mark.parametrize("spoil", [set_to_nonsense, take_out, take_out_the_last, rename_the_last])
def test_an_option_spoiled_between_steady_steps_is_an_error(spoil: Callable[[dict[str, Any]], None]) -> None:
    run = Run()
    run.step(2)
    before = snapshot(run.optimizer)
    group = run.optimizer.param_groups[1]
    options = dict(group)
    spoil(group)
    with pytest.raises(ValueError, match="eps"):
        run.step(3)
    group.clear()
    group.update(options)
    assert snapshot(run.optimizer) == before


def test_a_table_without_a_gradient_is_passed_over_and_one_without_lookups_counts_a_step() -> None:
    run = Run()
    before = run.tables[0].clone()
    run.set_gradients(2)
    run.tables[0].grad = None
    run.tables[1].grad = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.long), torch.empty(0), (9,), check_invariants=True
    )
    versions = [table._version for table in run.tables]
    run.optimizer.step()
    assert run.num_general == 0
    assert torch.equal(run.tables[0], before)
    assert [run.optimizer.state[table]["step"] for table in run.tables] == [2, 3, 3]
    assert [table._version - version for table, version in zip(run.tables, versions, strict=True)] == [0, 0, 1]


@pytest.mark.parametrize("part", ["indices", "values"])
def test_lookups_that_are_not_contiguous_go_the_general_way(part: str) -> None:
    """Indices are small, so that they would be inside the table in whatever order they are read."""
    steady, general = Run(), Run()
    for run in (steady, general):
        run.set_gradients(2)
        grad = run.tables[2].grad
        assert grad is not None
        lookups = {"indices": grad._indices() % 3, "values": grad._values()}
        if run is general:
            lookups[part] = lookups[part].t().contiguous().t()
            assert not lookups[part].is_contiguous()
        run.tables[2].grad = torch.sparse_coo_tensor(**lookups, size=grad.shape, check_invariants=False)
    for run in (steady, general):
        run.optimizer.step()
    assert (steady.num_general, general.num_general) == (0, 1)
    assert snapshot(steady.optimizer) == snapshot(general.optimizer)


def test_tables_that_native_code_cannot_walk_go_the_general_way_at_each_step() -> None:
    run = Run()
    run.tables[0].data = run.tables[0].data.t().contiguous().t()
    for seed in range(2, 5):
        run.step(seed)
    assert run.num_general == 3


def test_an_index_outside_its_table_is_found_and_nothing_is_changed() -> None:
    run = Run()
    run.set_gradients(2)
    grad = run.tables[2].grad
    assert grad is not None
    grad._indices()[1, 3] = 3
    before = snapshot(run.optimizer)
    with pytest.raises(IndexError, match=r"group 1, parameter 0 names index 3 in dimension 1"):
        run.optimizer.step()
    assert snapshot(run.optimizer) == before


def test_a_dense_gradient_after_sparse_ones_is_refused() -> None:
    run = Run()
    run.set_gradients(2)
    run.tables[0].grad = torch.zeros_like(run.tables[0])
    before = snapshot(run.optimizer)
    with pytest.raises(RuntimeError, match="dense"):
        run.optimizer.step()
    assert snapshot(run.optimizer) == before
