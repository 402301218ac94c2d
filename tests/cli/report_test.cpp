// SPDX-License-Identifier: Apache-2.0
#include "run_layer/report.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "cli/sample.hpp"
#include "io/files.hpp"

namespace {

using ::testing::HasSubstr;
using namespace gdn_run;

constexpr double infinity = std::numeric_limits<double>::infinity();
const double nan_value = std::nan("");

comparison compared(const std::vector<double>& expected, const std::vector<double>& actual, double limit = 1e-3) {
  return compare("t", {static_cast<index_t>(expected.size())}, expected, actual, limit);
}

TEST(compare, GivesTheLargestErrorAndTheRatioOfRootMeanSquares) {
  const comparison c = compared({3, 4}, {3.3, 3.6}, 0.2);
  EXPECT_NEAR(c.max_abs, 0.4, 1e-15);
  EXPECT_NEAR(c.rel_rms, 0.1, 1e-15);
  EXPECT_TRUE(c.ok);
  EXPECT_FALSE(compared({3, 4}, {3.3, 3.6}, 0.0999).ok);
}

TEST(compare, EqualTensorsAreWithinEveryLimit) {
  EXPECT_TRUE(compared({1, 2}, {1, 2}, 1e-300).ok);
  EXPECT_TRUE(compared({}, {}, 1e-300).ok);
}

TEST(compare, AnyErrorFailsWhereAllThatIsExpectedIsZero) {
  EXPECT_TRUE(compared({0, 0}, {0, -0.0}).ok);
  const comparison c = compared({0, 0}, {0, 5e-324}, 1e300);
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.rel_rms, infinity);
}

TEST(compare, WhatIsNotFiniteFailsOnEitherSide) {
  for (const double bad : {nan_value, infinity, -infinity}) {
    EXPECT_FALSE(compared({1, 2}, {1, bad}, 1e300).ok);
    EXPECT_FALSE(compared({1, bad}, {1, 2}, 1e300).ok);
    EXPECT_FALSE(compared({1, bad}, {1, bad}, 1e300).ok);
    EXPECT_FALSE(compared({0, 0}, {0, bad}, 1e300).ok);
  }
  EXPECT_FALSE(compared({1e308}, {-1e308}, 1e300).ok);  // the difference is infinite
}

TEST(compare, SquaresNeitherOverflowNorUnderflow) {
  EXPECT_NEAR(compared({1e300, 0}, {1.1e300, 0}).rel_rms, 0.1, 1e-12);
  EXPECT_NEAR(compared({1e-300, 0}, {1.1e-300, 0}).rel_rms, 0.1, 1e-12);
}

TEST(limit_of, DependsOnTheTypeAndOnOutputOrGradient) {
  options o;
  EXPECT_EQ(limit_of("output", o), 3e-5);
  EXPECT_EQ(limit_of("grad.linear_attn.A_log", o), 3e-5);
  o.dtype = gdn::dtype::f64;
  EXPECT_EQ(limit_of("decode.output", o), 3e-5);
  o.dtype = gdn::dtype::bf16;
  EXPECT_EQ(limit_of("conv_state", o), 2e-2);
  EXPECT_EQ(limit_of("grad.initial_state", o), 5e-2);
  o.dtype = gdn::dtype::f16;
  EXPECT_EQ(limit_of("recurrent_state", o), 4e-3);
  EXPECT_EQ(limit_of("grad.hidden_states", o), 8e-3);
  o.tolerance = 0.5;
  EXPECT_EQ(limit_of("grad.hidden_states", o), 0.5);
}

TEST(type_in_file, StatesAndGatesKeepFullPrecision) {
  for (const char* name :
       {"recurrent_state", "conv_state", "decode.recurrent_state", "decode.conv_state", "grad.initial_state",
        "grad.initial_conv_state", "grad.linear_attn.A_log", "grad.linear_attn.dt_bias"}) {
    EXPECT_EQ(type_in_file(name, gdn::dtype::bf16), gdn::dtype::f32) << name;
    EXPECT_EQ(type_in_file(name, gdn::dtype::f32), gdn::dtype::f32) << name;
    EXPECT_EQ(type_in_file(name, gdn::dtype::f64), gdn::dtype::f64) << name;
  }
  for (const char* name : {"output", "decode.output", "grad.hidden_states", "grad.linear_attn.norm.weight",
                           "grad.linear_attn.in_proj_qkv.weight", "grad.linear_attn.conv1d.weight"}) {
    EXPECT_EQ(type_in_file(name, gdn::dtype::bf16), gdn::dtype::bf16) << name;
    EXPECT_EQ(type_in_file(name, gdn::dtype::f16), gdn::dtype::f16) << name;
    EXPECT_EQ(type_in_file(name, gdn::dtype::f64), gdn::dtype::f64) << name;
  }
}

