// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  serve() for a layer of type T.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <serving/fixture.hpp>
#include <support/errors.hpp>

namespace gdn_test {

/// How far a sequence in company may be from the same sequence alone.
template <class T>
inline constexpr double serving_tolerance = 1e-10;
template <>
inline constexpr double serving_tolerance<float> = 2e-4;
template <>
inline constexpr double serving_tolerance<gdn::bfloat16> = 6e-2;  // chunks and steps round at different places

template <class T>
class serving : public testing::Test {
 public:
  gdn::kokkos::backend<> be;
};
TYPED_TEST_SUITE_P(serving);

/// 64 slots over 100 calls; sequences begin, go on by one token or several, pause, end, and stand between rows of NaN.
template <class T, class S>
void check_pool_of_64(const gdn::kokkos::backend<>& be, gdn::state_order order, double limit) {
  constexpr std::int32_t used = 64;
  constexpr index_t spare = 3;
  const gdn::layer_dims& d = serving_dims;
  const random_layer<T> layer(d);
  filled_pool<T, S> pool(d, used + spare, order);
  random_source random(7);
  std::uniform_real_distribution<double> value(-1, 1);

  struct history {
    std::vector<T> x, y;
  };
  std::vector<history> running(used);
  worst_error outputs, states, convs;
  index_t finished = 0, steps = 0, tokens_served = 0;
  const auto finish = [&](std::int32_t slot, bool with_state) {
    history& h = running[static_cast<std::size_t>(slot)];
    const auto n = static_cast<index_t>(h.x.size()) / d.hidden;
    if (n > 0) {
      host_tensor<T, 2> x({n, d.hidden});
      x.elements() = h.x;
      const auto want = forward_alone(be, layer.net, x);
      for (std::size_t i = 0; i < h.y.size(); ++i) outputs.add(real(h.y[i]), real(want.y.elements()[i]));
      if (with_state) compare_state(pool.views, slot, want, states, convs);
      ++finished;
    }
    h = {};
  };

  std::vector<bool> known(used, false);
  for (int call = 0; call < 100; ++call) {
    const bool decode = random.coin(3);
    std::vector<gdn::sequence> sequences;
    index_t tokens = 0;
    for (const index_t i : random.permutation(used)) {
      const auto slot = static_cast<std::int32_t>(i);
      if (random.coin(4)) continue;  // not named
      const bool skip = random.coin(12);
      const bool fresh = !known[static_cast<std::size_t>(i)] || random.coin(20);
      const index_t count = random.coin(15) ? 0 : decode || random.coin() ? 1 : random.between(2, 19);
      if (random.coin(6)) tokens += random.between(1, 2);                            // rows of nobody
      if (fresh && !skip && known[static_cast<std::size_t>(i)]) finish(slot, true);  // this one ends
      sequences.push_back({tokens, count, skip ? -1 : slot, fresh});
      tokens += count;
      if (!skip) known[static_cast<std::size_t>(i)] = true;
    }
    tokens += random.between(0, 2);
    std::shuffle(sequences.begin(), sequences.end(), random.engine());

    host_tensor<T, 2> x({tokens, d.hidden}), y({tokens, d.hidden});
    x.for_each([](T& v) { v = static_cast<T>(std::nanf("")); });
    y.for_each([](T& v) { v = static_cast<T>(std::nanf("")); });
    std::vector<bool> served(static_cast<std::size_t>(tokens), false);
    for (const gdn::sequence& q : sequences) {
      if (q.slot < 0) continue;
      for (index_t t = q.begin; t < q.begin + q.count; ++t) {
        served[static_cast<std::size_t>(t)] = true;
        ++tokens_served;
        for (index_t j = 0; j < d.hidden; ++j) x(t, j) = static_cast<T>(value(random.engine()));
      }
    }
    steps += gdn::plan_serving(sequences, tokens, used + spare, d).steps ? 1 : 0;
    serve_once(be, layer.net, pool.views, sequences, x, y);
    for (const gdn::sequence& q : sequences) {
      if (q.slot < 0) continue;
      history& h = running[static_cast<std::size_t>(q.slot)];
      const auto at = static_cast<std::ptrdiff_t>(q.begin * d.hidden),
                 n = static_cast<std::ptrdiff_t>(q.count * d.hidden);
      h.x.insert(h.x.end(), x.elements().begin() + at, x.elements().begin() + at + n);
      h.y.insert(h.y.end(), y.elements().begin() + at, y.elements().begin() + at + n);
    }
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t j = 0; j < d.hidden && !served[static_cast<std::size_t>(t)]; ++j) ASSERT_EQ(real(y(t, j)), 0);
    }
  }
  for (std::int32_t slot = 0; slot < used; ++slot) finish(slot, true);

  EXPECT_GT(finished, used);
  EXPECT_GT(steps, 10);
  EXPECT_LT(steps, 90);
  EXPECT_LE(outputs.value(), limit);
  EXPECT_LE(states.value(), limit);
  EXPECT_LE(convs.value(), limit);
  for (std::int32_t slot = used; slot < used + spare; ++slot) {
    EXPECT_TRUE(std::isnan(real(pool.views.recurrent(slot, 2, 3, 4)))) << "a slot that nobody named was written";
    EXPECT_TRUE(std::isnan(real(pool.views.conv(slot, 0, 0))));
  }
  std::printf("%lld tokens, %lld of 100 calls steps: outputs %.1e, states %.1e, conv states %.1e\n",
              static_cast<long long>(tokens_served), static_cast<long long>(steps), outputs.value(), states.value(),
              convs.value());
}

