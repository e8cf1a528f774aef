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

// ---- CUDA: launches on `stream` (a cudaStream_t), no synchronisation; returns a cudaError_t ----

constexpr int64_t kMaxTokensCuda =
    0x7fffffff;  // of the batch, and rows of this rank; more: cudaErrorInvalidValue

// What both need in device memory, in numbers of 8 bytes.
int64_t workspace_size_cuda(const Tokens& tokens);

// counts: [2] in device memory, as in Plan. A host that must know n copies it.
int count_visual_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned, void* workspace,
                      int64_t* counts, void* stream);

// plan.counts are those that count_visual_cuda wrote; without any token it pads the pairs.
int write_plan_cuda(const Tokens& tokens, const Owned& owned, void* workspace, const Plan& plan,
                    void* stream);

}  // namespace vlsp
