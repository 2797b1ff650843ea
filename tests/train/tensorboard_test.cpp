#include "hymoe/train/tensorboard.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

TEST(EventWriter, Crc32cOfTheStandardCheckString) { EXPECT_EQ(crc32c("123456789"), 0xe3069283u); }

TEST(EventWriter, WritesFramedRecordsWithTheScalars) {
  const TemporaryFolder folder;
  EventWriter(folder.path()).write(7, {{"loss", 2.5}});
  const fs::path file = fs::directory_iterator(folder.path())->path();
  EXPECT_EQ(file.filename().string().rfind("events.out.tfevents.", 0), 0u);
  std::ifstream in(file, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  std::vector<std::string> events;
  for (size_t at = 0; at < bytes.size();) {
    uint64_t length = 0;
    std::memcpy(&length, &bytes[at], 8);
    ASSERT_LE(at + 16 + length, bytes.size());
    events.push_back(bytes.substr(at + 12, length));
    const uint32_t crc = crc32c(events.back());
    const uint32_t masked = ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
    EXPECT_EQ(std::memcmp(&masked, &bytes[at + 12 + length], 4), 0);
    at += 16 + length;
  }
  ASSERT_EQ(events.size(), 2u);
  EXPECT_NE(events[0].find("brain.Event:2"), std::string::npos);
  const float value = 2.5f;
  const std::string scalar = "\x0a\x04loss\x15" + std::string(reinterpret_cast<const char*>(&value), 4);
  EXPECT_NE(events[1].find(scalar), std::string::npos);
  EXPECT_NE(events[1].find(std::string("\x10\x07", 2)), std::string::npos);
}

// Byte for byte what tensorboard.plugins.text has, of a string without dimensions.
TEST(EventWriter, WritesTexts) {
  const TemporaryFolder folder;
  EventWriter(folder.path()).write_text(3, "note", "hello");
  std::ifstream in(fs::directory_iterator(folder.path())->path(), std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  const std::string tensor("\x08\x07\x12\x00\x42\x05hello", 11), metadata = "\x0a\x06\x0a\x04text";
  const std::string value = std::string("\x0a\x04note\x42\x0b", 8) + tensor + "\x4a\x08" + metadata;
  EXPECT_NE(bytes.find(std::string("\x2a\x1f\x0a\x1d") + value), std::string::npos);
}

TEST(EventWriter, SaysWhichFileCannotBeWritten) {
  EXPECT_THROW(EventWriter("/nonexistent/folder"), DataError);
}

}  // namespace
}  // namespace hymoe
