"""Rounding in Triton: the numbers of ``csrc/rounding.h``, where the scheme is described, bit for bit.

Everything here works on blocks of float32 and of uint32 bits. bfloat16 is widened and rounded by its bits and not by a
cast, because Triton's interpreter rounds casts to bfloat16 wrongly (a carry out of the mantissa is lost).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import rounding

_GOLDEN64 = tl.constexpr(rounding.GOLDEN64)
_GOLDEN32 = tl.constexpr(rounding.GOLDEN32)
_MIX64_FIRST = tl.constexpr(rounding.MIX64[0])
_MIX64_SECOND = tl.constexpr(rounding.MIX64[1])
_SMALLEST_SCALE = tl.constexpr(rounding.SMALLEST_SCALE)

EXP_AVG = tl.constexpr(rounding.EXP_AVG)
EXP_AVG_SQ = tl.constexpr(rounding.EXP_AVG_SQ)
TABLE = tl.constexpr(rounding.TABLE)

_EXP_AVG_EXPONENT_BITS = tl.constexpr(rounding.EXP_AVG_EXPONENT_BITS)
_EXP_AVG_SQ_EXPONENT_BITS = tl.constexpr(rounding.EXP_AVG_SQ_EXPONENT_BITS)
_TOP = tl.constexpr(rounding.TOP)

_LARGEST_FLOAT32 = tl.constexpr(0x7F7FFFFF)
_LARGEST_BFLOAT16 = tl.constexpr(0x7F7F0000)


# Random bits --------------------------------------------------------------------------------------


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * _MIX64_FIRST
    z = (z ^ (z >> 27)) * _MIX64_SECOND
    return z ^ (z >> 31)


@triton.jit
def row_keys(step_key, rows):
    """Return uint32 keys of int64 ``rows``, from the table's step's, which is a uint64."""
    return (_mix64(step_key + _GOLDEN64 * (rows.to(tl.uint64) + 1)) >> 32).to(tl.uint32)


@triton.jit
def random_bits(row_key, columns, what: tl.constexpr):
    """Return 32 random bits for each element: ``row_key`` is ``[rows, 1]`` and ``columns`` ``[1, columns]``."""
    x = row_key + _GOLDEN32 * (columns.to(tl.uint32) * 4 + what)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _bits_of(values):
    return values.to(tl.float32).to(tl.uint32, bitcast=True)


@triton.jit
def _from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _round_to_whole(values, random):
    below = tl.floor(values)
    unit_interval = (random >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
    return below + (unit_interval < values - below).to(tl.float32)


# Floats of 16 bits --------------------------------------------------------------------------------


@triton.jit
def widen(values, dtype: tl.constexpr):
    """Return values of any floating dtype in the dtype that moments are computed in."""
    if values.dtype == tl.bfloat16:
        return _from_bits(values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(dtype)
    else:
        return values.to(dtype)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """Round to nearest, ties to even."""
    if dtype == tl.bfloat16:
        bits = _bits_of(values)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(is_nan, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def narrow_stochastically(values, random, dtype: tl.constexpr):
    """Round up or down by ``random``; chance makes no infinity of a number that has finite neighbours."""
    magnitude = _bits_of(values) & 0x7FFFFFFF
    sign = _bits_of(values) & 0x80000000
    if dtype == tl.bfloat16:
        rounded = (magnitude + (random & 0xFFFF)) & 0xFFFF0000
        rounded = tl.where(rounded < _LARGEST_BFLOAT16, rounded, _LARGEST_BFLOAT16)
        chosen = ((rounded | sign) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where(magnitude <= _LARGEST_BFLOAT16, chosen, narrow(values, tl.bfloat16))
    else:
        # Among float32's values that float16 has as well; below 2**-14 those are 2**-24 apart.
        value = _from_bits(magnitude)
        normal = _from_bits((magnitude + (random & 0x1FFF)) & 0xFFFFE000)
        normal = tl.where(normal < 65504.0, normal, 65504.0)
        is_normal = value >= 6.103515625e-05  # 2**-14
        in_spacings = tl.where(is_normal, 0.0, value * 16777216.0)  # 2**24
        subnormal = _round_to_whole(in_spacings, random) * 5.9604644775390625e-08
        rounded = tl.where(is_normal, normal, subnormal)
        chosen = tl.where(value <= 65504.0, rounded, value)
        return _from_bits(_bits_of(chosen) | sign).to(tl.float16)


# Codes of 8 bits ----------------------------------------------------------------------------------


@triton.jit
def block_scales(values):
    """Return the largest magnitude of each row of a block, ``[rows, 1]``: NaN where one is not finite, zero if tiny."""
    # The magnitudes of floats are ordered as their bits are, and NaN's are the largest.
    largest = tl.max((_bits_of(values) & 0x7FFFFFFF).to(tl.int32), axis=1)[:, None].to(tl.uint32)
    scales = _from_bits(largest)
    scales = tl.where(largest <= _LARGEST_FLOAT32, scales, _from_bits(largest | 0x7FC00000))
    return tl.where(scales < _SMALLEST_SCALE, 0.0, scales)


@triton.jit
def _encode(unit, random, exponent_bits: tl.constexpr):
    """Return the codes, uint32, of numbers in [0, _TOP]; ``csrc/rounding.h`` has the formula."""
    top: tl.constexpr = 2**exponent_bits - 1
    smallest_normal: tl.constexpr = 2.0 ** (1 - top)
    largest: tl.constexpr = 2 ** (exponent_bits + 3) - 1
    normal = (_bits_of(unit) - ((127 - top) << 23) + (random & 0xFFFFF)) >> 20
    is_normal = unit >= smallest_normal
    in_spacings = tl.where(is_normal, smallest_normal, unit) * (8.0 / smallest_normal)
    subnormal = _round_to_whole(in_spacings, random).to(tl.int32).to(tl.uint32)
    codes = tl.where(is_normal, normal, subnormal)
    return tl.where(codes < largest, codes, largest)


@triton.jit
def _to_units(magnitudes, scales):
    """Return magnitudes as shares of their block's scale, times ``_TOP``; zero where nothing is stored."""
    is_stored = scales > 0
    factor = tl.div_rn(tl.full(scales.shape, _TOP, tl.float32), tl.where(is_stored, scales, 1.0))
    return tl.where(is_stored, magnitudes * factor, 0.0)


