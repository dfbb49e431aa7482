"""The Triton backend by itself: what its kernels compile to, and what it does and leaves on a device.

That it computes the rule, the other files show, in Triton's interpreter: ``make test-triton`` runs them, and those
here that need the interpreter, with ``TRITON_INTERPRET=1``. The compiler needs no device, but cannot be had at the same
time.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, IS_INTERPRETED
from gradients import coo
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import sparseadam
from sparseadam import SparseAdam, _device_counts, _validate
from sparseadam._device_counts import DeviceCounts
from sparseadam._validate import Place
from sparseadam.moments import Moments, StateLayout, moment_dtype
from sparseadam.update import RowUpdate, _types, step_scalars, triton

has_triton = triton._load()[0] is not None
needs_compiler = pytest.mark.skipif(IS_INTERPRETED or not has_triton, reason="Triton's interpreter is on, or no Triton")
needs_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter: make test-triton")

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def a_step(dtype: torch.dtype = torch.float32, width: int = 64, num_lookups: int = 6, **options: Any) -> RowUpdate:
    """One table's part in a step, as the optimizer hands it to a backend."""
    table = torch.ones(20, width, dtype=dtype)
    group = {**SparseAdam([Parameter(table)], lr=0.1, **options).param_groups[0]}
    read = _validate.check_group(group, 0)
    moments = Moments(table.shape, 1, moment_dtype(dtype), table.device, read.layout)
    indices = torch.arange(num_lookups)[None] % 4
    values = torch.ones(num_lookups, width, dtype=dtype)
    scalars = step_scalars(read, 1)
    return RowUpdate(
        Place(group, 0, 0), table, moments, indices, values, num_lookups, scalars, read.stochastic_rounding
    )


# The compiler -------------------------------------------------------------------------------------

# Each option with each of the others that change its code, each dtype, narrow and wide rows.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, wide": {"width": 1000},
    "float64": {"dtype": torch.float64, "amsgrad": True, "bias_correction": "row"},
    "float16": {"dtype": torch.float16, "width": 16, "nonfinite": "error", "weight_decay": 0.1},
    "bfloat16, rounded": {"dtype": torch.bfloat16, "stochastic_rounding": True, "moment_dtype": torch.bfloat16},
    "float16, rounded": {
        "dtype": torch.float16,
        "stochastic_rounding": True,
        "moment_dtype": torch.uint8,
        "bias_correction": "row",
        "torch_eps": True,
        "weight_decay": 0.1,
        "weight_decay_mode": "exact",
        "width": 200,
    },
    "second moment a row": {"second_moment": "row", "amsgrad": True, "nonfinite": "skip", "width": 3},
    "second moment a row, codes": {"dtype": torch.float64, "second_moment": "row", "moment_dtype": torch.uint8},
}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
}


