// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What serving needs of a backend beyond a layer's operations: states in slots of the caller's pools.

#include <cstdint>

#include <gdn/concepts/backend.hpp>

namespace gdn {
inline namespace v0 {

/// Matrices [H, K, V] of each sequence between the slots of a pool, in S, and a dense buffer, in A.
///
/// 1. `load_states(pool [slots, H, K, V], slots [n], out [n, H, K, V], s)`: out[i] = pool[slots[i]], or zero where
///    slots[i] is -1.
/// 2. `store_states(in [n, H, K, V], slots [n], pool, s)`: pool[slots[i]] = in[i]; -1 is skipped. Zeros are stored
///    where `in` has no data.
/// 3. The buffer is row-major without gaps. The pool has any strides, of which the last or the last but one is 1; its
///    slots do not overlap. No slot is stored twice.
/// 4. A value that is widened is exact; one that is narrowed is rounded once, to nearest even, and NaN stays NaN.
/// 5. Nothing else of the pool is written, nor of a slot that no entry names.
template <class B, class S, class A>
concept state_ops = requires(const B& be, tensor_ref<const S, 4, typename B::memory_type> pool_in,
                             tensor_ref<S, 4, typename B::memory_type> pool_out,
                             tensor_ref<const A, 4, typename B::memory_type> in,
                             tensor_ref<A, 4, typename B::memory_type> out,
                             tensor_ref<const std::int32_t, 1, typename B::memory_type> slots,
                             typename B::stream_type s) {
  be.load_states(pool_in, slots, out, s);
  be.store_states(in, slots, pool_out, s);
};

/// `delta_rule_step` of gated_delta_rule on states of type S.
///
/// 1. `states` is a pool as state_ops 3 says.
/// 2. The step is computed in accumulate_t from the widened state; `o` is taken from the new state before it is
///    rounded, once, to S.
template <class B, class T, class S>
concept pool_steps = requires(const B& be, accumulate_t<T> scale,
                              const delta_rule_inputs<T, typename B::memory_type>& in,
                              tensor_ref<S, 4, typename B::memory_type> states,
                              tensor_ref<const std::int32_t, 1, typename B::memory_type> slots,
                              tensor_ref<T, 3, typename B::memory_type> o, typename B::stream_type s) {
  be.delta_rule_step(scale, in, states, slots, o, s);
};

/// A backend that serves layers of type T whose recurrent states are kept in S. Conv states are kept in T, and its
/// `causal_conv1d_step` takes them with any strides.
template <class B, class T, class S>
concept serving_backend =
    backend<B, T> && state_ops<B, S, accumulate_t<T>> && state_ops<B, T, T> &&
    pool_steps<B, between_t<T, typename B::memory_type>, S>;

}  // namespace v0
}  // namespace gdn
