// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The only home of macros: what differs between a host compiler and nvcc.

#if defined(__CUDACC__)
#define GDN_HD __host__ __device__
#else
#define GDN_HD
#endif

namespace gdn {
/// The inline namespace changes with the library's binary interface, so two versions can meet in one process.
inline namespace v0 {}
}  // namespace gdn
