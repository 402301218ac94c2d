// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Comparing results with what is expected, and writing them down.

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <gdn/core/dtype.hpp>
#include <gdn/io/file.hpp>

#include "bundle.hpp"
#include "options.hpp"
#include "run.hpp"

namespace gdn_run {

struct comparison {
  std::string name;  ///< as in the bundle, with "expected."
  std::vector<index_t> shape;
  double max_abs = 0;
  double rel_rms = 0;  ///< rms(error) / rms(expected); infinite for any error where all that is expected is 0
  double limit = 0;
  bool ok = false;  ///< rel_rms is within the limit; never if a value or an error is not finite
};

/// @param expected,actual of equal size
comparison compare(std::string name, std::vector<index_t> shape, std::span<const double> expected,
                   std::span<const double> actual, double limit);

/// The limit of a result, named without "expected.".
double limit_of(std::string_view name, const options& o);

/// The type of a result in `--out`: activations and weight gradients have the layer's, the gradients of A_log and
/// dt_bias, states and their gradients f32, or f64 in an f64 layer.
gdn::dtype type_in_file(std::string_view name, gdn::dtype layer);

/// Every expected tensor of the bundle whose part was run.
/// @throws gdn::backend_error if the run lacks a result or gave it another shape
std::vector<comparison> compare_all(const options& o, const bundle& b, const run_result& r);

bool all_within_limits(std::span<const comparison> table);

/// The table, then tokens, ranks, bytes and times, for people.
std::string to_text(const options& o, const bundle& b, const run_result& r, std::span<const comparison> table);

/// The same for programs; numbers that are not finite are null.
std::string to_json(const run_result& r, std::span<const comparison> table);

/// Writes the results as a safetensors file, all but its name.
void write_results(gdn::replacement_file& file, const options& o, const run_result& r);

}  // namespace gdn_run
