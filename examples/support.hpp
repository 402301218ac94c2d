// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What the examples share: memory, random values, comparison.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include <gdn/core/workspace.hpp>
#include <gdn/layer/gated_delta_net.hpp>

namespace example {

using gdn::index_t;
using workspace = gdn::workspace<gdn::host_memory>;

/// gdn allocates no memory of tensors. It says how much it needs, the program provides blocks, and workspaces hand them
/// out.
class block {
 public:
  block() = default;
  explicit block(gdn::memory_requirement need)
      : bytes_(need.bytes), data_(std::aligned_alloc(need.alignment, need.bytes)) {}
  workspace over() const { return {data_.get(), bytes_}; }

 private:
  struct release {
    void operator()(void* p) const { std::free(p); }
  };
  std::size_t bytes_ = 0;
  std::unique_ptr<void, release> data_;
};

/// Calls `carve(workspace)` twice, first to measure and then over memory of that size, which `memory` keeps.
template <class F>
auto allocate(block& memory, F&& carve) {
  workspace measure;
  carve(measure);
  memory = block(measure.peak());
  workspace real = memory.over();
  return carve(real);
}

inline std::vector<double> random_values(index_t n, unsigned seed, double scale = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<double> out(static_cast<std::size_t>(n));
  for (double& v : out) v = normal(engine);
  return out;
}

/// A layer whose nine weight tensors are random and lie in `memory`.
inline gdn::gated_delta_net<double> random_layer(const gdn::layer_dims& dims, block& memory) {
  const auto weights = allocate(memory, [&](workspace& ws) { return gdn::parameter_storage<double>::carve(ws, dims); });
  unsigned seed = 1;
  weights.for_each([&](std::string_view, const auto& w) {
    const auto values = random_values(w.size(), seed++, 0.3);
    std::copy(values.begin(), values.end(), w.data());
  });
  return {dims, weights};
}

/// The largest difference; infinite if the sizes differ or a value is not finite.
inline double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double d = std::abs(a[i] - b[i]);
    worst = d <= worst ? worst : std::isfinite(d) ? d : INFINITY;
  }
  return worst;
}

/// rms(a - b) / rms(b), the measure of gdn-run.
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  double error = a.size() == b.size() ? 0 : INFINITY;
  double size = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

/// Prints a line; false if `value` exceeds `limit`.
inline bool expect_at_most(const char* what, double value, double limit) {
  const bool ok = value <= limit;
  std::printf("%-52s %9.2e  %s %.0e\n", what, value, ok ? "<=" : "EXCEEDS", limit);
  return ok;
}

}  // namespace example
