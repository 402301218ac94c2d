// SPDX-License-Identifier: Apache-2.0
// Prefill under context parallelism, states delivered into a pool, decode on the rank that has it.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/comm/threads.hpp>
#include <gdn/layer/reduce.hpp>
#include <serving/fixture.hpp>
#include <support/deadline.hpp>
#include <support/errors.hpp>

namespace gdn_test {
namespace {

using T = double;
constexpr index_t prompt = 64, more = 12;
const std::vector<index_t> cu = {0, 20, 21, 64};    // documents of 20, 1 and 43 tokens
const std::vector<std::int32_t> slots = {5, 0, 3};  // of the documents, in the pool of `home`
constexpr int world = 4, home = 2;

/// Document n of three: its prompt, then `more` tokens.
host_tensor<T, 2> document(index_t n) {
  random_source random(100 + static_cast<std::uint64_t>(n));
  return random_tensor<T, 2>(
      random, {cu[static_cast<std::size_t>(n) + 1] - cu[static_cast<std::size_t>(n)] + more, serving_dims.hidden});
}

/// The final states of a prefill on this rank, from its rows of the packed prompt, into `pool` on `home`.
template <class S>
void prefill_into(gdn::thread_communicator& comm, const gdn::gated_delta_net<T>& layer,
                  const gdn::state_pool<T, S>& pool, const gdn::plan_options& options, host_tensor<T, 2>& all_y) {
  const gdn::kokkos::backend<> be;
  const gdn::layer_dims& d = layer.dims;
  const gdn::zigzag_layout layout{prompt, world};
  const auto host =
      gdn::plan_layer(d, layout, gdn::packing::from_cu_seqlens(cu, {}, 1, prompt), options, comm.rank(), 8);
  host_block tables(gdn::resident_requirement<gdn::host_memory>(host));
  auto table_ws = tables.workspace();
  const auto plan = gdn::upload(be, host, table_ws, {});
  const auto mine = gdn::positions(layout, comm.rank());
  host_tensor<T, 2> x({host.caller_rows, d.hidden}), y({host.caller_rows, d.hidden});
  for (index_t i = 0; i < host.caller_rows; ++i) {
    const index_t at = mine[static_cast<std::size_t>(i)];
    const index_t n = gdn::document_of(cu, at);
    const auto rows = document(n);
    for (index_t j = 0; j < d.hidden; ++j) x(i, j) = rows(at - cu[static_cast<std::size_t>(n)], j);
  }
  const auto leaving = static_cast<index_t>(host.leaving.size());
  host_tensor<T, 4> recurrent({leaving, d.value_heads, d.key_dim, d.value_dim});
  host_tensor<T, 3> conv({leaving, d.channels(), d.conv_width});
  gdn::sequence_states<T> states;
  states.final_ = recurrent.ref();
  states.final_conv = conv.ref();

  const std::vector<int> targets(3, home);
  const auto need = std::max(gdn::requirements<T>(be, d, plan, gdn::keep_policy::nothing).forward.bytes,
                             gdn::pool_delivery_requirement<T>(d, host, targets).bytes);
  host_block scratch({need});
  auto ws = scratch.workspace();
  gdn::prefill(be, comm, layer, plan, x.ref(), y.ref(), states, ws, {});
  const bool here = comm.rank() == home;
  gdn::deliver_states<T>(be, comm, d, host, targets, {recurrent.ref(), conv.ref()},
                         here ? pool : gdn::state_pool<T, S>{},
                         here ? std::span<const std::int32_t>(slots) : std::span<const std::int32_t>(), ws, {});
  for (index_t i = 0; i < host.caller_rows; ++i) {
    for (index_t j = 0; j < d.hidden; ++j) all_y(mine[static_cast<std::size_t>(i)], j) = y(i, j);
  }
}

template <class S>
void check(gdn::state_order order, const gdn::plan_options& options, double limit) {
  const deadline end(std::chrono::seconds(60));
  const gdn::kokkos::backend<> be;
  const random_layer<T> layer(serving_dims);
  filled_pool<T, S> pool(serving_dims, 7, order), single(serving_dims, 7, order);

  host_tensor<T, 2> y({prompt, serving_dims.hidden});
  gdn::run_on_threads(world,
                      [&](gdn::thread_communicator& comm) { prefill_into(comm, layer.net, pool.views, options, y); });

  // The same on one rank: prefill of three new sequences, and then both go on, one token each.
  std::vector<gdn::sequence> prefill, decode;
  host_tensor<T, 2> x({prompt, serving_dims.hidden}), one(x);
  for (std::size_t n = 0; n < 3; ++n) {
    prefill.push_back({cu[n], cu[n + 1] - cu[n], slots[n], true});
    decode.push_back({static_cast<index_t>(n), 1, slots[n], false});
    const auto rows = document(static_cast<index_t>(n));
    for (index_t t = cu[n]; t < cu[n + 1]; ++t) {
      for (index_t j = 0; j < serving_dims.hidden; ++j) x(t, j) = rows(t - cu[n], j);
    }
  }
  serve_once(be, layer.net, single.views, prefill, x, one);
  worst_error prompts, tokens, states, convs, whole;
  for (index_t i = 0; i < y.size(); ++i) prompts.add(y.at(i), one.at(i));
  std::vector<alone_result<T>> want;
  for (index_t n = 0; n < 3; ++n) want.push_back(forward_alone(be, layer.net, document(n)));
  for (index_t t = 0; t < more; ++t) {
    host_tensor<T, 2> next({3, serving_dims.hidden}), a(next), b(next);
    for (std::size_t n = 0; n < 3; ++n) {
      const auto rows = document(static_cast<index_t>(n));
      for (index_t j = 0; j < serving_dims.hidden; ++j) next(n, j) = rows(cu[n + 1] - cu[n] + t, j);
    }
    serve_once(be, layer.net, pool.views, decode, next, a);
    serve_once(be, layer.net, single.views, decode, next, b);
    for (index_t i = 0; i < a.size(); ++i) tokens.add(a.at(i), b.at(i));
    for (std::size_t n = 0; n < 3; ++n) {
      for (index_t j = 0; j < serving_dims.hidden; ++j) whole.add(a(n, j), want[n].y(cu[n + 1] - cu[n] + t, j));
    }
  }
  for (std::size_t n = 0; n < 3; ++n) compare_state(pool.views, slots[n], want[n], states, convs);
  EXPECT_LE(prompts.value(), 1e-10);
  EXPECT_LE(tokens.value(), limit);
  EXPECT_LE(whole.value(), limit);
  EXPECT_LE(states.value(), limit);
  EXPECT_LE(convs.value(), 1e-10);
  EXPECT_TRUE(std::isnan(real(pool.views.recurrent(1, 0, 0, 0))));
}

TEST(delivery, PrefillOnFourRanksThenDecodeOnOneEqualsOneRank) {
  for (const auto order : {gdn::state_order::value_last, gdn::state_order::key_last}) {
    for (const auto how : {gdn::strategy::reshard, gdn::strategy::in_place}) {
      check<double>(order, {.strategy = how, .final_state = true}, 1e-10);
    }
  }
}

TEST(delivery, NarrowStatesAreRoundedWhereTheyArrive) {
  check<gdn::bfloat16>(gdn::state_order::key_last, {.final_state = true}, 0.1);
}

TEST(delivery, RejectsWrongSlotsBeforeAnythingIsSent) {
  const gdn::kokkos::backend<> be;
  gdn::self_communicator self;
  filled_pool<T> pool(serving_dims, 2);
  const gdn::layer_dims& d = serving_dims;
  const auto plan =
      gdn::plan_layer(d, gdn::contiguous_layout{6, 1},
                      gdn::packing::from_cu_seqlens(std::vector<index_t>{0, 2, 6}, {}, 1, 6), {.final_state = true}, 0);
  host_tensor<T, 4> recurrent({2, d.value_heads, d.key_dim, d.value_dim});
  host_tensor<T, 3> conv({2, d.channels(), d.conv_width});
  const std::vector<int> targets = {0, 0};
  host_block scratch(gdn::pool_delivery_requirement<T>(d, plan, targets));
  const auto attempt = [&](const std::vector<std::int32_t>& to) {
    auto ws = scratch.workspace();
    gdn::deliver_states<T>(be, self, d, plan, targets, {recurrent.ref(), conv.ref()}, pool.views,
                           std::span<const std::int32_t>(to), ws, {});
  };
  EXPECT_EQ(text_of<gdn::metadata_error>([&] { attempt({1}); }),
            "1 slots are given, but 2 documents arrive at this rank");
  EXPECT_EQ(text_of<gdn::metadata_error>([&] { attempt({1, 1}); }), "slot 1 is named twice");
  EXPECT_EQ(text_of<gdn::metadata_error>([&] {
              attempt({1, 2});
            }),
            "arriving document 1 goes to slot 2; slots of this pool are 0 to 1, and -1 drops it");
  attempt({-1, 0});
  EXPECT_EQ(pool.views.recurrent(0, 0, 0, 0), 0);
  EXPECT_TRUE(std::isnan(pool.views.recurrent(1, 0, 0, 0)));
}

}  // namespace
}  // namespace gdn_test
