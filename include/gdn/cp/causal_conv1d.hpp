// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The causal convolution over a sequence that is split over ranks: its history, forward and backward.

#include <algorithm>
#include <type_traits>

#include <gdn/comm/exchange_rows.hpp>
#include <gdn/concepts/backend.hpp>
#include <gdn/plan/resident.hpp>

namespace gdn {
inline namespace v0 {

/// Bytes of workspace that fetch_history and return_history take for D channels.
template <class T, memory_kind Memory>
memory_requirement history_scratch(const cp_plan& p, index_t channels) {
  return {std::max(exchange_scratch<T, Memory>(p.halo.exchange, channels, false, p.rank).bytes,
                   exchange_scratch<T, Memory>(p.halo.exchange.inverse(), channels, true, p.rank).bytes)};
}

namespace detail {
/// Rows [n W, D] of a buffer of rows as matrices [n, W, D].
template <class T, memory_kind Memory>
tensor_ref<T, 3, Memory> state_matrices(tensor_ref<T, 2, Memory> buffer, index_t begin, index_t count, index_t width) {
  const auto part = rows(buffer, begin, count);
  return make_tensor<Memory>(part.data(), count / width, width, buffer.extent(1));
}
}  // namespace detail

/// Fetches the W - 1 rows of history of every segment, and the last W inputs of every document, from wherever they
/// are: other ranks, as many as needed, and initial conv states.
///
/// @param x       [L + plan.halo.state_rows, D]; the first L rows are this rank's, the others are filled here
/// @param initial [plan.entering, D, W] if the plan was made with `initial_state`
/// @param halo    [plan.halo.rows(), D] written: what causal_conv1d_forward reads, then the final states, as rows
/// @param final_  [plan.leaving, D, W] written if the plan was made with `final_state`
/// States are of type T or of the type of the rows, X.
template <class X, class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, X>
void fetch_history(const Backend& be, Comm& comm, const resident_plan<typename Backend::memory_type>& plan,
                   tensor_ref<X, 2, typename Backend::memory_type> x,
                   std::type_identity_t<tensor_ref<const T, 3, typename Backend::memory_type>> initial,
                   tensor_ref<X, 2, typename Backend::memory_type> halo,
                   tensor_ref<T, 3, typename Backend::memory_type> final_,
                   workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const halo_plan& h = plan.host.halo;
  const index_t W = plan.host.shape.conv_width;
  if (h.state_rows > 0) {
    be.swap_axes(initial, detail::state_matrices(x, plan.host.compute_rows, h.state_rows, W), s);
  }
  if (h.rows() > 0) be.fill_zero(halo, s);
  exchange_rows<X>(be, comm, plan.halo, x, halo, ws, s);
  if (h.tail_rows > 0) {
    be.swap_axes(tensor_ref<const X, 3, memory>(detail::state_matrices(halo, h.halo_rows, h.tail_rows, W)), final_, s);
  }
}

/// The adjoint: gradients of history rows go back to the tokens and states that they came from, and are added there.
///
/// @param d_halo    [plan.halo.rows(), D]; the first halo_rows as causal_conv1d_backward leaves them, the rest is
///                  filled here from d_final
/// @param d_final   [plan.leaving, D, W] what arrives at final states; zero if empty
/// @param dx        [L + plan.halo.state_rows, D]; the first L rows are added to
/// @param d_initial [plan.entering, D, W] written unless empty
template <class X, class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, X>
void return_history(const Backend& be, Comm& comm, const resident_plan<typename Backend::memory_type>& plan,
                    tensor_ref<X, 2, typename Backend::memory_type> d_halo,
                    std::type_identity_t<tensor_ref<const T, 3, typename Backend::memory_type>> d_final,
                    tensor_ref<X, 2, typename Backend::memory_type> dx,
                    tensor_ref<T, 3, typename Backend::memory_type> d_initial,
                    workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const halo_plan& h = plan.host.halo;
  const index_t W = plan.host.shape.conv_width;
  const index_t L = plan.host.compute_rows;
  if (h.tail_rows > 0) {
    if (d_final.data() != nullptr) {
      be.swap_axes(d_final, detail::state_matrices(d_halo, h.halo_rows, h.tail_rows, W), s);
    } else {
      be.fill_zero(rows(d_halo, h.halo_rows, h.tail_rows), s);
    }
  }
  if (h.state_rows > 0) be.fill_zero(rows(dx, L, h.state_rows), s);
  exchange_rows_add<X>(be, comm, plan.halo_adjoint, d_halo, dx, ws, s);
  if (h.state_rows > 0 && d_initial.data() != nullptr) {
    be.swap_axes(tensor_ref<const X, 3, memory>(detail::state_matrices(dx, L, h.state_rows, W)), d_initial, s);
  }
}

/// Bytes of workspace that cp::causal_conv1d() and its backward take for rows of D channels.
template <class T, class Backend>
  requires conv_ops<Backend, T>
memory_requirement conv_scratch(const Backend& be, const cp_plan& p, index_t channels) {
  const operation_sizes sizes{.tokens = p.compute_rows, .channels = channels, .conv_width = p.shape.conv_width};
  return {std::max(history_scratch<T, typename Backend::memory_type>(p, channels).bytes, be.scratch(sizes).bytes)};
}

namespace cp {

/// y_t = act(sum_j w_j x_{t-W+1+j}) over documents that begin, end and go on wherever the plan says. One exchange for
/// all rows of a batch.
///
/// @param x      [L + plan.halo.state_rows, D] in compute order; the first L rows are this rank's
/// @param w      [D, W]
/// @param halo   [plan.halo.rows(), D] written; causal_conv1d_backward() needs it
/// @param y      [L, D] written
/// @param ws     at least conv_scratch() bytes
/// Other parameters as fetch_history(). Enqueued on `s`.
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, T> && conv_ops<Backend, T>
void causal_conv1d(const Backend& be, Comm& comm, const resident_plan<typename Backend::memory_type>& plan,
                   tensor_ref<T, 2, typename Backend::memory_type> x,
                   tensor_ref<const T, 2, typename Backend::memory_type> w, activation act,
                   tensor_ref<const T, 3, typename Backend::memory_type> initial,
                   tensor_ref<T, 2, typename Backend::memory_type> halo,
                   tensor_ref<T, 2, typename Backend::memory_type> y,
                   tensor_ref<T, 3, typename Backend::memory_type> final_,
                   workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  fetch_history(be, comm, plan, x, initial, halo, final_, ws, s);
  be.causal_conv1d_forward(plan.conv_segments, rows(x, 0, plan.host.compute_rows), halo, w, act, y, s);
}

/// The gradients of causal_conv1d().
///
/// @param x,halo as causal_conv1d() left them
/// @param dy     [L, D]
/// @param dx     [L + plan.halo.state_rows, D]; the first L rows are the gradient
/// @param d_halo [plan.halo.rows(), D] scratch
/// @param dw     [D, W] in accumulate_t, added to: a sum over this rank's rows
/// @param ws     at least conv_scratch() bytes
/// Rows are of type X; w and states are of the same type, or of a narrower T.
template <class X, class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, X> && conv_ops<Backend, X>
void causal_conv1d_backward(const Backend& be, Comm& comm, const resident_plan<typename Backend::memory_type>& plan,
                            std::type_identity_t<tensor_ref<const X, 2, typename Backend::memory_type>> x,
                            std::type_identity_t<tensor_ref<const X, 2, typename Backend::memory_type>> halo,
                            tensor_ref<const T, 2, typename Backend::memory_type> w, activation act,
                            std::type_identity_t<tensor_ref<const X, 2, typename Backend::memory_type>> dy,
                            std::type_identity_t<tensor_ref<const T, 3, typename Backend::memory_type>> d_final,
                            tensor_ref<X, 2, typename Backend::memory_type> dx,
                            tensor_ref<X, 2, typename Backend::memory_type> d_halo,
                            tensor_ref<accumulate_t<X>, 2, typename Backend::memory_type> dw,
                            tensor_ref<T, 3, typename Backend::memory_type> d_initial,
                            workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  const index_t L = plan.host.compute_rows;
  be.causal_conv1d_backward(plan.conv_segments, rows(x, 0, L), halo, w, act, dy, rows(dx, 0, L), d_halo, dw, ws, s);
  return_history(be, comm, plan, d_halo, d_final, dx, d_initial, ws, s);
}

}  // namespace cp
}  // namespace v0
}  // namespace gdn
