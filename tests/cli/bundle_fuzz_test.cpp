// SPDX-License-Identifier: Apache-2.0
#include "run_layer/bundle.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/plan/fragment.hpp>

#include "cli/sample.hpp"
#include "io/files.hpp"

namespace {

using namespace gdn_run;

std::uint64_t seed() {
  const char* given = std::getenv("GDN_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 20240608;
}

/// Everything that a bundle may have, where it fits together.
gdn_test::sample full_sample(bool packed) {
  gdn_test::sample s;
  const index_t n = packed ? 3 : 2;
  if (packed) s.integers("attention_mask", {2, 8}, {1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1});
  s.integers("seq_index", {2, 4}, {0, 1, 6, 7, 2, 3, 4, 5});
  for (const char* name : {"grad_output", "expected.output", "expected.grad.hidden_states"}) s.floats(name, {2, 8, 4});
  for (const char* name : {"initial_state", "grad_recurrent_state", "expected.recurrent_state"}) {
    s.floats(name, {n, 2, 2, 2});
  }
  for (const char* name : {"initial_conv_state", "grad_conv_state", "expected.conv_state"}) s.floats(name, {n, 8, 3});
  if (!packed) {
    s.floats("decode.hidden_states", {2, 2, 4});
    s.floats("expected.decode.output", {2, 2, 4});
  }
  return s;
}

TEST(bundle_fuzz, MutatedBundlesAreLoadedOrRefusedByName) {
  std::cout << "GDN_TEST_SEED=" << seed() << "\n";
  std::mt19937_64 random(seed());
  const gdn_test::temporary_directory dir;
  const std::string path = dir.path("b");
  int accepted = 0;
  for (const bool packed : {false, true}) {
    full_sample(packed).write(path);
    const std::string sound = gdn_test::read_file(path);
    ASSERT_NO_THROW(load_bundle(path));
    for (int i = 0; i < 6'000; ++i) {
      SCOPED_TRACE(::testing::Message() << "case " << i << " of seed " << seed());
      dir.write("b", gdn_test::mutate(sound, random));
      try {
        const bundle b = load_bundle(path);
        ++accepted;
        options o;
        o.ranks = 1 + static_cast<int>(random() % 4);
        o.layout = static_cast<layout_kind>(random() % 5);
        gdn::fragment_table t = make_layout_table(o, b);
        std::sort(t.begin(), t.end(), [](const auto& x, const auto& y) { return x.begin < y.begin; });
        ASSERT_FALSE(gdn::validate_fragments(t, b.packing.rows(), o.ranks));
      } catch (const gdn::metadata_error& e) {
        ASSERT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      }
    }
  }
  EXPECT_GT(accepted, 100);
}

TEST(bundle_fuzz, RandomMasksAndBoundariesAreLoadedOrRefusedByName) {
  std::mt19937_64 random(seed());
  const gdn_test::temporary_directory dir;
  const std::string path = dir.path("b");
  int accepted = 0;
  for (int i = 0; i < 1'000; ++i) {
    SCOPED_TRACE(::testing::Message() << "case " << i << " of seed " << seed());
    gdn_test::sample s;
    const index_t extremes[] = {-1, INT64_MIN, INT64_MAX, 8, 9, 16};
    index_t last = 0;
    const auto next = [&]() -> index_t {
      if (random() % 40 == 0) return extremes[random() % std::size(extremes)];
      return random() % 5 == 0 ? 0 : last += static_cast<index_t>(random() % 4 == 0);
    };
    if (i % 2 == 0) {
      std::vector<index_t> ids;
      for (int k = 0; k < 16; ++k) {
        if (k % 8 == 0) last = 1;
        ids.push_back(next());
      }
      s.integers("attention_mask", {2, 8}, ids);
    } else {
      s.floats("hidden_states", {1, 8, 4});
      std::vector<index_t> cu(1 + random() % 6);
      for (index_t& c : cu) c = next();
      if (random() % 4 != 0) cu.front() = 0;
      if (random() % 4 != 0) cu.back() = 8;
      s.integers("cu_seqlens", {static_cast<index_t>(cu.size())}, cu);
    }
    s.write(path);
    try {
      const bundle b = load_bundle(path);
      ++accepted;
      EXPECT_EQ(b.packing.indices().size(), static_cast<std::size_t>(b.packing.tokens()));
      options o;
      o.layout = layout_kind::zigzag_documents;
      make_layout_table(o, b);
    } catch (const gdn::metadata_error&) {
    }
  }
  EXPECT_GT(accepted, 50);
}

}  // namespace
