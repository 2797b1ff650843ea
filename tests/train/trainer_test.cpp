#include "hymoe/train/trainer.h"

#include <cmath>

#include <gtest/gtest.h>

#include "hymoe/config/config.h"
#include "hymoe/io/file.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/model/kv_cache.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/moe/topk_router.h"
#include "train/run_test.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

class TrainerTest : public RunTest {};

TEST_F(TrainerTest, LearnsAndWritesTheRunFolder) {
  TrainConfig config = this->config("learn");
  config.steps = 60;
  const TrainResult result = Trainer(config).run();
  EXPECT_TRUE(result.finished);
  EXPECT_EQ(result.step, 60);
  const auto rows = this->rows("learn");
  EXPECT_EQ(rows.size(), 62u);  // evaluations before and after
  EXPECT_LT(rows.back()["loss/rust"].get<double>(), 0.6 * rows.front()["loss/rust"].get<double>());
  for (const char* key : {"step",
                          "tokens",
                          "loss",
                          "lm_loss",
                          "aux_loss",
                          "lr",
                          "grad_norm",
                          "tokens_per_second",
                          "tflops",
                          "peak_memory",
                          "load/layers.1.token",
                          "entropy/layers.1.segment",
                          "dead_experts/layers.1.token",
                          "coverage/layers.1.segment",
                          "load_cv/layers.1.token",
                          "load_p10/layers.1.token",
                          "load_p50/layers.1.segment",
                          "load_p90/layers.1.token",
                          "gate_weight/layers.1.segment",
                          "shared_weight/layers.1.token",
                          "router_entropy/layers.1.token",
                          "router_entropy/layers.1.segment",
                          "overlap/layers.1.segment",
                          "uncovered/layers.1.segment",
                          "shared/layers.1.segment"}) {
    EXPECT_TRUE(rows[1].contains(key)) << key;
  }
  const double gate = rows[1]["gate_weight/layers.1.token"], shared = rows[1]["shared_weight/layers.1.token"];
  EXPECT_NEAR(gate + shared, 1, 1e-6) << "one token expert and the shared one in one normalisation";
  for (size_t i = 1; i < 61; ++i) {
    EXPECT_EQ(rows[i].contains("router_grad/layers.1.token"), i == 2) << i;
    EXPECT_EQ(rows[i].contains("warnings"), false) << rows[i].dump();
  }
  EXPECT_GT(rows[2]["router_grad/layers.1.segment"].get<double>(), 0);
  EXPECT_GT(rows[2]["router_aux_grad/layers.1.token"].get<double>(), 0);
  EXPECT_EQ(rows[60]["tokens"], 60 * 4 * 32);
  for (const char* file : {"config.yaml", "metrics.jsonl", "report.html", "latest"}) {
    EXPECT_TRUE(fs::exists(runs / "learn" / file)) << file;
  }
  EXPECT_EQ(checkpoint("learn").filename(), "step-00000060");
  EXPECT_EQ(load_pretrained(checkpoint("learn"))->num_params(), Transformer(config.model)->num_params());
}

// A user's router may report what it has to say in some calls only.
struct SometimesRouter : TopkRouter {
  using TopkRouter::TopkRouter;
  Routing forward(const Tensor& x, const Packing& packing) override {
    Routing routing = TopkRouter::forward(x, packing);
    if (++calls_ % 3 == 2) routing.metrics["second"] = at::scalar_tensor(7, at::kFloat);
    return routing;
  }
  int calls_ = 0;
};

TEST_F(TrainerTest, AMetricIsTheMeanOverTheMicroBatchesThatHaveIt) {
  routers().add("sometimes", [](const RouterArgs& args) { return std::make_shared<SometimesRouter>(args); });
  TrainConfig config = this->config("sometimes");
  config.steps = 3;
  config.micro_batch = 1;
  config.eval.tokens = 0;
  config.model.moe.branches.pop_back();
  config.model.moe.branches[0].router.kind = "sometimes";
  config.model.moe.branches[0].router.capacity_factor = 1;
  Trainer(config).run();
  for (const auto& row : rows("sometimes")) {
    EXPECT_EQ(row["second/layers.1.token"], 7) << row.dump();
    EXPECT_GT(row["dropped/layers.1.token"].get<double>(), 0);
    EXPECT_LT(row["dropped/layers.1.token"].get<double>(), 1);
  }
}

