// The 16-bit conversions against their definition: every 16-bit value, its neighbourhood and its ties, and
// random floats. Exact.
#include "../../custom_ops/half.h"

#include <algorithm>

#include "float_oracle.h"
#include "testing.h"

namespace vlsp_test {
namespace {

template <class Half>
Half narrow(float value);
template <>
vlsp::Float16 narrow(float value) {
  return vlsp::to_float16(value);
}
template <>
vlsp::BFloat16 narrow(float value) {
  return vlsp::to_bfloat16(value);
}

template <class Half>
void check_narrowing(float value, FloatFormat format) {
  const double got = decode(narrow<Half>(value).bits, format);
  const double want = round_to(value, format);
  check(same_value(got, want), "rounding", vlsp::bit_cast<uint32_t>(value), 0, got, want);
}

template <class Half>
int64_t test_format(FloatFormat format) {
  int64_t cases = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const double want = decode(half.bits, format);
    const float got = vlsp::to_float(half);
    check(same_value(got, want), "widening", bits, 0, got, want);
    if (!std::isnan(got)) check_equal("round trip", bits, 0, narrow<Half>(got).bits, bits);
    const uint32_t middle = 1u << (22 - format.fraction_bits);  // half a step above, among the normals
    for (uint32_t offset : {0u, 1u, ~0u, middle, middle - 1, middle + 1}) {
      check_narrowing<Half>(vlsp::bit_cast<float>(vlsp::bit_cast<uint32_t>(got) + offset), format);
      ++cases;
    }
    const double next = decode(static_cast<uint16_t>(bits + 1), format);
    const float tie = static_cast<float>((want + next) / 2);  // also among the subnormals
    for (float near : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e38f)}) {
      check_narrowing<Half>(near, format);
      ++cases;
    }
  }
  Random random(3);
  for (int i = 0; i < 300000; ++i, ++cases) {
    check_narrowing<Half>(vlsp::bit_cast<float>(static_cast<uint32_t>(random.engine()())), format);
  }
  return cases;
}

}  // namespace

int64_t test_half() {
  return test_format<vlsp::Float16>(kHalfFormat) + test_format<vlsp::BFloat16>(kBrainFormat);
}

}  // namespace vlsp_test
