#include "hymoe/ops/attention.h"

#include "hymoe/ops/plain.h"
#include "ops/gradcheck.h"

namespace hymoe::ops {
namespace {

using namespace hymoe::testing;

Op attention_op(const Tensor& q_offsets, const Tensor& k_offsets, int64_t window = 0) {
  return [=](const Tensors& in) { return attention(in[0], in[1], in[2], q_offsets, k_offsets, window); };
}
Op plain_op(const Tensor& q_offsets, const Tensor& k_offsets, int64_t window = 0) {
  return
      [=](const Tensors& in) { return plain::attention(in[0], in[1], in[2], q_offsets, k_offsets, window); };
}

TEST(Attention, GradientsAgreeWithDifferences) {
  const Tensor offsets = ints({0, 3, 6, 6, 8});
  expect_gradients(attention_op(offsets, offsets), {leaf({8, 4, 4}), leaf({8, 2, 4}), leaf({8, 2, 4})}, 1e-6);
  expect_gradients(attention_op(offsets, offsets, 2), {leaf({8, 2, 4}), leaf({8, 1, 4}), leaf({8, 1, 4})},
                   1e-6);
  expect_gradients(attention_op(ints({0, 2, 3}), ints({0, 4, 8})),
                   {leaf({3, 2, 4}), leaf({8, 1, 4}), leaf({8, 1, 4})}, 1e-6);
}

TEST(Attention, EqualsThePlainComposition) {
  struct Case {
    Tensor q_offsets, k_offsets;
    int64_t window;
  };
  const Case cases[] = {
      {ints({0, 300, 600}), ints({0, 300, 600}), 0},              // equal lengths, one call
      {ints({0, 1, 90, 90, 600}), ints({0, 1, 90, 90, 600}), 0},  // ragged, empty
      {ints({0, 600}), ints({0, 600}), 70},                       // window, several query blocks
      {ints({0, 1, 2}), ints({0, 40, 90}), 0},                    // decoding
      {ints({0, 1, 2}), ints({0, 40, 90}), 16},                   // decoding in a window
      {ints({0, 300, 301}), ints({0, 420, 430}), 0},              // continued prefill
      {ints({0, 300, 301}), ints({0, 420, 430}), 100},
  };
  for (const Case& c : cases) {
    const int64_t queries = c.q_offsets[-1].item<int64_t>(), keys = c.k_offsets[-1].item<int64_t>();
    SCOPED_TRACE(::testing::Message() << queries << " queries, window " << c.window);
    expect_same(attention_op(c.q_offsets, c.k_offsets, c.window),
                plain_op(c.q_offsets, c.k_offsets, c.window),
                {leaf({queries, 6, 16}, at::kFloat), leaf({keys, 2, 16}, at::kFloat),
                 leaf({keys, 2, 16}, at::kFloat)},
                1e-5);
  }
}

TEST(Attention, TakesStridedInputsAndBf16) {
  const Tensor offsets = ints({0, 20, 40});
  const Tensor packed = at::randn({40, 10, 8});
  const Tensors in{packed.narrow(1, 0, 6).set_requires_grad(true),
                   packed.narrow(1, 6, 2).set_requires_grad(true),
                   packed.narrow(1, 8, 2).set_requires_grad(true)};
  expect_same(attention_op(offsets, offsets), plain_op(offsets, offsets), in, 1e-5);
  expect_same(
      attention_op(offsets, offsets), plain_op(offsets, offsets),
      {leaf({40, 4, 8}, at::kBFloat16), leaf({40, 4, 8}, at::kBFloat16), leaf({40, 4, 8}, at::kBFloat16)},
      5e-2);
}

TEST(Attention, SeesOnlyItsOwnPastAndDocument) {
  const Tensor offsets = ints({0, 30, 50});
  const Tensor q = at::randn({50, 2, 8}), k = at::randn({50, 2, 8}), v = at::randn({50, 2, 8});
  const Tensor y = attention(q, k, v, offsets, offsets);
  Tensor k2 = k.clone(), v2 = v.clone();
  k2.narrow(0, 20, 10).normal_();
  v2.narrow(0, 20, 10).normal_();
  const Tensor y2 = attention(q, k2, v2, offsets, offsets);
  EXPECT_TRUE(y.narrow(0, 0, 20).equal(y2.narrow(0, 0, 20)));
  EXPECT_TRUE(y.narrow(0, 30, 20).equal(y2.narrow(0, 30, 20)));
  EXPECT_FALSE(y.narrow(0, 20, 10).equal(y2.narrow(0, 20, 10)));
}

TEST(Attention, TakesNoRowsAndRefusesWrongInput) {
  EXPECT_EQ(attention(at::zeros({0, 2, 8}), at::zeros({0, 2, 8}), at::zeros({0, 2, 8}), ints({0}), ints({0}))
                .size(0),
            0);
  const Tensor x = at::zeros({4, 2, 8});
  expect_error(
      [&] {
        attention(x, at::zeros({4, 3, 8}), at::zeros({4, 3, 8}), ints({0, 4}), ints({0, 4}));
      },
      "attention: k must be [Tk, Hkv, 8] with Hkv dividing 2, got [4, 3, 8]");
  expect_error(
      [&] {
        attention(x, x, x, ints({0, 3}), ints({0, 4}));
      },
      "attention: q_offsets must rise from 0 to the 4 rows, got 0 to 3");
  expect_error(
      [&] {
        attention(x, x, x, ints({0, 1, 4}), ints({0, 4}));
      },
      "attention: q_offsets has 2 documents, k_offsets 1");
  expect_error(
      [&] {
        attention(x, x, x, ints({0, 3, 4}), ints({0, 2, 4}));
      },
      "attention: a document has more queries than keys");
}

}  // namespace
}  // namespace hymoe::ops
