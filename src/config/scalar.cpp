#include "config/scalar.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>

#include <nlohmann/json.hpp>

#include "hymoe/config/fields.h"

namespace hymoe {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

template <typename T>
bool parse_whole(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

// Takes the sign off and leaves what must begin like a decimal number. Leading zeros are refused: YAML 1.1
// reads 010 as octal.
bool split_sign(std::string_view& text, bool& negative) {
  negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  const bool dot = text.starts_with('.');
  if (text.size() <= size_t{dot} || !is_digit(text[dot])) return false;
  return text.size() < 2 || text[0] != '0' || !is_digit(text[1]);
}

}  // namespace

bool parse_bool(std::string_view text, bool& value) {
  value = text == "true" || text == "True" || text == "TRUE";
  return value || text == "false" || text == "False" || text == "FALSE";
}

bool parse_integer(std::string_view text, int64_t& value) {
  bool negative = false;
  double number = 0;
  if (!split_sign(text, negative) || !parse_number(text, number)) return false;
  const size_t e = text.find_first_of("eE");
  int64_t exponent = 0;
  if (e != std::string_view::npos) {
    std::string_view digits = text.substr(e + 1);
    if (digits.starts_with('+')) digits.remove_prefix(1);
    if (!parse_whole(digits, exponent) || exponent < -400 || exponent > 400) return false;
  }
  std::string digits(text.substr(0, e));
  if (const size_t dot = digits.find('.'); dot != std::string::npos) {
    exponent -= static_cast<int64_t>(digits.size() - dot - 1);
    digits.erase(dot, 1);
  }
  for (; exponent < 0 && digits.size() > 1 && digits.back() == '0'; ++exponent) digits.pop_back();
  if (digits.find_first_not_of('0') == std::string::npos) exponent = 0;
  if (exponent < 0) return false;
  digits.append(static_cast<size_t>(exponent), '0');
  return parse_whole(negative ? "-" + digits : digits, value);
}

bool parse_number(std::string_view text, double& value) {
  if (text == ".inf" || text == "+.inf" || text == "-.inf") {
    value =
        text[0] == '-' ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
    return true;
  }
  if (text == ".nan") {
    value = std::numeric_limits<double>::quiet_NaN();
    return true;
  }
  bool negative = false;
  if (!split_sign(text, negative) || !parse_whole(text, value)) return false;
  if (negative) value = -value;
  return true;
}

std::string in_quotes(std::string_view text, size_t longest) {
  const bool cut = text.size() > longest;
  const auto replace = nlohmann::json::error_handler_t::replace;
  return nlohmann::json(text.substr(0, longest)).dump(-1, ' ', false, replace) + (cut ? "..." : "");
}

std::string join_path(const std::string& path, const std::string& key) {
  const bool plain = !key.empty() && std::all_of(key.begin(), key.end(), [](unsigned char c) {
    return c > ' ' && c != '.' && c != '=' && c != '"' && c != '\\' && c != 0x7f;
  });
  return path + (path.empty() ? "" : ".") + (plain ? key : in_quotes(key, 60));
}

std::string format_scalar(bool value) { return value ? "true" : "false"; }

std::string format_scalar(int64_t value) { return std::to_string(value); }

std::string format_scalar(double value) {
  if (std::isnan(value)) return ".nan";
  if (std::isinf(value)) return value < 0 ? "-.inf" : ".inf";
  std::array<char, 32> buffer;
  const char* end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  std::string text(static_cast<const char*>(buffer.data()), end);
  // Readers of YAML 1.1 take 1e-05 for text and need 1.0e-05; the point also tells a number from an integer.
  if (text.find('.') == std::string::npos) text.insert(std::min(text.find('e'), text.size()), ".0");
  return text;
}

}  // namespace hymoe
