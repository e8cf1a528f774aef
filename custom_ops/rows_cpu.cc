// The row operations on the CPU: copy, add, take or zero rows by pairs of indices.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "rows.h"
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
void add_all(T* __restrict to, const From* __restrict from, int64_t count) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t i = 0; i < count; ++i) {
    to[i] = convert<T>(convert<Sum>(to[i]) + convert<Sum>(convert<T>(from[i])));
  }
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

void replace_rows_cpu(const Rows& hidden, const ConstRows& features, const Pairs& pairs,
                      const RowShape& shape) {
  const int64_t width = shape.width;
  with_types(hidden, features, [&](auto* to, const auto* from) {
    for_each_run(pairs, shape, [=](int64_t row, int64_t feature, int64_t length) {
      convert_all(to + row * width, from + feature * width, length * width);
    });
  });
}

void add_rows_cpu(const Rows& hidden, const ConstRows& features, const Pairs& pairs, const RowShape& shape) {
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

void zero_rows_cpu(const Rows& hidden, const Pairs& pairs, const RowShape& shape) {
  with_type(hidden.type, [&](auto element) {
    auto* rows = static_cast<decltype(element)*>(hidden.data);
    const int64_t row_bytes = shape.width * static_cast<int64_t>(sizeof(element));
    for_each_run(pairs, shape, [&](int64_t row, int64_t, int64_t length) {
      std::memset(rows + row * shape.width, 0, length * row_bytes);
    });
  });
}

}  // namespace vlsp
