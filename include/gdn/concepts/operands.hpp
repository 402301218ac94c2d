// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What the operands of a backend's operations have to be; every backend asks before it computes or enqueues.
///
/// Extents, data and strides are looked at, never elements: tables and tensors may lie on a device. What a table says
/// (runs and segments inside the tensors, slots that are -1 or inside the pool and all different) is the caller's to
/// keep; a backend of host memory looks at that, too. A few comparisons, no allocation unless one fails.
/// @throws shape_error that names the operand and the rule

#include <array>
#include <cstddef>
#include <string_view>
#include <type_traits>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/tensor.hpp>

namespace gdn {
inline namespace v0 {

/// Every operation reads and writes its last axis as an array.
template <class T, int R, class M>
void expects_unit_stride(const tensor_ref<T, R, M>& t, std::string_view name) {
  expects<shape_error>(t.stride(R - 1) == 1 || t.extent(R - 1) <= 1, "the last axis of", name,
                       "must have stride 1, has", t.stride(R - 1));
}

/// Extents, data and unit stride at once.
template <class T, int R, class M>
void expects_rows(const tensor_ref<T, R, M>& t, std::string_view name,
                  const std::type_identity_t<std::array<index_t, static_cast<std::size_t>(R)>>& extents) {
  expects_shape(t, name, extents);
  expects_unit_stride(t, name);
}

/// A table of a plan, or of slots, of any length.
template <class T, class M>
void expects_table(const tensor_ref<T, 1, M>& t, std::string_view name) {
  expects_rows(t, name, {t.extent(0)});
}

// ---- row_ops ----

template <tensor_view Src, tensor_view Dst>
void expects_copy_rows(const Src& src, const Dst& dst) {
  expects_rows(dst, "dst", {dst.extent(0), dst.extent(1)});
  expects_rows(src, "src", {dst.extent(0), dst.extent(1)});
}

/// Of gather_rows, scatter_rows and scatter_add_rows: rows `local + i` of one side, `packed + i` of the other.
template <tensor_view Runs, tensor_view Local, tensor_view Packed>
void expects_moved_rows(const Runs& runs, const Local& local, const Packed& packed) {
  expects<shape_error>(local.extent(1) == packed.extent(1), "rows have", local.extent(1),
                       "elements on one side and on the other", packed.extent(1));
  expects_unit_stride(local, "rows");
  expects_unit_stride(packed, "packed rows");
  expects_table(runs, "runs");
  if (runs.extent(0) == 0) return;  // then neither side needs data
  expects_shape(local, "rows", {local.extent(0), local.extent(1)});
  expects_shape(packed, "packed rows", {packed.extent(0), packed.extent(1)});
}

template <tensor_view T>
void expects_fill_zero(const T& t) {
  expects_rows(t, "the tensor", {t.extent(0), t.extent(1)});
}

template <tensor_view Src, tensor_view Dst>
void expects_swap_axes(const Src& src, const Dst& dst) {
  expects_rows(src, "src", {src.extent(0), src.extent(1), src.extent(2)});
  expects_rows(dst, "dst", {src.extent(0), src.extent(2), src.extent(1)});
}

// ---- linear_ops ----

template <tensor_view X, tensor_view W, tensor_view Y>
void expects_linear_forward(const X& x, const W& w, const Y& y) {
  const index_t length = x.extent(0), in = x.extent(1), out = w.extent(0);
  expects_rows(x, "x", {length, in});
  expects_rows(w, "w", {out, in});
  expects_rows(y, "y", {length, out});
}

template <tensor_view DY, tensor_view W, tensor_view DX>
void expects_linear_backward_input(const DY& dy, const W& w, const DX& dx) {
  const index_t length = dy.extent(0), out = dy.extent(1), in = w.extent(1);
  expects_rows(dy, "dy", {length, out});
  expects_rows(w, "w", {out, in});
  expects_rows(dx, "dx", {length, in});
}

template <tensor_view DY, tensor_view X, tensor_view DW>
void expects_linear_backward_weight(const DY& dy, const X& x, const DW& dw) {
  const index_t length = dy.extent(0), out = dy.extent(1), in = x.extent(1);
  expects_rows(dy, "dy", {length, out});
  expects_rows(x, "x", {length, in});
  expects_rows(dw, "dw", {out, in});
}

// ---- conv_ops; the weights may have any strides ----

/// What forward and backward have in common. Without halo rows, the halo may be an empty view.
template <tensor_view Segments, tensor_view X, tensor_view Halo, tensor_view W>
void expects_conv_inputs(const Segments& segments, const X& x, const Halo& halo, const W& w) {
  const index_t length = x.extent(0), dim = w.extent(0), width = w.extent(1);
  expects<shape_error>(width >= 1, "the convolution must have a width of 1 or more, has", width);
  expects_table(segments, "segments");
  expects<shape_error>(segments.extent(0) > 0 || length == 0, "segments cover", 0, "of", length, "rows");
  expects_shape(w, "w", {dim, width});
  expects_rows(x, "x", {length, dim});
  expects_rows(halo, "halo", {halo.extent(0), halo.extent(0) == 0 ? halo.extent(1) : dim});
}

template <tensor_view Segments, tensor_view X, tensor_view Halo, tensor_view W, tensor_view Y>
void expects_causal_conv1d_forward(const Segments& segments, const X& x, const Halo& halo, const W& w, const Y& y) {
  expects_conv_inputs(segments, x, halo, w);
  expects_rows(y, "y", {x.extent(0), w.extent(0)});
}

template <tensor_view Segments, tensor_view X, tensor_view Halo, tensor_view W, tensor_view DY, tensor_view DX,
          tensor_view DHalo, tensor_view DW>
void expects_causal_conv1d_backward(const Segments& segments, const X& x, const Halo& halo, const W& w, const DY& dy,
                                    const DX& dx, const DHalo& dhalo, const DW& dw) {
  expects_conv_inputs(segments, x, halo, w);
  expects_rows(dy, "dy", {x.extent(0), w.extent(0)});
  expects_rows(dx, "dx", {x.extent(0), w.extent(0)});
  expects_rows(dhalo, "dhalo", {halo.extent(0), halo.extent(1)});
  expects_rows(dw, "dw", {w.extent(0), w.extent(1)});
}

/// The states may have any strides.
template <tensor_view X, tensor_view States, tensor_view Slots, tensor_view W, tensor_view Y>
void expects_causal_conv1d_step(const X& x, const States& states, const Slots& slots, const W& w, const Y& y) {
  const index_t sequences = x.extent(0), dim = w.extent(0), width = w.extent(1);
  expects<shape_error>(width >= 1, "the convolution must have a width of 1 or more, has", width);
  expects_shape(w, "w", {dim, width});
  expects_rows(x, "x", {sequences, dim});
  expects_shape(states, "states", {states.extent(0), dim, width});
  expects_rows(slots, "slots", {sequences});
  expects_rows(y, "y", {sequences, dim});
}

// ---- gate_ops ----

template <tensor_view A, tensor_view B, tensor_view Rate, tensor_view Bias>
void expects_gate_inputs(const A& a, const B& b, const Rate& A_log, const Bias& dt_bias) {
  const index_t length = a.extent(0), heads = a.extent(1);
  expects_rows(a, "a", {length, heads});
  expects_rows(b, "b", {length, heads});
  expects_rows(A_log, "A_log", {heads});
  expects_rows(dt_bias, "dt_bias", {heads});
}

template <tensor_view A, tensor_view B, tensor_view Rate, tensor_view Bias, tensor_view G, tensor_view Beta>
void expects_gates_forward(const A& a, const B& b, const Rate& A_log, const Bias& dt_bias, const G& g,
                           const Beta& beta) {
  expects_gate_inputs(a, b, A_log, dt_bias);
  expects_rows(g, "g", {a.extent(0), a.extent(1)});
  expects_rows(beta, "beta", {a.extent(0), a.extent(1)});
}

template <tensor_view DG, tensor_view DBeta, tensor_view A, tensor_view B, tensor_view Rate, tensor_view Bias,
          tensor_view DA, tensor_view DB, tensor_view DRate, tensor_view DBias>
void expects_gates_backward(const DG& dg, const DBeta& dbeta, const A& a, const B& b, const Rate& A_log,
                            const Bias& dt_bias, const DA& da, const DB& db, const DRate& dA_log,
                            const DBias& d_dt_bias) {
  const index_t length = a.extent(0), heads = a.extent(1);
  expects_gate_inputs(a, b, A_log, dt_bias);
  expects_rows(dg, "dg", {length, heads});
  expects_rows(dbeta, "dbeta", {length, heads});
  expects_rows(da, "da", {length, heads});
  expects_rows(db, "db", {length, heads});
  expects_rows(dA_log, "dA_log", {heads});
  expects_rows(d_dt_bias, "d_dt_bias", {heads});
}

// ---- norm_ops ----

template <tensor_view X, tensor_view Y, tensor_view Rstd>
void expects_l2norm_forward(const X& x, const Y& y, const Rstd& rstd) {
  const index_t length = x.extent(0), heads = x.extent(1), dim = x.extent(2);
  expects_rows(x, "x", {length, heads, dim});
  expects_rows(y, "y", {length, heads, dim});
  expects_rows(rstd, "rstd", {length, heads});
}

template <tensor_view DY, tensor_view Y, tensor_view Rstd, tensor_view DX>
void expects_l2norm_backward(const DY& dy, const Y& y, const Rstd& rstd, const DX& dx) {
  const index_t length = y.extent(0), heads = y.extent(1), dim = y.extent(2);
  expects_rows(dy, "dy", {length, heads, dim});
  expects_rows(y, "y", {length, heads, dim});
  expects_rows(rstd, "rstd", {length, heads});
  expects_rows(dx, "dx", {length, heads, dim});
}

template <tensor_view O, tensor_view Z, tensor_view W, tensor_view Y, tensor_view Rstd>
void expects_gated_norm_forward(const O& o, const Z& z, const W& w, const Y& y, const Rstd& rstd) {
  const index_t length = o.extent(0), heads = o.extent(1), dim = o.extent(2);
  expects_rows(o, "o", {length, heads, dim});
  expects_rows(z, "z", {length, heads, dim});
  expects_rows(w, "w", {dim});
  expects_rows(y, "y", {length, heads, dim});
  expects_rows(rstd, "rstd", {length, heads});
}

template <tensor_view DY, tensor_view O, tensor_view Z, tensor_view W, tensor_view Rstd, tensor_view DO, tensor_view DZ,
          tensor_view DW>
void expects_gated_norm_backward(const DY& dy, const O& o, const Z& z, const W& w, const Rstd& rstd, const DO& d_o,
                                 const DZ& dz, const DW& dw) {
  const index_t length = o.extent(0), heads = o.extent(1), dim = o.extent(2);
  expects_rows(dy, "dy", {length, heads, dim});
  expects_rows(o, "o", {length, heads, dim});
  expects_rows(z, "z", {length, heads, dim});
  expects_rows(w, "w", {dim});
  expects_rows(rstd, "rstd", {length, heads});
  expects_rows(d_o, "d_o", {length, heads, dim});
  expects_rows(dz, "dz", {length, heads, dim});
  expects_rows(dw, "dw", {dim});
}

// ---- state_ops and the delta rule's step ----

/// A pool [slots, Hv, K, V] of states: its slots may lie anywhere, its rows or its columns are arrays.
template <tensor_view Pool>
void expects_pool(const Pool& pool, std::string_view name, index_t heads, index_t key_dim, index_t value_dim) {
  const auto unit = [&](int axis) { return pool.stride(axis) == 1 || pool.extent(axis) <= 1; };
  expects_shape(pool, name, {pool.extent(0), heads, key_dim, value_dim});
  expects<shape_error>(unit(2) || unit(3), name, "must have stride 1 in one of its last two axes, has", pool.stride(2),
                       "and", pool.stride(3));
}

/// Of load_states and store_states; the latter's `states` may have no data.
template <tensor_view Pool, tensor_view Slots, tensor_view States>
void expects_moved_states(const Pool& pool, const Slots& slots, const States& states, bool without_data = false) {
  expects_table(slots, "slots");
  if (!without_data) {
    expects_shape(states, "the states", {slots.extent(0), pool.extent(1), pool.extent(2), pool.extent(3)});
    expects<shape_error>(is_contiguous(states), "the states must be row-major without gaps");
  }
  expects_pool(pool, "the pool", pool.extent(1), pool.extent(2), pool.extent(3));
}

/// The gates may have any strides.
template <class T, memory_kind M>
void expects_rule_inputs(const delta_rule_inputs<T, M>& in, index_t tokens, index_t key_heads, index_t value_heads,
                         index_t key_dim, index_t value_dim) {
  expects<shape_error>(key_heads >= 1 && value_heads % key_heads == 0, "value heads", value_heads,
                       "must be a multiple of key heads", key_heads);
  expects_rows(in.q, "q", {tokens, key_heads, key_dim});
  expects_rows(in.k, "k", {tokens, key_heads, key_dim});
  expects_rows(in.v, "v", {tokens, value_heads, value_dim});
  expects_shape(in.g, "g", {tokens, value_heads});
  expects_shape(in.beta, "beta", {tokens, value_heads});
}

template <class T, memory_kind M, tensor_view States, tensor_view Slots, tensor_view O>
void expects_delta_rule_step(const delta_rule_inputs<T, M>& in, const States& states, const Slots& slots, const O& o) {
  const index_t rows = in.v.extent(0), heads = in.v.extent(1), key_dim = in.k.extent(2), value_dim = in.v.extent(2);
  expects_rule_inputs(in, rows, in.k.extent(1), heads, key_dim, value_dim);
  expects_pool(states, "states", heads, key_dim, value_dim);
  expects_rows(slots, "slots", {rows});
  expects_rows(o, "o", {rows, heads, value_dim});
}

}  // namespace v0
}  // namespace gdn
