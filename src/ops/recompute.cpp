#include "hymoe/ops/recompute.h"

#include <algorithm>

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool wants_gradient(const Tensor& x) { return x.defined() && x.requires_grad(); }

// Which of a list's tensors are defined: a node of the graph has no place for the others.
struct Places {
  std::vector<size_t> defined = {};
  size_t all = 0;

  variable_list pack(const std::vector<Tensor>& tensors) {
    variable_list packed;
    *this = {.all = tensors.size()};
    for (size_t i = 0; i < all; ++i) {
      if (!tensors[i].defined()) continue;
      defined.push_back(i);
      packed.push_back(tensors[i]);
    }
    return packed;
  }
  std::vector<Tensor> unpack(at::TensorList packed) const {
    std::vector<Tensor> tensors(all);
    for (size_t i = 0; i < defined.size(); ++i) tensors[defined[i]] = packed[i];
    return tensors;
  }
};

// What the backward pass runs again.
struct Again : torch::CustomClassHolder {
  explicit Again(Body f) : f(std::move(f)) {}
  Body f;
  Places inputs = {}, outputs = {};
};

// y = f(x; p): dx, dp = dy · ∂f, of a graph made for the purpose. Parameters are inputs of this node too, so
// that the engine that called it adds up their gradients.
struct Recompute : Function<Recompute> {
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<Again>& again,
                               at::TensorList inputs_and_parameters) {
    ctx->save_for_backward(inputs_and_parameters.vec());
    ctx->saved_data["again"] = c10::IValue::make_capsule(again);
    ctx->set_materialize_grads(false);
    return again->outputs.pack(again->f(again->inputs.unpack(inputs_and_parameters)));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto again = c10::static_intrusive_pointer_cast<Again>(ctx->saved_data["again"].toCapsule());
    variable_list saved = ctx->get_saved_variables(), wanted, results, from;
    std::vector<size_t> of;
    for (size_t i = 0; i < saved.size(); ++i) {
      const bool wants = saved[i].requires_grad() && ctx->needs_input_grad(i);
      if (i < again->inputs.defined.size()) saved[i] = saved[i].detach().requires_grad_(wants);
      if (!wants) continue;
      of.push_back(i + 1);
      wanted.push_back(saved[i]);
    }
    const torch::AutoGradMode with_gradients(true);
    const std::vector<Tensor> outputs = again->f(again->inputs.unpack(saved));
    for (size_t i = 0; i < gradients.size(); ++i) {
      const Tensor& y = outputs.at(again->outputs.defined[i]);
      if (!gradients[i].defined() || !y.requires_grad()) continue;
      results.push_back(y);
      from.push_back(gradients[i]);
    }
    variable_list all(saved.size() + 1);  // the first is that of `again`
    if (results.empty()) return all;
    const variable_list found = torch::autograd::grad(results, wanted, from, /*retain_graph=*/false,
                                                      /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < found.size(); ++i) all[of[i]] = found[i];
    return all;
  }
};

}  // namespace

std::vector<Tensor> recompute(const Body& f, const std::vector<Tensor>& inputs,
                              const std::vector<Tensor>& parameters) {
  if (!at::GradMode::is_enabled() || !(std::any_of(inputs.begin(), inputs.end(), wants_gradient) ||
                                       std::any_of(parameters.begin(), parameters.end(), wants_gradient))) {
    return f(inputs);
  }
  const auto again = c10::make_intrusive<Again>(f);
  variable_list all = again->inputs.pack(inputs);
  all.insert(all.end(), parameters.begin(), parameters.end());
  return again->outputs.unpack(Recompute::apply(again, at::TensorList(all)));
}

}  // namespace hymoe::ops
