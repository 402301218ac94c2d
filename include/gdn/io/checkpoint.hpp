// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Checkpoints: sizes from a config, parameters from tensors of either weight layout, and back.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <gdn/core/dtype.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/io/safetensors.hpp>
#include <gdn/layer/dims.hpp>
#include <gdn/layer/parameters.hpp>
#include <gdn/layer/ssm_gate.hpp>

namespace gdn {
inline namespace v0 {

// ---- config ---------------------------------------------------------------------------------------------------------

/// What the config of a model says about its Gated DeltaNet layers.
struct layer_config {
  layer_dims dims;
  dtype ssm = default_ssm_dtype;
  constexpr bool operator==(const layer_config&) const = default;
};

namespace detail {

/// A JSON value for a message, on one line.
inline std::string value_text(const nlohmann::json& value) {
  if (value.is_structured()) return value.is_array() ? "an array" : "an object";
  if (value.is_string()) return in_quotes(value.get_ref<const std::string&>());
  return value.dump();
}

/// The tree of a JSON object. Where unique(depth, parent, key) is true a key may come once only: `depth` is 1 in the
/// object itself, and `parent` is the key of the object around.
template <class Unique>
std::optional<diagnostic> read_json_object(std::string_view text, const Unique& unique, nlohmann::json& out) {
  if (const auto bad = first_bad_character(text)) {  // the lexer would stop in silence at NUL
    return diagnostic{say("it is no text in UTF-8: error at its byte", *bad)};
  }
  struct open_object {
    std::string key;
    std::set<std::string> keys;
  };
  std::vector<open_object> open;
  std::string twice;
  std::string last;  // key
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using event_t = nlohmann::json::parse_event_t;
    if (event == event_t::object_start) open.push_back({last, {}});
    if (event == event_t::object_end) open.pop_back();
    if (event == event_t::key) {
      last = value.get_ref<const std::string&>();
      if (unique(depth, open.back().key, last) && !open.back().keys.insert(last).second && twice.empty()) twice = last;
    }
    return true;
  };
  try {
    out = nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::parse_error& e) {
    return diagnostic{say("it is no JSON: error at its byte", e.byte)};
  } catch (const nlohmann::json::exception&) {
    return diagnostic{say(in_quotes(last), "is a number beyond double")};
  }
  if (!out.is_object()) return diagnostic{say("it is", value_text(out), "; it must be an object")};
  if (!twice.empty()) return diagnostic{say("it has the key", in_quotes(twice), "twice")};
  return std::nullopt;
}

inline std::optional<diagnostic> read_config(std::string_view text, layer_config& out) {
  struct size_key {
    const char* name;
    index_t layer_dims::*field;
  };
  constexpr size_key sizes[] = {{"hidden_size", &layer_dims::hidden},
                                {"linear_num_key_heads", &layer_dims::key_heads},
                                {"linear_num_value_heads", &layer_dims::value_heads},
                                {"linear_key_head_dim", &layer_dims::key_dim},
                                {"linear_value_head_dim", &layer_dims::value_dim},
                                {"linear_conv_kernel_dim", &layer_dims::conv_width}};
  std::set<std::string_view> known = {"rms_norm_eps", "hidden_act", "mamba_ssm_dtype", "text_config"};
  for (const size_key& s : sizes) known.insert(s.name);

  nlohmann::json tree;
  const auto unique = [&](int depth, std::string_view, std::string_view key) {
    return depth <= 2 && known.contains(key);
  };
  if (auto found = read_json_object(text, unique, tree)) return diagnostic{"config: " + found->text};
  const nlohmann::json* config = &tree;
  // The config of a vision-language model has its text model one level below.
  if (const auto nested = tree.find("text_config"); nested != tree.end() && nested->is_object()) {
    const bool flat =
        std::any_of(std::begin(sizes) + 1, std::end(sizes), [&](const size_key& s) { return tree.contains(s.name); });
    if (!flat) config = &*nested;
  }

  for (const size_key& s : sizes) {
    const auto at = config->find(s.name);
    if (at == config->end()) return diagnostic{say("config has no", s.name)};
    const bool fits =
        at->is_number_integer() &&
        (!at->is_number_unsigned() || at->get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<index_t>::max()});
    if (!fits || at->get<index_t>() < 1) {
      return diagnostic{say("config:", s.name, "is", value_text(*at), "; it must be an integer of at least 1")};
    }
    out.dims.*s.field = at->get<index_t>();
  }
  const auto eps = config->find("rms_norm_eps");
  if (eps == config->end()) return diagnostic{"config has no rms_norm_eps"};
  if (!eps->is_number() || !(eps->get<double>() > 0)) {  // JSON has no infinity, and beyond double is refused above
    return diagnostic{say("config: rms_norm_eps is", value_text(*eps), "; it must be a positive number")};
  }
  out.dims.norm_eps = eps->get<double>();
  const auto act = config->find("hidden_act");
  if (act == config->end()) return diagnostic{"config has no hidden_act"};
  if (*act != "silu" && *act != "swish") {
    return diagnostic{say("config: hidden_act is", value_text(*act), "; it must be 'silu' or 'swish'")};
  }
  out.ssm = default_ssm_dtype;
  if (const auto ssm = config->find("mamba_ssm_dtype"); ssm != config->end()) {
    const auto type = ssm->is_string() ? floating_type_named(ssm->get_ref<const std::string&>()) : std::nullopt;
    if (!type) {
      return diagnostic{say("config: mamba_ssm_dtype is", value_text(*ssm),
                            "; it must be 'float32', 'float64', 'bfloat16' or 'float16'")};
    }
    out.ssm = *type;
  }
  if (const auto found = validate_dims(out.dims)) return diagnostic{"config: " + found->text};
  return std::nullopt;
}
}  // namespace detail

