// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The library's entry points with the Kokkos backend, compiled once per type: tests of the layer compile fast.

#include <memory>
#include <span>

#include <gdn/core/storage.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/reduce.hpp>
#include <gdn/layer/requirements.hpp>
#include <support/any_communicator.hpp>

namespace gdn_test {

using gdn::index_t;

enum class rule_kind { chunked, recurrent };

using plan_on_host = gdn::resident_plan<gdn::host_memory>;
using memory_block = gdn::workspace<gdn::host_memory>;

/// A backend for layers of type T; each function is the one of the library with that name.
template <class T>
class layer_api {
 public:
  using A = gdn::accumulate_t<T>;

  explicit layer_api(rule_kind rule = rule_kind::chunked, int threads = 1);
  ~layer_api();
  layer_api(const layer_api&) = delete;
  layer_api& operator=(const layer_api&) = delete;

  plan_on_host upload(const gdn::cp_plan& plan, memory_block& memory) const;
  gdn::layer_requirements requirements(const gdn::layer_dims& d, const plan_on_host& plan,
                                       gdn::keep_policy policy) const;
  gdn::layer_tape<T> make_tape(const gdn::layer_dims& d, const plan_on_host& plan, gdn::keep_policy policy,
                               memory_block& memory) const;
  void forward(any_communicator& comm, const gdn::gated_delta_net<T>& layer, const plan_on_host& plan,
               gdn::tensor_ref<const T, 2> x, gdn::tensor_ref<T, 2> y, const gdn::sequence_states<T>& states,
               gdn::layer_tape<T>& tape, memory_block& ws) const;
  void prefill(any_communicator& comm, const gdn::gated_delta_net<T>& layer, const plan_on_host& plan,
               gdn::tensor_ref<const T, 2> x, gdn::tensor_ref<T, 2> y, const gdn::sequence_states<T>& states,
               memory_block& ws) const;
  void backward(any_communicator& comm, const gdn::gated_delta_net<T>& layer, const plan_on_host& plan,
                gdn::tensor_ref<const T, 2> dy, gdn::tensor_ref<T, 2> dx, const gdn::state_gradients<T>& states,
                const gdn::layer_gradients<T>& grad, const gdn::layer_tape<T>& tape, memory_block& ws) const;
  void reduce_gradients(any_communicator& comm, const gdn::layer_gradients<T>& grad, memory_block& ws) const;
  void deliver_states(any_communicator& comm, const gdn::layer_dims& d, const gdn::cp_plan& plan,
                      std::span<const int> targets, const gdn::layer_state<T>& from, const gdn::layer_state<T>& to,
                      memory_block& ws) const;
  gdn::memory_requirement decode_requirement(const gdn::layer_dims& d, index_t n) const;
  void decode_step(const gdn::gated_delta_net<T>& layer, gdn::tensor_ref<const T, 2> x, gdn::tensor_ref<T, 2> y,
                   const gdn::layer_state<T>& state, gdn::tensor_ref<const std::int32_t, 1> slots,
                   memory_block& ws) const;

  // cp/ on its own.
  gdn::memory_requirement conv_scratch(const gdn::cp_plan& plan, index_t channels) const;
  gdn::memory_requirement rule_scratch(index_t key_heads, const plan_on_host& plan) const;
  gdn::rule_tape<T, gdn::host_memory> take_rule_tape(index_t key_heads, const plan_on_host& plan,
                                                     memory_block& memory) const;
  void gated_delta_rule(any_communicator& comm, const plan_on_host& plan,
                        const gdn::delta_rule_inputs<T, gdn::host_memory>& in,
                        gdn::const_states_ref<T, gdn::host_memory> initial, gdn::tensor_ref<T, 3> o,
                        gdn::states_ref<T, gdn::host_memory> final_, const gdn::rule_tape<T, gdn::host_memory>& tape,
                        memory_block& ws) const;
  void gated_delta_rule_backward(any_communicator& comm, const plan_on_host& plan,
                                 const gdn::delta_rule_inputs<T, gdn::host_memory>& in,
                                 gdn::tensor_ref<const T, 3> d_o, gdn::const_states_ref<T, gdn::host_memory> d_final,
                                 const gdn::delta_rule_gradients<T, gdn::host_memory>& gradients,
                                 gdn::states_ref<T, gdn::host_memory> d_initial,
                                 const gdn::rule_tape<T, gdn::host_memory>& tape, memory_block& ws) const;
  void causal_conv1d(any_communicator& comm, const plan_on_host& plan, gdn::tensor_ref<T, 2> x,
                     gdn::tensor_ref<const T, 2> w, gdn::activation act, gdn::tensor_ref<const T, 3> initial,
                     gdn::tensor_ref<T, 2> halo, gdn::tensor_ref<T, 2> y, gdn::tensor_ref<T, 3> final_,
                     memory_block& ws) const;
  void causal_conv1d_backward(any_communicator& comm, const plan_on_host& plan, gdn::tensor_ref<const T, 2> x,
                              gdn::tensor_ref<const T, 2> halo, gdn::tensor_ref<const T, 2> w, gdn::activation act,
                              gdn::tensor_ref<const T, 2> dy, gdn::tensor_ref<const T, 3> d_final,
                              gdn::tensor_ref<T, 2> dx, gdn::tensor_ref<T, 2> d_halo, gdn::tensor_ref<A, 2> dw,
                              gdn::tensor_ref<T, 3> d_initial, memory_block& ws) const;

 private:
  struct backend;
  std::unique_ptr<backend> be_;
};

extern template class layer_api<double>;
extern template class layer_api<float>;
extern template class layer_api<gdn::bfloat16>;

}  // namespace gdn_test
