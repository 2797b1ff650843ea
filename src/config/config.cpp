#include "hymoe/config/config.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "config/loader.h"
#include "config/node.h"

namespace hymoe::detail {
namespace {

constexpr size_t kLargestFile = size_t{16} << 20;

std::string read_file(const std::filesystem::path& path) {
  const auto fail = [&](const std::string& text) { throw ConfigError("", text, path.string()); };
  std::error_code error;
  if (!std::filesystem::exists(path, error)) fail("wanted a config file, got none of this name");
  if (std::filesystem::is_directory(path, error)) fail("wanted a config file, got a folder");
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::string("cannot be read: ") + std::strerror(errno));
  std::string text(kLargestFile + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) fail("cannot be read to its end");
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kLargestFile) fail("wanted a config file of at most 16 MiB, got a larger one");
  return text;
}

Node dump(const Type& type, const void* value) {
  const auto scalar = [](Node::Kind kind, std::string text) {
    return Node{.kind = kind, .text = std::move(text)};
  };
  switch (type.kind) {
    case Type::Kind::kBool:
      return scalar(Node::Kind::kPlain, format_scalar(*static_cast<const bool*>(value)));
    case Type::Kind::kInteger:
      return scalar(Node::Kind::kPlain, format_scalar(*static_cast<const int64_t*>(value)));
    case Type::Kind::kNumber:
      return scalar(Node::Kind::kPlain, format_scalar(*static_cast<const double*>(value)));
    case Type::Kind::kText:
      return scalar(Node::Kind::kText, *static_cast<const std::string*>(value));
    case Type::Kind::kOptional: {
      Node node;
      type.visit(value, [&](const std::string&, const void* inner) { node = dump(*type.element, inner); });
      return node;
    }
    case Type::Kind::kList:
    case Type::Kind::kMap: {
      const bool list = type.kind == Type::Kind::kList;
      Node node{.kind = list ? Node::Kind::kList : Node::Kind::kMap};
      type.visit(value, [&](const std::string& key, const void* element) {
        node.entries.push_back(dump(*type.element, element));
        if (!list) node.entries.back().key = key;
      });
      return node;
    }
    case Type::Kind::kStruct: {
      Node node{.kind = Node::Kind::kMap};
      for (const FieldInfo& field : type.fields) {
        node.entries.push_back(dump(field.type(), field.member(const_cast<void*>(value))));
        node.entries.back().key = field.name;
      }
      return node;
    }
  }
  return {};
}

void fill(const Type& type, void* config, const Node& document, const std::string& name,
          const std::vector<std::string>& overrides, bool check = true) {
  Loader loader(type, config, name);
  loader.read(document);
  for (const std::string& text : overrides) loader.apply_override(text);
  if (check) loader.check();
}

}  // namespace

void load_config(const Type& type, void* config, const std::filesystem::path& path,
                 const std::vector<std::string>& overrides, bool check) {
  const std::string name = path.string();
  fill(type, config, parse_yaml(read_file(path), name), name, overrides, check);
}

void parse_config(const Type& type, void* config, const std::string& text, const std::string& name,
                  const std::vector<std::string>& overrides) {
  fill(type, config, parse_yaml(text, name), name, overrides);
}

void from_json(const Type& type, void* config, const nlohmann::json& json, const std::string& name) {
  fill(type, config, node_from_json(json), name, {});
}

std::string to_yaml(const Type& type, const void* config) { return write_yaml(dump(type, config)); }

nlohmann::json to_json(const Type& type, const void* config) { return write_json(dump(type, config)); }

void check_config(const Type& type, const void* config) { check_value(type, config); }

}  // namespace hymoe::detail
