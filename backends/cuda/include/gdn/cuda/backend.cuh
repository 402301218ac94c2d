// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The CUDA backend: what a layer needs, on one device.

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <type_traits>

#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/concepts/state_pool.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/cuda/conv1d.cuh>
#include <gdn/cuda/conv1d_step.cuh>
#include <gdn/cuda/delta_rule_ops.cuh>
#include <gdn/cuda/gate.cuh>
#include <gdn/cuda/head_sizes.hpp>
#include <gdn/cuda/linear.cuh>
#include <gdn/cuda/norm.cuh>
#include <gdn/cuda/rows.cuh>
#include <gdn/cuda/states.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// Types of weights and activations on the device; products in double are the CPU's.
template <class T>
concept device_type = std::same_as<T, float> || std::same_as<T, bfloat16> || std::same_as<T, float16>;

/// Computes on the device that was current when it was made. A value: copies share the cuBLASLt handle; any number of
/// streams and threads may use it at once. Every call enqueues on its stream, allocates and synchronises nothing, and
/// may be captured in a graph (but upload() and synchronize()).
class backend {
 public:
  using memory_type = device_memory;
  using stream_type = stream_ref;

  /// @throws backend_error if there is no device
  explicit backend(float_products how = float_products::ieee) : how_(how) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return static_cast<index_t>(value);
    };
    limits_ = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    blas_ = std::make_shared<blas_handle>();
  }

  std::string_view name() const noexcept { return "cuda"; }
  void synchronize(stream_ref s) const { check(cudaStreamSynchronize(s.get()), "cudaStreamSynchronize"); }
  template <class T>
  void upload(std::span<const std::type_identity_t<T>> host, tensor_ref<T, 1, device_memory> table,
              stream_ref s) const {
    expects_rows(table, "the table", {static_cast<index_t>(host.size())});
    if (host.empty()) return;
    check(cudaMemcpyAsync(table.data(), host.data(), host.size_bytes(), cudaMemcpyHostToDevice, s.get()),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(s.get()), "cudaStreamSynchronize");
  }
  memory_requirement scratch(const operation_sizes& n) const {
    return {std::max({detail::blas_workspace, detail::conv_scratch(n.tokens, n.channels, n.conv_width).bytes,
                      detail::gate_scratch(n.tokens, n.heads).bytes,
                      detail::norm_scratch(n.tokens, n.heads, n.head_dim).bytes}) +
            256};
  }

  // ---- rows.cuh ----
  template <class T>
  void copy_rows(detail::in_ref<T, 2> src, detail::out_ref<T, 2> dst, stream_ref s) const {
    detail::copy_rows<T>(src, dst, s);
  }
  template <class T>
  void gather_rows(detail::in_ref<T, 2> src, tensor_ref<const run, 1, device_memory> runs, detail::out_ref<T, 2> dst,
                   stream_ref s) const {
    detail::move_runs<T, true>(src, runs, dst, s);
  }
  template <class T>
  void scatter_rows(detail::in_ref<T, 2> src, tensor_ref<const run, 1, device_memory> runs, detail::out_ref<T, 2> dst,
                    stream_ref s) const {
    detail::move_runs<T, false>(src, runs, dst, s);
  }
  template <class T>
  void scatter_add_rows(detail::in_ref<T, 2> src, tensor_ref<const run, 1, device_memory> runs,
                        detail::out_ref<T, 2> dst, stream_ref s) const {
    detail::scatter_add_rows<T>(src, runs, dst, s);
  }
  template <class T>
  void fill_zero(detail::out_ref<T, 2> t, stream_ref s) const {
    detail::fill_zero<T>(t, s);
  }
  template <class T>
  void swap_axes(detail::in_ref<T, 3> src, detail::out_ref<T, 3> dst, stream_ref s) const {
    detail::swap_axes<T>(src, dst, s);
  }

  // ---- linear.cuh ----
  template <device_type T>
  void linear_forward(detail::in_ref<T, 2> x, detail::in_ref<T, 2> w, detail::out_ref<T, 2> y,
                      workspace<device_memory>& ws, stream_ref s) const {
    detail::linear_forward<T>(blas_->get(), how_, x, w, y, ws, s);
  }
  template <device_type T>
  void linear_backward_input(detail::in_ref<T, 2> dy, detail::in_ref<T, 2> w, detail::out_ref<T, 2> dx, bool add,
                             workspace<device_memory>& ws, stream_ref s) const {
    detail::linear_backward_input<T>(blas_->get(), how_, dy, w, dx, add, ws, s);
  }
  template <class E, device_type T = std::remove_const_t<E>>
  void linear_backward_weight(tensor_ref<E, 2, device_memory> dy, detail::in_ref<T, 2> x,
                              tensor_ref<float, 2, device_memory> dw, workspace<device_memory>& ws,
                              stream_ref s) const {
    detail::linear_backward_weight<T>(blas_->get(), how_, dy, x, dw, ws, s);
  }

  // ---- conv1d.cuh ----
  template <class E, class Y, device_type T = std::remove_const_t<E>>
  void causal_conv1d_forward(tensor_ref<const conv_segment, 1, device_memory> segments,
                             tensor_ref<E, 2, device_memory> x, detail::in_ref<T, 2> halo, detail::in_ref<T, 2> w,
                             activation act, tensor_ref<Y, 2, device_memory> y, stream_ref s) const {
    detail::causal_conv1d_forward<T>(segments, x, halo, w, act, y, s);
  }
  template <device_type T>
  void causal_conv1d_backward(tensor_ref<const conv_segment, 1, device_memory> segments, detail::in_ref<T, 2> x,
                              detail::in_ref<T, 2> halo, detail::in_ref<T, 2> w, activation act,
                              detail::in_ref<T, 2> dy, detail::out_ref<T, 2> dx, detail::other_ref<T, 2> d_halo,
                              tensor_ref<float, 2, device_memory> dw, workspace<device_memory>& ws,
                              stream_ref s) const {
    detail::causal_conv1d_backward<T>(segments, x, halo, w, act, dy, dx, d_halo, dw, ws, s);
  }
  template <device_type T, class Y>
  void causal_conv1d_step(detail::in_ref<T, 2> x, detail::out_ref<T, 3> states,
                          tensor_ref<const std::int32_t, 1, device_memory> slots, detail::in_ref<T, 2> w,
                          activation act, tensor_ref<Y, 2, device_memory> y, stream_ref s) const {
    detail::causal_conv1d_step<T>(x, states, slots, w, act, y, s);
  }

  // ---- gate.cuh ----
  template <device_type T>
  void gates_forward(detail::in_ref<T, 2> a, detail::in_ref<T, 2> b, detail::in_ref<float, 1> A_log,
                     detail::in_ref<float, 1> dt_bias, tensor_ref<float, 2, device_memory> g,
                     detail::out_ref<T, 2> beta, stream_ref s) const {
    detail::gates_forward<T>(a, b, A_log, dt_bias, g, beta, s);
  }
  template <device_type T>
  void gates_backward(detail::in_ref<float, 2> dg, detail::in_ref<float, 2> d_beta, detail::in_ref<T, 2> a,
                      detail::in_ref<T, 2> b, detail::in_ref<float, 1> A_log, detail::in_ref<float, 1> dt_bias,
                      detail::out_ref<T, 2> da, detail::other_ref<T, 2> db, tensor_ref<float, 1, device_memory> dA_log,
                      tensor_ref<float, 1, device_memory> d_dt_bias, workspace<device_memory>& ws, stream_ref s) const {
    detail::gates_backward<T>(dg, d_beta, a, b, A_log, dt_bias, da, db, dA_log, d_dt_bias, ws, s);
  }

  // ---- norm.cuh ----
  template <class E, device_type T>
  void l2norm_forward(tensor_ref<E, 3, device_memory> x, double eps, tensor_ref<T, 3, device_memory> y,
                      tensor_ref<float, 2, device_memory> rstd, stream_ref s) const {
    detail::l2norm_forward(tensor_ref<const E, 3, device_memory>(x), eps, y, rstd, s);
  }
  template <device_type T>
  void l2norm_backward(detail::in_ref<T, 3> dy, detail::in_ref<T, 3> y, detail::in_ref<float, 2> rstd,
                       detail::out_ref<T, 3> dx, stream_ref s) const {
    detail::l2norm_backward<T>(dy, y, rstd, dx, s);
  }
  template <device_type T>
  void gated_norm_forward(detail::in_ref<T, 3> o, detail::in_ref<T, 3> z, detail::in_ref<float, 1> w, double eps,
                          detail::out_ref<T, 3> y, tensor_ref<float, 2, device_memory> rstd, stream_ref s) const {
    detail::gated_norm_forward<T>(o, z, w, eps, y, rstd, s);
  }
  template <device_type T>
  void gated_norm_backward(detail::in_ref<T, 3> dy, detail::in_ref<T, 3> o, detail::in_ref<T, 3> z,
                           detail::in_ref<float, 1> w, detail::in_ref<float, 2> rstd, detail::out_ref<T, 3> d_o,
                           detail::other_ref<T, 3> dz, tensor_ref<float, 1, device_memory> dw,
                           workspace<device_memory>& ws, stream_ref s) const {
    detail::gated_norm_backward<T>(dy, o, z, w, rstd, d_o, dz, dw, ws, s);
  }

  // ---- delta_rule_ops.cuh; sizes are refused by the calls that come first: those that ask for memory ----
  static void expects_head_sizes(index_t key_dim, index_t value_dim) { cuda::expects_head_sizes(key_dim, value_dim); }
  template <device_type T>
  index_t delta_rule_prepared(const delta_rule_problem<T, device_memory>& problem) const {
    expects_head_sizes(problem.key_dim, problem.value_dim);
    return detail::delta_rule_prepared<T>(limits_, problem);
  }
  template <device_type T>
  memory_requirement delta_rule_scratch(const delta_rule_problem<T, device_memory>& problem) const {
    expects_head_sizes(problem.key_dim, problem.value_dim);
    return detail::delta_rule_scratch<T>(limits_, problem);
  }
  template <device_type T>
  void delta_rule_prepare(const delta_rule_problem<T, device_memory>& problem,
                          const delta_rule_inputs<T, device_memory>& in, summaries_ref<T, device_memory> prepared,
                          stream_ref s) const {
    detail::delta_rule_prepare<T>(limits_, problem, in, prepared, s);
  }
  template <device_type T>
  void delta_rule_summarise(const delta_rule_problem<T, device_memory>& problem,
                            const delta_rule_inputs<T, device_memory>& in,
                            summaries_ref<T, device_memory> prepared,
                            tensor_ref<const published_summary, 1, device_memory> table,
                            const_states_ref<T, device_memory> h0, summaries_ref<T, device_memory> summaries,
                            workspace<device_memory>& ws, stream_ref s) const {
    detail::delta_rule_summarise<T>(limits_, problem, in, prepared, table, h0, summaries, ws, s);
  }
  void compose(index_t heads, index_t key_dim, index_t value_dim,
               tensor_ref<const compose_item, 1, device_memory> items, tensor_ref<float, 1, device_memory> summaries,
               stream_ref s) const {
    detail::compose(heads, key_dim, value_dim, items, summaries, s);
  }
  void fold(index_t heads, index_t key_dim, index_t value_dim, tensor_ref<const fold_item, 1, device_memory> items,
            tensor_ref<const fold_link, 1, device_memory> links, tensor_ref<const float, 1, device_memory> summaries,
            tensor_ref<float, 4, device_memory> states, stream_ref s) const {
    detail::fold(heads, key_dim, value_dim, items, links, summaries, states, s);
  }
  template <device_type T>
  void delta_rule_forward(const delta_rule_problem<T, device_memory>& problem,
                          const delta_rule_inputs<T, device_memory>& in,
                          summaries_ref<T, device_memory> prepared, const_states_ref<T, device_memory> h0,
                          tensor_ref<T, 3, device_memory> o, states_ref<T, device_memory> ht,
                          workspace<device_memory>& ws, stream_ref s) const {
    detail::delta_rule_forward<T>(limits_, problem, in, prepared, h0, o, ht, ws, s);
  }
  template <device_type T>
  void delta_rule_summarise_gradient(const delta_rule_problem<T, device_memory>& problem,
                                     const delta_rule_inputs<T, device_memory>& in,
                                     summaries_ref<T, device_memory> prepared, detail::in_ref<T, 3> d_o,
                                     const_states_ref<T, device_memory> dht,
                                     tensor_ref<const published_summary, 1, device_memory> table,
                                     const_summaries_ref<T, device_memory> own,
                                     summaries_ref<T, device_memory> summaries, workspace<device_memory>& ws,
                                     stream_ref s) const {
    detail::delta_rule_summarise_gradient<T>(limits_, problem, in, prepared, d_o, dht, table, own, summaries, ws, s);
  }
  template <device_type T>
  void delta_rule_backward(const delta_rule_problem<T, device_memory>& problem,
                           const delta_rule_inputs<T, device_memory>& in,
                           summaries_ref<T, device_memory> prepared, const_states_ref<T, device_memory> h0,
                           detail::in_ref<T, 3> d_o, const_states_ref<T, device_memory> dht,
                           const delta_rule_gradients<T, device_memory>& gradients, states_ref<T, device_memory> dh0,
                           workspace<device_memory>& ws, stream_ref s) const {
    detail::delta_rule_backward<T>(limits_, problem, in, prepared, h0, d_o, dht, gradients, dh0, ws, s);
  }
  template <device_type T, device_type S>
  void delta_rule_step(float scale, const delta_rule_inputs<T, device_memory>& in,
                       tensor_ref<S, 4, device_memory> states, tensor_ref<const std::int32_t, 1, device_memory> slots,
                       tensor_ref<T, 3, device_memory> o, stream_ref s) const {
    expects_head_sizes(states.extent(2), states.extent(3));
    detail::delta_rule_step<T, S>(scale, in, states, slots, o, s);
  }

  // ---- states.cuh ----
  template <class E, device_type A>
  void load_states(tensor_ref<E, 4, device_memory> pool, tensor_ref<const std::int32_t, 1, device_memory> slots,
                   tensor_ref<A, 4, device_memory> out, stream_ref s) const {
    detail::load_states<std::remove_const_t<E>, A>(pool, slots, out, s);
  }
  template <class E, device_type S>
  void store_states(tensor_ref<E, 4, device_memory> in, tensor_ref<const std::int32_t, 1, device_memory> slots,
                    tensor_ref<S, 4, device_memory> pool, stream_ref s) const {
    detail::store_states<std::remove_const_t<E>, S>(in, slots, pool, s);
  }

 private:
  float_products how_;
  detail::device_limits limits_;
  std::shared_ptr<blas_handle> blas_;
};

static_assert(gdn::backend<backend, float> && gdn::backend<backend, bfloat16> && gdn::backend<backend, float16>);
static_assert(!gdn::backend<backend, double>);
static_assert(serving_backend<backend, float, float> && serving_backend<backend, bfloat16, bfloat16> &&
              serving_backend<backend, float16, float>);

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
