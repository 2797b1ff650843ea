#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

// A plain struct among what an autograd::Function keeps for its backward pass.
namespace hymoe::ops {

template <class S>
struct Kept : torch::CustomClassHolder {
  explicit Kept(const S& of) : value(of) {}
  S value;
};

template <class S>
void keep(torch::autograd::AutogradContext* ctx, const S& value) {
  ctx->saved_data["kept"] = c10::IValue::make_capsule(c10::make_intrusive<Kept<S>>(value));
}

template <class S>
S kept(torch::autograd::AutogradContext* ctx) {
  const auto capsule = ctx->saved_data["kept"].toCapsule();
  return static_cast<const Kept<S>&>(*capsule).value;
}

}  // namespace hymoe::ops
