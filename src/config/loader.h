#pragma once

#include <map>
#include <string>
#include <vector>

#include "config/node.h"
#include "hymoe/config/fields.h"

namespace hymoe {

// Fills one config from a document, then from overrides, then checks it.
class Loader {
 public:
  // `name` is the file in messages.
  Loader(const Type& type, void* config, std::string name);

  void read(const Node& document);
  void apply_override(const std::string& text);
  void check() const;

 private:
  void bind(const Type& type, void* value, const Node& node, const std::string& path,
            bool any_scalar = false);
  void bind_struct(const Type& type, void* value, const Node& node, const std::string& path);
  void bind_elements(const Type& type, void* value, const Node& node, const std::string& path);
  void bind_at(const Type& type, void* value, const std::vector<std::string>& parts, size_t i,
               const std::string& text, const std::string& path);
  const FieldInfo& find_field(const Type& type, const std::string& key, const std::string& path,
                              const std::string& where) const;
  std::string origin(std::string path) const;

  const Type& type_;
  void* config_;
  std::string name_;
  std::string source_;                          // of the node being read: the file or "command line"
  std::map<std::string, std::string> origins_;  // key path -> where it was given
};

// Limits and check() of a whole value; throws ConfigError without a place.
void check_value(const Type& type, const void* value);

}  // namespace hymoe
