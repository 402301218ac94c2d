// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The states of sequences: what enters and leaves a rank, and their gradients.

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/layer/gated_delta_net.hpp>
#include <gdn/layer/state_pool.hpp>

namespace gdn {
inline namespace v0 {

/// A document's state enters at the rank of its first token and leaves at the rank of its last, never after padding:
/// entry i belongs to document plan.entering[i] or plan.leaving[i]. A recurrent state is [Hv, K, V] in accumulate_t;
/// a conv state is [Dc, W]: the last W inputs of the convolution, oldest first, zeros where there were fewer.
/// Initial states are read if the plan was made with `initial_state`, final ones written if with `final_state`.
template <class T, memory_kind Memory = host_memory>
struct sequence_states {
  const_states_ref<T, Memory> initial;           ///< [entering, Hv, K, V]
  tensor_ref<const T, 3, Memory> initial_conv;   ///< [entering, Dc, W]
  states_ref<T, Memory> final_;                  ///< [leaving, Hv, K, V]
  tensor_ref<T, 3, Memory> final_conv;           ///< [leaving, Dc, W]
};

/// The gradients that arrive at final states (zero where the view is empty), and those of the initial ones (not
/// written where the view is empty).
template <class T, memory_kind Memory = host_memory>
struct state_gradients {
  const_states_ref<T, Memory> final_;
  tensor_ref<const T, 3, Memory> final_conv;
  states_ref<T, Memory> initial;
  tensor_ref<T, 3, Memory> initial_conv;
};

namespace detail {

template <class T, memory_kind Memory>
void check_states(const sequence_states<T, Memory>& states, const layer_dims& d, const cp_plan& plan) {
  const auto n_in = static_cast<index_t>(plan.entering.size());
  const auto n_out = static_cast<index_t>(plan.leaving.size());
  if (plan.options.initial_state) {
    expects_shape(states.initial, "the initial recurrent state", {n_in, d.value_heads, d.key_dim, d.value_dim});
    expects_shape(states.initial_conv, "the initial conv state", {n_in, d.channels(), d.conv_width});
  } else {
    expects<metadata_error>(states.initial.data() == nullptr && states.initial_conv.data() == nullptr,
                            "an initial state is given, but the plan was made without initial_state");
  }
  if (plan.options.final_state) {
    expects_shape(states.final_, "the final recurrent state", {n_out, d.value_heads, d.key_dim, d.value_dim});
    expects_shape(states.final_conv, "the final conv state", {n_out, d.channels(), d.conv_width});
  } else {
    expects<metadata_error>(states.final_.data() == nullptr && states.final_conv.data() == nullptr,
                            "a final state is asked for, but the plan was made without final_state");
  }
}

template <class T, memory_kind Memory>
void check_state_gradients(const state_gradients<T, Memory>& g, const layer_dims& d, const cp_plan& plan) {
  const auto n_in = static_cast<index_t>(plan.entering.size());
  const auto n_out = static_cast<index_t>(plan.leaving.size());
  const auto given = [](const auto& t) { return t.data() != nullptr; };
  expects<metadata_error>(plan.options.final_state || (!given(g.final_) && !given(g.final_conv)),
                          "a gradient of the final state is given, but the plan was made without final_state");
  expects<metadata_error>(plan.options.initial_state || (!given(g.initial) && !given(g.initial_conv)),
                          "a gradient of the initial state is asked for, but the plan was made without initial_state");
  if (given(g.final_)) {
    expects_shape(g.final_, "the final state's gradient", {n_out, d.value_heads, d.key_dim, d.value_dim});
  }
  if (given(g.final_conv)) {
    expects_shape(g.final_conv, "the final conv state's gradient", {n_out, d.channels(), d.conv_width});
  }
  if (given(g.initial)) {
    expects_shape(g.initial, "the initial state's gradient", {n_in, d.value_heads, d.key_dim, d.value_dim});
  }
  if (given(g.initial_conv)) {
    expects_shape(g.initial_conv, "the initial conv state's gradient", {n_in, d.channels(), d.conv_width});
  }
}

}  // namespace detail
}  // namespace v0
}  // namespace gdn
