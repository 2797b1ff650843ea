#include "moe/golden.h"
#include "hymoe/ops/gates.h"

namespace hymoe {
namespace {

MoEConfig multipl_config(const Golden& g, const std::string& gate_scale) {
  const int64_t width = g.number("F"), tokens = g.number("Et") - 1;
  return {
      .dim = g.number("H"),
      .shared = {.hidden = width},
      .branches = {
          {.name = "token",
           .num_experts = tokens,
           .hidden = width,
           .weight = g.real("fusion_weight_token"),
           .router = {.kind = "topk", .top_k = g.number("routed_k"), .shared = "inside", .balance_loss = 0}},
          {.name = "segment",
           .num_experts = g.number("Es"),
           .hidden = width,
           .weight = g.real("fusion_weight_segment"),
           .router = {.kind = "segment",
                      .segment_len = g.number("window"),
                      .score = "own",
                      .select = "expert_choice",
                      .capacity = g.real("capacity"),
                      .bucket = g.number("bucket"),
                      .gate_scale = gate_scale}}}};
}

MoE multipl_layer(const Golden& g, const std::string& gate_scale) {
  MoE moe(multipl_config(g, gate_scale));
  const int64_t tokens = g.number("Et") - 1, segments = g.number("Es");
  const std::string shared = "token_expert." + std::to_string(tokens) + ".";
  const Tensor router = g.get("router.weight");
  set(moe, "token.router.weight", router.narrow(0, 0, tokens + 1));
  set(moe, "segment.router.weight", router.narrow(0, tokens + 1, segments));
  for (const std::string matrix : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
    set(moe, "shared_expert." + matrix, g.get(shared + matrix));
  }
  set(moe, "token.experts.gate_up_proj", g.gate_up("token_expert", tokens));
  set(moe, "token.experts.down_proj", g.down("token_expert", tokens));
  set(moe, "segment.experts.gate_up_proj", g.gate_up("segment_expert", segments));
  set(moe, "segment.experts.down_proj", g.down("segment_expert", segments));
  return moe;
}

class MultiplGolden : public testing::TestWithParam<std::filesystem::path> {};

TEST_P(MultiplGolden, ValuesAndGradients) {
  const Golden g(GetParam());
  const int64_t tokens = g.number("Et") - 1, segments = g.number("Es");
  MoE moe = multipl_layer(g, "window");
  Tensor x = g.get("hidden").requires_grad_();
  const auto out = moe->forward(x.transpose(0, 1));
  expect_close(out.y.transpose(0, 1), g.get("y"), "y");
  (out.y.transpose(0, 1) * g.get("r")).sum().backward();

  expect_close(x.grad(), g.get("grad.hidden"), "grad hidden");
  expect_close(at::cat({grad(moe, "token.router.weight"), grad(moe, "segment.router.weight")}),
               g.get("grad.router.weight"), "grad router");
  const std::string shared = "grad.token_expert." + std::to_string(tokens) + ".";
  for (const std::string matrix : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
    expect_close(grad(moe, "shared_expert." + matrix), g.get(shared + matrix), "grad shared " + matrix);
  }
  const auto token_up = g.gate_up("token_expert", tokens, "grad."),
             token_down = g.down("token_expert", tokens, "grad.");
  expect_close(grad(moe, "token.experts.gate_up_proj"), token_up, "grad token gate_up");
  expect_close(grad(moe, "token.experts.down_proj"), token_down, "grad token down");
  expect_close(grad(moe, "segment.experts.gate_up_proj"), g.gate_up("segment_expert", segments, "grad."),
               "grad segment gate_up");
  expect_close(grad(moe, "segment.experts.down_proj"), g.down("segment_expert", segments, "grad."),
               "grad segment down");
}

TEST_P(MultiplGolden, IdsAndGates) {
  const Golden g(GetParam());
  MoE moe = multipl_layer(g, "window");
  const Tensor x = g.get("hidden").squeeze(1);
  const Packing packing = Packing::of(1, x.size(0));
  const Routing token = moe->router(0)->forward(x, packing);
  EXPECT_TRUE(at::equal(token.expert_ids.to(at::kInt), g.get("routed_ids")));
  const Tensor weights = at::cat({token.weights, token.shared_weight.unsqueeze(1)}, 1);
  expect_close(weights, g.get("token_weights"), "token weights");

  const Routing segment = moe->router(1)->forward(x, packing);
  const int64_t windows = g.number("num_segments"), experts = g.number("Es"),
                slots = g.number("segments_per_expert");
  Tensor want = at::zeros({windows, experts}), got = at::zeros({windows, experts});
  const Tensor taken = g.get("segment_selected_ids"), gates = g.get("segment_gates");
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t window = taken[e][i].item<int64_t>();
      if (window >= 0) want[window][e] = gates[e][i];
    }
  }
  ASSERT_EQ(segment.expert_ids.size(0), windows);
  for (int64_t u = 0; u < windows; ++u) {
    for (int64_t k = 0; k < segment.expert_ids.size(1); ++k) {
      const int64_t e = segment.expert_ids[u][k].item<int64_t>();
      if (e >= 0) got[u][e] = segment.weights[u][k] * static_cast<double>(g.number("window"));
    }
  }
  EXPECT_TRUE(at::equal(got > 0, want > 0));
  expect_close(got, want, "segment gates");
}

