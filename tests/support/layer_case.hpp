// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A layer and a whole batch, as no rank holds them, and what any number of ranks make of them.

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/plan/cp_plan.hpp>
#include <support/counting_communicator.hpp>
#include <support/layer_api.hpp>
#include <support/random.hpp>

namespace gdn_test {

using values = std::vector<double>;

inline constexpr std::array<std::string_view, 9> parameter_names = {
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "A_log", "dt_bias", "norm", "out_proj"};
enum parameter : std::size_t { in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, A_log, dt_bias, norm, out_proj };

/// Weights, inputs and the gradients that arrive: everything that does not depend on how a batch is spread over ranks.
/// Numbers are those of a float, so that a layer of any type starts from the same ones.
struct layer_batch {
  gdn::layer_dims dims;
  gdn::packing pack;
  std::array<values, 9> parameters;
  values x, dy;                      // [B S, hid]; rows of padding are NaN
  values initial, d_final;           // [N, Hv, K, V]
  values initial_conv, d_final_conv; // [N, Dc, W]

  index_t documents() const { return pack.documents(); }
  index_t state_size() const { return dims.state_size(); }
  index_t conv_size() const { return dims.channels() * dims.conv_width; }
};

/// How a batch is spread, and with which options it runs.
struct layer_spread {
  int world = 1;
  gdn::fragment_table rows;  // over the B S rows
  gdn::plan_options options;
  index_t chunk = 64;
  rule_kind rule = rule_kind::chunked;
  gdn::keep_policy keep = gdn::keep_policy::everything;  // nothing: forward only
  int threads = 1;                                       // of each rank
  bool late = false;                                     // exchanges begin after random waits
  int backward_runs = 1;                                 // each must give the same bits
};

/// Padding and layout of one rank: the reference of all others.
layer_spread on_one_rank(const layer_batch& batch, gdn::plan_options options = {});
/// One layout for all rows of the batch.
template <gdn::sequence_layout Layout>
layer_spread spread_over(const Layout& layout, const layer_batch& batch, gdn::plan_options options = {}) {
  layer_spread out;
  out.world = layout.world_size();
  out.rows = gdn::batch_table(layout.fragments(), layout.size(), layout.world_size(), batch.pack.batch);
  out.options = options;
  return out;
}

/// What all ranks together computed. What was not asked for is empty.
struct layer_result {
  values y, final_, final_conv, dx, d_initial, d_initial_conv;
  std::array<values, 9> gradients;  // sums over the ranks

  /// f(name, values) for each.
  template <class F>
  void for_each(F&& f) const {
    f("y", y);
    f("final state", final_);
    f("final conv state", final_conv);
    f("dx", dx);
    f("d initial state", d_initial);
    f("d initial conv state", d_initial_conv);
    for (std::size_t i = 0; i < gradients.size(); ++i) f(std::string("d ").append(parameter_names[i]), gradients[i]);
  }

  // Of each rank, not of the batch.
  std::vector<message_counts> forward_messages, backward_messages;
  std::vector<gdn::traffic> forward_plan, backward_plan;
  std::vector<gdn::layer_requirements> promised;
  std::vector<gdn::strategy> strategy;  // as done
};

/// Runs forward, and backward unless the spread keeps nothing, with memory of exactly the promised sizes, full of NaN.
/// Fails the current test if a guard of the memory was overwritten, an input was changed, a workspace was not returned,
/// more was used than promised, a repeated backward gave other bits, or a row of padding is not zero.
template <class T>
layer_result run_layer(const layer_batch& batch, const layer_spread& spread);
extern template layer_result run_layer<double>(const layer_batch&, const layer_spread&);
extern template layer_result run_layer<float>(const layer_batch&, const layer_spread&);
extern template layer_result run_layer<gdn::bfloat16>(const layer_batch&, const layer_spread&);

/// Random weights, inputs and states of sizes that make all parts of the layer matter.
layer_batch random_batch(random_source& random, const gdn::layer_dims& d, gdn::packing pack);

/// Numbers for tensors of n elements in [-scale, scale).
values random_values(random_source& random, index_t n, double scale = 1);

/// Every tensor of `got` is at most `limit` times the largest element of `want` away from it.
testing::AssertionResult near(const layer_result& got, const layer_result& want, double limit);
/// The same by the root of the mean square, as FLA and gdn-run measure it.
testing::AssertionResult near_rms(const layer_result& got, const layer_result& want, double limit);
testing::AssertionResult same_bits(const layer_result& got, const layer_result& want);

/// Largest error over largest value; and rms(error) / rms(want). 0 if both are zero, infinite if sizes differ or NaN.
double relative_error(const values& got, const values& want);
double rms_error(const values& got, const values& want);

std::string describe(const layer_batch& batch);
std::string describe(const layer_spread& spread);

/// A rank's rows of a tensor of the batch: rows of `width` elements, by their index in the batch.
template <class T>
std::vector<T> rows_of_rank(const values& all, const gdn::fragment_table& table, int rank, index_t width) {
  std::vector<T> out(static_cast<std::size_t>(gdn::local_rows(table, rank) * width));
  for (const gdn::fragment& f : table) {
    for (index_t i = 0; f.rank == rank && i < f.count * width; ++i) {
      out[static_cast<std::size_t>(f.local * width + i)] =
          static_cast<T>(all[static_cast<std::size_t>(f.begin * width + i)]);
    }
  }
  return out;
}
template <class T>
void put_rows_of_rank(const std::vector<T>& part, const gdn::fragment_table& table, int rank, index_t width,
                      values& all) {
  for (const gdn::fragment& f : table) {
    for (index_t i = 0; f.rank == rank && i < f.count * width; ++i) {
      all[static_cast<std::size_t>(f.begin * width + i)] =
          static_cast<double>(part[static_cast<std::size_t>(f.local * width + i)]);
    }
  }
}
/// Entries `which` of a tensor of entries of one size.
template <class T>
std::vector<T> entries(const values& all, const std::vector<index_t>& which, index_t size) {
  std::vector<T> out;
  for (const index_t n : which) {
    for (index_t i = 0; i < size; ++i) out.push_back(static_cast<T>(all[static_cast<std::size_t>(n * size + i)]));
  }
  return out;
}
template <class T>
void put_entries(const std::vector<T>& part, const std::vector<index_t>& which, index_t size, values& all) {
  for (std::size_t n = 0; n < which.size(); ++n) {
    for (index_t i = 0; i < size; ++i) {
      all[static_cast<std::size_t>(which[n] * size + i)] =
          static_cast<double>(part[n * static_cast<std::size_t>(size) + static_cast<std::size_t>(i)]);
    }
  }
}

/// A layer of type T with the weights of a batch.
template <class T>
class owned_layer {
 public:
  explicit owned_layer(const layer_batch& batch);
  const gdn::gated_delta_net<T>& layer() const { return layer_; }
  /// As it was made.
  bool unchanged() const;

 private:
  std::array<std::vector<T>, 9> weights_;             // those of A_log, dt_bias and norm are unused
  std::array<std::vector<gdn::accumulate_t<T>>, 9> full_;
  std::array<std::vector<T>, 9> weights_before_;
  std::array<std::vector<gdn::accumulate_t<T>>, 9> full_before_;
  gdn::gated_delta_net<T> layer_;
};
extern template class owned_layer<double>;
extern template class owned_layer<float>;
extern template class owned_layer<gdn::bfloat16>;

}  // namespace gdn_test
