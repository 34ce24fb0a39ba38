#pragma once

#include <array>
#include <cstdint>

#include <quantal/api.h>

namespace quantal::kernels {

/// A convolution over (batch, channels, depth, height, width). One of fewer spatial dimensions has
/// the first ones of size 1, with kernel, stride and dilation 1 and no padding.
struct QUANTAL_API ConvShape {
  using Extent = std::array<std::int64_t, 3>;

  std::int64_t batch = 1;
  std::int64_t channels = 1;
  std::int64_t rows = 1;  ///< output channels: the weight is (rows, channels / groups, kernel)
  std::int64_t groups = 1;
  Extent input{1, 1, 1};
  Extent kernel{1, 1, 1};
  Extent stride{1, 1, 1};
  Extent padding{0, 0, 0};
  Extent dilation{1, 1, 1};

  /// Sizes of the output; below 1 where the kernel does not fit.
  Extent output() const;
  std::int64_t pixels() const { return input[0] * input[1] * input[2]; }
  std::int64_t positions() const {
    const Extent size = output();
    return size[0] * size[1] * size[2];
  }
  std::int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  std::int64_t group_channels() const { return channels / groups; }
  std::int64_t group_rows() const { return rows / groups; }
  /// Elements of a row of the weight, in the order (channel, kernel).
  std::int64_t columns() const { return group_channels() * taps(); }
  /// Of the whole batch.
  std::int64_t products() const { return batch * positions() * rows * columns(); }
  /// One output channel for each input channel, of which it reads no other.
  bool is_depthwise() const { return groups == channels && rows == channels && channels > 1; }

  /// One tap on every pixel: a linear over channels.
  bool is_pointwise() const {
    return taps() == 1 && stride == Extent{1, 1, 1} && padding == Extent{0, 0, 0};
  }

  /// The pixel that a tap reads at a position, or -1 in the padding.
  std::int64_t pixel(const Extent& position, const Extent& tap) const {
    std::int64_t index = 0;
    for (int i = 0; i < 3; ++i) {
      const std::int64_t at = position[i] * stride[i] - padding[i] + tap[i] * dilation[i];
      if (at < 0 || at >= input[i]) return -1;
      index = index * input[i] + at;
    }
    return index;
  }
};

/// The next index of a row-major walk through `sizes`.
inline void advance(ConvShape::Extent& index, const ConvShape::Extent& sizes) {
  for (int i = 2; i >= 0; --i) {
    if (++index[i] < sizes[i]) return;
    index[i] = 0;
  }
}
/// The index that is `count` steps from the first.
QUANTAL_API ConvShape::Extent index_at(std::int64_t count, const ConvShape::Extent& sizes);

}  // namespace quantal::kernels
