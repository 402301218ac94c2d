// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Matrix products of activations and weights through cuBLASLt.

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string_view>
#include <type_traits>

#include <cublasLt.h>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// @throws backend_error with cuBLAS's name of the error
inline void check(cublasStatus_t status, std::string_view call,
                  std::source_location where = std::source_location::current()) {
  if (status == CUBLAS_STATUS_SUCCESS) [[likely]] return;
  throw backend_error(say(call, "failed:", cublasLtGetStatusName(status)), where);
}

/// Owns a cuBLASLt handle; threads may share it.
class blas_handle {
 public:
  blas_handle() { check(cublasLtCreate(&handle_), "cublasLtCreate"); }
  blas_handle(const blas_handle&) = delete;
  blas_handle& operator=(const blas_handle&) = delete;
  ~blas_handle() { static_cast<void>(cublasLtDestroy(handle_)); }
  cublasLtHandle_t get() const noexcept { return handle_; }

 private:
  cublasLtHandle_t handle_ = nullptr;
};

/// How float products are computed: IEEE unless the caller asks for TF32.
enum class float_products : unsigned char { ieee, tf32 };

namespace detail {

template <class T>
constexpr cudaDataType_t blas_type() {
  if constexpr (std::is_same_v<T, float>) return CUDA_R_32F;
  if constexpr (std::is_same_v<T, bfloat16>) return CUDA_R_16BF;
  if constexpr (std::is_same_v<T, float16>) return CUDA_R_16F;
}

/// What cuBLASLt may use for products that it splits; recommended for Hopper.
inline constexpr std::size_t blas_workspace = std::size_t{32} << 20;

/// A column-major matrix as cuBLASLt sees it. A row-major [r, c] matrix is a column-major [c, r] one.
struct blas_matrix {
  const void* data;
  cudaDataType_t type;
  index_t rows, columns, stride;
  bool transpose;
};

template <class Descriptor, cublasStatus_t (*Destroy)(Descriptor)>
struct blas_object {
  Descriptor get = nullptr;
  blas_object() = default;
  blas_object(const blas_object&) = delete;
  blas_object& operator=(const blas_object&) = delete;
  ~blas_object() {
    if (get != nullptr) static_cast<void>(Destroy(get));
  }
};
using blas_layout = blas_object<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

/// C = op(A) op(B) + beta C in column-major terms, with sums in float and an order that is the same on every run.
inline void multiply(cublasLtHandle_t handle, float_products how, const blas_matrix& a, const blas_matrix& b, void* c,
                     cudaDataType_t c_type, index_t c_rows, index_t c_columns, index_t c_stride, float beta,
                     workspace<device_memory>& ws, stream_ref s) {
  const scoped_mark scope(ws);
  const auto memory = ws.take<std::byte>(static_cast<index_t>(blas_workspace));
  blas_object<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
  blas_object<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference;
  blas_layout la, lb, lc;
  const bool tf32 = how == float_products::tf32 && a.type == CUDA_R_32F;
  check(cublasLtMatmulDescCreate(&product.get, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, bool transpose) {
    const cublasOperation_t op = transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
    check(cublasLtMatmulDescSetAttribute(product.get, attribute, &op, sizeof op), "cublasLtMatmulDescSetAttribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, a.transpose);
  set(CUBLASLT_MATMUL_DESC_TRANSB, b.transpose);
  const auto describe = [](blas_layout& layout, cudaDataType_t type, index_t rows, index_t columns, index_t stride) {
    check(cublasLtMatrixLayoutCreate(&layout.get, type, static_cast<std::uint64_t>(rows),
                                     static_cast<std::uint64_t>(columns), stride),
          "cublasLtMatrixLayoutCreate");
  };
  describe(la, a.type, a.rows, a.columns, a.stride);
  describe(lb, b.type, b.rows, b.columns, b.stride);
  describe(lc, c_type, c_rows, c_columns, c_stride);

  check(cublasLtMatmulPreferenceCreate(&preference.get), "cublasLtMatmulPreferenceCreate");
  const std::size_t bytes = blas_workspace;
  // Split products are summed from the workspace in a fixed order, never in place by atomics.
  const std::uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  check(cublasLtMatmulPreferenceSetAttribute(preference.get, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                             sizeof bytes),
        "cublasLtMatmulPreferenceSetAttribute");
  check(cublasLtMatmulPreferenceSetAttribute(preference.get, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                             sizeof reductions),
        "cublasLtMatmulPreferenceSetAttribute");
  const auto align = [&](cublasLtMatmulPreferenceAttributes_t attribute, const void* p) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    const auto multiple = static_cast<std::uint32_t>(address & (~address + 1) & 255u);  // its lowest bit, if below 256
    const std::uint32_t alignment = multiple == 0 ? 256u : multiple;
    check(cublasLtMatmulPreferenceSetAttribute(preference.get, attribute, &alignment, sizeof alignment),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a.data);
  align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b.data);
  align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c);
  align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c);
  cublasLtMatmulHeuristicResult_t found{};
  int results = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle, product.get, la.get, lb.get, lc.get, lc.get, preference.get, 1, &found,
                                       &results),
        "cublasLtMatmulAlgoGetHeuristic");
  expects<backend_error>(results == 1, "cuBLASLt has no algorithm for a product of", c_rows, "x", c_columns);
  const float one = 1.0f;
  check(cublasLtMatmul(handle, product.get, &one, a.data, la.get, b.data, lb.get, &beta, c, lc.get, c, lc.get,
                       &found.algo, memory.data(), bytes, s.get()),
        "cublasLtMatmul");
}

