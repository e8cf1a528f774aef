// Neighbouring elements that are loaded and stored in one access, and the operations on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vlsp {

template <int Bytes>
using Word = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<Bytes == 8, uint2, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>>;

// Unpacked only where it is used: many unpacked ones would need too many registers.
template <typename T, int N>
struct Pack {
  Word<sizeof(T) * N> word;
};

template <typename T, int N>
struct Elements {
  T at[N];
};

template <typename T, int N>
__device__ Elements<T, N> unpack(const Pack<T, N>& pack) {
  Elements<T, N> elements;
  memcpy(&elements, &pack, sizeof(elements));
  return elements;
}

template <typename T, int N>
__device__ Pack<T, N> make_pack(const Elements<T, N>& elements) {
  Pack<T, N> pack;
  memcpy(&pack, &elements, sizeof(pack));
  return pack;
}

// Between two types always by way of float, as the framework's own cast does.
template <typename To, typename From, int N>
__device__ Pack<To, N> convert(const Pack<From, N>& pack) {
  if constexpr (std::is_same_v<To, From>) {
    return pack;
  } else {
    const Elements<From, N> from = unpack(pack);
    Elements<To, N> to;
#pragma unroll
    for (int i = 0; i < N; ++i) to.at[i] = To(static_cast<float>(from.at[i]));
    return make_pack(to);
  }
}

template <typename T, int N>
__device__ Pack<T, N> add(const Pack<T, N>& a, const Pack<T, N>& b) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Elements<T, N> left = unpack(a);
  const Elements<T, N> right = unpack(b);
  Elements<T, N> sum;
#pragma unroll
  for (int i = 0; i < N; ++i) sum.at[i] = T(static_cast<Sum>(left.at[i]) + static_cast<Sum>(right.at[i]));
  return make_pack(sum);
}

}  // namespace vlsp
