// SPDX-License-Identifier: Apache-2.0
#include <plan/random_case.hpp>

#include <gtest/gtest.h>

#include <functional>
#include <set>

namespace {

using namespace gdn_test;

struct arguments {
  gdn::explicit_layout layout = explicit_of(gdn::zigzag_layout{16, 2});
  gdn::packing pack = gdn::packing::rows_of(2, 16);
  gdn::plan_shape shape;
  index_t channels = 7;
  gdn::plan_options options;

  gdn::cp_plan plan(int rank) const { return gdn::plan_context_parallel(layout, pack, shape, channels, options, rank); }
};

TEST(digest, IsEqualOnAllRanksAndInEveryRun) {
  const arguments a;
  EXPECT_EQ(a.plan(0).digest(), a.plan(1).digest());
  EXPECT_EQ(a.plan(0).digest(), arguments{}.plan(0).digest());
}

TEST(digest, DiffersWhereverTwoRanksMightDisagree) {
  const std::vector<std::function<void(arguments&)>> changes = {
      [](arguments& a) {
        a.layout = explicit_of(gdn::contiguous_layout{16, 2});
      },
      [](arguments& a) {
        a.layout = explicit_of(gdn::zigzag_layout{16, 4});
      },
      [](arguments& a) { a.layout.world = 3; },  // a rank more, without rows
      [](arguments& a) { std::swap(a.layout.table[0].local, a.layout.table[3].local); },
      [](arguments& a) { a.pack = gdn::packing::rows_of(1, 16); },
      [](arguments& a) { a.pack = gdn::packing::rows_of(3, 16); },
      [](arguments& a) {
        a.pack.cu_seqlens = {0, 32};
      },
      [](arguments& a) {
        a.pack.cu_seqlens = {0, 15, 32};
      },
      [](arguments& a) {
        a.pack.cu_seqlens = {0, 16, 16, 32};
      },
      [](arguments& a) {
        a.pack.cu_seqlens = {0, 0, 16, 32};
      },
      [](arguments& a) {
        a.pack.cu_seqlens = {0, 16, 32, 32};
      },
      [](arguments& a) {
        a.pack = gdn::packing::from_lengths(std::vector<index_t>{15, 16}, 16);
      },
      [](arguments& a) {
        a.pack = gdn::packing::from_lengths(std::vector<index_t>{16, 15}, 16);
      },
      [](arguments& a) {
        std::vector<index_t> mask(32, 1);  // the same lengths as above, with the padding on the left
        mask[0] = 0;
        a.pack = gdn::packing::from_mask(mask, 2, 16);
      },
      [](arguments& a) { a.shape.conv_width = 3; },
      [](arguments& a) { a.shape.chunk = 32; },
      [](arguments& a) { a.shape.hidden = 9; },
      [](arguments& a) { a.shape.summary.heads = 2; },
      [](arguments& a) { a.shape.summary.key_dim = 2; },
      [](arguments& a) { a.shape.summary.value_dim = 2; },
      [](arguments& a) { a.channels = 8; },
      [](arguments& a) { a.options.strategy = gdn::strategy::in_place; },
      [](arguments& a) { a.options.share = gdn::share::prefix_scan; },
      [](arguments& a) { a.options.share = gdn::share::relay; },
      [](arguments& a) { a.options.initial_state = true; },
      [](arguments& a) { a.options.final_state = true; },
  };
  std::set<std::uint64_t> digests = {arguments{}.plan(0).digest()};
  for (std::size_t i = 0; i < changes.size(); ++i) {
    arguments a;
    changes[i](a);
    EXPECT_TRUE(digests.insert(a.plan(0).digest()).second) << "change " << i;
    EXPECT_EQ(a.plan(0).digest(), a.plan(1).digest()) << "change " << i;
  }
}

TEST(digest, OfManyRandomBatchesNeverCollides) {
  std::set<std::uint64_t> digests;
  std::set<std::string> distinct;
  for (std::uint64_t n = 0; n < cases(5000); ++n) {
    random_source random(n);
    const plan_case c = any_case(random);
    std::string key = gdn::say(c.world, c.pack.batch, c.pack.row_length, c.shape.conv_width, c.shape.chunk,
                               c.shape.summary.heads, c.shape.summary.key_dim, c.shape.summary.value_dim, c.shape.hidden,
                               "|");
    for (const gdn::fragment& f : c.rows) key += gdn::say(f.begin, f.count, f.rank, f.local, "");
    for (const gdn::token_run& r : c.pack.runs) key += gdn::say("r", r.row, r.token, r.count);
    for (const index_t v : c.pack.cu_seqlens) key += gdn::say("c", v);
    distinct.insert(key);
    digests.insert(c.plan({}, 0).digest());
  }
  EXPECT_EQ(digests.size(), distinct.size());
}

}  // namespace
