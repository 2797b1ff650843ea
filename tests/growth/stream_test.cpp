#include "growth/stream.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "temporary_folder.h"

namespace hymoe {
namespace {

constexpr int64_t kMany = 5'000'001;  // more than is made or written at a time, and no multiple of anything

Tensor noised(const Tensor& values, double share, at::ScalarType dtype) {
  std::vector<Tensor> runs;
  put_with_noise(values, share, 1, "name", dtype, [&](const Tensor& run) { runs.push_back(run); });
  return at::cat(runs);
}

TEST(Stream, DrawsTheSameNoiseOnAnyNumberOfThreads) {
  const Tensor values = 3 + 0.5 * at::randn({kMany});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Tensor alone = noised(values, 0.1, at::kFloat);
  at::set_num_threads(3);
  const Tensor together = noised(values, 0.1, at::kFloat);
  at::set_num_threads(before);
  EXPECT_TRUE(alone.equal(together));

  const Tensor noise = alone - values;
  EXPECT_NEAR(noise.std().item<double>(), 0.05, 1e-4);
  EXPECT_NEAR(noise.mean().item<double>(), 0, 1e-4);
  for (const int64_t shift : {1 << 15, 1 << 22}) {  // parts are not drawn alike
    const Tensor shifted = noise.narrow(0, shift, kMany - shift) * noise.narrow(0, 0, kMany - shift);
    EXPECT_NEAR(shifted.mean().item<double>() / 0.0025, 0, 0.01);
  }
  EXPECT_TRUE(noised(values, 0.1, at::kBFloat16).equal(alone.to(at::kBFloat16)));
}

TEST(Stream, WritesWhatIsHandedOnInTheDtypeOfTheTensor) {
  const TemporaryFolder folder;
  const Tensor values = at::randn({3, kMany}), few = at::randn({7});
  std::vector<NewTensor> tensors{{{"many", at::kBFloat16, {3, kMany}}, {}},
                                 {{"zero", at::kFloat, {4}}, {}},
                                 {{"few", at::kFloat, {7}}, {}}};
  tensors[0].make = [&](const NewTensor::Put& put) {
    put(values.narrow(0, 0, 2));
    put(values[2].to(at::kBFloat16));
  };
  tensors[2].make = [&](const NewTensor::Put& put) { put(few); };
  Sha256 seen;
  write_tensors(
      folder.path(), "model", tensors, {}, [](const char*, int64_t, int64_t) {},
      [&](const std::string& name, const Tensor& run) {
        if (name == "many")
          seen.update(std::span(static_cast<const std::byte*>(run.const_data_ptr()), run.nbytes()));
      });
  const SafetensorsFolder written(folder.path());
  const Tensor many = written.tensor("many");
  EXPECT_TRUE(many.equal(values.to(at::kBFloat16)));
  EXPECT_TRUE(written.tensor("zero").eq(0).all().item<bool>());
  EXPECT_TRUE(written.tensor("few").equal(few));
  EXPECT_EQ(seen.hex(),
            sha256(std::span(static_cast<const std::byte*>(many.const_data_ptr()), many.nbytes())));
}

}  // namespace
}  // namespace hymoe
