#!/usr/bin/env bash
# Uses gdn without a build system: include paths, and Kokkos as any program links it.
#
#   CXX=... GDN=<source tree> KOKKOS_INCLUDE=... KOKKOS_LIB=... EIGEN_INCLUDE=... build.sh OUTPUT_FOLDER
set -euo pipefail
mkdir -p "$1"

"$CXX" -std=c++20 -O2 -fopenmp \
  -I "$GDN/include" -I "$GDN/backends/kokkos/include" -isystem "$KOKKOS_INCLUDE" -isystem "$EIGEN_INCLUDE" \
  "$(dirname "$0")/../main.cpp" -L "$KOKKOS_LIB" -lkokkoscore -ldl -o "$1/consumer"

"$1/consumer"
