#include <iostream>
#include <memory>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

struct ExportArguments {
  std::string checkpoint, target;
};

}  // namespace

void add_export(CLI::App& program) {
  auto* command = program.add_subcommand("export", "A checkpoint in the layout of its Hugging Face family");
  auto arguments = std::make_shared<ExportArguments>();
  command->add_option("checkpoint", arguments->checkpoint, "model folder")->required();
  command->add_option("target", arguments->target, "folder that appears when complete")->required();
  command->callback([arguments] {
    const ModelConfig config = read_model_config(arguments->checkpoint);
    const at::ScalarType dtype = read_dtype(arguments->checkpoint);
    export_config_json(config, dtype);  // what cannot be exported is refused before its weights are read
    export_pretrained(load_pretrained(arguments->checkpoint, at::kCPU, dtype), arguments->target,
                      arguments->checkpoint);
    std::cout << arguments->target << ": " << config.family << std::endl;
  });
}

}  // namespace hymoe
