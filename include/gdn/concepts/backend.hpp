// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What a backend computes: rows, matrix products, convolution, gates and norms, each a small concept.

#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>

#include <gdn/concepts/communicator.hpp>
#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/plan/tables.hpp>

namespace gdn {
inline namespace v0 {

/// Moves rows of [R, width] tensors (unit stride in the last axis). T is any element that rows are made of.
/// 1. `copy_rows(src, dst, s)`: equal extents. 2. `gather_rows(src, runs, dst, s)`: row `local + i` of each run to
///    row `packed + i` of dst. 3. `scatter_rows(src, runs, dst, s)`: the other way. 4. `scatter_add_rows`: adds, in
///    the order of the runs; a row may stand in several of them. 5. `fill_zero(t, s)`: zeros, also over NaN.
/// 6. `swap_axes(src [n, a, b], dst [n, b, a], s)`: transposes each matrix (conv states are channels first).
template <class B, class T>
concept row_ops = requires(const B& be, tensor_ref<const T, 2, typename B::memory_type> src,
                           tensor_ref<T, 2, typename B::memory_type> dst,
                           tensor_ref<const T, 3, typename B::memory_type> src3,
                           tensor_ref<T, 3, typename B::memory_type> dst3,
                           tensor_ref<const run, 1, typename B::memory_type> runs, typename B::stream_type s) {
  be.copy_rows(src, dst, s);
  be.gather_rows(src, runs, dst, s);
  be.scatter_rows(src, runs, dst, s);
  be.scatter_add_rows(src, runs, dst, s);
  be.fill_zero(dst, s);
  be.swap_axes(src3, dst3, s);
};

/// 1. `linear_forward(x [L, in], w [out, in], y [L, out], ws, s)`: y = x w^T.
/// 2. `linear_backward_input(dy, w, dx, add, ws, s)`: dx = dy w, or dx += dy w if `add`.
/// 3. `linear_backward_weight(dy, x, dw, ws, s)`: dw += dy^T x, summed in accumulate_t in an order that depends on L
///    only.
/// The bits of a row do not depend on how many threads work, nor on the other rows' values.
template <class B, class T>
concept linear_ops = requires(const B& be, tensor_ref<const T, 2, typename B::memory_type> in,
                              tensor_ref<T, 2, typename B::memory_type> out,
                              tensor_ref<accumulate_t<T>, 2, typename B::memory_type> dw, bool add,
                              workspace<typename B::memory_type>& ws, typename B::stream_type s) {
  be.linear_forward(in, in, out, ws, s);
  be.linear_backward_input(in, in, out, add, ws, s);
  be.linear_backward_weight(in, in, dw, ws, s);
};

enum class activation : std::uint8_t { none, silu };

/// Depthwise causal convolution p_t = sum_j w_j x_{t-W+1+j}, y = silu(p) or p, for any W >= 1. Segments tile [0, L).
/// 1. `causal_conv1d_forward(segments, x [L, D], halo [., D], w [D, W], act, y [L, D], s)`: y in T or accumulate_t.
/// 2. `causal_conv1d_backward(segments, x, halo, w, act, dy, dx, dhalo, dw, ws, s)`: writes dx [L, D] and the rows of
///    dhalo that segments name; dw [D, W] is added to, in a fixed order.
/// 3. `causal_conv1d_step(x [n, D], states [slots, D, W], slots [n], w, act, y [n, D], s)`: shifts the new column
///    into the state of each sequence (the state keeps the last W inputs), and convolves; slot -1 skips, y is zero.
///    y in T or accumulate_t.
template <class B, class T>
concept conv_ops =
    requires(const B& be, tensor_ref<const conv_segment, 1, typename B::memory_type> segments,
             tensor_ref<const T, 2, typename B::memory_type> in, tensor_ref<T, 2, typename B::memory_type> out,
             tensor_ref<accumulate_t<T>, 2, typename B::memory_type> wide,
             tensor_ref<T, 3, typename B::memory_type> states,
             tensor_ref<const std::int32_t, 1, typename B::memory_type> slots,
             workspace<typename B::memory_type>& ws, typename B::stream_type s) {
      be.causal_conv1d_forward(segments, in, in, in, activation::silu, out, s);
      be.causal_conv1d_forward(segments, in, in, in, activation::silu, wide, s);
      be.causal_conv1d_backward(segments, in, in, in, activation::silu, in, out, out, wide, ws, s);
      be.causal_conv1d_step(in, states, slots, in, activation::silu, out, s);
      be.causal_conv1d_step(in, states, slots, in, activation::silu, wide, s);
    };

/// 1. `gates_forward(a, b [L, Hv], A_log, dt_bias [Hv], g, beta [L, Hv], s)`: g = -exp(A_log) softplus(a + dt_bias) in
///    accumulate_t (softplus is the identity above 20), beta = sigmoid(b) rounded to T.
/// 2. `gates_backward(dg, dbeta, a, b, A_log, dt_bias, da, db, dA_log, d_dt_bias, ws, s)`: writes da and db, adds to the
///    two parameters' gradients in a fixed order.
template <class B, class T>
concept gate_ops = requires(const B& be, tensor_ref<const T, 2, typename B::memory_type> in,
                            tensor_ref<T, 2, typename B::memory_type> out,
                            tensor_ref<const accumulate_t<T>, 2, typename B::memory_type> gradient,
                            tensor_ref<accumulate_t<T>, 2, typename B::memory_type> g,
                            tensor_ref<const accumulate_t<T>, 1, typename B::memory_type> head,
                            tensor_ref<accumulate_t<T>, 1, typename B::memory_type> d_head,
                            workspace<typename B::memory_type>& ws, typename B::stream_type s) {
  be.gates_forward(in, in, head, head, g, out, s);
  be.gates_backward(gradient, gradient, in, in, head, head, out, out, d_head, d_head, ws, s);
};

/// 1. `l2norm_forward(x [L, H, D], eps, y, rstd [L, H], s)`: rstd = (sum x^2 + eps)^(-1/2), y = x rstd. x in
///    accumulate_t: an error of its direction, unlike one of its length, stays.
/// 2. `l2norm_backward(dy, y, rstd, dx, s)`: dx = rstd (dy - y <y, dy>).
/// 3. `gated_norm_forward(o, z [L, H, V], w [V], eps, y, rstd [L, H], s)`: y = w o rstd silu(z) with
///    rstd = (mean o^2 + eps)^(-1/2), in accumulate_t, rounded once at the end.
/// 4. `gated_norm_backward(dy, o, z, w, rstd, d_o, dz, dw, ws, s)`: dw [V] is added to in a fixed order.
template <class B, class T>
concept norm_ops = requires(const B& be, tensor_ref<const T, 3, typename B::memory_type> in,
                            tensor_ref<const accumulate_t<T>, 3, typename B::memory_type> wide,
                            tensor_ref<T, 3, typename B::memory_type> out, double eps,
                            tensor_ref<accumulate_t<T>, 2, typename B::memory_type> rstd,
                            tensor_ref<const accumulate_t<T>, 2, typename B::memory_type> rstd_in,
                            tensor_ref<const accumulate_t<T>, 1, typename B::memory_type> w,
                            tensor_ref<accumulate_t<T>, 1, typename B::memory_type> dw,
                            workspace<typename B::memory_type>& ws, typename B::stream_type s) {
  be.l2norm_forward(wide, eps, out, rstd, s);
  be.l2norm_backward(in, in, rstd_in, out, s);
  be.gated_norm_forward(in, in, w, eps, out, rstd, s);
  be.gated_norm_backward(in, in, in, w, rstd_in, out, out, dw, ws, s);
};

/// The calls of a layer of type T in which not all tensors are of one type: weights, input and output are in T, what
/// passes between operations in W = between_t<T, memory>. Each tensor's elements are rounded once, where it is written.
template <class B, class T, class W = between_t<T, typename B::memory_type>>
concept mixed_ops =
    std::same_as<T, W> ||
    (row_ops<B, W> && conv_ops<B, W> && gate_ops<B, W> && norm_ops<B, W> && gated_delta_rule<B, W> &&
     requires(const B& be, tensor_ref<const T, 2, typename B::memory_type> narrow,
              tensor_ref<T, 2, typename B::memory_type> narrow_out, tensor_ref<T, 3, typename B::memory_type> narrow3,
              tensor_ref<const W, 2, typename B::memory_type> wide,
              tensor_ref<const W, 3, typename B::memory_type> wide3,
              tensor_ref<W, 2, typename B::memory_type> wide_out, tensor_ref<W, 3, typename B::memory_type> wide_out3,
              tensor_ref<const conv_segment, 1, typename B::memory_type> segments,
              tensor_ref<const std::int32_t, 1, typename B::memory_type> slots,
              tensor_ref<const W, 1, typename B::memory_type> head, workspace<typename B::memory_type>& ws,
              typename B::stream_type s) {
       be.copy_rows(narrow, wide_out, s);
       be.copy_rows(wide, narrow_out, s);
       be.swap_axes(tensor_ref<const T, 3, typename B::memory_type>(narrow3), wide_out3, s);
       be.swap_axes(wide3, narrow3, s);
       be.linear_forward(narrow, narrow, wide_out, ws, s);
       be.linear_backward_input(narrow, narrow, wide_out, false, ws, s);
       be.linear_backward_input(wide, narrow, wide_out, true, ws, s);
       be.linear_backward_weight(wide, narrow, wide_out, ws, s);
       be.causal_conv1d_forward(segments, wide, wide, narrow, activation::silu, wide_out, s);
       be.causal_conv1d_backward(segments, wide, wide, narrow, activation::silu, wide, wide_out, wide_out, wide_out, ws,
                                 s);
       be.causal_conv1d_step(wide, narrow3, slots, narrow, activation::silu, wide_out, s);
       be.gates_forward(wide, wide, head, head, wide_out, narrow_out, s);
       be.gated_norm_forward(wide3, wide3, head, 1e-6, narrow3, wide_out, s);
     });

/// The largest sizes with which a layer calls the operations.
struct operation_sizes {
  index_t tokens = 0;      ///< L
  index_t channels = 0;    ///< Dc
  index_t conv_width = 1;  ///< W
  index_t heads = 0;       ///< Hv
  index_t head_dim = 0;    ///< V
};

/// Common to all of the above:
/// 1. A backend is a value that names an executor; its calls are const and may come from several threads, each with a
///    backend of its own.
/// 2. Every call is enqueued on the stream it is given, and nowhere else; it allocates nothing and synchronises
///    nothing. Scratch comes from the caller's workspace.
/// 3. The same inputs give the same bits on every run, whatever else runs.
/// 4. `upload(host, device, s)` copies a table of a plan into the backend's memory. `host` may be overwritten when it
///    returns.
/// 5. `synchronize(s)` waits until the stream's work is done and throws backend_error if it failed.
/// 6. `scratch(sizes)`: bytes that any operation with a workspace (but the delta rule, see there) may take from it for
///    these sizes or smaller ones; free again on return.
/// 7. Optional: `expects_head_sizes(K, V)` throws backend_error, naming the value and the rule, where the backend does
///    not compute such heads. The layer asks before it enqueues anything.
template <class B, class T>
concept backend = memory_kind<typename B::memory_type> && stream_handle<typename B::stream_type> &&
                  requires(const B& be, std::span<const run> host, tensor_ref<run, 1, typename B::memory_type> table,
                           const operation_sizes& sizes, typename B::stream_type s) {
                    { be.name() } -> std::convertible_to<std::string_view>;
                    be.synchronize(s);
                    be.upload(host, table, s);
                    { be.scratch(sizes) } -> std::same_as<memory_requirement>;
                  } && row_ops<B, T> && row_ops<B, accumulate_t<T>> && linear_ops<B, T> && conv_ops<B, T> &&
                  gate_ops<B, T> && norm_ops<B, T> && gated_delta_rule<B, T> && mixed_ops<B, T>;

/// A backend and a communicator that work on the same memory in the same order.
template <class B, class C>
concept compatible = communicator<C> && std::same_as<typename B::memory_type, typename C::memory_type> &&
                     std::same_as<typename B::stream_type, typename C::stream_type>;

}  // namespace v0
}  // namespace gdn
