#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "hymoe/growth/upcycle.h"

namespace hymoe {

/// Of which neurons of which dense FFN an expert is made.
struct ExpertCopy {
  int64_t source = 0;   // of the dense checkpoints
  Tensor neurons = {};  // [H] int64; undefined: all, in order
  Tensor fresh = {};    // [n] int64, which of the H are drawn anew; undefined: none
};

/// Throws ConfigError for a width or a number of experts that the method cannot make of `hidden` neurons.
void check_experts(const UpcycleConfig& config, int64_t hidden);

/// The experts of a branch, `hidden` being the dense FFN's width; `name` begins the branch's parameter names
/// and decides what is drawn.
std::vector<ExpertCopy> expert_copies(const UpcycleConfig& config, const BranchConfig& branch, int64_t hidden,
                                      const std::string& name);

/// An expert's matrix of the dense one: gate or up [F, D] -> [H, D], or with `down` [D, F] -> [D, H].
/// `factor` multiplies it, `name` decides what is drawn.
Tensor expert_matrix(const UpcycleConfig& config, const ExpertCopy& copy, const Tensor& dense, bool down,
                     double factor, const std::string& name);

/// What the weights of a row's experts lack to make its output the dense FFN's, for slices of a G-th of it
/// whose routers are undecided: G divided by the sum of these weights (NVIDIA, arXiv 2410.07524).
double lacking_factor(const UpcycleConfig& config, const BranchConfig& branch, int64_t hidden);

/// A router's first weights [E (+ 1), D] by router_init, `fresh` being those of its class. With method
/// granular, equal rows for the slices of one FFN: they are taken together.
Tensor router_weights(const UpcycleConfig& config, const BranchConfig& branch, int64_t hidden,
                      const Tensor& fresh, at::Generator generator);

}  // namespace hymoe
