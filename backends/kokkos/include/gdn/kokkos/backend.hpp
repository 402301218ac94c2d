// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The CPU backend: a Kokkos host execution space that computes what a layer needs.

#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

#include <Kokkos_Core.hpp>

#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/state_pool.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/core/stream.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/kokkos/conv1d.hpp>
#include <gdn/kokkos/delta_rule_ops.hpp>
#include <gdn/kokkos/detail/parallel.hpp>
#include <gdn/kokkos/gate.hpp>
#include <gdn/kokkos/linear.hpp>
#include <gdn/kokkos/norm.hpp>
#include <gdn/kokkos/rows.hpp>
#include <gdn/kokkos/states.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos {

/// How the gated delta rule is computed: by chunks, as matrix products, or token by token, as it is written.
enum class rule : std::uint8_t { chunked, recurrent };

/// Computes on the threads of one execution space instance, which orders its calls; every call has finished when it
/// returns. Results have the same bits for every number of threads and for every host execution space.
///
/// Several threads may compute at once, each with a backend of its own: `backend(Kokkos::OpenMP(2))`. Threads that
/// share an instance take turns.
///
/// Memory comes from the caller; an operation uses up to 350 KiB of the stack of each thread that works on it.
template <class Exec = Kokkos::DefaultHostExecutionSpace>
class backend {
  static_assert(Kokkos::is_execution_space_v<Exec>);
  static_assert(Kokkos::SpaceAccessibility<Exec, Kokkos::HostSpace>::accessible, "this backend computes on the host");

 public:
  using execution_space = Exec;
  using memory_type = host_memory;
  using stream_type = host_stream;

  /// @throws backend_error if the program has not initialised Kokkos (or has finalised it)
  explicit backend(rule how = rule::chunked) : backend(make_instance(), how) {}
  explicit backend(Exec exec, rule how = rule::chunked) : exec_(std::move(exec)), rule_(how) { expects_initialized(); }

  const Exec& instance() const noexcept { return exec_; }
  rule chosen_rule() const noexcept { return rule_; }

  std::string_view name() const noexcept { return "kokkos"; }
  void synchronize(host_stream) const { exec_.fence("gdn"); }
  /// Operations work on the stacks of their threads.
  memory_requirement scratch(const operation_sizes&) const noexcept { return {}; }
  template <class T>
  void upload(std::span<const std::type_identity_t<T>> host, tensor_ref<T, 1> table, host_stream) const {
    static_assert(std::is_trivially_copyable_v<T>);
    expects_rows(table, "the table", {static_cast<index_t>(host.size())});
    if (!host.empty()) std::memcpy(table.data(), host.data(), host.size_bytes());
  }

  // ---- rows.hpp ----
  template <class E, class T>
  void copy_rows(tensor_ref<E, 2> src, tensor_ref<T, 2> dst, host_stream) const {
    detail::copy_rows(exec_, detail::read_only(src), dst);
  }
  template <class T>
  void gather_rows(detail::in_ref<T, 2> src, tensor_ref<const run, 1> runs, tensor_ref<T, 2> dst, host_stream) const {
    detail::gather_rows(exec_, src, runs, dst);
  }
  template <class T>
  void scatter_rows(detail::in_ref<T, 2> src, tensor_ref<const run, 1> runs, tensor_ref<T, 2> dst, host_stream) const {
    detail::scatter_rows(exec_, src, runs, dst);
  }
  template <class T>
  void scatter_add_rows(detail::in_ref<T, 2> src, tensor_ref<const run, 1> runs, tensor_ref<T, 2> dst,
                        host_stream) const {
    detail::scatter_add_rows(exec_, src, runs, dst);
  }
  template <class T>
  void fill_zero(tensor_ref<T, 2> t, host_stream) const {
    detail::fill_zero(exec_, t);
  }
  template <class E, class T>
  void swap_axes(tensor_ref<E, 3> src, tensor_ref<T, 3> dst, host_stream) const {
    detail::swap_axes(exec_, detail::read_only(src), dst);
  }

