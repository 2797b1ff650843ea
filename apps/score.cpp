#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/eval/score.h"
#include "hymoe/io/jsonl.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {

void add_score(CLI::App& program) {
  auto* command = program.add_subcommand("score", "Loss and bits per byte of texts under a checkpoint");
  auto checkpoint = std::make_shared<std::string>();
  auto input = std::make_shared<std::string>();
  auto output = std::make_shared<std::string>();
  auto logits_path = std::make_shared<std::string>();
  command->add_option("checkpoint", *checkpoint, "model folder, with its tokenizer")->required();
  command->add_option("--input", *input, "JSON lines with {\"text\"}")->required();
  command->add_option("--output", *output, "file for the result lines; standard output without it");
  command->add_option("--logits", *logits_path,
                      "safetensors file for the logits: logits.<line> [S, vocab] fp32, lines from 0");
  command->callback([=] {
    Transformer model = load_pretrained(*checkpoint);
    model->eval();
    const Tokenizer tokenizer = Tokenizer::load(*checkpoint);
    OutputFile out(*output);
    NamedTensors logits;
    JsonLines lines(*input);
    int64_t line = 0;
    for (nlohmann::json record; lines.next(record); ++line) {
      const TextScore score =
          score_text(model, tokenizer, text_of(record, lines.where()), !logits_path->empty());
      out.write(nlohmann::ordered_json{{"tokens", score.ids.size()},
                                       {"bytes", score.bytes},
                                       {"loss", score.loss},
                                       {"bits_per_byte", score.bits_per_byte}});
      if (!logits_path->empty()) logits.emplace_back("logits." + std::to_string(line), score.logits);
    }
    out.close();
    if (!logits_path->empty()) write_safetensors(*logits_path, logits);
  });
}

}  // namespace hymoe
