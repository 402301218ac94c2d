// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Sigmoid and SiLU, to the precision that a result of some type can hold.

#include <gdn/concepts/backend.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// To the last bits of a float.
__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
/// To what inputs or a result of type T can tell apart: 16-bit types need no correctly rounded quotient.
template <class T>
__device__ inline float sigmoid_for(float x) {
  if constexpr (sizeof(T) != 2) return sigmoid(x);
  float power, result;  // flushed to zero where tiny: scaling around these two instructions costs more than they do
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

/// y and its derivative with respect to p, for inputs or results of type T. In a loop, `act` should be a constant:
/// branches around each element put the latencies of sigmoid one behind the other.
template <class T>
__device__ inline float apply(activation act, float p) {
  return act == activation::silu ? p * sigmoid_for<T>(p) : p;
}
template <class T>
__device__ inline float slope(activation act, float p) {
  if (act == activation::none) return 1.0f;
  const float s = sigmoid_for<T>(p);
  return s * (1.0f + p * (1.0f - s));
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
