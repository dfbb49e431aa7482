"""What every backend receives: tables, their moments, their lookups and the numbers of the step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from .. import _validate
from .._validate import GroupOptions, Place
from ..moments import Moments, StateLayout

# How backends are told what to do about rows whose gradient is not finite.
NONFINITE = {"propagate": 0, "error": 1, "skip": 2}

# Rows that an error about them names. As in csrc/step.cpp.
ROWS_NAMED = 5


class StepScalars(NamedTuple):
    """The numbers of one table's step, in double precision.

    With ``g`` the summed gradient of a row, every backend computes::

        exp_avg    = beta1 * exp_avg    + one_minus_beta1 * g
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g)
        table      = decay * table - step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)

    Where rows count their own touches, ``step_size`` and ``root_scale`` are computed for each, from ``lr``. Where rows
    owe decay, it is ``exp(log_decay of the table, this step's included - what the row has paid)`` in place of
    ``decay``.
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    root_scale: float
    eps: float
    decay: float
    lr: float
    torch_eps: bool
    log_decay: float
    seed: int
    step: int
    nonfinite: int


# What of a state's layout is kept on devices, and on the host for them.
LAYOUT_ON_DEVICES = frozenset({"stored_dtype", "one_exp_avg_sq_a_row", "amsgrad", "row_steps", "owes_decay"})


def layout_refusal(layout: StateLayout) -> str | None:
    """Say what of a state's layout only the native and the reference backend keep, or None where there is nothing."""
    unknown = [name for name in layout._fields if name not in LAYOUT_ON_DEVICES and getattr(layout, name)]
    options = ", ".join(_validate.OPTION_OF_LAYOUT[name] for name in unknown)
    return f"it does not keep what a state has with the option {options}" if unknown else None


class RowUpdate(NamedTuple):
    """One table's part in a step: its moments fit it, and its lookups are checked but for their range.

    ``indices`` is int64 ``[sparse_dim, num_lookups]`` and ``values`` ``[num_lookups, *row_shape]`` in the table's
    dtype; both are contiguous.
    """

    place: Place
    table: Tensor
    moments: Moments
    indices: Tensor
    values: Tensor
    num_lookups: int
    scalars: StepScalars
    stochastic_rounding: bool

    def is_done(self) -> bool:
        """Whether the step is counted: then it has been taken."""
        return self.moments.step >= self.scalars.step


class RowsRead(NamedTuple):
    """Rows of a table that are about to be read and may be behind; its moments replay missed steps.

    ``rows`` is int64 ``[num_rows_read]``, contiguous, on the table's device, in any order and with repeats.
    """

    place: Place
    table: Tensor
    moments: Moments
    rows: Tensor
    seed: int
    stochastic_rounding: bool


def step_scalars(options: GroupOptions, step: int) -> StepScalars:
    r"""Compute a step's numbers from its group's options.

    Kingma & Ba (2015), Algorithm 1, divides the moments by :math:`1-\beta^t` and adds ``eps`` to the corrected root:
    ``step_size`` carries the first correction and ``root_scale`` the second. With ``torch_eps`` both are carried by
    ``step_size``, as the paper's more efficient order of section 2 and :class:`torch.optim.SparseAdam` have it, and
    ``eps`` is added to the uncorrected root. ``maximize`` negates the gradient, which only the first moment can tell.
    Weight decay is decoupled (Loshchilov & Hutter, 2019): a factor of the weights before their step.

    Args:
        options: numbers of the parameter group.
        step: the table's step :math:`t`, counted from 1.
    """
    step_size, root_scale = bias_corrections(options.lr, options.beta1, options.beta2, step, options.torch_eps)
    one_minus_beta1 = 1.0 - options.beta1
    lost = max(options.lr * options.weight_decay, 0.0)  # a schedule may end at an lr of -1e-18
    return StepScalars(
        beta1=options.beta1,
        one_minus_beta1=-one_minus_beta1 if options.maximize else one_minus_beta1,
        beta2=options.beta2,
        one_minus_beta2=1.0 - options.beta2,
        step_size=step_size,
        root_scale=root_scale,
        eps=options.eps,
        decay=1.0 - lost,
        lr=options.lr,
        torch_eps=options.torch_eps,
        log_decay=math.log1p(-lost) if options.layout.owes_decay else 0.0,
        seed=options.seed or 0,
        step=step,
        nonfinite=NONFINITE[options.nonfinite],
    )


def bias_corrections(lr: float, beta1: float, beta2: float, step: Any, torch_eps: bool) -> tuple[Any, Any]:
    """Return ``step_size`` and ``root_scale`` after ``step`` steps: a number, or a tensor of the rows' own counts."""
    step_size = lr / (1.0 - beta1**step)
    root_correction2 = (1.0 - beta2**step) ** 0.5
    if torch_eps:
        return step_size * root_correction2, root_correction2**0  # 1, a number or a tensor as the other is
    return step_size, 1.0 / root_correction2
