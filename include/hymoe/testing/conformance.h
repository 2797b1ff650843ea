#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "hymoe/moe/experts.h"
#include "hymoe/moe/router.h"

namespace hymoe {

enum class Outcome { kPassed, kFailed, kDeclared };  // declared: a law that the class says it does not keep

struct Finding {
  std::string law;
  Outcome outcome = Outcome::kPassed;
  std::string detail = {};
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
/// form of the routing, causality, independence of other documents, padding, decoding, gradients of the
/// weights (that they reach x and every parameter, and are those of finite differences), determinism. State
/// of training is calibrated first: one forward pass in training mode, end_step. An exception out of the
/// router is a failed law.
Report check_router(const std::function<std::shared_ptr<Router>()>& make,
                    const RouterCheckOptions& options = {});

struct ExpertsCheckOptions {
  int64_t dim = 8;
  std::vector<int64_t> rows_per_expert = {3, 0, 4, 2};
  uint64_t seed = 1;
};

/// The same for experts: form of the result, independence of rows from one another and from their order,
/// gradients against finite differences, defined zero gradients of experts without rows, non-contiguous rows,
/// determinism.
Report check_experts(const std::function<std::shared_ptr<Experts>()>& make,
                     const ExpertsCheckOptions& options = {});

}  // namespace hymoe
