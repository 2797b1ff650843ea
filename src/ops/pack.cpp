#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include <ATen/Dispatch.h>
#include <c10/util/Float8_e4m3fn.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "kernels/pack.h"
#include "ops/cpu.h"
#include "ops/device.h"
#include "ops/gather.h"

namespace hymoe::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr float kLeastScale = 0x1p-126f;

// A block of up to kPackedBlock numbers -> its float8; returns their scale.
template <class T>
HYMOE_SIMD float pack_block(const T* __restrict x, uint8_t* __restrict codes, int64_t n) {
  float value[kernels::kPackedBlock];
  uint32_t largest = 0;  // of the bits, which put infinity and NaN above all numbers
  for (int64_t i = 0; i < n; ++i) {
    value[i] = static_cast<float>(x[i]);
    largest = std::max(largest, std::bit_cast<uint32_t>(value[i]) & 0x7fffffffu);
  }
  const float most = std::bit_cast<float>(largest);
  if (!(most <= std::numeric_limits<float>::max())) {
    std::memset(codes, 0x7f, n);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(most / 448.f, kLeastScale), inverse = 1 / scale;
  for (int64_t i = 0; i < n; ++i) codes[i] = c10::detail::fp8e4m3fn_from_fp32_value(value[i] * inverse);
  return scale;
}

template <class T>
HYMOE_SIMD void unpack_block(const uint8_t* __restrict codes, float scale, T* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t code = codes[i], bits = (code & 0x7f) << 20 | (code & 0x80) << 24;
    x[i] = static_cast<T>(std::bit_cast<float>(bits) * 0x1p120f * scale);  // NaN has a scale of NaN
  }
}

// f(block, first element, elements) for each block of a row.
template <class F>
void for_each_block(int64_t dim, const F& f) {
  for (int64_t b = 0; b < kernels::packed_blocks(dim); ++b) {
    const int64_t begin = b * kernels::kPackedBlock;
    f(b, begin, std::min(kernels::kPackedBlock, dim - begin));
  }
}

template <class T>
void pack_row(const T* x, uint8_t* packed, int64_t dim) {
  uint8_t* scales = packed + kernels::packed_scales(dim);
  std::fill(packed + dim, scales, uint8_t{0});
  for_each_block(dim, [&](int64_t block, int64_t begin, int64_t n) {
    const float scale = x == nullptr ? kLeastScale : pack_block(x + begin, packed + begin, n);
    if (x == nullptr) std::memset(packed + begin, 0, n);
    std::memcpy(scales + 4 * block, &scale, 4);
  });
}

template <class T>
void unpack_row(const uint8_t* packed, T* x, int64_t dim) {
  for_each_block(dim, [&](int64_t block, int64_t begin, int64_t n) {
    float scale;
    std::memcpy(&scale, packed + kernels::packed_scales(dim) + 4 * block, 4);
    unpack_block(packed + begin, scale, x + begin, n);
  });
}

Tensor pack_float8(const Tensor& x, const Tensor& source_row) {
  const int64_t dim = x.size(1), width = kernels::packed_width(dim);
  Tensor packed = cpu::empty({source_row.size(0), width}, x.options().dtype(at::kByte));
  if (device::takes(x)) {
    kernels::pack_rows({.x = device::address(x),
                        .source_row = device::data<int64_t>(source_row),
                        .packed = device::address(packed),
                        .num_rows = packed.size(0),
                        .dim = dim,
                        .dtype = device::dtype(x)},
                       device::stream(x));
    return packed;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "pack_rows", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    const int64_t* source = source_row.const_data_ptr<int64_t>();
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    cpu::parallel_for(packed.size(0), cpu::row_grain(4 * dim), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        pack_row(source[r] < 0 ? nullptr : from + source[r] * dim, to + r * width, dim);
    });
  });
  return packed;
}

