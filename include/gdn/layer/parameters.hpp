// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The weights of a layer and their gradients, as structs of views; the caller owns the memory.

#include <array>
#include <concepts>
#include <string_view>
#include <type_traits>

#include <gdn/core/tensor.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/layer/dims.hpp>

namespace gdn {
inline namespace v0 {

/// One view for each parameter tensor. `W` is the type of the matrices, `A` the type of what keeps full precision.
/// The split layout of Qwen3.5; the interleaved one of Qwen3-Next is a permutation of rows of it, which the loader
/// (gdn/io/checkpoint.hpp) applies.
template <class W, class A, memory_kind Memory>
struct parameter_set {
  tensor_ref<W, 2, Memory> in_proj_qkv;  ///< [Dc, hid], rows q | k | v
  tensor_ref<W, 2, Memory> in_proj_z;    ///< [Hv V, hid]
  tensor_ref<W, 2, Memory> in_proj_b;    ///< [Hv, hid]
  tensor_ref<W, 2, Memory> in_proj_a;    ///< [Hv, hid]
  tensor_ref<W, 2, Memory> conv1d;       ///< [Dc, W], column W - 1 multiplies the current token
  tensor_ref<A, 1, Memory> A_log;        ///< [Hv]
  tensor_ref<A, 1, Memory> dt_bias;      ///< [Hv]
  tensor_ref<A, 1, Memory> norm;         ///< [V], plain weight (not 1 + w)
  tensor_ref<W, 2, Memory> out_proj;     ///< [hid, Hv V]

  /// Takes all nine from one block. With a measuring workspace: what they need.
  static parameter_set carve(workspace<Memory>& ws, const layer_dims& d)
    requires(!std::is_const_v<W> && !std::is_const_v<A>)
  {
    parameter_set p;
    p.in_proj_qkv = ws.template take<W>(d.channels(), d.hidden);
    p.in_proj_z = ws.template take<W>(d.values(), d.hidden);
    p.in_proj_b = ws.template take<W>(d.value_heads, d.hidden);
    p.in_proj_a = ws.template take<W>(d.value_heads, d.hidden);
    p.conv1d = ws.template take<W>(d.channels(), d.conv_width);
    p.A_log = ws.template take<A>(d.value_heads);
    p.dt_bias = ws.template take<A>(d.value_heads);
    p.norm = ws.template take<A>(d.value_dim);
    p.out_proj = ws.template take<W>(d.hidden, d.values());
    return p;
  }

  /// f(name in a checkpoint, view) for each, in a fixed order.
  template <class F>
  void for_each(F&& f) const {
    f("in_proj_qkv.weight", in_proj_qkv);
    f("in_proj_z.weight", in_proj_z);
    f("in_proj_b.weight", in_proj_b);
    f("in_proj_a.weight", in_proj_a);
    f("conv1d.weight", conv1d);
    f("A_log", A_log);
    f("dt_bias", dt_bias);
    f("norm.weight", norm);
    f("out_proj.weight", out_proj);
  }

  // NOLINTNEXTLINE(google-explicit-constructor): as each view converts
  template <class U>
    requires(std::same_as<U, const W> && !std::is_const_v<W> && !std::is_const_v<A>)
  operator parameter_set<U, const A, Memory>() const {
    return {in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, A_log, dt_bias, norm, out_proj};
  }
};

/// What forward and backward read. `A_log`, `dt_bias` and the norm weight are in accumulate_t<T> whatever T is.
template <class T, memory_kind Memory = host_memory>
using layer_parameters = parameter_set<const T, const accumulate_t<T>, Memory>;

/// Memory for the weights of a layer of type T.
template <class T, memory_kind Memory = host_memory>
using parameter_storage = parameter_set<T, accumulate_t<T>, Memory>;

/// Gradients of all nine, in accumulate_t<T>. backward() *adds* to them: sums over this rank's tokens only, until
/// reduce_gradients() has summed them over the ranks.
template <class T, memory_kind Memory = host_memory>
using layer_gradients = parameter_set<accumulate_t<T>, accumulate_t<T>, Memory>;

/// The parameters that stay in full precision in every checkpoint (NeMo's `_FP32_PARAM_NAMES`).
inline constexpr std::array<std::string_view, 2> fp32_parameter_names = {"A_log", "dt_bias"};

/// @throws shape_error naming the tensor and the axis
template <class W, class A, memory_kind Memory>
void check_parameters(const parameter_set<W, A, Memory>& p, const layer_dims& d) {
  const index_t hid = d.hidden;
  expects_shape(p.in_proj_qkv, "in_proj_qkv", {d.channels(), hid});
  expects_shape(p.in_proj_z, "in_proj_z", {d.values(), hid});
  expects_shape(p.in_proj_b, "in_proj_b", {d.value_heads, hid});
  expects_shape(p.in_proj_a, "in_proj_a", {d.value_heads, hid});
  expects_shape(p.conv1d, "conv1d", {d.channels(), d.conv_width});
  expects_shape(p.A_log, "A_log", {d.value_heads});
  expects_shape(p.dt_bias, "dt_bias", {d.value_heads});
  expects_shape(p.norm, "norm", {d.value_dim});
  expects_shape(p.out_proj, "out_proj", {hid, d.values()});
}

}  // namespace v0
}  // namespace gdn
