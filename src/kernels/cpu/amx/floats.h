#pragma once

// Included by this folder's files only, below their target pragma: products of float activations.

#include "kernels/cpu/amx/activations.h"
#include "kernels/cpu/amx/product.h"
#include "kernels/cpu/amx/rounded_pairs.h"
#include "kernels/cpu/avx512/float_sums.h"

namespace quantal::kernels {
namespace {

template <bool is_affine>
struct BF16Product : FloatSums<is_affine> {
  template <int sums, int x, int weight>
  static inline __attribute__((always_inline)) void add() {
    add_bf16_products<sums, x, weight>();
  }
};

/// Of weights that are scaled already: a sum is a result.
struct ScaledProduct : BF16Product<false> {
  static __m512 apply(__m512, Sum total, const TileScales&, const std::int32_t*, int) {
    return total;
  }
};

template <typename Product, int parts, typename Source>
void multiply_parts(const LinearArgs& args, const Source& source, const ParallelFor& parallel_for) {
  for_strips(args.tokens, [&](std::int64_t first, std::int64_t count) {
    const std::int64_t size = size_of(args.type);
    LinearArgs strip = args;
    strip.tokens = count;
    strip.x = static_cast<const std::byte*>(args.x) + first * args.x_stride * size;
    strip.y = static_cast<std::byte*>(args.y) + first * args.y_stride * size;
    const TileActivations<typename Source::Line, parts> x(strip, parallel_for);
    multiply<Product, parts>(x.job(), source, parallel_for);
  });
}

constexpr bool is_affine(QTypeId qtype) {
  return qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4;
}

/// How a type of weight becomes pairs of bf16 numbers.
template <QTypeId qtype>
struct PairsOf : WidePairs<qtype> {};
template <>
struct PairsOf<QTypeId::kInt4> : NarrowPairs<4> {};
template <>
struct PairsOf<QTypeId::kInt2> : NarrowPairs<2> {};

/// Whether the weight is rounded to bf16, the activations' type: to scale the sums of each group by
/// itself takes half as long as to multiply them (docs/numerics.md).
inline bool rounds_weight(const LinearArgs& args) {
  return args.type == FloatType::kBF16 && args.tokens > kStreamTokens && args.layout->groups() > 1;
}

/// What find_linear() gives. source(Line) is the weight as a Source of a Line.
template <QTypeId qtype, typename SourceOf>
void multiply_floats(const LinearArgs& args, const SourceOf& source,
                     const ParallelFor& parallel_for) {
  if constexpr (is_affine(qtype)) {
    if (rounds_weight(args)) {
      using Line = RoundedPairs<qtype == QTypeId::kInt4 ? 4 : 2>;
      return multiply_parts<ScaledProduct, 1>(args, source.template operator()<Line>(),
                                              parallel_for);
    }
  }
  using Product = BF16Product<is_affine(qtype)>;
  const auto pairs = source.template operator()<PairsOf<qtype>>();
  switch (args.type) {
    case FloatType::kBF16:
      return multiply_parts<Product, 1>(args, pairs, parallel_for);
    case FloatType::kF16:
      return multiply_parts<Product, 2>(args, pairs, parallel_for);
    case FloatType::kF32:
      return multiply_parts<Product, 3>(args, pairs, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
