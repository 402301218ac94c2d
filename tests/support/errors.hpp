// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What an error says, for tests of messages.

#include <string>
#include <string_view>

#include <gdn/core/error.hpp>

namespace gdn_test {

/// The text without the spaces that stand before punctuation.
inline std::string plain(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (std::string_view(",;:.)").find(c) != std::string_view::npos && !out.empty() && out.back() == ' ')
      out.pop_back();
    out += c;
  }
  return out;
}

/// What f() says about the E that it throws.
template <class E, class F>
std::string text_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return plain(e.what());
  } catch (const std::exception& e) {
    return plain(gdn::say("another error:", e.what()));
  }
  return "no error";
}

}  // namespace gdn_test
