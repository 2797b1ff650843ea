#pragma once

#include "fuzz/target.h"
#include "hymoe/data/tokenizer.h"

namespace hymoe::fuzz {

/// What every tokenizer does that was loaded.
inline void use(const Tokenizer& tokenizer, std::string_view text) {
  for (const bool special : {false, true}) {
    const std::vector<int32_t> ids = tokenizer.encode(text, special);
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) broken("an id outside of the vocabulary");
      tokenizer.is_special(id);
    }
    tokenizer.decode(ids, special);
  }
  for (const auto& id : {tokenizer.bos_id(), tokenizer.eos_id()}) {
    if (id && (*id < 0 || *id >= tokenizer.vocab_size())) broken("an end outside of the vocabulary");
  }
}

}  // namespace hymoe::fuzz
