#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace hymoe {

// Appends scalars to a TensorBoard event file (TFRecord framing around tensorflow.Event protocol buffers).
class EventWriter {
 public:
  // Creates `folder/events.out.tfevents.<seconds>.<host>.<pid>`. Throws DataError when it cannot be written.
  explicit EventWriter(const std::filesystem::path& folder);

  // One event holding all scalars of one step.
  void write(int64_t step, const std::vector<std::pair<std::string, double>>& scalars);

 private:
  void write_record(const std::string& event);

  std::filesystem::path path_;
  std::ofstream file_;
};

// CRC-32C (Castagnoli), as the TFRecord format masks and stores it.
uint32_t crc32c(const std::string& bytes);

}  // namespace hymoe
