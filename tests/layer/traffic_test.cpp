// SPDX-License-Identifier: Apache-2.0
// Bytes that ranks receive, counted by a communicator of the tests (the laws compare them with the plan's prediction).
#include <plan/random_case.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

gdn::layer_dims dims_of(index_t hidden) {
  return {.hidden = hidden, .key_heads = 1, .value_heads = 2, .key_dim = 3, .value_dim = 2, .conv_width = 4};
}

struct received {
  std::vector<index_t> forward, backward;  // bytes of each rank
};
template <class T>
received count(index_t hidden, const gdn::packing& pack, const auto& layout, gdn::plan_options options) {
  random_source random(41);
  const layer_batch b = random_batch(random, dims_of(hidden), pack);
  const layer_result r = run_layer<T>(b, spread_over(layout, b, options));
  received out;
  for (const auto& m : r.forward_messages) out.forward.push_back(m.bytes_received);
  for (const auto& m : r.backward_messages) out.backward.push_back(m.bytes_received);
  return out;
}

/// Bytes of activations alone: those that grow with hid.
template <class T>
received activations(const gdn::packing& pack, const auto& layout, gdn::plan_options options) {
  const received narrow = count<T>(1, pack, layout, options), wide = count<T>(4, pack, layout, options);
  received out = wide;
  for (std::size_t r = 0; r < wide.forward.size(); ++r) {
    out.forward[r] = (wide.forward[r] - narrow.forward[r]) / 3;
    out.backward[r] = (wide.backward[r] - narrow.backward[r]) / 3;
  }
  return out;
}

TEST(layer_traffic, ZigzagReshardsAtMostTwiceItsRowsPerPass) {
  for (int world = 2; world <= 8; ++world) {
    const index_t L = 6;
    const auto pack = gdn::packing::rows_of(2, L * world);
    const received bytes = activations<float>(pack, gdn::zigzag_layout{L * world, world}, {gdn::strategy::reshard});
    for (const auto& pass : {bytes.forward, bytes.backward}) {
      for (const index_t b : pass) {
        EXPECT_LE(b, 2 * 2 * L * 4);  // 2 L rows of two batch rows, hid 1, fp32
        EXPECT_GT(b, 0);
      }
    }
  }
}

TEST(layer_traffic, InPlaceMovesNoActivations) {
  for (int world = 2; world <= 8; ++world) {
    for (const auto share : shares) {
      const auto pack = gdn::packing::rows_of(1, 6 * world);
      const received zigzag = activations<double>(pack, gdn::zigzag_layout{6 * world, world}, {gdn::strategy::in_place, share});
      EXPECT_EQ(zigzag.forward, std::vector<index_t>(static_cast<std::size_t>(world), 0));
      EXPECT_EQ(zigzag.backward, zigzag.forward);
    }
  }
}

TEST(layer_traffic, ContiguousMovesNoActivationsEitherWay) {
  for (const auto strategy : strategies) {
    const received r = activations<double>(gdn::packing::rows_of(1, 24), gdn::contiguous_layout{24, 4}, {strategy});
    EXPECT_EQ(r.forward, std::vector<index_t>(4, 0));
    EXPECT_EQ(r.backward, r.forward);
  }
}

TEST(layer_traffic, DocumentsWithinRanksSendNothingAtAll) {
  const std::vector<index_t> cu = {0, 1, 4, 8, 8, 11, 12, 16};
  const auto pack = gdn::packing::from_cu_seqlens(cu, {}, 1, 16);
  for (const auto strategy : strategies) {
    for (const auto share : shares) {
      for (const bool states : {false, true}) {
        random_source random(42);
        const layer_batch b = random_batch(random, dims_of(3), pack);
        const layer_result r =
            run_layer<double>(b, spread_over(gdn::contiguous_layout{16, 4}, b, {strategy, share, states, states}));
        for (const auto& m : r.forward_messages) EXPECT_EQ(m, message_counts{});
        for (const auto& m : r.backward_messages) EXPECT_EQ(m, message_counts{});
      }
    }
  }
}

TEST(layer_traffic, AllRowsOfABatchShareTheirMessages) {
  const auto messages = [](index_t batch) {
    random_source random(43);
    const layer_batch b = random_batch(random, dims_of(3), gdn::packing::rows_of(batch, 16));
    return run_layer<double>(b, spread_over(gdn::contiguous_layout{16, 4}, b, {gdn::strategy::in_place, gdn::share::relay}));
  };
  const layer_result one = messages(1), three = messages(3);
  for (std::size_t r = 0; r < 4; ++r) {
    EXPECT_LE(three.forward_messages[r].exchanges, one.forward_messages[r].exchanges + 1) << "rank " << r;
    EXPECT_EQ(one.forward_messages[0].messages_received, 0);
    EXPECT_GT(three.forward_messages[r].bytes_received, one.forward_messages[r].bytes_received - 1);
  }
}

TEST(layer_traffic, MoreSharingMovesMoreBytesOverEightRanks) {
  const auto total = [](gdn::share share) {
    const received r = count<double>(2, gdn::packing::rows_of(1, 64), gdn::contiguous_layout{64, 8},
                                     {gdn::strategy::in_place, share});
    return std::accumulate(r.forward.begin(), r.forward.end(), index_t{0});
  };
  EXPECT_LT(total(gdn::share::relay), total(gdn::share::prefix_scan));
  EXPECT_LT(total(gdn::share::prefix_scan), total(gdn::share::all_gather));
}

}  // namespace
}  // namespace gdn_test
