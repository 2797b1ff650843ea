#include "hymoe/io/shard.h"

#include <algorithm>

#include "hymoe/config/error.h"

namespace hymoe {

std::vector<int64_t> Shard::local_shape() const {
  std::vector<int64_t> local = shape;
  for (size_t d = 0; d < splits.size(); ++d) {
    const int64_t parts = splits[d].size * splits[d].groups;
    if (shape[d] % parts != 0) {
      throw Error(name + ": dimension " + std::to_string(d) + " of size " + std::to_string(shape[d]) +
                  " cannot be divided into " + std::to_string(parts) + " equal parts");
    }
    local[d] /= splits[d].size;
  }
  return local;
}

int64_t Shard::local_numel() const {
  int64_t numel = 1;
  for (const int64_t n : local_shape()) numel *= n;
  return numel;
}

Tensor Shard::part_of(const Tensor& whole) const {
  Tensor part = whole;
  for (size_t d = 0; d < splits.size(); ++d) {
    const auto [rank, size, groups] = splits[d];
    if (size == 1) continue;
    const auto dim = static_cast<int64_t>(d);
    part = part.unflatten(dim, {groups, size, shape[d] / groups / size}).select(dim + 1, rank);
    part = part.flatten(dim, dim + 1);
  }
  return part;
}

void Shard::for_each_run(int64_t begin, int64_t end,
                         const std::function<void(int64_t, int64_t, int64_t)>& run) const {
  const std::vector<int64_t> local = local_shape();
  // From the last divided dimension on, a stretch of the part is one of the whole.
  size_t last = 0;
  for (size_t d = 0; d < splits.size(); ++d) {
    if (splits[d].size > 1) last = d;
  }
  const auto split_of = [&](size_t d) { return d < splits.size() ? splits[d] : Split{}; };
  int64_t inner = 1, inner_local = 1;
  for (size_t d = last + 1; d < shape.size(); ++d) inner *= shape[d];
  const int64_t groups = shape.empty() ? 1 : split_of(last).groups;
  inner_local = shape.empty() ? 1 : local[last] / groups * inner;
  if (splits.empty()) inner_local = std::max<int64_t>(end, 1);
  for (int64_t at = begin; at < end;) {
    const int64_t count = std::min(end - at, inner_local - at % inner_local);
    // The place of local element `at` in the whole, dimension by dimension from the last.
    int64_t rest = at, whole = 0, stride = 1;
    if (splits.empty()) {
      whole = at;
    } else {
      for (size_t i = shape.size(); i-- > 0;) {
        const Split split = split_of(i);
        const int64_t index = rest % local[i], per_group = local[i] / split.groups;
        rest /= local[i];
        whole += (index + (index / per_group * (split.size - 1) + split.rank) * per_group) * stride;
        stride *= shape[i];
      }
    }
    run(at, whole, count);
    at += count;
  }
}

}  // namespace hymoe
