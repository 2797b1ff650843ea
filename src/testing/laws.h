#pragma once

#include <functional>
#include <string>
#include <vector>

#include "hymoe/testing/conformance.h"

// What the checks of routers, experts and models share. A law returns what is wrong, or nothing.
namespace hymoe::laws {

using Law = std::function<std::string()>;

/// Runs one law; an exception is a failure.
void check(Report& report, const std::string& name, const Law& law);

/// The same, but where it is declared not to be kept, what is wrong is only told.
void check_unless(Report& report, bool declared, const std::string& name, const Law& law);

/// Largest absolute value, 0 of nothing.
double largest(const Tensor& x);

/// Whether a and b are further apart than `tolerance`, or not to be compared (NaN).
bool differ(const Tensor& a, const Tensor& b, double tolerance);

/// Documents of these numbers of rows, one after another.
Packing packing_of(const std::vector<int64_t>& rows);

/// Another number of threads than before, in a scope.
class OtherThreads {
 public:
  OtherThreads();
  ~OtherThreads();
  OtherThreads(const OtherThreads&) = delete;
  OtherThreads& operator=(const OtherThreads&) = delete;

 private:
  int before_;
};

using Leaves = std::vector<std::pair<std::string, Tensor>>;

/// Autograd's gradient of f() against central differences at some entries of every leaf (double). Without
/// `exact` f() is computed in single precision.
std::string compare_gradients(const std::function<Tensor()>& f, const Leaves& leaves, bool exact);

}  // namespace hymoe::laws
