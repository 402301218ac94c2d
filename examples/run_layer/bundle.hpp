// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A layer bundle: a layer, its input, and what another implementation computed from them, all checked.

#include <optional>
#include <string>
#include <vector>

#include <gdn/core/error.hpp>
#include <gdn/core/types.hpp>
#include <gdn/io/checkpoint.hpp>
#include <gdn/io/safetensors.hpp>
#include <gdn/plan/fragment.hpp>
#include <gdn/plan/packing.hpp>

#include "options.hpp"

namespace gdn_run {

using gdn::index_t;

/// What precedes the names of the parameters.
inline constexpr const char* parameter_prefix = "linear_attn.";

/// A tensor with which results are compared.
struct expected_tensor {
  std::string name;  ///< of the result: without "expected."
  const gdn::tensor_entry* entry = nullptr;
};

/// Every tensor has the shape and a dtype that it must have; pointers are null where the file lacks a tensor.
/// Letters: B rows of S tokens, N documents, D tokens to decode, and those of layer_dims.
struct bundle {
  gdn::safetensors_file file;
  gdn::layer_config config;
  gdn::weight_layout weights = gdn::weight_layout::split;
  std::string peer;  ///< who computed what is expected

  index_t batch = 0;          ///< B
  index_t seq = 0;            ///< S
  index_t decode_tokens = 0;  ///< D
  gdn::packing packing;       ///< packing.documents() is N

  const gdn::tensor_entry* hidden_states = nullptr;         ///< [B, S, hid]
  const gdn::tensor_entry* initial_state = nullptr;         ///< [N, Hv, K, V]
  const gdn::tensor_entry* initial_conv_state = nullptr;    ///< [N, Dc, W]
  const gdn::tensor_entry* grad_output = nullptr;           ///< [B, S, hid]; asks for the backward pass
  const gdn::tensor_entry* grad_recurrent_state = nullptr;  ///< [N, Hv, K, V]
  const gdn::tensor_entry* grad_conv_state = nullptr;       ///< [N, Dc, W]
  const gdn::tensor_entry* decode_hidden_states = nullptr;  ///< [B, D, hid]; asks for decoding
  std::vector<std::vector<index_t>> seq_index;              ///< positions of each rank, empty if there is none
  std::vector<expected_tensor> expected;

  const gdn::layer_dims& dims() const noexcept { return config.dims; }
  /// Whether the gradient of this input is expected, though the bundle may leave the input itself out: it is zero then.
  bool expects_gradient_of(const std::string& input) const;
};

/// @throws gdn::metadata_error naming the file, the tensor or position, the value and the rule it breaks
bundle load_bundle(const std::string& path);

/// Which rank holds which of the B * S rows, as `--layout` and `--ranks` say.
/// @throws gdn::metadata_error if the bundle does not fit the layout, naming the option
gdn::fragment_table make_layout_table(const options& o, const bundle& b);

/// Nothing, or why `--backend` does not compute a layer of these sizes.
std::optional<gdn::diagnostic> exceeds_backend(const options& o, const bundle& b);

/// Nothing, or why the run cannot fit this machine's memory, by a bound that is too low.
std::optional<gdn::diagnostic> exceeds_memory(const options& o, const bundle& b);

}  // namespace gdn_run
