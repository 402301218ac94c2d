// SPDX-License-Identifier: Apache-2.0
#include <gdn/io/safetensors.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "io/files.hpp"

namespace {

using gdn::index_t;
using gdn_test::bytes_of;
using gdn_test::file_with;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// What is wrong with a file, or "" if nothing is; both validators must agree.
std::string finding(const std::string& file) {
  const auto found = gdn::validate_safetensors(bytes_of(file));
  try {
    gdn::parse_safetensors(bytes_of(file));
  } catch (const gdn::metadata_error& e) {
    EXPECT_TRUE(found);
    EXPECT_EQ(found ? found->text : "", e.what());
    return e.what();
  }
  EXPECT_FALSE(found);
  return "";
}

/// A file of `a`, two floats, with its entry spelt by the test.
std::string entry(const std::string& text, std::size_t bytes = 8) {
  return file_with(R"({"a":)" + text + "}", std::string(bytes, '\1'));
}

TEST(safetensors, ReadsTensorsAndMetadata) {
  const std::string file = file_with(
      R"({"__metadata__":{"k":"v","e":""},"b":{"dtype":"I64","shape":[],"data_offsets":[8,16]},)"
      R"("a":{"shape":[1,2],"data_offsets":[0,8],"dtype":"F32"},"zero":{"dtype":"BOOL","shape":[3,0],"data_offsets":[8,8]}}   )",
      std::string(16, '\1'));
  const gdn::safetensors s = gdn::parse_safetensors(bytes_of(file));
  ASSERT_EQ(s.tensors.size(), 3U);
  EXPECT_EQ(s.metadata.at("k"), "v");
  const gdn::tensor_entry* a = s.find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->type, gdn::dtype::f32);
  EXPECT_THAT(a->shape, ElementsAre(1, 2));
  EXPECT_EQ(a->size(), 2);
  EXPECT_EQ(a->bytes.data(), bytes_of(file).data() + file.size() - 16);
  EXPECT_EQ(s.find("b")->size(), 1);
  EXPECT_EQ(s.find("zero")->size(), 0);
  EXPECT_EQ(s.find("c"), nullptr);
  EXPECT_EQ(s.find(""), nullptr);
}

TEST(safetensors, FileWithoutTensorsIsSound) {
  EXPECT_EQ(finding(file_with("{}", "")), "");
  EXPECT_EQ(finding(file_with(R"({"__metadata__":{}})", "")), "");
}

TEST(safetensors, IgnoresUnknownKeysOfATensorWithAllTheyHold) {
  EXPECT_EQ(finding(entry(R"({"x":{"shape":[{}],"dtype":1},"dtype":"F32","y":[[1,{"z":null}]],"shape":[2],)"
                          R"("w":-1.5,"data_offsets":[0,8]})")),
            "");
}

TEST(safetensors, KnowsTheSizeOfEveryDtype) {
  for (const gdn::dtype_info& d : gdn::dtypes) {
    const std::size_t bytes = static_cast<std::size_t>(d.bits);  // of 8 elements
    const std::string name(d.name);
    EXPECT_EQ(
        finding(entry(R"({"dtype":")" + name + R"(","shape":[2,4],"data_offsets":[0,)" + std::to_string(bytes) + "]}",
                      bytes)),
        "")
        << name;
  }
}

TEST(safetensors, RejectsLengthsThatLeaveTheFile) {
  EXPECT_THAT(finding(""), HasSubstr("0 bytes"));
  EXPECT_THAT(finding("1234567"), HasSubstr("7 bytes"));
  std::string file = entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})");
  ASSERT_EQ(finding(file), "");
  for (const std::uint64_t length :
       {std::uint64_t{file.size()}, std::uint64_t{file.size() - 7}, ~std::uint64_t{0}, std::uint64_t{1} << 63}) {
    std::memcpy(file.data(), &length, 8);
    EXPECT_THAT(finding(file), HasSubstr(std::to_string(length)));
  }
}

