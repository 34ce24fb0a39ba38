#pragma once

// Included by this folder's files only, below their target pragma: an integer linear over any way
// to multiply bytes.

#include "kernels/cpu/avx512/byte_lines.h"
#include "kernels/cpu/avx512/product.h"
#include "kernels/integer_linear.h"

namespace quantal::kernels {
namespace {

/// `Dot<bits>::add` adds products of 4 unsigned and 4 signed bytes to a sum of 32 bits.
template <template <int> typename Dot, int bits>
struct IntegerProduct : Dot<bits>, ByteSums<bits> {};

/// The codes of all tokens and their sums, as a Product wants them.
template <typename Product>
class IntegerX {
 public:
  IntegerX(const PackedLayout& layout, const TokenCodes& codes, const ParallelFor& parallel_for)
      : blocks_(codes.tokens()),
        steps_(layout.padded_columns() / 4),
        is_copied_(codes.tokens() > 1),
        data_(is_copied_ ? blocks_.tokens * steps_ : 0),
        sums_(blocks_.tokens * layout.groups() * codes.blocks_per_group()),
        x_(is_copied_ ? words(data_) : reinterpret_cast<const std::int32_t*>(codes.codes(0))) {
    const std::int64_t sums = layout.groups() * codes.blocks_per_group();
    parallel_for(blocks_.count(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t first = blocks_.first(block);
        for (std::int64_t t = first; t < first + blocks_.present(block); ++t) {
          for (std::int64_t i = 0; i < sums; ++i)
            codes.sums(t)[i] = Product::x_sum(codes.sums(t)[i]);
        }
        blocks_.put(block, codes.sums(first), sums, 0, sums, sums, words(sums_));
        if (!is_copied_) continue;
        blocks_.put(block, reinterpret_cast<const std::int32_t*>(codes.codes(first)),
                    codes.stride() / 4, 0, steps_, steps_, words(data_));
      }
    });
  }
  std::int64_t steps() const { return steps_; }
  const std::int32_t* data() const { return x_; }
  const std::int32_t* sums() const { return words(sums_); }

 private:
  static std::int32_t* words(const Scratch& scratch) {
    return reinterpret_cast<std::int32_t*>(scratch.data());
  }

  TokenBlocks blocks_;
  std::int64_t steps_;
  bool is_copied_;
  Scratch data_, sums_;
  const std::int32_t* x_;
};

template <typename Line, typename Product>
void multiply_codes(const IntegerLinearArgs& args, const TokenCodes& codes,
                    const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const IntegerX<Product> x(layout, codes, parallel_for);
  const Job job{.layout = &layout,
                .weight = args.weight,
                .tokens = codes.tokens(),
                .x = x.data(),
                .steps = x.steps(),
                .x_sums = x.sums(),
                .blocks_per_group = codes.blocks_per_group(),
                .block_lines = kBlockColumns / layout.depth(),
                .out = output_of(args, &codes.scale(0))};
  multiply<Line, Product>(job, parallel_for);
}

template <template <int> typename Dot>
void integer_linear(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  if (args.source.tokens == 0) return;
  const TokenCodes codes(layout, args.source.tokens);
  parallel_for(codes.tokens(), [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__avx512(layout, args.source, begin, end, codes);
  });
  switch (layout.spec().qtype) {
    case QTypeId::kInt2:
      return multiply_codes<ByteLine<2>, IntegerProduct<Dot, 2>>(args, codes, parallel_for);
    case QTypeId::kInt4:
      return multiply_codes<ByteLine<4>, IntegerProduct<Dot, 4>>(args, codes, parallel_for);
    default:
      return multiply_codes<ByteLine<8>, IntegerProduct<Dot, 8>>(args, codes, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
