// As much of CUDA as the kernels use, on the CPU: every thread of a block is a fiber of its own, and which
// runs next is drawn at random wherever one waits for others. Launches on the null stream run at once; those
// on another stream are kept, as in a capture, until cuda_emulator_replay. Shared memory: see build.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__ static
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulator {

// The number of the planted mistake that is made, 0 for none: see build.py.
int mistake();

// Now or, on a stream that captures, later.
void enqueue(void* stream, std::function<void()> work);
void run_grid(dim3 blocks, dim3 threads, const std::function<void()>& kernel);

// Waits for all threads of the block, or of the warp, at the same call; `what` names it. Returns the values
// that they brought, by their number in the block, or in the warp.
const uint64_t* meet_block(const char* what, uint64_t value);
const uint64_t* meet_warp(const char* what, uint64_t value);
unsigned lane();
int count_block(const uint64_t* values);

// Memory of the block that runs, filled with poison before each block; `line` tells arrays apart.
void* shared_memory(const char* file, int line, size_t bytes);
template <typename Array>
Array& shared(const char* file, int line) {
  return *static_cast<Array*>(shared_memory(file, line, sizeof(Array)));
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet_block("__syncthreads", 0); }
inline int __syncthreads_count(bool value) {
  return emulator::count_block(emulator::meet_block("__syncthreads_count", value));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return static_cast<T>(emulator::meet_warp("__shfl_xor_sync", value)[emulator::lane() ^ mask]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const uint64_t* values = emulator::meet_warp("__shfl_up_sync", value);
  return static_cast<T>(values[emulator::lane() < step ? emulator::lane() : emulator::lane() - step]);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return static_cast<T>(emulator::meet_warp("__shfl_sync", value)[from]);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               std::type_identity_t<Parameters>... arguments) {
  const dim3 blocks = config->gridDim, threads = config->blockDim;
  if (blocks.x == 0 || blocks.y == 0 || blocks.y > 65535 || threads.x * threads.y > 1024)
    return cudaErrorInvalidValue;
  emulator::enqueue(config->stream,
                    [=] { emulator::run_grid(blocks, threads, [=] { kernel(arguments...); }); });
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  emulator::enqueue(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  emulator::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
