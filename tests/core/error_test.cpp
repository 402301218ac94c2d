// SPDX-License-Identifier: Apache-2.0
#include <gdn/core/error.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <string_view>

#include <support/errors.hpp>

namespace {

using namespace gdn_test;
using namespace std::string_literals;

TEST(say, JoinsWordsAndNumbersWithSpaces) {
  EXPECT_EQ(gdn::say("cu_seqlens[0] must be 0, is", 7), "cu_seqlens[0] must be 0, is 7");
  EXPECT_EQ(gdn::say(), "");
  EXPECT_EQ(gdn::say(-1, 2U, INT64_MIN, std::size_t{3}), "-1 2 -9223372036854775808 3");
  EXPECT_EQ(gdn::say("a"s, std::string_view("b"), true, false, 0.5), "a b true false 0.500000");
}

TEST(say, PutsNoSpaceBeforePunctuationOfTheText) {
  EXPECT_EQ(gdn::say("the limit is", 3, ", not", 4, "; see (", "docs", ")"), "the limit is 3, not 4; see ( docs)");
  EXPECT_EQ(gdn::say("rank", 1, "of", 4, ":", 32), "rank 1 of 4: 32");
  EXPECT_EQ(gdn::say("cannot open", ".hidden"s, std::string_view(",")), "cannot open .hidden ,");  // values are kept
}

TEST(expects, ThrowsItsTextWithTheValues) {
  EXPECT_NO_THROW(gdn::expects(true, "never", 1));
  EXPECT_EQ(text_of<gdn::error>([] { gdn::expects(1 > 2, "rows must not decrease, but", 1, "follows", 2); }),
            "rows must not decrease, but 1 follows 2");
  EXPECT_EQ(text_of<gdn::error>([] { gdn::expects(false, "a rule"s + " of the moment"); }), "a rule of the moment");
}

TEST(expects, ThrowsTheErrorThatIsAskedFor) {
  EXPECT_THROW(gdn::expects<gdn::shape_error>(false, "x"), gdn::shape_error);
  EXPECT_THROW(gdn::expects<gdn::metadata_error>(false, "x"), gdn::metadata_error);
  EXPECT_THROW(gdn::expects<gdn::workspace_error>(false, "x"), gdn::workspace_error);
  EXPECT_THROW(gdn::expects<gdn::backend_error>(false, "x"), gdn::backend_error);
  EXPECT_THROW(gdn::expects<gdn::comm_error>(false, "x"), gdn::comm_error);
  EXPECT_THROW(gdn::expects<gdn::comm_error>(false, "x"), std::runtime_error);  // all are
}

TEST(expects, RemembersWhereItWasCalled) {
  std::uint_least32_t line = 0;
  try {
    line = __LINE__ + 1;
    gdn::expects<gdn::shape_error>(false, "x");
  } catch (const gdn::error& e) {
    EXPECT_EQ(e.where().line(), line);
    EXPECT_NE(std::string_view(e.where().file_name()).find("error_test.cpp"), std::string_view::npos);
  }
}

TEST(expects, WorksInConstantExpressions) {
  constexpr auto half = [](int n) {
    gdn::expects(n % 2 == 0, "n must be even, is", n);
    return n / 2;
  };
  static_assert(half(8) == 4);
  EXPECT_EQ(text_of<gdn::error>([&] { half(7); }), "n must be even, is 7");
}

TEST(raise, IsTheThrowingTwinOfADiagnostic) {
  EXPECT_NO_THROW(gdn::raise(std::nullopt));
  EXPECT_EQ(text_of<gdn::metadata_error>([] { gdn::raise(gdn::diagnostic{"position 3 is -1"}); }), "position 3 is -1");
  EXPECT_THROW(gdn::raise<gdn::shape_error>(gdn::diagnostic{"x"}), gdn::shape_error);
}

}  // namespace
