// SPDX-License-Identifier: Apache-2.0
#include "run.hpp"

#include <gdn/core/error.hpp>

#include "run_typed.hpp"

namespace gdn_run {

run_result run_layer(const options& o, const bundle& b, const gdn::fragment_table& layout) {
#if defined(GDN_RUN_CUDA)
  if (o.backend == backend_kind::cuda) {
    switch (o.dtype) {
      case gdn::dtype::bf16: return run_cuda_bf16(o, b, layout);
      case gdn::dtype::f16: return run_cuda_f16(o, b, layout);
      default: return run_cuda_f32(o, b, layout);
    }
  }
#endif
  switch (o.dtype) {
    case gdn::dtype::f64: return run_kokkos_f64(o, b, layout);
    case gdn::dtype::bf16: return run_kokkos_bf16(o, b, layout);
    case gdn::dtype::f16: return run_kokkos_f16(o, b, layout);
    default: return run_kokkos_f32(o, b, layout);
  }
}

}  // namespace gdn_run
