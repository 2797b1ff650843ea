#include <chrono>
#include <fstream>
#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/io/jsonl.h"

namespace hymoe {

void add_tokenize(CLI::App& program) {
  auto* command = program.add_subcommand("tokenize", "Token ids of texts, for debugging and comparison");
  auto tokenizer_path = std::make_shared<std::string>();
  auto input = std::make_shared<std::string>();
  auto output = std::make_shared<std::string>();
  auto plain = std::make_shared<bool>(false);
  command->add_option("tokenizer", *tokenizer_path, "tokenizer.json, or a folder that holds it")->required();
  command->add_option("--input", *input, "JSON lines with {\"text\"}")->required();
  command->add_option("--output", *output, "file for {\"ids\"} lines; standard output without it");
  command->add_flag("--no-special", *plain, "split special tokens in the texts like other text");
  command->callback([=] {
    const Tokenizer tokenizer = Tokenizer::load(*tokenizer_path);
    OutputFile out(*output);
    JsonLines lines(*input);
    std::vector<int32_t> ids;
    int64_t bytes = 0;
    double seconds = 0;
    for (nlohmann::json record; lines.next(record);) {
      const std::string text = text_of(record, lines.where());
      ids.clear();
      const auto start = std::chrono::steady_clock::now();
      tokenizer.encode(text, ids, !*plain);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      bytes += static_cast<int64_t>(text.size());
      out.write(nlohmann::ordered_json{{"ids", ids}});
    }
    out.close();
    if (!output->empty()) {
      std::fprintf(stderr, "%.1f MB in %.2f s of encoding: %.1f MB/s\n", static_cast<double>(bytes) * 1e-6,
                   seconds, static_cast<double>(bytes) * 1e-6 / seconds);
    }
  });
}

}  // namespace hymoe
