#include "data/filters.h"

#include <algorithm>
#include <cstdint>

namespace hymoe {
namespace {

constexpr std::string_view kBlank = " \t\n\v\f\r";

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c; }

// Counts of characters; a letter is an ASCII letter or any character beyond ASCII.
struct Counts {
  int64_t lines = 0, characters = 0, longest_line = 0, letters = 0, visible = 0;
};

Counts count(std::string_view text) {
  Counts counts;
  int64_t line = 0;
  const auto end_line = [&] {
    counts.longest_line = std::max(counts.longest_line, line);
    counts.characters += line;
    ++counts.lines;
    line = 0;
  };
  for (char c : text) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      end_line();
    } else if ((byte & 0xc0) != 0x80) {  // no continuation of a character
      const char small = lower(c);
      ++line;
      counts.letters += byte >= 0x80 || (small >= 'a' && small <= 'z');
      counts.visible += kBlank.find(c) == std::string_view::npos;
    }
  }
  if (!text.empty() && text.back() != '\n') end_line();
  return counts;
}

// The first lines in lower case; no more than 4096 bytes of them.
std::string head(std::string_view text, int64_t lines) {
  constexpr size_t kMost = 4096;
  size_t end = 0;
  for (; lines > 0 && end < text.size() && end < kMost; ++end) lines -= text[end] == '\n';
  std::string out(text.substr(0, end));
  std::transform(out.begin(), out.end(), out.begin(), lower);
  return out;
}

bool is_generated(std::string_view text, const FilterConfig& filters) {
  const std::string top = head(text, filters.generated_lines);
  return std::any_of(filters.generated_markers.begin(), filters.generated_markers.end(),
                     [&](std::string marker) {
                       std::transform(marker.begin(), marker.end(), marker.begin(), lower);
                       return top.find(marker) != std::string::npos;
                     });
}

}  // namespace

void normalize_newlines(std::string& text) {
  size_t from = text.starts_with("\xef\xbb\xbf") ? 3 : 0;
  if (from == 0 && text.find('\r') == std::string::npos) return;
  size_t to = 0;
  for (; from < text.size(); ++from) {
    const bool is_return = text[from] == '\r';
    if (is_return && from + 1 < text.size() && text[from + 1] == '\n') continue;
    text[to++] = is_return ? '\n' : text[from];
  }
  text.resize(to);
}

std::string_view reject(std::string_view text, bool prose, const FilterConfig& filters) {
  const int64_t bytes = static_cast<int64_t>(text.size());
  if (bytes < filters.min_bytes || text.find_first_not_of(kBlank) == std::string_view::npos)
    return "too_short";
  if (bytes > filters.max_bytes) return "too_long";
  if (prose) return "";
  const Counts counts = count(text);
  if (counts.longest_line > filters.max_line) return "long_line";
  if (static_cast<double>(counts.characters) > filters.max_mean_line * static_cast<double>(counts.lines)) {
    return "long_lines";
  }
  if (static_cast<double>(counts.letters) < filters.min_alphabet * static_cast<double>(counts.visible)) {
    return "few_letters";
  }
  return is_generated(text, filters) ? "generated" : "";
}

}  // namespace hymoe