  // ---- linear.hpp ----
  template <class X, class W, class Y>
  void linear_forward(tensor_ref<X, 2> x, tensor_ref<W, 2> w, tensor_ref<Y, 2> y, workspace<host_memory>&,
                      host_stream) const {
    detail::linear_forward(exec_, detail::read_only(x), detail::read_only(w), y);
  }
  template <class DY, class W, class DX>
  void linear_backward_input(tensor_ref<DY, 2> dy, tensor_ref<W, 2> w, tensor_ref<DX, 2> dx, bool add,
                             workspace<host_memory>&, host_stream) const {
    detail::linear_backward_input(exec_, detail::read_only(dy), detail::read_only(w), dx, add);
  }
  template <class DY, class X, class A>
  void linear_backward_weight(tensor_ref<DY, 2> dy, tensor_ref<X, 2> x, tensor_ref<A, 2> dw, workspace<host_memory>&,
                              host_stream) const {
    detail::linear_backward_weight(exec_, detail::read_only(dy), detail::read_only(x), dw);
  }

  // ---- conv1d.hpp ----
  template <class E, class W, class Y, class X = std::remove_const_t<E>>
  void causal_conv1d_forward(tensor_ref<const conv_segment, 1> segments, tensor_ref<E, 2> x,
                             detail::in_ref<X, 2> halo, tensor_ref<W, 2> w, activation act, tensor_ref<Y, 2> y,
                             host_stream) const {
    detail::causal_conv1d_forward<X>(exec_, segments, x, halo, detail::read_only(w), act, y);
  }
  template <class X, class W>
  void causal_conv1d_backward(tensor_ref<const conv_segment, 1> segments, detail::in_ref<X, 2> x,
                              detail::in_ref<X, 2> halo, tensor_ref<W, 2> w, activation act, detail::in_ref<X, 2> dy,
                              tensor_ref<X, 2> dx, tensor_ref<X, 2> dhalo, detail::out_ref<accumulate_t<X>, 2> dw,
                              workspace<host_memory>&, host_stream) const {
    detail::causal_conv1d_backward(exec_, segments, x, halo, detail::read_only(w), act, dy, dx, dhalo, dw);
  }
  template <class E, class T, class W, class Y>
  void causal_conv1d_step(tensor_ref<E, 2> x, tensor_ref<T, 3> states, tensor_ref<const std::int32_t, 1> slots,
                          tensor_ref<W, 2> w, activation act, tensor_ref<Y, 2> y, host_stream) const {
    detail::causal_conv1d_step(exec_, detail::read_only(x), states, slots, detail::read_only(w), act, y);
  }

  // ---- gate.hpp ----
  template <class E, class T, class X = std::remove_const_t<E>>
  void gates_forward(tensor_ref<E, 2> a, detail::in_ref<X, 2> b, detail::in_ref<accumulate_t<T>, 1> a_log,
                     detail::in_ref<accumulate_t<T>, 1> dt_bias, detail::out_ref<accumulate_t<T>, 2> g,
                     tensor_ref<T, 2> beta, host_stream) const {
    detail::gates_forward<X>(exec_, a, b, a_log, dt_bias, g, beta);
  }
  template <class T>
  void gates_backward(detail::in_ref<accumulate_t<T>, 2> dg, detail::in_ref<accumulate_t<T>, 2> dbeta,
                      detail::in_ref<T, 2> a, detail::in_ref<T, 2> b, detail::in_ref<accumulate_t<T>, 1> a_log,
                      detail::in_ref<accumulate_t<T>, 1> dt_bias, tensor_ref<T, 2> da, tensor_ref<T, 2> db,
                      detail::out_ref<accumulate_t<T>, 1> d_a_log, detail::out_ref<accumulate_t<T>, 1> d_dt_bias,
                      workspace<host_memory>&, host_stream) const {
    detail::gates_backward(exec_, dg, dbeta, a, b, a_log, dt_bias, da, db, d_a_log, d_dt_bias);
  }

