// Index building on a GPU, in reading order and without atomics. count_tiles reads the tokens, once: it keeps
// two bits a token, visual and visual of this rank, and how many of them each part of a tile has before it.
// scan adds up the tiles, in one block. write_plan reads only these: of every warp that owns something it
// knows where the first pair goes and which feature row comes next.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "query.cuh"

namespace vlsp {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = kThreads * kRun;     // tokens
constexpr int kTileWords = kTile / kWarp;  // of 32 bits, one for each token
constexpr int kWarpWords = kTileWords / kWarps;
constexpr int kScanThreads = 1024;
constexpr int kWriteThreads = 128;  // its warps have nothing to do with each other
constexpr unsigned kAllLanes = 0xffffffffu;

// Two counts in one number, which adds them both: `own` in the low half, `all` in the high one.
using Counts = uint64_t;
using SmallCounts = uint32_t;  // within a tile
__device__ Counts make_counts(uint32_t own, uint32_t all) { return own | Counts{all} << 32; }
__device__ Counts widen(SmallCounts counts) { return make_counts(counts & 0xffff, counts >> 16); }
__device__ uint32_t own(Counts counts) { return static_cast<uint32_t>(counts); }
__device__ uint32_t all(Counts counts) { return static_cast<uint32_t>(counts >> 32); }

// The parts of the workspace.
struct Workspace {
  Counts* tiles;       // [num_tiles]; after the scan: of the tiles before
  uint4* visual;       // [num_tiles, kTileWords / 4]
  uint4* own;          // [num_tiles, kTileWords / 4]
  SmallCounts* warps;  // [num_tiles, kWarps]; of the warps before, in the tile
};

constexpr int64_t kTileBytes = sizeof(Counts) + 2 * kTileWords * 4 + kWarps * sizeof(SmallCounts);
constexpr int64_t kBitsAlignment = sizeof(uint4);

int64_t bytes_before_bits(int64_t num_tiles) {
  return (num_tiles * sizeof(Counts) + kBitsAlignment - 1) / kBitsAlignment * kBitsAlignment;
}

Workspace divide(void* workspace, int64_t num_tiles) {
  auto* tiles = static_cast<Counts*>(workspace);
  auto* visual = reinterpret_cast<uint4*>(static_cast<uint8_t*>(workspace) + bytes_before_bits(num_tiles));
  uint4* own = visual + num_tiles * kTileWords / 4;
  return {tiles, visual, own, reinterpret_cast<SmallCounts*>(own + num_tiles * kTileWords / 4)};
}

// The sum of the values of this lane and of the lanes before it.
template <typename T>
__device__ T scan_warp(T value) {
  const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

template <typename Token, int kIds>
__global__ void __launch_bounds__(kThreads)
    count_tiles(const __grid_constant__ Query query, const Workspace workspace) {
  __shared__ SmallCounts warps[kWarps];
  const uint32_t first = blockIdx.x * kTile + threadIdx.x * kRun;
  uint32_t visual = visual_bits<kIds>(query, load_run<Token>(query, first));
  if (first + kRun > query.num_tokens)
    visual &= first < query.num_tokens ? (1u << (query.num_tokens - first)) - 1 : 0;
  const uint32_t own = visual == 0 ? 0 : visual & own_bits_of_run(query, first);
  const uint32_t byte = blockIdx.x * kThreads + threadIdx.x;
  reinterpret_cast<uint8_t*>(workspace.visual)[byte] = static_cast<uint8_t>(visual);
  reinterpret_cast<uint8_t*>(workspace.own)[byte] = static_cast<uint8_t>(own);

  const uint32_t lane = threadIdx.x % kWarp;
  SmallCounts count = __popc(own) | __popc(visual) << 16;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  if (lane == 0) warps[threadIdx.x / kWarp] = count;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const SmallCounts mine = lane < kWarps ? warps[lane] : 0;
  const SmallCounts up_to_mine = scan_warp(mine);
  if (lane < kWarps) workspace.warps[blockIdx.x * kWarps + lane] = up_to_mine - mine;
  if (lane == kWarps - 1) workspace.tiles[blockIdx.x] = widen(up_to_mine);
}

// One block. A warp has neighbouring tiles, of which its lanes take one in turn.
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles(const Workspace workspace, uint32_t num_tiles, int64_t* counts) {
  constexpr uint32_t kScanWarps = kScanThreads / kWarp;
  __shared__ Counts warps[kScanWarps];
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t share = (num_tiles + kScanThreads - 1) / kScanThreads * kWarp;
  const uint32_t first = warp * share;
  const uint32_t last = min(first + share, num_tiles);
  Counts sum = 0;
#pragma unroll 8
  for (uint32_t tile = first + lane; tile < last; tile += kWarp) sum += workspace.tiles[tile];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0) warps[warp] = sum;
  __syncthreads();
  Counts next = 0;
  for (uint32_t w = 0; w < warp; ++w) next += warps[w];
#pragma unroll 4
  for (uint32_t tile = first; tile < last; tile += kWarp) {
    const bool inside = tile + lane < last;
    const Counts count = inside ? workspace.tiles[tile + lane] : 0;
    const Counts up_to_mine = scan_warp(count);
    if (inside) workspace.tiles[tile + lane] = next + up_to_mine - count;
    next += __shfl_sync(kAllLanes, up_to_mine, kWarp - 1);
  }
  if (threadIdx.x == kScanThreads - 1) {
    counts[0] = own(next);
    counts[1] = all(next);
  }
}

struct Words {
  uint32_t at[kWarpWords];
};

__device__ Words load_words(const uint4* words, uint32_t first_word) {
  Words loaded;
#pragma unroll
  for (int i = 0; i < kWarpWords / 4; ++i) {
    const uint4 four = words[first_word / 4 + i];
    memcpy(&loaded.at[4 * i], &four, sizeof(four));
  }
  return loaded;
}

// The pairs of a warp's words, a lane a token, so that stores go to neighbouring places.
__device__ void write_words(const Query& query, const Workspace& workspace, uint32_t warp, const Plan& plan) {
  const Words mine = load_words(workspace.own, warp * kWarpWords);
  const Words visual = load_words(workspace.visual, warp * kWarpWords);
  Counts next = workspace.tiles[warp / kWarps] + widen(workspace.warps[warp]);
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kWarpWords; ++i) any |= mine.at[i];
  if (any == 0) return;

  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t lanes_before = (1u << lane) - 1;
  const uint32_t first = warp * (kWarpWords * kWarp) + lane;
  uint32_t sample = first / query.seq_len;
  uint32_t position = first % query.seq_len;
  Finder finder;
#pragma unroll
  for (int i = 0; i < kWarpWords; ++i) {
    if (mine.at[i] >> lane & 1) {
      const uint32_t local = finder.local(query, position);
      const int64_t row = plan.sequence_first ? int64_t{local} * query.batch + sample
                                              : int64_t{sample} * query.local_len + local;
      const int64_t place = own(next) + __popc(mine.at[i] & lanes_before);
      const int64_t feature = all(next) + __popc(visual.at[i] & lanes_before);
      if (place < plan.capacity) {
        const bool exists = plan.num_features < 0 || feature < plan.num_features;
        plan.update[place] = exists ? row : -1;
        plan.gather[place] = exists ? feature : -1;
      }
    }
    next += make_counts(__popc(mine.at[i]), __popc(visual.at[i]));
    position += kWarp;
    while (position >= query.seq_len) {
      position -= query.seq_len;
      ++sample;
    }
  }
}

