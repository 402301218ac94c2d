// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The forward pass of a layer on one rank, top to bottom: plan, communicate, compute.

#include <gdn/layer/steps.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

/// What forward takes from the workspace for its whole length.
template <class T, memory_kind Memory>
struct forward_buffers {
  tensor_ref<T, 2, Memory> n;   // [L, Hv V]
  tensor_ref<T, 2, Memory> ys;  // [L, hid], or nothing where y is in compute order

  static forward_buffers take(workspace<Memory>& ws, const layer_dims& d, const cp_plan& p) {
    forward_buffers b;
    b.n = ws.template take<T>(p.compute_rows, d.values());
    b.ys = ws.template take<T>(p.undo_is_identity() ? index_t{0} : p.compute_rows, d.hidden);
    return b;
  }
};

template <class T, communicator Comm, class Backend, memory_kind Memory>
void forward(const Backend& be, Comm& comm, const gated_delta_net<T, Memory>& layer, const resident_plan<Memory>& plan,
             tensor_ref<const T, 2, Memory> x, tensor_ref<T, 2, Memory> y, const sequence_states<T, Memory>& states,
             activations<T, Memory>& act, workspace<Memory>& ws, typename Backend::stream_type s) {
  const layer_dims& d = layer.dims;
  const cp_plan& p = plan.host;
  const auto buffer = forward_buffers<T, Memory>::take(ws, d, p);
  const auto o = split_columns(act.o, d.value_heads, d.value_dim);
  const auto ys = p.undo_is_identity() ? y : buffer.ys;

  act.xs = undo<T>(be, comm, plan, x, act.moved, ws, s);                                             // [L, hid]
  project_in(be, layer, act, ws, s);                                                                 // qkv | z | b | a
  fetch_history(be, comm, plan, act.qkv, states.initial_conv, act.halo, states.final_conv, ws, s);   // [., Dc]
  prologue<T>(be, layer, plan, act, s);                                                              // q, k, v, g, beta
  cp::gated_delta_rule<between_t<T, Memory>>(be, comm, plan, act.rule_inputs(d), states.initial, o, states.final_,
                                             act.rule, ws, s);                                       // [L, Hv, V]
  epilogue<T>(be, layer, act, buffer.n, s);                                                          // [L, Hv V]
  be.linear_forward(buffer.n, layer.weights.out_proj, ys, ws, s);                                    // [L, hid]
  redo<T>(be, comm, plan, ys, y, ws, s);                                                             // caller's layout
}

}  // namespace detail

/// Runs a layer on this rank's part of a batch; every rank of the communicator calls it with its own part.
///
/// @param plan   made for this layer's sizes and this rank, uploaded to the backend
/// @param x      [plan.caller_rows, hid] in the caller's layout, contiguous; padding may hold anything
/// @param y      likewise, written; rows of padding become zero; must not overlap x
/// @param states as the plan's options say; default-constructed without states
/// @param tape   from make_tape() with the same plan, filled for backward()
/// @param ws     at least requirements().forward bytes; free again once the stream has passed this call
/// Enqueued on `s`; allocates a few words of host memory per peer and nothing else; same bits on every run.
/// @throws metadata_error, shape_error, workspace_error before anything runs; backend_error, comm_error while it does:
///         then y, states and tape are unspecified
template <class T, communicator Comm, class Backend, tensor_like X, tensor_like Y>
  requires backend<Backend, T> && compatible<Backend, Comm>
void forward(const Backend& be, Comm& comm, const gated_delta_net<T, typename Backend::memory_type>& layer,
             const resident_plan<typename Backend::memory_type>& plan, const X& x, const Y& y,
             const sequence_states<T, typename Backend::memory_type>& states,
             layer_tape<T, typename Backend::memory_type>& tape, workspace<typename Backend::memory_type>& ws,
             typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const auto in = as_tensor<const T, 2, memory>(x);
  const auto out = as_tensor<T, 2, memory>(y);
  detail::check_rank(comm, plan.host);
  check_layer(layer, plan.host);
  detail::check_rows(in, "x", plan.host.caller_rows, layer.dims.hidden);
  detail::check_rows(out, "y", plan.host.caller_rows, layer.dims.hidden);
  detail::check_states(states, layer.dims, plan.host);

  const scoped_mark scope(ws);
  tape.digest = 0;
  activations<T, memory> act = tape.values;
  act.take_rest(ws, layer.dims, plan.host, be.delta_rule_prepared(detail::layer_problem<T>(layer.dims, plan)),
                tape.policy);
  detail::forward<T>(be, comm, layer, plan, in, out, states, act, ws, s);
  tape.values.xs = act.xs;
  tape.digest = plan.host.digest();
}

/// forward() without a tape: the first tokens of sequences, or, with initial states, the next few of each.
template <class T, communicator Comm, class Backend, tensor_like X, tensor_like Y>
  requires backend<Backend, T> && compatible<Backend, Comm>
void prefill(const Backend& be, Comm& comm, const gated_delta_net<T, typename Backend::memory_type>& layer,
             const resident_plan<typename Backend::memory_type>& plan, const X& x, const Y& y,
             const sequence_states<T, typename Backend::memory_type>& states,
             workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  layer_tape<T, typename Backend::memory_type> none;
  forward(be, comm, layer, plan, x, y, states, none, ws, s);
}

}  // namespace v0
}  // namespace gdn
