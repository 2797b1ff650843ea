#include "hymoe/io/jsonl.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <zlib.h>

#include "hymoe/config/error.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

std::string gzip(const std::string& text) {
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, MAX_WBITS + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string packed(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

std::vector<std::string> lines_of(const std::filesystem::path& path) {
  LineReader reader(path);
  std::vector<std::string> lines;
  for (std::string line; reader.next(line);) lines.push_back(line);
  EXPECT_EQ(reader.line_number(), static_cast<int64_t>(lines.size()));
  return lines;
}

std::vector<nlohmann::json> records_of(const std::filesystem::path& path) {
  JsonLines reader(path);
  std::vector<nlohmann::json> records;
  for (nlohmann::json record; reader.next(record);) records.push_back(record);
  return records;
}

const std::vector<std::string> kThree{"one", "", "three"};

TEST(LineReaderTest, TakesEveryLineEnding) {
  TemporaryFolder folder;
  using Lines = std::vector<std::string>;
  EXPECT_EQ(lines_of(folder.file("a", "one\n\nthree\n")), kThree);
  EXPECT_EQ(lines_of(folder.file("a", "one\n\nthree")), kThree);
  EXPECT_EQ(lines_of(folder.file("a", "one\r\n\r\nthree\r\n")), kThree);
  EXPECT_EQ(lines_of(folder.file("a", "")), Lines{});
  EXPECT_EQ(lines_of(folder.file("a", "\n")), Lines{""});
  EXPECT_EQ(lines_of(folder.file("a", "a\rb\n")), Lines{"a\rb"});
}

TEST(LineReaderTest, LinesAcrossBlocks) {
  TemporaryFolder folder;
  std::vector<std::string> lines;
  std::string text;
  for (size_t i = 0; i < 40; ++i) {
    lines.push_back(std::string(i * 7919, static_cast<char>('a' + i % 26)));
    text += lines.back() + "\n";
  }
  EXPECT_EQ(lines_of(folder.file("a", text)), lines);
  EXPECT_EQ(lines_of(folder.file("a.gz", gzip(text))), lines);
  EXPECT_EQ(lines_of(folder.file("b.gz", gzip(text.substr(0, 300'000)) + gzip(text.substr(300'000)))), lines);
}

TEST(LineReaderTest, GzipEndsProperly) {
  TemporaryFolder folder;
  const std::string packed = gzip("one\n\nthree\n");
  EXPECT_EQ(lines_of(folder.file("a.gz", packed)), kThree);
  EXPECT_EQ(lines_of(folder.file("a.gz", packed + std::string(700'000, '\0'))), kThree);
  EXPECT_EQ(lines_of(folder.file("a.gz", packed + gzip(""))), kThree);
  EXPECT_TRUE(lines_of(folder.file("a.gz", gzip(""))).empty());
  for (const std::string& after :
       {std::string("xyz"), std::string("\0x", 2), std::string(300'000, '\0') + "x"}) {
    const auto path = folder.file("b.gz", packed + after);
    EXPECT_TRUE(holds(message_of<DataError>([&] { lines_of(path); }), "other data after the gzip data"));
  }
}

TEST(LineReaderTest, EveryTruncationOfGzipIsAnError) {
  TemporaryFolder folder;
  const std::string packed = gzip("one\n\nthree\n");
  for (size_t cut = 0; cut < packed.size(); ++cut) {
    const auto path = folder.file("a.gz", packed.substr(0, cut));
    ASSERT_TRUE(holds(message_of<DataError>([&] { lines_of(path); }), "gzip data ends too early")) << cut;
    const auto second = folder.file("b.gz", packed + packed.substr(0, cut));
    if (cut > 0) {
      ASSERT_TRUE(holds(message_of<DataError>([&] { lines_of(second); }), "gzip data ends too early")) << cut;
    }
  }
}

TEST(LineReaderTest, NamesFileAndLineOfDamagedGzip) {
  TemporaryFolder folder;
  std::string packed = gzip("one\ntwo\nthree\n");
  packed[packed.size() - 8] ^= 1;  // the checksum
  const auto path = folder.file("a.gz", packed);
  EXPECT_EQ(message_of<DataError>([&] { lines_of(path); }),
            path.string() + ":4: gzip data is damaged: incorrect data check");
  const auto plain = folder.file("plain.gz", "{}\n");
  EXPECT_TRUE(holds(message_of<DataError>([&] { lines_of(plain); }), "plain.gz:1: gzip data is damaged"));
}

TEST(LineReaderTest, SaysWhyItCannotOpen) {
  TemporaryFolder folder;
  EXPECT_TRUE(
      holds(message_of<DataError>([&] { LineReader(folder / "none.gz"); }), "none.gz: cannot open: No such"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { lines_of(folder.path()); }), "cannot read: Is a directory"));
}

TEST(JsonLinesTest, ReadsObjectsAndCountsBlankLines) {
  TemporaryFolder folder;
  const std::string text = "{\"a\": 1}\r\n\n  \t\n{\"a\": \"\xC3\xA4\"}";
  for (const auto& path : {folder.file("a.jsonl", text), folder.file("a.jsonl.gz", gzip(text))}) {
    const auto records = records_of(path);
    ASSERT_EQ(records.size(), 2u);
    EXPECT_EQ(records[0]["a"], 1);
    EXPECT_EQ(records[1]["a"], "\xC3\xA4");
  }
  JsonLines reader(folder / "a.jsonl");
  nlohmann::json record;
  ASSERT_TRUE(reader.next(record) && reader.next(record));
  EXPECT_EQ(reader.where(), (folder / "a.jsonl").string() + ":4");
  EXPECT_FALSE(reader.next(record));
}

TEST(JsonLinesTest, NamesFileAndLineOfBadRecords) {
  TemporaryFolder folder;
  const std::vector<std::pair<std::string, std::string>> cases{
      {"{\"a\": \"\xC3\"}", ":2: invalid UTF-8 at byte 8 of the line"},
      {"{\"a\": 1", ":2: no valid JSON: "},
      {"{\"a\": NaN}", ":2: no valid JSON: "},
      {"{} {}", ":2: no valid JSON: "},
      {"[1]", ":2: wanted a JSON object, got array"},
      {"\"text\"", ":2: wanted a JSON object, got string"},
  };
  for (const auto& [line, words] : cases) {
    const auto path = folder.file("a.jsonl", "{}\n" + line + "\n{}\n");
    const std::string message = message_of<DataError>([&] { records_of(path); });
    EXPECT_TRUE(holds(message, "a.jsonl" + words));
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

TEST(JsonLinesWriterTest, AppendsInTheOrderOfKeys) {
  TemporaryFolder folder;
  {
    JsonLinesWriter writer(folder / "a.jsonl");
    writer.write({{"step", 1}, {"loss", 2.5}, {"a", std::nan("")}});
    EXPECT_EQ(read_text(folder / "a.jsonl"),
              "{\"step\":1,\"loss\":2.5,\"a\":null}\n");  // before the writer is gone
  }
  JsonLinesWriter(folder / "a.jsonl").write(nlohmann::json{{"step", 2}});
  EXPECT_EQ(records_of(folder / "a.jsonl").size(), 2u);
}

TEST(JsonLinesWriterTest, CutsOffAnIncompleteLastLine) {
  TemporaryFolder folder;
  const std::string tail(600'000, 'x');
  for (const std::string& before : {std::string(), std::string("{}\n"), std::string("{}\n{}\n")}) {
    JsonLinesWriter(folder.file("a.jsonl", before + tail)).write({{"step", 2}});
    EXPECT_EQ(read_text(folder / "a.jsonl"), before + "{\"step\":2}\n");
  }
}

TEST(JsonLinesWriterTest, AFullDiskLeavesWholeLines) {
  JsonLinesWriter full("/dev/full");
  EXPECT_EQ(message_of<DataError>([&] {
              full.write({{"step", 1}});
            }),
            "/dev/full: cannot write: No space left on device");
  SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  JsonLinesWriter writer(disk / "a.jsonl");
  const std::string message = message_of<DataError>([&] {
    for (int64_t step = 0; step < 100'000; ++step)
      writer.write({{"step", step}, {"text", std::string(1000, 'x')}});
  });
  EXPECT_TRUE(holds(message, "No space left on device"));
  EXPECT_GT(records_of(disk / "a.jsonl").size(), 10u);
}

}  // namespace
}  // namespace hymoe
