// One launch on a stream.
#pragma once

#include <cuda_runtime.h>

namespace vlsp {

// Returns a cudaError_t, and leaves none behind for whoever asks next.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  cudaGetLastError();
  return error;
}

}  // namespace vlsp
