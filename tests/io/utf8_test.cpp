#include "hymoe/io/utf8.h"

#include <string>

#include <gtest/gtest.h>

namespace hymoe {
namespace {

std::string encode(uint32_t code) {
  std::string text;
  if (code < 0x80) {
    text += static_cast<char>(code);
  } else if (code < 0x800) {
    text += static_cast<char>(0xC0 | code >> 6);
    text += static_cast<char>(0x80 | (code & 63));
  } else if (code < 0x10000) {
    text += static_cast<char>(0xE0 | code >> 12);
    text += static_cast<char>(0x80 | (code >> 6 & 63));
    text += static_cast<char>(0x80 | (code & 63));
  } else {
    text += static_cast<char>(0xF0 | code >> 18);
    text += static_cast<char>(0x80 | (code >> 12 & 63));
    text += static_cast<char>(0x80 | (code >> 6 & 63));
    text += static_cast<char>(0x80 | (code & 63));
  }
  return text;
}

TEST(Utf8Test, TakesEveryScalarValueAndNoOther) {
  for (uint32_t code = 0; code < 0x120000; ++code) {
    const bool scalar = code < 0xD800 || (code >= 0xE000 && code <= 0x10FFFF);
    ASSERT_EQ(is_valid_utf8(encode(code)), scalar) << std::hex << code;
  }
}

TEST(Utf8Test, RefusesTruncatedOverlongAndStray) {
  for (const uint32_t code : {0xE4u, 0x20ACu, 0x1F600u}) {
    const std::string whole = encode(code);
    for (size_t cut = 1; cut < whole.size(); ++cut) {
      EXPECT_FALSE(is_valid_utf8(whole.substr(0, cut)));
      EXPECT_FALSE(is_valid_utf8(whole.substr(0, cut) + "a"));
      EXPECT_FALSE(is_valid_utf8(whole.substr(cut)));
    }
  }
  for (const char* bad :
       {"\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xF0\x8F\xBF\xBF", "\xF8\x88\x80\x80\x80", "\xFE", "\xFF"}) {
    EXPECT_EQ(find_invalid_utf8(bad), 0u);
  }
}

TEST(Utf8Test, FindsTheFirstBadByteAtEveryPosition) {
  EXPECT_EQ(find_invalid_utf8(""), std::string_view::npos);
  for (size_t size = 1; size < 70; ++size) {
    const std::string good(size, 'a');
    ASSERT_TRUE(is_valid_utf8(good));
    for (size_t i = 0; i < size; ++i) {
      std::string bad = good;
      bad[i] = '\x80';
      ASSERT_EQ(find_invalid_utf8(bad), i);
      const std::string wide = good.substr(0, i) + "\xE2\x82\xAC" + good.substr(i);
      ASSERT_TRUE(is_valid_utf8(wide));
      ASSERT_EQ(find_invalid_utf8(wide + "\xE2\x82"), wide.size());
    }
  }
}

TEST(LooksBinaryTest, LooksAtTheFirst8KiB) {
  EXPECT_FALSE(looks_binary(""));
  EXPECT_FALSE(looks_binary("text"));
  std::string text(10'000, 'a');
  text[8192] = '\0';
  EXPECT_FALSE(looks_binary(text));
  text[8191] = '\0';
  EXPECT_TRUE(looks_binary(text));
}

}  // namespace
}  // namespace hymoe
