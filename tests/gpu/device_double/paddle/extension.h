// As much of Paddle's header as custom_ops/paddle_op.h needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../cuda_runtime.h"

namespace paddle {

enum class DataType { INT64 };

struct Place {
  int device;
  int GetDeviceId() const { return device; }
};

// As Paddle's does, it gives the stream of the current device, wherever the tensor is.
struct Tensor {
  int device;
  Place place() const { return {device}; }
  void* stream() const { return reinterpret_cast<void*>(static_cast<intptr_t>(100 + current_device)); }
};

}  // namespace paddle
