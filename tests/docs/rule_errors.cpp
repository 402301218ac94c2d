// SPDX-License-Identifier: Apache-2.0
// Prints the errors of the delta rule against the token recurrence in double, per type and tensor: a table of
// docs/numerics.md. Inputs are rounded to the type first, so that only what the library computes counts.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include <Kokkos_Core.hpp>

#include <conformance/delta_rule.hpp>
#include <kokkos/setup.hpp>

namespace gdn_test {
namespace {

struct situation {
  const char* name;
  double slowest, fastest;  // g is uniform between them
  key_kind keys;
};
constexpr situation situations[] = {
    {"weak decay", -0.002, 0, key_kind::random},
    {"strong decay", -6, -1, key_kind::random},
    {"correlated keys, weak decay", -0.002, 0, key_kind::correlated},
};

using row = std::vector<std::pair<std::string, double>>;  // tensor, rms(error) / rms(value)

template <class T>
row errors(const situation& s) {
  random_source random(5);
  auto c = random_rule_case<T>(random, {512, 1, 2, 128, 128}, 64, s.keys);
  std::uniform_real_distribution<double> decay(s.slowest, s.fastest);
  c.g.for_each([&](auto& g) { g = static_cast<gdn::accumulate_t<T>>(decay(random.engine())); });
  const rule_answers want = by_recurrence(c.numbers());
  const auto got = run_rule<kokkos_setup<T>>(gdn::kokkos::backend<>(), c);
  return {{"o", rms_distance(got.o, want.o)},           {"final state", rms_distance(got.ht, want.ht)},
          {"dq", rms_distance(got.dq, want.dq)},        {"dk", rms_distance(got.dk, want.dk)},
          {"dv", rms_distance(got.dv, want.dv)},        {"dg", rms_distance(got.dg, want.dg)},
          {"dβ", rms_distance(got.dbeta, want.dbeta)},  {"d initial state", rms_distance(got.dh0, want.dh0)}};
}

void print() {
  std::puts("| | tensor | double | float | f16 | bf16 |\n|---|---|---|---|---|---|");
  for (const situation& s : situations) {
    const row columns[] = {errors<double>(s), errors<float>(s), errors<gdn::float16>(s), errors<gdn::bfloat16>(s)};
    for (std::size_t i = 0; i < columns[0].size(); ++i) {
      std::printf("| %s | %s |", i == 0 ? s.name : "", columns[0][i].first.c_str());
      for (const row& column : columns) std::printf(" %.1e |", column[i].second);
      std::puts("");
    }
  }
}

}  // namespace
}  // namespace gdn_test

int main() {
  const Kokkos::ScopeGuard kokkos;
  gdn_test::print();
}
