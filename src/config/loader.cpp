#include "config/loader.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "config/scalar.h"
#include "hymoe/config/error.h"

namespace hymoe {
namespace {

// Paths of all structs in the schema that have the key.
void find_key(const Type& type, const std::string& key, const std::string& path,
              std::vector<std::string>& found) {
  if (type.kind == Type::Kind::kList) find_key(*type.element, key, join_path(path, "<n>"), found);
  if (type.kind == Type::Kind::kMap) find_key(*type.element, key, join_path(path, "<name>"), found);
  if (type.kind == Type::Kind::kOptional) find_key(*type.element, key, path, found);
  for (const FieldInfo& field : type.fields) {
    if (field.name == key) found.push_back(path);
    find_key(field.type(), key, join_path(path, field.name), found);
  }
}

std::string unknown_key(const Type& root, const Type& level, const std::string& key) {
  constexpr size_t kMostNamed = 6;
  std::vector<std::pair<size_t, std::string>> known;
  for (const FieldInfo& field : level.fields) known.emplace_back(edit_distance(key, field.name), field.name);
  std::sort(known.begin(), known.end());
  std::string text = "unknown key, ";
  if (known.empty()) {
    text += "none is known here";
  } else if (known[0].first < key.size() && known[0].first <= std::max<size_t>(2, key.size() / 3)) {
    text += "did you mean " + known[0].second + "?";
  } else {
    text += "known here: " + known[0].second;
    for (size_t i = 1; i < std::min(known.size(), kMostNamed); ++i) text += ", " + known[i].second;
    if (known.size() > kMostNamed) text += ", ...";
  }
  std::vector<std::string> elsewhere;
  find_key(root, key, "", elsewhere);
  if (!elsewhere.empty()) {
    const std::string& path = elsewhere[0];
    text += "; " + join_path("", key) + " belongs to " + (path.empty() ? "the top level" : path);
  }
  return text;
}

std::string wanted(const Type& type) {
  switch (type.kind) {
    case Type::Kind::kBool:
      return "true or false";
    case Type::Kind::kInteger:
      return "an integer";
    case Type::Kind::kNumber:
      return "a number";
    case Type::Kind::kText:
      return "text";
    case Type::Kind::kList:
      return "a list";
    case Type::Kind::kOptional:
      return wanted(*type.element) + " or null";
    case Type::Kind::kStruct:
    case Type::Kind::kMap:
      return "a mapping";
  }
  return "";
}

bool is_scalar(const Type& type) {
  if (type.kind == Type::Kind::kOptional) return is_scalar(*type.element);
  return type.kind <= Type::Kind::kText;
}

// False where the node is not of the type. `hint` says how to make it so.
bool read_scalar(const Type& type, void* value, const Node& node, bool any_scalar, std::string& hint) {
  const bool plain = node.kind == Node::Kind::kPlain;
  if (!plain && node.kind != Node::Kind::kText) return false;
  switch (type.kind) {
    case Type::Kind::kBool:
      return plain && parse_bool(node.text, *static_cast<bool*>(value));
    case Type::Kind::kInteger:
      return plain && parse_integer(node.text, *static_cast<int64_t*>(value));
    case Type::Kind::kNumber:  // JSON has no infinity but in quotes
      return (plain || node.text.find("inf") < 3 || node.text == ".nan") &&
             parse_number(node.text, *static_cast<double*>(value));
    default:
      break;
  }
  bool truth = false;
  double number = 0;
  if (plain && !any_scalar && (parse_bool(node.text, truth) || parse_number(node.text, number))) {
    hint = " (put it in quotes)";
    return false;
  }
  *static_cast<std::string*>(value) = node.text;
  return true;
}

// "a.b.\"c.d\"=value" -> {a, b, c.d}, value.
std::pair<std::vector<std::string>, std::string> split_override(const std::string& text) {
  const auto malformed = [&](const std::string& what) {
    return ConfigError("", "wanted key.path=value, got " + in_quotes(text, 60) + what, kCommandLine);
  };
  std::vector<std::string> parts(1);
  size_t i = 0;
  for (; i < text.size() && text[i] != '='; ++i) {
    if (text[i] == '.') {
      parts.emplace_back();
    } else if (text[i] != '"') {
      parts.back() += text[i];
    } else {
      const size_t begin = i;
      do i = text.find_first_of("\"\\", i + 1);
      while (i < text.size() && text[i] == '\\' && ++i < text.size());
      const std::string part = text.substr(begin, i < text.size() ? i + 1 - begin : std::string::npos);
      if (!nlohmann::json::accept(part)) throw malformed(", where a quote is not closed");
      parts.back() += nlohmann::json::parse(part).get<std::string>();
    }
  }
  if (i >= text.size()) throw malformed("");
  if (std::find(parts.begin(), parts.end(), "") != parts.end())
    throw malformed(", where a part of the path is empty");
  return {parts, text.substr(i + 1)};
}

// Text needs no quotes on the command line, where the shell has taken them off.
Node parse_override_value(const Type& type, const std::string& text) {
  const Type& inner = type.kind == Type::Kind::kOptional ? *type.element : type;
  const bool null = inner.kind != type.kind && (text.empty() || text == "null" || text == "~");
  if (inner.kind == Type::Kind::kText && !null && !text.starts_with('"') && !text.starts_with('\'')) {
    return {.kind = Node::Kind::kText, .text = text};
  }
  return parse_yaml(text, kCommandLine);
}

void check_limits(const Limits& limits, double value, const std::string& text, const std::string& path) {
  const auto require = [&](const std::optional<double>& bound, const char* what, auto holds) {
    if (bound && !holds(value, *bound)) {  // NaN holds nowhere
      const std::string number = format_scalar(*bound);
      throw ConfigError(path, std::string("wanted ") + what + " " +
                                  (number.ends_with(".0") ? number.substr(0, number.size() - 2) : number) +
                                  ", got " + text);
    }
  };
  require(limits.at_least, "at least", std::greater_equal<double>());
  require(limits.at_most, "at most", std::less_equal<double>());
  require(limits.above, "more than", std::greater<double>());
  require(limits.below, "less than", std::less<double>());
}

void check_one_of(const Limits& limits, const std::string& text, const std::string& path) {
  const auto& all = limits.one_of;
  if (all.empty() || std::find(all.begin(), all.end(), text) != all.end()) return;
  std::string names = all[0];
  for (size_t i = 1; i < all.size(); ++i) names += ", " + all[i];
  throw ConfigError(path,
                    (all.size() > 1 ? "wanted one of " : "wanted ") + names + ", got " + join_path("", text));
}

void check_value(const Type& type, const void* value, const Limits& limits, const std::string& path) {
  if (type.kind == Type::Kind::kInteger) {
    const int64_t number = *static_cast<const int64_t*>(value);
    check_limits(limits, static_cast<double>(number), format_scalar(number), path);
    check_one_of(limits, format_scalar(number), path);
  } else if (type.kind == Type::Kind::kNumber) {
    const double number = *static_cast<const double*>(value);
    check_limits(limits, number, format_scalar(number), path);
    check_one_of(limits, format_scalar(number), path);
  } else if (type.kind == Type::Kind::kText) {
    check_one_of(limits, *static_cast<const std::string*>(value), path);
  } else if (type.element != nullptr) {
    type.visit(value, [&](const std::string& key, const void* element) {
      check_value(*type.element, element, limits,
                  type.kind == Type::Kind::kOptional ? path : join_path(path, key));
    });
  }
  for (const FieldInfo& field : type.fields) {
    check_value(field.type(), field.member(const_cast<void*>(value)), field.limits,
                join_path(path, field.name));
  }
  if (type.check == nullptr) return;
  try {
    type.check(value);
  } catch (const ConfigError& e) {
    std::string text = e.text();  // may quote a value
    for (char& c : text) c = static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    throw ConfigError(path + (path.empty() || e.key_path().empty() ? "" : ".") + e.key_path(), text);
  }
}

}  // namespace

void check_value(const Type& type, const void* value) { check_value(type, value, {}, ""); }

Loader::Loader(const Type& type, void* config, std::string name)
    : type_(type), config_(config), name_(std::move(name)), source_(name_) {}

void Loader::read(const Node& document) {
  if (document.kind != Node::Kind::kNull) bind(type_, config_, document, "");
}

void Loader::apply_override(const std::string& text) {
  source_ = kCommandLine;
  check_text(text, source_);
  const auto [parts, value] = split_override(text);
  bind_at(type_, config_, parts, 0, value, "");
}

void Loader::check() const {
  try {
    check_value(type_, config_);
  } catch (const ConfigError& e) {
    throw ConfigError(e.key_path(), e.text(), origin(e.key_path()));
  }
}

void Loader::bind(const Type& type, void* value, const Node& node, const std::string& path, bool any_scalar) {
  origins_[path] = where(source_, node.line);
  std::string hint;
  bool fits = true;
  if (type.kind == Type::Kind::kOptional) {
    type.clear(value);
    if (node.kind == Node::Kind::kNull) return;
    type.edit(value, "", [&](void* inner) { bind(*type.element, inner, node, path, any_scalar); });
  } else if (type.kind == Type::Kind::kStruct && node.kind == Node::Kind::kMap) {
    bind_struct(type, value, node, path);
  } else if ((type.kind == Type::Kind::kList && node.kind == Node::Kind::kList) ||
             (type.kind == Type::Kind::kMap && node.kind == Node::Kind::kMap)) {
    bind_elements(type, value, node, path);
  } else {
    fits = is_scalar(type) && read_scalar(type, value, node, any_scalar, hint);
  }
  if (!fits) {
    throw ConfigError(path, "wanted " + wanted(type) + ", got " + what_came(node) + hint, origins_[path]);
  }
}

void Loader::bind_struct(const Type& type, void* value, const Node& node, const std::string& path) {
  for (const Node& child : node.entries) {
    const FieldInfo& field = find_field(type, child.key, path, where(source_, child.line));
    bind(field.type(), field.member(value), child, join_path(path, child.key));
  }
}

void Loader::bind_elements(const Type& type, void* value, const Node& node, const std::string& path) {
  type.clear(value);
  origins_.erase(origins_.lower_bound(path + "."), origins_.lower_bound(path + "/"));  // '/' follows '.'
  for (size_t i = 0; i < node.entries.size(); ++i) {
    const bool list = type.kind == Type::Kind::kList;
    const std::string key = list ? std::to_string(i) : node.entries[i].key;
    type.edit(value, key, [&](void* element) {
      bind(*type.element, element, node.entries[i], join_path(path, key), !list);
    });
  }
}

void Loader::bind_at(const Type& type, void* value, const std::vector<std::string>& parts, size_t i,
                     const std::string& text, const std::string& path) {
  if (i == parts.size()) {
    Node node;
    try {
      node = parse_override_value(type, text);
    } catch (const ConfigError& e) {
      throw ConfigError(path, e.text(), source_);
    }
    return bind(type, value, node, path);
  }
  const std::string& part = parts[i];
  const std::string part_path = join_path(path, part);
  switch (type.kind) {
    case Type::Kind::kStruct: {
      const FieldInfo& field = find_field(type, part, path, source_);
      return bind_at(field.type(), field.member(value), parts, i + 1, text, part_path);
    }
    case Type::Kind::kOptional:
      return type.edit(value, "", [&](void* inner) { bind_at(*type.element, inner, parts, i, text, path); });
    case Type::Kind::kMap: {
      std::string key = part;
      size_t next = i + 1;
      for (; is_scalar(*type.element) && next < parts.size(); ++next) key += "." + parts[next];
      const std::string key_path = join_path(path, key);
      return type.edit(value, key, [&](void* e) { bind_at(*type.element, e, parts, next, text, key_path); });
    }
    case Type::Kind::kList: {
      size_t size = 0;
      type.visit(value, [&](const std::string&, const void*) { ++size; });
      const std::string last = std::to_string(size);
      const bool digits =
          part.size() <= last.size() && part.find_first_not_of("0123456789") == std::string::npos;
      if (!digits || std::stoul(part) > size) {
        throw ConfigError(
            part_path,
            "wanted an index from 0 to " + last + " (" + last + " appends), got " + join_path("", part),
            source_);
      }
      return type.edit(value, part,
                       [&](void* e) { bind_at(*type.element, e, parts, i + 1, text, part_path); });
    }
    default:
      throw ConfigError(part_path, "unknown key, " + path + " is " + wanted(type), source_);
  }
}

const FieldInfo& Loader::find_field(const Type& type, const std::string& key, const std::string& path,
                                    const std::string& where) const {
  for (const FieldInfo& field : type.fields) {
    if (field.name == key) return field;
  }
  throw ConfigError(join_path(path, key), unknown_key(type_, type, key), where);
}

// The place of the key, else of the innermost mapping around it, else the whole source.
std::string Loader::origin(std::string path) const {
  for (;;) {
    const auto found = origins_.find(path);
    if (found != origins_.end()) return found->second;
    if (path.empty()) return name_;
    const size_t dot = path.rfind('.');
    path.resize(dot == std::string::npos ? 0 : dot);
  }
}

}  // namespace hymoe
