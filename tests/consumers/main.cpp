// SPDX-License-Identifier: Apache-2.0
// What a project that uses gdn looks like: the same program in each of the folders beside this file.
#include <gdn/version.hpp>

#include <cstdio>

int main() {
  std::printf("gdn %d.%d.%d\n", GDN_VERSION_MAJOR, GDN_VERSION_MINOR, GDN_VERSION_PATCH);
}
