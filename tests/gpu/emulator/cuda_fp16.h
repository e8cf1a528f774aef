// The 16-bit floats of the kernels, by the project's own conversions, which are tested against their
// definition.
#pragma once

#include "half.h"

struct __half {
  vlsp::Float16 value;
  __half() = default;
  explicit __half(float x) : value(vlsp::to_float16(x)) {}
  explicit operator float() const { return vlsp::to_float(value); }
};
