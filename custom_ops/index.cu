// Index building on a GPU, in reading order and without atomics. count_tiles gives every block one tile of
// tokens to count. write_plan adds up the tiles before its own, which says where its first pair goes and
// which feature row comes next. Every block of it reads all counts: 16 bytes a tile, from L2, small beside
// the tile's own tokens up to a few thousand tiles (some ten million tokens).
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "query.cuh"

namespace vlsp {
namespace {

// A warp reads one token a lane, so that a ballot is 32 tokens in reading order and lanes with pairs store to
// neighbouring places. Wider loads would save instructions, not bytes, and scatter the stores.
constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWords = 8;  // words of 32 tokens a warp, all loaded before the first is used
constexpr int64_t kTile = int64_t{kThreads} * kWords;
constexpr unsigned kAllLanes = 0xffffffffu;

// What a lane knows of its warp's part of a tile: which tokens of each word are visual, and the row of its
// own token (-1: not visual, or not of this rank).
struct Part {
  unsigned visual[kWords];
  int64_t row[kWords];
};

template <typename Token>
__device__ unsigned find_visual(const Query& query, int64_t first, unsigned (&visual)[kWords]) {
  const Token* tokens = static_cast<const Token*>(query.tokens.data);
  Token token[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int64_t index = first + i * kWarp;
    token[i] = index < query.num_tokens ? tokens[index] : Token{0};
  }
  unsigned any = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool found = first + i * kWarp < query.num_tokens && is_visual(token[i], query.visual);
    visual[i] = __ballot_sync(kAllLanes, found);
    any |= visual[i];
  }
  return any;
}

template <typename Token>
__device__ Part read_part(const Query& query, bool sequence_first) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = blockIdx.x * kTile + threadIdx.x / kWarp * (kWords * kWarp) + lane;
  Part part;
  const unsigned any = find_visual<Token>(query, first, part.visual);
#pragma unroll
  for (int i = 0; i < kWords; ++i) part.row[i] = -1;
  if (any == 0) return part;

  int64_t sample = first / query.tokens.seq_len;
  int64_t position = first % query.tokens.seq_len;
  Walk walk(query, position);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (part.visual[i] >> lane & 1) {
      const int64_t local = walk.local(position);
      const int64_t row =
          sequence_first ? local * query.tokens.batch + sample : sample * query.owned.local_len + local;
      if (local >= 0) part.row[i] = row;
    }
    position += kWarp;
    while (position >= query.tokens.seq_len) {
      position -= query.tokens.seq_len;
      ++sample;
      walk.restart();
    }
  }
  return part;
}

__device__ TileCount operator+(const TileCount& a, const TileCount& b) {
  return {a.own + b.own, a.all + b.all};
}

__device__ TileCount count_warp(const Part& part) {
  TileCount count{0, 0};
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    count.own += __popc(__ballot_sync(kAllLanes, part.row[i] >= 0));
    count.all += __popc(part.visual[i]);
  }
  return count;
}

__device__ TileCount sum_over_warp(TileCount count) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    count.own += __shfl_xor_sync(kAllLanes, count.own, step);
    count.all += __shfl_xor_sync(kAllLanes, count.all, step);
  }
  return count;
}

template <typename Token>
__global__ void __launch_bounds__(kThreads)
    count_tiles(const __grid_constant__ Query query, TileCount* tiles) {
  __shared__ TileCount warps[kWarps];
  const TileCount count = count_warp(read_part<Token>(query, /*sequence_first=*/false));
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  TileCount sum{0, 0};
  for (int w = 0; w < kWarps; ++w) sum = sum + warps[w];
  tiles[blockIdx.x] = sum;
}

// Visual tokens of this warp, of all before it, and of all.
struct Sums {
  TileCount warp, before, all;
};

