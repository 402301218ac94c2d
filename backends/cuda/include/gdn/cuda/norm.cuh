// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Norms on the device: a few lanes of a warp per row of a head.

#include <algorithm>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cuda/detail/activation.cuh>
#include <gdn/cuda/detail/partial_sums.cuh>
#include <gdn/cuda/detail/vector.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int norm_threads = 256;

/// A row of a head belongs to `Lanes` neighbouring lanes of a warp, which own packs of N elements in turn. With N = 8
/// the row fits into one pack per lane; N = 1 takes any length. What a lane reads twice it finds in the L1.
template <int N, int Lanes>
struct row_lanes {
  static constexpr int rows_per_block = norm_threads / Lanes;

  /// f(token, head) for each of L H rows, in one fixed distribution. The lanes of a warp stay together; those beyond
  /// the last row get it again, with `live` false.
  template <class F>
  static __device__ void for_each_row(index_t tokens, index_t heads, F&& f) {
    const index_t n = tokens * heads;
    const auto mine = static_cast<index_t>(threadIdx.x) / Lanes;
    for (index_t first = blockIdx.x * static_cast<index_t>(rows_per_block); first < n;
         first += gridDim.x * static_cast<index_t>(rows_per_block)) {
      const index_t i = first + mine;
      const index_t row = i < n ? i : n - 1;
      const index_t t = quotient(row, heads);
      f(t, row - t * heads, i < n);
    }
  }
  static __device__ int lane() { return static_cast<int>(threadIdx.x % Lanes); }
  /// f(i) for the first element of each pack that this lane owns.
  template <class F>
  static __device__ void for_each_pack(index_t dim, F&& f) {
    if constexpr (N > 1) {
      if (lane() * N < dim) f(static_cast<index_t>(lane() * N));
    } else {
      for (index_t i = lane(); i < dim; i += Lanes) f(i);
    }
  }
  static __device__ float sum(float v) { return warp_sum<float, Lanes>(v); }
  static index_t blocks(index_t tokens, index_t heads) { return divide_up(tokens * heads, rows_per_block); }
};

/// Calls f.operator()<N, Lanes>() with the fewest lanes that hold a row, where all tensors can be moved in packs.
template <class F, class... Tensors>
void with_row_lanes(index_t dim, F&& f, const Tensors&... tensors) {
  if (dim > 256 || !(moves_in_packs(tensors, 8) && ...)) {
    f.template operator()<1, 32>();
  } else if (dim > 128) {
    f.template operator()<8, 32>();
  } else if (dim > 64) {
    f.template operator()<8, 16>();
  } else {
    f.template operator()<8, 8>();
  }
}

template <class X, class T, int N, int Lanes>
__global__ void __launch_bounds__(norm_threads)
    l2norm_forward_kernel(tensor_ref<const X, 3, device_memory> x, float eps, tensor_ref<T, 3, device_memory> y,
                          tensor_ref<float, 2, device_memory> rstd) {
  using lanes = row_lanes<N, Lanes>;
  const index_t D = x.extent(2);
  lanes::for_each_row(x.extent(0), x.extent(1), [&](index_t t, index_t h, bool live) {
    const X* from = &x(t, h, 0);
    float sum = 0;
    lanes::for_each_pack(D, [&](index_t i) {
      const pack<float, N> v = load<X, N>(from + i);
      for (int c = 0; c < N; ++c) sum += v[c] * v[c];
    });
    const float r = 1.0f / sqrtf(lanes::sum(sum) + eps);
    if (!live) return;
    T* to = &y(t, h, 0);
    lanes::for_each_pack(D, [&](index_t i) {
      pack<float, N> v = load<X, N>(from + i);
      for (int c = 0; c < N; ++c) v[c] *= r;
      store<T, N>(to + i, v);
    });
    if (lanes::lane() == 0) rstd(t, h) = r;
  });
}

template <class T, int N, int Lanes>
__global__ void __launch_bounds__(norm_threads)
    l2norm_backward_kernel(tensor_ref<const T, 3, device_memory> dy, tensor_ref<const T, 3, device_memory> y,
                           tensor_ref<const float, 2, device_memory> rstd, tensor_ref<T, 3, device_memory> dx) {
  using lanes = row_lanes<N, Lanes>;
  const index_t D = y.extent(2);
  lanes::for_each_row(y.extent(0), y.extent(1), [&](index_t t, index_t h, bool live) {
    const T* d_from = &dy(t, h, 0);
    const T* from = &y(t, h, 0);
    const float r = rstd(t, h);
    float dot = 0;
    lanes::for_each_pack(D, [&](index_t i) {
      const pack<float, N> d = load<T, N>(d_from + i);
      const pack<float, N> v = load<T, N>(from + i);
      for (int c = 0; c < N; ++c) dot += d[c] * v[c];
    });
    dot = lanes::sum(dot);
    if (!live) return;
    T* to = &dx(t, h, 0);
    lanes::for_each_pack(D, [&](index_t i) {
      const pack<float, N> d = load<T, N>(d_from + i);
      pack<float, N> v = load<T, N>(from + i);
      for (int c = 0; c < N; ++c) v[c] = r * (d[c] - v[c] * dot);
      store<T, N>(to + i, v);
    });
  });
}

