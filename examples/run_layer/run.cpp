// SPDX-License-Identifier: Apache-2.0
#include "run.hpp"

#include <gdn/core/error.hpp>

#include "run_typed.hpp"

namespace gdn_run {

run_result run_layer(const options& o, const bundle& b, const gdn::fragment_table& layout) {
  return o.dtype == gdn::dtype::f64 ? run_kokkos_f64(o, b, layout) : run_kokkos_f32(o, b, layout);
}

}  // namespace gdn_run
