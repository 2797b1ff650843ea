#include "hymoe/io/safetensors.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>

#include <ATen/Functions.h>
#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {
namespace fs = std::filesystem;

std::string with_length(std::string_view header, std::string_view data, uint64_t length) {
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes.append(header).append(data);
}

/// A safetensors file of this header over that many bytes of data.
std::string raw(std::string_view header, size_t data_bytes) {
  return with_length(header, std::string(data_bytes, '\1'), header.size());
}

/// Reads everything a file offers; the sum keeps the reads from being dropped.
double read_all(const fs::path& path) {
  const SafetensorsFile file(path);
  double sum = 0;
  for (const std::string& name : file.names()) {
    const Tensor tensor = file.tensor(name);
    TORCH_CHECK(static_cast<int64_t>(tensor.nbytes()) == file.info(name).end - file.info(name).begin);
    for (const char byte :
         std::string_view(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes())) {
      sum += byte;
    }
  }
  return sum;
}

NamedTensors every_dtype() {
  NamedTensors tensors;
  for (const auto dtype : {at::kByte, at::kBool, at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf,
                           at::kBFloat16, at::kFloat, at::kDouble, at::kFloat8_e4m3fn, at::kFloat8_e5m2,
                           at::kUInt16, at::kUInt32, at::kUInt64}) {
    tensors.emplace_back(c10::toString(dtype), at::arange(15).remainder(2).reshape({3, 5}).to(dtype));
  }
  tensors.emplace_back("scalar", at::scalar_tensor(2.5));
  tensors.emplace_back("empty", at::empty({0, 7}));
  tensors.emplace_back("transposed", at::arange(6.0).reshape({2, 3}).t());
  return tensors;
}

