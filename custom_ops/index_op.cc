// The index operator, vlsp_plan: the pairs (row, feature row) of this rank, from the tokens and what the rank
// owns of them, which is a rule or a table of intervals.

#include <algorithm>

#include "index.h"
#include "paddle_op.h"
#include "rule.h"

namespace vlsp {
namespace {

using OptionalTensor = paddle::optional<Tensor>;

TokenType token_type(const Tensor& tokens) {
  switch (tokens.dtype()) {
    case DataType::INT32:
      return TokenType::kInt32;
    case DataType::INT64:
      return TokenType::kInt64;
    case DataType::BOOL:
      return TokenType::kMask;
    default:
      PD_THROW("paddle_vl_sp: tokens must be int32, int64 or bool");
  }
}

Placeholders placeholders(const std::vector<int64_t>& ids) {
  PD_CHECK(!ids.empty() && ids.size() <= kMaxPlaceholders, "paddle_vl_sp: 1 to ", kMaxPlaceholders,
           " placeholder ids, got ", ids.size());
  Placeholders visual{};
  std::copy(ids.begin(), ids.end(), visual.ids);
  visual.count = static_cast<int>(ids.size());
  return visual;
}

Rule parse_rule(const std::vector<int64_t>& rule) {
  PD_CHECK(rule.size() == 6, "paddle_vl_sp: rule is cp_size, cp_rank, zigzag, sp_size, sp_rank, uneven");
  Rule parsed{rule[0], rule[1], rule[2] != 0, rule[3], rule[4], rule[5] != 0};
  PD_CHECK(0 <= parsed.cp_rank && parsed.cp_rank < parsed.cp_size, "paddle_vl_sp: cp_rank ", parsed.cp_rank,
           " is out of range for cp_size ", parsed.cp_size);
  PD_CHECK(0 <= parsed.sp_rank && parsed.sp_rank < parsed.sp_size, "paddle_vl_sp: sp_rank ", parsed.sp_rank,
           " is out of range for sp_size ", parsed.sp_size);
  return parsed;
}

// The intervals that this rank owns, from the rule or from the table of a packed sequence. Keeps them in
// memory until the kernels are launched.
class Ownership {
 public:
  Ownership(const Ownership&) = delete;
  Ownership(const Tensor& tokens, const OptionalTensor& table, const Rule& rule, int64_t table_local_len) {
    if (table) {
      use_table(tokens, *table, table_local_len);
    } else {
      use_rule(tokens.shape()[1], rule);
    }
  }

  const Owned& owned() const { return owned_; }

 private:
  void use_rule(int64_t seq_len, const Rule& rule) {
    const int64_t multiple = length_multiple(rule);
    PD_CHECK(seq_len % multiple == 0, "paddle_vl_sp: the length ", seq_len, " is not divisible by ", multiple,
             "; the next length that fits is ", (seq_len + multiple - 1) / multiple * multiple);
    const int count = owned_intervals(rule, seq_len, from_rule_);
    int64_t local_len = 0;
    for (int i = 0; i < count; ++i) local_len += from_rule_[i].length;
    owned_ = {from_rule_, count, local_len};
  }

  void use_table(const Tensor& tokens, const Tensor& table, int64_t local_len) {
    PD_CHECK(table.dtype() == DataType::INT64 && table.shape().size() == 2 && table.shape()[1] == 3,
             "paddle_vl_sp: the interval table must be int64 [K, 3]");
    PD_CHECK(tokens.shape()[0] == 1, "paddle_vl_sp: an interval table is for one packed row, B = 1");
    int64_t count = table.shape()[0];
    const bool on_device = tokens.is_gpu() && count > kMaxInlineIntervals;
    table_ = table.is_gpu() == on_device
                 ? table
                 : table.copy_to(on_device ? tokens.place() : paddle::CPUPlace(), true);
    const auto* intervals = reinterpret_cast<const Interval*>(table_.data<int64_t>());
    // A table may end in empty intervals: Paddle takes an empty table for an absent one, and the table of a
    // saved program has a fixed size.
    if (!on_device) {
      while (count > 0 && intervals[count - 1].length == 0) --count;
      check_table(intervals, count, tokens.shape()[1]);
    }
    owned_ = {intervals, count, local_len < 0 ? tokens.shape()[1] : local_len};
  }

  // The CPU kernels read tokens at what the table says; the CUDA kernels compare every position with it.
  static void check_table(const Interval* intervals, int64_t count, int64_t seq_len) {
    int64_t end = 0;
    for (int64_t k = 0; k < count; ++k) {
      const Interval& own = intervals[k];
      PD_CHECK(
          own.start >= end && own.length > 0 && own.length <= seq_len - own.start && own.local_start >= 0,
          "paddle_vl_sp: interval ", k, " of the table, (", own.start, ", ", own.length, ", ",
          own.local_start, "), is not a run after ", end, " within ", seq_len, " positions");
      end = own.start + own.length;
    }
  }

