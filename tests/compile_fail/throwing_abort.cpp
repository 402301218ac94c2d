// SPDX-License-Identifier: Apache-2.0
// expect: abort.*noexcept
// The compiler's note names the requirement that is missing.
#include <gdn/concepts/communicator.hpp>

struct my_communicator {
  using memory_type = gdn::host_memory;
  using stream_type = gdn::host_stream;
  int rank() const noexcept;
  int size() const noexcept;
  gdn::comm_state state() const noexcept;
  void exchange(std::span<const gdn::send_op>, std::span<const gdn::recv_op>, gdn::host_stream);
#ifdef GDN_CONTROL
  void abort() noexcept;
#else
  void abort();
#endif
};

void use(gdn::communicator auto& comm) {
  comm.abort();
}
void f(my_communicator& comm) {
  use(comm);
}
