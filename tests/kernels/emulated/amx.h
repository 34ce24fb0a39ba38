#pragma once

// What src/kernels/cpu/amx/tiles.h has of AMX, on a processor without it: as the processor's
// manual defines it, the order of additions included.

#include <cmath>
#include <cstdint>
#include <cstdlib>
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
  TileRegisters() {
    if (emulated::tiles != nullptr) std::abort();  // the inner one would release the outer one's
    emulated::tiles = tiles_;
  }
  ~TileRegisters() { emulated::tiles = nullptr; }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  emulated::Tile tiles_[8]{};
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

namespace emulated {

template <int sums, int x, int weight, typename Weight>
void add_products() {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      auto sum = emulated::tiles[sums].at<std::int32_t>(m, n);
      for (int i = 0; i < 64; ++i) {
        sum += static_cast<std::int8_t>(emulated::tiles[x].bytes[m][i]) *
               static_cast<Weight>(emulated::tiles[weight].bytes[i / 4][4 * n + i % 4]);
      }
      emulated::tiles[sums].set(m, n, sum);
    }
  }
}

}  // namespace emulated

template <int sums, int x, int weight>
void add_byte_products() {
  emulated::add_products<sums, x, weight, std::uint8_t>();
}
template <int sums, int x, int weight>
void add_signed_products() {
  emulated::add_products<sums, x, weight, std::int8_t>();
}

template <int sums, int x, int weight>
void add_bf16_products() {
  // [row][i] of x, [row of the result][i] of the weight.
  float xs[16][32], weights[16][32];
  for (int row = 0; row < 16; ++row) {
    for (int i = 0; i < 32; ++i) {
      const auto number = [](int tile, int line, int index) {
        const std::uint32_t half = emulated::tiles[tile].at<std::uint16_t>(line, index);
        return emulated::bf16_lane(half << 16);
      };
      xs[row][i] = number(x, row, i);
      weights[row][i] = number(weight, i / 2, 2 * row + i % 2);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float parts[2] = {};
      for (int i = 0; i < 32; ++i) {
        parts[i % 2] = emulated::flushed(std::fma(xs[m][i], weights[n][i], parts[i % 2]));
      }
      const float before = emulated::flushed(emulated::tiles[sums].at<float>(m, n));
      const float sum = before + emulated::flushed(parts[0] + parts[1]);
      emulated::tiles[sums].set(m, n, emulated::flushed(sum));
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
