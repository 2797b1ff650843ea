#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <utility>

#include <c10/core/ScalarType.h>

namespace hymoe {

inline constexpr std::array<std::pair<std::string_view, at::ScalarType>, 15> kSafetensorsDtypes{{
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U64", at::kUInt64},
    {"U32", at::kUInt32},
    {"U16", at::kUInt16},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
}};

inline std::optional<at::ScalarType> dtype_from_safetensors(std::string_view name) {
  for (const auto& [text, dtype] : kSafetensorsDtypes) {
    if (text == name) return dtype;
  }
  return std::nullopt;
}

inline std::optional<std::string_view> dtype_to_safetensors(at::ScalarType dtype) {
  for (const auto& [text, candidate] : kSafetensorsDtypes) {
    if (candidate == dtype) return text;
  }
  return std::nullopt;
}

}  // namespace hymoe
