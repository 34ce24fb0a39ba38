// Quantizing tokens to int8 for AVX2: the same codes and scales as the portable reading gives.
#include "kernels/token_codes.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/activation_codes.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

// max|x| as its bits, which order as the numbers do; a NaN or infinity gives at least 0x7F800000.
float absmax(const void* x, std::int64_t begin, std::int64_t count, FloatType type) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i most = _mm256_setzero_si256();
  std::int64_t i = 0;
  for (; i + kHalfRows <= count; i += kHalfRows) {
    const __m256i bits = _mm256_castps_si256(load_rows(x, begin + i, type));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) std::int32_t lanes[kHalfRows];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  std::int32_t top = *std::max_element(lanes, lanes + kHalfRows);
  for (; i < count; ++i) {
    const float value = load_float(x, begin + i, type);
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    top = std::max(top, bits & 0x7FFFFFFF);
  }
  float result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

}  // namespace

void quantize_tokens__avx2(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  if (source.codes != nullptr) {
    quantize_tokens__portable(layout, source, begin, end, out);
    return;
  }
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t from = t * source.stride;
    const float most = absmax(source.x, from, layout.spec().columns, source.type);
    const bool is_finite = std::isfinite(most);
    const float scale = std::max(most / 127, std::numeric_limits<float>::min());
    out.scale(t) = is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
    for (std::int64_t group = 0; group < layout.groups(); ++group) {
      std::int8_t* codes = out.codes(t) + layout.padded_begin(group);
      const std::int64_t columns = layout.group_columns(group);
      if (is_finite) {
        const std::int64_t begin = from + layout.group_begin(group);
        quantize_codes__avx2(source.x, source.type, begin, begin + columns, scale, codes - begin);
      } else {
        std::memset(codes, 0, columns);
      }
    }
    out.finish(layout, t);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
