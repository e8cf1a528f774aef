// The custom operators: the only file that knows Paddle. It checks, allocates and hands raw pointers on.
// Shapes are checked in Python first, with messages for people; what is checked here guards memory.

#include <paddle/extension.h>

#include <vector>

#include "index.h"
#include "rows.h"
#include "rule.h"

namespace {

// What this library was built for, to be read from the file before it is loaded.
[[gnu::used]] const char kBuild[] = VLSP_BUILD;

using paddle::DataType;
using paddle::Tensor;
using OptionalTensor = paddle::optional<Tensor>;
using Shape = std::vector<int64_t>;

#ifdef VLSP_WITH_CUDA
void check_cuda(int code, const char* what) {
  PD_CHECK(code == 0, "paddle_vl_sp: CUDA error ", code, " in ", what);
}
#else
[[noreturn]] void refuse_gpu(const char* what) {
  PD_THROW("paddle_vl_sp: ", what, " got a GPU tensor, but its operators were built without CUDA");
}
#endif

// ---- the index operator ----

vlsp::TokenType token_type(const Tensor& tokens) {
  switch (tokens.dtype()) {
    case DataType::INT32:
      return vlsp::TokenType::kInt32;
    case DataType::INT64:
      return vlsp::TokenType::kInt64;
    case DataType::BOOL:
      return vlsp::TokenType::kMask;
    default:
      PD_THROW("paddle_vl_sp: tokens must be int32, int64 or bool");
  }
}

vlsp::Placeholders placeholders(const std::vector<int64_t>& ids) {
  PD_CHECK(!ids.empty() && ids.size() <= vlsp::kMaxPlaceholders, "paddle_vl_sp: 1 to ",
           vlsp::kMaxPlaceholders, " placeholder ids, got ", ids.size());
  vlsp::Placeholders visual{};
  std::copy(ids.begin(), ids.end(), visual.ids);
  visual.count = static_cast<int>(ids.size());
  return visual;
}

vlsp::Rule parse_rule(const std::vector<int64_t>& rule) {
  PD_CHECK(rule.size() == 6, "paddle_vl_sp: rule is cp_size, cp_rank, zigzag, sp_size, sp_rank, uneven");
  vlsp::Rule parsed{rule[0], rule[1], rule[2] != 0, rule[3], rule[4], rule[5] != 0};
  PD_CHECK(0 <= parsed.cp_rank && parsed.cp_rank < parsed.cp_size, "paddle_vl_sp: cp_rank ", parsed.cp_rank,
           " is out of range for cp_size ", parsed.cp_size);
  PD_CHECK(0 <= parsed.sp_rank && parsed.sp_rank < parsed.sp_size, "paddle_vl_sp: sp_rank ", parsed.sp_rank,
           " is out of range for sp_size ", parsed.sp_size);
  return parsed;
}

// The intervals, from the rule or from the table of a packed sequence, kept alive for the launch.
class Ownership {
 public:
  Ownership(const Ownership&) = delete;
  Ownership(const Tensor& tokens, const OptionalTensor& table, const vlsp::Rule& rule,
            int64_t table_local_len) {
    if (table) {
      use_table(tokens, *table, table_local_len);
    } else {
      use_rule(tokens.shape()[1], rule);
    }
  }

  const vlsp::Owned& owned() const { return owned_; }

 private:
  void use_rule(int64_t seq_len, const vlsp::Rule& rule) {
    const int64_t multiple = vlsp::length_multiple(rule);
    PD_CHECK(seq_len % multiple == 0, "paddle_vl_sp: the length ", seq_len, " is not divisible by ", multiple,
             "; the next length that fits is ", (seq_len + multiple - 1) / multiple * multiple);
    const int count = vlsp::owned_intervals(rule, seq_len, from_rule_);
    int64_t local_len = 0;
    for (int i = 0; i < count; ++i) local_len += from_rule_[i].length;
    owned_ = {from_rule_, count, local_len};
  }

