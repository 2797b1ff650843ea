#include "data/unicode.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <iterator>
#include <stdexcept>
#include <vector>

#include <utf8proc.h>

namespace hymoe {
namespace {

enum Category : uint8_t { Lu, Ll, Lm, Lo, Mn, Mc, Nd, No, Pd, Po, Sm, So, Cf };

// A code point of each category, three bytes long and four bytes long (0: none is needed), old enough for
// every version and seldom named by a pattern.
struct StandIns {
  char32_t three, four;
};
constexpr StandIns kStandIns[] = {
    {0xA722, 0x10400}, {0xA723, 0x10428}, {0, 0x16B40},      {0xA000, 0x10450}, {0x302A, 0x101FD},
    {0x0903, 0x11000}, {0, 0x104A0},      {0, 0x10107},      {0, 0x10EAD},      {0x2016, 0x10100},
    {0, 0x1D6C1},      {0x2300, 0x10137}, {0x200B, 0x110BD},
};

struct Range {
  char32_t first, last;
  Category category;
};

// Where UnicodeData.txt of version 16 differs from that of version 14, and U+180E.
constexpr Range kNewer[] = {
    {0x897, 0x897, Mn},     {0xCF3, 0xCF3, Mc},     {0xECE, 0xECE, Mn},     {0x180E, 0x180E, Cf},
    {0x1B4E, 0x1B4F, Po},   {0x1B7F, 0x1B7F, Po},   {0x1C89, 0x1C89, Lu},   {0x1C8A, 0x1C8A, Ll},
    {0x2427, 0x2429, So},   {0x2FFC, 0x2FFF, So},   {0x31E4, 0x31E5, So},   {0x31EF, 0x31EF, So},
    {0xA7CB, 0xA7CC, Lu},   {0xA7CD, 0xA7CD, Ll},   {0xA7DA, 0xA7DA, Lu},   {0xA7DB, 0xA7DB, Ll},
    {0xA7DC, 0xA7DC, Lu},   {0x105C0, 0x105F3, Lo}, {0x10D40, 0x10D49, Nd}, {0x10D4A, 0x10D4D, Lo},
    {0x10D4E, 0x10D4E, Lm}, {0x10D4F, 0x10D4F, Lo}, {0x10D50, 0x10D65, Lu}, {0x10D69, 0x10D6D, Mn},
    {0x10D6E, 0x10D6E, Pd}, {0x10D6F, 0x10D6F, Lm}, {0x10D70, 0x10D85, Ll}, {0x10D8E, 0x10D8F, Sm},
    {0x10EC2, 0x10EC4, Lo}, {0x10EFC, 0x10EFF, Mn}, {0x1123F, 0x11240, Lo}, {0x11241, 0x11241, Mn},
    {0x11380, 0x11389, Lo}, {0x1138B, 0x1138B, Lo}, {0x1138E, 0x1138E, Lo}, {0x11390, 0x113B5, Lo},
    {0x113B7, 0x113B7, Lo}, {0x113B8, 0x113BA, Mc}, {0x113BB, 0x113C0, Mn}, {0x113C2, 0x113C2, Mc},
    {0x113C5, 0x113C5, Mc}, {0x113C7, 0x113CA, Mc}, {0x113CC, 0x113CD, Mc}, {0x113CE, 0x113CE, Mn},
    {0x113CF, 0x113CF, Mc}, {0x113D0, 0x113D0, Mn}, {0x113D1, 0x113D1, Lo}, {0x113D2, 0x113D2, Mn},
    {0x113D3, 0x113D3, Lo}, {0x113D4, 0x113D5, Po}, {0x113D7, 0x113D8, Po}, {0x113E1, 0x113E2, Mn},
    {0x116D0, 0x116E3, Nd}, {0x1171E, 0x1171E, Mc}, {0x11B00, 0x11B09, Po}, {0x11BC0, 0x11BE0, Lo},
    {0x11BE1, 0x11BE1, Po}, {0x11BF0, 0x11BF9, Nd}, {0x11F00, 0x11F01, Mn}, {0x11F02, 0x11F02, Lo},
    {0x11F03, 0x11F03, Mc}, {0x11F04, 0x11F10, Lo}, {0x11F12, 0x11F33, Lo}, {0x11F34, 0x11F35, Mc},
    {0x11F36, 0x11F3A, Mn}, {0x11F3E, 0x11F3F, Mc}, {0x11F40, 0x11F40, Mn}, {0x11F41, 0x11F41, Mc},
    {0x11F42, 0x11F42, Mn}, {0x11F43, 0x11F4F, Po}, {0x11F50, 0x11F59, Nd}, {0x11F5A, 0x11F5A, Mn},
    {0x1342F, 0x1342F, Lo}, {0x13439, 0x1343F, Cf}, {0x13440, 0x13440, Mn}, {0x13441, 0x13446, Lo},
    {0x13447, 0x13455, Mn}, {0x13460, 0x143FA, Lo}, {0x16100, 0x1611D, Lo}, {0x1611E, 0x16129, Mn},
    {0x1612A, 0x1612C, Mc}, {0x1612D, 0x1612F, Mn}, {0x16130, 0x16139, Nd}, {0x16D40, 0x16D42, Lm},
    {0x16D43, 0x16D6A, Lo}, {0x16D6B, 0x16D6C, Lm}, {0x16D6D, 0x16D6F, Po}, {0x16D70, 0x16D79, Nd},
    {0x18CFF, 0x18CFF, Lo}, {0x1B132, 0x1B132, Lo}, {0x1B155, 0x1B155, Lo}, {0x1CC00, 0x1CCEF, So},
    {0x1CCF0, 0x1CCF9, Nd}, {0x1CD00, 0x1CEB3, So}, {0x1D2C0, 0x1D2D3, No}, {0x1DF25, 0x1DF2A, Ll},
    {0x1E030, 0x1E06D, Lm}, {0x1E08F, 0x1E08F, Mn}, {0x1E4D0, 0x1E4EA, Lo}, {0x1E4EB, 0x1E4EB, Lm},
    {0x1E4EC, 0x1E4EF, Mn}, {0x1E4F0, 0x1E4F9, Nd}, {0x1E5D0, 0x1E5ED, Lo}, {0x1E5EE, 0x1E5EF, Mn},
    {0x1E5F0, 0x1E5F0, Lo}, {0x1E5F1, 0x1E5FA, Nd}, {0x1E5FF, 0x1E5FF, Po}, {0x1F6DC, 0x1F6DC, So},
    {0x1F774, 0x1F776, So}, {0x1F77B, 0x1F77F, So}, {0x1F7D9, 0x1F7D9, So}, {0x1F8B2, 0x1F8BB, So},
    {0x1F8C0, 0x1F8C1, So}, {0x1FA75, 0x1FA77, So}, {0x1FA87, 0x1FA89, So}, {0x1FA8F, 0x1FA8F, So},
    {0x1FAAD, 0x1FAAF, So}, {0x1FABB, 0x1FABF, So}, {0x1FAC6, 0x1FAC6, So}, {0x1FACE, 0x1FACF, So},
    {0x1FADA, 0x1FADC, So}, {0x1FADF, 0x1FADF, So}, {0x1FAE8, 0x1FAE9, So}, {0x1FAF7, 0x1FAF8, So},
    {0x1FBCB, 0x1FBEF, So}, {0x2B739, 0x2B739, Lo}, {0x2EBF0, 0x2EE5D, Lo}, {0x31350, 0x323AF, Lo}};

// Code points up to Unicode 14 that normalisation reorders or composes, and that of `tokenizers` (its tables
// are of version 9) does not; those of kNewer that are marks come on top. And U+11A7, which utf8proc takes
// for a Hangul final.
struct Span {
  char32_t first, last;
};
constexpr Span kUnordered[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x11A7, 0x11A7},   {0x1715, 0x1715},   {0x1ABF, 0x1AFF},
    {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x11930, 0x11930}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x16D67, 0x16D67}, {0x16FF0, 0x16FF1}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
};

