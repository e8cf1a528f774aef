// Row operations on a GPU, limited by memory bandwidth. The threads of a block cover the columns of a row
// and, where rows are narrow, several rows; each thread has kPacks accesses in flight.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "launch.cuh"
#include "pack.cuh"
#include "rows.h"

namespace vlsp {
namespace {

constexpr int kThreads = 64;
constexpr int kPacks = 4;       // accesses of a thread before it uses the first
constexpr int kThreadRows = 4;  // feature rows a thread in a strip of take_rows
constexpr int kAccessBytes = 16;
constexpr int64_t kMaxGridY = 65535;

__device__ bool within(int64_t index, int64_t size) { return index >= 0 && index < size; }

__global__ void __launch_bounds__(kThreads) fill_map(Pairs pairs, RowShape shape, Map map) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= pairs.count) return;
  const int64_t row = pairs.update[i];
  const int64_t feature = pairs.gather[i];
  if (within(row, shape.num_rows) && within(feature, shape.num_features)) map[row] = feature;
}

enum class Change { kReplace, kAdd, kZero };

// Here and below shape.width counts packs.
template <Change change, typename H, typename F, int N>
__global__ void __launch_bounds__(kThreads)
    merge_rows(Pack<H, N>* out, const Pack<H, N>* hidden, const Pack<F, N>* features, const int64_t* map,
               RowShape shape) {
  const int64_t first = int64_t{blockIdx.x} * kPacks * blockDim.x + threadIdx.x;
  const int64_t columns = shape.width - first;  // of this thread and those behind it
#pragma unroll 1
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < shape.num_rows;
       row += gridDim.y * blockDim.y) {
    const int64_t feature = map[row];
    const bool changed = feature >= 0;
    const Pack<H, N>* old_row = hidden + (row * shape.width + first);
    const Pack<F, N>* given_row = features + (feature * shape.width + first);
    Pack<H, N>* out_row = out + (row * shape.width + first);
    Pack<H, N> old[kPacks];
    Pack<F, N> given[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = k * blockDim.x;
      if (column >= columns) continue;
      if (change == Change::kAdd || !changed) old[k] = old_row[column];
      if (change != Change::kZero && changed) given[k] = given_row[column];
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = k * blockDim.x;
      if (column >= columns) continue;
      if (!changed) {
        out_row[column] = old[k];
      } else if constexpr (change == Change::kZero) {
        out_row[column] = {};
      } else if constexpr (change == Change::kReplace) {
        out_row[column] = convert<H>(given[k]);
      } else {
        out_row[column] = add(old[k], convert<H>(given[k]));
      }
    }
  }
}

