#include <sys/mman.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <regex>
#include <sstream>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"
#include "hymoe/ops/permute.h"
#include "hymoe/ops/plain.h"
#include "kernels/adamw.h"
#include "kernels/cross_entropy.h"
#include "kernels/gate.h"
#include "kernels/grouped.h"
#include "kernels/norm.h"
#include "kernels/pack.h"
#include "kernels/permute.h"
#include "kernels/rotary.h"
#include "kernels/segment.h"
#include "kernels/sparse_mixer.h"
#include "kernels/swiglu.h"
#include "ops/device.h"
#include "ops/gradcheck.h"

// Every kernel on so many rows that offsets have more than 32 bits: the last blocks of the grid, on buffers
// of which nothing but the last rows is ever touched, must give what the kernel gives for those rows alone.
namespace hymoe::ops {
namespace {

using namespace hymoe::testing;
using device::address, device::data;

constexpr int64_t kLast = 8;  // rows that are there
constexpr int64_t kRows = (int64_t{1} << 32) + kLast;
constexpr int64_t kGridRows = 0x7fffffff;  // of kernels that give a row a block
constexpr auto kFloat = kernels::DType::kFloat32;

/// Zeros, which take memory where they are written.
Tensor sparse(at::IntArrayRef sizes, at::ScalarType type) {
  size_t bytes = c10::elementSize(type);
  for (const int64_t size : sizes) bytes *= size;
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED, "mmap: no room for ", bytes, " bytes of addresses");
  return at::from_blob(
      memory, sizes, [bytes](void* p) { munmap(p, bytes); }, at::TensorOptions(type));
}

/// Makes tensors of `rows` rows: -1 in their sizes. No other size is kLast.
struct Buffers {
  int64_t rows;
  int64_t first() const { return rows - kLast; }