def launches_of(update: RowUpdate, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The arguments with which a step launches each kernel; none runs."""
    launches: dict[str, dict[str, Any]] = {}

    def note(name: str, num_programs: int, device: torch.device, **arguments: Any) -> None:
        assert num_programs > 0
        launches[name] = arguments

    monkeypatch.setattr(triton, "_launch", note)
    update.moments.make_room(update.num_lookups)
    touched = triton.check_rows([update], strict=True)
    triton.update_rows([update], touched)
    return launches


def compiled(name: str, arguments: dict[str, Any], target: tuple[Any, ...]) -> dict[str, Any]:
    """What a kernel called with these arguments becomes for a target, by kind."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    kernel = getattr(triton._kernels(), name)
    assert set(arguments) == set(kernel.arg_names)
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = parameter.annotation_type or mangle_type(value)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return dict(compile_kernel(source, target=GPUTarget(*target), options=dict(triton.COMPILE_OPTIONS)).asm)


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_ahead_of_time(variant: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the very arguments that a step passes: a wrong type or a branch that does not fit another shows here."""
    launches = launches_of(a_step(**VARIANTS[variant]), monkeypatch)
    assert list(launches) == ["list_rows", "find_rows", "update_rows"]
    for name, arguments in launches.items():
        kinds = compiled(name, arguments, TARGETS[target])
        assert kinds["cubin" if target.startswith("sm_") else "hsaco"]
        if "ptx" in kinds:
            assert not any(word in kinds["ptx"] for word in ("atom.", "red.global")), "nothing is left to chance"
            if name == "update_rows" and variant.startswith("plain"):
                assert "fma." not in kinds["ptx"], "contraction would give other bits than the other backends'"
                assert "sqrt.rn.f32" in kinds["ptx"] and "div.rn.f32" in kinds["ptx"]


# The interpreter ----------------------------------------------------------------------------------

# Options of which every operation is correctly rounded: no mean over a row, no power or exponential of a row's own.
BITWISE: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
    {"torch_eps": True, "nonfinite": "skip"},
    {"moment_dtype": torch.bfloat16},
    {"moment_dtype": torch.uint8},
]


def run_steps(backend: str, dtype: torch.dtype, width: int, **options: Any) -> list[torch.Tensor]:
    """A table and its state after three steps with repeated rows and, later, new ones."""
    draw = torch.Generator().manual_seed(width)
    table = Parameter(torch.randn(40, width, generator=draw).to(dtype))
    seeded = torch.Generator().manual_seed(1)
    options = {"stochastic_rounding": dtype in _validate.HALF_DTYPES, **options}
    optimizer = SparseAdam([table], lr=0.1, backend=backend, generator=seeded, **options)
    for num_rows in (20, 40, 40):
        rows = torch.randint(0, num_rows, (30,), generator=draw)
        table.grad = coo(rows, torch.randn(30, width, generator=draw).to(dtype), table.shape)
        optimizer.step()
    state = optimizer.state[table]
    return [table.detach(), *(state[name] for name in state if isinstance(state[name], torch.Tensor))]


@needs_interpreter
@pytest.mark.parametrize("options", BITWISE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [7, 200])
def test_the_bits_are_those_of_the_native_backend(dtype: torch.dtype, options: dict[str, Any], width: int) -> None:
    """Random bits included: contraction is off in both, and roots and quotients are correctly rounded."""
    if "native" not in BACKENDS:
        pytest.skip("this installation has no native module")
    got, want = run_steps("triton", dtype, width, **options), run_steps("native", dtype, width, **options)
    for part, (one, other) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(one, other), part


@needs_interpreter
@pytest.mark.parametrize("options", [{}, {"second_moment": "row", "nonfinite": "skip"}], ids=str)
def test_how_rows_are_dealt_to_programs_does_not_show(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them programs that begin behind the last touched row, and rows wider than a block."""
    want = run_steps("triton", torch.float32, 20, **options)
    monkeypatch.setattr(triton, "_INTERPRETED_BLOCK_ELEMENTS", 32)
    monkeypatch.setattr(triton, "_MAX_BLOCK_WIDTH", 8)
    got = run_steps("triton", torch.float32, 20, **options)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0) if options else torch.testing.assert_close(
            one, other, rtol=0, atol=0
        )


@needs_interpreter
def test_a_row_outside_the_table_is_not_written_where_assertions_are_compiled_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "_asserts_on_device", lambda device: True)
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    memory = torch.full((30, 4), torch.nan)
    memory[10:20] = 1.0
    table = Parameter(memory[10:20])
    optimizer = SparseAdam([table], backend="triton")
    table.grad = torch.sparse_coo_tensor(
        torch.tensor([[-1, 3, 10, 2**40]]), torch.ones(4, 4), table.shape, check_invariants=False
    )
    optimizer.step()
    assert memory[:10].isnan().all() and memory[20:].isnan().all()
    assert (table.detach() != 1.0).any(dim=1).nonzero().flatten().tolist() == [3]
    assert optimizer.state[table]["rows"].tolist() == [3]


class Watch(TorchDispatchMode):
    """Counts PyTorch's operations by name."""

    def __init__(self) -> None:
        """Start from none."""
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# Operations that make the host wait for a CUDA device: their result, or its size, is in its memory.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "is_nonzero"}