TEST_F(TrainerTest, TensorBoardHasWhatTheRowsHave) {
  TrainConfig config = this->config("board");
  config.steps = 2;
  config.model.moe.branches[1].weight = 0;
  Trainer(config).run();
  std::string events;
  for (const auto& entry : fs::directory_iterator(runs / "board")) {
    if (entry.path().filename().string().starts_with("events.")) events += read_text(entry.path());
  }
  const auto has = [&](const std::string& tag) {
    std::string field = "\x0a" + std::string(1, static_cast<char>(tag.size())) + tag;
    return events.find(field) != std::string::npos;
  };
  int arrays = 0;
  for (const auto& row : rows("board")) {
    for (const auto& [key, value] : row.items()) {
      if (key == "step") continue;
      if (value.is_number()) {
        EXPECT_TRUE(has(key)) << key;
      }
      if (!key.starts_with("rows_per_expert/")) continue;
      arrays += 1;
      for (size_t e = 0; e < value.size(); ++e)
        EXPECT_TRUE(has(key + "/" + std::to_string(e))) << key << " " << e;
      EXPECT_FALSE(has(key + "/" + std::to_string(value.size()))) << key;
    }
  }
  EXPECT_EQ(arrays, 2 * 2 * 2) << "evaluations, languages, branches";
  EXPECT_TRUE(has("warnings"));
  EXPECT_NE(events.find("- layers.1.segment: the router learns nothing"), std::string::npos);
}

TEST_F(TrainerTest, ResumedRunEqualsUnbrokenOneBitForBit) {  // law 8
  TrainConfig config = this->config("unbroken");
  config.model.moe.branches[0].router.jitter = 0.1;  // random numbers
  config.model.moe.branches[0].router.bias_update = 0.01;
  Trainer(config).run();
  config.name = "broken";
  config.steps = 5;
  config.schedule.min_ratio = 1;  // the schedule must not depend on where a sitting ends
  Trainer(config).run();
  config.steps = 12;
  Trainer(config).run();
  config.name = "whole";
  Trainer(config).run();
  EXPECT_EQ(hash(checkpoint("broken")), hash(checkpoint("whole")));
  EXPECT_NE(hash(checkpoint("broken")), hash(checkpoint("unbroken")));
  const auto broken = rows("broken"), whole = rows("whole");
  for (const auto& row : whole) {
    if (!row.contains("lm_loss")) continue;
    const auto same = std::find_if(broken.begin(), broken.end(), [&](const auto& other) {
      return other.contains("lm_loss") && other["step"] == row["step"];
    });
    ASSERT_NE(same, broken.end());
    EXPECT_EQ((*same)["lm_loss"], row["lm_loss"]);
  }
}

TEST_F(TrainerTest, MicroBatchesGiveTheGradientsOfTheWholeBatch) {
  TrainConfig config = this->config("whole");
  config.steps = 1;
  // A balance loss over what was seen so far is another loss; one over documents is not.
  config.model.moe.branches[0].router.balance_over = "sequence";
  for (BranchConfig& branch : config.model.moe.branches) branch.router.z_loss = 0.1;
  Trainer(config).run();
  config.name = "parts";
  config.micro_batch = 1;
  Trainer(config).run();
  EXPECT_NEAR(rows("whole")[1]["grad_norm"].get<double>(), rows("parts")[1]["grad_norm"].get<double>(), 1e-5);
  EXPECT_NEAR(rows("whole")[1]["lm_loss"].get<double>(), rows("parts")[1]["lm_loss"].get<double>(), 1e-6);
  EXPECT_NEAR(rows("whole")[1]["aux_loss"].get<double>(), rows("parts")[1]["aux_loss"].get<double>(), 1e-6);
}

