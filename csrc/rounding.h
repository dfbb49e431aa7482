// Rounding that is right on average: stochastic rounding, the random bits for it, and 8-bit codes of moments.
//
// A value between two representable ones goes to either with a probability that makes the expected result the value
// itself, so that changes too small for the type add up in place of being lost. The random bits are a function of where
// and when: seed, table, step, row and element. The same step gives the same bits on any number of threads.
//
// A code is a small unsigned float of `kExponentBits` and `kMantissaBits`, relative to the largest magnitude of its
// block of elements, the scale. With top = 2 - 2**-kMantissaBits its values are
//
//   scale / top * (1 + f / 2**M) * 2**(e - (2**E - 1))     e >= 1
//   scale / top * (f / 2**M) * 2**(2 - 2**E)               e == 0
//
// so the largest code is the scale itself. First moments have a sign, 4 exponent and 3 mantissa bits; second moments 5
// and 3, because they span twice the range, and never go from more than zero to zero: that would divide by eps alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "element.h"

namespace sparseadam {

// The finaliser of Steele, Lea & Flood's SplitMix64 (2014).
SPARSEADAM_INLINE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// What the random bits of a table's step, and of a row within it, are derived from.
SPARSEADAM_INLINE uint64_t step_key(uint64_t seed, uint64_t stream, uint64_t step) {
  return mix64(mix64(seed + 0x9E3779B97F4A7C15u * (stream + 1)) + step);
}
SPARSEADAM_INLINE uint32_t row_key(uint64_t step_key, int64_t row) {
  return static_cast<uint32_t>(mix64(step_key + 0x9E3779B97F4A7C15u * (static_cast<uint64_t>(row) + 1)) >> 32);
}

// What is rounded: each has random bits of its own.
enum class Rounded : uint32_t { kExpAvg = 0, kExpAvgSq = 1, kTable = 2, kMissedSteps = 3 };

// 32 random bits for an element of a row: Wellons' lowbias32 (2018) of a counter.
SPARSEADAM_INLINE uint32_t random_bits(uint32_t row_key, Rounded what, uint32_t element) {
  uint32_t x = row_key + 0x9E3779B9u * (4 * element + static_cast<uint32_t>(what));
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

SPARSEADAM_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
SPARSEADAM_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// In [0, 1), a multiple of 2**-24.
SPARSEADAM_INLINE float unit_interval(uint32_t random) { return static_cast<float>(random >> 8) * 0x1p-24f; }
// Whether chance rounds up what lies `fraction` above a whole number. Compared, not added: the sum would be rounded,
// and now and then to a whole number that it does not reach.
SPARSEADAM_INLINE bool goes_up(float fraction, uint32_t random) { return unit_interval(random) < fraction; }

// What lies above the largest finite number is left to rounding to nearest: chance must not make infinity of less.
SPARSEADAM_INLINE void narrow_stochastic(float value, uint32_t random, BFloat16* to) {
  constexpr uint32_t kLargest = 0x7F7F0000u;
  const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t rounded = std::min((magnitude + (random & 0xFFFFu)) & 0xFFFF0000u, kLargest);
  BFloat16 nearest;
  narrow(value, &nearest);
  to->bits = magnitude <= kLargest ? static_cast<uint16_t>((rounded | sign) >> 16) : nearest.bits;
}

#if defined(SPARSEADAM_HAS_FLOAT16)
// Rounded among float's values that float16 has as well, so that the conversion is exact. Below 2**-14 those are 2**-24
// apart.
SPARSEADAM_INLINE void narrow_stochastic(float value, uint32_t random, Float16* to) {
  const float magnitude = std::fabs(value);
  const float normal = from_bits((bits_of(magnitude) + (random & 0x1FFFu)) & ~0x1FFFu);
  const float below = std::floor(magnitude * 0x1p24f);
  const float subnormal = (goes_up(magnitude * 0x1p24f - below, random) ? below + 1.0f : below) * 0x1p-24f;
  const float rounded = magnitude < 0x1p-14f ? subnormal : std::min(normal, 65504.0f);
  const float chosen = magnitude <= 65504.0f ? rounded : magnitude;
  *to = static_cast<Float16>(std::copysign(chosen, value));
}
#endif

// float and double tables keep what is computed; their rounding is not stochastic.
SPARSEADAM_INLINE void narrow_stochastic(float value, uint32_t, float* to) { *to = value; }
SPARSEADAM_INLINE void narrow_stochastic(double value, uint32_t, double* to) { *to = value; }

template <int kExponentBits>
struct Code {
  static constexpr int kMantissaBits = 3;
  static constexpr int kDroppedBits = 23 - kMantissaBits;
  static constexpr int kTopExponent = (1 << kExponentBits) - 1;
  static constexpr uint32_t kLargest = (1u << (kExponentBits + kMantissaBits)) - 1;
  static constexpr float kTop = 2.0f - 1.0f / (1 << kMantissaBits);
  // A code is the bits of a float with more of everything, but for the codes without exponent.
  static constexpr uint32_t kOffset = static_cast<uint32_t>(127 - kTopExponent) << 23;

  static constexpr float power_of_two(int exponent) {
    float value = 1.0f;
    for (int i = 0; i < exponent; ++i) value *= 2.0f;
    for (int i = 0; i > exponent; --i) value /= 2.0f;
    return value;
  }
  static constexpr float kSmallestNormal = power_of_two(1 - kTopExponent);
  static constexpr float kSubnormalSpacing = power_of_two(1 - kTopExponent - kMantissaBits);

  // The code of `value` in [0, kTop], up to rounding.
  static SPARSEADAM_INLINE uint32_t encode(float value, uint32_t random) {
    constexpr uint32_t kMask = (1u << kDroppedBits) - 1;
    const uint32_t normal = (bits_of(value) - kOffset + (random & kMask)) >> kDroppedBits;
    const float in_spacings = std::min(value, kSmallestNormal) * (1.0f / kSubnormalSpacing);
    const auto below = static_cast<int32_t>(in_spacings);
    const auto subnormal =
        static_cast<uint32_t>(goes_up(in_spacings - static_cast<float>(below), random) ? below + 1 : below);
    return std::min(value < kSmallestNormal ? subnormal : normal, kLargest);
  }

  static SPARSEADAM_INLINE float decode(uint32_t code) {
    const float normal = from_bits((code << kDroppedBits) + kOffset);
    const float subnormal = static_cast<float>(static_cast<int32_t>(code)) * kSubnormalSpacing;
    return code < (1u << kMantissaBits) ? subnormal : normal;
  }
};

using ExpAvgCode = Code<4>;  // and a sign, in the highest bit
using ExpAvgSqCode = Code<5>;
static_assert(ExpAvgCode::kTop == ExpAvgSqCode::kTop, "both kinds of blocks are scaled alike below");

// Elements that share a scale; a row's last block may be shorter, and none spans rows.
constexpr int64_t kBlockSize = 128;
// A block without a larger magnitude is stored as zero: the scale's reciprocal must be finite.
constexpr float kSmallestScale = 1e-36f;

SPARSEADAM_INLINE int64_t num_blocks(int64_t width) { return (width + kBlockSize - 1) / kBlockSize; }

// The largest magnitude of a block, or NaN where one of them is not finite.
template <class Moment>
SPARSEADAM_INLINE float block_scale(const Moment* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, bits_of(static_cast<float>(values[i])) & 0x7FFFFFFFu);
  }
  const float scale = from_bits(largest);  // the magnitudes of floats are ordered as their bits are
  if (!(scale <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
  return scale < kSmallestScale ? 0.0f : scale;
}

// How a block of first moments, or of second ones, is put into codes and read back. `first` is the place of the block's
// first element in its row. Codes are bytes, which may alias anything: without `__restrict__` no loop is vectorised.
struct ExpAvgBlock {
  template <class Moment>
  static SPARSEADAM_INLINE void encode(const Moment* __restrict__ values, int64_t count, float to_unit,
                                       uint32_t row_key, uint32_t first, uint8_t* __restrict__ codes) {
    for (int64_t i = 0; i < count; ++i) {
      const auto value = static_cast<float>(values[i]);
      const uint32_t random = random_bits(row_key, Rounded::kExpAvg, first + static_cast<uint32_t>(i));
      const uint32_t code = ExpAvgCode::encode(std::fabs(value) * to_unit, random);
      codes[i] = static_cast<uint8_t>(code | (bits_of(value) >> 31 << 7));
    }
  }
  template <class Moment>
  static SPARSEADAM_INLINE void decode(const uint8_t* __restrict__ codes, int64_t count, float unit,
                                       Moment* __restrict__ values) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = codes[i];
      const float magnitude = ExpAvgCode::decode(code & 0x7Fu) * unit;
      values[i] = static_cast<Moment>(from_bits(bits_of(magnitude) | (code >> 7 << 31)));
    }
  }
};

