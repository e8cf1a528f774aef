// The current CUDA device of a thread: a launch goes to it, wherever its arrays are.
#pragma once

namespace vlsp {

// Makes `device` the current one and says in `previous` which was; returns a cudaError_t.
int switch_device_cuda(int device, int* previous);

}  // namespace vlsp
