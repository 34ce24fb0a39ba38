#include "kernels/grouped_plan.h"

#include <algorithm>

namespace quantal::kernels {
namespace {

constexpr std::int64_t kVector = GroupedConvPlan::kVector;
// Floats of a block, and blocks among which threads divide a call: with fewer, lines are read by
// two blocks less often.
constexpr std::int64_t kBlockFloats = 1 << 17;
constexpr std::int64_t kBlocks = 16;
// Rows that kernels compute together.
constexpr std::int64_t kRowsTogether = 4, kLaneRowsTogether = 16;

std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

}  // namespace

GroupedLanes lanes_of(const ConvShape& shape, ChannelOrder order) {
  const bool is_wide = order == ChannelOrder::kLast || shape.channels > kVector / 2;
  if (shape.is_depthwise() && is_wide) return GroupedLanes::kChannels;
  return order == ChannelOrder::kPlanes ? GroupedLanes::kPositions : GroupedLanes::kRows;
}

GroupedConvPlan::GroupedConvPlan(const GroupedConvArgs& args)
    : shape_(args.shape),
      size_(shape_.output()),
      order_(args.order),
      lanes_(lanes_of(shape_, order_)),
      groups_(1),
      group_rows_(shape_.rows),
      planes_(1) {
  if (lanes_ == GroupedLanes::kPositions) {
    groups_ = shape_.groups, group_rows_ = shape_.group_rows(), planes_ = shape_.group_channels();
  } else if (lanes_ == GroupedLanes::kChannels) {
    groups_ = divide_up(shape_.channels, kVector), group_rows_ = kVector;
  }
  lay_out_lines();
  divide();
  find_runs();
  find_columns();
}

void GroupedConvPlan::divide() {
  // What lies together is read and written by several blocks: while it is in the cache.
  const std::int64_t line_floats =
      planes_ * shape_.kernel[0] * line_ * (shares_pixels() ? groups_ : 1);
  const std::int64_t tap_lines = (shape_.kernel[1] - 1) * shape_.dilation[1];
  const std::int64_t fitting = (kBlockFloats / line_floats - tap_lines - 1) / shape_.stride[1] + 1;
  const std::int64_t most = std::clamp<std::int64_t>(fitting, 1, size_[1]);
  // No fewer lines than are read by two blocks.
  const std::int64_t least = std::max<std::int64_t>(1, tap_lines / shape_.stride[1]);
  const std::int64_t outer = shape_.batch * groups_ * size_[0];
  const std::int64_t wanted = std::min(divide_up(kBlocks, outer), divide_up(size_[1], least));
  lines_ = divide_up(size_[1], std::min(std::max(divide_up(size_[1], most), wanted), size_[1]));
  parts_ = divide_up(size_[1], lines_);
  const bool is_lane = lanes_ == GroupedLanes::kRows;
  const std::int64_t together =
      lanes_ == GroupedLanes::kChannels ? kVector : (is_lane ? kLaneRowsTogether : kRowsTogether);
  const std::int64_t tiles = divide_up(group_rows_, together);
  const std::int64_t row_parts = std::min(divide_up(kBlocks, outer * parts_), tiles);
  block_rows_ = divide_up(tiles, row_parts) * together;
  row_parts_ = divide_up(group_rows_, block_rows_);
}

void GroupedConvPlan::lay_out_lines() {
  const std::int64_t reach = (shape_.kernel[2] - 1) * shape_.dilation[2], step = shape_.stride[2];
  phases_ = 1, phase_ = (size_[2] - 1) * step + reach + 1;
  switch (lanes_) {
    case GroupedLanes::kPositions:
      pixel_ = 1, phases_ = step;
      phase_ = divide_up(size_[2], kVector) * kVector + reach / step;
      break;
    case GroupedLanes::kRows:
      pixel_ = spread_stride(shape_.channels, (kVector + shape_.kernel[2]) * shape_.kernel[1]);
      break;
    case GroupedLanes::kChannels:
      pixel_ = kVector;
      break;
  }
  position_step_ = step / phases_ * pixel_;
  line_ = phases_ * phase_ * pixel_;
  before_ = std::min(shape_.padding[2], phases_ * phase_);
  pixels_ = std::min(phases_ * phase_ - before_, shape_.input[2]);
}

void GroupedConvPlan::find_runs() {
  for (std::int64_t line = 0; line < lines_; ++line) {
    for (std::int64_t i = 0; i < size_[2]; i += kVector) {
      // Rather some positions twice than a part of a register.
      const std::int64_t w = std::max<std::int64_t>(0, std::min(i, size_[2] - kVector));
      runs_.push_back({line * shape_.stride[1] * line_ + w * position_step_, line * size_[2] + w,
                       std::min(kVector, size_[2])});
    }
  }
}

void GroupedConvPlan::find_columns() {
  ConvShape::Extent tap{};
  for (std::int64_t t = 0; t < shape_.taps(); ++t, advance(tap, shape_.kernel)) {
    const std::int64_t across = tap[2] * shape_.dilation[2];
    const std::int64_t in_line = (across % phases_ * phase_ + across / phases_) * pixel_;
    const std::int64_t begin = tap[0] * slice() + tap[1] * shape_.dilation[1] * line_ + in_line;
    const bool is_planes = lanes_ == GroupedLanes::kPositions;
    const std::int64_t channel = is_planes ? shape_.kernel[0] * slice() : 1;
    for (std::int64_t c = 0; c < shape_.group_channels(); ++c) {
      columns_.push_back(begin + c * channel);
    }
  }
}

GroupedConvPlan::Block GroupedConvPlan::block(std::int64_t index) const {
  const std::int64_t row_part = index % row_parts_;
  index /= row_parts_;
  // Lines of one group together: a thread reads what it, rather than another, has written. But
  // lines of all groups where they share pixels.
  const std::int64_t lines = size_[0] * parts_, samples = shape_.batch * groups_;
  const std::int64_t inner = shares_pixels() ? index % samples : index / lines;
  const std::int64_t outer = shares_pixels() ? index / samples : index % lines;
  const std::int64_t line = outer % parts_ * lines_, group = inner % groups_;
  const std::int64_t row = group * group_rows_ + row_part * block_rows_;
  const std::int64_t end = std::min((group + 1) * group_rows_, shape_.rows);
  return {.sample = inner / groups_,
          .group = group,
          .depth = outer / parts_,
          .line = line,
          .lines = std::min(lines_, size_[1] - line),
          .row = row,
          .rows = std::min(block_rows_, end - row)};
}

std::int64_t GroupedConvPlan::slack() const {
  return lanes_ == GroupedLanes::kChannels ? kVector * position_step_ : kVector;
}

std::int64_t GroupedConvPlan::block_floats() const {
  return planes_ * shape_.kernel[0] * slice() + std::max(slack(), shape_.input[2]);
}

std::int64_t GroupedConvPlan::block_results() const { return block_rows_ * lines_ * size_[2]; }

template <typename Visit>
void GroupedConvPlan::for_lines(const Block& block, float* to, const Visit& visit) const {
  const std::int64_t first = block.line * shape_.stride[1] - shape_.padding[1];
  for (std::int64_t plane = 0; plane < planes_; ++plane) {
    for (std::int64_t k = 0; k < shape_.kernel[0]; ++k) {
      const std::int64_t depth =
          block.depth * shape_.stride[0] - shape_.padding[0] + k * shape_.dilation[0];
      const bool has_depth = depth >= 0 && depth < shape_.input[0];
      for (std::int64_t i = 0; i < input_lines(); ++i, to += line_) {
        const std::int64_t height = first + i;
        const bool is_inside = has_depth && height >= 0 && height < shape_.input[1];
        visit(is_inside ? (plane * shape_.input[0] + depth) * shape_.input[1] + height : -1, to);
      }
    }
  }
}

void GroupedConvPlan::fill_padding(const Block& block, float* to) const {
  for_lines(block, to, [&](std::int64_t line, float* out) {
    if (line < 0 || !is_dense()) {
      std::fill_n(out, line_, 0.0F);
      return;
    }
    std::fill_n(out, before_ * pixel_, 0.0F);
    std::fill(out + (before_ + pixels_) * pixel_, out + line_, 0.0F);
  });
  std::fill_n(to + planes_ * shape_.kernel[0] * slice(), slack(), 0.0F);
}

void GroupedConvPlan::fill_pixels(const GroupedConvArgs& args, const Block& block,
                                  const GroupedConvReader& reader, float* to) const {
  if (lanes_ == GroupedLanes::kChannels) return gather_channels(args, block, reader, to);
  const std::int64_t plane = block.sample * groups_ + block.group;
  const std::int64_t first = plane * planes_ * shape_.input[0] * shape_.input[1];
  const bool is_planes = lanes_ == GroupedLanes::kPositions;
  const std::int64_t width = shape_.input[2], channels = is_planes ? 1 : shape_.channels;
  float* const buffer = to + planes_ * shape_.kernel[0] * slice();
  for_lines(block, to, [&](std::int64_t line, float* out) {
    if (line < 0) return;
    const std::int64_t from = (first + line) * width * channels;
    if (phases_ > 1) {
      reader.convert(args.x, from, pixels_, args.type, buffer);
      divide_into_phases(buffer, out);
    } else if (pixel_ == channels) {
      reader.convert(args.x, from, pixels_ * channels, args.type, out + before_ * pixel_);
    } else {
      for (std::int64_t w = 0; w < pixels_; ++w) {
        reader.convert(args.x, from + w * channels, channels, args.type,
                       out + (before_ + w) * pixel_);
      }
    }
  });
}

void GroupedConvPlan::gather_channels(const GroupedConvArgs& args, const Block& block,
                                      const GroupedConvReader& reader, float* to) const {
  const bool is_planes = order_ == ChannelOrder::kPlanes;
  const std::int64_t pixels = shape_.pixels();
  ChannelPixels from{.x = args.x,
                     .type = args.type,
                     .size = shape_.batch * shape_.channels * pixels,
                     .pixel_step = is_planes ? 1 : shape_.channels,
                     .channel_step = is_planes ? pixels : 1,
                     .pixels = pixels_,
                     .channels = block.rows};
  const std::int64_t first =
      block.sample * shape_.channels * pixels + block.row * from.channel_step;
  for_lines(block, to, [&](std::int64_t line, float* out) {
    if (line < 0) return;
    from.first = first + line * shape_.input[2] * from.pixel_step;
    reader.gather(from, out + before_ * pixel_);
  });
}

void GroupedConvPlan::divide_into_phases(const float* pixels, float* to) const {
  for (std::int64_t phase = 0; phase < phases_; ++phase, to += phase_) {
    // Its first pixel that is not padding.
    const std::int64_t first = divide_up(std::max<std::int64_t>(0, before_ - phase), phases_);
    float* out = to + first;
    for (std::int64_t w = first * phases_ + phase - before_; w < pixels_; w += phases_) {
      *out++ = pixels[w];
    }
  }
}

}  // namespace quantal::kernels
