// Writing an array that is larger than the cache: stores that go past it. An ordinary store first reads the
// line that it writes to, which is half as much traffic again for a copy. The C library does the same, but
// only in single copies of many megabytes, and rows are short.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vlsp {

constexpr int64_t kCacheLine = 64;
#if defined(VLSP_STREAM_FROM)  // a test, whose arrays are small
constexpr int64_t kSmallestStreamed = VLSP_STREAM_FROM;
#else
constexpr int64_t kSmallestStreamed = int64_t{16} << 20;
#endif

#if defined(__SSE2__)

// `to` begins a line, `count` is in lines; `load(i)` are the 16 bytes at i.
template <class Load>
inline void stream_lines(char* to, int64_t count, const Load& load) {
  for (int64_t i = 0; i < count * kCacheLine; i += kCacheLine) {
    for (int64_t part = 0; part < kCacheLine; part += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part), load(i + part));
    }
  }
}

inline void copy_lines(char* to, const char* from, int64_t count) {
  stream_lines(to, count,
               [=](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)); });
}

// Others see what was streamed after this.
inline void finish_stream() { _mm_sfence(); }
constexpr bool kCanStream = true;

#else

inline void copy_lines(char* to, const char* from, int64_t count) {
  std::memcpy(to, from, count * kCacheLine);
}
inline void finish_stream() {}
constexpr bool kCanStream = false;

#endif

// The array that a kernel writes once, of so many bytes. A small one stays in the cache for whoever reads it
// next.
class Written {
 public:
  explicit Written(int64_t num_bytes) : streams_(kCanStream && num_bytes >= kSmallestStreamed) {}
  Written(const Written&) = delete;
  ~Written() {
    if (streams_) finish_stream();
  }

  template <class T>
  void copy(T* to, const T* from, int64_t count) const {
    auto* target = reinterpret_cast<char*>(to);
    const auto* source = reinterpret_cast<const char*>(from);
    split(target, count * sizeof(T), [=](int64_t begin, int64_t size, bool is_lines) {
      if (is_lines) return copy_lines(target + begin, source + begin, size / kCacheLine);
      std::memcpy(target + begin, source + begin, size);
    });
  }

  // Elements that compute(piece, begin, count) writes to `piece`: in the cache first, where they are
  // streamed.
  template <class T, class Compute>
  void make(T* to, int64_t count, const Compute& compute) const {
    constexpr int64_t kPiece = 512 / sizeof(T);  // measured: more or less of it is slower
    if (!streams_) return compute(to, 0, count);
    alignas(kCacheLine) T piece[kPiece];
    for (int64_t begin = 0; begin < count; begin += kPiece) {
      const int64_t length = std::min(kPiece, count - begin);
      compute(piece, begin, length);
      copy(to + begin, piece, length);
    }
  }

 private:
  static constexpr int64_t kFewestLines = 8;  // shorter stretches are mostly the broken lines at their ends

  // Calls part(begin, size, is_lines) for the whole lines of a stretch and for what is before and after them.
  template <class Part>
  void split(const char* to, int64_t size, const Part& part) const {
    if (!streams_ || size < kFewestLines * kCacheLine) return part(0, size, false);
    const int64_t head = -reinterpret_cast<intptr_t>(to) & (kCacheLine - 1);
    const int64_t lines = (size - head) / kCacheLine * kCacheLine;
    if (head > 0) part(0, head, false);
    part(head, lines, true);
    if (head + lines < size) part(head + lines, size - head - lines, false);
  }

  bool streams_;
};

}  // namespace vlsp
