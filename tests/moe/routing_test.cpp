#include "hymoe/moe/routing.h"

#include <gtest/gtest.h>

#include "hymoe/moe/topk_router.h"
#include "moe/layers.h"

namespace hymoe {
namespace {

std::string packing_error(const Packing& packing, const Tensor& x) {
  try {
    packing.check(x);
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

TEST(Packing, OfABatch) {
  const Packing packing = Packing::of(3, 5);
  EXPECT_TRUE(at::equal(packing.offsets, at::tensor({0, 5, 10, 15}, at::kLong)));
  EXPECT_EQ(packing.rows(), 15);
  EXPECT_EQ(packing.documents(), 3);
  EXPECT_EQ(Packing::of(0, 5).rows(), 0);
}

TEST(Packing, ChecksItsFields) {
  const Tensor x = at::zeros({6, 2});
  EXPECT_EQ(packing_error(documents({4, 0, 2}), x), "no error");
  EXPECT_NE(packing_error(documents({4, 3}), x).find("must rise from 0 to 6, the rows of x, got 0 to 7"),
            std::string::npos);
  EXPECT_NE(packing_error(documents({8, -2}), x).find("falling in between"), std::string::npos);
  EXPECT_NE(packing_error({}, x).find("[N + 1] int64 on the CPU"), std::string::npos);
  EXPECT_NE(packing_error(Packing::of(2, 3), x.view({2, 3, 2})).find("must be [T, D]"), std::string::npos);

  Packing padded = documents({4, 2});
  padded.padding = at::tensor({0, 0, 1, 1, 0, 1}).to(at::kBool);
  EXPECT_EQ(packing_error(padded, x), "no error");
  padded.padding = at::tensor({0, 1, 0, 1, 0, 1}).to(at::kBool);
  EXPECT_NE(packing_error(padded, x).find("at the end of a document, got it before row 2 of document 0"),
            std::string::npos);
  padded.padding = Tensor();
  padded.prior = at::zeros({6});
  EXPECT_NE(packing_error(padded, x).find("prior must be [6] bool"), std::string::npos);
  padded.prior = Tensor();
  padded.padding = at::zeros({5}, at::kBool);
  EXPECT_NE(packing_error(padded, x).find("padding must be [6] bool"), std::string::npos);

  DecodeState state(2);
  Packing decoding = documents({4, 2});
  decoding.state = &state;
  EXPECT_EQ(packing_error(decoding, x), "no error");
  decoding.padding = at::zeros({6}, at::kBool);
  EXPECT_NE(packing_error(decoding, x).find("no row is padding"), std::string::npos);
  decoding = documents({4, 1, 1});
  decoding.state = &state;
  EXPECT_NE(packing_error(decoding, x).find("of 2 documents, got 3"), std::string::npos);
  EXPECT_THROW(state.advance(std::vector<int64_t>{1}), c10::Error);
}

TEST(TopkRouter, SharedExpertInsideTheNormalisation) {
  torch::manual_seed(5);
  auto router = routers().make("topk", {4, 3, {.top_k = 1, .shared = "inside"}});
  const Tensor weight = router->named_parameters()["weight"];
  ASSERT_EQ(weight.sizes(), (std::vector<int64_t>{4, 4}));
  const Tensor x = at::randn({7, 4}) * 20;
  const Routing routing = router->forward(x, Packing::of(1, 7));
  const Tensor scores = at::softmax(at::linear(x, weight), 1);
  const auto [best, id] = scores.narrow(1, 0, 3).max(1);
  EXPECT_TRUE(at::equal(routing.expert_ids.squeeze(1), id));
  EXPECT_LT(max_difference(routing.weights.squeeze(1), best / (best + scores.select(1, 3))), 1e-6);
  EXPECT_LT(max_difference(routing.weights.squeeze(1) + routing.shared_weight, at::ones({7})), 1e-6);
}

TEST(TopkRouter, OfEqualScoresTheLowerIndex) {
  auto router = routers().make("topk", {4, 5, {.top_k = 3}});
  at::NoGradGuard no_grad;
  router->named_parameters()["weight"].zero_();
  const Routing routing = router->forward(at::randn({2, 4}), Packing::of(1, 2));
  EXPECT_TRUE(at::equal(routing.expert_ids, at::tensor({0, 1, 2}, at::kLong).expand({2, 3})));
}

TEST(TopkRouter, PaddingGetsNoExpertAndDoesNotCount) {
  auto router = routers().make("topk", {4, 5, {.top_k = 2, .z_loss = 0.1}});
  const Tensor x = at::randn({6, 4});
  Packing padded = documents({6});
  padded.padding = at::tensor({0, 0, 0, 0, 1, 1}).to(at::kBool);
  const Routing all = router->forward(x.slice(0, 0, 4), documents({4})), some = router->forward(x, padded);
  EXPECT_TRUE(at::equal(some.expert_ids.slice(0, 0, 4), all.expert_ids));
  EXPECT_EQ(max_abs(some.expert_ids.slice(0, 4) + 1), 0);
  EXPECT_EQ(max_abs(some.weights.slice(0, 4)), 0);
  EXPECT_LT(max_difference(some.aux_loss, all.aux_loss), 1e-7);
  padded.padding.fill_(true);
  EXPECT_EQ(router->forward(x, padded).aux_loss.item<float>(), 0);
}

// Published models have it; training refuses it.
TEST(TopkRouter, ASingleNormalisedWeightIsOne) {
  const auto router = routers().make("topk", {4, 5, {.top_k = 1}});
  EXPECT_TRUE(router->forward(at::randn({7, 4}), Packing::of(1, 7)).weights.equal(at::ones({7, 1})));
}

}  // namespace
}  // namespace hymoe
