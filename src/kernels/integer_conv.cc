#include "kernels/integer_conv.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/integer_linear.h"
#include "kernels/scratch.h"
#include "kernels/tap_conv.h"
#include "kernels/transpose.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kTokens = 8;  // that kernels compute at a time
// Memory for the tokens of a block: in the second-level cache of one thread, or of all together.
constexpr std::int64_t kThreadBytes = 256 << 10;
constexpr std::int64_t kSharedBytes = 2 << 20;
// With so many blocks, threads that get one more than others do not matter.
constexpr std::int64_t kManyBlocks = 16;
// Pixels that one thread transposes at a time.
constexpr std::int64_t kTransposed = 1024;

// Scratch is counted in numbers of four bytes.
std::int64_t quarter(std::int64_t bytes) { return (bytes + 3) / 4; }

// Codes of all samples in the other order.
void reorder(const IntegerConvArgs& args, std::int8_t* to, const ParallelFor& parallel_for) {
  const std::int64_t pixels = args.shape.pixels(), channels = args.shape.channels;
  const std::int64_t parts = (pixels + kTransposed - 1) / kTransposed;
  parallel_for(args.shape.batch * parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t sample = i / parts * pixels * channels, first = i % parts * kTransposed;
      const std::int64_t count = std::min(kTransposed, pixels - first);
      const std::int8_t* from = args.codes + sample;
      if (args.order == ChannelOrder::kPlanes) {
        transpose(from + first, pixels, channels, count, to + sample + first * channels, channels);
      } else {
        transpose(from + first * channels, channels, count, channels, to + sample + first, pixels);
      }
    }
  });
}

bool orders_agree(const ConvShape& shape) { return shape.channels == 1 || shape.pixels() == 1; }

// The rows of a group lie in tiles that may hold rows of its neighbours: those are computed, too.
struct GroupTiles {
  GroupTiles(const IntegerConvArgs& args, std::int64_t group)
      : row(group * args.shape.group_rows()),
        skipped(row % kTileRows),
        layout(spec_of(args, skipped)),
        weight(args.weight + row / kTileRows * args.layout->tile_bytes()) {}

  static WeightSpec spec_of(const IntegerConvArgs& args, std::int64_t skipped) {
    WeightSpec spec = args.layout->spec();
    spec.rows = skipped + args.shape.group_rows();
    return spec;
  }
  std::int64_t rows() const { return layout.spec().rows; }

  std::int64_t row;
  std::int64_t skipped;
  PackedLayout layout;
  const std::byte* weight;
};

// Positions of a sample and group that are computed together.
struct Block {
  std::int64_t sample = 0;
  std::int64_t group = 0;
  std::int64_t position = 0;
  std::int64_t count = 0;
};

bool run_block(Isa isa, const IntegerConvArgs& args, const std::int8_t* codes, const Block& block,
               const ParallelFor& parallel_for) {
  const ConvShape& shape = args.shape;
  const GroupTiles group(args, block.group);
  const std::int64_t step = patch_order(shape) == ChannelOrder::kLast ? 1 : shape.pixels();
  const CodePatches patches{.shape = &shape,
                            .input = codes + block.sample * shape.channels * shape.pixels() +
                                     block.group * shape.group_channels() * step,
                            .first = block.position};
  IntegerLinearArgs linear{
      .layout = &group.layout,
      .weight = group.weight,
      .source = {.tokens = block.count, .scale = args.scales[block.sample], .patches = &patches},
      .type = args.type};
  if (args.bias != nullptr) {
    linear.bias =
        static_cast<const std::byte*>(args.bias) + (group.row - group.skipped) * size_of(args.type);
  }
  const bool is_direct = group.skipped == 0 && !args.y_scale &&
                         (args.order == ChannelOrder::kLast || shape.positions() == 1);
  if (is_direct) {
    const std::int64_t token = block.sample * shape.positions() + block.position;
    linear.y = args.y_at(token * shape.rows + group.row);
    linear.y_stride = shape.rows;
    find_integer_linear(isa, group.layout.spec())(linear, parallel_for);
    return true;
  }
  const Scratch results(quarter(block.count * group.rows() * args.y_element_size()));
  if (args.y_scale) {
    auto* to = reinterpret_cast<std::int8_t*>(results.data());
    if (!integer_linear_codes(isa, linear, *args.y_scale, to, parallel_for)) return false;
  } else {
    linear.y = results.data();
    linear.y_stride = group.rows();
    find_integer_linear(isa, group.layout.spec())(linear, parallel_for);
  }
  parallel_for((shape.group_rows() + kTileRows - 1) / kTileRows,
               [&](std::int64_t begin, std::int64_t end) {
                 const std::int64_t first = begin * kTileRows;
                 const std::int64_t last = std::min(end * kTileRows, shape.group_rows());
                 store_rows(isa, args,
                            {.source = reinterpret_cast<const std::byte*>(results.data()),
                             .stride = group.rows(),
                             .first = group.skipped + first,
                             .count = last - first,
                             .sample = block.sample,
                             .row = group.row + first,
                             .position = block.position,
                             .positions = block.count});
               });
  return true;
}

