// Gradients of gradients in static graphs, of any order.
//
// Paddle differentiates a graph by functions that append an operation's gradient to it. That for custom
// operators leaves out the mark that says whether the gradient can be differentiated again, and what has no
// mark counts as a constant: a second gradient lacks all that goes through it, without a word. With the mark
// Paddle appends its operation for second gradients, which it then cannot run. So the functions of our
// operators are replaced: a gradient is marked, and since the operators are linear, the gradient of a
// gradient is the operator itself.
#include <paddle/common/enforce.h>
#include <paddle/fluid/pir/dialect/operator/interface/vjp.h>
#include <paddle/fluid/pir/dialect/operator/ir/api_builder.h>
#include <paddle/pir/include/core/builtin_attribute.h>
#include <paddle/pir/include/core/ir_context.h>
#include <paddle/pir/include/core/op_info.h>
#include <paddle/pir/include/core/operation.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace vlsp {
namespace {

using paddle::dialect::VjpInterface;
using Values = std::vector<std::vector<pir::Value>>;
using Flags = std::vector<std::vector<bool>>;
using Vjp = decltype(VjpInterface::Concept::vjp_);

const std::string kOperators[] = {"custom_op.vlsp_replace_rows", "custom_op.vlsp_add_rows"};
const std::string kGradSuffix = "_grad";

// Whether the graph that is being built will be spoiled: Python knows.
bool (*spoils_second_gradients)() = nullptr;

// Paddle's own function for each operator, by its name.
std::unordered_map<std::string, Vjp>& original_vjps() {
  static std::unordered_map<std::string, Vjp> vjps;
  return vjps;
}

Values marked(Values grads) {
  const auto is_constant = pir::BoolAttribute::get(pir::IrContext::Instance(), false);
  for (auto& list : grads) {
    for (auto& x : list) {
      if (x) x.set_attribute(kAttrStopGradients, is_constant);
    }
  }
  return grads;
}

Values vjp_of_operator(pir::Operation* op, const Values& inputs, const Values& outputs,
                       const Values& out_grads, const Flags& stop_gradients) {
  return marked(original_vjps().at(op->name())(op, inputs, outputs, out_grads, stop_gradients));
}

// The gradient maps (update, gather, like_features, out_grad) to gradients of hidden and of features. Those
// of these two, in out_grads, go where the operator brings hidden and features.
Values vjp_of_gradient(pir::Operation* op, const Values& inputs, const Values&, const Values& out_grads,
                       const Flags& stop_gradients) {
  if (stop_gradients[0][0]) return {{pir::Value()}};
  if (spoils_second_gradients()) {
    PADDLE_THROW(common::errors::InvalidArgument(
        "paddle_vl_sp: second gradients in a to_static graph need FLAGS_enable_cse_in_dy2st=0, since the "
        "pass that "
        "it turns off lets Paddle write over values that it still needs: set it in the environment, or by "
        "paddle.set_flags before the function is first called"));
  }
  const std::string gradient = op->name();
  const std::string name = gradient.substr(0, gradient.size() - kGradSuffix.size());
  pir::OperationArgument made(pir::IrContext::Instance()->GetRegisteredOpInfo(name));
  const pir::Value hidden = out_grads[0][0], features = out_grads[1][0];
  made.AddInputs(
      {hidden, features, inputs[0][0], inputs[1][0], inputs[2][0]});  // in a branch not the op's own
  made.AddAttribute("feature_type", op->attribute("feature_type"));
  made.AddOutput(hidden.type());
  auto& builder = *paddle::dialect::ApiBuilder::Instance().GetBuilder();
  return marked({{builder.Build(std::move(made))->result(0)}});
}

bool replace_vjp(const std::string& name, Vjp vjp) {
  const pir::OpInfo info = pir::IrContext::Instance()->GetRegisteredOpInfo(name);
  auto* registered = info ? info.GetInterfaceImpl<VjpInterface>() : nullptr;
  if (registered == nullptr) return false;
  original_vjps().emplace(name, registered->vjp_);
  registered->vjp_ = vjp;
  return true;
}

}  // namespace
}  // namespace vlsp

// For Python, which calls it once, with ctypes. False: this Paddle keeps its functions elsewhere.
extern "C" bool vlsp_set_second_gradients_in_graphs(bool (*spoils)()) {
  vlsp::spoils_second_gradients = spoils;
  bool all = true;
  for (const std::string& name : vlsp::kOperators) {
    all = all && vlsp::replace_vjp(name, vlsp::vjp_of_operator) &&
          vlsp::replace_vjp(name + vlsp::kGradSuffix, vlsp::vjp_of_gradient);
  }
  return all;
}
