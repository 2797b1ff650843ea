#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>

#include <ATen/record_function.h>

namespace hymoe {

/// How many tensor operations ran, and those for which the host would wait for a GPU.
struct Counts {
  int64_t operations = 0;
  std::multiset<std::string> waits = {};
};

inline Counts count(const std::function<void()>& run) {
  static Counts counts;
  static int inside;  // what LibTorch's operation does on the CPU in its inside is not what it does on a GPU
  static const auto closed = [](const at::RecordFunction& f) {
    return std::string("aten::_grouped_mm") == f.name();
  };
  counts = {};
  inside = 0;
  const auto enter = [](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
    static const std::set<std::string> waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
                                                  "aten::masked_select", "aten::is_nonzero"};
    const std::string name = f.name();
    const auto in = f.inputs();
    // As Tensor::cpu() asks: for a device and the dtype that is there. Others want another tensor's device.
    const bool to_host = name == "aten::to" && in.size() == 8 && in[3].isDevice() && in[1].isInt() &&
                         in[1].toScalarType() == in[0].toTensor().scalar_type();
    const bool length = name == "aten::repeat_interleave" && in.back().isNone();
    ++counts.operations;
    inside += closed(f);
    if (inside == 0 && (waiting.contains(name) || to_host || length)) counts.waits.insert(name);
    return nullptr;
  };
  const auto leave = [](const at::RecordFunction& f, at::ObserverContext*) { inside -= closed(f); };
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(enter, leave).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  run();
  at::removeCallback(handle);
  return counts;
}

}  // namespace hymoe
