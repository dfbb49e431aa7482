"""Measuring: every contender once a round, rounds until there are enough, ratios within rounds.

A noisy machine slows a whole round, so each comparison is the median of ratios that were taken within a round and not
the ratio of two medians. Before the first round every contender has stepped on every gradient: what is measured is the
steady state, in which all rows of the gradients have moments.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._huge_pages import move_into_huge_pages
from ..moments import moment_dtype
from ..optimizer import SparseAdam
from .cases import FLOOR, FUSED_STEP, FUSED_WITH_GRADIENT, TORCH_SPARSE, Case
from .clock import laps
from .errors import BenchError
from .machine import HOST, available_bytes, fastest_backend
from .verify import verify
from .workload import NUM_GRADIENTS, Workload

OURS = "ours"
COPY = "copy"
PEERS_TABLES = "tables of PyTorch's"
COMPARISONS = (TORCH_SPARSE, FUSED_STEP, FUSED_WITH_GRADIENT, FLOOR)

_COPY_BUFFER_BYTES = 256 << 20
_COPY_BYTES = 2 * _COPY_BUFFER_BYTES  # each byte is read and written

SECONDS_PER_CASE = 20
_MIN_ROUNDS, _MAX_ROUNDS = 11, 301
# A turn goes through all gradients, so that the caches are the contender's own, as they are in a loop of training, and
# not what another one left; it lasts at least this long, or it would measure the clock.
_SECONDS_PER_TURN = 1e-3
# Steps that take longer bring more than caches hold, and have turns of their own.
_LONG_STEP_SECONDS = 0.1
# For Python, code that is loaded late, and scratch space of the contenders.
_RESERVED_BYTES = 1 << 30

Seconds = dict[str, float]


class Spread(NamedTuple):
    """A median with the 20th and the 80th percentile."""

    median: float
    low: float
    high: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, between two values the one in proportion.

    Example:
        >>> percentile([10.0, 40.0, 20.0], 75)
        30.0
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread_of(values: Sequence[float]) -> Spread:
    """Summarise one figure of many rounds."""
    return Spread(statistics.median(values), percentile(values, 20), percentile(values, 80))


class Contender(Protocol):
    """Something whose time is taken."""

    @property
    def warm_up_steps(self) -> int:
        """Steps until every gradient's rows have been touched and a step takes what it will take from then on."""

    def step(self, number: int) -> Seconds:
        """Step on gradient ``number`` and return the seconds it took, by name; preparations are not timed."""


class SparseStep:
    """``step()`` of an optimizer on uncoalesced sparse gradients; what coalesces, does so within the time."""

    warm_up_steps = 2 * NUM_GRADIENTS

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, workload: Workload) -> None:
        """Time ``optimizer``, which holds the tables of ``workload``, under ``name``."""
        self.name = name
        self.optimizer = optimizer
        self._workload = workload

    def step(self, number: int) -> Seconds:
        """See :class:`Contender`."""
        self._workload.give_gradients(number)
        (seconds,) = laps(self._workload.device, self.optimizer.step)
        self._workload.clear_gradients()
        return {self.name: seconds}


class FusedAdam:
    """What a dense embedding costs: its gradient, the size of the table, is made anew, then every row is updated.

    One pass gives both times: of the step alone, on a gradient just made, and of the two together.
    """

    name = "fused_adam"
    warm_up_steps = 2

    def __init__(self, workload: Workload) -> None:
        """Build the optimizer over the tables of ``workload``."""
        self.optimizer = torch.optim.Adam(workload.tables, fused=True)
        self._workload = workload

    def step(self, number: int) -> Seconds:
        """See :class:`Contender`."""
        gradient = self._workload.gradients[number % NUM_GRADIENTS]
        num_rows = self._workload.case.num_rows

        def make_gradients() -> None:
            for table, rows, values in zip(self._workload.tables, gradient.rows, gradient.values, strict=True):
                table.grad = torch.ops.aten.embedding_dense_backward(values, rows, num_rows, -1, False)

        making, stepping = laps(self._workload.device, make_gradients, self.optimizer.step)
        self._workload.clear_gradients()
        return {FUSED_STEP: stepping, FUSED_WITH_GRADIENT: making + stepping}


class Copy:
    """A copy between two buffers that no cache holds: how fast this machine's memory is at this moment."""

    warm_up_steps = 2

    def __init__(self, device: torch.device = HOST) -> None:
        """Make the buffers, written once so that their pages are there; in huge pages, as our tables are."""
        self._device = device
        self._source = torch.ones(_COPY_BUFFER_BYTES, dtype=torch.uint8, device=device)
        self._target = torch.ones(_COPY_BUFFER_BYTES, dtype=torch.uint8, device=device)
        if device.type == "cpu":
            for buffer in (self._source, self._target):
                move_into_huge_pages(buffer.data_ptr(), _COPY_BUFFER_BYTES)

    def step(self, number: int) -> Seconds:
        """See :class:`Contender`."""
        (seconds,) = laps(self._device, lambda: self._target.copy_(self._source))
        return {COPY: seconds}


