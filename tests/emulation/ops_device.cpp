#include "emulation/ops_device.h"

#include <utility>

#include "emulation/emulation.h"
#include "ops/device.h"

namespace hymoe::emulation {
namespace {
bool emulating = false;
}

Emulate::Emulate(bool on) : before_(std::exchange(emulating, on)) {}
Emulate::~Emulate() { emulating = before_; }

}  // namespace hymoe::emulation

namespace hymoe::ops::device {

bool takes(const Tensor& x) { return emulation::emulating && x.is_cpu(); }

int generation(const Tensor&) { return 9; }

kernels::Stream stream(const Tensor&) { return nullptr; }

void* address(const Tensor& x) {
  if (!x.defined()) return nullptr;
  TORCH_CHECK(x.is_contiguous(), "a kernel wants contiguous tensors, got sizes ", x.sizes(), ", strides ",
              x.strides());
  return view_address(x);
}

void* view_address(const Tensor& x) {
  auto* data = const_cast<void*>(x.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  if (x.numel() > 0) emulation::register_memory(data, (last + 1) * x.element_size());
  return data;
}

}  // namespace hymoe::ops::device