TEST_F(TrainerTest, LookingForDeadRoutersChangesNothingAndNamesThem) {
  TrainConfig config = this->config("looked");
  config.diagnose_interval = 3;
  config.model.moe.branches[1].weight = 0;
  Trainer(config).run();
  config.name = "not";
  config.diagnose_interval = 0;
  Trainer(config).run();
  EXPECT_EQ(hash(checkpoint("looked")), hash(checkpoint("not")));
  const auto looked = rows("looked");
  for (int step = 1; step <= 12; ++step) {
    const auto& row = looked[step];
    ASSERT_EQ(row["step"], step);
    ASSERT_EQ(row.contains("warnings"), step == 2 || step % 3 == 0) << step;
    if (!row.contains("warnings")) continue;
    EXPECT_EQ(row["warnings"],
              nlohmann::json({"layers.1.segment: the router learns nothing from the language: "
                              "the branch has weight 0"}));
    EXPECT_EQ(row["router_grad/layers.1.segment"], 0);
    EXPECT_GT(row["router_grad/layers.1.token"].get<double>(), 0);
  }
}

// As in MoE-LPR's second stage: only the router trains.
TEST_F(TrainerTest, PriorLossIsOfTheRowsOfItsLanguages) {
  TrainConfig config = this->config("");
  config.model.moe.branches.pop_back();
  config.model.moe.branches[0].router.balance_loss = 0;
  config.model.moe.branches[0].router.prior_loss = 1;
  config.model.freeze = {"model.embed_tokens.weight", "*norm.weight",      "*.self_attn.*",
                         "model.layers.0.mlp.*",      "*.shared_expert.*", "*.experts.*"};
  const auto aux_losses = [&](const std::string& name, const std::vector<std::string>& languages) {
    config.name = name;
    config.prior_languages = languages;
    Trainer(config).run();
    const auto rows = this->rows(name);
    return std::pair(rows[1]["aux_loss"].get<double>(), rows[12]["aux_loss"].get<double>());
  };
  const auto ruby = aux_losses("ruby", {"ruby"}), rust = aux_losses("rust", {"rust"});
  const auto both = aux_losses("both", {"ruby", "rust"});
  EXPECT_NEAR(ruby.first + rust.first, both.first, 1e-6);
  EXPECT_GT(std::min(ruby.first, rust.first), 0.2 * both.first);
  EXPECT_LT(both.second, 0.8 * both.first);
}

TEST_F(TrainerTest, PriorLanguagesAndPriorLossGoTogether) {
  const auto refusal = [](const TrainConfig& config) {
    try {
      Trainer(config).run();
    } catch (const ConfigError& error) {
      return error.key_path() + ": " + error.text();
    }
    return std::string("accepted");
  };
  TrainConfig config = this->config("prior");
  config.prior_languages = {"ruby"};
  EXPECT_EQ(refusal(config), "prior_languages: no router has a prior_loss: expected none");
  config.model.moe.branches[0].router.prior_loss = 0.1;
  config.prior_languages = {"rust", "cobol"};
  EXPECT_EQ(refusal(config),
            "prior_languages.1: 'cobol' is not among the languages that data is a mixture of");
  config.prior_languages = {};
  EXPECT_EQ(refusal(config), "prior_languages: a router has a prior_loss: expected the languages it is for");
}

TEST_F(TrainerTest, FrozenParametersStayBitIdentical) {  // law 9
  TrainConfig config = this->config("frozen");
  config.model.freeze = {"*.shared_expert.*", "*.self_attn.*", "*norm.weight", "model.embed_tokens.weight"};
  torch::manual_seed(config.seed);
  Transformer start(config.model);
  Trainer(config).run();
  Transformer end = load_pretrained(checkpoint("frozen"));
  const auto after = end->named_parameters();
  int frozen = 0;
  for (const auto& item : start->named_parameters()) {
    const bool is_frozen = item.key().find("experts") == std::string::npos &&
                           item.key().find("router") == std::string::npos &&
                           item.key().find("layers.0.mlp") == std::string::npos;
    frozen += is_frozen;
    EXPECT_EQ(after[item.key()].equal(item.value()), is_frozen) << item.key();
  }
  EXPECT_GT(frozen, 10);
}

