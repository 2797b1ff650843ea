#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "byte_tokenizer.h"
#include "hymoe/data/prepare.h"
#include "hymoe/data/token_file.h"
#include "hymoe/io/file.h"
#include "temporary_folder.h"

namespace hymoe {

inline constexpr int32_t kEos = 256;

/// "before7after", in a way that GCC 12 takes without false warnings.
inline std::string numbered(const std::string& before, int64_t number, const std::string& after = "") {
  std::string text = before;
  text += std::to_string(number);
  text += after;
  return text;
}

/// Writes a file and the folders above it.
inline std::filesystem::path put(const std::filesystem::path& path, std::string_view text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

/// The documents of a token file made with byte_tokenizer_json(), each as text; "$" is the end of text.
inline std::vector<std::string> documents_of(const TokenFile& file) {
  std::vector<std::string> documents;
  for (int64_t d = 0; d < file.num_documents(); ++d) {
    const int64_t begin = file.offsets()[d], count = file.offsets()[d + 1] - begin;
    std::vector<int64_t> ids(count);
    file.read(begin, count, ids.data());
    std::string text;
    for (int64_t id : ids) text += id == kEos ? '$' : static_cast<char>(id);
    documents.push_back(text);
  }
  return documents;
}

/// A folder with a tokenizer and a `src` folder to fill.
class Corpus {
 public:
  Corpus() { put(folder_ / "tokenizer.json", byte_tokenizer_json()); }
  void add(const std::string& name, std::string_view text) const { put(folder_ / "src" / name, text); }
  std::filesystem::path operator/(const std::string& name) const { return folder_ / name; }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  /// All documents for training, no tags, no filters that small documents would not pass.
  PrepareConfig config() const {
    PrepareConfig config;
    config.output = path("out");
    config.tokenizer = path("tokenizer.json");
    config.sources = {{.path = path("src")}};
    config.language_tags = false;
    config.filters.min_alphabet = 0;
    config.valid_share = 0;
    config.threads = 2;
    return config;
  }

  std::vector<std::string> documents(const std::string& language, const std::string& split = "train",
                                     const std::string& output = "out") const {
    return documents_of(open_token_file(folder_ / output, read_manifest(folder_ / output), language, split));
  }

 private:
  TemporaryFolder folder_;
};

}  // namespace hymoe
