// What the kernel tests share: a seeded generator, a check that stops, and the groups of cases.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace vlsp_test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // Both ends are included.
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }
  template <class T, size_t N>
  T pick(const T (&choices)[N]) {
    return choices[between(0, N - 1)];
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

inline void check(bool holds, const char* what, int64_t case_number, int64_t place, double got, double want) {
  if (holds) return;
  std::fprintf(stderr, "case %lld: %s at %lld: got %.17g, want %.17g\n", static_cast<long long>(case_number),
               what, static_cast<long long>(place), got, want);
  std::exit(1);
}

inline void check_equal(const char* what, int64_t case_number, int64_t place, int64_t got, int64_t want) {
  check(got == want, what, case_number, place, static_cast<double>(got), static_cast<double>(want));
}

// Each returns the number of cases it ran.
int64_t test_half();
int64_t test_index(int64_t num_layouts);
int64_t test_rows(int64_t num_inputs);

}  // namespace vlsp_test
