// Row operations on raw pointers. hidden is [num_rows, width], features is [num_features, width];
// pair i joins row update[i] with feature row gather[i]. Rows are unique, so nothing needs an atomic.
// Pairs with an index outside its table (-1 pads a fixed-size plan) are skipped.
#pragma once

#include <cstdint>

namespace vlsp {

enum class ElementType { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Pairs {
  const int64_t* update;
  const int64_t* gather;  // increasing; the padding comes last
  int64_t count;
};

struct RowShape {
  int64_t num_rows;
  int64_t num_features;
  int64_t width;
};

// An array of rows that is written, and one that is only read.
struct Rows {
  void* data;
  ElementType type;
};

struct ConstRows {
  const void* data;
  ElementType type;
};

// Memory for the feature row of every row, [num_rows], in the order of the rows: -1 where a row has none.
using Map = int64_t*;

// The array that is written comes first. A feature is first converted to the type of hidden, then moved or
// added; where both types are the same, moving keeps every bit. Sums are made in float (double where hidden
// is double) and rounded once. The CUDA forms launch on `stream` (a cudaStream_t), nothing where there is
// nothing to do, and return a cudaError_t.

// out = hidden, but out[update] = features[gather]: each row is read once and written once
void replace_rows_cpu(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, const Map& map);
int replace_rows_cuda(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, const Map& map, void* stream);

// out = hidden, but out[update] = hidden[update] + features[gather]
void add_rows_cpu(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                  const RowShape& shape, const Map& map);
int add_rows_cuda(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                  const RowShape& shape, const Map& map, void* stream);

// out = hidden, but out[update] = 0 in pairs whose feature row is in its table too
void zero_rows_cpu(const Rows& out, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   const Map& map);
int zero_rows_cuda(const Rows& out, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   const Map& map, void* stream);

// hidden[update] += features[gather]
void add_rows_in_place_cpu(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                           const RowShape& shape);
int add_rows_in_place_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                           const RowShape& shape, void* stream);

// features[gather] = hidden[update], zero elsewhere: writes every element of features
void take_rows_cpu(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape);
int take_rows_cuda(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   void* stream);

// to = from, both of one type; on a device the framework copies
void copy_rows_cpu(const Rows& to, const ConstRows& from, const RowShape& shape);

}  // namespace vlsp
