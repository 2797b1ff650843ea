#include "hymoe/data/batches.h"

#include <map>
#include <set>
#include <string>
#include <vector>

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "hymoe/data/manifest.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

const std::string kFingerprint(64, 'a');
constexpr int64_t kVocab = 100000;

/// A prepared folder without a tokenizer: every token of a language has an id of its own, 1000·(language + 1)
/// and on, in the order of the documents.
class Folder {
 public:
  /// Lengths of the documents by language; the same ones in both splits.
  explicit Folder(const std::map<std::string, std::vector<int64_t>>& languages) {
    Manifest manifest;
    manifest.tokenizer_fingerprint = kFingerprint;
    manifest.vocab_size = kVocab;
    int32_t first = 1000;
    for (const auto& [name, lengths] : languages) {
      for (const std::string split : {"train", "valid"}) {
        const std::string file = name + "." + split + ".tokens";
        TokenFileWriter writer(folder_ / file, kVocab, kFingerprint);
        int32_t id = first;
        for (int64_t length : lengths) {
          std::vector<int32_t> ids;
          for (int64_t i = 0; i < length; ++i) ids.push_back(id++);
          writer.add(ids);
        }
        SplitRecord& record = manifest.languages[name].splits[split];
        record = {file, writer.num_documents(), writer.num_tokens(), 0, ""};
        record.sha256 = writer.finish();
      }
      first += 1000;
    }
    write_file_atomic(folder_ / Manifest::kFileName, manifest.to_json().dump());
  }
  DataConfig config(int64_t seq_len, int64_t batch_size) const {
    DataConfig config;
    config.path = folder_.path().string();
    config.seq_len = seq_len;
    config.batch_size = batch_size;
    return config;
  }
  std::string path() const { return folder_.path().string(); }

 private:
  TemporaryFolder folder_;
};

