"""Compact moments: what they cost, how they grow, and that none of it shows in the numbers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref
from typing import Any

import pytest
import torch

from sparseadam import SparseAdam, _memory
from sparseadam._memory import Part


def touch(optimizer: SparseAdam, table: torch.nn.Parameter, rows: torch.Tensor) -> None:
    values = torch.arange(1.0, 1 + len(rows))[:, None].expand(-1, table.shape[1])
    table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)
    optimizer.step()


def test_only_touched_rows_have_moments_in_order_of_first_touch(backend: str) -> None:
    table = torch.nn.Parameter(torch.zeros(1000, 3))
    optimizer = SparseAdam([table], backend=backend)
    touch(optimizer, table, torch.tensor([700, 5, 700]))
    touch(optimizer, table, torch.tensor([5, 2, 999]))
    state = optimizer.state[table]
    assert state["rows"].tolist() == [5, 700, 2, 999]  # by step, and by row within a step
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (4, 3)
    assert state["exp_avg"][:, 0].tolist() == pytest.approx([0.9 * 0.2 + 0.1, 0.4, 0.2, 0.3])


def test_moment_bytes_count_touched_rows_and_the_index(backend: str) -> None:
    table = torch.nn.Parameter(torch.zeros(1000, 3))
    optimizer = SparseAdam([table], backend=backend)
    assert optimizer.moment_bytes() == 0
    touch(optimizer, table, torch.tensor([700, 5, 700]))
    assert optimizer.moment_bytes() == 2 * (2 * 3 * 4 + 8) + 1000 * 4


@pytest.mark.parametrize("num_rows", [50, 400_000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "bias_correction": "row", "weight_decay": 0.1, "weight_decay_mode": "exact"},
        {"second_moment": "row", "moment_dtype": torch.bfloat16},
        {"moment_dtype": torch.uint8},
    ],
    ids=["plain", "amsgrad, row steps, exact decay", "bfloat16, one second moment a row", "uint8"],
)
def test_moments_that_must_be_reallocated_hold_the_same_bits(
    num_rows: int, options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where address space cannot be reserved, moments grow by reallocation: more slots than fit, many times over."""

    def run() -> tuple[torch.Tensor, dict[str, object]]:
        table = torch.nn.Parameter(torch.zeros(num_rows, 5))
        seeded = torch.Generator().manual_seed(1)
        optimizer = SparseAdam([table], lr=0.1, generator=seeded, backend=backend, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            touch(optimizer, table, torch.randint(0, num_rows, (40,), generator=generator))
        return table.detach(), dict(optimizer.state[table])

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Cannot allocate memory")

    table, state = run()
    monkeypatch.setattr(_memory, "ReservedArray", refuse)
    grown_table, grown_state = run()
    assert torch.equal(grown_table, table)
    assert list(grown_state) == list(state)
    for name, part in state.items():
        assert torch.equal(torch.as_tensor(grown_state[name]), torch.as_tensor(part))


def test_growing_memory_reallocates_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parts but the one that moves, there is one copy in memory: the old one or the new one."""
    parts = {
        "rows": Part((), torch.int64, "rows"),
        "exp_avg": Part((4,), torch.float32, "moments"),
        "exp_avg_sq": Part((4,), torch.float32, "moments"),
    }
    memory = _memory.GrowingMemory(1000, parts, torch.device("cpu"))
    alive: list[weakref.ref[torch.Tensor]] = []
    held = []
    enlarge = _memory._enlarged

    def count(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
        larger = enlarge(tensor, capacity)
        alive.append(weakref.ref(larger))
        held.append(sum(part.nbytes for reference in alive if (part := reference()) is not None))
        return larger

    monkeypatch.setattr(_memory, "_enlarged", count)
    memory.grow(100)
    for number, part in enumerate(memory.all_parts(100).values()):
        part.fill_(number + 1)
    memory.grow(101)
    assert memory.capacity == 150
    for number, part in enumerate(memory.all_parts(150).values()):
        assert (part[:100] == number + 1).all() and not part[100:].any()

    old, new = 100, 150
    row, moment = 8, 4 * 4  # bytes of a slot
    assert held == [
        old * row,
        old * (row + moment),
        old * (row + 2 * moment),
        old * (row + 2 * moment) + new * row,
        old * 2 * moment + new * (row + moment),
        old * moment + new * (row + 2 * moment),
    ]


def test_views_handed_out_earlier_stay_valid_while_moments_grow(backend: str) -> None:
    table = torch.nn.Parameter(torch.zeros(300_000, 4))
    optimizer = SparseAdam([table], backend=backend)
    touch(optimizer, table, torch.tensor([7]))
    early = optimizer.state[table]["exp_avg"]
    touch(optimizer, table, torch.arange(200_000))
    assert torch.equal(early, optimizer.state[table]["exp_avg"][:1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_resident_memory_is_what_the_touched_rows_need(backend: str) -> None:
    """A table of 2,000,000 x 64, 1 % touched in ten steps: dense moments would be 1 GB, these are 10 MB.

    Runs in a process of its own, whose resident set nothing else changes. The bound leaves 16 MB for the allocator,
    lazily loaded code and the index (8 MB).
    """
    script = f"""
        import torch
        from sparseadam import SparseAdam
        def resident():
            with open("/proc/self/status") as status:
                fields = dict(line.split(":", 1) for line in status)
            return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
        def step(optimizer, table, rows):
            values = torch.ones(len(rows), 64)
            table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)
            optimizer.step()
            table.grad = None
        warm = torch.nn.Parameter(torch.zeros(5000, 64))
        step(SparseAdam([warm], backend={backend!r}), warm, torch.arange(2000))
        table = torch.nn.Parameter(torch.empty(2_000_000, 64))   # its untouched pages are not resident either
        optimizer = SparseAdam([table], backend={backend!r})
        before, _ = resident()
        for part in range(10):
            step(optimizer, table, torch.arange(2000) * 10 + part * 200_000)
        after, peak = resident()
        touched_pages_of_the_table = 20_000 * 4096
        print(after - before - touched_pages_of_the_table, peak - before - touched_pages_of_the_table)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    resident, peak = map(int, done.stdout.split())
    moments = 20_000 * (2 * 64 * 4 + 8)
    allowance = 16 << 20
    assert resident < 1.15 * moments + allowance
    assert peak < 1.3 * moments + allowance


def test_a_table_without_slots_yet_takes_another_sparse_dim_with_what_it_owes(backend: str) -> None:
    table = torch.nn.Parameter(torch.ones(4, 3))
    options = {"weight_decay": 0.5, "weight_decay_mode": "exact", "bias_correction": "row"}
    optimizer = SparseAdam([table], lr=0.1, backend=backend, **options)
    for sparse_dim in (2, 1, 2):
        no_lookups = torch.empty(sparse_dim, 0, dtype=torch.long), torch.empty(0, *table.shape[sparse_dim:])
        table.grad = torch.sparse_coo_tensor(*no_lookups, table.shape, check_invariants=True)
        optimizer.step()
    optimizer.flush()
    assert optimizer.state[table]["step"] == 3
    torch.testing.assert_close(table.detach(), torch.full((4, 3), 0.95**3))
