#include "hymoe/io/utf8.h"

#include <cstdint>
#include <cstring>

namespace hymoe {
namespace {

constexpr size_t kBinaryProbe = 8192;

bool is_continuation(unsigned char c) { return (c & 0xC0) == 0x80; }

/// Length of the well-formed sequence at p, 0 when there is none (Unicode 15, table 3-7).
size_t sequence_length(const unsigned char* p, size_t left) {
  const unsigned char c = p[0];
  if (c < 0x80) return 1;
  if (c < 0xC2) return 0;
  if (c < 0xE0) return left >= 2 && is_continuation(p[1]) ? 2 : 0;
  if (c < 0xF0) {
    if (left < 3 || !is_continuation(p[1]) || !is_continuation(p[2])) return 0;
    const bool overlong = c == 0xE0 && p[1] < 0xA0;
    const bool surrogate = c == 0xED && p[1] >= 0xA0;
    return overlong || surrogate ? 0 : 3;
  }
  if (c > 0xF4 || left < 4 || !is_continuation(p[1]) || !is_continuation(p[2]) || !is_continuation(p[3]))
    return 0;
  const bool overlong = c == 0xF0 && p[1] < 0x90;
  const bool too_large = c == 0xF4 && p[1] >= 0x90;
  return overlong || too_large ? 0 : 4;
}

}  // namespace

size_t find_invalid_utf8(std::string_view text) {
  const auto* data = reinterpret_cast<const unsigned char*>(text.data());
  const size_t size = text.size();
  size_t i = 0;
  while (i < size) {
    // Most text is ASCII: 16 bytes a step while no high bit is set.
    while (size - i >= 16) {
      uint64_t words[2];
      std::memcpy(words, data + i, sizeof(words));
      if (((words[0] | words[1]) & 0x8080808080808080u) != 0) break;
      i += 16;
    }
    // Then sequence by sequence up to the next ASCII stretch worth trying.
    const size_t stop = size - i < 16 ? size : i + 16;
    while (i < stop) {
      const size_t length = sequence_length(data + i, size - i);
      if (length == 0) return i;
      i += length;
    }
  }
  return std::string_view::npos;
}

bool looks_binary(std::string_view bytes) {
  return bytes.substr(0, kBinaryProbe).find('\0') != std::string_view::npos;
}

}  // namespace hymoe
