// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <utility>

#include <nlohmann/json.hpp>

#include <gdn/core/error.hpp>
#include <gdn/io/safetensors.hpp>
#include <gdn/version.hpp>

namespace gdn_run {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// The root of the sum of squares of f(i), safe from overflow and underflow of the squares.
template <class F>
double norm(std::size_t n, F&& f) {
  double largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double v = std::abs(f(i));
    if (!std::isfinite(v)) return infinity;
    largest = std::max(largest, v);
  }
  if (largest == 0) return 0;
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double v = f(i) / largest;
    sum += v * v;
  }
  return largest * std::sqrt(sum);
}

std::string format(const char* form, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), form, value);
  return text.data();
}

/// Rows of cells with columns of equal width; the first column is flush left.
std::string table_text(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width;
  for (const auto& row : rows) {
    width.resize(std::max(width.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string gap(width[i] - row[i].size(), ' ');
      if (i > 0) out += "  ";
      out += i == 0 ? row[i] + gap : gap + row[i];
    }
    out += '\n';
  }
  return out;
}

}  // namespace

comparison compare(std::string name, std::vector<index_t> shape, std::span<const double> expected,
                   std::span<const double> actual, double limit) {
  comparison c{std::move(name), std::move(shape), 0, 0, limit, false};
  const std::size_t n = expected.size();
  // With an infinity on both sides the difference is NaN, which is no small error.
  const auto difference = [&](std::size_t i) { return actual[i] - expected[i]; };
  bool finite = true;
  for (std::size_t i = 0; i < n; ++i) {
    const double e = std::abs(difference(i));
    finite = finite && std::isfinite(e);
    c.max_abs = std::isfinite(e) ? std::max(c.max_abs, e) : infinity;
  }
  if (!finite) {
    c.max_abs = infinity;
    c.rel_rms = infinity;
    return c;
  }
  const double wrong = norm(n, difference);
  const double right = norm(n, [&](std::size_t i) { return expected[i]; });
  if (wrong > 0) c.rel_rms = right > 0 ? wrong / right : infinity;
  c.ok = c.rel_rms <= limit;
  return c;
}

double limit_of(std::string_view name, const options& o) {
  if (o.tolerance) return *o.tolerance;
  const bool gradient = name.starts_with("grad.");
  switch (o.dtype) {
    case gdn::dtype::bf16:
      return gradient ? 5e-2 : 2e-2;
    case gdn::dtype::f16:
      return gradient ? 8e-3 : 4e-3;
    default:
      return 3e-5;  // the peer computes in fp32, also where this layer is f64
  }
}

gdn::dtype type_in_file(std::string_view name, gdn::dtype layer) {
  const bool full = name.ends_with("_state") || name.ends_with(".A_log") || name.ends_with(".dt_bias");
  return full && layer != gdn::dtype::f64 ? gdn::dtype::f32 : layer;
}

std::vector<comparison> compare_all(const options& o, const bundle& b, const run_result& r) {
  std::vector<comparison> out;
  for (const expected_tensor& e : b.expected) {
    if (!o.grad && e.name.starts_with("grad.")) continue;
    if (!o.decode && e.name.starts_with("decode.")) continue;
    const gdn::named_values* t = r.find(e.name);
    if (t == nullptr) throw gdn::backend_error("the run did not give '" + e.name + "'");
    if (t->shape != e.entry->shape || static_cast<index_t>(t->values.size()) != e.entry->size()) {
      throw gdn::backend_error("the run gave '" + e.name + "' the shape " + gdn::shape_text(t->shape) + ", not " +
                               gdn::shape_text(e.entry->shape));
    }
    out.push_back(compare(e.entry->name, t->shape, gdn::values_of<double>(*e.entry), t->values, limit_of(e.name, o)));
  }
  return out;
}

bool all_within_limits(std::span<const comparison> table) {
  return std::all_of(table.begin(), table.end(), [](const comparison& c) { return c.ok; });
}

std::string to_text(const options& o, const bundle& b, const run_result& r, std::span<const comparison> table) {
  std::string out;
  if (!b.peer.empty()) out += "expected by " + gdn::detail::in_quotes(b.peer) + "\n";
  std::vector<std::vector<std::string>> rows = {{"tensor", "shape", "max abs error", "rel rms error", "limit", ""}};
  for (const comparison& c : table) {
    rows.push_back({c.name, gdn::shape_text(c.shape), format("%.3e", c.max_abs), format("%.3e", c.rel_rms),
                    format("%.1e", c.limit), c.ok ? "ok" : "FAILED"});
  }
  out += table.empty() ? "nothing to compare\n" : table_text(rows);

  out += gdn::say("\ntokens", r.tokens, " ranks", o.ranks, "\n");
  rows = {{"bytes received", "halo", "state", "activations"}};
  for (std::size_t rank = 0; rank < r.received.size(); ++rank) {
    const gdn::traffic& t = r.received[rank];
    rows.push_back({"  rank " + std::to_string(rank), std::to_string(t.halo), std::to_string(t.state),
                    std::to_string(t.activations)});
  }
  out += table_text(rows);
  rows = {{"milliseconds", ""}};
  for (const auto& [phase, time] : r.milliseconds) rows.push_back({"  " + phase, format("%.3f", time)});
  return out + table_text(rows);
}

std::string to_json(const run_result& r, std::span<const comparison> table) {
  using json = nlohmann::ordered_json;
  json out = {{"ok", all_within_limits(table)}, {"tensors", json::array()},        {"tokens", r.tokens},
              {"ranks", r.received.size()},     {"bytes_received", json::array()}, {"milliseconds", json::object()}};
  for (const comparison& c : table) {
    out["tensors"].push_back({{"name", c.name},
                              {"shape", c.shape},
                              {"max_abs", c.max_abs},
                              {"rel_rms", c.rel_rms},
                              {"limit", c.limit},
                              {"ok", c.ok}});
  }
  for (std::size_t rank = 0; rank < r.received.size(); ++rank) {
    const gdn::traffic& t = r.received[rank];
    out["bytes_received"].push_back(
        {{"rank", rank}, {"halo", t.halo}, {"state", t.state}, {"activations", t.activations}});
  }
  for (const auto& [phase, time] : r.milliseconds) out["milliseconds"][phase] = time;
  return out.dump() + "\n";
}

void write_results(gdn::replacement_file& file, const options& o, const run_result& r) {
  std::vector<std::vector<std::byte>> bytes;
  std::vector<gdn::tensor_entry> entries;
  bytes.reserve(r.tensors.size());
  for (const gdn::named_values& t : r.tensors) {
    const gdn::dtype type = type_in_file(t.name, o.dtype);
    bytes.push_back(gdn::encode(t.values, type));
    entries.push_back({t.name, type, t.shape, bytes.back()});
  }
  const std::string version = std::to_string(GDN_VERSION_MAJOR) + "." + std::to_string(GDN_VERSION_MINOR) + "." +
                              std::to_string(GDN_VERSION_PATCH);
  gdn::write_safetensors(file, entries, {{"format", "pt"}, {"peer", "gdn " + version}});
}

}  // namespace gdn_run
