#include "hymoe/ops/recompute.h"

#include "hymoe/ops/grouped.h"
#include "hymoe/ops/norm.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

// A network with weights of its own: x [T, D] and m [T, D] -> its result and m·x, with something undefined
// between.
struct Network {
  Tensor norm = leaf({4}), gate = leaf({6, 4}), up = leaf({6, 4}), down = leaf({4, 6});
  std::shared_ptr<int> runs = std::make_shared<int>(0);

  Body body() const {
    return [*this](const Tensors& in) -> Tensors {
      ++*runs;
      const Tensor y = swiglu_mlp(rms_norm(in[0], norm, 1e-6), gate, up, down);
      return {in[0] + y, {}, in[2].defined() ? in[0] * in[2] : Tensor()};
    };
  }
  Tensors parameters() const { return {norm, gate, up, down}; }
  Tensors run(const Tensor& x, const Tensor& m, bool again = true) const {
    return again ? recompute(body(), {x, {}, m}, parameters()) : body()({x, {}, m});
  }
};

TEST(Recompute, GradientsAgreeWithDifferences) {
  const Op op = [](const Tensors& in) {
    const Body f = [=](const Tensors& x) -> Tensors {
      return {swiglu_mlp(x[0], in[2], in[3], in[4]) * x[1], x[0] + x[1]};
    };
    const Tensors y = recompute(f, {in[0], in[1]}, {in[2], in[3], in[4]});
    return y[0] * y[1];
  };
  expect_gradients(op, {leaf({3, 4}), leaf({3, 4}), leaf({6, 4}), leaf({6, 4}), leaf({4, 6})}, 1e-6);
}

TEST(Recompute, EqualsTheFunctionBitForBitThoughItsResultIsUsedTwice) {
  const Network network;
  const Tensor x = leaf({5, 4}), m = leaf({5, 4});
  const auto gradients_with = [&](bool again) {
    Tensors h = network.run(x, m, again);
    EXPECT_FALSE(h[1].defined());
    h = network.run(h[0], h[2], again);
    Tensors wanted = network.parameters();
    wanted.insert(wanted.end(), {x, m});
    const Tensor loss = (h[0] * h[2]).sum() + h[0].sum();
    Tensors found = torch::autograd::grad({loss}, wanted, {}, /*retain_graph=*/true);
    const Tensors second = torch::autograd::grad({loss}, wanted);
    for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(found[i].equal(second[i]));
    found.push_back(loss);
    return found;
  };
  const Tensors a = gradients_with(false), b = gradients_with(true);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(a[i].equal(b[i])) << i;
}

struct CountCalls : torch::autograd::PostAccumulateGradHook {
  explicit CountCalls(int& calls) : calls(calls) {}
  void operator()(const Tensor&) override { ++calls; }
  int& calls;
};

TEST(Recompute, AccumulatesOnceAndOnlyWhereItIsAsked) {
  const Network network;
  const Tensor x = leaf({5, 4}), m = at::randn({5, 4}, at::kDouble);
  int calls = 0;
  torch::autograd::impl::set_post_acc_grad_hooks(network.up, std::make_unique<CountCalls>(calls));
  const Tensor loss = network.run(network.run(x, m)[0], m)[0].sum();
  const Tensor alone = torch::autograd::grad({loss}, {network.up}, {}, /*retain_graph=*/true)[0];
  for (const Tensor& p : network.parameters()) EXPECT_FALSE(p.grad().defined());
  EXPECT_EQ(calls, 0);
  loss.backward();
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(network.up.grad().equal(alone));
}

TEST(Recompute, RunsOnceWhereNothingWantsAGradient) {
  Network network;
  for (Tensor& p : Tensors(network.parameters())) p.requires_grad_(false);
  const Tensor x = at::randn({5, 4}, at::kDouble);
  EXPECT_FALSE(network.run(x, x)[0].requires_grad());
  {
    const at::NoGradGuard guard;
    EXPECT_FALSE(network.run(leaf({5, 4}), {})[0].requires_grad());
  }
  EXPECT_EQ(*network.runs, 2);
  network.run(leaf({5, 4}), {})[0].sum().backward();
  EXPECT_EQ(*network.runs, 4);
}

TEST(Recompute, KeepsNothingButTheInputs) {
  const Tensor x = leaf({5, 4});
  c10::weak_intrusive_ptr<c10::StorageImpl> middle(c10::intrusive_ptr<c10::StorageImpl>{});
  const Body f = [&](const Tensors& in) -> Tensors {
    const Tensor h = in[0].exp();
    middle = h.storage().getWeakStorageImpl();
    return {h.exp()};
  };
  const Tensors kept = f({x});
  EXPECT_FALSE(middle.expired());
  const Tensors y = recompute(f, {x}, {});
  EXPECT_TRUE(middle.expired());
  y[0].sum().backward();
  EXPECT_TRUE(middle.expired());
  expect_close(x.grad(), x.exp().exp() * x.exp(), 1e-12);
}

}  // namespace
}  // namespace hymoe::ops
