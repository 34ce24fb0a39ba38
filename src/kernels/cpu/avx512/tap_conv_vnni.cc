// Convolution by taps for AVX-512 with VNNI: vpdpbusd multiplies the input's codes + 128 by signed
// codes, and sums begin with what that adds to them, the same for all tokens.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/tap_conv.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/taps.h"
#include "kernels/cpu/avx512/vnni.h"
#include "kernels/cpu/tap_product.h"

namespace quantal::kernels {
namespace {

// First what the sums of each tile begin with, then steps, those of all tiles in turn.
void decode_steps(const TapPlan& plan, const PackedLayout& layout, const std::byte* weight,
                  int tiles, std::byte* panel) {
  const __m512i zero_code = _mm512_set1_epi8(static_cast<char>(128));
  for (int j = 0; j < tiles; ++j) {
    const std::byte* lines = weight + j * layout.tile_bytes() + layout.group_offset(0);
    __m512i offset = _mm512_setzero_si512();
    decode_tile(plan, lines, [&](std::int64_t i, __m512i codes) __attribute__((always_inline)) {
      add_byte_products(offset, zero_code, codes);
      _mm512_storeu_si512(panel + ((i + 1) * tiles + j) * kLineBytes, codes);
    });
    _mm512_storeu_si512(panel + j * kLineBytes, _mm512_sub_epi32(_mm512_setzero_si512(), offset));
  }
}

struct VnniProduct {
  static constexpr std::int64_t kTokens = 12;
  struct Registers {};

  template <int tiles>
  static void multiply(const TapBlock& block, std::int64_t token, std::int64_t count,
                       std::int32_t* totals) {
    if (count <= 4) return multiply<tiles, 4>(block, token, totals);
    if (count <= 8) return multiply<tiles, 8>(block, token, totals);
    multiply<tiles, 12>(block, token, totals);
  }

 private:
  template <int tiles, int tokens>
  static void multiply(const TapBlock& block, std::int64_t token, std::int32_t* totals) {
    const std::int64_t stride = block.plan.token_bytes();
    const auto* x = static_cast<const std::uint8_t*>(block.x) + token * stride;
    const std::byte* weight = block.panel;
    __m512i sums[tokens][tiles];
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int j = 0; j < tiles; ++j) {
        sums[t][j] = _mm512_loadu_si512(weight + j * kLineBytes);
      }
    }
    const TapRun* runs = block.plan.runs();
    for (std::int64_t r = 0; r < block.plan.run_count(); ++r) {
      const std::uint8_t* run = x + runs[r].offset;
      for (std::int64_t k = 0; k < runs[r].units; ++k, run += 4) {
        weight += tiles * kLineBytes;
        __m512i words[tiles];
        QUANTAL_UNROLL for (int j = 0; j < tiles; ++j) {
          words[j] = _mm512_loadu_si512(weight + j * kLineBytes);
        }
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          std::int32_t codes;
          std::memcpy(&codes, run + t * stride, sizeof(codes));
          const __m512i values = _mm512_set1_epi32(codes);
          QUANTAL_UNROLL for (int j = 0; j < tiles; ++j)
              add_byte_products(sums[t][j], values, words[j]);
        }
      }
    }
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int j = 0; j < tiles; ++j) {
        _mm512_storeu_si512(totals + (t * tiles + j) * kTileRows, sums[t][j]);
      }
    }
  }
};

}  // namespace

const TapConvKernel tap_conv__avx512_vnni{.costs = {80, 15, 1.1F},
                                          .unit = 1,
                                          .is_unsigned = true,
                                          .decode = decode_steps,
                                          .multiply = multiply_block<VnniProduct, TapStore>};

}  // namespace quantal::kernels

#pragma GCC pop_options
