#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/fields.h"
#include "hymoe/moe/moe.h"

namespace hymoe {

struct UpcycleConfig {
  std::vector<int64_t> layers = {};
  int64_t every = 1;
  int64_t offset = 0;
  MoEConfig moe = {};
  bool preserve = true;
  std::vector<std::string> freeze = {};
  std::string sample = {};
  int64_t sample_tokens = 8192;
  int64_t sample_seq_len = 512;
  int64_t seed = 0;

  static auto fields() {
    return hymoe::fields(
        field("layers", &UpcycleConfig::layers, "layers that become MoE layers; empty: by every and offset")
            .at_least(0),
        field("every", &UpcycleConfig::every, "without layers: every n-th layer becomes a MoE layer")
            .at_least(1),
        field("offset", &UpcycleConfig::offset, "without layers: the first one").at_least(0),
        field("moe", &UpcycleConfig::moe,
              "the MoE layer; hidden widths must be the dense FFN's, which all experts copy"),
        field("preserve", &UpcycleConfig::preserve,
              "set moe.fusion to preserve, so that the new model computes what the dense one does"),
        field("freeze", &UpcycleConfig::freeze,
              "parameters that training will leave as they are, by name; * stands for any text"),
        field("sample", &UpcycleConfig::sample,
              "text for the receipt and for the cut-offs of threshold routers: a folder written by prepare, "
              "or a text file"),
        field("sample_tokens", &UpcycleConfig::sample_tokens, "tokens of it to use").at_least(2),
        field("sample_seq_len", &UpcycleConfig::sample_seq_len, "longest document in it").at_least(2),
        field("seed", &UpcycleConfig::seed, "of the routers' first weights").at_least(0));
  }
  void check() const;
};

/// What upcycling did to a model, as receipt.json holds it.
struct UpcycleReceipt {
  std::string source = {};
  double max_logit_difference = 0;  // over all tokens of the sample
  double loss_before = 0;           // nats a token on the sample
  double loss_after = 0;
  int64_t sample_tokens = 0;
  int64_t params_before = 0, params_after = 0;
  int64_t active_params_before = 0, active_params_after = 0;
  std::vector<int64_t> moe_layers = {};
  std::vector<std::pair<std::string, std::string>> frozen = {};  // parameter, SHA-256 of its bytes

  nlohmann::ordered_json to_json() const;
};

/// What is being done ("calibrate", "compare", "write") and how much of it is done.
using UpcycleProgress = std::function<void(const char* phase, int64_t done, int64_t total)>;

/// Turns the dense Hugging Face checkpoint in `source` into a hybrid MoE checkpoint in `target` (sparse
/// upcycling, Komatsuzaki et al., arXiv 2212.05055): in the chosen layers the FFN is copied into the shared
/// expert and into every expert of every branch; routers get fresh weights, threshold routers cut-offs
/// measured on the sample. All else is copied. `target` appears complete or not at all, with receipt.json.
/// Throws ConfigError, DataError.
UpcycleReceipt upcycle(const std::filesystem::path& source, const std::filesystem::path& target,
                       const UpcycleConfig& config, const UpcycleProgress& progress = {});

}  // namespace hymoe
