// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The CUDA backend as the conformance suites want it.

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>

namespace gdn_test {

template <class T>
struct cuda_setup {
  using backend_type = gdn::cuda::backend;
  using value_type = T;

  static backend_type make() { return backend_type(); }
  /// One stream for each thread: a launch on any other would race, and show.
  static gdn::cuda::stream_ref stream() {
    thread_local gdn::cuda::stream s;
    return s;
  }
  static gdn::workspace<gdn::device_memory>& scratch() {
    thread_local gdn::cuda::device_block block({std::size_t{96} << 20});
    thread_local gdn::workspace<gdn::device_memory> ws = block.workspace();
    return ws;
  }

  template <class U>
  class array {
   public:
    explicit array(std::size_t n) : bytes_(n * sizeof(U)), block_({bytes_ + 256}) {}
    U* data() const { return static_cast<U*>(block_.data()); }
    void poison() {
      gdn::cuda::check(cudaMemsetAsync(block_.data(), 0xff, bytes_, stream().get()), "poison");
      gdn::cuda::check(cudaStreamSynchronize(stream().get()), "poison");
    }
    void upload(const U* from) {
      gdn::cuda::check(cudaMemcpyAsync(block_.data(), from, bytes_, cudaMemcpyHostToDevice, stream().get()), "upload");
      gdn::cuda::check(cudaStreamSynchronize(stream().get()), "upload");
    }
    void download(U* to) const {
      gdn::cuda::check(cudaMemcpyAsync(to, block_.data(), bytes_, cudaMemcpyDeviceToHost, stream().get()), "download");
      gdn::cuda::check(cudaStreamSynchronize(stream().get()), "download");
    }

   private:
    std::size_t bytes_;
    gdn::cuda::device_block block_;
  };

  /// Both sides of the tiles that keys and columns of values are filled up to.
  static gdn::index_t head_size(gdn::index_t n) {
    constexpr std::array<gdn::index_t, 7> sizes = {16, 128, 256, 144, 48, 64, 80};
    return sizes[static_cast<std::size_t>(n) % sizes.size()];
  }

  /// There is one kind of backend; the same bits on every run are what remains to be shown.
  template <class F>
  static void for_each_variant(F&& f) {
    f(make(), std::string("another backend"));
  }
  static backend_type make_private() { return make(); }
};

}  // namespace gdn_test
