#include "config/node.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <optional>
#include <sstream>

#include <utf8proc.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include "config/scalar.h"
#include "hymoe/config/error.h"

namespace hymoe {
namespace {

constexpr int kMaxDepth = 100;        // an alias may hold itself
constexpr size_t kMaxNodes = 100000;  // aliases of aliases grow without bound

// What a node without its entries counts: aliases of long texts grow too.
size_t weight(const Node& node) { return 1 + node.text.size() / 1024; }

// Builds a Node from what the parser meets.
class YamlReader : public YAML::EventHandler {
 public:
  explicit YamlReader(const std::string& name) : name_(name) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) fail(mark, "wanted one document, got more text after its end");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    add({.kind = Node::Kind::kNull, .line = mark.line + 1}, mark, anchor);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& text) override {
    check_tag(mark, tag);
    const bool plain = tag != "!" && tag != "tag:yaml.org,2002:str";
    add({.kind = plain ? Node::Kind::kPlain : Node::Kind::kText, .text = text, .line = mark.line + 1}, mark,
        anchor);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(Node::Kind::kList, mark, tag, anchor);
  }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(Node::Kind::kMap, mark, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapEnd() override { close(); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) fail(mark, "an alias within what it stands for");
    Node node = found->second.first;
    nodes_ += found->second.second - weight(node);
    node.line = mark.line + 1;
    add(std::move(node), mark, 0);
  }

  Node take() && { return std::move(root_); }

  [[noreturn]] void fail(const YAML::Mark& mark, const std::string& text) const {
    throw ConfigError("", text, where(name_, mark.line + 1));
  }

 private:
  struct Open {
    Node node;
    YAML::Mark mark;
    YAML::anchor_t anchor;
    size_t nodes_before;
    std::optional<Node> key = {};                // of a map's next value
    std::map<std::string, int> first_line = {};  // of a map's keys
  };

  void open(Node::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    check_tag(mark, tag);
    if (open_.size() == kMaxDepth) fail(mark, "nested more than " + std::to_string(kMaxDepth) + " deep");
    open_.push_back({{.kind = kind, .line = mark.line + 1}, mark, anchor, nodes_});
  }

  void close() {
    Open last = std::move(open_.back());
    open_.pop_back();
    const size_t nodes = nodes_ + 1 - last.nodes_before;
    if (last.anchor != 0) anchors_[last.anchor] = {last.node, nodes};
    add(std::move(last.node), last.mark, 0);
  }

  void add(Node node, const YAML::Mark& mark, YAML::anchor_t anchor) {
    nodes_ += weight(node);
    if (nodes_ > kMaxNodes) fail(mark, "more than " + std::to_string(kMaxNodes) + " values");
    if (anchor != 0) anchors_[anchor] = {node, weight(node)};
    if (open_.empty()) {
      root_ = std::move(node);
    } else if (Open& outer = open_.back(); outer.node.kind == Node::Kind::kList) {
      outer.node.entries.push_back(std::move(node));
    } else if (!outer.key) {
      check_key(outer, node, mark);
      outer.key = std::move(node);
    } else {
      node.line = outer.key->line;
      node.key = std::move(outer.key->text);
      outer.node.entries.push_back(std::move(node));
      outer.key.reset();
    }
  }

  void check_key(Open& outer, const Node& key, const YAML::Mark& mark) const {
    if (key.kind != Node::Kind::kPlain && key.kind != Node::Kind::kText) fail(mark, "wanted text as a key");
    if (key.kind == Node::Kind::kPlain && key.text == "<<") fail(mark, "merge keys (<<) are not supported");
    const auto [first, added] = outer.first_line.emplace(key.text, key.line);
    if (!added) {
      const std::string line =
          name_ == kCommandLine ? "" : ", first in line " + std::to_string(first->second);
      fail(mark, "key " + in_quotes(key.text, 60) + " given twice" + line);
    }
  }

  void check_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (tag.size() > 1 && !tag.starts_with("tag:yaml.org,2002:")) {
      fail(mark, "tag " + in_quotes(tag, 60) + " is not supported");
    }
  }

  const std::string& name_;
  Node root_;
  std::vector<Open> open_;
  std::map<YAML::anchor_t, std::pair<Node, size_t>> anchors_;  // with how many nodes each is
  size_t nodes_ = 0;
  int documents_ = 0;
};

// JSON writes a character beyond U+FFFF as two \u escapes, which YAML does not know; YAML has \U for it.
std::string join_surrogates(const std::string& json) {
  const auto unit = [&](size_t i) -> uint32_t {
    return json.compare(i, 2, "\\u") == 0 ? std::stoul(json.substr(i + 2, 4), nullptr, 16) : 0;
  };
  std::string yaml;
  for (size_t i = 0; i < json.size();) {
    const size_t escape = std::min(json.find('\\', i), json.size());
    yaml.append(json, i, escape - i);
    i = escape;
    if (i == json.size()) break;
    const uint32_t high = unit(i);
    const bool pair = high >= 0xD800 && high < 0xDC00 && i + 12 <= json.size();
    const uint32_t low = pair ? unit(i + 6) : 0;
    if (low >= 0xDC00 && low < 0xE000) {
      char text[16];
      std::snprintf(text, sizeof(text), "\\U%08X", 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00));
      yaml += text;
      i += 12;
    } else {
      yaml.append(json, i, 2);
      i += 2;
    }
  }
  return yaml;
}

