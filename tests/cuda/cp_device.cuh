// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ranks that are threads and share one device, for cp_run.hpp: what cp_*.cu instantiate.

#include <vector>

#include <gdn/cp/causal_conv1d.hpp>
#include <gdn/cp/gated_delta_rule.hpp>
#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/local.hpp>
#include <cuda/cp_device.hpp>
#include <support/device_block.cuh>

namespace gdn_test {

struct device_ranks {
  using memory = gdn::device_memory;
  using stream = gdn::cuda::stream_ref;
  using communicator = gdn::cuda::local_communicator;

  template <class E, int R>
  using tensor = gdn::tensor_ref<E, R, memory>;

  template <class T>
  class api {
   public:
    api(rule_kind, int) {}
    gdn::cuda::stream_ref stream() const { return stream_; }

    gdn::resident_plan<memory> upload(const gdn::cp_plan& plan, gdn::workspace<memory>& ws) const {
      return gdn::upload(backend(), plan, ws, stream_);
    }
    gdn::memory_requirement conv_scratch(const gdn::cp_plan& plan, index_t channels) const {
      return gdn::conv_scratch<T>(backend(), plan, channels);
    }
    gdn::memory_requirement rule_scratch(index_t key_heads, const gdn::resident_plan<memory>& plan) const {
      return gdn::rule_scratch<T>(backend(), key_heads, plan);
    }
    gdn::rule_tape<T, memory> take_rule_tape(index_t key_heads, const gdn::resident_plan<memory>& plan,
                                             gdn::workspace<memory>& ws) const {
      return gdn::rule_tape<T, memory>::take(backend(), key_heads, plan, ws);
    }
    template <class Comm>
    void gated_delta_rule(Comm& comm, const gdn::resident_plan<memory>& plan, const gdn::delta_rule_inputs<T, memory>& in,
                          gdn::const_states_ref<T, memory> initial, tensor<T, 3> o, gdn::states_ref<T, memory> final_,
                          const gdn::rule_tape<T, memory>& tape, gdn::workspace<memory>& ws) const {
      gdn::cp::gated_delta_rule<T>(backend(), comm, plan, in, initial, o, final_, tape, ws, stream_);
    }
    template <class Comm>
    void gated_delta_rule_backward(Comm& comm, const gdn::resident_plan<memory>& plan,
                                   const gdn::delta_rule_inputs<T, memory>& in, tensor<const T, 3> d_o,
                                   gdn::const_states_ref<T, memory> d_final,
                                   const gdn::delta_rule_gradients<T, memory>& gradients,
                                   gdn::states_ref<T, memory> d_initial, const gdn::rule_tape<T, memory>& tape,
                                   gdn::workspace<memory>& ws) const {
      gdn::cp::gated_delta_rule_backward<T>(backend(), comm, plan, in, d_o, d_final, gradients, d_initial, tape, ws,
                                            stream_);
    }
    template <class Comm>
    void causal_conv1d(Comm& comm, const gdn::resident_plan<memory>& plan, tensor<T, 2> x, tensor<const T, 2> w,
                       gdn::activation act, tensor<const T, 3> initial, tensor<T, 2> halo, tensor<T, 2> y,
                       tensor<T, 3> final_, gdn::workspace<memory>& ws) const {
      gdn::cp::causal_conv1d<T>(backend(), comm, plan, x, w, act, initial, halo, y, final_, ws, stream_);
    }
    template <class Comm>
    void causal_conv1d_backward(Comm& comm, const gdn::resident_plan<memory>& plan, tensor<const T, 2> x,
                                tensor<const T, 2> halo, tensor<const T, 2> w, gdn::activation act, tensor<const T, 2> dy,
                                tensor<const T, 3> d_final, tensor<T, 2> dx, tensor<T, 2> d_halo,
                                tensor<gdn::accumulate_t<T>, 2> dw, tensor<T, 3> d_initial,
                                gdn::workspace<memory>& ws) const {
      gdn::cp::causal_conv1d_backward<T>(backend(), comm, plan, x, halo, w, act, dy, d_final, dx, d_halo, dw, d_initial,
                                         ws, stream_);
    }

   private:
    static const gdn::cuda::backend& backend() {  // ranks and tests share its handle
      static const gdn::cuda::backend be;
      return be;
    }
    gdn::cuda::stream stream_;
  };
  template <class U>
  class array : public device_array<U> {
   public:
    template <class Api>
    array(const std::vector<U>& from, const Api& of) : device_array<U>(from, of.stream()) {}
  };
  class block : public poisoned_device_block {
   public:
    template <class Api>
    block(gdn::memory_requirement need, const Api& of) : poisoned_device_block(need, of.stream()) {}
  };
};

template <class T>
conv_answers run_conv_on_device(const conv_numbers& n, const stream_spread& s) {
  return run_conv<T, device_ranks>(n, s);
}
template <class T>
rule_stream_answers run_rule_on_device(const rule_stream& n, const stream_spread& s, std::vector<message_counts>* counts) {
  return run_rule<T, device_ranks>(n, s, counts);
}

}  // namespace gdn_test
