#include "hymoe/data/token_file.h"

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "hymoe/data/manifest.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

const std::string kFingerprint(64, 'a');
constexpr int64_t kTrailerBytes = 104;

using Documents = std::vector<std::vector<int32_t>>;

std::filesystem::path write_documents(const std::filesystem::path& path, const Documents& documents,
                                      int64_t vocab_size) {
  TokenFileWriter writer(path, vocab_size, kFingerprint);
  for (const auto& ids : documents) writer.add(ids);
  writer.finish();
  return path;
}

Documents read_documents(const TokenFile& file) {
  Documents documents;
  for (int64_t d = 0; d < file.num_documents(); ++d) {
    const int64_t begin = file.offsets()[d], count = file.offsets()[d + 1] - begin;
    std::vector<int64_t> ids(count);
    file.read(begin, count, ids.data());
    documents.emplace_back(ids.begin(), ids.end());
  }
  return documents;
}

// Writes the file again with `size` bytes of `value` at `position` (negative: from the end).
template <typename T>
void patch(const std::filesystem::path& path, int64_t position, T value) {
  std::string bytes = read_text(path);
  if (position < 0) position += static_cast<int64_t>(bytes.size());
  std::memcpy(bytes.data() + position, &value, sizeof value);
  write_file_atomic(path, bytes);
}

TEST(TokenFile, KeepsDocumentsInBothWidths) {
  TemporaryFolder folder;
  const Documents small = {{0, 1, 65535}, {7}, {3, 3}};
  const TokenFile narrow(write_documents(folder / "narrow", small, 65536));
  EXPECT_EQ(read_documents(narrow), small);
  EXPECT_EQ(narrow.vocab_size(), 65536);
  EXPECT_EQ(std::filesystem::file_size(narrow.path()), 8u + 12 + 4 + 4 * 8 + kTrailerBytes);

  const TokenFile edge(write_documents(folder / "edge", {{65536}}, 65537));
  EXPECT_EQ(read_documents(edge), (Documents{{65536}}));

  const Documents large = {{0, 1, 65536}, {7}, {3, 200000}};
  const TokenFile wide(write_documents(folder / "wide", large, 200001));
  EXPECT_EQ(read_documents(wide), large);
  EXPECT_EQ(wide.num_documents(), 3);
  EXPECT_EQ(wide.num_tokens(), 6);
  EXPECT_EQ(wide.tokenizer_fingerprint(), kFingerprint);
  wide.verify();
}

TEST(TokenFile, MayBeEmpty) {
  TemporaryFolder folder;
  const TokenFile file(write_documents(folder / "empty", {}, 10));
  EXPECT_EQ(file.num_documents(), 0);
  EXPECT_EQ(file.num_tokens(), 0);
  file.verify();
}

TEST(TokenFile, IsWrittenThroughABufferAndHashed) {
  TemporaryFolder folder;
  std::vector<int32_t> ids(700001);
  std::iota(ids.begin(), ids.end(), 0);
  TokenFileWriter writer(folder / "f", 1 << 20, kFingerprint);
  writer.add(ids);
  writer.add(ids);
  EXPECT_FALSE(std::filesystem::exists(folder / "f")) << "it appears whole";
  const std::string hash = writer.finish();
  EXPECT_EQ(hash, sha256_file(folder / "f"));
  const TokenFile file(folder / "f");
  EXPECT_EQ(read_documents(file), (Documents{ids, ids}));
  file.verify();
}

TEST(TokenFile, FindsTheDocumentOfAToken) {
  TemporaryFolder folder;
  const TokenFile file(write_documents(folder / "f", {{1, 1, 1}, {1}, {1, 1}}, 10));
  const std::vector<int64_t> expected = {0, 0, 0, 1, 2, 2};
  for (int64_t t = 0; t < 6; ++t) EXPECT_EQ(file.document_of(t), expected[t]);
  EXPECT_THROW(file.document_of(6), c10::Error);
  EXPECT_THROW(file.document_of(-1), c10::Error);
  std::vector<int64_t> ids(7);
  EXPECT_THROW(file.read(0, 7, ids.data()), c10::Error);
  EXPECT_THROW(file.read(-1, 1, ids.data()), c10::Error);
  file.read(6, 0, ids.data());
}

