#include <algorithm>
#include <cstring>

#include "kernels/tap_conv.h"
#include "kernels/transpose.h"

namespace quantal::kernels {
namespace {

// Pixels that are copied by one thread at a time.
constexpr std::int64_t kFillPixels = 512;

// What gather_pixels() transposes at once; of fewer channels, interleave() does.
constexpr std::int64_t kManyChannels = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t span(const ConvShape& shape, int dim) {
  return (shape.kernel[dim] - 1) * shape.dilation[dim] + 1;
}

void flip_bytes(std::int8_t* bytes, std::int64_t count, std::uint8_t flip) {
  for (std::int64_t i = 0; i < count; ++i) bytes[i] = static_cast<std::int8_t>(bytes[i] ^ flip);
}

ConvShape of_groups(ConvShape shape, std::int64_t together) {
  shape.groups /= together;
  return shape;
}

}  // namespace

std::int64_t groups_together(const ConvShape& shape) {
  constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
  const std::int64_t rows = shape.group_rows();
  if (shape.groups == 1 || rows % kTileRows == 0) return 1;
  const bool fits = kTileRows % rows == 0 && shape.groups % (kTileRows / rows) == 0;
  // A step has channels of one group.
  return fits && shape.group_channels() % 4 == 0 ? kTileRows / rows : 0;
}

TapPlan::TapPlan(const ConvShape& shape, std::int64_t most_bytes, int unit)
    : together_(groups_together(shape)),
      shape_(of_groups(shape, together_)),
      size_(shape.output()),
      pitch_(ceil_div((size_[2] - 1) * shape.stride[2] + span(shape, 2), shape.stride[2])) {
  const std::int64_t step = shape.kernel[0] * shape.stride[1] * line_bytes();
  const std::int64_t room = most_bytes / step - ceil_div(span(shape, 1), shape.stride[1]);
  parts_ = ceil_div(size_[1], std::clamp<std::int64_t>(room, 1, size_[1]));
  lines_ = ceil_div(size_[1], parts_);
  parts_ = ceil_div(size_[1], lines_);
  phase_lines_ = ceil_div(input_lines(lines_), shape.stride[1]);
  plane_bytes_ = shape.stride[1] * phase_lines_ * line_bytes();
  slab_bytes_ = shape.kernel[0] * plane_bytes_;
  fill_lines_ = std::max<std::int64_t>(1, kFillPixels / std::max<std::int64_t>(1, shape.input[2]));
  line_parts_ = ceil_div(input_lines(lines_), fill_lines_);

  steps_.reserve(shape_.columns() / 4 + shape_.taps() * 2L * unit);
  // Pixels that a line of the kernel covers follow each other, unless there are others between
  // them, or channels of other groups.
  const std::int64_t width = shape.kernel[2];
  const std::int64_t together = shape_.groups == 1 && shape.dilation[2] == 1 ? width : 1;
  for (std::int64_t d = 0; d < shape.kernel[0]; ++d) {
    for (std::int64_t h = 0; h < shape.kernel[1]; ++h) {
      const std::int64_t y = h * shape.dilation[1];
      const std::int64_t line = y % shape.stride[1] * phase_lines_ + y / shape.stride[1];
      for (std::int64_t w = 0; w < width; w += together) {
        const std::int64_t pixel = w * shape.dilation[2] * shape.channels;
        add_run(d * plane_bytes_ + line * line_bytes() + pixel,
                (d * shape.kernel[1] + h) * width + w, together, unit);
      }
    }
  }
}

void TapPlan::add_run(std::int64_t offset, std::int64_t first_tap, std::int64_t taps, int unit) {
  const std::int64_t channels = shape_.group_channels(), codes = taps * channels;
  const std::int64_t units = ceil_div(codes, 4L * unit);
  runs_.push_back({offset, units});
  for (std::int64_t tap = 0; tap < taps; ++tap) {
    tap_steps_.push_back(static_cast<std::int32_t>(step_count() + tap * channels / 4));
  }
  const std::int64_t own_channels = channels / together_,
                     own_rows = shape_.group_rows() / together_;
  const std::int64_t all_taps = shape_.taps();
  // The channel of a code in its own group, that group, and its tap: without dividing.
  std::int64_t channel = 0, group = 0, tap = first_tap, left = codes;
  for (std::int64_t i = 0; i < units * unit; ++i) {
    TapStep& step = steps_.emplace_back();
    step.rows = together_ == 1
                    ? 0xFFFF
                    : static_cast<std::uint16_t>(((1 << own_rows) - 1) << group * own_rows);
    for (std::int32_t& column : step.columns) {
      column = left-- > 0 ? static_cast<std::int32_t>(channel * all_taps + tap) : -1;
      if (++channel < own_channels) continue;
      channel = 0;
      if (++group == together_) group = 0, ++tap;
    }
  }
}

std::int64_t TapPlan::input_lines(std::int64_t lines) const {
  return (lines - 1) * shape_.stride[1] + span(shape_, 1);
}

TapPlan::Slab TapPlan::slab(std::int64_t index) const {
  const std::int64_t line = index % parts_ * lines_, outer = index / parts_;
  return {outer / size_[0], outer % size_[0], line, std::min(lines_, size_[1] - line)};
}

// Tokens are computed in tiles, and runs are read in units, of which a group's last one may reach
// behind the last channel of a pixel.
std::int64_t TapPlan::slack() const {
  std::int64_t end = 0;
  for (const TapRun& run : runs_) {
    end = std::max(end, run.offset + 4 * step_count() / run_count());
  }
  const std::int64_t last =
      (pitch_ * (lines_ - 1) + size_[2] + TapConvKernel::kTileTokens - 1) * token_bytes();
  return std::max<std::int64_t>(0, last + shape_.channels + end - slab_bytes_);
}

std::int64_t TapPlan::positions(std::int64_t tokens) const {
  return tokens / pitch_ * size_[2] + std::min(tokens % pitch_, size_[2]);
}

std::int8_t* TapPlan::line_at(std::int8_t* plane, std::int64_t line) const {
  const std::int64_t stride = shape_.stride[1];
  return plane + (line % stride * phase_lines_ + line / stride) * line_bytes();
}

void TapPlan::fill(const IntegerConvArgs& args, const Slab& slab, std::int64_t part,
                   std::uint8_t flip, std::int8_t* to) const {
  const std::int64_t d = part / line_parts_, first = part % line_parts_ * fill_lines_;
  const std::int64_t end = std::min(first + fill_lines_, input_lines(slab.lines));
  const std::int64_t z = slab.depth * shape_.stride[0] - shape_.padding[0] + d * shape_.dilation[0];
  const std::int64_t above = slab.line * shape_.stride[1] - shape_.padding[1];
  const std::int64_t channels = shape_.channels, width = shape_.input[2];
  // Of a line: its padding, and those of its pixels that are read.
  const std::int64_t pixels = line_bytes() / channels, left = std::min(shape_.padding[2], pixels);
  const std::int64_t count = std::min(width, pixels - left);
  const std::int8_t* sample = args.codes + slab.sample * shape_.pixels() * channels;
  std::int8_t* plane = to + d * plane_bytes_;
  for (std::int64_t i = first; i < end; ++i) {
    std::int8_t* line = line_at(plane, i);
    const std::int64_t y = above + i;
    if (z < 0 || z >= shape_.input[0] || y < 0 || y >= shape_.input[1]) {
      std::memset(line, 0, line_bytes());
      continue;
    }
    std::memset(line, 0, left * channels);
    std::memset(line + (left + count) * channels, 0, (pixels - left - count) * channels);
    const std::int64_t pixel = (z * shape_.input[1] + y) * width;
    if (args.order == ChannelOrder::kLast) {
      std::memcpy(line + left * channels, sample + pixel * channels, count * channels);
    }
  }
  const bool has_pixels = z >= 0 && z < shape_.input[0];
  if (args.order == ChannelOrder::kPlanes && has_pixels) {
    gather_lines(sample + z * shape_.input[1] * width, above, first, end, plane);
  }
  if (flip == 0) return;
  for (std::int64_t i = first; i < end; ++i) flip_bytes(line_at(plane, i), line_bytes(), flip);
}

void TapPlan::gather_lines(const std::int8_t* planes, std::int64_t above, std::int64_t first,
                           std::int64_t end, std::int8_t* to) const {
  const std::int64_t channels = shape_.channels, width = shape_.input[2];
  const std::int64_t pixels = line_bytes() / channels, left = std::min(shape_.padding[2], pixels);
  const std::int64_t count = std::min(width, pixels - left);
  const std::int64_t begin_y = std::clamp<std::int64_t>(above + first, 0, shape_.input[1]);
  const std::int64_t end_y = std::clamp<std::int64_t>(above + end, 0, shape_.input[1]);
  const auto pixels_at = [&](std::int64_t y) { return line_at(to, y - above) + left * channels; };
  if (channels < kManyChannels) {
    for (std::int64_t y = begin_y; y < end_y; ++y) {
      interleave(planes + y * width, shape_.pixels(), channels, count, pixels_at(y));
    }
    return;
  }
  // Of all lines at once, since there may be few pixels in one.
  std::vector<std::int8_t> unread(channels);
  std::vector<std::int8_t*> pixel_at;
  for (std::int64_t y = begin_y; y < end_y; ++y) {
    for (std::int64_t x = 0; x < width; ++x) {
      pixel_at.push_back(x < count ? pixels_at(y) + x * channels : unread.data());
    }
  }
  gather_pixels(planes + begin_y * width, shape_.pixels(), channels, pixel_at);
}

}  // namespace quantal::kernels
