// 8 rows by 4 columns at a time.
#include "kernels/transpose.h"

#include <immintrin.h>

#include "kernels/packed_layout.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {

void transpose_floats__avx2(const float* from, std::int64_t from_stride, std::int64_t rows,
                            std::int64_t columns, float* to, std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; r += 8) {
    for (std::int64_t c = 0; c < columns; c += 4) {
      const float* at = from + r * from_stride + c;
      // Each has rows i and i + 4.
      __m256 both[4];
      QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
        const __m128 low = _mm_loadu_ps(at + i * from_stride);
        both[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low),
                                       _mm_loadu_ps(at + (i + 4) * from_stride), 1);
      }
      const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(both[0], both[1]));
      const __m256d b = _mm256_castps_pd(_mm256_unpacklo_ps(both[2], both[3]));
      const __m256d c_pairs = _mm256_castps_pd(_mm256_unpackhi_ps(both[0], both[1]));
      const __m256d d_pairs = _mm256_castps_pd(_mm256_unpackhi_ps(both[2], both[3]));
      const __m256d turned[4] = {_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b),
                                 _mm256_unpacklo_pd(c_pairs, d_pairs),
                                 _mm256_unpackhi_pd(c_pairs, d_pairs)};
      QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + (c + i) * to_stride + r, _mm256_castpd_ps(turned[i]));
      }
    }
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
