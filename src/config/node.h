#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace hymoe {

// A parsed YAML or JSON document before anything is known about types.
struct Node {
  enum class Kind {
    kNull,
    kPlain,
    kText,
    kList,
    kMap
  };  // kPlain: a scalar without quotes, of whatever type it reads as

  Kind kind = Kind::kNull;
  std::string text = {};           // of a scalar
  int line = 0;                    // of the key, or of a list's element; 0 where the source has no lines
  std::string key = {};            // in a map
  std::vector<Node> entries = {};  // of a list or map
};

// Stands for the file in what is said about overrides.
inline constexpr const char* kCommandLine = "command line";

// "name:line", or name alone where there is no line.
std::string where(const std::string& name, int line);

// Throws ConfigError if the text is not UTF-8 or holds control characters, which the YAML parser would not
// report.
void check_text(const std::string& text, const std::string& name);

// Reads one YAML or JSON document; nothing at all is null. Throws ConfigError.
Node parse_yaml(const std::string& text, const std::string& name);

Node node_from_json(const nlohmann::json& json);

// Block style, scalars' lists on one line.
std::string write_yaml(const Node& node);
std::string write_yaml_flow(const Node& node);

nlohmann::json write_json(const Node& node);

// What a message says came: `2.5`, `the text "2"`, `a list`, ...
std::string what_came(const Node& node);

}  // namespace hymoe
