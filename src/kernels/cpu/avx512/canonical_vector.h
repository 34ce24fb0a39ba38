#pragma once

// Included by this folder's files only, below their target pragma.

#include "kernels/cpu/avx2/canonical_floats.h"
#include "kernels/cpu/avx512/float_lines.h"

namespace quantal::kernels {
namespace {

/// The registers of canonical_floats.h.
struct Floats16 {
  using Register = __m512;
  static constexpr int kLanes = 16, kParts = 1, kUnrolled = 64, kSums = 16;

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, __m512 v) { _mm512_storeu_ps(to, v); }
  static __m512 broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 fmadd(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512 fnmadd(__m512 a, __m512 b, __m512 c) { return _mm512_fnmadd_ps(a, b, c); }
  static __m512 convert(const void* x, std::int64_t index, FloatType type) {
    return load_floats(x, index, type, first_lanes(kLanes));
  }
  static void arrange(float*, std::int64_t) {}
  static __m256 eight_parts(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  }

  template <QTypeId qtype>
  static void decode(const std::uint8_t* bytes, __m512 (&values)[kParts][kSections<qtype>]) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    if constexpr (qtype == QTypeId::kInt8) {
      values[0][0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    } else if constexpr (kSections<qtype> == 1) {
      values[0][0] = float8_values<qtype>(_mm256_cvtepi8_epi16(codes));
    } else {
      constexpr int kBits = 8 / kSections<qtype>;
      const __m512i words = _mm512_cvtepu8_epi32(codes);
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        values[0][s] =
            _mm512_permutexvar_ps(_mm512_srli_epi32(words, kBits * s), code_values<kBits>());
      }
    }
  }
};

}  // namespace
}  // namespace quantal::kernels
