#include "kernels/max_pool.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/max_pool_loops.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

using Extent = MaxPoolArgs::Extent;

constexpr std::int8_t kLowest = std::numeric_limits<std::int8_t>::min();

std::int64_t elements(const Extent& extent) { return extent[0] * extent[1] * extent[2]; }

// Where a window lies in one dimension, inside of the input.
struct Span {
  Span(const MaxPoolArgs& args, int dim, std::int64_t at)
      : begin(std::max<std::int64_t>(first(args, dim, at), 0)),
        end(std::min(first(args, dim, at) + args.kernel[dim], args.input[dim])) {}

  static std::int64_t first(const MaxPoolArgs& args, int dim, std::int64_t at) {
    return at * args.stride[dim] - args.padding[dim];
  }

  std::int64_t begin, end;
};

// Pixels one after another: the largest of the rows of a window, then of the taps in that row.
void pool_plane(const MaxPoolArgs& args, const MaxPoolKernel& kernel, std::int64_t plane) {
  const std::int64_t width = args.input[2], padding = args.padding[2];
  const std::int64_t reach = (args.output[2] - 1) * args.stride[2] + args.kernel[2];
  std::vector<std::int8_t> line(std::max(reach, padding + width), kLowest);
  const std::int8_t* codes = args.codes + plane * elements(args.input);
  std::int8_t* y = args.y + plane * elements(args.output);
  for (std::int64_t d = 0; d < args.output[0]; ++d) {
    const Span depth(args, 0, d);
    for (std::int64_t h = 0; h < args.output[1]; ++h, y += args.output[2]) {
      const Span height(args, 1, h);
      std::fill_n(line.data() + padding, width, kLowest);
      for (std::int64_t z = depth.begin; z < depth.end; ++z) {
        for (std::int64_t row = height.begin; row < height.end; ++row) {
          kernel.raise(codes + (z * args.input[1] + row) * width, width, line.data() + padding);
        }
      }
      kernel.reduce(line.data(), args.kernel[2], args.stride[2], args.output[2], y);
    }
  }
}

// Channels one after another: the largest of the window's pixels, all channels at once.
void pool_pixel(const MaxPoolArgs& args, const MaxPoolKernel& kernel, std::int64_t index) {
  const std::int64_t positions = elements(args.output);
  const Extent at = index_at(index % positions, args.output);
  const std::int8_t* sample = args.codes + index / positions * elements(args.input) * args.channels;
  std::int8_t* y = args.y + index * args.channels;
  std::fill_n(y, args.channels, kLowest);
  const Span depth(args, 0, at[0]), height(args, 1, at[1]), width(args, 2, at[2]);
  for (std::int64_t z = depth.begin; z < depth.end; ++z) {
    for (std::int64_t row = height.begin; row < height.end; ++row) {
      for (std::int64_t x = width.begin; x < width.end; ++x) {
        const std::int64_t pixel = (z * args.input[1] + row) * args.input[2] + x;
        kernel.raise(sample + pixel * args.channels, args.channels, y);
      }
    }
  }
}

}  // namespace

MaxPoolKernel max_pool__portable() { return {raise_to, reduce_to}; }

MaxPoolKernel find_max_pool(Isa isa) {
  return best_variant<MaxPoolKernel (*)()>(isa, {
#if defined(__x86_64__)
                                                    {Isa::kAvx2, max_pool__avx2},
#endif
                                                    {Isa::kPortable, max_pool__portable}})();
}

void max_pool(Isa isa, const MaxPoolArgs& args, const ParallelFor& parallel_for) {
  const bool is_last = args.order == ChannelOrder::kLast;
  const MaxPoolKernel kernel = find_max_pool(isa);
  parallel_for(args.batch * (is_last ? elements(args.output) : args.channels),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   is_last ? pool_pixel(args, kernel, i) : pool_plane(args, kernel, i);
                 }
               });
}

}  // namespace quantal::kernels
