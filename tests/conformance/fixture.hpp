// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every conformance suite over a backend shares.
///
/// A suite is instantiated with a Subject:
///   backend_type, value_type
///   make()                  a backend
///   stream()                a stream of it
///   array<U>(n)             n elements in the backend's memory; data(), upload(const U*), download(U*);
///                           poison(): every byte 0xff, NaN in every floating type
///   scratch()               a workspace in the backend's memory, large enough for the suite; one for each thread
///   for_each_variant(f)     f(backend, name) for backends that must give the same bits: other numbers of threads, ...
///   make_private()          a backend that a thread may use while others use theirs
///   head_size(n)            optional: the n-th of the sizes of heads that the backend computes; otherwise any n is one

#include <array>
#include <cstddef>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/concepts/backend.hpp>
#include <support/host_tensor.hpp>
#include <support/random.hpp>
#include <support/tolerance.hpp>

namespace gdn_test {

/// A host tensor's copy in the memory of a backend.
template <class Subject, class T, int R>
class placed {
 public:
  using memory = typename Subject::backend_type::memory_type;

  explicit placed(host_tensor<T, R> host) : host_(std::move(host)), array_(host_.elements().size()) {
    array_.upload(host_.elements().data());
  }
  gdn::tensor_ref<const T, R, memory> in() const { return host_.template over<memory>(array_.data()); }
  gdn::tensor_ref<T, R, memory> out() { return host_.template over<memory>(array_.data()); }
  host_tensor<T, R> fetch() const {
    host_tensor<T, R> t = host_;
    array_.download(t.elements().data());
    return t;
  }

 private:
  host_tensor<T, R> host_;
  typename Subject::template array<T> array_;
};

/// Bytes of results, to compare two runs.
class recorder {
 public:
  template <class Subject, class T, int R>
  void operator()(const placed<Subject, T, R>& p) {
    const host_tensor<T, R> t = p.fetch();
    const std::size_t old = bytes_.size(), more = t.elements().size() * sizeof(T);
    bytes_.resize(old + more);
    if (more > 0) std::memcpy(bytes_.data() + old, t.elements().data(), more);
  }
  bool operator==(const recorder&) const = default;
  bool empty() const { return bytes_.empty(); }

 private:
  std::vector<unsigned char> bytes_;
};

template <class Subject>
class backend_fixture : public testing::Test {
 public:
  using subject = Subject;
  using value_type = typename Subject::value_type;
  using sum_type = gdn::accumulate_t<value_type>;

  static auto& scratch() { return Subject::scratch(); }

  template <class U, int R>
  static placed<Subject, U, R> place(host_tensor<U, R> t) {
    return placed<Subject, U, R>(std::move(t));
  }
  template <class U>
  static placed<Subject, U, 1> place_table(const std::vector<U>& v) {
    host_tensor<U, 1> t({static_cast<index_t>(v.size())});
    std::copy(v.begin(), v.end(), t.elements().begin());
    return place(std::move(t));
  }

  /// K or V where a suite would use n.
  static index_t head_size(index_t n) {
    if constexpr (requires { Subject::head_size(n); }) {
      return Subject::head_size(n);
    } else {
      return n;
    }
  }

  /// run_all(backend) must record the same bytes on every variant of the backend, and again on each.
  template <class F>
  static void expect_same_on_variants(F&& run_all) {
    const recorder want = run_all(Subject::make());
    EXPECT_FALSE(want.empty());
    Subject::for_each_variant([&](const auto& be, const std::string& name) {
      EXPECT_TRUE(run_all(be) == want) << name;
      EXPECT_TRUE(run_all(be) == want) << name << ", second run";
    });
  }
  /// ... and while other threads do the same.
  template <class F>
  static void expect_same_in_threads(F&& run_all) {
    constexpr std::size_t threads = 4;
    const recorder want = run_all(Subject::make());
    std::array<bool, threads> same{};
    std::vector<std::thread> pool;
    for (std::size_t i = 0; i < threads; ++i) {
      pool.emplace_back([&, i] {
        const auto be = Subject::make_private();
        same[i] = true;
        for (int n = 0; n < 3; ++n) same[i] = same[i] && run_all(be) == want;
      });
    }
    for (std::thread& t : pool) t.join();
    for (std::size_t i = 0; i < threads; ++i) EXPECT_TRUE(same[i]) << "thread " << i;
  }

  /// The derivative of loss() by each element of `x`, which loss() reads.
  template <int R, class F>
  static host_tensor<double, R> differences(host_tensor<double, R>& x, F&& loss) {
    host_tensor<double, R> d = converted<double>(x);
    for (index_t n = 0; n < x.size(); ++n) {
      const double old = x.at(n);
      x.at(n) = old + difference_step;
      const double above = loss();
      x.at(n) = old - difference_step;
      const double below = loss();
      x.at(n) = old;
      d.at(n) = (above - below) / (2 * difference_step);
    }
    return d;
  }

  typename Subject::backend_type backend_ = Subject::make();
  typename Subject::backend_type::stream_type stream_ = Subject::stream();
};

/// sum of a b
template <class U, class V, int R>
double inner(const host_tensor<U, R>& a, const host_tensor<V, R>& b) {
  double sum = 0;
  for (index_t n = 0; n < a.size(); ++n) sum += real(a.at(n)) * real(b.at(n));
  return sum;
}

}  // namespace gdn_test
