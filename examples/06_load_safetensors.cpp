// SPDX-License-Identifier: Apache-2.0
// Loads the layer of a bundle (tests/data/README.md) and runs its input: 06_load_safetensors [BUNDLE]
// Checks the output against the one in the file, which another implementation computed in fp32.

#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/io/checkpoint.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/requirements.hpp>

#include "support.hpp"

namespace {

using gdn::index_t;
using T = double;

std::string default_bundle() {
  return std::filesystem::path(__FILE__).parent_path().parent_path() / "tests/data/qwen3_5_plain.safetensors";
}

const gdn::tensor_entry& tensor(const gdn::safetensors& file, const char* name) {
  const gdn::tensor_entry* found = file.find(name);
  gdn::expects<gdn::metadata_error>(found != nullptr, "the file has no tensor", name);
  return *found;
}

bool run(const std::string& path) {
  const gdn::safetensors_file bundle = gdn::open_safetensors(path);  // mapped into memory, checked
  const gdn::safetensors& file = bundle.content;

  // The layer: sizes from the model's config, weights under the names and in the layout of the checkpoint. A file of a
  // whole model has the prefix layer_prefix(file, layer), and its config.json beside it.
  const auto config = file.metadata.find("config");
  gdn::expects<gdn::metadata_error>(config != file.metadata.end(), "the file has no config");
  const auto [dims, ssm_type] = gdn::dims_from_config(config->second);
  example::block weight_memory;
  const auto weights =
      example::allocate(weight_memory, [&d = dims](auto& ws) { return gdn::parameter_storage<T>::carve(ws, d); });
  gdn::load_parameters<T>(file, "linear_attn.", dims, weights, ssm_type);
  const gdn::gated_delta_net<T> layer{dims, weights};

  // The batch: B rows of S tokens, of which a mask may say which belong to which document.
  const gdn::tensor_entry& hidden = tensor(file, "hidden_states");
  const index_t batch = hidden.shape.at(0);
  const index_t length = hidden.shape.at(1);
  const gdn::tensor_entry* mask = file.find("attention_mask");
  const auto documents = mask != nullptr ? gdn::packing::from_mask(gdn::values_of<index_t>(*mask), batch, length)
                                         : gdn::packing::rows_of(batch, length);

  const gdn::kokkos::backend be;
  const gdn::contiguous_layout layout{.rows = length, .world = 1};
  const auto host_plan = gdn::plan_layer(dims, layout, documents, {}, 0);
  example::block plan_memory;
  const auto plan = example::allocate(plan_memory, [&](auto& ws) { return gdn::upload(be, host_plan, ws, {}); });
  const example::block scratch(gdn::requirements<T>(be, dims, plan, gdn::keep_policy::nothing).forward);
  auto ws = scratch.over();

  const auto x = gdn::values_of<T>(hidden);
  std::vector<T> y(x.size());
  const auto rows = [&, hid = dims.hidden](auto& v) { return gdn::make_tensor(v.data(), batch * length, hid); };
  gdn::self_communicator self;
  gdn::prefill(be, self, layer, plan, rows(x), rows(y), {}, ws, {});

  std::printf("%s: %lld x %lld tokens\n", path.c_str(), static_cast<long long>(batch), static_cast<long long>(length));
  const auto expected = gdn::values_of<T>(tensor(file, "expected.output"));
  return example::expect_at_most("output, relative", example::relative_error(y, expected), 3e-5);
}

}  // namespace

int main(int argc, char** argv) {
  const Kokkos::ScopeGuard kokkos(argc, argv);
  try {
    return run(argc > 1 ? argv[1] : default_bundle()) ? 0 : 1;
  } catch (const gdn::error& e) {  // says which tensor, which value, and the rule that it breaks
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
}
