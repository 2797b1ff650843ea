#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "hymoe/model/config.h"
#include "model/config_file.h"

namespace hymoe {

using at::Tensor;

/// A part of a tensor, as a view.
using View = std::function<Tensor(const Tensor&)>;

/// Where a family's files have a tensor of ours, or a part of one.
struct Piece {
  std::string name = {};            // of the tensor in files
  std::vector<int64_t> shape = {};  // of all of it
  View there = {}, here = {};       // the parts of the file's tensor and of ours, of one shape; none: all
};

/// What says where: one tensor of ours.
struct OurTensor {
  std::string name = {};
  std::vector<int64_t> shape = {};
  int64_t layer = -1;     // -1: outside the layers
  std::string rest = {};  // of the name, behind "model.layers.N."
};

/// How a model_type of Hugging Face's says what we say. A family is one function each way for config.json,
/// and one for the names of tensors.
struct Family {
  std::string name;          // model_type in config.json, and ModelConfig::family
  std::string architecture;  // the class in transformers
  ModelConfig (*read)(const ConfigFile&);
  /// The keys of its own; what it cannot say is found by reading them again.
  void (*write)(const ModelConfig&, nlohmann::ordered_json&);
  /// `stacked`: the experts of a layer are one tensor, as transformers 5 has them in memory. nullptr: all
  /// tensors have our names and shapes.
  std::vector<Piece> (*pieces)(const ModelConfig&, const OurTensor&, bool stacked) = nullptr;
  std::string prefix = {};               // of tensors, left out by files of the headless model
  std::vector<std::string> unused = {};  // ends of names of buffers in older files
};

/// All of them.
const std::vector<Family>& families();
/// nullptr: there is none of that name.
const Family* find_family(std::string_view name);

/// The family's config.json of a model. Throws ConfigError naming the setting that it cannot say.
nlohmann::ordered_json family_config_json(const Family& family, const ModelConfig& config);

/// Where the family's files have a tensor of ours.
std::vector<Piece> pieces_of(const Family* family, const ModelConfig& config, const std::string& name,
                             const std::vector<int64_t>& shape, bool stacked);

// The families, each in its file.
Family llama_family();
Family mistral_family();
Family qwen2_family();
Family qwen3_family();
Family mixtral_family();
Family qwen2_moe_family();
Family qwen3_moe_family();
Family olmoe_family();
Family phimoe_family();
Family dots1_family();
Family gpt2_family();
Family gpt_neox_family();

}  // namespace hymoe
