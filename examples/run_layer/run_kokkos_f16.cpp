// SPDX-License-Identifier: Apache-2.0
#include "run_kokkos.hpp"

namespace gdn_run {

run_result run_kokkos_f16(const options& o, const bundle& b, const gdn::fragment_table& layout) {
  return run_kokkos<gdn::float16>(o, b, layout);
}

}  // namespace gdn_run
