// Looking for NaN and infinity with AVX2: numbers whose exponent is all ones.
#include "kernels/finite.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr int kRegisters = 4;

// Elements [begin, …) in steps of four registers: where the step begins that has one, or where the
// last step ends.
template <FloatType type>
std::int64_t skip_finite(const void* x, std::int64_t begin, std::int64_t end) {
  constexpr int kBytes = size_of(type), kStep = kRegisters * 32 / kBytes;
  const __m256i exponent = kBytes == 4
                               ? _mm256_set1_epi32(0x7F800000)
                               : _mm256_set1_epi16(type == FloatType::kF16 ? 0x7C00 : 0x7F80);
  std::int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    const auto* from = static_cast<const std::byte*>(x) + i * kBytes;
    __m256i found = _mm256_setzero_si256();
    QUANTAL_UNROLL for (int r = 0; r < kRegisters; ++r) {
      const __m256i bits = _mm256_and_si256(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * 32)), exponent);
      found = _mm256_or_si256(found, kBytes == 4 ? _mm256_cmpeq_epi32(bits, exponent)
                                                 : _mm256_cmpeq_epi16(bits, exponent));
    }
    if (_mm256_testz_si256(found, found) == 0) return i;
  }
  return i;
}

}  // namespace

std::int64_t find_non_finite__avx2(const void* x, FloatType type, std::int64_t begin,
                                   std::int64_t end) {
  const std::int64_t from = type == FloatType::kF32 ? skip_finite<FloatType::kF32>(x, begin, end)
                            : type == FloatType::kBF16
                                ? skip_finite<FloatType::kBF16>(x, begin, end)
                                : skip_finite<FloatType::kF16>(x, begin, end);
  return find_non_finite__portable(x, type, from, end);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
