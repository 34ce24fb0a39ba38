#include "kernels/conv_patches.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/scratch.h"
#include "kernels/transpose_square.h"

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

// Without a call for few bytes: both ends, which may overlap.
template <typename Block>
void copy_ends(const std::int8_t* from, std::int64_t count, std::int8_t* to) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(Block));
  Block first, last;
  std::memcpy(&first, from, kBytes);
  std::memcpy(&last, from + count - kBytes, kBytes);
  std::memcpy(to, &first, kBytes);
  std::memcpy(to + count - kBytes, &last, kBytes);
}
void copy_few(const std::int8_t* from, std::int64_t count, std::int8_t* to) {
  if (count > 64) {
    std::memcpy(to, from, count);
  } else if (count >= 16) {
    for (std::int64_t i = 0; i + 16 < count; i += 16) std::memcpy(to + i, from + i, 16);
    std::memcpy(to + count - 16, from + count - 16, 16);
  } else if (count >= 8) {
    copy_ends<std::uint64_t>(from, count, to);
  } else if (count >= 4) {
    copy_ends<std::uint32_t>(from, count, to);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// 16 bytes, `step` apart.
template <int step>
Register<std::int8_t>::Lanes load_sixteen(const std::int8_t* from) {
  const auto low = Register<std::int8_t>::load(from);
  if constexpr (step == 1) return low;
  const auto high = Register<std::int8_t>::load(from + 16);
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                 30);
}

// Positions of one row of the output, whose patches are written together.
template <typename Element>
class RowPatches {
 public:
  /// At most `most` positions are written at once.
  RowPatches(const ConvShape& shape, std::int64_t most)
      : shape_(shape),
        length_(reach(most) + kLineSlack),
        line_(length_),
        lines_(transposes() ? (length_ * shape.columns() / shape.kernel[2] + 3) / 4 : 0) {}

  void write(const Element* input, const Extent& at, std::int64_t count, Element* out,
             std::int64_t stride) {
    if constexpr (sizeof(Element) == 1) {
      if (transposes() && count >= kFewPositions) {
        find_lines(input, at, count);
        return shape_.stride[2] == 1 ? write_columns<1>(count, out, stride)
                                     : write_columns<2>(count, out, stride);
      }
    }
    copy_lines(input, at, count, out, stride);
  }

 private:
  static constexpr std::int64_t kLineSlack = 32;  // elements that may be read behind a line
  static constexpr std::int64_t kChunk = 16;      // columns
  static constexpr std::int64_t kFewPositions = 4;

  // Where a position's elements of a line are few bytes, 16 columns of 16 positions are transposed
  // instead.
  bool transposes() const {
    return sizeof(Element) == 1 && shape_.kernel[2] <= 4 && shape_.stride[2] <= 2 &&
           shape_.columns() >= kChunk;
  }

  // All lines that `count` positions read. Their padding stays from call to call.
  void find_lines(const Element* input, const Extent& at, std::int64_t count) {
    const Inside inside = inside_of(at, count);
    if (inside != inside_) {
      std::fill_n(lines(), length_ * shape_.columns() / shape_.kernel[2], Element{});
      inside_ = inside;
    }
    Element* to = lines() + inside.begin;
    const std::int64_t size = inside.end - inside.begin;
    for (std::int64_t c = 0; c < shape_.group_channels(); ++c) {
      for (std::int64_t d = 0; d < shape_.kernel[0]; ++d) {
        for (std::int64_t h = 0; h < shape_.kernel[1]; ++h, to += length_) {
          const Element* row = inner_row(input + c * shape_.pixels(), at, d, h);
          if (row == nullptr) {
            std::fill_n(to, size, Element{});
          } else {
            copy_few(row + inside.first + inside.begin, size, to);
          }
        }
      }
    }
  }

  Element* lines() const { return reinterpret_cast<Element*>(lines_.data()); }

  template <int step>
  void write_columns(std::int64_t count, Element* out, std::int64_t stride) const {
    const std::int64_t width = shape_.kernel[2], columns = shape_.columns();
    for (std::int64_t i = 0; i < columns; i += kChunk) {
      const std::int64_t first = std::min(i, columns - kChunk);  // the last ones, maybe again
      const Element* from[kChunk];
      const Element* line = lines() + first / width * length_;
      std::int64_t tap = first % width;
      for (const Element*& column : from) {
        column = line + tap * shape_.dilation[2];
        if (++tap == width) tap = 0, line += length_;
      }
      for (std::int64_t p = 0; p < count; p += kChunk) {
        Register<std::int8_t>::Lanes square[kChunk];
        QUANTAL_UNROLL for (int k = 0; k < kChunk; ++k) {
          square[k] = load_sixteen<step>(from[k] + p * step);
        }
        transpose_square<std::int8_t>(square);
        const std::int64_t some = std::min(kChunk, count - p);
        for (std::int64_t k = 0; k < some; ++k) {
          Register<std::int8_t>::store(square[k], out + (p + k) * stride + first);
        }
      }
    }
  }

  void copy_lines(const Element* input, const Extent& at, std::int64_t count, Element* out,
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

  // Elements of a line that `count` positions read.
  std::int64_t reach(std::int64_t count) const {
    return (count - 1) * shape_.stride[2] + (shape_.kernel[2] - 1) * shape_.dilation[2] + 1;
  }

  // What a row of the kernel reads, with its padding: where it lies, or copied.
  const Element* find_line(const Element* plane, const Extent& at, std::int64_t count,
                           std::int64_t d, std::int64_t h) {
    const Element* row = inner_row(plane, at, d, h);
    const Inside inside = row == nullptr ? Inside{0, 0, 0} : inside_of(at, count);
    // A run may read behind its end: only inside the row is that memory.
    const std::int64_t last = inside.first + reach(count) + kPatchSlack;
    if (row != nullptr && inside.first >= 0 && last <= shape_.input[2]) return row + inside.first;
    std::fill_n(line_.data(), inside.begin, Element{});
    if (inside.end > inside.begin) {
      std::copy(row + inside.first + inside.begin, row + inside.first + inside.end,
                line_.data() + inside.begin);
    }
    std::fill(line_.data() + inside.end, line_.data() + reach(count), Element{});
    return line_.data();
  }

  // Null: in the padding.
  const Element* inner_row(const Element* plane, const Extent& at, std::int64_t d,
                           std::int64_t h) const {
    const std::int64_t z = at[0] * shape_.stride[0] - shape_.padding[0] + d * shape_.dilation[0];
    const std::int64_t y = at[1] * shape_.stride[1] - shape_.padding[1] + h * shape_.dilation[1];
    const bool is_inside = z >= 0 && z < shape_.input[0] && y >= 0 && y < shape_.input[1];
    return is_inside ? plane + (z * shape_.input[1] + y) * shape_.input[2] : nullptr;
  }

  // Elements [begin, end) of a line are those of a row from `first` + begin on, the others padding.
  struct Inside {
    std::int64_t first = 0, begin = -1, end = -1;
    bool operator==(const Inside&) const = default;
  };
  Inside inside_of(const Extent& at, std::int64_t count) const {
    const std::int64_t first = at[2] * shape_.stride[2] - shape_.padding[2], length = reach(count);
    const std::int64_t begin = std::clamp<std::int64_t>(-first, 0, length);
    return {first, begin, std::clamp<std::int64_t>(shape_.input[2] - first, begin, length)};
  }

  const ConvShape& shape_;
  std::int64_t length_;  ///< of a line in memory
  std::vector<Element> line_;
  Scratch lines_;
  Inside inside_;  ///< of lines_
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
  RowPatches<Element> patches(shape, std::min(count, size[2]));
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

}  // namespace quantal::kernels
