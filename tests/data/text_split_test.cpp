#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "data/text_split.h"
#include "data/unicode.h"

namespace hymoe {
namespace {

using Behavior = SplitStep::Behavior;
using Words = std::vector<std::string>;

Words split(std::vector<SplitStep> steps, std::string_view text) {
  Words words;
  TextSplitter(std::move(steps)).split(text, [&](std::string_view word) { words.emplace_back(word); });
  return words;
}

SplitStep step(std::string_view pattern, Behavior behavior, bool invert, bool literal = false) {
  SplitStep step = SplitStep::regex(pattern, behavior);
  step.invert = invert;
  if (literal) step.kind = SplitStep::Kind::kLiteral;
  return step;
}

std::string utf8(char32_t c) {
  const auto byte = [](char32_t value) { return static_cast<char>(value); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xC0 | c >> 6), byte(0x80 | (c & 0x3F))};
  if (c < 0x10000) return {byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F))};
  return {byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 0x3F)), byte(0x80 | (c >> 6 & 0x3F)),
          byte(0x80 | (c & 0x3F))};
}

// Expected words as Hugging Face's tokenizers 0.23 cut them.
TEST(TextSplit, Behaviors) {
  struct Case {
    std::string_view pattern;
    bool literal;
    Behavior behavior;
    bool invert;
    std::string text;
    Words words;
  };
  const Case cases[] = {
      {R"(\d+)", false, Behavior::kIsolated, false, "ab12 3c45", {"ab", "12", " ", "3", "c", "45"}},
      {R"(\d+)", false, Behavior::kRemoved, false, "ab12 3c45", {"ab", " ", "c"}},
      {R"(\d+)", false, Behavior::kRemoved, true, "ab12 3c45", {"12", "3", "45"}},
      {R"(\d+)", false, Behavior::kMergedWithPrevious, false, "ab12 3c45", {"ab12", " 3", "c45"}},
      {R"(\d+)", false, Behavior::kMergedWithPrevious, true, "ab12 3c45", {"ab", "12 ", "3c", "45"}},
      {R"(\d+)", false, Behavior::kMergedWithNext, false, "ab12 3c45", {"ab", "12 ", "3c", "45"}},
      {R"(\d+)", false, Behavior::kMergedWithNext, true, "12ab", {"12", "ab"}},
      {"x*", false, Behavior::kIsolated, false, "axxbaa\u00e9", {"a", "xx", "b", "a", "a", "\u00e9"}},
      {"x*", false, Behavior::kRemoved, false, "axxbaa\u00e9", {"a", "b", "a", "a", "\u00e9"}},
      {"x*", false, Behavior::kMergedWithPrevious, false, "axxbaa\u00e9", {"axx", "b", "a", "a", "\u00e9"}},
      {"a", true, Behavior::kIsolated, false, "axxbaa\u00e9", {"a", "xxb", "a", "a", "\u00e9"}},
      {"a", true, Behavior::kMergedWithPrevious, false, "axxbaa\u00e9", {"a", "xxba", "a", "\u00e9"}},
      {"a", true, Behavior::kMergedWithNext, false, "axxbaa\u00e9", {"axxb", "a", "a\u00e9"}},
      {"a", true, Behavior::kContiguous, false, "axxbaa\u00e9", {"a", "xxb", "aa", "\u00e9"}},
      {"a.", true, Behavior::kIsolated, false, "aba.b", {"ab", "a.", "b"}},
      {"", true, Behavior::kIsolated, false, "ab", {"ab"}},
      {"a", true, Behavior::kRemoved, false, "aaa", {}},
      {"a", true, Behavior::kIsolated, false, "", {}},
  };
  for (const Case& c : cases) {
    EXPECT_EQ(split({step(c.pattern, c.behavior, c.invert, c.literal)}, c.text), c.words)
        << c.pattern << " " << static_cast<int>(c.behavior) << " " << c.invert << " " << c.text;
  }
}

TEST(TextSplit, StepsSeeOnlyTheirPiece) {
  // The look-ahead ends with the piece that the first step left.
  EXPECT_EQ(split({SplitStep::regex(R"(\d)"), SplitStep::regex(R"(\s+(?!\S)|\s+)")}, "a  1  b"),
            (Words{"a", "  ", "1", " ", " ", "b"}));
  EXPECT_EQ(split({SplitStep::regex(R"(\d)"), {.kind = SplitStep::Kind::kPrefixSpace}}, "a1 b"),
            (Words{" a", " 1", " b"}));
}

// Counts of Unicode 16, whatever version the libraries have.
TEST(TextSplit, CategoriesOfAllCodePoints) {
  std::string all;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c < 0xD800 || c > 0xDFFF) all += utf8(c);
  }
  const auto count = [&](std::string_view pattern) {
    return split({step(pattern, Behavior::kRemoved, true)}, all).size();
  };
  EXPECT_EQ(count(R"(\p{L})"), 141028u);
  EXPECT_EQ(count(R"(\p{Lu})"), 1858u);
  EXPECT_EQ(count(R"(\p{N})"), 1911u);
  EXPECT_EQ(count(R"(\p{M})"), 2501u);
  EXPECT_EQ(count(R"(\p{P})"), 855u);
  EXPECT_EQ(count(R"(\p{S})"), 8514u);
  EXPECT_EQ(count(R"(\s)"), 25u);
  EXPECT_EQ(count(R"((?i:s))"), 3u);
}

TEST(TextSplit, RefusedPatterns) {
  for (const char* pattern :
       {"^a",       "a$",        R"(\bx)", R"(\w+)", R"(\h)", R"(\p{Han})", R"(\pL)",  R"(a{1,2}+)",
        R"(a{,2})", "[a[b]]",    "[a&&b]", "[]a]",   "(?i)a", "(?<n>a)",    R"(\x41)", R"((?i:\p{Lu}))",
        "(?i:ss)",  "(*ACCEPT)", "(a",     "[a",     "a**",   "\\"}) {
    EXPECT_THROW(split({SplitStep::regex(pattern)}, "a"), std::invalid_argument) << pattern;
  }
  // cl100k and o200k, which other byte-level tokenizers split by
  for (
      const char* pattern :
      {R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)",
       R"([\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'re)?|[\p{Lu}\p{Lt}\p{M}]+[\p{Ll}\p{M}]*(?i:'s|'re)?|\p{N}{1,3}|\s+)"}) {
    EXPECT_EQ(unsupported_in_pattern(pattern), "");
  }
}

TEST(TextSplit, Nfc) {
  const auto nfc = [](std::string_view text) {
    std::string buffer;
    return std::string(to_nfc(text, buffer));
  };
  const std::pair<std::string, std::string> cases[] = {
      {"", ""},
      {"plain", "plain"},
      {"caf\u00e9 e\u0301", "caf\u00e9 \u00e9"},
      {"xe\u0301\u0323y", "x\u1eb9\u0301y"},
      {"\u0301a", "\u0301a"},
      {"\u1112\u1161\u11ab", "\ud55c"},
      {"\ub5a0\u11a7", "\ub5a0\u11a7"},                // no final: U+11A7 stays
      {"\u212b\u2126\uf900", "\u00c5\u03a9\u8c48"},    // singletons
      {"q\u0301\u1abf\u0316", "q\u0301\u1abf\u0316"},  // a mark newer than the tables is not reordered
      {"q\u0301\u0316", "q\u0316\u0301"},
  };
  for (const auto& [text, wanted] : cases) EXPECT_EQ(nfc(text), wanted) << text;
}

}  // namespace
}  // namespace hymoe
