// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One token for each of some sequences, whose states are updated in place.

#include <cmath>
#include <cstdint>

#include <gdn/layer/state.hpp>
#include <gdn/layer/unfused.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

template <class T, memory_kind Memory>
activations<T, Memory> decode_buffers(workspace<Memory>& ws, const layer_dims& d, index_t n) {
  using A = accumulate_t<T>;
  activations<T, Memory> act;
  act.qkv = ws.template take<T>(n, d.channels());
  act.z = ws.template take<T>(n, d.values());
  act.b = ws.template take<T>(n, d.value_heads);
  act.a = ws.template take<T>(n, d.value_heads);
  act.o = ws.template take<T>(n, d.values());
  act.rstd_o = ws.template take<A>(n, d.value_heads);
  act.convolved = ws.template take<T>(n, d.channels());
  act.q = ws.template take<T>(n, d.key_heads, d.key_dim);
  act.k = ws.template take<T>(n, d.key_heads, d.key_dim);
  act.rstd_q = ws.template take<A>(n, d.key_heads);
  act.rstd_k = ws.template take<A>(n, d.key_heads);
  act.g = ws.template take<A>(n, d.value_heads);
  act.beta = ws.template take<T>(n, d.value_heads);
  return act;
}

}  // namespace detail

/// Bytes of workspace that decode_step takes for n sequences.
template <class T, memory_kind Memory = host_memory>
memory_requirement decode_requirement(const layer_dims& d, index_t n) {
  workspace<Memory> measure;
  detail::decode_buffers<T>(measure, d, n);
  measure.template take<T>(n, d.values());
  return measure.peak();
}

/// The next token of n sequences, on one rank.
///
/// @param x,y   [n, hid] one token each
/// @param state [slots, ..]: recurrent and conv states, updated in place
/// @param slots [n] the slot of each token, all different; -1 skips the token, and its y is zero
/// The same numbers as one more token of forward(), up to rounding. Enqueued on `s`.
template <class T, class Backend, tensor_like X, tensor_like Y>
  requires backend<Backend, T>
void decode_step(const Backend& be, const gated_delta_net<T, typename Backend::memory_type>& layer, const X& x,
                 const Y& y, const layer_state<T, typename Backend::memory_type>& state,
                 tensor_ref<const std::int32_t, 1, typename Backend::memory_type> slots,
                 workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  using A = accumulate_t<T>;
  using view2 = tensor_ref<const T, 2, memory>;
  const layer_dims& d = layer.dims;
  const auto in = as_tensor<const T, 2, memory>(x);
  const auto out = as_tensor<T, 2, memory>(y);
  const index_t n = in.extent(0);
  raise(validate_dims(d));
  check_parameters(layer.weights, d);
  expects_shape(in, "x", {n, d.hidden});
  expects_shape(out, "y", {n, d.hidden});
  expects_shape(slots, "slots", {n});
  expects_shape(state.recurrent, "the recurrent state",
                {state.recurrent.extent(0), d.value_heads, d.key_dim, d.value_dim});
  expects_shape(state.conv, "the conv state", {state.recurrent.extent(0), d.channels(), d.conv_width});

  const scoped_mark scope(ws);
  activations<T, memory> act = detail::decode_buffers<T>(ws, d, n);
  const auto normed = ws.template take<T>(n, d.values());
  const view2 convolved = act.convolved;

  be.linear_forward(in, layer.weights.in_proj_qkv, act.qkv, s);
  be.linear_forward(in, layer.weights.in_proj_z, act.z, s);
  be.linear_forward(in, layer.weights.in_proj_b, act.b, s);
  be.linear_forward(in, layer.weights.in_proj_a, act.a, s);
  be.causal_conv1d_step(act.qkv, state.conv, slots, layer.weights.conv1d, activation::silu, act.convolved, s);
  be.l2norm_forward(split_columns(columns(convolved, 0, d.keys()), d.key_heads, d.key_dim), d.l2_eps, act.q,
                    act.rstd_q, s);
  be.l2norm_forward(split_columns(columns(convolved, d.keys(), d.keys()), d.key_heads, d.key_dim), d.l2_eps, act.k,
                    act.rstd_k, s);
  be.gates_forward(act.a, act.b, layer.weights.A_log, layer.weights.dt_bias, act.g, act.beta, s);
  be.delta_rule_step(static_cast<A>(1.0 / std::sqrt(static_cast<double>(d.key_dim))), act.rule_inputs(d),
                     state.recurrent, slots, split_columns(act.o, d.value_heads, d.value_dim), s);
  epilogue<T>(be, layer, act, normed, s);
  be.linear_forward(normed, layer.weights.out_proj, out, s);
}

}  // namespace v0
}  // namespace gdn
