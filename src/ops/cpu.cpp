#include "ops/cpu.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <ATen/TensorIterator.h>
#include <torch/types.h>

namespace hymoe::ops::cpu {

void parallel_for(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> f) {
  if (n <= grain) {
    if (n > 0) f(0, n);
    return;
  }
  // ATen's iterator runs on the threads that LibTorch was built with; its elements serve as indices only.
  Tensor index = at::empty({n}, at::kByte);
  auto elements = at::TensorIterator::nullary_op(index);
  const char* first = static_cast<const char*>(index.const_data_ptr());
  elements.for_each(
      [&](char** data, const int64_t*, int64_t size, int64_t repeats) {
        const int64_t begin = data[0] - first;
        f(begin, begin + size * repeats);
      },
      grain);
}

Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor x = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHuge = size_t{1} << 21;
  if (x.is_cpu() && x.nbytes() >= 4 * kHuge) {
    const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + x.nbytes()) / kHuge * kHuge;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // Advice: refusal changes nothing.
  }
#endif
  return x;
}

}  // namespace hymoe::ops::cpu
