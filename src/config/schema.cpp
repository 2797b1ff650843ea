#include "hymoe/config/schema.h"

#include <algorithm>

#include "config/scalar.h"
#include "hymoe/config/config.h"

namespace hymoe {
namespace {

std::string type_name(const Type& type, bool many = false) {
  const std::string s = many ? "s" : "";
  switch (type.kind) {
    case Type::Kind::kBool:
      return "true or false";
    case Type::Kind::kInteger:
      return "integer" + s;
    case Type::Kind::kNumber:
      return "number" + s;
    case Type::Kind::kText:
      return "text";
    case Type::Kind::kStruct:
      return "mapping" + s;
    case Type::Kind::kList:
      return "list" + s + " of " + type_name(*type.element, true);
    case Type::Kind::kOptional:
      return type_name(*type.element, many) + " or null";
    case Type::Kind::kMap:
      return "mapping" + s + " of names to " + type_name(*type.element, true);
  }
  return "";
}

std::string constraint_text(const Limits& limits) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  const auto add_bound = [&](const char* what, const std::optional<double>& bound) {
    if (!bound) return;
    const std::string number = format_scalar(*bound);
    add(std::string(what) + " " + (number.ends_with(".0") ? number.substr(0, number.size() - 2) : number));
  };
  add_bound("at least", limits.at_least);
  add_bound("more than", limits.above);
  add_bound("at most", limits.at_most);
  add_bound("less than", limits.below);
  std::string names;
  for (const std::string& name : limits.one_of) names += (names.empty() ? "one of " : ", ") + name;
  if (!names.empty()) add(names);
  return text;
}

// The struct inside lists, maps and optionals, or null.
const Type* inner_struct(const Type& type) {
  if (type.kind == Type::Kind::kStruct) return &type;
  return type.element == nullptr ? nullptr : inner_struct(*type.element);
}

std::string default_text(const Type& type, const void* value) {
  if (type.kind == Type::Kind::kStruct) return "";
  std::string text = detail::to_yaml(type, value);
  if (inner_struct(type) == nullptr || std::count(text.begin(), text.end(), '\n') == 1) {
    text.pop_back();
    return text;
  }
  size_t size = 0;
  type.visit(value, [&](const std::string&, const void*) { ++size; });
  return type.kind == Type::Kind::kOptional ? "given"
                                            : std::to_string(size) + (size == 1 ? " entry" : " entries");
}

void add_fields(const Type& type, const void* config, const std::string& path,
                std::vector<SchemaEntry>& entries) {
  for (const FieldInfo& field : type.fields) {
    const Type* field_type = &field.type();
    const void* value = field.member(const_cast<void*>(config));
    std::string field_path = join_path(path, field.name);
    entries.push_back({field_path, type_name(*field_type), default_text(*field_type, value),
                       constraint_text(field.limits), field.help});
    const Type* inner = inner_struct(*field_type);
    if (inner == nullptr) continue;
    if (inner == field_type) {
      add_fields(*inner, value, field_path, entries);
      continue;
    }
    for (; field_type != inner; field_type = field_type->element) {
      if (field_type->kind == Type::Kind::kList) field_path += ".<n>";
      if (field_type->kind == Type::Kind::kMap) field_path += ".<name>";
    }
    inner->with_default([&](const void* element) { add_fields(*inner, element, field_path, entries); });
  }
}

std::string parent(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

struct Section {
  std::string path;
  std::string help;
  std::vector<SchemaEntry> entries;
};

// One section a struct, outer before inner; a section's help is that of the field which holds the struct.
std::vector<Section> sections(const std::vector<SchemaEntry>& entries) {
  std::vector<Section> all;
  std::map<std::string, size_t> index;
  std::map<std::string, std::string> help;
  for (const SchemaEntry& entry : entries) {
    help[entry.path] = entry.help;
    const std::string path = parent(entry.path);
    const auto [found, added] = index.emplace(path, all.size());
    if (added) {
      std::string holder = path;
      while (!holder.empty() && !help.contains(holder)) holder = parent(holder);
      all.push_back({path, help[holder], {}});
    }
    SchemaEntry short_entry = entry;
    short_entry.path = entry.path.substr(path.empty() ? 0 : path.size() + 1);
    all[found->second].entries.push_back(std::move(short_entry));
  }
  return all;
}

std::string help_with_constraint(const SchemaEntry& entry) {
  if (entry.constraint.empty()) return entry.help;
  return entry.help.empty() ? entry.constraint : entry.help + " (" + entry.constraint + ")";
}

// Breaks at spaces so that no line goes past `width` columns if it can; continuation lines begin with
// `indent` spaces.
std::string wrap(const std::string& text, size_t column, size_t indent, size_t width) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t end = std::min(text.find(' ', i), text.size());
    if (!out.empty() && column + 1 + end - i > width) {
      out += '\n';
      out.append(indent, ' ');
      column = indent;
    } else if (!out.empty()) {
      out += ' ';
      ++column;
    }
    out += text.substr(i, end - i);
    column += end - i;
    i = end + 1;
  }
  return out;
}

