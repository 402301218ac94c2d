// SPDX-License-Identifier: Apache-2.0
// serve() on the device: sequences in pieces equal sequences at once, and a call can be captured in a graph.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string_view>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <gdn/layer/serve.hpp>

#include <cuda/setup.cuh>
#include <support/host_tensor.hpp>
#include <support/random.hpp>

namespace gdn_test {
namespace {

using memory = gdn::device_memory;
using gdn::index_t;

constexpr gdn::layer_dims dims{.hidden = 64, .key_heads = 2, .value_heads = 4, .key_dim = 32, .value_dim = 48};

template <class F>
gdn::cuda::device_block block_for(F&& carve) {
  gdn::workspace<memory> measure;
  carve(measure);
  return gdn::cuda::device_block(measure.peak());
}

template <class U, int R>
void fill(const gdn::tensor_ref<U, R, memory>& t, random_source& random, double scale) {
  std::vector<U> host(static_cast<std::size_t>(t.size()));
  std::uniform_real_distribution<float> value(-1, 1);
  for (U& v : host) v = static_cast<U>(static_cast<float>(scale) * value(random.engine()));
  gdn::cuda::check(cudaMemcpy(t.data(), host.data(), host.size() * sizeof(U), cudaMemcpyHostToDevice), "fill");
}

template <class T, class S>
class served {
 public:
  explicit served(gdn::state_order order)
      : weights_(block_for([](auto& ws) { gdn::parameter_storage<T, memory>::carve(ws, dims); })),
        states_(block_for([](auto& ws) { gdn::carve_pool<T, S>(ws, dims, slots); })) {
    auto ws = weights_.workspace();
    const auto w = gdn::parameter_storage<T, memory>::carve(ws, dims);
    random_source random(1);
    w.for_each([&](std::string_view, const auto& t) { fill(t, random, 0.3); });
    layer_ = {dims, w};
    auto pool_ws = states_.workspace();
    pool_ = gdn::carve_pool<T, S>(pool_ws, dims, slots, order);
    fill(pool_.recurrent, random, std::nan(""));
    fill(pool_.conv, random, std::nan(""));
  }

  /// One call, captured and launched as a graph if `graph`.
  std::vector<float> operator()(const std::vector<gdn::sequence>& sequences, const std::vector<T>& x, bool graph) {
    const auto s = cuda_setup<T>::stream();
    const index_t tokens = static_cast<index_t>(x.size()) / dims.hidden;
    const auto plan = gdn::plan_serving(sequences, tokens, slots, dims);
    gdn::cuda::device_block tables(gdn::resident_requirement<memory>(plan));
    auto table_ws = tables.workspace();
    const auto batch = gdn::upload(be_, plan, table_ws, s);
    gdn::cuda::device_block scratch(gdn::serve_requirement<T>(be_, dims, batch));
    auto ws = scratch.workspace();
    typename cuda_setup<T>::template array<T> in(x.size()), out(x.size());
    in.upload(x.data());
    const auto rows = [&](auto* data) { return gdn::make_tensor<memory>(data, tokens, dims.hidden); };
    const auto call = [&] { gdn::serve(be_, layer_, pool_, batch, rows(in.data()), rows(out.data()), ws, s); };
    if (graph) {
      cudaGraph_t captured = nullptr;
      cudaGraphExec_t ready = nullptr;
      gdn::cuda::check(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal), "capture");
      call();
      gdn::cuda::check(cudaStreamEndCapture(s.get(), &captured), "capture");
      gdn::cuda::check(cudaGraphInstantiate(&ready, captured, 0), "instantiate");
      gdn::cuda::check(cudaGraphLaunch(ready, s.get()), "launch");
      be_.synchronize(s);
      cudaGraphExecDestroy(ready);
      cudaGraphDestroy(captured);
    } else {
      call();
    }
    std::vector<T> y(x.size());
    out.download(y.data());
    std::vector<float> values;
    for (const T& v : y) values.push_back(static_cast<float>(v));
    return values;
  }