TYPED_TEST_P(serving, SixtyFourSequencesEqualEachAlone) {
  using A = gdn::accumulate_t<TypeParam>;
  for (const auto order : {gdn::state_order::value_last, gdn::state_order::key_last}) {
    check_pool_of_64<TypeParam, A>(this->be, order, serving_tolerance<TypeParam>);
  }
}

TYPED_TEST_P(serving, OrderOfAxesChangesNoBit) {
  using A = gdn::accumulate_t<TypeParam>;
  const random_layer<TypeParam> layer(serving_dims);
  filled_pool<TypeParam, A> a(serving_dims, 2), b(serving_dims, 2, gdn::state_order::key_last);
  random_source random(3);
  const std::vector<std::vector<gdn::sequence>> calls = {
      {{0, 9, 1, true}, {9, 1, 0, true}}, {{0, 1, 1, false}, {1, 1, 0, false}}, {{0, 1, 1, false}, {1, 9, 0, false}}};
  for (const auto& call : calls) {
    const auto x = random_tensor<TypeParam, 2>(random, {10, serving_dims.hidden});
    auto ya = x, yb = x;
    serve_once(this->be, layer.net, a.views, call, x, ya);
    serve_once(this->be, layer.net, b.views, call, x, yb);
    for (const gdn::sequence& q : call) {
      for (index_t t = q.begin; t < q.begin + q.count; ++t) {
        for (index_t j = 0; j < serving_dims.hidden; ++j) EXPECT_EQ(real(ya(t, j)), real(yb(t, j)));
      }
    }
  }
}

/// From one state, the next one in bf16 is the next one in fp32 rounded once, and the output is the same.
TYPED_TEST_P(serving, NarrowStatesAreRoundedOncePerCall) {
  using A = gdn::accumulate_t<TypeParam>;
  const random_layer<TypeParam> layer(serving_dims);
  filled_pool<TypeParam, A> wide(serving_dims, 1);
  filled_pool<TypeParam, gdn::bfloat16> narrow(serving_dims, 1);
  random_source random(4);
  double worst = 0;
  for (int call = 0; call < 60; ++call) {
    const index_t tokens = random.coin() ? 1 : random.between(2, 12);
    const auto x = random_tensor<TypeParam, 2>(random, {tokens, serving_dims.hidden});
    auto yw = x, yn = x;
    serve_once(this->be, layer.net, wide.views, {{0, tokens, 0, call == 0}}, x, yw);
    serve_once(this->be, layer.net, narrow.views, {{0, tokens, 0, call == 0}}, x, yn);
    EXPECT_TRUE(same_bits(yw, yn));
    for (index_t i = 0; i < wide.views.recurrent.size(); ++i) {
      A& w = wide.views.recurrent.data()[i];
      const gdn::bfloat16 n = narrow.views.recurrent.data()[i];
      worst = std::max(worst, std::abs(real(n) - real(w)) / std::abs(real(w)));
      w = static_cast<A>(static_cast<float>(n));  // the next call starts from the same state
    }
  }
  EXPECT_LE(worst, 0x1p-8);
  EXPECT_GT(worst, 0x1p-10);
}

TYPED_TEST_P(serving, NarrowStatesServeSixtyFourSequences) {
  check_pool_of_64<TypeParam, gdn::bfloat16>(this->be, gdn::state_order::key_last, 0.15);
}

