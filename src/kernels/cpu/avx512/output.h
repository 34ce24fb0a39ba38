#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma: where the
// results of a linear go.

#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

/// y, (tokens, rows), and what is done to the sums: times the token's scale, plus the row's bias.
struct Output {
  std::int64_t rows;
  FloatType type;  ///< of y and bias
  void* y;
  std::int64_t y_stride;
  const void* bias;     ///< null: 0
  const float* scales;  ///< of tokens; null: 1
};

/// Of a linear's arguments, of whatever activations.
template <typename Args>
Output output_of(const Args& args, const float* scales) {
  return {.rows = args.layout->spec().rows,
          .type = args.type,
          .y = args.y,
          .y_stride = args.y_stride,
          .bias = args.bias,
          .scales = scales};
}

/// The rows of a tile.
inline void store_rows(const Output& out, std::int64_t tile, std::int64_t token, __m512 sum) {
  const std::int64_t row = tile * kTileRows;
  const __mmask16 lanes = first_lanes(out.rows - row);
  const __m512 bias =
      out.bias != nullptr ? load_floats(out.bias, row, out.type, lanes) : _mm512_setzero_ps();
  const __m512 scale = _mm512_set1_ps(out.scales != nullptr ? out.scales[token] : 1.0F);
  store_floats(out.y, token * out.y_stride + row, out.type, lanes,
               _mm512_fmadd_ps(sum, scale, bias));
}

}  // namespace
}  // namespace quantal::kernels
