// SPDX-License-Identifier: Apache-2.0
// expect: is_trivially_copyable
// A workspace destroys nothing.
#include <string>

#include <gdn/core/workspace.hpp>

#ifdef GDN_CONTROL
using element = char;
#else
using element = std::string;
#endif

void f(gdn::workspace<gdn::host_memory>& ws) {
  ws.take<element>(3);
}
