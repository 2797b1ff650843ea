#pragma once

#include <cctype>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hymoe/io/shard.h"
#include "moe/layers.h"
#include "ranks.h"

// A layer divided over ranks against the whole one in this process, which sees the rows of all ranks.

namespace hymoe {

/// Set before every pass of a layer: different for every data rank and micro-batch. Ranks share torch's
/// generator.
inline thread_local uint64_t router_seed = 0;

struct Case {
  std::string name;
  MoEConfig config;
  bool joined = false;  // the whole layer sees the ranks' rows as one micro-batch, else as one after another
  bool recompute = false;
  at::ScalarType dtype = at::kDouble;
  double tolerance = 1e-10;  // of a tensor's largest magnitude
  int64_t steps = 2;
};

// What one data rank sees in a step.
struct Rows {
  Tensor x, probe;
  Packing packing;
};

inline Tensor real_rows(const Rows& rows) { return rows.packing.padding.logical_not().sum(); }

// Documents of other lengths on each rank, one of them empty, with padding; rank 1 has no rows at all.
inline std::vector<Rows> rows_of_ranks(int64_t ranks, int64_t dim, at::ScalarType dtype) {
  std::vector<Rows> all;
  for (int64_t r = 0; r < ranks; ++r) {
    Packing packing = r == 1 ? documents({}) : documents({9 + 2 * r, 3, 0, 14 - r});
    const int64_t rows = packing.rows();
    packing.padding = at::zeros({rows}, at::kBool);
    if (rows > 0) packing.padding.slice(0, 7 + 2 * r, 9 + 2 * r).fill_(true);
    packing.prior = at::arange(rows) % 3 == r % 3;
    all.push_back({at::randn({rows, dim}, at::kDouble).to(dtype),
                   at::randn({rows, dim}, at::kDouble).to(dtype), packing});
  }
  return all;
}

inline Rows join(const std::vector<Rows>& ranks) {
  std::vector<Tensor> x, probe, padding, prior, lengths;
  for (const Rows& rows : ranks) {
    x.push_back(rows.x);
    probe.push_back(rows.probe);
    padding.push_back(rows.packing.padding);
    prior.push_back(rows.packing.prior);
    lengths.push_back(rows.packing.offsets.diff());
  }
  Packing packing;
  packing.offsets = at::constant_pad_nd(at::cat(lengths).cumsum(0), {1, 0});
  packing.padding = at::cat(padding);
  packing.prior = at::cat(prior);
  return {at::cat(x), at::cat(probe), packing};
}

// What one forward and backward pass gave.
struct Pass {
  Tensor y, dx, aux;
  std::vector<BranchLoad> load;
};

inline Pass run(MoE moe, const Rows& rows, double share, bool recompute) {
  const Tensor x = rows.x.detach().clone().set_requires_grad(true);
  const MoEOutput out = moe->forward(x, rows.packing, recompute);
  const Tensor aux = out.aux_loss * share;
  ((out.y * out.y * rows.probe).sum() + aux).backward();
  return {out.y.detach(), x.grad(), aux.detach(), out.load};
}

using Named = std::map<std::string, Tensor>;

inline Named gradients_of(MoE moe) {
  Named gradients;
  for (auto& item : moe->named_parameters()) {
    const Tensor& gradient = item.value().grad();
    gradients[item.key()] = gradient.defined() ? gradient : at::zeros_like(item.value());
  }
  return gradients;
}

inline Named buffers_of(MoE moe) {
  Named buffers;
  for (auto& item : moe->named_buffers()) buffers[item.key()] = item.value().clone();
  return buffers;
}

inline void update(MoE moe, const Named& gradients, const Group& data) {
  at::NoGradGuard no_grad;
  for (auto& item : moe->named_parameters()) {
    item.value().sub_(gradients.at(item.key()), 0.003);
    item.value().mutable_grad() = Tensor();
  }
  moe->end_step(data);
}

// This rank's part of what the whole layer has for a parameter.
inline Tensor part_of(const Named& whole, const std::string& name, const MoEConfig& config,
                      const Mesh& mesh) {
  const Split ep{mesh.ep.rank(), mesh.ep.size()}, tp{mesh.tp.rank(), mesh.tp.size()};
  Shard shard;
  std::string whole_name = name;
  if (const size_t at = name.find(".experts."); at != std::string::npos) {
    shard.splits = {ep};
    const size_t begin = at + 9;
    if (name.ends_with("gate_up_proj")) {
      shard.splits = {ep, {tp.rank, tp.size, 2}};
    } else if (name.ends_with("down_proj")) {
      shard.splits = {ep, {}, tp};
    } else if (std::isdigit(name[begin]) != 0) {
      shard.splits = {};
      const int64_t first = config.branches.at(0).num_experts / ep.size * ep.rank;
      whole_name = name.substr(0, begin) + std::to_string(first + std::stoll(name.substr(begin))) +
                   name.substr(name.find('.', begin));
    }
  } else if (name == "shared_expert.down_proj.weight") {
    shard.splits = {{}, tp};
  } else if (name.starts_with("shared_expert.")) {
    shard.splits = {tp};
  }
  const Tensor& tensor = whole.at(whole_name);
  shard.shape = tensor.sizes().vec();
  return shard.part_of(tensor);
}

inline void expect_close(const Tensor& got, const Tensor& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  EXPECT_LE(max_difference(got.to(at::kDouble), want.to(at::kDouble)),
            tolerance * std::max(max_abs(want), 1e-2))
      << what;
}

// What all ranks together went through, by the whole layer.
struct Reference {
  MoE moe{nullptr};
  Named initial, initial_buffers;
  std::vector<std::vector<Rows>> rows;  // a step, a rank
  std::vector<std::vector<Pass>> passes;
  std::vector<Named> gradients, buffers;

