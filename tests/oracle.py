r"""What every backend is measured against: the formulas of the design in float64 NumPy, and how far rounding may stray.

Written from the formulas alone; shares no code with the package. Moments are dense here, and so is everything else.

Beside each number the oracle carries a bound on the error of a computation in a smaller type, by the standard model of
rounding: each operation gives its exact result times (1 + d), |d| <= u, with u half the spacing of the type at 1.
The gradients of the tests are small multiples of a power of two, so their sums are exact in every type and start no
error of their own. With e(x) for the bound on x, to first order in u:

    e(m') = b1*e(m) + 4u * (b1*|m| + (1-b1)*|g|)            b1 and 1-b1 rounded, two products, one sum
    e(v') = b2*e(v) + 5u * v'                               the same and g*g; all terms positive
    e(change) = |change| * (e(m')/|m'| + e(v')/(2 v') + 8u)   step_size, scale and eps rounded; root, two products,
                                                            sum, quotient
    e(theta') = e(theta) + e(change) + u * |theta'| + w * |theta'|

w is the half spacing of the table's own type where that is narrower than its moments'. The oracle's own float64 errors
are of the same form, so a float64 computation is allowed twice the bound; so is every other, for the terms in u*u.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# What a subnormal or an underflowing product may lose, far below every value that the tests look at.
TINY = 1e-40


@dataclass
class OracleTable:
    """A table of shape ``[num_rows, width]`` with dense moments, and bounds on what rounding may do to each."""

    theta: Array
    dtype: str
    m: Array = field(init=False)
    v: Array = field(init=False)
    t: int = 0

    def __post_init__(self) -> None:
        """Start with zero moments and exact values."""
        self.theta = self.theta.astype(np.float64)
        self.m, self.v = np.zeros_like(self.theta), np.zeros_like(self.theta)
        self.theta_error, self.m_error, self.v_error = (np.zeros_like(self.theta) for _ in range(3))

    def step(
        self,
        rows: npt.NDArray[np.int64],
        values: Array,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        maximize: bool = False,
        torch_eps: bool = False,
    ) -> None:
        """Take one step on lookups ``rows`` ``[num_lookups]`` with ``values`` ``[num_lookups, width]``."""
        b1, b2 = betas
        self.t += 1
        summed = np.zeros_like(self.theta)
        np.add.at(summed, rows, -values if maximize else values)
        i = np.unique(rows)
        g = summed[i]

        u = UNIT_ROUNDOFF["float64" if self.dtype == "float64" else "float32"]
        self.m_error[i] = b1 * self.m_error[i] + 4 * u * (b1 * abs(self.m[i]) + (1 - b1) * abs(g))
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        self.v_error[i] = b2 * self.v_error[i] + 5 * u * self.v[i]

        mhat = self.m[i] / (1 - b1**self.t)
        vhat = self.v[i] / (1 - b2**self.t)
        if torch_eps:
            denom = (np.sqrt(self.v[i]) + eps) / np.sqrt(1 - b2**self.t)
        else:
            denom = np.sqrt(vhat) + eps
        self.theta[i] -= lr * mhat / denom

        change = abs(lr * mhat / denom)
        from_m = lr * self.m_error[i] / (1 - b1**self.t) / denom
        from_v = change * self.v_error[i] / np.maximum(2 * self.v[i], TINY)
        narrow = UNIT_ROUNDOFF[self.dtype] if self.dtype in ("bfloat16", "float16") else 0.0
        self.theta_error[i] += from_m + from_v + 8 * u * change + (u + narrow) * (abs(self.theta[i]) + change)
        if narrow:
            self.theta_error[i] += 2.0**-24  # half the spacing of float16's subnormals, and more than bfloat16's

    def assert_close(self, theta: Array, m: Array, v: Array) -> None:
        """Compare a backend's numbers with the oracle's, each within twice its bound."""
        for name, got, want, error in (
            ("table", theta, self.theta, self.theta_error),
            ("exp_avg", m, self.m, self.m_error),
            ("exp_avg_sq", v, self.v, self.v_error),
        ):
            excess = abs(got - want) - 2 * error - TINY
            worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else None
            assert not (excess > 0).any(), (
                f"{name} at {worst} after step {self.t}: {got[worst]!r}, expected {want[worst]!r} "
                f"within {2 * error[worst]:.3g}"
            )