// Text that every YAML reader takes for this text also without quotes.
bool is_plain_text(const std::string& text) {
  static constexpr std::string_view kOtherwise[] = {"true", "false", "null", "yes", "no",
                                                    "on",   "off",   "y",    "n"};
  if (text.empty() ||
      !(std::isalpha(static_cast<unsigned char>(text[0])) || text[0] == '_' || text[0] == '/')) {
    return false;
  }
  const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return c < 0x80 &&
           (std::isalnum(c) || std::string_view("_-./+").find(static_cast<char>(c)) != std::string::npos);
  });
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  return plain && std::find(std::begin(kOtherwise), std::end(kOtherwise), lower) == std::end(kOtherwise);
}

std::string yaml_text(const std::string& text) { return is_plain_text(text) ? text : in_quotes(text); }

bool is_container(const Node& node) {
  return node.kind == Node::Kind::kList || node.kind == Node::Kind::kMap;
}

bool fits_one_line(const Node& node) {
  if (node.kind == Node::Kind::kMap) return node.entries.empty();
  return std::none_of(node.entries.begin(), node.entries.end(), is_container);
}

void write_block(const Node& node, const std::string& indent, std::string& out) {
  for (const Node& value : node.entries) {
    const bool in_map = node.kind == Node::Kind::kMap;
    out += indent + (in_map ? yaml_text(value.key) + ":" : "-");
    if (fits_one_line(value)) {
      out += ' ';
      out += write_yaml_flow(value);
      out += '\n';
    } else if (in_map) {
      out += "\n";
      write_block(value, indent + "  ", out);
    } else {  // the element's first line goes on the line of the dash
      std::string block;
      write_block(value, indent + "  ", block);
      out += block.substr(indent.size() + 1);
    }
  }
}

}  // namespace

std::string where(const std::string& name, int line) {
  return line > 0 && name != kCommandLine ? name + ":" + std::to_string(line) : name;
}

void check_text(const std::string& text, const std::string& name) {
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t c = 0;
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data() + i);
    const utf8proc_ssize_t length =
        utf8proc_iterate(bytes, static_cast<utf8proc_ssize_t>(text.size() - i), &c);
    if (length < 0) throw ConfigError("", "wanted UTF-8 text, got other bytes", where(name, line));
    if (c < ' ' && c != '\t' && c != '\n' && c != '\r') {
      throw ConfigError("", "wanted text, got the control character " + std::to_string(c), where(name, line));
    }
    line += c == '\n';
    i += static_cast<size_t>(length);
  }
}

Node parse_yaml(const std::string& text, const std::string& name) {
  check_text(text, name);
  const bool json_escapes = text.find("\\u") != std::string::npos && nlohmann::json::accept(text);
  std::istringstream stream(json_escapes ? join_surrogates(text) : text);
  YamlReader reader(name);
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(reader)) {
    }
  } catch (const YAML::Exception& e) {
    reader.fail(e.mark, "not valid YAML: " + e.msg);
  }
  return std::move(reader).take();
}

Node node_from_json(const nlohmann::json& json) {
  if (json.is_null()) return {};
  if (json.is_string()) return {.kind = Node::Kind::kText, .text = json.get<std::string>()};
  if (!json.is_structured()) return {.kind = Node::Kind::kPlain, .text = json.dump()};
  Node node{.kind = json.is_array() ? Node::Kind::kList : Node::Kind::kMap};
  for (const auto& [key, value] : json.items()) {
    node.entries.push_back(node_from_json(value));
    if (json.is_object()) node.entries.back().key = key;
  }
  return node;
}

std::string write_yaml(const Node& node) {
  if (fits_one_line(node)) return write_yaml_flow(node) + "\n";
  std::string out;
  write_block(node, "", out);
  return out;
}

std::string write_yaml_flow(const Node& node) {
  if (node.kind == Node::Kind::kNull) return "null";
  if (node.kind == Node::Kind::kPlain) return node.text;
  if (node.kind == Node::Kind::kText) return yaml_text(node.text);
  const bool map = node.kind == Node::Kind::kMap;
  std::string out = map ? "{" : "[";
  for (const Node& value : node.entries) {
    if (out.size() > 1) out += ", ";
    if (map) out += yaml_text(value.key) + ": ";
    out += write_yaml_flow(value);
  }
  return out + (map ? "}" : "]");
}

nlohmann::json write_json(const Node& node) {
  switch (node.kind) {
    case Node::Kind::kNull:
      return nullptr;
    case Node::Kind::kPlain:  // JSON has no infinity
      return nlohmann::json::accept(node.text) ? nlohmann::json::parse(node.text) : nlohmann::json(node.text);
    case Node::Kind::kText:
      return node.text;
    case Node::Kind::kList: {
      auto list = nlohmann::json::array();
      for (const Node& value : node.entries) list.push_back(write_json(value));
      return list;
    }
    case Node::Kind::kMap: {
      auto map = nlohmann::json::object();
      for (const Node& value : node.entries) map[value.key] = write_json(value);
      return map;
    }
  }
  return nullptr;
}

std::string what_came(const Node& node) {
  constexpr size_t kLongest = 60;
  switch (node.kind) {
    case Node::Kind::kNull:
      return "nothing";
    case Node::Kind::kPlain: {
      const bool harmless = node.text.size() <= kLongest && node.text.find('\n') == std::string::npos;
      return harmless ? node.text : in_quotes(node.text, kLongest);
    }
    case Node::Kind::kText:
      return "the text " + in_quotes(node.text, kLongest);
    case Node::Kind::kList:
      return "a list";
    case Node::Kind::kMap:
      return "a mapping";
  }
  return "";
}

}  // namespace hymoe
