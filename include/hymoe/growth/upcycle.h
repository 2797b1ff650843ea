#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/fields.h"
#include "hymoe/growth/receipt.h"
#include "hymoe/moe/moe.h"

namespace hymoe {

struct UpcycleConfig {
  std::vector<int64_t> layers = {};
  int64_t every = 1;
  int64_t offset = 0;
  MoEConfig moe = {};
  std::string method = "copy";
  double noise = 0.01;
  double reinit = 0.5;
  std::string scaling = "exact";
  std::vector<std::string> experts_from = {};
  std::string router_init = "class";
  double router_std = 0.02;
  bool preserve = true;
  std::vector<std::string> freeze = {};
  std::string dtype = "source";
  std::string sample = {};
  int64_t sample_tokens = 8192;
  int64_t sample_seq_len = 512;
  int64_t seed = 0;

  static auto fields() {
    using C = UpcycleConfig;
    return hymoe::fields(
        field("layers", &C::layers, "layers that become MoE layers; empty: by every and offset").at_least(0),
        field("every", &C::every, "without layers: every n-th layer becomes a MoE layer").at_least(1),
        field("offset", &C::offset, "without layers: the first one").at_least(0),
        field("moe", &C::moe,
              "the MoE layer; the shared expert, and experts by copy and noise, have the dense FFN's width"),
        field("method", &C::method,
              "what an expert is of the dense FFN; copy: all of it; noise: with noise on all; drop: with "
              "part of the neurons drawn anew (Drop-Upcycling); granular: one of hidden's equal slices, "
              "which the router takes together (NVIDIA); slice: a slice of shuffled copies, part drawn anew "
              "(Qwen)")
            .one_of({"copy", "noise", "drop", "granular", "slice"}),
        field("noise", &C::noise, "of method noise, as a share of a matrix' standard deviation").at_least(0),
        field("reinit", &C::reinit, "share of an expert's neurons that drop and slice draw anew")
            .at_least(0)
            .at_most(1),
        field("scaling", &C::scaling,
              "how granular makes up for weights that add up to less; exact: down_proj times what lacks; "
              "published: gate, up and down times its cube root; none: not")
            .one_of({"exact", "published", "none"}),
        field("experts_from", &C::experts_from,
              "further dense checkpoints of the same shape: expert e is of the e-th in turn, the source "
              "first, and all else is their mean (Branch-Train-MiX)"),
        field(
            "router_init", &C::router_init,
            "first weights of routers; class: as their class says, for ours N(0, 0.02); normal, uniform: of "
            "router_std")
            .one_of({"class", "normal", "uniform"}),
        field("router_std", &C::router_std, "standard deviation of router_init normal and uniform")
            .at_least(0),
        field("preserve", &C::preserve,
              "set moe.fusion to preserve, so that the new model computes what the dense one does, where "
              "the method lets it"),
        field("freeze", &C::freeze,
              "parameters that training will leave as they are, by name; * stands for any text"),
        field("dtype", &C::dtype, "of the new weights; source: as those of the source")
            .one_of({"source", "float32", "bfloat16"}),
        field("sample", &C::sample,
              "text for the receipt's comparison and for the cut-offs of threshold routers: a folder written "
              "by prepare, or a text file; empty: nothing is measured, and training's first step sets the "
              "cut-offs"),
        field("sample_tokens", &C::sample_tokens, "tokens of it to use").at_least(2),
        field("sample_seq_len", &C::sample_seq_len, "longest document in it").at_least(2),
        field("seed", &C::seed, "of the routers' first weights and of what methods draw").at_least(0));
  }
  void check() const;
};

/// What upcycling did to a model, as receipt.json holds it.
struct UpcycleReceipt {
  std::string source = {};
  nlohmann::ordered_json source_files = {};  // SHA-256 of the files of weights, of experts_from too
  UpcycleConfig config = {};
  Comparison comparison = {};
  int64_t params_before = 0, params_after = 0;
  int64_t active_params_before = 0, active_params_after = 0;
  std::vector<int64_t> moe_layers = {};
  std::vector<std::pair<std::string, std::string>> frozen = {};  // parameter, SHA-256 of its bytes

  nlohmann::ordered_json to_json() const;
};

/// Turns the dense Hugging Face checkpoint in `source` into a hybrid MoE checkpoint in `target`, tensor by
/// tensor: in the chosen layers the FFN becomes the shared expert, and by `method` every expert of every
/// branch (docs/growth.md has the methods); routers get fresh weights, and, where there is a sample,
/// threshold routers cut-offs measured on it. All else is copied. `target` appears complete or not at all,
/// with receipt.json. Throws ConfigError, DataError.
UpcycleReceipt upcycle(const std::filesystem::path& source, const std::filesystem::path& target,
                       const UpcycleConfig& config, const GrowthProgress& progress = {});

}  // namespace hymoe
