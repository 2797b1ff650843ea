#include "hymoe/moe/routing.h"

#include <algorithm>

#include <torch/types.h>

namespace hymoe {

void DecodeState::advance(const Tensor& offsets) {
  std::vector<int64_t> rows;
  const auto at = offsets.accessor<int64_t, 1>();
  for (int64_t i = 0; i + 1 < offsets.numel(); ++i) rows.push_back(at[i + 1] - at[i]);
  advance(rows);
}

void DecodeState::advance(const std::vector<int64_t>& rows_per_document) {
  TORCH_CHECK(rows_per_document.size() == past_.size(), "DecodeState::advance: wanted ", past_.size(),
              " documents, got ", rows_per_document.size());
  for (size_t i = 0; i < past_.size(); ++i) past_[i] += rows_per_document[i];
}

Packing Packing::of(int64_t batch, int64_t seq_len) {
  Packing packing;
  packing.offsets = at::arange(batch + 1, at::kLong).mul_(seq_len);
  return packing;
}

int64_t Packing::rows() const { return offsets.const_data_ptr<int64_t>()[offsets.numel() - 1]; }

void Packing::check(const Tensor& x) const {
  TORCH_CHECK(x.dim() == 2, "Packing: x must be [T, D], got ", x.sizes());
  TORCH_CHECK(offsets.defined() && offsets.dim() == 1 && offsets.numel() >= 1 && offsets.is_cpu() &&
                  offsets.is_contiguous() && offsets.scalar_type() == at::kLong,
              "Packing: offsets must be [N + 1] int64 on the CPU");
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK(at[0] == 0 && std::is_sorted(at, at + offsets.numel()) && rows() == x.size(0),
              "Packing: offsets must rise from 0 to ", x.size(0), ", the rows of x, got ", at[0], " to ",
              rows(), std::is_sorted(at, at + offsets.numel()) ? "" : ", falling in between");
  for (const auto& [name, mask] : {std::pair("padding", padding), {"prior", prior}}) {
    TORCH_CHECK(!mask.defined() || (mask.dim() == 1 && mask.size(0) == x.size(0) &&
                                    mask.scalar_type() == at::kBool && mask.device() == x.device()),
                "Packing: ", name, " must be [", x.size(0), "] bool on ", x.device(), ", got ",
                mask.toString(), " ", mask.sizes());
  }
  if (padding.defined()) {
    TORCH_CHECK(!state,
                "Packing: with a decoding state no row is padding; give each document its own length");
    if (padding.is_cpu()) {  // elsewhere the look would wait for the device
      const auto pad = padding.accessor<bool, 1>();
      for (int64_t i = 0; i < documents(); ++i) {
        for (int64_t t = at[i] + 1; t < at[i + 1]; ++t) {
          TORCH_CHECK(pad[t] || !pad[t - 1],
                      "Packing: padding must stand at the end of a document, got it before row ", t - at[i],
                      " of document ", i);
        }
      }
    }
  }
  TORCH_CHECK(!state || state->documents() == documents(), "Packing: the decoding state is of ",
              state ? state->documents() : 0, " documents, got ", documents());
}

}  // namespace hymoe