std::vector<int64_t> to_vector(const Tensor& tensor) {
  const Tensor flat = tensor.contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

void expect_equal(const Batch& a, const Batch& b) {
  EXPECT_TRUE(at::equal(a.tokens, b.tokens));
  EXPECT_TRUE(at::equal(a.targets, b.targets));
  EXPECT_TRUE(at::equal(a.offsets, b.offsets));
  EXPECT_TRUE(at::equal(a.document_language, b.document_language));
}

/// The laws of packing for files of a Folder: offsets rise, every row starts a document, tokens of a document
/// are consecutive, and targets are the next token, or -100 at the end of a document of the corpus.
void expect_well_packed(const Batch& batch, const std::set<int64_t>& last_tokens) {
  const int64_t rows = batch.tokens.size(0), seq_len = batch.tokens.size(1);
  const auto tokens = to_vector(batch.tokens), targets = to_vector(batch.targets),
             offsets = to_vector(batch.offsets);
  ASSERT_EQ(offsets.front(), 0);
  ASSERT_EQ(offsets.back(), rows * seq_len);
  ASSERT_EQ(batch.document_language.numel(), static_cast<int64_t>(offsets.size()) - 1);
  const std::set<int64_t> starts(offsets.begin(), offsets.end());
  for (int64_t r = 0; r < rows; ++r) EXPECT_TRUE(starts.contains(r * seq_len)) << "row " << r;
  for (size_t d = 0; d + 1 < offsets.size(); ++d) {
    ASSERT_LT(offsets[d], offsets[d + 1]);
    if (batch.document_language[d].item<int64_t>() < 0) continue;
    for (int64_t t = offsets[d]; t < offsets[d + 1]; ++t) {
      EXPECT_EQ(tokens[t], tokens[offsets[d]] + t - offsets[d]);
      EXPECT_EQ(targets[t], last_tokens.contains(tokens[t]) ? -100 : tokens[t] + 1);
      EXPECT_TRUE(!last_tokens.contains(tokens[t]) || t + 1 == offsets[d + 1])
          << "a document goes on after its end";
    }
  }
}

TEST(Batches, DocumentsArePackedWithTheirBoundaries) {
  const Folder folder({{"go", {5, 1, 9, 2, 30}}});  // 47 tokens: 1000..1046
  const Batches batches(folder.config(6, 4));
  for (int64_t step = 0; step < 20; ++step) {
    expect_well_packed(batches.at(step), {1004, 1005, 1014, 1016, 1046});
  }
  EXPECT_EQ(batches.languages(), std::vector<std::string>{"go"});
  EXPECT_EQ(batches.vocab_size(), kVocab);
}

TEST(Batches, AnEpochTakesEveryRowOnceAndNoTokenTwice) {
  for (int64_t tokens : {6, 7, 11, 12, 47, 600}) {
    const Folder folder({{"go", {tokens}}});
    const Batches batches(folder.config(6, 1));
    const int64_t rows = tokens / 6;
    ASSERT_EQ(batches.rows_per_epoch(0), rows);
    std::vector<std::vector<int64_t>> orders;
    std::set<int64_t> ever;
    for (int64_t epoch = 0; epoch < 20; ++epoch) {
      std::set<int64_t> seen;
      std::vector<int64_t> order;
      for (int64_t i = epoch * rows; i < (epoch + 1) * rows; ++i) {
        EXPECT_EQ(batches.row(i).epoch, epoch);
        for (int64_t id : to_vector(batches.at(i).tokens)) EXPECT_TRUE(seen.insert(id).second) << id;
        order.push_back(batches.row(i).begin);
      }
      EXPECT_EQ(static_cast<int64_t>(seen.size()), rows * 6);
      ever.insert(seen.begin(), seen.end());
      orders.push_back(order);
    }
    EXPECT_EQ(static_cast<int64_t>(ever.size()), tokens) << "what one epoch leaves out others take";
    EXPECT_TRUE(rows <= 10 || orders[0] != orders[1]);
  }
}

TEST(Batches, StepsAreIndependentOfEachOtherAndOfTheWorldSize) {
  const Folder folder({{"go", {50, 3, 77}}, {"rust", {20, 90}}});
  const Batches batches(folder.config(8, 12)), again(folder.config(8, 12));
  for (int64_t step : {5, 0, 1000000, 3}) {
    const Batch whole = batches.at(step);
    expect_equal(whole, again.at(step));
    for (int64_t world : {1, 2, 3, 4, 6, 12}) {
      std::vector<Tensor> tokens, targets, languages;
      for (int64_t rank = 0; rank < world; ++rank) {
        const Batch part = batches.at(step, rank, world);
        EXPECT_EQ(part.tokens.size(0), 12 / world);
        tokens.push_back(part.tokens);
        targets.push_back(part.targets);
        languages.push_back(part.document_language);
      }
      EXPECT_TRUE(at::equal(at::cat(tokens), whole.tokens));
      EXPECT_TRUE(at::equal(at::cat(targets), whole.targets));
      EXPECT_TRUE(at::equal(at::cat(languages), whole.document_language));
    }
  }
  EXPECT_FALSE(at::equal(batches.at(0).tokens, batches.at(1).tokens));
}

TEST(Batches, TheSeedDecidesTheOrder) {
  const Folder folder({{"go", {500}}});
  DataConfig config = folder.config(8, 12);
  const Batch first = Batches(config).at(0);
  config.seed = 1;
  EXPECT_FALSE(at::equal(Batches(config).at(0).tokens, first.tokens));
}

TEST(Batches, LanguagesComeInTheirShares) {
  const Folder folder({{"cpp", {100}}, {"go", {300}}, {"rust", {600}}});
  DataConfig config = folder.config(10, 10);
  for (bool by_size : {true, false}) {
    std::vector<double> shares = {0.1, 0.3, 0.6};
    if (!by_size) {
      config.weights = {{"C++", 3}, {"rust", 1}, {"go", 0}};
      shares = {0.75, 0.25};
    }
    const Batches batches(config);
    ASSERT_EQ(batches.languages(), (by_size ? std::vector<std::string>{"cpp", "go", "rust"}
                                            : std::vector<std::string>{"cpp", "rust"}));
    std::vector<int64_t> rows(shares.size());
    for (int64_t step = 0; step < 200; ++step) {
      std::vector<int64_t> here(shares.size());
      for (int64_t i = 0; i < 10; ++i) ++here[batches.row(step * 10 + i).language];
      for (size_t l = 0; l < shares.size(); ++l) {
        EXPECT_NEAR(static_cast<double>(here[l]), 10 * shares[l], 2.0) << "step " << step;
        rows[l] += here[l];
      }
    }
    for (size_t l = 0; l < shares.size(); ++l) {
      EXPECT_DOUBLE_EQ(batches.shares()[l], shares[l]);
      EXPECT_NEAR(static_cast<double>(rows[l]), 2000 * shares[l], 3.0);
      const double epochs = static_cast<double>(rows[l]) / static_cast<double>(batches.rows_per_epoch(l));
      EXPECT_DOUBLE_EQ(batches.epochs(200)[l], epochs);
    }
  }
}

TEST(Batches, EveryLanguageGoesThroughItsOwnEpochs) {
  const Folder folder({{"cpp", {41, 40}}, {"go", {300}}, {"rust", {60, 7}}});
  DataConfig config = folder.config(10, 10);
  config.weights = {{"cpp", 1}, {"go", 2}, {"rust", 1}};
  const Batches batches(config);
  std::map<std::pair<int64_t, int64_t>, std::set<int64_t>> rows;
  for (int64_t i = 0; i < 1000; ++i) {
    const Batches::Row row = batches.row(i);
    EXPECT_TRUE((rows[{row.language, row.epoch}].insert(row.begin).second));
  }
  for (const auto& [of, begins] : rows) {
    if (rows.contains({of.first, of.second + 1})) {
      EXPECT_EQ(static_cast<int64_t>(begins.size()), batches.rows_per_epoch(of.first));
    }
  }
  config.weights["cpp"] = 0;  // a language's order does not depend on the others
  const Batches fewer(config);
  std::vector<int64_t> go, go_of_fewer;
  for (int64_t i = 0; i < 40; ++i) {
    if (batches.row(i).language == 1) go.push_back(batches.row(i).begin);
    if (fewer.row(i).language == 0) go_of_fewer.push_back(fewer.row(i).begin);
  }
  const size_t common = std::min(go.size(), go_of_fewer.size());
  EXPECT_TRUE(std::equal(go.begin(), go.begin() + common, go_of_fewer.begin()));
}

TEST(Batches, WhatCannotBeServedIsNamed) {
  const Folder folder({{"go", {50}}, {"rust", {5}}});
  const auto open = [](const DataConfig& config, const std::string& split = "train",
                       const std::string& tokenizer = "") {
    return message_of<Error>([&] { Batches batches(config, split, tokenizer); });
  };
  DataConfig config = folder.config(10, 4);
  EXPECT_TRUE(holds(open(config), "rust has 5 tokens, fewer than one row of seq_len 10"));
  config.weights = {{"rsut", 1}};
  EXPECT_TRUE(holds(open(config), "weights: '" + folder.path() + "' has no language 'rsut'; nearest: rust"));
  config.weights = {{"go", 0}};
  EXPECT_TRUE(holds(open(config), "weights: one must be above 0"));
  config.weights = {{"go", -1}};
  EXPECT_TRUE(holds(open(config), "weights"));
  config.weights = {{"go", 1}};
  EXPECT_TRUE(holds(open(config, "test"), "no split 'test'"));
  EXPECT_TRUE(holds(open(config, "train", std::string(64, 'b')),
                    "but the tokenizer here is " + std::string(64, 'b')));
  EXPECT_EQ(open(config, "train", kFingerprint), "(nothing was thrown)");
  EXPECT_TRUE(holds(open(DataConfig{}), "path: the folder that `hymoe prepare` wrote was wanted"));
  config.path = folder.path() + "/nowhere";
  EXPECT_TRUE(holds(open(config), "nowhere/manifest.json: there is no such file"));
  config = folder.config(0, 4);
  EXPECT_TRUE(holds(open(config), "seq_len"));

  const Batches batches(folder.config(5, 4));
  EXPECT_TRUE(holds(message_of<c10::Error>([&] { batches.at(0, 0, 3); }), "batch_size 4 must be a multiple"));
  EXPECT_THROW(batches.at(0, 2, 2), c10::Error);
  EXPECT_THROW(batches.at(-1), c10::Error);
}

std::set<int64_t> targets_of(const EvalBatches& batches) {
  std::set<int64_t> all;
  for (int64_t i = 0; i < batches.size(); ++i) {
    for (int64_t target : to_vector(batches.at(i).targets)) {
      EXPECT_TRUE(target == -100 || all.insert(target).second) << "target twice: " << target;
    }
  }
  return all;
}

TEST(EvalBatches, EveryTokenButTheFirstOfADocumentIsATargetOnce) {
  const std::vector<int64_t> lengths = {5, 1, 9, 2, 30, 11, 10, 21};
  const Folder folder({{"go", lengths}});
  std::set<int64_t> expected, last_tokens;
  int64_t id = 1000;
  for (int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i, ++id) {
      if (i > 0) expected.insert(id);
    }
    last_tokens.insert(id - 1);
  }
  for (int64_t seq_len : {1, 2, 7, 10, 100}) {
    for (int64_t batch_size : {1, 3, 100}) {
      const EvalBatches batches(folder.path(), "go", seq_len, batch_size);
      EXPECT_EQ(targets_of(batches), expected);
      EXPECT_EQ(batches.num_targets(), static_cast<int64_t>(expected.size()));
      for (int64_t i = 0; i < batches.size(); ++i) expect_well_packed(batches.at(i), last_tokens);
    }
  }
}