/// y [L, out] = x [L, in] w [out, in]^T.
template <class T>
void linear_forward(cublasLtHandle_t handle, float_products how, in_ref<T, 2> x, in_ref<T, 2> w, out_ref<T, 2> y,
                    workspace<device_memory>& ws, stream_ref s) {
  expects_linear_forward(x, w, y);
  if (y.size() == 0) return;
  multiply(handle, how, {w.data(), blas_type<T>(), w.extent(1), w.extent(0), w.stride(0), true},
           {x.data(), blas_type<T>(), x.extent(1), x.extent(0), x.stride(0), false}, y.data(), blas_type<T>(),
           y.extent(1), y.extent(0), y.stride(0), 0.0f, ws, s);
}

/// dx [L, in] = dy [L, out] w [out, in], or += if `add`.
template <class T>
void linear_backward_input(cublasLtHandle_t handle, float_products how, in_ref<T, 2> dy, in_ref<T, 2> w,
                           out_ref<T, 2> dx, bool add, workspace<device_memory>& ws, stream_ref s) {
  expects_linear_backward_input(dy, w, dx);
  if (dx.size() == 0) return;
  multiply(handle, how, {w.data(), blas_type<T>(), w.extent(1), w.extent(0), w.stride(0), false},
           {dy.data(), blas_type<T>(), dy.extent(1), dy.extent(0), dy.stride(0), false}, dx.data(), blas_type<T>(),
           dx.extent(1), dx.extent(0), dx.stride(0), add ? 1.0f : 0.0f, ws, s);
}

/// dw [out, in] += dy [L, out]^T x [L, in], in float.
template <class T>
void linear_backward_weight(cublasLtHandle_t handle, float_products how, in_ref<T, 2> dy, in_ref<T, 2> x,
                            tensor_ref<float, 2, device_memory> dw, workspace<device_memory>& ws, stream_ref s) {
  expects_linear_backward_weight(dy, x, dw);
  if (dw.size() == 0 || dy.extent(0) == 0) return;
  multiply(handle, how, {x.data(), blas_type<T>(), x.extent(1), x.extent(0), x.stride(0), false},
           {dy.data(), blas_type<T>(), dy.extent(1), dy.extent(0), dy.stride(0), true}, dw.data(), CUDA_R_32F,
           dw.extent(1), dw.extent(0), dw.stride(0), 1.0f, ws, s);
}

}  // namespace detail
}  // namespace cuda
}  // namespace v0
}  // namespace gdn
