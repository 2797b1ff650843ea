#include "hymoe/ops/grouped.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/plain.h"
#include "ops/cpu.h"
#include "ops/device.h"
#include "ops/grouped_at_once.h"
#include "ops/swiglu.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

void check_groups(const char* op, const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert) {
  TORCH_CHECK(rows.dim() == 2, op, ": rows must be [R, D], got ", rows.sizes());
  TORCH_CHECK(rows_per_expert.dim() == 1 && rows_per_expert.scalar_type() == at::kLong, op,
              ": rows_per_expert must be [E] int64, got ", rows_per_expert.toString(), " ",
              rows_per_expert.sizes());
  TORCH_CHECK(
      weight.dim() == 3 && weight.size(0) == rows_per_expert.size(0) && weight.size(2) == rows.size(1), op,
      ": weight must be [", rows_per_expert.size(0), ", N, ", rows.size(1), "] for rows ", rows.sizes(),
      ", got ", weight.sizes());
  TORCH_CHECK(weight.scalar_type() == rows.scalar_type(), op, ": rows are ", rows.scalar_type(), ", weights ",
              weight.scalar_type());
}

void check_counts(const char* op, const Tensor& rows, const std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (const int64_t n : counts) {
    TORCH_CHECK(n >= 0, op, ": rows_per_expert must not be negative, got ", n);
    total += n;
  }
  TORCH_CHECK(total == rows.size(0), op, ": rows_per_expert adds up to ", total, ", but there are ",
              rows.size(0), " rows");
}

Tensor scratch(const std::vector<int64_t>& counts, int64_t width, const Tensor& like) {
  const int64_t most = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  return cpu::empty({std::min(most, swiglu_block(like)), width}, like.options());
}

void zero(std::initializer_list<Tensor> gradients) {
  for (const Tensor& gradient : gradients) {
    if (gradient.defined()) gradient.zero_();
  }
}

// Runs the experts f(e, first row, rows), each worker with its own f = make(). Experts of like size go to the
// threads whole, the largest first: a product on one thread neither waits for others nor shares its work.
// Where one expert has too many of the rows for that, experts go one by one and the products use the threads.
// So they do on a GPU, where they wait for nobody.
template <class Make>
void for_experts(const std::vector<int64_t>& counts, bool on_device, const Make& make) {
  std::vector<int64_t> starts(counts.size()), order(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), starts.begin(), int64_t{0});
  std::iota(order.begin(), order.end(), 0);
  const int64_t threads = at::get_num_threads();
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t largest = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  if (on_device || threads == 1 || total == 0 || 2 * threads * largest > total) {
    auto run = make();
    for (const int64_t e : order) run(e, starts[e], counts[e]);
    return;
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
  std::atomic<size_t> next{0};
  cpu::parallel_for(threads, 1, [&](int64_t, int64_t) {
    // Threads of the pool do not know that the caller records no graph here.
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto run = make();
    for (size_t i = next++; i < order.size(); i = next++) run(order[i], starts[order[i]], counts[order[i]]);
  });
}

bool wants_gradient(std::initializer_list<Tensor> inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& x) { return x.requires_grad(); });
}

// y_e = x_e W_eᵀ: dx_e = dy_e W_e, dW_e = dy_eᵀ x_e.
struct GroupedProduct : Function<GroupedProduct> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weight,
                        const std::vector<int64_t>& counts) {
    ctx->save_for_backward({rows, weight});
    ctx->saved_data["counts"] = counts;
    Tensor y = cpu::empty({rows.size(0), weight.size(1)}, rows.options());
    for_experts(counts, device::takes(rows), [&] {
      return [&](int64_t e, int64_t start, int64_t n) {
        Tensor out = y.narrow(0, start, n);
        if (n > 0) at::mm_out(out, rows.narrow(0, start, n), weight[e].t());
      };
    });
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &weight = saved[1], dy = gradients[0].contiguous();
    const auto counts = ctx->saved_data["counts"].toIntVector();
    Tensor d_rows, d_weight;
    if (ctx->needs_input_grad(0)) d_rows = cpu::empty(rows.sizes(), rows.options());
    if (ctx->needs_input_grad(1)) d_weight = cpu::empty(weight.sizes(), weight.options());
    for_experts(counts, device::takes(rows), [&] {
      return [&](int64_t e, int64_t start, int64_t n) {
        if (n == 0) return zero({d_weight.defined() ? d_weight[e] : Tensor()});
        const Tensor part = dy.narrow(0, start, n);
        if (d_rows.defined()) {
          Tensor out = d_rows.narrow(0, start, n);
          at::mm_out(out, part, weight[e]);
        }
        if (d_weight.defined()) {
          Tensor out = d_weight[e];
          at::mm_out(out, part.t(), rows.narrow(0, start, n));
        }
      };
    });
    return {d_rows, d_weight, {}};
  }
};

