"""Initial values of rows, functions of seed, row and column: rows need not be stored before they are used.

Every operation below is a sum, a product or a quotient, which IEEE 754 rounds correctly, in float64; the result is
rounded to the table's dtype. So whichever machine computes a row, and among whichever others, gets the same bits. A
library's logarithms and cosines, and PyTorch's square roots as well, may differ in the last place between machines, and
between the lanes of a vector and what is left over, so there are none. Native code (``csrc/initial.cpp``) does the same
operations, without their intermediate tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import rounding
from .update import native

# Wichura (1988), Algorithm AS 241, PPND16: numerators and denominators by rising power, for the middle and the tails.
_MIDDLE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAILS = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_MIDDLE_HALF_WIDTH = 0.425
_LOG_TERMS = 12
# Of Newton's iteration for a root: the first guess is off by less than a fifth, and each step squares that.
_ROOT_STEPS = 5


class Init(NamedTuple):
    """How the rows of a table begin.

    Attributes:
        kind: ``"zeros"``, ``"normal"`` or ``"uniform"``.
        scale: the standard deviation, or the bound of both signs.
        seed: in [0, 2**53).
    """

    kind: str
    scale: float
    seed: int

    def values(self, rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        r"""Return the initial values of some rows, ``[len(rows), dim]``.

        With :math:`k` the 32 bits of ``rounding.element_bits(seed, rows, dim)`` and :math:`p = (k + 1/2) / 2^{32}`, it
        is :math:`\mathrm{scale}\,\Phi^{-1}(p)` or :math:`\mathrm{scale}\,(2p - 1)`, with :math:`\Phi^{-1}` the inverse
        of the normal distribution function as in Wichura's AS 241 (relative error about 1e-16). The largest magnitude
        that ``"normal"`` can give is 6.34 times ``scale``.

        References:
            Wichura, *Algorithm AS 241: The Percentage Points of the Normal Distribution*, 1988,
            https://doi.org/10.2307/2347330
        """
        if self.kind == "zeros":
            return torch.zeros((len(rows), dim), dtype=dtype, device=rows.device)
        # PyTorch, too, rounds float64 to half precision by way of float32.
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        if native.module() is None:
            return self.reference_values(rows, dim).to(wide).to(dtype)
        return native.initial_values(self.kind, self.scale, self.seed, rows.contiguous(), dim, wide).to(dtype)

    def reference_values(self, rows: Tensor, dim: int) -> Tensor:
        """Return what ``values`` returns, in float64, of PyTorch operations: the definition."""
        probability = (rounding.element_bits(self.seed, rows, dim).to(torch.float64) + 0.5) * 2.0**-32
        centred = probability - 0.5
        values = _normal_quantile(probability, centred) if self.kind == "normal" else centred * 2.0
        return values * self.scale


def _normal_quantile(probability: Tensor, centred: Tensor) -> Tensor:
    middle = centred * _ratio(_MIDDLE, _MIDDLE_HALF_WIDTH**2 - centred * centred)
    is_tail = centred.abs() > _MIDDLE_HALF_WIDTH
    tail = torch.minimum(probability[is_tail], 1.0 - probability[is_tail])
    # AS 241 has a third form for tails below exp(-25); the least here is 2**-33.
    middle[is_tail] = _ratio(_TAILS, _root(-_log(tail)) - 1.6).copysign(centred[is_tail])
    return middle


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    above, below = (_polynomial(each, x) for each in coefficients)
    return above / below


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive numbers: of the power of two, and of the rest by a series."""
    mantissa, exponent = torch.frexp(x)
    is_low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(is_low, mantissa * 2.0, mantissa)
    exponent = exponent.to(x.dtype) - is_low.to(x.dtype)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)  # log(m) = 2 artanh((m - 1) / (m + 1))
    series = _polynomial(tuple(1.0 / (2 * term + 1) for term in range(_LOG_TERMS)), ratio * ratio)
    return exponent * math.log(2.0) + ratio * series * 2.0


def _root(x: Tensor) -> Tensor:
    """Return the square root of numbers from 2.5 to 23, which those of tails are."""
    root = 1.5 + x * 0.15
    for _ in range(_ROOT_STEPS):
        root = (root + x / root) * 0.5
    return root