TEST(safetensors, RejectsHeadersAboveTheLimitOfTheFormat) {
  EXPECT_THAT(finding(file_with(std::string(100'000'001, ' '), "")), HasSubstr("at most 100000000"));
}

TEST(safetensors, RejectsWhatIsNoJsonObject) {
  for (const char* header : {"", " {}", "[]", "1", "null", "{", "{}}", "{} x", "{\"a\"}", "{a:1}", "{'a':1}", "{,}",
                             "{\"__metadata__\":{},}", "\xef\xbb\xbf{}", "{}//", "{\"a\":\"\n\"}", "{\"a\":+1}"}) {
    EXPECT_THAT(finding(file_with(header, "")), HasSubstr("header")) << header;
  }
  EXPECT_THAT(finding(file_with(std::string("{}\0", 3), "")), HasSubstr("byte 2"));
  EXPECT_THAT(finding(file_with(std::string("{}\0 junk", 8), "")), HasSubstr("byte 2"));
}

TEST(safetensors, RejectsDeepNestingWithoutDeepRecursion) {
  EXPECT_NE(finding(file_with("{\"a\":" + std::string(1'000'000, '['), "")), "");
  std::string deep = R"({"a":{"x":)";
  for (int i = 0; i < 200'000; ++i) deep += R"({"x":)";
  EXPECT_NE(finding(file_with(deep, "")), "");
  const std::string arrays = std::string(200'000, '[') + std::string(200'000, ']');
  EXPECT_EQ(finding(entry(R"({"x":)" + arrays + R"(,"dtype":"F32","shape":[2],"data_offsets":[0,8]})")), "");
}

TEST(safetensors, RejectsWhatIsNoUtf8) {
  const std::string e = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const auto named = [&](const std::string& name) {
    return finding(file_with("{\"" + name + "\":" + e + "}", std::string(8, '\1')));
  };
  for (const char* good : {"\xc2\x80", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xef\xbf\xbf", "\xf0\x90\x80\x80",
                           "\xf4\x8f\xbf\xbf", "\\u00fc", "\\ud83d\\ude00"}) {
    EXPECT_EQ(named(good), "") << good;
  }
  for (const char* bad : {"\x80", "\xff", "\xc0\x80", "\xc1\xbf", "\xc2", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xe2\x82",
                          "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\\ud800", "\\x"}) {
    EXPECT_NE(named(bad), "") << bad;
  }
}

TEST(safetensors, RejectsNamesThatComeTwice) {
  const std::string e = R"({"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  EXPECT_THAT(finding(file_with("{\"a\":" + e + ",\"a\":" + e + "}", "")), HasSubstr("'a' comes twice"));
  EXPECT_THAT(finding(file_with("{\"a\":" + e + ",\"\\u0061\":" + e + "}", "")), HasSubstr("'a' comes twice"));
  EXPECT_THAT(finding(file_with(R"({"__metadata__":{},"__metadata__":{}})", "")), HasSubstr("twice"));
  EXPECT_THAT(finding(file_with(R"({"__metadata__":{"x":"1","x":"2"}})", "")), HasSubstr("'x' twice"));
  EXPECT_THAT(finding(entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"dtype":"F32"})")),
              HasSubstr("'dtype' twice"));
}

TEST(safetensors, RejectsMetadataThatIsNoText) {
  for (const char* value : {"1", "null", "true", "{}", "[]", "1.5", "-1"}) {
    EXPECT_THAT(finding(file_with(std::string(R"({"__metadata__":{"k":)") + value + "}}", "")), HasSubstr("'k'"));
    EXPECT_THAT(
        finding(file_with(std::string(R"({"__metadata__":)") + (value == std::string("{}") ? "1" : value) + "}", "")),
        HasSubstr("__metadata__"));
  }
}

TEST(safetensors, RejectsEntriesThatAreNoTensors) {
  for (const char* text :
       {"1", "null", "true", "[]", "\"F32\"", "{}", R"({"dtype":"F32","shape":[2]})",
        R"({"dtype":"F32","data_offsets":[0,8]})", R"({"shape":[2],"data_offsets":[0,8]})",
        R"({"dtype":1,"shape":[2],"data_offsets":[0,8]})", R"({"dtype":["F32"],"shape":[2],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})", R"({"dtype":"F32","shape":{},"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[[2]],"data_offsets":[0,8]})", R"({"dtype":"F32","shape":[2],"data_offsets":8})",
        R"({"dtype":"F32","shape":[2],"data_offsets":[0]})", R"({"dtype":"F32","shape":[2],"data_offsets":[0,4,8]})"}) {
    EXPECT_THAT(finding(entry(text)), HasSubstr("tensor 'a'")) << text;
  }
}

