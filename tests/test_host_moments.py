"""Moments on the host for tables on a device.

No device is at hand here. All that is done for one is done to tables on the CPU instead, as if their moments were
elsewhere; what is left out is that the copies cross a bus, and that they do so from pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from gradients import coo
from torch.nn import Parameter

from sparseadam import SparseAdam, _memory
from sparseadam.update import _types, host, triton

CPU_BACKENDS = [name for name in BACKENDS if name != "triton"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "weight_decay_mode": "exact", "bias_correction": "row", "amsgrad": True},
    {"second_moment": "row", "moment_dtype": torch.bfloat16, "nonfinite": "skip"},
    {"moment_dtype": torch.uint8, "maximize": True, "torch_eps": True},
]
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[host.Visit]]:
    """Treats every table as one whose moments are elsewhere; the visits that this led to."""
    seen: list[host.Visit] = []
    fetch_rows = host.fetch_rows

    def note(update: Any) -> host.Visit:
        seen.append(fetch_rows(update))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(host, "is_apart", lambda update: True)
        patch.setattr(host, "fetch_rows", note)
        yield seen


def run(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], sparse_dim: int, options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A table and its state after steps with repeated rows, new ones and none."""
    draw = torch.Generator().manual_seed(5)
    # Every second column of a larger table: rows that lie apart, with elements that do.
    table = Parameter(torch.randn(*shape, 2, generator=draw).to(dtype)[..., 0])
    rounds = dtype in (torch.bfloat16, torch.float16)
    seeded = torch.Generator().manual_seed(1)
    optimizer = SparseAdam([table], lr=0.1, backend=backend, generator=seeded, stochastic_rounding=rounds, **options)
    for num_lookups in (1, 30, 0, 30):
        sizes = shape[:sparse_dim]
        indices = torch.stack([torch.randint(size, (num_lookups,), generator=draw) for size in sizes])
        values = torch.randn(num_lookups, *shape[sparse_dim:], generator=draw).to(dtype)
        if num_lookups == 30 and "nonfinite" in options:
            values[3] = torch.inf
        table.grad = coo(indices, values, shape)
        optimizer.step()
    optimizer.flush()
    return table.detach(), dict(optimizer.state[table])


@pytest.mark.parametrize("shape, sparse_dim", [((40, 9), 1), ((5, 4, 3), 2), ((30, 130), 1), ((25,), 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_visit_gives_the_bits_of_a_step_in_place(
    dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...], sparse_dim: int, visits: list[host.Visit]
) -> None:
    """Slots, random bits and skipped rows are those of the rows' places in the whole table."""
    backend = CPU_BACKENDS[0]
    table, state = run(backend, dtype, shape, sparse_dim, options)
    assert len(visits) == 3 and visits[-1].update.table.is_contiguous()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "is_apart", lambda update: False)
        # In place, the native backend refuses such a table.
        expected_table, expected = run("reference", dtype, shape, sparse_dim, options)
    assert list(state) == list(expected)
    assert torch.equal(state["rows"], expected["rows"])
    for name in state:
        got, want = torch.as_tensor(state[name]).double(), torch.as_tensor(expected[name]).double()
        assert got.shape == want.shape
        if name.endswith(("step", "steps", "skipped")):
            assert torch.equal(got, want), name
    unit = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    if "moment_dtype" not in options and dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(table, expected_table, rtol=64 * unit, atol=64 * unit)


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_contiguous_tables_get_the_same_bits_in_place_and_by_a_visit(
    dtype: torch.dtype, options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for is_apart in (False, True):
        monkeypatch.setattr(host, "is_apart", lambda update, is_apart=is_apart: is_apart)
        draw = torch.Generator().manual_seed(5)
        table = Parameter(torch.randn(40, 9, generator=draw).to(dtype))
        rounds = dtype in (torch.bfloat16, torch.float16)
        seeded = torch.Generator().manual_seed(1)
        optimizer = SparseAdam(
            [table], lr=0.1, backend=backend, generator=seeded, stochastic_rounding=rounds, **options
        )
        for num_rows in (10, 40, 40):
            rows = torch.randint(num_rows, (30,), generator=draw)
            table.grad = coo(rows[None], torch.randn(30, 9, generator=draw).to(dtype), table.shape)
            optimizer.step()
        results.append([table.detach(), *map(torch.as_tensor, dict(optimizer.state[table]).values())])
    for part, (one, other) in enumerate(zip(*results, strict=True)):
        assert torch.equal(one, other), part


@each_backend
def test_only_touched_rows_travel(backend: str, visits: list[host.Visit]) -> None:
    """What the page on GPUs says a step carries."""
    for dtype in (torch.float32, torch.bfloat16):
        table = Parameter(torch.ones(10_000, 8, dtype=dtype))
        optimizer = SparseAdam([table], backend=backend)
        rows = torch.tensor([[7, 9_000, 7, 7, 12]])
        table.grad = coo(rows, torch.ones(5, 8, dtype=dtype), table.shape)
        optimizer.step()
        visit = visits[-1]
        row_names = visit.update.moments.row_names
        assert row_names is not None
        weights, values = visit.update.table.nbytes, visit.update.values.nbytes
        element = dtype.itemsize
        assert row_names.nbytes + weights == 3 * (8 + element * 8)
        assert values == (3 if dtype is torch.float32 else 5) * element * 8


@each_backend
@pytest.mark.parametrize(
    "fault, error, pattern",
    [
        ("row", IndexError, "names row 40, but its table has rows 0 to 39"),
        ("value", RuntimeError, r"not finite, first in rows 31 \(repeated rows summed\)"),
    ],
)
def test_a_fault_is_named_by_the_tables_rows_and_changes_nothing(
    fault: str, error: type[Exception], pattern: str, backend: str, visits: list[host.Visit]
) -> None:
    table = Parameter(torch.ones(40, 4))
    optimizer = SparseAdam([table], backend=backend, nonfinite="error")
    table.grad = coo(torch.tensor([[5, 31]]), torch.ones(2, 4), table.shape)
    optimizer.step()
    before = table.detach().clone(), deepcopy(optimizer.state_dict())
    values = torch.ones(3, 4)
    if fault == "value":
        values[1, 2] = torch.nan
    rows = torch.tensor([[2, 31, 40 if fault == "row" else 39]])
    table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=False)
    with pytest.raises(error, match=pattern):
        optimizer.step()
    assert torch.equal(table.detach(), before[0])
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1]["state"], rtol=0, atol=0)