/// The first rule that a config breaks, if any: the keys of layer_dims, `rms_norm_eps` and `hidden_act` must be there,
/// sizes are integers of at least 1, Hk divides Hv, eps is positive, the activation is silu, `mamba_ssm_dtype` (if it
/// is there) names a floating type. Other keys are ignored.
inline std::optional<diagnostic> validate_config(std::string_view json) {
  layer_config ignored;
  return detail::read_config(json, ignored);
}

/// @param json text of a `config.json`; if it has none of the `linear_*` keys, its `text_config` is read
/// @throws metadata_error with the text of validate_config()
inline layer_config dims_from_config(std::string_view json) {
  layer_config out;
  raise(detail::read_config(json, out));
  return out;
}

// ---- names and layouts ----------------------------------------------------------------------------------------------

/// How a checkpoint stores the input projections.
enum class weight_layout {
  split,       ///< in_proj_qkv, in_proj_z, in_proj_b, in_proj_a (Qwen3.5)
  interleaved  ///< in_proj_qkvz and in_proj_ba, the rows of each key head together (Qwen3-Next)
};

/// The row of in_proj_qkvz that holds row `c` of in_proj_qkv (c < Dc), or row c - Dc of in_proj_z. Group h of qkvz is
/// q (K), k (K), v (R V), z (R V).
constexpr index_t interleaved_qkvz_row(const layer_dims& d, index_t c) noexcept {
  const index_t values = d.ratio() * d.value_dim;  // of one key head
  const index_t group = 2 * d.key_dim + 2 * values;
  const auto row = [&](index_t at, index_t per_head, index_t first) {
    return at / per_head * group + first + at % per_head;
  };
  if (c < d.keys()) return row(c, d.key_dim, 0);
  if (c < 2 * d.keys()) return row(c - d.keys(), d.key_dim, d.key_dim);
  if (c < d.channels()) return row(c - 2 * d.keys(), values, 2 * d.key_dim);
  return row(c - d.channels(), values, 2 * d.key_dim + values);
}