def steps_watched(optimizer: SparseAdam, table: Parameter, rows: list[list[int]]) -> list[Counter[str]]:
    calls = []
    for step_rows in rows:
        table.grad = coo(step_rows, torch.ones(len(step_rows), table.shape[1]), table.shape)
        with Watch() as watch:
            optimizer.step()
        calls.append(watch.calls)
    return calls


@needs_interpreter
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "skip", "bias_correction": "row"},
        {"weight_decay": 0.1, "weight_decay_mode": "exact", "moment_dtype": torch.uint8},
    ],
    ids=str,
)
def test_a_steady_step_waits_for_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: moments that grow by reallocation, checks that the device makes."""
    monkeypatch.setattr(triton, "_asserts_on_device", lambda device: True)
    monkeypatch.setattr(sparseadam._memory, "ReservedArray", refuse_reservation)
    table = Parameter(torch.ones(5000, 8))
    optimizer = SparseAdam([table], backend="triton", **options)
    batches = [[number % 10, 7, 7, number * 3 % 20] for number in range(25)]
    reads, read = [], DeviceCounts.read
    monkeypatch.setattr(DeviceCounts, "read", lambda counts: reads.append(None) or read(counts))
    calls, num_reads = [], []
    for batch in batches:
        calls += steps_watched(optimizer, table, [batch])
        num_reads.append(len(reads))
    assert 0 < num_reads[20] < 9, "capacity grows by half, so seldom"
    assert num_reads[-1] == num_reads[20], "and not while all rows have slots"
    assert all(each["_assert_async"] == 1 for each in calls), "each step's rows are checked on the device"
    assert not any(WAITS & set(each) for each in calls)
    # The watch sees a step wait that has to.
    table.grad = coo([1], torch.ones(1, 8), table.shape)
    strict = SparseAdam([table], backend="triton", strict=True)
    with Watch() as watch:
        strict.step()
    assert WAITS & set(watch.calls)


def refuse_reservation(*_: object, **__: object) -> None:
    raise OSError("Cannot allocate memory")


@needs_interpreter
def test_the_state_is_right_whenever_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are counted on the device; the state's length follows without a step in between."""
    monkeypatch.setattr(sparseadam._memory, "ReservedArray", refuse_reservation)
    tables = {name: Parameter(torch.ones(50, 3)) for name in ("triton", "reference")}
    optimizers = {name: SparseAdam([table], backend=name, nonfinite="skip") for name, table in tables.items()}
    for number in range(6):
        values = torch.ones(3, 3)
        values[0, 0] = torch.inf if number % 2 else 1.0
        states = {}
        for name, table in tables.items():
            table.grad = coo([number * 5, 30, number], values, table.shape)
            optimizers[name].step()
            states[name] = optimizers[name].state[table]
        assert list(states["triton"]) == list(states["reference"])
        for key in ("step", "num_skipped"):
            assert states["triton"].get(key) == states["reference"].get(key)
        assert torch.equal(states["triton"]["rows"], states["reference"]["rows"])
        assert optimizers["triton"].moment_bytes() == optimizers["reference"].moment_bytes()


