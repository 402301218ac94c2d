// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What forward leaves for backward, in memory of the caller.

#include <cstdint>

#include <gdn/concepts/backend.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cp/gated_delta_rule.hpp>
#include <gdn/layer/gated_delta_net.hpp>

namespace gdn {
inline namespace v0 {

enum class keep_policy : std::uint8_t {
  nothing,    ///< no backward will come
  recompute,  ///< what crossed ranks, and the states: backward rebuilds the rest and communicates no more for it
  everything  ///< also projections, the delta rule's chunk inverses and its output: only cheap steps are rebuilt
};

/// The intermediate values of a layer on one rank. Shapes with L = plan.compute_rows.
template <class T, memory_kind Memory>
struct activations {
  using A = accumulate_t<T>;
  tensor_ref<const T, 2, Memory> xs;   ///< [L, hid] the input in compute order: `moved`, or the caller's own x

  // What came from other ranks, and the states: on every tape.
  tensor_ref<T, 2, Memory> moved;      ///< [L, hid], or nothing where x is already in compute order
  tensor_ref<T, 2, Memory> halo;       ///< [halo rows + tail rows, Dc]
  rule_tape<T, Memory> rule;           ///< states and summaries; its `prepared` is costly, see below

  // What is costly to rebuild.
  tensor_ref<T, 2, Memory> qkv;        ///< [L + state rows, Dc]
  tensor_ref<T, 2, Memory> z;          ///< [L, Hv V]
  tensor_ref<T, 2, Memory> b, a;       ///< [L, Hv]
  tensor_ref<T, 2, Memory> o;          ///< [L, Hv V]
  tensor_ref<A, 2, Memory> rstd_o;     ///< [L, Hv]

  // What is cheap to rebuild.
  tensor_ref<A, 2, Memory> keys;       ///< [L, 2 Hk K] convolved q | k before they get unit length, unrounded
  tensor_ref<T, 2, Memory> v;          ///< [L, Hv V] convolved
  tensor_ref<T, 3, Memory> q, k;       ///< [L, Hk, K] of unit length
  tensor_ref<A, 2, Memory> rstd_q, rstd_k;  ///< [L, Hk]
  tensor_ref<A, 2, Memory> g;          ///< [L, Hv]
  tensor_ref<T, 2, Memory> beta;       ///< [L, Hv]

  void take_received(workspace<Memory>& m, const layer_dims& d, const cp_plan& p) {
    moved = m.template take<T>(p.undo_is_identity() ? index_t{0} : p.compute_rows, d.hidden);
    halo = m.template take<T>(p.halo.rows(), d.channels());
    rule.take_states(m, p);
  }
  void take_costly(workspace<Memory>& m, const layer_dims& d, const cp_plan& p, index_t prepared_elements) {
    const index_t L = p.compute_rows;
    qkv = m.template take<T>(L + p.halo.state_rows, d.channels());
    z = m.template take<T>(L, d.values());
    b = m.template take<T>(L, d.value_heads);
    a = m.template take<T>(L, d.value_heads);
    rule.take_prepared(m, prepared_elements);
    o = m.template take<T>(L, d.values());
    rstd_o = m.template take<A>(L, d.value_heads);
  }
  void take_cheap(workspace<Memory>& m, const layer_dims& d, const cp_plan& p) {
    const index_t L = p.compute_rows;
    keys = m.template take<A>(L, 2 * d.keys());
    v = m.template take<T>(L, d.values());
    q = m.template take<T>(L, d.key_heads, d.key_dim);
    k = m.template take<T>(L, d.key_heads, d.key_dim);
    rstd_q = m.template take<A>(L, d.key_heads);
    rstd_k = m.template take<A>(L, d.key_heads);
    g = m.template take<A>(L, d.value_heads);
    beta = m.template take<T>(L, d.value_heads);
  }

  /// What is not on a tape of this policy comes from the workspace.
  void take_rest(workspace<Memory>& m, const layer_dims& d, const cp_plan& p, index_t prepared_elements,
                 keep_policy policy) {
    if (policy == keep_policy::nothing) take_received(m, d, p);
    if (policy != keep_policy::everything) take_costly(m, d, p, prepared_elements);
    take_cheap(m, d, p);
  }

  delta_rule_inputs<T, Memory> rule_inputs(const layer_dims& d) const {
    return {q, k, split_columns(v, d.value_heads, d.value_dim), g, beta};
  }
};

/// Made by make_tape(), filled by forward(), read by backward(). Where nothing is resharded or unpadded it refers to
/// the caller's x, which must then stay unchanged until backward().
template <class T, memory_kind Memory = host_memory>
struct layer_tape {
  keep_policy policy = keep_policy::nothing;
  std::uint64_t digest = 0;  ///< of the plan that filled it; 0 if none did
  activations<T, Memory> values;
};

/// Lays out a tape in caller memory, which must be as large as requirements() says and outlive the tape.
template <class T, class Backend>
  requires backend<Backend, T>
layer_tape<T, typename Backend::memory_type> make_tape(const Backend& be, const layer_dims& d,
                                                       const resident_plan<typename Backend::memory_type>& plan,
                                                       keep_policy policy,
                                                       workspace<typename Backend::memory_type>& memory) {
  layer_tape<T, typename Backend::memory_type> tape;
  tape.policy = policy;
  if (policy == keep_policy::nothing) return tape;
  tape.values.take_received(memory, d, plan.host);
  if (policy == keep_policy::everything) {
    tape.values.take_costly(memory, d, plan.host, be.delta_rule_prepared(rule_problem<T>(d.key_heads, plan)));
  }
  return tape;
}

}  // namespace v0
}  // namespace gdn