  static constexpr index_t slots = 5;

 private:
  gdn::cuda::backend be_;
  gdn::cuda::device_block weights_, states_;
  gdn::gated_delta_net<T, memory> layer_;
  gdn::state_pool<T, S, memory> pool_;
};

/// Two sequences of 150 and 90 tokens: at once; in pieces between skipped rows of NaN; and the last ones by steps.
template <class T, class S>
void check(double limit) {
  for (const auto order : {gdn::state_order::value_last, gdn::state_order::key_last}) {
    const index_t a = 150, b = 90, more = 8;
    random_source random(2);
    std::uniform_real_distribution<float> value(-1, 1);
    std::vector<T> x(static_cast<std::size_t>((a + b) * dims.hidden));
    for (T& v : x) v = static_cast<T>(value(random.engine()));
    served<T, S> whole(order), pieces(order), graphs(order);
    const auto want = whole({{0, a, 3, true}, {a, b, 0, true}}, x, false);

    double worst = 0, largest = 0;
    const auto rows_of = [&](index_t begin, index_t count) {
      return std::vector<T>(x.begin() + begin * dims.hidden, x.begin() + (begin + count) * dims.hidden);
    };
    const auto compare = [&](const std::vector<float>& got, index_t row, index_t begin, index_t count) {
      for (index_t i = 0; i < count * dims.hidden; ++i) {
        const double w = want[static_cast<std::size_t>(begin * dims.hidden + i)];
        const double e = std::abs(got[static_cast<std::size_t>(row * dims.hidden + i)] - w);
        largest = std::max(largest, std::abs(w));
        worst = e <= worst ? worst : std::isfinite(e) ? e : INFINITY;
      }
    };
    const auto run = [&](const std::vector<gdn::sequence>& sequences, const std::vector<T>& rows) {
      const auto y = pieces(sequences, rows, false);
      EXPECT_EQ(graphs(sequences, rows, true), y);  // the same bits
      return y;
    };
    // b's first 30 rows, two of nobody, all but the last of a.
    std::vector<T> call = rows_of(a, 30);
    call.insert(call.end(), static_cast<std::size_t>(2 * dims.hidden), static_cast<T>(std::nanf("")));
    for (const T& v : rows_of(0, a - more)) call.push_back(v);
    auto y = run({{32, a - more, 3, true}, {0, 30, 0, true}, {30, 2, -1, false}}, call);
    compare(y, 32, 0, a - more);
    compare(y, 0, a, 30);
    for (index_t i = 0; i < 2 * dims.hidden; ++i) EXPECT_EQ(y[static_cast<std::size_t>(30 * dims.hidden + i)], 0);
    y = run({{0, b - more - 30, 0, false}}, rows_of(a + 30, b - more - 30));
    compare(y, 0, a + 30, b - more - 30);
    for (index_t t = 0; t < more; ++t) {  // steps, b before a
      call = rows_of(a + b - more + t, 1);
      for (const T& v : rows_of(a - more + t, 1)) call.push_back(v);
      y = run({{0, 1, 0, false}, {1, 1, 3, false}}, call);
      compare(y, 0, a + b - more + t, 1);
      compare(y, 1, a - more + t, 1);
    }
    EXPECT_LE(worst, limit * largest);
    std::printf("worst error %.1e of %.1e\n", worst, largest);
  }
}

TEST(cuda_serve, PiecesEqualTheWholeInFloat) {
  check<float, float>(1e-4);
}
TEST(cuda_serve, PiecesEqualTheWholeInBfloat16) {
  check<gdn::bfloat16, float>(3e-2);
}
TEST(cuda_serve, NarrowStatesAreClose) {
  check<gdn::bfloat16, gdn::bfloat16>(1e-1);
}

}  // namespace
}  // namespace gdn_test
