// SPDX-License-Identifier: Apache-2.0
#include <gdn/version.hpp>

#include <gtest/gtest.h>

#include <string>

namespace {

TEST(version, IsTheOneOfThePackage) {
  const std::string version = std::to_string(GDN_VERSION_MAJOR) + "." + std::to_string(GDN_VERSION_MINOR) + "." +
                              std::to_string(GDN_VERSION_PATCH);
  EXPECT_EQ(version, GDN_TEST_VERSION);
}

}  // namespace
