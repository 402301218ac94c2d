// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What forward leaves for backward, in memory of the caller.

#include <concepts>
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
  using W = between_t<T, Memory>;
  static constexpr bool wide = !std::same_as<T, W>;

  tensor_ref<const T, 2, Memory> xs;   ///< [L, hid] the input in compute order: `moved`, or the caller's own x

  // What came from other ranks, and the states: on every tape.
  tensor_ref<T, 2, Memory> moved;      ///< [L, hid], or nothing where x is already in compute order
  tensor_ref<W, 2, Memory> halo;       ///< [halo rows + tail rows, Dc]
  rule_tape<W, Memory> rule;           ///< states and summaries; its `prepared` is costly, see below

  // What is costly to rebuild.
  tensor_ref<W, 2, Memory> qkv;        ///< [L + state rows, Dc]
  tensor_ref<W, 2, Memory> z;          ///< [L, Hv V]
  tensor_ref<W, 2, Memory> b, a;       ///< [L, Hv]
  tensor_ref<W, 2, Memory> o;          ///< [L, Hv V]
  tensor_ref<A, 2, Memory> rstd_o;     ///< [L, Hv]

  // What is cheap to rebuild.
  tensor_ref<A, 2, Memory> keys;       ///< [L, 2 Hk K] convolved q | k before they get unit length, unrounded
  tensor_ref<W, 2, Memory> v;          ///< [L, Hv V] convolved
  tensor_ref<T, 3, Memory> q, k;       ///< [L, Hk, K] of unit length
  tensor_ref<A, 2, Memory> rstd_q, rstd_k;  ///< [L, Hk]
  tensor_ref<A, 2, Memory> g;          ///< [L, Hv]
  tensor_ref<T, 2, Memory> beta;       ///< [L, Hv]
  tensor_ref<W, 3, Memory> wide_q, wide_k;  ///< their values as the delta rule reads them; nothing where W is T
  tensor_ref<W, 2, Memory> wide_beta;

  void take_received(workspace<Memory>& m, const layer_dims& d, const cp_plan& p) {
    moved = m.template take<T>(p.undo_is_identity() ? index_t{0} : p.compute_rows, d.hidden);
    halo = m.template take<W>(p.halo.rows(), d.channels());
    rule.take_states(m, p);
  }
  void take_projections(workspace<Memory>& m, const layer_dims& d, index_t qkv_rows, index_t n) {
    qkv = m.template take<W>(qkv_rows, d.channels());
    z = m.template take<W>(n, d.values());
    b = m.template take<W>(n, d.value_heads);
    a = m.template take<W>(n, d.value_heads);
    o = m.template take<W>(n, d.values());
    rstd_o = m.template take<A>(n, d.value_heads);
  }
  void take_costly(workspace<Memory>& m, const layer_dims& d, const cp_plan& p, index_t prepared_elements) {
    take_projections(m, d, p.compute_rows + p.halo.state_rows, p.compute_rows);
    rule.take_prepared(m, prepared_elements);
  }
  void take_cheap(workspace<Memory>& m, const layer_dims& d, index_t n) {
    keys = m.template take<A>(n, 2 * d.keys());
    v = m.template take<W>(n, d.values());
    q = m.template take<T>(n, d.key_heads, d.key_dim);
    k = m.template take<T>(n, d.key_heads, d.key_dim);
    rstd_q = m.template take<A>(n, d.key_heads);
    rstd_k = m.template take<A>(n, d.key_heads);
    g = m.template take<A>(n, d.value_heads);
    beta = m.template take<T>(n, d.value_heads);
    const index_t copied = wide ? n : 0;
    wide_q = m.template take<W>(copied, d.key_heads, d.key_dim);
    wide_k = m.template take<W>(copied, d.key_heads, d.key_dim);
    wide_beta = m.template take<W>(copied, d.value_heads);
  }

  /// What is not on a tape of this policy comes from the workspace.
  void take_rest(workspace<Memory>& m, const layer_dims& d, const cp_plan& p, index_t prepared_elements,
                 keep_policy policy) {
    if (policy == keep_policy::nothing) take_received(m, d, p);
    if (policy != keep_policy::everything) take_costly(m, d, p, prepared_elements);
    take_cheap(m, d, p.compute_rows);
  }

  delta_rule_inputs<W, Memory> rule_inputs(const layer_dims& d) const {
    const auto values = split_columns(v, d.value_heads, d.value_dim);
    if constexpr (wide) {
      return {wide_q, wide_k, values, g, wide_beta};
    } else {
      return {q, k, values, g, beta};
    }
  }
};

namespace detail {
/// The delta rule of a layer of type T on one rank.
template <class T, memory_kind Memory>
delta_rule_problem<between_t<T, Memory>, Memory> layer_problem(const layer_dims& d, const resident_plan<Memory>& plan) {
  return rule_problem<between_t<T, Memory>>(d.key_heads, plan);
}
}  // namespace detail

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
    tape.values.take_costly(memory, d, plan.host, be.delta_rule_prepared(detail::layer_problem<T>(d, plan)));
  }
  return tape;
}

}  // namespace v0
}  // namespace gdn
