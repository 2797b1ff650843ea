#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "hymoe/config/error.h"

namespace hymoe {

/// The values a field, or each element of a list, optional or map field, may take; empty parts allow
/// everything.
struct Limits {
  std::optional<double> at_least, at_most, above, below = {};
  std::vector<std::string> one_of = {};  // as format_scalar() writes them
};

struct Type;

/// One field of a config struct without its C++ type.
struct FieldInfo {
  std::string name = {};
  std::string help = {};
  const Type& (*type)() = nullptr;
  std::function<void*(void*)> member;  // address of the struct -> address of the field
  Limits limits;
};

/// A config type at run time. Everything that loads, writes, checks and describes configs works on a `Type`
/// and a `void*`, so that a new config struct costs a few small functions and no copy of the loader.
struct Type {
  enum class Kind { kBool, kInteger, kNumber, kText, kStruct, kList, kOptional, kMap };
  using Edit = std::function<void(void*)>;
  using Visit = std::function<void(const std::string& key, const void* element)>;

  Kind kind;
  void (*with_default)(const Edit&);  // calls with a new value that has the type's defaults

  std::vector<FieldInfo> fields = {};    // of a struct
  void (*check)(const void*) = nullptr;  // a struct's own check(), if it has one

  const Type* element = nullptr;  // of a list, an optional or a map, as are the functions below
  void (*clear)(void*) = nullptr;
  void (*visit)(const void*, const Visit&) = nullptr;                  // key: index, "" or the map's key
  void (*edit)(void*, const std::string& key, const Edit&) = nullptr;  // makes the element if it is not there
};

/// The text of a scalar in YAML and messages; numbers in the shortest form that reads back as the same value.
std::string format_scalar(bool value);
std::string format_scalar(int64_t value);
std::string format_scalar(double value);
inline std::string format_scalar(std::string_view value) { return std::string(value); }

namespace detail {

template <typename T>
inline constexpr bool is_vector = false;
template <typename T>
inline constexpr bool is_vector<std::vector<T>> = true;
template <typename T>
inline constexpr bool is_optional = false;
template <typename T>
inline constexpr bool is_optional<std::optional<T>> = true;
template <typename T>
inline constexpr bool is_map = false;
template <typename T>
inline constexpr bool is_map<std::map<std::string, T>> = true;

// What constraints apply to: the innermost element of lists, optionals and maps.
template <typename T>
struct LeafOf {
  using type = T;
};
template <typename T>
struct LeafOf<std::vector<T>> : LeafOf<T> {};
template <typename T>
struct LeafOf<std::optional<T>> : LeafOf<T> {};
template <typename T>
struct LeafOf<std::map<std::string, T>> : LeafOf<T> {};

template <typename T>
const Type& type_of();

template <typename T>
void describe_list(Type& type) {
  using Element = typename T::value_type;
  type.kind = Type::Kind::kList;
  type.element = &type_of<Element>();
  type.visit = [](const void* list, const Type::Visit& visit) {
    size_t i = 0;
    for (const Element& element : *static_cast<const T*>(list)) visit(std::to_string(i++), &element);
  };
  type.edit = [](void* list, const std::string& key, const Type::Edit& edit) {
    T& elements = *static_cast<T*>(list);
    const size_t i = std::stoul(key);
    if (i == elements.size()) elements.push_back(Element{});
    Element element = std::move(elements.at(i));  // a copy back and forth serves std::vector<bool> too
    edit(&element);
    elements[i] = std::move(element);
  };
}

template <typename T>
void describe_optional(Type& type) {
  type.kind = Type::Kind::kOptional;
  type.element = &type_of<typename T::value_type>();
  type.visit = [](const void* optional, const Type::Visit& visit) {
    if (const T& value = *static_cast<const T*>(optional)) visit("", &*value);
  };
  type.edit = [](void* optional, const std::string&, const Type::Edit& edit) {
    T& value = *static_cast<T*>(optional);
    if (!value) value.emplace();
    edit(&*value);
  };
}

template <typename T>
void describe_map(Type& type) {
  type.kind = Type::Kind::kMap;
  type.element = &type_of<typename T::mapped_type>();
  type.visit = [](const void* map, const Type::Visit& visit) {
    for (const auto& [key, element] : *static_cast<const T*>(map)) visit(key, &element);
  };
  type.edit = [](void* map, const std::string& key, const Type::Edit& edit) {
    edit(&(*static_cast<T*>(map))[key]);
  };
}

template <typename T>
Type make_type() {
  Type type;
  type.with_default = [](const Type::Edit& edit) {
    T value{};
    edit(&value);
  };
  if constexpr (std::same_as<T, bool>) {
    type.kind = Type::Kind::kBool;
  } else if constexpr (std::same_as<T, int64_t>) {
    type.kind = Type::Kind::kInteger;
  } else if constexpr (std::same_as<T, double>) {
    type.kind = Type::Kind::kNumber;
  } else if constexpr (std::same_as<T, std::string>) {
    type.kind = Type::Kind::kText;
  } else if constexpr (is_vector<T> || is_optional<T> || is_map<T>) {
    type.clear = [](void* value) { *static_cast<T*>(value) = T{}; };
    if constexpr (is_vector<T>) describe_list<T>(type);
    if constexpr (is_optional<T>) describe_optional<T>(type);
    if constexpr (is_map<T>) describe_map<T>(type);
  } else {
    static_assert(
        requires { T::fields(); },
        "a config field is a bool, int64_t, double, std::string, a struct with fields(), or a "
        "std::vector, std::optional or std::map<std::string, ...> of these");
    type.kind = Type::Kind::kStruct;
    type.fields = T::fields();
    if constexpr (requires(const T& config) { config.check(); }) {
      type.check = [](const void* config) { static_cast<const T*>(config)->check(); };
    }
  }
  return type;
}

template <typename T>
const Type& type_of() {
  static const Type type = make_type<T>();
  return type;
}

}  // namespace detail

/// A field under construction: the constraints return it again. On a list, optional or map they apply to its
/// elements.
template <typename Leaf>
class Field {
 public:
  static constexpr bool kIsNumber = std::same_as<Leaf, int64_t> || std::same_as<Leaf, double>;
  static constexpr bool kIsScalar = kIsNumber || std::same_as<Leaf, std::string>;

