// SPDX-License-Identifier: Apache-2.0
#include <gdn/io/file.hpp>

#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "io/files.hpp"

namespace {

using gdn_test::read_file;
using ::testing::HasSubstr;

std::string text_of(const gdn::mapped_file& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const gdn::metadata_error& e) {
    return e.what();
  }
  return "no error";
}

class files : public ::testing::Test {
 protected:
  gdn_test::temporary_directory dir_;
};

TEST_F(files, MappedFileShowsTheBytesAlsoAfterAMove) {
  gdn::mapped_file a(dir_.write("a", std::string("x\0y", 3)));
  EXPECT_EQ(text_of(a), std::string("x\0y", 3));
  gdn::mapped_file b = std::move(a);
  gdn::mapped_file c(dir_.write("c", "other"));
  c = std::move(b);
  EXPECT_EQ(text_of(c), std::string("x\0y", 3));
  EXPECT_EQ(c.path(), dir_.path("a"));
}

TEST_F(files, EmptyFileHasNoBytes) {
  EXPECT_TRUE(gdn::mapped_file(dir_.write("e", "")).bytes().empty());
}

TEST_F(files, WhatCannotBeReadIsNamed) {
  EXPECT_THAT(message_of([&] { gdn::mapped_file f(dir_.path("absent")); }), HasSubstr(dir_.path("absent")));
  EXPECT_THAT(message_of([&] { gdn::mapped_file f(dir_.path("")); }), HasSubstr("directory"));
  EXPECT_THAT(message_of([&] { gdn::mapped_file f("/dev/null"); }), HasSubstr("no regular file"));
  EXPECT_THAT(message_of([&] { gdn::mapped_file f(""); }), HasSubstr("cannot be opened"));
}

TEST_F(files, APipeIsRefusedAtOnce) {
  ASSERT_EQ(::mkfifo(dir_.path("pipe").c_str(), 0600), 0);
  EXPECT_THAT(message_of([&] { gdn::mapped_file f(dir_.path("pipe")); }), HasSubstr("no regular file"));
}

TEST_F(files, ReplacementAppearsWithCommitOnly) {
  dir_.write("a", "old");
  gdn::replacement_file f(dir_.path("a"));
  f.write("new ");
  f.write("text");
  EXPECT_EQ(read_file(dir_.path("a")), "old");
  f.commit();
  EXPECT_EQ(read_file(dir_.path("a")), "new text");
  EXPECT_EQ(dir_.files(), 1U);
}

TEST_F(files, ReplacementWithoutCommitLeavesNothing) {
  dir_.write("a", "old");
  {
    gdn::replacement_file f(dir_.path("a"));
    f.write("new");
    gdn::replacement_file moved = std::move(f);
    gdn::replacement_file absent(dir_.path("b"));
  }
  EXPECT_EQ(read_file(dir_.path("a")), "old");
  EXPECT_EQ(dir_.files(), 1U);
}

TEST_F(files, ReplacedLinkStaysALink) {
  dir_.write("a", "old");
  std::filesystem::create_symlink(dir_.path("a"), dir_.path("link"));
  gdn::replacement_file f(dir_.path("link"));
  f.write("new");
  f.commit();
  EXPECT_TRUE(std::filesystem::is_symlink(dir_.path("link")));
  EXPECT_EQ(read_file(dir_.path("a")), "new");
}

TEST_F(files, NewFileHasTheUsualPermissions) {
  dir_.write("usual", "");
  gdn::replacement_file f(dir_.path("a"));
  f.commit();
  EXPECT_EQ(std::filesystem::status(dir_.path("a")).permissions(),
            std::filesystem::status(dir_.path("usual")).permissions());
}

TEST_F(files, DevicesAreWrittenToNotReplaced) {
  gdn::replacement_file f("/dev/null");
  f.write("nothing");
  f.commit();
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

TEST_F(files, WhatCannotBeWrittenIsNamed) {
  EXPECT_THAT(message_of([&] { gdn::replacement_file f(dir_.path("no/such/place")); }), HasSubstr("no/such/place"));
  EXPECT_THAT(message_of([&] { gdn::replacement_file f(dir_.path("")); }), HasSubstr("is no file"));
  EXPECT_THAT(message_of([&] { gdn::replacement_file f(""); }), HasSubstr("is no file"));
  if (std::filesystem::exists("/dev/full")) {
    gdn::replacement_file f("/dev/full");
    EXPECT_THAT(message_of([&] { f.write("text"); }), HasSubstr("/dev/full"));
  }
}

TEST(in_quotes, TextOfAFileStaysOnOneShortLine) {
  EXPECT_EQ(gdn::detail::in_quotes("a\nb\\\x7f"), "'a\\x0ab\\x5c\\x7f'");
  EXPECT_LT(gdn::detail::in_quotes(std::string(1000, 'x')).size(), 110U);
}

}  // namespace
