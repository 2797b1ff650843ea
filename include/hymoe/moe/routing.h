#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hymoe {

using at::Tensor;

/// What routers remember of N documents while these are decoded piece by piece: document i of a call
/// continues document i of the calls before. One state serves all layers of a model; make it under the
/// model's first call, hand it in with every Packing, and call advance() once after each call of the whole
/// model.
class DecodeState {
 public:
  /// For `documents` documents, none of which has begun.
  explicit DecodeState(int64_t documents = 0) : past_(static_cast<size_t>(documents), 0) {}

  int64_t documents() const { return static_cast<int64_t>(past_.size()); }
  /// Rows of each document that earlier calls have seen.
  const std::vector<int64_t>& past() const { return past_; }
  /// Ends a call: document i has grown by the rows that offsets [N + 1] gives it.
  void advance(const Tensor& offsets);
  void advance(const std::vector<int64_t>& rows_per_document);
  /// The named tensors of one router, empty at first; `router` is its address.
  std::map<std::string, Tensor>& slot(const void* router) { return slots_[router]; }

 private:
  std::vector<int64_t> past_;
  std::map<const void*, std::map<std::string, Tensor>> slots_;
};

/// Which of T rows form which document: document i is rows offsets[i]..offsets[i + 1].
struct Packing {
  Tensor offsets = {};  // [N + 1] int64 on the CPU, from 0 to T; a document may be empty
  Tensor padding = {};  // [T] bool on x's device, true where a row means nothing; undefined: nowhere.
                        // Padding stands at the end of a document.
  Tensor prior = {};    // [T] bool on x's device, true where prior_loss applies; undefined: nowhere
  DecodeState* state = nullptr;  // set while decoding; then there is no padding

  /// `batch` documents of seq_len rows each.
  static Packing of(int64_t batch, int64_t seq_len);
  int64_t rows() const;
  int64_t documents() const { return offsets.numel() - 1; }
  /// Throws c10::Error when the fields do not fit together or do not hold x [T, D].
  void check(const Tensor& x) const;
};

/// What a router hands over. A unit is a run of consecutive rows of one document that go the same way.
struct Routing {
  Tensor expert_ids = {};     // [U, K] int64, -1 = no expert
  Tensor weights = {};        // [U, K] fp32, differentiable, 0 where the id is -1
  Tensor offsets = {};        // [U + 1] int64 on x's device, unit u is rows offsets[u]..offsets[u + 1];
                              // undefined: every row is a unit
  Tensor shared_weight = {};  // [U] fp32; undefined (= 1) unless the shared expert is in the normalisation
  Tensor aux_loss = {};       // scalar fp32, coefficients applied; or undefined
  std::optional<int64_t> max_rows =
      {};  // most rows that go to experts, a row twice where it goes to two; set
           // by routers that know without looking, so that a GPU is not waited for
  std::map<std::string, Tensor> metrics = {};  // for the log: fp32 scalars without gradient; logged are
                                               // means over the calls that set them
};

}  // namespace hymoe
