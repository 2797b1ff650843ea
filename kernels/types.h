#pragma once

#include <cstdint>

// Before a small function of both the CPU and the GPU.
#ifdef __CUDACC__
#define HYMOE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define HYMOE_EVERYWHERE inline __attribute__((always_inline))
#endif

/// Types that launchers share. A launcher is one function of a struct of addresses and sizes, `void
/// gather_rows(const GatherRows&, Stream)`: it chooses block and grid, puts the work on the stream and
/// returns. Addresses are of the GPU's memory, tensors contiguous; addresses that may be nullptr say so.
/// Launchers throw std::runtime_error with CUDA's words.
namespace hymoe::kernels {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

/// A cudaStream_t.
using Stream = void*;

/// Columns of a row that a warp holds in its registers: experts, a shared one among them.
constexpr int kMostColumns = 512;

}  // namespace hymoe::kernels