  void use_table(const Tensor& tokens, const Tensor& table, int64_t local_len) {
    PD_CHECK(table.dtype() == DataType::INT64 && table.shape().size() == 2 && table.shape()[1] == 3,
             "paddle_vl_sp: the interval table must be int64 [K, 3]");
    PD_CHECK(tokens.shape()[0] == 1, "paddle_vl_sp: an interval table is for one packed row, B = 1");
    int64_t count = table.shape()[0];
    const bool on_device = tokens.is_gpu() && count > vlsp::kMaxInlineIntervals;
    table_ = table.is_gpu() == on_device
                 ? table
                 : table.copy_to(on_device ? tokens.place() : paddle::CPUPlace(), true);
    const auto* intervals = reinterpret_cast<const vlsp::Interval*>(table_.data<int64_t>());
    // Paddle takes an empty table for an absent one, and a saved program has a table of fixed size: so a
    // table may end in empty intervals.
    if (!on_device) {
      while (count > 0 && intervals[count - 1].length == 0) --count;
      check_table(intervals, count, tokens.shape()[1]);
    }
    owned_ = {intervals, count, local_len < 0 ? tokens.shape()[1] : local_len};
  }

  // The CPU kernels follow a table blindly; those of a GPU compare every position with it.
  static void check_table(const vlsp::Interval* intervals, int64_t count, int64_t seq_len) {
    int64_t end = 0;
    for (int64_t k = 0; k < count; ++k) {
      const vlsp::Interval& own = intervals[k];
      PD_CHECK(
          own.start >= end && own.length > 0 && own.length <= seq_len - own.start && own.local_start >= 0,
          "paddle_vl_sp: interval ", k, " of the table, (", own.start, ", ", own.length, ", ",
          own.local_start, "), is not a run after ", end, " within ", seq_len, " positions");
      end = own.start + own.length;
    }
  }

  vlsp::Interval from_rule_[2];
  Tensor table_;
  vlsp::Owned owned_{};
};

Tensor empty_indices(int64_t size, const paddle::Place& place) {
  return paddle::empty({size}, DataType::INT64, place);
}

struct PlanTensors {
  Tensor update, gather, counts;

  PlanTensors(int64_t size, const paddle::Place& place)
      : update(empty_indices(size, place)),
        gather(empty_indices(size, place)),
        counts(empty_indices(2, place)) {}

