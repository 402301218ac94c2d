// SPDX-License-Identifier: Apache-2.0
// What the small concepts accept and, more to the point, what they do not.
#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/communicator.hpp>
#include <gdn/core/stream.hpp>
#include <gdn/plan/fragment.hpp>

#include <gtest/gtest.h>

#include <memory>
#include <string>

namespace {

// ---- streams --------------------------------------------------------------------------------------------------------

struct queue {
  void* handle;
  bool operator==(const queue&) const = default;
};
struct no_default_queue : queue {
  explicit no_default_queue(void* h) : queue{h} {}
};
struct without_equality {
  void* handle;
};
struct counted {
  std::shared_ptr<int> handle;
  bool operator==(const counted&) const = default;
};
static_assert(gdn::stream_handle<queue> && gdn::stream_handle<void*> && gdn::stream_handle<no_default_queue>);
static_assert(!gdn::stream_handle<without_equality>);
static_assert(!gdn::stream_handle<counted>);  // not trivially copyable: cannot be passed to a kernel by value
static_assert(!gdn::stream_handle<std::string>);

// ---- communicators --------------------------------------------------------------------------------------------------

struct model {
  using memory_type = gdn::device_memory;
  using stream_type = queue;
  int rank() const noexcept;
  int size() const noexcept;
  gdn::comm_state state() const noexcept;
  void exchange(std::span<const gdn::send_op>, std::span<const gdn::recv_op>, queue);
  void abort() noexcept;
};
static_assert(gdn::communicator<model>);

struct abort_that_throws : model {
  void abort();
};
struct state_that_throws : model {
  gdn::comm_state state() const;
};
struct rank_of_other_type : model {
  unsigned rank() const noexcept;
};
struct size_of_mutable_object : model {
  int size() noexcept;
};
struct exchange_with_result : model {
  bool exchange(std::span<const gdn::send_op>, std::span<const gdn::recv_op>, queue);
};
struct exchange_on_no_stream : model {
  void exchange(std::span<const gdn::send_op>, std::span<const gdn::recv_op>);
};
struct state_as_bool : model {
  bool state() const noexcept;
};
struct stream_that_is_none : model {
  using stream_type = counted;
  void exchange(std::span<const gdn::send_op>, std::span<const gdn::recv_op>, counted);
};
struct memory_that_is_none : model {
  using memory_type = int;
};
static_assert(!gdn::communicator<abort_that_throws> && !gdn::communicator<state_that_throws>);
static_assert(!gdn::communicator<rank_of_other_type> && !gdn::communicator<size_of_mutable_object>);
static_assert(!gdn::communicator<exchange_with_result> && !gdn::communicator<exchange_on_no_stream>);
static_assert(!gdn::communicator<state_as_bool> && !gdn::communicator<stream_that_is_none>);
static_assert(!gdn::communicator<memory_that_is_none> && !gdn::communicator<int> && !gdn::communicator<model*>);

// ---- a backend and a communicator meet on the same memory and stream ------------------------------------------------

struct device_backend {
  using memory_type = gdn::device_memory;
  using stream_type = queue;
};
struct host_backend {
  using memory_type = gdn::host_memory;
  using stream_type = queue;
};
struct other_stream_backend {
  using memory_type = gdn::device_memory;
  using stream_type = gdn::host_stream;
};
static_assert(gdn::compatible<device_backend, model>);
static_assert(!gdn::compatible<host_backend, model> && !gdn::compatible<other_stream_backend, model>);
static_assert(!gdn::compatible<device_backend, abort_that_throws>);

// ---- layouts --------------------------------------------------------------------------------------------------------

struct user_layout {
  int world_size() const { return 1; }
  gdn::index_t size() const { return 3; }
  gdn::fragment_table fragments() const { return {{0, 3, 0, 0}}; }
  bool operator==(const user_layout&) const = default;
};
struct layout_without_equality {
  int world_size() const;
  gdn::index_t size() const;
  gdn::fragment_table fragments() const;
};
struct layout_of_int_size : user_layout {
  int size() const;
};
struct layout_of_a_span : user_layout {
  std::span<const gdn::fragment> fragments() const;
};
struct layout_without_default : user_layout {
  explicit layout_without_default(int);
};
static_assert(gdn::sequence_layout<user_layout>);
static_assert(!gdn::sequence_layout<layout_without_equality> && !gdn::sequence_layout<layout_of_int_size>);
static_assert(!gdn::sequence_layout<layout_of_a_span> && !gdn::sequence_layout<layout_without_default>);
static_assert(!gdn::sequence_layout<gdn::fragment_table>);

TEST(concepts, RejectWhatDoesNotModelThem) {
  SUCCEED() << "all of this file is checked when it is compiled";
}

}  // namespace
