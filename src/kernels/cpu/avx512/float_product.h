#pragma once

// Included by this folder's files only, below their target pragma: fp32 activations and products of
// them (product.h).

#include "kernels/cpu/avx512/activations.h"

namespace quantal::kernels {
namespace {

struct FloatRow {
  static constexpr int kBytes = 4;  ///< of a column
  static void copy(const LinearArgs& args, std::int64_t from, std::int64_t columns,
                   std::int32_t* to) {
    for (std::int64_t i = 0; i < columns; i += 16) {
      _mm512_storeu_ps(to + i, load_floats(args.x, from + i, args.type, first_lanes(columns - i)));
    }
  }
};

template <bool is_affine>
struct FloatProduct : FloatSums<is_affine> {
  static inline __attribute__((always_inline)) void add(__m512& sum, __m512i weight, __m512i x) {
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(weight), _mm512_castsi512_ps(x), sum);
  }
};

}  // namespace
}  // namespace quantal::kernels
