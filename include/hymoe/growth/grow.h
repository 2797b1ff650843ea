#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/fields.h"
#include "hymoe/growth/receipt.h"

namespace hymoe {

struct GrowConfig {
  int64_t num_layers = 0;
  std::string depth = "interpose";
  int64_t first = 0;
  int64_t last = 0;
  bool zero_outputs = false;
  int64_t experts = 1;
  std::vector<std::string> branches = {};
  std::string order = "append";
  double noise = 0.01;
  std::string router = "copy";
  std::string top_k = "scale";
  std::string optimizer = "drop";
  std::string sample = {};
  int64_t sample_tokens = 8192;
  int64_t sample_seq_len = 512;
  int64_t seed = 0;

  static auto fields() {
    using C = GrowConfig;
    return hymoe::fields(
        field("num_layers", &C::num_layers, "layers of the new model; 0: as many as before")
            .at_least(0)
            .at_most(10'000),
        field("depth", &C::depth,
              "where copies of layers stand; interpose: behind their source; stack: the whole block again "
              "above; identity: LLaMA-Pro, behind every so many layers one that adds nothing at first")
            .one_of({"interpose", "stack", "identity"}),
        field("first", &C::first, "first layers that are not copied").at_least(0).at_most(10'000),
        field("last", &C::last, "last layers that are not copied").at_least(0).at_most(10'000),
        field("zero_outputs", &C::zero_outputs,
              "zero what copied layers write to the residual stream (o_proj, down_proj), which keeps the "
              "function; always so with identity"),
        field("experts", &C::experts, "copies of every routed expert, itself included")
            .at_least(1)
            .at_most(10'000),
        field("branches", &C::branches, "branches whose experts are copied; empty: all"),
        field("order", &C::order,
              "where copies of experts stand: append behind all, interleave behind their source")
            .one_of({"append", "interleave"}),
        field("noise", &C::noise,
              "of copied experts and of their rows and biases in the router, as a share of the standard "
              "deviation of each expert's matrix, or of the router's tensor")
            .at_least(0),
        field("router", &C::router,
              "rows of copied experts: copied, or the whole router drawn anew from N(0, 0.02)")
            .one_of({"copy", "random"}),
        field("top_k", &C::top_k,
              "scale: top_k, capacity and bucket grow with the experts, which keeps the function up to the "
              "noise; keep: they stay")
            .one_of({"scale", "keep"}),
        field("optimizer", &C::optimizer,
              "copy: moments too, and where the run stands, so that it can go on; drop: weights alone")
            .one_of({"drop", "copy"}),
        field("sample", &C::sample,
              "text on which the receipt compares both models, a folder written by prepare or a text file; "
              "empty: nothing is measured"),
        field("sample_tokens", &C::sample_tokens, "tokens of it to use").at_least(2),
        field("sample_seq_len", &C::sample_seq_len, "longest document in it").at_least(2),
        field("seed", &C::seed, "of the noise").at_least(0));
  }
};

/// What a layer of a deeper model is made of.
struct GrownLayer {
  int64_t source;
  bool copy = false;  // its source stands at another place too, as itself

  bool operator==(const GrownLayer&) const = default;
};

/// The layers of a model of n layers made deeper, L = config.num_layers, a = first, c = last (Orthogonal
/// growth, arXiv 2510.08008):
///
///   interpose   layers [a, n - c) spread over L - a - c places in order, layer a + floor(j·(n - a - c) /
///               (L - a - c)) at the j-th: each k times where L = n + (k - 1)·(n - a - c)
///   stack       layers [0, n - c), then [a, n) k - 1 times; L = k·n - c - (k - 1)·a
///   identity    (LLaMA-Pro, arXiv 2401.02415) of layers [a, n - c) every s-th twice, s = (n - a - c) / (L -
///               n), which must be whole
///
/// Throws ConfigError for an L that cannot be.
std::vector<GrownLayer> layer_map(int64_t layers, const GrowConfig& config);

/// What growing did to a model, as receipt.json holds it.
struct GrowReceipt {
  std::string source = {};
  nlohmann::ordered_json source_files = {};  // SHA-256 of the files of weights
  GrowConfig config = {};
  std::vector<GrownLayer> layers = {};
  int64_t params_before = 0, params_after = 0;
  Comparison comparison = {};
  nlohmann::ordered_json source_receipt = {};  // where the source had one

  nlohmann::ordered_json to_json() const;
};

/// Makes the model in `source` deeper, wider in experts, or both, as `target`, tensor by tensor. `source` is
/// a folder of ours, dense or hybrid, or one of Hugging Face: llama, mistral, qwen2, qwen3, mixtral,
/// qwen2_moe, qwen3_moe, olmoe, experts stacked or one by one. `target` appears complete or not at all, with
/// receipt.json. Throws ConfigError, DataError.
GrowReceipt grow(const std::filesystem::path& source, const std::filesystem::path& target,
                 const GrowConfig& config, const GrowthProgress& progress = {});

}  // namespace hymoe
