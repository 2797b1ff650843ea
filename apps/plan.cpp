#include "hymoe/train/plan.h"

#include <cmath>
#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"

namespace hymoe {
namespace {

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  std::array<char, 200> text{};
  std::snprintf(text.data(), text.size(), pattern, values...);
  return text.data();
}

std::string time_text(double seconds) {
  return seconds < 1 ? format("%.1f ms", seconds * 1e3) : format("%.2f s", seconds);
}

void print(const Plan& plan) {
  const HardwareConfig& h = plan.hardware;
  std::cout << format("%lld ranks: dp %lld, ep %lld, tp %lld; %s, %lld a node: %.0f TFLOP/s at %.0f %%, ",
                      static_cast<long long>(plan.processes), static_cast<long long>(plan.mesh.dp),
                      static_cast<long long>(plan.mesh.ep), static_cast<long long>(plan.mesh.tp),
                      h.kind.c_str(), static_cast<long long>(h.node), h.flops * 1e-12, h.efficiency * 100)
            << format("%.1f GB/s inside a node, %.1f between\n", h.inside * 1e-9, h.between * 1e-9)
            << format("parameters        %s, %s a token, %s on a rank\n",
                      format_count(static_cast<double>(plan.num_params)).c_str(),
                      format_count(static_cast<double>(plan.num_active_params)).c_str(),
                      format_count(static_cast<double>(plan.local_params)).c_str())
            << format("FLOPs a token     %.3g\n", plan.flops_per_token)
            << format("step              %lld x %lld tokens a rank\n",
                      static_cast<long long>(plan.micro_batches), static_cast<long long>(plan.rows))
            << "\nmemory of a rank\n";
  for (const auto& [kind, bytes] : plan.memory) {
    if (bytes != 0) std::cout << format("  %-24s %12s\n", kind.c_str(), format_bytes(bytes).c_str());
  }
  std::cout << format("  %-24s %12s of %s\n", "all", format_bytes(plan.memory_bytes()).c_str(),
                      format_bytes(h.memory).c_str());
  if (!plan.traffic.empty()) {
    std::cout << format("\n%-26s %-6s %-14s %12s %12s %10s %10s\n", "communication a step", "group", "",
                        "of tensors", "sent", "time", "exposed");
  }
  for (const PlannedTraffic& t : plan.traffic) {
    std::cout << format("  %-24s %-6s %-14s %12s %12s %10s %10s\n", t.name.c_str(), t.group.c_str(),
                        t.operation.c_str(), format_bytes(t.bytes).c_str(), format_bytes(t.wire).c_str(),
                        time_text(t.seconds).c_str(), time_text(t.exposed).c_str());
  }
  std::cout << format("\nstep %s, of which computing %s; %s tokens/s; %.1f %% of all FLOP/s\n",
                      time_text(plan.step_seconds).c_str(), time_text(plan.compute_seconds).c_str(),
                      format_count(plan.tokens_per_second).c_str(), plan.flops_used * 100);
  if (plan.memory_bytes() > h.memory) std::cout << "it does not fit\n";
}

}  // namespace

void add_plan(CLI::App& program) {
  auto* command = program.add_subcommand(
      "plan", "What a training run needs, without running it: memory, communication, time of a step");
  auto arguments = std::make_shared<ConfigArguments>();
  auto json = std::make_shared<bool>(false);
  arguments->add_to(*command);
  command->add_flag("--json", *json, "print JSON");
  command->footer(
      "CONFIG is one of hymoe train, which may also say processes and hardware:\n"
      "hymoe plan run.yaml processes=64 parallel.tp=8 hardware.kind=a100\n"
      "hymoe config plan                 every setting");
  command->callback([=] {
    const Plan planned = plan(load_plan_config(arguments->path, arguments->overrides));
    if (*json) {
      std::cout << plan_json(planned).dump(2) << std::endl;
    } else {
      print(planned);
    }
  });
}

}  // namespace hymoe
