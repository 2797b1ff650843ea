#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hymoe/config/fields.h"

namespace hymoe {

// What `hymoe eval` does.
struct EvalCommandConfig {
  std::string checkpoint = {};
  std::string data = {};
  std::vector<std::string> languages = {};
  int64_t tokens = 16384;
  int64_t seq_len = 512;
  int64_t batch_size = 4;

  static auto fields() {
    using C = EvalCommandConfig;
    return hymoe::fields(field("checkpoint", &C::checkpoint, "model folder, with its tokenizer"),
                         field("data", &C::data, "folder that hymoe prepare wrote"),
                         field("languages", &C::languages, "empty: all that have held-out documents"),
                         field("tokens", &C::tokens, "held-out tokens a language; 0: all").at_least(0),
                         field("seq_len", &C::seq_len, "longest document; longer ones are cut").at_least(2),
                         field("batch_size", &C::batch_size, "rows of seq_len a forward pass").at_least(1));
  }
  void check() const;
};

}  // namespace hymoe
