#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/error.h"
#include "hymoe/config/fields.h"

namespace hymoe {

namespace detail {

void load_config(const Type&, void* config, const std::filesystem::path&,
                 const std::vector<std::string>& overrides, bool check);
void parse_config(const Type&, void* config, const std::string& text, const std::string& name,
                  const std::vector<std::string>& overrides);
void from_json(const Type&, void* config, const nlohmann::json&, const std::string& name);
std::string to_yaml(const Type&, const void* config);
nlohmann::json to_json(const Type&, const void* config);
void check_config(const Type&, const void* config);

}  // namespace detail

/// Reads a YAML or JSON file into a config struct; what the file does not name keeps its value in `config`,
/// the defaults; a list or map that it names replaces the default whole. Overrides are `key.path=value`: list
/// elements by index (index == size appends), map keys as path parts (in double quotes if they hold dots; in
/// a map of scalars the rest of the path is the key), whole lists, maps and structs as YAML flow text
/// (`languages=[rust, go]`). Throws ConfigError for anything the struct does not declare: unknown or repeated
/// key, wrong type, value out of range, null, a failing check().
template <typename T>
T load_config(const std::filesystem::path& path, const std::vector<std::string>& overrides = {},
              T config = {}) {
  detail::load_config(detail::type_of<T>(), &config, path, overrides, /*check=*/true);
  return config;
}

/// As load_config, less the limits of values and every check(): for a look at one setting that decides what
/// the others stand on.
template <typename T>
T read_config(const std::filesystem::path& path, const std::vector<std::string>& overrides = {}) {
  T config{};
  detail::load_config(detail::type_of<T>(), &config, path, overrides, /*check=*/false);
  return config;
}

/// As load_config, from YAML or JSON text; `name` stands for the file in messages.
template <typename T>
T parse_config(const std::string& text, const std::string& name,
               const std::vector<std::string>& overrides = {}, T config = {}) {
  detail::parse_config(detail::type_of<T>(), &config, text, name, overrides);
  return config;
}

/// As load_config, from a JSON value; `name` stands for the file in messages.
template <typename T>
T from_json(const nlohmann::json& json, const std::string& name) {
  T config{};
  detail::from_json(detail::type_of<T>(), &config, json, name);
  return config;
}

/// Every field as YAML text that parse_config reads back exactly.
template <typename T>
std::string to_yaml(const T& config) {
  return detail::to_yaml(detail::type_of<T>(), &config);
}

/// Every field as JSON that from_json reads back exactly; numbers that are not finite become ".inf", "-.inf",
/// ".nan".
template <typename T>
nlohmann::json to_json(const T& config) {
  return detail::to_json(detail::type_of<T>(), &config);
}

/// Checks a config built in C++: the limits of every field, then every struct's check(), inner ones first.
/// Throws ConfigError.
template <typename T>
void check_config(const T& config) {
  detail::check_config(detail::type_of<T>(), &config);
}

}  // namespace hymoe
