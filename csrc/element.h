// Element types of a table and how they widen to, and round from, the type of its moments.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparseadam {

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSEADAM_X86 1
#endif

#define SPARSEADAM_INLINE inline __attribute__((always_inline))
// For lambdas that prefetch: to GCC they have no effect, so a call of one that is not inlined at once is dropped. And
// for those that hold a kernel: outside the function of an instruction set they would be compiled for the platform's
// floor.
#define SPARSEADAM_LAMBDA_INLINE __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

SPARSEADAM_INLINE float widen(float value) { return value; }
SPARSEADAM_INLINE double widen(double value) { return value; }

SPARSEADAM_INLINE float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

SPARSEADAM_INLINE void narrow(float value, float* to) { *to = value; }
SPARSEADAM_INLINE void narrow(double value, double* to) { *to = value; }

// Round to nearest, ties to even; a NaN stays one, whatever its payload.
SPARSEADAM_INLINE void narrow(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
}

// float16 is the compiler's own type, where it has one: GCC 12 and Clang 15 do on x86-64, older ones do not.
#if defined(__FLT16_MANT_DIG__)
#define SPARSEADAM_HAS_FLOAT16 1
using Float16 = _Float16;
SPARSEADAM_INLINE float widen(Float16 value) { return static_cast<float>(value); }
SPARSEADAM_INLINE void narrow(float value, Float16* to) { *to = static_cast<Float16>(value); }
#endif

}  // namespace sparseadam