template <class T, int N, int Lanes>
__global__ void __launch_bounds__(norm_threads)
    gated_norm_forward_kernel(tensor_ref<const T, 3, device_memory> o, tensor_ref<const T, 3, device_memory> z,
                              const float* w, float eps, tensor_ref<T, 3, device_memory> y,
                              tensor_ref<float, 2, device_memory> rstd) {
  using lanes = row_lanes<N, Lanes>;
  const index_t D = o.extent(2);
  lanes::for_each_row(o.extent(0), o.extent(1), [&](index_t t, index_t h, bool live) {
    const T* from = &o(t, h, 0);
    const T* gates = &z(t, h, 0);
    pack<float, N> gate{};  // a pack of z is loaded along with that of o, before the sum is known
    float sum = 0;
    lanes::for_each_pack(D, [&](index_t i) {
      if constexpr (N > 1) gate = load<T, N>(gates + i);
      const pack<float, N> v = load<T, N>(from + i);
      for (int c = 0; c < N; ++c) sum += v[c] * v[c];
    });
    const float r = 1.0f / sqrtf(lanes::sum(sum) / static_cast<float>(D) + eps);
    if (!live) return;
    T* to = &y(t, h, 0);
    lanes::for_each_pack(D, [&](index_t i) {
      if constexpr (N == 1) gate = load<T, N>(gates + i);
      pack<float, N> v = load<T, N>(from + i);
      for (int c = 0; c < N; ++c) v[c] = w[i + c] * (v[c] * r) * apply<T>(activation::silu, gate[c]);
      store<T, N>(to + i, v);
    });
    if (lanes::lane() == 0) rstd(t, h) = r;
  });
}

/// dw: each group of lanes keeps its own sums, in registers (N > 1) or in its row of shared memory [groups, D]; the
/// block's groups are added in their order, then the blocks.
template <class T, int N, int Lanes>
__global__ void __launch_bounds__(norm_threads)
    gated_norm_backward_kernel(tensor_ref<const T, 3, device_memory> dy, tensor_ref<const T, 3, device_memory> o,
                               tensor_ref<const T, 3, device_memory> z, const float* w,
                               tensor_ref<const float, 2, device_memory> rstd, tensor_ref<T, 3, device_memory> d_o,
                               tensor_ref<T, 3, device_memory> dz, float* partial) {
  using lanes = row_lanes<N, Lanes>;
  extern __shared__ float sums[];
  const index_t D = o.extent(2);
  float* mine = sums + static_cast<index_t>(threadIdx.x) / Lanes * D;
  pack<float, N> dw{};
  lanes::for_each_pack(D, [&](index_t i) {
    for (int c = 0; c < N; ++c) mine[i + c] = 0;
  });
  pack<float, N> scale{};
  if constexpr (N > 1) lanes::for_each_pack(D, [&](index_t i) { scale = load<float, N>(w + i); });
  lanes::for_each_row(o.extent(0), o.extent(1), [&](index_t t, index_t h, bool live) {
    const T* d_from = &dy(t, h, 0);
    const T* from = &o(t, h, 0);
    const T* gates = &z(t, h, 0);
    const float r = rstd(t, h);
    float dot = 0;
    pack<float, N> d{}, x{}, g{}, s{};  // of the pack at hand: dy, normalised o, z, sigmoid(z)
    const auto fetch = [&](index_t i) {
      d = load<T, N>(d_from + i);
      x = load<T, N>(from + i);
      g = load<T, N>(gates + i);
      if constexpr (N == 1) scale[0] = w[i];
      for (int c = 0; c < N; ++c) {
        x[c] *= r;
        s[c] = sigmoid_for<T>(g[c]);
      }
    };
    lanes::for_each_pack(D, [&](index_t i) {
      fetch(i);
      for (int c = 0; c < N; ++c) dot += x[c] * (d[c] * scale[c] * (g[c] * s[c]));
    });
    dot = lanes::sum(dot) / static_cast<float>(D);
    if (!live) return;
    lanes::for_each_pack(D, [&](index_t i) {
      if constexpr (N == 1) fetch(i);
      pack<float, N> to_z, to_o;
      for (int c = 0; c < N; ++c) {
        const float gate = g[c] * s[c];
        const float of_w = d[c] * x[c];
        if constexpr (N > 1) {
          dw[c] += of_w * gate;
        } else {
          mine[i] += of_w * gate;
        }
        to_z[c] = of_w * scale[c] * (s[c] * (1.0f + g[c] * (1.0f - s[c])));
        to_o[c] = r * (d[c] * scale[c] * gate - x[c] * dot);
      }
      store<T, N>(&dz(t, h, i), to_z);
      store<T, N>(&d_o(t, h, i), to_o);
    });
  });
  if constexpr (N > 1) {
    lanes::for_each_pack(D, [&](index_t i) {
      for (int c = 0; c < N; ++c) mine[i + c] = dw[c];
    });
  }
  __syncthreads();
  for (index_t i = threadIdx.x; i < D; i += blockDim.x) {
    float sum = 0;
    for (int k = 0; k < lanes::rows_per_block; ++k) sum += sums[k * D + i];
    partial[blockIdx.x * D + i] = sum;
  }
}

