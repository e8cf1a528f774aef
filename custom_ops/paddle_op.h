// What the *_op.cc files share. They alone know Paddle: they check, allocate, and hand raw pointers to the
// kernels. Shapes are checked in Python first, with messages for people; what is checked here guards memory.
#pragma once

#ifdef VLSP_WITH_CUDA
#define PADDLE_WITH_CUDA
#define PADDLE_NO_PYTHON
#endif
#include <paddle/extension.h>

#include <vector>

namespace vlsp {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

#ifdef VLSP_WITH_CUDA
inline void check_cuda(int code, const char* what) {
  PD_CHECK(code == 0, "paddle_vl_sp: CUDA error ", code, " in ", what);
}
#else
[[noreturn]] inline void refuse_gpu(const char* what) {
  PD_THROW("paddle_vl_sp: ", what, " got a GPU tensor, but its operators were built without CUDA");
}
#endif

}  // namespace vlsp
