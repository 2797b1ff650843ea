#include <string>
#include <string_view>
#include <utility>

#include "data/json_node.h"
#include "data/tokenizer_spec.h"

namespace hymoe {
namespace {

using Kind = SplitStep::Kind;
using Behavior = SplitStep::Behavior;

// Numbers of Unicode 17, which is one version ahead of what the split patterns know.
constexpr std::string_view kDigitsPattern = R"([\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}])";

constexpr size_t kMostSplits = 100;  // each a call inside the last

[[noreturn]] void unsupported(const JsonNode& piece, const std::string& type) {
  piece.fail("type " + type + " is not supported");
}

void read_model(const JsonNode& model, VocabularyBuilder& builder, TokenizerSpec& spec) {
  const std::optional<JsonNode> type = model.find("type");
  if (type && type->string() != "BPE") unsupported(model, type->string());
  if (model.flag("byte_fallback", false)) model.fail("byte_fallback is not supported");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const std::optional<JsonNode> affix = model.find(key);
    if (affix && !affix->string().empty()) affix->fail("not supported");
  }
  const std::optional<JsonNode> dropout = model.find("dropout");
  if (dropout && dropout->value() != 0) dropout->fail("not supported");

  const JsonNode vocab = model.at("vocab");
  if (!vocab.value().is_object())
    vocab.fail("wanted an object, got " + std::string(vocab.value().type_name()));
  for (const auto& [token, id] : vocab.value().items()) {
    if (!id.is_number_integer()) vocab.fail("id of \"" + token + "\" is no integer");
    builder.add_token(token, id.get<int64_t>(), vocab.path());
  }
  const JsonNode merges = model.at("merges");
  for (const JsonNode& merge : merges.array()) {
    if (merge.is_string()) {
      if (!merge.string().starts_with("#version")) builder.add_merge(merge.string(), merge.path());
      continue;
    }
    const std::vector<JsonNode> pair = merge.array();
    if (pair.size() != 2) merge.fail("wanted two tokens, got " + std::to_string(pair.size()));
    builder.add_merge(pair[0].string(), pair[1].string(), merge.path());
  }
  spec.bpe.ignore_merges = model.flag("ignore_merges", false);
  spec.bpe.fuse_unknown = model.flag("fuse_unk", false);
  const std::optional<JsonNode> unknown = model.find("unk_token");
  if (unknown && !unknown->string().empty()) {
    spec.bpe.unknown = builder.find(unknown->string());
    if (!spec.bpe.unknown) unknown->fail("\"" + unknown->string() + "\" is not in the vocabulary");
  }
}

void read_normalizer(const JsonNode& normalizer, TokenizerSpec& spec) {
  const std::string& type = normalizer.at("type").string();
  if (type == "Sequence") {
    for (const JsonNode& item : normalizer.at("normalizers").array()) read_normalizer(item, spec);
  } else if (type == "NFC") {
    spec.nfc = true;
  } else {
    unsupported(normalizer, type);
  }
}

Behavior read_behavior(const JsonNode& behavior) {
  const std::string& name = behavior.string();
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  behavior.fail("\"" + name + "\" is not supported");
}

void add_split(SplitStep step, const JsonNode& piece, TokenizerSpec& spec) {
  try {
    TextSplitter({step});
  } catch (const std::invalid_argument& e) {
    piece.fail(e.what());
  }
  spec.splits.push_back(std::move(step));
}

// Appends the steps; true when they end in ByteLevel, which must come last.
bool read_pre_tokenizer(const JsonNode& piece, TokenizerSpec& spec) {
  const std::string& type = piece.at("type").string();
  if (type == "Sequence") {
    bool byte_level = false;
    for (const JsonNode& item : piece.at("pretokenizers").array()) {
      if (byte_level) item.fail("no pre-tokenizer is supported after ByteLevel");
      byte_level = read_pre_tokenizer(item, spec);
    }
    return byte_level;
  }
  if (type == "ByteLevel") {
    if (piece.flag("add_prefix_space", true)) spec.splits.push_back({.kind = Kind::kPrefixSpace});
    if (piece.flag("use_regex", true)) spec.splits.push_back(SplitStep::regex(kGpt2Pattern));
    return true;
  }
  if (type == "Digits") {
    const bool individual = piece.flag("individual_digits", false);
    spec.splits.push_back(
        SplitStep::regex(kDigitsPattern, individual ? Behavior::kIsolated : Behavior::kContiguous));
    return false;
  }
  if (type != "Split") unsupported(piece, type);
  const JsonNode pattern = piece.at("pattern");
  const std::optional<JsonNode> regex = pattern.find("Regex");
  const JsonNode text = regex ? *regex : pattern.at("String");
  SplitStep step = SplitStep::regex(text.string(), read_behavior(piece.at("behavior")));
  if (!regex) step.kind = Kind::kLiteral;
  step.invert = piece.flag("invert", false);
  add_split(std::move(step), text, spec);
  return false;
}

bool is_byte_level(const JsonNode& decoder) {
  const std::string& type = decoder.at("type").string();
  if (type != "Sequence") return type == "ByteLevel";
  const std::vector<JsonNode> items = decoder.at("decoders").array();
  return items.size() == 1 && is_byte_level(items[0]);
}

// Post-processors only put special tokens around the ids; one of an unknown type might do more. Those before
// a text begin prompts; how texts end is the caller's.
void read_post_processor(const JsonNode& piece, std::vector<int32_t>& prefix) {
  const std::string& type = piece.at("type").string();
  if (type == "Sequence") {
    for (const JsonNode& item : piece.at("processors").array()) read_post_processor(item, prefix);
  } else if (type == "TemplateProcessing") {
    const auto single = piece.find("single");
    for (const JsonNode& item : single ? single->array() : std::vector<JsonNode>{}) {
      const auto special = item.find("SpecialToken");
      if (!special) break;
      const JsonNode token = piece.at("special_tokens").at(special->at("id").string());
      for (const JsonNode& id : token.at("ids").array()) prefix.push_back(read_token_id(id));
    }
  } else if (type == "RobertaProcessing" || type == "BertProcessing") {
    const std::vector<JsonNode> cls = piece.at("cls").array();
    if (cls.size() != 2) piece.at("cls").fail("wanted a token and its id");
    prefix.push_back(read_token_id(cls[1]));
  } else if (type != "ByteLevel") {
    unsupported(piece, type);
  }
}

}  // namespace

