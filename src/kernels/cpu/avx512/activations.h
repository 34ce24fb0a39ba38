#pragma once

// Included by this folder's files only, below their target pragma: float activations and their sums
// for a weight-only linear.

#include "kernels/cpu/avx512/product.h"
#include "kernels/linear.h"

namespace quantal::kernels {
namespace {

/// x of all tokens in whole lines of columns, as a Row lays them out: Row::copy(args, from,
/// columns, to) writes `columns` elements from x[from] on, and zeros to the end of their line; it
/// may write up to 64 bytes more.
template <typename Row>
class Activations {
 public:
  Activations(const LinearArgs& args, const ParallelFor& parallel_for)
      : args_(args),
        layout_(*args.layout),
        steps_(layout_.padded_columns() * Row::kBytes / 4),
        x_(args.tokens * steps_ + kSlack),
        sums_(layout_.is_affine() ? args.tokens * layout_.groups() : 0) {
    parallel_for(args.tokens, [&](std::int64_t begin, std::int64_t end) {
      const Scratch row(steps_ + kSlack);
      for (std::int64_t t = begin; t < end; ++t) take(t, words(row));
    });
  }

  Job job() const {
    return {.layout = &layout_,
            .weight = args_.weight,
            .tokens = args_.tokens,
            .x = words(x_),
            .steps = steps_,
            .x_sums = layout_.is_affine() ? sums_.data() : nullptr,
            .blocks_per_group = 1,
            .block_lines = layout_.group_lines(0) + 1,
            .scales = nullptr,
            .type = args_.type,
            .y = args_.y,
            .y_stride = args_.y_stride,
            .bias = args_.bias};
  }

 private:
  static constexpr std::int64_t kSlack = 16;
  static std::int32_t* words(const Scratch& scratch) {
    return reinterpret_cast<std::int32_t*>(scratch.data());
  }

  void take(std::int64_t t, std::int32_t* row) const {
    if (args_.tokens == 1) row = words(x_);
    for (std::int64_t g = 0; g < layout_.groups(); ++g) {
      const std::int64_t from = t * args_.x_stride + layout_.group_begin(g);
      const std::int64_t columns = layout_.group_columns(g);
      Row::copy(args_, from, columns, row + layout_.padded_begin(g) * Row::kBytes / 4);
      if (layout_.is_affine()) sums_.data()[t * layout_.groups() + g] = sum_of(from, columns);
    }
    if (args_.tokens == 1) return;
    const std::int64_t first = t / kBlockTokens * kBlockTokens;
    const std::int64_t count = std::min<std::int64_t>(kBlockTokens, args_.tokens - first);
    interleave(row, steps_, t - first, count, words(x_) + first * steps_);
  }

  float sum_of(std::int64_t from, std::int64_t count) const {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < count; i += 16) {
      const __mmask16 lanes = first_lanes(count - i);
      sum = _mm512_add_ps(sum, load_floats(args_.x, from + i, args_.type, lanes));
    }
    return _mm512_reduce_add_ps(sum);
  }

  const LinearArgs& args_;
  const PackedLayout& layout_;
  std::int64_t steps_;
  Scratch x_, sums_;
};

/// fp32 sums, with shifts where the weight is affine.
template <bool is_affine>
struct FloatSums {
  using Sum = __m512;
  using XSum = float;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }

  static __m512 apply(__m512 sum, Sum total, const TileScales& scales, XSum x_sum) {
    const __m512 scaled = _mm512_fmadd_ps(total, scales.scale, sum);
    if constexpr (!is_affine) return scaled;
    return _mm512_fnmadd_ps(_mm512_set1_ps(x_sum), scales.shift, scaled);
  }
};

}  // namespace
}  // namespace quantal::kernels
