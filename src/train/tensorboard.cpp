#include "hymoe/train/tensorboard.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

// The few pieces of the protocol buffer wire format that an Event needs.
void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

template <class T>
void put_fixed(std::string& out, T value) {
  static_assert(std::endian::native == std::endian::little);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void put_key(std::string& out, uint32_t field, uint32_t wire_type) {
  put_varint(out, field << 3 | wire_type);
}

void put_bytes(std::string& out, uint32_t field, const std::string& bytes) {
  put_key(out, field, 2);
  put_varint(out, bytes.size());
  out += bytes;
}

std::string event_at(double wall_time) {
  std::string event;
  put_key(event, 1, 1);  // Event.wall_time
  put_fixed(event, wall_time);
  return event;
}

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

uint32_t masked_crc(const std::string& bytes) {
  const uint32_t crc = crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

}  // namespace

uint32_t crc32c(const std::string& bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ ((c & 1) ? 0x82f63b78u : 0u);
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (const char byte : bytes) crc = table[(crc ^ static_cast<uint8_t>(byte)) & 0xff] ^ (crc >> 8);
  return ~crc;
}

EventWriter::EventWriter(const std::filesystem::path& folder) {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  path_ = folder / ("events.out.tfevents." + std::to_string(static_cast<int64_t>(now())) + "." + host.data() +
                    "." + std::to_string(getpid()));
  file_.open(path_, std::ios::binary | std::ios::app);
  std::string event = event_at(now());
  put_bytes(event, 3, "brain.Event:2");  // Event.file_version
  write_record(event);
}

void EventWriter::write(int64_t step, const std::vector<std::pair<std::string, double>>& scalars) {
  std::string summary;
  for (const auto& [tag, value] : scalars) {
    std::string entry;
    put_bytes(entry, 1, tag);  // Summary.Value.tag
    put_key(entry, 2, 5);      // Summary.Value.simple_value
    put_fixed(entry, static_cast<float>(value));
    put_bytes(summary, 1, entry);
  }
  write_summary(step, summary);
}

void EventWriter::write_text(int64_t step, const std::string& tag, const std::string& text) {
  std::string plugin, metadata, tensor, entry, summary;
  put_bytes(plugin, 1, "text");    // PluginData.plugin_name
  put_bytes(metadata, 1, plugin);  // SummaryMetadata.plugin_data
  put_key(tensor, 1, 0);           // TensorProto.dtype
  put_varint(tensor, 7);           // DT_STRING
  put_bytes(tensor, 2, "");        // TensorProto.tensor_shape, of a scalar
  put_bytes(tensor, 8, text);      // TensorProto.string_val
  put_bytes(entry, 1, tag);
  put_bytes(entry, 8, tensor);    // Summary.Value.tensor
  put_bytes(entry, 9, metadata);  // Summary.Value.metadata
  put_bytes(summary, 1, entry);
  write_summary(step, summary);
}

void EventWriter::write_summary(int64_t step, const std::string& summary) {
  std::string event = event_at(now());
  put_key(event, 2, 0);  // Event.step
  put_varint(event, static_cast<uint64_t>(step));
  put_bytes(event, 5, summary);  // Event.summary
  write_record(event);
}

void EventWriter::write_record(const std::string& event) {
  std::string length, record;
  put_fixed(length, static_cast<uint64_t>(event.size()));
  record = length;
  put_fixed(record, masked_crc(length));
  record += event;
  put_fixed(record, masked_crc(event));
  file_.write(record.data(), static_cast<std::streamsize>(record.size()));
  file_.flush();
  if (!file_) throw DataError(path_.string(), std::string("cannot write: ") + std::strerror(errno));
}

}  // namespace hymoe
