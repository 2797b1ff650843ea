#include "hymoe/data/tokenizer.h"

#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "data/bpe.h"
#include "data/tokenizer_spec.h"
#include "hymoe/config/error.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int32_t>;

const fs::path kShared = fs::path(HYMOE_SOURCE_DIR) / ".." / "shared" / "data" / "tokenizers";
const char* const kQwenPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

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

json byte_level(bool prefix_space, bool regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", prefix_space},
          {"trim_offsets", true},
          {"use_regex", regex}};
}

json added(int id, const std::string& content, bool special, const json& flags = json::object()) {
  json token = {{"id", id},        {"content", content}, {"special", special},  {"normalized", false},
                {"lstrip", false}, {"rstrip", false},    {"single_word", false}};
  token.update(flags);
  return token;
}

// Bytes are ids 0 to 255; "ab" 256, "bc" 257, "abc" 258, "Ġa" 259, "00" 260, "0000" 261; <end> 262.
json small_tokenizer() {
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

std::string random_utf8(std::mt19937& random, size_t size) {
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

TEST_F(TokenizerTest, MergesByRankThenFromTheLeft) {
  const Tokenizer tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.encode("abc"), Ids{258});  // b c first, then a bc
  EXPECT_EQ(tokenizer.encode("abab"), (Ids{256, 256}));
  EXPECT_EQ(tokenizer.encode("00000"), (Ids{261, '0'}));  // pairs from the left
  EXPECT_EQ(tokenizer.encode("x a"), (Ids{'x', 259}));
  EXPECT_EQ(tokenizer.vocab_size(), 263);
  EXPECT_EQ(tokenizer.id("Ġa"), 259);
  EXPECT_EQ(tokenizer.id(" a"), std::nullopt);
  EXPECT_EQ(tokenizer.token_bytes(259), " a");
  Ids ids = {7};
  tokenizer.encode("abc", ids);
  EXPECT_EQ(ids, (Ids{7, 258}));
}

// Short words are merged by scans and long ones by a heap; both must do what the definition says.
TEST(Bpe, EqualsItsDefinition) {
  std::vector<std::string> tokens(256);
  for (int b = 0; b < 256; ++b) tokens[b] = std::string(1, static_cast<char>(b));
  std::mt19937 random(3);
  std::vector<Merge> merges;
  std::map<std::pair<int32_t, int32_t>, size_t> ranks;
  while (merges.size() < 60) {  // of tokens over three letters
    const auto pick = [&] {
      return merges.empty() || random() % 3 == 0 ? static_cast<int32_t>('a' + random() % 3)
                                                 : merges[random() % merges.size()].result;
    };
    const Merge merge{pick(), pick(), static_cast<int32_t>(tokens.size())};
    if (!ranks.emplace(std::pair(merge.left, merge.right), merges.size()).second) continue;
    tokens.push_back(tokens[merge.left] + tokens[merge.right]);
    merges.push_back(merge);
  }
  const Bpe bpe(tokens, merges, {});
  for (int round = 0; round < 500; ++round) {
    std::string word(1 + random() % 200, 'a');
    for (char& c : word) c = static_cast<char>('a' + random() % 3);
    Ids wanted(word.begin(), word.end());
    for (;;) {
      size_t best = merges.size();
      size_t where = 0;
      for (size_t i = 0; i + 1 < wanted.size(); ++i) {
        const auto found = ranks.find({wanted[i], wanted[i + 1]});
        if (found != ranks.end() && found->second < best) std::tie(best, where) = std::pair(found->second, i);
      }
      if (best == merges.size()) break;
      wanted[where] = merges[best].result;
      wanted.erase(wanted.begin() + static_cast<std::ptrdiff_t>(where) + 1);
    }
    Ids ids;
    bpe.encode(word, ids);
    ASSERT_EQ(ids, wanted) << word;
  }
}

TEST_F(TokenizerTest, RoundTripOfRandomText) {
  const Tokenizer tokenizer = load(small_tokenizer());
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    const std::string text = random_utf8(random, random() % 300);
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
}

TEST_F(TokenizerTest, SpecialTokensInText) {
  const Tokenizer tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer.encode("ab<end>", true), (Ids{256, 262}));
  EXPECT_EQ(tokenizer.encode("ab<end>"), (Ids{256, '<', 'e', 'n', 'd', '>'}));
  EXPECT_TRUE(tokenizer.is_special(262));
  EXPECT_FALSE(tokenizer.is_special(256));
  EXPECT_FALSE(tokenizer.is_special(-1));
  const Ids ids = {256, 262, 'c', 5000, -1};
  EXPECT_EQ(tokenizer.decode(ids), "ab<end>c");
  EXPECT_EQ(tokenizer.decode(ids, true), "abc");
}

