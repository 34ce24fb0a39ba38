#include "kernels/canonical_linear.h"

#include <algorithm>
#include <atomic>

#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

// A few tokens are prepared again for every block, which stays in the second-level cache of its
// thread. For many that would take longer than the cache saves: the threads share a block.
constexpr std::int64_t kFewTokens = 8;
constexpr std::int64_t kThreadBlock = 128 << 10;
constexpr std::int64_t kSharedBlock = 2 << 20;  ///< a thread's part
// So little is packed sooner than another thread begins.
constexpr std::int64_t kSerialBytes = 32 << 10;

std::int64_t tiles_in(const PackedLayout& layout, std::int64_t bytes) {
  return std::max<std::int64_t>(1, bytes / std::max<std::int64_t>(1, layout.tile_bytes()));
}

// Threads that take part, `most` at most.
std::int64_t threads_of(const ParallelFor& parallel_for, std::int64_t most) {
  std::atomic<std::int64_t> parts = 0;
  parallel_for(most, [&](std::int64_t, std::int64_t) { ++parts; });
  return parts;
}

void* advanced(void* data, std::int64_t index, FloatType type) {
  return static_cast<std::byte*>(data) + index * size_of(type);
}
const void* advanced(const void* data, std::int64_t index, FloatType type) {
  return data == nullptr ? nullptr : static_cast<const std::byte*>(data) + index * size_of(type);
}

// Where rows from `row` on begin.
template <typename Args>
void advance_rows(Args& args, std::int64_t row) {
  args.y = advanced(args.y, row, args.type);
  args.bias = advanced(args.bias, row, args.type);
}
void advance_rows(FloatConvArgs& args, std::int64_t row) {
  args.first_row += row;
  args.y = advanced(args.y, row * args.y_row_stride(), args.type);
  args.bias = advanced(args.bias, row, args.type);
}

/// Runs a kernel on block after block of packed rows.
template <typename Args, typename Kernel>
class Blocks {
 public:
  Blocks(Isa isa, const Args& args, Kernel kernel, const CanonicalWeight& weight)
      : isa_(isa), args_(args), layout_(*args.layout), kernel_(kernel), weight_(weight) {}

  void each_thread_its_own(const ParallelFor& parallel_for) const {
    const std::int64_t step = tiles_in(layout_, kThreadBlock);
    parallel_for(layout_.tiles(), [&](std::int64_t begin, std::int64_t end) {
      const Scratch packed = room(std::min(step, end - begin));
      for (std::int64_t tile = begin; tile < end; tile += step) {
        run(tile, std::min(end, tile + step), packed, serial_for);
      }
    });
  }

  void shared(const ParallelFor& parallel_for) const {
    const std::int64_t tiles = layout_.tiles();
    std::int64_t step = tiles_in(layout_, kSharedBlock);
    if (step < tiles) step *= threads_of(parallel_for, tiles);
    const Scratch packed = room(std::min(step, tiles));
    for (std::int64_t tile = 0; tile < tiles; tile += step) {
      run(tile, std::min(tiles, tile + step), packed, parallel_for);
    }
  }

 private:
  Scratch room(std::int64_t tiles) const { return Scratch(tiles * layout_.tile_bytes() / 4); }

  // Packs tiles [begin, end) and multiplies them.
  void run(std::int64_t begin, std::int64_t end, const Scratch& packed,
           const ParallelFor& parallel_for) const {
    auto* bytes = reinterpret_cast<std::byte*>(packed.data());
    const bool is_small = (end - begin) * layout_.tile_bytes() < kSerialBytes;
    const ParallelFor packing = is_small ? serial_for : parallel_for;
    packing(end - begin, [&](std::int64_t first, std::int64_t last) {
      pack_tiles(isa_, layout_, weight_, begin + first, begin + last,
                 bytes + first * layout_.tile_bytes());
    });
    const std::int64_t row = begin * PackedLayout::kTileRows;
    WeightSpec spec = layout_.spec();
    spec.rows = std::min(spec.rows, end * PackedLayout::kTileRows) - row;
    const PackedLayout part(spec);
    Args block = args_;
    block.layout = &part;
    block.weight = bytes;
    advance_rows(block, row);
    kernel_(block, parallel_for);
  }

