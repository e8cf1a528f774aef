// 16-bit floats the slow way: by their definition, in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace vlsp_test {

struct FloatFormat {
  int fraction_bits;
  int smallest_exponent;  // of a normal number
  int largest_exponent;
};

constexpr FloatFormat kHalfFormat{10, -14, 15};
constexpr FloatFormat kBrainFormat{7, -126, 127};

inline double decode(uint16_t bits, FloatFormat format) {
  const int exponent = (bits & 0x7fff) >> format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int bias = format.largest_exponent;
  double magnitude;
  if (exponent == 2 * bias + 1) {
    magnitude = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, format.smallest_exponent - format.fraction_bits);
  } else {
    magnitude = std::ldexp(fraction + (1 << format.fraction_bits), exponent - bias - format.fraction_bits);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest value of the format, ties to even.
inline double round_to(double value, FloatFormat format) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), format.smallest_exponent);
  const double step = std::ldexp(1.0, exponent - format.fraction_bits);
  const double rounded = std::nearbyint(value / step) * step;
  const double limit = std::ldexp(1.0, format.largest_exponent + 1);
  return std::abs(rounded) < limit ? rounded : std::copysign(std::numeric_limits<double>::infinity(), value);
}

inline bool same_value(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

}  // namespace vlsp_test
