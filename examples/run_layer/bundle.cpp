// SPDX-License-Identifier: Apache-2.0
#include "bundle.hpp"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include <gdn/core/error.hpp>
#if defined(GDN_RUN_CUDA)
#include <gdn/cuda/head_sizes.hpp>
#endif
#include <gdn/plan/layouts.hpp>

namespace gdn_run {
namespace {

using gdn::diagnostic;
using gdn::metadata_error;
using gdn::say;
using gdn::tensor_entry;
using shape = std::vector<index_t>;

std::string in_quotes(std::string_view name) {
  return "'" + std::string(name) + "'";
}  // for names we know

/// Reads the tensors of a file as a bundle; errors have no file name yet.
class loader {
 public:
  explicit loader(bundle& b) : b_(b) {}

  void load() {
    load_config();
    load_input();
    load_packing();
    load_seq_index();
    load_states_and_gradients();
    load_decode();
    load_expected();
  }

 private:
  const tensor_entry* find(std::string_view name) const { return b_.file.find(name); }

  /// A tensor of floats of this shape, if it is there.
  const tensor_entry* floating(std::string_view name, const shape& want) const {
    const tensor_entry* t = find(name);
    if (t != nullptr) gdn::raise(gdn::validate_floating(*t, want));
    return t;
  }

  /// A tensor of integers, if it is there; `axes` says what its axes are.
  const tensor_entry* indices(std::string_view name, std::size_t rank, const char* axes) const {
    const tensor_entry* t = find(name);
    if (t == nullptr) return nullptr;
    if (!gdn::is_index(t->type)) {
      throw metadata_error(
          say("tensor", in_quotes(name), "has dtype", gdn::name_of(t->type), "; it must be I64 or I32"));
    }
    expects_axes(*t, rank, axes);
    return t;
  }

  static void expects_axes(const tensor_entry& t, std::size_t rank, const char* axes) {
    if (t.shape.size() == rank) return;
    throw metadata_error(
        say("tensor", in_quotes(t.name), "has the shape", gdn::shape_text(t.shape), "; it must be", axes));
  }

  shape activation() const { return {b_.batch, b_.seq, b_.dims().hidden}; }
  shape recurrent_state() const {
    return {b_.packing.documents(), b_.dims().value_heads, b_.dims().key_dim, b_.dims().value_dim};
  }
  shape conv_state() const { return {b_.packing.documents(), b_.dims().channels(), b_.dims().conv_width}; }

  void load_config() {
    const gdn::metadata_map& metadata = b_.file.content.metadata;
    const auto config = metadata.find("config");
    if (config == metadata.end()) throw metadata_error("__metadata__ has no 'config'");
    b_.config = gdn::dims_from_config(config->second);
    if (const auto peer = metadata.find("peer"); peer != metadata.end()) b_.peer = peer->second;
    b_.weights = gdn::checkpoint_layout(b_.file.content, parameter_prefix, b_.dims());
  }

  void load_input() {
    const tensor_entry* t = find("hidden_states");
    if (t == nullptr) throw metadata_error("tensor 'hidden_states' is missing");
    expects_axes(*t, 3, "[B, S, hid]");
    gdn::raise(gdn::validate_floating(*t, shape{t->shape[0], t->shape[1], b_.dims().hidden}));
    b_.batch = t->shape[0];
    b_.seq = t->shape[1];
    if (b_.batch == 0 || b_.seq == 0) {
      throw metadata_error(say("tensor 'hidden_states' has the shape", gdn::shape_text(t->shape),
                               "; at least one row of at least one token is needed"));
    }
    b_.hidden_states = t;
  }

  void load_packing() {
    const tensor_entry* mask = indices("attention_mask", 2, "[B, S]");
    const tensor_entry* cu = indices("cu_seqlens", 1, "[N + 1]");
    if (mask != nullptr && cu != nullptr) {
      throw metadata_error("tensors 'attention_mask' and 'cu_seqlens' are both there; only one may be");
    }
    if (mask != nullptr) {
      if (mask->shape != shape{b_.batch, b_.seq}) {
        throw metadata_error(say("tensor 'attention_mask' has the shape", gdn::shape_text(mask->shape),
                                 "; it must be [B, S] =", gdn::shape_text(shape{b_.batch, b_.seq})));
      }
      const auto ids = gdn::values_of<index_t>(*mask);
      if (const auto found = gdn::validate_mask(ids, b_.batch, b_.seq)) {
        throw metadata_error("tensor 'attention_mask': " + found->text);
      }
      b_.packing = gdn::packing::from_mask(ids, b_.batch, b_.seq);
    } else if (cu != nullptr) {
      if (b_.batch != 1) {
        throw metadata_error(say("tensor 'cu_seqlens' needs one row, 'hidden_states' has", b_.batch));
      }
      const auto bounds = gdn::values_of<index_t>(*cu);
      if (const auto found = gdn::validate_cu_seqlens(bounds, b_.seq)) {
        throw metadata_error("tensor 'cu_seqlens': " + found->text);
      }
      b_.packing = gdn::packing::from_cu_seqlens(bounds, {}, 1, b_.seq);
    } else {
      b_.packing = gdn::packing::rows_of(b_.batch, b_.seq);
    }
  }

