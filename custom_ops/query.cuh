// The arguments of the index kernels, by value, and what they compute from them: which of a thread's tokens
// are visual, and where this rank keeps a position. Tokens are counted in 32 bits (kMaxTokensCuda).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "index.h"

namespace vlsp {

constexpr int kRun = 8;  // neighbouring tokens of a thread: a bit each makes a byte

struct Query {
  const void* tokens;
  uint32_t num_tokens;
  uint32_t batch;
  uint32_t seq_len;
  bool aligned;                   // whether a run can be loaded in accesses of 16 bytes (a mask: 8)
  bool possible;                  // whether any token can be visual
  int64_t ids[kMaxPlaceholders];  // filled up with the first
  const Interval* many;           // [num_intervals] in device memory, null where `few` holds them
  Interval few[kMaxInlineIntervals];
  uint32_t num_intervals;
  uint32_t local_len;
};

// ---- Which tokens are visual ----

template <typename Token>
struct alignas(sizeof(Token) * kRun < 16 ? sizeof(Token) * kRun : 16) Run {
  Token at[kRun];
};

// Tokens behind the last are 0.
template <typename Token>
__device__ Run<Token> load_run(const Query& query, uint32_t first) {
  const Token* tokens = static_cast<const Token*>(query.tokens);
  Run<Token> run{};
  if (query.aligned && first + kRun <= query.num_tokens) {
    run = *reinterpret_cast<const Run<Token>*>(tokens + first);
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (first + j < query.num_tokens) run.at[j] = tokens[first + j];
    }
  }
  return run;
}

template <int kIds, typename Token>
__device__ uint32_t visual_bits(const Query& query, const Run<Token>& run) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    bool found = false;
#pragma unroll
    for (int k = 0; k < kIds; ++k) found |= run.at[j] == static_cast<Token>(query.ids[k]);
    bits |= static_cast<uint32_t>(found) << j;
  }
  return query.possible ? bits : 0;
}

// Of 4 bytes, which are not 0: the product brings the lowest bit of byte k to bit 28 + k.
__device__ inline uint32_t nonzero_bits(uint32_t bytes) {
  bytes |= bytes >> 4;
  bytes |= bytes >> 2;
  bytes |= bytes >> 1;
  return (bytes & 0x01010101u) * 0x10204080u >> 28;
}

template <int>
__device__ uint32_t visual_bits(const Query&, const Run<uint8_t>& run) {
  uint32_t half[2];
  memcpy(half, &run, sizeof(half));
  return nonzero_bits(half[0]) | nonzero_bits(half[1]) << 4;
}

// ---- What this rank owns ----

// The number of intervals that start at `position` or before it.
__device__ inline uint32_t intervals_up_to(const Query& query, uint32_t position) {
  uint32_t low = 0;
  uint32_t high = query.num_intervals;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (query.many[middle].start <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Bits of the positions first <= i < last of a run.
__device__ inline uint32_t bits_between(int64_t first, int64_t last) {
  const auto below = [](int64_t i) { return (1u << min(max(i, int64_t{0}), int64_t{kRun})) - 1; };
  return below(last) & ~below(first);
}

// Which of kRun positions of one sample are owned.
__device__ inline uint32_t own_bits(const Query& query, int64_t position) {
  uint32_t bits = 0;
  if (query.many == nullptr) {
    for (uint32_t k = 0; k < query.num_intervals; ++k) {
      const int64_t start = query.few[k].start - position;
      bits |= bits_between(start, start + query.few[k].length);
    }
    return bits;
  }
  for (uint32_t k = max(intervals_up_to(query, position), 1u) - 1; k < query.num_intervals; ++k) {
    const int64_t start = query.many[k].start - position;
    if (start >= kRun) break;
    bits |= bits_between(start, start + query.many[k].length);
  }
  return bits;
}

// The same for a run of tokens, which may reach into the next samples.
__device__ inline uint32_t own_bits_of_run(const Query& query, uint32_t first) {
  uint32_t position = first % query.seq_len;
  uint32_t bits = own_bits(query, position);
  uint32_t done = query.seq_len - position;
  if (done < kRun) bits &= (1u << done) - 1;
  for (; done < kRun; done += query.seq_len) bits |= own_bits(query, 0) << done;
  return bits & ((1u << kRun) - 1);
}

// Local positions of owned ones. Neighbours are mostly in one interval: the last one found is tried first.
class Finder {
 public:
  __device__ uint32_t local(const Query& query, uint32_t position) {
    if (position - start_ >= length_) find(query, position);
    return local_start_ + position - start_;
  }

 private:
  __device__ void find(const Query& query, uint32_t position) {
    if (query.many == nullptr) {
      for (uint32_t k = 0; k < query.num_intervals; ++k) {
        if (query.few[k].start <= position) use(query.few[k]);
      }
    } else {
      use(query.many[max(intervals_up_to(query, position), 1u) - 1]);
    }
  }

  __device__ void use(const Interval& interval) {
    start_ = static_cast<uint32_t>(interval.start);
    length_ = static_cast<uint32_t>(interval.length);
    local_start_ = static_cast<uint32_t>(interval.local_start);
  }

  uint32_t start_ = 0;
  uint32_t length_ = 0;
  uint32_t local_start_ = 0;
};

// ---- On the host ----

inline Query make_query(const Tokens& tokens, const Placeholders& visual, const Owned& owned) {
  Query query{};
  query.tokens = tokens.data;
  query.num_tokens = static_cast<uint32_t>(tokens.batch * tokens.seq_len);
  query.batch = static_cast<uint32_t>(tokens.batch);
  query.seq_len = static_cast<uint32_t>(tokens.seq_len);
  query.aligned = reinterpret_cast<uintptr_t>(tokens.data) % (tokens.type == TokenType::kMask ? 8 : 16) == 0;
  int count = 0;
  for (int k = 0; k < visual.count; ++k) {
    const bool fits =
        tokens.type != TokenType::kInt32 || visual.ids[k] == static_cast<int32_t>(visual.ids[k]);
    if (fits) query.ids[count++] = visual.ids[k];
  }
  query.possible = count > 0;
  for (; count < kMaxPlaceholders; ++count) query.ids[count] = query.ids[0];
  query.num_intervals = static_cast<uint32_t>(owned.count);
  query.local_len = static_cast<uint32_t>(owned.local_len);
  if (owned.count <= kMaxInlineIntervals) {
    std::copy_n(owned.intervals, owned.count, query.few);
  } else {
    query.many = owned.intervals;
  }
  return query;
}

}  // namespace vlsp