class report : public ::testing::Test {
 protected:
  report() {
    sample_.floats("grad_output", {2, 8, 4});
    sample_.floats("decode.hidden_states", {2, 1, 4});
    sample_.floats("expected.output", {2, 8, 4});
    sample_.floats("expected.grad.linear_attn.A_log", {2});
    sample_.floats("expected.decode.output", {2, 1, 4});
    sample_.write(dir_.path("b"));
    bundle_ = load_bundle(dir_.path("b"));
    result_.tensors = {{"output", {2, 8, 4}, std::vector<double>(64, 0.5)},
                       {"grad.linear_attn.A_log", {2}, {0.5, 0.6}},
                       {"decode.output", {2, 1, 4}, std::vector<double>(8, 0.5)},
                       {"conv_state", {2, 8, 3}, std::vector<double>(48, 0.25)}};
    result_.received = {{1, 2, 3}, {4, 5, 6}};
    result_.milliseconds = {{"prefill", 1.5}, {"backward", 2.5}};
    result_.tokens = 16;
  }

  gdn_test::temporary_directory dir_;
  gdn_test::sample sample_;
  bundle bundle_;
  options options_;
  run_result result_;
};

TEST_F(report, ComparesEveryExpectedTensorOfWhatWasRun) {
  EXPECT_EQ(compare_all(options_, bundle_, result_).size(), 3U);
  EXPECT_FALSE(all_within_limits(compare_all(options_, bundle_, result_)));
  options_.grad = false;
  EXPECT_EQ(compare_all(options_, bundle_, result_).size(), 2U);
  EXPECT_TRUE(all_within_limits(compare_all(options_, bundle_, result_)));
  options_.decode = false;
  EXPECT_EQ(compare_all(options_, bundle_, result_).size(), 1U);
}

TEST_F(report, ResultThatIsMissingOrOfAnotherShapeIsAFailureOfTheRun) {
  result_.tensors[0].shape = {2, 4, 8};
  EXPECT_THROW(compare_all(options_, bundle_, result_), gdn::backend_error);
  result_.tensors.erase(result_.tensors.begin());
  EXPECT_THROW(compare_all(options_, bundle_, result_), gdn::backend_error);
}

TEST_F(report, JsonHoldsTheTableAndTheFigures) {
  const auto table = compare_all(options_, bundle_, result_);
  const auto json = nlohmann::json::parse(to_json(result_, table));
  EXPECT_EQ(json["ok"], false);
  ASSERT_EQ(json["tensors"].size(), 3U);
  const auto& gate = json["tensors"][1];
  EXPECT_EQ(gate["name"], "expected.grad.linear_attn.A_log");
  EXPECT_EQ(gate["shape"], std::vector<int>{2});
  EXPECT_NEAR(gate["max_abs"].get<double>(), 0.1, 1e-9);
  EXPECT_NEAR(gate["rel_rms"].get<double>(), 0.1 / std::sqrt(0.5), 1e-9);
  EXPECT_EQ(gate["limit"], 3e-5);
  EXPECT_EQ(gate["ok"], false);
  EXPECT_EQ(json["bytes_received"][1],
            nlohmann::json::parse(R"({"rank": 1, "halo": 4, "state": 5, "activations": 6})"));
  EXPECT_EQ(json["milliseconds"]["backward"], 2.5);
}

TEST_F(report, JsonStaysJsonWhenNothingIsFinite) {
  result_.tensors[1].values = {nan_value, 0};
  const auto json = nlohmann::json::parse(to_json(result_, compare_all(options_, bundle_, result_)));
  EXPECT_TRUE(json["tensors"][1]["rel_rms"].is_null());
  EXPECT_EQ(json["tensors"][1]["ok"], false);
}

TEST_F(report, NothingToCompareIsWithinEveryLimit) {
  EXPECT_TRUE(all_within_limits({}));
  EXPECT_THAT(to_text(options_, bundle_, result_, {}), HasSubstr("nothing to compare"));
  EXPECT_EQ(nlohmann::json::parse(to_json(result_, {}))["ok"], true);
}

TEST_F(report, TextNamesTensorsVerdictsAndFigures) {
  const std::string text = to_text(options_, bundle_, result_, compare_all(options_, bundle_, result_));
  for (const char* part :
       {"nobody", "expected.output", "[2, 8, 4]", "FAILED", "ok", "tokens 16", "halo", "rank 1", "prefill", "2.500"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST_F(report, ResultsAreWrittenUnderTheirNamesInTheirTypes) {
  options_.dtype = gdn::dtype::bf16;
  gdn::replacement_file file(dir_.path("out"));
  write_results(file, options_, result_);
  file.commit();
  const gdn::safetensors_file out = gdn::open_safetensors(dir_.path("out"));
  EXPECT_EQ(out.tensors().size(), result_.tensors.size());
  EXPECT_EQ(out.find("output")->type, gdn::dtype::bf16);
  EXPECT_EQ(out.find("conv_state")->type, gdn::dtype::f32);
  EXPECT_EQ(out.find("conv_state")->shape, (std::vector<index_t>{2, 8, 3}));
  EXPECT_EQ(gdn::values_of<double>(*out.find("grad.linear_attn.A_log"))[1], double{0.6F});
}

}  // namespace