  explicit Field(FieldInfo info) : info_(std::move(info)) {}

  Field at_least(double bound) && requires kIsNumber { return with(&Limits::at_least, bound); }
  Field at_most(double bound) && requires kIsNumber { return with(&Limits::at_most, bound); }
  Field above(double bound) && requires kIsNumber { return with(&Limits::above, bound); }
  Field below(double bound) && requires kIsNumber { return with(&Limits::below, bound); }
  Field one_of(std::initializer_list<std::conditional_t<kIsNumber, Leaf, std::string_view>> values) &&
      requires kIsScalar {
    for (const auto& value : values) info_.limits.one_of.push_back(format_scalar(value));
    return std::move(*this);
  }

  FieldInfo take() && { return std::move(info_); }

 private:
  Field with(std::optional<double> Limits::*limit, double bound) {
    info_.limits.*limit = bound;
    return std::move(*this);
  }

  FieldInfo info_;
};

/// Names a member of a config struct, with one line of help.
template <typename Struct, typename Member>
auto field(std::string name, Member Struct::*member, std::string help) {
  return Field<typename detail::LeafOf<Member>::type>(
      {.name = std::move(name),
       .help = std::move(help),
       .type = &detail::type_of<Member>,
       .member = [member](void* config) -> void* { return &(static_cast<Struct*>(config)->*member); },
       .limits = {}});
}

/// What a config struct's `static auto fields()` returns: its fields, in the order they are written and
/// documented.
template <typename... Leaf>
std::vector<FieldInfo> fields(Field<Leaf>... field) {
  std::vector<FieldInfo> all;
  all.reserve(sizeof...(field));
  (all.push_back(std::move(field).take()), ...);
  return all;
}

}  // namespace hymoe
