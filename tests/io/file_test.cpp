#include "hymoe/io/file.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {
namespace fs = std::filesystem;

size_t entries(const fs::path& folder) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(MappedFileTest, ShowsTheBytes) {
  TemporaryFolder folder;
  const MappedFile file(folder.file("a", std::string_view("x\0y", 3)));
  ASSERT_EQ(file.bytes().size(), 3u);
  EXPECT_EQ(static_cast<char>(file.bytes()[2]), 'y');
}

TEST(MappedFileTest, AnEmptyFileHasNoBytes) {
  TemporaryFolder folder;
  EXPECT_TRUE(MappedFile(folder.file("a", "")).bytes().empty());
}

TEST(MappedFileTest, MovesItsMapping) {
  TemporaryFolder folder;
  MappedFile first(folder.file("a", "one"));
  MappedFile second(std::move(first));
  EXPECT_EQ(static_cast<char>(second.bytes()[0]), 'o');
  second = MappedFile(folder.file("b", "four"));
  EXPECT_EQ(second.bytes().size(), 4u);
  EXPECT_EQ(second.path().filename(), "b");
}

TEST(MappedFileTest, SaysWhyItCannotOpen) {
  TemporaryFolder folder;
  EXPECT_EQ(message_of<DataError>([&] { MappedFile(folder / "none"); }),
            (folder / "none").string() + ": cannot open: No such file or directory");
  EXPECT_TRUE(holds(message_of<DataError>([&] { MappedFile{folder.path()}; }), "is a folder, wanted a file"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { MappedFile("/dev/null"); }), "is no regular file"));
}

TEST(ReadTextTest, ReadsWholeFiles) {
  TemporaryFolder folder;
  const std::string text(100'000, 'x');
  EXPECT_EQ(read_text(folder.file("a", text)), text);
  EXPECT_EQ(read_text(folder.file("b", "")), "");
  EXPECT_GT(read_text("/proc/self/status").size(), 500u);  // reports size 0
  EXPECT_TRUE(holds(message_of<DataError>([&] { read_text(folder / "none"); }), "No such file"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { read_text(folder.path()); }), "Is a directory"));
}

