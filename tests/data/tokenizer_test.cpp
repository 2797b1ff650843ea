#include "hymoe/data/tokenizer.h"

#include <random>
#include <sstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "data/bpe.h"
#include "data/tokenizer_spec.h"
#include "data/tokenizers.h"

namespace hymoe {
namespace {

const char* const kQwenPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

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

TEST_F(TokenizerTest, PromptsBeginAsThePostProcessorSays) {
  json j = small_tokenizer();
  EXPECT_EQ(load(j).encode_prompt("a"), Ids{'a'});
  const json tokens{{"<a>", {{"id", "<a>"}, {"ids", {7}}, {"tokens", {"<a>"}}}},
                    {"<z>", {{"id", "<z>"}, {"ids", {8}}, {"tokens", {"<z>"}}}}};
  const auto special = [](const char* id) { return json{{"SpecialToken", {{"id", id}, {"type_id", 0}}}}; };
  const json text{{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  j["post_processor"] = {{"type", "Sequence"},
                         {"processors",
                          {{{"type", "ByteLevel"}},
                           {{"type", "TemplateProcessing"},
                            {"single", {special("<a>"), text, special("<z>")}},
                            {"special_tokens", tokens}}}}};
  const Tokenizer tokenizer = load(j);
  EXPECT_EQ(tokenizer.encode_prompt("a"), (Ids{7, 'a'}));
  EXPECT_EQ(tokenizer.encode_prompt("\x07"
                                    "a"),
            (Ids{7, 'a'}));  // it stands there
  EXPECT_EQ(tokenizer.encode_prompt(""), Ids{7});
  EXPECT_EQ(tokenizer.encode("a"), Ids{'a'});
  j["post_processor"] = {{"type", "RobertaProcessing"}, {"cls", {"<a>", 7}}, {"sep", {"<z>", 8}}};
  EXPECT_EQ(load(j).encode_prompt("a"), (Ids{7, 'a'}));
  j["post_processor"] = {
      {"type", "TemplateProcessing"}, {"single", {special("<b>"), text}}, {"special_tokens", tokens}};
  write("tokenizer.json", j.dump());
  EXPECT_NE(refusal(folder_).find("\"<b>\" is missing"), std::string::npos) << refusal(folder_);
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
