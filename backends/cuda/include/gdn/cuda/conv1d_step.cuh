// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One token per sequence: the convolution's step on states in place.

#include <cstdint>

#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/cuda/detail/activation.cuh>
#include <gdn/cuda/detail/vector.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// One thread per channel of one sequence's token. `Dense`: the state's W = 4 columns lie next to each other.
template <class T, class Y, bool Dense>
__global__ void conv_step_kernel(tensor_ref<const T, 2, device_memory> x, tensor_ref<T, 3, device_memory> states,
                                 const std::int32_t* slots, tensor_ref<const T, 2, device_memory> weight,
                                 activation act, tensor_ref<Y, 2, device_memory> y) {
  const index_t channel = blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x;
  const index_t row = blockIdx.x;
  if (channel >= x.extent(1)) return;
  const std::int32_t slot = slots[row];
  if (slot < 0) {
    y(row, channel) = static_cast<Y>(0.0f);
    return;
  }
  T* state = &states(slot, channel, 0);
  float p = 0;
  if constexpr (Dense) {
    const pack<float, 4> old = load<T, 4>(state);
    const pack<float, 4> now{{old[1], old[2], old[3], static_cast<float>(x(row, channel))}};
    const pack<float, 4> w = load<T, 4>(&weight(channel, 0));
#pragma unroll
    for (int j = 0; j < 4; ++j) p += w[j] * now[j];
    store<T, 4>(state, now);
  } else {
    const index_t W = states.extent(2);
    const index_t stride = states.stride(2);
    for (index_t j = 0; j < W; ++j) {
      const T v = j + 1 < W ? state[(j + 1) * stride] : x(row, channel);
      state[j * stride] = v;
      p += static_cast<float>(weight(channel, j)) * static_cast<float>(v);
    }
  }
  y(row, channel) = static_cast<Y>(apply<T>(act, p));
}

/// @param slots [n] all different, each inside the pool, or -1 for a row without a sequence. They lie on the device and
///              are not looked at here: a slot outside is memory of others, and one that stands twice is a race.
template <class T, class Y>
void causal_conv1d_step(in_ref<T, 2> x, out_ref<T, 3> states, tensor_ref<const std::int32_t, 1, device_memory> slots,
                        in_ref<T, 2> w, activation act, out_ref<Y, 2> y, stream_ref s) {
  expects_causal_conv1d_step(x, states, slots, w, y);
  const bool dense = states.extent(2) == 4 && moves_in_packs(states, 4) && moves_in_packs(w, 4);
  launch("causal_conv1d_step", dense ? conv_step_kernel<T, Y, true> : conv_step_kernel<T, Y, false>,
         grid_of(x.extent(0), divide_up(x.extent(1), 128)), 128, 0, s, x, states, slots.data(), w, act, y);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