TEST(EvalBatches, RowsAreWellFilledAndPaddingIsMarked) {
  const Folder folder({{"go", {6, 6, 4, 4, 3}}});
  const EvalBatches batches(folder.path(), "go", 10, 2);
  ASSERT_EQ(batches.size(), 2);
  const Batch full = batches.at(0), last = batches.at(1);
  EXPECT_FALSE(full.padding.defined()) << "6 + 4 and 6 + 4";
  EXPECT_EQ(last.tokens.size(0), 1);
  EXPECT_EQ(to_vector(last.offsets), (std::vector<int64_t>{0, 3, 10}));
  EXPECT_EQ(to_vector(last.document_language), (std::vector<int64_t>{0, -1}));
  EXPECT_EQ(last.padding.sum().item<int64_t>(), 7);
  EXPECT_FALSE(last.padding[2].item<bool>());
  EXPECT_TRUE(last.padding[3].item<bool>());
  EXPECT_EQ(to_vector(last.targets),
            (std::vector<int64_t>{1021, 1022, -100, -100, -100, -100, -100, -100, -100, -100}));
}

TEST(EvalBatches, ALastTokenAloneTakesNoRow) {
  const Folder folder({{"go", {11, 21, 1}}});
  EXPECT_EQ(EvalBatches(folder.path(), "go", 10, 1).size(), 3);
}

