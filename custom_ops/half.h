// 16-bit floats for the CPU: conversions to and from float in integer arithmetic without branches, so that
// loops over them vectorise. Rounding is to nearest even, a NaN stays a NaN, subnormals are kept (also where
// the process flushes them: no intermediate value is one).
#pragma once

#include <cstdint>
#include <cstring>

namespace vlsp {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// A choice by mask: GCC will not turn ?: around floating point work into straight code, and then no loop
// over it vectorises.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

inline float to_float(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(choose(is_nan, 0x7fff, rounded))};
}

inline float to_float(Float16 value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  constexpr uint32_t kSmallestNormal = (127 - 14) << 23;  // 2^-14
  const uint32_t magnitude = value.bits & 0x7fff;
  const uint32_t widened = magnitude << 13;
  const float subnormal = bit_cast<float>(widened + kSmallestNormal) - bit_cast<float>(kSmallestNormal);
  // For infinity and NaN the exponent becomes all ones.
  const uint32_t normal = widened + choose(magnitude >= 0x7c00, 2 * kRebias, kRebias);
  const uint32_t bits = choose(magnitude < 0x0400, bit_cast<uint32_t>(subnormal), normal);
  return bit_cast<float>(bits | (uint32_t{value.bits} & 0x8000) << 16);
}

inline Float16 to_float16(float value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  constexpr uint32_t kSmallestNormal = (127 - 14) << 23;  // 2^-14
  constexpr uint32_t kOverflow = 0x477ff000;              // 65520, halfway above the largest
  constexpr uint32_t kHalf = 0x3f000000;                  // 0.5f, whose last bit is worth 2^-24
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Adding 0.5 lets the floating point unit round to the step of the subnormals.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(kHalf)) - kHalf;
  uint32_t half = (magnitude - kRebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  half = choose(magnitude < kSmallestNormal, subnormal, half);
  half = choose(magnitude >= kOverflow, 0x7c00, half);
  half = choose(magnitude > 0x7f800000, 0x7e00, half);  // NaN
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000))};
}

}  // namespace vlsp
