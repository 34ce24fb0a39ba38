#include "kernels/canonical_linear.h"

#include <algorithm>

namespace quantal::kernels {
namespace {

// A block stays in the second-level cache until it is multiplied. Preparing the tokens is repeated
// for every block: for many of them it has more rows, since then the arithmetic takes the time.
constexpr std::int64_t kFewTokens = 8;
constexpr std::int64_t kSmallBlock = 128 << 10;
constexpr std::int64_t kLargeBlock = 1 << 20;

std::int64_t tiles_per_block(const PackedLayout& layout, std::int64_t tokens) {
  const std::int64_t bytes = tokens <= kFewTokens ? kSmallBlock : kLargeBlock;
  return std::max<std::int64_t>(1, bytes / std::max<std::int64_t>(1, layout.tile_bytes()));
}

void* advanced(void* data, std::int64_t index, FloatType type) {
  return static_cast<std::byte*>(data) + index * size_of(type);
}
const void* advanced(const void* data, std::int64_t index, FloatType type) {
  return data == nullptr ? nullptr : static_cast<const std::byte*>(data) + index * size_of(type);
}

// Runs `kernel` on block after block of packed rows.
template <typename Args, typename Kernel>
void in_blocks(Isa isa, const Args& args, std::int64_t tokens, Kernel kernel,
               const CanonicalWeight& weight, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const std::int64_t step = tiles_per_block(layout, tokens);
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    const Scratch packed(std::min(step, end - begin) * layout.tile_bytes() / 4);
    auto* bytes = reinterpret_cast<std::byte*>(packed.data());
    for (std::int64_t tile = begin; tile < end; tile += step) {
      const std::int64_t stop = std::min(end, tile + step);
      pack_tiles(isa, layout, weight, tile, stop, bytes);
      const std::int64_t row = tile * PackedLayout::kTileRows;
      WeightSpec spec = layout.spec();
      spec.rows = std::min(spec.rows, stop * PackedLayout::kTileRows) - row;
      const PackedLayout part(spec);
      Args block = args;
      block.layout = &part;
      block.weight = bytes;
      block.y = advanced(args.y, row, args.type);
      block.bias = advanced(args.bias, row, args.type);
      kernel(block, serial_for);
    }
  });
}

// Whether rows lie one after the other in whole bytes, in groups of whole lines without padding.
bool lies_plain(const PackedLayout& layout) {
  const WeightSpec& spec = layout.spec();
  const std::int64_t sections = layout.depth() / 4;
  return spec.rows % sections == 0 && layout.group_columns(0) * layout.groups() == spec.columns &&
         (spec.group_size == 0 || spec.group_size == layout.group_columns(0)) &&
         layout.group_columns(0) % std::max<std::int64_t>(8, layout.depth()) == 0;
}

// Runs the kernel for a few tokens, where there is one for them.
template <typename Args>
bool runs_few(Isa isa, const Args& args, std::int64_t tokens, const CanonicalWeight& weight,
              const ParallelFor& parallel_for) {
#if defined(__x86_64__)
  if (isa != Isa::kPortable && tokens > 0 && tokens <= kFewCanonicalTokens &&
      lies_plain(*args.layout)) {
    few_from_canonical__avx2(args, weight, parallel_for);
    return true;
  }
#endif
  static_cast<void>(isa), static_cast<void>(args), static_cast<void>(tokens);
  static_cast<void>(weight), static_cast<void>(parallel_for);
  return false;
}

}  // namespace

void linear_from_canonical(Isa isa, const LinearArgs& args, const CanonicalWeight& weight,
                           const ParallelFor& parallel_for) {
  if (runs_few(isa, args, args.tokens, weight, parallel_for)) return;
  in_blocks(isa, args, args.tokens, find_linear(isa, args.layout->spec()), weight, parallel_for);
}

void integer_linear_from_canonical(Isa isa, const IntegerLinearArgs& args,
                                   const CanonicalWeight& weight, const ParallelFor& parallel_for) {
  if (runs_few(isa, args, args.source.tokens, weight, parallel_for)) return;
  in_blocks(isa, args, args.source.tokens, find_integer_linear(isa, args.layout->spec()), weight,
            parallel_for);
}

}  // namespace quantal::kernels
