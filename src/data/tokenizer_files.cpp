#include <algorithm>
#include <charconv>
#include <functional>
#include <queue>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/json_node.h"
#include "data/tokenizer_spec.h"

namespace hymoe {
namespace {

constexpr int64_t kMaxId = int64_t{1} << 20;  // all ids below the largest take memory

constexpr std::string_view kQwenPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Calls `use` with each line, without its end, and its number.
template <typename Use>
void for_each_line(std::string_view text, const Use& use) {
  int64_t number = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    use(line, ++number);
  }
}

std::optional<std::string> decode_base64(std::string_view text) {
  static constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string_view digits = text;
  while (digits.ends_with('=')) digits.remove_suffix(1);
  if (digits.empty() || text.size() % 4 != 0 || text.size() - digits.size() > 2) return std::nullopt;
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (const char c : digits) {
    const size_t value = kDigits.find(c);
    if (value == std::string_view::npos) return std::nullopt;
    bits = bits << 6 | static_cast<uint32_t>(value);
    count += 6;
    if (count >= 8) bytes += static_cast<char>(bits >> (count -= 8));
  }
  return bytes;
}

// Bytes with a hash of theirs that takes no longer for more of them.
struct Hashed {
  std::string_view bytes;
  uint64_t hash;
  bool operator==(const Hashed& other) const { return hash == other.hash && bytes == other.bytes; }
};

// The parts of one text, hashed as polynomials of the bytes.
class Parts {
 public:
  explicit Parts(std::string_view text) : text_(text), sums_{0}, powers_{1} {
    constexpr uint64_t kBase = 0x9E3779B97F4A7C15u;
    sums_.reserve(text.size() + 1);
    powers_.reserve(text.size() + 1);
    for (const char c : text) {
      sums_.push_back(sums_.back() * kBase + static_cast<unsigned char>(c) + 1);
      powers_.push_back(powers_.back() * kBase);
    }
  }
  Hashed operator()(size_t begin, size_t end) const {
    return {text_.substr(begin, end - begin), sums_[end] - sums_[begin] * powers_[end - begin]};
  }

 private:
  std::string_view text_;
  std::vector<uint64_t> sums_, powers_;
};

struct HashOf {
  size_t operator()(const Hashed& x) const { return x.hash ^ x.hash >> 32; }
};
using Ranks = std::unordered_map<Hashed, int64_t, HashOf>;

// The two parts that byte pair encoding by ranks, of all tokens before `token`, leaves of it; how many parts
// it leaves otherwise.
size_t split_by_ranks(const Parts& token, size_t size, int64_t rank, const Ranks& ranks, size_t& cut) {
  struct Candidate {
    int64_t rank;
    size_t begin, middle, end;
    bool operator>(const Candidate& other) const {
      return std::tie(rank, begin) > std::tie(other.rank, other.begin);
    }
  };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
  std::vector<size_t> next(size + 1),
      last(size + 1);  // where parts begin; next is 0 where none does any more
  const auto push = [&](size_t begin) {
    const size_t middle = next[begin];
    if (middle == size) return;
    const auto found = ranks.find(token(begin, next[middle]));
    if (found != ranks.end() && found->second < rank) heap.push({found->second, begin, middle, next[middle]});
  };
  for (size_t i = 0; i <= size; ++i) {
    next[i] = i + 1;
    last[i] = i - 1;
  }
  for (size_t i = 0; i < size; ++i) push(i);
  size_t parts = size;
  while (parts > 2 && !heap.empty()) {
    const auto [_, begin, middle, end] = heap.top();
    heap.pop();
    if (next[begin] != middle || next[middle] != end) continue;
    next[begin] = end;
    next[middle] = 0;
    last[end] = begin;
    --parts;
    push(begin);
    if (begin > 0) push(last[begin]);
  }
  cut = next[0];
  return parts;
}

}  // namespace

void VocabularyBuilder::fail(const std::string& where, const std::string& text) const {
  throw DataError(file_, one_line(where.empty() ? text : where + ": " + text));
}