/// The row of in_proj_ba that holds row `h` of in_proj_b (h < Hv), or row h - Hv of in_proj_a. Group h of ba is b (R),
/// a (R).
constexpr index_t interleaved_ba_row(const layer_dims& d, index_t h) noexcept {
  const index_t first = h < d.value_heads ? 0 : d.ratio();
  const index_t head = h < d.value_heads ? h : h - d.value_heads;
  return head / d.ratio() * 2 * d.ratio() + first + head % d.ratio();
}

struct named_shape {
  std::string name;
  std::vector<index_t> shape;
};

/// The parameter tensors of a layer as a checkpoint has them, nine or seven.
inline std::vector<named_shape> parameter_shapes(weight_layout layout, const layer_dims& d) {
  std::vector<named_shape> out;
  if (layout == weight_layout::split) {
    out = {{"in_proj_qkv.weight", {d.channels(), d.hidden}},
           {"in_proj_z.weight", {d.values(), d.hidden}},
           {"in_proj_b.weight", {d.value_heads, d.hidden}},
           {"in_proj_a.weight", {d.value_heads, d.hidden}}};
  } else {
    out = {{"in_proj_qkvz.weight", {d.channels() + d.values(), d.hidden}},
           {"in_proj_ba.weight", {2 * d.value_heads, d.hidden}}};
  }
  out.push_back({"conv1d.weight", {d.channels(), 1, d.conv_width}});
  out.push_back({"A_log", {d.value_heads}});
  out.push_back({"dt_bias", {d.value_heads}});
  out.push_back({"norm.weight", {d.value_dim}});
  out.push_back({"out_proj.weight", {d.hidden, d.values()}});
  return out;
}

/// The rule that a tensor breaks which must have this shape and floating elements, if any.
inline std::optional<diagnostic> validate_floating(const tensor_entry& t, std::span<const index_t> shape) {
  if (!is_floating(t.type)) {
    return diagnostic{
        say("tensor", detail::in_quotes(t.name), "has dtype", name_of(t.type), "; it must be F64, F32, F16 or BF16")};
  }
  if (!std::equal(t.shape.begin(), t.shape.end(), shape.begin(), shape.end())) {
    return diagnostic{say("tensor", detail::in_quotes(t.name), "has the shape", shape_text(t.shape), "; it must be",
                          shape_text(shape))};
  }
  return std::nullopt;
}

namespace detail {
inline std::optional<diagnostic> find_layout(const safetensors& file, std::string_view prefix, weight_layout& out) {
  const auto first_of = [&](std::initializer_list<const char*> names) -> std::string {
    for (const char* name : names) {
      if (file.find(std::string(prefix) + name) != nullptr) return std::string(prefix) + name;
    }
    return {};
  };
  const std::string split =
      first_of({"in_proj_qkv.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight"});
  const std::string interleaved = first_of({"in_proj_qkvz.weight", "in_proj_ba.weight"});
  if (!split.empty() && !interleaved.empty()) {
    return diagnostic{say("tensors", in_quotes(split), "and", in_quotes(interleaved),
                          "belong to two weight layouts; only one may be there")};
  }
  out = interleaved.empty() ? weight_layout::split : weight_layout::interleaved;
  return std::nullopt;
}
}  // namespace detail

/// The first rule that the parameters of a layer break, if any: all of one layout are there, none of the other, and
/// their shapes and dtypes fit.
inline std::optional<diagnostic> validate_checkpoint(const safetensors& file, std::string_view prefix,
                                                     const layer_dims& d) {
  weight_layout layout = weight_layout::split;
  if (auto found = detail::find_layout(file, prefix, layout)) return found;
  for (const named_shape& p : parameter_shapes(layout, d)) {
    const std::string name = std::string(prefix) + p.name;
    const tensor_entry* t = file.find(name);
    if (t == nullptr) return diagnostic{say("tensor", detail::in_quotes(name), "is missing")};
    if (auto found = validate_floating(*t, p.shape)) return found;
  }
  return std::nullopt;
}

