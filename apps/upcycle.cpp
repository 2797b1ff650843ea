#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/growth/upcycle.h"

namespace hymoe {

void add_upcycle(CLI::App& program) {
  auto* command = program.add_subcommand(
      "upcycle", "Turn a dense checkpoint into a hybrid MoE checkpoint, with a receipt");
  auto source = std::make_shared<std::string>();
  auto target = std::make_shared<std::string>();
  auto arguments = std::make_shared<ConfigArguments>();
  auto json = std::make_shared<bool>(false);
  command->add_option("source", *source, "folder of the dense checkpoint, in Hugging Face's layout")
      ->required();
  command->add_option("target", *target, "folder to write")->required();
  arguments->add_to(*command, /*required=*/false);
  command->add_flag("--json", *json, "print the receipt as JSON");
  command->callback([=] {
    const auto config = arguments->load<UpcycleConfig>();
    Progress progress(!*json);
    const UpcycleReceipt receipt =
        upcycle(*source, *target, config,
                [&](const char* phase, int64_t done, int64_t total) { progress.show(phase, done, total); });
    progress.clear();
    if (*json) {
      std::cout << receipt.to_json().dump(2) << std::endl;
      return;
    }
    std::printf("%s -> %s\n", source->c_str(), target->c_str());
    std::printf("  MoE layers          %zu\n", receipt.moe_layers.size());
    std::printf("  parameters          %s -> %s\n",
                format_count(static_cast<double>(receipt.params_before)).c_str(),
                format_count(static_cast<double>(receipt.params_after)).c_str());
    std::printf("  active a token      %s -> %s\n",
                format_count(static_cast<double>(receipt.active_params_before)).c_str(),
                format_count(static_cast<double>(receipt.active_params_after)).c_str());
    print_comparison(receipt.comparison);
    std::printf("  frozen tensors      %zu, their hashes in receipt.json\n", receipt.frozen.size());
  });
}

}  // namespace hymoe