template <typename H, typename F, int N>
__global__ void __launch_bounds__(kThreads)
    add_in_place(Pack<H, N>* hidden, const Pack<F, N>* features, Pairs pairs, RowShape shape) {
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
      given[k] = from[column];
      old[k] = to[column];
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = first + k * blockDim.x;
      if (column < shape.width) to[column] = add(old[k], convert<H>(given[k]));
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

// Calls use(to, from, shape) with pointers to packs as wide as addresses and width allow; `also` is a third
// array, of the type To. Between two types that is N or 1.
template <typename To, typename From, int N = kAccessBytes / std::max(sizeof(To), sizeof(From)), typename Use>
int with_packs(void* to, const void* from, const void* also, RowShape shape, Use use) {
  if constexpr (N > 1) {
    if (!fits<To, N>(to, shape.width) || !fits<From, N>(from, shape.width) ||
        !fits<To, N>(also, shape.width)) {
      return with_packs<To, From, std::is_same_v<To, From> ? N / 2 : 1>(to, from, also, shape, use);
    }
  }
  shape.width /= N;
  return use(static_cast<Pack<To, N>*>(to), static_cast<const Pack<From, N>*>(from), shape);
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

template <Change change, typename H, typename F, int N>
int launch_merge(Pack<H, N>* out, const Pack<H, N>* hidden, const Pack<F, N>* features, const int64_t* map,
                 const RowShape& shape, void* stream) {
  const Grid grid = cover(shape.width, shape.num_rows, 1);
  return launch(merge_rows<change, H, F, N>, grid.blocks, grid.threads, stream, out, hidden, features, map,
                shape);
}

template <typename H, typename F, int N>
int launch_in_place(Pack<H, N>* hidden, const Pack<F, N>* features, const Pairs& pairs, const RowShape& shape,
                    void* stream) {
  const Grid grid = cover(shape.width, pairs.count, 1);
  return launch(add_in_place<H, F, N>, grid.blocks, grid.threads, stream, hidden, features, pairs, shape);
}

template <typename H, typename F, int N>
int launch_take(const Pack<H, N>* hidden, Pack<F, N>* features, const Pairs& pairs, const RowShape& shape,
                void* stream) {
  const Grid grid = cover(shape.width, shape.num_features, kThreadRows);
  return launch(take_strips<H, F, N>, grid.blocks, grid.threads, stream, hidden, features, pairs, shape);
}

enum class Values { kMoved, kComputed };

template <Values values, typename Use>
int with_types(const Rows& to, const ConstRows& from, const void* also, const RowShape& shape, Use use) {
  return with_type(to.type, [&](auto written) {
    return with_type(from.type, [&](auto read) {
      using To = decltype(written);
      using From = decltype(read);
      if constexpr (values == Values::kMoved && std::is_same_v<To, From>) {
        return with_packs<Bits<To>, Bits<To>>(to.data, from.data, also, shape, use);
      } else {
        return with_packs<To, From>(to.data, from.data, also, shape, use);
      }
    });
  });
}

int64_t row_bytes(const ConstRows& rows, int64_t width) {
  return with_type(rows.type, [](auto element) { return static_cast<int>(sizeof(element)); }) * width;
}

template <Change change, Values values>
int merge(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
          const RowShape& shape, const Map& map, void* stream) {
  if (shape.num_rows == 0 || shape.width == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (pairs.count == 0) {
    const int64_t bytes = shape.num_rows * row_bytes(hidden, shape.width);
    return cudaMemcpyAsync(out.data, hidden.data, bytes, cudaMemcpyDeviceToDevice, cuda_stream);
  }
  int error = cudaMemsetAsync(map, 0xff, shape.num_rows * sizeof(int64_t), cuda_stream);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>((pairs.count + kThreads - 1) / kThreads);
  error = launch(fill_map, blocks, kThreads, stream, pairs, shape, map);
  if (error != cudaSuccess) return error;
  const auto use = [&](auto* to, const auto* from, const RowShape& packed) {
    using Packs = std::remove_pointer_t<decltype(to)>;
    return launch_merge<change>(to, static_cast<const Packs*>(hidden.data), from, map, packed, stream);
  };
  return with_types<values>(out, features, hidden.data, shape, use);
}

}  // namespace

int replace_rows_cuda(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, const Map& map, void* stream) {
  return merge<Change::kReplace, Values::kMoved>(out, hidden, features, pairs, shape, map, stream);
}

int add_rows_cuda(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                  const RowShape& shape, const Map& map, void* stream) {
  return merge<Change::kAdd, Values::kComputed>(out, hidden, features, pairs, shape, map, stream);
}

int zero_rows_cuda(const Rows& out, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   const Map& map, void* stream) {
  return merge<Change::kZero, Values::kMoved>(out, hidden, hidden, pairs, shape, map, stream);
}

int add_rows_in_place_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                           const RowShape& shape, void* stream) {
  if (pairs.count == 0 || shape.width == 0) return cudaSuccess;
  return with_types<Values::kComputed>(hidden, features, hidden.data, shape,
                                       [&](auto* to, const auto* from, const RowShape& packed) {
                                         return launch_in_place(to, from, pairs, packed, stream);
                                       });
}

int take_rows_cuda(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   void* stream) {
  if (shape.num_features == 0 || shape.width == 0) return cudaSuccess;
  return with_types<Values::kMoved>(features, hidden, features.data, shape,
                                    [&](auto* to, const auto* from, const RowShape& packed) {
                                      return launch_take(from, to, pairs, packed, stream);
                                    });
}

}  // namespace vlsp
