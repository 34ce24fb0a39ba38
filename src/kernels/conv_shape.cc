#include "kernels/conv_shape.h"

namespace quantal::kernels {

ConvShape::Extent ConvShape::output() const {
  Extent size;
  for (int i = 0; i < 3; ++i) {
    const std::int64_t span = dilation[i] * (kernel[i] - 1) + 1;
    const std::int64_t room = input[i] + 2 * padding[i] - span;
    size[i] = room < 0 ? 0 : room / stride[i] + 1;
  }
  return size;
}

ConvShape::Extent index_at(std::int64_t count, const ConvShape::Extent& sizes) {
  const std::int64_t rows = count / sizes[2];
  return {rows / sizes[1], rows % sizes[1], count % sizes[2]};
}

}  // namespace quantal::kernels
