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
#include <array>
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
enum class Rounded : uint32_t { kExpAvg = 0, kExpAvgSq = 1, kTable = 2 };  // 3: owed decay, rounding.py

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

SPARSEADAM_INLINE void narrow_stochastic(float value, uint32_t random, BFloat16* to) {
  const uint32_t rounded = (bits_of(value) + (random & 0xFFFFu)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
}

#if defined(SPARSEADAM_HAS_FLOAT16)
// Rounded among float's values that float16 has as well, so that the conversion is exact. Below 2**-14 those are 2**-24
// apart. What lies above the largest of them is left to the conversion: chance must not make infinity of it.
SPARSEADAM_INLINE void narrow_stochastic(float value, uint32_t random, Float16* to) {
  const float magnitude = std::fabs(value);
  const float normal = from_bits((bits_of(magnitude) + (random & 0x1FFFu)) & ~0x1FFFu);
  const float subnormal = std::floor(magnitude * 0x1p24f + unit_interval(random)) * 0x1p-24f;
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

  // The code of `value` in [0, kTop]: the bits of a float are such a code with more of everything.
  static SPARSEADAM_INLINE uint32_t encode(float value, uint32_t random) {
    constexpr uint32_t kOffset = static_cast<uint32_t>(127 - kTopExponent) << 23;
    constexpr uint32_t kMask = (1u << kDroppedBits) - 1;
    const uint32_t normal = (bits_of(value) - kOffset + (random & kMask)) >> kDroppedBits;
    const auto subnormal = static_cast<uint32_t>(
        static_cast<int32_t>(value * power_of_two(kTopExponent - 1 + kMantissaBits) + unit_interval(random)));
    return std::min(value < power_of_two(1 - kTopExponent) ? subnormal : normal, kLargest);
  }

  // The values of all codes as shares of the scale.
  static const std::array<float, kLargest + 1>& shares() {
    static const std::array<float, kLargest + 1> made = [] {
      std::array<float, kLargest + 1> values{};
      for (uint32_t code = 0; code <= kLargest; ++code) {
        const int exponent = static_cast<int>(code >> kMantissaBits);
        const double fraction = static_cast<double>(code & ((1u << kMantissaBits) - 1)) / (1 << kMantissaBits);
        const double value = exponent == 0 ? std::ldexp(fraction, 1 - kTopExponent)
                                           : std::ldexp(1.0 + fraction, exponent - kTopExponent);
        values[code] = static_cast<float>(value / static_cast<double>(kTop));
      }
      return values;
    }();
    return made;
  }

 private:
  static constexpr float power_of_two(int exponent) {
    float value = 1.0f;
    for (int i = 0; i < exponent; ++i) value *= 2.0f;
    for (int i = 0; i > exponent; --i) value /= 2.0f;
    return value;
  }
};

using ExpAvgCode = Code<4>;  // and a sign, in the highest bit
using ExpAvgSqCode = Code<5>;

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

template <class Moment>
SPARSEADAM_INLINE void encode_exp_avg(const Moment* values, int64_t width, uint32_t row_key, uint8_t* codes,
                                      float* scales) {
  for (int64_t begin = 0; begin < width; begin += kBlockSize) {
    const int64_t end = std::min(begin + kBlockSize, width);
    const float scale = block_scale(values + begin, end - begin);
    scales[begin / kBlockSize] = scale;
    const float to_unit = scale > 0.0f ? ExpAvgCode::kTop / scale : 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      const auto value = static_cast<float>(values[i]);
      const uint32_t random = random_bits(row_key, Rounded::kExpAvg, static_cast<uint32_t>(i));
      const uint32_t code = ExpAvgCode::encode(scale > 0.0f ? std::fabs(value) * to_unit : 0.0f, random);
      codes[i] = static_cast<uint8_t>(code | (bits_of(value) >> 31 << 7));
    }
  }
}

template <class Moment>
SPARSEADAM_INLINE void decode_exp_avg(const uint8_t* codes, const float* scales, int64_t width, Moment* values) {
  const float* shares = ExpAvgCode::shares().data();
  for (int64_t i = 0; i < width; ++i) {
    const float magnitude = shares[codes[i] & 0x7Fu] * scales[i / kBlockSize];
    values[i] = static_cast<Moment>((codes[i] & 0x80u) != 0 ? -magnitude : magnitude);
  }
}

template <class Moment>
SPARSEADAM_INLINE void encode_exp_avg_sq(const Moment* values, int64_t width, uint32_t row_key, uint8_t* codes,
                                         float* scales) {
  for (int64_t begin = 0; begin < width; begin += kBlockSize) {
    const int64_t end = std::min(begin + kBlockSize, width);
    const float scale = block_scale(values + begin, end - begin);
    scales[begin / kBlockSize] = scale;
    const float to_unit = scale > 0.0f ? ExpAvgSqCode::kTop / scale : 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      const auto value = static_cast<float>(values[i]);
      const uint32_t random = random_bits(row_key, Rounded::kExpAvgSq, static_cast<uint32_t>(i));
      const uint32_t code = ExpAvgSqCode::encode(scale > 0.0f ? value * to_unit : 0.0f, random);
      const uint32_t smallest = value > 0.0f && scale > 0.0f ? 1u : 0u;
      codes[i] = static_cast<uint8_t>(std::max(code, smallest));
    }
  }
}

template <class Moment>
SPARSEADAM_INLINE void decode_exp_avg_sq(const uint8_t* codes, const float* scales, int64_t width, Moment* values) {
  const float* shares = ExpAvgSqCode::shares().data();
  for (int64_t i = 0; i < width; ++i) values[i] = static_cast<Moment>(shares[codes[i]] * scales[i / kBlockSize]);
}

}  // namespace sparseadam
