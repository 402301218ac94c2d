// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Decay and write strength of the delta rule from two projections, and their gradients.

#include <cmath>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/kokkos/detail/activation.hpp>
#include <gdn/kokkos/detail/parallel.hpp>
#include <gdn/kokkos/detail/sums.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// log(1 + e^x), replaced by x above 20.
template <class A>
A softplus(A x) {
  return x > A(20) ? x : std::log1p(std::exp(x));
}

template <class X, class T, class Exec>
void gates_forward(const Exec& exec, in_ref<X, 2> a, in_ref<X, 2> b, in_ref<accumulate_t<T>, 1> a_log,
                   in_ref<accumulate_t<T>, 1> dt_bias, out_ref<accumulate_t<T>, 2> g, tensor_ref<T, 2> beta) {
  using A = accumulate_t<T>;
  constexpr index_t row_block = 64, head_block = 64;
  const index_t length = a.extent(0), heads = a.extent(1);
  expects_gates_forward(a, b, a_log, dt_bias, g, beta);

  const index_t head_blocks = blocks_of(heads, head_block);
  for_each_item(exec, blocks_of(length, row_block) * head_blocks, [=](index_t item) {
    const range rows = block_at(item / head_blocks, row_block, length);
    const range own = block_at(item % head_blocks, head_block, heads);
    A rate[head_block];
    for (index_t h = 0; h < own.count; ++h) rate[h] = -std::exp(a_log(own.begin + h));
    for (index_t t = rows.begin; t < rows.end(); ++t) {
      for (index_t h = 0; h < own.count; ++h) {
        const index_t head = own.begin + h;
        g(t, head) = rate[h] * softplus(static_cast<A>(a(t, head)) + dt_bias(head));
        beta(t, head) = static_cast<T>(sigmoid(static_cast<A>(b(t, head))));
      }
    }
  });
}

/// da = dg (-e^A_log) sigmoid(a + dt_bias), db = dbeta beta (1 - beta), dA_log += sum dg g, d_dt_bias += sum da.
/// The sums run in double over fixed groups of rows, then over the groups.
template <class T, class Exec>
void gates_backward(const Exec& exec, in_ref<accumulate_t<T>, 2> dg, in_ref<accumulate_t<T>, 2> dbeta, in_ref<T, 2> a,
                    in_ref<T, 2> b, in_ref<accumulate_t<T>, 1> a_log, in_ref<accumulate_t<T>, 1> dt_bias,
                    tensor_ref<T, 2> da, tensor_ref<T, 2> db, out_ref<accumulate_t<T>, 1> d_a_log,
                    out_ref<accumulate_t<T>, 1> d_dt_bias) {
  using A = accumulate_t<T>;
  constexpr index_t head_block = 32;
  const index_t length = a.extent(0), heads = a.extent(1);
  expects_gates_backward(dg, dbeta, a, b, a_log, dt_bias, da, db, d_a_log, d_dt_bias);

  row_group_sums<2 * head_block> sums;  // of each group of rows: dA_log | d_dt_bias
  for (index_t h0 = 0; h0 < heads; h0 += head_block) {
    const range own{h0, std::min(head_block, heads - h0)};
    sums.clear();
    for_each_item(exec, sums.groups, [=, &sums](index_t group) {
      const range rows = sums.rows_of(group, length);
      double* d_log = sums.of(group);
      double* d_bias = d_log + head_block;
      A rate[head_block];
      for (index_t h = 0; h < own.count; ++h) rate[h] = -std::exp(a_log(own.begin + h));
      for (index_t t = rows.begin; t < rows.end(); ++t) {
        for (index_t h = 0; h < own.count; ++h) {
          const index_t head = own.begin + h;
          const A x = static_cast<A>(a(t, head)) + dt_bias(head);
          const A slope = x > A(20) ? A(1) : sigmoid(x);  // of softplus
          const A d_x = dg(t, head) * rate[h] * slope;
          const A write = sigmoid(static_cast<A>(b(t, head)));
          da(t, head) = static_cast<T>(d_x);
          db(t, head) = static_cast<T>(dbeta(t, head) * write * (A(1) - write));
          d_log[h] += static_cast<double>(dg(t, head) * rate[h] * softplus(x));
          d_bias[h] += static_cast<double>(d_x);
        }
      }
    });
    sums.add_to(0, own.count, &d_a_log(own.begin));
    sums.add_to(head_block, own.count, &d_dt_bias(own.begin));
  }
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