  void load_seq_index() {
    const tensor_entry* t = indices("seq_index", 2, "[P, S / P]");
    if (t == nullptr) return;
    const index_t ranks = t->shape[0];
    const index_t length = t->shape[1];
    if (ranks < 1 || length < 1 || b_.seq % ranks != 0 || length != b_.seq / ranks) {
      throw metadata_error(say("tensor 'seq_index' has the shape", gdn::shape_text(t->shape),
                               "; it must be [P, S / P] with S =", b_.seq));
    }
    const auto positions = gdn::values_of<index_t>(*t);
    for (auto at = positions.begin(); at != positions.end(); at += length) b_.seq_index.emplace_back(at, at + length);
    if (const auto found = gdn::validate_positions(b_.seq_index)) {
      throw metadata_error("tensor 'seq_index': " + found->text);
    }
  }

  void load_states_and_gradients() {
    b_.initial_state = floating("initial_state", recurrent_state());
    b_.initial_conv_state = floating("initial_conv_state", conv_state());
    b_.grad_output = floating("grad_output", activation());
    b_.grad_recurrent_state = floating("grad_recurrent_state", recurrent_state());
    b_.grad_conv_state = floating("grad_conv_state", conv_state());
  }

  void load_decode() {
    const tensor_entry* t = find("decode.hidden_states");
    if (t == nullptr) return;
    expects_axes(*t, 3, "[B, D, hid]");
    b_.decode_tokens = t->shape[1];
    b_.decode_hidden_states = floating("decode.hidden_states", {b_.batch, b_.decode_tokens, b_.dims().hidden});
    if (b_.packing.documents() != b_.batch) {
      throw metadata_error(say("tensor 'decode.hidden_states' needs one document per row; there are",
                               b_.packing.documents(), "documents in", b_.batch, "rows"));
    }
  }

  void load_expected() {
    for (const tensor_entry& t : b_.file.tensors()) {
      const std::string name = gdn::detail::in_quotes(t.name);
      if (b_.grad_output == nullptr && t.name.starts_with("expected.grad.")) {
        throw metadata_error(say("tensor", name, "needs 'grad_output', which is missing"));
      }
      if (b_.decode_hidden_states == nullptr && t.name.starts_with("expected.decode.")) {
        throw metadata_error(say("tensor", name, "needs 'decode.hidden_states', which is missing"));
      }
    }
    const auto expect = [&](const std::string& name, const shape& want) {
      if (const tensor_entry* t = floating("expected." + name, want)) b_.expected.push_back({name, t});
    };
    expect("output", activation());
    expect("conv_state", conv_state());
    expect("recurrent_state", recurrent_state());
    expect("grad.hidden_states", activation());
    const std::string gradient = std::string("grad.") + parameter_prefix;
    for (const gdn::named_shape& p : gdn::parameter_shapes(b_.weights, b_.dims())) expect(gradient + p.name, p.shape);
    const bool split = b_.weights == gdn::weight_layout::split;
    for (const gdn::named_shape& p :
         gdn::parameter_shapes(split ? gdn::weight_layout::interleaved : gdn::weight_layout::split, b_.dims())) {
      const std::string name = "expected." + gradient + p.name;
      if (find(parameter_prefix + p.name) == nullptr && find(name) != nullptr) {
        throw metadata_error(say("tensor", in_quotes(name), "belongs to another weight layout than the weights"));
      }
    }
    expect("grad.initial_state", recurrent_state());
    expect("grad.initial_conv_state", conv_state());
    expect("decode.output", {b_.batch, b_.decode_tokens, b_.dims().hidden});
    expect("decode.conv_state", conv_state());
    expect("decode.recurrent_state", recurrent_state());
  }

