#pragma once

// Included by this folder's files only, below their target pragma: float activations of a
// weight-only linear.

#include "kernels/cpu/avx512/float_sums.h"
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
        blocks_(args.tokens),
        steps_(layout_.padded_columns() * Row::kBytes / 4),
        x_(blocks_.tokens * steps_ + kSlack),
        sums_(layout_.is_affine() ? blocks_.tokens * layout_.groups() : 0) {
    // A group of no columns has a sum nevertheless.
    const std::int64_t parts =
        std::max<std::int64_t>(1, (layout_.group_columns(0) + kPart - 1) / kPart);
    const std::int64_t count = blocks_.count() * layout_.groups() * parts;
    const auto take = [&](std::int64_t begin, std::int64_t end) {
      const Scratch rows(blocks_.most * kPartWords);
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t group = i / parts;
        take_part(group / layout_.groups(), group % layout_.groups(), i % parts, words(rows));
      }
    };
    // One token is not worth a second thread.
    args.tokens == 1 ? take(0, count) : parallel_for(count, take);
  }

  Job job() const {
    return {.layout = &layout_,
            .weight = args_.weight,
            .tokens = args_.tokens,
            .x = words(x_),
            .steps = steps_,
            .x_sums = layout_.is_affine() ? words(sums_) : nullptr,
            .blocks_per_group = 1,
            .block_lines = layout_.group_lines(0) + 1,
            .out = output_of(args_, nullptr)};
  }

 private:
  static constexpr std::int64_t kSlack = 16;
  static constexpr std::int64_t kPart = 512;  ///< columns of a group that are taken at once
  static constexpr std::int64_t kPartWords = kPart * Row::kBytes / 4 + kSlack;
  static std::int32_t* words(const Scratch& scratch) {
    return reinterpret_cast<std::int32_t*>(scratch.data());
  }

  void take_part(std::int64_t block, std::int64_t group, std::int64_t part,
                 std::int32_t* rows) const {
    const std::int64_t columns = layout_.group_columns(group), begin = part * kPart;
    if (begin >= columns && part > 0) return;
    const std::int64_t count = std::min(kPart, columns - begin), depth = layout_.depth();
    const std::int64_t first = blocks_.first(block), present = blocks_.present(block);
    const auto from = [&](std::int64_t t) {
      return (first + t) * args_.x_stride + layout_.group_begin(group);
    };
    for (std::int64_t t = 0; t < present; ++t) {
      Row::copy(args_, from(t) + begin, count, rows + t * kPartWords);
    }
    const std::int64_t column = layout_.padded_begin(group) + begin;
    blocks_.put(block, rows, kPartWords, column * Row::kBytes / 4,
                (count + depth - 1) / depth * depth * Row::kBytes / 4, steps_, words(x_));
    if (!layout_.is_affine() || part > 0) return;
    const std::int64_t width = blocks_.width(block);
    float* sums = sums_.data() + first * layout_.groups() + group * width;
    for (std::int64_t t = 0; t < width; ++t) sums[t] = t < present ? sum_of(from(t), columns) : 0;
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
  TokenBlocks blocks_;
  std::int64_t steps_;
  Scratch x_, sums_;
};

}  // namespace
}  // namespace quantal::kernels