TYPED_TEST_P(serving, SequencesWithoutRowsKeepTheirStateOrAreCleared) {
  const random_layer<TypeParam> layer(serving_dims);
  filled_pool<TypeParam> pool(serving_dims, 3);
  host_tensor<TypeParam, 2> x({2, serving_dims.hidden}), y({2, serving_dims.hidden});
  x.for_each([](TypeParam& v) { v = static_cast<TypeParam>(std::nanf("")); });
  serve_once(this->be, layer.net, pool.views, {{0, 0, 0, true}, {1, 0, 1, false}, {0, 2, -1, true}}, x, y);
  for (index_t i = 0; i < pool.views.recurrent.size() / 3; ++i) EXPECT_EQ(real(pool.views.recurrent.data()[i]), 0);
  for (index_t i = 0; i < pool.views.conv.size() / 3; ++i) EXPECT_EQ(real(pool.views.conv.data()[i]), 0);
  EXPECT_TRUE(std::isnan(real(pool.views.recurrent(1, 0, 0, 0))));
  EXPECT_TRUE(std::isnan(real(pool.views.conv(2, 0, 0))));
  y.for_each([](TypeParam& v) { EXPECT_EQ(real(v), 0); });
}

TYPED_TEST_P(serving, ErrorsNameTheTensorAndTheRule) {
  const random_layer<TypeParam> layer(serving_dims);
  filled_pool<TypeParam> pool(serving_dims, 3);
  host_tensor<TypeParam, 2> x({4, serving_dims.hidden}), y({4, serving_dims.hidden});
  const auto plan = gdn::plan_serving(std::vector<gdn::sequence>{{0, 4, 1, true}}, 4, 3, serving_dims);
  host_block tables(gdn::resident_requirement<gdn::host_memory>(plan));
  auto table_ws = tables.workspace();
  const auto batch = gdn::upload(this->be, plan, table_ws, {});
  gdn::memory_requirement need = gdn::serve_requirement<TypeParam>(this->be, serving_dims, batch);
  const auto attempt = [&](const auto& p, const auto& from, const auto& to, std::size_t less = 0) {
    host_block scratch({need.bytes - less});
    auto ws = scratch.workspace();
    gdn::serve(this->be, layer.net, p, batch, from, to, ws, {});
  };
  attempt(pool.views, x.ref(), y.ref());
  using gdn::metadata_error, gdn::shape_error, gdn::workspace_error;
  EXPECT_EQ(text_of<shape_error>([&] { attempt(pool.views, gdn::rows(x.ref(), 0, 3), y.ref()); }),
            "x axis 0 must be 4 is 3");
  EXPECT_EQ(text_of<shape_error>([&] { attempt(pool.views, x.ref(), gdn::columns(y.ref(), 0, 5)); }),
            "y axis 1 must be 6 is 5");
  host_tensor<TypeParam, 2> gaps({4, serving_dims.hidden}, 1);
  EXPECT_EQ(text_of<shape_error>([&] { attempt(pool.views, gaps.ref(), y.ref()); }), "x must be contiguous");
  auto p = pool.views;
  p.recurrent.extent_[0] = p.conv.extent_[0] = 2;
  EXPECT_EQ(text_of<metadata_error>([&] { attempt(p, x.ref(), y.ref()); }),
            "the plan is for a pool of 3 slots, this one has 2");
  p.recurrent.extent_[0] = 3;
  EXPECT_EQ(text_of<shape_error>([&] { attempt(p, x.ref(), y.ref()); }),
            "the pool's conv states axis 0 must be 3 is 2");
  p = pool.views;
  p.recurrent.extent_[2] = 5;
  EXPECT_EQ(text_of<shape_error>([&] { attempt(p, x.ref(), y.ref()); }),
            "the pool's recurrent states axis 2 must be 4 is 5");
  p = pool.views;
  p.recurrent.stride_[3] = 2;
  EXPECT_EQ(text_of<shape_error>([&] { attempt(p, x.ref(), y.ref()); }),
            "the pool's recurrent states must have stride 1 in one of its last two axes, has 5 and 2");
  p = pool.views;
  p.conv.stride_[2] = 3;
  EXPECT_EQ(text_of<shape_error>([&] { attempt(p, x.ref(), y.ref()); }),
            "the pool's conv states must have stride 1 in one of its last two axes, has 4 and 3");
  EXPECT_THAT(text_of<workspace_error>([&] { attempt(pool.views, x.ref(), y.ref(), need.bytes / 2); }),
              testing::HasSubstr("the workspace has"));
  auto other = serving_dims;
  other.conv_width = 3;
  const random_layer<TypeParam> narrow(other);
  EXPECT_EQ(text_of<metadata_error>([&] {
              host_block scratch(need);
              auto ws = scratch.workspace();
              gdn::serve(this->be, narrow.net, pool.views, batch, x.ref(), y.ref(), ws, {});
            }),
            "the plan is for conv width 4, the layer has 3");
}

REGISTER_TYPED_TEST_SUITE_P(serving, SixtyFourSequencesEqualEachAlone, OrderOfAxesChangesNoBit,
                            NarrowStatesAreRoundedOncePerCall, NarrowStatesServeSixtyFourSequences,
                            SequencesWithoutRowsKeepTheirStateOrAreCleared, ErrorsNameTheTensorAndTheRule);

}  // namespace gdn_test