def our_optimizer(workload: Workload) -> SparseAdam:
    """Return ours over the tables of ``workload``, with the fastest backend present."""
    return SparseAdam(workload.tables, backend=fastest_backend(workload.device).name)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of an optimizer's state."""
    if isinstance(optimizer, SparseAdam):
        return optimizer.moment_bytes()
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


# Rounds -------------------------------------------------------------------------------------------


class Rounds:
    """Interleaved rounds of contenders, each in a turn of one step on every gradient; where steps are long, of one.

    Args:
        contenders: who takes part. They are warmed up here.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        """Warm up, and see how many steps a turn needs."""
        self._turns = [(contender, _steps_per_turn(contender)) for contender in contenders]
        self._count = 0

    def take(self) -> Seconds:
        """Give every contender its turn; return the seconds of a step, by name: the median of a turn's steps."""
        first = self._count % len(self._turns)
        order = self._turns[first:] + self._turns[:first]
        if self._count // len(self._turns) % 2:
            order.reverse()  # or each would always come after the same other
        seconds: Seconds = {}
        for contender, num_steps in order:
            steps = [contender.step(self._count + offset) for offset in range(num_steps)]
            seconds.update({name: statistics.median(step[name] for step in steps) for name in steps[0]})
        self._count += 1
        return seconds


