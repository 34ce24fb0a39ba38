#pragma once

// What src/kernels/cpu/amx/tiles.h has of AMX, on a processor without it: as the processor's
// manual defines it, the order of additions included.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/emulated/avx512.h"

namespace quantal::kernels {
namespace {
namespace emulated {

constexpr int kTileRows = 16, kTileBytes = 64;

struct Tile {
  template <typename T>
  T at(int row, int index) const {
    T value;
    std::memcpy(&value, bytes[row] + index * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void set(int row, int index, T value) {
    std::memcpy(bytes[row] + index * sizeof(T), &value, sizeof(T));
  }
  std::uint8_t bytes[kTileRows][kTileBytes];
};

/// Null: not configured.
inline thread_local Tile* tiles = nullptr;

}  // namespace emulated

class TileRegisters {
 public:
  TileRegisters() : before_(emulated::tiles) { emulated::tiles = tiles_; }
  ~TileRegisters() { emulated::tiles = before_; }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  emulated::Tile tiles_[8]{};
  emulated::Tile* before_;
};

template <int tile>
void zero_tile() {
  emulated::tiles[tile] = {};
}

template <int tile>
void load_tile(const void* from, std::int64_t stride) {
  for (int row = 0; row < emulated::kTileRows; ++row) {
    std::memcpy(emulated::tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride,
                emulated::kTileBytes);
  }
}
template <int tile>
void store_tile(void* to, std::int64_t stride) {
  for (int row = 0; row < emulated::kTileRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulated::tiles[tile].bytes[row],
                emulated::kTileBytes);
  }
}

template <int sums, int x, int weight>
void add_byte_products() {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      auto sum = emulated::tiles[sums].at<std::int32_t>(m, n);
      for (int i = 0; i < 64; ++i) {
        sum += emulated::tiles[x].at<std::int8_t>(m, i) *
               emulated::tiles[weight].at<std::uint8_t>(i / 4, 4 * n + i % 4);
      }
      emulated::tiles[sums].set(m, n, sum);
    }
  }
}

template <int sums, int x, int weight>
void add_bf16_products() {
  const auto number = [](int tile, int row, int index) {
    return emulated::bf16_lane(std::uint32_t{emulated::tiles[tile].at<std::uint16_t>(row, index)}
                               << 16);
  };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float parts[2] = {};
      for (int i = 0; i < 32; ++i) {
        const float product_sum =
            std::fma(number(x, m, i), number(weight, i / 2, 2 * n + i % 2), parts[i % 2]);
        parts[i % 2] = emulated::flushed(product_sum);
      }
      const float before = emulated::flushed(emulated::tiles[sums].at<float>(m, n));
      emulated::tiles[sums].set(m, n,
                                emulated::flushed(before + emulated::flushed(parts[0] + parts[1])));
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