TEST_F(TokenizerTest, AddedTokens) {
  json j = small_tokenizer();
  j["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}};
  j["added_tokens"] = {added(262, "<a>", false),
                       added(263, "<a>b", false),
                       added(264, "[L]", false, {{"lstrip", true}}),
                       added(265, "[R]", false, {{"rstrip", true}}),
                       added(266, "word", false, {{"single_word", true}}),
                       added(267, "e\u0301", false, {{"normalized", true}}),
                       added(268, "e\u0301!", false)};
  const Tokenizer tokenizer = load(j);
  EXPECT_EQ(tokenizer.encode("<a><a>b"), (Ids{262, 263}));  // the longest
  EXPECT_EQ(tokenizer.encode("x \t[L] x"), (Ids{'x', 264, ' ', 'x'}));
  EXPECT_EQ(tokenizer.encode("x [R] \u3000x"), (Ids{'x', ' ', 265, 'x'}));
  EXPECT_EQ(tokenizer.encode("word-word"), (Ids{266, '-', 266}));
  EXPECT_EQ(tokenizer.encode("words"), (Ids{'w', 'o', 'r', 'd', 's'}));
  EXPECT_EQ(tokenizer.encode("\u00e9 word"), (Ids{267, ' ', 266}));
  EXPECT_EQ(tokenizer.encode("e\u0301"), Ids{267});
  EXPECT_EQ(tokenizer.encode("e\u0301!\u00e9!"), (Ids{268, 267, '!'}));
}

TEST_F(TokenizerTest, BytesWithoutToken) {
  json j = small_tokenizer();
  j["model"]["vocab"].erase("q");
  j["model"]["vocab"].erase("z");
  EXPECT_EQ(load(j).encode("aqbz"), Ids{256});  // left out, and what stood around them merges
  j["model"]["unk_token"] = "x";
  EXPECT_EQ(load(j).encode("aqzb"), (Ids{'a', 'x', 'x', 'b'}));
  j["model"]["fuse_unk"] = true;
  EXPECT_EQ(load(j).encode("aqzb"), (Ids{'a', 'x', 'b'}));
}

TEST_F(TokenizerTest, Settings) {
  json j = small_tokenizer();
  j["model"]["vocab"]["abca"] = 263;
  EXPECT_EQ(load(j).encode("abca"), (Ids{258, 'a'}));
  j["model"]["ignore_merges"] = true;
  EXPECT_EQ(load(j).encode("abca"), Ids{263});
  j = small_tokenizer();
  j["pre_tokenizer"] = byte_level(true, true);
  EXPECT_EQ(load(j).encode("a a"), (Ids{259, 259}));
  j["pre_tokenizer"] = byte_level(false, false);
  EXPECT_EQ(load(j).encode("0 a"), (Ids{'0', 259}));
  j["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers", {{{"type", "Digits"}, {"individual_digits", true}}, byte_level(false, true)}}};
  EXPECT_EQ(load(j).encode("00a"), (Ids{'0', '0', 'a'}));
  j["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false;
  EXPECT_EQ(load(j).encode("00a"), (Ids{260, 'a'}));
}

TEST_F(TokenizerTest, InvalidText) {
  const Tokenizer tokenizer = load(small_tokenizer());
  try {
    tokenizer.encode("ab\xFFz");
    FAIL();
  } catch (const DataError& e) {
    EXPECT_STREQ(e.what(), "text: invalid UTF-8 at byte 2");
  }
}

TEST_F(TokenizerTest, EndsOfText) {
  EXPECT_EQ(load(small_tokenizer()).eos_id(), std::nullopt);
  write("config.json", R"({"eos_token_id": 5})");
  EXPECT_EQ(load(small_tokenizer()).eos_id(), 5);
  write("generation_config.json", R"({"eos_token_id": [6, 7], "bos_token_id": 8})");
  EXPECT_EQ(load(small_tokenizer()).eos_id(), 6);
  write("tokenizer_config.json", R"({"eos_token": {"content": "<end>"}, "bos_token": null})");
  EXPECT_EQ(load(small_tokenizer()).eos_id(), 262);
  EXPECT_EQ(load(small_tokenizer()).bos_id(), std::nullopt);
  write("tokenizer_config.json", R"({"eos_token": "<none>"})");
  EXPECT_NE(refusal(folder_).find("tokenizer_config.json: eos_token: \"<none>\" is not in the vocabulary"),
            std::string::npos);
}

TEST_F(TokenizerTest, FingerprintIsOfTheMeaning) {
  const json j = small_tokenizer();
  const std::string fingerprint = load(j).fingerprint();
  EXPECT_EQ(fingerprint.size(), 64u);
  json same = j;
  same["model"]["merges"] = json::array();
  for (const std::string merge : j["model"]["merges"]) {
    same["model"]["merges"].push_back({merge.substr(0, merge.find(' ')), merge.substr(merge.find(' ') + 1)});
  }
  same["post_processor"] = nullptr;
  write("tokenizer.json", same.dump(2));
  EXPECT_EQ(Tokenizer::load(folder_ / "tokenizer.json").fingerprint(), fingerprint);
  for (const auto& [pointer, value] :
       std::initializer_list<std::pair<const char*, json>>{{"/model/vocab/new", 270},
                                                           {"/model/merges", {"a b"}},
                                                           {"/model/ignore_merges", true},
                                                           {"/normalizer", {{"type", "NFC"}}},
                                                           {"/pre_tokenizer/add_prefix_space", true},
                                                           {"/added_tokens/0/special", false}}) {
    json other = j;
    other[json::json_pointer(pointer)] = value;
    EXPECT_NE(load(other).fingerprint(), fingerprint) << pointer;
  }
}

TEST_F(TokenizerTest, NumbersAndDepthEnd) {
  write("tokenizer.json", R"({"model":1e999})");
  EXPECT_EQ(refusal(folder_),
            (folder_ / "tokenizer.json").string() + ": not valid JSON: a number is too large");
  std::string deep = R"({"normalizer":)";
  for (int i = 0; i < 100'000; ++i) deep += R"({"type":"Sequence","normalizers":[)";
  write("tokenizer.json", deep);
  EXPECT_NE(refusal(folder_).find("nested more than 100 deep"), std::string::npos);
}

// A pattern that gives up is an error of the tokenizer's file, whose text it quotes.
TEST_F(TokenizerTest, PatternsThatGiveUp) {
  json tokenizer = small_tokenizer();
  tokenizer["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"}, {"pattern", {{"Regex", "(a|aa)+[xy]"}}}, {"behavior", "Isolated"}},
        byte_level(false, false)}}};
  EXPECT_THROW(load(tokenizer).encode(std::string(60, 'a')), DataError);
}

