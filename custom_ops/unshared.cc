// Compiled without PADDLE_WITH_CUDA: with it, the header of DenseTensor needs those of cuBLAS and others. The
// layout of a DenseTensor is the same either way.
#include "unshared.h"

#include <paddle/phi/core/dense_tensor.h>

#include <atomic>

namespace vlsp {
namespace {

// References that autograd itself holds to a gradient that it passes to an operator. Python measures the
// number by a backward pass when it loads the library; until then it is 0, and every gradient counts as
// shared.
std::atomic<int64_t> unshared_references{0};
std::atomic<int64_t> last_references{0};

}  // namespace

bool is_unshared(const paddle::Tensor& gradient) {
  const int64_t references = gradient.impl().use_count();
  last_references = references;
  return references == unshared_references && gradient.is_dense_tensor() &&
         static_cast<const phi::DenseTensor&>(*gradient.impl()).Holder().use_count() == 1;
}

}  // namespace vlsp

// For Python, which calls them with ctypes.
extern "C" {

// To the gradient that is_unshared was asked about last.
int64_t vlsp_last_references() { return vlsp::last_references; }

void vlsp_set_unshared_references(int64_t number) { vlsp::unshared_references = number; }

}  // extern "C"