struct SwigluActivation : Function<SwigluActivation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up) {
    ctx->save_for_backward({gate_up});
    Tensor h = cpu::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
    swiglu_forward(gate_up, h);
    return h;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor gate_up = ctx->get_saved_variables()[0];
    Tensor dh = gradients[0].clone(at::MemoryFormat::Contiguous);
    Tensor d_gate_up = cpu::empty(gate_up.sizes(), gate_up.options());
    swiglu_backward(gate_up, dh, d_gate_up);
    return {d_gate_up};
  }
};

struct SwigluExperts : Function<SwigluExperts> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& gate_up_proj,
                        const Tensor& down_proj, const std::vector<int64_t>& counts, bool keep) {
    const int64_t hidden = down_proj.size(2);
    Tensor gate_up, y = cpu::empty(rows.sizes(), rows.options());
    if (keep) gate_up = cpu::empty({rows.size(0), 2 * hidden}, rows.options());
    for_experts(counts, device::takes(rows), [&] {
      return [&, h = scratch(counts, hidden, rows),
              passing = keep ? Tensor() : scratch(counts, 2 * hidden, rows)](int64_t e, int64_t start,
                                                                             int64_t n) mutable {
        Tensor kept = keep ? gate_up.narrow(0, start, n) : passing, out = y.narrow(0, start, n);
        swiglu_network_forward(rows.narrow(0, start, n), {{gate_up_proj[e]}, down_proj[e]}, kept, keep, h,
                               out);
      };
    });
    if (keep) {
      ctx->save_for_backward({rows, gate_up_proj, down_proj, gate_up});
      ctx->saved_data["counts"] = counts;
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &gate_up_proj = saved[1], &down_proj = saved[2], &gate_up = saved[3];
    const Tensor dy = gradients[0].contiguous();
    const auto counts = ctx->saved_data["counts"].toIntVector();
    const int64_t hidden = down_proj.size(2);
    Tensor d_rows, d_gate_up_proj, d_down_proj;
    if (ctx->needs_input_grad(0)) d_rows = cpu::empty(rows.sizes(), rows.options());
    if (ctx->needs_input_grad(1)) d_gate_up_proj = cpu::empty(gate_up_proj.sizes(), rows.options());
    if (ctx->needs_input_grad(2)) d_down_proj = cpu::empty(down_proj.sizes(), rows.options());
    for_experts(counts, device::takes(rows), [&] {
      return [&, dh = scratch(counts, hidden, rows), d_gate_up = scratch(counts, 2 * hidden, rows)](
                 int64_t e, int64_t start, int64_t n) mutable {
        SwigluNetwork gradient{{d_gate_up_proj.defined() ? d_gate_up_proj[e] : Tensor()},
                               d_down_proj.defined() ? d_down_proj[e] : Tensor()};
        if (n == 0) return zero({gradient.in[0], gradient.down});
        Tensor dx = d_rows.defined() ? d_rows.narrow(0, start, n) : Tensor();
        swiglu_network_backward(rows.narrow(0, start, n), gate_up.narrow(0, start, n), dy.narrow(0, start, n),
                                {{gate_up_proj[e]}, down_proj[e]}, gradient, dh, d_gate_up, dx);
      };
    });
    return {d_rows, d_gate_up_proj, d_down_proj, {}, {}};
  }
};

struct SwigluMlp : Function<SwigluMlp> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gate, const Tensor& up,
                        const Tensor& down, bool keep) {
    const int64_t hidden = gate.size(0);
    const std::vector<int64_t> counts{x.size(0)};
    Tensor gate_up = keep ? cpu::empty({x.size(0), 2 * hidden}, x.options()) : scratch(counts, 2 * hidden, x);
    Tensor h = scratch(counts, hidden, x), y = cpu::empty(x.sizes(), x.options());
    swiglu_network_forward(x, {{gate, up}, down}, gate_up, keep, h, y);
    if (keep) ctx->save_for_backward({x, gate, up, down, gate_up});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &gate_up = saved[4], dy = gradients[0].contiguous();
    const SwigluNetwork network{{saved[1], saved[2]}, saved[3]};
    Tensor wanted[4];
    for (int i = 0; i < 4; ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      wanted[i] = x.size(0) > 0 ? cpu::empty(saved[i].sizes(), x.options()) : at::zeros_like(saved[i]);
    }
    SwigluNetwork gradient{{wanted[1], wanted[2]}, wanted[3]};
    const std::vector<int64_t> counts{x.size(0)};
    Tensor dh = scratch(counts, gate_up.size(1) / 2, x), d_gate_up = scratch(counts, gate_up.size(1), x);
    swiglu_network_backward(x, gate_up, dy, network, gradient, dh, d_gate_up, wanted[0]);
    return {wanted[0], wanted[1], wanted[2], wanted[3], {}};
  }
};

}  // namespace

