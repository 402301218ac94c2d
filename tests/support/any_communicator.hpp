// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A communicator chosen at run time, so that one instantiation of the layer serves all tests.

#include <gdn/comm/any.hpp>

namespace gdn_test {

/// Refers to a communicator over host memory, which must outlive it.
using any_communicator = gdn::any_communicator<gdn::host_memory, gdn::host_stream>;

}  // namespace gdn_test
