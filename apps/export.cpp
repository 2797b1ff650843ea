#include <iostream>
#include <memory>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

struct ExportArguments {
  std::string checkpoint, target;
  bool with_code = false;
};

// What cannot be exported is refused before its weights are read.
void check_family(const ModelConfig& config, at::ScalarType dtype) {
  try {
    export_config_json(config, dtype);
  } catch (const ConfigError& error) {
    throw ConfigError(error.key_path(),
                      error.text() + "; --with-code exports it with Python for transformers");
  }
}

}  // namespace

void add_export(CLI::App& program) {
  auto* command = program.add_subcommand(
      "export", "A checkpoint for transformers: in the layout of its family, or with code");
  auto arguments = std::make_shared<ExportArguments>();
  command->add_option("checkpoint", arguments->checkpoint, "model folder")->required();
  command->add_option("target", arguments->target, "folder that appears when complete")->required();
  command->add_flag("--with-code", arguments->with_code,
                    "any model, in our layout, with the Python by which transformers loads it");
  command->callback([arguments] {
    const auto& [checkpoint, target, with_code] = *arguments;
    check_vacant(target);
    const ModelConfig config = read_model_config(checkpoint);
    const at::ScalarType dtype = read_dtype(checkpoint);
    if (!with_code) check_family(config, dtype);
    const Transformer model = load_pretrained(checkpoint, at::kCPU, dtype);
    (with_code ? export_with_code : export_pretrained)(model, target, checkpoint);
    std::cout << target << ": " << (with_code ? "modeling_hymoe.py" : config.family) << std::endl;
  });
}

}  // namespace hymoe
