#pragma once

namespace hymoe::emulation {

/// While one of these lives, operations give tensors on the CPU to the emulated kernels.
class Emulate {
 public:
  explicit Emulate(bool on = true);
  ~Emulate();
  Emulate(const Emulate&) = delete;

 private:
  bool before_;
};

}  // namespace hymoe::emulation
