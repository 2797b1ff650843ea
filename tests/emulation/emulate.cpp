#include <utility>

#include <torch/types.h>

#include "emulation/ops_device.h"
#include "ops/device.h"

// What the emulated kernels and those on a GPU (tests/gpu) have in common in tests: tensors are on the CPU.
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

void* address(const Tensor& x) {
  if (!x.defined()) return nullptr;
  TORCH_CHECK(x.is_contiguous(), "a kernel wants contiguous tensors, got sizes ", x.sizes(), ", strides ",
              x.strides());
  return view_address(x);
}

}  // namespace hymoe::ops::device
