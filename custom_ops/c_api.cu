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

int64_t vlsp_num_tiles(int64_t batch, int64_t seq_len) {
  return vlsp::num_tiles_cuda(make_tokens(nullptr, 0, batch, seq_len));
}

int vlsp_count_tiles(const void* tokens, int64_t token_type, int64_t batch, int64_t seq_len,
                     const int64_t* ids, int64_t num_ids, const int64_t* intervals, int64_t num_intervals,
                     int64_t local_len, void* tiles, void* stream) {
  if (num_ids > vlsp::kMaxPlaceholders) return cudaErrorInvalidValue;
  return vlsp::count_tiles_cuda(
      make_tokens(tokens, token_type, batch, seq_len), make_placeholders(ids, num_ids),
      make_owned(intervals, num_intervals, local_len), static_cast<vlsp::TileCount*>(tiles), stream);
}

int vlsp_write_plan(const void* tokens, int64_t token_type, int64_t batch, int64_t seq_len,
                    const int64_t* ids, int64_t num_ids, const int64_t* intervals, int64_t num_intervals,
                    int64_t local_len, const void* tiles, int64_t* update, int64_t* gather, int64_t capacity,
                    int64_t num_features, int64_t* counts, int64_t sequence_first, void* stream) {
  if (num_ids > vlsp::kMaxPlaceholders) return cudaErrorInvalidValue;
  const vlsp::Plan plan{update, gather, capacity, num_features, counts, sequence_first != 0};
  return vlsp::write_plan_cuda(make_tokens(tokens, token_type, batch, seq_len),
                               make_placeholders(ids, num_ids),
                               make_owned(intervals, num_intervals, local_len),
                               static_cast<const vlsp::TileCount*>(tiles), plan, stream);
}

// operation: 0 replace, 1 add, 2 take, 3 zero
int vlsp_rows(int64_t operation, void* hidden, int64_t hidden_type, void* features, int64_t feature_type,
              const int64_t* update, const int64_t* gather, int64_t num_pairs, int64_t num_rows,
              int64_t num_features, int64_t width, void* stream) {
  const auto type_of_hidden = static_cast<vlsp::ElementType>(hidden_type);
  const auto type_of_features = static_cast<vlsp::ElementType>(feature_type);
  const vlsp::Pairs pairs{update, gather, num_pairs};
  const vlsp::RowShape shape{num_rows, num_features, width};
  const vlsp::Rows to_hidden{hidden, type_of_hidden}, to_features{features, type_of_features};
  const vlsp::ConstRows from_hidden{hidden, type_of_hidden}, from_features{features, type_of_features};
  switch (operation) {
    case 0:
      return vlsp::replace_rows_cuda(to_hidden, from_features, pairs, shape, stream);
    case 1:
      return vlsp::add_rows_cuda(to_hidden, from_features, pairs, shape, stream);
    case 2:
      return vlsp::take_rows_cuda(to_features, from_hidden, pairs, shape, stream);
    case 3:
      return vlsp::zero_rows_cuda(to_hidden, pairs, shape, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // extern "C"