int32_t read_token_id(const JsonNode& node) {
  const int64_t id = node.integer();
  if (id != static_cast<int32_t>(id)) node.fail(std::to_string(id) + " is no token id");
  return static_cast<int32_t>(id);
}

AddedToken read_added_token(const JsonNode& token, int32_t id) {
  const bool special = token.flag("special", false);
  return {.id = id,
          .content = token.at("content").string(),
          .special = special,
          .normalized = token.flag("normalized", !special),
          .lstrip = token.flag("lstrip", false),
          .rstrip = token.flag("rstrip", false),
          .single_word = token.flag("single_word", false)};
}

TokenizerSpec read_tokenizer_json(const std::filesystem::path& file) {
  const nlohmann::json json = read_json(file);
  const std::string name = file.string();
  const JsonNode root(json, name, "");
  TokenizerSpec spec;
  VocabularyBuilder builder(name, spec);
  read_model(root.at("model"), builder, spec);
  if (const auto normalizer = root.find("normalizer")) read_normalizer(*normalizer, spec);
  const JsonNode pre_tokenizer = root.at("pre_tokenizer");
  if (!read_pre_tokenizer(pre_tokenizer, spec))
    pre_tokenizer.fail("only byte-level BPE is supported: wanted ByteLevel last");
  if (spec.splits.size() > kMostSplits)
    pre_tokenizer.fail("wanted at most " + std::to_string(kMostSplits) + " steps, got " +
                       std::to_string(spec.splits.size()));
  const JsonNode decoder = root.at("decoder");
  if (!is_byte_level(decoder)) unsupported(decoder, decoder.at("type").string());
  if (const auto processor = root.find("post_processor")) read_post_processor(*processor, spec.prefix);
  if (const auto added = root.find("added_tokens")) {
    for (const JsonNode& token : added->array()) {
      if (token.at("content").string().empty()) continue;
      builder.add_added_token(read_added_token(token, read_token_id(token.at("id"))), token.path());
    }
  }
  return spec;
}

}  // namespace hymoe
