#include <thread>
#include <vector>

#include <ATen/DeviceAccelerator.h>
#include <gtest/gtest.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "comm/communicator.h"

namespace hymoe {
namespace {

// One rank a GPU, as many as there are.
TEST(Nccl, CollectivesOfEveryGpu) {
  if (!at::hasCUDA() || at::accelerator::deviceCount() == 0) GTEST_SKIP() << "there is no GPU";
  const int size = at::accelerator::deviceCount();
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.emplace_back([&, rank] {
      at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(rank));
      auto backend = make_nccl(store, rank, size, std::chrono::minutes(1));
      const Group group(std::shared_ptr<Communicator>(new Communicator{std::move(backend), "gpus"}));
      EXPECT_TRUE(group.device().is_cuda());
      Tensor sum = at::full({4}, rank + 1.0, group.device()), largest = sum.clone();
      group.all_reduce_sum(sum);
      group.all_reduce_max(largest);
      EXPECT_EQ(sum[0].item<double>(), size * (size + 1) / 2);
      EXPECT_EQ(largest[0].item<double>(), size);
      const Tensor all =
          group.all_gather(at::full({1}, rank, at::TensorOptions(group.device()).dtype(at::kLong)));
      EXPECT_TRUE(at::equal(all.cpu(), at::arange(size)));
      const std::vector<int64_t> each(size, 1);
      EXPECT_TRUE(at::equal(group.all_to_all(all, each, each).cpu(), at::full({size}, rank, at::kLong)));
      group.barrier();
    });
  }
  for (std::thread& rank : ranks) rank.join();
}

}  // namespace
}  // namespace hymoe