struct ExpAvgSqBlock {
  template <class Moment>
  static SPARSEADAM_INLINE void encode(const Moment* __restrict__ values, int64_t count, float to_unit,
                                       uint32_t row_key, uint32_t first, uint8_t* __restrict__ codes) {
    const uint32_t is_stored = to_unit > 0.0f ? 1u : 0u;
    for (int64_t i = 0; i < count; ++i) {
      const auto value = static_cast<float>(values[i]);
      const uint32_t random = random_bits(row_key, Rounded::kExpAvgSq, first + static_cast<uint32_t>(i));
      const uint32_t code = ExpAvgSqCode::encode(value * to_unit, random);
      codes[i] = static_cast<uint8_t>(std::max(code, value > 0.0f ? is_stored : 0u));
    }
  }
  template <class Moment>
  static SPARSEADAM_INLINE void decode(const uint8_t* __restrict__ codes, int64_t count, float unit,
                                       Moment* __restrict__ values) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Moment>(ExpAvgSqCode::decode(codes[i]) * unit);
  }
};

template <class Block, class Moment>
SPARSEADAM_INLINE void encode_row(const Moment* values, int64_t width, uint32_t row_key, uint8_t* codes,
                                  float* scales) {
  for (int64_t begin = 0; begin < width; begin += kBlockSize) {
    const int64_t count = std::min(kBlockSize, width - begin);
    const float scale = block_scale(values + begin, count);
    scales[begin / kBlockSize] = scale;
    if (scale > 0.0f) {
      Block::encode(values + begin, count, ExpAvgCode::kTop / scale, row_key, static_cast<uint32_t>(begin),
                    codes + begin);
    } else {  // zero, or NaN, which makes NaN of any code
      std::memset(codes + begin, 0, static_cast<size_t>(count));
    }
  }
}

template <class Block, class Moment>
SPARSEADAM_INLINE void decode_row(const uint8_t* codes, const float* scales, int64_t width, Moment* values) {
  for (int64_t begin = 0; begin < width; begin += kBlockSize) {
    const int64_t count = std::min(kBlockSize, width - begin);
    Block::decode(codes + begin, count, scales[begin / kBlockSize] / ExpAvgCode::kTop, values + begin);
  }
}

}  // namespace sparseadam
