// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ends a test program that hangs, since a thread that waits for ever cannot be ended alone.

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace gdn_test {

/// While it lives, the program may run for that long.
class deadline {
 public:
  explicit deadline(std::chrono::seconds limit = std::chrono::seconds(10))
      : watch_([this, limit] {
          std::unique_lock lock(mutex_);
          if (done_.wait_for(lock, limit, [this] { return over_; })) return;
          std::fprintf(stderr, "\nthe test hangs: it did not end within %lld s\n",
                       static_cast<long long>(limit.count()));
          std::_Exit(3);
        }) {}
  deadline(const deadline&) = delete;
  deadline& operator=(const deadline&) = delete;
  ~deadline() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    done_.notify_all();
    watch_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  bool over_ = false;
  std::thread watch_;
};

}  // namespace gdn_test
