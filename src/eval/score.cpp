#include "hymoe/eval/score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "eval/guards.h"

namespace hymoe {
namespace {

// Whole logits of so many rows exist at a time.
constexpr int64_t kRows = 128;

}  // namespace

TextScore score_text(Transformer& model, const Tokenizer& tokenizer, std::string_view text,
                     bool with_logits) {
  check_vocabulary(model, tokenizer);
  const torch::NoGradGuard no_grad;
  const EvaluationMode evaluation(model);
  const std::vector<int32_t> encoded = tokenizer.encode(text, /*allow_special=*/true);
  TextScore score;
  score.ids.assign(encoded.begin(), encoded.end());
  score.bytes = static_cast<int64_t>(text.size());
  const auto size = static_cast<int64_t>(score.ids.size());
  const Tensor ids = at::tensor(score.ids, at::kLong);
  if (with_logits) score.logits = at::empty({size, model->config().vocab_size}, at::kFloat);

  // Window [begin, end) gives rows [row, end - 1), which predict the tokens that no window before it held;
  // the last window gives the last row too, which predicts nothing of the text.
  const int64_t window = std::min(model->config().max_seq_len, size);
  TORCH_CHECK(window > 1 || size < 2, "score_text: max_seq_len must be at least 2, got ", window);
  double nats = 0;
  int64_t row = 0;
  for (int64_t begin = 0, end = 0; end < size; begin += window / 2) {
    end = std::min(begin + window, size);
    const Tensor tokens = ids.narrow(0, begin, end - begin);
    const Tensor hidden = model->hidden(tokens, Packing::of(1, end - begin)).hidden;
    const int64_t rows_end = end == size ? end : end - 1;
    for (; row < rows_end;) {
      const int64_t n = std::min(kRows, rows_end - row);
      const Tensor logits = model->logits(hidden.narrow(0, row - begin, n)).to(at::kCPU, at::kFloat);
      if (with_logits) score.logits.narrow(0, row, n).copy_(logits);
      const int64_t predicted = std::min(n, size - 1 - row);
      if (predicted > 0) {
        const Tensor targets = ids.narrow(0, row + 1, predicted).unsqueeze(1);
        const Tensor log_p = logits.narrow(0, 0, predicted).log_softmax(1).gather(1, targets);
        nats -= log_p.sum(at::kDouble).item<double>();
      }
      row += n;
    }
  }
  const double none = std::numeric_limits<double>::quiet_NaN();
  score.loss = size < 2 ? none : nats / static_cast<double>(size - 1);
  score.bits_per_byte = size < 2 ? none : nats / (std::numbers::ln2 * static_cast<double>(score.bytes));
  return score;
}

}  // namespace hymoe
