#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/growth/grow.h"

namespace hymoe {

/// Experts of one branch, or of a Hugging Face model's layers.
struct GrownPool {
  int64_t experts;
  bool grows;              // it becomes config.experts times as large
  bool shared_row;         // the router has one row more, the last
  double bias_factor = 1;  // of the router's selection bias, which joins scores that a softmax shares out
};

/// What a folder's configs say of the model before and after growth.
struct GrownConfig {
  std::vector<GrownLayer> layers = {};
  std::map<std::string, GrownPool> pools = {};  // by branch; "" in Hugging Face's models
  nlohmann::ordered_json json = {};             // the new config.json
  std::string yaml = {};                        // the new config.yaml; empty where there is none
};

/// Throws ConfigError for what the model has not, DataError for a config.json that is not understood.
GrownConfig grown_config(const std::filesystem::path& source, const GrowConfig& config);

}  // namespace hymoe
