#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/fields.h"

namespace hymoe {

/// One documented key. In paths `<n>` stands for a list index and `<name>` for a map key.
struct SchemaEntry {
  std::string path = {};        // "moe.branches.<n>.router.top_k"
  std::string type = {};        // "integer", "list of text", "mapping" (a struct; its fields follow), ...
  std::string value = {};       // the default, as in YAML; empty for a struct
  std::string constraint = {};  // "at least 1", or empty
  std::string help = {};
};

namespace detail {

std::vector<SchemaEntry> describe(const Type&);
std::string help_text(const Type&);
std::string markdown_reference(const Type&, const std::string& title);

}  // namespace detail

/// Every key of a config struct, outer before inner, in the order of fields().
template <typename T>
std::vector<SchemaEntry> describe() {
  return detail::describe(detail::type_of<T>());
}

/// The schema for a terminal of 110 columns, one block a struct.
template <typename T>
std::string help_text() {
  return detail::help_text(detail::type_of<T>());
}

/// The schema as Markdown: a heading and one table a struct.
template <typename T>
std::string markdown_reference(const std::string& title) {
  return detail::markdown_reference(detail::type_of<T>(), title);
}

/// What changed from a to b (values of to_json), one line a key: `key.path: old → new`; "(none)" where a side
/// lacks it.
std::vector<std::string> config_difference(const nlohmann::json& a, const nlohmann::json& b);

}  // namespace hymoe
