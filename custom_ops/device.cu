#include <cuda_runtime.h>

#include "device.h"

namespace vlsp {

int switch_device_cuda(int device, int* previous) {
  const cudaError_t error = cudaGetDevice(previous);
  return error != cudaSuccess || *previous == device ? error : cudaSetDevice(device);
}

}  // namespace vlsp
