// Row operations on a GPU, limited by memory bandwidth. The threads of a block cover the columns of a row
// and, where rows are narrow, several rows; each thread has kPacks accesses in flight.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "pack.cuh"
#include "rows.h"

namespace vlsp {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;       // accesses of a thread before it uses the first
constexpr int kThreadRows = 4;  // feature rows a thread in a strip of take_rows
constexpr int kAccessBytes = 16;
constexpr int64_t kMaxGridY = 65535;

__device__ bool within(int64_t index, int64_t size) { return index >= 0 && index < size; }

enum class Change { kReplace, kAdd, kZero };

// Here and below shape.width counts packs.
template <Change change, typename H, typename F, int N>
__global__ void __launch_bounds__(kThreads)
    change_rows(Pack<H, N>* hidden, const Pack<F, N>* features, Pairs pairs, RowShape shape) {
  const int64_t first = int64_t{blockIdx.x} * kPacks * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (int64_t i = blockIdx.y * blockDim.y + threadIdx.y; i < pairs.count; i += gridDim.y * blockDim.y) {
    const int64_t row = pairs.update[i];
    const int64_t feature = pairs.gather[i];
    if (!within(row, shape.num_rows) || !within(feature, shape.num_features)) continue;
    Pack<H, N>* to = hidden + row * shape.width;
    const Pack<F, N>* from = features + feature * shape.width;
    Pack<H, N> old[kPacks];
    Pack<F, N> given[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = first + k * blockDim.x;
      if (column >= shape.width) continue;
      if constexpr (change != Change::kZero) given[k] = from[column];
      if constexpr (change == Change::kAdd) old[k] = to[column];
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = first + k * blockDim.x;
      if (column >= shape.width) continue;
      if constexpr (change == Change::kZero) to[column] = {};
      if constexpr (change == Change::kReplace) to[column] = convert<H>(given[k]);
      if constexpr (change == Change::kAdd) to[column] = add(old[k], convert<H>(given[k]));
    }
  }
}

// The first pair whose feature row is not below `feature`. The whole block searches: every round cuts the
// range by the number of threads, three rounds for a million pairs.
__device__ int64_t find_pair(const Pairs& pairs, int64_t feature, int thread) {
  int64_t low = 0;
  int64_t high = pairs.count;
  while (low < high) {
    const int64_t step = (high - low + kThreads - 1) / kThreads;
    const int64_t probe = low + thread * step;
    const bool below = probe < high && within(pairs.gather[probe], feature);  // padding counts as the end
    const int num_below = __syncthreads_count(below);
    if (num_below == 0) break;
    high = min(high, low + num_below * step);
    low += (num_below - 1) * step + 1;
  }
  return low;
}

// Strips of neighbouring feature rows: one search finds the pairs of all of them, and each pair stores the
// source of its feature row.
template <typename H, typename F, int N>
__global__ void __launch_bounds__(kThreads)
    take_strips(const Pack<H, N>* hidden, Pack<F, N>* features, Pairs pairs, RowShape shape) {
  __shared__ int64_t sources[kThreads * kThreadRows];  // of each feature row of the strip; -1: none
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int strip = blockDim.y * kThreadRows;
  const int64_t first = int64_t{blockIdx.x} * kPacks * blockDim.x + threadIdx.x;
  for (int64_t start = int64_t{blockIdx.y} * strip; start < shape.num_features; start += gridDim.y * strip) {
    const int64_t first_pair = find_pair(pairs, start, thread);
    for (int j = thread; j < strip; j += kThreads) sources[j] = -1;
    __syncthreads();
#pragma unroll 1
    for (int64_t j = thread; j < min(int64_t{strip}, pairs.count - first_pair); j += kThreads) {
      const int64_t row = pairs.update[first_pair + j];
      const int64_t feature = pairs.gather[first_pair + j];
      if (within(feature - start, strip) && within(row, shape.num_rows)) sources[feature - start] = row;
    }
    __syncthreads();
#pragma unroll 1
    for (int j = threadIdx.y; j < min(int64_t{strip}, shape.num_features - start); j += blockDim.y) {
      const int64_t row = sources[j];
      const bool used = row >= 0;
      Pack<H, N> taken[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = first + k * blockDim.x;
        if (used && column < shape.width) taken[k] = hidden[row * shape.width + column];
      }
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = first + k * blockDim.x;
        if (column >= shape.width) continue;
        features[(start + j) * shape.width + column] = used ? convert<F>(taken[k]) : Pack<F, N>{};
      }
    }
    __syncthreads();
  }
}

struct Grid {
  dim3 blocks;
  dim3 threads;
};

