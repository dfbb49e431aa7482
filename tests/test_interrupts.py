"""Ctrl-C in the middle of what is written in more than one go: it takes effect when rows and their state agree."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import needs_steady_steps
from gradients import coo
from signals import answering
from snapshot import snapshot
from torch import nn

from sparseadam import SparseAdam, _interrupts, replay
from sparseadam.update import native, reference

ROWS, WIDTH = 24, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "exact": {"weight_decay": 0.1, "weight_decay_mode": "exact"},
    "replay": {"weight_decay": 0.1, "missed_steps": "replay"},
}


def trained(options: dict[str, Any]) -> tuple[nn.Parameter, SparseAdam]:
    """Return a table and its optimizer after two steps, with a gradient for the third."""
    table = nn.Parameter(torch.ones(ROWS, WIDTH))
    optimizer = SparseAdam([table], lr=0.1, backend="reference", **options)
    for step in range(3):
        rows = torch.arange(step, ROWS, 5)
        if "missed_steps" in options:
            optimizer.catch_up(table, rows)
        table.grad = torch.sparse_coo_tensor(
            rows[None], torch.ones(len(rows), WIDTH), table.shape, check_invariants=True
        )
        if step < 2:
            optimizer.step()
    return table, optimizer


def interrupting(write: Callable[..., None]) -> Callable[..., None]:
    """Return the same with a Ctrl-C after each call."""

    def wrapper(*arguments: Any) -> None:
        write(*arguments)
        signal.raise_signal(signal.SIGINT)

    return wrapper


def interrupting_writes(rows_to_write: Callable[..., Callable[..., None]]) -> Callable[..., Callable[..., None]]:
    """Return the same whose writes are followed by a Ctrl-C."""
    return lambda *arguments: interrupting(rows_to_write(*arguments))


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has them ignore it."""
    with answering(signal.default_int_handler, signal.SIGINT):
        yield


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tables are written a stretch of rows at a time: several of them here."""
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 8)
    monkeypatch.setattr(replay, "ROWS_AT_ONCE", 4)


def resize(table: nn.Parameter, optimizer: SparseAdam) -> None:
    """Give a table six rows more; it must not have a gradient."""
    table.grad = None
    optimizer.resize(table, ROWS + 6)


ACTS: dict[str, Callable[[nn.Parameter, SparseAdam], Any]] = {
    "step": lambda table, optimizer: optimizer.step(),
    "flush": lambda table, optimizer: optimizer.flush(),
    "forget": lambda table, optimizer: optimizer.forget(table, torch.tensor([1, 7])),
    "resize": resize,
    "catch_up": lambda table, optimizer: optimizer.catch_up(table, torch.tensor([0, 5, 23])),
}
# Those that write to the table.
WRITES = [
    ("step", "defaults"),
    ("step", "exact"),
    *((act, "exact") for act in ("flush", "resize")),
    *((act, "replay") for act in ("flush", "resize", "forget", "catch_up")),
]


@pytest.mark.parametrize(("act", "options"), WRITES, ids=["-".join(names) for names in WRITES])
def test_ctrl_c_waits_until_rows_and_their_state_agree(act: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, got = trained(OPTIONS[options]), trained(OPTIONS[options])
    ACTS[act](*expected)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "_rows_to_write", interrupting_writes(reference._rows_to_write))
        ACTS[act](*got)
    assert snapshot(got[1]) == snapshot(expected[1])


def with_dense(backend: str) -> SparseAdam:
    """Return an optimizer of a table and a dense parameter after two steps, with gradients for the third."""
    table, weight = nn.Parameter(torch.ones(ROWS, WIDTH)), nn.Parameter(torch.ones(5))
    optimizer = SparseAdam([table, weight], lr=0.1, dense_gradients="adam", backend=backend)
    for step in range(3):
        table.grad = coo([step, 9], torch.ones(2, WIDTH), table.shape)
        weight.grad = torch.ones(5)
        if step < 2:
            optimizer.step()
    return optimizer


def test_ctrl_c_waits_until_dense_parameters_are_stepped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, got = with_dense("reference"), with_dense("reference")
    expected.step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "_rows_to_write", interrupting_writes(reference._rows_to_write))
        got.step()
    assert snapshot(got) == snapshot(expected)


@needs_steady_steps
def test_ctrl_c_in_a_steady_step_waits_until_dense_parameters_are_stepped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of what was written is replaced by a signal's arrival, of which Python hears when it is back."""
    expected, got = with_dense("native"), with_dense("native")
    expected.step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(got, "_step_generally", None)
        arrival = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("PyErr_SetInterrupt", ctypes.pythonapi))
        patch.setattr(torch._C, "_increment_version", arrival)
        got.step()
    assert snapshot(got) == snapshot(expected)


