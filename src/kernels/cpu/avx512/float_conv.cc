// Weight-only convolution for AVX-512: the sums of AVX2's, of up to 64 rows at once.
#include "kernels/float_conv.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/for_qtype.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx2/positions.h"
#include "kernels/cpu/avx512/float_lines.h"

namespace quantal::kernels {
namespace {

// sums[token][tile][16] += Σ x[token][c] · panels[tile][c][16]: up to 24 registers of sums.
template <int tokens, int tiles, std::int64_t panel_columns>
void multiply_panels(const Positions::Block& given, const float* panels, std::int64_t columns,
                     float* sums) {
  const Positions::Block x = given;  // whose address nobody has: it stays in registers
  __m512 total[tokens][tiles];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int i = 0; i < tiles; ++i) {
      total[t][i] = _mm512_loadu_ps(sums + (t * tiles + i) * kTileRows);
    }
  }
  for (std::int64_t c = 0; c < columns; ++c, panels += kTileRows) {
    __m512 weights[tiles];
    QUANTAL_UNROLL for (int i = 0; i < tiles; ++i) {
      weights[i] = _mm512_loadu_ps(panels + i * panel_columns * kTileRows);
    }
    const std::int64_t column = x.column(c);
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const __m512 value = _mm512_set1_ps(*x.at(t, column));
      QUANTAL_UNROLL for (int i = 0; i < tiles; ++i) {
        total[t][i] = _mm512_fmadd_ps(weights[i], value, total[t][i]);
      }
    }
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int i = 0; i < tiles; ++i) {
      _mm512_storeu_ps(sums + (t * tiles + i) * kTileRows, total[t][i]);
    }
  }
}

template <QTypeId qtype>
struct Panels {
  using Line = FloatLine<qtype>;
  // Those of four tiles stay in the first-level cache.
  static constexpr std::int64_t kColumns = 96;
  static constexpr std::int64_t kDepth = Line::kSteps;

  static void decode(const PackedLayout& layout, const std::byte* tile, std::int64_t group,
                     std::int64_t first, std::int64_t count, float* panel) {
    constexpr std::int64_t kPanelBytes = kColumns / kDepth * kLineBytes;
    const TileScales scales(layout, tile, group);
    const std::byte* lines = tile + layout.group_offset(group) + first * kLineBytes;
    for (std::int64_t i = 0; i < count; ++i, lines += kLineBytes, panel += kDepth * kTileRows) {
      _mm_prefetch(reinterpret_cast<const char*>(lines) + kPanelBytes, _MM_HINT_T1);
      Line line;
      line.load(lines);
      for_steps<kDepth>([&](auto step) __attribute__((always_inline)) {
        const __m512 codes = _mm512_castsi512_ps(line.template get<step>());
        _mm512_storeu_ps(panel + step * kTileRows,
                         _mm512_fmsub_ps(codes, scales.scale, scales.shift));
      });
    }
  }

  static void multiply(const Positions::Block& block, std::int64_t count, const float* panels,
                       std::int64_t tiles, std::int64_t columns, float* sums) {
    kMultiply[(count - 1) * kBlockTiles + tiles - 1](block, panels, columns, sums);
  }

  using Multiply = void (*)(const Positions::Block&, const float*, std::int64_t, float*);
  template <std::size_t... index>
  static constexpr auto multipliers(std::index_sequence<index...>) {
    return std::array<Multiply, sizeof...(index)>{
        multiply_panels<index / kBlockTiles + 1, index % kBlockTiles + 1, kColumns>...};
  }
  static constexpr auto kMultiply =
      multipliers(std::make_index_sequence<kBlockTokens * kBlockTiles>());
};

}  // namespace

const FloatConvKernel float_conv__avx512 = {load_floats, multiply_positions<Panels>};

}  // namespace quantal::kernels

#pragma GCC pop_options