__device__ Sums scan(const Part& part, const TileCount* tiles, int64_t num_tiles) {
  __shared__ Sums by_warp[kWarps];  // of the tiles each warp its share; `before`: those before this tile
  TileCount before{0, 0};
  TileCount all{0, 0};
  for (int64_t t = threadIdx.x; t < num_tiles; t += kThreads) {
    const TileCount tile = tiles[t];
    all = all + tile;
    if (t < blockIdx.x) before = before + tile;
  }
  const int warp = threadIdx.x / kWarp;
  const Sums mine{count_warp(part), sum_over_warp(before), sum_over_warp(all)};
  if (threadIdx.x % kWarp == 0) by_warp[warp] = mine;
  __syncthreads();
  Sums sums{mine.warp, {0, 0}, {0, 0}};
  for (int w = 0; w < kWarps; ++w) {
    sums.all = sums.all + by_warp[w].all;
    sums.before = sums.before + by_warp[w].before;
    if (w < warp) sums.before = sums.before + by_warp[w].warp;
  }
  return sums;
}

template <typename Token>
__global__ void __launch_bounds__(kThreads)
    write_plan(const __grid_constant__ Query query, const TileCount* tiles, int64_t num_tiles, Plan plan) {
  const Part part = read_part<Token>(query, plan.sequence_first);
  const Sums sums = scan(part, tiles, num_tiles);
  TileCount next = sums.before;
  const unsigned lanes_before = (1u << threadIdx.x % kWarp) - 1;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const unsigned own = __ballot_sync(kAllLanes, part.row[i] >= 0);
    const int64_t place = next.own + __popc(own & lanes_before);
    const int64_t feature = next.all + __popc(part.visual[i] & lanes_before);
    if (part.row[i] >= 0 && place < plan.capacity) {
      const bool exists = plan.num_features < 0 || feature < plan.num_features;
      plan.update[place] = exists ? part.row[i] : -1;
      plan.gather[place] = exists ? feature : -1;
    }
    next = next + TileCount{__popc(own), __popc(part.visual[i])};
  }

  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t place = sums.all.own + thread; place < plan.capacity; place += int64_t{gridDim.x} * kThreads) {
    plan.update[place] = -1;
    plan.gather[place] = -1;
  }
  if (thread == 0 && plan.counts != nullptr) {
    plan.counts[0] = sums.all.own;
    plan.counts[1] = sums.all.all;
  }
}

// Calls use(token) with a token of the type.
template <typename Use>
void with_type(TokenType type, Use use) {
  switch (type) {
    case TokenType::kInt32:
      return use(int32_t{});
    case TokenType::kInt64:
      return use(int64_t{});
    case TokenType::kMask:
      return use(uint8_t{});
  }
}

}  // namespace

int64_t num_tiles_cuda(const Tokens& tokens) { return (tokens.batch * tokens.seq_len + kTile - 1) / kTile; }

int count_tiles_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned, TileCount* tiles,
                     void* stream) {
  const int64_t num_tiles = num_tiles_cuda(tokens);
  if (num_tiles == 0) return cudaSuccess;
  if (num_tiles > INT_MAX) return cudaErrorInvalidValue;
  const Query query = make_query(tokens, visual, owned);
  with_type(tokens.type, [&](auto token) {
    count_tiles<decltype(token)>
        <<<static_cast<unsigned>(num_tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(query, tiles);
  });
  return cudaGetLastError();
}

// Without any token it still pads the pairs and writes the counts.
int write_plan_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned,
                    const TileCount* tiles, const Plan& plan, void* stream) {
  const int64_t num_tiles = num_tiles_cuda(tokens);
  if (plan.capacity == 0 && plan.counts == nullptr) return cudaSuccess;
  if (num_tiles > INT_MAX) return cudaErrorInvalidValue;
  const Query query = make_query(tokens, visual, owned);
  const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(num_tiles, 1));
  with_type(tokens.type, [&](auto token) {
    write_plan<decltype(token)>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(query, tiles, num_tiles, plan);
  });
  return cudaGetLastError();
}

}  // namespace vlsp
