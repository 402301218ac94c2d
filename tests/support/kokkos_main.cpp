// SPDX-License-Identifier: Apache-2.0
// Runs GoogleTest while Kokkos is initialised: the program's duty, never the library's.

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const Kokkos::ScopeGuard kokkos(argc, argv);
  return RUN_ALL_TESTS();
}
