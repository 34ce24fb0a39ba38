// Convolution by taps for AMX: a tile of 16 tokens is 64 bytes of 16 pixels that are a stride apart
// in the input, and is multiplied by signed codes, so that no sums of tokens are needed.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "kernels/tap_conv.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/amx/tile_job.h"
#include "kernels/cpu/avx512/taps.h"
#include "kernels/cpu/tap_product.h"

namespace quantal::kernels {
namespace {

// Tiles of steps, those of all tiles of rows in turn.
void decode_tiles(const TapPlan& plan, const PackedLayout& layout, const std::byte* weight,
                  int tiles, std::byte* panel) {
  for (int j = 0; j < tiles; ++j) {
    const std::byte* lines = weight + j * layout.tile_bytes() + layout.group_offset(0);
    decode_tile(plan, lines, [&](std::int64_t i, __m512i codes) __attribute__((always_inline)) {
      const std::int64_t tile = i / kTileSteps * tiles + j, step = i % kTileSteps;
      _mm512_storeu_si512(panel + tile * kTileBytes + step * kLineBytes, codes);
    });
  }
}

struct TileProduct {
  static constexpr std::int64_t kTokens = 2 * kTileTokens;
  using Registers = TileRegisters;

  template <int tiles>
  static void multiply(const TapBlock& block, std::int64_t token, std::int64_t count,
                       std::int32_t* totals) {
    if (count <= kTileTokens) return multiply<1, tiles>(block, token, totals);
    multiply<2, tiles>(block, token, totals);
  }

 private:
  template <int token_tiles, int tiles>
  static void multiply(const TapBlock& block, std::int64_t token, std::int32_t* totals) {
    const std::int64_t stride = block.plan.token_bytes();
    const auto* x = static_cast<const std::int8_t*>(block.x) + token * stride;
    const std::byte* weight = block.panel;
    for_tiles<token_tiles, tiles>(
        [](auto i, auto j) __attribute__((always_inline)) { zero_tile<i * tiles + j>(); });
    const TapRun* runs = block.plan.runs();
    for (std::int64_t r = 0; r < block.plan.run_count(); ++r) {
      const std::int8_t* run = x + runs[r].offset;
      for (std::int64_t k = 0; k < runs[r].units; ++k, run += kLineBytes) {
        for_steps<tiles>([&](auto j) __attribute__((always_inline)) {
          load_tile<kWeightTile + j>(weight + j * kTileBytes, kLineBytes);
        });
        weight += tiles * kTileBytes;
        for_steps<token_tiles>([&](auto i) __attribute__((always_inline)) {
          load_tile<kXTile + i>(run + i * kTileTokens * stride, stride);
          for_steps<tiles>([&](auto j) __attribute__((always_inline)) {
            add_signed_products<i * tiles + j, kXTile + i, kWeightTile + j>();
          });
        });
      }
    }
    for_tiles<token_tiles, tiles>([&](auto i, auto j) __attribute__((always_inline)) {
      store_tile<i * tiles + j>(totals + (i * kTileTokens * tiles + j) * kTileRows,
                                tiles * kLineBytes);
    });
  }
};

}  // namespace

const TapConvKernel tap_conv__amx{.costs = {190, 10, 1.2F, 768},
                                  .unit = static_cast<int>(kTileSteps),
                                  .decode = decode_tiles,
                                  .multiply = multiply_block<TileProduct, TapStore>};

}  // namespace quantal::kernels

#pragma GCC pop_options
