// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Rows of tokens on their way to the thread that walks over them.

#include <cstdint>

#include <gdn/cuda/detail/async_copy.cuh>
#include <gdn/cuda/detail/conv_walk.cuh>
#include <gdn/cuda/detail/vector.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// N channels of the next tokens of a few inputs, in shared memory. Each thread copies and reads packs of its own, so
/// that no register waits for memory and no barrier is needed: 12 to 16 tokens of each input are under way all the
/// time.
template <class T, int N, int Inputs>
struct token_ring {
  static constexpr int group = 4, groups = 4;  // tokens of a group; all groups but one are under way
  raw_pack<T, N> packs[groups][group][Inputs][conv_threads];

  /// Starts on the next tokens, to become group k: those before `left`, and zeros behind them. Moves `from` on.
  __device__ void fetch(int k, const T* (&from)[Inputs], const index_t (&strides)[Inputs], int left) {
#pragma unroll
    for (int i = 0; i < group; ++i) {
      raw_pack<T, N>* to[Inputs];
#pragma unroll
      for (int n = 0; n < Inputs; ++n) to[n] = &packs[k][i][n][threadIdx.x];
      if (i < left) {
#pragma unroll
        for (int n = 0; n < Inputs; ++n) {
          if constexpr (sizeof(raw_pack<T, N>) >= 4) {
            copy_async<T, N>(*to[n], from[n]);
          } else {  // there is no such copy of two bytes
            *to[n] = load_raw<T, N>(from[n]);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < Inputs; ++n) *to[n] = {};
      }
#pragma unroll
      for (int n = 0; n < Inputs; ++n) next_row(from[n], strides[n]);
    }
    commit_copies();
  }
  /// Waits for the oldest group, if fetch() was called for all that follow it.
  __device__ void await() const {
    wait_copies<groups - 1>();
  }
  __device__ const raw_pack<T, N>& operator()(int k, int i, int input) const {
    return packs[k][i][input][threadIdx.x];
  }
};

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
