#include "train/together.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include <ATen/ops/zeros.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

constexpr char kResult = 'r', kDataError = 'd', kError = 'e';

std::vector<std::string> gather(const Group& ranks, const std::string& text) {
  Tensor size = at::zeros({1}, at::kLong);
  *size.mutable_data_ptr<int64_t>() = static_cast<int64_t>(text.size());
  const Tensor sizes = ranks.all_gather(size);
  const auto* counts = sizes.const_data_ptr<int64_t>();
  const int64_t longest = *std::max_element(counts, counts + ranks.size());
  Tensor padded = at::zeros({longest}, at::kByte);
  std::memcpy(padded.data_ptr(), text.data(), text.size());
  const Tensor all = ranks.all_gather(padded);
  std::vector<std::string> texts;
  for (int64_t rank = 0; rank < ranks.size(); ++rank) {
    const auto* begin = static_cast<const char*>(all.const_data_ptr()) + rank * longest;
    texts.emplace_back(begin, begin + counts[rank]);
  }
  return texts;
}

}  // namespace

std::vector<std::string> together(const Group& ranks, const std::function<std::string()>& step) {
  std::string text;
  std::exception_ptr own;
  try {
    text = kResult + step();
  } catch (const DataError& error) {
    own = std::current_exception();
    text = kDataError + std::string(error.what());
  } catch (const std::exception& error) {
    own = std::current_exception();
    text = kError + std::string(error.what());
    text.resize(std::min(text.size(), text.find('\n')));
  }
  std::vector<std::string> texts;
  try {
    texts = gather(ranks, text);
  } catch (const std::exception&) {
    if (!own) throw;
  }
  if (own) std::rethrow_exception(own);
  for (std::string& other : texts) {
    const char kind = other[0];
    other.erase(0, 1);
    if (kind == kError) throw Error(other);
    if (kind == kDataError)
      throw DataError(other.substr(0, other.find(": ")), other.substr(other.find(": ") + 2));
  }
  return texts;
}

}  // namespace hymoe
