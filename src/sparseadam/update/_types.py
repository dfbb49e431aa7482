"""What every backend receives: tables, their moments, their lookups and the numbers of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .._validate import GroupOptions, Place
from ..moments import Moments


class StepScalars(NamedTuple):
    """The numbers of one table's step, in double precision.

    With ``g`` the summed gradient of a row, every backend computes::

        exp_avg    = beta1 * exp_avg    + one_minus_beta1 * g
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g)
        table     -= step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    root_scale: float
    eps: float


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


def step_scalars(options: GroupOptions, step: int) -> StepScalars:
    r"""Compute a step's numbers from its group's options.

    Kingma & Ba (2015), Algorithm 1, divides the moments by :math:`1-\beta^t` and adds ``eps`` to the corrected root:
    ``step_size`` carries the first correction and ``root_scale`` the second. With ``torch_eps`` both are carried by
    ``step_size``, as the paper's more efficient order of section 2 and :class:`torch.optim.SparseAdam` have it, and
    ``eps`` is added to the uncorrected root. ``maximize`` negates the gradient, which only the first moment can tell.

    Args:
        options: numbers of the parameter group.
        step: the table's step :math:`t`, counted from 1.
    """
    bias_correction1 = 1.0 - options.beta1**step
    root_correction2 = math.sqrt(1.0 - options.beta2**step)
    one_minus_beta1 = 1.0 - options.beta1
    step_size = options.lr / bias_correction1
    return StepScalars(
        beta1=options.beta1,
        one_minus_beta1=-one_minus_beta1 if options.maximize else one_minus_beta1,
        beta2=options.beta2,
        one_minus_beta2=1.0 - options.beta2,
        step_size=step_size * root_correction2 if options.torch_eps else step_size,
        root_scale=1.0 if options.torch_eps else 1.0 / root_correction2,
        eps=options.eps,
    )
