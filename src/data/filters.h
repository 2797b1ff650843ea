#pragma once

#include <string>
#include <string_view>

#include "hymoe/data/prepare.h"

namespace hymoe {

/// Takes a byte order mark off and makes every line end (\r\n and \r too) a \n.
void normalize_newlines(std::string& text);

/// Why a document is left out, as the manifest names it; empty when it is taken. `prose`: rules for source
/// code do not apply.
std::string_view reject(std::string_view text, bool prose, const FilterConfig& filters);

}  // namespace hymoe
