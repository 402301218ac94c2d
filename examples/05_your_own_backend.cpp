// SPDX-License-Identifier: Apache-2.0
// A backend of your own: take one that exists and replace what yours does better. Here the matrix products are replaced
// by loops, which count what they do; a host project would call its library. A layer then runs on it unchanged.

#include <cstdio>
#include <memory>
#include <string_view>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/requirements.hpp>

#include "support.hpp"

namespace {

using gdn::index_t;
using T = double;

/// Every operation that it does not name is that of kokkos::backend. A member hides all overloads of its name, so one
/// template stands for all combinations of types that the operation has.
class counting_backend : public gdn::kokkos::backend<> {
 public:
  std::string_view name() const noexcept { return "counting"; }

  /// y [L, out] = x [L, in] w [out, in]^T. Each sum runs over `in` from its begin, whatever the other rows are: the
  /// same bits on every run, as gdn::linear_ops asks.
  template <class X, class W, class Y>
  void linear_forward(gdn::tensor_ref<X, 2> x, gdn::tensor_ref<W, 2> w, gdn::tensor_ref<Y, 2> y,
                      gdn::workspace<gdn::host_memory>&, gdn::host_stream) const {
    using A = gdn::accumulate_t<Y>;
    for (index_t t = 0; t < y.extent(0); ++t) {
      for (index_t o = 0; o < y.extent(1); ++o) {
        A sum = 0;
        for (index_t i = 0; i < x.extent(1); ++i) sum += static_cast<A>(x(t, i)) * static_cast<A>(w(o, i));
        y(t, o) = static_cast<Y>(sum);
      }
    }
    *products_ += y.size() * x.extent(1);
  }

  index_t products() const { return *products_; }

 private:
  std::shared_ptr<index_t> products_ = std::make_shared<index_t>(0);  // a backend is a value: copies count together
};

// The compiler names the operation that is missing, or that takes something else.
static_assert(gdn::linear_ops<counting_backend, T>);
static_assert(gdn::backend<counting_backend, T> && gdn::backend<counting_backend, float>);
static_assert(gdn::compatible<counting_backend, gdn::self_communicator>);

constexpr gdn::layer_dims dims{.hidden = 16, .key_heads = 2, .value_heads = 4, .key_dim = 8, .value_dim = 8};
constexpr index_t tokens = 50;

/// y of a layer, by any backend on the host.
template <class Backend>
  requires gdn::backend<Backend, T>
std::vector<T> run(const Backend& be, const gdn::gated_delta_net<T>& layer, const std::vector<T>& x) {
  const auto plan =
      gdn::plan_layer(dims, gdn::contiguous_layout{tokens, 1}, gdn::packing::rows_of(1, tokens), {}, 0);
  example::block plan_memory;
  const auto resident = example::allocate(plan_memory, [&](auto& ws) { return gdn::upload(be, plan, ws, {}); });
  const example::block scratch(gdn::requirements<T>(be, dims, resident, gdn::keep_policy::nothing).forward);
  auto ws = scratch.over();
  gdn::self_communicator self;
  std::vector<T> y(x.size());
  const auto rows = [](auto& v) { return gdn::make_tensor(v.data(), tokens, dims.hidden); };
  gdn::prefill(be, self, layer, resident, rows(x), rows(y), {}, ws, {});
  return y;
}

}  // namespace

int main() {
  const Kokkos::ScopeGuard kokkos;
  example::block weights;
  const auto layer = example::random_layer(dims, weights);
  const auto x = example::random_values(tokens * dims.hidden, 100);

  const counting_backend mine;
  const auto y = run(mine, layer, x);
  const auto want = run(gdn::kokkos::backend(), layer, x);

  // qkv, z, b and a, then the output projection.
  const index_t planned =
      tokens * dims.hidden * (dims.channels() + dims.values() + 2 * dims.value_heads + dims.values());
  std::printf("%.*s: %lld multiply-adds in matrix products\n", static_cast<int>(mine.name().size()), mine.name().data(),
              static_cast<long long>(mine.products()));
  return example::expect_at_most("outputs", example::difference(y, want), 1e-12) && mine.products() == planned ? 0 : 1;
}