TEST_F(TrainerTest, AStopRequestEndsWithACheckpoint) {
  TrainConfig config = this->config("stopped");
  config.steps = 1000;
  const TrainResult result = Trainer(config).run([](const auto& row) {
    if (row["step"] == 3) Trainer::request_stop();
  });
  EXPECT_FALSE(result.finished);
  EXPECT_EQ(result.step, 3);
  EXPECT_EQ(checkpoint("stopped").filename(), "step-00000003");
}

TEST_F(TrainerTest, AnEvaluationLeftByAStopIsDoneAnew) {
  TrainConfig config = this->config("left");
  config.steps = 4;
  config.eval.interval = 2;
  const auto stop_at = [&](const std::string& at) {
    int evaluations = 0;
    return Trainer(config).run({}, [&](const std::string& language, int64_t done, int64_t) {
      evaluations += language == "ruby" && done == 0;
      if (language == "rust" && at == "first") Trainer::request_stop();
      if (language == "rust" && at == "second" && evaluations > 1) Trainer::request_stop();
    });
  };
  EXPECT_EQ(stop_at("first").step, 0);
  EXPECT_EQ(stop_at("second").step, 2);
  EXPECT_EQ(stop_at("never").step, 4);
  EXPECT_EQ(stop_at("never").step, 4) << "a run that has ended is evaluated no more";
  std::vector<int64_t> evaluated;
  for (const auto& row : rows("left")) {
    if (row.contains("loss/rust")) evaluated.push_back(row["step"]);
  }
  EXPECT_EQ(evaluated, (std::vector<int64_t>{0, 2, 4}));
}

TEST_F(TrainerTest, KeepsTheNewestCheckpoints) {
  TrainConfig config = this->config("keep");
  config.checkpoint = {.interval = 2, .keep = 2};
  Trainer(config).run();
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(runs / "keep")) {
    if (entry.is_directory()) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, std::vector<std::string>({"step-00000010", "step-00000012"}));
}

TEST_F(TrainerTest, ANumberThatIsNotFiniteStopsWithStepAndTensor) {
  TrainConfig config = this->config("nan");
  torch::manual_seed(0);
  Transformer model(config.model);
  {
    torch::NoGradGuard no_grad;
    model->named_parameters()["model.layers.1.mlp.token.experts.down_proj"][0][0][0].fill_(NAN);
  }
  save_pretrained(model, runs / "poisoned", shared->path() / "tokenizer");
  config.init = runs / "poisoned";
  config.eval.tokens = 0;
  try {
    Trainer(config).run();
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "step 1: loss is nan: model.layers.1.mlp.token.experts.down_proj is not finite");
  }
}

TEST_F(TrainerTest, RefusesAnotherConfigInTheSameRun) {
  TrainConfig config = this->config("same");
  config.steps = 1;
  Trainer(config).run();
  config.schedule.lr = 1;
  try {
    Trainer(config).run();
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("schedule.lr: 0.01"), std::string::npos) << error.what();
  }
}

TEST_F(TrainerTest, ADamagedCheckpointIsNamed) {
  TrainConfig config = this->config("damaged");
  config.steps = 2;
  Trainer(config).run();
  config.steps = 3;
  fs::path file;
  for (const char* name : {"model.safetensors", "optimizer.safetensors"}) {
    file = checkpoint("damaged") / name;
    const std::string bytes = read_text(file);
    write_file_atomic(file, "?" + bytes.substr(1));  // in the header: seen before it is read
    try {
      Trainer(config).run();
      FAIL();
    } catch (const DataError& error) {
      EXPECT_NE(std::string(error.what()).find(std::string(name) + ": SHA-256 differs"), std::string::npos)
          << error.what();
    }
    write_file_atomic(file, bytes);
  }
  fs::resize_file(file, fs::file_size(file) - 10);
  EXPECT_THROW(verify_checkpoint(file.parent_path()), DataError);
  fs::remove(file);
  EXPECT_THROW(verify_checkpoint(file.parent_path()), DataError);
}