@needs_steady_steps
def test_ctrl_c_during_a_steady_step_finds_its_writes_reported() -> None:
    """The signal comes while native code runs, as a rule; whenever it comes, autograd knows of what was written."""
    table = nn.Parameter(torch.zeros(20_000, 256))
    optimizer = SparseAdam([table], lr=0.1)
    table.grad = coo(torch.arange(len(table)), torch.ones(table.shape), table.shape)
    for _ in range(2):
        optimizer.step()
    last = table.detach()[-1, -1]
    for _ in range(5):
        begins, before = threading.Event(), (last.item(), table._version)

        def interrupt(begins: threading.Event = begins) -> None:
            begins.wait()
            time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            begins.set()
            optimizer.step()
            thread.join()
            time.sleep(1)  # where the step was over first
        thread.join()
        assert (last.item() != before[0]) == (table._version > before[1])


@pytest.mark.skipif(native.module() is None, reason="of the native backend")
def test_ctrl_c_while_native_code_gives_rows_slots_finds_them_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were read next got the same slots."""
    table = nn.Parameter(torch.ones(ROWS, WIDTH))
    optimizer = SparseAdam([table], lr=0.1, backend="native", **OPTIONS["replay"])
    table.grad = coo(torch.arange(3), torch.ones(3, WIDTH), table.shape)
    optimizer.step()
    module = native.module()

    class Interrupted:
        """The module whose ``catch_up`` a Ctrl-C comes in."""

        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def catch_up(self, **arguments: Any) -> Any:
            done = module.catch_up(**arguments)
            signal.raise_signal(signal.SIGINT)
            return done

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(native, "_module", Interrupted)
        optimizer.catch_up(table, torch.arange(2, 9))
    assert optimizer.state[table]["rows"].tolist() == list(range(9))
    optimizer.flush()
    assert torch.allclose(table[3:], torch.tensor(1 - 0.1 * 0.1))


@needs_steady_steps
def test_ctrl_c_in_a_steady_step_leaves_autograd_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came as the step left them out left them out for all that the thread did afterwards."""
    table = nn.Parameter(torch.ones(ROWS, WIDTH))
    optimizer = SparseAdam([table], lr=0.1)
    table.grad = coo(torch.arange(3), torch.ones(3, WIDTH), table.shape)
    optimizer.step()
    views = torch._C.DispatchKey.ADInplaceOrView
    exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded", interrupting(exclude))
        optimizer.step()
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(views)


def test_ctrl_c_takes_effect_between_two_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [nn.Parameter(torch.ones(ROWS, WIDTH)) for _ in range(2)]
    optimizer = SparseAdam(tables, lr=0.1, backend="reference", **OPTIONS["exact"])
    for table in tables:
        table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, WIDTH), table.shape, check_invariants=True)
    optimizer.step()
    before = [table.detach().clone() for table in tables]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "_rows_to_write", interrupting_writes(reference._rows_to_write))
        optimizer.flush()
    assert torch.allclose(tables[0][2:], before[0][2:] * (1 - 0.1 * 0.1))
    assert torch.equal(tables[1], before[1])
    optimizer.flush()
    assert torch.equal(tables[0], tables[1])


@needs_steady_steps
@pytest.mark.parametrize("is_steady", [False, True])
def test_a_handler_that_saves_finds_the_step_taken(is_steady: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of SIGTERM may: its state_dict() flushes, which gives tables new histories."""
    read_history = native._history_tuple
    signals: list[int] = []  # to be raised while the second table is read

    def read_and_raise(moments: Any) -> Any:
        if moments is optimizer.state[tables[1]] and signals:
            signal.raise_signal(signals.pop())
        return read_history(moments)

    def save(*_: object) -> None:
        optimizer.state_dict()
        saved.append(snapshot(optimizer))

    monkeypatch.setattr(native, "_history_tuple", read_and_raise)
    saved: list[dict[str, Any]] = []
    with answering(save, signal.SIGTERM):
        for raised in ([signal.SIGTERM], []):
            tables = [nn.Parameter(torch.ones(ROWS, WIDTH)) for _ in range(2)]
            optimizer = SparseAdam(tables, lr=0.1, backend="native", **OPTIONS["replay"])
            for step in range(4):
                for table in tables:
                    rows = torch.arange(step, ROWS, 5)
                    optimizer.catch_up(table, rows)
                    table.grad = coo(rows, torch.ones(len(rows), WIDTH), table.shape)
                if step == 3:
                    optimizer._steady_step = optimizer._steady_step if is_steady else None
                    signals += raised
                optimizer.step()
    assert not signals
    save()
    in_handler, after_step = saved
    assert in_handler == after_step


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"])
def test_every_signal_that_came_is_answered_even_where_one_raises(name: str) -> None:
    if not hasattr(signal, name):
        pytest.skip("not a signal of this system")
    numbers = {getattr(signal, name), signal.SIGINT, signal.SIGTERM}
    heard: list[int] = []

    def answer(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    with answering(answer, *numbers):
        with pytest.raises(KeyboardInterrupt), _interrupts.held():
            for number in numbers:
                signal.raise_signal(number)
            assert not heard
        assert sorted(heard) == sorted(numbers)
        assert all(signal.getsignal(number) is answer for number in numbers)


@pytest.mark.parametrize("exchange", range(1, 4))
def test_a_signal_that_comes_as_handlers_are_given_back_leaves_none_held(
    exchange: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is answered before the exchange: that of another signal was left out, which nobody heard from then on."""
    heard: list[int] = []
    exchanges: list[int] = []

    def exchanging(number: int, handler: Any) -> None:
        exchanges.append(number)
        if len(exchanges) == 2 + exchange:  # as many as are held
            signal.raise_signal(signal.SIGINT)
        signal.signal(number, handler)

    with answering(lambda number, _: heard.append(number), signal.SIGTERM):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_interrupts, "signal", SimpleNamespace(getsignal=signal.getsignal, signal=exchanging))
            with _interrupts.held():
                pass
            signal.raise_signal(signal.SIGINT)  # where there was no such exchange
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


