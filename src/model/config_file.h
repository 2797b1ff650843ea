#pragma once

#include <concepts>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "data/json_node.h"
#include "hymoe/config/error.h"

namespace hymoe {

/// A config.json with errors that name the file and the key. A key that is null counts as absent.
class ConfigFile {
 public:
  using json = nlohmann::json;

  ConfigFile(std::filesystem::path path, json values) : path_(std::move(path)), values_(std::move(values)) {}
  /// The file in a folder. Throws DataError for one that is no JSON object.
  static ConfigFile in(const std::filesystem::path& dir, const char* name = "config.json");

  const std::filesystem::path& path() const { return path_; }

  [[noreturn]] void fail(const std::string& key, const std::string& text) const {
    throw DataError(path_.string() + ": " + one_line(key), one_line(text));
  }

  /// Whether it is there, be it null.
  bool has(const std::string& key) const { return values_.contains(key); }

  const json* find(const std::string& key) const {
    const auto it = values_.find(key);
    return it == values_.end() || it->is_null() ? nullptr : &*it;
  }

  template <typename T>
  T get(const std::string& key, std::optional<T> otherwise = {}) const {
    const json* value = find(key);
    if (value == nullptr) {
      if (otherwise) return *otherwise;
      fail(key, "is missing");
    }
    return as<T>(key, *value);
  }

  template <typename T>
  T as(const std::string& key, const json& value) const {
    if constexpr (std::same_as<T, int64_t>) {
      const bool fits = !value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX;
      if (value.is_number_integer() && fits) return value.get<T>();
      fail(key, "expected an integer, got " + value.dump());
    } else if constexpr (std::same_as<T, double>) {
      if (value.is_number()) return value.get<T>();
      fail(key, "expected a number, got " + value.dump());
    } else if constexpr (std::same_as<T, bool>) {
      if (value.is_boolean()) return value.get<T>();
      fail(key, "expected true or false, got " + value.dump());
    } else if constexpr (std::same_as<T, std::string>) {
      if (value.is_string()) return value.get<T>();
      fail(key, "expected text, got " + value.dump());
    } else {  // a list
      if (!value.is_array()) fail(key, "expected a list, got " + value.dump());
      T list;
      for (const json& element : value) list.push_back(as<typename T::value_type>(key, element));
      return list;
    }
  }

  /// An integer from `least` to `most`: what is multiplied, or what there are lists of.
  int64_t get_size(const std::string& key, std::optional<int64_t> otherwise = {}, int64_t least = 1,
                   int64_t most = INT32_MAX) const {
    const auto value = get<int64_t>(key, otherwise);
    if (value >= least && value <= most) return value;
    fail(key, "expected " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                  std::to_string(value));
  }
  /// The number of layers.
  int64_t get_layers(const std::string& key) const { return get_size(key, {}, 1, 10'000); }

  /// What we have only one value of: another one is refused.
  void expect(const std::string& key, const json& only) const {
    const json* value = find(key);
    if (value != nullptr && *value != only) {
      fail(key, "only " + only.dump() + " is implemented, got " + value->dump());
    }
  }

 private:
  std::filesystem::path path_;
  json values_;
};

}  // namespace hymoe
