// The arguments of the index kernels, by value, and what they compute from them: whether a token is visual,
// and its local position on this rank.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "index.h"

namespace vlsp {

struct Query {
  Tokens tokens;
  int64_t num_tokens;
  Placeholders visual;
  Owned owned;                        // its intervals only where they are in device memory
  Interval few[kMaxInlineIntervals];  // else here
};

inline Query make_query(const Tokens& tokens, const Placeholders& visual, const Owned& owned) {
  Query query{tokens, tokens.batch * tokens.seq_len, visual, owned, {}};
  if (owned.count <= kMaxInlineIntervals) std::copy_n(owned.intervals, owned.count, query.few);
  return query;
}

__device__ inline bool is_visual(uint8_t token, const Placeholders&) { return token != 0; }

template <typename Token>
__device__ bool is_visual(Token token, const Placeholders& visual) {
  bool found = false;
#pragma unroll
  for (int k = 0; k < kMaxPlaceholders; ++k) found |= k < visual.count && token == visual.ids[k];
  return found;
}

// Local positions of increasing global ones: a binary search for the first, then a step at a time.
class Walk {
 public:
  __device__ Walk(const Query& query, int64_t position)
      : intervals_(query.owned.count > kMaxInlineIntervals ? query.owned.intervals : query.few),
        count_(query.owned.count) {
    int64_t low = 0;
    int64_t high = count_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (intervals_[middle].start <= position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    enter(low - 1);
  }

  __device__ void restart() { enter(-1); }

  // -1: not owned.
  __device__ int64_t local(int64_t position) {
    while (position >= next_start_) enter(index_ + 1);
    const int64_t offset = position - now_.start;
    return offset < now_.length ? now_.local_start + offset : -1;
  }

 private:
  __device__ void enter(int64_t index) {
    index_ = index;
    now_ = index < 0 ? Interval{0, 0, 0} : intervals_[index];
    next_start_ = index + 1 < count_ ? intervals_[index + 1].start : INT64_MAX;
  }

  const Interval* intervals_;
  int64_t count_;
  int64_t index_;
  Interval now_;
  int64_t next_start_;
};

}  // namespace vlsp
