#include "kernels/float_conv.h"

#include <algorithm>
#include <numeric>

#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kLineFloats = 16;       // of the cache
constexpr std::int64_t kSets = 64, kWays = 8;  // of the first-level cache
// So few numbers are copied sooner than another thread begins.
constexpr std::int64_t kSerial = 1 << 14;
// Columns and positions that a kernel reads again and again before it goes on.
constexpr std::int64_t kColumns = 256, kPositions = 6;

}  // namespace

std::int64_t spread_stride(std::int64_t least, std::int64_t count) {
  const std::int64_t sets = kSets / std::gcd(least / kLineFloats, kSets);
  if (least % kLineFloats != 0 || sets * kWays / 2 >= count) return least;
  return least + kLineFloats;  // an odd number of lines
}

ConvInput::ConvInput(const FloatConvArgs& args, ConvertFloats convert,
                     const ParallelFor& parallel_for)
    : shape_(args.shape),
      padded_{shape_.input[0] + 2 * shape_.padding[0], shape_.input[1] + 2 * shape_.padding[1],
              shape_.input[2] + 2 * shape_.padding[2]},
      is_planes_(args.order == ChannelOrder::kPlanes),
      pixel_stride_(is_planes_ ? 1 : spread_stride(shape_.channels, kPositions * shape_.taps())),
      channel_stride_(is_planes_ ? spread_stride(padded_pixels(), kColumns / shape_.taps()) : 1),
      is_copied_(!lies_well(args.type)),
      scratch_(is_copied_ ? shape_.batch * sample_stride() : 0),
      data_(is_copied_ ? scratch_.data() : static_cast<const float*>(args.x)) {
  if (is_copied_) copy(args, convert, parallel_for);
  find_columns();
  find_positions();
}

bool ConvInput::lies_well(FloatType type) const {
  return type == FloatType::kF32 && sample_stride() == shape_.channels * shape_.pixels();
}

void ConvInput::find_columns() {
  columns_.reserve(shape_.columns());
  for (std::int64_t c = 0; c < shape_.group_channels(); ++c) {
    ConvShape::Extent tap{};
    for (std::int64_t t = 0; t < shape_.taps(); ++t, advance(tap, shape_.kernel)) {
      columns_.push_back(c * channel_stride_ + offset_of(tap, shape_.dilation));
    }
  }
}

void ConvInput::find_positions() {
  const ConvShape::Extent size = shape_.output();
  const std::int64_t step = offset_of({0, 0, 1}, shape_.stride);
  positions_.resize(shape_.batch * size[0] * size[1] * size[2]);
  std::int64_t* to = positions_.data();
  for (std::int64_t sample = 0; sample < shape_.batch; ++sample) {
    for (std::int64_t d = 0; d < size[0]; ++d) {
      for (std::int64_t h = 0; h < size[1]; ++h, to += size[2]) {
        const std::int64_t row = sample * sample_stride() + offset_of({d, h, 0}, shape_.stride);
        for (std::int64_t w = 0; w < size[2]; ++w) to[w] = row + w * step;
      }
    }
  }
}

// A row of pixels of a channel, or of all channels where those lie together, after the other.
void ConvInput::copy(const FloatConvArgs& args, ConvertFloats convert,
                     const ParallelFor& parallel_for) const {
  const std::int64_t planes = is_planes_ ? shape_.channels : 1;
  const std::int64_t lines = padded_[0] * padded_[1];
  const ParallelFor threads = shape_.batch * sample_stride() < kSerial ? serial_for : parallel_for;
  threads(shape_.batch * planes * lines, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t plane = i / lines, first = i % lines;
      const std::int64_t last = std::min(lines, first + end - i);
      float* const to =
          scratch_.data() + plane / planes * sample_stride() + plane % planes * channel_stride_;
      copy_lines(args, convert, plane, first, last, to);
      i += last - first;
    }
  });
}

// Lines [first, last) of a plane that begins at `to`. Counted, not divided: a line may be short.
void ConvInput::copy_lines(const FloatConvArgs& args, ConvertFloats convert, std::int64_t plane,
                           std::int64_t first, std::int64_t last, float* to) const {
  std::int64_t depth = first / padded_[1], height = first % padded_[1];
  for (std::int64_t line = first; line < last; ++line) {
    copy_line(args, convert, plane, depth - shape_.padding[0], height - shape_.padding[1],
              to + line * padded_[2] * pixel_stride_);
    if (++height == padded_[1]) height = 0, ++depth;
  }
}

void ConvInput::copy_line(const FloatConvArgs& args, ConvertFloats convert, std::int64_t plane,
                          std::int64_t depth, std::int64_t height, float* to) const {
  const bool is_inside =
      depth >= 0 && depth < shape_.input[0] && height >= 0 && height < shape_.input[1];
  if (!is_inside) {
    std::fill_n(to, padded_[2] * pixel_stride_, 0.0F);
    return;
  }
  const std::int64_t padding = shape_.padding[2] * pixel_stride_, width = shape_.input[2];
  const std::int64_t line = (plane * shape_.input[0] + depth) * shape_.input[1] + height;
  std::fill_n(to, padding, 0.0F);
  to += padding;
  if (is_planes_) {
    convert(args.x, line * width, width, args.type, to);
  } else if (pixel_stride_ == shape_.channels) {
    convert(args.x, line * width * shape_.channels, width * shape_.channels, args.type, to);
  } else {
    for (std::int64_t w = 0; w < width; ++w) {
      convert(args.x, (line * width + w) * shape_.channels, shape_.channels, args.type,
              to + w * pixel_stride_);
    }
  }
  std::fill_n(to + width * pixel_stride_, padding, 0.0F);
}

const FloatConvKernel* find_float_conv(Isa isa) {
  return best_variant<const FloatConvKernel*>(isa, {
#if defined(__x86_64__)
                                                       {Isa::kAvx512, &float_conv__avx512},
                                                       {Isa::kAvx2, &float_conv__avx2},
#endif
                                                   });
}

void float_conv(Isa isa, const FloatConvArgs& args, const ParallelFor& parallel_for) {
  const FloatConvKernel* kernel = find_float_conv(isa);
  const ConvInput input(args, kernel->convert, parallel_for);
  kernel->run(args, input, parallel_for);
}

}  // namespace quantal::kernels
