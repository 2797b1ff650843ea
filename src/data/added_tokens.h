#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hymoe {

/// A token matched in the text itself, before any splitting.
struct AddedToken {
  int32_t id;
  std::string content;
  bool special = false;
  bool normalized = false;   // matched in the normalised text
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool single_word = false;  // not within a word
};

/// Finds added tokens, leftmost first and the longest of those.
class AddedTokenFinder {
 public:
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  /// Calls `sink` with each piece of `text` (valid UTF-8) in order: the id of an added token, or the text
  /// between. A special token's place in the text stays text unless `allow_special`.
  using Sink = std::function<void(std::string_view piece, std::optional<int32_t> id)>;
  void split(std::string_view text, bool allow_special, const Sink& sink) const;

 private:
  const AddedToken* longest_at(std::string_view text) const;

  std::vector<AddedToken> tokens_;  // sorted by content
  std::string first_bytes_;
  bool all_special_;
};

}  // namespace hymoe
