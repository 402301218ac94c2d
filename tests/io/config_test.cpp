// SPDX-License-Identifier: Apache-2.0
#include <gdn/io/checkpoint.hpp>

#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace {

using ::testing::HasSubstr;

using fields = std::vector<std::pair<std::string, std::string>>;

const fields sound = {
    {"hidden_size", "64"},         {"linear_num_key_heads", "2"},   {"linear_num_value_heads", "6"},
    {"linear_key_head_dim", "16"}, {"linear_value_head_dim", "24"}, {"linear_conv_kernel_dim", "4"},
    {"rms_norm_eps", "1e-06"},     {"hidden_act", "\"silu\""},      {"mamba_ssm_dtype", "\"bfloat16\""}};

std::string object(const fields& f) {
  std::string out = "{";
  for (const auto& [key, value] : f) out += (out.size() > 1 ? ", \"" : "\"") + key + "\": " + value;
  return out + "}";
}

fields with(const std::string& key, const std::string& value) {
  fields f = sound;
  for (auto& [k, v] : f) {
    if (k == key) v = value;
  }
  return f;
}

fields without(const std::string& key) {
  fields f = sound;
  std::erase_if(f, [&](const auto& e) { return e.first == key; });
  return f;
}

/// What is wrong with a config, or "" if nothing is; both validators must agree.
std::string finding(const std::string& json) {
  const auto found = gdn::validate_config(json);
  try {
    gdn::dims_from_config(json);
  } catch (const gdn::metadata_error& e) {
    EXPECT_EQ(found ? found->text : "", e.what());
    return e.what();
  }
  EXPECT_FALSE(found);
  return "";
}

TEST(config, GivesTheSizesOfTheLayer) {
  const gdn::layer_config c = gdn::dims_from_config(object(sound));
  const gdn::layer_dims want{.hidden = 64, .key_heads = 2, .value_heads = 6, .key_dim = 16, .value_dim = 24};
  EXPECT_EQ(c.dims, want);
  EXPECT_EQ(c.ssm, gdn::dtype::bf16);
}

TEST(config, SsmDtypeIsFloat32IfAbsent) {
  EXPECT_EQ(gdn::dims_from_config(object(without("mamba_ssm_dtype"))).ssm, gdn::dtype::f32);
}

TEST(config, SwishIsSilu) {
  EXPECT_EQ(finding(object(with("hidden_act", "\"swish\""))), "");
}

TEST(config, UnknownKeysAreIgnored) {
  fields f = sound;
  f.insert(f.begin(), {"rope", R"({"hidden_size": "x", "a": [1, {"b": null}]})"});
  f.push_back({"text_config", "\"none\""});
  f.push_back({"\\u00fc", "true"});
  EXPECT_EQ(finding(object(f)), "");
}

TEST(config, TextConfigOfAVisionLanguageModelIsRead) {
  const std::string nested = R"({"model_type": "qwen3_5", "hidden_size": 7, "text_config": )" + object(sound) + "}";
  EXPECT_EQ(gdn::dims_from_config(nested).dims.hidden, 64);
  EXPECT_THAT(finding(R"({"text_config": )" + object(without("hidden_act")) + "}"), HasSubstr("hidden_act"));
}

TEST(config, FlatKeysComeBeforeTextConfig) {
  fields f = sound;
  f.push_back({"text_config", object(with("hidden_size", "128"))});
  EXPECT_EQ(gdn::dims_from_config(object(f)).dims.hidden, 64);
}

TEST(config, RejectsMissingKeys) {
  for (const auto& [key, value] : sound) {
    if (key == "mamba_ssm_dtype") continue;
    EXPECT_THAT(finding(object(without(key))), HasSubstr("no " + key));
  }
  EXPECT_NE(finding("{}"), "");
}

TEST(config, RejectsSizesThatAreNoIntegersOfAtLeastOne) {
  for (const auto& [key, sane] : sound) {
    if (key.starts_with("rms") || key == "hidden_act" || key == "mamba_ssm_dtype") continue;
    for (const char* value : {"0", "-1", "-9223372036854775808", "1.5", "2.0", "1e3", "\"2\"", "true", "null", "[2]",
                              "{}", "9223372036854775808", "18446744073709551615", "1e400", "16777217"}) {
      EXPECT_THAT(finding(object(with(key, value))), HasSubstr(key)) << value;
    }
  }
}

TEST(config, RejectsHeadsThatDoNotDivide) {
  EXPECT_THAT(finding(object(with("linear_num_value_heads", "5"))), HasSubstr("linear_num_value_heads"));
  EXPECT_THAT(finding(object(with("linear_num_key_heads", "12"))), HasSubstr("linear_num_key_heads"));
}

TEST(config, RejectsEpsThatIsNotPositiveAndFinite) {
  for (const char* value : {"0", "0.0", "-1e-6", "1e999", "\"1e-6\"", "null", "true", "1e-400"}) {
    EXPECT_THAT(finding(object(with("rms_norm_eps", value))), HasSubstr("rms_norm_eps")) << value;
  }
  EXPECT_NE(finding(object(with("rms_norm_eps", "NaN"))), "");
  EXPECT_EQ(finding(object(with("rms_norm_eps", "1"))), "");
}

TEST(config, RejectsOtherActivationsAndSsmTypes) {
  for (const char* value : {"\"gelu\"", "\"SiLU\"", "\"\"", "1", "null", "[\"silu\"]"}) {
    EXPECT_THAT(finding(object(with("hidden_act", value))), HasSubstr("hidden_act"));
  }
  for (const char* value : {"\"int8\"", "\"float\xc3\xbc\"", "\"\"", "32", "null", "[\"float32\"]"}) {
    EXPECT_THAT(finding(object(with("mamba_ssm_dtype", value))), HasSubstr("mamba_ssm_dtype"));
  }
}

TEST(config, RejectsWhatIsNoJsonObject) {
  for (const std::string& text :
       {std::string(), std::string("null"), std::string("8"), std::string("[]"), std::string("\"x\""),
        object(sound) + "}", object(sound).substr(1), std::string("{\"a\":\"\xff\"}"), std::string(100'000, '['),
        object(sound) + std::string("\0{", 2), "\xef\xbb\xbf" + object(sound).substr(0, 5)}) {
    const std::string found = finding(text);
    EXPECT_THAT(found, HasSubstr("config"));
    EXPECT_LT(found.size(), 200U);
  }
}

TEST(config, RejectsKeysThatComeTwice) {
  fields f = sound;
  f.push_back({"hidden_size", "64"});
  EXPECT_THAT(finding(object(f)), HasSubstr("'hidden_size' twice"));
  EXPECT_THAT(finding(R"({"text_config": )" + object(f) + "}"), HasSubstr("'hidden_size' twice"));
}

}  // namespace