void expect_same(const NamedTensors& tensors, const auto& file) {
  ASSERT_EQ(file.names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    ASSERT_TRUE(file.contains(name)) << name;
    const Tensor read = file.tensor(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    ASSERT_EQ(read.sizes(), tensor.sizes()) << name;
    EXPECT_EQ(std::memcmp(read.const_data_ptr(), tensor.contiguous().const_data_ptr(), tensor.nbytes()), 0)
        << name;
  }
}

TEST(SafetensorsTest, RoundTripsEveryDtypeAlignedAndMapped) {
  TemporaryFolder folder;
  const NamedTensors tensors = every_dtype();
  const WrittenFile written = write_safetensors(folder / "a.safetensors", tensors, {{"k", "v\n\"\xC3\xA4"}});
  EXPECT_EQ(written.name, "a.safetensors");
  EXPECT_EQ(written.size, static_cast<int64_t>(fs::file_size(folder / "a.safetensors")));
  EXPECT_EQ(written.sha256, sha256_file(folder / "a.safetensors"));
  const SafetensorsFile file(folder / "a.safetensors");
  expect_same(tensors, file);
  EXPECT_EQ(file.metadata().at("k"), "v\n\"\xC3\xA4");
  for (const std::string& name : file.names()) {
    if (file.tensor(name).numel() == 0) continue;
    EXPECT_EQ(file.tensor(name).const_data_ptr(), file.tensor(name).const_data_ptr())
        << name << " was copied";
  }
}

TEST(SafetensorsTest, SameInputSameBytes) {
  TemporaryFolder folder;
  EXPECT_EQ(write_safetensors(folder / "a", every_dtype()).sha256,
            write_safetensors(folder / "b", every_dtype()).sha256);
}

TEST(SafetensorsTest, KeepsTheGivenOrderWithinAnElementSize) {
  TemporaryFolder folder;
  write_safetensors(folder / "a", {{"z", at::ones(3)}, {"half", at::ones(3, at::kHalf)}, {"b", at::ones(2)}});
  EXPECT_EQ(SafetensorsFile(folder / "a").names(), (std::vector<std::string>{"z", "b", "half"}));
}

TEST(SafetensorsTest, ATensorOutlivesItsFile) {
  TemporaryFolder folder;
  write_safetensors(folder / "a", {{"x", at::arange(1000.0)}});
  const Tensor x = SafetensorsFile(folder / "a").tensor("x");
  fs::remove(folder / "a");
  EXPECT_EQ(x.sum().item<double>(), 499500.0);
}

TEST(SafetensorsTest, ReadsUnalignedTensorsByCopy) {
  TemporaryFolder folder;
  const float values[2] = {1.5f, -2.0f};
  std::string data = "\7";
  data.append(reinterpret_cast<const char*>(values), sizeof(values));
  const std::string header =
      R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  const SafetensorsFile file(folder.file("a", with_length(header, data, header.size())));
  EXPECT_EQ(file.tensor("x")[0].item<float>(), 1.5f);
  EXPECT_EQ(file.tensor("x")[1].item<float>(), -2.0f);
}

TEST(SafetensorsTest, AFileMayHoldNoTensors) {
  TemporaryFolder folder;
  write_safetensors(folder / "a", {}, {});
  EXPECT_TRUE(SafetensorsFile(folder / "a").names().empty());
}

TEST(SafetensorsTest, EveryTruncationIsAnError) {
  TemporaryFolder folder;
  const auto path = folder / "a";
  write_safetensors(path, every_dtype());
  std::ofstream(path, std::ios::binary | std::ios::app) << 'x';
  EXPECT_TRUE(holds(message_of<DataError>([&] { read_all(path); }), "belong to no tensor"));
  for (auto size = fs::file_size(path) - 1; size-- > 0;) {
    fs::resize_file(path, size);
    ASSERT_TRUE(holds(message_of<DataError>([&] { read_all(path); }), path.string() + ": "))
        << size << " bytes";
  }
}

TEST(SafetensorsTest, FlippedBitsAreErrorsOrAnotherValidFile) {
  TemporaryFolder folder;
  const auto path = folder / "a";
  write_safetensors(path, {{"x", at::ones({2, 3})}, {"y", at::ones(4, at::kHalf)}, {"z", at::ones({})}});
  const std::string whole = read_text(path);
  const size_t header = whole.rfind('}') + 1;
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  const auto put = [&](size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  size_t refused = 0;
  for (size_t bit = 0; bit < 8 * header; ++bit) {
    put(bit / 8, static_cast<char>(whole[bit / 8] ^ 1 << bit % 8));
    try {
      read_all(path);
    } catch (const DataError& error) {
      ++refused;
      ASSERT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    }
    put(bit / 8, whole[bit / 8]);
  }
  EXPECT_GT(refused, 6 * header);
}

struct Lie {
  std::string header;
  size_t data_bytes;
  std::string words;
};

class SafetensorsLieTest : public testing::TestWithParam<Lie> {};

TEST_P(SafetensorsLieTest, IsRefusedWithTheRightWords) {
  TemporaryFolder folder;
  const auto path = folder.file("a.safetensors", raw(GetParam().header, GetParam().data_bytes));
  const std::string message = message_of<DataError>([&] { read_all(path); });
  EXPECT_TRUE(holds(message, path.string() + ": "));
  EXPECT_TRUE(holds(message, GetParam().words));
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

INSTANTIATE_TEST_SUITE_P(
    Headers, SafetensorsLieTest,
    testing::Values(
        Lie{"", 0, "does not begin with '{'"}, Lie{"[]", 0, "does not begin with '{'"},
        Lie{"{", 0, "header is no valid JSON"}, Lie{"{\"\xC3\":1}", 0, "header is no valid JSON"},
        Lie{R"({"t":1})", 0, "tensor \"t\": must be an object"},
        Lie{R"({"t":{"dtype":"F32","shape":[]}})", 4,
            "tensor \"t\": must have dtype, shape and data_offsets"},
        Lie{R"({"t":{"dtype":"F32","shape":[],"data_offsets":[0,4],"more":1}})", 4, "unknown entry \"more\""},
        Lie{R"({"t":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4,
            "names \"dtype\" twice"},
        Lie{R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
            1, "header names \"t\" twice"},
        Lie{R"({"__metadata__":{"a":1}})", 0, "__metadata__: \"a\" must be a string"},
        Lie{R"({"__metadata__":[]})", 0, "__metadata__ must be an object"},
        Lie{one("\"F31\"", "[1]", "[0,4]"), 4, "tensor \"t\": unknown dtype \"F31\""},
        Lie{one("3", "[1]", "[0,4]"), 4, "tensor \"t\": dtype must be a string"},
        Lie{one("\"F32\"", "[-1]", "[0,4]"), 4, "tensor \"t\": shape must hold whole numbers"},
        Lie{one("\"F32\"", "[1.0]", "[0,4]"), 4, "tensor \"t\": shape must hold whole numbers"},
        Lie{one("\"F32\"", "[true]", "[0,4]"), 4, "tensor \"t\": shape must hold whole numbers"},
        Lie{one("\"F32\"", "[[1]]", "[0,4]"), 4, "header is nested too deeply"},
        Lie{one("\"F32\"", "1", "[0,4]"), 4, "tensor \"t\": shape must be a list"},
        Lie{one("\"F32\"", "[9223372036854775808]", "[0,4]"), 4, "got \"9223372036854775808\""},
        Lie{one("\"F32\"", "[99999999999999999999999]", "[0,4]"), 4, "shape must hold whole numbers"},
        Lie{one("\"F32\"", "[4294967296,4294967296]", "[0,4]"), 4,
            "shape [4294967296, 4294967296] overflows"},
        Lie{one("\"F32\"", "[0,4294967296,4294967296]", "[0,0]"), 0, "overflows"},
        Lie{one("\"F32\"", "[2]", "[0,4]"), 4, "data_offsets [0, 4] hold 4 bytes, but F32 [2] takes 8"},
        Lie{one("\"F32\"", "[1]", "[0,8]"), 8, "data_offsets [0, 8] hold 8 bytes, but F32 [1] takes 4"},
        Lie{one("\"F32\"", "[1]", "[4,0]"), 4, "data_offsets [4, 0] end before they begin"},
        Lie{one("\"F32\"", "[1]", "[0,4]"), 3,
            "data_offsets [0, 4] reach past the end of the data (3 bytes)"},
        Lie{one("\"F32\"", "[1]", "[0]"), 4, "data_offsets must be two numbers, got 1"},
        Lie{one("\"F32\"", "[1]", "[-4,0]"), 4, "data_offsets must hold whole numbers"},
        Lie{one("\"F32\"", "[1]", "[0,18446744073709551615]"), 4, "data_offsets must hold whole numbers"},
        Lie{one("\"F32\"", "[1]", "[0,9223372036854775807]"), 4, "reach past the end of the data (4 bytes)"},
        Lie{one("\"F32\"", "[1]", "[4,8]"), 8, "tensor \"t\": bytes 0 to 4 of the data belong to no tensor"},
        Lie{one("\"F32\"", "[1]", "[0,4]"), 8, ": bytes 4 to 8 of the data belong to no tensor"},
        Lie{R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
            12, "tensor \"b\": data_offsets [4, 12] overlap tensor \"a\""},
        Lie{R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
            8, "tensor \"b\": data_offsets [0, 8] overlap tensor \"a\""},
        Lie{R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}})",
            8, "tensor \"b\": data_offsets [4, 4] overlap tensor \"a\""},
        Lie{"{\"a\\nb\":1}", 0, "tensor \"a\\nb\": must be"},
        Lie{"{\"a\":" + std::string(100'000, '['), 0, "header is nested too deeply"}));

TEST(SafetensorsTest, HeaderLengthIsChecked) {
  TemporaryFolder folder;
  const auto error = [&](uint64_t length) {
    return message_of<DataError>([&] { read_all(folder.file("a", with_length("{}", "", length))); });
  };
  EXPECT_TRUE(holds(error(3), "header of 3 bytes reaches past the end of the file (10 bytes)"));
  EXPECT_TRUE(holds(error(100'000'001), "header length 100000001 is over the limit of 100000000"));
  EXPECT_TRUE(holds(error(~uint64_t{0}), "over the limit"));
  EXPECT_TRUE(holds(error(~uint64_t{0} - 7), "over the limit"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { read_all(folder.file("a", "1234567")); }), "too short"));
}

TEST(SafetensorsTest, NamesAMissingTensor) {
  TemporaryFolder folder;
  write_safetensors(folder / "a", {{"x", at::ones(1)}});
  const SafetensorsFile file(folder / "a");
  EXPECT_EQ(message_of<DataError>([&] { file.tensor("y"); }),
            (folder / "a").string() + ": has no tensor \"y\"");
}

TEST(WriteSafetensorsTest, ChecksItsInput) {
  TemporaryFolder folder;
  const auto error = [&](const NamedTensors& tensors) {
    return message_of<c10::Error>([&] { write_safetensors(folder / "a", tensors); });
  };
  EXPECT_TRUE(holds(error({{"x", at::ones(1)}, {"x", at::ones(1)}}), "two tensors are named x"));
  EXPECT_TRUE(holds(error({{"x", Tensor()}}), "tensor x is undefined"));
  EXPECT_TRUE(holds(error({{"x", at::ones(1, at::kComplexFloat)}}), "which safetensors lacks"));
  EXPECT_TRUE(holds(error({{"__metadata__", at::ones(1)}}), "cannot be a tensor's name"));
  EXPECT_TRUE(holds(error({{"\xFF", at::ones(1)}}), "no valid UTF-8"));
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(WriteSafetensorsTest, AFullDiskIsReportedAndLeavesTheOldFile) {
  SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a small file system";
  write_safetensors(disk / "a", {{"x", at::ones(10)}});
  EXPECT_TRUE(holds(message_of<DataError>([&] {
                      write_safetensors(disk / "a", {{"x", at::ones(1 << 20)}});
                    }),
                    "a: cannot write: No space left on device"));
  EXPECT_EQ(SafetensorsFile(disk / "a").tensor("x").numel(), 10);
  EXPECT_EQ(std::distance(fs::directory_iterator(disk.path()), {}), 1);
}

TEST(SafetensorsFolderTest, ReadsWhatTheShardedWriterWrote) {
  TemporaryFolder folder;
  const NamedTensors tensors{
      {"a", at::rand(100)}, {"b", at::rand(60)}, {"c", at::rand(40)}, {"d", at::rand(300)}};
  const std::vector<std::pair<int64_t, size_t>> cases{{1, 5}, {400, 4}, {640, 4}, {1200, 3}, {2000, 1}};
  for (const auto& [limit, files] : cases) {
    const fs::path target = folder / std::to_string(limit);
    fs::create_directory(target);
    const auto written = write_safetensors_sharded(target, "model", tensors, limit);
    for (const WrittenFile& file : written) {
      EXPECT_EQ(file.size, static_cast<int64_t>(fs::file_size(target / file.name)));
      EXPECT_EQ(file.sha256, sha256_file(target / file.name));
    }
    EXPECT_EQ(written.back().name, limit == 2000 ? "model.safetensors" : "model.safetensors.index.json");
    EXPECT_EQ(written.size(), files);
    const SafetensorsFolder read(target);
    expect_same(tensors, read);
    EXPECT_EQ(read.metadata().at("format"), "pt");
    EXPECT_EQ(read.names(), (std::vector<std::string>{"a", "b", "c", "d"}));
  }
}

TEST(SafetensorsFolderTest, ReadsASingleFileAndOtherStems) {
  TemporaryFolder folder;
  write_safetensors_sharded(folder.path(), "optimizer", {{"x", at::ones(3)}, {"y", at::ones(3)}}, 12);
  EXPECT_EQ(SafetensorsFolder(folder.path(), "optimizer").files().size(), 2u);
  EXPECT_TRUE(SafetensorsFolder(folder / "optimizer-00001-of-00002.safetensors").contains("x"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { SafetensorsFolder(folder.path()); }),
                    "has neither model.safetensors nor model.safetensors.index.json"));
  EXPECT_TRUE(holds(message_of<DataError>([&] { SafetensorsFolder(folder / "none"); }), "none: cannot open"));
}

class SafetensorsIndexTest : public testing::Test {
 protected:
  void SetUp() override {
    write_safetensors(folder_ / "one.safetensors", {{"x", at::ones(1)}, {"y", at::ones(1)}});
    write_safetensors(folder_ / "two.safetensors", {{"z", at::ones(1)}});
  }
  std::string error_of(const std::string& weight_map) {
    folder_.file("model.safetensors.index.json", "{\"weight_map\":" + weight_map + "}");
    return message_of<DataError>([&] { SafetensorsFolder{folder_.path()}; });
  }
  TemporaryFolder folder_;
};

TEST_F(SafetensorsIndexTest, NamesWhatDisagrees) {
  EXPECT_EQ(error_of(R"({"x":"one.safetensors","y":"one.safetensors","z":"two.safetensors"})"),
            "(nothing was thrown)");
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","y":"one.safetensors","z":"three.safetensors"})"),
                    "lists \"three.safetensors\", which is missing"));
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","z":"two.safetensors"})"),
                    "one.safetensors: tensor \"y\" is not in the index"));
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","y":"one.safetensors","w":"two.safetensors"})"),
                    "two.safetensors: lacks tensor \"w\" of the index"));
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","y":"two.safetensors","z":"two.safetensors"})"),
                    "tensor \"y\" is said to be in two.safetensors but is in one.safetensors"));
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","x":"two.safetensors"})"), "index names \"x\" twice"));
  EXPECT_TRUE(holds(error_of("{}"), "weight_map is empty"));
  EXPECT_TRUE(holds(error_of("[]"), "must have an object weight_map"));
  EXPECT_TRUE(holds(error_of("{"), "index is no valid JSON"));
}

