// SPDX-License-Identifier: Apache-2.0
// A program that never initialises Kokkos: the backend says so instead of doing it.

#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <gdn/kokkos/kokkos.hpp>

namespace {

TEST(KokkosUninitialised, MakingABackendNamesTheMissingCall) {
  try {
    const gdn::kokkos::backend<> be;
    FAIL() << "a backend was made";
  } catch (const gdn::backend_error& e) {
    EXPECT_THAT(std::string(e.what()), testing::HasSubstr("the program must call Kokkos::initialize"));
  }
  EXPECT_FALSE(Kokkos::is_initialized());
}

}  // namespace
