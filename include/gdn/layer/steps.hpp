// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Steps that forward and backward share: layouts, projections, checks.

#include <gdn/comm/exchange_rows.hpp>
#include <gdn/cp/causal_conv1d.hpp>
#include <gdn/cp/gated_delta_rule.hpp>
#include <gdn/layer/state.hpp>
#include <gdn/layer/unfused.hpp>

namespace gdn {
inline namespace v0 {
namespace detail {

/// Views in a backend's memory; they take no part in deduction, so mutable ones convert to const.
template <class T, class Backend>
using matrix_of = tensor_ref<T, 2, typename Backend::memory_type>;

/// The sizes with which a layer of L tokens calls a backend's operations.
constexpr operation_sizes sizes_of(const layer_dims& d, index_t tokens) noexcept {
  return {tokens, d.channels(), d.conv_width, d.value_heads, d.value_dim};
}

/// Refuses what the backend does not compute, before anything is enqueued.
template <class Backend>
void check_heads(const Backend& be, const layer_dims& d) {
  if constexpr (requires { be.expects_head_sizes(d.key_dim, d.value_dim); }) {
    be.expects_head_sizes(d.key_dim, d.value_dim);
  }
}

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
                workspace<Memory>& ws, typename Backend::stream_type s) {
  be.linear_forward(act.xs, layer.weights.in_proj_qkv, rows(act.qkv, 0, act.xs.extent(0)), ws, s);
  be.linear_forward(act.xs, layer.weights.in_proj_z, act.z, ws, s);
  be.linear_forward(act.xs, layer.weights.in_proj_b, act.b, ws, s);
  be.linear_forward(act.xs, layer.weights.in_proj_a, act.a, ws, s);
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
