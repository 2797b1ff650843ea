#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"

namespace hymoe {

/// The file as JSON, nested at most 100 deep: what copies or prints a value recurses. Throws DataError naming
/// it.
inline nlohmann::json read_json(const std::filesystem::path& file) {
  constexpr int kMaxDepth = 100;
  const auto check = [&](int depth, nlohmann::json::parse_event_t, const nlohmann::json&) {
    if (depth > kMaxDepth) throw DataError(file.string(), "nested more than 100 deep");
    return true;
  };
  try {
    return nlohmann::json::parse(read_text(file), check);
  } catch (const nlohmann::json::parse_error& e) {
    throw DataError(file.string(), "not valid JSON at byte " + std::to_string(e.byte));
  } catch (const nlohmann::json::out_of_range&) {
    throw DataError(file.string(), "not valid JSON: a number is too large");
  }
}

/// For messages that quote a file: tokens may hold line ends.
inline std::string one_line(std::string text) {
  for (char& c : text) c = static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  return text;
}

/// A value in a JSON file that knows where it stands; what it is asked for and is not is a DataError
/// "file: path.to.value: wanted an object, got array".
class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, const std::string& file, std::string path)
      : value_(&value), file_(&file), path_(std::move(path)) {}

  [[noreturn]] void fail(const std::string& text) const {
    throw DataError(*file_, one_line(path_.empty() ? text : path_ + ": " + text));
  }
  const std::string& path() const { return path_; }
  const nlohmann::json& value() const { return *value_; }
  bool is_array() const { return value_->is_array(); }
  bool is_string() const { return value_->is_string(); }

  /// The member, when it is there and not null.
  std::optional<JsonNode> find(const std::string& key) const {
    if (!value_->is_object()) wanted("an object");
    const auto member = value_->find(key);
    if (member == value_->end() || member->is_null()) return std::nullopt;
    return JsonNode(*member, *file_, path_.empty() ? key : path_ + "." + key);
  }
  JsonNode at(const std::string& key) const {
    const std::optional<JsonNode> member = find(key);
    if (!member) fail("\"" + key + "\" is missing");
    return *member;
  }
  std::vector<JsonNode> array() const {
    if (!value_->is_array()) wanted("an array");
    std::vector<JsonNode> items;
    items.reserve(value_->size());
    for (size_t i = 0; i < value_->size(); ++i) {
      items.emplace_back((*value_)[i], *file_, path_ + "[" + std::to_string(i) + "]");
    }
    return items;
  }
  const std::string& string() const {
    if (!value_->is_string()) wanted("a string");
    return value_->get_ref<const std::string&>();
  }
  int64_t integer() const {
    if (!value_->is_number_integer()) wanted("an integer");
    if (value_->is_number_unsigned() && value_->get<uint64_t>() > INT64_MAX)
      fail("is too large, got " + value_->dump());
    return value_->get<int64_t>();
  }
  /// The member, or `otherwise` when it is not there.
  bool flag(const std::string& key, bool otherwise) const {
    const std::optional<JsonNode> member = find(key);
    if (!member) return otherwise;
    if (!member->value_->is_boolean()) member->wanted("true or false");
    return member->value_->get<bool>();
  }

 private:
  [[noreturn]] void wanted(const std::string& what) const {
    fail("wanted " + what + ", got " + value_->type_name());
  }

  const nlohmann::json* value_;
  const std::string* file_;
  std::string path_;
};

}  // namespace hymoe
