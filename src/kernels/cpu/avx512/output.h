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

/// The rows of a tile, of one token after the other.
template <FloatType type>
class RowStore {
 public:
  RowStore(const Output& out, std::int64_t tile)
      : y_(static_cast<std::byte*>(out.y) + tile * kTileRows * size_of(type)),
        stride_(out.y_stride),
        lanes_(first_lanes(out.rows - tile * kTileRows)),
        scales_(out.scales),
        bias_(out.bias != nullptr ? load_floats(out.bias, tile * kTileRows, type, lanes_)
                                  : _mm512_setzero_ps()) {}

  inline __attribute__((always_inline)) void store(std::int64_t token, __m512 sum) const {
    store_floats(at(token), 0, type, lanes_, result(token, sum));
  }

  inline __attribute__((always_inline)) __m512 result(std::int64_t token, __m512 sum) const {
    if (scales_ == nullptr) return _mm512_add_ps(sum, bias_);
    return _mm512_fmadd_ps(sum, _mm512_set1_ps(scales_[token]), bias_);
  }
  std::byte* at(std::int64_t token) const { return y_ + token * stride_ * size_of(type); }
  __mmask16 lanes() const { return lanes_; }

 private:
  std::byte* y_;
  std::int64_t stride_;
  __mmask16 lanes_;
  const float* scales_;
  __m512 bias_;
};

/// Of two tiles, where b's rows are behind a's.
template <FloatType type>
inline __attribute__((always_inline)) void store_both(const RowStore<type>& a,
                                                      const RowStore<type>& b, std::int64_t token,
                                                      __m512 a_sum, __m512 b_sum) {
  if constexpr (type != FloatType::kBF16) {
    a.store(token, a_sum);
    b.store(token, b_sum);
  } else {
    const __m512i both = round_to_bf16(a.result(token, a_sum), b.result(token, b_sum));
    if (b.at(0) - a.at(0) == kTileRows * size_of(type)) {
      const __mmask32 lanes = a.lanes() | static_cast<__mmask32>(b.lanes()) << 16;
      _mm512_mask_storeu_epi16(a.at(token), lanes, both);
    } else {
      _mm256_mask_storeu_epi16(a.at(token), a.lanes(), _mm512_castsi512_si256(both));
      _mm256_mask_storeu_epi16(b.at(token), b.lanes(), _mm512_extracti64x4_epi64(both, 1));
    }
  }
}

/// Of one token.
inline void store_rows(const Output& out, std::int64_t tile, std::int64_t token, __m512 sum) {
  switch (out.type) {
    case FloatType::kF32:
      return RowStore<FloatType::kF32>(out, tile).store(token, sum);
    case FloatType::kBF16:
      return RowStore<FloatType::kBF16>(out, tile).store(token, sum);
    case FloatType::kF16:
      return RowStore<FloatType::kF16>(out, tile).store(token, sum);
  }
}

}  // namespace
}  // namespace quantal::kernels