template <class X, class T>
void l2norm_forward(tensor_ref<const X, 3, device_memory> x, double eps, out_ref<T, 3> y,
                    tensor_ref<float, 2, device_memory> rstd, stream_ref s) {
  expects_l2norm_forward(x, y, rstd);
  const auto run = [&]<int N, int Lanes>() {
    launch("l2norm_forward", l2norm_forward_kernel<X, T, N, Lanes>,
           grid_of(row_lanes<N, Lanes>::blocks(x.extent(0), x.extent(1))), norm_threads, 0, s, x,
           static_cast<float>(eps), y, rstd);
  };
  with_row_lanes(x.extent(2), run, x, y);
}

template <class T>
void l2norm_backward(in_ref<T, 3> dy, in_ref<T, 3> y, in_ref<float, 2> rstd, out_ref<T, 3> dx, stream_ref s) {
  expects_l2norm_backward(dy, y, rstd, dx);
  const auto run = [&]<int N, int Lanes>() {
    launch("l2norm_backward", l2norm_backward_kernel<T, N, Lanes>,
           grid_of(row_lanes<N, Lanes>::blocks(y.extent(0), y.extent(1))), norm_threads, 0, s, dy, y, rstd, dx);
  };
  with_row_lanes(y.extent(2), run, dy, y, dx);
}

template <class T>
void gated_norm_forward(in_ref<T, 3> o, in_ref<T, 3> z, in_ref<float, 1> w, double eps, out_ref<T, 3> y,
                        tensor_ref<float, 2, device_memory> rstd, stream_ref s) {
  expects_gated_norm_forward(o, z, w, y, rstd);
  const auto run = [&]<int N, int Lanes>() {
    launch("gated_norm_forward", gated_norm_forward_kernel<T, N, Lanes>,
           grid_of(row_lanes<N, Lanes>::blocks(o.extent(0), o.extent(1))), norm_threads, 0, s, o, z, w.data(),
           static_cast<float>(eps), y, rstd);
  };
  with_row_lanes(o.extent(2), run, o, z, y);
}

/// Blocks of gated_norm_backward, each of which leaves one partial sum of dw: a function of the sizes alone.
inline index_t norm_sums(index_t tokens, index_t heads) {
  const index_t blocks = divide_up(tokens * heads, norm_threads / 32);
  return blocks < 1024 ? blocks : 1024;
}
inline memory_requirement norm_scratch(index_t tokens, index_t heads, index_t dim) {
  return {static_cast<std::size_t>(norm_sums(tokens, heads) * dim) * sizeof(float)};
}

template <class T>
void gated_norm_backward(in_ref<T, 3> dy, in_ref<T, 3> o, in_ref<T, 3> z, in_ref<float, 1> w, in_ref<float, 2> rstd,
                         out_ref<T, 3> d_o, other_ref<T, 3> dz, tensor_ref<float, 1, device_memory> dw,
                         workspace<device_memory>& ws, stream_ref s) {
  expects_gated_norm_backward(dy, o, z, w, rstd, d_o, dz, dw);
  if (d_o.size() == 0) return;
  const scoped_mark scope(ws);
  const index_t D = o.extent(2);
  const auto partial = ws.take<float>(norm_sums(o.extent(0), o.extent(1)), D);
  const auto run = [&]<int N, int Lanes>() {
    using lanes = row_lanes<N, Lanes>;
    const index_t blocks = std::min(lanes::blocks(o.extent(0), o.extent(1)), partial.extent(0));
    launch("gated_norm_backward", gated_norm_backward_kernel<T, N, Lanes>, grid_of(blocks), norm_threads,
           static_cast<std::size_t>(lanes::rows_per_block * D) * sizeof(float), s, dy, o, z, w.data(), rstd, d_o, dz,
           partial.data());
    add_partial_sums(partial.data(), blocks, make_tensor<device_memory>(dw.data(), 1, D), s);
  };
  with_row_lanes(D, run, dy, o, z, w, d_o, dz);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