template <typename T, size_t n>
const T* find_range(const T (&ranges)[n], char32_t c) {
  const T* found = std::upper_bound(std::begin(ranges), std::end(ranges), c,
                                    [](char32_t value, const T& range) { return value < range.first; });
  return found != std::begin(ranges) && c <= (found - 1)->last ? found - 1 : nullptr;
}

// Blocks of 256 code points that kNewer touches: few, so that most text needs no search.
const std::bitset<0x1100>& newer_blocks() {
  static const std::bitset<0x1100> blocks = [] {
    std::bitset<0x1100> set;
    for (const Range& range : kNewer) {
      for (char32_t block = range.first >> 8; block <= range.last >> 8; ++block) set.set(block);
    }
    return set;
  }();
  return blocks;
}

size_t sequence_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

char32_t code_point(const char* p) {
  const auto byte = [p](int i) { return static_cast<char32_t>(static_cast<unsigned char>(p[i])); };
  switch (sequence_length(*p)) {
    case 1:
      return byte(0);
    case 2:
      return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
    case 3:
      return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    default:
      return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
  }
}

void write_code_point(char32_t c, char* p) {
  utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), reinterpret_cast<utf8proc_uint8_t*>(p));
}

size_t previous(std::string_view text, size_t position) {
  do --position;
  while ((static_cast<unsigned char>(text[position]) & 0xC0) == 0x80);
  return position;
}

