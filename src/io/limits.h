#pragma once

#include <cstddef>
#include <cstdint>

/// What a file may ask for. Every limit is checked before the allocation that it bounds.
namespace quantal::io {

inline constexpr std::uint64_t kMaxHeader = 100'000'000;                // as the reference reader
inline constexpr std::uint64_t kMaxIndex = std::uint64_t{64} << 20;     // a shard index, in bytes
inline constexpr std::uint64_t kMaxDocument = std::uint64_t{16} << 20;  // a quantization map
inline constexpr std::size_t kMaxDepth = 8;
inline constexpr std::size_t kMaxRank = 64;
inline constexpr std::uint64_t kMaxDim = std::uint64_t{1} << 62;
inline constexpr std::size_t kMaxName = 4096;
inline constexpr std::size_t kMaxMetadata = std::size_t{1} << 18;  // entries: 112 bytes each in RAM
inline constexpr std::size_t kMaxWarnings = 16;
inline constexpr std::uint64_t kDataAlignment = 64;  // a cache line, and an AVX-512 register

}  // namespace quantal::io