/// @throws metadata_error with the text of validate_checkpoint()
inline weight_layout checkpoint_layout(const safetensors& file, std::string_view prefix, const layer_dims& d) {
  raise(validate_checkpoint(file, prefix, d));
  weight_layout layout = weight_layout::split;
  raise(detail::find_layout(file, prefix, layout));
  return layout;
}

namespace detail {
/// name_of(i) for i in [0, n): the names of all tensors.
template <class NameOf>
std::string layer_prefix(std::size_t n, const NameOf& name_of, index_t layer) {
  const std::string tail = "layers." + std::to_string(layer) + ".linear_attn.";
  std::set<std::string> found;
  for (std::size_t i = 0; i < n; ++i) {
    const std::string_view name = name_of(i);
    const std::size_t at = name.find(tail);
    if (at == std::string_view::npos || (at > 0 && name[at - 1] != '.') || name.starts_with("mtp.")) continue;
    found.insert(std::string(name.substr(0, at)) + tail);
  }
  if (found.empty()) throw metadata_error(say("no tensor's name has", in_quotes(tail)));
  if (found.size() > 1) {
    throw metadata_error(say("layer", layer, "is there twice, as", in_quotes(*found.begin()), "and",
                             in_quotes(*std::next(found.begin()))));
  }
  return *found.begin();
}
}  // namespace detail

/// What precedes the names of the parameters of layer `layer`: "model.layers.3.linear_attn.", or
/// "model.language_model.layers.3.linear_attn." in a vision-language model.
/// @throws metadata_error unless exactly one is in the file; layers of multi-token prediction ("mtp.") do not count
inline std::string layer_prefix(const safetensors& file, index_t layer) {
  return detail::layer_prefix(
      file.tensors.size(), [&](std::size_t i) -> std::string_view { return file.tensors[i].name; }, layer);
}

// ---- values ---------------------------------------------------------------------------------------------------------

namespace detail {
/// Elements of a file, at any address, as values of To: the same bits where the types are the same, else rounded once.
template <class To>
void decode(dtype type, const std::byte* from, To* to, index_t n) {
  const auto each = [&]<class Stored>(Stored) {
    if constexpr (std::same_as<Stored, To>) {
      std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(To));
    } else {
      for (index_t i = 0; i < n; ++i) {
        Stored v;
        std::memcpy(&v, from + static_cast<std::size_t>(i) * sizeof v, sizeof v);
        if constexpr (sizeof(Stored) == 2) {
          to[i] = static_cast<To>(static_cast<float>(v));
        } else {
          to[i] = static_cast<To>(v);
        }
      }
    }
  };
  switch (type) {
    case dtype::f64: return each(double{});
    case dtype::f32: return each(float{});
    case dtype::f16: return each(float16{});
    default: return each(bfloat16{});
  }
}

/// The inverse: values as elements of a file.
template <class From>
void encode_row(const From* from, dtype type, std::byte* to, index_t n) {
  const auto each = [&]<class Stored>(Stored) {
    if constexpr (std::same_as<Stored, From>) {
      std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(From));
    } else {
      for (index_t i = 0; i < n; ++i) {
        Stored v;
        if constexpr (sizeof(From) == 2) {
          v = static_cast<Stored>(static_cast<float>(from[i]));
        } else {
          v = static_cast<Stored>(from[i]);
        }
        std::memcpy(to + static_cast<std::size_t>(i) * sizeof v, &v, sizeof v);
      }
    }
  };
  switch (type) {
    case dtype::f64: return each(double{});
    case dtype::f32: return each(float{});
    case dtype::f16: return each(float16{});
    default: return each(bfloat16{});
  }
}

template <class T>
constexpr T* row_of(const tensor_ref<T, 1, host_memory>& t, index_t) noexcept {
  return t.data();
}
template <class T>
constexpr T* row_of(const tensor_ref<T, 2, host_memory>& t, index_t row) noexcept {
  return t.data() + row * t.stride(0);
}