  Isa isa_;
  const Args& args_;
  const PackedLayout& layout_;
  Kernel kernel_;
  const CanonicalWeight& weight_;
};

template <typename Args, typename Kernel>
void in_blocks(Isa isa, const Args& args, std::int64_t tokens, Kernel kernel,
               const CanonicalWeight& weight, const ParallelFor& parallel_for) {
  const Blocks<Args, Kernel> blocks(isa, args, kernel, weight);
  if (tokens <= kFewTokens) {
    blocks.each_thread_its_own(parallel_for);
  } else {
    blocks.shared(parallel_for);
  }
}

#if defined(__x86_64__)
// Whether rows lie one after the other in whole bytes, in groups of whole lines without padding.
bool lies_plain(const PackedLayout& layout) {
  const WeightSpec& spec = layout.spec();
  const std::int64_t sections = layout.depth() / 4;
  return spec.rows % sections == 0 && layout.group_columns(0) * layout.groups() == spec.columns &&
         (spec.group_size == 0 || spec.group_size == layout.group_columns(0)) &&
         layout.group_columns(0) % std::max<std::int64_t>(8, layout.depth()) == 0;
}

void run_few(Isa isa, const LinearArgs& args, const CanonicalWeight& weight,
             const ParallelFor& parallel_for) {
  using Few = void (*)(const LinearArgs&, const CanonicalWeight&, const ParallelFor&);
  best_variant<Few>(isa, {{Isa::kAvx512Vbmi, few_from_canonical__avx512_vbmi},
                          {Isa::kAvx512, few_from_canonical__avx512},
                          {Isa::kAvx2, few_from_canonical__avx2}})(args, weight, parallel_for);
}

void run_few(Isa, const IntegerLinearArgs& args, const CanonicalWeight& weight,
             const ParallelFor& parallel_for) {
  few_from_canonical__avx2(args, weight, parallel_for);
}

// From so many tokens on AMX's kernel takes less time.
std::int64_t tile_tokens(const LinearArgs&) { return kFewCanonicalTokens + 1; }
std::int64_t tile_tokens(const IntegerLinearArgs&) { return 2; }
#endif

// Runs a kernel that reads rows where they lie, where there is one.
template <typename Args>
bool runs_in_place(Isa isa, const Args& args, std::int64_t tokens, const CanonicalWeight& weight,
                   const ParallelFor& parallel_for) {
#if defined(__x86_64__)
  if (isa == Isa::kPortable || tokens == 0 || !lies_plain(*args.layout)) return false;
  if (isa == Isa::kAmx && tokens >= tile_tokens(args) &&
      linear_from_canonical__amx(args, weight, parallel_for)) {
    return true;
  }
  if (tokens <= kFewCanonicalTokens) {
    run_few(isa, args, weight, parallel_for);
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
  if (runs_in_place(isa, args, args.tokens, weight, parallel_for)) return;
  in_blocks(isa, args, args.tokens, find_linear(isa, args.layout->spec()), weight, parallel_for);
}

void integer_linear_from_canonical(Isa isa, const IntegerLinearArgs& args,
                                   const CanonicalWeight& weight, const ParallelFor& parallel_for) {
  if (runs_in_place(isa, args, args.source.tokens, weight, parallel_for)) return;
  in_blocks(isa, args, args.source.tokens, find_integer_linear(isa, args.layout->spec()), weight,
            parallel_for);
}

void float_conv_from_canonical(Isa isa, const FloatConvArgs& args, const CanonicalWeight& weight,
                               const ParallelFor& parallel_for) {
  const FloatConvKernel& kernel = *find_float_conv(isa);
  const ConvInput input(args, kernel.convert, parallel_for);
  const auto run = [&](const FloatConvArgs& block, const ParallelFor& threads) {
    kernel.run(block, input, threads);
  };
  in_blocks(isa, args, input.count(), run, weight, parallel_for);
}

}  // namespace quantal::kernels
