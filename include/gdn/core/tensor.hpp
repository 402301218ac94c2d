// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  tensor_ref: pointer, extents and strides; and how foreign views become one.

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string_view>
#include <type_traits>

#include <gdn/config.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {

/// A non-owning view of `Rank` axes. Strides count elements. Copying copies the view, never the elements; constness
/// of the elements is in `T`. The layout is the same under every compiler, so it may cross from `.cpp` to `.cu`.
template <class T, int Rank, memory_kind Memory = host_memory>
struct tensor_ref {
  static_assert(Rank >= 1);
  using element_type = T;
  using value_type = std::remove_const_t<T>;
  using memory_type = Memory;

  T* data_ = nullptr;
  index_t extent_[Rank] = {};
  index_t stride_[Rank] = {};

  static constexpr int rank() noexcept { return Rank; }
  GDN_HD constexpr T* data() const noexcept { return data_; }
  GDN_HD constexpr index_t extent(int axis) const noexcept { return extent_[axis]; }
  GDN_HD constexpr index_t stride(int axis) const noexcept { return stride_[axis]; }
  GDN_HD constexpr index_t size() const noexcept {
    index_t n = 1;
    for (int i = 0; i < Rank; ++i) n *= extent_[i];
    return n;
  }
  template <class... I>
    requires(sizeof...(I) == Rank)
  GDN_HD constexpr T& operator()(I... i) const noexcept {
    index_t at = 0;
    int axis = 0;
    ((at += static_cast<index_t>(i) * stride_[axis++]), ...);
    return data_[at];
  }
  /// A view of mutable elements is a view of const ones.
  // NOLINTNEXTLINE(google-explicit-constructor): as `T*` converts to `const T*`
  template <class U>
    requires(std::same_as<U, const T> && !std::is_const_v<T>)
  GDN_HD constexpr operator tensor_ref<U, Rank, Memory>() const noexcept {
    tensor_ref<U, Rank, Memory> r;
    r.data_ = data_;
    for (int i = 0; i < Rank; ++i) {
      r.extent_[i] = extent_[i];
      r.stride_[i] = stride_[i];
    }
    return r;
  }
};
static_assert(std::is_trivially_copyable_v<tensor_ref<float, 4, device_memory>>);
static_assert(std::is_standard_layout_v<tensor_ref<float, 4, device_memory>>);
static_assert(sizeof(tensor_ref<float, 4, device_memory>) == 8 + 2 * 4 * 8);

/// A row-major view of `extents` over `data`.
template <memory_kind Memory = host_memory, class T, class... N>
GDN_HD constexpr tensor_ref<T, static_cast<int>(sizeof...(N)), Memory> make_tensor(T* data, N... extents) noexcept {
  tensor_ref<T, static_cast<int>(sizeof...(N)), Memory> r;
  const index_t n[] = {static_cast<index_t>(extents)...};
  r.data_ = data;
  index_t stride = 1;
  for (int i = static_cast<int>(sizeof...(N)) - 1; i >= 0; --i) {
    r.extent_[i] = n[i];
    r.stride_[i] = stride;
    stride *= n[i];
  }
  return r;
}

/// True if the elements are row-major without gaps (an axis of extent 1 may have any stride).
template <class T, int R, class M>
constexpr bool is_contiguous(const tensor_ref<T, R, M>& t) noexcept {
  index_t stride = 1;
  for (int i = R - 1; i >= 0; --i) {
    if (t.extent(i) != 1 && t.stride(i) != stride && t.size() != 0) return false;
    stride *= t.extent(i);
  }
  return true;
}

/// [begin, begin + count) of the first axis.
template <class T, int R, class M>
GDN_HD constexpr tensor_ref<T, R, M> rows(tensor_ref<T, R, M> t, index_t begin, index_t count) noexcept {
  if (t.data_ != nullptr) t.data_ += begin * t.stride_[0];
  t.extent_[0] = count;
  return t;
}

/// [begin, begin + count) of the last axis.
template <class T, int R, class M>
GDN_HD constexpr tensor_ref<T, R, M> columns(tensor_ref<T, R, M> t, index_t begin, index_t count) noexcept {
  if (t.data_ != nullptr) t.data_ += begin * t.stride_[R - 1];
  t.extent_[R - 1] = count;
  return t;
}

/// [begin, begin + count) of any axis.
template <class T, int R, class M>
GDN_HD constexpr tensor_ref<T, R, M> slice(tensor_ref<T, R, M> t, int axis, index_t begin, index_t count) noexcept {
  if (t.data_ != nullptr) t.data_ += begin * t.stride_[axis];
  t.extent_[axis] = count;
  return t;
}

