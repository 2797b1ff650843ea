#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/types.h>

#include "ops/device.h"

namespace hymoe::ops::device {

bool takes(const Tensor& x) { return x.is_cuda(); }

int generation(const Tensor& x) {
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device()));
  return major;
}

kernels::Stream stream(const Tensor& x) {
  // A launch goes to the current device, which is x's while autograd or the trainer runs; make sure of it.
  if (c10::cuda::current_device() != x.get_device()) c10::cuda::set_device(x.get_device());
  return c10::cuda::getCurrentCUDAStream(x.get_device()).stream();
}

void* address(const Tensor& x) { return x.defined() ? const_cast<void*>(x.const_data_ptr()) : nullptr; }

void* view_address(const Tensor& x) { return address(x); }

}  // namespace hymoe::ops::device
