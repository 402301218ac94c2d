// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A layer as its formulas say, document by document and token by token, in double.

#include <functional>

#include <support/layer_case.hpp>

namespace gdn_test {

/// Output and final states of a batch; with `initial` its initial states come in, else zeros. What a layer keeps in its
/// own type between steps (unit q and k, beta, what the norm leaves) goes through `kept`.
layer_result layer_by_formulas(const layer_batch& batch, bool initial,
                               const std::function<double(double)>& kept = [](double v) { return v; });

/// <y, dy> + <final, d_final> + <final conv, d_final_conv>: what backward() is the gradient of.
double loss_of(const layer_batch& batch, const layer_result& result);

}  // namespace gdn_test