/// f(view, name without prefix, row): the tensor of a checkpoint, and its row there for each row of the view.
template <class W, class A, class F>
void for_each_stored(const parameter_set<W, A, host_memory>& p, weight_layout layout, const layer_dims& d, F&& f) {
  const auto same = [](index_t row) { return row; };
  if (layout == weight_layout::split) {
    p.for_each([&](std::string_view name, const auto& view) { f(view, name, same); });
    return;
  }
  f(p.in_proj_qkv, "in_proj_qkvz.weight", [&](index_t row) { return interleaved_qkvz_row(d, row); });
  f(p.in_proj_z, "in_proj_qkvz.weight", [&](index_t row) { return interleaved_qkvz_row(d, d.channels() + row); });
  f(p.in_proj_b, "in_proj_ba.weight", [&](index_t row) { return interleaved_ba_row(d, row); });
  f(p.in_proj_a, "in_proj_ba.weight", [&](index_t row) { return interleaved_ba_row(d, d.value_heads + row); });
  f(p.conv1d, "conv1d.weight", same);
  f(p.A_log, "A_log", same);
  f(p.dt_bias, "dt_bias", same);
  f(p.norm, "norm.weight", same);
  f(p.out_proj, "out_proj.weight", same);
}
}  // namespace detail

/// Reads the parameters of one layer into `out`, in the split layout whatever the file has, straight from the file's
/// bytes (which may be mapped). A_log, dt_bias and the norm weight keep the precision of accumulate_t; the first two are
/// rounded through `ssm` (see round_through).
/// @param out views that the caller has carved for `d`; rows may have any stride, columns are dense
/// @throws metadata_error naming the tensor (see validate_checkpoint), shape_error if `out` is not for `d`
template <class T>
void load_parameters(const safetensors& file, std::string_view prefix, const layer_dims& d,
                     const parameter_storage<T, host_memory>& out, dtype ssm = default_ssm_dtype) {
  const weight_layout layout = checkpoint_layout(file, prefix, d);
  check_parameters(out, d);
  detail::for_each_stored(out, layout, d, [&](const auto& view, std::string_view name, auto&& row_in_file) {
    const tensor_entry& t = *file.find(std::string(prefix) + std::string(name));
    constexpr int last = std::remove_cvref_t<decltype(view)>::rank() - 1;
    const index_t width = view.extent(last);
    const index_t row_bytes = width * bits_of(t.type) / 8;
    for (index_t row = 0; row < (last == 0 ? 1 : view.extent(0)); ++row) {
      detail::decode(t.type, t.bytes.data() + row_in_file(row) * row_bytes, detail::row_of(view, row), width);
    }
  });
  for (index_t h = 0; h < d.value_heads; ++h) {
    out.A_log(h) = round_through(ssm, out.A_log(h));
    out.dt_bias(h) = round_through(ssm, out.dt_bias(h));
  }
}

/// A tensor that is not in a file yet.
struct named_values {
  std::string name;
  std::vector<index_t> shape;
  std::vector<double> values;
};

/// The inverse of load_parameters(): parameters or gradients under the names, and in the layout, of a checkpoint.
template <class W, class A>
std::vector<named_values> checkpoint_tensors(const parameter_set<W, A, host_memory>& p, weight_layout layout,
                                             std::string_view prefix, const layer_dims& d) {
  check_parameters(p, d);
  std::vector<named_values> out;
  for (named_shape& s : parameter_shapes(layout, d)) {
    index_t size = 1;
    for (const index_t extent : s.shape) size *= extent;
    out.push_back({std::move(s.name), std::move(s.shape), std::vector<double>(static_cast<std::size_t>(size))});
  }
  detail::for_each_stored(p, layout, d, [&](const auto& view, std::string_view name, auto&& row_in_file) {
    auto& values = std::find_if(out.begin(), out.end(), [&](const named_values& t) { return t.name == name; })->values;
    constexpr int last = std::remove_cvref_t<decltype(view)>::rank() - 1;
    const index_t width = view.extent(last);
    for (index_t row = 0; row < (last == 0 ? 1 : view.extent(0)); ++row) {
      const auto* from = detail::row_of(view, row);
      std::transform(from, from + width, values.data() + row_in_file(row) * width,
                     [](auto v) { return static_cast<double>(v); });
    }
  });
  for (named_values& t : out) t.name.insert(0, prefix);
  return out;
}

