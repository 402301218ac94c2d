// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  L2 normalisation of queries and keys, and the gated RMS norm of the output.

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

/// Vectors of [L, H, D] that an item works on.
inline constexpr index_t vectors_per_item = 64;

/// Vector `i` of [L, H, D].
template <class T>
T* vector_at(const tensor_ref<T, 3>& t, index_t i) noexcept {
  return t.data() + i / t.extent(1) * t.stride(0) + i % t.extent(1) * t.stride(1);
}
/// Element `i` of [L, H].
template <class T>
T& scalar_at(const tensor_ref<T, 2>& t, index_t i) noexcept {
  return t(i / t.extent(1), i % t.extent(1));
}

/// x in T or accumulate_t.
template <class X, class T, class Exec>
void l2norm_forward(const Exec& exec, tensor_ref<const X, 3> x, double eps, tensor_ref<T, 3> y,
                    out_ref<accumulate_t<T>, 2> rstd) {
  using A = accumulate_t<T>;
  const index_t length = x.extent(0), heads = x.extent(1), dim = x.extent(2), vectors = length * heads;
  expects_l2norm_forward(x, y, rstd);
  for_each_item(exec, blocks_of(vectors, vectors_per_item), [=](index_t item) {
    const range own = block_at(item, vectors_per_item, vectors);
    for (index_t n = own.begin; n < own.end(); ++n) {
      const X* xs = vector_at(x, n);
      T* ys = vector_at(y, n);
      const A squares = lane_sum<A>(dim, [=](index_t i) { return static_cast<A>(xs[i]) * static_cast<A>(xs[i]); });
      const A rho = A(1) / std::sqrt(squares + static_cast<A>(eps));
      for (index_t i = 0; i < dim; ++i) ys[i] = static_cast<T>(static_cast<A>(xs[i]) * rho);
      scalar_at(rstd, n) = rho;
    }
  });
}

template <class T, class Exec>
void l2norm_backward(const Exec& exec, in_ref<T, 3> dy, in_ref<T, 3> y, in_ref<accumulate_t<T>, 2> rstd,
                     tensor_ref<T, 3> dx) {
  using A = accumulate_t<T>;
  const index_t length = y.extent(0), heads = y.extent(1), dim = y.extent(2), vectors = length * heads;
  expects_l2norm_backward(dy, y, rstd, dx);
  for_each_item(exec, blocks_of(vectors, vectors_per_item), [=](index_t item) {
    const range own = block_at(item, vectors_per_item, vectors);
    for (index_t n = own.begin; n < own.end(); ++n) {
      const T* dys = vector_at(dy, n);
      const T* ys = vector_at(y, n);
      T* dxs = vector_at(dx, n);
      const A rho = scalar_at(rstd, n);
      const A along = lane_sum<A>(dim, [=](index_t i) { return static_cast<A>(ys[i]) * static_cast<A>(dys[i]); });
      for (index_t i = 0; i < dim; ++i) {
        dxs[i] = static_cast<T>(rho * (static_cast<A>(dys[i]) - static_cast<A>(ys[i]) * along));
      }
    }
  });
}

/// o and z in T or accumulate_t.
template <class X, class T, class Exec>
void gated_norm_forward(const Exec& exec, in_ref<X, 3> o, in_ref<X, 3> z, in_ref<accumulate_t<T>, 1> w, double eps,
                        tensor_ref<T, 3> y, out_ref<accumulate_t<T>, 2> rstd) {
  using A = accumulate_t<T>;
  const index_t length = o.extent(0), heads = o.extent(1), dim = o.extent(2), vectors = length * heads;
  expects_gated_norm_forward(o, z, w, y, rstd);
  for_each_item(exec, blocks_of(vectors, vectors_per_item), [=](index_t item) {
    const range own = block_at(item, vectors_per_item, vectors);
    const A* ws = w.data();
    for (index_t n = own.begin; n < own.end(); ++n) {
      const X* os = vector_at(o, n);
      const X* zs = vector_at(z, n);
      T* ys = vector_at(y, n);
      const A squares = lane_sum<A>(dim, [=](index_t i) { return static_cast<A>(os[i]) * static_cast<A>(os[i]); });
      const A rho = A(1) / std::sqrt(squares / static_cast<A>(dim) + static_cast<A>(eps));
      for (index_t i = 0; i < dim; ++i) {
        ys[i] = static_cast<T>(ws[i] * (static_cast<A>(os[i]) * rho) * silu(static_cast<A>(zs[i])));
      }
      scalar_at(rstd, n) = rho;
    }
  });
}

