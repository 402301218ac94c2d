// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Safetensors files made by hand, sound and broken, and a directory for them.

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace gdn_test {

/// The bytes of a file with this header and data, whatever they hold.
inline std::string file_with(std::string_view header, std::string_view data) {
  const std::uint64_t length = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out.append(header).append(data);
}

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

/// A directory that goes away with its files.
class temporary_directory {
 public:
  temporary_directory() {
    static std::uint64_t counter = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("gdn-test-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    std::filesystem::create_directories(path_);
  }
  temporary_directory(const temporary_directory&) = delete;
  temporary_directory& operator=(const temporary_directory&) = delete;
  ~temporary_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string path(const std::string& name) const { return (path_ / name).string(); }
  std::string write(const std::string& name, std::string_view content) const {
    std::ofstream(path(name), std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
    return path(name);
  }
  std::size_t files() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// One of many small ways to break a safetensors file; the same random numbers, the same file.
template <class Random>
std::string mutate(std::string file, Random& random) {
  const auto below = [&](std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random() % n); };
  if (file.size() < 8) return file += static_cast<char>(below(256));
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  const std::size_t header = static_cast<std::size_t>(std::min<std::uint64_t>(length, file.size() - 8));
  const auto edit_header = [&](auto&& edit) {  // and keeps its length true
    std::string text = file.substr(8, header);
    edit(text);
    file = file_with(text, file.substr(8 + header));
  };
  static const std::vector<std::string> tokens = {"0",
                                                  "1",
                                                  "-1",
                                                  "7",
                                                  "4294967296",
                                                  "9223372036854775807",
                                                  "9223372036854775808",
                                                  "18446744073709551615",
                                                  "1e999",
                                                  "1.5",
                                                  "-0",
                                                  "true",
                                                  "null",
                                                  "\"\"",
                                                  "\"F32\"",
                                                  "\"F64\"",
                                                  "\"BOOL\"",
                                                  "\"F4\"",
                                                  "[]",
                                                  "[0]",
                                                  "[0,0]",
                                                  "{}",
                                                  "{",
                                                  "}",
                                                  "[",
                                                  "]",
                                                  ",",
                                                  ":",
                                                  "\"",
                                                  "\\",
                                                  "\\u0000",
                                                  "\\ud800",
                                                  "\xff",
                                                  "\xc0\x80",
                                                  std::string(1, '\0'),
                                                  " ",
                                                  "\"__metadata__\":{},",
                                                  "\"dtype\":\"F32\",",
                                                  "\"shape\":[2],",
                                                  "\"data_offsets\":[0,8],"};
  switch (below(8)) {
    case 0:  // flip bits anywhere
      for (std::size_t n = 1 + below(4); n > 0; --n) {
        file[below(file.size())] ^= static_cast<char>(1U << below(8));
      }
      break;
    case 1:  // flip bits of the header
      for (std::size_t n = 1 + below(4); n > 0 && header > 0; --n) {
        file[8 + below(header)] ^= static_cast<char>(1U << below(8));
      }
      break;
    case 2:
      file.resize(below(file.size() + 1));
      break;
    case 3:
      file.append(1 + below(16), static_cast<char>(below(256)));
      break;
    case 4: {  // another header length
      const std::uint64_t lengths[] = {0,           1,         length - 1, length + 1, length + 8, file.size() - 8,
                                       file.size(), 100000001, ~0ULL,      1ULL << 63, ~0ULL - 7,  random()};
      const std::uint64_t other = lengths[below(std::size(lengths))];
      std::memcpy(file.data(), &other, 8);
      break;
    }
    case 5:  // put a token somewhere
      edit_header([&](std::string& text) { text.insert(below(text.size() + 1), tokens[below(tokens.size())]); });
      break;
    case 6:  // replace a number
      edit_header([&](std::string& text) {
        const std::size_t from = text.find_first_of("0123456789", below(text.size()));
        if (from == std::string::npos) return;
        const std::size_t end = text.find_first_not_of("0123456789", from);
        text.replace(from, (end == std::string::npos ? text.size() : end) - from, tokens[below(tokens.size())]);
      });
      break;
    default:  // remove, or repeat, a piece
      edit_header([&](std::string& text) {
        const std::size_t from = below(text.size());
        const std::size_t count = 1 + below(40);
        const std::string piece = text.substr(from, count);
        if (below(2) == 0) {
          text.erase(from, count);
        } else {
          text.insert(below(text.size() + 1), piece);
        }
      });
  }
  return file;
}

}  // namespace gdn_test