void VocabularyBuilder::add_token(const std::string& token, int64_t id, const std::string& where) {
  if (id < 0 || id >= kMaxId) {
    fail(where, "id of \"" + token + "\": wanted 0 to " + std::to_string(kMaxId - 1) + ", got " +
                    std::to_string(id));
  }
  if (token.empty()) fail(where, "id " + std::to_string(id) + " is given to an empty token");
  if (spec_.vocabulary.size() <= static_cast<size_t>(id))
    spec_.vocabulary.resize(static_cast<size_t>(id) + 1);
  std::string& slot = spec_.vocabulary[static_cast<size_t>(id)];
  if (!slot.empty()) {
    fail(where, "id " + std::to_string(id) + " is given to both \"" + slot + "\" and \"" + token + "\"");
  }
  if (!ids_.emplace(token, static_cast<int32_t>(id)).second) fail(where, "\"" + token + "\" comes twice");
  slot = token;
}

std::optional<int32_t> VocabularyBuilder::find(const std::string& token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

int32_t VocabularyBuilder::need(const std::string& token, const std::string& where) const {
  const std::optional<int32_t> id = find(token);
  if (!id) fail(where, "\"" + token + "\" is not in the vocabulary");
  return *id;
}

void VocabularyBuilder::add_merge(const std::string& left, const std::string& right,
                                  const std::string& where) {
  spec_.merges.push_back({need(left, where), need(right, where), need(left + right, where)});
}

void VocabularyBuilder::add_merge(std::string_view line, const std::string& where) {
  const size_t space = line.find(' ');
  if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
    fail(where, "wanted two tokens with a space between, got \"" + std::string(line) + "\"");
  }
  add_merge(std::string(line.substr(0, space)), std::string(line.substr(space + 1)), where);
}

void VocabularyBuilder::add_added_token(AddedToken token, const std::string& where) {
  const auto quoted = "\"" + token.content + "\"";
  if (token.id < 0 || token.id >= kMaxId) fail(where, "id of " + quoted + " is " + std::to_string(token.id));
  const std::optional<int32_t> in_model = find(token.content);
  if (in_model && *in_model != token.id) {
    fail(where, quoted + " has id " + std::to_string(token.id) + " here and " + std::to_string(*in_model) +
                    " in the vocabulary");
  }
  const auto slot = static_cast<size_t>(token.id);
  if (!in_model && slot < spec_.vocabulary.size() && !spec_.vocabulary[slot].empty()) {
    fail(where, "id " + std::to_string(token.id) + " is given to both \"" + spec_.vocabulary[slot] +
                    "\" and " + quoted);
  }
  const size_t number = spec_.added.size();
  const size_t before = std::min(added_contents_.emplace(token.content, number).first->second,
                                 added_ids_.emplace(token.id, number).first->second);
  if (before < number) {
    const AddedToken& other = spec_.added[before];
    fail(where, quoted + " with id " + std::to_string(token.id) + " repeats \"" + other.content +
                    "\" with id " + std::to_string(other.id));
  }
  spec_.added.push_back(std::move(token));
}

namespace {

// What a folder says of tokens beyond its vocab.json, as transformers reads it: tokenizer_config.json's
// added_tokens_decoder with their flags, then those that only added_tokens.json has, which are special where
// a special token is called so.
std::vector<AddedToken> read_added_tokens(const std::filesystem::path& folder) {
  std::vector<AddedToken> tokens;
  std::set<std::string> special;
  const auto visit = [&](const char* name, const auto& body) {
    const std::filesystem::path path = folder / name;
    if (!std::filesystem::exists(path)) return;
    const nlohmann::json json = read_json(path);
    const std::string file = path.string();
    const JsonNode root(json, file, "");
    if (!json.is_object()) root.fail("wanted an object");
    body(root);
  };
  const auto text_of = [](const JsonNode& token) {
    return token.is_string() ? token.string() : token.at("content").string();
  };
  const auto read_special = [&](const JsonNode& root) {
    for (const char* which : {"bos", "eos", "unk", "sep", "pad", "cls", "mask"}) {
      if (const auto token = root.find(std::string(which) + "_token")) special.insert(text_of(*token));
    }
    if (const auto more = root.find("additional_special_tokens")) {
      for (const JsonNode& token : more->array()) special.insert(text_of(token));
    }
  };
  visit("special_tokens_map.json", read_special);
  visit("tokenizer_config.json", [&](const JsonNode& root) {
    read_special(root);
    const auto added = root.find("added_tokens_decoder");
    if (!added) return;
    for (const auto& [key, value] : added->value().items()) {
      const JsonNode token = added->at(key);
      int32_t id = -1;
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
      if (error != std::errc() || end != key.data() + key.size())
        token.fail("wanted the id of a token as key");
      tokens.push_back(read_added_token(token, id));
    }
  });
  visit("added_tokens.json", [&](const JsonNode& root) {
    for (const auto& [content, value] : root.value().items()) {
      const int32_t id = read_token_id(root.at(content));
      const auto known = std::find_if(tokens.begin(), tokens.end(), [&](const AddedToken& token) {
        return token.id == id && token.content == content;
      });
      if (known == tokens.end())
        tokens.push_back({.id = id, .content = content, .special = special.contains(content)});
    }
  });
  return tokens;
}

}  // namespace

