#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "hymoe/model/transformer.h"
#include "hymoe/moe/experts.h"
#include "hymoe/moe/router.h"

namespace hymoe {

/// declared: a law that the class says it does not keep, or whose lack the state of a model explains.
enum class Outcome { kPassed, kFailed, kDeclared };

/// "passed", "FAILED" or "declared".
const char* to_text(Outcome outcome);

struct Finding {
  std::string law;
  Outcome outcome = Outcome::kPassed;
  std::string detail = {};  // what was seen, where the outcome is not kPassed
};

struct Report {
  std::vector<Finding> findings = {};
  /// Whether no law failed.
  bool ok() const;
  /// A line a law.
  std::string text() const;
};

struct RouterCheckOptions {
  int64_t dim = 8;
  int64_t num_experts = 4;
  std::vector<int64_t> documents = {9, 1, 0, 14};  // rows of each
  std::vector<std::string> without_gradient = {};  // parameters that the language-model loss shall not reach
  uint64_t seed = 1;
};

/// Runs the laws of docs/architecture.md that a router can break, in double on the CPU, on what `make` gives:
/// form of the routing, causality, independence of other documents and of their order, padding, decoding,
/// gradients of the weights (that they reach x and every parameter, and are those of finite differences),
/// determinism (with another number of threads too), calls without rows. State of training is calibrated
/// first: one forward pass in training mode, end_step. An exception out of the router is a failed law. A law
/// that the router declares not to keep is tried all the same, and the report says what was seen.
Report check_router(const std::function<std::shared_ptr<Router>()>& make,
                    const RouterCheckOptions& options = {});

struct ExpertsCheckOptions {
  int64_t dim = 8;
  std::vector<int64_t> rows_per_expert = {3, 0, 4, 2};
  /// A pool of its own of the experts begin..end of `whole`, as a rank of expert parallelism holds it. If
  /// given, the pools of two halves must give the results and the gradients of the whole.
  std::function<std::shared_ptr<Experts>(Experts& whole, int64_t begin, int64_t end)> make_part = {};
  uint64_t seed = 1;
};

/// The same for experts: form of the result, independence of rows from one another and from their order,
/// gradients against finite differences, defined zero gradients of experts without rows, non-contiguous rows,
/// expert parallelism, determinism.
Report check_experts(const std::function<std::shared_ptr<Experts>()>& make,
                     const ExpertsCheckOptions& options = {});

struct ModelCheckOptions {
  int64_t rows = 0;         // of the longest document; 0: two windows of its longest segments and a few more
  double tolerance = 1e-4;  // of the largest logit
  uint64_t seed = 1;
};

/// The laws of a whole model as it is, in evaluation mode, on some short documents of random tokens:
/// parameters are finite; changing a token, at the borders of windows above all, changes no logits before it;
/// packing, the order of documents, batch size and padding change no document's logits; decoding in pieces
/// (single tokens at the borders of windows) gives those of one pass; the same call gives the same twice, bit
/// for bit, and with another number of threads; a batch without rows has no logits; every expert and router
/// that trains gets a finite gradient of the language-model loss. A router that gets none because of how the
/// model stands (equal experts, no rows) is reported as declared. It costs some twenty forward passes.
/// Weights, state, gradients, mode and type are as before in the end.
///
/// Logits of two calls may differ by `tolerance` times the largest of all: products of other shapes sum in
/// another order, which in fp32 stays far below that, while a row that goes to another expert stays far
/// above. bf16 models are compared in fp32, into which they are converted for the time: their rounding alone
/// sends rows to other experts, which no tolerance tells from a law that is broken. Gradients and repeated
/// calls are in the model's own type.
Report check_model(Transformer& model, const ModelCheckOptions& options = {});

}  // namespace hymoe
