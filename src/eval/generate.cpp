#include "hymoe/eval/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <span>
#include <utility>

#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "eval/guards.h"
#include "eval/text_stream.h"
#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/model/kv_cache.h"

namespace hymoe {
namespace {

/// Draws the next token of one completion.
class Sampler {
 public:
  Sampler(const GenerateConfig& config, int64_t prompt) : config_(config) {
    std::seed_seq seed{config.seed, prompt};
    random_.seed(seed);
  }

  int64_t operator()(std::span<const float> logits) {
    const auto best = std::max_element(logits.begin(), logits.end());
    if (config_.temperature == 0) return best - logits.begin();
    std::vector<double> weights(logits.size());
    double total = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      total += weights[i] = std::exp((static_cast<double>(logits[i]) - *best) / config_.temperature);
    }
    std::vector<int64_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    if (config_.top_p < 1) {
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
      double kept = 0;
      size_t n = 0;
      while (n < order.size() && kept < config_.top_p * total) kept += weights[order[n++]];
      order.resize(n);
      total = kept;
    }
    double left = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
    for (const int64_t id : order) {
      left -= weights[id];
      if (left < 0) return id;
    }
    return best - logits.begin();
  }

 private:
  const GenerateConfig& config_;
  std::mt19937_64 random_;
};

/// A completion under way.
struct Completion {
  Sampler sampler;
  TextStream stream;
  Generation result;
  bool ended = false;
};

std::vector<int64_t> end_tokens(const Transformer& model, const Tokenizer& tokenizer,
                                const GenerateConfig& config) {
  if (config.ignore_eos) return {};
  std::vector<int64_t> ids = model->config().eos_token_ids;
  if (const auto id = tokenizer.eos_id()) ids.push_back(*id);
  return ids;
}

void check_prompts(const std::vector<std::vector<int64_t>>& prompts, const ModelConfig& config) {
  for (size_t i = 0; i < prompts.size(); ++i) {
    const std::string where = "prompt " + std::to_string(i);
    if (prompts[i].empty()) throw DataError(where, "has no tokens to continue");
    if (static_cast<int64_t>(prompts[i].size()) >= config.max_seq_len) {
      throw DataError(
          where, "has " + std::to_string(prompts[i].size()) +
                     " tokens, which leaves none of max_seq_len = " + std::to_string(config.max_seq_len));
    }
    for (const int64_t id : prompts[i]) {
      if (id < 0 || id >= config.vocab_size) {
        throw DataError(where, "has token " + std::to_string(id) + ", the model has " +
                                   std::to_string(config.vocab_size));
      }
    }
  }
}

// Logits [active, V] after the new tokens of every document that has some.
Tensor next_logits(Transformer& model, const std::vector<std::vector<int64_t>>& tokens, KVCache& cache) {
  std::vector<int64_t> rows, offsets{0}, last;
  for (const auto& document : tokens) {
    rows.insert(rows.end(), document.begin(), document.end());
    offsets.push_back(static_cast<int64_t>(rows.size()));
    if (!document.empty()) last.push_back(offsets.back() - 1);
  }
  const Packing packing{.offsets = at::tensor(offsets), .padding = {}};
  const Tensor hidden = model->hidden(at::tensor(rows), packing, &cache).hidden;
  const Tensor ends = hidden.index_select(0, at::tensor(last).to(hidden.device()));
  const Tensor logits = model->logits(ends).to(at::kCPU, at::kFloat).contiguous();
  if (!at::isfinite(logits).all().item<bool>()) throw DataError("model", "its logits are not finite");
  return logits;
}

}  // namespace

void GenerateConfig::check() const {
  for (size_t i = 0; i < stop.size(); ++i) {
    if (stop[i].empty()) throw ConfigError("stop." + std::to_string(i), "must not be empty");
  }
}

std::vector<Generation> generate(Transformer& model, const Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts,
                                 const GenerateConfig& config, const OnText& on_text) {
  check_config(config);
  check_vocabulary(model, tokenizer);
  check_prompts(prompts, model->config());
  const torch::NoGradGuard no_grad;
  const EvaluationMode evaluation(model);
  const std::vector<int64_t> ends = end_tokens(model, tokenizer, config);
  std::vector<int64_t> reach;
  for (const auto& prompt : prompts)
    reach.push_back(
        std::min(model->config().max_seq_len - static_cast<int64_t>(prompt.size()), config.max_new_tokens) +
        static_cast<int64_t>(prompt.size()));
  KVCache cache(model->config(), static_cast<int64_t>(prompts.size()), reach);
  std::vector<Completion> completions;
  for (size_t i = 0; i < prompts.size(); ++i) {
    completions.push_back({Sampler(config, static_cast<int64_t>(i)), TextStream(config.stop), {}});
  }

  std::vector<std::vector<int64_t>> tokens = prompts;
  size_t active = prompts.size();
  while (active > 0) {
    const Tensor logits = next_logits(model, tokens, cache);
    const float* row = logits.const_data_ptr<float>();
    for (size_t i = 0; i < prompts.size(); ++i) {
      Completion& c = completions[i];
      if (c.ended) continue;
      const int64_t id = c.sampler({row, static_cast<size_t>(logits.size(1))});
      row += logits.size(1);
      tokens[i].clear();
      if (std::find(ends.begin(), ends.end(), id) != ends.end()) {
        c.result.finish = "eos";
      } else {
        c.result.ids.push_back(id);
        tokens[i] = {id};
        const auto token = static_cast<int32_t>(id);
        if (!tokenizer.is_special(token) && c.stream.push(tokenizer.token_bytes(token))) {
          c.result.finish = "stop";
        } else if (static_cast<int64_t>(c.result.ids.size()) == config.max_new_tokens ||
                   cache.length(static_cast<int64_t>(i)) == model->config().max_seq_len) {
          c.result.finish = "length";
        }
      }
      c.ended = !c.result.finish.empty();
      if (c.ended) {
        if (c.result.finish != "stop") c.stream.finish();
        tokens[i].clear();
        --active;
      }
      const std::string_view piece = c.stream.take();
      if (on_text && !piece.empty()) on_text(static_cast<int64_t>(i), piece);
      if (c.ended) c.result.text = c.stream.text();
    }
  }
  std::vector<Generation> results;
  for (Completion& c : completions) results.push_back(std::move(c.result));
  return results;
}

}  // namespace hymoe
