// Memory that was mapped just now gets its pages at the first write, 4 KiB at a time, which takes longer than
// the writing. Linux gives 2 MiB pages where they are asked for (transparent huge pages, "madvise").
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vlsp {

constexpr int64_t kSmallestHuge = int64_t{4} << 20;  // as numpy: below, a huge page may be mostly unused

// For an array that is about to be written. A wish: nothing happens where the system has no such pages, or
// where the memory has its pages already.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(MADV_HUGEPAGE)
  if (num_bytes < kSmallestHuge) return;
  constexpr uintptr_t kPage = 4096;  // madvise refuses an address that is not a page's
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const auto end = reinterpret_cast<uintptr_t>(data) + num_bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace vlsp
