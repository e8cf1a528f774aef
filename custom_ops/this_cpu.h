// The plain loops of this project, compiled twice: for the baseline that the build asks for, and on x86-64
// for AVX2 too, chosen when running. Elsewhere the baseline is all there is.
#pragma once

namespace vlsp {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(VLSP_BASELINE_ONLY)

// `flatten` brings everything that `work` calls in here, so it is compiled for AVX2 with it. FMA stays off:
// results are the same bits either way.
template <class Work>
__attribute__((target("avx2"), flatten)) void with_avx2(const Work& work) {
  work();
}

template <class Work>
void for_this_cpu(const Work& work) {
  __builtin_cpu_supports("avx2") ? with_avx2(work) : work();
}

#else

template <class Work>
void for_this_cpu(const Work& work) {
  work();
}

#endif

}  // namespace vlsp
