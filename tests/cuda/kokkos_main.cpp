// SPDX-License-Identifier: Apache-2.0
// As main.cpp, with Kokkos for the reference.

#include <cstdio>

#include <Kokkos_Core.hpp>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int devices = 0;
  if (!testing::GTEST_FLAG(list_tests) && (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)) {
    std::puts("[  SKIPPED ] no CUDA device");
    return 0;
  }
  const Kokkos::ScopeGuard kokkos(Kokkos::InitializationSettings().set_disable_warnings(true));
  return RUN_ALL_TESTS();
}
