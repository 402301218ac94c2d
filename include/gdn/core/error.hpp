// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Errors that name the value, the place and the rule.

#include <concepts>
#include <cstddef>
#include <optional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace gdn {
inline namespace v0 {

/// Base of everything that gdn throws itself.
class error : public std::runtime_error {
 public:
  explicit error(const std::string& text, std::source_location where = std::source_location::current())
      : std::runtime_error(text), where_(where) {}
  /// Where in the host program's call the contract was checked.
  const std::source_location& where() const noexcept { return where_; }

 private:
  std::source_location where_;
};

// Constructors are written out: nvcc 13.0 fails on inherited ones with a source_location by default.

/// Extents of tensors that contradict each other or the plan.
class shape_error : public error {
 public:
  explicit shape_error(const std::string& text, std::source_location where = std::source_location::current())
      : error(text, where) {}
};
/// Masks, lengths, positions, layouts or checkpoints that break a rule.
class metadata_error : public error {
 public:
  explicit metadata_error(const std::string& text, std::source_location where = std::source_location::current())
      : error(text, where) {}
};
/// Memory given by the caller is too small or misaligned.
class workspace_error : public error {
 public:
  explicit workspace_error(const std::string& text, std::source_location where = std::source_location::current())
      : error(text, where) {}
};
/// A backend cannot do what was asked, or failed while doing it.
class backend_error : public error {
 public:
  explicit backend_error(const std::string& text, std::source_location where = std::source_location::current())
      : error(text, where) {}
};
/// A message could not be exchanged; the communicator's state says why, and stays so.
class comm_error : public error {
 public:
  explicit comm_error(const std::string& text, std::source_location where = std::source_location::current())
      : error(text, where) {}
};

/// What a validator found: the text names the value, the place and the rule.
struct diagnostic {
  std::string text;
};

namespace detail {
inline void append(std::string& out, std::string_view v) { out += v; }
inline void append(std::string& out, const char* v) { out += v; }
inline void append(std::string& out, const std::string& v) { out += v; }
inline void append(std::string& out, bool v) { out += v ? "true" : "false"; }
template <class V>
  requires std::integral<V> || std::floating_point<V>
void append(std::string& out, V v) {
  out += std::to_string(v);
}

/// True for text in the code, not for values of strings, that begins with punctuation.
template <class V>
constexpr bool is_punctuation(const V&) {
  return false;
}
template <std::size_t N>
constexpr bool is_punctuation(const char (&text)[N]) {
  return std::string_view(",.:;)").find(text[0]) != std::string_view::npos;
}
}  // namespace detail

/// Joins words and numbers with single spaces, and punctuation with none before it. (g++ 12 has no <format>.)
template <class... Parts>
std::string say(const Parts&... parts) {
  std::string out;
  ((out.empty() || detail::is_punctuation(parts) ? void() : void(out += ' '), detail::append(out, parts)), ...);
  return out;
}

namespace detail {
/// Captures the call site next to the first argument, since a default argument cannot follow a pack.
struct located_text {
  std::string_view text;
  std::source_location where;
  template <class S>
    requires std::convertible_to<const S&, std::string_view>
  // NOLINTNEXTLINE(google-explicit-constructor): the conversion is the point
  constexpr located_text(const S& s, std::source_location at = std::source_location::current()) : text(s), where(at) {}
};
}  // namespace detail

/// Checks a contract, in release builds too: `expects<shape_error>(a == b, "x has rows", a, "but y has", b)`.
template <std::derived_from<error> E = error, class... Parts>
constexpr void expects(bool condition, detail::located_text rule, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    throw E(say(rule.text, parts...), rule.where);
  }
}

/// The throwing twin of a validator: nothing if there is no finding.
template <std::derived_from<error> E = metadata_error>
void raise(const std::optional<diagnostic>& found, std::source_location where = std::source_location::current()) {
  if (found) [[unlikely]] {
    throw E(found->text, where);
  }
}

}  // namespace v0
}  // namespace gdn