TEST(EvalBatches, ABudgetTakesTheFirstPieceOfEveryDocumentBeforeASecondOne) {
  const Folder folder({{"go", {40, 5, 40, 5}}});  // tokens from 1000, 1040, 1045, 1085 on
  const auto targets = [&](int64_t budget) {
    return targets_of(EvalBatches(folder.path(), "Golang", 10, 2, budget));
  };
  std::set<int64_t> first_pieces;
  for (int64_t i = 1; i <= 10; ++i) first_pieces.insert({1000 + i, 1045 + i});
  for (int64_t i = 1; i < 5; ++i) first_pieces.insert({1040 + i, 1085 + i});
  EXPECT_EQ(targets(30), first_pieces);
  const std::set<int64_t> more = targets(31);
  EXPECT_EQ(more.size(), first_pieces.size() + 10);
  EXPECT_TRUE(std::includes(more.begin(), more.end(), first_pieces.begin(), first_pieces.end()));
  EXPECT_EQ(targets(1), targets(5)) << "one piece";
  EXPECT_LE(targets(1).size(), 10u);
  EXPECT_EQ(targets(1000), targets(0));
}

TEST(EvalBatches, WhatCannotBeServedIsNamed) {
  const Folder folder({{"go", {5}}, {"rust", {1, 1}}, {"ruby", {}}});
  const auto open = [&](const std::string& language) {
    return message_of<DataError>([&] { EvalBatches batches(folder.path(), language, 10, 2); });
  };
  EXPECT_TRUE(holds(open("rust"), "there is nothing to predict"));
  EXPECT_TRUE(holds(open("ruby"), "there is nothing to predict"));
  EXPECT_TRUE(holds(open("rubi"), "no language 'rubi'; nearest: ruby, there are go, ruby, rust"));
  EXPECT_THROW(EvalBatches(folder.path(), "go", 0, 1), c10::Error);
  EXPECT_THROW(EvalBatches(folder.path(), "go", 10, 2).at(1), c10::Error);
}

TEST(TargetBytes, AreThoseOfTheTargetsAlone) {
  Batch batch;
  batch.targets = at::tensor({2, -100, 0, 1}, at::kLong).view({2, 2});
  EXPECT_EQ(target_bytes(batch, at::tensor({10, 200, 3000}, at::kLong)), 3210);
}

}  // namespace
}  // namespace hymoe
