// What a rank owns of one unpacked sequence, from the rule alone: at most two intervals.
// The same rule as paddle_vl_sp/layout.py, for lengths that are known only at run time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "index.h"

namespace vlsp {

struct Rule {
  int64_t cp_size, cp_rank;
  bool zigzag;
  int64_t sp_size, sp_rank;
  bool uneven;  // lengths that do not divide give the first ranks one more (contiguous cuts only)
};

struct Share {
  int64_t begin, end;
};

inline Share share_of(int64_t length, int64_t size, int64_t rank) {
  const int64_t quotient = length / size, remainder = length % size;
  const int64_t begin = rank * quotient + std::min(rank, remainder);
  return {begin, begin + quotient + (rank < remainder ? 1 : 0)};
}

// The number a length must be a multiple of.
inline int64_t length_multiple(const Rule& rule) {
  const bool zigzag = rule.zigzag && rule.cp_size > 1;
  if (rule.uneven) return zigzag ? 2 * rule.cp_size : 1;
  const int64_t local_multiple = zigzag && rule.sp_size % 2 ? 2 * rule.sp_size : rule.sp_size;
  return rule.cp_size * local_multiple;
}

// Fills `owned`, which has room for two, and returns how many there are: increasing, disjoint, none empty.
inline int owned_intervals(const Rule& rule, int64_t seq_len, Interval* owned) {
  Share pieces[2];
  int num_pieces = 1;
  if (rule.zigzag && rule.cp_size > 1) {
    const int64_t chunk = seq_len / (2 * rule.cp_size);
    const int64_t late = 2 * rule.cp_size - 1 - rule.cp_rank;
    pieces[0] = {rule.cp_rank * chunk, (rule.cp_rank + 1) * chunk};
    pieces[1] = {late * chunk, (late + 1) * chunk};
    num_pieces = 2;
  } else {
    pieces[0] = share_of(seq_len, rule.cp_size, rule.cp_rank);
  }
  int64_t row_len = 0;
  for (int i = 0; i < num_pieces; ++i) row_len += pieces[i].end - pieces[i].begin;
  const Share share = share_of(row_len, rule.sp_size, rule.sp_rank);

  int count = 0;
  int64_t row = 0;  // where the piece begins in the row that cp left
  for (int i = 0; i < num_pieces; ++i) {
    const int64_t length = pieces[i].end - pieces[i].begin;
    const int64_t low = std::max(row, share.begin), high = std::min(row + length, share.end);
    if (low < high) owned[count++] = {pieces[i].begin + low - row, high - low, low - share.begin};
    row += length;
  }
  return count;
}

}  // namespace vlsp
