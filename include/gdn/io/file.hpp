// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Files: read as one block of memory, written whole or not at all. (POSIX)

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {
/// Text that came from a file, in quotes, on one line and at most about 100 characters long.
inline std::string in_quotes(std::string_view text) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text) {
    if (out.size() > 96) {
      out += "...";
      break;
    }
    const auto u = static_cast<unsigned char>(c);
    if (u < 0x20 || u >= 0x7f || c == '\\') {
      out += "\\x";
      out += digits[u >> 4];
      out += digits[u & 15];
    } else {
      out += c;
    }
  }
  return out += "'";
}

inline std::string system_text(int error) {
  return std::generic_category().message(error);
}

/// A file descriptor that is closed.
class descriptor {
 public:
  descriptor() = default;
  explicit descriptor(int fd) noexcept : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const noexcept { return fd_; }
  /// 0, or the error that closing reports (a full disk may do so only now).
  int close() noexcept { return fd_ >= 0 && ::close(std::exchange(fd_, -1)) != 0 ? errno : 0; }

 private:
  int fd_ = -1;
};
}  // namespace detail

/// A file mapped for reading. Copies nothing; the pages come in as they are touched. The file must not be truncated
/// while it is mapped.
class mapped_file {
 public:
  mapped_file() = default;
  /// @throws metadata_error naming the file: it must exist, be readable, and be a regular file
  explicit mapped_file(const std::string& path) : path_(path) {
    // A pipe without O_NONBLOCK would wait for a writer before it could be refused.
    const detail::descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (file.get() < 0) throw metadata_error(path + ": cannot be opened: " + detail::system_text(errno));
    struct stat info = {};
    if (::fstat(file.get(), &info) != 0) {
      throw metadata_error(path + ": cannot be examined: " + detail::system_text(errno));
    }
    if (!S_ISREG(info.st_mode)) {
      throw metadata_error(path + (S_ISDIR(info.st_mode) ? ": is a directory; a file is needed"
                                                         : ": is no regular file, which is needed"));
    }
    size_ = static_cast<std::size_t>(info.st_size);
    if (size_ == 0) return;  // nothing can be mapped
    void* at = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (at == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr): the system's macro
      throw metadata_error(path + ": cannot be mapped: " + detail::system_text(errno));
    }
    data_ = static_cast<const std::byte*>(at);
  }
  mapped_file(mapped_file&& other) noexcept
      : path_(std::move(other.path_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  mapped_file& operator=(mapped_file&& other) noexcept {
    path_.swap(other.path_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~mapped_file() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// A file that others see whole or not at all: bytes go to a temporary beside it, which `commit()` renames. Without
/// commit() nothing is left. A device or pipe (/dev/null, /dev/stdout) is written to directly.
class replacement_file {
 public:
  /// @throws metadata_error naming the file, if it could not be written
  explicit replacement_file(const std::string& path) : path_(path) {
    namespace fs = std::filesystem;
    std::error_code ignored;
    const fs::file_status status = fs::status(path, ignored);
    if (path.empty() || fs::is_directory(status)) throw fail("is no file", 0);
    // Standard output may be a file that others write to, too: it keeps its place there.
    if (const int standard = path == "/dev/stdout" ? 1 : path == "/dev/stderr" ? 2 : -1; standard > 0) {
      file_ = detail::descriptor(::fcntl(standard, F_DUPFD_CLOEXEC, 0));
      if (file_.get() < 0) throw fail("cannot be opened", errno);
      return;
    }
    if (fs::exists(status) && !fs::is_regular_file(status)) {
      file_ = detail::descriptor(::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK));
      if (file_.get() < 0) throw fail("cannot be opened", errno);
      ::fcntl(file_.get(), F_SETFL, 0);  // only the opening must not wait
      return;
    }
    // A link stays a link: what it points to is replaced.
    fs::path target = fs::exists(status) ? fs::canonical(path, ignored) : fs::path(path);
    if (target.empty()) target = path;
    target_ = target.string();
    static std::atomic<unsigned> counter{0};
    do {
      const std::string name = ".gdn-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp";
      temporary_ = (target.parent_path() / name).string();
      file_ = detail::descriptor(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    } while (file_.get() < 0 && errno == EEXIST);
    if (file_.get() < 0) {
      const int error = errno;
      temporary_.clear();
      throw fail("cannot be created", error);
    }
  }
  replacement_file(replacement_file&& other) noexcept
      : path_(std::move(other.path_)),
        target_(std::move(other.target_)),
        temporary_(std::exchange(other.temporary_, {})),
        file_(std::move(other.file_)) {}
  replacement_file& operator=(replacement_file&&) = delete;
  ~replacement_file() {
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
  }

  /// @throws metadata_error naming the file
  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::write(file_.get(), bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw fail("cannot be written", errno);
      bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  /// Gives the file its name. @throws metadata_error naming the file
  void commit() {
    if (const int error = file_.close(); error != 0) throw fail("cannot be written", error);
    if (temporary_.empty()) return;
    if (std::rename(temporary_.c_str(), target_.c_str()) != 0) throw fail("cannot be replaced", errno);
    temporary_.clear();
  }

 private:
  metadata_error fail(const char* what, int error) const {
    return metadata_error(detail::in_quotes(path_) + " " + what +
                          (error == 0 ? "" : ": " + detail::system_text(error)));
  }

  std::string path_;
  std::string target_;
  std::string temporary_;  // empty if there is none to remove
  detail::descriptor file_;
};

}  // namespace v0
}  // namespace gdn
