// SPDX-License-Identifier: Apache-2.0
// The reference itself: its gradients are central differences of its outputs. And: the two rules agree.
#include <conformance/delta_rule.hpp>
#include <kokkos/delta_rule_setup.hpp>

namespace gdn_test {
namespace {

TEST(delta_rule_reference, GradientsAreDifferences) {
  random_source random(0);
  auto c = random_rule_case<double>(random, {9, 1, 2, 3, 4});
  c.cut({5, 4}, rule_case<double>::states::all, random);
  rule_numbers n = c.numbers();
  const rule_answers want = by_recurrence(n);
  const auto loss = [&] {
    const rule_answers r = by_recurrence(n, false);
    return inner(r.o, n.d_o) + inner(r.ht, n.dht);
  };
  const auto check = [&](auto& x, const auto& gradient, const char* name) {
    EXPECT_TRUE(close(backend_fixture<kokkos_setup<double>>::differences(x, loss), gradient, 1e-8)) << name;
  };
  check(n.q, want.dq, "q");
  check(n.k, want.dk, "k");
  check(n.v, want.dv, "v");
  check(n.g, want.dg, "g");
  check(n.beta, want.dbeta, "beta");
  check(n.h0, want.dh0, "h0");
}

TEST(delta_rule, ChunksEqualTheRecurrence) {
  for (std::uint64_t n = 0; n < 40; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t Hk = random.between(1, 2);
    auto c = random_rule_case<double>(
        random, {random.between(1, 300), Hk, Hk * random.between(1, 4), random.between(1, 40), random.between(1, 40)},
        random.between(1, 100));
    c.cut({c.tokens()}, rule_case<double>::states::mixed, random);
    const auto a = run_rule<kokkos_setup<double>>(kokkos_setup<double>::make(), c);
    const auto b = run_rule<recurrent_setup<double>>(recurrent_setup<double>::make(), c);
    EXPECT_TRUE(near(a, rule_answers{b.o, b.dq, b.dk, b.dv, b.dg, b.dbeta, b.ht, b.dh0}, 1e-12));
  }
}

}  // namespace
}  // namespace gdn_test
