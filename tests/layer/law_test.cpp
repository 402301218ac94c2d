// SPDX-License-Identifier: Apache-2.0
// Random layers over random layouts, documents, padding and options: any number of ranks is one rank.
#include <layer/random_layer.hpp>
#include <support/layer_reference.hpp>

#include <gtest/gtest.h>

namespace {

using namespace gdn_test;

/// Random cases in shares of equal size, so that they can run at the same time.
class layer_law : public testing::TestWithParam<int> {
 public:
  static constexpr int parts = 4;
  /// f(random, case) for this part's cases.
  template <class F>
  void for_each_case(std::uint64_t count, F&& f, index_t least = 2, index_t most = 6) {
    for (std::uint64_t n = static_cast<std::uint64_t>(GetParam()); n < cases(count) && !HasFailure(); n += parts) {
      random_source random(n);
      const layer_case c = random_layer_case(random, least, most);
      SCOPED_TRACE(testing::Message() << "case " << n << ": " << c);
      f(random, c);
    }
  }
};
INSTANTIATE_TEST_SUITE_P(part, layer_law, testing::Range(0, layer_law::parts));

TEST_P(layer_law, ManyRanksEqualOneRank) {
  for_each_case(4000, [](random_source&, const layer_case& c) {
    const layer_spread one = on_one_rank(c.batch, {.initial_state = c.spread.options.initial_state,
                                                   .final_state = c.spread.options.final_state});
    EXPECT_TRUE(near(run_layer<double>(c.batch, c.spread), run_layer<double>(c.batch, one), 1e-10));
  });
}

TEST_P(layer_law, OneRankIsTheFormulas) {
  for_each_case(1200, [](random_source&, const layer_case& c) {
    layer_spread one = on_one_rank(c.batch, {.initial_state = c.spread.options.initial_state, .final_state = true});
    one.keep = gdn::keep_policy::nothing;
    one.rule = c.spread.rule;
    one.chunk = c.spread.chunk;
    EXPECT_TRUE(near(run_layer<double>(c.batch, one), layer_by_formulas(c.batch, one.options.initial_state), 1e-11));
  });
}

// Tiny layers are badly conditioned now and then; layers of real sizes are held to 1e-5 in published_test.cpp.
TEST_P(layer_law, FloatsAreCloseToDoubles) {
  for_each_case(400, [](random_source&, const layer_case& c) {
    const layer_result want = run_layer<double>(c.batch, c.spread);
    EXPECT_TRUE(near_rms(run_layer<float>(c.batch, c.spread), want, 5e-4));
  }, 8, 16);
}

TEST_P(layer_law, RecomputedTapesGiveTheSameBits) {
  for_each_case(300, [](random_source&, const layer_case& c) {
    layer_spread all = c.spread, few = c.spread;
    all.keep = gdn::keep_policy::everything;
    few.keep = gdn::keep_policy::recompute;
    EXPECT_TRUE(same_bits(run_layer<double>(c.batch, few), run_layer<double>(c.batch, all)));
  });
}

TEST_P(layer_law, BackwardMayRunAgain) {
  for_each_case(200, [](random_source&, const layer_case& c) {
    layer_spread twice = c.spread;
    twice.backward_runs = 2;
    run_layer<double>(c.batch, twice);  // compares the bits
  });
}

TEST_P(layer_law, BytesAreThoseOfThePlan) {
  for_each_case(600, [](random_source&, const layer_case& c) {
    const auto check = [&](const layer_result& r) {
      for (std::size_t rank = 0; rank < r.forward_plan.size(); ++rank) {
        EXPECT_EQ(r.forward_messages[rank].bytes_received, r.forward_plan[rank].total()) << "forward, rank " << rank;
        EXPECT_EQ(r.backward_messages[rank].bytes_received, r.backward_plan[rank].total()) << "backward, rank " << rank;
      }
      index_t sent = 0, received = 0;
      for (const auto& m : r.forward_messages) sent += m.bytes_sent, received += m.bytes_received;
      EXPECT_EQ(sent, received);
    };
    check(run_layer<double>(c.batch, c.spread));
    check(run_layer<float>(c.batch, c.spread));
  });
}

TEST_P(layer_law, LateMessagesChangeNoBit) {
  for_each_case(60, [](random_source&, const layer_case& c) {
    layer_spread late = c.spread;
    late.late = true;
    EXPECT_TRUE(same_bits(run_layer<double>(c.batch, late), run_layer<double>(c.batch, c.spread)));
  });
}

TEST_P(layer_law, ThreadsChangeNoBit) {
  for_each_case(100, [](random_source& random, const layer_case& c) {
    layer_spread more = c.spread;
    more.threads = static_cast<int>(random.between(2, 3));
    EXPECT_TRUE(same_bits(run_layer<double>(c.batch, more), run_layer<double>(c.batch, c.spread)));
  });
}

TEST_P(layer_law, PaddingMayHoldAnything) {
  for_each_case(200, [](random_source& random, const layer_case& c) {
    layer_batch other = c.batch;
    for (values* v : {&other.x, &other.dy}) {
      for (double& e : *v) e = std::isnan(e) ? static_cast<double>(random.between(-9, 9)) : e;
    }
    EXPECT_TRUE(same_bits(run_layer<double>(other, c.spread), run_layer<double>(c.batch, c.spread)));
  });
}

TEST_P(layer_law, PerturbingOneDocumentChangesNoBitOfOthers) {
  for_each_case(300, [](random_source& random, const layer_case& c) {
    const index_t N = c.batch.documents();
    if (N == 0) return;
    const index_t n = random.between(0, N - 1);
    layer_batch other = c.batch;
    const std::vector<index_t> rows = c.batch.pack.indices();
    std::vector<bool> touched(static_cast<std::size_t>(c.batch.pack.rows()), false);
    for (index_t t = c.batch.pack.cu_seqlens[static_cast<std::size_t>(n)];
         t < c.batch.pack.cu_seqlens[static_cast<std::size_t>(n) + 1]; ++t) {
      const index_t row = rows[static_cast<std::size_t>(t)];
      touched[static_cast<std::size_t>(row)] = true;
      for (index_t i = 0; i < c.batch.dims.hidden; ++i) {
        other.x[static_cast<std::size_t>(row * c.batch.dims.hidden + i)] += 0.5;
        other.dy[static_cast<std::size_t>(row * c.batch.dims.hidden + i)] -= 0.25;
      }
    }
    const auto perturb = [&](values& v, index_t size) {
      for (index_t i = n * size; i < (n + 1) * size; ++i) v[static_cast<std::size_t>(i)] += 0.125;
    };
    perturb(other.initial, c.batch.state_size());
    perturb(other.d_final, c.batch.state_size());
    perturb(other.initial_conv, c.batch.conv_size());
    perturb(other.d_final_conv, c.batch.conv_size());

    layer_result a = run_layer<double>(c.batch, c.spread), b = run_layer<double>(other, c.spread);
    const auto forget = [&](values& v, index_t size) {  // what belongs to document n
      for (index_t i = n * size; !v.empty() && i < (n + 1) * size; ++i) v[static_cast<std::size_t>(i)] = 0;
    };
    for (layer_result* r : {&a, &b}) {
      for (values* v : {&r->y, &r->dx}) {
        for (std::size_t i = 0; i < v->size(); ++i) {
          if (touched[i / static_cast<std::size_t>(c.batch.dims.hidden)]) (*v)[i] = 0;
        }
      }
      forget(r->final_, c.batch.state_size());
      forget(r->d_initial, c.batch.state_size());
      forget(r->final_conv, c.batch.conv_size());
      forget(r->d_initial_conv, c.batch.conv_size());
      r->gradients = {};
    }
    EXPECT_TRUE(same_bits(a, b));
  });
}

}  // namespace
