// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Prologue and epilogue of the delta rule: what a backend may fuse, and the small operations otherwise.

#include <gdn/concepts/backend.hpp>
#include <gdn/layer/tape.hpp>

namespace gdn {
inline namespace v0 {

/// Optional: a backend with one call for conv + SiLU, l2norm of q and k, and the gates. It must write what prologue()
/// writes, to the same precision.
template <class B, class T>
concept has_fused_prologue =
    requires(const B& be, const gated_delta_net<T, typename B::memory_type>& layer,
             const resident_plan<typename B::memory_type>& plan,
             const activations<T, typename B::memory_type>& values, typename B::stream_type s) {
      be.prologue(layer, plan, values, s);
    };

/// Optional: a backend with one call for the gated norm as epilogue() writes it.
template <class B, class T>
concept has_fused_epilogue =
    requires(const B& be, const gated_delta_net<T, typename B::memory_type>& layer,
             const activations<T, typename B::memory_type>& values, tensor_ref<T, 2, typename B::memory_type> n,
             typename B::stream_type s) { be.epilogue(layer, values, n, s); };

namespace detail {
/// keys -> q, k of unit length.
template <class T, class Backend, memory_kind Memory>
void normalise_keys(const Backend& be, const layer_dims& d, const activations<T, Memory>& act,
                    typename Backend::stream_type s) {
  const tensor_ref<const accumulate_t<T>, 2, Memory> keys = act.keys;
  be.l2norm_forward(split_columns(columns(keys, 0, d.keys()), d.key_heads, d.key_dim), d.l2_eps, act.q, act.rstd_q, s);
  be.l2norm_forward(split_columns(columns(keys, d.keys(), d.keys()), d.key_heads, d.key_dim), d.l2_eps, act.k,
                    act.rstd_k, s);
}

/// The rounded q, k and beta in the type in which the delta rule is computed.
template <class T, class Backend, memory_kind Memory>
void widen_inputs(const Backend& be, const activations<T, Memory>& act, typename Backend::stream_type s) {
  if constexpr (activations<T, Memory>::wide) {
    const auto rows_of = [](const auto& t) {
      return make_tensor<Memory>(t.data(), t.extent(0), t.extent(1) * t.extent(2));
    };
    be.copy_rows(rows_of(act.q), rows_of(act.wide_q), s);
    be.copy_rows(rows_of(act.k), rows_of(act.wide_k), s);
    be.copy_rows(act.beta, act.wide_beta, s);
  }
}
}  // namespace detail

/// qkv, halo, b, a -> q, k (unit length), v, g, beta.
template <class T, class Backend>
void prologue(const Backend& be, const gated_delta_net<T, typename Backend::memory_type>& layer,
              const resident_plan<typename Backend::memory_type>& plan,
              const activations<T, typename Backend::memory_type>& act, typename Backend::stream_type s) {
  if constexpr (has_fused_prologue<Backend, T>) {
    be.prologue(layer, plan, act, s);
  } else {
    using view = tensor_ref<const between_t<T, typename Backend::memory_type>, 2, typename Backend::memory_type>;
    const layer_dims& d = layer.dims;
    const view qkv = rows(act.qkv, 0, plan.host.compute_rows);  // [L, Dc]
    const auto convolve = [&](index_t begin, const auto& y) {
      const index_t n = y.extent(1);
      be.causal_conv1d_forward(plan.conv_segments, columns(qkv, begin, n), columns(view(act.halo), begin, n),
                               rows(layer.weights.conv1d, begin, n), activation::silu, y, s);
    };
    convolve(0, act.keys);
    convolve(2 * d.keys(), act.v);
    detail::normalise_keys(be, d, act, s);
    be.gates_forward(act.a, act.b, layer.weights.A_log, layer.weights.dt_bias, act.g, act.beta, s);
    detail::widen_inputs(be, act, s);
  }
}

/// o, z -> n [L, Hv V], the gated RMS norm.
template <class T, class Backend>
void epilogue(const Backend& be, const gated_delta_net<T, typename Backend::memory_type>& layer,
              const activations<T, typename Backend::memory_type>& act,
              tensor_ref<T, 2, typename Backend::memory_type> n, typename Backend::stream_type s) {
  if constexpr (has_fused_epilogue<Backend, T>) {
    be.epilogue(layer, act, n, s);
  } else {
    using view = tensor_ref<const between_t<T, typename Backend::memory_type>, 2, typename Backend::memory_type>;
    const layer_dims& d = layer.dims;
    be.gated_norm_forward(split_columns(view(act.o), d.value_heads, d.value_dim),
                          split_columns(view(act.z), d.value_heads, d.value_dim), layer.weights.norm, d.norm_eps,
                          split_columns(n, d.value_heads, d.value_dim), act.rstd_o, s);
  }
}

}  // namespace v0
}  // namespace gdn
