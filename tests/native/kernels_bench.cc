// Times the CPU kernels against the memory floor: the same bytes read and written once, in the same process,
// in turn. Prints the median of the ratios; every buffer is touched before.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../custom_ops/index.h"
#include "../../custom_ops/rows.h"
#include "../../custom_ops/this_cpu.h"

namespace {

using vlsp::ElementType;
using vlsp::TokenType;

volatile uint64_t g_sink;

template <class F>
double seconds(F work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// `floor_share` is the part of the floor's bytes that the kernel has to move.
template <class Kernel, class Floor>
void compare(const char* name, int rounds, double floor_share, Kernel kernel, Floor floor) {
  std::vector<double> ratios;
  std::vector<double> times;
  for (int i = 0; i < rounds; ++i) {
    const double floor_time = seconds(floor) * floor_share;
    times.push_back(seconds(kernel));
    ratios.push_back(times.back() / floor_time);
  }
  std::printf("%-44s %9.1f us   %5.2fx the floor\n", name, median(times) * 1e6, median(ratios));
}

void read_all(const uint8_t* bytes, int64_t size) {
  uint64_t sum = 0;
  for (int64_t i = 0; i + 8 <= size; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    sum += word;
  }
  g_sink = sum;
}

std::vector<uint8_t> half_visual(int64_t size, int64_t shortest_run, int64_t longest_run) {
  std::mt19937_64 engine(1);
  std::uniform_int_distribution<int64_t> run(shortest_run, longest_run);
  std::vector<uint8_t> mask(size);
  bool visual = false;
  for (int64_t i = 0; i < size; visual = !visual) {
    for (const int64_t stop = std::min(size, i + run(engine)); i < stop; ++i) mask[i] = visual;
  }
  return mask;
}

template <class T>
void bench_index(const char* name, TokenType type, int num_ids, int64_t seq_len, int64_t shortest_run,
                 int64_t longest_run) {
  constexpr int64_t kBatch = 8;
  constexpr int64_t kRanks = 8;
  const int64_t local_len = seq_len / kRanks;
  const auto mask = half_visual(kBatch * seq_len, shortest_run, longest_run);
  std::vector<T> ids(mask.begin(), mask.end());
  const vlsp::Tokens tokens{ids.data(), type, kBatch, seq_len};
  vlsp::Placeholders visual{{1}, num_ids};
  for (int k = 1; k < num_ids; ++k) visual.ids[k] = 1000 + k;
  const vlsp::Interval interval{3 * local_len, local_len, 0};
  int64_t counts[2];
  count_visual_cpu(tokens, visual, {&interval, 1, local_len}, counts);
  std::vector<int64_t> update(counts[0]);
  std::vector<int64_t> gather(counts[0]);
  const auto floor = [&] {
    vlsp::for_this_cpu([&] {
      read_all(reinterpret_cast<const uint8_t*>(ids.data()), static_cast<int64_t>(ids.size() * sizeof(T)));
      std::fill(update.begin(), update.end(), counts[0]);
      std::fill(gather.begin(), gather.end(), counts[1]);
    });
  };
  for (bool sequence_first : {false, true}) {
    char line[100];
    std::snprintf(line, sizeof(line), "%s, %d id, S%lldk, runs %lld-%lld%s", name, num_ids,
                  static_cast<long long>(seq_len >> 10), static_cast<long long>(shortest_run),
                  static_cast<long long>(longest_run), sequence_first ? ", S first" : "");
    compare(
        line, seq_len > 32768 ? 101 : 401, 1.0,
        [&] {
          build_plan_cpu(tokens, visual, {&interval, 1, local_len},
                         {update.data(), gather.data(), counts[0], -1, counts, sequence_first});
        },
        floor);
  }
}

template <class T>
void bench_rows(const char* name, ElementType type, bool sequence_first) {
  constexpr int64_t kBatch = 4, kSeqLen = 32768, kRanks = 4, kWidth = 1024, kLocal = kSeqLen / kRanks;
  const auto mask = half_visual(kBatch * kSeqLen, 256, 4096);
  const vlsp::Tokens tokens{mask.data(), TokenType::kMask, kBatch, kSeqLen};
  const vlsp::Interval interval{kLocal, kLocal, 0};
  std::vector<int64_t> update(kBatch * kLocal), gather(kBatch * kLocal);
  int64_t counts[2];
  build_plan_cpu(tokens, {{1}, 1}, {&interval, 1, kLocal},
                 {update.data(), gather.data(), kBatch * kLocal, -1, counts, sequence_first});
  const vlsp::Pairs pairs{update.data(), gather.data(), counts[0]};
  const vlsp::RowShape shape{kBatch * kLocal, counts[1], kWidth};
  std::vector<T> hidden(shape.num_rows * kWidth), features(shape.num_features * kWidth);
  const vlsp::Rows to_hidden{hidden.data(), type}, to_features{features.data(), type};
  const vlsp::ConstRows from_hidden{hidden.data(), type}, from_features{features.data(), type};

  const int64_t moved = counts[0] * kWidth;  // elements; one memcpy of them reads and writes 2 * moved
  std::vector<T> from(moved, T{1}), to(moved);
  const auto floor = [&] { std::memcpy(to.data(), from.data(), moved * sizeof(T)); };
  const double all_over_own = static_cast<double>(counts[1]) / static_cast<double>(counts[0]);
  char text[100];
  const auto describe = [&](const char* what) {
    std::snprintf(text, sizeof(text), "%s %s%s", what, name, sequence_first ? ", S first" : "");
    return text;
  };
  std::vector<T> out(hidden.size());
  std::vector<int64_t> map(shape.num_rows);
  const vlsp::Rows to_out{out.data(), type};
  const double rows_over_own = static_cast<double>(shape.num_rows) / static_cast<double>(counts[0]);
  compare(
      describe("replace"), 15, rows_over_own,
      [&] { replace_rows_cpu(to_out, from_hidden, from_features, pairs, shape, map.data()); }, floor);
  compare(
      describe("add"), 15, rows_over_own + 0.5,
      [&] { add_rows_cpu(to_out, from_hidden, from_features, pairs, shape, map.data()); }, floor);
  compare(
      describe("zero"), 15, rows_over_own - 0.5,
      [&] { zero_rows_cpu(to_out, from_hidden, pairs, shape, map.data()); }, floor);
  compare(
      describe("add in place"), 15, 1.5,
      [&] { add_rows_in_place_cpu(to_hidden, from_features, pairs, shape); }, floor);
  compare(
      describe("take"), 15, (1 + all_over_own) / 2,
      [&] { take_rows_cpu(to_features, from_hidden, pairs, shape); }, floor);
}

}  // namespace

int main() {
  for (int64_t seq_len : {16384, 131072}) {
    bench_index<uint8_t>("mask", TokenType::kMask, 1, seq_len, 256, 4096);
    for (int num_ids : {1, 2, 3})
      bench_index<int64_t>("int64", TokenType::kInt64, num_ids, seq_len, 256, 4096);
    for (int num_ids : {1, 2}) bench_index<int32_t>("int32", TokenType::kInt32, num_ids, seq_len, 256, 4096);
  }
  bench_index<uint8_t>("mask", TokenType::kMask, 1, 16384, 1, 8);
  bench_index<int64_t>("int64", TokenType::kInt64, 1, 16384, 1, 8);
  for (bool sequence_first : {false, true}) {
    bench_rows<float>("float32", ElementType::kFloat32, sequence_first);
    bench_rows<uint16_t>("bfloat16", ElementType::kBFloat16, sequence_first);
    bench_rows<uint16_t>("float16", ElementType::kFloat16, sequence_first);
  }
  return 0;
}
