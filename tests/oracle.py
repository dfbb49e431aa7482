r"""What every backend is measured against: the formulas of the design in float64 NumPy, and how far rounding may stray.

Written from the formulas alone; shares no code with the package. Moments are dense here, and so is everything else.

Beside each number the oracle carries a bound on the error of a computation in a smaller type, by the standard model of
rounding: each operation gives its exact result times (1 + d), |d| <= u, with u half the spacing of the type at 1.
The gradients of the tests are small multiples of a power of two, so their sums are exact in every type and start no
error of their own. With e(x) for the bound on x, to first order in u:

    e(m') = b1*e(m) + 4u * (b1*|m| + (1-b1)*|g|)            b1 and 1-b1 rounded, two products, one sum
    e(v') = b2*e(v) + 5u * v'                               the same and g*g; all terms positive
    e(v') = b2*e(v) + (5+width)u * v'                       one v a row: width-1 sums and a quotient more for the mean
    e(vmax') = max(e(vmax), e(v'))                          a maximum rounds nothing
    e(change) = |change| * (e(m')/|m'| + e(v')/(2 v') + 8u) step_size, scale and eps rounded; root, two products,
                                                            sum, quotient. With amsgrad vmax stands for v
              + |change| * 2w * (b1**n/(1-b1**n) + b2**n/(2 (1-b2**n)))   the powers in double, w = 2**-53
    e(decay*theta) = decay*e(theta) + (e(decay) + u*decay) * |theta|      nothing where nothing decays
    e(theta') = e(decay*theta) + e(change) + u * |theta'| + h * |theta'|

h is the half spacing of the table's own type where that is narrower than its moments'. The decay itself is computed in
double and rounded once, e(decay) = u*decay + 2w*(1 + lr*wd) for one step's 1 - lr*wd. What a row owes for several steps
is the exponential of a difference of two sums of logarithms: a step adds w*(2/f + |log f| + |sum|) to its absolute
error, f = 1 - lr*wd, and paying it w*(3 + |what is owed|).

The oracle's own float64 errors are of the same form, so a float64 computation is allowed twice the bound; so is every
other, for the terms in u*u.

What is rounded stochastically is compared otherwise: it must be one of the two neighbours, on the grid of its type, of
a value within the bound of the oracle's (for moments within 8 * 2**-24 more: they are rounded from float32, and codes
by the rounded reciprocal of a float32 scale). The oracle then goes on from what was stored, so that a step is judged by
itself; that the choice among the neighbours is right on average is the matter of ``test_rounding.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# What a subnormal or an underflowing product may lose, far below every value that the tests look at.
TINY = 1e-40
SINGLE, DOUBLE = UNIT_ROUNDOFF["float32"], UNIT_ROUNDOFF["float64"]

# Bits of the fraction and smallest exponent of a normal number.
FLOAT_FORMATS = {"bfloat16": (7, -126), "float16": (10, -14)}
BLOCK_SIZE = 128


# Grids --------------------------------------------------------------------------------------------


def spacing(x: Array, dtype: str) -> Array:
    """Return the distance between the two numbers of a float type that enclose each ``x``, or that follow it."""
    fraction_bits, smallest = FLOAT_FORMATS[dtype]
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, smallest)
    return np.ldexp(1.0, exponent - fraction_bits)


def float_neighbours(low: Array, high: Array, dtype: str) -> tuple[Array, Array]:
    """Return the last number of a float type not above ``low`` and the first not below ``high``; both are finite."""
    below, above = spacing(low, dtype), spacing(high, dtype)
    return np.floor(low / below) * below, np.ceil(high / above) * above


def code_shares(exponent_bits: int) -> Array:
    """Return the magnitudes of all codes as shares of the scale, ascending; the last is 1.

    A code is an unsigned float of ``exponent_bits`` and three bits of fraction, the exponent above: with the exponent's
    bits at zero the numbers are evenly spaced down to zero.
    """
    codes = np.arange(2 ** (exponent_bits + 3))
    exponent, fraction = codes // 8, codes % 8 / 8
    values = np.where(exponent > 0, np.ldexp(1 + fraction, exponent), np.ldexp(fraction, 1))
    return values / values[-1]


EXP_AVG_SHARES, EXP_AVG_SQ_SHARES = code_shares(4), code_shares(5)


def scale_of_element(scales: Array, width: int) -> Array:
    """Spread the scales of blocks ``[num_rows, num_blocks]`` over the elements ``[num_rows, width]``."""
    return np.repeat(scales, BLOCK_SIZE, axis=1)[:, :width]


def block_maxima(x: Array) -> Array:
    """Return the largest magnitude of each block of each row, ``[num_rows, num_blocks]``."""
    return np.stack(
        [abs(x[:, begin : begin + BLOCK_SIZE]).max(axis=1) for begin in range(0, x.shape[1], BLOCK_SIZE)], axis=1
    )


def decode_exp_avg(codes: npt.NDArray[np.uint8], scales: Array) -> Array:
    """Return first moments from their codes: a sign in the highest bit, then four bits of exponent."""
    magnitudes = EXP_AVG_SHARES[codes & 127] * scale_of_element(scales, codes.shape[1])
    return np.where(codes >= 128, -magnitudes, magnitudes)


def decode_exp_avg_sq(codes: npt.NDArray[np.uint8], scales: Array) -> Array:
    """Return second moments from their codes: five bits of exponent, no sign."""
    return EXP_AVG_SQ_SHARES[codes] * scale_of_element(scales, codes.shape[1])


def share_neighbours(magnitude: Array, error: Array, scales: Array, shares: Array) -> tuple[Array, Array]:
    """Return the codes' values around ``magnitude``, each ``error`` further out; the last is the scale itself."""
    scale = scale_of_element(scales, magnitude.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        low = np.where(scale > 0, np.maximum(magnitude - error, 0) / scale, 0.0)
        high = np.where(scale > 0, (magnitude + error) / scale, 0.0)
    below = np.maximum(np.searchsorted(shares, low, side="right") - 1, 0)
    above = np.minimum(np.searchsorted(shares, high, side="left"), len(shares) - 1)
    return shares[below] * scale, shares[above] * scale


# State, as the design describes it ----------------------------------------------------------------


def read_state(state: Mapping[str, Any], num_rows: int, width: int) -> dict[str, Array]:
    """Spread a table's state out by row and decode it; rows that have no slot are zero.

    Args:
        state: a table's state, a mapping of tensors and numbers, or an empty one.
        num_rows: rows of the table.
        width: elements of a row.

    Returns:
        ``exp_avg`` ``[num_rows, width]``, ``exp_avg_sq`` and, if there is one, ``max_exp_avg_sq``
        (``[num_rows, width]``, or ``[num_rows, 1]`` if a row has one), the scales ``[num_rows, num_blocks]``, and
        ``row_steps`` and ``paid_log_decay`` ``[num_rows, 1]``.
    """
    if not state:
        return {"exp_avg": np.zeros((num_rows, width)), "exp_avg_sq": np.zeros((num_rows, width))}
    rows = state["rows"].numpy()
    parts: dict[str, Array] = {}
    for key, part in state.items():
        if key in ("step", "rows", "log_decay", "num_skipped"):
            continue
        by_slot = part.reshape(len(rows), int(np.prod(part.shape[1:])))
        is_code = str(part.dtype) == "torch.uint8"
        numbers = by_slot.numpy() if is_code else by_slot.double().numpy()
        dense = np.zeros((num_rows, numbers.shape[1]), numbers.dtype)
        dense[rows] = numbers
        parts[key] = dense
    if "exp_avg_scale" in parts:
        parts["exp_avg"] = decode_exp_avg(parts["exp_avg"], parts["exp_avg_scale"])
    if "exp_avg_sq_scale" in parts:
        parts["exp_avg_sq"] = decode_exp_avg_sq(parts["exp_avg_sq"], parts["exp_avg_sq_scale"])
    return parts


# The rule -----------------------------------------------------------------------------------------


@dataclass
class OracleTable:
    """A table of shape ``[num_rows, width]`` with dense moments, and bounds on what rounding may do to each.

    The options that shape the state are the table's, all others each step's. ``v`` and ``vmax`` are ``[num_rows, 1]``
    with one second moment a row; ``counts`` ``[num_rows]`` says how often a row was touched, and ``owed``
    ``[num_rows, 1]`` what it must still be multiplied by.
    """

    theta: Array
    dtype: str
    amsgrad: bool = False
    bias_correction: str = "table"
    second_moment: str = "element"
    weight_decay_mode: str = "touched"
    moment_dtype: str | None = None
    stochastic_rounding: bool = False
    m: Array = field(init=False)
    v: Array = field(init=False)
    vmax: Array = field(init=False)
    t: int = 0
    num_skipped: int = 0

    def __post_init__(self) -> None:
        """Start with zero moments and exact values."""
        self.theta = self.theta.astype(np.float64)
        num_rows, width = self.theta.shape
        self.m = np.zeros((num_rows, width))
        self.v = np.zeros((num_rows, 1 if self.second_moment == "row" else width))
        self.vmax = np.zeros_like(self.v)
        self.theta_error, self.m_error = np.zeros_like(self.theta), np.zeros_like(self.m)
        self.v_error, self.vmax_error = np.zeros_like(self.v), np.zeros_like(self.v)
        self.counts = np.zeros(num_rows, dtype=np.int64)
        self.owed, self.log_error = np.ones((num_rows, 1)), np.zeros((num_rows, 1))
        self.log_decay = 0.0  # the sum since the last flush, whose size is what the package's sums round by
        self.u = UNIT_ROUNDOFF["float64" if self.dtype == "float64" else "float32"]

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
        weight_decay: float = 0.0,
        nonfinite: str = "propagate",
    ) -> None:
        """Take one step on lookups ``rows`` ``[num_lookups]`` with ``values`` ``[num_lookups, width]``."""
        self.t += 1
        if self.weight_decay_mode == "exact":
            self._owe(lr * weight_decay)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            summed = np.zeros_like(self.theta)
            np.add.at(summed, rows, -values if maximize else values)
            i = np.unique(rows)
            if nonfinite == "skip":
                is_finite = np.isfinite(summed[i]).all(axis=1)
                self.num_skipped += int((~is_finite).sum())
                i = i[is_finite]
            self.counts[i] += 1
            self._move_moments(i, summed[i], betas)
            change, change_error = self._change(i, lr, betas, eps, torch_eps)
            decay, decay_error = self._pay(i) if self.weight_decay_mode == "exact" else self._decay(lr * weight_decay)
            self._move_table(i, decay, decay_error, change, change_error)

    def flush(self) -> None:
        """Pay what every row owes."""
        is_owing = np.flatnonzero(self.owed[:, 0] != 1)
        decay, decay_error = self._pay(is_owing)
        nothing = np.zeros_like(self.theta[is_owing])
        self._move_table(is_owing, decay, decay_error, nothing, nothing)
        self.log_decay = 0.0

    def _owe(self, decayed: float) -> None:
        """Let every row owe one step's decay."""
        if decayed == 0:
            return
        factor = 1 - decayed
        self.owed *= factor
        self.log_decay += np.log(factor)
        self.log_error += DOUBLE * (2 / factor + abs(np.log(factor)) + abs(self.log_decay))

    def _pay(self, i: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return what rows ``i`` are multiplied by and its error, after which they owe nothing."""
        decay, log_error = self.owed[i].copy(), self.log_error[i]
        relative = self.u + log_error + DOUBLE * (3 + abs(np.log(decay)))
        self.owed[i], self.log_error[i] = 1, 0
        return decay, np.where(decay == 1, 0.0, relative * decay)

    def _decay(self, decayed: float) -> tuple[Array, Array]:
        decay = 1 - decayed
        error = 0.0 if decayed == 0 else self.u * abs(decay) + 2 * DOUBLE * (1 + decayed)
        return np.full((1, 1), decay), np.full((1, 1), error)

    def _move_moments(self, i: npt.NDArray[np.int64], g: Array, betas: tuple[float, float]) -> None:
        b1, b2 = betas
        self.m_error[i] = b1 * self.m_error[i] + 4 * self.u * (b1 * abs(self.m[i]) + (1 - b1) * abs(g))
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        square, roundings = g * g, 5
        if self.second_moment == "row":
            square, roundings = square.mean(axis=1, keepdims=True), 5 + g.shape[1]
        self.v[i] = b2 * self.v[i] + (1 - b2) * square
        self.v_error[i] = b2 * self.v_error[i] + roundings * self.u * self.v[i]
        self.vmax[i] = np.maximum(self.vmax[i], self.v[i])
        self.vmax_error[i] = np.maximum(self.vmax_error[i], self.v_error[i])

    def _change(
        self, i: npt.NDArray[np.int64], lr: float, betas: tuple[float, float], eps: float, torch_eps: bool
    ) -> tuple[Array, Array]:
        """Return what is taken from rows ``i``, and its error."""
        b1, b2 = betas
        n = self.counts[i, None] if self.bias_correction == "row" else np.full((len(i), 1), self.t)
        power1, power2 = np.power(b1, n), np.power(b2, n)
        used, used_error = (self.vmax, self.vmax_error) if self.amsgrad else (self.v, self.v_error)
        mhat = self.m[i] / (1 - power1)
        if torch_eps:
            denom = (np.sqrt(used[i]) + eps) / np.sqrt(1 - power2)
        else:
            denom = np.sqrt(used[i] / (1 - power2)) + eps
        change = lr * mhat / denom
        from_m = lr * self.m_error[i] / (1 - power1) / denom
        from_v = abs(change) * used_error[i] / np.maximum(2 * used[i], TINY)
        from_powers = abs(change) * 2 * DOUBLE * (power1 / (1 - power1) + power2 / (2 * (1 - power2)))
        return change, from_m + from_v + from_powers + 8 * self.u * abs(change)

    def _move_table(
        self, i: npt.NDArray[np.int64], decay: Array, decay_error: Array, change: Array, change_error: Array
    ) -> None:
        decayed = decay * self.theta[i]
        product_error = np.where(decay == 1, 0.0, decay_error * abs(self.theta[i]) + self.u * abs(decayed))
        self.theta[i] = decayed - change
        narrow = UNIT_ROUNDOFF[self.dtype] if self.dtype in FLOAT_FORMATS and not self.stochastic_rounding else 0.0
        self.theta_error[i] = abs(decay) * self.theta_error[i] + product_error + change_error
        self.theta_error[i] += (self.u + narrow) * (abs(self.theta[i]) + abs(change))
        if narrow:
            self.theta_error[i] += 2.0**-24  # half the spacing of float16's subnormals, and more than bfloat16's

    # Comparing ------------------------------------------------------------------------------------

    def assert_close(self, theta: Array, m: Array, v: Array, vmax: Array | None = None) -> None:
        """Compare a backend's numbers with the oracle's, each within twice its bound; NaN is NaN's equal."""
        self._assert_within("table", theta, self.theta, self.theta_error)
        self._assert_within("exp_avg", m, self.m, self.m_error)
        self._assert_within("exp_avg_sq", v, self.v, self.v_error)
        if vmax is not None:
            self._assert_within("max_exp_avg_sq", vmax, self.vmax, self.vmax_error)

    def assert_step(self, theta: Array, parts: Mapping[str, Array]) -> None:
        """Compare the table and its state, as :func:`read_state` gives it, and go on from what is stored.

        Of the parts, only those are taken over that are rounded stochastically.
        """
        if self.stochastic_rounding:
            error = 2 * self.theta_error
            low, high = float_neighbours(self.theta - error, self.theta + error, self.dtype)
            self._assert_between("table", theta, low, high)
            self.theta, self.theta_error = theta.copy(), np.zeros_like(theta)
        else:
            self._assert_within("table", theta, self.theta, self.theta_error)
        self._assert_exp_avg(parts)
        self._assert_exp_avg_sq(parts)
        if self.amsgrad and self.t:
            self._assert_within("max_exp_avg_sq", parts["max_exp_avg_sq"], self.vmax, self.vmax_error)
        if self.bias_correction == "row" and self.t:
            assert np.array_equal(parts["row_steps"][:, 0], self.counts)

    def _assert_exp_avg(self, parts: Mapping[str, Array]) -> None:
        stored, error = parts["exp_avg"], 2 * self.m_error + 8 * SINGLE * abs(self.m) + TINY
        if self.moment_dtype is None:
            self._assert_within("exp_avg", stored, self.m, self.m_error)
            return
        if self.moment_dtype == "bfloat16":
            self._assert_between("exp_avg", stored, *float_neighbours(self.m - error, self.m + error, "bfloat16"))
        elif "exp_avg_scale" in parts:
            scales = parts["exp_avg_scale"]
            self._assert_scales("exp_avg_scale", scales, self.m, error)
            low, high = share_neighbours(abs(self.m), error, scales, EXP_AVG_SHARES)
            self._assert_between("exp_avg", abs(stored), low, high)
            assert (stored * self.m >= 0).all() or (abs(self.m) <= error)[stored * self.m < 0].all()
        # What decoding rounds, in float32: the share and its product with the scale.
        self.m, self.m_error = stored.copy(), 2 * SINGLE * abs(stored)

    def _assert_exp_avg_sq(self, parts: Mapping[str, Array]) -> None:
        stored, error = parts["exp_avg_sq"], 2 * self.v_error + 8 * SINGLE * self.v + TINY
        if self.moment_dtype is None or self.second_moment == "row":
            if self.t:
                self._assert_within("exp_avg_sq", stored, self.v, self.v_error)
            return
        if self.moment_dtype == "bfloat16":
            low, high = float_neighbours(np.maximum(self.v - error, 0), self.v + error, "bfloat16")
            self._assert_between("exp_avg_sq", stored, low, high)
        elif "exp_avg_sq_scale" in parts:
            scales = parts["exp_avg_sq_scale"]
            self._assert_scales("exp_avg_sq_scale", scales, self.v, error)
            low, high = share_neighbours(self.v, error, scales, EXP_AVG_SQ_SHARES)
            self._assert_between("exp_avg_sq", stored, low, high)
            assert (stored[self.v > error] > 0).all(), "a second moment above zero was stored as zero"
        self.v, self.v_error = stored.copy(), 2 * SINGLE * stored

    def assert_owed(self, log_decay: float, paid_log_decay: Array) -> None:
        """Compare what each row owes; ``paid_log_decay`` is ``[num_rows, 1]``, zero for rows without a slot."""
        bound = 2 * (self.log_error + DOUBLE * (3 + abs(np.log(self.owed)) + abs(self.log_decay)))
        difference = abs((log_decay - paid_log_decay) - np.log(self.owed))
        assert (difference <= bound).all(), f"owed differs by {difference.max():.3g} after step {self.t}"

    def _assert_within(self, name: str, got: Array, want: Array, error: Array) -> None:
        assert got.shape == want.shape, f"{name} has shape {got.shape}, expected {want.shape}"
        with np.errstate(invalid="ignore"):
            is_near = abs(got - want) <= 2 * error + TINY
        is_near |= (got == want) | (np.isnan(got) & np.isnan(want))
        if not is_near.all():
            worst = tuple(np.argwhere(~is_near)[0])
            raise AssertionError(
                f"{name} at {worst} after step {self.t}: {got[worst]!r}, expected {want[worst]!r} "
                f"within {2 * error[worst]:.3g}; {(~is_near).sum()} elements differ"
            )

    def _assert_between(self, name: str, got: Array, low: Array, high: Array) -> None:
        assert got.shape == low.shape, f"{name} has shape {got.shape}, expected {low.shape}"
        is_between = (low - TINY <= got) & (got <= high + TINY)
        if not is_between.all():
            worst = tuple(np.argwhere(~is_between)[0])
            raise AssertionError(
                f"{name} at {worst} after step {self.t}: {got[worst]!r} is no neighbour, those are "
                f"{low[worst]!r} and {high[worst]!r}; {(~is_between).sum()} elements differ"
            )

    def _assert_scales(self, name: str, scales: Array, exact: Array, error: Array) -> None:
        """A scale is its block's largest magnitude."""
        largest = block_maxima(exact)
        self._assert_within(name, scales, largest, block_maxima(error) / 2)