@needs_interpreter
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_it_is_never_chosen_for_a_table_on_the_cpu(is_contiguous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for one that the native backend refuses."""
    monkeypatch.setattr(triton, "_refusal", lambda *_: pytest.fail("Triton was asked"))
    table = Parameter(torch.ones(6, 2) if is_contiguous else torch.ones(2, 6).t())
    table.grad = coo([1, 2], torch.ones(2, 2), table.shape)
    SparseAdam([table]).step()
    assert (table.detach() != 1.0).any(dim=1).nonzero().flatten().tolist() == [1, 2]


# Refusals and what is deferred --------------------------------------------------------------------


def test_a_deferred_check_raises_with_the_parameters_name_where_the_device_is_the_host() -> None:
    """On the CPU the assertion fails at once, which is how its condition and its words can be seen."""
    place = Place({"params": [], "param_names": ["users"]}, 0, 0)
    for indices, sparse_shape in (([[0, 9]], [10]), ([[0, 1], [4, 3]], [2, 5])):
        triton.assert_rows(torch.tensor(indices), sparse_shape, place)
    for indices, sparse_shape in (([[0, 10]], [10]), ([[-1]], [10]), ([[0, 1], [4, 5]], [2, 5])):
        with pytest.raises(RuntimeError, match=r"'users' \(group 0, parameter 0\) names a row outside.*strict=True"):
            triton.assert_rows(torch.tensor(indices), sparse_shape, place)


def test_assertions_are_relied_on_only_where_they_stop_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton._asserts_on_device(cuda) and not triton._asserts_on_device(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not triton._asserts_on_device(cuda)


@pytest.mark.skipif(not has_triton, reason="Triton is not installed")
def test_a_layout_that_the_kernels_do_not_keep_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    update = a_step(amsgrad=True)
    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    assert triton.prepare(update) is None
    monkeypatch.setattr(_types, "LAYOUT_ON_DEVICES", frozenset(StateLayout._fields) - {"amsgrad"})
    reason = triton.prepare(update)
    assert reason is not None and "does not keep" in reason and "amsgrad" in reason


@pytest.mark.skipif(IS_INTERPRETED or torch.cuda.is_available(), reason="the backend can be used here")
def test_without_a_device_it_says_so() -> None:
    backend = next(each for each in sparseadam.backends() if each.name == "triton")
    assert not backend.available
    assert (
        ("no CUDA or ROCm device" in backend.detail) if has_triton else ("pip install 'triton>=3.6'" in backend.detail)
    )
    with pytest.raises(ImportError, match=r'backend="triton" is not available: .*(TRITON_INTERPRET|pip install)'):
        SparseAdam([Parameter(torch.ones(2, 2))], backend="triton")


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_load", lambda: (None, "No module named 'triton'"))
    with pytest.raises(ImportError, match=r"Triton is missing .*No module named 'triton'.*pip install 'triton"):
        SparseAdam([Parameter(torch.ones(2, 2))], backend="triton")


def test_a_triton_that_is_too_old_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    triton._load.cache_clear()
    try:
        reason = triton.missing_reason()
        assert reason is not None and "3.5.1 was found, and 3.6 or later is needed" in reason
    finally:
        triton._load.cache_clear()


@pytest.mark.parametrize("strict", [1, "yes", None])
def test_strict_is_a_flag(strict: Any) -> None:
    with pytest.raises(TypeError, match="strict must be True or False"):
        SparseAdam([Parameter(torch.ones(2, 2))], strict=strict)


# Counting on a device -----------------------------------------------------------------------------


class SlowEvent:
    """An event that is done when it is told to be."""

    def __init__(self) -> None:
        """Not done yet."""
        self.is_done = False

    def query(self) -> bool:
        """Whether it was told."""
        return self.is_done


def test_the_bound_of_slots_follows_the_device_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[SlowEvent] = []

    def record(device: torch.device) -> SlowEvent:
        events.append(SlowEvent())
        return events[-1]

    monkeypatch.setattr(_device_counts, "_record", record)
    counts = DeviceCounts(3, 0, torch.device("cpu"))
    assert counts.most_slots() == 3
    counts.tensor[0] += 2
    counts.note_step(10)
    assert counts.most_slots() == 13  # nothing has arrived: each lookup may have been a new row's
    counts.note_step(10)
    assert counts.most_slots() == 23 and len(events) == 1, "one copy travels at a time"
    events[0].is_done = True
    assert counts.most_slots() == 5 + 10  # what arrived was counted after the first step
    counts.note_step(4)
    assert counts.most_slots() == 5 + 10 + 4 and len(events) == 2
    assert counts.read() == (5, 0)
    assert counts.most_slots() == 5


def test_scalars_travel_as_the_bits_of_doubles() -> None:
    for number in (0.1, 0.0, -1.5, float("-inf")):
        assert struct.unpack("d", struct.pack("q", triton._bits(number)))[0] == number
