// Building the indices of a plan on the CPU.
#include <algorithm>
#include <type_traits>

#include "index.h"
#include "match_cpu.h"
#include "this_cpu.h"

namespace vlsp {
namespace {

constexpr int64_t kBlock = 64;

// Writes pairs in reading order for as long as there is room.
class PairWriter {
 public:
  explicit PairWriter(const Plan& plan) : plan_(plan) {}

  int64_t feature() const { return feature_; }
  int64_t own() const { return own_; }

  // Visual tokens of other ranks.
  void skip(int64_t count) { feature_ += count; }

  // The next `count` visual tokens are this rank's; row_of(i) is the row of the i-th of them.
  template <class RowOf>
  void write(int64_t count, RowOf row_of) {
    const int64_t fitting = std::min(count, room());
    int64_t* update = plan_.update + written_;
    int64_t* gather = plan_.gather + written_;
    for (int64_t i = 0; i < fitting; ++i) update[i] = row_of(i);
    for (int64_t i = 0; i < fitting; ++i) gather[i] = feature_ + i;
    written_ += fitting;
    feature_ += count;
    own_ += count;
  }

  void pad() {
    std::fill(plan_.update + written_, plan_.update + plan_.capacity, int64_t{-1});
    std::fill(plan_.gather + written_, plan_.gather + plan_.capacity, int64_t{-1});
  }

 private:
  int64_t room() const {
    const int64_t places = plan_.capacity - written_;
    return plan_.num_features < 0 ? places
                                  : std::max<int64_t>(0, std::min(places, plan_.num_features - feature_));
  }

  const Plan plan_;
  int64_t written_ = 0;
  int64_t feature_ = 0;
  int64_t own_ = 0;
};

// Visual tokens come in long runs: nearly every block is all text or all visual.
template <class Matcher>
void write_block(const Matcher& is_visual, const typename Matcher::Token* tokens, int64_t length, int64_t row,
                 int64_t stride, PairWriter& writer) {
  const int64_t count = count_visual(is_visual, tokens, length);
  if (count == 0) return;
  if (count == length) return writer.write(count, [=](int64_t i) { return row + i * stride; });
  uint8_t offsets[kBlock];
  int64_t found = 0;
  for (int64_t i = 0; i < length; ++i) {
    offsets[found] = static_cast<uint8_t>(i);
    found += is_visual(tokens[i]);
  }
  writer.write(found, [&](int64_t i) { return row + offsets[i] * stride; });
}

template <class Matcher>
void write_interval(const Matcher& is_visual, const typename Matcher::Token* tokens, int64_t length,
                    int64_t row, int64_t stride, PairWriter& writer) {
  for (int64_t start = 0; start < length; start += kBlock) {
    write_block(is_visual, tokens + start, std::min(kBlock, length - start), row + start * stride, stride,
                writer);
  }
}

// Visits every token once, in reading order: on_gap(first, length) for what others own,
// on_owned(first, length, sample, local) for what this rank owns.
template <class Token, class OnGap, class OnOwned>
void walk(const Tokens& tokens, const Owned& owned, OnGap on_gap, OnOwned on_owned) {
  for (int64_t sample = 0; sample < tokens.batch; ++sample) {
    const Token* first = static_cast<const Token*>(tokens.data) + sample * tokens.seq_len;
    int64_t position = 0;
    for (int64_t k = 0; k < owned.count; ++k) {
      const Interval& interval = owned.intervals[k];
      on_gap(first + position, interval.start - position);
      on_owned(first + interval.start, interval.length, sample, interval.local_start);
      position = interval.start + interval.length;
    }
    on_gap(first + position, tokens.seq_len - position);
  }
}

}  // namespace

void count_visual_cpu(const Tokens& tokens, const Placeholders& visual, const Owned& owned, int64_t* counts) {
  int64_t own = 0;
  int64_t others = 0;
  with_matcher(tokens.type, visual, [&](const auto& is_visual) {
    using Token = typename std::decay_t<decltype(is_visual)>::Token;
    const auto on_gap = [&](const Token* first, int64_t length) {
      others += count_visual(is_visual, first, length);
    };
    const auto on_owned = [&](const Token* first, int64_t length, int64_t, int64_t) {
      own += count_visual(is_visual, first, length);
    };
    for_this_cpu([&] { walk<Token>(tokens, owned, on_gap, on_owned); });
  });
  counts[0] = own;
  counts[1] = own + others;
}

void build_plan_cpu(const Tokens& tokens, const Placeholders& visual, const Owned& owned, const Plan& plan) {
  PairWriter writer(plan);
  const int64_t row_stride = plan.sequence_first ? tokens.batch : 1;
  const int64_t sample_stride = plan.sequence_first ? 1 : owned.local_len;
  with_matcher(tokens.type, visual, [&](const auto& is_visual) {
    using Token = typename std::decay_t<decltype(is_visual)>::Token;
    const auto on_gap = [&](const Token* first, int64_t length) {
      writer.skip(count_visual(is_visual, first, length));
    };
    const auto on_owned = [&](const Token* first, int64_t length, int64_t sample, int64_t local) {
      const int64_t row = sample * sample_stride + local * row_stride;
      write_interval(is_visual, first, length, row, row_stride, writer);
    };
    for_this_cpu([&] { walk<Token>(tokens, owned, on_gap, on_owned); });
  });
  writer.pad();
  if (plan.counts == nullptr) return;
  plan.counts[0] = writer.own();
  plan.counts[1] = writer.feature();
}

}  // namespace vlsp
