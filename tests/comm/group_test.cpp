#include "hymoe/comm/group.h"

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/comm/mesh.h"

namespace hymoe {
namespace {

TEST(Group, OfOneLeavesTensorsAsTheyAre) {
  const Mesh mesh;
  for (const Group& group : {mesh.dp, mesh.ep, mesh.tp}) {
    EXPECT_EQ(group.rank(), 0);
    EXPECT_EQ(group.size(), 1);
    Tensor x = at::arange(3);
    group.all_reduce_sum(x);
    group.all_reduce_mean(x);
    group.barrier();
    EXPECT_TRUE(at::equal(x, at::arange(3)));
  }
}

}  // namespace
}  // namespace hymoe