  Tensor zeros(std::vector<int64_t> sizes, at::ScalarType type = at::kFloat) const {
    std::replace(sizes.begin(), sizes.end(), int64_t{-1}, rows);
    return sparse(sizes, type);
  }
  Tensor last(const Tensor& x) const {
    const int64_t dim = std::find(x.sizes().begin(), x.sizes().end(), rows) - x.sizes().begin();
    return x.narrow(dim, first(), kLast);
  }
  /// Zeros, and in the last rows:
  Tensor normal(const std::vector<int64_t>& sizes, at::ScalarType type = at::kFloat) const {
    const Tensor x = zeros(sizes, type);
    last(x).copy_(at::randn(last(x).sizes()));
    return x;
  }
  Tensor integers(const std::vector<int64_t>& sizes, const std::vector<int64_t>& values) const {
    const Tensor x = zeros(sizes, at::kLong);
    last(x).copy_(ints(values).view(last(x).sizes()));
    return x;
  }
  /// Numbers of last rows, counted from the first of these; -1 is none.
  Tensor row_numbers(const std::vector<int64_t>& sizes, std::vector<int64_t> values) const {
    for (int64_t& value : values) value += value < 0 ? 0 : first();
    return integers(sizes, values);
  }
};

Tensors gather_rows(const Buffers& b) {
  const Tensor x = b.normal({-1, 4}), source = b.row_numbers({-1}, {3, -1, 0, 7, 7, 2, -1, 5}),
               rows = b.normal({-1, 4});
  kernels::gather_rows({address(x), data<int64_t>(source), address(rows), b.rows, 4, kFloat, kFloat},
                       nullptr);
  return {b.last(rows)};
}

Tensors pack_rows(const Buffers& b) {
  const Tensor x = b.normal({-1, 4}), source = b.row_numbers({-1}, {3, -1, 0, 7, 7, 2, -1, 5}),
               packed = b.zeros({-1, 8}, at::kByte);
  kernels::pack_rows({address(x), data<int64_t>(source), address(packed), b.rows, 4, kFloat}, nullptr);
  return {b.last(packed)};
}

Tensors unpack_rows(const Buffers& b) {
  const Tensor packed = b.zeros({-1, 8}, at::kByte), rows = b.normal({-1, 4}),
               source = b.row_numbers({-1}, {3, -1, 0, 7, 7, 2, -1, 5});
  b.last(packed).copy_(plain::pack_rows(at::randn({kLast, 4}), at::arange(kLast), at::kFloat8_e4m3fn));
  kernels::unpack_rows({address(packed), data<int64_t>(source), address(rows), b.rows, 4, kFloat}, nullptr);
  return {b.last(rows)};
}

Tensor two_slots(const Buffers& b) {
  return b.row_numbers({-1, 2}, {3, -1, 0, 7, -1, -1, 1, 2, 6, -1, -1, 4, 5, -1, -1, -1});
}

Tensors gather_sum(const Buffers& b) {
  const Tensor rows = b.normal({-1, 4}), weights = b.normal({-1, 2}), slots = two_slots(b),
               base = b.normal({-1, 4}), base_weight = b.normal({-1}), y = b.zeros({-1, 4});
  kernels::gather_sum({address(rows), address(weights), data<int64_t>(slots), address(base),
                       address(base_weight), address(y), b.rows, 2, 4, kFloat},
                      nullptr);
  return {b.last(y)};
}

Tensors gather_sum_backward(const Buffers& b) {
  const Tensor dy = b.normal({-1, 4}), rows = b.normal({-1, 4}), weights = b.normal({-1, 2}),
               slots = two_slots(b), base = b.normal({-1, 4}), base_weight = b.normal({-1});
  const Tensor d_rows = b.zeros({-1, 4}), d_weights = b.zeros({-1, 2}), d_base = b.zeros({-1, 4}),
               d_base_weight = b.zeros({-1});
  kernels::gather_sum_backward({address(dy), address(rows), address(weights), data<int64_t>(slots),
                                address(base), address(base_weight), address(d_rows), address(d_weights),
                                address(d_base), address(d_base_weight), b.rows, 2, 4, kFloat},
                               nullptr);
  return {b.last(d_rows), b.last(d_weights), b.last(d_base), b.last(d_base_weight)};
}

Tensors topk(const Buffers& b) {
  const Tensor scores = b.normal({-1, 5}), ids = b.zeros({-1, 2}, at::kLong);
  kernels::topk({address(scores), data<int64_t>(ids), b.rows, 5, 2, kFloat}, nullptr);
  return {b.last(ids)};
}

// Two of five experts, and a shared one.
kernels::Gating gating(int64_t rows) { return {rows, 5, 2, true, false, true, false, 1.5}; }

Tensors gate(const Buffers& b) {
  const Tensor logits = b.normal({-1, 6}), bias = at::randn({5}), ids = b.zeros({-1, 2}, at::kLong),
               weights = b.zeros({-1, 2}), shared = b.zeros({-1}), scores = b.zeros({-1, 6});
  kernels::gate({address(logits), address(bias), data<int64_t>(ids), address(weights), address(shared),
                 address(scores), gating(b.rows), kFloat},
                nullptr);
  return {b.last(ids), b.last(weights), b.last(shared), b.last(scores)};
}

Tensor two_experts(const Buffers& b) {
  return b.integers({-1, 2}, {3, 0, 4, 1, 2, 3, 1, 0, 0, 4, 2, 1, 3, 4, 4, 0});
}

Tensors gate_backward(const Buffers& b) {
  const Tensor logits = b.normal({-1, 6}), ids = two_experts(b), d_weights = b.normal({-1, 2}),
               d_shared = b.normal({-1}), d_scores = b.normal({-1, 6}), d_logits = b.zeros({-1, 6});
  kernels::gate_backward({address(logits), data<int64_t>(ids), address(d_weights), address(d_shared),
                          address(d_scores), address(d_logits), gating(b.rows), kFloat},
                         nullptr);
  return {b.last(d_logits)};
}

kernels::Mixing mixing(int64_t rows) { return {rows, 5, 2, 5.0, false, true, 7}; }

// With numbers that are given, and with those of the seed, which are given for the last rows alone.
Tensors sparse_mixer(const Buffers& b) {
  const auto mix = [&](const Tensor& logs, const Tensor& uniforms) {
    const Tensor logits = b.normal({-1, 5}), ids = b.zeros({-1, 2}, at::kLong), weights = b.zeros({-1, 2}),
                 scores = b.zeros({-1, 5});
    kernels::sparse_mixer({address(logits), address(logs), address(uniforms), data<int64_t>(ids),
                           address(weights), address(scores), mixing(b.rows), kFloat},
                          nullptr);
    return Tensors{b.last(ids), b.last(weights), b.last(scores)};
  };
  Tensor logs = b.normal({2, -1, 5}), uniforms = b.normal({2, -1});
  b.last(uniforms).add_(1);  // many above what decides
  Tensors found = mix(logs, uniforms);
  logs.reset();
  uniforms.reset();
  if (b.rows == kLast) {
    logs = b.zeros({2, -1, 5});
    uniforms = b.zeros({2, -1});
    for (int64_t i = 0; i < 2 * kLast; ++i) {
      const int64_t round = i / kLast, row = i % kLast;
      const auto word = [&](uint32_t block) {
        return kernels::mixer_words(mixing(0).seed, kRows - kLast + row, round, block).at[0];
      };
      for (int64_t e = 0; e < 5; ++e)
        logs[round][row][e] = kernels::exact_log(kernels::exponential(word(static_cast<uint32_t>(e))));
      uniforms[round][row] = kernels::uniform(word(kernels::kUniformBlock));
    }
  }
  const Tensors drawn = mix(logs, uniforms);
  found.insert(found.end(), drawn.begin(), drawn.end());
  return found;
}

Tensors sparse_mixer_backward(const Buffers& b) {
  const Tensor logits = b.normal({-1, 5}), ids = two_experts(b), d_weights = b.normal({-1, 2}),
               d_scores = b.normal({-1, 5}), d_logits = b.zeros({-1, 5});
  kernels::sparse_mixer_backward({address(logits), data<int64_t>(ids), address(d_weights), address(d_scores),
                                  address(d_logits), mixing(b.rows), kFloat},
                                 nullptr);
  return {b.last(d_logits)};
}

// As many units as rows; the last eight of them have the last rows.
struct Units {
  Tensor offsets, padding;
  explicit Units(const Buffers& b)
      : offsets(sparse({b.rows + 1}, at::kLong)), padding(b.zeros({-1}, at::kBool)) {
    offsets.narrow(0, b.first(), kLast + 1).copy_(ints({0, 3, 3, 4, 8, 8, 8, 8, 8}) + b.first());
    padding[b.rows - 2] = true;
  }
};

Tensors segment_pool(const Buffers& b) {
  const Tensor x = b.normal({-1, 12}), max = b.zeros({-1, 12}), mean = b.zeros({-1, 12}),
               source = b.zeros({-1, 12}, at::kLong);
  const Units units(b);
  const auto pool = [&](const Tensor& y, int64_t* source_row) {
    kernels::segment_pool({address(x), data<int64_t>(units.offsets), data<bool>(units.padding), address(y),
                           source_row, b.rows, b.rows, 12, kFloat},
                          nullptr);
  };
  pool(max, data<int64_t>(source));
  pool(mean, nullptr);
  const Tensor row = b.last(source);
  return {b.last(max), b.last(mean), at::where(row < 0, row, row - b.first())};
}

Tensors segment_pool_backward(const Buffers& b) {
  const Tensor dy = b.normal({-1, 3}), of_max = b.zeros({-1, 3}), of_mean = b.zeros({-1, 3});
  const Tensor source = b.row_numbers(
      {-1, 3}, {0, 2, 1, -1, -1, -1, 3, 3, 3, 7, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1});
  const Units units(b);
  const auto back = [&](const Tensor& dx, int64_t* source_row) {
    kernels::segment_pool_backward({address(dy), data<int64_t>(units.offsets), data<bool>(units.padding),
                                    source_row, address(dx), b.rows, b.rows, 3, kFloat},
                                   nullptr);
  };
  back(of_max, data<int64_t>(source));
  back(of_mean, nullptr);
  return {b.last(of_max), b.last(of_mean)};
}

Tensors rank_among_earlier(const Buffers& b) {
  const Tensor values = b.normal({3, -1}), position = b.integers({-1}, {0, 1, 2, 0, 1, 2, 3, 4}),
               rank = b.zeros({3, -1}, at::kLong);
  kernels::rank_among_earlier(
      {data<float>(values), data<int64_t>(position), data<int64_t>(rank), b.rows, 3, kFloat}, nullptr);
  return {b.last(rank)[2]};  // the last block is of the last column
}

Tensors take_in_order(const Buffers& b) {
  const Tensor order = b.row_numbers(
                   {3, -1}, {3, 1, 0, 7, 2, 6, 4, 5, 7, 0, 3, 1, 2, 5, 4, 6, 0, 1, 3, 7, 2, 4, 5, 6}),
               size = b.integers({-1}, {1, 2, 0, 3, 1, 1, 2, 1}), limit = at::full({1}, 6., at::kDouble),
               begin = ints({b.first(), b.rows}), taken = b.zeros({-1, 3}, at::kBool),
               times = b.zeros({-1}, at::kInt);
  kernels::take_in_order({data<int64_t>(order), data<int64_t>(size), data<double>(limit),
                          data<int64_t>(begin), data<bool>(taken), data<int32_t>(times), 1, b.rows, 3, 2},
                         nullptr);
  return {b.last(taken), b.last(times)};
}

Tensors swiglu(const Buffers& b) {
  const Tensor gate_up = b.normal({-1, 24}), h = b.zeros({-1, 12});
  kernels::swiglu({address(gate_up), address(h), b.rows, 12, 24, kFloat}, nullptr);
  return {b.last(h)};
}

Tensors swiglu_backward(const Buffers& b) {
  const Tensor gate_up = b.normal({-1, 24}), dh_to_h = b.normal({-1, 12}), d = b.zeros({-1, 24});
  kernels::swiglu_backward({address(gate_up), address(dh_to_h), address(d), b.rows, 12, 24, kFloat}, nullptr);
  return {b.last(dh_to_h), b.last(d)};
}

Tensors rms_norm(const Buffers& b) {
  const Tensor x = b.normal({-1, 12}), weight = at::randn({12}), y = b.zeros({-1, 12}), rstd = b.zeros({-1});
  kernels::rms_norm({address(x), address(weight), address(y), address(rstd), b.rows, 12, 1e-5, kFloat},
                    nullptr);
  return {b.last(y), b.last(rstd)};
}

Tensors rms_norm_backward(const Buffers& b) {
  const int64_t parts = b.rows / 4;
  const Tensor x = b.normal({-1, 12}), weight = at::randn({12}), dy = b.normal({-1, 12}),
               rstd = b.normal({-1}), dx = b.zeros({-1, 12}), d_weight = sparse({parts, 12}, at::kFloat);
  kernels::rms_norm_backward({address(x), address(weight), address(dy), address(rstd), address(dx),
                              address(d_weight), b.rows, 12, parts, kFloat},
                             nullptr);
  return {b.last(dx), d_weight.narrow(0, parts - 2, 2)};
}

Tensors rotary(const Buffers& b) {
  const Tensor x = b.normal({-1, 2, 16}), positions = b.integers({-1}, {0, 1, 2, 3, 100, 0, 1, 7}),
               inv_freq = at::rand({16}), y = b.zeros({-1, 2, 16});
  kernels::rotary({address(x), data<int64_t>(positions), data<float>(inv_freq), address(y), b.rows, 2, 16, 32,
                   16, -1, kFloat},
                  nullptr);
  return {b.last(y)};
}

Tensor targets_of(const Buffers& b) { return b.integers({-1}, {3, 0, 11, -100, 5, 14, 2, 1}); }

Tensors loss_rows(const Buffers& b) {
  const Tensor logits = b.normal({-1, 15}), targets = targets_of(b), weights = b.normal({-1}),
               nll = b.zeros({-1});
  kernels::loss_rows(
      {address(logits), data<int64_t>(targets), address(weights), address(nll), b.rows, 15, kFloat}, nullptr);
  return {b.last(nll), b.last(logits)};
}

Tensors loss_pieces(const Buffers& b) {
  const Tensor logits = b.normal({-1, 12}), targets = targets_of(b), top = b.zeros({-1}), sum = b.zeros({-1}),
               own = b.zeros({-1});
  kernels::loss_pieces({address(logits), data<int64_t>(targets), address(top), address(sum), address(own),
                        b.rows, 12, 1, kFloat},
                       nullptr);
  return {b.last(top), b.last(sum), b.last(own)};
}

Tensors loss_gradient(const Buffers& b) {
  const Tensor logits = b.normal({-1, 12}), targets = targets_of(b), weights = b.normal({-1}),
               top = b.normal({-1}), sum = b.normal({-1});
  kernels::loss_gradient({address(logits), data<int64_t>(targets), address(weights), address(top),
                          address(sum), b.rows, 12, 1, kFloat},
                         nullptr);
  return {b.last(logits)};
}

Tensors adamw(const Buffers& b) {
  const Tensor gradient = b.normal({-1}), target = b.normal({-1}), m = b.normal({-1}), v = b.normal({-1}),
               parameter = b.zeros({-1}, at::kBFloat16);
  b.last(v).abs_();
  kernels::adamw({address(gradient), data<float>(target), data<float>(m), data<float>(v), address(parameter),
                  b.rows - 1, 2, 0.1, 0.05, 0.99, 0.01, 0.5, 1e-6, kFloat, kernels::DType::kBFloat16},
                 nullptr);
  return {b.last(target), b.last(m), b.last(v), b.last(parameter)};
}

// Small matrices, and one that is large.
Tensors zero_without_rows(const Buffers& b) {
  const Tensor small = b.normal({-1, 4}), large = b.normal({-1, 4}),
               counts = b.integers({-1}, {0, 1, 0, 5, 5, 0, 1, 0}), none = ints({0});
  kernels::zero_without_rows({address(small), data<int64_t>(counts), b.rows, 16}, nullptr);
  kernels::zero_without_rows({address(large), data<int64_t>(none), 1, b.rows * 16}, nullptr);
  return {b.last(small), b.last(large)};
}

struct Case {
  std::function<Tensors(const Buffers&)> run;
  int64_t rows = kRows, blocks = 1;  // and so many of these have the last rows
};

const std::map<std::string, Case> kCases = {
    {"gather_rows", {gather_rows}},
    {"pack_rows", {pack_rows}},
    {"unpack_rows", {unpack_rows}},
    {"gather_sum", {gather_sum}},
    {"gather_sum_backward", {gather_sum_backward}},
    {"topk", {topk}},
    {"gate", {gate}},
    {"gate_backward", {gate_backward}},
    {"sparse_mixer", {sparse_mixer}},
    {"sparse_mixer_backward", {sparse_mixer_backward}},
    {"segment_pool", {segment_pool}},
    {"segment_pool_backward", {segment_pool_backward}},
    {"rank_among_earlier", {rank_among_earlier}},
    {"take_in_order", {take_in_order}},
    {"swiglu", {swiglu, kGridRows, kLast}},
    {"swiglu_backward", {swiglu_backward, kGridRows, kLast}},
    {"rms_norm", {rms_norm}},
    {"rms_norm_backward", {rms_norm_backward}},
    {"rotary", {rotary}},
    {"loss_rows", {loss_rows, kGridRows, kLast}},
    {"loss_pieces", {loss_pieces, kGridRows, kLast}},
    {"loss_gradient", {loss_gradient, kGridRows, kLast}},
    {"adamw", {adamw}},
    {"zero_without_rows", {zero_without_rows, kGridRows, kLast}},
};

TEST(LargeOffsets, EveryKernelReachesTheLastRows) {
  for (const auto& [kernel, c] : kCases) {
    const auto run = [&, &c = c](int64_t rows) {
      torch::manual_seed(4);
      return c.run(Buffers{rows});
    };
    const int64_t before = emulation::launches(kernel);
    const Tensors expected = run(kLast);
    const emulation::LastBlocks last(c.blocks);
    const Tensors found = run(c.rows);
    EXPECT_GE(emulation::launches(kernel) - before, 2) << kernel;
    for (size_t i = 0; i < found.size(); ++i)
      EXPECT_TRUE(found[i].equal(expected[i])) << kernel << '\n' << found[i] << '\n' << expected[i];
  }
}

// Sorts count slots in 32 bits.
TEST(LargeOffsets, SortsRefuseThem) {
  const emulation::Emulate emulate;
  const Tensor ids = sparse({int64_t{1} << 31, 1}, at::kLong);
  expect_error([&] { sort_by_expert(ids, 3, 5); }, "expert_ids: more than 2^31 - 1 of them");
  expect_error([&] { rank_within_expert(ids, 3); }, "expert_ids: more than 2^31 - 1 of them");
}

TEST(LargeOffsets, TheTableHasEveryOtherKernel) {
  const std::regex launch("launch\\(\"([a-z_]+)\"");
  for (const auto& entry : std::filesystem::directory_iterator(HYMOE_SOURCE_DIR "/kernels")) {
    if (entry.path().extension() != ".cu" || entry.path().stem() == "sort") continue;
    std::stringstream text;
    text << std::ifstream(entry.path()).rdbuf();
    const std::string source = text.str();
    std::sregex_iterator found(source.begin(), source.end(), launch), end;
    EXPECT_NE(found, end) << entry.path();
    for (; found != end; ++found) EXPECT_TRUE(kCases.contains((*found)[1])) << (*found)[1];
  }
}

}  // namespace
}  // namespace hymoe::ops