def _steps_per_turn(contender: Contender) -> int:
    seconds = [max(contender.step(number).values()) for number in range(contender.warm_up_steps)]
    expected = statistics.median(seconds[len(seconds) // 2 :])
    if expected >= _LONG_STEP_SECONDS:
        return 1
    return NUM_GRADIENTS * max(1, math.ceil(_SECONDS_PER_TURN / expected / NUM_GRADIENTS))


def take_rounds(
    contenders: Sequence[Contender],
    num_rounds: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[Seconds]:
    """Warm up, then take rounds without the garbage collector.

    Args:
        contenders: who takes part in each round.
        num_rounds: how many; None takes what some twenty seconds allow, within limits.
        on_progress: told, after each round, which share of the work is done.
    """
    taken: list[Seconds] = []
    with _no_garbage_collection():
        rounds = Rounds(contenders)
        started = perf_counter()
        share = 0.0
        while share < 1:
            taken.append(rounds.take())
            if num_rounds is not None:
                share = len(taken) / num_rounds
            else:
                by_time = (perf_counter() - started) / SECONDS_PER_CASE
                share = max(len(taken) / _MAX_ROUNDS, min(by_time, len(taken) / _MIN_ROUNDS))
            on_progress(min(share, 1.0))
    return taken


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# A case -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was measured of a case.

    Attributes:
        case: what was measured.
        num_rounds: how often.
        num_touched: distinct rows of a step over all tables, on average.
        floor_bytes: what a step must move at least, on average.
        seconds: of a step, by contender; under ``floor`` of moving the floor's bytes.
        ratios: median of the ratios within rounds: how many times ours is faster; under ``floor`` the share of its
            speed that ours reaches.
        bandwidth: bytes a second of a copy, read and written.
        state_bytes: of each optimizer's state, by contender.
        left_out: why a contender did not take part.
    """

    case: Case
    num_rounds: int
    num_touched: float
    floor_bytes: float
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    bandwidth: Spread
    state_bytes: dict[str, int]
    left_out: dict[str, str]


def measure(
    case: Case,
    num_rounds: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
    *,
    with_dense: bool = True,
    device: torch.device = HOST,
) -> Result:
    """Verify and measure a case.

    Args:
        case: what to measure.
        num_rounds: how many rounds; None takes what some twenty seconds allow.
        on_progress: told, after each round, which share of the rounds is done.
        with_dense: compare with a dense embedding, too.
        device: where the tables are, and all that is compared.

    Raises:
        BenchError: the case does not fit in memory, or its result is wrong.
        UsageError: the file of row numbers does not do.
    """
    left_out = _check_memory(case, with_dense, device)
    workload = Workload(case, device=device)
    verify(workload)
    stepping: list[SparseStep | FusedAdam] = [SparseStep(OURS, our_optimizer(workload), workload)]
    stepping += _peers(
        workload, with_sparse=TORCH_SPARSE not in left_out, with_dense=with_dense and FUSED_STEP not in left_out
    )
    stepping = [contender for contender in stepping if _can_step(contender, left_out)]
    rounds = take_rounds([*stepping, Copy(device)], num_rounds, on_progress)
    sizes = {contender.name: state_bytes(contender.optimizer) for contender in stepping}
    return summarize(workload, rounds, sizes, left_out)


def _peers(workload: Workload, *, with_sparse: bool, with_dense: bool) -> list[SparseStep | FusedAdam]:
    """Return PyTorch's optimizers, which share tables of their own: ours has its tables moved into huge pages."""
    peers: list[SparseStep | FusedAdam] = []
    if with_sparse or with_dense:
        workload = workload.with_other_tables()
    if with_sparse:
        peers.append(SparseStep(TORCH_SPARSE, torch.optim.SparseAdam(workload.tables), workload))
    if with_dense:
        peers.append(FusedAdam(workload))
    return peers


def _can_step(contender: SparseStep | FusedAdam, left_out: dict[str, str]) -> bool:
    """Whether PyTorch has this contender's operations for the dtype; ours has been verified."""
    if contender.name == OURS:
        return True
    try:
        contender.step(0)
    except RuntimeError as error:
        names = (FUSED_STEP, FUSED_WITH_GRADIENT) if isinstance(contender, FusedAdam) else (contender.name,)
        left_out.update(dict.fromkeys(names, str(error).partition("\n")[0]))
        return False
    return True


def summarize(
    workload: Workload, rounds: Sequence[Seconds], sizes: Mapping[str, int], left_out: Mapping[str, str]
) -> Result:
    """Turn the seconds of rounds into medians, percentiles and ratios within rounds."""
    gradients = workload.gradients
    mean_bytes = statistics.fmean(gradient.floor_bytes for gradient in gradients)
    with_floor = [{**seconds, FLOOR: seconds[COPY] * mean_bytes / _COPY_BYTES} for seconds in rounds]
    return Result(
        case=workload.case,
        num_rounds=len(rounds),
        num_touched=statistics.fmean(gradient.num_touched for gradient in gradients),
        floor_bytes=mean_bytes,
        seconds={name: spread_of([seconds[name] for seconds in with_floor]) for name in with_floor[0] if name != COPY},
        ratios=ratios_to_ours(with_floor),
        bandwidth=spread_of([_COPY_BYTES / seconds[COPY] for seconds in rounds]),
        state_bytes=dict(sizes),
        left_out=dict(left_out),
    )


def ratios_to_ours(rounds: Sequence[Seconds]) -> dict[str, Spread]:
    """Summarise each comparison's ratio to ours, taken within each round."""
    present = [name for name in COMPARISONS if name in rounds[0]]
    return {name: spread_of([seconds[name] / seconds[OURS] for seconds in rounds]) for name in present}


def _check_memory(case: Case, with_dense: bool, device: torch.device) -> dict[str, str]:
    """Say which contenders do not fit in memory beside ours and each other, and why.

    Raises:
        BenchError: not even ours fits.
    """
    available = available_bytes(device)
    if available is None:
        return {}
    needs = memory_needs(case)
    free = available - _RESERVED_BYTES - needs[OURS]
    if free < 0:
        raise BenchError(
            f"case {case.name} needs {_gigabytes(needs[OURS] + _RESERVED_BYTES)} of memory and "
            f"{_gigabytes(available)} are available; pass a smaller --rows, --dim, --lookups or --tables."
        )
    tables = needs[PEERS_TABLES]
    left_out: dict[str, str] = {}
    for name, more in ((TORCH_SPARSE, ()), (FUSED_STEP, (FUSED_WITH_GRADIENT,))):
        if name == FUSED_STEP and not with_dense:
            continue
        needed = tables + needs[name]
        if needed <= free:
            free -= needed
            tables = 0  # the other shares them
            continue
        reason = f"needs {_gigabytes(needed)} of memory more, and {_gigabytes(free)} are left"
        left_out.update(dict.fromkeys((name, *more), reason))
    return left_out


def memory_needs(case: Case) -> dict[str, int]:
    """Return the bytes that each contender adds; ours carries gradients and copy buffers, which all share."""
    table = case.num_rows * case.width * case.dtype.itemsize
    lookups = case.num_lookups * (case.width * case.dtype.itemsize + torch.int64.itemsize)
    num_slots = min(case.num_rows, NUM_GRADIENTS * case.num_lookups)
    moments = num_slots * 2 * case.width * moment_dtype(case.dtype).itemsize + case.num_rows * torch.int64.itemsize
    # The cumulative distribution, its exponents and the permutation are gone again when the tables come.
    drawing = 3 * case.num_rows * torch.int64.itemsize
    gradients = NUM_GRADIENTS * case.num_tables * lookups
    return {
        OURS: max(case.num_tables * (table + moments), drawing) + gradients + _COPY_BYTES,
        PEERS_TABLES: case.num_tables * table,
        # Moments of all rows; while it steps, the coalesced gradient and what is computed from it.
        TORCH_SPARSE: case.num_tables * 2 * table + 8 * lookups,
        # Moments of all rows and a gradient of all rows.
        FUSED_STEP: case.num_tables * 3 * table,
    }


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
