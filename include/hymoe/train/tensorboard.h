#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace hymoe {

// Appends scalars and texts to a TensorBoard event file (TFRecord framing around tensorflow.Event protocol
// buffers).
class EventWriter {
 public:
  // Creates `folder/events.out.tfevents.<seconds>.<host>.<pid>`. Throws DataError when it cannot be written.
  explicit EventWriter(const std::filesystem::path& folder);

  // One event holding all scalars of one step.
  void write(int64_t step, const std::vector<std::pair<std::string, double>>& scalars);
  // An event with one text, Markdown to TensorBoard.
  void write_text(int64_t step, const std::string& tag, const std::string& text);

 private:
  void write_summary(int64_t step, const std::string& summary);
  void write_record(const std::string& event);

  std::filesystem::path path_;
  std::ofstream file_;
};

// CRC-32C (Castagnoli), as the TFRecord format masks and stores it.
uint32_t crc32c(const std::string& bytes);

}  // namespace hymoe