  // ---- norm.hpp ----
  template <class E, class T>
  void l2norm_forward(tensor_ref<E, 3> x, double eps, tensor_ref<T, 3> y, detail::out_ref<accumulate_t<T>, 2> rstd,
                      host_stream) const {
    detail::l2norm_forward(exec_, tensor_ref<const E, 3>(x), eps, y, rstd);
  }
  template <class T>
  void l2norm_backward(detail::in_ref<T, 3> dy, detail::in_ref<T, 3> y, detail::in_ref<accumulate_t<T>, 2> rstd,
                       tensor_ref<T, 3> dx, host_stream) const {
    detail::l2norm_backward(exec_, dy, y, rstd, dx);
  }
  template <class E, class T, class X = std::remove_const_t<E>>
  void gated_norm_forward(tensor_ref<E, 3> o, detail::in_ref<X, 3> z, detail::in_ref<accumulate_t<T>, 1> w, double eps,
                          tensor_ref<T, 3> y, detail::out_ref<accumulate_t<T>, 2> rstd, host_stream) const {
    detail::gated_norm_forward<X>(exec_, o, z, w, eps, y, rstd);
  }
  template <class T>
  void gated_norm_backward(detail::in_ref<T, 3> dy, detail::in_ref<T, 3> o, detail::in_ref<T, 3> z,
                           detail::in_ref<accumulate_t<T>, 1> w, detail::in_ref<accumulate_t<T>, 2> rstd,
                           tensor_ref<T, 3> d_o, tensor_ref<T, 3> dz, detail::out_ref<accumulate_t<T>, 1> dw,
                           workspace<host_memory>&, host_stream) const {
    detail::gated_norm_backward(exec_, dy, o, z, w, rstd, d_o, dz, dw);
  }

  // ---- delta_rule_ops.hpp ----
  template <class T>
  index_t delta_rule_prepared(const delta_rule_problem<T, host_memory>& problem) const {
    return with_rule([&](auto how) { return how.prepared(problem); });
  }
  template <class T>
  memory_requirement delta_rule_scratch(const delta_rule_problem<T, host_memory>& problem) const {
    return with_rule([&]<class Rule>(Rule) { return detail::delta_rule_scratch<Rule, T>(exec_, problem); });
  }
  template <class T>
  void delta_rule_prepare(const delta_rule_problem<T, host_memory>& problem,
                          const delta_rule_inputs<T, host_memory>& in, summaries_ref<T, host_memory> prepared,
                          host_stream) const {
    detail::check_problem<T>(problem, in);
    with_rule([&](auto how) { how.prepare(exec_, problem, in, prepared); });
  }
  template <class T>
  void delta_rule_summarise(const delta_rule_problem<T, host_memory>& problem,
                            const delta_rule_inputs<T, host_memory>& in, const_summaries_ref<T, host_memory> prepared,
                            tensor_ref<const published_summary, 1> table, const_states_ref<T, host_memory> h0,
                            summaries_ref<T, host_memory> summaries, workspace<host_memory>& ws, host_stream) const {
    with_rule([&]<class Rule>(Rule) {
      detail::delta_rule_summarise<Rule, T>(exec_, problem, in, prepared, table, h0, summaries, ws);
    });
  }
  template <class A>
  void compose(index_t heads, index_t key_dim, index_t value_dim, tensor_ref<const compose_item, 1> items,
               tensor_ref<A, 1> summaries, host_stream) const {
    detail::compose(exec_, heads, key_dim, value_dim, items, summaries);
  }
  template <class A>
  void fold(index_t heads, index_t key_dim, index_t value_dim, tensor_ref<const fold_item, 1> items,
            tensor_ref<const fold_link, 1> links, detail::in_ref<A, 1> summaries, tensor_ref<A, 4> states,
            host_stream) const {
    detail::fold(exec_, heads, key_dim, value_dim, items, links, summaries, states);
  }
  template <class T>
  void delta_rule_forward(const delta_rule_problem<T, host_memory>& problem,
                          const delta_rule_inputs<T, host_memory>& in, const_summaries_ref<T, host_memory> prepared,
                          const_states_ref<T, host_memory> h0, tensor_ref<T, 3> o, states_ref<T, host_memory> ht,
                          workspace<host_memory>& ws, host_stream) const {
    with_rule(
        [&]<class Rule>(Rule) { detail::delta_rule_forward<Rule, T>(exec_, problem, in, prepared, h0, o, ht, ws); });
  }
  template <class T>
  void delta_rule_summarise_gradient(const delta_rule_problem<T, host_memory>& problem,
                                     const delta_rule_inputs<T, host_memory>& in,
                                     const_summaries_ref<T, host_memory> prepared, detail::in_ref<T, 3> d_o,
                                     const_states_ref<T, host_memory> dht, tensor_ref<const published_summary, 1> table,
                                     const_summaries_ref<T, host_memory> own, summaries_ref<T, host_memory> summaries,
                                     workspace<host_memory>& ws, host_stream) const {
    with_rule([&]<class Rule>(Rule) {
      detail::delta_rule_summarise_gradient<Rule, T>(exec_, problem, in, prepared, d_o, dht, table, own, summaries, ws);
    });
  }
  template <class T>
  void delta_rule_backward(const delta_rule_problem<T, host_memory>& problem,
                           const delta_rule_inputs<T, host_memory>& in, const_summaries_ref<T, host_memory> prepared,
                           const_states_ref<T, host_memory> h0, detail::in_ref<T, 3> d_o,
                           const_states_ref<T, host_memory> dht, const delta_rule_gradients<T, host_memory>& gradients,
                           states_ref<T, host_memory> dh0, workspace<host_memory>& ws, host_stream) const {
    with_rule([&]<class Rule>(Rule) {
      detail::delta_rule_backward<Rule, T>(exec_, problem, in, prepared, h0, d_o, dht, gradients, dh0, ws);
    });
  }
  template <class T, class S>
  void delta_rule_step(std::type_identity_t<accumulate_t<T>> scale, const delta_rule_inputs<T, host_memory>& in,
                       tensor_ref<S, 4> states, tensor_ref<const std::int32_t, 1> slots, tensor_ref<T, 3> o,
                       host_stream) const {
    detail::delta_rule_step<T, S>(exec_, scale, in, states, slots, o);
  }

