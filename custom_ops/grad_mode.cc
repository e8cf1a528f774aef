#include "grad_mode.h"

#include <paddle/phi/api/include/tensor.h>

#include <atomic>

namespace vlsp {
namespace {

std::atomic<bool (*)()> creates_graph{nullptr};

}  // namespace

bool is_recorded(const paddle::Tensor& x) {
  bool (*ask)() = creates_graph;
  return x.get_autograd_meta() != nullptr && ask != nullptr && ask();
}

}  // namespace vlsp

// For Python, which calls it with ctypes and knows the answer.
extern "C" void vlsp_set_creates_graph(bool (*ask)()) { vlsp::creates_graph = ask; }
