// Index building on raw pointers: which rows of this rank's hidden states are visual tokens, and
// which feature row each of them takes. Nothing here depends on a framework.
#pragma once

#include <cstdint>

namespace vlsp {

constexpr int kMaxPlaceholders = 8;
constexpr int kMaxInlineIntervals = 8;

enum class TokenType { kInt32, kInt64, kMask };  // kMask: one byte a token, visual unless 0

struct Tokens {  // [batch, seq_len]
  const void* data;
  TokenType type;
  int64_t batch;
  int64_t seq_len;
};

// A token is visual if it equals one of the ids; a mask is read as tokens with the id 1.
struct Placeholders {
  int64_t ids[kMaxPlaceholders];
  int count;
};

// A run of global positions that this rank owns, and the local position of its first.
struct Interval {
  int64_t start;
  int64_t length;
  int64_t local_start;
};

// All that this rank owns of every sample: increasing, disjoint, none empty; an int64 table [count, 3].
// For CUDA the table is in host memory up to kMaxInlineIntervals, in device memory beyond.
struct Owned {
  const Interval* intervals;
  int64_t count;
  int64_t local_len;
};

// Where the pairs go, in reading order. `counts` receives {visual tokens of this rank, of the batch},
// whether or not their pairs fit.
struct Plan {
  int64_t* update;       // [capacity] row = b * local_len + local, or local * batch + b
  int64_t* gather;       // [capacity] feature row
  int64_t capacity;      // further pairs are left out; unused places become -1
  int64_t num_features;  // pairs whose feature row is not below it are left out; -1: not known
  int64_t* counts;       // [2], may be null
  bool sequence_first;
};

// ---- CPU ----

void count_visual_cpu(const Tokens& tokens, const Placeholders& visual, const Owned& owned, int64_t* counts);

void build_plan_cpu(const Tokens& tokens, const Placeholders& visual, const Owned& owned, const Plan& plan);

// ---- CUDA: two launches on `stream` (a cudaStream_t), no synchronisation; returns a cudaError_t ----

struct TileCount {
  int64_t own;  // visual tokens of this rank in the tile
  int64_t all;  // visual tokens in the tile
};

// 0 where there is no token: then count_tiles_cuda launches nothing, and write_plan_cuda still pads.
int64_t num_tiles_cuda(const Tokens& tokens);

// tiles: [num_tiles] in device memory. Their sums are the two counts, for a host that must know n first.
int count_tiles_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned, TileCount* tiles,
                     void* stream);

int write_plan_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned,
                    const TileCount* tiles, const Plan& plan, void* stream);

}  // namespace vlsp
