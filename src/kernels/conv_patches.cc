#include "kernels/conv_patches.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace quantal::kernels {
namespace {

using Extent = ConvShape::Extent;

// Every run copies `bytes`, which may be more than it has: what comes behind is written later.
template <int bytes, typename Element>
void copy_fixed(const Element* from, std::int64_t step, std::int64_t count, Element* to,
                std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * step, bytes);
}

// Runs of `length` elements that begin `step` apart, `dilation` between their elements.
template <typename Element>
void copy_runs(const Element* from, std::int64_t step, std::int64_t dilation, std::int64_t length,
               std::int64_t count, Element* to, std::int64_t stride) {
  if (dilation > 1 && length > 1) {
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t k = 0; k < length; ++k) to[i * stride + k] = from[i * step + k * dilation];
    }
    return;
  }
  const auto bytes = length * static_cast<std::int64_t>(sizeof(Element));
  if (length == 1) return copy_fixed<sizeof(Element)>(from, step, count, to, stride);
  if (bytes <= 4) return copy_fixed<4>(from, step, count, to, stride);
  if (bytes <= 8) return copy_fixed<8>(from, step, count, to, stride);
  if (bytes <= 16) return copy_fixed<16>(from, step, count, to, stride);
  for (std::int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * step, bytes);
}

// Positions of one row of the output, whose patches are written together.
template <typename Element>
class RowPatches {
 public:
  explicit RowPatches(const ConvShape& shape)
      : shape_(shape), line_(reach(shape.output()[2]) + kPatchSlack) {}

  void write(const Element* input, const Extent& at, std::int64_t count, Element* out,
             std::int64_t stride) {
    const std::int64_t pixels = shape_.pixels(), width = shape_.kernel[2];
    for (std::int64_t c = 0; c < shape_.group_channels(); ++c) {
      for (std::int64_t d = 0; d < shape_.kernel[0]; ++d) {
        for (std::int64_t h = 0; h < shape_.kernel[1]; ++h) {
          const Element* line = find_line(input + c * pixels, at, count, d, h);
          copy_runs(line, shape_.stride[2], shape_.dilation[2], width, count, out, stride);
          out += width;
        }
      }
    }
  }

 private:
  // Elements of a line that `count` positions read.
  std::int64_t reach(std::int64_t count) const {
    return (count - 1) * shape_.stride[2] + (shape_.kernel[2] - 1) * shape_.dilation[2] + 1;
  }

  // What a row of the kernel reads, with its padding.
  const Element* find_line(const Element* plane, const Extent& at, std::int64_t count,
                           std::int64_t d, std::int64_t h) {
    const std::int64_t z = at[0] * shape_.stride[0] - shape_.padding[0] + d * shape_.dilation[0];
    const std::int64_t y = at[1] * shape_.stride[1] - shape_.padding[1] + h * shape_.dilation[1];
    const std::int64_t first = at[2] * shape_.stride[2] - shape_.padding[2];
    const std::int64_t length = reach(count), width = shape_.input[2];
    const bool is_inside = z >= 0 && z < shape_.input[0] && y >= 0 && y < shape_.input[1];
    const std::int64_t left = is_inside ? std::clamp<std::int64_t>(-first, 0, length) : length;
    const std::int64_t end = std::clamp<std::int64_t>(width - first, left, length);
    const Element* row = plane + (z * shape_.input[1] + y) * width;
    // A run may read behind its end: only inside the row is that memory.
    if (is_inside && left == 0 && first + length + kPatchSlack <= width) return row + first;
    std::fill_n(line_.data(), left, Element{});
    if (end > left) std::copy(row + first + left, row + first + end, line_.data() + left);
    std::fill(line_.data() + end, line_.data() + length, Element{});
    return line_.data();
  }

  const ConvShape& shape_;
  std::vector<Element> line_;
};

template <typename Element>
void write_pixels(const ConvShape& shape, const Element* input, std::int64_t first,
                  std::int64_t count, Element* out, std::int64_t stride) {
  const Extent size = shape.output();
  const std::int64_t columns = shape.group_channels();
  Extent at = index_at(first, size);
  for (std::int64_t i = 0; i < count; ++i, advance(at, size)) {
    const std::int64_t pixel = shape.pixel(at, {0, 0, 0});
    Element* to = out + i * stride;
    if (pixel < 0) {
      std::fill_n(to, columns, Element{});
    } else {
      std::memcpy(to, input + pixel * shape.channels, columns * sizeof(Element));
    }
  }
}

