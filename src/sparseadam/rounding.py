"""Stochastic rounding and 8-bit codes in PyTorch operations, on any device.

The same numbers as ``csrc/rounding.h``, where the scheme is described: random bits are a function of seed, table, step,
row and element, and a code is a small float relative to the largest magnitude of its block.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Elements of a row that share a scale.
BLOCK_SIZE = 128
# What is rounded: each has random bits of its own.
EXP_AVG, EXP_AVG_SQ, TABLE, MISSED_STEPS = range(4)

_MANTISSA_BITS = 3
EXP_AVG_EXPONENT_BITS, EXP_AVG_SQ_EXPONENT_BITS = 4, 5
SMALLEST_SCALE = 1e-36
_MASK64, _MASK32 = 2**64 - 1, 2**32 - 1
GOLDEN64, GOLDEN32 = 0x9E3779B97F4A7C15, 0x9E3779B9
MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _mix64(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014) of a number below 2**64."""
    z = ((z ^ (z >> 30)) * MIX64[0]) & _MASK64
    z = ((z ^ (z >> 27)) * MIX64[1]) & _MASK64
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, count: int) -> Tensor:
    """Shift int64 right as if it had no sign."""
    mask: int = 2 ** (64 - count) - 1
    return (z >> count) & mask


def _mix64_each(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(MIX64[0])
    z = (z ^ _shifted(z, 27)) * _signed(MIX64[1])
    return z ^ _shifted(z, 31)


def step_key(seed: int, stream: int, step: int) -> int:
    """Return what the random bits of a table's step are derived from: 64 bits, as a signed number."""
    table_key = _mix64((seed + GOLDEN64 * (stream + 1)) & _MASK64)
    return _signed(_mix64((table_key + step) & _MASK64))


def random_bits(seed: int, stream: int, step: int, rows: Tensor, what: int, width: int) -> Tensor:
    """Return 32 random bits for each element of ``rows``, as int64 ``[len(rows), width]`` below 2**32.

    Args:
        seed: of the parameter group, below 2**53.
        stream: tells tables apart.
        step: the table's step.
        rows: int64 ``[num_rows]``.
        what: ``EXP_AVG``, ``EXP_AVG_SQ``, ``TABLE``, or ``MISSED_STEPS`` of the table: the decay that rows owe for
            them, or all that they were to be moved by.
        width: elements of a row.
    """
    row_keys = _shifted(_mix64_each((rows + 1) * _signed(GOLDEN64) + step_key(seed, stream, step)), 32)
    elements = torch.arange(width, dtype=torch.int64, device=rows.device)
    x = (row_keys[:, None] + GOLDEN32 * ((4 * elements + what) & _MASK32)) & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def element_bits(seed: int, rows: Tensor, width: int) -> Tensor:
    """Return 32 random bits for each element of ``rows`` of a table, as int64 ``[len(rows), width]`` below 2**32.

    A function of seed, row and element alone: SplitMix64's finaliser of a counter for the row's key and again for the
    element, all in 64 bits, so that no two rows of a table of 10**9 are likely to be alike.
    """
    table_key = _signed(_mix64((seed + GOLDEN64) & _MASK64))
    row_keys = _mix64_each((rows + 1) * _signed(GOLDEN64) + table_key)
    elements = torch.arange(1, width + 1, dtype=torch.int64, device=rows.device)
    return _shifted(_mix64_each(row_keys[:, None] + elements * _signed(GOLDEN64)), 32)


def _bits_of(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).to(torch.int64) & _MASK32


def _from_bits(bits: Tensor) -> Tensor:
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _round_to_whole(values: Tensor, random: Tensor) -> Tensor:
    # Compared, not added: the sum would be rounded, and now and then to a whole number that it does not reach.
    below = torch.floor(values)
    unit_interval = (random >> 8).to(torch.float32) * 2.0**-24
    return below + (unit_interval < values - below)


def round_stochastically(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to bfloat16 or float16, up or down with probabilities that make the expected result the value itself.

    Args:
        values: of any floating dtype; taken as float32.
        random: bits of ``random_bits``, of the same shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``. Chance makes no infinity of a number that has finite neighbours.
    """
    values = values.to(torch.float32)
    if dtype is torch.bfloat16:
        limit = torch.finfo(dtype).max
        rounded = _from_bits((_bits_of(values) + (random & 0xFFFF)) & 0xFFFF0000).clamp(-limit, limit)
        return torch.where(values.abs() <= limit, rounded, values).to(dtype)
    magnitude = values.abs()
    normal = _from_bits((_bits_of(magnitude) + (random & 0x1FFF)) & 0xFFFFE000)
    subnormal = _round_to_whole(magnitude * 2.0**24, random) * 2.0**-24
    rounded = torch.where(magnitude < 2.0**-14, subnormal, normal.clamp(max=65504.0))
    return torch.where(magnitude <= 65504.0, rounded, magnitude).copysign(values).to(dtype)


def num_blocks(width: int) -> int:
    """Return how many scales a row has."""
    return -(-width // BLOCK_SIZE)


def _top_exponent(exponent_bits: int) -> int:
    return int(2**exponent_bits) - 1


TOP = 2.0 - 2.0**-_MANTISSA_BITS


@cache
def _units(exponent_bits: int, device: torch.device) -> Tensor:
    """Return the values of all codes where the scale is ``TOP``, float32."""
    top = _top_exponent(exponent_bits)
    values = []
    for code in range(2 ** (exponent_bits + _MANTISSA_BITS)):
        exponent, fraction = code >> _MANTISSA_BITS, (code % 2**_MANTISSA_BITS) / 2**_MANTISSA_BITS
        values.append(math.ldexp(1.0 + fraction, exponent - top) if exponent else math.ldexp(fraction, 1 - top))
    return torch.tensor(values, dtype=torch.float32, device=device)


def _scale_of_each(scales: Tensor, width: int) -> Tensor:
    return scales.repeat_interleave(BLOCK_SIZE, dim=1)[:, :width]


def _block_scales(magnitudes: Tensor) -> Tensor:
    """Return the largest magnitude of each block, float32 ``[num_rows, num_blocks]``; NaN where one is not finite."""
    num_rows, width = magnitudes.shape
    padded = magnitudes.new_zeros((num_rows, num_blocks(width) * BLOCK_SIZE))
    padded[:, :width] = magnitudes
    scales = padded.reshape(num_rows, num_blocks(width), BLOCK_SIZE).amax(2)  # a NaN among them is the largest
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return torch.where(scales < SMALLEST_SCALE, 0.0, scales)


def _encode(magnitudes: Tensor, random: Tensor, exponent_bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes of ``[num_rows, width]`` magnitudes, as int64, and their blocks' scales."""
    scales = _block_scales(magnitudes)
    to_unit = _scale_of_each(torch.where(scales > 0, TOP / scales, 0.0), magnitudes.shape[1])
    unit = torch.where(to_unit > 0, magnitudes * to_unit, 0.0)
    top = _top_exponent(exponent_bits)
    dropped = 23 - _MANTISSA_BITS
    normal = (_bits_of(unit) - ((127 - top) << 23) + (random & (2**dropped - 1))) >> dropped
    subnormal = _round_to_whole(unit * 2.0 ** (top - 1 + _MANTISSA_BITS), random).to(torch.int64)
    codes = torch.where(unit < 2.0 ** (1 - top), subnormal, normal)
    return codes.clamp(max=2 ** (exponent_bits + _MANTISSA_BITS) - 1), scales


def encode_exp_avg(values: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of first moments ``[num_rows, width]`` and scales ``[num_rows, num_blocks]``."""
    values = values.to(torch.float32)
    codes, scales = _encode(values.abs(), random, EXP_AVG_EXPONENT_BITS)
    is_stored = _scale_of_each(scales, values.shape[1]) > 0
    return (codes + 128 * (values.signbit() & is_stored)).to(torch.uint8), scales


def decode_exp_avg(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 first moments that codes ``[num_rows, width]`` stand for."""
    codes = codes.to(torch.int64)
    units = _units(EXP_AVG_EXPONENT_BITS, codes.device)[codes & 127]
    magnitudes = units * _scale_of_each(scales / TOP, codes.shape[1])
    return torch.where(codes >= 128, -magnitudes, magnitudes)


def encode_exp_avg_sq(values: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of second moments and scales, as ``encode_exp_avg`` does; more than zero stays so."""
    values = values.to(torch.float32)
    codes, scales = _encode(values, random, EXP_AVG_SQ_EXPONENT_BITS)
    is_more = (values > 0) & (_scale_of_each(scales, values.shape[1]) > 0)
    return torch.maximum(codes, is_more.to(codes.dtype)).to(torch.uint8), scales


def decode_exp_avg_sq(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 second moments that codes ``[num_rows, width]`` stand for."""
    units = _units(EXP_AVG_SQ_EXPONENT_BITS, codes.device)[codes.to(torch.int64)]
    return units * _scale_of_each(scales / TOP, codes.shape[1])