TEST(Sha256Test, GivesThePublishedDigests) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  TemporaryFolder folder;
  EXPECT_EQ(sha256_file(folder.file("a", std::string(1'000'000, 'a'))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  Sha256 pieces;
  pieces.update("a");
  pieces.update("");
  pieces.update("bc");
  EXPECT_EQ(pieces.hex(), sha256("abc"));
}

TEST(WriteFileAtomicTest, ReplacesAndLeavesNothingElse) {
  TemporaryFolder folder;
  write_file_atomic(folder / "a", "old");
  write_file_atomic(folder / "a", "new");
  EXPECT_EQ(read_text(folder / "a"), "new");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(WriteFileAtomicTest, FollowsTheUmask) {
  TemporaryFolder folder;
  const mode_t before = ::umask(022);
  write_file_atomic(folder / "a", "x");
  ::umask(before);
  EXPECT_EQ(fs::status(folder / "a").permissions(), fs::perms(0644));
}

TEST(WriteFileAtomicTest, RefusesWhatIsNoFile) {
  TemporaryFolder folder;
  EXPECT_TRUE(holds(message_of<DataError>([&] { write_file_atomic(folder / "no/a", "x"); }), "No such file"));
  EXPECT_TRUE(
      holds(message_of<DataError>([&] { write_file_atomic(folder.path(), "x"); }), "is no regular file"));
  EXPECT_TRUE(
      holds(message_of<DataError>([&] { write_file_atomic("/dev/full", "x"); }), "is no regular file"));
}

TEST(WriteFileAtomicTest, AFullDiskLeavesTheOldFile) {
  SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  write_file_atomic(disk / "a", "old");
  EXPECT_EQ(message_of<DataError>([&] { write_file_atomic(disk / "a", std::string(1 << 20, 'x')); }),
            (disk / "a").string() + ": cannot write: No space left on device");
  EXPECT_EQ(read_text(disk / "a"), "old");
  EXPECT_EQ(entries(disk.path()), 1u);
}

TEST(AtomicFileTest, LeavesNothingWithoutCommit) {
  TemporaryFolder folder;
  { AtomicFile(folder / "a").write("x"); }
  EXPECT_EQ(entries(folder.path()), 0u);
}

TEST(AtomicDirectoryTest, AppearsAtCommit) {
  TemporaryFolder folder;
  {
    AtomicDirectory directory(folder / "d/");
    write_file_atomic(directory.folder() / "a", "x");
    fs::create_directory(directory.folder() / "sub");
    write_file_atomic(directory.folder() / "sub/b", "y");
    EXPECT_FALSE(fs::exists(folder / "d"));
    directory.commit();
  }
  EXPECT_EQ(read_text(folder / "d/a"), "x");
  EXPECT_EQ(read_text(folder / "d/sub/b"), "y");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(AtomicDirectoryTest, ReplacesTheWholeFolder) {
  TemporaryFolder folder;
  for (const std::string name : {"first", "second"}) {
    AtomicDirectory directory(folder / "d");
    write_file_atomic(directory.folder() / name, name);
    directory.commit();
  }
  EXPECT_FALSE(fs::exists(folder / "d/first"));
  EXPECT_EQ(read_text(folder / "d/second"), "second");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(AtomicDirectoryTest, IsWantedWhereNothingLies) {
  TemporaryFolder folder;
  fs::create_directory(folder / "empty");
  check_vacant(folder / "empty");
  check_vacant(folder / "none");
  folder.file("empty/file", "x");
  for (const char* taken : {"empty", "empty/file"})
    EXPECT_TRUE(holds(message_of<DataError>([&] { check_vacant(folder / taken); }), "is there already"));
}

TEST(AtomicDirectoryTest, LeavesNothingWithoutCommit) {
  TemporaryFolder folder;
  { write_file_atomic(AtomicDirectory(folder / "d").folder() / "a", "x"); }
  EXPECT_EQ(entries(folder.path()), 0u);
}

TEST(AtomicDirectoryTest, SaysWhyItCannotWrite) {
  TemporaryFolder folder;
  folder.file("file", "x");
  EXPECT_TRUE(holds(message_of<DataError>([&] { AtomicDirectory(folder / "file/d"); }), "Not a directory"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { AtomicDirectory(folder / "file"); }), "is no folder"));
}

TEST(AtomicDirectoryTest, SaysThatNoMoreFilesCanBeOpened) {
  TemporaryFolder folder;
  struct rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const struct rlimit none { 0, before.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const std::string message = message_of<DataError>([&] { AtomicDirectory(folder / "d"); });
  ::setrlimit(RLIMIT_NOFILE, &before);
  EXPECT_TRUE(holds(message, "Too many open files"));
  EXPECT_EQ(entries(folder.path()), 0u);
}

TEST(AtomicDirectoryTest, AFullDiskLeavesTheOldFolder) {
  SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  const auto write = [&](size_t size) {
    AtomicDirectory directory(disk / "d");
    write_file_atomic(directory.folder() / "a", std::string(size, 'x'));
    directory.commit();
  };
  write(10);
  EXPECT_TRUE(holds(message_of<DataError>([&] { write(1 << 20); }), "No space left on device"));
  EXPECT_EQ(read_text(disk / "d/a").size(), 10u);
  EXPECT_EQ(entries(disk.path()), 1u);
}

/// Replaces `target` by generation after generation of three equal files until it is killed.
[[noreturn]] void replace_until_killed(const fs::path& target) {
  for (int generation = 1;; ++generation) {
    AtomicDirectory directory(target);
    for (const char* name : {"a", "b", "c"}) {
      std::ofstream(directory.folder() / name)
          << std::string(20'000, static_cast<char>('A' + generation % 26));
    }
    directory.commit();
  }
}

TEST(AtomicDirectoryTest, AKilledWriterLeavesACompleteFolder) {
  TemporaryFolder folder;
  std::mt19937 random(1);
  for (int trial = 0; trial < 30; ++trial) {
    const pid_t child = ::fork();
    if (child == 0) replace_until_killed(folder / "d");
    std::this_thread::sleep_for(std::chrono::microseconds(2000 + random() % 20'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    if (fs::exists(folder / "d")) {
      const std::string a = read_text(folder / "d/a");
      ASSERT_EQ(a.size(), 20'000u);
      ASSERT_EQ(read_text(folder / "d/b"), a);
      ASSERT_EQ(read_text(folder / "d/c"), a);
    }
  }
  ASSERT_TRUE(fs::exists(folder / "d"));
  remove_abandoned(folder.path());
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(RemoveAbandonedTest, KeepsLivingWritersAndOtherNames) {
  TemporaryFolder folder;
  AtomicDirectory directory(folder / "d");
  AtomicFile file(folder / "f");
  folder.file("g.tmp-abcdef", "left behind");
  folder.file("notes.tmp-1", "a user's");
  folder.file("h.old-abcdef", "the only complete one");
  remove_abandoned(folder.path());
  EXPECT_FALSE(fs::exists(folder / "g.tmp-abcdef"));
  EXPECT_TRUE(fs::exists(folder / "notes.tmp-1"));
  EXPECT_TRUE(fs::exists(folder / "h.old-abcdef"));
  directory.commit();
  file.commit();
  EXPECT_TRUE(fs::exists(folder / "d"));
  EXPECT_TRUE(fs::exists(folder / "f"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { remove_abandoned(folder / "none"); }), "No such file"));
}

TEST(FreeBytesTest, AsksTheDiskOfThePath) {
  EXPECT_GT(free_bytes("."), 0);
  EXPECT_GT(free_bytes("not/there/yet"), 0);
  SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  EXPECT_LE(free_bytes(disk / "none"), 1 << 16);
}

}  // namespace
}  // namespace hymoe
