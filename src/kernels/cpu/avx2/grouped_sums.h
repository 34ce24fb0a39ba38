#pragma once

// Included by this folder's files only, below their target pragma.

#include "kernels/conv_shape.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

/// 8 codes as fp32.
inline __m256 load_codes(const std::int8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

/// What a row's sums become: its numbers in all lanes, or those of 8 rows.
struct RowFactors {
  __m256 scale, shift, bias;

  template <bool is_affine>
  __m256 finish(__m256 sum, __m256 x_sum, __m256 x_scale) const {
    sum = _mm256_fmadd_ps(sum, scale, _mm256_setzero_ps());
    if constexpr (is_affine) sum = _mm256_fnmadd_ps(x_sum, shift, sum);
    return _mm256_fmadd_ps(sum, x_scale, bias);
  }
};

/// Positions that are computed together where lanes are rows or channels: sums of x take registers,
/// too.
template <bool is_affine>
constexpr int kTogether = is_affine ? kHalfRows / 2 : kHalfRows;

/// Of as many positions of 8 channels, in a depthwise convolution.
template <bool is_affine, int count = kTogether<is_affine>>
struct Sums {
  Sums() { QUANTAL_UNROLL for (int i = 0; i < count; ++i) w_x[i] = x[i] = _mm256_setzero_ps(); }
  void add(int position, __m256 value, __m256 factor) {
    w_x[position] = _mm256_fmadd_ps(value, factor, w_x[position]);
    if constexpr (is_affine) x[position] = _mm256_add_ps(x[position], value);
  }
  __m256 w_x[count], x[count];
};

inline __m256 load_pixel(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load_pixel(const std::int8_t* x) { return load_codes(x); }

/// As QUANTAL_UNROLL, for the pixels of a run: at most 7 strides of 2, and 7 taps.
#define QUANTAL_UNROLL_PIXELS _Pragma("GCC unroll 24")

/// Adds the taps of one line of the kernel to positions `stride` pixels apart; pixels lie `step`
/// numbers apart. One is loaded once for all positions that read it.
template <int width, int stride, bool is_affine, int count, typename Number>
inline void add_line(const Number* x, std::int64_t step, const float* weight,
                     Sums<is_affine, count>& sums) {
  __m256 factors[width];
  QUANTAL_UNROLL for (int k = 0; k < width; ++k) factors[k] = _mm256_load_ps(weight + k * 8);
  QUANTAL_UNROLL_PIXELS for (int p = 0; p < (count - 1) * stride + width; ++p) {
    const __m256 value = load_pixel(x + p * step);
    QUANTAL_UNROLL for (int k = 0; k < width; ++k) {
      const int i = (p - k) / stride;
      if (p >= k && (p - k) % stride == 0 && i < count) sums.add(i, value, factors[k]);
    }
  }
}

/// One tap of any kernel; `step`: from position to position.
template <bool is_affine, int count, typename Number>
inline void add_tap(const Number* x, std::int64_t step, const float* weight,
                    Sums<is_affine, count>& sums) {
  const __m256 factor = _mm256_load_ps(weight);
  QUANTAL_UNROLL for (int i = 0; i < count; ++i) sums.add(i, load_pixel(x + i * step), factor);
}

/// Calls run.operator()<width, stride>() for a line of the kernel; with zeros where it has no loop
/// of its own.
template <typename Run>
inline void for_width(const ConvShape& shape, const Run& run) {
  const std::int64_t stride = shape.stride[2];
  const auto with_stride = [&]<int width>() {
    stride == 1 ? run.template operator()<width, 1>() : run.template operator()<width, 2>();
  };
  switch (stride <= 2 && shape.dilation[2] == 1 ? shape.kernel[2] : 0) {
    case 3:
      return with_stride.template operator()<3>();
    case 5:
      return with_stride.template operator()<5>();
    case 7:
      return with_stride.template operator()<7>();
    default:
      return run.template operator()<0, 0>();
  }
}

}  // namespace
}  // namespace quantal::kernels