TEST(TokenFile, RefusesWhatIsNoTokenOfTheVocabulary) {
  TemporaryFolder folder;
  TokenFileWriter writer(folder / "f", 10, kFingerprint);
  EXPECT_TRUE(holds(message_of<c10::Error>([&] {
                      writer.add(std::vector<int32_t>{3, 10});
                    }),
                    "id 10 is outside the vocabulary of 10"));
  EXPECT_THROW(writer.add(std::vector<int32_t>{-1}), c10::Error);
  EXPECT_THROW(writer.add({}), c10::Error);
}

TEST(TokenFile, EveryTruncationIsFound) {
  TemporaryFolder folder;
  const std::string bytes = read_text(write_documents(folder / "f", {{1, 2, 3}, {4}}, 100));
  for (size_t size = 0; size < bytes.size(); ++size) {
    write_file_atomic(folder / "cut", std::string_view(bytes).substr(0, size));
    const std::string what = message_of<DataError>([&] { TokenFile file(folder / "cut"); });
    EXPECT_TRUE(holds(what, (folder / "cut").string())) << size;
    const std::string cut = "cut off after " + std::to_string(size) + " bytes";
    EXPECT_TRUE(holds(what, size < 8 ? "this is no token file" : cut));
  }
  write_file_atomic(folder / "longer",
                    bytes + std::string(8, '\0') + bytes.substr(bytes.size() - kTrailerBytes));
  EXPECT_THROW(TokenFile(folder / "longer"), DataError);
}

TEST(TokenFile, LiesInTheTrailerAreFound) {
  TemporaryFolder folder;
  const auto broken = [&](int64_t position, auto value) {
    const auto path = write_documents(folder / "f", {{1, 2, 3}, {4}}, 100);
    patch(path, position, value);
    return message_of<DataError>([&] { TokenFile file(path); });
  };
  EXPECT_TRUE(holds(broken(0, 'X'), "this is no token file"));
  EXPECT_TRUE(holds(broken(-1, 'X'), "end mark is missing"));
  EXPECT_TRUE(holds(broken(-kTrailerBytes, uint32_t{9}), "version 9, this program reads version 1"));
  EXPECT_TRUE(holds(broken(-kTrailerBytes + 4, uint32_t{3}), "tokens of 2 or 4 bytes were wanted"));
  EXPECT_TRUE(holds(broken(-kTrailerBytes + 4, uint32_t{4}), "do not take"));
  for (uint64_t lie : {uint64_t{0}, uint64_t{1}, uint64_t{3}, (uint64_t{1} << 61) + 2, ~uint64_t{0}}) {
    EXPECT_TRUE(holds(broken(-kTrailerBytes + 8, lie), "do not take")) << "documents " << lie;
  }
  for (uint64_t lie : {uint64_t{0}, uint64_t{5}, (uint64_t{1} << 63) + 4, ~uint64_t{0}}) {
    EXPECT_THROW(
        {
          const auto path = write_documents(folder / "g", {{1, 2, 3}, {4}}, 100);
          patch(path, -kTrailerBytes + 16, lie);
          TokenFile file(path);
        },
        DataError)
        << "tokens " << lie;
  }
  const int64_t offsets = 8 + 8;
  EXPECT_TRUE(holds(broken(offsets, uint64_t{1}), "document offsets must rise from 0 to 4"));
  EXPECT_TRUE(holds(broken(offsets + 8, uint64_t{0}), "document offsets must rise"));
  EXPECT_TRUE(holds(broken(offsets + 8, uint64_t{5}), "document offsets must rise"));
  EXPECT_TRUE(holds(broken(offsets + 16, uint64_t{5}), "the last ends at 5"));
}

TEST(TokenFile, ChecksumAndIdsAreVerified) {
  TemporaryFolder folder;
  const auto path = write_documents(folder / "f", {{1, 2, 3}, {4}}, 100);
  patch(path, 8, uint16_t{2});
  const TokenFile changed(path);
  EXPECT_TRUE(holds(message_of<DataError>([&] { changed.verify(); }), "does not have the checksum"));
  patch(path, 8 + 4, uint16_t{100});
  const TokenFile outside(path);
  std::vector<int64_t> ids(4);
  outside.read(0, 2, ids.data());
  EXPECT_TRUE(holds(message_of<DataError>([&] { outside.read(0, 3, ids.data()); }),
                    "id 100 among tokens 0 to 3 is outside the vocabulary of 100"));
}

