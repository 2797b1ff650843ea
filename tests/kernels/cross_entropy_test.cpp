#include "hymoe/ops/cross_entropy.h"

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "kernels/cross_entropy.h"
#include "kernels/rounding.h"
#include "ops/device.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

struct Loss {
  Tensor nll, gradient;
};

// By the kernel; the gradient is of Σ weights·nll.
Loss loss_rows(const Tensor& logits, const Tensor& targets, const Tensor& weights) {
  Loss out{at::empty({logits.size(0)}), logits.clone()};
  kernels::loss_rows({.logits = device::address(out.gradient),
                      .targets = device::data<int64_t>(targets),
                      .token_weights = device::address(weights),
                      .nll = device::address(out.nll),
                      .num_rows = logits.size(0),
                      .vocab = logits.size(1),
                      .dtype = device::dtype(logits)},
                     device::stream(logits));
  return out;
}

// By two parts of the vocabulary.
Loss loss_of_parts(const Tensor& logits, const Tensor& targets, const Tensor& weights, int64_t cut) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Tensor parts[] = {logits.narrow(1, 0, cut).clone(), logits.narrow(1, cut, vocab - cut).clone()};
  const Tensor pieces = at::empty({2, 3, rows});
  for (int64_t i = 0; i < 2; ++i) {
    kernels::loss_pieces({.logits = device::address(parts[i]),
                          .targets = device::data<int64_t>(targets),
                          .top = device::address(pieces[i][0]),
                          .sum = device::address(pieces[i][1]),
                          .own = device::address(pieces[i][2]),
                          .num_rows = rows,
                          .vocab = parts[i].size(1),
                          .first = i * cut,
                          .dtype = device::dtype(logits)},
                         device::stream(logits));
  }
  const Tensor top = pieces.select(1, 0).amax(0);
  const Tensor sum = (pieces.select(1, 1) * (pieces.select(1, 0) - top).exp()).sum(0);
  for (int64_t i = 0; i < 2; ++i) {
    kernels::loss_gradient({.logits = device::address(parts[i]),
                            .targets = device::data<int64_t>(targets),
                            .token_weights = device::address(weights),
                            .top = device::address(top),
                            .sum = device::address(sum),
                            .num_rows = rows,
                            .vocab = parts[i].size(1),
                            .first = i * cut,
                            .dtype = device::dtype(logits)},
                           device::stream(logits));
  }
  const Tensor nll = (sum.log() + top - pieces.select(1, 2).sum(0)).masked_fill(targets == -100, 0);
  return {nll, at::cat({parts[0], parts[1]}, 1)};
}

Loss by_definition(const Tensor& logits, const Tensor& targets, const Tensor& weights) {
  const Tensor z = logits.detach().to(at::kDouble).set_requires_grad(true), ignored = targets == -100;
  const Tensor nll = -at::log_softmax(z, 1).gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1);
  const Tensor kept = nll.masked_fill(ignored, 0);
  return {kept.detach(), torch::autograd::grad({(kept * weights.to(at::kDouble)).sum()}, {z})[0]};
}

TEST(LossKernels, EqualTheDefinitionForAllWidths) {
  for (const int64_t vocab : {2, 5, 8, 1000, 4096, 9001, 17000}) {
    Tensor targets = at::randint(0, vocab, {4}, at::TensorOptions(at::kLong));
    const Tensor weights = at::tensor({1.f, 0.3f, -2.f, 1.f});
    targets[3] = -100;
    for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const Tensor logits = (at::randn({4, vocab}) * 5).to(type);
      const Loss exact = by_definition(logits, targets, weights), found = loss_rows(logits, targets, weights);
      expect_close(found.nll, exact.nll, 1e-6);
      expect_rounded(found.gradient, exact.gradient, 1e-5);
      const Loss apart = loss_of_parts(logits, targets, weights, (vocab + 1) / 2);
      expect_close(apart.nll, exact.nll, 1e-6);
      expect_rounded(apart.gradient, exact.gradient, 1e-5);
      const Loss alone = loss_rows(logits, targets, {});
      EXPECT_TRUE(alone.nll.equal(found.nll));
      EXPECT_TRUE(alone.gradient.equal(logits));
    }
  }
}

TEST(LossKernels, TakeTheLargestVocabularies) {
  const int64_t vocab = 1 << 18;
  const Tensor logits = at::randn({1, vocab}), weights = at::ones({1});
  for (const int64_t target : {int64_t{0}, vocab - 1}) {
    const Loss exact = by_definition(logits, ints({target}), weights),
               found = loss_rows(logits, ints({target}), weights);
    expect_close(found.nll, exact.nll, 1e-6);
    expect_close(found.gradient, exact.gradient, 1e-6);
  }
}

TEST(LossKernels, StayFiniteWhereTheLossIs) {
  const float inf = INFINITY;
  const Tensor weights = at::ones({6});
  Tensor logits = at::full({6, 3000}, -inf);
  logits[0].fill_(1e30);
  logits[1].fill_(-1e30);
  logits[2][2999] = 1;                 // all but the target are impossible
  logits[3].narrow(0, 0, 2).fill_(1);  // the target is impossible
  logits[4].narrow(0, 0, 2).fill_(1);
  const Tensor targets = ints({7, 7, 2999, 5, 1, 0});
  const Loss found = loss_rows(logits, targets, weights);
  expect_close(found.nll.narrow(0, 0, 3), at::tensor({std::log(3000.f), std::log(3000.f), 0.f}), 1e-6);
  EXPECT_EQ(found.nll[3].item<float>(), inf);
  EXPECT_NEAR(found.nll[4].item<float>(), std::log(2), 1e-6);
  EXPECT_TRUE(found.nll[5].isnan().item<bool>());  // nothing is possible
  EXPECT_TRUE(found.gradient.narrow(0, 0, 5).isfinite().all().item<bool>());
  const Tensor wrong = ints({3000, -1, -101, 0, 0, 0});
  EXPECT_TRUE(loss_rows(at::zeros({6, 3000}), wrong, weights).nll.narrow(0, 0, 3).isnan().all().item<bool>());
}

TEST(LossKernels, RunInTheOperation) {
  const emulation::Emulate emulate;
  const int64_t before = emulation::launches();
  linear_cross_entropy(leaf({7, 4}, at::kBFloat16), leaf({9, 4}, at::kBFloat16),
                       ints({0, 1, 2, 3, 4, -100, 8}), {}, 3);
  EXPECT_EQ(emulation::launches() - before, 3);
}

}  // namespace
}  // namespace hymoe::ops
