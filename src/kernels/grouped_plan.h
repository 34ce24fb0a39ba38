#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/conv_patches.h"
#include "kernels/float_conv.h"

/// What a convolution in groups (grouped_conv.h) is of, and how a call is divided into blocks.
namespace quantal::kernels {

/// What x and weight are where they have codes.
struct ConvCodes {
  const PackedLayout* layout = nullptr;  ///< int8, int4 or int2, of one group a row
  const std::byte* weight = nullptr;     ///< packed
  const float* x_scales = nullptr;       ///< one a sample; NaN: so is its output
  /// y is int8 codes of this scale, to which numbers of the convolution's type are rounded as
  /// quantize_codes() does.
  std::optional<float> y_scale;
};

/// Arguments of a convolution. Checked by the caller: kernels trust them.
struct GroupedConvArgs {
  /// Products of so many codes, a byte each, have exact sums.
  static constexpr std::int64_t kMostCodes = 1 << 10;

  ConvShape shape;
  const float* weight = nullptr;               ///< (rows, shape.columns()), but of codes
  FloatType type = FloatType::kF32;            ///< of x, y and bias
  ChannelOrder order = ChannelOrder::kPlanes;  ///< of x and y
  const void* x = nullptr;                     ///< (batch, channels, pixels), or in the other order
  void* y = nullptr;           ///< (batch, shape.rows, positions), or in the other order
  const void* bias = nullptr;  ///< (rows), or null
  /// x is int8 codes, and the weight is packed; null for floats.
  /// Precondition: shape.columns() <= kMostCodes.
  const ConvCodes* codes = nullptr;
};

/// What the lanes of a register hold: kVector of
enum class GroupedLanes : std::uint8_t {
  kPositions,  ///< the positions of a line; of planes
  kRows,       ///< the rows of one group or several; where the channels of a pixel lie together
  kChannels,   ///< the channels of a depthwise convolution, in either order
};
GroupedLanes lanes_of(const ConvShape& shape, ChannelOrder order);

/// Pixels of kVector channels, which may lie anywhere.
struct ChannelPixels {
  const void* x = nullptr;
  FloatType type = FloatType::kF32;
  std::int64_t size = 0;   ///< numbers of x
  std::int64_t first = 0;  ///< index of the first channel's first pixel
  std::int64_t pixel_step = 1, channel_step = 1;
  std::int64_t pixels = 0, channels = 0;
};
/// How the input becomes fp32.
struct GroupedConvReader {
  ConvertFloats convert = nullptr;  ///< a run of numbers; null where lanes are channels
  /// To (pixels, kVector); channels that are not there are anything.
  void (*gather)(const ChannelPixels& from, float* to) = nullptr;
};

/// Divides a call into blocks whose input fits the cache. A block is some lines of the output, of
/// one sample and depth; some rows of one group (kPositions), of all (kRows), or kVector channels.
/// What it reads is copied as fp32, with zeros in the padding:
///
///   kPositions   (channels, kernel depth, lines, phases, pixels), where a phase has the pixels of
///                a line that are a stride apart
///   kRows        (kernel depth, lines, pixels, channels)
///   kChannels    (kernel depth, lines, pixels, kVector)
class GroupedConvPlan {
 public:
  /// Positions, or rows, that are computed together. Kernels read as many numbers from anywhere in
  /// a block; as many positions where lanes are channels.
  static constexpr std::int64_t kVector = 8;

  explicit GroupedConvPlan(const GroupedConvArgs& args);

  struct Block {
    std::int64_t sample = 0, group = 0, depth = 0;
    std::int64_t line = 0, lines = 0;  ///< of the output
    std::int64_t row = 0, rows = 0;    ///< of the weight
  };
  std::int64_t blocks() const { return shape_.batch * groups_ * size_[0] * parts_ * row_parts_; }
  Block block(std::int64_t index) const;

  /// Floats that a block takes, and results that it has.
  std::int64_t block_floats() const;
  std::int64_t block_results() const;
  /// The zeros, which are the same for every block of those lines,
  void fill_padding(const Block& block, float* to) const;
  /// and what lies between them.
  void fill_pixels(const GroupedConvArgs& args, const Block& block, const GroupedConvReader& reader,
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
  GroupedLanes lanes() const { return lanes_; }
  /// So far from a run's begin lies what each column of the weight reads, in the order
  /// (taps, channels of a group).
  const std::vector<std::int64_t>& columns() const { return columns_; }

 private:
  std::int64_t input_lines() const {
    return (lines_ - 1) * shape_.stride[1] + (shape_.kernel[1] - 1) * shape_.dilation[1] + 1;
  }
  std::int64_t slice() const { return input_lines() * line_; }
  void lay_out_lines();
  void divide();
  void find_runs();
  void find_columns();
  /// Calls visit(line, to) for each line of a block: its index among those of the block's planes,
  /// or -1 in the padding.
  template <typename Visit>
  void for_lines(const Block& block, float* to, const Visit& visit) const;
  void gather_channels(const GroupedConvArgs& args, const Block& block,
                       const GroupedConvReader& reader, float* to) const;
  void divide_into_phases(const float* pixels, float* to) const;
  /// Whether pixels leave no gaps that are read.
  bool is_dense() const {
    return phases_ == 1 && (lanes_ != GroupedLanes::kRows || pixel_ == shape_.channels);
  }
  /// Whether blocks of several groups have the same pixels.
  bool shares_pixels() const {
    return lanes_ == GroupedLanes::kChannels && order_ == ChannelOrder::kLast;
  }
  /// What is read beyond the last line.
  std::int64_t slack() const;

  ConvShape shape_;
  ConvShape::Extent size_;
  ChannelOrder order_;
  GroupedLanes lanes_;
  std::int64_t groups_, group_rows_;     ///< of which one is a block's, and its rows
  std::int64_t row_parts_, block_rows_;  ///< into which those are divided
  std::int64_t planes_;                  ///< that a block reads
  std::int64_t phases_, phase_;          ///< of a line in planes, and pixels in each
  std::int64_t pixel_, position_step_;   ///< floats from pixel to pixel
  std::int64_t line_;                    ///< floats from line to line
  std::int64_t before_, pixels_;         ///< padding in front of a line, and pixels that it reads
  std::int64_t parts_, lines_;           ///< of a depth of the output; most lines of a block
  std::vector<Run> runs_;
  std::vector<std::int64_t> columns_;
};

}  // namespace quantal::kernels