size_t find_byte_from(std::string_view text, size_t position, unsigned char least) {
  while (position < text.size() && static_cast<unsigned char>(text[position]) < least) ++position;
  return position;
}

bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_word(char32_t c) {
  if (c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
      (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189)) {
    return true;  // joiners, and symbols that Unicode counts as alphabetic
  }
  if (const Range* newer = find_range(kNewer, c)) return newer->category <= Nd;
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category >= UTF8PROC_CATEGORY_LU && category != UTF8PROC_CATEGORY_NO &&
         category <= UTF8PROC_CATEGORY_PC;
}

// Appends the NFC form of `text`.
void append_nfc(std::string_view text, std::vector<utf8proc_int32_t>& code_points, std::string& out) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  if (text.empty()) return;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  const auto size = static_cast<utf8proc_ssize_t>(text.size());
  if (code_points.size() < 4 * text.size()) code_points.resize(4 * text.size());
  auto capacity = static_cast<utf8proc_ssize_t>(code_points.size());
  utf8proc_ssize_t count = utf8proc_decompose(bytes, size, code_points.data(), capacity, kOptions);
  if (count > capacity) {
    code_points.resize(static_cast<size_t>(count));
    count = utf8proc_decompose(bytes, size, code_points.data(), count, kOptions);
  }
  if (count >= 0) count = utf8proc_normalize_utf32(code_points.data(), count, kOptions);
  if (count < 0) throw std::runtime_error(std::string("NFC: ") + utf8proc_errmsg(count));
  for (utf8proc_ssize_t i = 0; i < count; ++i) {
    char encoded[4];
    out.append(encoded, static_cast<size_t>(utf8proc_encode_char(
                            code_points[i], reinterpret_cast<utf8proc_uint8_t*>(encoded))));
  }
}

}  // namespace

std::string_view with_stable_categories(std::string_view text, std::string& buffer) {
  bool copied = false;
  for (size_t i = find_byte_from(text, 0, 0xE0); i < text.size(); i = find_byte_from(text, i, 0xE0)) {
    const char32_t c = code_point(&text[i]);
    const size_t length = sequence_length(text[i]);
    const Range* range = newer_blocks()[c >> 8] ? find_range(kNewer, c) : nullptr;
    if (range) {
      if (!copied) buffer.assign(text);
      copied = true;
      const StandIns& stand_ins = kStandIns[range->category];
      write_code_point(length == 3 ? stand_ins.three : stand_ins.four, &buffer[i]);
    }
    i += length;
  }
  return copied ? std::string_view(buffer) : text;
}

std::string_view to_nfc(std::string_view text, std::string& buffer) {
  // Nothing below U+0300 (lead byte 0xCC) combines with what stands before it, so NFC is found island by
  // island: runs of higher code points, each with the one code point before it.
  constexpr unsigned char kLead = 0xCC;
  size_t next = find_byte_from(text, 0, kLead);
  if (next == text.size()) return text;
  buffer.clear();
  std::vector<utf8proc_int32_t> code_points;
  size_t done = 0;
  while (next < text.size()) {
    size_t begin = next > done ? previous(text, next) : next;
    buffer.append(text, done, begin - done);
    while (next < text.size() && static_cast<unsigned char>(text[next]) >= kLead) {
      const size_t length = sequence_length(text[next]);
      const char32_t c = code_point(&text[next]);
      const Range* newer = newer_blocks()[c >> 8] ? find_range(kNewer, c) : nullptr;
      if ((newer && (newer->category == Mn || newer->category == Mc)) || find_range(kUnordered, c)) {
        append_nfc(text.substr(begin, next - begin), code_points, buffer);
        buffer.append(text, next, length);
        begin = next + length;
      }
      next += length;
    }
    append_nfc(text.substr(begin, next - begin), code_points, buffer);
    done = next;
    next = find_byte_from(text, done, kLead);
  }
  return buffer.append(text, done);
}

size_t skip_space(std::string_view text, size_t position) {
  while (position < text.size() && is_space(code_point(&text[position]))) {
    position += sequence_length(text[position]);
  }
  return position;
}

size_t skip_space_back(std::string_view text, size_t position) {
  while (position > 0 && is_space(code_point(&text[previous(text, position)]))) {
    position = previous(text, position);
  }
  return position;
}

bool word_begins_at(std::string_view text, size_t position) {
  return position < text.size() && is_word(code_point(&text[position]));
}

bool word_ends_at(std::string_view text, size_t position) {
  return position > 0 && is_word(code_point(&text[previous(text, position)]));
}

}  // namespace hymoe
