// Index building against the obvious way, and all ranks of a layout together: each visual token is owned
// exactly once. Pure counting: exact.
#include "../../custom_ops/index.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "testing.h"

namespace vlsp_test {
namespace {

using vlsp::Interval;
using vlsp::TokenType;

constexpr int64_t kPoison = -7;

// A layout: for every rank the global positions it owns, in local order.
using Layout = std::vector<std::vector<int64_t>>;

Layout cut_contiguously(const std::vector<int64_t>& positions, int64_t num_ranks) {
  Layout layout(num_ranks);
  const int64_t length = static_cast<int64_t>(positions.size());
  for (int64_t i = 0; i < length; ++i) layout[i * num_ranks / length].push_back(positions[i]);
  return layout;
}

// Every segment is cut by the context parallel rule, then each rank's row contiguously.
Layout random_layout(Random& random, int64_t* seq_len) {
  const int64_t cp = random.between(1, 4);
  const int64_t sp = random.between(1, 4);
  const bool zigzag = random.chance(0.6);
  const bool even = zigzag || random.chance(0.5);
  const int64_t num_segments = random.chance(0.5) ? 1 : random.between(2, 12);
  const int64_t longest = random.chance(0.05) ? 3000 : random.chance(0.5) ? 300 : 20;
  Layout rows(cp);
  *seq_len = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t num_chunks = zigzag ? 2 * cp : cp;
    const int64_t length =
        even ? num_chunks * random.between(1, longest / num_chunks + 1) : random.between(1, longest);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t chunk = i * num_chunks / length;
      rows[chunk < cp ? chunk : num_chunks - 1 - chunk].push_back(*seq_len + i);
    }
    *seq_len += length;
  }
  Layout layout;
  for (const auto& row : rows) {
    for (auto& part : cut_contiguously(row, sp)) layout.push_back(std::move(part));
  }
  return layout;
}

std::vector<Interval> to_intervals(const std::vector<int64_t>& positions) {
  std::vector<Interval> intervals;
  for (int64_t local = 0; local < static_cast<int64_t>(positions.size()); ++local) {
    if (local > 0 && positions[local] == positions[local - 1] + 1) {
      ++intervals.back().length;
    } else {
      intervals.push_back({positions[local], 1, local});
    }
  }
  return intervals;
}

struct Input {
  std::vector<uint8_t> is_visual;  // [batch * seq_len]
  std::vector<uint8_t> bytes;      // the tokens, `skew` tokens into the allocation
  vlsp::Tokens tokens;
  vlsp::Placeholders visual;
};

std::vector<uint8_t> random_mask(Random& random, int64_t size) {
  std::vector<uint8_t> mask(size);
  const int64_t longest_run = random.pick({int64_t{1}, int64_t{3}, int64_t{40}, int64_t{700}});
  const double density = random.pick({0.0, 0.1, 0.5, 0.9, 1.0});
  for (int64_t i = 0; i < size;) {
    const int64_t stop = std::min(size, i + random.between(1, longest_run));
    const bool visual = random.chance(density);
    for (; i < stop; ++i) mask[i] = visual;
  }
  return mask;
}

template <class T>
void fill_tokens(Random& random, Input* input, const std::vector<int64_t>& visual_ids,
                 const std::vector<int64_t>& text_ids) {
  const int64_t size = static_cast<int64_t>(input->is_visual.size());
  const int64_t skew = random.between(0, 3);
  input->bytes.resize((skew + size) * sizeof(T));
  T* tokens = reinterpret_cast<T*>(input->bytes.data()) + skew;
  for (int64_t i = 0; i < size; ++i) {
    const auto& ids = input->is_visual[i] ? visual_ids : text_ids;
    tokens[i] = static_cast<T>(ids[random.between(0, static_cast<int64_t>(ids.size()) - 1)]);
  }
  input->tokens.data = tokens;
}

// Ids that differ in one half of the word only, repeated ids, and ids that no int32 token can equal.
void fill_ids(Random& random, Input* input) {
  const bool wide = input->tokens.type == TokenType::kInt64;
  const int64_t high = int64_t{1} << 32;
  std::vector<int64_t> visual_ids;
  input->visual.count = static_cast<int>(random.between(1, vlsp::kMaxPlaceholders));
  for (int k = 0; k < input->visual.count; ++k) {
    int64_t& id = input->visual.ids[k];
    if (!wide && random.chance(0.2)) {
      id = 50 + high;  // 50 is a text id
      continue;
    }
    id = 100 + random.between(0, 8) + (wide && random.chance(0.3) ? high : 0);
    visual_ids.push_back(id);
  }
  if (visual_ids.empty()) std::fill(input->is_visual.begin(), input->is_visual.end(), uint8_t{0});
  std::vector<int64_t> text_ids = {0, -1, 50, 99, 109, -100};
  if (wide) text_ids.insert(text_ids.end(), {101 - high, 101 + 2 * high, high});
  wide ? fill_tokens<int64_t>(random, input, visual_ids, text_ids)
       : fill_tokens<int32_t>(random, input, visual_ids, text_ids);
}

Input random_input(Random& random, int64_t batch, int64_t seq_len) {
  Input input;
  input.is_visual = random_mask(random, batch * seq_len);
  input.tokens.type = random.pick({TokenType::kInt32, TokenType::kInt64, TokenType::kMask});
  input.tokens.batch = batch;
  input.tokens.seq_len = seq_len;
  if (input.tokens.type == TokenType::kMask) {
    input.visual = {{1}, 1};
    fill_tokens<uint8_t>(
        random, &input,
        random.chance(0.5) ? std::vector<int64_t>{1} : std::vector<int64_t>{1, 2, 127, 128, 255}, {0});
  } else {
    fill_ids(random, &input);
  }
  return input;
}

