#include "ops/swiglu.h"

#include <ATen/Dispatch.h>
#include <torch/types.h>

#include "kernels/swiglu.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

template <class T>
HYMOE_SIMD void forward_row(const T* __restrict gate, const T* __restrict up, T* __restrict h,
                            int64_t hidden) {
  using A = cpu::Accumulate<T>;
  for (int64_t i = 0; i < hidden; ++i) {
    const A g = gate[i];
    h[i] = static_cast<T>(g / (1 + cpu::exp(-g)) * static_cast<A>(up[i]));
  }
}

// s = sigmoid(g): dg = dh·u·s·(1 + g·(1 - s)), du = dh·g·s.
template <class T>
HYMOE_SIMD void backward_row(const T* __restrict gate, const T* __restrict up, T* __restrict dh,
                             T* __restrict d_gate, T* __restrict d_up, int64_t hidden) {
  using A = cpu::Accumulate<T>;
  for (int64_t i = 0; i < hidden; ++i) {
    const A g = gate[i], u = up[i], d = dh[i];
    const A s = 1 / (1 + cpu::exp(-g)), silu = g * s;
    d_gate[i] = static_cast<T>(d * u * s * (1 + g * (1 - s)));
    d_up[i] = static_cast<T>(d * silu);
    dh[i] = static_cast<T>(silu * u);
  }
}

Tensor block_of(const Tensor& x, int64_t start, int64_t n) { return x.defined() ? x.narrow(0, start, n) : x; }

// out = a·b, or out += a·b.
void product(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    out.addmm_(a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

}  // namespace

int64_t swiglu_block(const Tensor& rows) { return device::takes(rows) ? 8192 : 1024; }

void swiglu_forward(const Tensor& gate_up, Tensor& h) {
  const int64_t rows = h.size(0), hidden = h.size(1), in_step = gate_up.stride(0), out_step = h.stride(0);
  if (device::takes(h)) {
    return kernels::swiglu({.gate_up = device::view_address(gate_up),
                            .h = device::address(h),
                            .num_rows = rows,
                            .hidden = hidden,
                            .row_step = in_step,
                            .dtype = device::dtype(h)},
                           device::stream(h));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "swiglu", [&] {
    const scalar_t* in = gate_up.const_data_ptr<scalar_t>();
    scalar_t* out = h.mutable_data_ptr<scalar_t>();
    cpu::parallel_for(rows, cpu::row_grain(hidden), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        forward_row(in + r * in_step, in + r * in_step + hidden, out + r * out_step, hidden);
      }
    });
  });
}

void swiglu_backward(const Tensor& gate_up, Tensor& dh_to_h, Tensor& d_gate_up) {
  const int64_t rows = dh_to_h.size(0), hidden = dh_to_h.size(1), in_step = gate_up.stride(0);
  const int64_t h_step = dh_to_h.stride(0), out_step = d_gate_up.stride(0);
  if (device::takes(gate_up)) {
    return kernels::swiglu_backward({.gate_up = device::view_address(gate_up),
                                     .dh_to_h = device::address(dh_to_h),
                                     .d_gate_up = device::address(d_gate_up),
                                     .num_rows = rows,
                                     .hidden = hidden,
                                     .row_step = in_step,
                                     .dtype = device::dtype(gate_up)},
                                    device::stream(gate_up));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dh_to_h.scalar_type(), "swiglu", [&] {
    const scalar_t* in = gate_up.const_data_ptr<scalar_t>();
    scalar_t* h = dh_to_h.mutable_data_ptr<scalar_t>();
    scalar_t* out = d_gate_up.mutable_data_ptr<scalar_t>();
    cpu::parallel_for(rows, cpu::row_grain(hidden), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const scalar_t* gate = in + r * in_step;
        scalar_t* d_gate = out + r * out_step;
        backward_row(gate, gate + hidden, h + r * h_step, d_gate, d_gate + hidden, hidden);
      }
    });
  });
}

void swiglu_network_forward(const Tensor& rows, const SwigluNetwork& network, Tensor& gate_up, bool keep,
                            Tensor& h, Tensor& y) {
  for (int64_t start = 0; start < rows.size(0); start += swiglu_block(rows)) {
    const int64_t n = std::min(swiglu_block(rows), rows.size(0) - start);
    const Tensor x = rows.narrow(0, start, n);
    Tensor projected = gate_up.narrow(0, keep ? start : 0, n), hidden = h.narrow(0, 0, n),
           out = y.narrow(0, start, n);
    int64_t column = 0;
    for (const Tensor& matrix : network.in) {
      product(projected.narrow(1, column, matrix.size(0)), x, matrix.t(), false);
      column += matrix.size(0);
    }
    swiglu_forward(projected, hidden);
    at::mm_out(out, hidden, network.down.t());
  }
}

void swiglu_network_backward(const Tensor& rows, const Tensor& gate_up, const Tensor& dy,
                             const SwigluNetwork& network, SwigluNetwork& gradients, Tensor& dh,
                             Tensor& d_gate_up, Tensor& dx) {
  for (int64_t start = 0; start < rows.size(0); start += swiglu_block(rows)) {
    const int64_t n = std::min(swiglu_block(rows), rows.size(0) - start);
    const bool later = start > 0;
    const Tensor x = rows.narrow(0, start, n), d_out = dy.narrow(0, start, n);
    Tensor hidden = dh.narrow(0, 0, n), d_in = d_gate_up.narrow(0, 0, n);
    at::mm_out(hidden, d_out, network.down);
    swiglu_backward(gate_up.narrow(0, start, n), hidden, d_in);
    if (gradients.down.defined()) product(gradients.down, d_out.t(), hidden, later);
    int64_t column = 0;
    for (size_t i = 0; i < network.in.size(); ++i) {
      const Tensor part = d_in.narrow(1, column, network.in[i].size(0));
      if (gradients.in[i].defined()) product(gradients.in[i], part.t(), x, later);
      if (dx.defined()) product(block_of(dx, start, n), part, network.in[i], column > 0);
      column += network.in[i].size(0);
    }
  }
}

}  // namespace hymoe::ops
