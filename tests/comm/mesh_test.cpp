#include "hymoe/comm/mesh.h"

#include <gtest/gtest.h>

#include <torch/types.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

TEST(PlannedMesh, HasPlacesAndSizesOfAThousandRanksAndTalksToNone) {
  const Mesh mesh = planned_mesh({.dp = 64, .ep = 8, .tp = 2}, 1024, /*rank=*/1000);
  EXPECT_EQ(mesh.dp.rank(), 62);
  EXPECT_EQ(mesh.ep.rank(), 4);
  EXPECT_EQ(mesh.tp.rank(), 0);
  EXPECT_EQ(mesh.dp.size(), 64);
  EXPECT_EQ(mesh.ep.size(), 8);
  EXPECT_EQ(mesh.tp.size(), 2);
  EXPECT_EQ(mesh.data.size(), 512);
  EXPECT_EQ(mesh.world.size(), 1024);
  Tensor one = at::ones({1});
  EXPECT_THROW(mesh.dp.all_reduce_sum(one), Error);
  EXPECT_THROW(mesh.ep.all_to_all(at::ones({8}), std::vector<int64_t>(8, 1), std::vector<int64_t>(8, 1)),
               Error);
  EXPECT_THROW(planned_mesh({.dp = 3}, 4), ConfigError);
}

}  // namespace
}  // namespace hymoe
