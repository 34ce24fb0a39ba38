#pragma once

// Included by this folder's files only, below their target pragma: an integer linear over any way
// to multiply bytes.

#include "kernels/cpu/avx512/product.h"
#include "kernels/integer_linear.h"

namespace quantal::kernels {
namespace {

/// Unsigned codes, 4 columns a register.
template <int bits>
struct ByteLine {
  static constexpr int kSteps = 8 / bits;

  void load(const std::byte* line) { words = _mm512_loadu_si512(line); }

  template <int step>
  __m512i get() const {
    if constexpr (bits == 8) return words;
    const __m512i codes = step == 0 ? words : _mm512_srli_epi16(words, bits * step);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << bits) - 1));
  }

  __m512i words;
};

/// `Dot<bits>::add` adds products of 4 unsigned and 4 signed bytes to a sum of 32 bits.
template <template <int> typename Dot, int bits>
struct IntegerProduct : Dot<bits> {
  using Sum = __m512i;
  using XSum = std::int32_t;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static Sum load(const float* from) { return _mm512_loadu_si512(from); }
  static void store(float* to, Sum sum) { _mm512_storeu_si512(to, sum); }

  // The order of integer_linear.h.
  static __m512 apply(__m512 sum, Sum total, const TileScales& scales, XSum x_sum) {
    if constexpr (bits == 8) {
      const __m512i exact = _mm512_sub_epi32(total, _mm512_set1_epi32(128 * x_sum));
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scales.scale, sum);
    }
    const __m512 scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales.scale, sum);
    return _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(x_sum)), scales.shift, scaled);
  }
};

/// The codes of all tokens, as a product wants them.
class IntegerX {
 public:
  IntegerX(const PackedLayout& layout, const TokenCodes& codes, const ParallelFor& parallel_for)
      : steps_(layout.padded_columns() / 4),
        is_copied_(codes.tokens() > 1),
        data_(is_copied_ ? codes.tokens() * steps_ : 0),
        x_(is_copied_ ? data_.data() : reinterpret_cast<const float*>(codes.codes(0))) {
    if (!is_copied_) return;
    parallel_for(codes.tokens(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t first = t / kBlockTokens * kBlockTokens;
        const std::int64_t count = std::min<std::int64_t>(kBlockTokens, codes.tokens() - first);
        interleave(reinterpret_cast<const std::int32_t*>(codes.codes(t)), steps_, t - first, count,
                   reinterpret_cast<std::int32_t*>(data_.data()) + first * steps_);
      }
    });
  }
  std::int64_t steps() const { return steps_; }
  const std::int32_t* data() const { return reinterpret_cast<const std::int32_t*>(x_); }

 private:
  std::int64_t steps_;
  bool is_copied_;
  Scratch data_;
  const float* x_;
};

template <template <int> typename Dot>
void integer_linear(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  if (args.source.tokens == 0) return;
  const TokenCodes codes(layout, args.source.tokens);
  parallel_for(codes.tokens(), [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__avx512(layout, args.source, begin, end, codes);
  });
  const IntegerX x(layout, codes, parallel_for);
  const Job job{.layout = &layout,
                .weight = args.weight,
                .tokens = codes.tokens(),
                .x = x.data(),
                .steps = x.steps(),
                .x_sums = codes.sums(0),
                .blocks_per_group = codes.blocks_per_group(),
                .block_lines = kBlockColumns / layout.depth(),
                .scales = &codes.scale(0),
                .type = args.type,
                .y = args.y,
                .y_stride = args.y_stride,
                .bias = args.bias};
  switch (layout.spec().qtype) {
    case QTypeId::kInt2:
      return multiply<ByteLine<2>, IntegerProduct<Dot, 2>>(job, parallel_for);
    case QTypeId::kInt4:
      return multiply<ByteLine<4>, IntegerProduct<Dot, 4>>(job, parallel_for);
    default:
      return multiply<ByteLine<8>, IntegerProduct<Dot, 8>>(job, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
