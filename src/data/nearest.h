#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace hymoe {

/// The end of an error about an unknown name: "; nearest: rust, there are cpp, go, rust".
std::string choices(std::string_view name, const std::vector<std::string>& names);

}  // namespace hymoe
