#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <quantal/safetensors.h>

namespace quantal::io {

inline constexpr std::string_view kMetadataKey = "__metadata__";
inline constexpr std::uint64_t kLengthBytes = 8;  // of the header's length, before the header

/// A header whose every claim was checked.
struct Header {
  safetensors::Metadata metadata;
  std::vector<safetensors::TensorInfo> tensors;  // by offset
  std::vector<std::uint32_t> by_name;            // indices into tensors, names ascending
  std::vector<std::string> warnings;

  const safetensors::TensorInfo* find(std::string_view name) const;
};

/// The header's length from a file's first bytes; `file_size` bounds it.
/// kHeaderTooSmall, kHeaderTooLarge, kInvalidHeaderLength.
Result<std::uint64_t> header_length(std::span<const std::byte> first_bytes, std::uint64_t file_size,
                                    std::string_view source);

/// Parses `json` for a file with `data_size` bytes after its header. Strict: see ReadOptions.
Result<Header> parse_header(std::string_view json, std::uint64_t data_size, std::string_view source,
                            bool strict);

}  // namespace quantal::io
