#pragma once

#include <cstdint>

#include "kernels/conv_shape.h"
#include "kernels/packed_layout.h"
#include "kernels/token_codes.h"

/// A convolution as a matrix product: each position of the output is a token, what the kernel
/// covers there, in the order of the weight's columns: (channel, depth, height, width).
namespace quantal::kernels {

/// Where the channels of a pixel lie.
enum class ChannelOrder : std::uint8_t {
  kPlanes,  ///< (channels, pixels)
  kLast,    ///< (pixels, channels)
};

/// The order from which patches of a convolution are written.
QUANTAL_API ChannelOrder patch_order(const ConvShape& shape);

/// Elements that write_patches() may write behind the columns of a token.
constexpr std::int64_t kPatchSlack = 8;

/// Patches of positions [first, first + count) of one sample and group, at out + i * stride.
/// `input` is the group's first channel of the sample, in patch_order(shape); padding gives zeros.
/// `Element`: std::int8_t, std::uint16_t (bits of a half-precision number) or float.
template <typename Element>
QUANTAL_API void write_patches(const ConvShape& shape, const Element* input, std::int64_t first,
                               std::int64_t count, Element* out, std::int64_t stride);

/// Patches of int8 codes as the tokens of an integer linear.
struct CodePatches {
  const ConvShape* shape = nullptr;
  const std::int8_t* input = nullptr;
  std::int64_t first = 0;  ///< the position that is token 0

  /// Tokens [begin, end), without scale, padding and sums.
  void write(const PackedLayout& layout, std::int64_t begin, std::int64_t end,
             const TokenCodes& out) const;
};

}  // namespace quantal::kernels
