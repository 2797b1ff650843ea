#include "testing/laws.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include <ATen/Parallel.h>
#include <torch/types.h>

namespace hymoe {

const char* to_text(Outcome outcome) {
  return outcome == Outcome::kPassed ? "passed" : outcome == Outcome::kFailed ? "FAILED" : "declared";
}

bool Report::ok() const {
  return std::none_of(findings.begin(), findings.end(),
                      [](const Finding& f) { return f.outcome == Outcome::kFailed; });
}

std::string Report::text() const {
  std::string all;
  for (const Finding& f : findings) {
    std::string outcome = to_text(f.outcome);
    outcome.resize(10, ' ');
    all += outcome + f.law + (f.detail.empty() ? "" : ": " + f.detail) + "\n";
  }
  return all;
}

namespace laws {
namespace {

std::string run(const Law& law) {
  try {
    return law();
  } catch (const c10::Error& error) {
    return std::string("threw: ") + error.what_without_backtrace();
  } catch (const std::exception& error) {
    return std::string("threw: ") + error.what();
  }
}

}  // namespace

void check(Report& report, const std::string& name, const Law& law) {
  const std::string wrong = run(law);
  report.findings.push_back({name, wrong.empty() ? Outcome::kPassed : Outcome::kFailed, wrong});
}

void check_unless(Report& report, bool declared, const std::string& name, const Law& law) {
  if (!declared) return check(report, name, law);
  const std::string wrong = run(law);
  report.findings.push_back(
      {name, Outcome::kDeclared, wrong.empty() ? "not kept, it says; nothing of it was seen" : wrong});
}

double largest(const Tensor& x) { return x.numel() == 0 ? 0 : x.detach().abs().max().item<double>(); }

bool differ(const Tensor& a, const Tensor& b, double tolerance) { return !(largest(a - b) <= tolerance); }

Packing packing_of(const std::vector<int64_t>& rows) {
  std::vector<int64_t> offsets{0};
  for (const int64_t n : rows) offsets.push_back(offsets.back() + n);
  Packing packing;
  packing.offsets = at::tensor(offsets, at::kLong);
  return packing;
}

OtherThreads::OtherThreads() : before_(at::get_num_threads()) { at::set_num_threads(before_ == 1 ? 2 : 1); }

OtherThreads::~OtherThreads() { at::set_num_threads(before_); }

std::string compare_gradients(const std::function<Tensor()>& f, const Leaves& leaves, bool exact) {
  constexpr int64_t kEntries = 8;
  const double step = exact ? 1e-6 : 1e-2, tolerance = exact ? 1e-5 : 5e-2;
  for (const auto& [name, leaf] : leaves) leaf.mutable_grad() = Tensor();
  f().backward();
  at::NoGradGuard no_grad;
  for (const auto& [name, leaf] : leaves) {
    const Tensor gradient = leaf.grad().defined() ? leaf.grad().flatten() : at::zeros({leaf.numel()});
    double* value = leaf.mutable_data_ptr<double>();
    const int64_t entries = std::min(kEntries, leaf.numel());
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t at = i * leaf.numel() / entries;
      const double original = value[at];
      value[at] = original + step;
      const double up = f().item<double>();
      value[at] = original - step;
      const double slope = (up - f().item<double>()) / (2 * step), got = gradient[at].item<double>();
      value[at] = original;
      if (!(std::abs(slope - got) <= tolerance * std::max(1.0, std::abs(slope)))) {
        return "the gradient of " + name + " is " + std::to_string(got) + " at entry " + std::to_string(at) +
               ", differences give " + std::to_string(slope);
      }
    }
  }
  return {};
}

}  // namespace laws
}  // namespace hymoe