// An 8 x 8 matrix of bytes in eight words, transposed by exchanging ever larger blocks.
void transpose_bytes(const std::int8_t* from, std::int64_t from_stride, std::int8_t* to,
                     std::int64_t to_stride) {
  std::uint64_t rows[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&rows[i], from + i * from_stride, 8);
  const auto exchange = [&](int distance, int shift, std::uint64_t mask) {
    for (int i = 0; i < 8; ++i) {
      if ((i & distance) != 0) continue;
      const std::uint64_t moved = (rows[i] >> shift ^ rows[i + distance]) & mask;
      rows[i + distance] ^= moved;
      rows[i] ^= moved << shift;
    }
  };
  exchange(4, 32, 0x00000000FFFFFFFF);
  exchange(2, 16, 0x0000FFFF0000FFFF);
  exchange(1, 8, 0x00FF00FF00FF00FF);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &rows[i], 8);
}

template <typename Element>
void transpose_block(const Element* from, std::int64_t from_stride, Element* to,
                     std::int64_t to_stride) {
  if constexpr (sizeof(Element) == 1) {
    transpose_bytes(from, from_stride, to, to_stride);
  } else {
    for (int c = 0; c < 8; ++c) {
      for (int r = 0; r < 8; ++r) to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
}

}  // namespace

ChannelOrder patch_order(const ConvShape& shape) {
  return shape.taps() == 1 ? ChannelOrder::kLast : ChannelOrder::kPlanes;
}

template <typename Element>
void write_patches(const ConvShape& shape, const Element* input, std::int64_t first,
                   std::int64_t count, Element* out, std::int64_t stride) {
  if (patch_order(shape) == ChannelOrder::kLast) {
    return write_pixels(shape, input, first, count, out, stride);
  }
  const Extent size = shape.output();
  RowPatches<Element> patches(shape);
  for (std::int64_t done = 0; done < count;) {
    const Extent at = index_at(first + done, size);
    const std::int64_t part = std::min(count - done, size[2] - at[2]);
    patches.write(input, at, part, out + done * stride, stride);
    done += part;
  }
}

template void write_patches(const ConvShape&, const std::int8_t*, std::int64_t, std::int64_t,
                            std::int8_t*, std::int64_t);
template void write_patches(const ConvShape&, const std::uint16_t*, std::int64_t, std::int64_t,
                            std::uint16_t*, std::int64_t);
template void write_patches(const ConvShape&, const float*, std::int64_t, std::int64_t, float*,
                            std::int64_t);

void CodePatches::write(const PackedLayout& layout, std::int64_t begin, std::int64_t end,
                        const TokenCodes& out) const {
  static_assert(kPatchSlack <= TokenCodes::kSlack);
  write_patches(*shape, input, first + begin, end - begin, out.codes(begin), out.stride());
  if (layout.padded_begin(layout.groups() - 1) == layout.group_begin(layout.groups() - 1)) return;
  for (std::int64_t t = begin; t < end; ++t) {
    std::int8_t* codes = out.codes(t);
    for (std::int64_t group = layout.groups() - 1; group > 0; --group) {
      std::memmove(codes + layout.padded_begin(group), codes + layout.group_begin(group),
                   layout.group_columns(group));
    }
  }
}

template <typename Element>
void transpose(const Element* from, std::int64_t from_stride, std::int64_t rows,
               std::int64_t columns, Element* to, std::int64_t to_stride) {
  const std::int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (std::int64_t r = 0; r < whole_rows; r += 8) {
    for (std::int64_t c = 0; c < whole_columns; c += 8) {
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
}

template void transpose(const std::int8_t*, std::int64_t, std::int64_t, std::int64_t, std::int8_t*,
                        std::int64_t);
template void transpose(const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t,
                        std::uint16_t*, std::int64_t);
template void transpose(const float*, std::int64_t, std::int64_t, std::int64_t, float*,
                        std::int64_t);

}  // namespace quantal::kernels
