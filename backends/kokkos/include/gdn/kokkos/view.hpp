// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Kokkos Views as tensors.

#include <type_traits>

#include <Kokkos_Core.hpp>

#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos {

/// Where a view's elements lie: shared and pinned spaces count as host memory.
template <class View>
using view_memory =
    std::conditional_t<Kokkos::SpaceAccessibility<Kokkos::HostSpace, typename View::memory_space>::accessible,
                       host_memory, device_memory>;

template <class V>
concept view = Kokkos::is_view_v<V> && V::rank()
>= 1;

}  // namespace kokkos

/// Any layout: strides are taken over as they are. The view must outlive the tensor_ref, which owns nothing.
template <kokkos::view View>
struct tensor_traits<View> {
  static auto ref(const View& v) {
    tensor_ref<typename View::value_type, static_cast<int>(View::rank()), kokkos::view_memory<View>> t;
    t.data_ = v.data();
    for (int i = 0; i < t.rank(); ++i) {
      t.extent_[i] = static_cast<index_t>(v.extent(static_cast<unsigned>(i)));
      t.stride_[i] = static_cast<index_t>(v.stride(static_cast<unsigned>(i)));
    }
    return t;
  }
};

static_assert(tensor_like<Kokkos::View<const float**, Kokkos::LayoutStride, Kokkos::HostSpace>>);

}  // namespace v0
}  // namespace gdn
