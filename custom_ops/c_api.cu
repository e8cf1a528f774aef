// The CUDA functions of index.h and rows.h for a caller without C++ (ctypes): plain pointers and int64
// numbers, all arrays in device memory but `ids` and up to kMaxInlineIntervals intervals. Element and token
// types are the numbers of their enums. Every int returned is a cudaError_t.
#include <cuda_runtime.h>

#include <algorithm>

#include "index.h"
#include "rows.h"

namespace {

vlsp::Tokens make_tokens(const void* data, int64_t type, int64_t batch, int64_t seq_len) {
  return {data, static_cast<vlsp::TokenType>(type), batch, seq_len};
}

vlsp::Placeholders make_placeholders(const int64_t* ids, int64_t count) {
  vlsp::Placeholders visual{{}, static_cast<int>(count)};
  std::copy_n(ids, count, visual.ids);
  return visual;
}

vlsp::Owned make_owned(const int64_t* intervals, int64_t count, int64_t local_len) {
  static_assert(sizeof(vlsp::Interval) == 3 * sizeof(int64_t), "intervals are an int64 table [count, 3]");
  return {reinterpret_cast<const vlsp::Interval*>(intervals), count, local_len};
}

}  // namespace

extern "C" {

const char* vlsp_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int64_t vlsp_workspace_size(int64_t batch, int64_t seq_len) {
  return vlsp::workspace_size_cuda(make_tokens(nullptr, 0, batch, seq_len));
}

int vlsp_count_visual(const void* tokens, int64_t token_type, int64_t batch, int64_t seq_len,
                      const int64_t* ids, int64_t num_ids, const int64_t* intervals, int64_t num_intervals,
                      int64_t local_len, void* workspace, int64_t* counts, void* stream) {
  if (num_ids > vlsp::kMaxPlaceholders) return cudaErrorInvalidValue;
  return vlsp::count_visual_cuda(make_tokens(tokens, token_type, batch, seq_len),
                                 make_placeholders(ids, num_ids),
                                 make_owned(intervals, num_intervals, local_len), workspace, counts, stream);
}

int vlsp_write_plan(int64_t batch, int64_t seq_len, const int64_t* intervals, int64_t num_intervals,
                    int64_t local_len, void* workspace, int64_t* update, int64_t* gather, int64_t capacity,
                    int64_t num_features, int64_t* counts, int64_t sequence_first, void* stream) {
  const vlsp::Plan plan{update, gather, capacity, num_features, counts, sequence_first != 0};
  return vlsp::write_plan_cuda(make_tokens(nullptr, 0, batch, seq_len),
                               make_owned(intervals, num_intervals, local_len), workspace, plan, stream);
}

// operation: 0 replace, 1 add, 2 zero, which write `out` and need a map [num_rows]; 3 add in place, 4 take
int vlsp_rows(int64_t operation, void* out, void* hidden, int64_t hidden_type, void* features,
              int64_t feature_type, const int64_t* update, const int64_t* gather, int64_t* map,
              int64_t num_pairs, int64_t num_rows, int64_t num_features, int64_t width, void* stream) {
  const auto type_of_hidden = static_cast<vlsp::ElementType>(hidden_type);
  const auto type_of_features = static_cast<vlsp::ElementType>(feature_type);
  const vlsp::Pairs pairs{update, gather, num_pairs};
  const vlsp::RowShape shape{num_rows, num_features, width};
  const vlsp::Rows to_out{out, type_of_hidden};
  const vlsp::ConstRows from_hidden{hidden, type_of_hidden}, from_features{features, type_of_features};
  switch (operation) {
    case 0:
      return vlsp::replace_rows_cuda(to_out, from_hidden, from_features, pairs, shape, map, stream);
    case 1:
      return vlsp::add_rows_cuda(to_out, from_hidden, from_features, pairs, shape, map, stream);
    case 2:
      return vlsp::zero_rows_cuda(to_out, from_hidden, pairs, shape, map, stream);
    case 3:
      return vlsp::add_rows_in_place_cuda({hidden, type_of_hidden}, from_features, pairs, shape, stream);
    case 4:
      return vlsp::take_rows_cuda({features, type_of_features}, from_hidden, pairs, shape, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // extern "C"
