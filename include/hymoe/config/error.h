#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hymoe {

/// Base of what hymoe throws about a user's files and settings; `what()` is one line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A setting is wrong. `what()` is `where: key.path: what was wanted, what came`, less the parts that are
/// empty. A config's own `check()` throws it with the key path relative to its struct; the loader puts the
/// path of that struct in front and adds where the key was given ("file:line" or "command line").
class ConfigError : public Error {
 public:
  ConfigError(std::string key_path, std::string text, std::string where = "")
      : Error((where.empty() ? "" : where + ": ") + (key_path.empty() ? "" : key_path + ": ") + text),
        key_path_(std::move(key_path)),
        text_(std::move(text)),
        where_(std::move(where)) {}

  const std::string& key_path() const { return key_path_; }
  const std::string& text() const { return text_; }
  const std::string& where() const { return where_; }

 private:
  std::string key_path_;
  std::string text_;
  std::string where_;
};

/// A data file is wrong. `where` names the file, and the line, tensor or key in it; `what()` is `where:
/// text`.
struct DataError : Error {
  DataError(const std::string& where, const std::string& text) : Error(where + ": " + text) {}
};

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
size_t edit_distance(std::string_view a, std::string_view b);

/// The end of an error about an unknown name: "; nearest: rust, there are cpp, go, rust".
std::string choices(std::string_view name, const std::vector<std::string>& names);

}  // namespace hymoe
