#include "hymoe/data/tokenizer.h"

#include <algorithm>
#include <initializer_list>
#include <unordered_map>
#include <utility>

#include "data/json_node.h"
#include "data/tokenizer_spec.h"
#include "data/unicode.h"
#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/io/utf8.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

// The file of a tokenizer that `path` means.
fs::path find_tokenizer(const fs::path& path) {
  if (!fs::is_directory(path)) return path;
  for (const char* name : {"tokenizer.json", "vocab.json"}) {
    if (fs::exists(path / name)) return path / name;
  }
  std::vector<fs::path> ranks;
  for (const fs::directory_entry& entry : fs::directory_iterator(path)) {
    if (entry.path().extension() == ".tiktoken") ranks.push_back(entry.path());
  }
  if (ranks.size() == 1) return ranks[0];
  throw DataError(path.string(), ranks.empty() ? "holds no tokenizer.json, vocab.json or *.tiktoken"
                                               : "holds more than one *.tiktoken: name one");
}

TokenizerSpec read_spec(const fs::path& file) {
  constexpr std::string_view kVocab = "vocab.json";
  const std::string name = file.filename().string();
  if (file.extension() == ".tiktoken") return read_tiktoken(file);
  if (!name.ends_with(kVocab)) return read_tokenizer_json(file);
  if (const fs::path config = file.parent_path() / "tokenizer_config.json"; fs::exists(config)) {
    const nlohmann::json json = read_json(config);
    const std::string config_name = config.string();
    const auto type = JsonNode(json, config_name, "").find("tokenizer_class");
    if (type && !type->string().starts_with("GPT2Tokenizer")) {
      type->fail("vocab.json and merges.txt are read as GPT-2's, not as those of " + type->string() +
                 ": save it as tokenizer.json");
    }
  }
  const std::string prefix = name.substr(0, name.size() - kVocab.size());
  return read_gpt2_files(file, file.parent_path() / (prefix + "merges.txt"));
}

void update(Sha256& hash, std::string_view text) {
  hash.update(std::to_string(text.size()) + ":");
  hash.update(text);
}

void update(Sha256& hash, std::initializer_list<int64_t> numbers) {
  std::string text;
  for (const int64_t number : numbers) text += std::to_string(number) + ",";
  hash.update(text);
}

std::string fingerprint_of(const TokenizerSpec& spec) {
  Sha256 hash;
  update(hash, "hymoe byte-level BPE 1");
  update(hash, {static_cast<int64_t>(spec.vocabulary.size())});
  for (const std::string& token : spec.vocabulary) update(hash, token);
  update(hash, {static_cast<int64_t>(spec.merges.size())});
  for (const Merge& merge : spec.merges) update(hash, {merge.left, merge.right});
  update(hash, {spec.bpe.ignore_merges, spec.bpe.unknown.value_or(-1), spec.bpe.fuse_unknown, spec.nfc,
                static_cast<int64_t>(spec.splits.size())});
  for (const SplitStep& step : spec.splits) {
    update(hash, {static_cast<int64_t>(step.kind), static_cast<int64_t>(step.behavior), step.invert});
    update(hash, step.pattern);
  }
  std::vector<AddedToken> added = spec.added;
  std::ranges::sort(added, {}, &AddedToken::id);
  for (const AddedToken& token : added) {
    update(hash, {token.id, token.special, token.normalized && spec.nfc, token.lstrip, token.rstrip,
                  token.single_word});
    update(hash, token.content);
  }
  return hash.hex();
}

std::vector<std::string> bytes_of(const std::vector<std::string>& vocabulary) {
  std::vector<std::string> tokens;
  for (const std::string& token : vocabulary) tokens.push_back(bytes_of_characters(token).value_or(""));
  return tokens;
}