struct Expected {
  std::vector<int64_t> update;
  std::vector<int64_t> gather;
  int64_t num_visual = 0;
};

Expected obvious_plan(const Input& input, const std::vector<int64_t>& positions, bool sequence_first) {
  const int64_t batch = input.tokens.batch;
  const int64_t seq_len = input.tokens.seq_len;
  const int64_t local_len = static_cast<int64_t>(positions.size());
  std::vector<int64_t> local_of(seq_len, -1);
  for (int64_t local = 0; local < local_len; ++local) local_of[positions[local]] = local;
  Expected expected;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < seq_len; ++s) {
      if (!input.is_visual[b * seq_len + s]) continue;
      if (local_of[s] >= 0) {
        expected.update.push_back(sequence_first ? local_of[s] * batch + b : b * local_len + local_of[s]);
        expected.gather.push_back(expected.num_visual);
      }
      ++expected.num_visual;
    }
  }
  return expected;
}

void check_plan(const Input& input, const vlsp::Owned& owned, const Expected& expected, int64_t capacity,
                int64_t num_features, bool sequence_first, int64_t number) {
  std::vector<int64_t> update(capacity, kPoison);
  std::vector<int64_t> gather(capacity, kPoison);
  int64_t counts[2] = {kPoison, kPoison};
  const bool want_counts = number % 5 != 0;
  build_plan_cpu(
      input.tokens, input.visual, owned,
      {update.data(), gather.data(), capacity, num_features, want_counts ? counts : nullptr, sequence_first});
  const int64_t num_own = static_cast<int64_t>(expected.update.size());
  for (int64_t i = 0; i < capacity; ++i) {
    const bool used = i < num_own && (num_features < 0 || expected.gather[i] < num_features);
    check_equal("update", number, i, update[i], used ? expected.update[i] : -1);
    check_equal("gather", number, i, gather[i], used ? expected.gather[i] : -1);
  }
  if (want_counts) {
    check_equal("own count", number, 0, counts[0], num_own);
    check_equal("whole count", number, 0, counts[1], expected.num_visual);
  }
  count_visual_cpu(input.tokens, input.visual, owned, counts);
  check_equal("counted own", number, 0, counts[0], num_own);
  check_equal("counted whole", number, 0, counts[1], expected.num_visual);
}

int64_t check_layout(Random& random, int64_t number) {
  int64_t seq_len = 0;
  const Layout layout = random_layout(random, &seq_len);
  const Input input = random_input(random, random.between(0, 5), seq_len);
  const bool sequence_first = random.chance(0.5);
  int64_t cases = 0;
  std::vector<int64_t> seen;
  for (const auto& positions : layout) {
    const auto intervals = to_intervals(positions);
    const int64_t local_len = static_cast<int64_t>(positions.size());
    const vlsp::Owned owned{intervals.data(), static_cast<int64_t>(intervals.size()), local_len};
    const Expected expected = obvious_plan(input, positions, sequence_first);
    const int64_t num_own = static_cast<int64_t>(expected.update.size());
    for (int64_t capacity :
         {num_own, input.tokens.batch * local_len, random.between(0, num_own), num_own + 5}) {
      for (int64_t num_features :
           {int64_t{-1}, expected.num_visual, random.between(0, expected.num_visual)}) {
        check_plan(input, owned, expected, capacity, num_features, sequence_first, number);
        ++cases;
      }
    }
    seen.insert(seen.end(), expected.gather.begin(), expected.gather.end());
  }
  std::sort(seen.begin(), seen.end());
  check_equal("visual tokens of all ranks", number, 0, static_cast<int64_t>(seen.size()),
              std::accumulate(input.is_visual.begin(), input.is_visual.end(), int64_t{0}));
  for (int64_t i = 0; i < static_cast<int64_t>(seen.size()); ++i)
    check_equal("owned once", number, i, seen[i], i);
  return cases;
}

// No tokens, nothing owned, no room for a pair: null pointers are allowed.
int64_t check_empty() {
  const vlsp::Placeholders visual{{1}, 1};
  int64_t cases = 0;
  for (TokenType type : {TokenType::kInt32, TokenType::kInt64, TokenType::kMask}) {
    for (int64_t batch : {0, 3}) {
      int64_t counts[2] = {kPoison, kPoison};
      int64_t update = kPoison;
      int64_t gather = kPoison;
      const vlsp::Tokens tokens{nullptr, type, batch, 0};
      build_plan_cpu(tokens, visual, {nullptr, 0, 0}, {&update, &gather, 1, -1, counts, false});
      check_equal("padding of nothing", 0, 0, update + gather, -2);
      check_equal("counts of nothing", 0, 0, counts[0] + counts[1], 0);
      build_plan_cpu(tokens, visual, {nullptr, 0, 0}, {nullptr, nullptr, 0, -1, nullptr, true});
      count_visual_cpu(tokens, visual, {nullptr, 0, 0}, counts);
      check_equal("counts of nothing", 0, 1, counts[0] + counts[1], 0);
      ++cases;
    }
  }
  return cases;
}

}  // namespace

int64_t test_index(int64_t num_layouts) {
  int64_t cases = check_empty();
  for (int64_t number = 1; number <= num_layouts; ++number) {
    Random random(number);
    cases += check_layout(random, number);
  }
  return cases;
}

}  // namespace vlsp_test
