// Every operation is one that IEEE 754 rounds correctly, in the order in which initial.py has them, and contraction is
// off: so the bits are those of initial.py, on any machine.
#include "initial.h"

#include <array>
#include <cmath>
#include <cstddef>

#include "rounding.h"

namespace sparseadam {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// Wichura (1988), AS 241, PPND16: numerators and denominators by rising power, for the middle and the tails.
constexpr std::array<double, 8> kMiddleAbove = {
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
constexpr std::array<double, 8> kMiddleBelow = {1.0,
                                                4.2313330701600911252e1,
                                                6.8718700749205790830e2,
                                                5.3941960214247511077e3,
                                                2.1213794301586595867e4,
                                                3.9307895800092710610e4,
                                                2.8729085735721942674e4,
                                                5.2264952788528545610e3};
constexpr std::array<double, 8> kTailsAbove = {
    1.42343711074968357734e0, 4.63033784615654529590e0,  5.76949722146069140550e0,  3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
constexpr std::array<double, 8> kTailsBelow = {1.0,
                                               2.05319162663775882187e0,
                                               1.67638483018380384940e0,
                                               6.89767334985100004550e-1,
                                               1.48103976427480074590e-1,
                                               1.51986665636164571966e-2,
                                               5.47593808499534494600e-4,
                                               1.05075007164441684324e-9};
constexpr double kMiddleHalfWidth = 0.425;
// Of the series of artanh, by even powers.
constexpr std::array<double, 12> kLog = {1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0,  1.0 / 11.0,
                                         1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0};
constexpr double kLog2 = 0.6931471805599453;
constexpr double kRootHalf = 0.7071067811865476;

template <size_t kCount>
double polynomial(const std::array<double, kCount>& coefficients, double x) {
  double value = coefficients[kCount - 1];
  for (size_t i = kCount - 1; i-- > 0;) value = value * x + coefficients[i];
  return value;
}

double logarithm(double x) {
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < kRootHalf) {
    mantissa *= 2.0;
    exponent -= 1;
  }
  const double ratio = (mantissa - 1.0) / (mantissa + 1.0);
  return exponent * kLog2 + ratio * polynomial(kLog, ratio * ratio) * 2.0;
}

double root(double x) {
  double root = 1.5 + x * 0.15;
  for (int step = 0; step < 5; ++step) root = (root + x / root) * 0.5;
  return root;
}

double normal_quantile(double probability, double centred) {
  if (std::fabs(centred) <= kMiddleHalfWidth) {
    const double x = kMiddleHalfWidth * kMiddleHalfWidth - centred * centred;
    return centred * (polynomial(kMiddleAbove, x) / polynomial(kMiddleBelow, x));
  }
  const double tail = std::fmin(probability, 1.0 - probability);
  const double x = root(-logarithm(tail)) - 1.6;
  return std::copysign(polynomial(kTailsAbove, x) / polynomial(kTailsBelow, x), centred);
}

}  // namespace

template <class T>
void initial_values(Distribution distribution, double scale, uint64_t seed, const int64_t* rows, int64_t num_rows,
                    int64_t width, T* values) {
  const uint64_t table_key = mix64(seed + kGolden);
  for (int64_t i = 0; i < num_rows; ++i) {
    const uint64_t row_key = mix64(table_key + kGolden * (static_cast<uint64_t>(rows[i]) + 1));
    for (int64_t column = 0; column < width; ++column) {
      const uint64_t bits = mix64(row_key + kGolden * (static_cast<uint64_t>(column) + 1)) >> 32;
      const double probability = (static_cast<double>(bits) + 0.5) * 0x1p-32;
      const double centred = probability - 0.5;
      const double value =
          distribution == Distribution::kNormal ? normal_quantile(probability, centred) : centred * 2.0;
      values[i * width + column] = static_cast<T>(value * scale);
    }
  }
}

template void initial_values(Distribution, double, uint64_t, const int64_t*, int64_t, int64_t, float*);
template void initial_values(Distribution, double, uint64_t, const int64_t*, int64_t, int64_t, double*);

}  // namespace sparseadam