// Through the integer linear, for every convolution; codes in patch_order().
bool conv_by_patches(Isa isa, const IntegerConvArgs& args, const std::int8_t* codes,
                     const ParallelFor& parallel_for) {
  const ConvShape& shape = args.shape;
  const std::int64_t positions = shape.positions();
  // Codes as bytes and as 16-bit numbers, and the results.
  const std::int64_t token_bytes =
      3 * (args.layout->padded_columns() + 128) + (shape.group_rows() + kTileRows) * 4;
  const auto tokens_in = [&](std::int64_t bytes) {
    return std::max(kTokens, bytes / token_bytes / kTokens * kTokens);
  };
  std::atomic<bool> all_have_codes = true;
  const auto for_blocks = [&](std::int64_t tokens, const ParallelFor& outer,
                              const ParallelFor& inner) {
    const std::int64_t parts = (positions + tokens - 1) / tokens;
    outer(shape.batch * shape.groups * parts, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
        const std::int64_t first = i % parts * tokens, outer_index = i / parts;
        const Block block{outer_index / shape.groups, outer_index % shape.groups, first,
                          std::min(tokens, positions - first)};
        if (!run_block(isa, args, codes, block, inner)) all_have_codes = false;
      }
    });
    return all_have_codes.load();
  };
  const std::int64_t own = tokens_in(kThreadBytes);
  const std::int64_t blocks = shape.batch * shape.groups * ((positions + own - 1) / own);
  // Few blocks do not divide well among threads, which then divide the rows of the weight.
  if (blocks >= kManyBlocks) return for_blocks(own, parallel_for, serial_for);
  return for_blocks(tokens_in(kSharedBytes), serial_for, parallel_for);
}

}  // namespace

void store_rows(Isa isa, const IntegerConvArgs& args, const RowBlock& block) {
  const ConvShape& shape = args.shape;
  const std::int64_t size = args.y_element_size();
  const std::byte* from = block.source + block.first * size;
  if (args.order == ChannelOrder::kLast) {
    for (std::int64_t i = 0; i < block.positions; ++i) {
      const std::int64_t to =
          (block.sample * shape.positions() + block.position + i) * shape.rows + block.row;
      std::memcpy(args.y_at(to), from + i * block.stride * size, block.count * size);
    }
    return;
  }
  void* to =
      args.y_at((block.sample * shape.rows + block.row) * shape.positions() + block.position);
  const auto transpose_elements = [&]<typename Element>(Element) {
    transpose(reinterpret_cast<const Element*>(from), block.stride, block.positions, block.count,
              static_cast<Element*>(to), shape.positions());
  };
  switch (size) {
    case 1:
      return transpose_elements(std::int8_t{});
    case 2:
      return transpose_elements(std::uint16_t{});
    default:
      return transpose_floats(isa, reinterpret_cast<const float*>(from), block.stride,
                              block.positions, block.count, static_cast<float*>(to),
                              shape.positions());
  }
}

bool integer_conv(Isa isa, const IntegerConvArgs& args, const ParallelFor& parallel_for) {
  if (args.shape.batch * args.shape.positions() * args.shape.rows == 0) return true;
  if (goes_by_taps(isa, args.shape, *args.layout, args.order)) {
    return conv_by_taps(isa, args, parallel_for);
  }
  if (goes_without_patches(isa, args.shape, *args.layout, args.order)) {
    return conv_without_patches(isa, args, parallel_for);
  }
  const bool reorders = patch_order(args.shape) != args.order && !orders_agree(args.shape);
  const std::int64_t size = args.shape.batch * args.shape.channels * args.shape.pixels();
  const Scratch reordered(reorders ? quarter(size) : 0);
  auto* codes = reinterpret_cast<std::int8_t*>(reordered.data());
  if (reorders) reorder(args, codes, parallel_for);
  return conv_by_patches(isa, args, reorders ? codes : args.codes, parallel_for);
}

}  // namespace quantal::kernels