TEST(safetensors, RejectsUnknownDtypes) {
  for (const char* dtype : {"F31", "f32", "", "float32", "F32 "}) {
    EXPECT_THAT(finding(entry(std::string(R"({"dtype":")") + dtype + R"(","shape":[2],"data_offsets":[0,8]})")),
                HasSubstr("unknown dtype"));
  }
}

TEST(safetensors, RejectsExtentsThatAreNoCounts) {
  for (const char* extent :
       {"-1", "-0", "2.0", "1e0", "\"2\"", "true", "null", "9223372036854775808", "18446744073709551616", "1e999"}) {
    EXPECT_NE(finding(entry(std::string(R"({"dtype":"F32","shape":[)") + extent + R"(],"data_offsets":[0,8]})")), "")
        << extent;
  }
  std::string axes = "1";
  for (int i = 0; i < 64; ++i) axes += ",1";
  EXPECT_THAT(finding(entry(R"({"dtype":"F64","shape":[)" + axes + R"(],"data_offsets":[0,8]})")),
              HasSubstr("64 axes"));
}

TEST(safetensors, RejectsSizesThatOverflow) {
  for (const char* shape : {"4294967296,4294967296", "9223372036854775807", "4611686018427387906",
                            "0,9223372036854775807,2", "9223372036854775807,2,0"}) {
    EXPECT_THAT(finding(entry(std::string(R"({"dtype":"F32","shape":[)") + shape + R"(],"data_offsets":[0,8]})")),
                HasSubstr("overflows"))
        << shape;
  }
}

TEST(safetensors, RejectsElementsThatLeaveAByteHalfEmpty) {
  EXPECT_NE(finding(entry(R"({"dtype":"F4","shape":[3],"data_offsets":[0,1]})", 1)), "");
  EXPECT_NE(finding(entry(R"({"dtype":"F4","shape":[3],"data_offsets":[0,2]})", 2)), "");
}

TEST(safetensors, RejectsOffsetsThatDoNotFit) {
  const auto at = [](const std::string& offsets, const std::string& shape = "2") {
    return finding(entry(R"({"dtype":"F32","shape":[)" + shape + R"(],"data_offsets":[)" + offsets + "]}"));
  };
  EXPECT_EQ(at("0,8"), "");
  EXPECT_THAT(at("8,0"), HasSubstr("must not decrease"));
  EXPECT_THAT(at("0,12", "3"), HasSubstr("ends at byte 12"));
  EXPECT_THAT(at("0,8", "1"), HasSubstr("has 8 bytes"));
  EXPECT_THAT(at("4,8", "1"), HasSubstr("belong to no tensor"));
  EXPECT_THAT(at("0,4", "1"), HasSubstr("end at byte 4"));
  EXPECT_NE(at("-8,0"), "");
  EXPECT_NE(at("0.0,8.0"), "");
  EXPECT_NE(at("18446744073709551608,0"), "");
  EXPECT_NE(at("9223372036854775800,9223372036854775807"), "");
}

TEST(safetensors, RejectsOverlapsAndHoles) {
  const auto two = [](const char* a, const char* b) {
    return finding(file_with(std::string(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[)") + a +
                                 R"(]},"b":{"dtype":"F32","shape":[2],"data_offsets":[)" + b + "]}}",
                             std::string(16, '\1')));
  };
  EXPECT_EQ(two("0,8", "8,16"), "");
  EXPECT_EQ(two("8,16", "0,8"), "");
  EXPECT_THAT(two("0,8", "0,8"), HasSubstr("overlap"));
  EXPECT_THAT(two("0,8", "4,12"), HasSubstr("overlap"));
  const std::string inside = file_with(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                       R"("b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}})",
                                       std::string(8, '\1'));
  EXPECT_THAT(finding(inside), HasSubstr("overlap"));
  const std::string hole = file_with(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                     R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
                                     std::string(12, '\1'));
  EXPECT_THAT(finding(hole), HasSubstr("'b' begins at byte 8 of the data, 4 was due"));
}