/// Splits the last axis, [.., H * D] -> [.., H, D]: columns of a projection become heads, nothing moves.
template <class T, int R, class M>
GDN_HD constexpr tensor_ref<T, R + 1, M> split_columns(const tensor_ref<T, R, M>& t, index_t heads,
                                                       index_t dim) noexcept {
  tensor_ref<T, R + 1, M> r;
  r.data_ = t.data_;
  for (int i = 0; i < R - 1; ++i) {
    r.extent_[i] = t.extent_[i];
    r.stride_[i] = t.stride_[i];
  }
  r.extent_[R - 1] = heads;
  r.stride_[R - 1] = dim * t.stride_[R - 1];
  r.extent_[R] = dim;
  r.stride_[R] = t.stride_[R - 1];
  return r;
}

/// A view of a contiguous tensor with other extents of the same product.
template <class T, int R, class M, class... N>
constexpr tensor_ref<T, static_cast<int>(sizeof...(N)), M> reshape(const tensor_ref<T, R, M>& t, N... extents) {
  expects<shape_error>(is_contiguous(t), "reshape needs a contiguous tensor");
  auto r = make_tensor<M>(t.data(), extents...);
  expects<shape_error>(r.size() == t.size(), "reshape keeps the number of elements:", t.size(), "became", r.size());
  return r;
}

/// What a view must offer to be read as a tensor_ref.
template <class V>
concept tensor_view = std::copyable<V> && requires(const V& v, int axis) {
  typename V::element_type;
  requires memory_kind<typename V::memory_type>;
  typename std::integral_constant<int, static_cast<int>(V::rank())>;  // known when compiling
  { v.data() } -> std::same_as<typename V::element_type*>;
  { v.extent(axis) } -> std::convertible_to<index_t>;
  { v.stride(axis) } -> std::convertible_to<index_t>;
};
template <class V>
concept mutable_tensor_view = tensor_view<V> && !std::is_const_v<typename V::element_type>;

/// Opt-in for types that cannot be edited (Kokkos::View, DLTensor, at::Tensor): specialise with a static
/// `ref(const V&)` that returns a tensor_view.
template <class V>
struct tensor_traits;

/// Anything that the public entry points take: a tensor_view, or a type with tensor_traits.
template <class V>
concept tensor_like = tensor_view<std::remove_cvref_t<V>> || requires(const std::remove_cvref_t<V>& v) {
  { tensor_traits<std::remove_cvref_t<V>>::ref(v) } -> tensor_view;
};

/// The tensor_ref of any tensor_like value: the boundary where foreign view types end.
template <tensor_like V>
constexpr auto canonical(const V& v) {
  if constexpr (tensor_view<V>) {
    constexpr int rank = static_cast<int>(V::rank());
    tensor_ref<typename V::element_type, rank, typename V::memory_type> r;
    r.data_ = v.data();
    for (int i = 0; i < rank; ++i) {
      r.extent_[i] = static_cast<index_t>(v.extent(i));
      r.stride_[i] = static_cast<index_t>(v.stride(i));
    }
    return r;
  } else {
    return canonical(tensor_traits<V>::ref(v));
  }
}

/// canonical(v) as a tensor of exactly this element type, rank and memory; a mismatch is named at compile time.
template <class T, int Rank, memory_kind Memory, tensor_like V>
constexpr tensor_ref<T, Rank, Memory> as_tensor(const V& v) {
  const auto r = canonical(v);
  using found = std::remove_cv_t<decltype(r)>;
  static_assert(found::rank() == Rank, "the tensor has another number of axes");
  static_assert(std::same_as<typename found::memory_type, Memory>, "the tensor lives in another memory");
  static_assert(std::same_as<typename found::value_type, std::remove_const_t<T>>, "the tensor has another type");
  static_assert(std::is_const_v<T> || !std::is_const_v<typename found::element_type>,
                "a tensor that is written must have mutable elements");
  return r;
}

/// Checks the extents of a tensor that came from outside; the message names it and the axis.
template <class T, int R, class M>
void expects_shape(const tensor_ref<T, R, M>& t, std::string_view name,
                   const std::type_identity_t<std::array<index_t, static_cast<std::size_t>(R)>>& want,
                   std::source_location where = std::source_location::current()) {
  for (int i = 0; i < R; ++i) {
    if (t.extent(i) != want[static_cast<std::size_t>(i)]) {
      throw shape_error(say(name, "axis", i, "must be", want[static_cast<std::size_t>(i)], "is", t.extent(i)), where);
    }
  }
  if (t.size() != 0 && t.data() == nullptr) throw shape_error(say(name, "has no data"), where);
}

static_assert(tensor_view<tensor_ref<const float, 2, host_memory>> && mutable_tensor_view<tensor_ref<float, 2>>);

}  // namespace v0
}  // namespace gdn
