// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Checkpoints of whole models: directories with config.json and one safetensors file, or several and an index.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <gdn/core/dtype.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/io/checkpoint.hpp>
#include <gdn/io/file.hpp>
#include <gdn/io/safetensors.hpp>
#include <gdn/layer/dims.hpp>
#include <gdn/layer/parameters.hpp>

namespace gdn {
inline namespace v0 {

// ---- index ----------------------------------------------------------------------------------------------------------

/// Which file of a checkpoint has which tensor: the `weight_map` of a model.safetensors.index.json.
struct checkpoint_index {
  struct entry {
    std::string name;
    std::size_t shard = 0;  ///< of `shards`
    bool operator==(const entry&) const = default;
  };
  std::vector<std::string> shards;  ///< paths relative to the index, ascending
  std::vector<entry> tensors;       ///< ascending by name

  /// nullptr if there is none.
  const entry* find(std::string_view name) const noexcept {
    const auto at = std::lower_bound(tensors.begin(), tensors.end(), name,
                                     [](const entry& t, std::string_view n) { return t.name < n; });
    return at != tensors.end() && at->name == name ? &*at : nullptr;
  }
  bool operator==(const checkpoint_index&) const = default;
};

namespace detail {

/// A path that names a file in or below the directory of the index. Links are followed: the cache of the Hugging Face
/// hub consists of them.
inline bool stays_inside(std::string_view path) {
  if (path.empty() || path.front() == '/' || path.find('\0') != std::string_view::npos) return false;
  for (std::size_t at = 0; at <= path.size();) {
    const std::size_t end = std::min(path.find('/', at), path.size());
    const std::string_view part = path.substr(at, end - at);
    if (part.empty() || part == "." || part == "..") return false;
    at = end + 1;
  }
  return true;
}

inline std::optional<diagnostic> read_checkpoint_index(std::string_view text, checkpoint_index& out) {
  nlohmann::json tree;
  const auto unique = [](int depth, std::string_view parent, std::string_view key) {
    return (depth == 1 && key == "weight_map") || (depth == 2 && parent == "weight_map");
  };
  if (auto found = read_json_object(text, unique, tree)) return found;
  const auto map = tree.find("weight_map");
  if (map == tree.end()) return diagnostic{"it has no weight_map"};
  if (!map->is_object()) return diagnostic{say("weight_map is", value_text(*map), "; it must be an object")};
  if (map->empty()) return diagnostic{"weight_map is empty"};
  for (const auto& [name, file] : map->items()) {
    if (name.empty()) return diagnostic{"weight_map has a tensor without a name"};
    if (!file.is_string()) {
      return diagnostic{
          say("weight_map: tensor", in_quotes(name), "is in", value_text(file), "; it must be the name of a file")};
    }
    const auto& path = file.get_ref<const std::string&>();
    if (!stays_inside(path)) {
      return diagnostic{say("weight_map: tensor", in_quotes(name), "is in", in_quotes(path),
                            "; it must be a file beside the index or below it")};
    }
    out.shards.push_back(path);
  }
  std::sort(out.shards.begin(), out.shards.end());
  out.shards.erase(std::unique(out.shards.begin(), out.shards.end()), out.shards.end());
  for (const auto& [name, file] : map->items()) {
    const auto at = std::lower_bound(out.shards.begin(), out.shards.end(), file.get_ref<const std::string&>());
    out.tensors.push_back({name, static_cast<std::size_t>(at - out.shards.begin())});
  }
  std::sort(out.tensors.begin(), out.tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return std::nullopt;
}

}  // namespace detail

/// The first rule that an index breaks, if any: JSON, UTF-8, one `weight_map` of tensors to files, no tensor twice, no
/// file outside the directory. Other keys are ignored.
inline std::optional<diagnostic> validate_checkpoint_index(std::string_view json) {
  checkpoint_index ignored;
  return detail::read_checkpoint_index(json, ignored);
}

/// @throws metadata_error with the text of validate_checkpoint_index()
inline checkpoint_index parse_checkpoint_index(std::string_view json) {
  checkpoint_index out;
  raise(detail::read_checkpoint_index(json, out));
  return out;
}

// ---- checkpoint -----------------------------------------------------------------------------------------------------

/// The files of a model. Each is mapped once, when one of its tensors is first asked for, and stays mapped as long as
/// the checkpoint lives. Any number of threads may ask.
class checkpoint {
 public:
  const checkpoint_index& index() const noexcept { return index_; }
  /// What config.json says, if there is one.
  const std::optional<layer_config>& config() const noexcept { return config_; }
  /// @throws metadata_error if there is none
  const layer_config& expect_config() const {
    expects<metadata_error>(config_.has_value(), path_ + ": there is no config.json beside it");
    return *config_;
  }
  /// The type in which the model keeps A_log and dt_bias.
  dtype ssm() const noexcept { return config_ ? config_->ssm : default_ssm_dtype; }
  /// The file that open_checkpoint() found: an index, or the one file of tensors.
  const std::string& path() const noexcept { return path_; }
  /// Files that are mapped now.
  std::size_t mapped() const {
    const std::lock_guard lock(files_->mutex);
    return static_cast<std::size_t>(
        std::count_if(files_->shards.begin(), files_->shards.end(), [](const auto& f) { return f != nullptr; }));
  }

  /// nullptr if the index has none of this name.
  /// @throws metadata_error if its file is missing or broken, lacks the tensor, or has one that belongs to another file
  const tensor_entry* find(std::string_view name) const {
    const checkpoint_index::entry* e = index_.find(name);
    if (e == nullptr) return nullptr;
    const tensor_entry* t = shard(e->shard).find(name);  // there: shard() has compared
    return t;
  }

  /// The tensors whose names begin with `prefix`, whatever files they are in.
  safetensors tensors(std::string_view prefix) const {
    safetensors out;
    auto at = std::lower_bound(index_.tensors.begin(), index_.tensors.end(), prefix,
                               [](const auto& e, std::string_view p) { return e.name < p; });
    for (; at != index_.tensors.end() && at->name.starts_with(prefix); ++at) {
      out.tensors.push_back(*shard(at->shard).find(at->name));
    }
    return out;
  }

  /// A file of the index, mapped and checked.
  const safetensors_file& shard(std::size_t n) const {
    const std::lock_guard lock(files_->mutex);
    std::unique_ptr<safetensors_file>& file = files_->shards[n];
    if (file == nullptr) {
      auto opened = std::make_unique<safetensors_file>(open_safetensors(directory_ + index_.shards[n]));
      if (auto found = compare(*opened, n)) throw metadata_error(opened->path() + ": " + found->text);
      file = std::move(opened);
    }
    return *file;
  }

 private:
  friend checkpoint open_checkpoint(const std::string& path);

  /// What a file has must be what the index says that it has.
  std::optional<diagnostic> compare(const safetensors_file& file, std::size_t n) const {
    for (const checkpoint_index::entry& e : index_.tensors) {
      if (e.shard == n && file.find(e.name) == nullptr) {
        return diagnostic{
            say("tensor", detail::in_quotes(e.name), "is missing;", detail::in_quotes(path_), "says that it is here")};
      }
    }
    for (const tensor_entry& t : file.tensors()) {
      const checkpoint_index::entry* e = index_.find(t.name);
      if (e != nullptr && e->shard != n) {
        return diagnostic{say("tensor", detail::in_quotes(t.name), "is here, but", detail::in_quotes(path_),
                              "says that it is in", detail::in_quotes(index_.shards[e->shard]))};
      }
    }
    return std::nullopt;
  }

  struct mapped_files {
    std::mutex mutex;
    std::vector<std::unique_ptr<safetensors_file>> shards;  // null until asked for
  };
  std::string path_;
  std::string directory_;  // with a slash, or empty
  checkpoint_index index_;
  std::optional<layer_config> config_;
  std::unique_ptr<mapped_files> files_ = std::make_unique<mapped_files>();
};

/// @param path a directory with model.safetensors, or else model.safetensors.index.json (in this order, as
///             transformers looks for them); or such a file, an index if it ends in .json
/// Reads the index and the config.json beside it, and maps no shard yet.
/// @throws metadata_error naming the file and the rule that it breaks
inline checkpoint open_checkpoint(const std::string& path) {
  namespace fs = std::filesystem;
  const auto exists = [](const std::string& p) {
    std::error_code ignored;
    return fs::exists(p, ignored);
  };
  checkpoint out;
  out.path_ = path;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    const std::string inside = path.ends_with('/') ? path : path + "/";
    out.path_ = inside + "model.safetensors";
    if (!exists(out.path_)) out.path_ = inside + "model.safetensors.index.json";
    expects<metadata_error>(exists(out.path_),
                            inside + ": has neither model.safetensors nor model.safetensors.index.json");
  }
  const std::size_t slash = out.path_.rfind('/');
  out.directory_ = slash == std::string::npos ? "" : out.path_.substr(0, slash + 1);

  if (out.path_.ends_with(".json")) {
    const mapped_file file(out.path_);
    const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    if (auto found = detail::read_checkpoint_index(text, out.index_)) {
      throw metadata_error(out.path_ + ": " + found->text);
    }
    out.files_->shards.resize(out.index_.shards.size());
  } else {
    auto file = std::make_unique<safetensors_file>(open_safetensors(out.path_));
    out.index_.shards = {out.path_.substr(out.directory_.size())};
    for (const tensor_entry& t : file->tensors()) out.index_.tensors.push_back({t.name, 0});
    out.files_->shards.push_back(std::move(file));
  }

  if (const std::string config = out.directory_ + "config.json"; exists(config)) {
    const mapped_file file(config);
    layer_config read;
    const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    if (auto found = detail::read_config(text, read)) throw metadata_error(config + ": " + found->text);
    out.config_ = read;
  }
  return out;
}

/// The first file of a checkpoint that is missing, broken, or not what the index says, if any. Maps them all.
inline std::optional<diagnostic> validate_shards(const checkpoint& c) {
  for (std::size_t n = 0; n < c.index().shards.size(); ++n) {
    try {
      c.shard(n);
    } catch (const metadata_error& e) {
      return diagnostic{e.what()};
    }
  }
  return std::nullopt;
}

// ---- layers ---------------------------------------------------------------------------------------------------------

/// As layer_prefix() of one file, over all files of a checkpoint. @throws metadata_error
inline std::string layer_prefix(const checkpoint& c, index_t layer) {
  const auto& tensors = c.index().tensors;
  return detail::layer_prefix(
      tensors.size(), [&](std::size_t i) -> std::string_view { return tensors[i].name; }, layer);
}

/// How the checkpoint stores this layer's projections; all its parameters are there and fit.
/// @throws metadata_error naming the tensor
inline weight_layout checkpoint_layout(const checkpoint& c, index_t layer, const layer_dims& d) {
  const std::string prefix = layer_prefix(c, layer);
  return checkpoint_layout(c.tensors(prefix), prefix, d);
}

/// The first rule that a layer of a checkpoint breaks, if any.
inline std::optional<diagnostic> validate_checkpoint(const checkpoint& c, index_t layer, const layer_dims& d) {
  try {
    const std::string prefix = layer_prefix(c, layer);
    return validate_checkpoint(c.tensors(prefix), prefix, d);
  } catch (const metadata_error& e) {
    return diagnostic{e.what()};
  }
}

/// Reads the parameters of layer `layer` into `out`, each value once, from the mapped files: see load_parameters() of
/// one file. A_log and dt_bias are rounded through the type that config.json names, if any.
/// @throws metadata_error with the text of validate_checkpoint(), shape_error if `out` is not for `d`
template <class T>
void load_parameters(const checkpoint& c, index_t layer, const layer_dims& d,
                     const parameter_storage<T, host_memory>& out) {
  const std::string prefix = layer_prefix(c, layer);
  load_parameters<T>(c.tensors(prefix), prefix, d, out, c.ssm());
}

// ---- writing --------------------------------------------------------------------------------------------------------

/// The text of an index. Tensor i is in `files[i]`.
inline std::string checkpoint_index_text(std::span<const tensor_entry> tensors, std::span<const std::string> files) {
  nlohmann::ordered_json map = nlohmann::ordered_json::object();
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    bytes += tensors[i].bytes.size();
    map[tensors[i].name] = files[i];
  }
  return nlohmann::ordered_json{{"metadata", {{"total_size", bytes}}}, {"weight_map", std::move(map)}}.dump(2) + "\n";
}

/// Writes tensors in the given order to at most `shards` files of about one size, and their index, under the names of
/// transformers: model-00001-of-00003.safetensors, model.safetensors.index.json. The index comes last.
/// @throws metadata_error naming the file, or the tensor that comes twice
inline void save_checkpoint(const std::string& directory, std::span<const tensor_entry> tensors, int shards,
                            const metadata_map& metadata = {{"format", "pt"}}) {
  expects<metadata_error>(1 <= shards && shards <= 99999, "a checkpoint cannot have", shards, "files");
  expects<metadata_error>(!tensors.empty(), "a checkpoint without tensors cannot be written");
  std::vector<std::string_view> names;
  std::size_t total = 0;
  for (const tensor_entry& t : tensors) {
    names.push_back(t.name);
    total += t.bytes.size();
  }
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) throw metadata_error(say("the name", detail::in_quotes(*twice), "comes twice"));

  // File k holds what begins in the k-th part of the bytes; empty parts get no file.
  std::vector<std::size_t> ends;
  for (std::size_t i = 0, at = 0, part = 0; i < tensors.size(); ++i) {
    const std::size_t k = total == 0 ? 0 : at * static_cast<std::size_t>(shards) / total;
    if (i > 0 && k != part) ends.push_back(i);
    part = k;
    at += tensors[i].bytes.size();
  }
  ends.push_back(tensors.size());
  const auto five = [](std::size_t n) {
    const std::string digits = std::to_string(n);
    return std::string(5 - std::min<std::size_t>(digits.size(), 5), '0') + digits;
  };
  std::vector<std::string> files;
  for (std::size_t k = 0, begin = 0; k < ends.size(); begin = ends[k++]) {
    const std::string name = "model-" + five(k + 1) + "-of-" + five(ends.size()) + ".safetensors";
    files.resize(ends[k], name);
    write_safetensors(directory + "/" + name, tensors.subspan(begin, ends[k] - begin), metadata);
  }
  replacement_file index(directory + "/model.safetensors.index.json");
  index.write(std::string_view(checkpoint_index_text(tensors, files)));
  index.commit();
}

}  // namespace v0
}  // namespace gdn