/// With x = o rstd and d = dy w silu(z): d_o = rstd (d - x mean(x d)), dz = dy w x silu'(z), dw += sum dy x silu(z).
template <class T, class Exec>
void gated_norm_backward(const Exec& exec, in_ref<T, 3> dy, in_ref<T, 3> o, in_ref<T, 3> z,
                         in_ref<accumulate_t<T>, 1> w, in_ref<accumulate_t<T>, 2> rstd, tensor_ref<T, 3> d_o,
                         tensor_ref<T, 3> dz, out_ref<accumulate_t<T>, 1> dw) {
  using A = accumulate_t<T>;
  constexpr index_t panel = 128;   // columns of dw that are summed at once
  constexpr index_t cached = 512;  // sigmoids that are kept; longer vectors compute them again
  const index_t length = o.extent(0), heads = o.extent(1), dim = o.extent(2), vectors = length * heads;
  expects_gated_norm_backward(dy, o, z, w, rstd, d_o, dz, dw);

  row_group_sums<panel> sums;
  for (index_t c0 = 0; c0 < dim; c0 += panel) {
    const range columns{c0, std::min(panel, dim - c0)};
    sums.clear();
    for_each_item(exec, sums.groups, [=, &sums](index_t group) {
      const range own = sums.rows_of(group, vectors);
      double* dws = sums.of(group);
      const A* ws = w.data();
      A gate[cached];
      for (index_t n = own.begin; n < own.end(); ++n) {
        const T* dys = vector_at(dy, n);
        const T* os = vector_at(o, n);
        const T* zs = vector_at(z, n);
        const A rho = scalar_at(rstd, n);
        const auto gate_at = [=, &gate](index_t i) { return dim <= cached ? gate[i] : sigmoid(static_cast<A>(zs[i])); };
        if (dim <= cached) {
          const range needed = c0 == 0 ? range{0, dim} : columns;
          for (index_t i = needed.begin; i < needed.end(); ++i) gate[i] = sigmoid(static_cast<A>(zs[i]));
        }
        if (c0 == 0) {  // the first panel brings the other two gradients
          T* d_os = vector_at(d_o, n);
          T* dzs = vector_at(dz, n);
          const auto d_at = [=](index_t i) {
            return static_cast<A>(dys[i]) * ws[i] * (static_cast<A>(zs[i]) * gate_at(i));
          };
          const A along = rho * lane_sum<A>(dim, [=](index_t i) { return static_cast<A>(os[i]) * d_at(i); });
          const A mean = along / static_cast<A>(dim);
          for (index_t i = 0; i < dim; ++i) {
            const A x = static_cast<A>(os[i]) * rho;
            const A s = gate_at(i);
            const A slope = s * (A(1) + static_cast<A>(zs[i]) * (A(1) - s));
            d_os[i] = static_cast<T>(rho * (d_at(i) - x * mean));
            dzs[i] = static_cast<T>(static_cast<A>(dys[i]) * ws[i] * x * slope);
          }
        }
        for (index_t i = 0; i < columns.count; ++i) {
          const index_t c = columns.begin + i;
          const A gated = static_cast<A>(zs[c]) * gate_at(c);
          dws[i] += static_cast<double>(static_cast<A>(dys[c]) * (static_cast<A>(os[c]) * rho) * gated);
        }
      }
    });
    sums.add_to(0, columns.count, dw.data() + c0);
  }
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
