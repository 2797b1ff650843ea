#include <string>

#include <gtest/gtest.h>

#include "eval/text_stream.h"

namespace hymoe {
namespace {

// Feeds byte by byte; a "|" stands between calls that made something certain.
std::string stream(const std::string& bytes, std::vector<std::string> stop = {}) {
  TextStream text(std::move(stop));
  std::string seen, joined;
  const auto take = [&] {
    const std::string_view piece = text.take();
    joined += piece;
    if (piece.empty()) return;
    if (!seen.empty()) seen += '|';
    seen += piece;
  };
  bool stopped = false;
  for (const char c : bytes) {
    stopped = text.push({&c, 1});
    take();
    if (stopped) break;
  }
  if (!stopped) text.finish();
  take();
  EXPECT_EQ(joined, text.text());
  if (stopped) seen += '!';
  return seen;
}

TEST(TextStream, GivesWholeCharacters) {
  EXPECT_EQ(stream("aé€😀b"), "a|é|€|😀|b");
  EXPECT_EQ(stream(""), "");
}

TEST(TextStream, ReplacesWhatIsNoUtf8) {
  EXPECT_EQ(stream("a\xFFz"), "a|\uFFFD|z");
  EXPECT_EQ(stream("\xE2\x82"), "\uFFFD");
  EXPECT_EQ(stream("\xE2\x82z"), "\uFFFD\uFFFDz");
  EXPECT_EQ(stream("\x80\xC3"), "\uFFFD|\uFFFD");
}

TEST(TextStream, HoldsBackWhatMayBeginAStopText) {
  EXPECT_EQ(stream("a\n\ndef f", {"\n\ndef"}), "a!");
  EXPECT_EQ(stream("a\n\ndog", {"\n\ndef"}), "a|\n\ndo|g");
  EXPECT_EQ(stream("x\n", {"\n#"}), "x|\n");
  EXPECT_EQ(stream("aab", {"ab"}), "a!");
  EXPECT_EQ(stream("ü!", {"!", "?"}), "ü!");
  EXPECT_EQ(stream("abc", {"bc", "abcd", "b"}), "a!");
}

TEST(TextStream, FirstStopTextWins) {
  TextStream text({"three", "two"});
  EXPECT_TRUE(text.push("one two three"));
  EXPECT_EQ(text.text(), "one ");
}

}  // namespace
}  // namespace hymoe
