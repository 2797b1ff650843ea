#pragma once

namespace hymoe {

/// This library's version; the build reads it from this line.
inline constexpr const char* kVersion = "0.1.0";

}  // namespace hymoe
