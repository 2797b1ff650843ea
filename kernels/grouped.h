#pragma once

#include "kernels/types.h"

namespace hymoe::kernels {

/// matrices[e] = 0 where rows_per_expert[e] is 0. matrices [num_experts, bytes], bytes a multiple of 16.
struct ZeroWithoutRows {
  void* matrices;
  const int64_t* rows_per_expert;
  int64_t num_experts, bytes;
};
void zero_without_rows(const ZeroWithoutRows& args, Stream stream);

}  // namespace hymoe::kernels
