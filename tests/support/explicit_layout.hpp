// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Any layout as a list of its fragments.

#include <gdn/plan/layouts.hpp>

namespace gdn_test {

inline gdn::explicit_layout explicit_of(const gdn::sequence_layout auto& layout) {
  return {layout.fragments(), layout.size(), layout.world_size()};
}

}  // namespace gdn_test
