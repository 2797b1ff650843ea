// tokenizer.json, tokenizer_config.json, generation_config.json and a text, as many as there are.
#include "fuzz/tokenizer_use.h"

namespace hymoe::fuzz {
namespace {

constexpr const char* kNames[] = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"};

bool read(std::string_view bytes) {
  static const Folder folder;
  const std::vector<std::string_view> files = split_files(bytes);
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (i < files.size()) {
      folder.write(kNames[i], files[i]);
    } else {
      folder.remove(kNames[i]);
    }
  }
  const std::string_view text =
      files.size() > std::size(kNames) ? files[std::size(kNames)] : "abc ab<e>  a\u0301 12";
  return taken([&] { use(Tokenizer::load(folder.path()), text.substr(0, 64)); });
}

std::vector<std::string> seeds() {
  const std::string zero(1, '\0');
  const std::string model =
      R"("model":{"type":"BPE","unk_token":"u","vocab":{"a":0,"b":1,"c":2,"ab":3,"Ġ":4,"Ġa":5,"u":6},)"
      R"("merges":["a b",["Ġ","a"]]},"decoder":{"type":"ByteLevel"})";
  const std::string plain =
      R"({"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},"added_tokens":[)"
      R"({"id":7,"content":"<e>","special":true}],)" +
      model + "}";
  const std::string steps =
      R"({"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"}]},"post_processor":{"type":"Sequence",)"
      R"("processors":[{"type":"TemplateProcessing"}]},"pre_tokenizer":{"type":"Sequence","pretokenizers":[)"
      R"json({"type":"Split","pattern":{"Regex":"(?i:'s)|\\p{N}{1,3}|\\s+(?!\\S)"},"behavior":"Isolated","invert":false},)json"
      R"({"type":"Split","pattern":{"String":" "},"behavior":"MergedWithNext"},{"type":"Digits","individual_digits":true},)"
      R"({"type":"ByteLevel","use_regex":false}]},"added_tokens":[{"id":7,"content":"<e>","special":false,"lstrip":true,)"
      R"("rstrip":true,"normalized":true,"single_word":true}],)" +
      model + "}";
  return {
      plain, steps, plain + zero + R"({"bos_token":"a","eos_token":{"content":"<e>"}})",
      plain + zero + "{}" + zero + R"({"bos_token_id":1,"eos_token_id":[7,2]})" + zero + "a b ab 's 123 <e>"};
}

const Registration registration({"tokenizer", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
