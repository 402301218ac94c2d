// SPDX-License-Identifier: Apache-2.0
#include "layer.hpp"

#include <gdn/cuda/backend.cuh>
#include <gdn/layer/requirements.hpp>

namespace host_project {

template <class T>
struct layer<T>::state {
  gdn::layer_dims dims;
  gdn::cuda::backend backend;
  gdn::cuda::self_communicator comm;  // local_communicator or NCCL where there are several ranks
  gdn::cuda::device_block tables, scratch;
  gdn::resident_plan<device> plan;

  state(const gdn::layer_dims& d, const gdn::cp_plan& p, gdn::cuda::stream_ref s)
      : dims(d), tables(gdn::resident_requirement<device>(p)), scratch({0}) {
    auto ws = tables.workspace();
    plan = gdn::upload(backend, p, ws, s);
    scratch = gdn::cuda::device_block(gdn::requirements<T>(backend, dims, plan, gdn::keep_policy::nothing).forward);
  }
};

template <class T>
layer<T>::layer(const gdn::layer_dims& dims, const std::vector<index_t>& cu_seqlens, gdn::cuda::stream_ref s) {
  const index_t tokens = cu_seqlens.back();
  const auto plan = gdn::plan_layer(dims, gdn::contiguous_layout{tokens, 1},
                                    gdn::packing::from_cu_seqlens(cu_seqlens, {}, 1, tokens), {}, 0);
  state_ = std::make_unique<state>(dims, plan, s);
}
template <class T>
layer<T>::~layer() = default;
template <class T>
void layer<T>::forward(const gdn::layer_parameters<T, device>& weights, gdn::tensor_ref<const T, 2, device> x,
                       gdn::tensor_ref<T, 2, device> y, gdn::cuda::stream_ref s) {
  auto ws = state_->scratch.workspace();
  const gdn::gated_delta_net<T, device> net{state_->dims, weights};
  gdn::prefill(state_->backend, state_->comm, net, state_->plan, x, y, {}, ws, s);
}

template class layer<float>;
template class layer<gdn::bfloat16>;

}  // namespace host_project
