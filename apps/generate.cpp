#include <iostream>
#include <iterator>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/config/config.h"
#include "hymoe/eval/generate.h"
#include "hymoe/io/file.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

struct GenerateArguments {
  std::string checkpoint, prompt, prompt_file;
  GenerateConfig config;
  bool no_prefix = false, json = false;

  std::string text() const {
    if (!prompt.empty()) return prompt;
    if (!prompt_file.empty()) return read_text(prompt_file);
    return {std::istreambuf_iterator<char>(std::cin), {}};
  }
};

}  // namespace

void add_generate(CLI::App& program) {
  auto* command = program.add_subcommand("generate", "Text from a checkpoint, as it is made");
  auto arguments = std::make_shared<GenerateArguments>();
  GenerateConfig& config = arguments->config;
  command->add_option("checkpoint", arguments->checkpoint, "model folder, with its tokenizer")->required();
  command->add_option("--prompt", arguments->prompt, "text to continue");
  command->add_option("--prompt-file", arguments->prompt_file,
                      "file with the text; without either, standard input");
  command->add_option("--max-new-tokens", config.max_new_tokens, "longest completion in tokens")
      ->capture_default_str();
  command->add_option("--temperature", config.temperature, "0: greedy")->capture_default_str();
  command->add_option("--top-p", config.top_p, "sample from the likeliest tokens of this total probability")
      ->capture_default_str();
  command->add_option("--seed", config.seed, "of the sampling")->capture_default_str();
  command->add_option("--stop", config.stop, "text that ends the completion; may be repeated")
      ->allow_extra_args(false);
  command->add_flag("--ignore-eos", config.ignore_eos, "go on after a token that ends texts");
  command->add_flag("--no-prefix", arguments->no_prefix,
                    "do not begin with the special tokens that the tokenizer puts before a text");
  command->add_flag("--json", arguments->json, "print one object: text, ids, finish");
  command->callback([arguments] {
    check_config(arguments->config);
    Transformer model = load_pretrained(arguments->checkpoint);
    model->eval();
    model->check_decodable();
    const Tokenizer tokenizer = Tokenizer::load(arguments->checkpoint);
    const std::string text = arguments->text();
    const std::vector<int32_t> ids =
        arguments->no_prefix ? tokenizer.encode(text, /*allow_special=*/true) : tokenizer.encode_prompt(text);
    if (ids.empty()) throw DataError("prompt", "expected some text, got none");
    OnText stream;
    if (!arguments->json) {
      std::cout << text;
      stream = [](int64_t, std::string_view piece) { std::cout << piece << std::flush; };
    }
    const auto results = generate(model, tokenizer, {{ids.begin(), ids.end()}}, arguments->config, stream);
    if (arguments->json) {
      const nlohmann::ordered_json row{
          {"text", results[0].text}, {"ids", results[0].ids}, {"finish", results[0].finish}};
      std::cout << row.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    }
    std::cout << std::endl;
  });
}

}  // namespace hymoe
