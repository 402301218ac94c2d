// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule as the token recurrence says, forward and backward, in double.

#include <vector>

#include <gdn/plan/tables.hpp>
#include <support/host_tensor.hpp>

namespace gdn_test {

/// Inputs of a call of the delta rule, as numbers; see gdn::delta_rule_problem for the shapes.
struct rule_numbers {
  std::vector<gdn::rule_segment> segments;
  double scale = 1;
  host_tensor<double, 3> q, k, v, d_o;
  host_tensor<double, 2> g, beta;
  host_tensor<double, 4> h0, dht;  // [places, Hv, K, V]
};

/// What it gives. Places of states that no segment writes stay NaN.
struct rule_answers {
  host_tensor<double, 3> o, dq, dk, dv;
  host_tensor<double, 2> dg, dbeta;
  host_tensor<double, 4> ht, dh0;
};

/// S~ = a S;  d = b (v - S~^T k);  S' = S~ + k d^T;  o = scale S'^T q, and the gradients of that, segment by segment.
rule_answers by_recurrence(const rule_numbers& n, bool backward = true);

}  // namespace gdn_test
