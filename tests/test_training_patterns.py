"""How people train: mixed precision, steps inside backward, accumulation, zero_grad, torch.compile; and the page on it.

What is said here of PyTorch was found with torch 2.13.0 and is said to users in docs/training.md. Several processes
have a file of their own.
"""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import snapshot
from torch import Tensor, nn

from sparseadam import SparseAdam, coalesce_grads_

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
PLAIN = "The plain loop"
SEVERAL_PROCESSES = "Several processes"  # run by test_distributed_data_parallel.py
MEMORY = "Memory of large batches"  # says how to start a program, and has no Python


def read_blocks() -> dict[str, str]:
    """Return the Python blocks of the page by the headings above them."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        if heading == MEMORY:
            continue
        (found[heading],) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return found


BLOCKS = read_blocks()


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """PyTorch's sparse additions wake all threads whatever the size, which a busy machine pays for."""
    torch.set_num_threads(1)


class Training:
    """A model with two tables and a dense layer, and an optimizer for either; a seed names a batch."""

    def __init__(self, backend: str) -> None:
        """Start from the same parameters every time."""
        torch.manual_seed(0)
        self.users = nn.Embedding(20, 4, sparse=True)
        self.items = nn.EmbeddingBag(30, 4, mode="sum", sparse=True)
        self.head = nn.Linear(8, 1)
        tables = [self.users.weight, self.items.weight]
        self.optimizers = [
            SparseAdam(tables, lr=0.1, backend=backend),
            torch.optim.Adam(self.head.parameters(), lr=0.1),
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, tables first."""
        return [self.users.weight, self.items.weight, *self.head.parameters()]

    def loss(self, seed: int, worst: float = 1.0) -> Tensor:
        """Return a loss in which users are looked up in two calls; ``worst`` multiplies the first example's."""
        generator = torch.Generator().manual_seed(seed)
        users = torch.randint(20, (2, 6), generator=generator)
        items = torch.randint(30, (6, 3), generator=generator)
        weights = torch.randn(6, generator=generator)
        weights[0] *= worst
        looked_up = torch.cat([self.users(users[0]).tanh() + self.users(users[1]), self.items(items)], dim=1)
        return (self.head(looked_up).squeeze(1).float() * weights).sum()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Step every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def train(self, seeds: Iterable[int]) -> None:
        """Train in the plain loop."""
        for seed in seeds:
            self.zero_grad()
            self.loss(seed).backward()
            self.step()

    def snapshot(self) -> list[dict[str, Any]]:
        """Return all that both optimizers hold."""
        return [snapshot(optimizer) for optimizer in self.optimizers]


def scaled_step(training: Training, scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """Take a step of all optimizers on a scaled loss."""
    training.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in training.optimizers:
        scaler.step(optimizer)
    scaler.update()


def sparse_gradient(table: Tensor, rows: list[int], values: list[float]) -> Tensor:
    """Make a gradient with a lookup for each row, all of whose elements are one value."""
    filled = torch.tensor(values, dtype=table.dtype)[:, None].repeat(1, table.shape[1])
    return torch.sparse_coo_tensor([rows], filled, table.shape, check_invariants=True)


def entries(gradient: Tensor | None) -> list[int]:
    """Return the row of each entry of a gradient."""
    assert gradient is not None
    return [int(row) for row in gradient._indices()[0]]


# Mixed precision ----------------------------------------------------------------------------------


def region(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_run_has_the_bits_of_the_unscaled_run(backend: str, dtype: torch.dtype | None) -> None:
    scaled, unscaled = Training(backend), Training(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for seed in range(6):
        with region(dtype):
            loss, unscaled_loss = scaled.loss(seed), unscaled.loss(seed)
        scaled_step(scaled, scaler, loss)
        unscaled.zero_grad()
        unscaled_loss.backward()
        unscaled.step()
    assert scaler.get_scale() == 2.0**11, "it has grown on the way"
    assert scaled.snapshot() == unscaled.snapshot()


def test_a_scale_saves_float16_gradients_that_would_become_zero(backend: str) -> None:
    for scale, is_saved in ((1.0, False), (2.0**16, True)):
        training = Training(backend)
        before = training.users.weight.detach().clone()
        with region(torch.float16):
            loss = training.loss(0)
        scaled_step(training, torch.amp.GradScaler("cpu", init_scale=scale), loss * 2.0**-28)
        assert torch.equal(training.users.weight, before) != is_saved


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("bad_seed", [0, 3])
def test_a_skipped_step_changes_nothing_and_training_goes_on(backend: str, bad: float, bad_seed: int) -> None:
    training, twin = Training(backend), Training(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for seed in range(6):
        before = training.snapshot()
        scaled_step(training, scaler, training.loss(seed, worst=bad if seed == bad_seed else 1.0))
        assert (training.snapshot() == before) == (seed == bad_seed)
    assert scaler.get_scale() == 2.0**7
    twin.train(seed for seed in range(6) if seed != bad_seed)
    assert training.snapshot() == twin.snapshot()


def test_the_scale_backs_off_until_float16_gradients_fit(backend: str) -> None:
    """Each optimizer is skipped for its own gradients: the head's overflow first, being sums over the batch."""
    training, twin = Training(backend), Training(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    patterns = []
    for seed in range(14):
        scale, before = scaler.get_scale(), training.snapshot()
        with region(torch.float16):
            loss, twin_loss = training.loss(seed), twin.loss(seed)
        scaled_step(training, scaler, loss)
        twin.zero_grad()
        twin_loss.backward()
        stepped = [now != then for now, then in zip(training.snapshot(), before, strict=True)]
        for optimizer, is_stepped in zip(twin.optimizers, stepped, strict=True):
            if is_stepped:
                optimizer.step()
        assert training.snapshot() == twin.snapshot()
        assert scaler.get_scale() == (scale if all(stepped) else scale / 2)
        patterns.append(stepped)
    assert patterns[0] == [False, False]
    assert [True, False] in patterns
    assert patterns[-1] == [True, True]


def test_a_scaler_refuses_float16_tables_before_it_coalesces(backend: str) -> None:
    table = nn.Embedding(10, 4, sparse=True, dtype=torch.float16)
    optimizer = SparseAdam(table.parameters(), backend=backend)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(table(torch.tensor([1, 2, 1])).sum()).backward()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    assert entries(table.weight.grad) == [1, 2, 1]
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_coalesced", [False, True], ids=["as it is", "coalesced"])
def test_a_sum_that_overflows_is_found_in_coalesced_gradients_only(
    backend: str, dtype: torch.dtype, is_coalesced: bool
) -> None:
    table = nn.Parameter(torch.ones(10, 4, dtype=dtype))
    optimizer = SparseAdam([table], backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    table.grad = sparse_gradient(table, [7, 2, 7], [3e38, 1.0, 3e38])
    if is_coalesced:
        coalesce_grads_([table])
    before = snapshot(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert (snapshot(optimizer) == before) == is_coalesced
    assert scaler.get_scale() == (0.5 if is_coalesced else 1.0)
    assert table.isnan().any(dim=1).nonzero().flatten().tolist() == ([] if is_coalesced else [7])


def test_a_sum_that_overflows_by_its_scale_alone_is_stepped_on_as_without_a_scaler(backend: str) -> None:
    table, twin = (nn.Parameter(torch.ones(10, 4)) for _ in range(2))
    optimizer, twin_optimizer = (SparseAdam([each], backend=backend) for each in (table, twin))
    scale = 2.0**126
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    rows = [7, 2, 7, 7, 7, 7]
    table.grad = sparse_gradient(table, rows, [scale] * 6)
    twin.grad = sparse_gradient(twin, rows, [1.0] * 6)
    assert not table.grad.coalesce()._values().isfinite().all()
    scaler.step(optimizer)
    twin_optimizer.step()
    assert snapshot(optimizer) == snapshot(twin_optimizer)


def test_a_finite_gradient_whose_square_overflows_passes_the_scaler_and_stops_its_row(backend: str) -> None:
    table = nn.Parameter(torch.ones(1, 4))
    optimizer = SparseAdam([table], backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for size in (2e19, 1.0):
        scaler.scale(torch.zeros(()))
        table.grad = sparse_gradient(table, [0], [size])
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[table]["step"] == 2
    assert optimizer.state[table]["exp_avg_sq"].isinf().all()
    assert torch.equal(table, torch.ones(1, 4))


def test_tables_whose_outputs_are_added_are_unscaled_twice_unless_coalesced() -> None:
    words, positions = (nn.Embedding(10, 4, sparse=True) for _ in range(2))
    optimizer = SparseAdam([words.weight, positions.weight])

    def unscaled_gradients(coalesce: bool) -> list[Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.zero_grad()
        added = words(torch.tensor([3, 7, 3])) + positions(torch.tensor([0, 1, 2]))
        scaler.scale((added * torch.ones(3, 4)).sum()).backward()
        if coalesce:
            coalesce_grads_([words.weight, positions.weight])
        scaler.unscale_(optimizer)
        return [table.weight.grad.to_dense() for table in (words, positions)]

    wanted = [torch.zeros(10, 4), torch.zeros(10, 4)]
    wanted[0][3], wanted[0][7] = 2.0, 1.0
    wanted[1][:3] = 1.0
    for found, want in zip(unscaled_gradients(coalesce=True), wanted, strict=True):
        assert torch.equal(found, want)
    for found, want in zip(unscaled_gradients(coalesce=False), wanted, strict=True):
        assert torch.equal(found, want / 1024), "a torch that no longer does this makes docs/training.md wrong"


def test_tables_of_bags_and_dense_parameters_get_gradients_of_their_own() -> None:
    ids, ones = torch.tensor([[3], [7], [3]]), torch.ones(3, 4)
    bags = [nn.EmbeddingBag(10, 4, mode="sum", sparse=True) for _ in range(2)]
    dense = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    ((bags[0](ids) + bags[1](ids) + dense[0] + dense[1]) * ones).sum().backward()
    memory = [bag.weight.grad._values().data_ptr() for bag in bags] + [each.grad.data_ptr() for each in dense]
    assert len(set(memory)) == 4


# A step inside the backward pass ------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True], ids=["an optimizer each", "one for both tables"])
def test_steps_in_backward_have_the_bits_of_the_plain_loop(backend: str, is_shared: bool) -> None:
    training, twin = Training(backend), Training(backend)
    if not is_shared:
        tables = [training.users.weight, training.items.weight]
        training.optimizers[:1] = [SparseAdam([table], lr=0.1, backend=backend) for table in tables]
    optimizer_of = {
        parameter: optimizer
        for optimizer in training.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    at_once: list[int] = []

    def step_and_free(parameter: Tensor) -> None:
        at_once.append(sum(each.grad is not None for each in training.parameters))
        optimizer_of[parameter].step()
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(step_and_free) for parameter in training.parameters]
    for seed in range(5):
        training.loss(seed).backward()
        assert all(parameter.grad is None for parameter in training.parameters)
    for handle in handles:
        handle.remove()
    assert at_once == [1] * 5 * 4, "one gradient at a time, each parameter once"
    twin.train(range(5))
    for found, want in zip(training.parameters, twin.parameters, strict=True):
        assert torch.equal(found, want)
    for table, its_twin in zip(training.parameters[:2], twin.parameters[:2], strict=True):
        state, want_state = optimizer_of[table].state[table], twin.optimizers[0].state[its_twin]
        assert state["step"] == want_state["step"] == 5
        for key in ("rows", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], want_state[key]), key


def test_a_step_refused_in_backward_raises_there_and_leaves_its_table(backend: str) -> None:
    good, bad = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2)
    optimizer = SparseAdam([good.weight, bad.weight], backend=backend)
    starts = [table.weight.detach().clone() for table in (good, bad)]

    def step_and_free(parameter: Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    handles = [table.weight.register_post_accumulate_grad_hook(step_and_free) for table in (good, bad)]
    # Gradients come in the reverse order of the lookups: the good one first.
    looked_up = bad(torch.tensor([1]))
    loss = (looked_up + good(torch.tensor([1])).tanh()).sum()
    with pytest.raises(RuntimeError, match=r"SparseAdam does not support dense gradients.*parameter 1"):
        loss.backward()
    for handle in handles:
        handle.remove()
    assert not torch.equal(good.weight, starts[0])
    assert torch.equal(bad.weight, starts[1])
    assert bad.weight not in optimizer.state


def test_removing_the_hooks_frees_the_optimizer(backend: str) -> None:
    """Until then table, hook and optimizer hold each other where garbage collection does not see it."""
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = SparseAdam(table.parameters(), backend=backend)
    handle = table.weight.register_post_accumulate_grad_hook(functools.partial(step_of, optimizer))
    table(torch.tensor([1])).sum().backward()
    is_alive = weakref.ref(optimizer)
    handle.remove()
    del table, optimizer, handle
    gc.collect()
    assert is_alive() is None


def step_of(optimizer: SparseAdam, _: Tensor) -> None:
    optimizer.step()


# Gradient accumulation ----------------------------------------------------------------------------


def lookups_of_pass(index: int) -> tuple[Tensor, Tensor]:
    """Return row numbers and their gradients, whose sums are exact in float32: the order of sums does not show."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(12, (9,), generator=generator), torch.randint(-8, 9, (9, 4), generator=generator).float()


def weighted(table: nn.Embedding, rows: Tensor, weights: Tensor) -> Tensor:
    return (table(rows) * weights.to(table.weight.dtype)).sum()


@pytest.mark.parametrize("is_coalesced", [False, True], ids=["as it is", "coalesced"])
def test_several_passes_make_the_step_of_one_over_the_joined_batch(backend: str, is_coalesced: bool) -> None:
    torch.manual_seed(0)
    table, twin = nn.Embedding(12, 4, sparse=True), nn.Embedding(12, 4, sparse=True)
    twin.load_state_dict(table.state_dict())
    optimizer, twin_optimizer = (SparseAdam(each.parameters(), lr=0.1, backend=backend) for each in (table, twin))
    for step in range(3):
        passes = [lookups_of_pass(8 * step + index) for index in range(8)]
        optimizer.zero_grad()
        touched: set[int] = set()
        for rows, weights in passes:
            weighted(table, rows, weights).backward()
            touched.update(rows.tolist())
            if is_coalesced:
                assert len(entries(table.weight.grad)) <= len(touched) + len(rows)
                coalesce_grads_(table.parameters())
                assert entries(table.weight.grad) == sorted(touched)
        if not is_coalesced:
            # Autograd merges both lists as if they were sorted and coalesced, and so sums few of the repeated rows.
            assert 4 * len(touched) < len(entries(table.weight.grad)) < 8 * 9
        twin_optimizer.zero_grad()
        weighted(twin, *(torch.cat(parts) for parts in zip(*passes, strict=True))).backward()
        optimizer.step()
        twin_optimizer.step()
        assert snapshot(optimizer) == snapshot(twin_optimizer)


def test_accumulation_rounds_half_precision_sums_that_a_single_pass_does_not(backend: str) -> None:
    rows, weights = torch.tensor([1, 1, 1]), torch.tensor([[256.0], [1.0], [1.0]])  # bfloat16 has no 257
    for parts, coalesce, want in ((1, False, 258.0), (3, False, 256.0), (3, True, 256.0)):
        table = nn.Embedding(3, 1, sparse=True, dtype=torch.bfloat16)
        optimizer = SparseAdam(table.parameters(), betas=(0.5, 0.999), backend=backend)
        for part in zip(rows.chunk(parts), weights.chunk(parts), strict=True):
            weighted(table, *part).backward()
            if coalesce:
                coalesce_grads_(table.parameters())
        optimizer.step()
        assert optimizer.state[table.weight]["exp_avg"].item() == 0.5 * want


# zero_grad ----------------------------------------------------------------------------------------


def test_a_loop_has_the_same_bits_with_either_zero_grad(backend: str) -> None:
    kept, dropped = Training(backend), Training(backend)
    gradients = set()
    for seed in range(5):
        kept.zero_grad(set_to_none=False)
        kept.loss(seed).backward()
        kept.step()
        gradients.add(id(kept.users.weight.grad))
    dropped.train(range(5))
    assert len(gradients) == 1, "the gradient stays the object that it is"
    assert kept.snapshot() == dropped.snapshot()


def test_zero_grad_that_keeps_a_gradient_keeps_no_entry_and_the_step_after_it_only_counts(backend: str) -> None:
    training = Training(backend)
    training.train(range(2))
    optimizer, tables = training.optimizers[0], training.parameters[:2]
    before = snapshot(optimizer)
    training.zero_grad(set_to_none=False)
    for table in tables:
        assert entries(table.grad) == []
        assert table.grad._values().shape == (0, 4)
        assert table.grad._values().untyped_storage().nbytes() == 0
    optimizer.step()
    assert [optimizer.state[table]["step"] for table in tables] == [3, 3]
    for table in tables:
        optimizer.state[table]["step"] = 2
    assert snapshot(optimizer) == before, "nothing but the step was counted"
    training.zero_grad()
    optimizer.step()
    assert snapshot(optimizer) == before, "with None there is no step to count"


# torch.compile ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile nothing that was compiled before, leave nothing behind, and start no pool of compiling processes."""
    from torch._inductor import config  # two seconds, which processes that import this file for the page can do without

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Inductor finds out what the compiler can do by compiling for half of the time; the processor's word is enough.
    with config.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):
        yield
    torch._dynamo.reset()


def test_a_compiled_model_has_sparse_gradients_and_no_graph_break(backend: str, fresh_compiler: None) -> None:
    """Without a code generator, so that bits can be compared; the page's block goes through inductor."""
    compiled, eager = Training(backend), Training(backend)
    loss = torch.compile(looked_up_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(1)
    for count in (4, 4, 7, 2, 9):
        rows = torch.randint(20, (count,), generator=generator), torch.randint(30, (count, 3), generator=generator)
        for training, its_loss in ((compiled, loss), (eager, looked_up_loss)):
            training.zero_grad()
            its_loss(training.users, training.items, training.head, *rows).backward()
            assert sorted(entries(training.users.weight.grad)) == sorted(rows[0].tolist())
            training.step()
    assert compiled.snapshot() == eager.snapshot()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "compiled once for all numbers of lookups"
    assert not counters["graph_break"]


# Dynamo looks at the gradients of what is on the stack where it breaks the graph, and warns of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_a_step_called_from_compiled_code_is_not_compiled(backend: str, fresh_compiler: None) -> None:

    def trained(*, compiles: bool) -> list[Tensor]:
        table = nn.Embedding.from_pretrained(torch.ones(20, 4), freeze=False, sparse=True)
        bias = nn.Parameter(torch.zeros(4))
        optimizer = SparseAdam([table.weight, bias], lr=0.1, dense_gradients="adam", backend=backend)

        def train(rows: Tensor) -> None:
            optimizer.zero_grad()
            (table(rows) + bias).square().sum().backward()
            optimizer.step()

        train_as_asked = torch.compile(train, backend="eager") if compiles else train
        for number in range(3):
            train_as_asked(torch.tensor([number, 1, 7]))
        return [table.weight.detach(), bias.detach()]

    assert all(map(torch.equal, trained(compiles=True), trained(compiles=False)))


def looked_up_loss(users: nn.Module, items: nn.Module, head: nn.Module, user_ids: Tensor, item_ids: Tensor) -> Tensor:
    return head(torch.cat([users(user_ids), items(item_ids)], dim=1)).tanh().sum()


# The page -----------------------------------------------------------------------------------------


def run(*headings: str) -> dict[str, Any]:
    """Run blocks of the page one after the other and return the names they leave."""
    names: dict[str, Any] = {"__name__": "training"}
    for heading in headings:
        exec(compile(BLOCKS[heading], f"<docs/training.md: {heading}>", "exec"), names)
    return names


def outcome(names: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parameters that a block ends with, and the moments of the tables, in which a wrong scale shows."""
    model, tables_optimizer, _ = names["model"], *names["optimizers"]
    found = dict(model.state_dict())
    for name in ("users", "items"):
        state = tables_optimizer.state[getattr(model, name).weight]
        assert state["step"] == len(names["batches"])
        found |= {f"{name}.{key}": state[key] for key in ("rows", "exp_avg", "exp_avg_sq")}
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """What the plain loop of the page ends with."""
    return outcome(run(PLAIN))


def test_the_plain_loop_of_the_page_trains(plain: dict[str, Tensor]) -> None:
    start = run(PLAIN)["build"]()[0].state_dict()
    assert not any(torch.equal(plain[name], value) for name, value in start.items())


def assert_like_plain(found: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float) -> None:
    """Compare parameters, in units of the learning rate, 0.01, and moments, in units of the largest."""
    for name, want in plain.items():
        if name.endswith("rows"):
            assert torch.equal(found[name], want)
        else:
            unit = want.abs().max().item() if "exp_avg" in name else 0.01
            difference = (found[name] - want).abs().max().item()
            assert difference <= tolerance * unit, (name, difference)


TOLERANCES = {
    "Mixed precision": 0.05,
    "A step inside the backward pass": 0.0,
    "Gradient accumulation": 1e-3,
    "zero_grad": 0.0,
    "torch.compile": 1e-3,
}


# torch's own, on importing inductor.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("heading", TOLERANCES)
def test_a_block_of_the_page_ends_like_the_plain_loop(
    heading: str, plain: dict[str, Tensor], fresh_compiler: None
) -> None:
    assert_like_plain(outcome(run(PLAIN, heading)), plain, TOLERANCES[heading])


def test_no_block_of_the_page_is_left_out() -> None:
    assert set(BLOCKS) == {PLAIN, SEVERAL_PROCESSES, *TOLERANCES}
