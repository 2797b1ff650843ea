#pragma once

#include <string>

#include "hymoe/config/error.h"
#include "hymoe/data/tokenizer.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

/// Throws DataError when the tokenizer has ids that the model has not.
inline void check_vocabulary(const Transformer& model, const Tokenizer& tokenizer) {
  const int64_t rows = model->config().vocab_size;
  if (tokenizer.vocab_size() > rows) {
    throw DataError("tokenizer", "has " + std::to_string(tokenizer.vocab_size()) + " tokens, the model has " +
                                     std::to_string(rows) + ": it is another model's");
  }
}

/// Puts a model into evaluation mode, and back at the end of the scope.
class EvaluationMode {
 public:
  explicit EvaluationMode(Transformer& model) : model_(model), was_training_(model->is_training()) {
    model_->eval();
  }
  ~EvaluationMode() { model_->train(was_training_); }
  EvaluationMode(const EvaluationMode&) = delete;
  EvaluationMode& operator=(const EvaluationMode&) = delete;

 private:
  Transformer model_;
  bool was_training_;
};

}  // namespace hymoe
