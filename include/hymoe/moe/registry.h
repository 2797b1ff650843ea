#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <c10/util/Exception.h>

#include "hymoe/config/error.h"

namespace hymoe {

/// Named factories of a class that users extend. Add to it from main, before configs are loaded; a static
/// initializer in a static library may be dropped by the linker.
template <typename T, typename Args>
class Registry {
 public:
  using Factory = std::function<std::shared_ptr<T>(const Args&)>;

  /// From now on `name` works in every config. Throws c10::Error when the name is taken.
  void add(const std::string& name, Factory factory) {
    TORCH_CHECK(factories_.emplace(name, std::move(factory)).second, "Registry::add: ", name, " is taken");
  }

  /// Throws ConfigError listing the known names when `name` is none of them.
  std::shared_ptr<T> make(const std::string& name, const Args& args) const {
    check(name, "");
    return factories_.at(name)(args);
  }

  /// Throws ConfigError at key_path, listing the known names, when `name` is none of them.
  void check(const std::string& name, const std::string& key_path) const {
    if (factories_.contains(name)) return;
    std::string known;
    for (const auto& [other, factory] : factories_) known += (known.empty() ? "" : ", ") + other;
    throw ConfigError(key_path, "expected one of " + known + ", got \"" + name + "\"");
  }

  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, factory] : factories_) all.push_back(name);
    return all;
  }

 private:
  std::map<std::string, Factory> factories_;
};

}  // namespace hymoe
