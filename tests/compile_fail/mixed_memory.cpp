// SPDX-License-Identifier: Apache-2.0
// expect: compatible
// A backend on the host and a communicator of device memory.
#include <gdn/concepts/backend.hpp>

struct host_backend {
  using memory_type = gdn::host_memory;
  using stream_type = gdn::host_stream;
};
struct my_communicator {
#ifdef GDN_CONTROL
  using memory_type = gdn::host_memory;
#else
  using memory_type = gdn::device_memory;
#endif
  using stream_type = gdn::host_stream;
  int rank() const noexcept;
  int size() const noexcept;
  gdn::comm_state state() const noexcept;
  void exchange(std::span<const gdn::send_op>, std::span<const gdn::recv_op>, gdn::host_stream);
  void abort() noexcept;
};

template <class Backend, class Comm>
requires gdn::compatible<Backend, Comm>
void use(const Backend&, Comm&) {}
void f(const host_backend& be, my_communicator& comm) {
  use(be, comm);
}
