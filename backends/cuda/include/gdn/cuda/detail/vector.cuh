// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A few neighbouring elements of any storage type, moved at once and computed in float.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <gdn/core/storage.hpp>
#include <gdn/core/tensor.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

template <class T, int N>
struct pack {
  T at[N];
  __device__ T& operator[](int i) { return at[i]; }
  __device__ const T& operator[](int i) const { return at[i]; }
};

/// N elements as stored, aligned for one access, of 16 bytes at most; wider packs take several. In words where they
/// fill some: as elements of 16 bits, each would take a register of its own.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) raw_pack {
  static constexpr bool in_words = sizeof(T) * N % 4 == 0;
  static constexpr int per_word = in_words ? static_cast<int>(4 / sizeof(T)) : 1;
  std::conditional_t<in_words, std::uint32_t, T> at[N / per_word];
};

/// From an address that is a multiple of their size or of 16 bytes.
template <class T, int N>
__device__ raw_pack<T, N> load_raw(const T* from) {
  return *reinterpret_cast<const raw_pack<T, N>*>(from);
}
template <class T, int N>
__device__ pack<float, N> widen(const raw_pack<T, N>& raw) {
  pack<float, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (!raw_pack<T, N>::in_words) {
      out[i] = static_cast<float>(raw.at[i]);
    } else if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(raw.at[i]);
    } else {
      T element;
      element.bits = static_cast<std::uint16_t>(raw.at[i / 2] >> (i % 2 * 16));
      out[i] = static_cast<float>(element);
    }
  }
  return out;
}
/// widen() by other instructions: for a second pass over packs of bfloat16, of which ptxas would otherwise keep the
/// floats of the first pass in twice as many registers.
template <class T, int N>
__device__ pack<float, N> widen_again(const raw_pack<T, N>& raw) {
  if constexpr (!std::is_same_v<T, bfloat16> || N % 2 != 0) {
    return widen(raw);
  } else {
    pack<float, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = __uint_as_float(__byte_perm(raw.at[i / 2], 0, i % 2 == 0 ? 0x1044 : 0x3244));
    return out;
  }
}
template <class T, int N>
__device__ pack<float, N> load(const T* from) {
  return widen(load_raw<T, N>(from));
}
/// Rounds N values and writes them to device memory, in one access as load_raw() reads them: left to itself, the
/// compiler splits such stores.
template <class T, int N>
__device__ void store(T* to, const pack<float, N>& v) {
  constexpr int words = static_cast<int>(sizeof(T)) * N / 4;
  if constexpr (words * 4 != static_cast<int>(sizeof(T)) * N || (words & (words - 1)) != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<T>(v[i]);
  } else {
    unsigned word[words];
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(v[i]);
      } else {
        word[i] = static_cast<unsigned>(T(v[2 * i]).bits) | static_cast<unsigned>(T(v[2 * i + 1]).bits) << 16;
      }
    }
    if constexpr (words == 1) *reinterpret_cast<unsigned*>(to) = word[0];
    if constexpr (words == 2) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word[0]), "r"(word[1])
                   : "memory");
    }
#pragma unroll
    for (int i = 0; i + 4 <= words; i += 4) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to) + 4 * i), "r"(word[i]),
                   "r"(word[i + 1]), "r"(word[i + 2]), "r"(word[i + 3])
                   : "memory");
    }
  }
}

/// True if packs of N elements may be moved: the address and the strides are multiples of a pack's alignment.
template <class T, int R, class M>
bool moves_in_packs(const tensor_ref<T, R, M>& t, index_t n) {
  const index_t bytes = std::min<index_t>(n * static_cast<index_t>(sizeof(T)), 16);
  bool good = reinterpret_cast<std::uintptr_t>(t.data()) % static_cast<std::uintptr_t>(bytes) == 0;
  for (int axis = 0; axis + 1 < R; ++axis) good = good && t.stride(axis) * static_cast<index_t>(sizeof(T)) % bytes == 0;
  return good && t.extent(R - 1) % n == 0 && (t.stride(R - 1) == 1 || t.extent(R - 1) <= 1);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
