#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/packed_layout.h"

/// Depthwise convolution of int8 codes: every channel has its own few taps.
namespace quantal::kernels {

/// A weight of (channels, taps) as the kernels read it.
struct DepthwiseWeight {
  std::int64_t channels = 0;
  std::int64_t taps = 0;
  /// (pairs of taps, channels, 2): codes; a last odd tap has a partner of 0.
  const std::int16_t* codes = nullptr;
  const float* scale = nullptr;  ///< (channels)
  const float* shift = nullptr;  ///< (channels); null for symmetric types
};

/// Arguments of a run of positions. Checked by the caller: kernels trust them.
struct DepthwiseArgs {
  DepthwiseWeight weight;
  std::int64_t positions = 0;
  /// (positions, 2 · pairs of taps): the channels of the pixel that a tap reads; zeros in padding.
  const std::int8_t* const* pixels = nullptr;
  float scale = 1;                   ///< of the codes
  FloatType type = FloatType::kF32;  ///< of y and bias
  void* y = nullptr;                 ///< (positions, channels)
  const void* bias = nullptr;        ///< (channels), or null
};

/// As the integer linear (integer_linear.h) with the taps as its columns, to the bit.
using DepthwiseKernel = void (*)(const DepthwiseArgs& args);

/// The kernel of an instruction set.
QUANTAL_API DepthwiseKernel find_depthwise(Isa isa);

/// Channels [first, channels) alone, for the portable kernel and for what others leave over.
void depthwise_channels(const DepthwiseArgs& args, std::int64_t first);

void depthwise__portable(const DepthwiseArgs& args);
void depthwise__avx2(const DepthwiseArgs& args);

}  // namespace quantal::kernels
