#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include "testing/laws.h"

namespace hymoe {
namespace {

using namespace laws;

constexpr double kTolerance = 1e-10;

class ExpertsLaws {
 public:
  ExpertsLaws(const std::function<std::shared_ptr<Experts>()>& make, const ExpertsCheckOptions& options)
      : options_(options),
        counts_(at::tensor(options.rows_per_expert, at::kLong)),
        total_(total_of(counts_)) {
    torch::manual_seed(options.seed);
    experts_ = make();
    if (options.make_part) {  // out of the weights as made: their copies become double without a loss
      const int64_t all = counts_.numel(), half = all / 2;
      for (const auto& [begin, end] : {std::pair(int64_t{0}, half), {half, all}})
        parts_.push_back(options.make_part(*experts_, begin, end));
    }
    for (Experts* pool : pools()) {
      pool->to(at::kDouble);
      pool->eval();
    }
    x_ = at::randn({total_, options.dim}, at::kDouble);
  }

  std::string form();
  std::string independence();
  std::string gradients();
  std::string no_rows(bool of_any);
  std::string strides();
  std::string parallelism();
  std::string determinism();

 private:
  static int64_t total_of(const Tensor& counts) { return counts.sum().item<int64_t>(); }
  std::vector<Experts*> pools() const {
    std::vector<Experts*> all{experts_.get()};
    for (const auto& part : parts_) all.push_back(part.get());
    return all;
  }
  Tensor run(const Tensor& rows) { return experts_->forward(rows, counts_); }

  ExpertsCheckOptions options_;
  Tensor counts_;
  int64_t total_;
  std::shared_ptr<Experts> experts_;
  std::vector<std::shared_ptr<Experts>> parts_;
  Tensor x_;
};

std::string ExpertsLaws::form() {
  const Tensor y = run(x_);
  return y.sizes() == x_.sizes() && y.scalar_type() == x_.scalar_type() ? "" : "the result must be as rows";
}

std::string ExpertsLaws::independence() {
  at::NoGradGuard no_grad;
  const Tensor y = run(x_);
  std::vector<Tensor> order;  // each expert's rows, last first
  for (const Tensor& part : at::arange(total_).split_with_sizes(options_.rows_per_expert))
    order.push_back(part.flip(0));
  const Tensor flipped = at::cat(order);
  if (differ(run(x_.index_select(0, flipped)), y.index_select(0, flipped), kTolerance))
    return "the result depends on the order of an expert's rows";
  for (int64_t row = 0; row < total_; ++row) {
    Tensor changed = x_.clone();
    changed[row] = at::randn({options_.dim}, at::kDouble);
    Tensor other = run(changed);
    other[row] = y[row];
    if (differ(other, y, kTolerance))
      return "changing row " + std::to_string(row) + " changed the result of another row";
  }
  return {};
}

std::string ExpertsLaws::gradients() {
  Leaves leaves{{"rows", x_.clone().set_requires_grad(true)}};
  for (const auto& item : experts_->named_parameters()) leaves.emplace_back(item.key(), item.value());
  const Tensor cotangent = at::randn_like(x_);
  return compare_gradients([&] { return (run(leaves[0].second) * cotangent).sum(); }, leaves, /*exact=*/true);
}

std::string ExpertsLaws::no_rows(bool of_any) {
  experts_->zero_grad();
  const Tensor y =
      of_any ? experts_->forward(x_.slice(0, 0, 0), at::zeros_like(counts_)) : experts_->forward(x_, counts_);
  if (!experts_->parameters().empty() && !y.requires_grad())
    return "missing zero gradient of every parameter";
  if (y.requires_grad()) y.sum().backward();
  for (const auto& item : experts_->named_parameters()) {
    if (!item.value().grad().defined()) return "missing zero gradient of " + item.key();
    if (of_any && largest(item.value().grad()) > 0) return "a gradient out of no rows: " + item.key();
  }
  return {};
}

std::string ExpertsLaws::strides() {
  at::NoGradGuard no_grad;
  return differ(run(x_.t().contiguous().t()), run(x_), kTolerance) ? "the strides of rows matter" : "";
}

std::string ExpertsLaws::parallelism() {
  const Tensor x = x_.clone().set_requires_grad(true), cotangent = at::randn_like(x_);
  const int64_t half = counts_.numel() / 2, first = total_of(counts_.slice(0, 0, half));
  const auto rows = x.split_with_sizes({first, total_ - first});
  const Tensor of_parts = at::cat({parts_[0]->forward(rows[0], counts_.slice(0, 0, half)),
                                   parts_[1]->forward(rows[1], counts_.slice(0, half))});
  const Tensor whole = run(x);
  if (differ(of_parts, whole, kTolerance)) return "two halves of the pool give another result than the whole";
  const auto gradient = [&](const Tensor& y) { return torch::autograd::grad({y}, {x}, {cotangent})[0]; };
  return differ(gradient(of_parts), gradient(whole), kTolerance)
             ? "two halves of the pool give another gradient than the whole"
             : "";
}

std::string ExpertsLaws::determinism() {
  at::NoGradGuard no_grad;
  const Tensor y = run(x_);
  if (!at::equal(y, run(x_))) return "two calls on the same rows differ";
  const OtherThreads threads;
  return differ(y, run(x_), kTolerance) ? "another number of threads changes the result" : "";
}

}  // namespace

Report check_experts(const std::function<std::shared_ptr<Experts>()>& make,
                     const ExpertsCheckOptions& options) {
  Report report;
  std::unique_ptr<ExpertsLaws> laws;
  check(report, "construction", [&] {
    laws = std::make_unique<ExpertsLaws>(make, options);
    return std::string();
  });
  if (!laws) return report;
  check(report, "form", [&] { return laws->form(); });
  check(report, "independence of rows", [&] { return laws->independence(); });
  check(report, "gradients", [&] { return laws->gradients(); });
  check(report, "experts without rows", [&] { return laws->no_rows(/*of_any=*/false); });
  check(report, "no rows", [&] { return laws->no_rows(/*of_any=*/true); });
  check(report, "non-contiguous rows", [&] { return laws->strides(); });
  if (options.make_part) check(report, "expert parallelism", [&] { return laws->parallelism(); });
  check(report, "determinism", [&] { return laws->determinism(); });
  return report;
}

}  // namespace hymoe
