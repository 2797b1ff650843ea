#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/config/error.h"
#include "hymoe/io/safetensors.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {
namespace fs = std::filesystem;

NamedTensors some_tensors() {
  return {{"half", at::arange(24).to(at::kBFloat16).view({4, 6})},
          {"single", at::arange(24).mul(0.1).to(at::kFloat).view({2, 12})},
          {"scalar", at::full({}, 7, at::kLong)},
          {"empty", at::empty({0, 3})},
          {"bytes", at::arange(5, at::kByte)}};
}

std::vector<TensorSpec> specs_of(const NamedTensors& tensors) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors)
    specs.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  return specs;
}

// Elements [begin, end) of rank `rank`'s half of the columns of a matrix.
TensorPart columns(const std::string& name, const Tensor& matrix, int64_t rank, int64_t begin, int64_t end) {
  TensorPart part{.shard = {name, matrix.sizes().vec(), {{}, {rank, 2}}}, .begin = begin};
  part.values = part.shard.part_of(matrix).flatten().slice(0, begin, end).clone();
  return part;
}

TEST(SafetensorsLayoutTest, FilledByPartsTheFilesAreThoseOfTheWriter) {
  const NamedTensors tensors = some_tensors();
  for (const int64_t limit : {50, 100, 10'000}) {
    TemporaryFolder whole, parts;
    const auto written = write_safetensors_sharded(whole.path(), "m", tensors, limit);
    const SafetensorsLayout layout("m", specs_of(tensors), limit);
    layout.create(parts.path());
    const auto& half = tensors[0].second;
    const auto& single = tensors[1].second;
    layout.write(parts.path(), {columns("half", half, 1, 0, 5), columns("single", single, 0, 3, 12)});
    layout.write(parts.path(), {columns("half", half, 1, 5, 12), columns("single", single, 1, 0, 12)});
    layout.write(parts.path(), {columns("half", half, 0, 0, 12), columns("single", single, 0, 0, 3)});
    for (size_t i = 2; i < tensors.size(); ++i)
      layout.write(parts.path(), {TensorPart::whole(tensors[i].first, tensors[i].second)});
    for (const WrittenFile& file : written)
      EXPECT_EQ(sha256_file(parts / file.name), file.sha256) << file.name << " at " << limit;
    EXPECT_EQ(std::distance(fs::directory_iterator(parts.path()), {}), static_cast<int64_t>(written.size()));
  }
}

TEST(SafetensorsLayoutTest, RefusesAPartOfAnotherTensor) {
  TemporaryFolder folder;
  const SafetensorsLayout layout("m", specs_of(some_tensors()), 10'000);
  layout.create(folder.path());
  const auto error = [&](const TensorPart& part) {
    return message_of<c10::Error>([&] { layout.write(folder.path(), {part}); });
  };
  EXPECT_TRUE(holds(error(TensorPart::whole("other", at::zeros(1))), "no tensor is named other"));
  EXPECT_TRUE(holds(error(TensorPart::whole("half", at::zeros({4, 6}))),
                    "tensor half must be BFloat16 [4, 6], got Float [4, 6]"));
  EXPECT_TRUE(holds(error(TensorPart::whole("single", at::zeros({12, 2}))), "got Float [12, 2]"));
}

TEST(SafetensorsReadTest, FillsPartsInTheirOwnDtype) {
  TemporaryFolder folder;
  const NamedTensors tensors = some_tensors();
  write_safetensors_sharded(folder.path(), "model", tensors, 60);
  const SafetensorsFolder files(folder.path());
  for (const auto& [name, tensor] : {tensors[0], tensors[1]}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
      for (const int64_t rank : {0, 1}) {
        TensorPart part = columns(name, tensor, rank, 2, 11);
        const Tensor expected = part.values.to(dtype);
        part.values = at::full({9}, -1, dtype);
        files.read(part);
        EXPECT_TRUE(part.values.equal(expected)) << name << " " << dtype;
      }
    }
  }
  const Tensor scalar = at::zeros({}, at::kLong);
  files.read(TensorPart::whole("scalar", scalar));
  EXPECT_EQ(scalar.item<int64_t>(), 7);
}

TEST(SafetensorsReadTest, NamesWhatDoesNotFit) {
  TemporaryFolder folder;
  write_safetensors(folder / "model.safetensors", some_tensors());
  const SafetensorsFolder files(folder.path());
  const auto error = [&](const std::string& name, const Tensor& wanted) {
    return message_of<DataError>([&] { files.read(TensorPart::whole(name, wanted)); });
  };
  EXPECT_TRUE(holds(error("other", at::zeros(1)), "has no tensor \"other\""));
  EXPECT_TRUE(holds(error("half", at::zeros({6, 4})),
                    "model.safetensors: tensor \"half\": expected Float [6, 4], got BFloat16 [4, 6]"));
  EXPECT_TRUE(holds(error("scalar", at::zeros({})), "expected Float [], got Long []"));
}

TEST(ReserveFileTest, FindsAFullDiskBeforeAnythingIsWritten) {
  SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  EXPECT_EQ(message_of<DataError>([&] { reserve_file(disk / "a", 1 << 20); }),
            (disk / "a").string() + ": cannot reserve 1048576 bytes: No space left on device");
  fs::remove(disk / "a");
  reserve_file(disk / "b", 40'000);
  EXPECT_EQ(fs::file_size(disk / "b"), 40'000u);
  EXPECT_TRUE(holds(message_of<DataError>([&] { write_file_atomic(disk / "c", std::string(40'000, 'x')); }),
                    "No space left"));
  SharedFile(disk / "b").write(39'990, std::as_bytes(std::span("0123456789", 10)));
  EXPECT_EQ(read_text(disk / "b").substr(39'989), std::string("\0"
                                                              "0123456789",
                                                              11));
}

}  // namespace
}  // namespace hymoe
