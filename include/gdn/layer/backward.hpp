// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The backward pass of a layer on one rank: the steps of forward, transposed, from the last to the first.

#include <concepts>

#include <gdn/layer/steps.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

/// What backward takes from the workspace for its whole length.
template <class T, memory_kind Memory>
struct backward_buffers {
  using A = accumulate_t<T>;
  using W = between_t<T, Memory>;
  tensor_ref<T, 2, Memory> dys, dxs;         // [L, hid], or nothing where the caller's layout is the compute order
  tensor_ref<W, 2, Memory> sum;              // [L, hid], or nothing where dxs is of this type
  tensor_ref<T, 2, Memory> n;                // [L, Hv V]
  tensor_ref<W, 2, Memory> dn, d_o, dz;      // [L, Hv V]
  tensor_ref<W, 3, Memory> dq, dk;           // [L, Hk, K] of the unit vectors
  tensor_ref<W, 2, Memory> d_convolved;      // [L, Dc]
  tensor_ref<A, 2, Memory> dg, d_beta;       // [L, Hv]
  tensor_ref<W, 2, Memory> da, db;           // [L, Hv]
  tensor_ref<W, 2, Memory> dqkv;             // [L + state rows, Dc]
  tensor_ref<W, 2, Memory> d_halo;           // [halo rows + tail rows, Dc]

  static backward_buffers take(workspace<Memory>& ws, const layer_dims& d, const cp_plan& p) {
    const index_t L = p.compute_rows;
    const index_t moved = p.undo_is_identity() ? 0 : L;
    backward_buffers b;
    b.dys = ws.template take<T>(moved, d.hidden);
    b.dxs = ws.template take<T>(moved, d.hidden);
    b.sum = ws.template take<W>(std::same_as<T, W> ? 0 : L, d.hidden);
    b.n = ws.template take<T>(L, d.values());
    b.dn = ws.template take<W>(L, d.values());
    b.d_o = ws.template take<W>(L, d.values());
    b.dz = ws.template take<W>(L, d.values());
    b.dq = ws.template take<W>(L, d.key_heads, d.key_dim);
    b.dk = ws.template take<W>(L, d.key_heads, d.key_dim);
    b.d_convolved = ws.template take<W>(L, d.channels());
    b.dg = ws.template take<A>(L, d.value_heads);
    b.d_beta = ws.template take<A>(L, d.value_heads);
    b.da = ws.template take<W>(L, d.value_heads);
    b.db = ws.template take<W>(L, d.value_heads);
    b.dqkv = ws.template take<W>(L + p.halo.state_rows, d.channels());
    b.d_halo = ws.template take<W>(p.halo.rows(), d.channels());
    return b;
  }
};

/// What forward did not leave on the tape, from what it did: no communication.
template <class T, class Backend, memory_kind Memory>
void rebuild(const Backend& be, const gated_delta_net<T, Memory>& layer, const resident_plan<Memory>& plan,
             const activations<T, Memory>& act, keep_policy policy, tensor_ref<T, 2, Memory> n, workspace<Memory>& ws,
             typename Backend::stream_type s) {
  const layer_dims& d = layer.dims;
  const auto problem = layer_problem<T>(d, plan);
  const bool all = policy != keep_policy::everything;
  if (all) project_in(be, layer, act, ws, s);
  prologue<T>(be, layer, plan, act, s);
  if (all) {
    be.delta_rule_prepare(problem, act.rule_inputs(d), act.rule.prepared, s);
    be.delta_rule_summarise(problem, act.rule_inputs(d), act.rule.prepared, {}, act.rule.h0, {}, ws, s);
    be.delta_rule_forward(problem, act.rule_inputs(d), act.rule.prepared, act.rule.h0,
                          split_columns(act.o, d.value_heads, d.value_dim), states_ref<T, Memory>{}, ws, s);
  }
  epilogue<T>(be, layer, act, n, s);
}

