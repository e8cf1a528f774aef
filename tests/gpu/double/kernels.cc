// The functions of index.cu and rows.cu by those of the CPU. On the null stream a launch runs at once; on any
// other it is kept, as in a capture, until cuda_double_replay. CUDA_DOUBLE_FAULT names a mistake to make.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "cuda_runtime.h"
#include "index.h"
#include "rows.h"

namespace {

std::map<void*, std::vector<std::function<void()>>> captured;

int launch(void* stream, std::function<void()> run) {
  if (stream == nullptr) {
    run();
  } else {
    captured[stream].push_back(run);
  }
  return cudaSuccess;
}

bool fault(const char* name) {
  const char* chosen = std::getenv("CUDA_DOUBLE_FAULT");
  return chosen != nullptr && std::strcmp(chosen, name) == 0;
}

// Few intervals are read at the launch, many when it runs.
std::function<vlsp::Owned()> keep(const vlsp::Owned& owned) {
  if (owned.count > vlsp::kMaxInlineIntervals) return [owned] { return owned; };
  const std::vector<vlsp::Interval> few(owned.intervals, owned.intervals + owned.count);
  return [few, owned] { return vlsp::Owned{few.data(), owned.count, owned.local_len}; };
}

int64_t element_size(vlsp::ElementType type) {
  return type == vlsp::ElementType::kFloat64 ? 8 : type == vlsp::ElementType::kFloat32 ? 4 : 2;
}

void spoil(const vlsp::Rows& written, int64_t num_rows, int64_t width) {
  uint8_t* data = static_cast<uint8_t*>(written.data);
  const int64_t size = element_size(written.type);
  const int64_t bytes = num_rows * width * size;
  if (fault("first") && bytes > 0) data[0] ^= 1;
  if (fault("stray")) data[bytes] ^= 1;
  for (int64_t i = 0; fault("sign") && i < bytes; i += size) {
    if (std::all_of(data + i, data + i + size, [](uint8_t byte) { return byte == 0; }))
      data[i + size - 1] = 0x80;
  }
  for (int64_t i = 0; fault("nan") && written.type == vlsp::ElementType::kBFloat16 && i < bytes; i += 2) {
    if ((data[i + 1] & 0x7f) == 0x7f && data[i] > 0x81) data[i] ^= 1;  // another NaN
  }
}

}  // namespace

namespace vlsp {

int64_t num_tiles_cuda(const Tokens& tokens) { return (tokens.batch * tokens.seq_len + 4095) / 4096; }

int count_tiles_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned, TileCount* tiles,
                     void* stream) {
  const auto kept = keep(owned);
  return launch(stream, [=] {
    const int64_t num_tiles = num_tiles_cuda(tokens);
    std::memset(tiles, 0, num_tiles * sizeof(TileCount));
    if (num_tiles > 0) count_visual_cpu(tokens, visual, kept(), &tiles->own);
  });
}

int write_plan_cuda(const Tokens& tokens, const Placeholders& visual, const Owned& owned, const TileCount*,
                    const Plan& plan, void* stream) {
  if (fault("crash") && plan.counts == nullptr) std::abort();
  const auto kept = keep(owned);
  return launch(stream, [=] {
    const int64_t last = plan.capacity == 0 ? 0 : plan.update[plan.capacity - 1];
    build_plan_cpu(tokens, visual, kept(), plan);
    if (fault("unwritten") && plan.capacity > 0) plan.update[plan.capacity - 1] = last;
  });
}

int replace_rows_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, void* stream) {
  return launch(stream, [=] {
    replace_rows_cpu(hidden, features, pairs, shape);
    spoil(hidden, shape.num_rows, shape.width);
  });
}

int add_rows_cuda(const Rows& hidden, const ConstRows& features, const Pairs& pairs, const RowShape& shape,
                  void* stream) {
  return launch(stream, [=] {
    (fault("sum") ? replace_rows_cpu : add_rows_cpu)(hidden, features, pairs, shape);
    spoil(hidden, shape.num_rows, shape.width);
  });
}

int take_rows_cuda(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   void* stream) {
  return launch(stream, [=] {
    take_rows_cpu(features, hidden, pairs, shape);
    spoil(features, shape.num_features, shape.width);
  });
}

int zero_rows_cuda(const Rows& hidden, const Pairs& pairs, const RowShape& shape, void* stream) {
  return launch(stream, [=] {
    zero_rows_cpu(hidden, pairs, shape);
    spoil(hidden, shape.num_rows, shape.width);
  });
}

}  // namespace vlsp

extern "C" void cuda_double_replay(void* stream) {
  if (fault("stale")) return;
  for (const auto& run : captured[stream]) run();
}
