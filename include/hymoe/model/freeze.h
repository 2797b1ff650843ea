#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "hymoe/model/transformer.h"

namespace hymoe {

/// Whether `name` is `pattern`, in which every * stands for any run of characters (also none).
bool name_matches(std::string_view pattern, std::string_view name);

/// Parameters of the whole model that its config's `freeze` patterns name. Throws ConfigError for a pattern
/// that names none.
std::vector<std::string> frozen_parameters(const Transformer& model);

/// Stops gradients to those parameters and returns their names.
std::vector<std::string> freeze_parameters(Transformer& model);

}  // namespace hymoe