/// A tensor as a file will have it.
struct stored_tensor {
  std::string name;
  dtype type = dtype::f32;
  std::vector<index_t> shape;
  std::vector<std::byte> bytes;

  tensor_entry entry() const { return {name, type, shape, bytes}; }
};

/// The type in which a checkpoint has a parameter: A_log, dt_bias and the norm weight are F32 whatever the others are.
/// @param name without prefix
constexpr dtype stored_type(std::string_view name, dtype weights) noexcept {
  return name == "A_log" || name == "dt_bias" || name == "norm.weight" ? dtype::f32 : weights;
}

/// The parameters of a layer as a checkpoint has them: names, layout and types. Each value rounds once; those of the
/// stored type keep their bits.
/// @param weights f64, f32, f16 or bf16: the type of the matrices (see stored_type)
template <class W, class A>
std::vector<stored_tensor> stored_parameters(const parameter_set<W, A, host_memory>& p, weight_layout layout,
                                             std::string_view prefix, const layer_dims& d, dtype weights) {
  check_parameters(p, d);
  expects<metadata_error>(is_floating(weights), "weights cannot be written as", name_of(weights));
  std::vector<stored_tensor> out;
  for (named_shape& s : parameter_shapes(layout, d)) {
    const dtype type = stored_type(s.name, weights);
    const auto bytes = static_cast<std::size_t>(detail::bytes_of(type, s.shape).value());
    out.push_back({std::move(s.name), type, std::move(s.shape), std::vector<std::byte>(bytes)});
  }
  detail::for_each_stored(p, layout, d, [&](const auto& view, std::string_view name, auto&& row_in_file) {
    auto& t = *std::find_if(out.begin(), out.end(), [&](const stored_tensor& s) { return s.name == name; });
    constexpr int last = std::remove_cvref_t<decltype(view)>::rank() - 1;
    const index_t width = view.extent(last);
    const index_t row_bytes = width * bits_of(t.type) / 8;
    for (index_t row = 0; row < (last == 0 ? 1 : view.extent(0)); ++row) {
      detail::encode_row(detail::row_of(view, row), t.type, t.bytes.data() + row_in_file(row) * row_bytes, width);
    }
  });
  for (stored_tensor& t : out) t.name.insert(0, prefix);
  return out;
}

/// Writes the parameters of one layer to a file of their own, which appears whole or not at all.
/// @throws metadata_error naming the file
template <class W, class A>
void save_parameters(const std::string& path, const parameter_set<W, A, host_memory>& p, weight_layout layout,
                     std::string_view prefix, const layer_dims& d, dtype weights,
                     const metadata_map& metadata = {{"format", "pt"}}) {
  const auto tensors = stored_parameters(p, layout, prefix, d, weights);
  std::vector<tensor_entry> entries;
  for (const stored_tensor& t : tensors) entries.push_back(t.entry());
  write_safetensors(path, entries, metadata);
}

static_assert([] {  // two key heads, each with one value head; group: q q k k v v v z z z
  constexpr layer_dims d{.hidden = 1, .key_heads = 2, .value_heads = 2, .key_dim = 2, .value_dim = 3};
  return interleaved_qkvz_row(d, 2) == 10 && interleaved_qkvz_row(d, 7) == 13 && interleaved_qkvz_row(d, 8) == 4 &&
         interleaved_qkvz_row(d, 14) == 7 && interleaved_ba_row(d, 1) == 2 && interleaved_ba_row(d, 3) == 3;
}());

}  // namespace v0
}  // namespace gdn
