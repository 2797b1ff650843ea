#include <random>
#include <sstream>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "data/tokenizer_spec.h"
#include "data/tokenizers.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

const fs::path kShared = fs::path(HYMOE_SOURCE_DIR) / ".." / "shared" / "data" / "tokenizers";

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

TEST_F(TokenizerTest, Gpt2FilesWithAddedTokens) {
  json vocab;
  for (int b = 0; b < 256; ++b) vocab[characters_of_bytes(std::string(1, static_cast<char>(b)))] = b;
  write("vocab.json", vocab.dump());
  write("merges.txt", "#version: 0.2\n");
  write("added_tokens.json", R"({"<|im_start|>": 256, "<more>": 257, "<pad>": 258})");
  write("special_tokens_map.json", R"({"pad_token": {"content": "<pad>"}})");
  write("tokenizer_config.json",
        R"({"added_tokens_decoder": {"256": {"content": "<|im_start|>", "special": true, "lstrip": true}}})");
  const Tokenizer tokenizer = Tokenizer::load(folder_);
  EXPECT_EQ(tokenizer.encode("a <|im_start|><more><pad>", true), (Ids{'a', 256, 257, 258}));
  EXPECT_EQ(tokenizer.encode("<more>"), Ids{257});
  EXPECT_EQ(tokenizer.encode("<pad>").size(), 5u);  // special: text unless allowed
  EXPECT_EQ(tokenizer.decode(Ids{256, 257, 258}, true), "<more>");
  write("added_tokens.json", R"({"<|im_start|>": 255})");
  EXPECT_NE(refusal(folder_).find("\"<|im_start|>\""), std::string::npos) << refusal(folder_);
  write("added_tokens.json", R"({"<|im_start|>": "x"})");
  EXPECT_NE(refusal(folder_).find("added_tokens.json: <|im_start|>: wanted an integer"), std::string::npos)
      << refusal(folder_);
  write("tokenizer_config.json", R"({"added_tokens_decoder": {"x": {"content": "y"}}})");
  EXPECT_NE(refusal(folder_).find("added_tokens_decoder.x: wanted the id of a token as key"),
            std::string::npos)
      << refusal(folder_);
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

}  // namespace
}  // namespace hymoe
