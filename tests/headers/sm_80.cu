// SPDX-License-Identifier: Apache-2.0
// The layer's forward and backward in bfloat16, for all sizes of heads, compile for the oldest devices that the backend
// names: other tests are compiled for one architecture, which may be a newer one.

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/self.hpp>
#include <gdn/layer/backward.hpp>
#include <gdn/layer/forward.hpp>

template <class T>
struct layer_step {
  using device = gdn::device_memory;
  using rows = gdn::tensor_ref<T, 2, device>;

  gdn::cuda::backend be;
  gdn::cuda::self_communicator self;
  gdn::gated_delta_net<T, device> net;
  gdn::resident_plan<device> plan;
  gdn::layer_tape<T, device> tape;
  gdn::layer_gradients<T, device> gradients;
  gdn::workspace<device> ws;

  void operator()(const rows& x, const rows& y, const rows& dy, const rows& dx, gdn::cuda::stream_ref s) {
    gdn::forward(be, self, net, plan, x, y, {}, tape, ws, s);
    gdn::backward(be, self, net, plan, dy, dx, {}, gradients, tape, ws, s);
  }
};

template struct layer_step<gdn::bfloat16>;
