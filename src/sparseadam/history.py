r"""The numbers of the steps that rows may have missed, kept until every row is up to date again.

With ``missed_steps="replay"`` a row is moved when it is next read, by its own last step and by those it has missed
since, as dense Adam would have moved it at once: in a missed step the gradient is zero. So the numbers of each step are
kept, in double precision, from the last step on at which all rows were up to date.

After :math:`n` missed steps a row's first moment has been multiplied by :math:`\prod\beta_1` and the root of its second
by :math:`\prod\sqrt{\beta_2}`, so what it moves by falls as :math:`r^n` with :math:`r = \beta_1/\sqrt{\beta_2}` does.
Steps in which that product is below ``NEGLIGIBLE`` are taken not to move it; ``docs/replay.md`` has the bound.
"""

from __future__ import annotations

import math
from array import array
from typing import Protocol

import torch
from torch import Tensor

# A missed step is passed over once r**n is below this: at the default betas from the 198th on.
NEGLIGIBLE = 1e-9
# Every step touches the sums of as many steps before it as a row can miss before what is left is negligible.
MAX_WINDOW = 1 << 16

# The columns of a history. The last three are sums over all steps so far, of logarithms.
STEP_SIZE, ROOT_SCALE, BETA1, BETA2, EPS, LOG_BETA1, LOG_BETA2, LOG_DECAY = range(NUM_COLUMNS := 8)

# Stands for a beta of zero, whose logarithm must be finite: after one step nothing is left of any number.
_SMALLEST_BETA = 1e-300


def window(beta1: float, beta2: float) -> float:
    """Return how many missed steps move a row by more than what is negligible, a whole number or infinity."""
    ratio = beta1 / math.sqrt(beta2) if beta2 > 0.0 else math.inf
    if ratio >= 1.0:
        return math.inf
    return 1 if ratio < NEGLIGIBLE else math.ceil(math.log(NEGLIGIBLE) / math.log(ratio))


class StepNumbers(Protocol):
    """What is kept of a step; ``StepScalars`` says what the numbers mean."""

    @property
    def step_size(self) -> float:
        """Of the first moment, ``lr`` and bias correction in it."""

    @property
    def root_scale(self) -> float:
        """Of the root of the second moment."""

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""

    @property
    def eps(self) -> float:
        """Added to the scaled root."""

    @property
    def decay(self) -> float:
        """Of weights."""


class History:
    """The numbers of the steps of one table since all its rows were up to date.

    Entry 0 stands for ``base``, the step at which they were; entry ``n`` for the ``n``-th step after it.

    Args:
        base: the table's step so far.
    """

    __slots__ = ("_numbers", "base", "native_cache")

    def __init__(self, base: int) -> None:
        """Start without steps."""
        self.base = base
        self._numbers = array("d", bytes(8 * NUM_COLUMNS))
        # What the native backend has summed up of these steps, and found of the rows last read.
        self.native_cache: object | None = None

    @property
    def num_steps(self) -> int:
        """Steps since ``base``."""
        return len(self._numbers) // NUM_COLUMNS - 1

    @property
    def last_step(self) -> int:
        """The table's step at the last entry."""
        return self.base + self.num_steps

    @property
    def num_bytes(self) -> int:
        """Bytes that the numbers take."""
        return len(self._numbers) * self._numbers.itemsize

    @property
    def address(self) -> int:
        """Where the numbers stand, ``[num_steps + 1, NUM_COLUMNS]`` of float64, until the next step is appended."""
        return self._numbers.buffer_info()[0]

    @property
    def log_decay(self) -> float:
        """Logarithm of what weight decay has made of a row that missed all steps."""
        return self._numbers[LOG_DECAY - NUM_COLUMNS]

    def append(self, step: StepNumbers) -> None:
        """Add a step that was just taken."""
        log_beta1, log_beta2, log_decay = self._numbers[LOG_BETA1 - NUM_COLUMNS :]
        self._numbers.extend(
            (
                step.step_size,
                step.root_scale,
                step.beta1,
                step.beta2,
                step.eps,
                log_beta1 + math.log(max(step.beta1, _SMALLEST_BETA)),
                log_beta2 + math.log(max(step.beta2, _SMALLEST_BETA)),
                log_decay + math.log(step.decay),
            )
        )

    def numbers(self) -> Tensor:
        """Return a copy of the numbers, float64 ``[num_steps + 1, NUM_COLUMNS]``."""
        return torch.frombuffer(self._numbers, dtype=torch.float64).clone().reshape(-1, NUM_COLUMNS)

    @classmethod
    def of(cls, base: int, numbers: Tensor) -> History:
        """Return the history that has these numbers."""
        made = cls(base)
        made._numbers = array("d", numbers.flatten().tolist())
        return made

    def copy(self) -> History:
        """Return the same history, to go on by itself."""
        copied = History(self.base)
        copied._numbers = self._numbers[:]
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle the numbers alone."""
        return _rebuild, (self.base, self._numbers.tobytes())


def _rebuild(base: int, numbers: bytes) -> History:
    history = History(base)
    history._numbers = array("d", numbers)
    return history
