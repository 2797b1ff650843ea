#pragma once

#include "hymoe/data/prepare.h"

namespace hymoe {

/// The config with languages by their canonical names.
PrepareConfig normalized(PrepareConfig config);

/// What must hold before anything is read: a valid config that names output, tokenizer and sources, and an
/// output that may be written. Throws ConfigError and DataError.
void check_request(const PrepareConfig& config);

}  // namespace hymoe
