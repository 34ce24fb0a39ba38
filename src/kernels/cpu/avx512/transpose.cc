// 16 rows by 4 columns at a time: a cache line of each row of the result.
#include "kernels/transpose.h"

#include "kernels/cpu/avx512/intrinsics.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace quantal::kernels {
namespace {

// Rows 0, 4, 8 and 12 from `from` on: loads put them in place, without a shuffle.
inline __m512 load_quads(const float* from, std::int64_t stride) {
  __m512 rows = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
  rows = _mm512_mask_broadcast_f32x4(rows, 0x00F0, _mm_loadu_ps(from + 4 * stride));
  rows = _mm512_mask_broadcast_f32x4(rows, 0x0F00, _mm_loadu_ps(from + 8 * stride));
  return _mm512_mask_broadcast_f32x4(rows, 0xF000, _mm_loadu_ps(from + 12 * stride));
}

}  // namespace

void transpose_floats__avx512(const float* from, std::int64_t from_stride, std::int64_t rows,
                              std::int64_t columns, float* to, std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; r += 16) {
    for (std::int64_t c = 0; c < columns; c += 4) {
      const float* at = from + r * from_stride + c;
      const __m512 first = load_quads(at, from_stride);
      const __m512 second = load_quads(at + from_stride, from_stride);
      const __m512 third = load_quads(at + 2 * from_stride, from_stride);
      const __m512 fourth = load_quads(at + 3 * from_stride, from_stride);
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(first, second));
      const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(third, fourth));
      const __m512d c_pairs = _mm512_castps_pd(_mm512_unpackhi_ps(first, second));
      const __m512d d_pairs = _mm512_castps_pd(_mm512_unpackhi_ps(third, fourth));
      const __m512d turned[4] = {_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b),
                                 _mm512_unpacklo_pd(c_pairs, d_pairs),
                                 _mm512_unpackhi_pd(c_pairs, d_pairs)};
      QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
        _mm512_storeu_ps(to + (c + i) * to_stride + r, _mm512_castpd_ps(turned[i]));
      }
    }
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
