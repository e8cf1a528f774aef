// The row operations on the CPU: copy, add, take or zero rows by pairs of indices.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "rows.h"
#include "stream.h"
#include "this_cpu.h"

namespace vlsp {
namespace {

inline float to_float(float value) { return value; }
inline float to_float(double value) { return static_cast<float>(value); }

// Double to 16 bits goes by way of float, as the framework's own cast does.
template <class To, class From>
inline To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, Float16>) {
    return to_float16(to_float(value));
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(to_float(value));
  } else {
    return to_float(value);
  }
}

template <class To, class From>
void convert_all(To* __restrict to, const From* __restrict from, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = convert<To>(from[i]);
  }
}

template <class T, class From>
inline T sum_of(T value, From added) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  return convert<T>(convert<Sum>(value) + convert<Sum>(convert<T>(added)));
}

template <class T, class From>
void add_all(T* __restrict to, const From* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = sum_of(to[i], from[i]);
}

template <class T, class From>
void sum_all(T* __restrict to, const T* __restrict values, const From* __restrict added, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = sum_of(values[i], added[i]);
}

// Calls visit(row, feature, length) for every longest stretch of pairs whose rows are neighbours in both
// tables: long runs of visual tokens become one flat piece of memory.
template <class Visit>
void for_each_run(const Pairs& pairs, const RowShape& shape, Visit visit) {
  if (shape.width == 0) return;  // then the arrays may be null
  int64_t i = 0;
  while (i < pairs.count) {
    const int64_t row = pairs.update[i];
    const int64_t feature = pairs.gather[i];
    if (row < 0 || row >= shape.num_rows || feature < 0 || feature >= shape.num_features) {
      ++i;
      continue;
    }
    const int64_t longest = std::min({pairs.count - i, shape.num_rows - row, shape.num_features - feature});
    int64_t length = 1;
    while (length < longest && pairs.update[i + length] == row + length &&
           pairs.gather[i + length] == feature + length) {
      ++length;
    }
    visit(row, feature, length);
    i += length;
  }
}

void fill_map(const Pairs& pairs, const RowShape& shape, const Map& map) {
  std::fill_n(map, shape.num_rows, -1);
  for_each_run(pairs, shape, [&](int64_t row, int64_t feature, int64_t length) {
    for (int64_t i = 0; i < length; ++i) map[row + i] = feature + i;
  });
}

// Writes all rows of `to`: copies of hidden or, by change(piece, hidden, first, count), what a stretch of
// elements becomes whose features are elements first to first + count. `piece` is a part of `to`, or memory
// in the cache.
template <class T, class Change>
void merge(T* to, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape, const Map& map,
           const Change& change) {
  if (shape.width == 0) return;
  const T* old = static_cast<const T*>(hidden.data);
  fill_map(pairs, shape, map);
  const Written written(shape.num_rows * shape.width * sizeof(T));
  int64_t row = 0;
  while (row < shape.num_rows) {
    const int64_t feature = map[row];
    int64_t length = 1;
    while (row + length < shape.num_rows && map[row + length] == (feature < 0 ? -1 : feature + length))
      ++length;
    const int64_t at = row * shape.width, count = length * shape.width;
    if (feature < 0) {
      written.copy(to + at, old + at, count);
    } else {
      written.make(to + at, count, [&](T* piece, int64_t begin, int64_t length) {
        change(piece, old + at + begin, feature * shape.width + begin, length);
      });
    }
    row += length;
  }
}

template <class Use>
void with_type(ElementType type, Use use) {
  switch (type) {
    case ElementType::kFloat32:
      return use(float{});
    case ElementType::kFloat64:
      return use(double{});
    case ElementType::kFloat16:
      return use(Float16{});
    case ElementType::kBFloat16:
      return use(BFloat16{});
  }
}

// Calls use(to, from) with typed pointers.
template <class Use>
void with_types(const Rows& to, const ConstRows& from, Use use) {
  with_type(to.type, [&](auto written) {
    with_type(from.type, [&](auto read) {
      auto* target = static_cast<decltype(written)*>(to.data);
      const auto* source = static_cast<const decltype(read)*>(from.data);
      for_this_cpu([&] { use(target, source); });
    });
  });
}

}  // namespace

void replace_rows_cpu(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape, const Map& map) {
  with_types(out, features, [&](auto* to, const auto* from) {
    merge(to, hidden, pairs, shape, map, [=](auto* piece, const auto*, int64_t first, int64_t count) {
      convert_all(piece, from + first, count);
    });
  });
}

void add_rows_cpu(const Rows& out, const ConstRows& hidden, const ConstRows& features, const Pairs& pairs,
                  const RowShape& shape, const Map& map) {
  with_types(out, features, [&](auto* to, const auto* from) {
    merge(to, hidden, pairs, shape, map, [=](auto* piece, const auto* old, int64_t first, int64_t count) {
      sum_all(piece, old, from + first, count);
    });
  });
}

void zero_rows_cpu(const Rows& out, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape,
                   const Map& map) {
  with_type(out.type, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(out.data);
    merge(to, hidden, pairs, shape, map, [](auto* piece, const auto*, int64_t, int64_t count) {
      std::memset(piece, 0, count * sizeof(*piece));
    });
  });
}

void add_rows_in_place_cpu(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                           const RowShape& shape) {
  const int64_t width = shape.width;
  with_types(hidden, features, [&](auto* to, const auto* from) {
    for_each_run(pairs, shape, [=](int64_t row, int64_t feature, int64_t length) {
      add_all(to + row * width, from + feature * width, length * width);
    });
  });
}

void take_rows_cpu(const Rows& features, const ConstRows& hidden, const Pairs& pairs, const RowShape& shape) {
  const int64_t width = shape.width;
  with_types(features, hidden, [&](auto* to, const auto* from) {
    int64_t next = 0;  // feature rows below it are written
    const auto zero_up_to = [&](int64_t feature) {
      const int64_t gap = feature - next;
      if (gap > 0 && width > 0) std::memset(to + next * width, 0, gap * width * sizeof(*to));
    };
    for_each_run(pairs, shape, [&](int64_t row, int64_t feature, int64_t length) {
      zero_up_to(feature);
      convert_all(to + feature * width, from + row * width, length * width);
      next = std::max(next, feature + length);
    });
    zero_up_to(shape.num_features);
  });
}

void copy_rows_cpu(const Rows& to, const ConstRows& from, const RowShape& shape) {
  with_type(to.type, [&](auto element) {
    const int64_t count = shape.num_rows * shape.width;
    const Written written(count * sizeof(element));
    if (count == 0) return;
    written.copy(static_cast<decltype(element)*>(to.data), static_cast<const decltype(element)*>(from.data),
                 count);
  });
}

}  // namespace vlsp
