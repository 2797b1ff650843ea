#pragma once

#include <cstddef>
#include <string_view>

namespace hymoe {

/// Position of the first byte that does not begin or continue a well-formed UTF-8 sequence (the start of the
/// bad sequence; surrogates, overlong forms and values over U+10FFFF are bad); std::string_view::npos when
/// all is well.
size_t find_invalid_utf8(std::string_view text);

inline bool is_valid_utf8(std::string_view text) { return find_invalid_utf8(text) == std::string_view::npos; }

/// Whether the first 8 KiB hold a NUL byte, as hardly any text file does.
bool looks_binary(std::string_view bytes);

}  // namespace hymoe
