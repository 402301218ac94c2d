// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The layer on the device, compiled once per type, for tests that a host compiler compiles.

#include <gdn/core/storage.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {

/// As run_layer(), by threads that share one device. Messages and bytes are not counted.
template <class T>
layer_result run_layer_on_device(const layer_batch& batch, const layer_spread& spread);
extern template layer_result run_layer_on_device<float>(const layer_batch&, const layer_spread&);
extern template layer_result run_layer_on_device<gdn::bfloat16>(const layer_batch&, const layer_spread&);
extern template layer_result run_layer_on_device<gdn::float16>(const layer_batch&, const layer_spread&);

/// The batch with the numbers that a layer of type T stores, so that a reference starts from the rounded ones.
template <class T>
layer_batch rounded(layer_batch b) {
  const auto round = [](values& v) {
    for (double& x : v) x = static_cast<double>(static_cast<T>(static_cast<float>(x)));
  };
  for (const auto i : {in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, out_proj}) round(b.parameters[i]);
  for (values* v : {&b.x, &b.dy, &b.initial_conv, &b.d_final_conv}) round(*v);
  return b;
}

}  // namespace gdn_test
