// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A few neighbouring elements of any storage type, moved at once and computed in float.

#include <gdn/core/storage.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

template <class T, int N>
struct pack {
  T at[N];
  __device__ T& operator[](int i) { return at[i]; }
  __device__ const T& operator[](int i) const { return at[i]; }
};

template <class T, int N>
struct alignas(sizeof(T) * N) raw_pack {
  T at[N];
};

/// N elements from an address that is a multiple of their size.
template <class T, int N>
__device__ pack<float, N> load(const T* from) {
  const raw_pack<T, N> raw = *reinterpret_cast<const raw_pack<T, N>*>(from);
  pack<float, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = static_cast<float>(raw.at[i]);
  return out;
}
template <class T, int N>
__device__ void store(T* to, const pack<float, N>& v) {
  raw_pack<T, N> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.at[i] = static_cast<T>(v[i]);
  *reinterpret_cast<raw_pack<T, N>*>(to) = raw;
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
