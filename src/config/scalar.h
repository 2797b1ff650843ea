#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace hymoe {

// Each reads a whole scalar as YAML writes it without quotes; false if it is not one.
bool parse_bool(std::string_view text, bool& value);
bool parse_integer(std::string_view text, int64_t& value);  // also 1e9 and 2.0: whatever is exactly an int64
bool parse_number(std::string_view text, double& value);    // also .inf, -.inf and .nan

// A text in double quotes with JSON's escapes, which YAML shares; cut after `longest` bytes.
std::string in_quotes(std::string_view text, size_t longest = std::string_view::npos);

// `path.key`, with the key in quotes where it would not read back as one part of a path.
std::string join_path(const std::string& path, const std::string& key);

}  // namespace hymoe
