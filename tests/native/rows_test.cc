// Row operations against a loop over elements in double: moves of one type keep every bit, conversions and
// sums round once and equal the definition exactly.
#include "../../custom_ops/rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../../custom_ops/half.h"
#include "float_oracle.h"
#include "testing.h"

namespace vlsp_test {
namespace {

using vlsp::ElementType;

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat64, ElementType::kFloat16,
                                  ElementType::kBFloat16};
constexpr uint8_t kPoison = 0xa5;

int64_t size_of(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// An array of one of the types, that starts `skew` elements into its allocation and ends with it.
struct Array {
  ElementType type;
  int64_t skew;
  std::vector<uint8_t> bytes;

  Array(ElementType type, int64_t count, int64_t skew)
      : type(type), skew(skew), bytes((skew + count) * size_of(type), kPoison) {}
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / size_of(type) - skew; }
  void* data() { return count() == 0 ? nullptr : at(0); }
  uint8_t* at(int64_t i) { return bytes.data() + (skew + i) * size_of(type); }

  double get(int64_t i) {
    uint64_t bits = 0;
    std::memcpy(&bits, at(i), size_of(type));
    switch (type) {
      case ElementType::kFloat32:
        return vlsp::bit_cast<float>(static_cast<uint32_t>(bits));
      case ElementType::kFloat64:
        return vlsp::bit_cast<double>(bits);
      case ElementType::kFloat16:
        return decode(static_cast<uint16_t>(bits), kHalfFormat);
      case ElementType::kBFloat16:
        return decode(static_cast<uint16_t>(bits), kBrainFormat);
    }
    return 0;
  }
};

// The nearest value of the type; to 16 bits by way of float.
double round_to_type(double value, ElementType type) {
  if (type == ElementType::kFloat64) return value;
  const float single = static_cast<float>(value);
  if (type == ElementType::kFloat32) return single;
  return round_to(single, type == ElementType::kFloat16 ? kHalfFormat : kBrainFormat);
}

template <class T>
void put(Array& array, int64_t i, T value) {
  std::memcpy(array.at(i), &value, sizeof(T));
}

void put_double(Array& array, int64_t i, double value) {
  switch (array.type) {
    case ElementType::kFloat32:
      return put(array, i, static_cast<float>(value));
    case ElementType::kFloat64:
      return put(array, i, value);
    case ElementType::kFloat16:
      return put(array, i, vlsp::to_float16(static_cast<float>(value)));
    case ElementType::kBFloat16:
      return put(array, i, vlsp::to_bfloat16(static_cast<float>(value)));
  }
}

// Mostly plain numbers of many sizes; sometimes any bits at all (NaN, infinity, subnormals).
Array random_array(Random& random, ElementType type, int64_t count) {
  Array array(type, count, random.between(0, 3));
  for (int64_t i = 0; i < array.count(); ++i) {
    if (random.chance(0.1)) {
      put_double(array, i, 0);
      const uint64_t bits = random.engine()();
      std::memcpy(array.at(i), &bits, size_of(type));
    } else {
      put_double(array, i,
                 std::ldexp(static_cast<double>(random.between(-5000, 5000)),
                            static_cast<int>(random.between(-20, 3))));
    }
  }
  return array;
}

struct Input {
  vlsp::RowShape shape;
  std::vector<int64_t> update;
  std::vector<int64_t> gather;
  vlsp::Pairs pairs() const { return {update.data(), gather.data(), static_cast<int64_t>(update.size())}; }
  bool inside(int64_t i) const {
    return update[i] >= 0 && update[i] < shape.num_rows && gather[i] >= 0 && gather[i] < shape.num_features;
  }
};

// Unique rows in runs of some length, increasing features with gaps, now and then an index outside, padding.
Input random_pairs(Random& random) {
  Input input;
  input.shape = {
      random.between(0, 60), random.between(0, 60),
      random.pick({int64_t{0}, int64_t{1}, int64_t{3}, int64_t{8}, int64_t{17}, int64_t{64}, int64_t{100}})};
  std::vector<int64_t> rows(input.shape.num_rows);
  std::iota(rows.begin(), rows.end(), 0);
  const int64_t piece = random.pick({int64_t{1}, int64_t{2}, int64_t{9}, int64_t{60}});
  for (int64_t at = input.shape.num_rows / piece * piece - piece; at > 0; at -= piece) {
    const int64_t other = random.between(0, at / piece) * piece;
    if (other != at) std::swap_ranges(rows.begin() + at, rows.begin() + at + piece, rows.begin() + other);
  }
  int64_t feature = random.between(0, 2);
  for (int64_t row : rows) {
    if (feature >= input.shape.num_features + 2) break;
    const bool outside = random.chance(0.03);
    const int64_t far[] = {-1, input.shape.num_rows, INT64_MAX, INT64_MIN};
    input.update.push_back(outside ? random.pick(far) : row);
    input.gather.push_back(feature);
    feature += random.chance(0.9) ? 1 : random.between(1, 5);
  }
  const int64_t padding = random.between(0, 3);
  input.update.insert(input.update.end(), padding, -1);
  input.gather.insert(input.gather.end(), padding, -1);
  return input;
}

// What an element must become: `value`, or the very bits of an element of another array.
void check_elements(const char* what, int64_t number, Array& got, Array& before,
                    const std::vector<double>& want, const std::vector<uint8_t>& written) {
  for (int64_t i = 0; i < got.count(); ++i) {
    if (written[i]) {
      check(same_value(got.get(i), want[i]), what, number, i, got.get(i), want[i]);
    } else {
      check(std::memcmp(got.at(i), before.at(i), size_of(got.type)) == 0, "left alone", number, i, got.get(i),
            before.get(i));
    }
  }
  const auto skew_bytes = static_cast<std::ptrdiff_t>(got.skew * size_of(got.type));
  check(
      std::all_of(got.bytes.begin(), got.bytes.begin() + skew_bytes, [](uint8_t b) { return b == kPoison; }),
      "before the array", number, 0, 0, 0);
}

enum class Operation { kReplace, kAdd, kZero, kCopy, kAddInPlace, kTake };

// What it writes: a copy of `target`, of the same skew, or `target` itself.
void run(Operation operation, Array& target, Array& source, const Input& input) {
  const vlsp::Pairs pairs = input.pairs();
  const vlsp::Rows to{target.data(), target.type};
  const vlsp::ConstRows from{source.data(), source.type};
  if (operation == Operation::kAddInPlace) return add_rows_in_place_cpu(to, from, pairs, input.shape);
  if (operation == Operation::kTake) return take_rows_cpu(to, from, pairs, input.shape);
  Array out(target.type, target.count(), target.skew);
  std::vector<int64_t> map(input.shape.num_rows, 7);
  const vlsp::Rows to_out{out.data(), out.type};
  const vlsp::ConstRows old{target.data(), target.type};
  if (operation == Operation::kReplace) replace_rows_cpu(to_out, old, from, pairs, input.shape, map.data());
  if (operation == Operation::kAdd) add_rows_cpu(to_out, old, from, pairs, input.shape, map.data());
  if (operation == Operation::kZero) zero_rows_cpu(to_out, old, pairs, input.shape, map.data());
  if (operation == Operation::kCopy) copy_rows_cpu(to_out, old, input.shape);
  target = out;
}

bool adds(Operation operation) { return operation == Operation::kAdd || operation == Operation::kAddInPlace; }

double sum_in(ElementType type, double a, double b) {
  return type == ElementType::kFloat64 ? a + b : static_cast<float>(a) + static_cast<float>(b);
}

void check_operation(Operation operation, const Input& input, Array hidden, Array features, int64_t number) {
  const bool takes = operation == Operation::kTake;
  Array target = takes ? features : hidden;
  Array& source = takes ? hidden : features;
  std::vector<double> want(target.count(), 0.0);
  std::vector<uint8_t> written(target.count(), takes);
  std::vector<std::pair<int64_t, int64_t>> moved;  // (target, source) elements
  for (int64_t i = 0; i < static_cast<int64_t>(input.update.size()); ++i) {
    if (operation == Operation::kCopy || !input.inside(i)) continue;
    for (int64_t k = 0; k < input.shape.width; ++k) {
      const int64_t row = input.update[i] * input.shape.width + k;
      const int64_t feature = input.gather[i] * input.shape.width + k;
      const int64_t to = takes ? feature : row;
      const int64_t from = takes ? row : feature;
      const double value = round_to_type(source.get(from), target.type);
      written[to] = 1;
      want[to] = operation == Operation::kZero ? 0.0
                 : adds(operation) ? round_to_type(sum_in(target.type, target.get(to), value), target.type)
                                   : value;
      moved.emplace_back(to, from);
    }
  }
  const Array source_before = source;
  Array before = target;
  run(operation, target, source, input);
  check_elements(takes ? "take" : "row", number, target, before, want, written);
  if (operation == Operation::kZero || operation == Operation::kCopy) return;
  check(source.bytes == source_before.bytes, "source left alone", number, 0, 0, 0);
  if (adds(operation) || source.type != target.type) return;
  for (const auto& [to, from] : moved) {
    check(std::memcmp(target.at(to), source.at(from), size_of(target.type)) == 0, "bits moved", number, to,
          target.get(to), source.get(from));
  }
}

}  // namespace

int64_t test_rows(int64_t num_inputs) {
  int64_t cases = 0;
  for (int64_t number = 1; number <= num_inputs; ++number) {
    Random random(number);
    const Input input = random_pairs(random);
    const ElementType hidden_type = kTypes[number % 4];
    const ElementType feature_type = kTypes[number / 4 % 4];
    const Array hidden = random_array(random, hidden_type, input.shape.num_rows * input.shape.width);
    const Array features = random_array(random, feature_type, input.shape.num_features * input.shape.width);
    for (Operation operation : {Operation::kReplace, Operation::kAdd, Operation::kZero, Operation::kCopy,
                                Operation::kAddInPlace, Operation::kTake}) {
      check_operation(operation, input, hidden, features, number);
      ++cases;
    }
  }
  return cases;
}

}  // namespace vlsp_test
