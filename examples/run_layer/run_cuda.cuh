// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  gdn-run's ranks on GPUs.

#include <cstddef>
#include <span>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>

#include "device_ranks.hpp"
#include "run_typed.hpp"

namespace gdn_run {

class cuda_platform {
 public:
  using memory = gdn::device_memory;
  using communicator = device_communicator;

  explicit cuda_platform(const options& o) : options_(o) { choose_device(o); }

  template <class F>
  void run_ranks(F&& f) const {
    run_device_ranks(options_, f);
  }
  /// Whether all ranks of this process are on one GPU.
  bool one_memory() const { return options_.processes || options_.comm == comm_kind::local || options_.ranks == 1; }

  gdn::cuda::stream make_stream() const { return {}; }
  gdn::cuda::backend make_backend(int) const {
    return gdn::cuda::backend(options_.products == product_kind::tf32 ? gdn::cuda::float_products::tf32
                                                                      : gdn::cuda::float_products::ieee);
  }
  gdn::cuda::device_block block(gdn::memory_requirement need, std::byte fill) const {
    gdn::cuda::device_block out(need);
    if (out.bytes() > 0) {
      gdn::cuda::check(cudaMemset(out.data(), static_cast<int>(fill), out.bytes()), "cudaMemset");
      gdn::cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
    return out;
  }
  template <class E, int R>
  void put(std::span<const E> from, const gdn::tensor_ref<E, R, memory>& to, gdn::cuda::stream_ref s) const {
    gdn::cuda::copy_to_device(from, to, s);
  }
  template <class E, int R>
  std::vector<E> get(const gdn::tensor_ref<E, R, memory>& from, gdn::cuda::stream_ref s) const {
    return gdn::cuda::copy_to_host(from, s);
  }

 private:
  const options& options_;
};

template <class T>
run_result run_cuda(const options& o, const bundle& b, const gdn::fragment_table& layout) {
  const cuda_platform platform(o);
  return layer_run<T, cuda_platform>(o, b, layout, platform).run();
}

}  // namespace gdn_run
