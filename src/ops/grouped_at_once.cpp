#include "ops/grouped_at_once.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "kernels/grouped.h"
#include "ops/device.h"
#include "ops/swiglu.h"

namespace hymoe::ops::at_once {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Where each expert's rows end.
Tensor ends_of(const Tensor& rows_per_expert) { return rows_per_expert.cumsum(0, at::kInt); }

// y_e = x_e W_e for weight [E, D, N], which may be a transposed view.
Tensor product(const Tensor& rows, const Tensor& weight, const Tensor& ends) {
  if (rows.size(0) == 0) return at::empty({0, weight.size(2)}, rows.options());
  return at::_grouped_mm(rows, weight, ends);
}

// dW_e = dy_eᵀ x_e. LibTorch leaves the matrices of experts without rows as they come on some GPUs.
Tensor weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& rows_per_expert, const Tensor& ends) {
  if (dy.size(0) == 0) return at::zeros({ends.size(0), dy.size(1), x.size(1)}, dy.options());
  Tensor dw = at::_grouped_mm(dy.t(), x, ends);
  kernels::zero_without_rows({.matrices = device::address(dw),
                              .rows_per_expert = device::data<int64_t>(rows_per_expert),
                              .num_experts = dw.size(0),
                              .bytes = dw.size(1) * dw.size(2) * dw.element_size()},
                             device::stream(dw));
  return dw;
}

struct GroupedProduct : Function<GroupedProduct> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weight,
                        const Tensor& rows_per_expert) {
    const Tensor ends = ends_of(rows_per_expert);
    ctx->save_for_backward({rows, weight, rows_per_expert, ends});
    return product(rows, weight.transpose(1, 2), ends);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &weight = saved[1], dy = gradients[0].contiguous();
    return {ctx->needs_input_grad(0) ? product(dy, weight, saved[3]) : Tensor(),
            ctx->needs_input_grad(1) ? weight_gradient(dy, rows, saved[2], saved[3]) : Tensor(),
            {}};
  }
};

struct SwigluExperts : Function<SwigluExperts> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& gate_up_proj,
                        const Tensor& down_proj, const Tensor& rows_per_expert, bool keep) {
    const Tensor ends = ends_of(rows_per_expert);
    const Tensor gate_up = product(rows, gate_up_proj.transpose(1, 2), ends);
    Tensor h = at::empty({rows.size(0), down_proj.size(2)}, rows.options());
    swiglu_forward(gate_up, h);
    if (keep) ctx->save_for_backward({rows, gate_up_proj, down_proj, gate_up, rows_per_expert, ends});
    return product(h, down_proj.transpose(1, 2), ends);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &gate_up = saved[3], &counts = saved[4], &ends = saved[5];
    const Tensor dy = gradients[0].contiguous();
    Tensor h = product(dy, saved[2], ends);  // its gradient, until swiglu_backward has read that
    Tensor d_gate_up = at::empty(gate_up.sizes(), gate_up.options());
    swiglu_backward(gate_up, h, d_gate_up);
    return {ctx->needs_input_grad(0) ? product(d_gate_up, saved[1], ends) : Tensor(),
            ctx->needs_input_grad(1) ? weight_gradient(d_gate_up, rows, counts, ends) : Tensor(),
            ctx->needs_input_grad(2) ? weight_gradient(dy, h, counts, ends) : Tensor(),
            {},
            {}};
  }
};

Tensor on_device_of(const Tensor& rows, const Tensor& rows_per_expert) {
  return rows_per_expert.to(rows.device(), /*non_blocking=*/true).contiguous();
}

}  // namespace

Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert) {
  return GroupedProduct::apply(rows.contiguous(), weight.contiguous(), on_device_of(rows, rows_per_expert));
}

Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert, bool keep) {
  return SwigluExperts::apply(rows.contiguous(), gate_up_proj.contiguous(), down_proj.contiguous(),
                              on_device_of(rows, rows_per_expert), keep);
}

}  // namespace hymoe::ops::at_once
