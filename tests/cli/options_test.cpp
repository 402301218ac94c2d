// SPDX-License-Identifier: Apache-2.0
#include "run_layer/options.hpp"

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace gdn_run;

std::vector<std::string> words(const std::string& line) {
  std::istringstream in(line);
  return {std::istream_iterator<std::string>(in), {}};
}

options parsed(const std::string& line) {
  return parse_command(words(line)).run.value();
}

std::string refusal(const std::vector<std::string>& arguments) {
  try {
    parse_command(arguments);
  } catch (const usage_error& e) {
    return e.what();
  }
  return "accepted";
}

TEST(options, DefaultsAreTheFirstValues) {
  const options o = parsed("file");
  EXPECT_EQ(o.bundle, "file");
  EXPECT_EQ(o.ranks, 1);
  EXPECT_EQ(o.comm, comm_kind::threads);
  EXPECT_EQ(o.backend, backend_kind::kokkos);
  EXPECT_EQ(o.layout, layout_kind::contiguous);
  EXPECT_EQ(o.strategy, gdn::strategy::reshard);
  EXPECT_EQ(o.share, gdn::share::all_gather);
  EXPECT_EQ(o.dtype, gdn::dtype::f32);
  EXPECT_EQ(o.rule, rule_kind::chunked);
  EXPECT_EQ(o.products, product_kind::ieee);
  EXPECT_TRUE(o.grad && o.decode);
  EXPECT_FALSE(o.tolerance);
  EXPECT_EQ(o.out + o.json, "");
  EXPECT_EQ(o.repeat, 1);
}

TEST(options, EachIsRead) {
  const options o = parsed(
      "--ranks 64 --comm threads --backend kokkos --layout zigzag-documents --strategy in-place --share relay --dtype "
      "f64 "
      "--rule recurrent --no-grad --no-decode --tolerance 1e-9 --out o --json=j --repeat 3 file");
  EXPECT_EQ(o.ranks, 64);
  EXPECT_EQ(o.layout, layout_kind::zigzag_documents);
  EXPECT_EQ(o.strategy, gdn::strategy::in_place);
  EXPECT_EQ(o.share, gdn::share::relay);
  EXPECT_EQ(o.dtype, gdn::dtype::f64);
  EXPECT_EQ(o.rule, rule_kind::recurrent);
  EXPECT_FALSE(o.grad || o.decode);
  EXPECT_EQ(o.tolerance, 1e-9);
  EXPECT_EQ(o.out, "o");
  EXPECT_EQ(o.json, "j");
  EXPECT_EQ(o.repeat, 3);
  EXPECT_EQ(parsed("f --layout zigzag").layout, layout_kind::zigzag);
  EXPECT_EQ(parsed("f --layout interleaved").layout, layout_kind::interleaved);
  EXPECT_EQ(parsed("f --layout seq-index").layout, layout_kind::seq_index);
  EXPECT_EQ(parsed("f --share prefix-scan").share, gdn::share::prefix_scan);
  EXPECT_EQ(parsed("-- --file").bundle, "--file");
}

TEST(options, HelpNamesEveryOptionAndVersionTheVersion) {
  const command help = parse_command(words("--help"));
  EXPECT_FALSE(help.run);
  for (const char* option : {"--ranks", "--comm", "--backend", "--layout", "--strategy", "--share", "--dtype", "--rule",
                             "--products", "--no-grad", "--no-decode", "--tolerance", "--out", "--json", "--repeat", "--version"}) {
    EXPECT_THAT(help.text, HasSubstr(option));
  }
  const command version = parse_command(words("--version"));
  EXPECT_FALSE(version.run);
  EXPECT_THAT(version.text, ::testing::MatchesRegex("gdn-run [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST(options, NumbersOutOfRangeAreNamed) {
  for (const char* value : {"0", "-1", "65", "two", "2.5", "1e1", "0x4", "", " 4", "4 ", "99999999999999999999"}) {
    EXPECT_THAT(refusal({"--ranks", value, "f"}),
                AllOf(HasSubstr("--ranks"), HasSubstr("'" + std::string(value) + "'")));
  }
  for (const char* value : {"0", "-1", "x", "1.5", ""}) {
    EXPECT_THAT(refusal({"--repeat", value, "f"}), HasSubstr("--repeat"));
  }
  for (const char* value : {"0", "-1", "x", "nan", "inf", "1e999", "1e-999", "1e-3x", ""}) {
    EXPECT_THAT(refusal({"--tolerance", value, "f"}), HasSubstr("--tolerance")) << value;
  }
  EXPECT_EQ(parsed("--ranks 04 f").ranks, 4);  // not octal
}

TEST(options, UnknownValuesAreNamedWithThoseThatExist) {
  for (const char* option : {"--comm", "--backend", "--layout", "--strategy", "--share", "--dtype", "--rule", "--products"}) {
    EXPECT_THAT(refusal({option, "other", "f"}), AllOf(HasSubstr(option), HasSubstr("'other'"), HasSubstr("one of")));
    EXPECT_THAT(refusal({option, "", "f"}), AllOf(HasSubstr(option), HasSubstr("''")));
    EXPECT_THAT(refusal({option, "f"}), HasSubstr(option)) << "the bundle is taken for the value";
    EXPECT_THAT(refusal({"f", option}), HasSubstr(option));
  }
}

TEST(options, ValuesThatAreNotThereYetAreNamed) {
  for (const char* line : {"--comm mpi", "--comm local", "--comm nccl", "--backend cuda"}) {
    EXPECT_THAT(refusal(words(line + std::string(" f"))), AllOf(HasSubstr(line), HasSubstr("not part of")));
  }
}

TEST(options, OneBundleIsNeededAndNothingElse) {
  EXPECT_THAT(refusal({}), HasSubstr("BUNDLE"));
  EXPECT_THAT(refusal({""}), HasSubstr("BUNDLE"));
  EXPECT_THAT(refusal({"--ranks", "2"}), HasSubstr("BUNDLE"));
  EXPECT_THAT(refusal({"--out", "f"}), HasSubstr("BUNDLE"));
  EXPECT_THAT(refusal({"f", "second"}), HasSubstr("second"));
  EXPECT_THAT(refusal({"--frobnicate", "f"}), HasSubstr("--frobnicate"));
  EXPECT_THAT(refusal({"-x", "f"}), HasSubstr("-x"));
  EXPECT_THAT(refusal({"--ranks", "2", "--ranks", "2", "f"}), HasSubstr("--ranks"));
  EXPECT_THAT(refusal({"--out", "", "f"}), HasSubstr("--out"));
  EXPECT_THAT(refusal({"--json", "", "f"}), HasSubstr("--json"));
}

}  // namespace