Tensor unpack_float8(const Tensor& packed, const Tensor& source_row, int64_t dim, at::ScalarType type) {
  Tensor rows = cpu::empty({source_row.size(0), dim}, packed.options().dtype(type));
  if (device::takes(packed)) {
    kernels::unpack_rows({.packed = device::address(packed),
                          .source_row = device::data<int64_t>(source_row),
                          .rows = device::address(rows),
                          .num_rows = rows.size(0),
                          .dim = dim,
                          .dtype = device::dtype(rows)},
                         device::stream(packed));
    return rows;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "unpack_rows", [&] {
    const auto unpack = [&](const char* from, char* to) {
      unpack_row(reinterpret_cast<const uint8_t*>(from), reinterpret_cast<scalar_t*>(to), dim);
    };
    gather_with(unpack, packed, source_row, rows);
  });
  return rows;
}

// Both: gradients are those of permute.
variable_list permute_backward(AutogradContext* ctx, const Tensor& gradient, size_t inputs) {
  const auto saved = ctx->get_saved_variables();
  variable_list gradients(inputs);
  gradients[0] = unpermute(gradient, {}, {.source_row = saved[0], .slot_row = saved[1]});
  return gradients;
}

struct Pack : Function<Pack> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& source_row,
                               const Tensor& slot_row, at::ScalarType type) {
    ctx->save_for_backward({source_row, slot_row});
    Tensor packed;
    if (!device::fused(x)) {
      packed = plain::pack_rows(x, source_row, type);
    } else {
      packed = type == at::kBFloat16 ? gather_rows(x, source_row, type) : pack_float8(x, source_row);
    }
    ctx->mark_non_differentiable({packed});
    return {at::empty({1, 1}, x.options()).expand({source_row.size(0), x.size(1)}), packed};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    return permute_backward(ctx, gradients[0], 4);
  }
};

struct Unpack : Function<Unpack> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& packed,
                        const Tensor& source_row, const Tensor& slot_row) {
    ctx->save_for_backward({source_row, slot_row});
    const auto type = rows.scalar_type();
    if (!device::fused(packed)) return plain::unpack_rows(packed, source_row, rows.size(1), type);
    if (packed.scalar_type() == at::kBFloat16) return gather_rows(packed, source_row, type);
    return unpack_float8(packed, source_row, rows.size(1), type);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    return permute_backward(ctx, gradients[0], 4);
  }
};

void check_type(at::ScalarType type) {
  TORCH_CHECK(type == at::kBFloat16 || type == at::kFloat8_e4m3fn,
              "pack_rows: type must be BFloat16 or Float8_e4m3fn, got ", type);
}

}  // namespace

int64_t packed_row_bytes(int64_t dim, at::ScalarType type) {
  check_type(type);
  return type == at::kBFloat16 ? 2 * dim : kernels::packed_width(dim);
}

PackedRows pack_rows(const Tensor& x, const Permutation& permutation, at::ScalarType type) {
  check_type(type);
  TORCH_CHECK(x.dim() == 2 && x.size(0) == permutation.slot_row.size(0), "pack_rows: x must be [",
              permutation.slot_row.size(0), ", D], got ", x.sizes());
  const auto packed = Pack::apply(x.contiguous(), permutation.source_row, permutation.slot_row, type);
  return {.rows = packed[0], .packed = packed[1]};
}

Tensor unpack_rows(const PackedRows& rows, const Permutation& permutation) {
  const Tensor& packed = rows.packed;
  const int64_t bytes = packed.size(1) * static_cast<int64_t>(packed.element_size());
  const auto type = packed.scalar_type() == at::kByte ? at::kFloat8_e4m3fn : packed.scalar_type();
  TORCH_CHECK(rows.rows.dim() == 2 && rows.rows.size(0) == permutation.slot_row.size(0) &&
                  packed.size(0) == rows.rows.size(0) && bytes == packed_row_bytes(rows.rows.size(1), type),
              "unpack_rows: rows must be [", permutation.slot_row.size(0), ", D] and packed fit them, got ",
              rows.rows.sizes(), " and ", packed.toString(), " ", packed.sizes());
  return Unpack::apply(rows.rows, packed.contiguous(), permutation.source_row, permutation.slot_row);
}

}  // namespace hymoe::ops
