#pragma once

#include <string_view>

#include <c10/core/ScalarType.h>
#include <nlohmann/json.hpp>

#include "hymoe/model/config.h"

namespace hymoe {

/// modeling_hymoe.py, which CMake makes a source of.
extern const std::string_view kModelingCode;

/// config.json with model_type "hymoe", whatever the config.
nlohmann::ordered_json our_config_json(const ModelConfig& config, at::ScalarType dtype, bool noncausal);

}  // namespace hymoe