bool counts_on_device(const Tensor& rows, const Tensor& weight) {
  if (!device::takes(rows) || rows.scalar_type() != at::kBFloat16) return false;
  // Elsewhere LibTorch has at::_grouped_mm read its offsets on the host, in each product.
  const int generation = device::generation(rows);
  return (generation == 9 || generation == 10) && weight.size(1) % 8 == 0 && weight.size(2) % 8 == 0;
}

Tensor grouped_mm(const Tensor& rows, const Tensor& weight, const Tensor& rows_per_expert) {
  check_groups("grouped_mm", rows, weight, rows_per_expert);
  if (counts_on_device(rows, weight)) return at_once::grouped_mm(rows, weight, rows_per_expert);
  const auto counts = cpu::to_vector(rows_per_expert);
  check_counts("grouped_mm", rows, counts);
  if (!device::fused(rows)) return plain::grouped_mm(rows, weight, rows_per_expert);
  return GroupedProduct::apply(rows, weight, counts);
}

Tensor swiglu(const Tensor& gate_up) {
  TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "swiglu: gate_up must be [R, 2·H], got ",
              gate_up.sizes());
  if (!device::fused(gate_up)) return plain::swiglu(gate_up);
  return SwigluActivation::apply(gate_up.stride(1) == 1 ? gate_up : gate_up.contiguous());
}

Tensor swiglu_experts(const Tensor& rows, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& rows_per_expert) {
  check_groups("swiglu_experts", rows, gate_up_proj, rows_per_expert);
  TORCH_CHECK(down_proj.dim() == 3 && down_proj.size(0) == gate_up_proj.size(0) &&
                  down_proj.size(1) == rows.size(1) && 2 * down_proj.size(2) == gate_up_proj.size(1),
              "swiglu_experts: down_proj must be [E, D, H] for gate_up_proj [E, 2·H, D] ",
              gate_up_proj.sizes(), ", got ", down_proj.sizes());
  TORCH_CHECK(down_proj.scalar_type() == rows.scalar_type(), "swiglu_experts: rows are ", rows.scalar_type(),
              ", down_proj ", down_proj.scalar_type());
  const bool keep = wants_gradient({rows, gate_up_proj, down_proj});
  if (counts_on_device(rows, gate_up_proj) && counts_on_device(rows, down_proj))
    return at_once::swiglu_experts(rows, gate_up_proj, down_proj, rows_per_expert, keep);
  const auto counts = cpu::to_vector(rows_per_expert);
  check_counts("swiglu_experts", rows, counts);
  if (!device::fused(rows)) return plain::swiglu_experts(rows, gate_up_proj, down_proj, rows_per_expert);
  return SwigluExperts::apply(rows, gate_up_proj, down_proj, counts, keep);
}

Tensor swiglu_mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  TORCH_CHECK(x.dim() == 2, "swiglu_mlp: x must be [T, D], got ", x.sizes());
  TORCH_CHECK(gate.dim() == 2 && gate.size(1) == x.size(1), "swiglu_mlp: gate must be [H, ", x.size(1),
              "], got ", gate.sizes());
  TORCH_CHECK(up.sizes() == gate.sizes(), "swiglu_mlp: up must be ", gate.sizes(), " like gate, got ",
              up.sizes());
  TORCH_CHECK(down.dim() == 2 && down.size(0) == x.size(1) && down.size(1) == gate.size(0),
              "swiglu_mlp: down must be [", x.size(1), ", ", gate.size(0), "], got ", down.sizes());
  if (!device::fused(x)) return plain::swiglu_mlp(x, gate, up, down);
  return SwigluMlp::apply(x, gate, up, down, wants_gradient({x, gate, up, down}));
}

}  // namespace hymoe::ops
