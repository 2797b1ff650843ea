#include "hymoe/model/pretrained.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/model/sharding.h"
#include "io/names.h"

namespace hymoe {
namespace {

constexpr int64_t kMaxShardBytes = int64_t{5} << 30;

using Names = std::vector<std::string>;

template <typename... Parts>
std::string to_text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

bool is_weight_type(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
}

// What a file's tensor is for: a part of it for this rank's `tensor`, which is undefined where the tensor is
// another rank's.
struct Target {
  Shard shard;
  Tensor tensor;
  bool is_parameter;
};

std::unordered_map<std::string, Target> targets_of(const Transformer& model) {
  std::unordered_map<std::string, Target> targets;
  const std::vector<ParameterShard> shards = parameter_shards(model);
  for (const WholeParameter& whole : whole_parameters(model)) {
    Target& target = targets[whole.name];
    target = {{.shape = whole.shape}, {}, true};
    if (whole.index >= 0) target = {shards[whole.index].shard, shards[whole.index].parameter, true};
  }
  for (const auto& item : model->named_buffers()) {
    targets[item.key()] = {{.shape = item.value().sizes().vec()}, item.value(), false};
  }
  return targets;
}

void check_names_and_shapes(const SafetensorsFolder& files,
                            const std::unordered_map<std::string, Target>& targets, bool tied) {
  Names missing, extra, misshapen;
  for (const auto& [name, target] : targets) {
    if (!files.contains(name)) missing.push_back(name);
  }
  std::sort(missing.begin(), missing.end());
  for (const std::string& name : files.names()) {
    const auto it = targets.find(name);
    if (it == targets.end()) {
      if (!tied || name != "lm_head.weight") extra.push_back(name);
      continue;
    }
    const TensorInfo& info = files.info(name);
    const auto& [shard, tensor, is_parameter] = it->second;
    const bool type_fits = is_parameter ? is_weight_type(info.dtype) : info.dtype == tensor.scalar_type();
    if (shard.shape != info.shape || !type_fits) {
      misshapen.push_back(to_text(name, " (expected ", at::IntArrayRef(shard.shape), ", got ", info.dtype,
                                  " ", at::IntArrayRef(info.shape), ")"));
    }
  }
  std::string text;
  append_names(text, missing, "tensors missing");
  append_names(text, extra, "tensors that this model has not");
  append_names(text, misshapen, "tensors of another shape or type");
  if (!text.empty()) throw DataError(files.path().string(), text);
}

// Parameters become `dtype` if one is given, and everything goes to `device` if one is given.
void fill(Transformer& model, const std::filesystem::path& dir, std::optional<at::Device> device,
          std::optional<at::ScalarType> dtype) {
  const torch::NoGradGuard no_grad;
  const SafetensorsFolder files(dir);
  auto targets = targets_of(model);
  const bool tied = model->config().tie_embeddings;
  check_names_and_shapes(files, targets, tied);
  for (const std::string& name : files.names()) {
    const Tensor value = files.tensor(name);
    const auto it = targets.find(name);
    if (it == targets.end()) {
      if (!value.equal(files.tensor("model.embed_tokens.weight"))) {
        throw DataError(files.file_with(name).path().string() + ": " + name,
                        "differs from model.embed_tokens.weight, but config.json ties them");
      }
      continue;
    }
    auto& [shard, target, is_parameter] = it->second;
    if (!target.defined()) continue;
    const at::ScalarType to_dtype =
        is_parameter ? dtype.value_or(target.scalar_type()) : target.scalar_type();
    const at::Device to_device = device.value_or(target.device());
    if (target.scalar_type() == to_dtype && target.device() == to_device) {
      target.copy_(shard.part_of(value));
    } else {
      target.set_data(shard.part_of(value).to(to_device, to_dtype, /*non_blocking=*/false, /*copy=*/true,
                                              at::MemoryFormat::Contiguous));
    }
  }
}

}  // namespace

Transformer load_pretrained(const std::filesystem::path& dir, at::Device device, at::ScalarType dtype,
                            const Mesh& mesh) {
  Transformer model(read_model_config(dir), mesh, Init::kNone);
  if (read_noncausal(dir).value_or(model->noncausal()) != model->noncausal()) {
    throw DataError((dir / "config.json").string() + ": noncausal",
                    model->noncausal()
                        ? "expected true, for a router that looks ahead or depends on the batch, got false"
                        : "expected false, since no router looks ahead or depends on the batch, got true");
  }
  fill(model, dir, device, dtype);
  return model;
}

void load_weights(Transformer& model, const std::filesystem::path& dir) { fill(model, dir, {}, {}); }

std::vector<WrittenFile> write_pretrained(const Transformer& model, const std::filesystem::path& folder,
                                          const std::filesystem::path& tokenizer_dir) {
  NamedTensors tensors;
  for (const auto& item : model->named_parameters()) tensors.emplace_back(item.key(), item.value().detach());
  const at::ScalarType dtype = tensors.front().second.scalar_type();
  for (const auto& item : model->named_buffers()) tensors.emplace_back(item.key(), item.value());
  write_file_atomic(folder / "config.json",
                    model_config_json(model->config(), dtype, model->noncausal()).dump(2) + "\n");
  if (!tokenizer_dir.empty()) copy_tokenizer_files(tokenizer_dir, folder);
  return write_safetensors_sharded(folder, "model", tensors, kMaxShardBytes);
}

void save_pretrained(const Transformer& model, const std::filesystem::path& dir,
                     const std::filesystem::path& tokenizer_dir) {
  if (dir.has_parent_path()) std::filesystem::create_directories(dir.parent_path());
  AtomicDirectory directory(dir);
  write_pretrained(model, directory.folder(), tokenizer_dir);
  directory.commit();
}

void copy_tokenizer_files(const std::filesystem::path& from, const std::filesystem::path& to) {
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
                           "merges.txt", "generation_config.json", "chat_template.jinja"}) {
    if (std::filesystem::exists(from / name)) write_file_atomic(to / name, read_text(from / name));
  }
}

}  // namespace hymoe
