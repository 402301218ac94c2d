// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Steps that forward and backward share: layouts, history and states between ranks.

#include <gdn/comm/exchange_rows.hpp>
#include <gdn/comm/share.hpp>
#include <gdn/layer/state.hpp>
#include <gdn/layer/unfused.hpp>

namespace gdn {
inline namespace v0 {
namespace detail {

/// Views in a backend's memory; they take no part in deduction, so mutable ones convert to const.
template <class T, class Backend>
using matrix_of = tensor_ref<T, 2, typename Backend::memory_type>;
template <class A, class Backend>
using states_of = tensor_ref<A, 4, typename Backend::memory_type>;

/// The caller's rows in compute order: `moved`, or `x` itself where nothing has to move.
template <class T, communicator Comm, class Backend, memory_kind Memory>
matrix_of<const T, Backend> undo(const Backend& be, Comm& comm, const resident_plan<Memory>& plan,
                                 matrix_of<const T, Backend> x, matrix_of<T, Backend> moved, workspace<Memory>& ws,
                                 typename Backend::stream_type s) {
  if (plan.host.undo_is_identity()) return x;
  exchange_rows<T>(be, comm, plan.undo, x, moved, ws, s);
  return moved;
}

/// The way back into the caller's layout; padding becomes zero.
template <class T, communicator Comm, class Backend, memory_kind Memory>
void redo(const Backend& be, Comm& comm, const resident_plan<Memory>& plan, matrix_of<const T, Backend> ys,
          matrix_of<T, Backend> y, workspace<Memory>& ws, typename Backend::stream_type s) {
  if (plan.host.undo_is_identity()) return;  // ys is y
  if (!plan.host.padding.empty()) be.fill_zero(y, s);
  exchange_rows<T>(be, comm, plan.redo, ys, y, ws, s);
}

/// qkv, z, b, a of this rank's tokens.
template <class T, class Backend, memory_kind Memory>
void project_in(const Backend& be, const gated_delta_net<T, Memory>& layer, const activations<T, Memory>& act,
                typename Backend::stream_type s) {
  be.linear_forward(act.xs, layer.weights.in_proj_qkv, rows(act.qkv, 0, act.xs.extent(0)), s);
  be.linear_forward(act.xs, layer.weights.in_proj_z, act.z, s);
  be.linear_forward(act.xs, layer.weights.in_proj_b, act.b, s);
  be.linear_forward(act.xs, layer.weights.in_proj_a, act.a, s);
}

/// Rows [n W, Dc] of a buffer of rows as matrices [n, W, Dc].
template <class T, memory_kind Memory>
tensor_ref<T, 3, Memory> state_matrices(tensor_ref<T, 2, Memory> buffer, index_t begin, index_t count, index_t width) {
  const auto part = rows(buffer, begin, count);
  return make_tensor<Memory>(part.data(), count / width, width, buffer.extent(1));
}

/// Initial conv states become rows behind this rank's own; then the history of every segment, and the last W inputs
/// of every document, are fetched from where they are.
template <class T, communicator Comm, class Backend, memory_kind Memory>
void fetch_history(const Backend& be, Comm& comm, const resident_plan<Memory>& plan,
                   const sequence_states<T, Memory>& states, const activations<T, Memory>& act, workspace<Memory>& ws,
                   typename Backend::stream_type s) {
  const halo_plan& halo = plan.host.halo;
  const index_t W = plan.host.shape.conv_width;
  if (halo.state_rows > 0) {
    be.swap_axes(states.initial_conv, state_matrices(act.qkv, plan.host.compute_rows, halo.state_rows, W), s);
  }
  if (halo.rows() > 0) be.fill_zero(act.halo, s);
  exchange_rows<T>(be, comm, plan.halo, act.qkv, act.halo, ws, s);
  if (halo.tail_rows > 0) {
    be.swap_axes(tensor_ref<const T, 3, Memory>(state_matrices(act.halo, halo.halo_rows, halo.tail_rows, W)),
                 states.final_conv, s);
  }
}

/// A buffer of states [n, Hv, K, V] as rows.
template <class A, memory_kind Memory>
tensor_ref<A, 2, Memory> as_rows(const tensor_ref<A, 4, Memory>& states) {
  return make_tensor<Memory>(states.data(), states.extent(0),
                             states.extent(1) * states.extent(2) * states.extent(3));
}

/// The first `n` states of `to` from the caller's, or zeros where there are none.
template <class A, class Backend>
void place_states(const Backend& be, states_of<const A, Backend> from, states_of<A, Backend> to, index_t n,
                  typename Backend::stream_type s) {
  if (n == 0) return;
  const auto target = rows(as_rows(to), 0, n);
  if (from.data() != nullptr) {
    be.copy_rows(as_rows(from), target, s);
  } else {
    be.fill_zero(target, s);
  }
}

/// An empty document passes its state on as it came: for each, row `in` of `from` (or zero) to row `out` of `to`.
template <class A, class Backend>
void pass_empty(const Backend& be, const cp_plan& plan, states_of<const A, Backend> from, states_of<A, Backend> to,
                bool reverse, typename Backend::stream_type s) {
  if (to.data() == nullptr) return;
  for (const run& e : plan.empty_documents) {
    const auto target = rows(as_rows(to), reverse ? e.local : e.packed, 1);
    if (from.data() != nullptr) {
      be.copy_rows(rows(as_rows(from), reverse ? e.packed : e.local, 1), target, s);
    } else {
      be.fill_zero(target, s);
    }
  }
}

template <communicator Comm>
void check_rank(const Comm& comm, const cp_plan& plan) {
  expects<metadata_error>(comm.rank() == plan.rank && comm.size() == plan.world, "the plan is for rank", plan.rank,
                          "of", plan.world, ", the communicator is rank", comm.rank(), "of", comm.size());
}

template <class T, memory_kind Memory>
void check_rows(const tensor_ref<T, 2, Memory>& t, std::string_view name, index_t rows, index_t width) {
  expects_shape(t, name, {rows, width});
  expects<shape_error>(is_contiguous(t), name, "must be contiguous");
}

}  // namespace detail
}  // namespace v0
}  // namespace gdn
