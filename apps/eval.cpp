#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "eval_config.h"
#include "hymoe/comm/launch.h"
#include "hymoe/config/config.h"
#include "hymoe/data/manifest.h"
#include "hymoe/model/language_loss.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {

void EvalCommandConfig::check() const {
  if (checkpoint.empty()) throw ConfigError("checkpoint", "must name a model folder");
  if (data.empty()) throw ConfigError("data", "must name a folder that hymoe prepare wrote");
}

void add_eval(CLI::App& program) {
  auto* command = program.add_subcommand("eval", "Held-out loss and bits per byte of every language");
  auto arguments = std::make_shared<ConfigArguments>();
  auto json = std::make_shared<bool>(false);
  arguments->add_to(*command);
  command->add_flag("--json", *json, "print one object a language");
  command->callback([=] {
    if (const int64_t processes = read_process().world_size; processes > 1)
      throw ConfigError("", "eval is one process's work, got " + std::to_string(processes));
    const auto config = load_config<EvalCommandConfig>(arguments->path, arguments->overrides);
    const Manifest manifest = read_manifest(config.data);
    Transformer model = load_pretrained(config.checkpoint);
    const Tokenizer tokenizer = Tokenizer::load(config.checkpoint);
    const Tensor token_bytes = token_byte_lengths(tokenizer, model->config().vocab_size);
    std::vector<std::string> languages = config.languages;
    if (languages.empty()) {
      for (const auto& [language, record] : manifest.languages) {
        if (record.splits.contains("valid")) languages.push_back(language);
      }
    }
    if (!*json) std::printf("%-12s %10s %14s %14s\n", "language", "tokens", "nats/token", "bits/byte");
    for (const std::string& language : languages) {
      const EvalBatches batches(config.data, language, config.seq_len, config.batch_size, config.tokens,
                                "valid", tokenizer.fingerprint());
      const LanguageLoss result = *language_loss(model, batches, token_bytes);
      if (*json) {
        const nlohmann::ordered_json row{{"language", language},
                                         {"tokens", result.tokens},
                                         {"bytes", result.bytes},
                                         {"loss", result.loss},
                                         {"bits_per_byte", result.bits_per_byte}};
        std::cout << row.dump() << std::endl;
      } else {
        std::printf("%-12s %10lld %14.4f %14.4f\n", language.c_str(), static_cast<long long>(result.tokens),
                    result.loss, result.bits_per_byte);
      }
    }
  });
}

}  // namespace hymoe