TEST(safetensors, MessagesStayOnOneLineWhateverTheNames) {
  const std::string name = "x\\n" + std::string(5000, 'y');
  const std::string text = finding(file_with("{\"" + name + "\":1}", ""));
  EXPECT_EQ(text.find('\n'), std::string::npos);
  EXPECT_LT(text.size(), 300U);
}

TEST(open_safetensors, NamesTheFile) {
  const gdn_test::temporary_directory dir;
  const std::string path = dir.write("broken.safetensors", "12345678");
  try {
    gdn::open_safetensors(path);
    FAIL();
  } catch (const gdn::metadata_error& e) {
    EXPECT_THAT(e.what(), HasSubstr(path + ": the header has"));
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

template <class T>
gdn::tensor_entry tensor_of(gdn::dtype type, const std::vector<T>& values) {
  return {"t", type, {static_cast<index_t>(values.size())}, std::as_bytes(std::span(values))};
}

TEST(values_of, FloatsAreReadExactlyFromEveryFloatingType) {
  const double third = 1.0 / 3;
  EXPECT_THAT(gdn::values_of<double>(tensor_of<double>(gdn::dtype::f64, {third, -0.0, 5e-324})),
              ElementsAre(third, -0.0, 5e-324));
  EXPECT_THAT(gdn::values_of<double>(tensor_of<float>(gdn::dtype::f32, {0.1F})), ElementsAre(double{0.1F}));
  EXPECT_THAT(gdn::values_of<float>(tensor_of<double>(gdn::dtype::f64, {third})), ElementsAre(1.0F / 3));
  EXPECT_THAT(gdn::values_of<float>(tensor_of<std::uint16_t>(gdn::dtype::bf16, {0x3fc0, 0x0001})),
              ElementsAre(1.5F, 0x1p-133F));
  EXPECT_THAT(gdn::values_of<double>(tensor_of<std::uint16_t>(gdn::dtype::f16, {0x3e00, 0x0001, 0xfc00})),
              ElementsAre(1.5, 0x1p-24, -std::numeric_limits<double>::infinity()));
}

TEST(values_of, IntegersAreReadFromBothIndexTypes) {
  constexpr index_t large = std::numeric_limits<index_t>::min();
  EXPECT_THAT(gdn::values_of<index_t>(tensor_of<std::int64_t>(gdn::dtype::i64, {large, 7})), ElementsAre(large, 7));
  EXPECT_THAT(gdn::values_of<index_t>(tensor_of<std::int32_t>(gdn::dtype::i32, {-7, 7})), ElementsAre(-7, 7));
}

TEST(values_of, BytesMayLieAtAnyAddress) {
  std::vector<std::byte> block(1 + 2 * sizeof(double));
  const double values[] = {1.25, -2.5};
  std::memcpy(block.data() + 1, values, sizeof values);
  const gdn::tensor_entry t{"t", gdn::dtype::f64, {2}, std::span(block).subspan(1)};
  EXPECT_THAT(gdn::values_of<double>(t), ElementsAre(1.25, -2.5));
}

TEST(values_of, RejectsOtherTypesByName) {
  const auto message = [](auto&& read) -> std::string {
    try {
      read();
    } catch (const gdn::metadata_error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(message([] { gdn::values_of<double>(tensor_of<std::int64_t>(gdn::dtype::i64, {1})); }), HasSubstr("I64"));
  EXPECT_THAT(message([] { gdn::values_of<index_t>(tensor_of<float>(gdn::dtype::f32, {1})); }), HasSubstr("F32"));
  EXPECT_THAT(message([] { gdn::values_of<index_t>(tensor_of<char>(gdn::dtype::boolean, {1})); }), HasSubstr("BOOL"));
  EXPECT_THAT(message([] { gdn::values_of<float>(tensor_of<char>(gdn::dtype::f8_e4m3, {1})); }), HasSubstr("F8_E4M3"));
}

// ---- writing --------------------------------------------------------------------------------------------------------

std::string header_of(const std::string& file) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  return file.substr(8, length);
}

TEST(write_safetensors, WhatIsWrittenIsReadBack) {
  const gdn_test::temporary_directory dir;
  const std::vector<double> values = {1.0 / 3, -0.0, 1e300, std::nan(""), 1e-310};
  std::vector<gdn::tensor_entry> entries;
  std::vector<std::vector<std::byte>> bytes;
  for (const gdn::dtype type : {gdn::dtype::bf16, gdn::dtype::f64, gdn::dtype::f16, gdn::dtype::f32}) {
    bytes.push_back(gdn::encode(values, type));
    entries.push_back({"name \"" + std::string(gdn::name_of(type)) + "\"\n\xc3\xbc", type, {1, 5}, bytes.back()});
  }
  entries.push_back({"empty", gdn::dtype::f32, {0, 3}, {}});
  entries.push_back({"scalar", gdn::dtype::i64, {}, std::as_bytes(std::span("8 bytes.", 8))});
  gdn::write_safetensors(dir.path("f"), entries, {{"config", "{\"a\": 1}"}, {"peer", "\xe4\xb8\xad"}});

  const gdn::safetensors_file f = gdn::open_safetensors(dir.path("f"));
  EXPECT_EQ(f.content.metadata.at("config"), "{\"a\": 1}");
  ASSERT_EQ(f.tensors().size(), entries.size());
  for (const gdn::tensor_entry& t : entries) {
    const gdn::tensor_entry* read = f.find(t.name);
    ASSERT_NE(read, nullptr) << t.name;
    EXPECT_EQ(read->type, t.type);
    EXPECT_EQ(read->shape, t.shape);
    EXPECT_TRUE(std::equal(read->bytes.begin(), read->bytes.end(), t.bytes.begin(), t.bytes.end()));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(read->bytes.data()) % static_cast<unsigned>(gdn::bits_of(t.type) / 8),
              0U);
  }
  EXPECT_EQ(header_of(gdn_test::read_file(dir.path("f"))).size() % 8, 0U);
  EXPECT_EQ(dir.files(), 1U);
}

TEST(write_safetensors, EncodingRoundsEachValueOnce) {
  const std::vector<double> above_tie = {1 + 0x1p-8 + 0x1p-40};
  const auto bytes = gdn::encode(above_tie, gdn::dtype::bf16);
  EXPECT_THAT(gdn::values_of<double>({"t", gdn::dtype::bf16, {1}, bytes}), ElementsAre(1 + 0x1p-7));
}

TEST(write_safetensors, RefusesWhatItCouldNotReadAndLeavesNothing) {
  const gdn_test::temporary_directory dir;
  const std::vector<std::byte> eight(8);
  const std::string path = dir.path("f");
  using entries = std::vector<gdn::tensor_entry>;
  const auto refused = [&](const entries& e, const gdn::metadata_map& m = {}) {
    EXPECT_THROW(gdn::write_safetensors(path, e, m), gdn::metadata_error);
  };
  refused(entries{{"a", gdn::dtype::f32, {3}, eight}});
  refused(entries{{"a", gdn::dtype::f32, {2}, eight}, {"a", gdn::dtype::f64, {1}, eight}});
  refused(entries{{"__metadata__", gdn::dtype::f32, {2}, eight}});
  refused(entries{{"\xff", gdn::dtype::f32, {2}, eight}});
  refused(entries{{"a", gdn::dtype::f32, {2}, eight}}, {{"k", "\xff"}});
  EXPECT_EQ(dir.files(), 0U);
}

}  // namespace
