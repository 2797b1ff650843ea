#include "eval/text_stream.h"

#include <algorithm>

#include "hymoe/io/utf8.h"

namespace hymoe {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Whether `bytes` may be the beginning of a longer well-formed sequence.
bool may_become_a_character(std::string_view bytes) {
  const auto lead = static_cast<unsigned char>(bytes[0]);
  const size_t length = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
  return bytes.size() < length &&
         std::all_of(bytes.begin() + 1, bytes.end(), [](unsigned char c) { return (c & 0xC0) == 0x80; });
}

}  // namespace

void TextStream::decode(bool last) {
  while (!pending_.empty()) {
    const size_t good = std::min(find_invalid_utf8(pending_), pending_.size());
    text_.append(pending_, 0, good);
    pending_.erase(0, good);
    if (pending_.empty() || (!last && may_become_a_character(pending_))) return;
    text_ += kReplacement;
    pending_.erase(0, last && may_become_a_character(pending_) ? pending_.size() : 1);
  }
}

bool TextStream::push(std::string_view bytes) {
  pending_ += bytes;
  decode(/*last=*/false);
  size_t end = std::string::npos;
  for (const std::string& stop : stop_) end = std::min(end, text_.find(stop, taken_));
  if (end == std::string::npos) return false;
  text_.resize(end);
  pending_.clear();
  finished_ = true;
  return true;
}

void TextStream::finish() {
  decode(/*last=*/true);
  finished_ = true;
}

size_t TextStream::certain_size() const {
  if (finished_) return text_.size();
  size_t held = 0;  // longest end of the text that begins a stop text
  for (const std::string& stop : stop_) {
    for (size_t n = std::min(stop.size() - 1, text_.size() - taken_); n > held; --n) {
      if (std::string_view(text_).ends_with(std::string_view(stop).substr(0, n))) held = n;
    }
  }
  return text_.size() - held;
}

std::string_view TextStream::take() {
  const size_t begin = taken_;
  taken_ = certain_size();
  return std::string_view(text_).substr(begin, taken_ - begin);
}

}  // namespace hymoe
