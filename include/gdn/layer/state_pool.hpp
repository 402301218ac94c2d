// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  state_pool: the states of all sequences that are being served, in slots of the caller's memory.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include <gdn/core/storage.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/layer/dims.hpp>

namespace gdn {
inline namespace v0 {

/// `slots` places for the state of one sequence each. Owns nothing; slots that a call does not name are not touched.
/// StateT is the type in which the recurrent states are kept: accumulate_t<T>, or bfloat16 for half the memory. A state
/// is computed in accumulate_t<T> always, and rounded when it is put back.
///
/// Any strides will do (slots of all layers in one block, padding, ..) as long as one of the last two axes has stride 1
/// and slots do not overlap.
template <class T, class StateT = accumulate_t<T>, memory_kind Memory = host_memory>
struct state_pool {
  tensor_ref<StateT, 4, Memory> recurrent;  ///< [slots, Hv, K, V]
  tensor_ref<T, 3, Memory> conv;            ///< [slots, Dc, W]: the last W inputs of the convolution, oldest first

  constexpr index_t slots() const noexcept { return recurrent.extent(0); }
};

/// Which axis of a recurrent state has stride 1 in the pools that carve_pool makes.
enum class state_order : std::uint8_t {
  value_last,  ///< rows of V elements, as transformers and fla keep them
  key_last     ///< rows of K elements, as FlashInfer ("pretranspose") and fla (`state_v_first`) may
};

/// Takes a pool without gaps from a block; with a measuring workspace: what it needs. Contents are unspecified: the
/// first call for a sequence says `fresh`.
template <class T, class StateT = accumulate_t<T>, memory_kind Memory>
state_pool<T, StateT, Memory> carve_pool(workspace<Memory>& ws, const layer_dims& d, index_t slots,
                                         state_order order = state_order::value_last) {
  state_pool<T, StateT, Memory> pool;
  pool.recurrent = ws.template take<StateT>(slots, d.value_heads, d.key_dim, d.value_dim);
  if (order == state_order::key_last) {
    pool.recurrent.stride_[2] = 1;
    pool.recurrent.stride_[3] = d.key_dim;
  }
  pool.conv = ws.template take<T>(slots, d.channels(), d.conv_width);
  return pool;
}

namespace detail {

template <class T, int R, memory_kind Memory>
void expects_unit_axis(const tensor_ref<T, R, Memory>& t, std::string_view name) {
  const auto unit = [&](int axis) { return t.stride(axis) == 1 || t.extent(axis) <= 1; };
  expects<shape_error>(unit(R - 1) || unit(R - 2), name, "must have stride 1 in one of its last two axes, has",
                       t.stride(R - 2), "and", t.stride(R - 1));
}

/// Conv states [slots, Dc, W] as matrices of one head.
template <class T, memory_kind Memory>
constexpr tensor_ref<T, 4, Memory> as_states(const tensor_ref<T, 3, Memory>& t) noexcept {
  tensor_ref<T, 4, Memory> r;
  r.data_ = t.data_;
  for (int i = 0; i < 4; ++i) {
    r.extent_[i] = i == 1 ? 1 : t.extent_[i == 0 ? 0 : i - 1];
    r.stride_[i] = i == 1 ? 0 : t.stride_[i == 0 ? 0 : i - 1];
  }
  return r;
}

/// A pool that is only read.
template <class T, int R, memory_kind Memory>
constexpr tensor_ref<const T, R, Memory> read_only(const tensor_ref<T, R, Memory>& t) noexcept {
  return t;
}

}  // namespace detail

/// @throws shape_error naming the tensor and the axis
template <class T, class StateT, memory_kind Memory>
void check_pool(const state_pool<T, StateT, Memory>& pool, const layer_dims& d) {
  expects_shape(pool.recurrent, "the pool's recurrent states", {pool.slots(), d.value_heads, d.key_dim, d.value_dim});
  expects_shape(pool.conv, "the pool's conv states", {pool.slots(), d.channels(), d.conv_width});
  detail::expects_unit_axis(pool.recurrent, "the pool's recurrent states");
  detail::expects_unit_axis(pool.conv, "the pool's conv states");
}

/// States of type accumulate_t: what decode_step updates and deliver_states delivers.
template <class T, memory_kind Memory = host_memory>
using layer_state = state_pool<T, accumulate_t<T>, Memory>;

}  // namespace v0
}  // namespace gdn
