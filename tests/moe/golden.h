#pragma once

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/io/safetensors.h"
#include "moe/layers.h"

namespace hymoe {

inline const std::filesystem::path kData = HYMOE_SOURCE_DIR "/../shared/data";

/// The references of a folder whose names begin with `prefix`.
inline std::vector<std::filesystem::path> files(const std::string& folder, const std::string& prefix) {
  std::vector<std::filesystem::path> found;
  if (!std::filesystem::is_directory(kData / folder)) return found;
  for (const auto& entry : std::filesystem::directory_iterator(kData / folder)) {
    const std::string name = entry.path().filename();
    if (name.starts_with(prefix) && name.ends_with(".safetensors")) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// One reference file.
class Golden {
 public:
  explicit Golden(const std::filesystem::path& path) : file_(path) {}

  Tensor get(const std::string& name) const { return file_.tensor(name).clone(); }
  std::string text(const std::string& key) const { return file_.metadata().at(key); }
  int64_t number(const std::string& key) const { return std::stoll(text(key)); }
  double real(const std::string& key) const { return std::stod(text(key)); }

  /// [E, 2F, H] and [E, H, F] of the experts prefix.0, prefix.1, ...; `what` is "" or "grad.".
  Tensor gate_up(const std::string& prefix, int64_t experts, const std::string& what = "") const {
    std::vector<Tensor> all;
    for (int64_t e = 0; e < experts; ++e) {
      const std::string expert = what + prefix + "." + std::to_string(e);
      all.push_back(at::cat({get(expert + ".gate_proj.weight"), get(expert + ".up_proj.weight")}));
    }
    return at::stack(all);
  }
  Tensor down(const std::string& prefix, int64_t experts, const std::string& what = "") const {
    std::vector<Tensor> all;
    for (int64_t e = 0; e < experts; ++e) {
      all.push_back(get(what + prefix + "." + std::to_string(e) + ".down_proj.weight"));
    }
    return at::stack(all);
  }

 private:
  SafetensorsFile file_;
};

/// To 1e-5 of the largest magnitude wanted.
inline void expect_close(const Tensor& got, const Tensor& want, const std::string& what) {
  ASSERT_TRUE(got.defined()) << what;
  ASSERT_EQ(got.numel(), want.numel()) << what;
  EXPECT_LE(max_difference(got.reshape(want.sizes()), want), 1e-5 * max_abs(want)) << what;
}

inline void set(MoE& moe, const std::string& name, const Tensor& value) {
  at::NoGradGuard no_grad;
  Tensor parameter = moe->named_parameters()[name];
  ASSERT_EQ(parameter.sizes(), value.sizes()) << name;
  parameter.copy_(value);
}

inline Tensor grad(MoE& moe, const std::string& name) { return moe->named_parameters()[name].grad(); }

inline std::string case_name(const testing::TestParamInfo<std::filesystem::path>& info) {
  return info.param.stem();
}

}  // namespace hymoe
