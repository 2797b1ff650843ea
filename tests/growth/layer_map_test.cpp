#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "hymoe/growth/grow.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

std::vector<int64_t> sources(int64_t n, const GrowConfig& config) {
  std::vector<int64_t> all;
  for (const GrownLayer& layer : layer_map(n, config)) all.push_back(layer.source);
  return all;
}

std::vector<int64_t> copies(int64_t n, const GrowConfig& config) {
  std::vector<int64_t> all;
  const auto layers = layer_map(n, config);
  for (size_t j = 0; j < layers.size(); ++j) {
    if (layers[j].copy) all.push_back(static_cast<int64_t>(j));
  }
  return all;
}

using List = std::vector<int64_t>;

TEST(LayerMap, InterposesCopiesBehindTheirSource) {
  EXPECT_EQ(sources(3, {.num_layers = 6}), List({0, 0, 1, 1, 2, 2}));
  EXPECT_EQ(copies(3, {.num_layers = 6}), List({1, 3, 5}));
  EXPECT_EQ(sources(2, {.num_layers = 6}), List({0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(sources(5, {.num_layers = 7, .first = 1, .last = 2}), List({0, 1, 1, 2, 2, 3, 4}));
  EXPECT_EQ(copies(5, {.num_layers = 7, .first = 1, .last = 2}), List({2, 4}));
}

TEST(LayerMap, StacksTheBlockAgain) {
  EXPECT_EQ(sources(3, {.num_layers = 6, .depth = "stack"}), List({0, 1, 2, 0, 1, 2}));
  EXPECT_EQ(copies(3, {.num_layers = 6, .depth = "stack"}), List({3, 4, 5}));
  // [0, n - c), then [a, n) twice: 3·5 - 2 - 2·1 layers
  const GrowConfig thrice{.num_layers = 11, .depth = "stack", .first = 1, .last = 2};
  EXPECT_EQ(sources(5, thrice), List({0, 1, 2, 1, 2, 3, 4, 1, 2, 3, 4}));
  EXPECT_EQ(copies(5, thrice), List({3, 4, 7, 8, 9, 10}));
}

// Against the formulas of arXiv 2510.08008's code, for all options.
TEST(LayerMap, FollowsTheFormulas) {
  for (int64_t n = 1; n <= 7; ++n) {
    for (int64_t a = 0; a < n; ++a) {
      for (int64_t c = 0; a + c < n; ++c) {
        for (int64_t k = 1; k <= 4; ++k) {
          List interposed, stacked;
          for (int64_t i = 0; i < n; ++i) interposed.insert(interposed.end(), a <= i && i < n - c ? k : 1, i);
          for (int64_t i = 0; i < n - c; ++i) stacked.push_back(i);
          for (int64_t r = 1; r < k; ++r) {
            for (int64_t i = a; i < n; ++i) stacked.push_back(i);
          }
          const auto size = [](const List& list) { return static_cast<int64_t>(list.size()); };
          EXPECT_EQ(size(interposed), n + (k - 1) * (n - a - c));
          EXPECT_EQ(sources(n, {.num_layers = size(interposed), .first = a, .last = c}), interposed);
          if (k == 1) continue;
          EXPECT_EQ(size(stacked), k * n - c - (k - 1) * a);
          EXPECT_EQ(sources(n, {.num_layers = size(stacked), .depth = "stack", .first = a, .last = c}),
                    stacked);
        }
      }
    }
  }
}

TEST(LayerMap, ReachesNumbersBetweenTheMultiples) {
  const GrowConfig config{.num_layers = 54, .first = 1, .last = 1};  // the paper's 28 -> 54
  const List map = sources(28, config);
  EXPECT_EQ(map.size(), 54u);
  EXPECT_EQ(List(map.begin(), map.begin() + 5), List({0, 1, 1, 2, 2}));
  EXPECT_EQ(List(map.end() - 3, map.end()), List({26, 26, 27}));
  EXPECT_EQ(sources(4, {.num_layers = 6}), List({0, 0, 1, 2, 2, 3}));
}

TEST(LayerMap, PutsIdentityBlocksBehindEveryGroup) {  // LLaMA-Pro: 32 -> 40 is a block every 4
  EXPECT_EQ(sources(4, {.num_layers = 6, .depth = "identity"}), List({0, 1, 1, 2, 3, 3}));
  EXPECT_EQ(copies(4, {.num_layers = 6, .depth = "identity"}), List({2, 5}));
  EXPECT_EQ(copies(32, {.num_layers = 40, .depth = "identity"}), List({4, 9, 14, 19, 24, 29, 34, 39}));
  EXPECT_EQ(sources(6, {.num_layers = 8, .depth = "identity", .first = 1, .last = 1}),
            List({0, 1, 2, 2, 3, 4, 4, 5}));
}

TEST(LayerMap, SaysWhatCannotBe) {
  const auto error = [](int64_t n, const GrowConfig& config) {
    return message_of<ConfigError>([&] { layer_map(n, config); });
  };
  EXPECT_EQ(error(4, {.num_layers = 3}), "num_layers: expected at least the 4 that there are, got 3");
  EXPECT_EQ(error(4, {.num_layers = 7, .depth = "stack"}),
            "num_layers: stacking gives 4 + a multiple of 4 layers, got 7");
  EXPECT_EQ(error(4, {.num_layers = 7, .depth = "identity"}),
            "num_layers: identity adds a divisor of the 4 layers that may be copied, got 7");
  EXPECT_EQ(error(4, {.num_layers = 7, .first = 3, .last = 1}),
            "first: first and last leave none of 4 layers to copy");
}

}  // namespace
}  // namespace hymoe
