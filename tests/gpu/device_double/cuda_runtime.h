// A double of two GPUs: which one is current, and nothing that runs.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

inline int current_device = 0;
inline int num_switches = 0;

inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  ++num_switches;
  current_device = device;
  return cudaSuccess;
}