// Enough threads across a row for its packs, the rest of the block down the rows.
Grid cover(int64_t width, int64_t num_rows, int thread_rows) {
  int across = 1;
  while (across < kThreads && across * kPacks < width) across *= 2;
  const int down = kThreads / across;
  const int64_t blocks_across = (width + across * kPacks - 1) / (across * kPacks);
  const int64_t blocks_down = (num_rows + down * thread_rows - 1) / (down * thread_rows);
  return {dim3(blocks_across, std::min(blocks_down, kMaxGridY)), dim3(across, down)};
}

template <typename T, int N>
bool fits(const void* data, int64_t width) {
  return width % N == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T, N>) == 0;
}

// Calls use(to, from, shape) with pointers to packs as wide as addresses and width allow.
template <typename To, typename From, typename Use>
int with_packs(void* to, const void* from, RowShape shape, Use use) {
  constexpr int N = kAccessBytes / std::max(sizeof(To), sizeof(From));
  if (fits<To, N>(to, shape.width) && fits<From, N>(from, shape.width)) {
    shape.width /= N;
    use(static_cast<Pack<To, N>*>(to), static_cast<const Pack<From, N>*>(from), shape);
  } else {
    use(static_cast<Pack<To, 1>*>(to), static_cast<const Pack<From, 1>*>(from), shape);
  }
  return cudaGetLastError();
}

template <typename Use>
int with_type(ElementType type, Use use) {
  switch (type) {
    case ElementType::kFloat32:
      return use(float{});
    case ElementType::kFloat64:
      return use(double{});
    case ElementType::kFloat16:
      return use(__half{});
    case ElementType::kBFloat16:
      return use(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// What moves an element of this many bytes, whatever they mean.
template <typename T>
using Bits =
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

enum class Values { kMoved, kComputed };

template <Values values, typename Use>
int with_types(const Rows& to, const ConstRows& from, const RowShape& shape, Use use) {
  return with_type(to.type, [&](auto written) {
    return with_type(from.type, [&](auto read) {
      using To = decltype(written);
      using From = decltype(read);
      if constexpr (values == Values::kMoved && std::is_same_v<To, From>) {
        return with_packs<Bits<To>, Bits<To>>(to.data, from.data, shape, use);
      } else {
        return with_packs<To, From>(to.data, from.data, shape, use);
      }
    });
  });
}

template <Change change, typename H, typename F, int N>
void launch_change(Pack<H, N>* hidden, const Pack<F, N>* features, const Pairs& pairs, const RowShape& shape,
                   void* stream) {
  const Grid grid = cover(shape.width, pairs.count, 1);
  change_rows<change>
      <<<grid.blocks, grid.threads, 0, static_cast<cudaStream_t>(stream)>>>(hidden, features, pairs, shape);
}

}  // namespace

int replace_rows_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, void* stream) {
  if (pairs.count == 0 || shape.width == 0) return cudaSuccess;
  return with_types<Values::kMoved>(hidden, features, shape,
                                    [&](auto* to, const auto* from, const RowShape& packed) {
                                      launch_change<Change::kReplace>(to, from, pairs, packed, stream);
                                    });
}

int add_rows_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs, const RowShape& shape,
                  void* stream) {
  if (pairs.count == 0 || shape.width == 0) return cudaSuccess;
  return with_types<Values::kComputed>(hidden, features, shape,
                                       [&](auto* to, const auto* from, const RowShape& packed) {
                                         launch_change<Change::kAdd>(to, from, pairs, packed, stream);
                                       });
}

int take_rows_cuda(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   void* stream) {
  if (shape.num_features == 0 || shape.width == 0) return cudaSuccess;
  return with_types<Values::kMoved>(
      features, hidden, shape, [&](auto* to, const auto* from, const RowShape& packed) {
        const Grid grid = cover(packed.width, packed.num_features, kThreadRows);
        take_strips<<<grid.blocks, grid.threads, 0, static_cast<cudaStream_t>(stream)>>>(from, to, pairs,
                                                                                         packed);
      });
}

int zero_rows_cuda(const Rows& hidden, const Pairs& pairs, const RowShape& shape, void* stream) {
  if (pairs.count == 0 || shape.width == 0) return cudaSuccess;
  return with_type(hidden.type, [&](auto element) {
    using H = Bits<decltype(element)>;
    return with_packs<H, H>(hidden.data, hidden.data, shape,
                            [&](auto* rows, const auto* unused, const RowShape& packed) {
                              launch_change<Change::kZero>(rows, unused, pairs, packed, stream);
                            });
  });
}

}  // namespace vlsp
