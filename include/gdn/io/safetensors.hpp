// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Safetensors files: a strict parser over bytes, their values, and a writer.

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <gdn/core/dtype.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/half.hpp>
#include <gdn/core/types.hpp>
#include <gdn/io/file.hpp>

namespace gdn {
inline namespace v0 {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

/// A tensor of a file. Its bytes are row-major and may lie at any address; the file must outlive it.
struct tensor_entry {
  std::string name;
  dtype type = dtype::f32;
  std::vector<index_t> shape;
  std::span<const std::byte> bytes;

  index_t size() const noexcept {
    index_t n = 1;
    for (const index_t extent : shape) n *= extent;
    return n;
  }
};

using metadata_map = std::map<std::string, std::string, std::less<>>;

/// What a safetensors file says: its tensors, sorted by name, and its `__metadata__`.
struct safetensors {
  std::vector<tensor_entry> tensors;
  metadata_map metadata;

  /// nullptr if there is none.
  const tensor_entry* find(std::string_view name) const noexcept {
    const auto at = std::lower_bound(tensors.begin(), tensors.end(), name,
                                     [](const tensor_entry& t, std::string_view n) { return t.name < n; });
    return at != tensors.end() && at->name == name ? &*at : nullptr;
  }
};

/// "[2, 96, 64]"
inline std::string shape_text(std::span<const index_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return out += "]";
}

namespace detail {

inline constexpr std::uint64_t header_limit = 100'000'000;  // of the format's own library
inline constexpr std::size_t axes_limit = 64;

/// Bytes of `shape` elements of `type`; nothing if they overflow, whatever the order of the extents, or if elements
/// narrower than a byte leave a byte half empty.
inline std::optional<index_t> bytes_of(dtype type, std::span<const index_t> shape) noexcept {
  index_t bits = bits_of(type);
  bool empty = false;
  for (const index_t extent : shape) {
    if (extent < 0) return std::nullopt;
    empty = empty || extent == 0;
    if (__builtin_mul_overflow(bits, std::max<index_t>(extent, 1), &bits)) return std::nullopt;
  }
  if (empty) return 0;
  if (bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

/// The position of the first byte that is no part of well-formed UTF-8 (RFC 3629), or is NUL: the JSON lexer would
/// take that for the end of its input.
inline std::optional<std::size_t> first_bad_character(std::string_view text) noexcept {
  const auto at = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  for (std::size_t i = 0; i < text.size();) {
    const unsigned lead = at(i);
    std::size_t length = 1;
    unsigned low = 0x80;  // the range of the second byte: no overlong forms, no surrogates, nothing above U+10FFFF
    unsigned high = 0xbf;
    if (lead >= 0xc2 && lead <= 0xdf) {
      length = 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      length = 3;
      if (lead == 0xe0) low = 0xa0;
      if (lead == 0xed) high = 0x9f;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      length = 4;
      if (lead == 0xf0) low = 0x90;
      if (lead == 0xf4) high = 0x8f;
    } else if (lead == 0 || lead >= 0x80) {
      return i;
    }
    for (std::size_t j = 1; j < length; ++j) {
      if (at(i + j) < low || at(i + j) > high) return i;
      low = 0x80;
      high = 0xbf;
    }
    i += length;
  }
  return std::nullopt;
}

/// Reads a header as it streams by. nlohmann's tree would keep the last of two equal names in silence.
class header_reader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  struct entry {
    dtype type = dtype::f32;
    std::vector<index_t> shape;
    std::vector<index_t> offsets;
  };

  std::map<std::string, entry> entries;
  metadata_map metadata;
  std::optional<diagnostic> found;

  bool null() override { return value("null"); }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(number_integer_t v) override { return value(std::to_string(v)); }
  bool number_unsigned(number_unsigned_t v) override {
    if ((place_ != place::shape && place_ != place::offsets) ||
        v > static_cast<number_unsigned_t>(std::numeric_limits<index_t>::max())) {
      return value(std::to_string(v));
    }
    std::vector<index_t>& list = place_ == place::shape ? entry_.shape : entry_.offsets;
    if (list.size() == (place_ == place::shape ? axes_limit : 2)) {
      return fail(tensor(), place_ == place::shape ? "has more than 64 axes" : "has more than two data_offsets");
    }
    list.push_back(static_cast<index_t>(v));
    return true;
  }
  bool number_float(number_float_t, const string_t& text) override { return value(text.substr(0, 40)); }
  bool binary(binary_t&) override { return value("binary"); }
  bool string(string_t& v) override {
    if (place_ == place::metadata) {
      metadata.insert_or_assign(key_, std::move(v));
      return true;
    }
    if (place_ == place::entry && key_ == "dtype") {
      const std::optional<dtype> type = dtype_named(v);
      if (!type) return fail(tensor(), "has the unknown dtype", in_quotes(v));
      entry_.type = *type;
      return true;
    }
    return value("the text " + in_quotes(v));
  }

  bool start_object(std::size_t) override {
    switch (place_) {
      case place::start:
        place_ = place::root;
        return true;
      case place::root:
        keys_.clear();
        entry_ = {};
        place_ = name_ == "__metadata__" ? place::metadata : place::entry;
        return true;
      default:
        return start_nested("an object");
    }
  }
  bool end_object() override {
    switch (place_) {
      case place::skipped:
        return end_nested();
      case place::metadata:
        place_ = place::root;
        return true;
      case place::entry:
        for (const char* key : {"dtype", "shape", "data_offsets"}) {
          if (!keys_.contains(key)) return fail(tensor(), "has no", key);
        }
        entries.emplace(name_, std::move(entry_));
        place_ = place::root;
        return true;
      default:
        return true;
    }
  }
  bool start_array(std::size_t) override {
    if (place_ == place::entry && key_ == "shape") {
      place_ = place::shape;
    } else if (place_ == place::entry && key_ == "data_offsets") {
      place_ = place::offsets;
    } else {
      return start_nested("an array");
    }
    return true;
  }
  bool end_array() override {
    if (place_ == place::skipped) return end_nested();
    if (place_ == place::offsets && entry_.offsets.size() != 2) {
      return fail(tensor(), "has", entry_.offsets.size(), "data_offsets; there must be two");
    }
    place_ = place::entry;
    return true;
  }
  bool key(string_t& v) override {
    if (place_ == place::skipped) return true;
    if (place_ == place::root) {
      if (!names_.insert(v).second) return fail("the name", in_quotes(v), "comes twice");
      name_ = std::move(v);
      return true;
    }
    key_ = std::move(v);
    if (!keys_.insert(key_).second) {
      return fail(place_ == place::metadata ? "__metadata__" : tensor(), "has the key", in_quotes(key_), "twice");
    }
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    return fail("the header is no JSON object of tensors: error at its byte", position);
  }

 private:
  enum class place { start, root, metadata, entry, shape, offsets, skipped };

  template <class... Parts>
  bool fail(const Parts&... parts) {
    found = diagnostic{say(parts...)};
    return false;
  }
  std::string tensor() const { return "tensor " + in_quotes(name_); }

  /// A scalar where another kind of value belongs, unless it belongs to an unknown key.
  bool value(const std::string& what) {
    switch (place_) {
      case place::start:
        return fail("the header is", what, "; it must be an object");
      case place::root:
        return fail(name_ == "__metadata__" ? name_ : tensor(), "is", what, "; it must be an object");
      case place::metadata:
        return fail("__metadata__", in_quotes(key_), "is", what, "; it must be text");
      case place::entry:
        if (key_ == "dtype") return fail(tensor(), "has as dtype", what, "; it must be text");
        if (key_ == "shape" || key_ == "data_offsets") {
          return fail(tensor(), "has as", key_, what, "; it must be an array");
        }
        return true;
      case place::shape:
        return fail(tensor(), "has the extent", what, "; extents are integers from 0 to 2^63 - 1");
      case place::offsets:
        return fail(tensor(), "has the offset", what, "; offsets are integers from 0 to 2^63 - 1");
      case place::skipped:
        return true;
    }
    return true;
  }
  bool start_nested(const char* what) {
    if (place_ == place::skipped) {
      ++depth_;
      return true;
    }
    const bool unknown = place_ == place::entry && key_ != "dtype" && key_ != "shape" && key_ != "data_offsets";
    if (!unknown) return value(what);
    place_ = place::skipped;
    depth_ = 1;
    return true;
  }
  bool end_nested() {
    if (--depth_ == 0) place_ = place::entry;
    return true;
  }

  place place_ = place::start;
  std::size_t depth_ = 0;  // below an unknown key
  std::string name_;       // of the tensor
  std::string key_;        // within it or __metadata__
  std::set<std::string> names_;
  std::set<std::string> keys_;
  entry entry_;
};

/// Fills `out` up to the first broken rule.
inline std::optional<diagnostic> read_safetensors(std::span<const std::byte> file, safetensors& out) {
  if (file.size() < 8) return diagnostic{say("the file has", file.size(), "bytes; a safetensors file has 8 or more")};
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  if (length > file.size() - 8) {
    return diagnostic{say("the header has", length, "bytes; only", file.size() - 8, "follow its length")};
  }
  if (length > header_limit) return diagnostic{say("the header has", length, "bytes; at most", header_limit, "may be")};
  const std::string_view header(reinterpret_cast<const char*>(file.data()) + 8, static_cast<std::size_t>(length));
  const std::span<const std::byte> data = file.subspan(8 + static_cast<std::size_t>(length));
  if (!header.starts_with('{')) return diagnostic{"the header does not begin with {"};
  if (const auto bad = first_bad_character(header)) {
    return diagnostic{say("the header is no text in UTF-8: error at its byte", *bad)};
  }

  header_reader reader;
  if (!nlohmann::json::sax_parse(header.begin(), header.end(), &reader)) {
    return reader.found ? reader.found : diagnostic{"the header is no JSON object of tensors"};
  }

  struct piece {
    index_t begin, end;
    const std::string* name;
  };
  std::vector<piece> pieces;
  pieces.reserve(reader.entries.size());
  const auto total = static_cast<index_t>(data.size());
  for (auto& [name, e] : reader.entries) {
    const index_t begin = e.offsets[0];
    const index_t end = e.offsets[1];
    const std::optional<index_t> bytes = bytes_of(e.type, e.shape);
    const std::string tensor = "tensor " + in_quotes(name);
    if (!bytes) return diagnostic{say(tensor, "has the shape", shape_text(e.shape), "; its size overflows")};
    if (begin > end) return diagnostic{say(tensor, "has data_offsets", begin, "to", end, "; they must not decrease")};
    if (end > total) return diagnostic{say(tensor, "ends at byte", end, "of the data, which has", total)};
    if (end - begin != *bytes) {
      return diagnostic{say(tensor, "has", end - begin, "bytes;", name_of(e.type), shape_text(e.shape), "has", *bytes)};
    }
    pieces.push_back({begin, end, &name});
    out.tensors.push_back({name, e.type, std::move(e.shape),
                           data.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(*bytes))});
  }
  std::sort(pieces.begin(), pieces.end(),
            [](const piece& a, const piece& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  index_t at = 0;
  for (const piece& p : pieces) {
    if (p.begin != at) {
      return diagnostic{say("tensor", in_quotes(*p.name), "begins at byte", p.begin, "of the data,", at, "was due;",
                            p.begin < at ? "tensors overlap" : "some bytes belong to no tensor")};
    }
    at = p.end;
  }
  if (at != total) return diagnostic{say("the tensors end at byte", at, "of the data, which has", total)};
  out.metadata = std::move(reader.metadata);
  return std::nullopt;
}

template <class T, class Stored>
void convert_values(std::span<const std::byte> bytes, std::span<T> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    Stored v;
    std::memcpy(&v, bytes.data() + i * sizeof v, sizeof v);
    out[i] = static_cast<T>(v);
  }
}
template <class T, auto FromBits>
void convert_halves(std::span<const std::byte> bytes, std::span<T> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::uint16_t v = 0;
    std::memcpy(&v, bytes.data() + i * sizeof v, sizeof v);
    out[i] = static_cast<T>(FromBits(v));
  }
}

}  // namespace detail

/// The first rule of the format that a file breaks, if any: lengths, JSON, UTF-8, names that come twice, dtypes,
/// extents, offsets that do not fit them, tensors that overlap, bytes that belong to none.
inline std::optional<diagnostic> validate_safetensors(std::span<const std::byte> file) {
  safetensors ignored;
  return detail::read_safetensors(file, ignored);
}

/// @return views into `file`, which must outlive them
/// @throws metadata_error with the text of validate_safetensors()
inline safetensors parse_safetensors(std::span<const std::byte> file) {
  safetensors out;
  raise(detail::read_safetensors(file, out));
  return out;
}

/// A file on disk with what it says.
struct safetensors_file {
  mapped_file file;
  safetensors content;

  const std::string& path() const noexcept { return file.path(); }
  const tensor_entry* find(std::string_view name) const noexcept { return content.find(name); }
  std::span<const tensor_entry> tensors() const noexcept { return content.tensors; }
};

/// @throws metadata_error naming the file
inline safetensors_file open_safetensors(const std::string& path) {
  safetensors_file out;
  out.file = mapped_file(path);
  if (const auto found = detail::read_safetensors(out.file.bytes(), out.content)) {
    throw metadata_error(path + ": " + found->text);
  }
  return out;
}

/// The elements of a tensor: of F64, F32, F16 or BF16 for a floating T (exact, but that F64 rounds once to float), of
/// I64 or I32 for index_t.
/// @throws metadata_error if the tensor has another dtype, shape_error if `out` has another size
template <class T>
requires std::floating_point<T> || std::same_as<T, index_t>
void read_values(const tensor_entry& t, std::span<T> out) {
  expects<shape_error>(static_cast<index_t>(out.size()) == t.size(), "tensor", t.name, "has", t.size(), "elements,",
                       out.size(), "were asked for");
  if constexpr (std::floating_point<T>) {
    switch (t.type) {
      case dtype::f64:
        return detail::convert_values<T, double>(t.bytes, out);
      case dtype::f32:
        return detail::convert_values<T, float>(t.bytes, out);
      case dtype::f16:
        return detail::convert_halves<T, from_f16>(t.bytes, out);
      case dtype::bf16:
        return detail::convert_halves<T, from_bf16>(t.bytes, out);
      default:
        break;
    }
  } else {
    if (t.type == dtype::i64) return detail::convert_values<T, std::int64_t>(t.bytes, out);
    if (t.type == dtype::i32) return detail::convert_values<T, std::int32_t>(t.bytes, out);
  }
  throw metadata_error(say("tensor", detail::in_quotes(t.name), "has dtype", name_of(t.type), "; it must be",
                           std::floating_point<T> ? "F64, F32, F16 or BF16" : "I64 or I32"));
}

template <class T>
std::vector<T> values_of(const tensor_entry& t) {
  std::vector<T> out(static_cast<std::size_t>(t.size()));
  read_values<T>(t, out);
  return out;
}

/// The bytes of `values` in a file; each rounds once, to nearest even.
/// @param type f64, f32, f16 or bf16
inline std::vector<std::byte> encode(std::span<const double> values, dtype type) {
  expects<metadata_error>(is_floating(type), "values cannot be written as", name_of(type));
  const auto size = static_cast<std::size_t>(bits_of(type) / 8);
  std::vector<std::byte> out(values.size() * size);
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::byte* at = out.data() + i * size;
    const auto put = [&](auto v) { std::memcpy(at, &v, sizeof v); };
    switch (type) {
      case dtype::f64:
        put(values[i]);
        break;
      case dtype::f32:
        put(static_cast<float>(values[i]));
        break;
      case dtype::f16:
        put(to_f16(values[i]));
        break;
      default:
        put(to_bf16(values[i]));
        break;
    }
  }
  return out;
}

namespace detail {
/// Widest type first, so that every tensor is aligned; then by name.
inline std::vector<const tensor_entry*> file_order(std::span<const tensor_entry> tensors) {
  std::vector<const tensor_entry*> order;
  for (const tensor_entry& t : tensors) order.push_back(&t);
  std::sort(order.begin(), order.end(), [](const tensor_entry* a, const tensor_entry* b) {
    return bits_of(a->type) != bits_of(b->type) ? bits_of(a->type) > bits_of(b->type) : a->name < b->name;
  });
  return order;
}
}  // namespace detail

/// The first 8 + n bytes of a file of `tensors`, n a multiple of 8.
/// @throws metadata_error if a name comes twice or is no UTF-8, or if bytes do not fit dtype and shape
inline std::string safetensors_header(std::span<const tensor_entry> tensors, const metadata_map& metadata = {}) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::set<std::string_view> names = {"__metadata__"};
  std::size_t at = 0;
  for (const tensor_entry* t : detail::file_order(tensors)) {
    const std::string name = detail::in_quotes(t->name);
    expects<metadata_error>(names.insert(t->name).second, "the name", name, "comes twice");
    const std::optional<index_t> bytes = detail::bytes_of(t->type, t->shape);
    expects<metadata_error>(bytes && static_cast<std::size_t>(*bytes) == t->bytes.size(), "tensor", name, "has",
                            t->bytes.size(), "bytes, which do not fit", name_of(t->type), shape_text(t->shape));
    header.push_back({t->name,
                      {{"dtype", name_of(t->type)},
                       {"shape", t->shape},
                       {"data_offsets", std::array<std::size_t, 2>{at, at + t->bytes.size()}}}});
    at += t->bytes.size();
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw metadata_error("a name or the metadata of a safetensors file is no UTF-8");
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  const std::uint64_t length = text.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + text;
}

/// Writes all but the name; `file.commit()` gives it. @throws metadata_error naming the file
inline void write_safetensors(replacement_file& file, std::span<const tensor_entry> tensors,
                              const metadata_map& metadata = {}) {
  file.write(safetensors_header(tensors, metadata));
  for (const tensor_entry* t : detail::file_order(tensors)) file.write(t->bytes);
}

/// Writes a file that appears whole or not at all.
/// @throws metadata_error naming the file
inline void write_safetensors(const std::string& path, std::span<const tensor_entry> tensors,
                              const metadata_map& metadata = {}) {
  replacement_file file(path);
  write_safetensors(file, tensors, metadata);
  file.commit();
}

}  // namespace v0
}  // namespace gdn