TEST_F(SafetensorsIndexTest, FilesMustLieInTheFolder) {
  for (const std::string name : {R"("../one.safetensors")", R"("/etc/passwd")", R"("a\\b")", R"("..")",
                                 R"("")", R"("one.safetensors\u0000")", "1"}) {
    EXPECT_TRUE(holds(error_of("{\"x\":" + name + "}"),
                      "tensor \"x\": wanted the name of a file in the same folder"));
  }
}

TEST_F(SafetensorsIndexTest, ATensorMayBeInOneFileOnly) {
  write_safetensors(folder_ / "two.safetensors", {{"x", at::ones(1)}, {"z", at::ones(1)}});
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","y":"one.safetensors","z":"two.safetensors"})"),
                    "two.safetensors: tensor \"x\" is also in one.safetensors"));
}

TEST_F(SafetensorsIndexTest, AWholeFileBesideAnIndexIsAmbiguous) {
  fs::copy(folder_ / "two.safetensors", folder_ / "model.safetensors");
  EXPECT_TRUE(holds(error_of(R"({"x":"one.safetensors","y":"one.safetensors"})"),
                    "holds both model.safetensors and"));
  EXPECT_EQ(error_of(R"({"z":"model.safetensors"})"), "(nothing was thrown)");
}

/// Runs a Python script in the folder; -1 where its packages are absent.
int run_python(const TemporaryFolder& folder, const std::string& script) {
  if (std::system(HYMOE_TEST_PYTHON " -c 'import safetensors.torch' > /dev/null 2>&1") != 0) return -1;
  folder.file("script.py", script);
  return std::system(("cd '" + folder.path().string() + "' && " HYMOE_TEST_PYTHON " script.py").c_str());
}

