#include "hymoe/model/pretrained.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"
#include "hymoe/model/outline.h"
#include "hymoe/model/sharding.h"
#include "io/names.h"
#include "model/family.h"

namespace hymoe {
namespace {

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

// A tensor of the model: this rank's part of it, undefined where it is another rank's, and where files have
// it.
struct Target {
  std::string name;
  Shard shard;
  Tensor tensor;
  bool is_parameter;
  std::vector<Piece> pieces = {};
};

std::vector<Target> targets_of(const Transformer& model) {
  std::vector<Target> targets;
  const std::vector<ParameterShard> shards = parameter_shards(model);
  for (const WholeParameter& whole : whole_parameters(model)) {
    if (whole.index >= 0) {
      targets.push_back({whole.name, shards[whole.index].shard, shards[whole.index].parameter, true});
    } else {
      targets.push_back({whole.name, {.shape = whole.shape}, {}, true});
    }
  }
  for (const auto& item : model->named_buffers()) {
    targets.push_back({item.key(), {.shape = item.value().sizes().vec()}, item.value(), false});
  }
  return targets;
}

bool any_name(const SafetensorsFolder& files, const std::function<bool(const std::string&)>& is) {
  return std::any_of(files.names().begin(), files.names().end(), is);
}

// Finds in which of the family's layouts a folder is.
void place(std::vector<Target>& targets, const SafetensorsFolder& files, const Family* family,
           const ModelConfig& config) {
  const bool stacked =
      any_name(files, [](const std::string& name) { return name.ends_with(".experts.gate_up_proj"); });
  const std::string prefix = family != nullptr ? family->prefix : "";
  const bool headless = !any_name(files, [&](const std::string& name) { return name.starts_with(prefix); });
  for (Target& target : targets) {
    target.pieces = pieces_of(family, config, target.name, target.shard.shape, stacked);
    for (Piece& piece : target.pieces) {
      if (headless && piece.name.starts_with(prefix)) piece.name.erase(0, prefix.size());
    }
  }
}

struct Wanted {
  std::vector<int64_t> shape;
  std::optional<at::ScalarType> type;  // none: any that weights have
};

void check_names_and_shapes(const SafetensorsFolder& files, const std::vector<Target>& targets, bool native,
                            const std::function<bool(const std::string&)>& may_be_left) {
  std::unordered_map<std::string, Wanted> wanted;
  for (const Target& target : targets) {
    // A buffer of ours has its own type; a family's may be any.
    const bool exact = native && !target.is_parameter;
    for (const Piece& piece : target.pieces) {
      wanted[piece.name] = {piece.shape, exact ? std::optional(target.tensor.scalar_type()) : std::nullopt};
    }
  }
  Names missing, extra, misshapen;
  for (const auto& [name, of] : wanted) {
    if (!files.contains(name)) missing.push_back(name);
  }
  std::sort(missing.begin(), missing.end());
  for (const std::string& name : files.names()) {
    const auto it = wanted.find(name);
    if (it == wanted.end()) {
      if (!may_be_left(name)) extra.push_back(name);
      continue;
    }
    const TensorInfo& info = files.info(name);
    const auto& [shape, type] = it->second;
    if (shape != info.shape || !(type ? info.dtype == *type : is_weight_type(info.dtype))) {
      misshapen.push_back(to_text(name, " (expected ", at::IntArrayRef(shape), ", got ", info.dtype, " ",
                                  at::IntArrayRef(info.shape), ")"));
    }
  }
  std::string text;
  append_names(text, missing, "tensors missing");
  append_names(text, extra, "tensors that this model has not");
  append_names(text, misshapen, "tensors of another shape or type");
  if (!text.empty()) throw DataError(files.path().string(), text);
}

Tensor part_of(const View& view, const Tensor& whole) { return view ? view(whole) : whole; }

// A tensor out of parts of others. Its parts must be all of it.
Tensor assemble(const std::string& name, const std::vector<int64_t>& shape, at::ScalarType dtype,
                const std::vector<std::pair<View, Tensor>>& parts) {
  if (parts.size() == 1 && !parts[0].first) return parts[0].second;
  Tensor whole = at::empty(shape, dtype);
  int64_t filled = 0;
  for (const auto& [here, part] : parts) {
    part_of(here, whole).copy_(part);
    filled += part.numel();
  }
  TORCH_CHECK(filled == whole.numel(), "the family's parts of ", name, " are ", filled, " numbers of ",
              whole.numel());
  return whole;
}

// Reads one tensor of ours.
Tensor read_whole(const SafetensorsFolder& files, const Target& target, at::ScalarType dtype) {
  std::vector<std::pair<View, Tensor>> parts;
  for (const Piece& piece : target.pieces) {
    parts.emplace_back(piece.here, part_of(piece.there, files.tensor(piece.name)));
  }
  return assemble(target.name, target.shard.shape, dtype, parts);
}

// A tied output matrix may be in files too, if it is the embedding.
void check_tied(const SafetensorsFolder& files, const std::string& head, const std::string& embedding) {
  if (!files.contains(head) || files.tensor(head).equal(files.tensor(embedding))) return;
  throw DataError(files.file_with(head).path().string() + ": " + head,
                  "differs from " + embedding + ", but config.json ties them");
}

// The model's tensors and where the files, in the family's layout or, without one, in ours, have them.
std::vector<Target> find_targets(const SafetensorsFolder& files, const Family* family,
                                 const Transformer& model) {
  std::vector<Target> targets = targets_of(model);
  place(targets, files, family, model->config());
  const bool tied = model->config().tie_embeddings;
  const std::string head = pieces_of(family, model->config(), "lm_head.weight", {}, false).front().name;
  check_names_and_shapes(files, targets, family == nullptr, [&](const std::string& name) {
    if (tied && name == head) return true;
    return family != nullptr && std::any_of(family->unused.begin(), family->unused.end(),
                                            [&](const std::string& end) { return name.ends_with(end); });
  });
  for (const Target& target : targets) {
    if (tied && target.name == "model.embed_tokens.weight")
      check_tied(files, head, target.pieces.front().name);
  }
  return targets;
}

const Family* family_of(const std::filesystem::path& dir) {
  return find_family(ConfigFile::in(dir).get<std::string>("model_type"));
}

// Parameters become `dtype` if one is given, and everything goes to `device` if one is given.
void fill(Transformer& model, const std::filesystem::path& dir, std::optional<at::Device> device,
          std::optional<at::ScalarType> dtype) {
  const torch::NoGradGuard no_grad;
  const SafetensorsFolder files(dir);
  for (Target& target : find_targets(files, family_of(dir), model)) {
    Tensor& to = target.tensor;
    if (!to.defined()) continue;
    const at::ScalarType to_dtype = target.is_parameter ? dtype.value_or(to.scalar_type()) : to.scalar_type();
    const at::Device to_device = device.value_or(to.device());
    const Tensor part = target.shard.part_of(read_whole(files, target, to_dtype));
    if (to.scalar_type() == to_dtype && to.device() == to_device) {
      to.copy_(part);
    } else {
      to.set_data(
          part.to(to_device, to_dtype, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous));
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

void check_weights(const std::filesystem::path& dir) {
  find_targets(SafetensorsFolder(dir), family_of(dir), outline(read_model_config(dir)));
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

at::ScalarType read_dtype(const std::filesystem::path& dir) {
  const SafetensorsFolder folder(dir);
  std::map<at::ScalarType, int64_t> elements{{at::kFloat, 0}};
  for (const std::string& name : folder.names()) {
    const TensorInfo& info = folder.info(name);
    if (is_weight_type(info.dtype)) elements[info.dtype] += c10::multiply_integers(info.shape);
  }
  return std::max_element(elements.begin(), elements.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

void export_pretrained(const Transformer& model, const std::filesystem::path& dir,
                       const std::filesystem::path& tokenizer_dir) {
  const Family* family = find_family(model->config().family);
  std::vector<Target> targets = targets_of(model);
  const at::ScalarType dtype = targets.front().tensor.scalar_type();
  const auto config = export_config_json(model->config(), dtype);
  // Tensors of the family's, each out of parts of ours.
  std::vector<TensorSpec> specs;
  std::unordered_map<std::string, std::vector<std::pair<View, Tensor>>> parts;
  for (const Target& target : targets) {
    const Tensor ours = target.tensor.detach();
    for (const Piece& piece : pieces_of(family, model->config(), target.name, target.shard.shape, false)) {
      auto& of = parts[piece.name];
      if (of.empty()) specs.push_back({piece.name, ours.scalar_type(), piece.shape});
      of.emplace_back(piece.there, part_of(piece.here, ours));
    }
  }
  AtomicDirectory directory(dir);
  const SafetensorsLayout layout("model", specs, kMaxShardBytes);
  layout.create(directory.folder());
  layout.write(directory.folder(), [&](const SafetensorsLayout::Put& put) {
    for (const TensorSpec& spec : specs)
      put(TensorPart::whole(spec.name,
                            assemble(spec.name, spec.shape, spec.dtype, parts[spec.name]).contiguous()));
  });
  write_file_atomic(directory.folder() / "config.json", config.dump(2) + "\n");
  if (!tokenizer_dir.empty()) copy_tokenizer_files(tokenizer_dir, directory.folder());
  directory.commit();
}

void save_pretrained(const Transformer& model, const std::filesystem::path& dir,
                     const std::filesystem::path& tokenizer_dir) {
  AtomicDirectory directory(dir);
  write_pretrained(model, directory.folder(), tokenizer_dir);
  directory.commit();
}

void copy_tokenizer_files(const std::filesystem::path& from, const std::filesystem::path& to) {
  constexpr std::array kNames{"tokenizer.json",
                              "tokenizer_config.json",
                              "special_tokens_map.json",
                              "added_tokens.json",
                              "vocab.json",
                              "merges.txt",
                              "vocab.txt",
                              "tokenizer.model",
                              "spiece.model",
                              "generation_config.json",
                              "chat_template.jinja",
                              "chat_template.json"};
  for (const auto& entry : std::filesystem::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".tiktoken") || std::find(kNames.begin(), kNames.end(), name) != kNames.end())
      write_file_atomic(to / name, read_text(entry.path()));
  }
}

}  // namespace hymoe
