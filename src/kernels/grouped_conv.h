#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/grouped_plan.h"

/// Convolution in groups of few channels, depthwise among them: the rows of one are too few for a
/// matrix product. Of floats, or of codes, whose sums fp32 holds exactly.
namespace quantal::kernels {

/// What belongs to each row of a weight, in fp32: as many as rows, and for lanes that are rows or
/// channels as a multiple of 8.
struct ConvRows {
  /// (rows, taps, channels of a group) for kPositions; else (rows / kVector, taps, channels,
  /// kVector).
  const float* weight;
  /// Ones and zeros where there are none, but a null shift.
  const float *scale, *shift, *bias;
};

/// One block of a convolution.
struct GroupedConvBlock {
  const GroupedConvArgs& args;
  const GroupedConvPlan& plan;
  GroupedConvPlan::Block at;
  const float* input;
  ConvRows rows;
  float x_scale;
  void* y;  ///< of args.type
  /// Where row at.row goes at the block's first position, and how far the next row's and the next
  /// position's lie from it.
  std::int64_t begin, row_step, position_step;
};

/// A line of the output of a depthwise convolution over pixels whose channels lie together, in
/// whole registers: x, of fp32 or codes, is read where it lies.
struct DepthwiseLine {
  static constexpr std::int64_t kMostTapLines = 16;  ///< lines that the kernel may cover

  const GroupedConvArgs& args;
  std::int64_t sample, depth, line;
  ConvRows rows;
  float x_scale;
  float* y;  ///< (positions of the line, channels)
};

/// y[r] = x · (scale[r] · Σ w x - shift[r] · Σ x) + bias[r]: products are added in fp32, column by
/// column, and the result is rounded to args.type. The same bits for any number of threads and, of
/// finite weights, in either order.
struct GroupedConvKernel {
  GroupedConvReader floats, codes;
  /// By GroupedLanes; null where there is none.
  void (*run[3])(const GroupedConvBlock& block);
  void (*line)(const DepthwiseLine& line);  ///< or null
};

/// The kernel of an instruction set for groups of this size; null where it has none.
QUANTAL_API const GroupedConvKernel* find_grouped_conv(Isa isa, const ConvShape& shape,
                                                       ChannelOrder order);

/// False where a number that y should hold as a code is NaN; y is then unspecified.
/// Precondition: find_grouped_conv(isa, args.shape, args.order).
QUANTAL_API bool grouped_conv(Isa isa, const GroupedConvArgs& args,
                              const ParallelFor& parallel_for = serial_for);

/// The part of the kernels whose lanes are channels.
void run_channels__avx2(const GroupedConvBlock& block);
void depthwise_line__avx2(const DepthwiseLine& line);
void gather_floats__avx2(const ChannelPixels& from, float* to);
void gather_codes__avx2(const ChannelPixels& from, float* to);

extern const GroupedConvKernel grouped_conv__portable, grouped_conv__avx2;

}  // namespace quantal::kernels
