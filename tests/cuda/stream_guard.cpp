// SPDX-License-Identifier: Apache-2.0
#include <cuda/stream_guard.hpp>

#include <cstddef>
#include <mutex>

#include <dlfcn.h>

namespace gdn_test {
namespace {

std::mutex mutex;
bool armed = false;
cudaStream_t allowed = nullptr;
int kept = 0;
std::vector<std::string> broken;

void note_work(const char* call, cudaStream_t s) {
  const std::lock_guard lock(mutex);
  if (!armed) return;
  if (s == allowed) {
    ++kept;
  } else {
    broken.emplace_back(call);
  }
}
void note_forbidden(const char* call) {
  const std::lock_guard lock(mutex);
  if (armed) broken.emplace_back(call);
}

}  // namespace

stream_guard::stream_guard(cudaStream_t only) {
  const std::lock_guard lock(mutex);
  armed = true;
  allowed = only;
  kept = 0;
  broken.clear();
}
stream_guard::~stream_guard() {
  const std::lock_guard lock(mutex);
  armed = false;
}
std::vector<std::string> stream_guard::violations() const {
  const std::lock_guard lock(mutex);
  return broken;
}
int stream_guard::enqueued() const {
  const std::lock_guard lock(mutex);
  return kept;
}

namespace {

/// The function of that name behind this program's.
template <class F>
F* real(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace
}  // namespace gdn_test

// NOLINTBEGIN: names and types are those of CUDA
using namespace gdn_test;

#define GDN_TEST_WORK(name, stream, parameters, arguments)                   \
  extern "C" cudaError_t CUDARTAPI name parameters {                         \
    static auto* const f = real<cudaError_t CUDARTAPI parameters>(#name);    \
    note_work(#name, stream);                                                \
    return f arguments;                                                      \
  }
#define GDN_TEST_FORBIDDEN(name, parameters, arguments)                      \
  extern "C" cudaError_t CUDARTAPI name parameters {                         \
    static auto* const f = real<cudaError_t CUDARTAPI parameters>(#name);    \
    note_forbidden(#name);                                                   \
    return f arguments;                                                      \
  }

GDN_TEST_WORK(cudaLaunchKernelExC, config->stream, (const cudaLaunchConfig_t* config, const void* f_, void** args),
              (config, f_, args))
GDN_TEST_WORK(cudaLaunchKernel, s, (const void* f_, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t s),
              (f_, grid, block, args, shared, s))
// What <<<>>> calls since CUDA 13.
GDN_TEST_WORK(__cudaLaunchKernel, s,
              (const void* f_, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t s),
              (f_, grid, block, args, shared, s))
GDN_TEST_WORK(cudaMemcpyAsync, s, (void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t s),
              (to, from, n, kind, s))
GDN_TEST_WORK(cudaMemsetAsync, s, (void* to, int byte, size_t n, cudaStream_t s), (to, byte, n, s))
GDN_TEST_FORBIDDEN(cudaMemcpy, (void* to, const void* from, size_t n, cudaMemcpyKind kind), (to, from, n, kind))
GDN_TEST_FORBIDDEN(cudaMemset, (void* to, int byte, size_t n), (to, byte, n))
GDN_TEST_FORBIDDEN(cudaMalloc, (void** p, size_t n), (p, n))
GDN_TEST_FORBIDDEN(cudaMallocAsync, (void** p, size_t n, cudaStream_t s), (p, n, s))
GDN_TEST_FORBIDDEN(cudaMallocManaged, (void** p, size_t n, unsigned flags), (p, n, flags))
GDN_TEST_FORBIDDEN(cudaHostAlloc, (void** p, size_t n, unsigned flags), (p, n, flags))
GDN_TEST_FORBIDDEN(cudaFree, (void* p), (p))
GDN_TEST_FORBIDDEN(cudaStreamCreateWithFlags, (cudaStream_t* s, unsigned flags), (s, flags))
GDN_TEST_FORBIDDEN(cudaStreamSynchronize, (cudaStream_t s), (s))
GDN_TEST_FORBIDDEN(cudaEventSynchronize, (cudaEvent_t e), (e))
GDN_TEST_FORBIDDEN(cudaDeviceSynchronize, (), ())
// NOLINTEND
