// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Random layers over the random batches and layouts of the plans' tests.

#include <string>
#include <utility>

#include <plan/random_case.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {

struct layer_case {
  std::string name;
  layer_batch batch;
  layer_spread spread;
};

inline std::ostream& operator<<(std::ostream& out, const layer_case& c) {
  return out << c.name << "\n  " << describe(c.batch) << "\n  " << describe(c.spread);
}

/// Heads of one element are for memory and plans only: the norms map them to their sign, whose gradient is rounding.
inline gdn::layer_dims random_dims(random_source& random, index_t width, index_t least = 2, index_t most = 6) {
  gdn::layer_dims d;
  d.hidden = random.between(1, most);
  d.key_heads = random.between(1, 2);
  d.value_heads = d.key_heads * random.between(1, 4);
  d.key_dim = random.between(least, most);
  d.value_dim = random.between(least, most);
  d.conv_width = width;
  return d;
}

inline layer_spread random_options(random_source& random, layer_spread s) {
  s.options.strategy = strategies[random.between(0, 1)];
  s.options.share = shares[random.between(0, 2)];
  s.options.initial_state = random.coin();
  s.options.final_state = random.coin();
  const index_t chunks[] = {1, 2, 5, 16, 64};
  s.chunk = chunks[random.between(0, 4)];
  s.rule = random.coin(3) ? rule_kind::recurrent : rule_kind::chunked;
  s.keep = random.coin() ? gdn::keep_policy::everything : gdn::keep_policy::recompute;
  return s;
}

/// Ranks 1 to 8, batches of 1 to 3 rows, W 1 to 6, all layouts, packings, strategies, shares and rules.
inline layer_case random_layer_case(random_source& random, index_t least = 2, index_t most = 6) {
  const plan_case p = any_case(random);
  layer_case c;
  c.name = p.name;
  c.batch = random_batch(random, random_dims(random, p.shape.conv_width, least, most), p.pack);
  c.spread.world = p.world;
  c.spread.rows = p.rows;
  c.spread = random_options(random, std::move(c.spread));
  return c;
}

}  // namespace gdn_test
