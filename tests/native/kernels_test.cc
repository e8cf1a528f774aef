// Runs every property test of the CPU kernels; made to run under the address and undefined behaviour
// sanitizers. Arguments: the number of layouts and of row inputs.
#include "testing.h"

int main(int argc, char** argv) {
  const int64_t num_layouts = argc > 1 ? std::atoll(argv[1]) : 1500;
  const int64_t num_inputs = argc > 2 ? std::atoll(argv[2]) : 3000;
  std::printf("half: %lld values\n", static_cast<long long>(vlsp_test::test_half()));
  std::printf("index: %lld plans of %lld layouts\n",
              static_cast<long long>(vlsp_test::test_index(num_layouts)),
              static_cast<long long>(num_layouts));
  std::printf("rows: %lld operations on %lld inputs\n",
              static_cast<long long>(vlsp_test::test_rows(num_inputs)), static_cast<long long>(num_inputs));
  return 0;
}
