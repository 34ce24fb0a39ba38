#include "kernels/grouped_conv.h"

#include <algorithm>

#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kVector = GroupedConvPlan::kVector;
// Floats of a block, and blocks among which threads divide a call: fewer lines are read twice.
constexpr std::int64_t kBlockFloats = 1 << 16;
constexpr std::int64_t kBlocks = 4;

std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// (taps, channels) from (channels, taps), in which `row` is; its numbers go `stride` apart.
void reorder_row(const ConvShape& shape, const float* row, float* to, std::int64_t stride) {
  for (std::int64_t c = 0; c < shape.group_channels(); ++c) {
    for (std::int64_t tap = 0; tap < shape.taps(); ++tap) {
      to[(tap * shape.group_channels() + c) * stride] = *row++;
    }
  }
}

void reorder_weight(const GroupedConvArgs& args, float* to) {
  const std::int64_t columns = args.shape.columns();
  const bool is_planes = args.order == ChannelOrder::kPlanes;
  const std::int64_t together = is_planes ? 1 : kVector;
  if (!is_planes) std::fill_n(to, divide_up(args.shape.rows, kVector) * kVector * columns, 0.0F);
  for (std::int64_t r = 0; r < args.shape.rows; ++r) {
    const std::int64_t first = r / together * together;
    reorder_row(args.shape, args.weight + r * columns, to + first * columns + r - first, together);
  }
}

}  // namespace

GroupedConvPlan::GroupedConvPlan(const GroupedConvArgs& args)
    : shape_(args.shape),
      size_(shape_.output()),
      is_planes_(args.order == ChannelOrder::kPlanes),
      groups_(is_planes_ ? shape_.groups : 1),
      planes_(is_planes_ ? shape_.group_channels() : 1) {
  lay_out_lines();
  const std::int64_t line_floats = planes_ * shape_.kernel[0] * line_;
  const std::int64_t tap_lines = (shape_.kernel[1] - 1) * shape_.dilation[1];
  const std::int64_t fitting = (kBlockFloats / line_floats - tap_lines - 1) / shape_.stride[1] + 1;
  const std::int64_t most = std::clamp<std::int64_t>(fitting, 1, size_[1]);
  const std::int64_t wanted = divide_up(kBlocks, shape_.batch * groups_ * size_[0]);
  parts_ = std::min(std::max(divide_up(size_[1], most), wanted), size_[1]);
  lines_ = divide_up(size_[1], parts_);
  parts_ = divide_up(size_[1], lines_);
  find_runs();
  find_columns();
}

void GroupedConvPlan::lay_out_lines() {
  const std::int64_t reach = (shape_.kernel[2] - 1) * shape_.dilation[2], step = shape_.stride[2];
  if (is_planes_) {
    pixel_ = 1, position_step_ = 1, phases_ = step;
    phase_ = divide_up(size_[2], kVector) * kVector + reach / step;
    line_ = phases_ * phase_;
  } else {
    phases_ = 1, phase_ = (size_[2] - 1) * step + reach + 1;
    pixel_ = spread_stride(shape_.channels, (kVector + shape_.kernel[2]) * shape_.kernel[1]);
    position_step_ = step * pixel_;
    line_ = phase_ * pixel_;
  }
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
    const std::int64_t in_line =
        is_planes_ ? across % phases_ * phase_ + across / phases_ : across * pixel_;
    const std::int64_t begin = tap[0] * slice() + tap[1] * shape_.dilation[1] * line_ + in_line;
    const std::int64_t channel = is_planes_ ? shape_.kernel[0] * slice() : 1;
    for (std::int64_t c = 0; c < shape_.group_channels(); ++c) {
      columns_.push_back(begin + c * channel);
    }
  }
}

GroupedConvPlan::Block GroupedConvPlan::block(std::int64_t index) const {
  const std::int64_t inner = index % (shape_.batch * groups_),
                     outer = index / (shape_.batch * groups_);
  const std::int64_t line = outer % parts_ * lines_;
  return {.sample = inner / groups_,
          .group = inner % groups_,
          .depth = outer / parts_,
          .line = line,
          .lines = std::min(lines_, size_[1] - line)};
}

std::int64_t GroupedConvPlan::block_floats() const {
  return planes_ * shape_.kernel[0] * slice() + std::max(kVector, shape_.input[2]);
}

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
  // Registers reach beyond the last pixels.
  std::fill_n(to + planes_ * shape_.kernel[0] * slice(), kVector, 0.0F);
}

void GroupedConvPlan::fill_pixels(const GroupedConvArgs& args, const Block& block,
                                  ConvertFloats convert, float* to) const {
  const std::int64_t plane = block.sample * groups_ + block.group;
  const std::int64_t first = plane * planes_ * shape_.input[0] * shape_.input[1];
  const std::int64_t width = shape_.input[2], channels = is_planes_ ? 1 : shape_.channels;
  float* const buffer = to + planes_ * shape_.kernel[0] * slice();
  for_lines(block, to, [&](std::int64_t line, float* out) {
    if (line < 0) return;
    const std::int64_t from = (first + line) * width * channels;
    if (phases_ > 1) {
      convert(args.x, from, pixels_, args.type, buffer);
      divide_into_phases(buffer, out);
    } else if (pixel_ == channels) {
      convert(args.x, from, pixels_ * channels, args.type, out + before_ * pixel_);
    } else {
      for (std::int64_t w = 0; w < pixels_; ++w) {
        convert(args.x, from + w * channels, channels, args.type, out + (before_ + w) * pixel_);
      }
    }
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

const GroupedConvKernel* find_grouped_conv(Isa isa, const ConvShape& shape, ChannelOrder order) {
  // In more rows, a register would hold one group's alone.
  const std::int64_t rows = shape.group_rows();
  const bool fits = kVector % rows == 0 && rows < kVector && shape.group_channels() <= rows;
  if (order == ChannelOrder::kLast && !fits) return nullptr;
#if defined(__x86_64__)
  if (isa == Isa::kAvx2 || isa == Isa::kAvxVnni) return &grouped_conv__avx2;
#endif
  static_cast<void>(isa);
  return nullptr;
}

void grouped_conv(Isa isa, const GroupedConvArgs& args, const ParallelFor& parallel_for) {
  if (args.shape.batch == 0) return;
  const GroupedConvKernel* kernel = find_grouped_conv(isa, args.shape, args.order);
  const GroupedConvPlan plan(args);
  const std::int64_t rows = divide_up(args.shape.rows, kVector) * kVector;
  const Scratch weight(rows * args.shape.columns()), bias(rows);
  reorder_weight(args, weight.data());
  std::fill_n(bias.data(), rows, 0.0F);
  if (args.bias != nullptr) kernel->convert(args.bias, 0, args.shape.rows, args.type, bias.data());
  parallel_for(plan.blocks(), [&](std::int64_t begin, std::int64_t end) {
    const Scratch input(plan.block_floats());
    GroupedConvPlan::Block filled;
    for (std::int64_t i = begin; i < end; ++i) {
      const GroupedConvBlock block{args,         plan,          plan.block(i),
                                   input.data(), weight.data(), bias.data()};
      const bool has_padding =
          i > begin && block.at.depth == filled.depth && block.at.line == filled.line;
      if (!has_padding) plan.fill_padding(block.at, input.data());
      filled = block.at;
      plan.fill_pixels(args, block.at, kernel->convert, input.data());
      (args.order == ChannelOrder::kPlanes ? kernel->planes : kernel->pixels)(block);
    }
  });
}

}  // namespace quantal::kernels