__global__ void __launch_bounds__(kWriteThreads)
    write_plan(const __grid_constant__ Query query, const Workspace workspace, uint32_t num_tiles,
               const Plan plan) {
  const uint32_t thread = blockIdx.x * kWriteThreads + threadIdx.x;
  const uint32_t warp = thread / kWarp;
  if (warp < num_tiles * kWarps) write_words(query, workspace, warp, plan);
  for (int64_t place = plan.counts[0] + thread; place < plan.capacity; place += gridDim.x * kWriteThreads) {
    plan.update[place] = -1;
    plan.gather[place] = -1;
  }
}

template <typename Token, int kIds>
int launch_count(const Query& query, const Workspace& workspace, unsigned num_tiles, void* stream) {
  return launch(count_tiles<Token, kIds>, num_tiles, kThreads, stream, query, workspace);
}

int launch_count(TokenType type, int num_ids, const Query& query, const Workspace& workspace,
                 unsigned num_tiles, void* stream) {
  switch (type) {
    case TokenType::kMask:
      return launch_count<uint8_t, 0>(query, workspace, num_tiles, stream);
    case TokenType::kInt32:
      return num_ids <= 2 ? launch_count<int32_t, 2>(query, workspace, num_tiles, stream)
                          : launch_count<int32_t, kMaxPlaceholders>(query, workspace, num_tiles, stream);
    case TokenType::kInt64:
      return num_ids <= 2 ? launch_count<int64_t, 2>(query, workspace, num_tiles, stream)
                          : launch_count<int64_t, kMaxPlaceholders>(query, workspace, num_tiles, stream);
  }
  return cudaErrorInvalidValue;
}

bool too_many(const Tokens& tokens, const Owned& owned) {
  return tokens.batch * std::max(tokens.seq_len, owned.local_len) > kMaxTokensCuda;
}

unsigned count_of_tiles(const Tokens& tokens) {
  return static_cast<unsigned>((tokens.batch * tokens.seq_len + kTile - 1) / kTile);
}

}  // namespace

int64_t workspace_size_cuda(const Tokens& tokens) {
  const int64_t num_tiles = count_of_tiles(tokens);
  return (bytes_before_bits(num_tiles) + num_tiles * (kTileBytes - sizeof(Counts))) / sizeof(int64_t);
}

int count_visual_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned, void* workspace,
                      int64_t* counts, void* stream) {
  if (too_many(tokens, owned)) return cudaErrorInvalidValue;
  const unsigned num_tiles = count_of_tiles(tokens);
  if (num_tiles == 0)
    return cudaMemsetAsync(counts, 0, 2 * sizeof(*counts), static_cast<cudaStream_t>(stream));
  const Workspace parts = divide(workspace, num_tiles);
  const Query query = make_query(tokens, visual, owned);
  const int error = launch_count(tokens.type, visual.count, query, parts, num_tiles, stream);
  return error != cudaSuccess ? error : launch(scan_tiles, 1, kScanThreads, stream, parts, num_tiles, counts);
}

int write_plan_cuda(const Tokens& tokens, const Owned& owned, void* workspace, const Plan& plan,
                    void* stream) {
  if (plan.capacity == 0) return cudaSuccess;
  if (too_many(tokens, owned)) return cudaErrorInvalidValue;
  const unsigned num_tiles = count_of_tiles(tokens);
  const Query query = make_query(tokens, {}, owned);
  const unsigned blocks = std::max(num_tiles * (kThreads / kWriteThreads), 1u);
  return launch(write_plan, blocks, kWriteThreads, stream, query, divide(workspace, num_tiles), num_tiles,
                plan);
}

}  // namespace vlsp
