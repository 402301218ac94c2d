// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What layer_f64.cpp and layer_f32.cpp instantiate.

#include <Kokkos_Core.hpp>

#include <gdn/cp/causal_conv1d.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <support/layer_api.hpp>

namespace gdn_test {

template <class T>
struct layer_api<T>::backend {
#ifdef KOKKOS_ENABLE_OPENMP
  using executor = Kokkos::OpenMP;
  static executor make(int threads) { return executor(threads); }
#else
  using executor = Kokkos::Serial;
  static executor make(int) { return executor(Kokkos::NewInstance{}); }
#endif
  gdn::kokkos::backend<executor> value;
};

template <class T>
layer_api<T>::layer_api(rule_kind rule, int threads)
    : be_(new backend{gdn::kokkos::backend<typename backend::executor>(
          backend::make(threads), rule == rule_kind::chunked ? gdn::kokkos::rule::chunked : gdn::kokkos::rule::recurrent)}) {
}
template <class T>
layer_api<T>::~layer_api() = default;

template <class T>
plan_on_host layer_api<T>::upload(const gdn::cp_plan& plan, memory_block& memory) const {
  return gdn::upload(be_->value, plan, memory, {});
}
template <class T>
gdn::layer_requirements layer_api<T>::requirements(const gdn::layer_dims& d, const plan_on_host& plan,
                                                   gdn::keep_policy policy) const {
  return gdn::requirements<T>(be_->value, d, plan, policy);
}
template <class T>
gdn::layer_tape<T> layer_api<T>::make_tape(const gdn::layer_dims& d, const plan_on_host& plan, gdn::keep_policy policy,
                                           memory_block& memory) const {
  return gdn::make_tape<T>(be_->value, d, plan, policy, memory);
}
template <class T>
void layer_api<T>::forward(any_communicator& comm, const gdn::gated_delta_net<T>& layer, const plan_on_host& plan,
                           gdn::tensor_ref<const T, 2> x, gdn::tensor_ref<T, 2> y,
                           const gdn::sequence_states<T>& states, gdn::layer_tape<T>& tape, memory_block& ws) const {
  gdn::forward(be_->value, comm, layer, plan, x, y, states, tape, ws, {});
}
template <class T>
void layer_api<T>::prefill(any_communicator& comm, const gdn::gated_delta_net<T>& layer, const plan_on_host& plan,
                           gdn::tensor_ref<const T, 2> x, gdn::tensor_ref<T, 2> y,
                           const gdn::sequence_states<T>& states, memory_block& ws) const {
  gdn::prefill(be_->value, comm, layer, plan, x, y, states, ws, {});
}
template <class T>
void layer_api<T>::backward(any_communicator& comm, const gdn::gated_delta_net<T>& layer, const plan_on_host& plan,
                            gdn::tensor_ref<const T, 2> dy, gdn::tensor_ref<T, 2> dx,
                            const gdn::state_gradients<T>& states, const gdn::layer_gradients<T>& grad,
                            const gdn::layer_tape<T>& tape, memory_block& ws) const {
  gdn::backward(be_->value, comm, layer, plan, dy, dx, states, grad, tape, ws, {});
}
template <class T>
void layer_api<T>::reduce_gradients(any_communicator& comm, const gdn::layer_gradients<T>& grad,
                                    memory_block& ws) const {
  gdn::reduce_gradients<T>(be_->value, comm, grad, ws, {});
}
template <class T>
void layer_api<T>::deliver_states(any_communicator& comm, const gdn::layer_dims& d, const gdn::cp_plan& plan,
                                  std::span<const int> targets, const gdn::layer_state<T>& from,
                                  const gdn::layer_state<T>& to, memory_block& ws) const {
  gdn::deliver_states<T>(be_->value, comm, d, plan, targets, from, to, ws, {});
}
template <class T>
gdn::memory_requirement layer_api<T>::decode_requirement(const gdn::layer_dims& d, index_t n) const {
  return gdn::decode_requirement<T>(be_->value, d, n);
}
template <class T>
void layer_api<T>::decode_step(const gdn::gated_delta_net<T>& layer, gdn::tensor_ref<const T, 2> x,
                               gdn::tensor_ref<T, 2> y, const gdn::layer_state<T>& state,
                               gdn::tensor_ref<const std::int32_t, 1> slots, memory_block& ws) const {
  gdn::decode_step(be_->value, layer, x, y, state, slots, ws, {});
}
template <class T>
gdn::memory_requirement layer_api<T>::conv_scratch(const gdn::cp_plan& plan, index_t channels) const {
  return gdn::conv_scratch<T>(be_->value, plan, channels);
}
template <class T>
gdn::memory_requirement layer_api<T>::rule_scratch(index_t key_heads, const plan_on_host& plan) const {
  return gdn::rule_scratch<T>(be_->value, key_heads, plan);
}
template <class T>
gdn::rule_tape<T, gdn::host_memory> layer_api<T>::take_rule_tape(index_t key_heads, const plan_on_host& plan,
                                                                 memory_block& memory) const {
  return gdn::rule_tape<T, gdn::host_memory>::take(be_->value, key_heads, plan, memory);
}
template <class T>
void layer_api<T>::gated_delta_rule(any_communicator& comm, const plan_on_host& plan,
                                    const gdn::delta_rule_inputs<T, gdn::host_memory>& in,
                                    gdn::const_states_ref<T, gdn::host_memory> initial, gdn::tensor_ref<T, 3> o,
                                    gdn::states_ref<T, gdn::host_memory> final_,
                                    const gdn::rule_tape<T, gdn::host_memory>& tape, memory_block& ws) const {
  gdn::cp::gated_delta_rule<T>(be_->value, comm, plan, in, initial, o, final_, tape, ws, {});
}
template <class T>
void layer_api<T>::gated_delta_rule_backward(any_communicator& comm, const plan_on_host& plan,
                                             const gdn::delta_rule_inputs<T, gdn::host_memory>& in,
                                             gdn::tensor_ref<const T, 3> d_o,
                                             gdn::const_states_ref<T, gdn::host_memory> d_final,
                                             const gdn::delta_rule_gradients<T, gdn::host_memory>& gradients,
                                             gdn::states_ref<T, gdn::host_memory> d_initial,
                                             const gdn::rule_tape<T, gdn::host_memory>& tape, memory_block& ws) const {
  gdn::cp::gated_delta_rule_backward<T>(be_->value, comm, plan, in, d_o, d_final, gradients, d_initial, tape, ws, {});
}
template <class T>
void layer_api<T>::causal_conv1d(any_communicator& comm, const plan_on_host& plan, gdn::tensor_ref<T, 2> x,
                                 gdn::tensor_ref<const T, 2> w, gdn::activation act,
                                 gdn::tensor_ref<const T, 3> initial, gdn::tensor_ref<T, 2> halo,
                                 gdn::tensor_ref<T, 2> y, gdn::tensor_ref<T, 3> final_, memory_block& ws) const {
  gdn::cp::causal_conv1d<T>(be_->value, comm, plan, x, w, act, initial, halo, y, final_, ws, {});
}
template <class T>
void layer_api<T>::causal_conv1d_backward(any_communicator& comm, const plan_on_host& plan,
                                          gdn::tensor_ref<const T, 2> x, gdn::tensor_ref<const T, 2> halo,
                                          gdn::tensor_ref<const T, 2> w, gdn::activation act,
                                          gdn::tensor_ref<const T, 2> dy, gdn::tensor_ref<const T, 3> d_final,
                                          gdn::tensor_ref<T, 2> dx, gdn::tensor_ref<T, 2> d_halo,
                                          gdn::tensor_ref<A, 2> dw, gdn::tensor_ref<T, 3> d_initial,
                                          memory_block& ws) const {
  gdn::cp::causal_conv1d_backward<T>(be_->value, comm, plan, x, halo, w, act, dy, d_final, dx, d_halo, dw, d_initial, ws,
                                     {});
}

}  // namespace gdn_test