  // ---- states.hpp ----
  template <class E, class A>
  void load_states(tensor_ref<E, 4> pool, tensor_ref<const std::int32_t, 1> slots, tensor_ref<A, 4> out,
                   host_stream) const {
    detail::load_states<std::remove_const_t<E>, A>(exec_, pool, slots, out);
  }
  template <class E, class S>
  void store_states(tensor_ref<E, 4> in, tensor_ref<const std::int32_t, 1> slots, tensor_ref<S, 4> pool,
                    host_stream) const {
    detail::store_states<std::remove_const_t<E>, S>(exec_, in, slots, pool);
  }

 private:
  template <class F>
  auto with_rule(F&& f) const {
    return rule_ == rule::chunked ? f(detail::chunked_rule{}) : f(detail::recurrent_rule{});
  }
  static void expects_initialized() {
    expects<backend_error>(Kokkos::is_initialized() && !Kokkos::is_finalized(),
                           "Kokkos is not initialised; the program must call Kokkos::initialize (or hold a "
                           "Kokkos::ScopeGuard) before it makes a backend, and gdn never does so itself");
  }
  static Exec make_instance() {
    expects_initialized();  // first: the default instance exists only in an initialised Kokkos
    return Exec();
  }

  Exec exec_;
  rule rule_ = rule::chunked;
};

static_assert(row_ops<backend<>, float> && row_ops<backend<>, double>);
static_assert(linear_ops<backend<>, float> && linear_ops<backend<>, double>);
static_assert(conv_ops<backend<>, float> && conv_ops<backend<>, double>);
static_assert(gate_ops<backend<>, float> && gate_ops<backend<>, double>);
static_assert(norm_ops<backend<>, float> && norm_ops<backend<>, double>);
static_assert(gated_delta_rule<backend<>, float> && gated_delta_rule<backend<>, double>);
static_assert(gdn::backend<backend<>, float> && gdn::backend<backend<>, double>);
static_assert(gdn::backend<backend<>, bfloat16> && gdn::backend<backend<>, float16>);
static_assert(serving_backend<backend<>, float, bfloat16> && serving_backend<backend<>, double, double>);

}  // namespace kokkos
}  // namespace v0
}  // namespace gdn
