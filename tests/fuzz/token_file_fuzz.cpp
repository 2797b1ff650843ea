// A token file.
#include "fuzz/target.h"
#include "hymoe/data/token_file.h"
#include "hymoe/io/file.h"

namespace hymoe::fuzz {
namespace {

bool read(std::string_view bytes) {
  static const Folder folder;
  const auto path = folder.write("tokens.bin", bytes);
  return taken([&] {
    const TokenFile file(path);
    const int64_t count = file.num_tokens();
    if (static_cast<int64_t>(file.offsets().size()) != file.num_documents() + 1)
      broken("offsets and documents");
    if (count > 0 && file.document_of(count - 1) != file.num_documents() - 1) broken("the last document");
    std::vector<int64_t> ids(static_cast<size_t>(count));
    file.read(0, count, ids.data());
    for (const int64_t id : ids) {
      if (id < 0 || id >= file.vocab_size()) broken("an id outside of the vocabulary");
    }
    taken([&] { file.verify(); });
  });
}

std::string written(int64_t vocab_size, const std::vector<std::vector<int32_t>>& documents) {
  const Folder folder;
  TokenFileWriter writer(folder.path() / "made.bin", vocab_size, std::string(64, 'a'));
  for (const auto& document : documents) writer.add(document);
  writer.finish();
  return read_text(folder.path() / "made.bin");
}

std::vector<std::string> seeds() {
  return {written(300, {}), written(300, {{1, 2, 299}, {0}}), written(70000, {{69999}, {5, 6}, {7, 8, 9}})};
}

const Registration registration({"token_file", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
