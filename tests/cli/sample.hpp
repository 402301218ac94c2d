// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Layer bundles made in memory, for tests that change one thing of a sound one.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <gdn/io/safetensors.hpp>

namespace gdn_test {

using gdn::index_t;

/// Tensors with their bytes, and metadata; B = 2 rows of S = 8 tokens, hid = 4, Hk = 1, Hv = 2, K = V = 2, W = 3.
struct sample {
  struct tensor {
    gdn::dtype type;
    std::vector<index_t> shape;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, tensor> tensors;
  gdn::metadata_map metadata;

  sample() {
    metadata["config"] =
        R"({"hidden_size": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 2, )"
        R"("linear_value_head_dim": 2, "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-6, "hidden_act": "silu"})";
    metadata["peer"] = "nobody";
    const std::vector<std::pair<std::string, std::vector<index_t>>> parameters = {{"in_proj_qkv.weight", {8, 4}},
                                                                                  {"in_proj_z.weight", {4, 4}},
                                                                                  {"in_proj_b.weight", {2, 4}},
                                                                                  {"in_proj_a.weight", {2, 4}},
                                                                                  {"conv1d.weight", {8, 1, 3}},
                                                                                  {"A_log", {2}},
                                                                                  {"dt_bias", {2}},
                                                                                  {"norm.weight", {2}},
                                                                                  {"out_proj.weight", {4, 4}}};
    for (const auto& [name, shape] : parameters) floats("linear_attn." + name, shape);
    floats("hidden_states", {2, 8, 4});
  }

  /// All elements have the same value.
  void floats(const std::string& name, const std::vector<index_t>& shape, double value = 0.5,
              gdn::dtype type = gdn::dtype::f32) {
    const index_t size = std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies<>());
    const std::vector<double> values(static_cast<std::size_t>(size), value);
    tensors[name] = {type, shape, gdn::encode(values, type)};
  }
  void integers(const std::string& name, const std::vector<index_t>& shape, const std::vector<index_t>& values) {
    std::vector<std::byte> bytes(values.size() * sizeof(index_t));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    tensors[name] = {gdn::dtype::i64, shape, std::move(bytes)};
  }

  void write(const std::string& path) const {
    std::vector<gdn::tensor_entry> entries;
    for (const auto& [name, t] : tensors) entries.push_back({name, t.type, t.shape, t.bytes});
    gdn::write_safetensors(path, entries, metadata);
  }
};

}  // namespace gdn_test