  Reference(const Case& c, int64_t ranks) : moe(make_moe(c.config)) {
    moe->to(c.dtype);
    moe->train();
    for (auto& item : moe->named_parameters()) {
      if (item.key() == "fusion.logits") item.value().data().copy_(at::tensor({0.3, -0.4}));
      initial[item.key()] = item.value().detach().clone();
    }
    initial_buffers = buffers_of(moe);
    for (int64_t step = 0; step < c.steps; ++step) {
      rows.push_back(rows_of_ranks(ranks, c.config.dim, c.dtype));
      passes.emplace_back();
      const std::vector<Rows> micro_batches = c.joined ? std::vector{join(rows[step])} : rows[step];
      for (size_t i = 0; i < micro_batches.size(); ++i) {
        router_seed = i;
        passes[step].push_back(run(moe, micro_batches[i], share(micro_batches[i], step), false));
      }
      if (c.joined) split(step);
      gradients.push_back(gradients_of(moe));
      update(moe, gradients[step], {});
      buffers.push_back(buffers_of(moe));
    }
  }

  double share(const Rows& of, int64_t step) const {
    return real_rows(of).item<double>() / real_rows(join(rows[step])).item<double>();
  }
  // y and dx of all rows -> of each rank's; the rest stays with the first.
  void split(int64_t step) {
    Pass all = passes[step][0];
    int64_t begin = 0;
    for (size_t r = 0; r < rows[step].size(); ++r) {
      const int64_t n = rows[step][r].x.size(0);
      if (r > 0) passes[step].emplace_back();
      passes[step][r].y = all.y.narrow(0, begin, n);
      passes[step][r].dx = all.dx.narrow(0, begin, n);
      begin += n;
    }
  }
};

// Loads of all ranks add up to those of the whole layer.
inline void expect_same_load(const std::vector<BranchLoad>& mine, const std::vector<Pass>& whole,
                             const Group& data, const std::string& what) {
  for (size_t b = 0; b < mine.size(); ++b) {
    for (const auto field :
         {&BranchLoad::rows_per_expert, &BranchLoad::covered, &BranchLoad::rows, &BranchLoad::joint}) {
      if (!(mine[b].*field).defined()) continue;
      Tensor got = (mine[b].*field).clone(), want = at::zeros_like(got);
      data.all_reduce_sum(got);
      for (const Pass& pass : whole) {
        if (!pass.load.empty()) want += pass.load[b].*field;
      }
      EXPECT_TRUE(at::equal(got, want)) << what << ": " << got << " for " << want;
    }
  }
}

inline void expect_same(const Case& c, const Reference& whole, const Mesh& mesh) {
  MoE moe(c.config, mesh);
  moe->to(c.dtype);
  EXPECT_EQ(moe->num_params(), whole.moe->num_params());
  EXPECT_EQ(moe->num_active_params(), whole.moe->num_active_params());
  {
    at::NoGradGuard no_grad;
    for (auto& item : moe->named_parameters())
      item.value().copy_(part_of(whole.initial, item.key(), c.config, mesh));
    for (auto& item : moe->named_buffers()) item.value().copy_(whole.initial_buffers.at(item.key()));
  }
  mesh.world.barrier();  // no rank still draws its weights while another's router draws
  const int64_t rank = mesh.data.rank();
  router_seed = rank;
  for (int64_t step = 0; step < c.steps; ++step) {
    const std::string what =
        c.name + ", step " + std::to_string(step) + ", rank " + std::to_string(rank) + ": ";
    const Rows& rows = whole.rows[step][rank];
    const Pass got = run(moe, rows, whole.share(rows, step), c.recompute);
    const Pass& want = whole.passes[step][rank];
    expect_close(got.y, want.y, c.tolerance, what + "y");
    expect_close(got.dx, want.dx, c.tolerance, what + "gradient of x");
    Tensor aux = got.aux.clone(), whole_aux = at::zeros_like(aux);
    mesh.data.all_reduce_sum(aux);
    for (const Pass& pass : whole.passes[step])
      whole_aux += pass.aux.defined() ? pass.aux : at::zeros_like(aux);
    expect_close(aux, whole_aux, c.tolerance, what + "aux_loss");
    expect_same_load(got.load, whole.passes[step], mesh.data, what + "load");
    Named gradients = gradients_of(moe);
    for (auto& [name, gradient] : gradients) {
      gradient = gradient.contiguous();
      (name.find(".experts.") == std::string::npos ? mesh.data : mesh.dp).all_reduce_sum(gradient);
      expect_close(gradient, part_of(whole.gradients[step], name, c.config, mesh), c.tolerance,
                   what + "gradient of " + name);
    }
    update(moe, gradients, mesh.data);
    // What routers gather is fp32.
    for (const auto& [name, buffer] : buffers_of(moe))
      expect_close(buffer, whole.buffers[step].at(name), 1e-6, what + name);
  }
}

inline void expect_same(const MeshConfig& mesh_config, const std::vector<Case>& cases) {
  std::vector<Reference> whole;
  for (const Case& c : cases) whole.emplace_back(c, mesh_config.dp * mesh_config.ep);
  run_ranks(mesh_config, [&](const Mesh& mesh) {
    for (size_t i = 0; i < cases.size(); ++i) expect_same(cases[i], whole[i], mesh);
  });
}

}  // namespace hymoe
