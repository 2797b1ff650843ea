#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/growth/grow.h"

namespace hymoe {

void add_grow(CLI::App& program) {
  auto* command =
      program.add_subcommand("grow", "Make a checkpoint deeper, or wider in experts, with a receipt");
  auto source = std::make_shared<std::string>();
  auto target = std::make_shared<std::string>();
  auto arguments = std::make_shared<ConfigArguments>();
  auto json = std::make_shared<bool>(false);
  command->add_option("source", *source, "folder of a checkpoint, ours or Hugging Face's")->required();
  command->add_option("target", *target, "folder to write")->required();
  arguments->add_to(*command, /*required=*/false);
  command->add_flag("--json", *json, "print the receipt as JSON");
  command->callback([=] {
    const auto config = arguments->load<GrowConfig>();
    Progress progress(!*json);
    const GrowReceipt receipt =
        grow(*source, *target, config,
             [&](const char* phase, int64_t done, int64_t total) { progress.show(phase, done, total); });
    progress.clear();
    if (*json) {
      std::cout << receipt.to_json().dump(2) << std::endl;
      return;
    }
    std::string layers;
    for (const GrownLayer& layer : receipt.layers)
      layers += (layers.empty() ? "" : " ") + std::to_string(layer.source) + (layer.copy ? "'" : "");
    std::printf("%s -> %s\n", source->c_str(), target->c_str());
    std::printf("  layers              %s\n", layers.c_str());
    std::printf("  experts             x %lld\n", static_cast<long long>(config.experts));
    std::printf("  parameters          %s -> %s\n",
                format_count(static_cast<double>(receipt.params_before)).c_str(),
                format_count(static_cast<double>(receipt.params_after)).c_str());
    print_comparison(receipt.comparison);
  });
}

}  // namespace hymoe
