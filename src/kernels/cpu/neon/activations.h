#pragma once

// Included by this folder's files only, below their target pragma.

#include <algorithm>
#include <cstring>

#include "kernels/cpu/neon/rows.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr int kFewTokens = 4;  ///< up to so many, codes are decoded in registers

/// Activations with every group padded to whole lines, so that no kernel reads past the end: as
/// fp32, whatever they are, or the bits of bf16 ones.
template <typename Number>
class Activations {
 public:
  Activations(const LinearArgs& args, const ParallelFor& parallel_for)
      : layout_(*args.layout),
        stride_(padded_stride(layout_.padded_columns())),
        copied_(args.type != kType || args.tokens > kFewTokens ||
                layout_.padded_columns() != layout_.spec().columns),
        scratch_(copied_ ? floats_for(args.tokens * stride_) : 0),
        copy_(reinterpret_cast<Number*>(scratch_.data())),
        x_(copied_ ? copy_ : static_cast<const Number*>(args.x)),
        x_stride_(copied_ ? stride_ : args.x_stride) {
    if (!copied_) return;
    parallel_for(args.tokens, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) copy_token(args, t);
    });
  }

  /// The columns of a token's group.
  const Number* group(std::int64_t token, std::int64_t group) const {
    return x_ + token * x_stride_ + layout_.padded_begin(group);
  }
  std::int64_t stride() const { return x_stride_; }

 private:
  static constexpr FloatType kType = sizeof(Number) == 4 ? FloatType::kF32 : FloatType::kBF16;

  static std::int64_t floats_for(std::int64_t count) {
    return count * static_cast<std::int64_t>(sizeof(Number)) / 4;
  }

  // Whole cache lines, and never a multiple of a page, where tokens would compete for the same
  // lines of the cache.
  static std::int64_t padded_stride(std::int64_t columns) {
    constexpr std::int64_t kLine = 64 / sizeof(Number);
    return (columns + kLine - 1) / kLine * kLine + kLine;
  }

  void copy_token(const LinearArgs& args, std::int64_t t) const {
    for (std::int64_t g = 0; g < layout_.groups(); ++g) {
      Number* to = copy_ + t * stride_ + layout_.padded_begin(g);
      const std::int64_t columns = layout_.group_columns(g);
      convert(args, t * args.x_stride + layout_.group_begin(g), columns, to);
      const std::int64_t padded = layout_.group_lines(g) * layout_.depth();
      std::fill(to + columns, to + padded, Number{0});
    }
  }

  static void convert(const LinearArgs& args, std::int64_t from, std::int64_t count,
                      std::uint16_t* to) {
    std::copy_n(static_cast<const std::uint16_t*>(args.x) + from, count, to);
  }
  static void convert(const LinearArgs& args, std::int64_t from, std::int64_t count, float* to) {
    std::int64_t i = 0;
    for (; i + kQuarterRows <= count; i += kQuarterRows) {
      vst1q_f32(to + i, load_rows(args.x, from + i, args.type));
    }
    for (; i < count; ++i) to[i] = load_float(args.x, from + i, args.type);
  }

  const PackedLayout& layout_;
  std::int64_t stride_;
  bool copied_;
  Scratch scratch_;
  Number* copy_;
  const Number* x_;
  std::int64_t x_stride_;
};

/// Σ x of every group of every token, [group][token]; zeros for symmetric types.
class GroupSums {
 public:
  template <typename Number>
  GroupSums(const LinearArgs& args, const Activations<Number>& x, const ParallelFor& parallel_for)
      : tokens_(args.tokens),
        is_affine_(args.layout->is_affine()),
        sums_(is_affine_ ? args.layout->groups() * tokens_ : tokens_) {
    if (!is_affine_) {
      std::fill_n(sums_.data(), tokens_, 0.0F);
      return;
    }
    const PackedLayout& layout = *args.layout;
    parallel_for(tokens_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        for (std::int64_t g = 0; g < layout.groups(); ++g) {
          const std::int64_t padded = layout.group_lines(g) * layout.depth();
          sums_.data()[g * tokens_ + t] = sum_of(x.group(t, g), padded);
        }
      }
    });
  }
  const float* group(std::int64_t g) const { return sums_.data() + (is_affine_ ? g * tokens_ : 0); }

 private:
  // `count` is a multiple of 8 for narrow codes: groups are padded with zeros to whole lines.
  template <typename Number>
  static float sum_of(const Number* values, std::int64_t count) {
    constexpr FloatType kType = sizeof(Number) == 4 ? FloatType::kF32 : FloatType::kBF16;
    float32x4_t even = vdupq_n_f32(0), odd = even;
    for (std::int64_t c = 0; c < count; c += 8) {
      even = vaddq_f32(even, load_rows(values, c, kType));
      odd = vaddq_f32(odd, load_rows(values, c + 4, kType));
    }
    return vaddvq_f32(vaddq_f32(even, odd));
  }

  std::int64_t tokens_;
  bool is_affine_;
  Scratch sums_;
};

}  // namespace
}  // namespace quantal::kernels
