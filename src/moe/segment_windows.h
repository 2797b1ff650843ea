#pragma once

#include <cstdint>
#include <vector>

#include "hymoe/moe/routing.h"

namespace hymoe {

/// The windows of one call, document after document.
struct Windows {
  Tensor offsets;       // [U + 1]
  Tensor rows;          // [U] rows that are not padding
  Tensor document;      // [U], rising
  Tensor begin;         // [N + 1] first window of each document
  Tensor position;      // [U] place among its document's windows of this call
  Tensor ordinal;       // [U] place among all windows of its document
  int64_t longest = 0;  // most windows that a document has in this call
  // Documents with rows in this call, their last windows, and 1 where those are full, else 0.
  std::vector<int64_t> documents, last, last_is_full;
  // Windows begun in calls before, their documents, and the rows they held then.
  std::vector<int64_t> continued, of_document, held;
};

/// Cuts documents into windows of `length` rows, the last of a document as long as there are rows; with
/// packing.state, where the calls before left off.
Windows cut_windows(const Tensor& x, const Packing& packing, int64_t length);

/// An index for rows on the device of `like`.
Tensor to_device(const std::vector<int64_t>& values, const Tensor& like);

/// y[u] = x[u - steps] where the document has that many rows before u (position [U]), else `none`.
Tensor shifted(const Tensor& x, const Tensor& position, int64_t steps, double none);

/// y[u] = Σ_{j <= u, same document} decay^(u - j)·x[j], in log(longest) steps; no row of another document
/// enters a sum, so that a document's numbers do not depend on its company.
Tensor document_scan(const Tensor& x, const Tensor& position, int64_t longest, double decay);

/// y[t] = maximum or mean of the last `length` rows of the document up to t, in log(length) steps.
Tensor sliding_pool(const Tensor& x, const Tensor& position, int64_t length, bool max);

/// [U, E] bool: experts in order each take windows of highest score among those that fewer than `bucket`
/// experts have, while the sizes taken stay within sum of sizes·capacity / E, rounded down. size [U], 0 for
/// padding. All windows are one pool, or, with `by_document`, those of each document. The host never
/// waits for a decision.
Tensor expert_choice(const Tensor& scores, const Tensor& size, double capacity, int64_t bucket,
                     const Windows* by_document);

/// [E] the logit down to which expert choice without bucket would take windows, were they divisible: the
/// windows' sizes stand end to end, best first, each with its logit at its middle, and the cut-off is the
/// line between these at sum of sizes·capacity / E. Before the first middle it goes on as the tail of an
/// exponential distribution would: with m its distance and s the share, a ln(m / s)-fold of the first two
/// logits' difference higher; a lone window's logit stays.
Tensor choice_cutoff(const Tensor& logits, const Tensor& size, double capacity);

}  // namespace hymoe
