#include "train/coverage.h"

#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "hymoe/config/error.h"
#include "io/names.h"

namespace hymoe {
namespace {

using nlohmann::json;

// Elements given twice may be as many as those not given: then the sum of positions tells.
struct Given {
  TensorSpec tensor;
  int64_t count = 0;
  uint64_t positions = 0;

  void add(int64_t begin, int64_t n) {
    count += n;
    positions += static_cast<uint64_t>(begin) * static_cast<uint64_t>(n) + sum_below(n);
  }
  // 0 + 1 + ... + (n - 1) modulo 2^64
  static uint64_t sum_below(int64_t n) {
    const auto u = static_cast<uint64_t>(n);
    return u % 2 == 0 ? u / 2 * (u - 1) : (u - 1) / 2 * u;
  }
};

std::string text_of(at::ScalarType dtype, const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << dtype << " " << at::IntArrayRef(shape);
  return out.str();
}

void check(const Given& given) {
  const auto& [tensor, count, positions] = given;
  const int64_t numel = tensor.numel();
  const std::string of = " of its " + std::to_string(numel) + " elements are given by ";
  if (count < numel) throw Error(tensor.name + ": " + std::to_string(numel - count) + of + "no rank");
  if (count > numel)
    throw Error(tensor.name + ": " + std::to_string(count - numel) + of + "more than one rank");
  if (positions != Given::sum_below(numel))
    throw Error(tensor.name + ": some" + of + "more than one rank, and others by none");
}

}  // namespace

json describe(const std::vector<TensorPart>& parts) {
  std::map<std::string, Given> tensors;
  for (const auto& [shard, begin, values] : parts) {
    const TensorSpec tensor{shard.name, values.scalar_type(), shard.shape};
    Given& given = tensors.try_emplace(shard.name, Given{tensor}).first->second;
    TORCH_CHECK(given.tensor == tensor, "checkpoint: two parts of ", shard.name, " differ in dtype or shape");
    TORCH_CHECK(begin >= 0 && begin + values.numel() <= shard.local_numel(), "checkpoint: part of ",
                shard.name, " reaches past its shard: elements ", begin, " to ", begin + values.numel(),
                " of ", shard.local_numel());
    shard.for_each_run(begin, begin + values.numel(),
                       [&](int64_t, int64_t whole, int64_t count) { given.add(whole, count); });
  }
  json all = json::array();
  for (const auto& [name, given] : tensors) {
    all.push_back(
        {name, static_cast<int>(given.tensor.dtype), given.tensor.shape, given.count, given.positions});
  }
  return all;
}

std::vector<TensorSpec> whole_tensors(const std::vector<json>& descriptions) {
  std::map<std::string, Given> tensors;
  for (const json& description : descriptions) {
    for (const json& entry : description) {
      const TensorSpec tensor{entry[0], static_cast<at::ScalarType>(entry[1].get<int>()), entry[2]};
      Given& given = tensors.try_emplace(tensor.name, Given{tensor}).first->second;
      if (given.tensor != tensor) {
        throw Error(tensor.name + ": is " + text_of(given.tensor.dtype, given.tensor.shape) +
                    " on one rank and " + text_of(tensor.dtype, tensor.shape) + " on another");
      }
      given.count += entry[3].get<int64_t>();
      given.positions += entry[4].get<uint64_t>();
    }
  }
  std::vector<TensorSpec> specs;
  for (auto& [name, given] : tensors) {
    check(given);
    specs.push_back(std::move(given.tensor));
  }
  return specs;
}

std::string wants_of(const SafetensorsFolder& files, const std::vector<TensorPart>& parts) {
  std::set<std::string> names, missing, misshapen;
  for (const auto& [shard, begin, values] : parts) {
    names.insert(shard.name);
    if (!files.contains(shard.name)) {
      missing.insert(shard.name);
      continue;
    }
    const TensorInfo& info = files.info(shard.name);
    if (info.shape != shard.shape || !reads_as(info.dtype, values.scalar_type())) {
      misshapen.insert(shard.name + " (expected " + text_of(values.scalar_type(), shard.shape) + ", got " +
                       text_of(info.dtype, info.shape) + ")");
    }
  }
  std::string wanted;
  for (const std::string& name : files.names()) wanted += names.contains(name) ? '1' : '0';
  return json{{"missing", missing}, {"misshapen", misshapen}, {"wanted", wanted}}.dump();
}

std::string difference(const SafetensorsFolder& files, const std::vector<std::string>& wants) {
  std::set<std::string> missing, misshapen, extra(files.names().begin(), files.names().end());
  for (const std::string& text : wants) {
    const json want = json::parse(text);
    for (const json& name : want["missing"]) missing.insert(name);
    for (const json& name : want["misshapen"]) misshapen.insert(name);
    const std::string wanted = want["wanted"];
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i] == '1') extra.erase(files.names()[i]);
    }
  }
  std::string text;
  append_names(text, missing, "tensors missing");
  append_names(text, extra, "tensors that nothing here wants");
  append_names(text, misshapen, "tensors of another shape or type");
  return text;
}

}  // namespace hymoe
