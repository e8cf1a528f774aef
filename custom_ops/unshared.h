// Whether an operator may return a gradient that it receives as its own result.
#pragma once

#include <paddle/phi/api/include/tensor.h>

namespace vlsp {

// Whether nothing but autograd refers to the gradient: neither to the tensor (a kept gradient, a hook) nor to
// its memory (a view of it, a variable of a static graph).
bool is_unshared(const paddle::Tensor& gradient);

}  // namespace vlsp
