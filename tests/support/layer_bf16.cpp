// SPDX-License-Identifier: Apache-2.0
#include <support/layer_api_kokkos.hpp>

template class gdn_test::layer_api<gdn::bfloat16>;
