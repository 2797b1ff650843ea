#include "model/with_code.h"

#include <algorithm>
#include <string>
#include <vector>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/model/pretrained.h"

namespace hymoe {
namespace {

void check_has_code(const BranchConfig& branch, const std::string& path) {
  const auto expect = [&](const char* key, const std::string& got, const std::vector<std::string>& known) {
    if (std::find(known.begin(), known.end(), got) != known.end()) return;
    std::string names;
    for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
    throw ConfigError(path + key, "modeling_hymoe.py has no code for \"" + got + "\": expected " + names);
  };
  expect("router.kind", branch.router.kind,
         {"topk", "sparse_mixer", "segment", "expert_choice", "threshold"});
  expect("experts", branch.experts, {"swiglu"});
}

nlohmann::ordered_json config_json(const Transformer& model) {
  const ModelConfig& config = model->config();
  auto out = our_config_json(config, model->parameters().front().scalar_type(), model->noncausal());
  out["auto_map"] = {{"AutoConfig", "modeling_hymoe.HymoeConfig"},
                     {"AutoModelForCausalLM", "modeling_hymoe.HymoeForCausalLM"}};
  // transformers looks here for the end of generation where there is no generation_config.json.
  if (config.bos_token_id >= 0) out["bos_token_id"] = config.bos_token_id;
  if (!config.eos_token_ids.empty()) out["eos_token_id"] = config.eos_token_ids;
  return out;
}

}  // namespace

void export_with_code(const Transformer& model, const std::filesystem::path& dir,
                      const std::filesystem::path& tokenizer_dir) {
  const ModelConfig& config = model->config();
  for (size_t b = 0; b < config.moe.branches.size() && !config.moe_layers.empty(); ++b) {
    check_has_code(config.moe.branches[b], "moe.branches." + std::to_string(b) + ".");
  }
  AtomicDirectory directory(dir);
  write_pretrained(model, directory.folder(), tokenizer_dir);
  write_file_atomic(directory.folder() / "config.json", config_json(model).dump(2) + "\n");
  write_file_atomic(directory.folder() / "modeling_hymoe.py", kModelingCode);
  directory.commit();
}

}  // namespace hymoe
