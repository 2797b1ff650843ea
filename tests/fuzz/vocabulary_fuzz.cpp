// vocab.json and merges.txt; or, when there is but one file, ranks as tiktoken has them.
#include "fuzz/tokenizer_use.h"

namespace hymoe::fuzz {
namespace {

bool read(std::string_view bytes) {
  static const Folder folder;
  const std::vector<std::string_view> files = split_files(bytes);
  std::filesystem::path path;
  if (files.size() == 1) {
    path = folder.write("a.tiktoken", files[0]);
  } else {
    path = folder.write("vocab.json", files[0]);
    folder.write("merges.txt", files[1]);
  }
  return taken([&] { use(Tokenizer::load(path), "abab abc<|endoftext|> 12 a\u0301"); });
}

std::string base64(std::string_view bytes) {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const auto byte = [&](size_t j) { return j < bytes.size() ? static_cast<unsigned char>(bytes[j]) : 0u; };
    const unsigned bits = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
    for (size_t digit = 0; digit < 4; ++digit)
      text += i + digit > bytes.size() ? '=' : kDigits[bits >> (18 - 6 * digit) & 63];
  }
  return text;
}

std::vector<std::string> seeds() {
  std::string ranks;
  int rank = 0;
  for (int byte = 0; byte < 256; ++byte)
    ranks += base64(std::string(1, static_cast<char>(byte))) + " " + std::to_string(rank++) + "\n";
  for (const char* token : {"ab", "abc", "abab"})
    ranks += base64(token) + " " + std::to_string(rank++) + "\n";
  const std::string zero(1, '\0');
  return {ranks,
          R"({"a":0,"b":1,"c":2,"ab":3,"abc":4,"<|endoftext|>":5})" + zero + "#version: 0.2\na b\nab c\n"};
}

const Registration registration({"vocabulary", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
