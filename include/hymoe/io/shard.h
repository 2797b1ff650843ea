#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hymoe {

using at::Tensor;

/// How one dimension of a tensor is divided among ranks: into `groups` equal stretches, each of `size` equal
/// parts, of which this rank has part `rank` of every stretch.
struct Split {
  int64_t rank = 0, size = 1, groups = 1;
};

/// A rank's part of a named tensor. The part is a tensor of its own, whose elements in order are "local".
struct Shard {
  std::string name = {};            // of the whole tensor
  std::vector<int64_t> shape = {};  // of the whole tensor
  std::vector<Split> splits = {};   // one a dimension; empty: this rank has all of it

  /// Shape of the part. Throws Error naming the tensor when a dimension cannot be divided so.
  std::vector<int64_t> local_shape() const;
  int64_t local_numel() const;
  /// whole [shape] -> the part, a view where it can be one.
  Tensor part_of(const Tensor& whole) const;
  /// Calls run(local, whole, count) for all stretches of local elements [begin, end) that are contiguous in
  /// the whole too: `count` elements from `local` of the part lie at `whole` of the whole tensor.
  void for_each_run(int64_t begin, int64_t end,
                    const std::function<void(int64_t local, int64_t whole, int64_t count)>& run) const;
};

/// Values of the local elements [begin, begin + n) of a shard's part; what is written into files and read
/// from them.
struct TensorPart {
  Shard shard = {};
  int64_t begin = 0;
  Tensor values = {};  // [n], contiguous, on any device

  /// All of a contiguous tensor, viewed.
  static TensorPart whole(const std::string& name, const Tensor& tensor) {
    return {.shard = {.name = name, .shape = tensor.sizes().vec()},
            .begin = 0,
            .values = tensor.detach().view(-1)};
  }
};

}  // namespace hymoe
