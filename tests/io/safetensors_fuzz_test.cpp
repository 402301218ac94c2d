// SPDX-License-Identifier: Apache-2.0
#include <gdn/io/safetensors.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/files.hpp"

namespace {

using gdn_test::bytes_of;

std::uint64_t seed() {
  const char* given = std::getenv("GDN_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 20240607;
}

/// A small sound file with most of what a header can have.
std::string sound_file() {
  return gdn_test::file_with(
      R"({"__metadata__":{"config":"{\"a\": 1}","peer":"p\u00fc"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("ids":{"dtype":"I64","shape":[2],"data_offsets":[24,40]},"h":{"dtype":"BF16","shape":[1,2,2],"data_offsets":[40,48]},)"
      R"("m":{"dtype":"BOOL","shape":[3],"data_offsets":[48,51]},"none":{"dtype":"F64","shape":[0,4],"data_offsets":[51,51]},)"
      R"("x":{"extra":[{"shape":null}],"dtype":"U8","shape":[],"data_offsets":[51,52]}}  )",
      std::string(52, '\3'));
}

/// The laws of an accepted file: its tensors tile the data in some order.
void expect_tiling(const gdn::safetensors& s, std::span<const std::byte> file) {
  std::size_t total = 0;
  for (const gdn::tensor_entry& t : s.tensors) {
    total += t.bytes.size();
    ASSERT_EQ(static_cast<gdn::index_t>(t.bytes.size()) * 8, t.size() * gdn::bits_of(t.type));
    if (t.bytes.empty()) continue;
    ASSERT_GE(t.bytes.data(), file.data() + 8);
    ASSERT_LE(t.bytes.data() + t.bytes.size(), file.data() + file.size());
    ASSERT_EQ(s.find(t.name), &t);
  }
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  ASSERT_EQ(total, file.size() - 8 - length);
}

TEST(safetensors_fuzz, MutatedFilesAreReadOrRefusedAndBothValidatorsAgree) {
  const std::string sound = sound_file();
  ASSERT_FALSE(gdn::validate_safetensors(bytes_of(sound)));
  std::cout << "GDN_TEST_SEED=" << seed() << "\n";
  std::mt19937_64 random(seed());
  int accepted = 0;
  for (int i = 0; i < 40'000; ++i) {
    std::string file = sound;
    for (int n = static_cast<int>(random() % 3); n >= 0; --n) file = gdn_test::mutate(std::move(file), random);
    const std::vector<char> copy(file.begin(),
                                 file.end());  // no terminator behind it: a sanitizer sees one step too far
    const auto bytes = std::as_bytes(std::span(copy));
    SCOPED_TRACE(::testing::Message() << "case " << i << " of seed " << seed());
    const std::optional<gdn::diagnostic> found = gdn::validate_safetensors(bytes);
    try {
      const gdn::safetensors s = gdn::parse_safetensors(bytes);
      ASSERT_FALSE(found) << found->text;
      expect_tiling(s, bytes);
      ++accepted;
    } catch (const gdn::metadata_error& e) {
      ASSERT_TRUE(found) << e.what();
      ASSERT_EQ(found->text, e.what());
      ASSERT_EQ(found->text.find('\n'), std::string::npos);
    }
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(accepted, 100);  // other names and values leave a file sound
}

TEST(safetensors_fuzz, EveryPrefixOfAFileIsRefused) {
  const std::string sound = sound_file();
  for (std::size_t n = 0; n < sound.size(); ++n) {
    const std::vector<char> prefix(sound.begin(), sound.begin() + static_cast<std::ptrdiff_t>(n));
    EXPECT_TRUE(gdn::validate_safetensors(std::as_bytes(std::span(prefix)))) << n;
  }
}

TEST(safetensors_fuzz, RandomBytesAreRefused) {
  std::mt19937_64 random(seed());
  for (int i = 0; i < 2'000; ++i) {
    std::vector<char> bytes(random() % 200);
    for (char& b : bytes) b = static_cast<char>(random());
    if (bytes.size() > 9 && i % 2 == 0) {  // a header that begins well
      const std::uint64_t length = 1 + random() % (bytes.size() - 8);
      std::memcpy(bytes.data(), &length, 8);
      bytes[8] = '{';
    }
    EXPECT_TRUE(gdn::validate_safetensors(std::as_bytes(std::span(bytes)))) << "case " << i << " of seed " << seed();
  }
}

}  // namespace
