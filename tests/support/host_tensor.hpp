// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Tensors that own their elements, for references and as the host's copy of what a backend works on.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/core/tensor.hpp>
#include <support/random.hpp>

namespace gdn_test {

/// Floating-point numbers and the 16-bit types that only store them.
template <class T>
concept real_number = !std::is_integral_v<T> && requires(T v) {
  static_cast<double>(v);
};

template <class T>
double real(T v) {
  return static_cast<double>(v);
}

/// Row-major, with `padding` unused elements after each step of the first axis. Padding holds NaN, so that reading it
/// shows in a result, and must be found unchanged after a call.
template <class T, int R>
class host_tensor {
 public:
  host_tensor() = default;
  explicit host_tensor(const std::array<index_t, R>& extents, index_t padding = 0) : padding_(padding) {
    index_t stride = 1;
    for (int i = R - 1; i >= 0; --i) {
      shape_.extent_[i] = extents[static_cast<std::size_t>(i)];
      shape_.stride_[i] = i == 0 && R > 1 ? stride + padding : stride;
      stride *= shape_.extent_[i];
    }
    elements_.assign(static_cast<std::size_t>(R > 1 ? extents[0] * shape_.stride_[0] : extents[0]), unused());
    for_each([&](T& v) { v = T{}; });
  }

  index_t extent(int axis) const { return shape_.extent(axis); }
  index_t size() const { return shape_.size(); }
  std::vector<T>& elements() { return elements_; }
  const std::vector<T>& elements() const { return elements_; }

  gdn::tensor_ref<T, R> ref() { return over(elements_.data()); }
  gdn::tensor_ref<const T, R> ref() const { return over(elements_.data()); }
  /// The same extents and strides over other memory.
  template <gdn::memory_kind Memory = gdn::host_memory, class P>
  gdn::tensor_ref<P, R, Memory> over(P* data) const {
    gdn::tensor_ref<P, R, Memory> t;
    t.data_ = data;
    for (int i = 0; i < R; ++i) {
      t.extent_[i] = shape_.extent_[i];
      t.stride_[i] = shape_.stride_[i];
    }
    return t;
  }

  template <class... I>
  T& operator()(I... i) {
    return ref()(i...);
  }
  template <class... I>
  const T& operator()(I... i) const {
    return ref()(i...);
  }
  /// Element `n` in row-major order, whatever the padding.
  T& at(index_t n) {
    if (padding_ == 0) return elements_[static_cast<std::size_t>(n)];
    const index_t row = shape_.size() / shape_.extent(0);
    return elements_[static_cast<std::size_t>(n / row * shape_.stride(0) + n % row)];
  }
  const T& at(index_t n) const { return const_cast<host_tensor&>(*this).at(n); }

  template <class F>
  void for_each(F&& f) {
    for (index_t n = 0; n < size(); ++n) f(at(n));
  }
  bool padding_is_unused() const {
    if (padding_ == 0) return true;
    const index_t row = shape_.stride(0) - padding_;
    for (index_t i = 0; i < shape_.extent(0); ++i) {
      for (index_t j = row; j < shape_.stride(0); ++j) {
        const T& v = elements_[static_cast<std::size_t>(i * shape_.stride(0) + j)];
        if constexpr (real_number<T>) {
          if (!std::isnan(real(v))) return false;
        } else if (!(v == unused())) {
          return false;
        }
      }
    }
    return true;
  }

 private:
  static T unused() {
    if constexpr (real_number<T>) {
      return static_cast<T>(std::numeric_limits<double>::quiet_NaN());
    } else if constexpr (std::is_arithmetic_v<T>) {
      return T(77);
    } else {
      return T{};
    }
  }

  gdn::tensor_ref<T, R> shape_;
  index_t padding_ = 0;
  std::vector<T> elements_;
};

/// Values in [-scale, scale), already rounded to T.
template <class T, int R>
host_tensor<T, R> random_tensor(random_source& random, const std::array<index_t, R>& extents, index_t padding = 0,
                                double scale = 1) {
  host_tensor<T, R> t(extents, padding);
  std::uniform_real_distribution<double> value(-scale, scale);
  t.for_each([&](T& v) { v = static_cast<T>(value(random.engine())); });
  return t;
}

template <class U, class T, int R>
host_tensor<U, R> converted(const host_tensor<T, R>& t) {
  std::array<index_t, R> extents;
  for (int i = 0; i < R; ++i) extents[static_cast<std::size_t>(i)] = t.extent(i);
  host_tensor<U, R> out(extents);
  for (index_t n = 0; n < t.size(); ++n) out.at(n) = static_cast<U>(real(t.at(n)));
  return out;
}

/// The largest error must be at most `tolerance` times the largest reference value. NaN is an error.
template <class T, int R>
testing::AssertionResult close(const host_tensor<T, R>& got, const host_tensor<double, R>& want, double tolerance) {
  double largest = 1e-30, worst = 0;
  index_t where = -1;
  for (index_t n = 0; n < want.size(); ++n) largest = std::max(largest, std::abs(want.at(n)));
  for (index_t n = 0; n < want.size(); ++n) {
    const double error = std::abs(real(got.at(n)) - want.at(n)) / largest;
    if (!(error <= worst)) {
      worst = error;
      where = n;
      if (error != error) break;
    }
  }
  if (!got.padding_is_unused()) return testing::AssertionFailure() << "elements between rows were written";
  if (worst <= tolerance) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "element " << where << " is " << real(got.at(where)) << ", not "
                                     << want.at(where) << "; relative error " << worst << ", allowed " << tolerance;
}

/// Equal values, or NaN in both.
template <class T, int R>
testing::AssertionResult same_bits(const host_tensor<T, R>& a, const host_tensor<T, R>& b) {
  for (index_t n = 0; n < a.size(); ++n) {
    const double x = real(a.at(n)), y = real(b.at(n));
    if (x != y && !(std::isnan(x) && std::isnan(y))) {
      return testing::AssertionFailure() << "element " << n << " is " << x << " and " << y;
    }
  }
  return testing::AssertionSuccess();
}

}  // namespace gdn_test
