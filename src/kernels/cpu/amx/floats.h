#pragma once

// Included by this folder's files only, below their target pragma: products of float activations.

#include "kernels/cpu/amx/activations.h"
#include "kernels/cpu/amx/product.h"
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

template <typename Source, bool is_affine, int parts>
void multiply_parts(const LinearArgs& args, const Source& source, const ParallelFor& parallel_for) {
  for_strips(args.tokens, [&](std::int64_t first, std::int64_t count) {
    const std::int64_t size = size_of(args.type);
    LinearArgs strip = args;
    strip.tokens = count;
    strip.x = static_cast<const std::byte*>(args.x) + first * args.x_stride * size;
    strip.y = static_cast<std::byte*>(args.y) + first * args.y_stride * size;
    const TileActivations<typename Source::Line, parts> x(strip, parallel_for);
    multiply<BF16Product<is_affine>, parts>(x.job(), source, parallel_for);
  });
}

/// What find_linear() gives, of a weight that is read from a Source of pairs.
template <bool is_affine, typename Source>
void multiply_floats(const LinearArgs& args, const Source& source,
                     const ParallelFor& parallel_for) {
  switch (args.type) {
    case FloatType::kBF16:
      return multiply_parts<Source, is_affine, 1>(args, source, parallel_for);
    case FloatType::kF16:
      return multiply_parts<Source, is_affine, 2>(args, source, parallel_for);
    case FloatType::kF32:
      return multiply_parts<Source, is_affine, 3>(args, source, parallel_for);
  }
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

}  // namespace
}  // namespace quantal::kernels
