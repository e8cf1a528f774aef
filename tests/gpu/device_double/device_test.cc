// Launches go to the device of their tensor, on its stream, and leave the current device as it was.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "paddle_op.h"

#define CHECK(condition)                                \
  if (!(condition)) {                                   \
    std::printf("line %d: %s\n", __LINE__, #condition); \
    std::exit(1);                                       \
  }

namespace {

// What a launch would see: device 0 or 1 with its stream, or an error that it returns.
int launch(void* stream, int expected_device, int error = 0) {
  CHECK(current_device == expected_device);
  CHECK(stream == reinterpret_cast<void*>(static_cast<intptr_t>(100 + expected_device)));
  return error;
}

}  // namespace

int main() {
  using vlsp::DeviceOf;
  const paddle::Tensor first{0}, second{1}, gone{7};
  for (int current = 0; current < 2; ++current) {
    cudaSetDevice(current);
    for (const paddle::Tensor& x : {first, second}) {
      vlsp::check_cuda(launch(DeviceOf(x).stream(), x.device), "launch");
      CHECK(current_device == current);
      const DeviceOf outer(x);
      {
        vlsp::check_cuda(launch(DeviceOf(first).stream(), 0), "launch");
      }
      CHECK(current_device == x.device);
      cudaSetDevice(current);
    }
  }

  cudaSetDevice(0);
  try {
    vlsp::check_cuda(launch(DeviceOf(second).stream(), 1, 209), "launch");
    CHECK(false);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()) == "paddle_vl_sp: CUDA error 209 in launch");
  }
  CHECK(current_device == 0);
  try {
    DeviceOf device(gone);
    CHECK(false);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()) == "paddle_vl_sp: CUDA error 101 in a change of the device");
  }

  num_switches = 0;
  {
    const DeviceOf device(first);
  }
  CHECK(num_switches == 0);  // on one device nothing is switched
  std::printf("device: passed\n");
}
