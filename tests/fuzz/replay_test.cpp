// The fuzz targets of this room without a fuzzer: their seeds, and a few thousand mutations of them.
#include <random>

#include <gtest/gtest.h>

#include "fuzz/target.h"

namespace hymoe::fuzz {
namespace {

class Mutator {
 public:
  explicit Mutator(std::vector<std::string> seeds) : seeds_(std::move(seeds)) {}

  std::string next() {
    std::string bytes = seeds_[below(seeds_.size())];
    for (size_t i = 0, count = 1 + below(4); i < count; ++i) change(bytes);
    return bytes;
  }

 private:
  size_t below(size_t n) { return n == 0 ? 0 : random_() % n; }

  void change(std::string& bytes) {
    static const std::string kPieces[] = {"0",
                                          "-1",
                                          "9223372036854775807",
                                          "18446744073709551615",
                                          "1e999",
                                          "null",
                                          "[[[[",
                                          "{\"a\":",
                                          "\"",
                                          "\n",
                                          ",",
                                          "\xff",
                                          std::string(1, '\0'),
                                          "&a [*a]"};
    const size_t at = below(bytes.size() + 1), count = std::min(bytes.size() - at, below(16));
    switch (below(6)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        bytes.erase(at, count);
        break;
      case 2:
        bytes.insert(at, bytes.substr(at, count));
        break;
      case 3:
        bytes.replace(at, count, kPieces[below(std::size(kPieces))]);
        break;
      case 4: {  // a number becomes another
        const size_t digit = bytes.find_first_of("0123456789", at);
        if (digit == std::string::npos) break;
        const size_t end = std::min(bytes.find_first_not_of("0123456789", digit), bytes.size());
        bytes.replace(digit, end - digit, kPieces[below(5)]);
        break;
      }
      default: {  // the end of another seed
        const std::string& other = seeds_[below(seeds_.size())];
        bytes = bytes.substr(0, at) + other.substr(below(other.size() + 1));
      }
    }
  }

  std::vector<std::string> seeds_;
  std::mt19937_64 random_{1};
};

std::string shown(const std::string& bytes) { return testing::PrintToString(bytes.substr(0, 4000)); }

TEST(Fuzz, Replay) {
  constexpr int kMutations = 3000;
  ASSERT_FALSE(targets().empty());
  for (const Target& target : targets()) {
    SCOPED_TRACE(target.name);
    int refused = 0;
    for (const std::string& seed : target.seeds()) EXPECT_TRUE(target.read(seed)) << shown(seed);
    Mutator mutator(target.seeds());
    for (int i = 0; i < kMutations; ++i) {
      const std::string bytes = mutator.next();
      ASSERT_NO_THROW(refused += target.read(bytes) ? 0 : 1) << shown(bytes);
    }
    EXPECT_GT(refused, kMutations / 10);
    EXPECT_LT(refused, kMutations);
  }
}

}  // namespace
}  // namespace hymoe::fuzz