TEST(TokenFile, AnotherTokenizerIsNamed) {
  TemporaryFolder folder;
  const TokenFile file(write_documents(folder / "f", {{1}}, 10));
  file.check_tokenizer(kFingerprint);
  const std::string other(64, 'b');
  const std::string what = message_of<DataError>([&] { file.check_tokenizer(other); });
  EXPECT_TRUE(holds(what, kFingerprint));
  EXPECT_TRUE(holds(what, other));
}

Manifest example_manifest(const std::filesystem::path& folder) {
  TokenFileWriter writer(folder / "rust.train.tokens", 10, kFingerprint);
  writer.add(std::vector<int32_t>{1, 2, 3});
  Manifest manifest{.version = "1",
                    .tokenizer_path = "t",
                    .tokenizer_fingerprint = kFingerprint,
                    .vocab_size = 10,
                    .languages = {},
                    .skipped = {{"unknown_language", 2}},
                    .sources = {{{"path", "src"}}},
                    .config = {{"output", "out"}}};
  manifest.languages["rust"] = {.tag = "// language: Rust",
                                .splits = {{"train", {"rust.train.tokens", 1, 3, 5, writer.finish()}}},
                                .skipped = {{"duplicate", 4}}};
  write_file_atomic(folder / Manifest::kFileName, manifest.to_json().dump());
  return manifest;
}

TEST(Manifest, RoundTripsAndOpensItsFiles) {
  TemporaryFolder folder;
  const Manifest written = example_manifest(folder.path());
  const Manifest read = read_manifest(folder.path());
  EXPECT_EQ(read.to_json(), written.to_json());
  EXPECT_EQ(open_token_file(folder.path(), read, "rust", "train", kFingerprint).num_tokens(), 3);
}

TEST(Manifest, WhatIsNotThereIsNamed) {
  TemporaryFolder folder;
  EXPECT_TRUE(holds(message_of<DataError>([&] { read_manifest(folder / "x"); }),
                    "x/manifest.json: there is no such file"));
  const Manifest manifest = example_manifest(folder.path());
  const auto open = [&](const std::string& language, const std::string& split,
                        const std::string& fingerprint) {
    return message_of<DataError>(
        [&] { open_token_file(folder.path(), manifest, language, split, fingerprint); });
  };
  EXPECT_TRUE(holds(open("rsut", "train", ""), "no language 'rsut'; nearest: rust, there are rust"));
  EXPECT_TRUE(holds(open("rust", "valid", ""), "the language rust has no split 'valid'"));
  EXPECT_TRUE(holds(open("rust", "train", std::string(64, 'b')), "made with the tokenizer " + kFingerprint));
  Manifest lying = manifest;
  lying.tokenizer_fingerprint = std::string(64, 'c');
  EXPECT_TRUE(holds(message_of<DataError>([&] { open_token_file(folder.path(), lying, "rust", "train"); }),
                    "made with the tokenizer " + kFingerprint));
  lying = manifest;
  lying.languages["rust"].splits["train"].tokens = 4;
  EXPECT_TRUE(holds(message_of<DataError>([&] { open_token_file(folder.path(), lying, "rust", "train"); }),
                    "holds 1 documents of 3 tokens, but the manifest says 1 of 4"));
}

TEST(Manifest, DamageIsNamed) {
  TemporaryFolder folder;
  const nlohmann::json good = nlohmann::json::parse(example_manifest(folder.path()).to_json().dump());
  const auto read = [&](const std::string& text) {
    folder.file(Manifest::kFileName, text);
    return message_of<DataError>([&] { read_manifest(folder.path()); });
  };
  EXPECT_TRUE(holds(read("{"), "this is no JSON"));
  EXPECT_TRUE(holds(read("[]"), "the key 'format' is missing"));
  for (const auto& [key, value] : good.items()) {
    nlohmann::json without = good;
    without.erase(key);
    EXPECT_TRUE(holds(read(without.dump()), "the key '" + key + "' is missing"));
  }
  nlohmann::json bad = good;
  bad["format"] = 7;
  EXPECT_TRUE(holds(read(bad.dump()), "manifest of format 7, this program reads format 1"));
  bad = good;
  bad["languages"]["rust"]["splits"]["train"]["tokens"] = "many";
  EXPECT_TRUE(
      holds(read(bad.dump()), "languages.rust: splits.train: the key 'tokens' has a value of another type"));
  bad = good;
  bad["languages"]["rust"]["splits"]["train"]["file"] = "../secret";
  EXPECT_TRUE(holds(read(bad.dump()), "'file' must be a name in the folder"));
}

}  // namespace
}  // namespace hymoe
