// Whether an operator's result may be differentiated further, which Paddle does not tell a custom operator.
#pragma once

namespace paddle {
class Tensor;
}

namespace vlsp {

// Whether what is computed from x belongs to a paddle.grad(..., create_graph=True). Never in a static graph.
bool is_recorded(const paddle::Tensor& x);

}  // namespace vlsp
