// A depthwise convolution around its kernel: the weight's codes as the kernel wants them, and where
// each position reads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels/depthwise.h"
#include "kernels/integer_conv.h"
#include "kernels/linear.h"

namespace quantal::kernels {
namespace {

using Extent = ConvShape::Extent;

// Positions that a thread takes at a time: their codes and sums stay in the first-level cache.
constexpr std::int64_t kPositions = 32;

struct Taps {
  explicit Taps(const IntegerConvArgs& args)
      : channels(args.shape.channels),
        taps(args.shape.taps()),
        codes((taps + 1) / 2 * channels * 2),
        scale(channels),
        shift(channels),
        is_affine(args.layout->is_affine()) {
    const PackedLayout& layout = *args.layout;
    const int zero = is_affine ? 0 : 128;
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t tile = c / PackedLayout::kTileRows, r = c % PackedLayout::kTileRows;
      if (r == 0) scales = load_scales(layout, args.weight + tile * layout.tile_bytes(), 0);
      scale[c] = scales.scale[r];
      shift[c] = scales.shift[r];
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        codes[(tap / 2 * channels + c) * 2 + tap % 2] =
            static_cast<std::int16_t>(packed_code(layout, args.weight, c, tap) - zero);
      }
    }
  }

  DepthwiseWeight weight() const {
    return {channels, taps, codes.data(), scale.data(), is_affine ? shift.data() : nullptr};
  }

  std::int64_t channels, taps;
  std::vector<std::int16_t> codes;
  std::vector<float> scale, shift;
  bool is_affine;
  GroupScales scales;
};

// Fills `pixels` for positions [first, first + count) of the sample at `codes`.
void find_pixels(const ConvShape& shape, const std::int8_t* codes, const std::int8_t* zeros,
                 std::int64_t first, std::int64_t count, const std::int8_t** pixels) {
  const Extent size = shape.output();
  Extent at = index_at(first, size);
  for (std::int64_t i = 0; i < count; ++i, advance(at, size)) {
    Extent tap{};
    for (std::int64_t t = 0; t < shape.taps(); ++t, advance(tap, shape.kernel)) {
      const std::int64_t pixel = shape.pixel(at, tap);
      *pixels++ = pixel < 0 ? zeros : codes + pixel * shape.channels;
    }
    if (shape.taps() % 2 != 0) *pixels++ = zeros;
  }
}

}  // namespace

bool has_depthwise(const IntegerConvArgs& args) {
  return args.shape.is_depthwise() && args.layout->groups() == 1 &&
         args.shape.taps() <= kBlockColumns;
}

bool conv_depthwise(Isa isa, const IntegerConvArgs& args, const std::int8_t* codes,
                    const ParallelFor& parallel_for) {
  const ConvShape& shape = args.shape;
  const Taps taps(args);
  const std::vector<std::int8_t> zeros(shape.channels);
  const std::int64_t positions = shape.positions(), reads = (shape.taps() + 1) / 2 * 2;
  const std::int64_t parts = (positions + kPositions - 1) / kPositions;
  std::atomic<bool> all_have_codes = true;
  parallel_for(shape.batch * parts, [&](std::int64_t begin, std::int64_t end) {
    std::vector<const std::int8_t*> pixels(kPositions * reads);
    const bool is_direct = args.order == ChannelOrder::kLast && !args.y_scale;
    for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
      const std::int64_t sample = i / parts, first = i % parts * kPositions;
      const std::int64_t count = std::min(kPositions, positions - first);
      find_pixels(shape, codes + sample * shape.pixels() * shape.channels, zeros.data(), first,
                  count, pixels.data());
      const BlockResults results(args, is_direct ? 0 : count * shape.channels);
      const std::int64_t begins = (sample * positions + first) * shape.channels;
      find_depthwise(isa)({.weight = taps.weight(),
                           .positions = count,
                           .pixels = pixels.data(),
                           .scale = args.scales[sample],
                           .type = args.type,
                           .y = is_direct ? args.y_at(begins) : results.numbers(),
                           .bias = args.bias});
      if (is_direct) continue;
      const std::byte* finished = results.finish(isa, serial_for);
      if (finished == nullptr) {
        all_have_codes = false;
        continue;
      }
      store_rows(args, {.source = finished,
                        .stride = shape.channels,
                        .count = shape.channels,
                        .sample = sample,
                        .position = first,
                        .positions = count});
    }
  });
  return all_have_codes;
}

}  // namespace quantal::kernels
