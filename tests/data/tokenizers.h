#pragma once

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "data/tokenizer_spec.h"
#include "hymoe/config/error.h"
#include "hymoe/data/tokenizer.h"

namespace hymoe {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int32_t>;

// A folder of its own for each test, removed after it.
class TokenizerTest : public testing::Test {
 protected:
  TokenizerTest() {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(testing::TempDir()) / (std::string("tokenizer_") + info->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~TokenizerTest() override { fs::remove_all(folder_); }

  void write(const std::string& name, const std::string& text) { std::ofstream(folder_ / name) << text; }
  Tokenizer load(const json& tokenizer) {
    write("tokenizer.json", tokenizer.dump());
    return Tokenizer::load(folder_);
  }
  // The message of the error that loading throws.
  std::string refusal(const fs::path& path) {
    try {
      Tokenizer::load(path);
    } catch (const DataError& e) {
      return e.what();
    }
    return "loaded";
  }

  fs::path folder_;
};

inline json byte_level(bool prefix_space, bool regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", prefix_space},
          {"trim_offsets", true},
          {"use_regex", regex}};
}

inline json added(int id, const std::string& content, bool special, const json& flags = json::object()) {
  json token = {{"id", id},        {"content", content}, {"special", special},  {"normalized", false},
                {"lstrip", false}, {"rstrip", false},    {"single_word", false}};
  token.update(flags);
  return token;
}

// Bytes are ids 0 to 255; "ab" 256, "bc" 257, "abc" 258, "Ġa" 259, "00" 260, "0000" 261; <end> 262.
inline json small_tokenizer() {
  json vocab;
  for (int b = 0; b < 256; ++b) vocab[characters_of_bytes(std::string(1, static_cast<char>(b)))] = b;
  int id = 256;
  for (const char* token : {"ab", "bc", "abc", "Ġa", "00", "0000"}) vocab[token] = id++;
  return {{"version", "1.0"},
          {"added_tokens", {added(262, "<end>", true)}},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level(false, true)},
          {"post_processor", {{"type", "TemplateProcessing"}}},
          {"decoder", byte_level(false, true)},
          {"model",
           {{"type", "BPE"},
            {"unk_token", nullptr},
            {"vocab", vocab},
            {"merges", {"b c", "a b", "a bc", "Ġ a", "0 0", "00 00"}}}}};
}

inline std::string random_utf8(std::mt19937& random, size_t size) {
  std::string text;
  while (text.size() < size) {
    const uint32_t bits = 7 + random() % 14;
    const uint32_t c = random() % (1u << bits);
    if (c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) continue;
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    } else if (c < 0x10000) {
      text += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
               static_cast<char>(0x80 | (c & 0x3F))};
    } else {
      text += {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 0x3F)),
               static_cast<char>(0x80 | (c >> 6 & 0x3F)), static_cast<char>(0x80 | (c & 0x3F))};
    }
  }
  return text;
}

}  // namespace hymoe
