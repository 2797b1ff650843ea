#pragma once

#include <cstring>

#include <ATen/core/Tensor.h>

#include "ops/cpu.h"

namespace hymoe::ops {

using at::Tensor;

/// rows[r] = x[source_row[r]], zeros where source_row[r] is -1, in `type`: x's or, of the two, one of
/// bfloat16. x [T, D] contiguous, on a device with a fused path; autograd does not see it.
Tensor gather_rows(const Tensor& x, const Tensor& source_row, at::ScalarType type);

/// On the CPU, copy(from, to) with the bytes of x[source_row[r]] and of rows[r] for each row that has a
/// source, zeros for the others.
template <class F>
void gather_with(const F& copy, const Tensor& x, const Tensor& source_row, const Tensor& rows) {
  const int64_t from_width = x.size(1) * static_cast<int64_t>(x.element_size());
  const int64_t to_width = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t* source = source_row.const_data_ptr<int64_t>();
  cpu::parallel_for(rows.size(0), cpu::row_grain(x.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (source[r] >= 0) {
        copy(from + source[r] * from_width, to + r * to_width);
      } else {
        std::memset(to + r * to_width, 0, to_width);
      }
    }
  });
}

}  // namespace hymoe::ops
