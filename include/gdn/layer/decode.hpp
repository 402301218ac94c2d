// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One token for each of some sequences, whose states are updated in place.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <gdn/concepts/state_pool.hpp>
#include <gdn/layer/state_pool.hpp>
#include <gdn/layer/steps.hpp>
#include <gdn/layer/unfused.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

template <class T, memory_kind Memory>
activations<T, Memory> decode_buffers(workspace<Memory>& ws, const layer_dims& d, index_t n) {
  activations<T, Memory> act;
  act.take_projections(ws, d, n, n);
  act.take_cheap(ws, d, n);
  return act;
}

/// From projections to the output of the delta rule: row i is the next token of slots[i].
template <class T, class StateT, class Backend, memory_kind Memory>
void step(const Backend& be, const gated_delta_net<T, Memory>& layer, const activations<T, Memory>& act,
          const state_pool<T, StateT, Memory>& pool, tensor_ref<const std::int32_t, 1, Memory> slots,
          typename Backend::stream_type s) {
  const layer_dims& d = layer.dims;
  const auto convolve = [&](index_t begin, const auto& y) {
    const index_t n = y.extent(1);
    be.causal_conv1d_step(columns(act.qkv, begin, n), slice(pool.conv, 1, begin, n), slots,
                          rows(layer.weights.conv1d, begin, n), activation::silu, y, s);
  };
  convolve(0, act.keys);
  convolve(2 * d.keys(), act.v);
  normalise_keys(be, d, act, s);
  be.gates_forward(act.a, act.b, layer.weights.A_log, layer.weights.dt_bias, act.g, act.beta, s);
  widen_inputs(be, act, s);
  be.delta_rule_step(static_cast<accumulate_t<T>>(1.0 / std::sqrt(static_cast<double>(d.key_dim))), act.rule_inputs(d),
                     pool.recurrent, slots, split_columns(act.o, d.value_heads, d.value_dim), s);
}

}  // namespace detail

/// Bytes of workspace that decode_step takes for n sequences.
template <class T, class Backend>
  requires backend<Backend, T>
memory_requirement decode_requirement(const Backend& be, const layer_dims& d, index_t n) {
  detail::check_heads(be, d);
  workspace<typename Backend::memory_type> measure;
  detail::decode_buffers<T>(measure, d, n);
  measure.template take<T>(n, d.values());
  measure.template take<std::byte>(static_cast<index_t>(be.scratch(detail::sizes_of(d, n)).bytes));
  return measure.peak();
}

/// The next token of n sequences, on one rank.
///
/// @param x,y   [n, hid] one token each
/// @param state [slots, ..]: recurrent and conv states, updated in place
/// @param slots [n] the slot of each token, all different; -1 skips the token, and its y is zero (if its x is
///              finite; serve() reads no such row)
/// The same numbers as one more token of forward(), up to rounding. Enqueued on `s`.
template <class T, class Backend, tensor_like X, tensor_like Y, class StateT = accumulate_t<T>>
  requires backend<Backend, T> && pool_steps<Backend, between_t<T, typename Backend::memory_type>, StateT>
void decode_step(const Backend& be, const gated_delta_net<T, typename Backend::memory_type>& layer, const X& x,
                 const Y& y, const state_pool<T, StateT, typename Backend::memory_type>& state,
                 tensor_ref<const std::int32_t, 1, typename Backend::memory_type> slots,
                 workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const layer_dims& d = layer.dims;
  const auto in = as_tensor<const T, 2, memory>(x);
  const auto out = as_tensor<T, 2, memory>(y);
  const index_t n = in.extent(0);
  raise(validate_dims(d));
  detail::check_heads(be, d);
  check_parameters(layer.weights, d);
  expects_shape(in, "x", {n, d.hidden});
  expects_shape(out, "y", {n, d.hidden});
  expects_shape(slots, "slots", {n});
  check_pool(state, d);

  const scoped_mark scope(ws);
  activations<T, memory> act = detail::decode_buffers<T>(ws, d, n);
  const auto normed = ws.template take<T>(n, d.values());

  be.linear_forward(in, layer.weights.in_proj_qkv, act.qkv, ws, s);
  be.linear_forward(in, layer.weights.in_proj_z, act.z, ws, s);
  be.linear_forward(in, layer.weights.in_proj_b, act.b, ws, s);
  be.linear_forward(in, layer.weights.in_proj_a, act.a, ws, s);
  detail::step(be, layer, act, state, slots, s);
  epilogue<T>(be, layer, act, normed, s);
  be.linear_forward(normed, layer.weights.out_proj, out, ws, s);
}

}  // namespace v0
}  // namespace gdn