  Interval from_rule_[2];
  Tensor table_;
  Owned owned_{};
};

Tensor empty_indices(int64_t size, const paddle::Place& place) {
  return paddle::empty({size}, DataType::INT64, place);
}

struct PlanTensors {
  Tensor update, gather, counts;

  PlanTensors(int64_t size, const Tensor& counts)
      : update(empty_indices(size, counts.place())),
        gather(empty_indices(size, counts.place())),
        counts(counts) {}

  Plan pointers(int64_t num_features, bool sequence_first) {
    return {update.data<int64_t>(), gather.data<int64_t>(), update.numel(),
            num_features,           counts.data<int64_t>(), sequence_first};
  }
};

struct PlanRequest {
  Tokens tokens;
  Placeholders visual;
  const Owned& owned;
  paddle::Place place;
  bool sequence_first;
  int64_t num_features;
  int64_t padded_size;  // -1: as many as there are
};

PlanTensors plan_on_cpu(const PlanRequest& request) {
  int64_t size = request.padded_size;
  if (size < 0) {
    int64_t counts[2];
    count_visual_cpu(request.tokens, request.visual, request.owned, counts);
    size = counts[0];
  }
  PlanTensors plan(size, empty_indices(2, request.place));
  build_plan_cpu(request.tokens, request.visual, request.owned,
                 plan.pointers(request.num_features, request.sequence_first));
  return plan;
}

#ifdef VLSP_WITH_CUDA
PlanTensors plan_on_gpu(const PlanRequest& request, const Tensor& tokens) {
  PD_CHECK(request.tokens.batch * std::max(request.tokens.seq_len, request.owned.local_len) <= kMaxTokensCuda,
           "paddle_vl_sp: on a GPU a batch has at most 2^31 - 1 tokens, got ", request.tokens.batch, " x ",
           request.tokens.seq_len);
  const DeviceOf device(tokens);
  void* stream = device.stream();
  Tensor workspace = empty_indices(workspace_size_cuda(request.tokens), request.place);
  void* memory = workspace.data<int64_t>();
  Tensor counts = empty_indices(2, request.place);
  check_cuda(count_visual_cuda(request.tokens, request.visual, request.owned, memory, counts.data<int64_t>(),
                               stream),
             "count_visual");
  const int64_t size = request.padded_size >= 0 ? request.padded_size
                                                : *counts.copy_to(paddle::CPUPlace(), true).data<int64_t>();
  PlanTensors plan(size, counts);
  check_cuda(write_plan_cuda(request.tokens, request.owned, memory,
                             plan.pointers(request.num_features, request.sequence_first), stream),
             "write_plan");
  return plan;
}
#else
PlanTensors plan_on_gpu(const PlanRequest&, const Tensor&) { refuse_gpu("plan"); }
#endif

std::vector<Tensor> plan(const Tensor& tokens,  // [B, S]
                         const OptionalTensor& table, const std::vector<int64_t>& ids,
                         const std::vector<int64_t>& rule, int64_t table_local_len, bool sequence_first,
                         int64_t num_features, bool padded) {
  PD_CHECK(tokens.shape().size() == 2, "paddle_vl_sp: tokens must be [B, S], got ", text(tokens.shape()));
  const Ownership ownership(tokens, table, parse_rule(rule), table_local_len);
  const int64_t num_rows = tokens.shape()[0] * ownership.owned().local_len;
  const int64_t padded_size = !padded ? -1 : num_features < 0 ? num_rows : std::min(num_rows, num_features);
  const PlanRequest request{{tokens.data(), token_type(tokens), tokens.shape()[0], tokens.shape()[1]},
                            placeholders(ids),
                            ownership.owned(),
                            tokens.place(),
                            sequence_first,
                            num_features,
                            padded_size};
  const PlanTensors made = tokens.is_gpu() ? plan_on_gpu(request, tokens) : plan_on_cpu(request);
  return {made.update, made.gather, made.counts};
}

std::vector<Shape> plan_shapes(const Shape& tokens, const paddle::optional<Shape>& table) {
  return {{-1}, {-1}, {2}};
}

std::vector<DataType> plan_types(const DataType& tokens, const paddle::optional<DataType>& table) {
  return {DataType::INT64, DataType::INT64, DataType::INT64};
}

}  // namespace
}  // namespace vlsp

PD_BUILD_OP(vlsp_plan)
    .Inputs({"tokens", paddle::Optional("table")})
    .Outputs({"update", "gather", "counts"})
    .Attrs({"ids: std::vector<int64_t>", "rule: std::vector<int64_t>", "table_local_len: int64_t",
            "sequence_first: bool", "num_features: int64_t", "padded: bool"})
    .SetKernelFn(PD_KERNEL(vlsp::plan))
    .SetInferShapeFn(PD_INFER_SHAPE(vlsp::plan_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(vlsp::plan_types));