TokenizerSpec read_gpt2_files(const std::filesystem::path& vocab, const std::filesystem::path& merges) {
  const nlohmann::json tokens = read_json(vocab);
  if (!tokens.is_object()) throw DataError(vocab.string(), "wanted an object of tokens and ids");
  TokenizerSpec spec;
  VocabularyBuilder builder(vocab.string(), spec);
  for (const auto& [token, id] : tokens.items()) {
    if (!id.is_number_integer())
      throw DataError(vocab.string(), one_line("id of \"" + token + "\" is no integer"));
    builder.add_token(token, id.get<int64_t>(), "");
  }
  const std::string text = read_text(merges);
  for_each_line(text, [&](std::string_view line, int64_t number) {
    if (line.starts_with("#version") || line.empty()) return;
    try {
      builder.add_merge(line, "");
    } catch (const DataError& e) {
      const std::string what = e.what();
      throw DataError(merges.string() + ":" + std::to_string(number), what.substr(what.find(": ") + 2));
    }
  });
  spec.splits.push_back(SplitStep::regex(kGpt2Pattern));
  for (AddedToken& token : read_added_tokens(vocab.parent_path()))
    builder.add_added_token(std::move(token), "added tokens");
  const std::string end = "<|endoftext|>";
  const auto is_end = [&](const AddedToken& token) { return token.content == end; };
  if (const auto id = builder.find(end); id && std::none_of(spec.added.begin(), spec.added.end(), is_end))
    builder.add_added_token({.id = *id, .content = end, .special = true}, "");
  return spec;
}

TokenizerSpec read_tiktoken(const std::filesystem::path& file) {
  TokenizerSpec spec;
  VocabularyBuilder builder(file.string(), spec);
  const std::string text = read_text(file);
  std::vector<std::string> tokens;
  for_each_line(text, [&](std::string_view line, int64_t number) {
    const std::string where = file.string() + ":" + std::to_string(number);
    const size_t space = std::min(line.find(' '), line.size());
    const std::optional<std::string> bytes = decode_base64(line.substr(0, space));
    const std::string_view digits = line.substr(std::min(space + 1, line.size()));
    int64_t rank = -1;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (!bytes || error != std::errc() || end != digits.data() + digits.size()) {
      throw DataError(where, "wanted a token in base64, a space and its rank");
    }
    if (rank != static_cast<int64_t>(tokens.size())) {
      throw DataError(where,
                      "wanted rank " + std::to_string(tokens.size()) + ", got " + std::to_string(rank));
    }
    builder.add_token(characters_of_bytes(*bytes), rank, "");
    tokens.push_back(*bytes);
  });
  Ranks ranks;
  for (size_t rank = 0; rank < tokens.size(); ++rank) {
    ranks.emplace(Parts(tokens[rank])(0, tokens[rank].size()), rank);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text(1, static_cast<char>(byte));
    if (!ranks.contains(Parts(text)(0, 1))) {
      throw DataError(file.string(), "byte " + std::to_string(byte) + " has no rank");
    }
  }
  for (size_t rank = 0; rank < tokens.size(); ++rank) {
    const size_t size = tokens[rank].size();
    if (size == 1) continue;
    const Parts token(tokens[rank]);
    size_t cut = 0;
    if (const size_t parts = split_by_ranks(token, size, static_cast<int64_t>(rank), ranks, cut);
        parts != 2) {
      throw DataError(file.string(), "rank " + std::to_string(rank) + ": the lower ranks leave " +
                                         std::to_string(parts) + " parts of this token, wanted 2");
    }
    spec.merges.push_back({static_cast<int32_t>(ranks.at(token(0, cut))),
                           static_cast<int32_t>(ranks.at(token(cut, size))), static_cast<int32_t>(rank)});
  }
  spec.nfc = true;
  spec.splits.push_back(SplitStep::regex(kQwenPattern));
  auto id = static_cast<int32_t>(tokens.size());
  for (const char* content : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
    builder.add_added_token({.id = id++, .content = content, .special = true}, "");
  }
  return spec;
}

}  // namespace hymoe
