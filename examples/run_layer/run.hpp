// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Running a bundle through the public API.

#include <string>
#include <utility>
#include <vector>

#include <gdn/io/checkpoint.hpp>
#include <gdn/plan/cp_plan.hpp>

#include "bundle.hpp"
#include "options.hpp"

namespace gdn_run {

/// What a run computed, gathered from all ranks.
struct run_result {
  /// Results under the names and with the shapes of bundle.md, without "expected.", in any order; rows in the order of
  /// the sequence. Always "output", "conv_state" and "recurrent_state". If the backward pass ran: "grad.hidden_states",
  /// "grad.linear_attn.<name>" for each parameter tensor of the bundle (in its weight layout), and
  /// "grad.initial_state", "grad.initial_conv_state" where the bundle has that state or expects its gradient. If tokens
  /// were decoded: "decode.output", "decode.conv_state", "decode.recurrent_state".
  std::vector<gdn::named_values> tensors;

  std::vector<gdn::traffic> received;  ///< [P] bytes that each rank received in one run, forward and backward
  std::vector<std::pair<std::string, double>> milliseconds;  ///< of each phase, in order; of --repeat runs the least
  index_t tokens = 0;                                        ///< valid ones, of all rows

  /// nullptr if there is none.
  const gdn::named_values* find(const std::string& name) const noexcept {
    for (const gdn::named_values& t : tensors) {
      if (t.name == name) return &t;
    }
    return nullptr;
  }
};

/// Prefill, then the backward pass and decoding where both the bundle and the options ask for them.
/// @param layout make_layout_table(o, b)
/// @throws gdn::backend_error, gdn::comm_error
run_result run_layer(const options& o, const bundle& b, const gdn::fragment_table& layout);

}  // namespace gdn_run
