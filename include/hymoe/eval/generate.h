#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "hymoe/config/fields.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

struct GenerateConfig {
  int64_t max_new_tokens = 256;
  double temperature = 0;  // 0: greedy
  double top_p = 1;
  int64_t seed = 0;
  std::vector<std::string> stop = {};
  bool ignore_eos = false;

  static auto fields() {
    return hymoe::fields(
        field("max_new_tokens", &GenerateConfig::max_new_tokens, "longest completion in tokens").at_least(1),
        field("temperature", &GenerateConfig::temperature, "divides the logits before sampling; 0: greedy")
            .at_least(0),
        field("top_p", &GenerateConfig::top_p, "sample from the likeliest tokens of this total probability")
            .above(0)
            .at_most(1),
        field("seed", &GenerateConfig::seed, "of the sampling").at_least(0),
        field("stop", &GenerateConfig::stop, "texts that end a completion; not part of it"),
        field("ignore_eos", &GenerateConfig::ignore_eos, "go on after a token that ends texts"));
  }
  void check() const;
};

struct Generation {
  std::vector<int64_t> ids = {};  // of the completion, without prompt and end token
  std::string text = {};          // of the completion, cut before the stop text
  std::string finish = {};        // "eos", "stop", or "length" (max_new_tokens or max_seq_len reached)
};

/// Called with pieces of completion `prompt` as soon as they are certain: whole UTF-8 characters that no stop
/// text can take back. All pieces of a completion make its text.
using OnText = std::function<void(int64_t prompt, std::string_view piece)>;

/// Continues every prompt (token ids, at least one each, fewer than max_seq_len) with the KV cache, all
/// together. Completion i depends on prompt i, its index, the config and the weights, not on the other
/// prompts. Nucleus sampling after Holtzman et al., arXiv 1904.09751. Refuses a model that is not causal,
/// unless its routers allow it.
std::vector<Generation> generate(Transformer& model, const Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts,
                                 const GenerateConfig& config = {}, const OnText& on_text = {});

}  // namespace hymoe
