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

// The array that is written comes first. A feature is first converted to the type of hidden, then moved or
// added; where both types are the same, moving keeps every bit. Sums are made in float (double where hidden
// is double) and rounded once. The CUDA forms make one launch on `stream` (a cudaStream_t), none where there
// is nothing to do, and return a cudaError_t.

// hidden[update] = features[gather]
void replace_rows_cpu(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape);
int replace_rows_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, void* stream);

// hidden[update] += features[gather]
void add_rows_cpu(const Rows& hidden, const ConstRows& features, const Pairs& pairs, const RowShape& shape);
int add_rows_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs, const RowShape& shape,
                  void* stream);

// features[gather] = hidden[update], zero elsewhere: writes every element of features
void take_rows_cpu(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape);
int take_rows_cuda(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   void* stream);

// hidden[update] = 0, in pairs whose feature row is in its table too
void zero_rows_cpu(const Rows& hidden, const Pairs& pairs, const RowShape& shape);
int zero_rows_cuda(const Rows& hidden, const Pairs& pairs, const RowShape& shape, void* stream);

}  // namespace vlsp
