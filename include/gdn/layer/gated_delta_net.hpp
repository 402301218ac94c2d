// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A layer as a value: its sizes and its weights; and what a plan must know of it.

#include <gdn/layer/dims.hpp>
#include <gdn/layer/parameters.hpp>
#include <gdn/plan/resident.hpp>

namespace gdn {
inline namespace v0 {

/// Sizes and weights of one Gated DeltaNet layer. Owns nothing; copying it copies views.
template <class T, memory_kind Memory = host_memory>
struct gated_delta_net {
  layer_dims dims;
  layer_parameters<T, Memory> weights;
};

/// The sizes that a plan for this layer depends on. @param chunk tokens per chunk of the delta rule
constexpr plan_shape shape_of(const layer_dims& d, index_t chunk = 64) noexcept {
  return {d.conv_width, {d.value_heads, d.key_dim, d.value_dim}, chunk, d.hidden};
}

/// Plans a batch for a layer: see plan_context_parallel.
template <sequence_layout Layout>
cp_plan plan_layer(const layer_dims& d, const Layout& layout, const packing& pack, const plan_options& options,
                   int rank, index_t chunk = 64) {
  return plan_context_parallel(layout, pack, shape_of(d, chunk), d.channels(), options, rank);
}

/// @throws metadata_error if the plan was made for a layer of other sizes
template <class T, memory_kind Memory>
void check_layer(const gated_delta_net<T, Memory>& layer, const cp_plan& plan) {
  raise(validate_dims(layer.dims));
  check_parameters(layer.weights, layer.dims);
  const plan_shape want = shape_of(layer.dims, plan.shape.chunk);
  expects<metadata_error>(plan.shape.conv_width == want.conv_width, "the plan is for conv width", plan.shape.conv_width,
                          ", the layer has", want.conv_width);
  expects<metadata_error>(plan.shape.hidden == want.hidden, "the plan is for hid", plan.shape.hidden,
                          ", the layer has", want.hidden);
  expects<metadata_error>(plan.shape.summary == want.summary && plan.conv_channels == layer.dims.channels(),
                          "the plan is for", plan.shape.summary.heads, "value heads of", plan.shape.summary.key_dim,
                          "x", plan.shape.summary.value_dim, "and", plan.conv_channels,
                          "channels, which are not this layer's");
}

}  // namespace v0
}  // namespace gdn