  bundle& b_;
};

metadata_error no_layout(const options& o, const std::string& why) {
  return metadata_error(say("--layout", to_text(o.layout), "with --ranks", o.ranks, why));
}

/// Bytes that this process may use: the machine's, or its control group's if that is less.
double memory_limit() {
  double limit = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
  std::ifstream group("/sys/fs/cgroup/memory.max");
  double bytes = 0;
  if (group >> bytes) limit = std::min(limit, bytes);
  return limit;
}

}  // namespace

bool bundle::expects_gradient_of(const std::string& input) const {
  return std::any_of(expected.begin(), expected.end(),
                     [&](const expected_tensor& e) { return e.name == "grad." + input; });
}

bundle load_bundle(const std::string& path) {
  bundle b;
  b.file = gdn::open_safetensors(path);
  try {
    loader(b).load();
  } catch (const gdn::error& e) {
    throw metadata_error(path + ": " + e.what(), e.where());
  }
  return b;
}

gdn::fragment_table make_layout_table(const options& o, const bundle& b) {
  const int world = o.ranks;
  const index_t chunks = 2 * world;
  const auto each_row = [&](const auto& layout) { return gdn::batch_table(layout.fragments(), b.seq, world, b.batch); };
  switch (o.layout) {
    case layout_kind::contiguous:
      return each_row(gdn::contiguous_layout{b.seq, world});
    case layout_kind::zigzag:
      if (b.seq % chunks != 0) {
        throw no_layout(o, say("needs a multiple of 2 P =", chunks, "tokens per row;", o.bundle, "has S =", b.seq));
      }
      return each_row(gdn::zigzag_layout{b.seq, world});
    case layout_kind::zigzag_documents: {
      const auto documents = b.packing.document_rows();
      for (std::size_t n = 0; n < documents.size(); ++n) {
        const index_t length = documents[n].second - documents[n].first;
        if (length % chunks != 0) {
          throw no_layout(o, say("needs documents of a multiple of 2 P =", chunks, "tokens; document", n, "of",
                                 o.bundle, "has", length));
        }
      }
      return gdn::per_document_zigzag(documents, b.packing.rows(), world).fragments();
    }
    case layout_kind::interleaved:
      return each_row(gdn::interleaved_layout{b.seq, world});
    case layout_kind::seq_index:
      if (b.seq_index.empty()) throw no_layout(o, "needs the tensor 'seq_index', which " + o.bundle + " lacks");
      if (static_cast<int>(b.seq_index.size()) != world) {
        throw no_layout(
            o, say("does not fit the tensor 'seq_index' of", o.bundle, "which is for", b.seq_index.size(), "ranks"));
      }
      return each_row(gdn::from_positions(b.seq_index));
  }
  return {};
}

std::optional<gdn::diagnostic> exceeds_backend([[maybe_unused]] const options& o, [[maybe_unused]] const bundle& b) {
#if defined(GDN_RUN_CUDA)
  const gdn::layer_dims& d = b.dims();
  if (o.backend != backend_kind::cuda || !gdn::cuda::validate_head_sizes(d.key_dim, d.value_dim)) return std::nullopt;
  const bool key = !gdn::cuda::is_head_size(d.key_dim);
  return diagnostic{say(o.bundle + ": config:", key ? "linear_key_head_dim is" : "linear_value_head_dim is",
                        key ? d.key_dim : d.value_dim, "; --backend cuda takes multiples of", gdn::cuda::head_size_step,
                        "up to", gdn::cuda::head_size_most)};
#else
  return std::nullopt;
#endif
}

std::optional<gdn::diagnostic> exceeds_memory(const options& o, const bundle& b) {
  const auto real = [](index_t n) { return static_cast<double>(n); };
  const gdn::layer_dims& d = b.dims();
  const double value = o.dtype == gdn::dtype::f64 ? 8 : 4;
  const double heads = real(d.value_heads);
  const double states = real(b.packing.documents()) * heads * real(d.key_dim) * real(d.value_dim);
  const double summary = heads * real(d.key_dim) * (real(d.key_dim) + real(d.value_dim));
  const double activations = real(b.packing.tokens()) * (real(d.channels()) + 2 * real(d.values()));
  // States and their gradients, initial and final, are there at once, and the gathered results are in double.
  const double bytes = (4 * value + 8) * states + value * activations + (o.ranks > 1 ? value * summary : 0);
  const double limit = memory_limit();
  if (bytes <= limit) return std::nullopt;
  return diagnostic{say(o.bundle + ": the run needs", static_cast<index_t>(bytes / 1048576), "MiB or more of memory,",
                        static_cast<index_t>(limit / 1048576), "are there")};
}

}  // namespace gdn_run