template <class T, communicator Comm, class Backend, memory_kind Memory>
void backward(const Backend& be, Comm& comm, const gated_delta_net<T, Memory>& layer,
              const resident_plan<Memory>& plan, tensor_ref<const T, 2, Memory> dy, tensor_ref<T, 2, Memory> dx,
              const state_gradients<T, Memory>& states, const layer_gradients<T, Memory>& grad,
              const activations<T, Memory>& act, keep_policy policy, workspace<Memory>& ws,
              typename Backend::stream_type s) {
  using W = between_t<T, Memory>;
  using view2 = tensor_ref<const W, 2, Memory>;
  using view3 = tensor_ref<const W, 3, Memory>;
  using narrow = tensor_ref<const T, 2, Memory>;  // what products read beside weights and inputs
  const layer_dims& d = layer.dims;
  const cp_plan& p = plan.host;
  const auto g = backward_buffers<T, Memory>::take(ws, d, p);
  const auto in = act.rule_inputs(d);
  const auto heads = [&](const auto& t) { return split_columns(t, d.value_heads, d.value_dim); };  // [L, Hv, V]
  const auto key_columns = [&](const auto& t, index_t i) {                                          // [L, Hk, K]
    return split_columns(columns(t, i * d.keys(), d.keys()), d.key_heads, d.key_dim);
  };
  const auto d_v = heads(columns(g.d_convolved, 2 * d.keys(), d.values()));
  const auto dxs = p.undo_is_identity() ? dx : g.dxs;
  const auto sum = [&] {
    if constexpr (std::same_as<T, W>) {
      return dxs;
    } else {
      return g.sum;
    }
  }();

  rebuild<T>(be, layer, plan, act, policy, g.n, ws, s);
  const narrow dys = undo<T>(be, comm, plan, dy, g.dys, ws, s);                                      // [L, hid]
  be.linear_backward_weight(dys, narrow(g.n), grad.out_proj, ws, s);
  be.linear_backward_input(dys, layer.weights.out_proj, g.dn, false, ws, s);                             // [L, Hv V]
  be.gated_norm_backward(heads(view2(g.dn)), heads(view2(act.o)), heads(view2(act.z)), layer.weights.norm, act.rstd_o,
                         heads(g.d_o), heads(g.dz), grad.norm, ws, s);
  cp::gated_delta_rule_backward<W>(be, comm, plan, in, heads(view2(g.d_o)), states.final_,
                                   {g.dq, g.dk, d_v, g.dg, g.d_beta}, states.initial, act.rule, ws, s);
  be.gates_backward(g.dg, g.d_beta, act.a, act.b, layer.weights.A_log, layer.weights.dt_bias, g.da, g.db, grad.A_log,
                    grad.dt_bias, ws, s);                                                                // [L, Hv]
  be.l2norm_backward(view3(g.dq), in.q, act.rstd_q, key_columns(g.d_convolved, 0), s);
  be.l2norm_backward(view3(g.dk), in.k, act.rstd_k, key_columns(g.d_convolved, 1), s);
  cp::causal_conv1d_backward(be, comm, plan, act.qkv, act.halo, layer.weights.conv1d, activation::silu, g.d_convolved,
                             states.final_conv, g.dqkv, g.d_halo, grad.conv1d, states.initial_conv, ws,
                             s);                                                                     // [L, Dc]
  const view2 dqkv = rows(g.dqkv, 0, p.compute_rows);
  be.linear_backward_weight(dqkv, act.xs, grad.in_proj_qkv, ws, s);
  be.linear_backward_weight(view2(g.dz), act.xs, grad.in_proj_z, ws, s);
  be.linear_backward_weight(view2(g.db), act.xs, grad.in_proj_b, ws, s);
  be.linear_backward_weight(view2(g.da), act.xs, grad.in_proj_a, ws, s);
  be.linear_backward_input(dqkv, layer.weights.in_proj_qkv, sum, false, ws, s);                          // [L, hid]
  be.linear_backward_input(view2(g.dz), layer.weights.in_proj_z, sum, true, ws, s);
  be.linear_backward_input(view2(g.db), layer.weights.in_proj_b, sum, true, ws, s);
  be.linear_backward_input(view2(g.da), layer.weights.in_proj_a, sum, true, ws, s);
  if constexpr (!std::same_as<T, W>) be.copy_rows(sum, dxs, s);                                      // rounded once
  redo<T>(be, comm, plan, dxs, dx, ws, s);                                                           // caller's layout
}

}  // namespace detail

/// The gradients of forward() on this rank; every rank calls it.
///
/// @param dy     [plan.caller_rows, hid] contiguous; rows of padding are not read
/// @param dx     likewise, written; rows of padding become zero
/// @param states gradients that arrive at final states, and where those of initial ones go
/// @param grad   *added* to: sums over this rank's tokens; reduce_gradients() sums them over the ranks
/// @param tape   filled by forward() with this plan; it is not changed, so backward may run again
/// @param ws     at least requirements().backward bytes
/// Enqueued on `s`; same bits on every run. Errors as forward().
template <class T, communicator Comm, class Backend, tensor_like DY, tensor_like DX>
  requires backend<Backend, T> && compatible<Backend, Comm>
void backward(const Backend& be, Comm& comm, const gated_delta_net<T, typename Backend::memory_type>& layer,
              const resident_plan<typename Backend::memory_type>& plan, const DY& dy, const DX& dx,
              const state_gradients<T, typename Backend::memory_type>& states,
              const layer_gradients<T, typename Backend::memory_type>& grad,
              const layer_tape<T, typename Backend::memory_type>& tape,
              workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const auto in = as_tensor<const T, 2, memory>(dy);
  const auto out = as_tensor<T, 2, memory>(dx);
  detail::check_rank(comm, plan.host);
  check_layer(layer, plan.host);
  check_parameters(grad, layer.dims);
  detail::check_rows(in, "dy", plan.host.caller_rows, layer.dims.hidden);
  detail::check_rows(out, "dx", plan.host.caller_rows, layer.dims.hidden);
  detail::check_state_gradients(states, layer.dims, plan.host);
  expects<metadata_error>(tape.policy != keep_policy::nothing, "the tape keeps nothing; backward needs a policy");
  expects<metadata_error>(tape.digest == plan.host.digest(), tape.digest == 0
                                                                 ? "the tape was not filled by forward"
                                                                 : "the tape was filled with another plan");

  const scoped_mark scope(ws);
  activations<T, memory> act = tape.values;
  act.take_rest(ws, layer.dims, plan.host, be.delta_rule_prepared(detail::layer_problem<T>(layer.dims, plan)),
                tape.policy);
  detail::backward<T>(be, comm, layer, plan, in, out, states, grad, act, tape.policy, ws, s);
}

}  // namespace v0
}  // namespace gdn
