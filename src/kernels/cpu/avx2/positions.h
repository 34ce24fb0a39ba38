#pragma once

// Included by this folder's files and those of avx512 only, below their target pragma.

#include "kernels/cpu/avx2/rows.h"
#include "kernels/float_conv.h"
#include "kernels/for_qtype.h"
#include "kernels/row_blocks.h"

namespace quantal::kernels {
namespace {

/// What multiply_rows() reads and writes: tokens are the positions of all samples.
class Positions {
 public:
  static constexpr std::int64_t kStrip = 512;

  Positions(const FloatConvArgs& args, const ConvInput& input) : args_(args), input_(input) {}

  struct Block {
    std::int64_t column(std::int64_t c) const { return columns[c]; }
    const float* at(int token, std::int64_t column) const { return begins[token] + column; }
    const std::int64_t* columns;
    const float* begins[kBlockTokens];
  };

  std::int64_t columns(std::int64_t group, std::int64_t begin, std::int64_t end) const {
    return std::min(end, args_.layout->group_columns(group)) - begin;
  }
  std::int64_t together(std::int64_t tile) const {
    const std::int64_t rows = args_.shape.group_rows();
    return args_.shape.groups == 1 ? kBlockTiles
                                   : (rows - row_of(tile) % rows) / PackedLayout::kTileRows;
  }
  Block block(std::int64_t tile, std::int64_t token, std::int64_t count,
              std::int64_t column) const {
    const float* const data = input_.group(row_of(tile) / args_.shape.group_rows());
    Block block{input_.columns() + column, {}};
    for (std::int64_t t = 0; t < count; ++t) {
      block.begins[t] = data + input_.positions()[token + t];
    }
    return block;
  }
  void store(const BlockSums& sums) const {
    if (args_.order == ChannelOrder::kLast) return store_pixels(sums);
    for (std::int64_t half = 0; half < sums.tiles * PackedLayout::kTileRows; half += kHalfRows) {
      const std::int64_t row = sums.first_tile * PackedLayout::kTileRows + half;
      const std::int64_t rows = std::min(kHalfRows, args_.layout->spec().rows - row);
      if (rows > 0) store_planes(sums, half, row, rows);
    }
  }

 private:
  // Among all rows.
  std::int64_t row_of(std::int64_t tile) const {
    return args_.first_row + tile * PackedLayout::kTileRows;
  }

  void store_pixels(const BlockSums& sums) const {
    const std::int64_t first_row = sums.first_tile * PackedLayout::kTileRows;
    const std::int64_t rows =
        std::min(sums.tiles * PackedLayout::kTileRows, args_.layout->spec().rows - first_row);
    alignas(32) float bias[kBlockRows];
    for (std::int64_t r = 0; r < rows; r += kHalfRows) {
      _mm256_store_ps(bias + r, load_bias(args_.bias, first_row + r, rows - r, args_.type));
    }
    // Not read again after every store, which may be to anything.
    const BlockSums block = sums;
    const FloatType type = args_.type;
    void* const y = args_.y;
    const std::int64_t stride = args_.shape.rows;
    for (std::int64_t t = 0; t < block.tokens; ++t) {
      const std::int64_t to = (block.first + t) * stride + first_row;
      for (std::int64_t r = 0; r < rows; r += kHalfRows) {
        const __m256 sum = _mm256_load_ps(block.at(t, 0) + r);
        store_rows(y, to + r, type, rows - r, _mm256_add_ps(sum, _mm256_load_ps(bias + r)));
      }
    }
  }

  // Positions of one sample, up to 8 at a time.
  void store_planes(const BlockSums& sums, std::int64_t half, std::int64_t row,
                    std::int64_t rows) const {
    const std::int64_t positions = args_.shape.positions();
    const __m256 bias = load_bias(args_.bias, row, rows, args_.type);
    std::int64_t sample = sums.first / positions, position = sums.first % positions;
    for (std::int64_t t = 0; t < sums.tokens;) {
      const std::int64_t count = std::min({std::int64_t{8}, sums.tokens - t, positions - position});
      __m256 values[8];
      QUANTAL_UNROLL for (int i = 0; i < 8; ++i) {
        const std::int64_t token = std::min<std::int64_t>(t + i, sums.tokens - 1);
        values[i] = _mm256_add_ps(_mm256_load_ps(sums.at(token, 0) + half), bias);
      }
      transpose(values);
      const std::int64_t first = (sample * args_.shape.rows + row) * positions + position;
      QUANTAL_UNROLL for (int r = 0; r < 8; ++r) {
        if (r < rows) store_rows(args_.y, first + r * positions, args_.type, count, values[r]);
      }
      t += count;
      position += count;
      if (position == positions) position = 0, ++sample;
    }
  }

  const FloatConvArgs& args_;
  const ConvInput& input_;
};

/// FloatConvKernel::run by an instruction set's panels.
template <template <QTypeId> typename Panels>
void multiply_positions(const FloatConvArgs& args, const ConvInput& input,
                        const ParallelFor& parallel_for) {
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    multiply_rows<Panels<qtype>>(*args.layout, args.weight, Positions(args, input), input.count(),
                                 parallel_for);
  });
}

}  // namespace
}  // namespace quantal::kernels