TEST_F(TrainerTest, TrainedModelsDecodeWithTheLossOfOneForward) {
  const auto losses = [&](const std::string& score, const std::string& select) {
    TrainConfig config = this->config(score + "-" + select);
    RouterConfig& router = config.model.moe.branches[1].router;
    router.score = score;
    router.select = select;
    router.capacity = 2;
    router.allow_noncausal = score == "own";
    Trainer(config).run();
    Transformer model = load_pretrained(checkpoint(config.name));
    model->eval();
    const torch::NoGradGuard no_grad;
    const Tensor text = Batches(config.data).at(1000).tokens.flatten();
    const int64_t n = text.numel() - 1;
    const LossOutput out = model->loss(text.slice(0, 0, n), text.slice(0, 1), Packing::of(1, n));
    EXPECT_GT(out.loads[1].load.covered.item<int64_t>(), 0) << config.name;
    KVCache cache(model->config(), 1);
    double nats = 0;
    for (int64_t t = 0; t < n; ++t) {
      const Tensor hidden = model->hidden(text.slice(0, t, t + 1), Packing::of(1, 1), &cache).hidden;
      nats -= model->logits(hidden).log_softmax(1)[0][text[t + 1].item<int64_t>()].item<double>();
    }
    return std::pair(out.loss.item<double>() / static_cast<double>(n), nats / static_cast<double>(n));
  };
  for (const auto& [score, select] : {std::pair("previous", "threshold"),
                                      {"sliding", "top_k"},
                                      {"prefix", "predictor"},
                                      {"previous", "prefix_choice"}}) {
    const auto [whole, steps] = losses(score, select);
    EXPECT_NEAR(whole, steps, 1e-4) << score << " " << select;
    EXPECT_LT(whole, 5) << "log 257 is 5.5: nothing was learned";
  }
  const auto [whole, steps] = losses("own", "expert_choice");
  EXPECT_GT(std::abs(whole - steps), 1e-3) << "the published method is not decodable, and this test sees it";
}

TEST_F(TrainerTest, BadSettingsAreNamed) {
  const auto message = [&](auto change) -> std::string {
    TrainConfig config = this->config("bad");
    change(config);
    try {
      Trainer(config).run();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message([](auto& c) { c.micro_batch = 3; }), "micro_batch: must divide data.batch_size 4, got 3");
  EXPECT_EQ(message([](auto& c) { c.data.seq_len = 200; }),
            "data.seq_len: must be at most model.max_seq_len 128, got 200");
  EXPECT_NE(message([](auto& c) {
              c.model.vocab_size = 100, c.model.eos_token_ids = {};
            }).find("model.vocab_size: must be at least"),
            std::string::npos);
  EXPECT_NE(message([](auto& c) {
              c.model.moe.branches = {{.name = "one", .num_experts = 2, .hidden = 8, .router = {.top_k = 1}}};
            }).find("model.moe.branches.0.router.top_k: a single normalised weight is always 1"),
            std::string::npos);
  EXPECT_NE(message([](auto& c) { c.runs = "/proc/nowhere"; }).find("/proc/nowhere"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.data.path = "/nowhere"; }).find("/nowhere"), std::string::npos);
}

TEST_F(TrainerTest, InitGivesTheDefaultsOfTheModelSection) {
  tiny::write_dense_checkpoint(runs / "dense");
  std::ofstream(runs / "train.yaml") << "init: " << (runs / "dense").string() << "\ndata: {path: x}\n"
                                     << "model: {max_seq_len: 64}\n";
  const TrainConfig config = load_train_config(runs / "train.yaml", {"data.seq_len=32", "steps=3"});
  EXPECT_EQ(config.model.dim, 16);
  EXPECT_EQ(config.model.max_seq_len, 64);
  // The section alone would not hold together: its MoE layer is the checkpoint's.
  Transformer hybrid(this->config("x").model);
  save_pretrained(hybrid, runs / "hybrid");
  const std::string init = "init=" + (runs / "hybrid").string();
  const TrainConfig changed = load_train_config(
      runs / "train.yaml", {init, "data.seq_len=32", "model.moe.branches.0.router.top_k=2"});
  EXPECT_EQ(changed.model.moe.branches.size(), 2u);
  EXPECT_EQ(changed.model.moe.branches[0].router.top_k, 2);
  EXPECT_EQ(config.steps, 3);
}

}  // namespace
}  // namespace hymoe
