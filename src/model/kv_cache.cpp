#include "hymoe/model/kv_cache.h"

#include <algorithm>

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/grad_mode.h>

namespace hymoe {
namespace {

constexpr int64_t kFirstCapacity = 64;

// Copies `rows` behind the first `length` rows of `buffer`, which grows when it is too small.
Tensor append_rows(Tensor& buffer, int64_t length, const Tensor& rows) {
  const int64_t total = length + rows.size(0);
  if (!buffer.defined() || buffer.size(0) < total) {
    const int64_t capacity = std::max({total, 2 * length, kFirstCapacity});
    Tensor grown = at::empty({capacity, rows.size(1), rows.size(2)}, rows.options());
    if (length > 0) grown.narrow(0, 0, length).copy_(buffer.narrow(0, 0, length));
    buffer = std::move(grown);
  }
  buffer.narrow(0, length, rows.size(0)).copy_(rows);
  return buffer.narrow(0, 0, total);
}

}  // namespace

KVCache::KVCache(const ModelConfig& config, int64_t batch, std::vector<int64_t> reach)
    : layers_(config.num_layers, std::vector<Entry>(batch)),
      state_(batch),
      reach_(reach.empty() ? std::vector<int64_t>(batch, config.max_seq_len) : std::move(reach)) {
  TORCH_CHECK(static_cast<int64_t>(reach_.size()) == batch, "KVCache: reach must be of ", batch,
              " documents, got ", reach_.size());
}

std::pair<Tensor, Tensor> KVCache::append(int64_t layer, int64_t document, const Tensor& k, const Tensor& v) {
  const torch::NoGradGuard no_grad;
  Entry& entry = layers_.at(layer).at(document);
  return {append_rows(entry.k, length(document), k), append_rows(entry.v, length(document), v)};
}

}  // namespace hymoe