json many_steps() {
  json steps(100, {{"type", "Digits"}});
  steps.push_back(byte_level(false, true));
  return steps;
}

TEST_F(TokenizerTest, MalformedOrUnsupported) {
  const std::tuple<const char*, json, const char*> cases[] = {
      {"/model/type", "Unigram", "model: type Unigram is not supported"},
      {"/model/byte_fallback", true, "model: byte_fallback is not supported"},
      {"/model/dropout", 0.1, "model.dropout: not supported"},
      {"/model/continuing_subword_prefix", "##", "model.continuing_subword_prefix: not supported"},
      {"/model/unk_token", "none", "model.unk_token: \"none\" is not in the vocabulary"},
      {"/model/vocab", json::array(), "model.vocab: wanted an object, got array"},
      {"/model/vocab/ab", "x", "model.vocab: id of \"ab\" is no integer"},
      {"/model/vocab/a\nb", "x", "model.vocab: id of \"a b\" is no integer"},
      {"/model/vocab/ab", -1, "id of \"ab\": wanted 0 to 1048575, got -1"},
      {"/model/vocab/ab", 1 << 30, "got 1073741824"},
      {"/model/vocab/ab", 97, "model.vocab: id 97 is given to both"},
      {"/model/vocab/ab", 1 << 20, "got 1048576"},
      {"/added_tokens/0/id", uint64_t{1} << 63, "added_tokens[0].id: is too large"},
      {"/pre_tokenizer",
       {{"type", "Sequence"}, {"pretokenizers", many_steps()}},
       "wanted at most 100 steps, got 101"},
      {"/model/merges", 1, "model.merges: wanted an array, got number"},
      {"/model/merges/0", "ab", "model.merges[0]: wanted two tokens"},
      {"/model/merges/0", "a b c", "model.merges[0]: wanted two tokens"},
      {"/model/merges/0", {"a"}, "model.merges[0]: wanted two tokens, got 1"},
      {"/model/merges/0", {"a", 1}, "model.merges[0][1]: wanted a string, got number"},
      {"/model/merges/0", "a zz", "model.merges[0]: \"zz\" is not in the vocabulary"},
      {"/model/merges/0", "a c", "model.merges[0]: \"ac\" is not in the vocabulary"},
      {"/model", nullptr, "\"model\" is missing"},
      {"/normalizer", {{"type", "Lowercase"}}, "normalizer: type Lowercase is not supported"},
      {"/normalizer", {{"type", 1}}, "normalizer.type: wanted a string"},
      {"/pre_tokenizer", nullptr, "\"pre_tokenizer\" is missing"},
      {"/pre_tokenizer", {{"type", "Whitespace"}}, "pre_tokenizer: type Whitespace is not supported"},
      {"/pre_tokenizer", {{"type", "Digits"}}, "wanted ByteLevel last"},
      {"/pre_tokenizer/use_regex", "yes", "pre_tokenizer.use_regex: wanted true or false, got string"},
      {"/pre_tokenizer",
       {{"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}},
       "pre_tokenizer.pattern.Regex: missing closing parenthesis at byte 2 of the pattern"},
      {"/pre_tokenizer",
       {{"type", "Split"}, {"pattern", {{"Regex", R"(\w+)"}}}, {"behavior", "Isolated"}},
       R"(pre_tokenizer.pattern.Regex: "\w" in the pattern is not supported)"},
      {"/pre_tokenizer",
       {{"type", "Split"}, {"pattern", {{"String", "a"}}}, {"behavior", "Other"}},
       "pre_tokenizer.behavior: \"Other\" is not supported"},
      {"/pre_tokenizer",
       {{"type", "Sequence"}, {"pretokenizers", {byte_level(false, true), {{"type", "Digits"}}}}},
       "pre_tokenizer.pretokenizers[1]: no pre-tokenizer is supported after ByteLevel"},
      {"/decoder", {{"type", "Metaspace"}}, "decoder: type Metaspace is not supported"},
      {"/post_processor", {{"type", "Other"}}, "post_processor: type Other is not supported"},
      {"/added_tokens/0/id", 97, "added_tokens[0]: id 97 is given to both \"a\" and \"<end>\""},
      {"/added_tokens/0/id", -4, "added_tokens[0]: id of \"<end>\" is -4"},
      {"/added_tokens/0/content", "ab", "added_tokens[0]: \"ab\" has id 262 here and 256 in the vocabulary"},
      {"/added_tokens/1", added(300, "<end>", true), "added_tokens[1]: \"<end>\" with id 300 repeats"},
  };
  for (const auto& [pointer, value, wanted] : cases) {
    json j = small_tokenizer();
    j[json::json_pointer(pointer)] = value;
    write("tokenizer.json", j.dump());
    const std::string message = refusal(folder_);
    EXPECT_TRUE(message.starts_with((folder_ / "tokenizer.json").string())) << message;
    EXPECT_NE(message.find(wanted), std::string::npos) << pointer << " = " << value << ": " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
  write("tokenizer.json", "{\"model\": ");
  EXPECT_NE(refusal(folder_).find("tokenizer.json: not valid JSON at byte"), std::string::npos);
  write("tokenizer.json", "[1]");
  EXPECT_NE(refusal(folder_).find("tokenizer.json: wanted an object, got array"), std::string::npos);
  fs::remove(folder_ / "tokenizer.json");
  EXPECT_NE(refusal(folder_).find("holds no tokenizer.json"), std::string::npos);
  EXPECT_NE(refusal(folder_ / "absent.json").find("absent.json"), std::string::npos);
}

std::string base64(const std::string& bytes) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t bits = 0;
    for (size_t j = i; j < i + 3; ++j)
      bits = bits << 8 | (j < bytes.size() ? static_cast<unsigned char>(bytes[j]) : 0);
    for (size_t j = 0; j < 4; ++j) {
      text += i + j > bytes.size() ? '=' : digits[bits >> (18 - 6 * j) & 63];
    }
  }
  return text;
}

// What byte pair encoding by ranks leaves of a token, by the definition.
std::vector<std::string> parts_by_ranks(const std::string& token,
                                        const std::map<std::string, int32_t>& ranks) {
  std::vector<std::string> parts;
  for (const char c : token) parts.emplace_back(1, c);
  while (parts.size() > 2) {
    size_t best = parts.size();
    int32_t lowest = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = ranks.find(parts[i] + parts[i + 1]);
      if (found == ranks.end() || (best < parts.size() && found->second >= lowest)) continue;
      best = i;
      lowest = found->second;
    }
    if (best == parts.size()) break;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  return parts;
}

TEST_F(TokenizerTest, MergesOfRanksAreThoseOfTheDefinition) {
  std::mt19937 random(5);
  size_t longest = 0, refused = 0;
  for (int round = 0; round < 20; ++round) {
    std::vector<std::string> tokens;
    std::map<std::string, int32_t> ranks;
    std::string text;
    const auto line = [](const std::string& token, size_t rank) {
      return base64(token) + " " + std::to_string(rank) + "\n";
    };
    const auto add = [&](const std::string& token) {
      text += line(token, tokens.size());
      ranks[token] = static_cast<int32_t>(tokens.size());
      tokens.push_back(token);
    };
    for (int b = 0; b < 256; ++b) add(std::string(1, static_cast<char>(b)));
    std::vector<std::array<int32_t, 3>> wanted;
    while (wanted.size() < 60) {  // of two letters, the later ones long
      const auto pick = [&] {
        if (wanted.empty() || random() % 3 == 0) return std::string(1, static_cast<char>('a' + random() % 2));
        return tokens[tokens.size() - 1 - random() % std::min<size_t>(wanted.size(), 12)];
      };
      const std::string token = pick() + pick();
      if (ranks.contains(token) || token.size() > 600) continue;
      const std::vector<std::string> parts = parts_by_ranks(token, ranks);
      if (parts.size() == 2) {
        wanted.push_back({ranks.at(parts[0]), ranks.at(parts[1]), static_cast<int32_t>(tokens.size())});
        longest = std::max(longest, token.size());
        add(token);
      } else if (++refused < 40) {
        write("x.tiktoken", text + line(token, tokens.size()));
        EXPECT_NE(refusal(folder_ / "x.tiktoken").find("leave " + std::to_string(parts.size()) + " parts"),
                  std::string::npos);
      }
    }
    write("x.tiktoken", text);
    std::vector<std::array<int32_t, 3>> merges;
    for (const Merge& m : read_tiktoken(folder_ / "x.tiktoken").merges)
      merges.push_back({m.left, m.right, m.result});
    EXPECT_EQ(merges, wanted);
  }
  EXPECT_GT(longest, 200);
  EXPECT_GT(refused, 10);
}

TEST_F(TokenizerTest, AddedTokenThatRepeatsAnyBeforeItNamesTheFirst) {
  json j = small_tokenizer();
  j["added_tokens"] = json::array();
  const auto name = [](int i) { return std::string(1, '<').append(std::to_string(i)).append(">"); };
  for (int i = 0; i < 20; ++i) j["added_tokens"].push_back(added(300 + i, name(i), true));
  load(j);
  for (const auto& [id, content, before] :
       {std::tuple{9000, name(7), 7}, {308, "<new>", 8}, {309, name(4), 4}, {304, name(9), 4}}) {
    json repeated = j;
    repeated["added_tokens"].push_back(added(id, content, true));
    write("tokenizer.json", repeated.dump());
    std::ostringstream wanted;
    wanted << "added_tokens[20]: \"" << content << "\" with id " << id << " repeats \"" << name(before)
           << "\" with id " << 300 + before;
    EXPECT_NE(refusal(folder_).find(wanted.str()), std::string::npos) << refusal(folder_);
  }
}

TEST_F(TokenizerTest, MalformedTiktokenAndGpt2Files) {
  for (const auto& [text, wanted] :
       {std::pair{"YQ==\n", ":1: wanted a token in base64, a space and its rank"},
        std::pair{"YQ== 0\nY* 1\n", ":2: wanted a token in base64"},
        std::pair{"YQ== 1\n", ":1: wanted rank 0, got 1"}, std::pair{"YQ== 0\n", ": byte 0 has no rank"}}) {
    write("x.tiktoken", text);
    EXPECT_NE(refusal(folder_).find("x.tiktoken" + std::string(wanted)), std::string::npos)
        << refusal(folder_);
  }
  write("vocab.json", R"({"a": 0, "b": 1, "ab": 2})");
  write("merges.txt", "#version: 0.2\na b\nb a\n");
  EXPECT_NE(refusal(folder_).find("merges.txt:3: \"ba\" is not in the vocabulary"), std::string::npos)
      << refusal(folder_);
  write("merges.txt", "#version: 0.2\na b\n");
  EXPECT_EQ(Tokenizer::load(folder_).encode("ab"), Ids{2});
  write("tokenizer_config.json", R"({"tokenizer_class": "Qwen2Tokenizer"})");
  EXPECT_NE(refusal(folder_).find("tokenizer_class: vocab.json and merges.txt are read as GPT-2's"),
            std::string::npos);
}

struct Sample {
  std::string text;
  Ids ids;
};

void expect_ids(const Tokenizer& tokenizer, const std::vector<Sample>& samples) {
  for (const Sample& sample : samples) EXPECT_EQ(tokenizer.encode(sample.text), sample.ids) << sample.text;
}

// Expected ids by Hugging Face's tokenizers 0.23.
TEST_F(TokenizerTest, Gpt2) {
  if (!fs::exists(kShared)) GTEST_SKIP() << "../shared is absent";
  const Tokenizer tokenizer = Tokenizer::load(kShared / "gpt2.vocab.json");
  EXPECT_EQ(tokenizer.vocab_size(), 50257);
  EXPECT_EQ(tokenizer.eos_id(), 50256);
  expect_ids(
      tokenizer,
      {
          {"def fib(n):\012    return n if n < 2 else fib(n-1) + fib(n-2)\012",
           {4299, 12900, 7, 77, 2599, 198, 220, 220,  220,   1441, 299, 611, 299, 1279, 362,
            2073, 12900, 7, 77, 12,   16,  8,   1343, 12900, 7,    77,  12,  17,  8,    198}},
          {"fn main() { println!(\042{}\042, 12345); }",
           {22184, 1388, 3419, 1391, 44872, 0, 7203, 90, 92, 1600, 17031, 2231, 1776, 1782}},
          {"I'm, you're; WE'LL DON'T 'tis it'\305\277",
           {40, 1101, 11, 345, 821, 26, 12887, 6, 3069, 23917, 6, 51, 705, 48010, 340, 6, 129, 123}},
          {"  \011\015\012\015\012  x \012", {220, 220, 197, 201, 198, 201, 198, 220, 2124, 220, 198}},
          {"e\314\201te\314\201 \303\251t\303\251", {68, 136, 223, 660, 136, 223, 220, 25125, 2634}},
          {"\344\270\255\346\226\207\345\255\227\347\254\246 \346\227\245\346\234\254\350\252\236 "
           "\355\225\234\352\265\255\354\226\264",
           {40792, 23877, 229, 27764, 245,   163, 105, 99,  10545, 245, 98,  17312,
            105,   45739, 252, 220,   47991, 250, 166, 113, 255,   168, 244, 112}},
          {"\360\237\221\250\342\200\215\360\237\221\251\342\200\215\360\237\221\247\342\200\215\360\237\221"
           "\246\360\237\217\275",
           {41840, 101, 447, 235, 41840, 102, 447, 235, 41840, 100, 447, 235, 41840, 99, 8582, 237, 121}},
          {"\302\240\343\200\200a\341\240\216b", {1849, 5099, 222, 64, 157, 254, 236, 65}},
          {"\331\243\331\244\331\245 1/2 \302\262\302\263 \342\205\247",
           {149, 96, 149, 97, 149, 98, 352, 14, 17, 1587, 110, 126, 111, 2343, 227, 100}},
          {"<|endoftext|>x<|im_start|>",
           {27, 91, 437, 1659, 5239, 91, 29, 87, 27, 91, 320, 62, 9688, 91, 29}},
          {"\340\244\205\340\244\250\340\245\201\340\244\232\340\245\215\340\244\233\340\245\207\340\244\246 "
           "\340\270\227\340\270\265\340\271\210",
           {11976, 227, 11976, 101, 24231, 223,   11976, 248,   24231, 235,   11976, 249,
            24231, 229, 11976, 99,  220,   19567, 245,   19567, 113,   31479, 230}},
          {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
           {24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794,
            24794, 24794, 24794, 7252}},
          {"\341\206\250\341\204\205\341\205\245\341\206\247 \360\220\265\212\360\236\227\261",
           {157, 228, 101, 157, 226, 227, 157, 227, 98,  157, 228,
            100, 220, 172, 238, 113, 232, 172, 252, 245, 109}},
      });
  std::mt19937 random(2);
  for (int i = 0; i < 200; ++i) {
    const std::string text = random_utf8(random, random() % 400);
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
  // The same tokenizer written as tokenizer.json is the same tokenizer.
  json j = small_tokenizer();
  j["model"]["vocab"] = json::parse(read_text(kShared / "gpt2.vocab.json"));
  j["model"]["merges"] = json::array();
  std::istringstream merges(read_text(kShared / "gpt2.merges.txt"));
  for (std::string line; std::getline(merges, line);) j["model"]["merges"].push_back(line);
  j["added_tokens"] = {added(50256, "<|endoftext|>", true)};
  const Tokenizer same = load(j);
  EXPECT_EQ(same.fingerprint(), tokenizer.fingerprint());
  EXPECT_EQ(same.eos_id(), 50256);
}

TEST_F(TokenizerTest, Qwen) {
  if (!fs::exists(kShared)) GTEST_SKIP() << "../shared is absent";
  const Tokenizer tokenizer = Tokenizer::load(kShared / "qwen.tiktoken");
  EXPECT_EQ(tokenizer.vocab_size(), 151646);
  EXPECT_EQ(tokenizer.eos_id(), 151643);
  EXPECT_EQ(tokenizer.encode("<|endoftext|>x<|im_start|>", true), (Ids{151643, 87, 151644}));
  expect_ids(
      tokenizer,
      {
          {"def fib(n):\012    return n if n < 2 else fib(n-1) + fib(n-2)\012",
           {750, 15801, 1445, 982, 262, 470, 308, 421,   308,  366, 220, 17,
            770, 15801, 1445, 12,  16,  8,   488, 15801, 1445, 12,  17,  340}},
          {"fn main() { println!(\042{}\042, 12345); }",
           {8822, 1887, 368, 314, 13751, 79878, 220, 16, 17, 18, 19, 20, 1215, 335}},
          {"I'm, you're; WE'LL DON'T 'tis it'\305\277",
           {40, 2776, 11, 498, 2299, 26, 19677, 6, 4086, 44273, 17323, 364, 83, 285, 432, 6, 144815}},
          {"  \011\015\012\015\012  x \012", {19271, 871, 220, 856, 715}},
          {"e\314\201te\314\201 \303\251t\303\251", {38783, 23639}},
          {"\344\270\255\346\226\207\345\255\227\347\254\246 \346\227\245\346\234\254\350\252\236 "
           "\355\225\234\352\265\255\354\226\264",
           {104811, 48391, 75402, 21894, 102819, 130092, 31079}},
          {"\360\237\221\250\342\200\215\360\237\221\251\342\200\215\360\237\221\247\342\200\215\360\237\221"
           "\246\360\237\217\275",
           {145367, 378, 235, 145233, 378, 235, 145665, 378, 235, 145988, 145375}},
          {"\302\240\343\200\200a\341\240\216b", {4102, 22441, 64, 123970, 236, 65}},
          {"\331\243\331\244\331\245 1/2 \302\262\302\263 \342\205\247",
           {149, 96, 149, 97, 149, 98, 220, 16, 14, 17, 220, 29456, 43201, 220, 70467, 100}},
          {"<|endoftext|>x<|im_start|>", {27, 91, 8691, 723, 427, 91, 29, 87, 27, 91, 318, 4906, 91, 29}},
          {"\340\244\205\340\244\250\340\245\201\340\244\232\340\245\215\340\244\233\340\245\207\340\244\246 "
           "\340\270\227\340\270\265\340\271\210",
           {146378, 60096, 72653, 146113, 30484, 249, 54784, 99, 220, 35884, 47171}},
          {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
           {69440, 69440, 69440, 69440, 69440, 69440, 69440, 69440, 28458, 5305}},
          {"\341\206\250\341\204\205\341\205\245\341\206\247 \360\220\265\212\360\236\227\261",
           {147979, 60294, 124137, 100, 220, 123934, 113, 232, 172, 252, 245, 109}},
      });
  // Threads share one tokenizer.
  std::mt19937 random(4);
  const std::string text = random_utf8(random, 20000);
  const Ids wanted = tokenizer.encode(text);
  std::vector<Ids> ids(4);
  std::vector<std::thread> threads;
  for (Ids& out : ids) threads.emplace_back([&out, tokenizer, &text] { out = tokenizer.encode(text); });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& out : ids) EXPECT_EQ(out, wanted);
}

TEST_F(TokenizerTest, QwenStyleJson) {
  json j = small_tokenizer();
  j["normalizer"] = {{"type", "NFC"}};
  j["pre_tokenizer"] = {{"type", "Sequence"},
                        {"pretokenizers",
                         {{{"type", "Split"},
                           {"pattern", {{"Regex", kQwenPattern}}},
                           {"behavior", "Isolated"},
                           {"invert", false}},
                          byte_level(false, false)}}};
  const Tokenizer tokenizer = load(j);
  EXPECT_EQ(tokenizer.encode("0000"), (Ids{'0', '0', '0', '0'}));  // digits one by one
  EXPECT_EQ(tokenizer.encode("e\u0301"), (Ids{0xC3, 0xA9}));
  EXPECT_EQ(tokenizer.encode(" abc\n"), (Ids{' ', 258, 10}));
}

}  // namespace
}  // namespace hymoe