TEST_P(MultiplGolden, WithoutTheDivisionByTheWindow) {
  const Golden g(GetParam());
  MoE moe = multipl_layer(g, "none");
  Tensor x = g.get("hidden").requires_grad_();
  const Tensor y = moe->forward(x.transpose(0, 1)).y.transpose(0, 1);
  const Tensor want = g.get("y_tok") * g.real("fusion_weight_token") +
                      g.get("y_seg_without_1_over_w") * g.real("fusion_weight_segment");
  expect_close(y, want, "y");
  (y * g.get("r")).sum().backward();
  expect_close(x.grad(), g.get("grad_without_1_over_w.hidden"), "grad hidden");
  expect_close(at::cat({grad(moe, "token.router.weight"), grad(moe, "segment.router.weight")}),
               g.get("grad_without_1_over_w.router.weight"), "grad router");
}

// The published balance loss counts the shared expert among the experts; ours does not, so it is put together
// here.
TEST_P(MultiplGolden, PublishedBalanceLoss) {
  const Golden g(GetParam());
  const int64_t experts = g.number("Et");
  const double rows = static_cast<double>(g.number("S"));
  Tensor x = g.get("hidden").requires_grad_(), router = g.get("router.weight").requires_grad_();
  const auto gates = ops::topk_gates(at::linear(x.squeeze(1), router.narrow(0, 0, experts)),
                                     {.top_k = g.number("routed_k"), .shared_last = true});
  expect_close(gates.scores, g.get("token_probs"), "scores");
  const Tensor counts = at::cat(
      {at::bincount(gates.ids.reshape(-1), {}, experts - 1), at::full({1}, g.number("S"), at::kLong)});
  EXPECT_TRUE(at::equal(counts.to(at::kInt), g.get("tokens_per_expert")));
  const Tensor loss = (gates.scores.sum(0) * counts).sum() * g.real("aux_loss_coeff") * experts /
                      (rows * rows * static_cast<double>(g.number("top_k")));
  expect_close(loss.reshape({1}), g.get("aux_loss"), "aux loss");
  loss.backward();
  expect_close(x.grad(), g.get("aux_grad.hidden"), "aux grad hidden");
  expect_close(router.grad(), g.get("aux_grad.router.weight"), "aux grad router");
}

INSTANTIATE_TEST_SUITE_P(All, MultiplGolden, testing::ValuesIn(files("golden_multipl_moe", "case_")),
                         case_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(MultiplGolden);

TEST(Golden, DataIsThere) {
  if (!std::filesystem::is_directory(kData)) GTEST_SKIP() << "../shared is absent";
  EXPECT_EQ(files("golden_multipl_moe", "case_").size(), 8u);
  EXPECT_EQ(files("golden_hf", "").size(), 9u);
}

}  // namespace
}  // namespace hymoe
