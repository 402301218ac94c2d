// SPDX-License-Identifier: Apache-2.0
// Two shared libraries that both include everything, in one process.

#include <vector>

#include <gtest/gtest.h>

std::vector<float> one_library();
std::vector<float> other_library();

TEST(TwoLibraries, GiveTheSameBitsInOneProcess) {
  const std::vector<float> one = one_library();
  EXPECT_EQ(other_library(), one);
  EXPECT_EQ(one_library(), one);
}