std::vector<AddedToken> added_tokens(const TokenizerSpec& spec, bool normalized) {
  std::vector<AddedToken> tokens;
  for (AddedToken token : spec.added) {
    if ((token.normalized && spec.nfc) != normalized) continue;
    std::string buffer;
    if (normalized) token.content = std::string(to_nfc(token.content, buffer));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

}  // namespace

struct Tokenizer::State {
  explicit State(const TokenizerSpec& spec);
  void read_ends(const fs::path& folder);
  void encode_words(std::string_view text, std::vector<int32_t>& out) const;
  std::optional<int32_t> find(std::string_view token) const;

  Bpe bpe;
  TextSplitter splitter;
  bool nfc;
  AddedTokenFinder added;             // in the text as it comes
  AddedTokenFinder added_normalized;  // in the normalised text
  std::vector<std::string> bytes;     // by id
  std::vector<bool> special;
  std::unordered_map<std::string, int32_t> ids;
  std::vector<int32_t> prefix;
  std::optional<int32_t> bos;
  std::optional<int32_t> eos;
  std::string fingerprint;
};

Tokenizer::State::State(const TokenizerSpec& spec)
    : bpe(bytes_of(spec.vocabulary), spec.merges, spec.bpe),
      splitter(spec.splits),
      nfc(spec.nfc),
      added(added_tokens(spec, false)),
      added_normalized(added_tokens(spec, true)),
      prefix(spec.prefix),
      fingerprint(fingerprint_of(spec)) {
  for (const std::string& token : spec.vocabulary) {
    if (!token.empty()) ids.emplace(token, static_cast<int32_t>(bytes.size()));
    bytes.push_back(bytes_of_characters(token).value_or(token));
  }
  for (const AddedToken& token : spec.added) {
    const auto id = static_cast<size_t>(token.id);
    bytes.resize(std::max(bytes.size(), id + 1));
    special.resize(bytes.size());
    bytes[id] = token.content;
    special[id] = token.special;
    ids[token.content] = token.id;
  }
  special.resize(bytes.size());
}

std::optional<int32_t> Tokenizer::State::find(std::string_view token) const {
  const auto found = ids.find(std::string(token));
  if (found == ids.end()) return std::nullopt;
  return found->second;
}

// What the files beside the tokenizer's say of the tokens that begin and end a text.
void Tokenizer::State::read_ends(const fs::path& folder) {
  const auto read = [&](const std::string& which, std::initializer_list<const char*> usual) {
    for (const char* name : {"tokenizer_config.json", "generation_config.json", "config.json"}) {
      const fs::path file = folder / name;
      if (!fs::exists(file)) continue;
      const nlohmann::json json = read_json(file);
      const std::string file_name = file.string();
      const bool by_text = std::string_view(name) == "tokenizer_config.json";
      const std::string key = which + (by_text ? "_token" : "_token_id");
      const JsonNode root(json, file_name, "");
      std::optional<JsonNode> node = root.find(key);
      if (!node && !root.value().contains(key)) continue;
      if (!node) return std::optional<int32_t>();  // null: it has none
      if (by_text) {
        if (!node->is_string()) node = node->at("content");
        const std::optional<int32_t> id = find(node->string());
        if (!id) node->fail("\"" + node->string() + "\" is not in the vocabulary");
        return id;
      }
      if (node->is_array()) {
        const std::vector<JsonNode> items = node->array();
        if (items.empty()) continue;
        node = items[0];
      }
      const int64_t id = node->integer();
      if (id < 0 || id >= static_cast<int64_t>(bytes.size())) {
        node->fail("wanted the id of a token, below " + std::to_string(bytes.size()) + ", got " +
                   std::to_string(id));
      }
      return std::optional<int32_t>(static_cast<int32_t>(id));
    }
    for (const char* token : usual) {
      if (const auto id = find(token)) return id;
    }
    return std::optional<int32_t>();
  };
  bos = read("bos", {"<|begin_of_text|>", "<s>"});
  eos = read("eos", {"<|endoftext|>", "<|end_of_text|>", "</s>"});
}

void Tokenizer::State::encode_words(std::string_view text, std::vector<int32_t>& out) const {
  splitter.split(text, [&](std::string_view word) { bpe.encode(word, out); });
}

Tokenizer Tokenizer::load(const std::filesystem::path& file_or_folder) {
  const fs::path file = find_tokenizer(file_or_folder);
  auto state = std::make_shared<State>(read_spec(file));
  state->read_ends(file.parent_path());
  return Tokenizer(std::move(state));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool allow_special) const {
  std::vector<int32_t> ids;
  encode(text, ids, allow_special);
  return ids;
}

void Tokenizer::encode(std::string_view text, std::vector<int32_t>& out, bool allow_special) const {
  if (const size_t bad = find_invalid_utf8(text); bad != std::string_view::npos) {
    throw DataError("text", "invalid UTF-8 at byte " + std::to_string(bad));
  }
  const State& state = *state_;
  std::string buffer;
  state.added.split(text, allow_special, [&](std::string_view piece, std::optional<int32_t> id) {
    if (id) return out.push_back(*id);
    if (state.nfc) piece = to_nfc(piece, buffer);
    state.added_normalized.split(piece, allow_special,
                                 [&](std::string_view rest, std::optional<int32_t> token) {
                                   if (token) return out.push_back(*token);
                                   state.encode_words(rest, out);
                                 });
  });
}

std::vector<int32_t> Tokenizer::encode_prompt(std::string_view text) const {
  std::vector<int32_t> ids = encode(text, /*allow_special=*/true);
  const std::vector<int32_t>& prefix = state_->prefix;
  const bool begun = ids.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), ids.begin());
  if (!begun) ids.insert(ids.begin(), prefix.begin(), prefix.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size() || (skip_special && is_special(id))) continue;
    text += state_->bytes[static_cast<size_t>(id)];
  }
  return text;
}

std::string Tokenizer::token_bytes(int32_t id) const { return decode({&id, 1}); }

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(state_->bytes.size()); }

std::optional<int32_t> Tokenizer::id(std::string_view token) const { return state_->find(token); }

std::optional<int32_t> Tokenizer::eos_id() const { return state_->eos; }

std::optional<int32_t> Tokenizer::bos_id() const { return state_->bos; }

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && state_->special[static_cast<size_t>(id)];
}

const std::string& Tokenizer::fingerprint() const { return state_->fingerprint; }

}  // namespace hymoe
