// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Everything of the Kokkos backend.

#include <gdn/kokkos/backend.hpp>
#include <gdn/kokkos/view.hpp>
