#include "hymoe/train/metrics.h"

#include <cmath>
#include <fstream>

#include <gtest/gtest.h>

#include "hymoe/io/file.h"
#include "hymoe/train/report.h"
#include "tiny.h"

namespace hymoe {
namespace {

BranchLoad load_of(const std::vector<int64_t>& counts, int64_t covered, int64_t rows) {
  return {.name = "token",
          .rows_per_expert = at::tensor(counts),
          .covered = at::scalar_tensor(covered, at::kLong),
          .rows = at::scalar_tensor(rows, at::kLong)};
}

TEST(LoadSummary, OfEvenUnevenAndEmptyLoads) {
  const LoadSummary even = summarize(load_of({5, 5, 5, 5}, 20, 20));
  EXPECT_DOUBLE_EQ(even.load, 1);
  EXPECT_NEAR(even.entropy, 1, 1e-12);
  EXPECT_EQ(even.dead_experts, 0);
  EXPECT_DOUBLE_EQ(even.coverage, 1);
  const LoadSummary one = summarize(load_of({12, 0, 0, 0}, 12, 16));
  EXPECT_DOUBLE_EQ(one.load, 4);
  EXPECT_DOUBLE_EQ(one.entropy, 0);
  EXPECT_EQ(one.dead_experts, 3);
  EXPECT_DOUBLE_EQ(one.coverage, 0.75);
  const LoadSummary none = summarize(load_of({0, 0}, 0, 16));
  EXPECT_DOUBLE_EQ(none.load, 0);
  EXPECT_DOUBLE_EQ(none.entropy, 0);
  EXPECT_EQ(none.dead_experts, 2);
  EXPECT_EQ(none.cv, 0);
}

TEST(LoadSummary, SpreadOfTheExpertsRows) {
  const LoadSummary even = summarize(load_of({5, 5, 5, 5}, 20, 20));
  EXPECT_DOUBLE_EQ(even.cv, 0);
  EXPECT_DOUBLE_EQ(even.p10, 1);
  EXPECT_DOUBLE_EQ(even.p90, 1);
  const LoadSummary rising = summarize(load_of({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 55, 55));
  EXPECT_DOUBLE_EQ(rising.cv, std::sqrt(10.0) / 5);
  EXPECT_DOUBLE_EQ(rising.p10, 0.2);
  EXPECT_DOUBLE_EQ(rising.p50, 1);
  EXPECT_DOUBLE_EQ(rising.p90, 1.8);
}

TEST(LoadSummary, OverlapOfTwoBranchesChoices) {
  const auto overlap = [](const std::vector<int64_t>& joint, int64_t before) {
    BranchLoad load = load_of({5, 5}, 10, 10);
    load.joint = at::tensor(joint).view({before, -1});
    return summarize(load).overlap.value();
  };
  EXPECT_NEAR(overlap({2, 4, 3, 6}, 2), 0, 1e-12) << "independent";
  EXPECT_NEAR(overlap({5, 0, 0, 0, 0, 5}, 2), 1, 1e-12) << "one follows from the other";
  EXPECT_NEAR(overlap({5, 0, 0, 2, 0, 3}, 3), 1, 1e-12) << "whatever the number of experts";
  EXPECT_EQ(overlap({5, 5, 0, 0}, 2), 0) << "one never varies";
  EXPECT_EQ(overlap({0, 0, 0, 0}, 2), 0);
  EXPECT_FALSE(summarize(load_of({5, 5}, 10, 10)).overlap.has_value());
}

TEST(MetricsLog, DropsRowsThatAResumedRunWillLogAgain) {
  TemporaryFolder folder;
  {
    MetricsLog log(folder.path(), -1);
    for (int step = 1; step <= 4; ++step) log.write({{"step", step}, {"lm_loss", 1.0 / step}});
  }
  std::ofstream(folder / "metrics.jsonl", std::ios::app) << "{\"step\":5,\"lm_";  // killed while writing
  MetricsLog log(folder.path(), 2);
  log.write({{"step", 3}, {"lm_loss", 7.0}});
  EXPECT_EQ(read_text(folder / "metrics.jsonl"),
            "{\"step\":1,\"lm_loss\":1.0}\n{\"step\":2,\"lm_loss\":0.5}\n{\"step\":3,\"lm_loss\":7.0}\n");
}

TEST(Report, HasAChartForEveryMetric) {
  TemporaryFolder folder;
  std::ofstream(folder / "metrics.jsonl") << "{\"step\":1,\"lm_loss\":2.4}\n";
  write_report(folder.path());
  const std::string page = read_text(folder / "report.html");
  for (const std::string name :
       {"load",        "load_cv",       "load_p10",       "load_p50",    "load_p90",
        "entropy",     "dead_experts",  "coverage",       "uncovered",   "shared",
        "gate_weight", "shared_weight", "router_entropy", "overlap",     "dropped",
        "unrivalled",  "flip_rate",     "predictor_loss", "router_grad", "router_aux_grad"}) {
    EXPECT_NE(page.find(name + ": '"), std::string::npos) << name;
  }
}

TEST(Report, IsOnePageWithAllRowsThatNothingInThemCanBreak) {
  TemporaryFolder folder;
  std::ofstream(folder / "metrics.jsonl") << R"({"step":0,"loss/rust":2.5})"
                                             "\n"
                                          << R"({"step":1,"lm_loss":2.4,"note":"</script><b>"})"
                                             "\n";
  write_report(folder.path());
  const std::string page = read_text(folder / "report.html");
  EXPECT_NE(page.find("\"loss/rust\":2.5"), std::string::npos);
  EXPECT_EQ(page.find("</script><b>"), std::string::npos);
  EXPECT_EQ(page.find("http://"),
            page.find("http://www.w3.org/2000/svg"));  // a name, not an address that is loaded
  EXPECT_EQ(page.find("https://"), std::string::npos);
}

}  // namespace
}  // namespace hymoe
