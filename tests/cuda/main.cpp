// SPDX-License-Identifier: Apache-2.0
// Runs the tests on the first device; without one, says so in the words by which ctest counts a skipped test.

#include <cstdio>

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int devices = 0;
  if (!testing::GTEST_FLAG(list_tests) && (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)) {
    std::puts("[  SKIPPED ] no CUDA device");
    return 0;
  }
  return RUN_ALL_TESTS();
}
