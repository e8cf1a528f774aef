// What the *_op.cc files share. They alone know Paddle: they check, allocate, and hand raw pointers to the
// kernels. Shapes are checked in Python first, with messages for people; what is checked here guards memory.
#pragma once

#ifdef VLSP_WITH_CUDA
#define PADDLE_WITH_CUDA
#define PADDLE_NO_PYTHON
#endif
#include <paddle/common/enforce.h>
#include <paddle/extension.h>

#include <string>
#include <vector>

#include "device.h"

// Paddle's own PD_CHECK throws an exception that its executor of static graphs does not know: the process
// ends. This one arrives in Python as a ValueError, from a graph too.
#undef PD_CHECK
#undef PD_THROW
#define PD_THROW(...) \
  PADDLE_THROW(common::errors::InvalidArgument("%s", ::common::ErrorMessage(__VA_ARGS__).to_string()))
#define PD_CHECK(condition, ...)             \
  do {                                       \
    if (!(condition)) PD_THROW(__VA_ARGS__); \
  } while (0)

namespace vlsp {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

// "[2, 4]", for messages.
inline std::string text(const Shape& shape) {
  std::string sizes;
  for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return "[" + sizes + "]";
}

#ifdef VLSP_WITH_CUDA
inline void check_cuda(int code, const char* what) {
  PD_CHECK(code == 0, "paddle_vl_sp: CUDA error ", code, " in ", what);
}

// For launches on the device of a tensor, which need not be the current one: makes it that, and restores the
// old one at the end.
class DeviceOf {
 public:
  DeviceOf(const DeviceOf&) = delete;
  explicit DeviceOf(const Tensor& x) : device_(x.place().GetDeviceId()) {
    check_cuda(switch_device_cuda(device_, &previous_), "a change of the device");
    stream_ = x.stream();  // that of the current device
  }
  ~DeviceOf() { switch_device_cuda(previous_, &device_); }

  void* stream() const { return stream_; }

 private:
  int device_;
  int previous_ = 0;
  void* stream_ = nullptr;
};
#else
[[noreturn]] inline void refuse_gpu(const char* what) {
  PD_THROW("paddle_vl_sp: ", what, " got a GPU tensor, but its operators were built without CUDA");
}
#endif

}  // namespace vlsp
