#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <nlohmann/json.hpp>

#include "hymoe/io/safetensors.h"
#include "hymoe/model/config.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

/// A model's config from `dir`/config.json: model_type of one of Hugging Face's families that
/// docs/checkpoints.md has, or hymoe (ours). What we do not implement (another activation, other rope
/// scalings, …) is a DataError that names the file and the key. Texts end at the tokens that
/// `dir`/generation_config.json names, too.
ModelConfig read_model_config(const std::filesystem::path& dir);

/// What `dir`/config.json says under "noncausal"; nothing where it does not say.
std::optional<bool> read_noncausal(const std::filesystem::path& dir);

/// The type of most of `dir`'s weights: float32, float16 or bfloat16. config.json may say another.
at::ScalarType read_dtype(const std::filesystem::path& dir);

/// config.json of a model whose tensors have our names: as transformers reads it (5 and older) where the
/// dense family's files are the same, else with model_type "hymoe" and all of the config under "model", and
/// "noncausal": true where Transformer::noncausal().
nlohmann::ordered_json model_config_json(const ModelConfig& config, at::ScalarType dtype, bool noncausal);

/// config.json of a model in its family's layout. Throws ConfigError naming a setting that the family has no
/// word for: several branches, a segment router, ….
nlohmann::ordered_json export_config_json(const ModelConfig& config, at::ScalarType dtype);

/// A model from a folder: config.json, and model.safetensors or its shards in F32, F16 or BF16, with the
/// names of ours or of the family of config.json, experts stacked or not. Parameters become `dtype`; buffers
/// keep theirs. Tensors of ours are read one at a time, of each this rank's part. A missing, extra or
/// misshapen tensor is a DataError that lists the names, and so is a "noncausal" that is not what the model's
/// routers say; a tied lm_head.weight may be present if it equals the embedding.
Transformer load_pretrained(const std::filesystem::path& dir, at::Device device = at::kCPU,
                            at::ScalarType dtype = at::kFloat, const Mesh& mesh = {});

/// The same into a model that is there (its device, its dtypes), from a folder with the tensors of it.
void load_weights(Transformer& model, const std::filesystem::path& dir);

/// Throws what load_pretrained would for files that do not hold the tensors of config.json's model.
void check_weights(const std::filesystem::path& dir);

/// Writes config.json and model*.safetensors into `folder`, which exists, and copies the tokenizer and
/// generation files of `tokenizer_dir` if one is given.
std::vector<WrittenFile> write_pretrained(const Transformer& model, const std::filesystem::path& folder,
                                          const std::filesystem::path& tokenizer_dir = {});

/// The same as a folder that appears only when complete.
void save_pretrained(const Transformer& model, const std::filesystem::path& dir,
                     const std::filesystem::path& tokenizer_dir = {});

/// Writes a whole model as its family has it, one tensor an expert, for transformers and what reads its
/// files; a folder that appears only when complete. Throws as export_config_json.
void export_pretrained(const Transformer& model, const std::filesystem::path& dir,
                       const std::filesystem::path& tokenizer_dir = {});

/// Writes a whole model of any config with our names of tensors, and modeling_hymoe.py beside them, with
/// which transformers loads it (trust_remote_code); we read the folder too, which appears only when complete.
/// Throws ConfigError naming what the Python has not: routers and experts of a user's.
void export_with_code(const Transformer& model, const std::filesystem::path& dir,
                      const std::filesystem::path& tokenizer_dir = {});

/// Copies tokenizer.json, tokenizer_config.json, special_tokens_map.json, vocab.json, merges.txt,
/// generation_config.json and chat_template.jinja, those that are there.
void copy_tokenizer_files(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace hymoe