@pytest.mark.skipif(native.module() is None, reason="of the native backend")
def test_a_handler_that_saves_while_rows_catch_up_finds_them_before_or_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving ended the history that native code had been told of, by which rows then decayed once more."""
    table = nn.Parameter(torch.ones(ROWS, WIDTH))
    optimizer = SparseAdam([table], lr=0.1, backend="native", missed_steps="replay", weight_decay=0.5)
    table.grad = coo([0], torch.ones(1, WIDTH), table.shape)
    optimizer.step()
    history_of = native._history_tuple

    def interrupted(moments: Any) -> Any:
        found = history_of(moments)
        signal.raise_signal(signal.SIGTERM)
        return found

    with answering(lambda *_: optimizer.state_dict(), signal.SIGTERM), monkeypatch.context() as patch:
        patch.setattr(native, "_history_tuple", interrupted)
        optimizer.catch_up(table, torch.tensor([5]))
    optimizer.flush()
    assert torch.allclose(table[1:], torch.tensor(0.95))


def test_ctrl_c_finds_a_group_added_and_no_hook_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group had been added without a seed; a hook of one kind of state dict went on for the other kind."""
    optimizer = SparseAdam([nn.Parameter(torch.ones(ROWS, WIDTH))], moment_dtype=torch.bfloat16)
    added = torch.optim.Optimizer.add_param_group

    def interrupted(self: Any, group: dict[str, Any]) -> None:
        added(self, group)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Optimizer, "add_param_group", interrupted)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 2))]})
    assert optimizer.param_groups[1]["seed"] == optimizer.param_groups[0]["seed"]

    register = optimizer.register_state_dict_post_hook
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            optimizer, "register_state_dict_post_hook", lambda *_, **__: (register(*_, **__), signal.raise_signal(2))[0]
        )
        optimizer.state_dict()
    assert not optimizer._optimizer_state_dict_post_hooks


@pytest.mark.parametrize("raising", range(4))
def test_all_handlers_are_back_after_one_raised_while_they_were_exchanged(
    raising: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = []

    def exchange(number: int, handler: Any) -> None:
        signal.signal(number, handler)
        exchanged.append(number)
        if len(exchanged) == raising + 1:
            raise SystemExit

    handlers: dict[int, Any] = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: None}
    with answering(handlers[signal.SIGINT], signal.SIGINT), answering(handlers[signal.SIGTERM], signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(_interrupts, "signal", SimpleNamespace(getsignal=signal.getsignal, signal=exchange))
            with pytest.raises(SystemExit), _interrupts.held():
                pass
        assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_the_handler_of_the_program_is_called_once_and_stays() -> None:
    heard = []
    with answering(lambda number, frame: heard.append(number), signal.SIGINT):
        handler = signal.getsignal(signal.SIGINT)
        with _interrupts.held(), _interrupts.held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert not heard
        assert heard == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("ignoring", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_python_does_not_handle_is_left_alone(ignoring: signal.Handlers) -> None:
    with answering(ignoring, signal.SIGINT), _interrupts.held():
        assert signal.getsignal(signal.SIGINT) is ignoring


def test_threads_that_hear_of_no_signals_step_as_well() -> None:
    table, optimizer = trained(OPTIONS["exact"])
    expected_table, expected = trained(OPTIONS["exact"])
    expected.step()
    expected.flush()
    thread = threading.Thread(target=lambda: (optimizer.step(), optimizer.flush()))
    thread.start()
    thread.join()
    assert torch.equal(table, expected_table)
    assert snapshot(optimizer) == snapshot(expected)
