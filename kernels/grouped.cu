#include "kernels/grouped.h"

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockBytes = int64_t{64} << 10;

__global__ void zero_without_rows_kernel(Global<float> matrices, Global<const int64_t> rows_per_expert,
                                         int64_t blocks, int64_t size) {
  const int64_t e = blockIdx.x / blocks, first = blockIdx.x % blocks * (kBlockBytes / 4);
  if (rows_per_expert[e] > 0) return;
  const int64_t end = first + kBlockBytes / 4 < size ? first + kBlockBytes / 4 : size;
  for (int64_t i = first + threadIdx.x * 4; i < end; i += kThreads * 4) {
    store<4>(matrices, e * size + i, Vector<float, 4>{});
  }
}

}  // namespace

void zero_without_rows(const ZeroWithoutRows& a, Stream stream) {
  const int64_t blocks = (a.bytes + kBlockBytes - 1) / kBlockBytes;
  launch("zero_without_rows", zero_without_rows_kernel, blocks * a.num_experts, kThreads, stream,
         static_cast<float*>(a.matrices), a.rows_per_expert, blocks, a.bytes / 4);
}

}  // namespace hymoe::kernels