std::string cell(std::string text) {
  for (size_t i = 0; (i = text.find('|', i)) != std::string::npos; i += 2) text.insert(i, 1, '\\');
  return text;
}

std::string code(const std::string& text) {
  std::string out = "`";
  out += cell(text);
  return text.empty() ? text : out + "`";
}

void flatten(const nlohmann::json& json, const std::string& path, std::map<std::string, std::string>& out) {
  if (!json.is_structured() || json.empty()) {
    out[path] = json.dump();
    return;
  }
  for (const auto& [key, value] : json.items()) flatten(value, join_path(path, key), out);
}

}  // namespace

namespace detail {

std::vector<SchemaEntry> describe(const Type& type) {
  std::vector<SchemaEntry> entries;
  type.with_default([&](const void* config) { add_fields(type, config, "", entries); });
  return entries;
}

std::string help_text(const Type& type) {
  constexpr size_t kWidth = 110, kWidestKey = 28, kWidestValue = 36;
  const std::vector<Section> all = sections(describe(type));
  const auto value_of = [](const SchemaEntry& e) {
    return e.type + (e.value.empty() ? "" : " = " + e.value);
  };
  size_t key_width = 0, value_width = 0;
  for (const Section& section : all) {
    for (const SchemaEntry& entry : section.entries) {
      if (entry.path.size() <= kWidestKey) key_width = std::max(key_width, entry.path.size());
      if (value_of(entry).size() <= kWidestValue) value_width = std::max(value_width, value_of(entry).size());
    }
  }
  const size_t value_column = key_width + 4, help_column = value_column + value_width + 2;
  std::string out;
  for (const Section& section : all) {
    if (!out.empty()) out += "\n";
    if (!section.path.empty()) {
      out += wrap(section.path + (section.help.empty() ? "" : ": " + section.help), 0, 2, kWidth) + "\n";
    }
    for (const SchemaEntry& entry : section.entries) {
      std::string line = "  " + entry.path;
      const auto go_to = [&](size_t column) {
        const size_t used = line.size() - (line.find_last_of('\n') + 1);
        const bool next_line = used > 0 && used + 2 > column;
        if (next_line) line += '\n';
        line.append(next_line ? column : column - used, ' ');
      };
      go_to(value_column);
      line += wrap(value_of(entry), value_column, value_column, kWidth);
      const std::string help = help_with_constraint(entry);
      if (!help.empty()) {
        go_to(help_column);
        line += wrap(help, help_column, help_column, kWidth);
      }
      out += line + "\n";
    }
  }
  return out;
}

std::string markdown_reference(const Type& type, const std::string& title) {
  std::string out = "# " + title + "\n";
  for (const Section& section : sections(describe(type))) {
    if (!section.path.empty()) out += "\n## " + code(section.path) + "\n";
    if (!section.help.empty()) out += "\n" + section.help + "\n";
    out += "\n| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n";
    for (const SchemaEntry& entry : section.entries) {
      out += "| " + code(entry.path) + " | " + entry.type + " | " + code(entry.value) + " | " +
             cell(entry.constraint) + " | " + cell(entry.help) + " |\n";
    }
  }
  return out;
}

}  // namespace detail

std::vector<std::string> config_difference(const nlohmann::json& a, const nlohmann::json& b) {
  std::map<std::string, std::string> old_values, new_values;
  flatten(a, "", old_values);
  flatten(b, "", new_values);
  std::map<std::string, std::string> all = old_values;
  all.insert(new_values.begin(), new_values.end());
  // An empty list or map is told by its new or old elements.
  const auto filled = [](const std::map<std::string, std::string>& values, const std::string& path) {
    const auto next = values.lower_bound(path + ".");
    return next != values.end() && next->first.starts_with(path + ".");
  };
  std::vector<std::string> lines;
  for (const auto& [path, value] : all) {
    const auto before = old_values.find(path), after = new_values.find(path);
    if (filled(old_values, path) || filled(new_values, path)) continue;
    const std::string from = before == old_values.end() ? "(none)" : before->second;
    const std::string to = after == new_values.end() ? "(none)" : after->second;
    if (from != to) lines.push_back(path + ": " + from + " → " + to);
  }
  return lines;
}

}  // namespace hymoe
