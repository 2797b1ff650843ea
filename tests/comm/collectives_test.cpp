#include "hymoe/comm/collectives.h"

#include <atomic>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/config/error.h"
#include "ranks.h"

namespace hymoe {
namespace {

// What rank r has: different on each, the same whenever asked.
Tensor of_rank(int64_t rank, int64_t rows = 3) {
  return at::sin(at::arange(rows * 2, at::kDouble) + 10 * static_cast<double>(rank)).view({rows, 2});
}

Tensor sum_of_ranks(int64_t size) {
  Tensor sum = at::zeros({3, 2}, at::kDouble);
  for (int64_t rank = 0; rank < size; ++rank) sum += of_rank(rank);
  return sum;
}

bool close(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && at::allclose(a, b, 0, 1e-12);
}

TEST(Group, CollectivesOfSeveralRanks) {
  run_ranks({.dp = 3}, [](const Mesh& mesh) {
    const Group& group = mesh.dp;
    const int64_t rank = group.rank();
    Tensor sum = of_rank(rank), largest = of_rank(rank), mean = of_rank(rank), from_one = of_rank(rank);
    group.all_reduce_sum(sum);
    group.all_reduce_max(largest);
    group.all_reduce_mean(mean);
    group.broadcast(from_one, 1);
    EXPECT_TRUE(close(sum, sum_of_ranks(3)));
    EXPECT_TRUE(close(mean, sum_of_ranks(3) / 3));
    EXPECT_TRUE(close(largest, at::maximum(at::maximum(of_rank(0), of_rank(1)), of_rank(2))));
    EXPECT_TRUE(at::equal(from_one, of_rank(1)));
    const Tensor all = group.all_gather(of_rank(rank));
    EXPECT_TRUE(at::equal(all, at::cat({of_rank(0), of_rank(1), of_rank(2)})));
    EXPECT_TRUE(at::equal(group.reduce_scatter_sum(of_rank(rank)), sum.narrow(0, rank, 1)));
    Tensor started = of_rank(rank);
    Pending pending = group.start_all_reduce_sum(started);
    pending.wait();
    EXPECT_TRUE(at::equal(started, sum));
    started = of_rank(rank);
    pending = group.start_reduce_scatter_sum(started);
    pending.wait();
    EXPECT_TRUE(at::equal(started.narrow(0, rank, 1), sum.narrow(0, rank, 1)));
    started = of_rank(rank);
    pending = group.start_all_gather(started);
    pending.wait();
    EXPECT_TRUE(at::equal(started, at::cat({of_rank(0).narrow(0, 0, 1), of_rank(1).narrow(0, 1, 1),
                                            of_rank(2).narrow(0, 2, 1)})));
    group.barrier();
    const auto traffic = group.traffic();
    EXPECT_EQ(traffic.at("all_gather").calls, 2);
    EXPECT_EQ(traffic.at("all_gather").bytes, (3 + 1) * 3 * 2 * 8);
    EXPECT_EQ(traffic.at("reduce_scatter").bytes, 2 * 3 * 2 * 8);
  });
}

TEST(Group, AllToAllOfUnevenRowsAndOfNone) {
  // Rank r sends r + s rows to rank s, so rank 0 sends itself none.
  run_ranks({.ep = 3}, [](const Mesh& mesh) {
    const int64_t rank = mesh.ep.rank();
    std::vector<int64_t> send, receive;
    std::vector<Tensor> rows, expected;
    for (int64_t other = 0; other < 3; ++other) {
      send.push_back(rank + other);
      receive.push_back(rank + other);
      rows.push_back(
          at::full({rank + other, 2}, 10.0 * static_cast<double>(rank) + static_cast<double>(other)));
      expected.push_back(
          at::full({rank + other, 2}, 10.0 * static_cast<double>(other) + static_cast<double>(rank)));
    }
    EXPECT_TRUE(at::equal(mesh.ep.all_to_all(at::cat(rows), send, receive), at::cat(expected)));
    const std::vector<int64_t> none(3, 0);
    EXPECT_EQ(mesh.ep.all_to_all(at::zeros({0, 5}), none, none).sizes(), at::IntArrayRef({0, 5}));
    EXPECT_THROW(mesh.ep.all_to_all(at::zeros({4, 5}), none, none), c10::Error);
  });
}

// The gradient of Σ_ranks f against central differences, which every rank takes of its own x in turn.
void expect_true_gradient(const MeshConfig& config,
                          const std::function<Tensor(const Tensor&, const Mesh&)>& f) {
  run_ranks(config, [&](const Mesh& mesh) {
    const Tensor x = of_rank(mesh.world.rank()).set_requires_grad(true);
    f(x, mesh).backward();
    at::NoGradGuard no_grad;
    for (int64_t rank = 0; rank < mesh.world.size(); ++rank) {
      for (int64_t i = 0; i < x.numel(); ++i) {
        double values[2] = {};
        for (const int side : {0, 1}) {
          Tensor moved = x.detach().clone();
          if (rank == mesh.world.rank()) moved.view(-1)[i] += side == 0 ? 1e-6 : -1e-6;
          Tensor sum = f(moved, mesh).reshape({1});
          mesh.world.all_reduce_sum(sum);
          values[side] = sum.item<double>();
        }
        if (rank == mesh.world.rank()) {
          EXPECT_NEAR(x.grad().view(-1)[i].item<double>(), (values[0] - values[1]) / 2e-6, 1e-8);
        }
      }
    }
  });
}

// Different on every rank, so that gradients are.
Tensor weighed(const Tensor& y, const Group& group) {
  return (y * y * at::cos(at::arange(y.numel(), at::kDouble) + static_cast<double>(group.rank())).view_as(y))
      .sum();
}

TEST(Collectives, GatherRowsAndExchangesHaveTrueGradients) {
  expect_true_gradient(
      {.dp = 2}, [](const Tensor& x, const Mesh& mesh) { return weighed(gather_rows(x, mesh.dp), mesh.dp); });
  expect_true_gradient({.ep = 3}, [](const Tensor& x, const Mesh& mesh) {
    const int64_t rank = mesh.ep.rank();
    std::vector<int64_t> send(3, 0), receive(3, 0);  // two rows to the next rank, one to the one after it
    send[(rank + 1) % 3] = 2;
    send[(rank + 2) % 3] = 1;
    receive[(rank + 2) % 3] = 2;
    receive[(rank + 1) % 3] = 1;
    RowExchange exchange(x, send, receive, mesh.ep);
    return weighed(exchange.finish(), mesh.ep);
  });
}

// Rank r sends two rows to the next rank and one to the one after it.
TEST(Collectives, WhatTravelsInThePlaceOfRowsLeavesTheirGradientsAsTheyAre) {
  run_ranks({.ep = 3}, [](const Mesh& mesh) {
    const int64_t rank = mesh.ep.rank(), next = (rank + 1) % 3, last = (rank + 2) % 3;
    std::vector<int64_t> send(3, 0), receive(3, 0);
    send[next] = receive[last] = 2;
    send[last] = receive[next] = 1;
    const Tensor packed = at::arange(3, at::kByte).unsqueeze(1).repeat({1, 5}) + 10 * rank;
    std::vector<Tensor> gradients;
    for (const Tensor& in_place : {Tensor(), packed}) {
      const Tensor x = of_rank(rank).set_requires_grad(true);
      const int64_t before = mesh.ep.traffic()["all_to_all"].bytes;
      RowExchange exchange(x, send, receive, mesh.ep, in_place);
      const Tensor y = exchange.finish();
      EXPECT_EQ(mesh.ep.traffic()["all_to_all"].bytes - before, 3 * (in_place.defined() ? 5 : 2 * 8));
      EXPECT_EQ(y.sizes(), x.sizes());
      if (in_place.defined()) {
        std::vector<int64_t> from;  // numbers of the rows that came
        for (int64_t other = 0; other < 3; ++other) {
          const int64_t first = rank < 3 - rank - other ? 0 : 3 - receive[other];
          for (int64_t i = 0; i < receive[other]; ++i) from.push_back(10 * other + first + i);
        }
        EXPECT_TRUE(exchange.packed().select(1, 4).to(at::kLong).equal(at::tensor(from)));
      } else {
        EXPECT_FALSE(exchange.packed().defined());
      }
      y.backward(of_rank(rank + 7));
      gradients.push_back(x.grad());
    }
    EXPECT_TRUE(gradients[0].equal(gradients[1]));
  });
}

// x is the same on all ranks and so is the loss, of which each rank computes a part of the product: f, then g
// of Megatron-LM. The gradient is that of the whole product, on every rank.
TEST(Collectives, SlicesOfAProductGiveTheGradientOfTheWhole) {
  const Tensor w = of_rank(7, 4);  // [4, 2]
  const auto loss = [](const Tensor& y) { return (y * y * y).sum(); };
  Tensor whole = of_rank(0).set_requires_grad(true);
  loss(at::tanh(whole.matmul(w.t())).matmul(w)).backward();
  run_ranks({.tp = 2}, [&](const Mesh& mesh) {
    const Tensor x = of_rank(0).set_requires_grad(true), slice = w.narrow(0, 2 * mesh.tp.rank(), 2);
    const Tensor inner = at::tanh(copy_to_ranks(x, mesh.tp).matmul(slice.t()));
    loss(sum_over_ranks(inner.matmul(slice), mesh.tp)).backward();
    EXPECT_TRUE(close(x.grad(), whole.grad()));
  });
}

TEST(Collectives, OfOneRankAreTheIdentity) {
  const Tensor x = of_rank(0).set_requires_grad(true);
  EXPECT_TRUE(copy_to_ranks(x, {}).is_same(x));
  EXPECT_TRUE(sum_over_ranks(x, {}).is_same(x));
  EXPECT_TRUE(gather_rows(x, {}).is_same(x));
  EXPECT_TRUE(at::equal(RowExchange(x, {3}, {3}, {}).finish(), x));
}

TEST(Mesh, NeighboursShareMatricesAndGroupsCrossAsDescribed) {
  std::atomic<int> seen = 0;
  run_ranks({.dp = 2, .ep = 2, .tp = 2}, [&](const Mesh& mesh) {
    const int64_t rank = mesh.world.rank();
    EXPECT_EQ(mesh.tp.rank(), rank % 2);
    EXPECT_EQ(mesh.ep.rank(), rank / 2 % 2);
    EXPECT_EQ(mesh.dp.rank(), rank / 4);
    EXPECT_EQ(mesh.data.rank(), rank / 2);
    for (const auto& [group, expected] :
         {std::pair(mesh.tp, std::vector<int64_t>{rank / 2 * 2, rank / 2 * 2 + 1}),
          {mesh.ep, {rank / 4 * 4 + rank % 2, rank / 4 * 4 + rank % 2 + 2}},
          {mesh.dp, {rank % 4, rank % 4 + 4}},
          {mesh.data, {rank % 2, rank % 2 + 2, rank % 2 + 4, rank % 2 + 6}}}) {
      EXPECT_TRUE(at::equal(group.all_gather(at::full({1}, rank, at::kLong)), at::tensor(expected)));
    }
    ++seen;
  });
  EXPECT_EQ(seen, 8);
}

TEST(Mesh, OfAnotherNumberOfRanksIsRefused) {
  try {
    make_mesh({}, 0, 6, {.dp = 2, .ep = 2}, {}, {}, {});
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.key_path(), "parallel");
    EXPECT_NE(std::string(error.what()).find("6, got 2·2·1"), std::string::npos) << error.what();
  }
}

// What `body` throws on rank 0 of the two in a group whose other rank is gone.
std::string error_without_rank(const MeshConfig& mesh_config, const std::function<void(const Mesh&)>& body) {
  try {
    run_ranks(
        mesh_config,
        [&](const Mesh& mesh) {
          if (mesh.world.rank() == 1) return;
          const Where where("layer 3");
          body(mesh);
        },
        std::chrono::seconds(2));
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Group, ARankThatDoesNotAnswerEndsTheOthersWithWordsThatSayWhereAndWhat) {
  const std::string sum = error_without_rank({.dp = 2}, [](const Mesh& mesh) {
    Tensor x = at::zeros({4, 5});
    mesh.dp.all_reduce_sum(x);
  });
  const std::string packed = error_without_rank({.dp = 1, .ep = 2}, [](const Mesh& mesh) {
    RowExchange(at::zeros({4, 2}), {1, 3}, {2, 1}, mesh.ep, at::zeros({4, 12}, at::kByte)).finish();
  });
  for (const auto& [text, group, what] :
       {std::tuple(sum, "dp", "all_reduce of [4, 5] Float"), {packed, "ep", "all_to_all of [4, 12] Byte"}}) {
    for (const std::string& part :
         {"rank 0 of 2 of group " + std::string(group), std::string(what), std::string("in layer 3")})
      EXPECT_NE(text.find(part), std::string::npos) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace hymoe
