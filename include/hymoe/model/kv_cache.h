#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/model/config.h"
#include "hymoe/moe/routing.h"

namespace hymoe {

using at::Tensor;

/// What a Transformer remembers of N documents between calls: keys and values of every layer, and the
/// routers' state. Document i of a call continues document i of the calls before; a document may have no rows
/// in a call. Room grows by doubling, so a step costs no copy of the past.
class KVCache {
 public:
  /// For `batch` documents, all empty. `reach` is what longrope takes for the length of each, whose keys turn
  /// by it from the first on; by default max_seq_len.
  KVCache(const ModelConfig& config, int64_t batch, std::vector<int64_t> reach = {});

  const std::vector<int64_t>& reach() const { return reach_; }
  int64_t batch() const { return state_.documents(); }
  /// Rows that a document holds.
  int64_t length(int64_t document) const { return state_.past().at(document); }
  DecodeState& state() { return state_; }

  /// Puts k and v [rows, kv_heads, d] of new rows behind those of a layer's document and returns all of that
  /// document's: views [length + rows, kv_heads, d], valid until the next append.
  std::pair<Tensor, Tensor> append(int64_t layer, int64_t document, const Tensor& k, const Tensor& v);
  /// Ends a call: document i grew by the rows that offsets [N + 1] give it.
  void advance(const Tensor& offsets) { state_.advance(offsets); }

 private:
  struct Entry {
    Tensor k, v;  // [capacity, kv_heads, d]
  };

  std::vector<std::vector<Entry>> layers_;  // [layer][document]
  DecodeState state_;
  std::vector<int64_t> reach_;
};

}  // namespace hymoe
