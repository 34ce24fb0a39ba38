#pragma once

#include <cstdint>
#include <vector>

#include <quantal/isa.h>

#include "kernels/conv_patches.h"
#include "kernels/float_conv.h"

/// Convolution of floats in groups of few channels, depthwise among them: the rows of one are too
/// few for a matrix product. Registers hold several positions of a line instead, or, where the
/// channels of a pixel lie together, the rows of several groups.
namespace quantal::kernels {

/// Arguments of a convolution. Checked by the caller: kernels trust them.
struct GroupedConvArgs {
  ConvShape shape;
  const float* weight = nullptr;               ///< (rows, shape.columns())
  FloatType type = FloatType::kF32;            ///< of x, y and bias
  ChannelOrder order = ChannelOrder::kPlanes;  ///< of x and y
  const void* x = nullptr;                     ///< (batch, channels, pixels), or in the other order
  void* y = nullptr;           ///< (batch, shape.rows, positions), or in the other order
  const void* bias = nullptr;  ///< (rows), or null
};

/// Divides a call into blocks whose input fits the cache. A block is some lines of the output, of
/// one sample and depth, and in planes of one group. What it reads is copied as fp32, with zeros in
/// the padding: (channels, kernel depth, lines, phases, pixels), where a phase has the pixels of a
/// line that are a stride apart; or (kernel depth, lines, pixels, channels).
class GroupedConvPlan {
 public:
  /// Positions, or rows, that are computed together. Kernels read as many numbers from anywhere in
  /// a block.
  static constexpr std::int64_t kVector = 8;

  explicit GroupedConvPlan(const GroupedConvArgs& args);

  struct Block {
    std::int64_t sample = 0, group = 0, depth = 0;
    std::int64_t line = 0, lines = 0;  ///< of the output
  };
  std::int64_t blocks() const { return shape_.batch * groups_ * size_[0] * parts_; }
  Block block(std::int64_t index) const;

  /// Floats that a block takes.
  std::int64_t block_floats() const;
  /// The zeros, which are the same for every block of those lines,
  void fill_padding(const Block& block, float* to) const;
  /// and what lies between them.
  void fill_pixels(const GroupedConvArgs& args, const Block& block, ConvertFloats convert,
                   float* to) const;

  /// Up to kVector positions of a line of the output.
  struct Run {
    std::int64_t begin;     ///< of what they read
    std::int64_t position;  ///< the first one, counted from the block's
    std::int64_t count;
  };
  const Run* runs() const { return runs_.data(); }
  std::int64_t runs_of(const Block& block) const {
    return block.lines * static_cast<std::int64_t>(runs_.size()) / lines_;
  }
  /// From what a position reads to what the next one does.
  std::int64_t position_step() const { return position_step_; }
  const ConvShape::Extent& output() const { return size_; }
  /// So far from a run's begin lies what each column of the weight reads, in the order
  /// (taps, channels of a group).
  const std::vector<std::int64_t>& columns() const { return columns_; }

 private:
  std::int64_t input_lines() const {
    return (lines_ - 1) * shape_.stride[1] + (shape_.kernel[1] - 1) * shape_.dilation[1] + 1;
  }
  std::int64_t slice() const { return input_lines() * line_; }
  void lay_out_lines();
  void find_runs();
  void find_columns();
  /// Calls visit(line, to) for each line of a block: its index among those of the block's planes,
  /// or -1 in the padding.
  template <typename Visit>
  void for_lines(const Block& block, float* to, const Visit& visit) const;
  void divide_into_phases(const float* pixels, float* to) const;
  /// Whether pixels leave no gaps that are read.
  bool is_dense() const { return phases_ == 1 && (is_planes_ || pixel_ == shape_.channels); }

  ConvShape shape_;
  ConvShape::Extent size_;
  bool is_planes_;
  std::int64_t groups_, planes_;        ///< in which blocks lie, and that one reads
  std::int64_t phases_, phase_;         ///< of a line in planes, and pixels in each
  std::int64_t pixel_, position_step_;  ///< floats from pixel to pixel
  std::int64_t line_;                   ///< floats from line to line
  std::int64_t before_, pixels_;        ///< padding in front of a line, and pixels that it reads
  std::int64_t parts_, lines_;          ///< of a depth of the output; most lines of a block
  std::vector<Run> runs_;
  std::vector<std::int64_t> columns_;
};

/// One block of a convolution.
struct GroupedConvBlock {
  const GroupedConvArgs& args;
  const GroupedConvPlan& plan;
  GroupedConvPlan::Block at;
  const float* input;
  /// (rows, taps, channels of a group); for pixels (rows / kVector, taps, channels, kVector).
  const float* weight;
  const float* bias;  ///< as many as rows of `weight`, zeros without one
};

/// Multiplies, column by column, and adds in fp32, and rounds once, to args.type. The same bits for
/// any number of threads and in either order.
struct GroupedConvKernel {
  ConvertFloats convert;
  void (*planes)(const GroupedConvBlock& block);
  void (*pixels)(const GroupedConvBlock& block);
};

/// The kernel of an instruction set for groups of this size; null where it has none.
QUANTAL_API const GroupedConvKernel* find_grouped_conv(Isa isa, const ConvShape& shape,
                                                       ChannelOrder order);

/// Precondition: find_grouped_conv(isa, args.shape, args.order).
QUANTAL_API void grouped_conv(Isa isa, const GroupedConvArgs& args,
                              const ParallelFor& parallel_for = serial_for);

extern const GroupedConvKernel grouped_conv__avx2;

}  // namespace quantal::kernels
