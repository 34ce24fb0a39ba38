#pragma once

// Included by this folder's files only: AMX's eight tiles, of 16 rows of 64 bytes each.
//
// Not the compiler's intrinsics: GCC 12's do not say that they read memory, so that stores to a
// tile's memory may come after the tile was loaded.

#include <cstdint>

#if defined(QUANTAL_EMULATE)
#include "kernels/emulated/amx.h"
#else

namespace quantal::kernels {
namespace {

/// Tiles that this thread may use while the object lives. Whoever else uses tiles on the thread
/// configures them again afterwards, as oneDNN does in each call.
class TileRegisters {
 public:
  TileRegisters() {
    Shape shape{};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) shape.rows[i] = 16, shape.row_bytes[i] = 64;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease" : : : "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct Shape {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  static_assert(sizeof(Shape) == 64);
};

template <int tile>
inline __attribute__((always_inline)) void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}

/// 16 rows, `stride` bytes from each other.
template <int tile>
inline __attribute__((always_inline)) void load_tile(const void* from, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(stride), "i"(tile)
                   : "memory");
}
template <int tile>
inline __attribute__((always_inline)) void store_tile(void* to, std::int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

/// sums[m][n] += Σ x[m][4k + j] · weight[k][4n + j] of signed and unsigned bytes, int32.
template <int sums, int x, int weight>
inline __attribute__((always_inline)) void add_byte_products() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(weight));
}

/// The same of signed bytes alone.
template <int sums, int x, int weight>
inline __attribute__((always_inline)) void add_signed_products() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(weight));
}

/// sums[m][n] += Σ x[m][2k + j] · weight[k][2n + j] of bf16 numbers, fp32. Denormal numbers are
/// zeros.
template <int sums, int x, int weight>
inline __attribute__((always_inline)) void add_bf16_products() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(weight));
}

}  // namespace
}  // namespace quantal::kernels

#endif
