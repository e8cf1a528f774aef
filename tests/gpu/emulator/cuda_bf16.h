#pragma once

#include "half.h"

struct __nv_bfloat16 {
  vlsp::BFloat16 value;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : value(vlsp::to_bfloat16(x)) {}
  explicit operator float() const { return vlsp::to_float(value); }
};