TEST(SafetensorsPythonTest, PythonReadsOurFiles) {
  TemporaryFolder folder;
  write_safetensors(folder / "a.safetensors", every_dtype(), {{"k", "\xC3\xA4"}});
  write_safetensors(folder / "none.safetensors", {}, {});
  const int status = run_python(folder, R"(
import torch
from safetensors import safe_open
from safetensors.torch import load_file
tensors = load_file("a.safetensors")
assert len(tensors) == 18, len(tensors)
for name, tensor in tensors.items():
    if tensor.shape == (3, 5):
        assert torch.equal(tensor.to(torch.float64), (torch.arange(15) % 2).reshape(3, 5).double()), name
assert tensors["scalar"].item() == 2.5 and tensors["empty"].shape == (0, 7)
assert torch.equal(tensors["transposed"], torch.arange(6.0).reshape(2, 3).t())
assert safe_open("a.safetensors", "pt").metadata() == {"k": "ä"}
assert load_file("none.safetensors") == {}
)");
  if (status < 0) GTEST_SKIP() << "no safetensors and torch in " HYMOE_TEST_PYTHON;
  EXPECT_EQ(status, 0);
}

TEST(SafetensorsPythonTest, WeReadPythonsFiles) {
  TemporaryFolder folder;
  const int status = run_python(folder, R"(
import torch
from safetensors.torch import save_file
save_file({"b": torch.arange(7, dtype=torch.uint8), "x": torch.arange(6.0).reshape(2, 3).bfloat16(),
           "e": torch.empty(0), "s": torch.tensor(3)}, "p.safetensors", metadata={"format": "pt"})
)");
  if (status < 0) GTEST_SKIP() << "no safetensors and torch in " HYMOE_TEST_PYTHON;
  ASSERT_EQ(status, 0);
  const SafetensorsFile file(folder / "p.safetensors");
  EXPECT_EQ(file.names().size(), 4u);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_TRUE(at::equal(file.tensor("x"), at::arange(6.0).reshape({2, 3}).to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(file.tensor("b"), at::arange(7, at::kByte)));
  EXPECT_EQ(file.tensor("e").numel(), 0);
  EXPECT_EQ(file.tensor("s").item<int64_t>(), 3);
}

}  // namespace
}  // namespace hymoe