@each_backend
def test_moments_that_must_be_reallocated_have_room_for_a_visit(
    backend: str, visits: list[host.Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(_memory, "ReservedArray", refuse)
    table = Parameter(torch.zeros(1000, 3))
    optimizer = SparseAdam([table], backend=backend)
    touched: list[int] = []
    for number in range(6):
        rows = [number * 50 + place for place in range(number * 7 + 1)]
        table.grad = coo(torch.tensor([rows]), torch.ones(len(rows), 3), table.shape)
        optimizer.step()
        touched += rows
    assert optimizer.state[table]["rows"].tolist() == touched
    assert (optimizer.state[table]["exp_avg"] == torch.full((), 0.1)).all()


def test_where_moments_are_is_an_option_of_the_group_and_is_saved(visits: list[host.Visit]) -> None:
    tables = [Parameter(torch.ones(6, 2)) for _ in range(2)]
    optimizer = SparseAdam([{"params": tables[:1], "moment_device": "cpu"}, {"params": tables[1:]}])
    assert [group["moment_device"] for group in optimizer.param_groups] == ["cpu", None]
    loaded = SparseAdam([{"params": tables[:1]}, {"params": tables[1:]}])
    loaded.load_state_dict(optimizer.state_dict())
    assert [group["moment_device"] for group in loaded.param_groups] == ["cpu", None]


@pytest.mark.parametrize("value, error", [("cuda", ValueError), (torch.device("cpu"), TypeError), (0, TypeError)])
def test_no_other_device_is_taken(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"moment_device.*'cpu'"):
        SparseAdam([Parameter(torch.ones(2, 2))], moment_device=value)


def test_a_dense_gradient_refuses_it_by_name() -> None:
    parameter = Parameter(torch.ones(2, 2))
    optimizer = SparseAdam([parameter], dense_gradients="adam", moment_device="cpu")
    parameter.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="moment_device='cpu' is for sparse gradients only"):
        optimizer.step()


def test_moments_move_to_where_the_option_says(visits: list[host.Visit]) -> None:
    """Read from a checkpoint they go there at once: the device may have no room for them."""
    table = Parameter(torch.ones(6, 2, device="meta"))
    saved = SparseAdam([Parameter(torch.ones(6, 2))])
    saved.param_groups[0]["params"][0].grad = coo(torch.tensor([[3]]), torch.ones(1, 2), (6, 2))
    saved.step()
    packed = saved.state_dict()
    for moment_device, expected in (("cpu", "cpu"), (None, "meta")):
        packed["param_groups"][0]["moment_device"] = moment_device
        optimizer = SparseAdam([table], moment_device=moment_device)
        optimizer.load_state_dict(packed)
        assert optimizer.state[table]["exp_avg"].device.type == expected


def test_a_layout_that_visits_do_not_keep_is_refused_by_name(
    visits: list[host.Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_types, "LAYOUT_ON_DEVICES", _types.LAYOUT_ON_DEVICES - {"amsgrad"})
    table = Parameter(torch.ones(6, 2))
    optimizer = SparseAdam([table], amsgrad=True)
    table.grad = coo(torch.tensor([[3]]), torch.ones(1, 2), table.shape)
    with pytest.raises(RuntimeError, match=r'moment_device="cpu" cannot be had for group 0, .* amsgrad'):
        optimizer.step()
    assert table not in optimizer.state


def test_triton_cannot_be_named_for_it(visits: list[host.Visit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing_reason", lambda: None)
    table = Parameter(torch.ones(6, 2))
    optimizer = SparseAdam([table], backend="triton")
    table.grad = coo(torch.tensor([[3]]), torch.ones(1, 2), table.shape)
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot update .* need the moments beside the table'):
        optimizer.step()
