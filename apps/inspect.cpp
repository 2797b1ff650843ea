#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/config/error.h"
#include "hymoe/data/manifest.h"
#include "hymoe/io/file.h"
#include "hymoe/io/jsonl.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/testing/conformance.h"
#include "hymoe/train/checkpoint.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

std::string dtype_name(at::ScalarType dtype) { return c10::toString(dtype); }

nlohmann::ordered_json inspect_tensors(const SafetensorsFolder& folder) {
  nlohmann::ordered_json tensors;
  for (const auto& name : folder.names()) {
    tensors[name] = {{"dtype", dtype_name(folder.info(name).dtype)}, {"shape", folder.info(name).shape}};
  }
  return {{"kind", "tensors"}, {"tensors", tensors}};
}

nlohmann::ordered_json inspect_token_file(const fs::path& path) {
  const TokenFile file(path);
  file.verify();
  return {{"kind", "token file"},
          {"documents", file.num_documents()},
          {"tokens", file.num_tokens()},
          {"vocab_size", file.vocab_size()},
          {"tokenizer", file.tokenizer_fingerprint()},
          {"checksum", "good"}};
}

nlohmann::ordered_json inspect_prepared(const fs::path& path) {
  const Manifest manifest = read_manifest(path);
  nlohmann::ordered_json json{{"kind", "prepared corpus"},
                              {"hymoe", manifest.version},
                              {"vocab_size", manifest.vocab_size},
                              {"tokenizer", manifest.tokenizer_path}};
  for (const auto& [language, record] : manifest.languages) {
    for (const auto& [split, entry] : record.splits) {
      open_token_file(path, manifest, language, split).verify();
      json["languages"][language][split] = {
          {"documents", entry.documents}, {"tokens", entry.tokens}, {"bytes", entry.bytes}};
    }
  }
  json["checksums"] = "good";
  return json;
}

nlohmann::ordered_json inspect_model(const fs::path& path) {
  const ModelConfig config = read_model_config(path);
  const Transformer model = load_pretrained(path);
  nlohmann::ordered_json json{{"kind", "model"},
                              {"family", config.family},
                              {"layers", config.num_layers},
                              {"dim", config.dim},
                              {"vocab_size", config.vocab_size},
                              {"moe_layers", config.moe_layers},
                              {"parameters", model->num_params()},
                              {"active_parameters", model->num_active_params()},
                              {"noncausal", model->noncausal()}};
  if (fs::exists(path / "state.json")) {
    verify_checkpoint(path);
    const auto state = nlohmann::json::parse(read_text(path / "state.json"));
    json["kind"] = "checkpoint";
    json["step"] = state["step"];
    json["tokens"] = state["tokens"];
    json["checksums"] = "good";
  }
  return json;
}

nlohmann::ordered_json inspect_run(const fs::path& path) {
  nlohmann::ordered_json json{{"kind", "run"}};
  nlohmann::json row, last, last_eval;
  for (JsonLines lines(path / "metrics.jsonl"); lines.next(row);)
    (row.contains("lm_loss") ? last : last_eval) = row;
  json["last_step"] = last;
  json["last_evaluation"] = last_eval;
  const auto checkpoint = latest_checkpoint(path);
  if (checkpoint) json["checkpoint"] = inspect_model(*checkpoint);
  return json;
}

nlohmann::ordered_json inspect(const fs::path& path) {
  if (!fs::exists(path)) throw DataError(path.string(), "no such file or folder");
  if (fs::is_directory(path)) {
    if (fs::exists(path / Manifest::kFileName)) return inspect_prepared(path);
    if (fs::exists(path / "metrics.jsonl")) return inspect_run(path);
    if (fs::exists(path / "config.json")) return inspect_model(path);
    throw DataError(path.string(), "expected a model, a checkpoint, a prepared corpus or a run");
  }
  if (path.extension() == ".safetensors") return inspect_tensors(SafetensorsFolder(path));
  return inspect_token_file(path);
}

Report check(const fs::path& path) {
  const bool is_run = fs::exists(path / "metrics.jsonl");
  const auto checkpoint = is_run ? latest_checkpoint(path) : path;
  if (!checkpoint) throw DataError(path.string(), "has no checkpoint yet to check");
  Transformer model = load_pretrained(*checkpoint);
  return check_model(model);
}

nlohmann::ordered_json to_json(const Report& report) {
  nlohmann::ordered_json all = nlohmann::ordered_json::array();
  for (const Finding& finding : report.findings) {
    all.push_back({{"law", finding.law}, {"outcome", to_text(finding.outcome)}, {"detail", finding.detail}});
  }
  return all;
}

// The laws that failed, as an error.
void refuse_broken(const std::string& path, const Report& report) {
  std::string broken;
  for (const Finding& finding : report.findings) {
    if (finding.outcome == Outcome::kFailed) broken += (broken.empty() ? "" : ", ") + finding.law;
  }
  if (!broken.empty()) throw DataError(path, "this model breaks laws: " + broken);
}

void print(const nlohmann::ordered_json& json, const std::string& indent) {
  for (const auto& [key, value] : json.items()) {
    if (value.is_object() && !value.empty()) {
      std::cout << indent << key << ":\n";
      print(value, indent + "  ");
    } else {
      std::cout << indent << key << ": " << (value.is_string() ? value.get<std::string>() : value.dump())
                << "\n";
    }
  }
}

}  // namespace

void add_inspect(CLI::App& program) {
  auto* command =
      program.add_subcommand("inspect", "What a checkpoint, token file or run holds; verifies checksums");
  auto path = std::make_shared<std::string>();
  auto json = std::make_shared<bool>(false), with_check = std::make_shared<bool>(false);
  command->add_option("path", *path, "folder or file")->required();
  command->add_flag("--json", *json, "print JSON");
  command->add_flag(
      "--check", *with_check,
      "run a model's laws on random tokens: causality, packing, padding, decoding, gradients, …");
  command->callback([=] {
    auto result = inspect(*path);
    const Report report = *with_check ? check(*path) : Report{};
    if (*json) {
      if (*with_check) result["check"] = to_json(report);
      std::cout << result.dump(2) << std::endl;
    } else {
      print(result, "");
      std::cout << report.text() << std::flush;
    }
    refuse_broken(*path, report);
  });
}

}  // namespace hymoe