@triton.jit
def _decode(codes, exponent_bits: tl.constexpr):
    top: tl.constexpr = 2**exponent_bits - 1
    spacing: tl.constexpr = 2.0 ** (1 - top) / 8
    normal = _from_bits((codes << 20) + ((127 - top) << 23))
    return tl.where(codes < 8, codes.to(tl.float32) * spacing, normal)


@triton.jit
def encode_exp_avg(values, scales, random):
    """Return the uint8 codes of first moments, whose blocks' scales are ``[rows, 1]``."""
    bits = _bits_of(values)
    codes = _encode(_to_units(_from_bits(bits & 0x7FFFFFFF), scales), random, _EXP_AVG_EXPONENT_BITS)
    return tl.where(scales > 0, codes | (bits >> 31 << 7), 0).to(tl.uint8)


@triton.jit
def decode_exp_avg(codes, scales):
    """Return the float32 first moments that codes stand for."""
    bits = codes.to(tl.uint32)
    magnitudes = _decode(bits & 0x7F, _EXP_AVG_EXPONENT_BITS) * tl.div_rn(scales, _top_like(scales))
    return _from_bits(_bits_of(magnitudes) | (bits >> 7 << 31))


@triton.jit
def encode_exp_avg_sq(values, scales, random):
    """Return the uint8 codes of second moments; one above zero never gets the code of zero."""
    values = values.to(tl.float32)
    codes = _encode(_to_units(values, scales), random, _EXP_AVG_SQ_EXPONENT_BITS)
    codes = tl.where((codes == 0) & (values > 0), 1, codes)
    return tl.where(scales > 0, codes, 0).to(tl.uint8)


@triton.jit
def decode_exp_avg_sq(codes, scales):
    """Return the float32 second moments that codes stand for."""
    return _decode(codes.to(tl.uint32), _EXP_AVG_SQ_EXPONENT_BITS) * tl.div_rn(scales, _top_like(scales))


@triton.jit
def _top_like(scales):
    return tl.full(scales.shape, _TOP, tl.float32)