  vlsp::Plan pointers(int64_t num_features, bool sequence_first) {
    return {update.data<int64_t>(), gather.data<int64_t>(), update.numel(),
            num_features,           counts.data<int64_t>(), sequence_first};
  }
};

struct PlanRequest {
  vlsp::Tokens tokens;
  vlsp::Placeholders visual;
  const vlsp::Owned& owned;
  paddle::Place place;
  bool sequence_first;
  int64_t num_features;
  int64_t padded_size;  // -1: as many as there are
};

PlanTensors plan_on_cpu(const PlanRequest& ask) {
  int64_t size = ask.padded_size;
  if (size < 0) {
    int64_t counts[2];
    vlsp::count_visual_cpu(ask.tokens, ask.visual, ask.owned, counts);
    size = counts[0];
  }
  PlanTensors plan(size, ask.place);
  vlsp::build_plan_cpu(ask.tokens, ask.visual, ask.owned,
                       plan.pointers(ask.num_features, ask.sequence_first));
  return plan;
}

#ifdef VLSP_WITH_CUDA
PlanTensors plan_on_gpu(const PlanRequest& ask, void* stream) {
  const int64_t num_tiles = vlsp::num_tiles_cuda(ask.tokens);
  Tensor tiles = empty_indices(2 * num_tiles, ask.place);
  auto* tile_counts = reinterpret_cast<vlsp::TileCount*>(tiles.data<int64_t>());
  check_cuda(vlsp::count_tiles_cuda(ask.tokens, ask.visual, ask.owned, tile_counts, stream), "count_tiles");
  int64_t size = ask.padded_size;
  if (size < 0) {
    const Tensor on_host = tiles.copy_to(paddle::CPUPlace(), true);
    size = 0;
    for (int64_t i = 0; i < num_tiles; ++i) size += on_host.data<int64_t>()[2 * i];
  }
  PlanTensors plan(size, ask.place);
  check_cuda(vlsp::write_plan_cuda(ask.tokens, ask.visual, ask.owned, tile_counts,
                                   plan.pointers(ask.num_features, ask.sequence_first), stream),
             "write_plan");
  return plan;
}
#endif

std::vector<Tensor> plan(const Tensor& tokens,  // [B, S]
                         const OptionalTensor& table, const std::vector<int64_t>& ids,
                         const std::vector<int64_t>& rule, int64_t table_local_len, bool sequence_first,
                         int64_t num_features, bool padded) {
  PD_CHECK(tokens.shape().size() == 2, "paddle_vl_sp: tokens must be [B, S]");
  const Ownership ownership(tokens, table, parse_rule(rule), table_local_len);
  const int64_t num_rows = tokens.shape()[0] * ownership.owned().local_len;
  const int64_t padded_size = !padded ? -1 : num_features < 0 ? num_rows : std::min(num_rows, num_features);
  const PlanRequest ask{{tokens.data(), token_type(tokens), tokens.shape()[0], tokens.shape()[1]},
                        placeholders(ids),
                        ownership.owned(),
                        tokens.place(),
                        sequence_first,
                        num_features,
                        padded_size};
  if (tokens.is_gpu()) {
#ifdef VLSP_WITH_CUDA
    PlanTensors made = plan_on_gpu(ask, tokens.stream());
    return {made.update, made.gather, made.counts};
#else
    refuse_gpu("plan");
#endif
  }
  PlanTensors made = plan_on_cpu(ask);
  return {made.update, made.gather, made.counts};
}

std::vector<Shape> plan_shapes(const Shape& tokens, const paddle::optional<Shape>& table) {
  return {{-1}, {-1}, {2}};
}

std::vector<DataType> plan_types(const DataType& tokens, const paddle::optional<DataType>& table) {
  return {DataType::INT64, DataType::INT64, DataType::INT64};
}

// ---- the row operators ----

// In the order of vlsp::ElementType, which is also what the attribute feature_type means.
constexpr DataType kElementTypes[] = {DataType::FLOAT32, DataType::FLOAT64, DataType::FLOAT16,
                                      DataType::BFLOAT16};

vlsp::ElementType element_type(DataType type) {
  for (int i = 0; i < 4; ++i) {
    if (kElementTypes[i] == type) return static_cast<vlsp::ElementType>(i);
  }
  PD_THROW("paddle_vl_sp: rows must be float32, float64, float16 or bfloat16");
}

DataType data_type(int feature_type) {
  PD_CHECK(0 <= feature_type && feature_type < 4, "paddle_vl_sp: unknown element type ", feature_type);
  return kElementTypes[feature_type];
}

vlsp::Pairs pairs_of(const Tensor& update, const Tensor& gather) {
  PD_CHECK(update.dtype() == DataType::INT64 && gather.dtype() == DataType::INT64 &&
               update.numel() == gather.numel(),
           "paddle_vl_sp: update and gather indices must be int64 and of one length");
  return {update.data<int64_t>(), gather.data<int64_t>(), update.numel()};
}

using CpuKernel = void (*)(const vlsp::RowArrays&, const vlsp::Pairs&, const vlsp::RowShape&);
using CudaKernel = int (*)(const vlsp::RowArrays&, const vlsp::Pairs&, const vlsp::RowShape&, void*);

struct RowKernel {
  const char* name;
  CpuKernel cpu;
  CudaKernel cuda;
};

#ifdef VLSP_WITH_CUDA
#define VLSP_ROW_KERNEL(name) {#name, vlsp::name##_cpu, vlsp::name##_cuda}
#else
#define VLSP_ROW_KERNEL(name) {#name, vlsp::name##_cpu, nullptr}
#endif
const RowKernel kReplaceRows = VLSP_ROW_KERNEL(replace_rows);
const RowKernel kAddRows = VLSP_ROW_KERNEL(add_rows);
const RowKernel kTakeRows = VLSP_ROW_KERNEL(take_rows);
const RowKernel kZeroRows = VLSP_ROW_KERNEL(zero_rows);

// `hidden` is written by replace, add and zero; `features` by take. Both are [.., width].
void run_rows(const RowKernel& kernel, const Tensor& hidden, const Tensor& features, const Tensor& update,
              const Tensor& gather) {
  PD_CHECK(
      !hidden.shape().empty() && features.shape().size() == 2 && hidden.shape().back() == features.shape()[1],
      "paddle_vl_sp: hidden must be [.., H] and features [N, H]");
  PD_CHECK(hidden.place() == features.place() && hidden.place() == update.place() &&
               hidden.place() == gather.place(),
           "paddle_vl_sp: hidden, features and indices must be on one device");
  const int64_t width = features.shape()[1];
  const vlsp::RowArrays arrays{const_cast<void*>(hidden.data()), element_type(hidden.dtype()),
                               const_cast<void*>(features.data()), element_type(features.dtype())};
  const vlsp::RowShape shape{width ? hidden.numel() / width : 0, features.shape()[0], width};
  if (hidden.is_gpu()) {
#ifdef VLSP_WITH_CUDA
    check_cuda(kernel.cuda(arrays, pairs_of(update, gather), shape, hidden.stream()), kernel.name);
    return;
#else
    refuse_gpu(kernel.name);
#endif
  }
  kernel.cpu(arrays, pairs_of(update, gather), shape);
}

// Forward inputs: hidden, features, update, gather, and `like_features`, which is given only where the number
// of feature rows is not known while the graph is built (num_features is -1): its gradient needs a shape from
// somewhere, and keeping the features themselves for that would hold their memory until the backward pass.

std::vector<Tensor> replace_rows(const Tensor& hidden, const Tensor& features, const Tensor& update,
                                 const Tensor& gather, const Tensor& like_features, int64_t num_features,
                                 int feature_type) {
  Tensor out = hidden.copy_to(hidden.place(), false);
  run_rows(kReplaceRows, out, features, update, gather);
  return {out};
}

std::vector<Tensor> add_rows(const Tensor& hidden, const Tensor& features, const Tensor& update,
                             const Tensor& gather, const Tensor& like_features, int64_t num_features,
                             int feature_type) {
  Tensor out = hidden.copy_to(hidden.place(), false);
  run_rows(kAddRows, out, features, update, gather);
  return {out};
}

// In place: its gradient is written where autograd can be told of it, in Python.
void add_rows_inplace(Tensor& hidden,  // NOLINT: Paddle's signature for an in-place operator
                      const Tensor& features, const Tensor& update, const Tensor& gather) {
  run_rows(kAddRows, hidden, features, update, gather);
}

// [num_features, H] with features[gather] = rows[update] and zero elsewhere: the gradient of using features.
Tensor take_rows(const Tensor& rows, const Tensor& update, const Tensor& gather, int64_t num_features,
                 int feature_type) {
  Tensor features = paddle::empty({num_features, rows.shape().back()}, data_type(feature_type), rows.place());
  run_rows(kTakeRows, rows, features, update, gather);
  return features;
}

int64_t known_features(const Tensor& like_features, int64_t num_features) {
  return num_features < 0 ? like_features.shape()[0] : num_features;
}

std::vector<Tensor> replace_rows_grad(const Tensor& update, const Tensor& gather, const Tensor& like_features,
                                      const Tensor& out_grad, int64_t num_features, int feature_type) {
  const int64_t rows = known_features(like_features, num_features);
  const Tensor grad = take_rows(out_grad, update, gather, rows, feature_type);
  const Tensor hidden_grad = out_grad.copy_to(out_grad.place(), false);
  run_rows(kZeroRows, hidden_grad, grad, update, gather);
  return {hidden_grad, grad};
}

// How many hold the gradient that autograd hands to an operator, if nobody outside holds it.
constexpr int64_t kHoldersInAutograd = 4;

// Autograd may add other users' gradients into the tensor that is returned. So the gradient is passed on as
// it is only where nobody would see that: no kept gradient and no hook has it.
Tensor passed_on(const Tensor& grad) {
  return grad.impl().use_count() > kHoldersInAutograd ? grad.copy_to(grad.place(), false) : grad;
}

std::vector<Tensor> add_rows_back(const Tensor& out_grad, const Tensor& update, const Tensor& gather,
                                  int64_t num_features, int feature_type) {
  return {passed_on(out_grad), take_rows(out_grad, update, gather, num_features, feature_type)};
}

std::vector<Tensor> add_rows_grad(const Tensor& update, const Tensor& gather, const Tensor& like_features,
                                  const Tensor& out_grad, int64_t num_features, int feature_type) {
  const int64_t rows = known_features(like_features, num_features);
  return {passed_on(out_grad), take_rows(out_grad, update, gather, rows, feature_type)};
}

// Of the gradients of two gradients one is missing where nobody asked for that gradient: then it is zero.
Tensor given_or_zeros(const Tensor& x, Shape shape, DataType type, const Tensor& beside) {
  return x.initialized() ? x : paddle::full(shape, 0, type, beside.place());
}

// Both operations are linear: the gradient of their gradient moves rows as they do themselves.
std::vector<Tensor> moved_again(const RowKernel& kernel, const Tensor& update, const Tensor& gather,
                                const Tensor& like_features, const Tensor& out_grad,
                                const Tensor& hidden_grad_grad, const Tensor& feature_grad_grad,
                                int64_t num_features, int feature_type) {
  const int64_t rows = known_features(like_features, num_features);
  const Tensor hidden = given_or_zeros(hidden_grad_grad, out_grad.shape(), out_grad.dtype(), out_grad);
  const Tensor features =
      given_or_zeros(feature_grad_grad, {rows, out_grad.shape().back()}, data_type(feature_type), out_grad);
  const Tensor out = hidden.copy_to(hidden.place(), false);
  run_rows(kernel, out, features, update, gather);
  return {out};
}

std::vector<Tensor> replace_rows_double_grad(const Tensor& update, const Tensor& gather,
                                             const Tensor& like_features, const Tensor& out_grad,
                                             const Tensor& hidden_grad_grad, const Tensor& feature_grad_grad,
                                             int64_t num_features, int feature_type) {
  return moved_again(kReplaceRows, update, gather, like_features, out_grad, hidden_grad_grad,
                     feature_grad_grad, num_features, feature_type);
}

std::vector<Tensor> add_rows_double_grad(const Tensor& update, const Tensor& gather,
                                         const Tensor& like_features, const Tensor& out_grad,
                                         const Tensor& hidden_grad_grad, const Tensor& feature_grad_grad,
                                         int64_t num_features, int feature_type) {
  return moved_again(kAddRows, update, gather, like_features, out_grad, hidden_grad_grad, feature_grad_grad,
                     num_features, feature_type);
}

std::vector<Shape> back_shapes(const Shape& rows, const Shape& update, const Shape& gather,
                               int64_t num_features, int feature_type) {
  return {rows, {num_features, rows.back()}};
}

std::vector<DataType> back_types(const DataType& rows, const DataType& update, const DataType& gather,
                                 int64_t num_features, int feature_type) {
  return {rows, data_type(feature_type)};
}

std::vector<Shape> same_shape(const Shape& hidden, const Shape& features, const Shape& update,
                              const Shape& gather, const Shape& like_features, int64_t num_features,
                              int feature_type) {
  return {hidden};
}

std::vector<DataType> same_type(const DataType& hidden, const DataType& features, const DataType& update,
                                const DataType& gather, const DataType& like_features, int64_t num_features,
                                int feature_type) {
  return {hidden};
}

Shape feature_shape(const Shape& out_grad, const Shape& like_features, int64_t num_features) {
  return {num_features < 0 ? like_features[0] : num_features, out_grad.back()};
}

std::vector<Shape> grad_shapes(const Shape& update, const Shape& gather, const Shape& like_features,
                               const Shape& out_grad, int64_t num_features, int feature_type) {
  return {out_grad, feature_shape(out_grad, like_features, num_features)};
}

std::vector<Shape> double_grad_shape(const Shape& update, const Shape& gather, const Shape& like_features,
                                     const Shape& out_grad, const Shape& hidden_grad_grad,
                                     const Shape& feature_grad_grad, int64_t num_features, int feature_type) {
  return {out_grad};
}

std::vector<DataType> double_grad_type(const DataType& update, const DataType& gather,
                                       const DataType& like_features, const DataType& out_grad,
                                       const DataType& hidden_grad_grad, const DataType& feature_grad_grad,
                                       int64_t num_features, int feature_type) {
  return {out_grad};
}

std::vector<DataType> grad_types(const DataType& update, const DataType& gather,
                                 const DataType& like_features, const DataType& out_grad,
                                 int64_t num_features, int feature_type) {
  return {out_grad, data_type(feature_type)};
}

}  // namespace

