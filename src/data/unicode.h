#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace hymoe {

/// `text` (valid UTF-8) with each code point whose category differs between Unicode 14 and 16 replaced by one
/// of the same length and category that all versions agree on, so that a split pattern finds the same pieces
/// whatever version PCRE2 has; U+180E, white space to PCRE2 alone, likewise. Offsets stay. Gives `text`
/// itself when there is nothing to replace, else a view of `buffer`.
std::string_view with_stable_categories(std::string_view text, std::string& buffer);

/// `text` (valid UTF-8) in normal form NFC, as Hugging Face's `tokenizers` makes it: combining marks newer
/// than its tables stay where they are. Gives `text` itself when it holds nothing over U+02FF, else a view of
/// `buffer`.
std::string_view to_nfc(std::string_view text, std::string& buffer);

/// Position after (before) the run of white space that begins (ends) at `position`.
size_t skip_space(std::string_view text, size_t position);
size_t skip_space_back(std::string_view text, size_t position);

/// Whether the code point that begins (ends) at `position` is part of a word: a letter, mark, digit,
/// connector or joiner.
bool word_begins_at(std::string_view text, size_t position);
bool word_ends_at(std::string_view text, size_t position);

}  // namespace hymoe
