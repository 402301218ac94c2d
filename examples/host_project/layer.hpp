// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The layer as this project calls it. The templates of gdn are compiled in layer.cu and nowhere else: any host
/// compiler reads this header in a second, and a change in the program compiles no kernel.

#include <memory>
#include <vector>

#include <gdn/core/storage.hpp>
#include <gdn/cuda/memory.hpp>
#include <gdn/cuda/self.hpp>
#include <gdn/layer/gated_delta_net.hpp>

namespace host_project {

using gdn::index_t;
using device = gdn::device_memory;

/// A layer over packed documents of one shape, on one device: plan, workspace and handles. Weights, x and y are the
/// caller's own device buffers.
template <class T>
class layer {
 public:
  layer(const gdn::layer_dims& dims, const std::vector<index_t>& cu_seqlens, gdn::cuda::stream_ref s);
  ~layer();

  /// y [T, hid] of x [T, hid]; enqueued on the stream.
  void forward(const gdn::layer_parameters<T, device>& weights, gdn::tensor_ref<const T, 2, device> x,
               gdn::tensor_ref<T, 2, device> y, gdn::cuda::stream_ref s);

 private:
  struct state;
  std::unique_ptr<state> state_;
};

extern template class layer<float>;
extern template class layer<gdn::bfloat16>;

}  // namespace host_project
