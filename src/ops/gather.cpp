#include "ops/gather.h"

#include <cstring>

#include <ATen/Dispatch.h>
#include <torch/types.h>

#include "kernels/permute.h"
#include "ops/cpu.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

template <class T, class To>
HYMOE_SIMD void convert_row(const T* __restrict from, To* __restrict to, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
}

}  // namespace

Tensor gather_rows(const Tensor& x, const Tensor& source_row, at::ScalarType type) {
  const int64_t dim = x.size(1);
  Tensor rows = cpu::empty({source_row.size(0), dim}, x.options().dtype(type));
  if (device::takes(x)) {
    kernels::gather_rows({.x = device::address(x),
                          .source_row = device::data<int64_t>(source_row),
                          .rows = device::address(rows),
                          .num_rows = rows.size(0),
                          .dim = dim,
                          .dtype = device::dtype(x),
                          .rows_dtype = device::dtype(rows)},
                         device::stream(x));
    return rows;
  }
  if (x.scalar_type() == type) {
    const size_t width = dim * x.element_size();
    gather_with([&](const char* from, char* to) { std::memcpy(to, from, width); }, x, source_row, rows);
    return rows;
  }
  const bool narrows = type == at::kBFloat16;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kHalf, narrows ? x.scalar_type() : type, "gather_rows", [&] {
    const auto convert = [&](auto from_type, auto to_type) {
      using From = decltype(from_type);
      using To = decltype(to_type);
      const auto copy = [&](const char* from, char* to) {
        convert_row(reinterpret_cast<const From*>(from), reinterpret_cast<To*>(to), dim);
      };
      gather_with(copy, x, source_row, rows);
    };
    if (narrows) {
      convert(scalar_t{}, at::BFloat16{});
    } else {
      convert(at::BFloat16{}, scalar_t{});
    }
  });
  return rows;
}

}  // namespace hymoe::ops