PD_BUILD_OP(vlsp_plan)
    .Inputs({"tokens", paddle::Optional("table")})
    .Outputs({"update", "gather", "counts"})
    .Attrs({"ids: std::vector<int64_t>", "rule: std::vector<int64_t>", "table_local_len: int64_t",
            "sequence_first: bool", "num_features: int64_t", "padded: bool"})
    .SetKernelFn(PD_KERNEL(plan))
    .SetInferShapeFn(PD_INFER_SHAPE(plan_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(plan_types));

PD_BUILD_OP(vlsp_replace_rows)
    .Inputs({"hidden", "features", "update", "gather", "like_features"})
    .Outputs({"out"})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(replace_rows))
    .SetInferShapeFn(PD_INFER_SHAPE(same_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(same_type));

PD_BUILD_GRAD_OP(vlsp_replace_rows)
    .Inputs({"update", "gather", "like_features", paddle::Grad("out")})
    .Outputs({paddle::Grad("hidden"), paddle::Grad("features")})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(replace_rows_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(grad_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(grad_types));

PD_BUILD_DOUBLE_GRAD_OP(vlsp_replace_rows)
    .Inputs({"update", "gather", "like_features", paddle::Grad("out"), paddle::Grad(paddle::Grad("hidden")),
             paddle::Grad(paddle::Grad("features"))})
    .Outputs({paddle::Grad(paddle::Grad("out"))})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(replace_rows_double_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(double_grad_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(double_grad_type));

PD_BUILD_OP(vlsp_add_rows)
    .Inputs({"hidden", "features", "update", "gather", "like_features"})
    .Outputs({"out"})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(add_rows))
    .SetInferShapeFn(PD_INFER_SHAPE(same_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(same_type));

PD_BUILD_GRAD_OP(vlsp_add_rows)
    .Inputs({"update", "gather", "like_features", paddle::Grad("out")})
    .Outputs({paddle::Grad("hidden"), paddle::Grad("features")})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(add_rows_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(grad_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(grad_types));

PD_BUILD_DOUBLE_GRAD_OP(vlsp_add_rows)
    .Inputs({"update", "gather", "like_features", paddle::Grad("out"), paddle::Grad(paddle::Grad("hidden")),
             paddle::Grad(paddle::Grad("features"))})
    .Outputs({paddle::Grad(paddle::Grad("out"))})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(add_rows_double_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(double_grad_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(double_grad_type));

PD_BUILD_OP(vlsp_add_rows_)
    .Inputs({"hidden", "features", "update", "gather"})
    .Outputs({"out"})
    .SetInplaceMap({{"hidden", "out"}})
    .SetKernelFn(PD_KERNEL(add_rows_inplace));

PD_BUILD_OP(vlsp_add_rows_back)
    .Inputs({"out_grad", "update", "gather"})
    .Outputs({"hidden_grad", "feature_grad"})
    .Attrs({"num_features: int64_t", "feature_type: int"})
    .SetKernelFn(PD_KERNEL(add_rows_back))
    .SetInferShapeFn(PD_INFER_SHAPE(back_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(back_types));
