#include "kernels/tap_conv.h"

#include <algorithm>
#include <atomic>

#include "kernels/scratch.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
// Of copies of the input: in the second-level cache of one thread, or of all together.
constexpr std::int64_t kThreadBytes = 512 << 10;
constexpr std::int64_t kSharedBytes = 2 << 20;
// With so many, threads that get one more than others do not matter.
constexpr std::int64_t kManyStrips = 16;
// Blocks of tokens that divide well among threads, and so few that rows of the weight do better.
constexpr std::int64_t kManyBlocks = 24;
constexpr std::int64_t kFewBlocks = 8;
// Of panels that are all kept at once.
constexpr std::int64_t kMostPanelBytes = 1 << 20;
// A panel of more columns leaves the second-level cache.
constexpr std::int64_t kMostColumns = 1 << 14;

// What goes_by_taps() was measured with: channels and rows of a group, and channels of planes with
// lines that are not long, for which floats take less time.
constexpr std::int64_t kManyGroupProducts = 64;
constexpr std::int64_t kFewChannels = 8;
constexpr std::int64_t kLongLine = 64;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

class TapConv {
 public:
  /// Copies of the input take `bytes` at a time, or as much as one line of the output needs.
  TapConv(Isa isa, const IntegerConvArgs& args, std::int64_t bytes)
      : isa_(isa),
        args_(args),
        kernel_(*find_tap_conv(isa, args.shape, *args.layout)),
        strip_bytes_(bytes / (kernel_.is_wide ? 3 : 1)),
        plan_(args.shape, strip_bytes_, kernel_.unit),
        shape_(plan_.shape()),
        strip_slabs_(std::max<std::int64_t>(1, strip_bytes_ / plan_.slab_bytes())),
        pairs_(ceil_div(shape_.group_rows(), kPairRows)),
        block_tokens_(TapConvKernel::kTokens) {
    const std::int64_t tokens = plan_.tokens(plan_.slab(0));
    const auto blocks = [&] { return plan_.slabs() * ceil_div(tokens, block_tokens_); };
    while (block_tokens_ > TapConvKernel::kFewestTokens && blocks() < kManyBlocks) {
      block_tokens_ -= TapConvKernel::kFewestTokens;
    }
    slab_blocks_ = ceil_div(tokens, block_tokens_);
    keeps_panels_ =
        blocks() >= kFewBlocks && shape_.groups * pairs_ * panel_floats() * 4 <= kMostPanelBytes;
  }

  /// Slabs that are copied together.
  std::int64_t strips() const { return ceil_div(plan_.slabs(), strip_slabs_); }

  /// Of all panels, where they are made once; else each thread makes those that it needs.
  std::int64_t panels_floats() const {
    return keeps_panels_ ? shape_.groups * pairs_ * panel_floats() : 0;
  }
  void fill_panels(float* panels, const ParallelFor& parallel_for) const {
    if (!keeps_panels_) return;
    parallel_for(shape_.groups * pairs_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) decode(rows_of(i), panels + i * panel_floats());
    });
  }

  bool run(std::int64_t index, const float* panels, const ParallelFor& parallel_for) const {
    const std::int64_t first_slab = index * strip_slabs_;
    const std::int64_t slabs = std::min(strip_slabs_, plan_.slabs() - first_slab);
    const std::int64_t size = (slabs * plan_.slab_bytes() + plan_.slack() + 15) / 16 * 16;
    const Scratch copy(size / 4), wide(kernel_.is_wide ? size / 2 : 0);
    auto* codes = reinterpret_cast<std::int8_t*>(copy.data());
    const std::uint8_t flip = kernel_.is_unsigned ? 0x80 : 0;
    const std::int64_t parts = plan_.fill_parts();
    parallel_for(slabs * parts, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        plan_.fill(args_, plan_.slab(first_slab + i / parts), i % parts, flip,
                   codes + i / parts * plan_.slab_bytes());
      }
    });
    if (kernel_.is_wide) {
      auto* to = reinterpret_cast<std::int16_t*>(wide.data());
      parallel_for(size / 16, [&](std::int64_t begin, std::int64_t end) {
        kernel_.widen(codes + begin * 16, (end - begin) * 16, to + begin * 16);
      });
    }
    const Strip strip{
        first_slab, slabs * slab_blocks_,
        reinterpret_cast<const std::byte*>(kernel_.is_wide ? wide.data() : copy.data())};
    return keeps_panels_ ? multiply_blocks(strip, panels, parallel_for)
                         : multiply_pairs(strip, parallel_for);
  }

 private:
  static constexpr std::int64_t kPairRows = TapConvKernel::kTiles * kTileRows;

  struct Strip {
    std::int64_t first_slab;
    std::int64_t blocks;
    const std::byte* x;
  };

  // Of one group, in up to kTiles tiles.
  struct Rows {
    std::int64_t group, first, count;
    int tiles;
    const std::byte* weight;
  };
  Rows rows_of(std::int64_t pair) const {
    const std::int64_t group = pair / pairs_, in_group = pair % pairs_ * kPairRows;
    const std::int64_t first = group * shape_.group_rows() + in_group;
    const std::int64_t count = std::min(kPairRows, shape_.group_rows() - in_group);
    return {group, first, count, static_cast<int>(ceil_div(count, kTileRows)),
            args_.weight + first / kTileRows * args_.layout->tile_bytes()};
  }

  std::int64_t panel_floats() const {
    return TapConvKernel::kTiles *
           (plan_.step_count() * kernel_.step_bytes + TapConvKernel::kHeadBytes) / 4;
  }
  void decode(const Rows& rows, float* panel) const {
    kernel_.decode(plan_, *args_.layout, rows.weight, rows.tiles,
                   reinterpret_cast<std::byte*>(panel));
  }

  // A thread has some tokens, and all rows of the weight.
  bool multiply_blocks(const Strip& strip, const float* panels,
                       const ParallelFor& parallel_for) const {
    std::atomic<bool> all_have_codes = true;
    parallel_for(strip.blocks, [&](std::int64_t begin, std::int64_t end) {
      const Results results(*this);
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t pair = 0; pair < shape_.groups * pairs_ && all_have_codes; ++pair) {
          if (!run_block(strip, i, rows_of(pair), panels + pair * panel_floats(), results)) {
            all_have_codes = false;
          }
        }
      }
    });
    return all_have_codes;
  }

  // A thread has some rows, and all tokens.
  bool multiply_pairs(const Strip& strip, const ParallelFor& parallel_for) const {
    std::atomic<bool> all_have_codes = true;
    const std::int64_t blocks = strip.blocks;
    parallel_for(shape_.groups * pairs_ * blocks, [&](std::int64_t begin, std::int64_t end) {
      const Scratch panel(panel_floats());
      const Results results(*this);
      for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
        const Rows rows = rows_of(i / blocks);
        if (i == begin || i % blocks == 0) decode(rows, panel.data());
        if (!run_block(strip, i % blocks, rows, panel.data(), results)) all_have_codes = false;
      }
    });
    return all_have_codes;
  }

  // Of a block, where they do not go to y at once.
  struct Results {
    explicit Results(const TapConv& conv)
        : numbers(conv.block_tokens_ * kPairRows),
          codes(conv.args_.y_scale ? conv.block_tokens_ * kPairRows / 4 : 0) {}
    Scratch numbers, codes;
  };

  bool run_block(const Strip& strip, std::int64_t index, const Rows& rows, const float* panel,
                 const Results& results) const {
    const std::int64_t slab_index = index / slab_blocks_;
    const TapPlan::Slab slab = plan_.slab(strip.first_slab + slab_index);
    const std::int64_t first = index % slab_blocks_ * block_tokens_;
    const std::int64_t count = std::min(block_tokens_, plan_.tokens(slab) - first);
    if (count <= 0) return true;
    const std::int64_t before = plan_.positions(first);
    const std::int64_t positions = plan_.positions(first + count) - before;
    const std::int64_t position = plan_.first_position(slab) + before;
    const std::int64_t code = slab_index * plan_.slab_bytes() + first * plan_.token_bytes() +
                              rows.group * shape_.group_channels();
    TapBlock call{.plan = plan_,
                  .x = strip.x + code * (kernel_.is_wide ? 2 : 1),
                  .first = first,
                  .count = count,
                  .panel = reinterpret_cast<const std::byte*>(panel),
                  .weight = rows.weight,
                  .layout = *args_.layout,
                  .tiles = rows.tiles,
                  .rows = rows.count,
                  .x_scale = args_.scales[slab.sample],
                  .type = args_.type};
    if (args_.bias != nullptr) {
      call.bias = static_cast<const std::byte*>(args_.bias) + rows.first * size_of(args_.type);
    }
    if (args_.order == ChannelOrder::kLast && !args_.y_scale) {
      const std::int64_t token = slab.sample * plan_.positions() + position;
      call.y = args_.y_at(token * shape_.rows + rows.first);
      call.y_stride = shape_.rows;
      kernel_.multiply(call);
      return true;
    }
    call.y = results.numbers.data();
    call.y_stride = rows.count;
    kernel_.multiply(call);
    const void* source = call.y;
    if (args_.y_scale) {
      auto* codes = reinterpret_cast<std::int8_t*>(results.codes.data());
      source = codes;
      if (!quantize_codes(isa_, call.y, args_.type, positions * rows.count, *args_.y_scale,
                          codes)) {
        return false;
      }
    }
    store_rows(isa_, args_,
               {.source = static_cast<const std::byte*>(source),
                .stride = rows.count,
                .count = rows.count,
                .sample = slab.sample,
                .row = rows.first,
                .position = position,
                .positions = positions});
    return true;
  }

  Isa isa_;
  const IntegerConvArgs& args_;
  const TapConvKernel& kernel_;
  std::int64_t strip_bytes_;
  TapPlan plan_;
  const ConvShape& shape_;
  std::int64_t strip_slabs_;
  std::int64_t pairs_;         ///< of tiles, in a group
  std::int64_t block_tokens_;  ///< at most
  std::int64_t slab_blocks_;
  bool keeps_panels_;
};

bool run_strips(const TapConv& conv, const ParallelFor& parallel_for, const ParallelFor& outer,
                const ParallelFor& inner) {
  const Scratch panels(conv.panels_floats());
  conv.fill_panels(panels.data(), parallel_for);
  std::atomic<bool> all_have_codes = true;
  outer(conv.strips(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
      if (!conv.run(i, panels.data(), inner)) all_have_codes = false;
    }
  });
  return all_have_codes;
}

}  // namespace

const TapConvKernel* find_tap_conv(Isa isa, const ConvShape& shape, const PackedLayout& layout) {
  const std::int64_t columns = shape.columns() * groups_together(shape);
  if (layout.spec().qtype != QTypeId::kInt8 || layout.groups() != 1 || columns == 0 ||
      columns > kMostColumns) {
    return nullptr;
  }
  return best_variant<const TapConvKernel*>(isa, {
#if defined(__x86_64__)
                                                     {Isa::kAmx, &tap_conv__amx},
                                                     {Isa::kAvx512Vnni, &tap_conv__avx512_vnni},
                                                     {Isa::kAvxVnni, &tap_conv__avx_vnni},
                                                     {Isa::kAvx2, &tap_conv__avx2},
#elif defined(__aarch64__)
                                                     {Isa::kNeonDotprod, &tap_conv__neon_dotprod},
#endif
                                                     {Isa::kPortable, nullptr}});
}

bool goes_by_taps(Isa isa, const ConvShape& shape, const PackedLayout& layout, ChannelOrder order) {
  const TapConvKernel* kernel = find_tap_conv(isa, shape, layout);
  if (kernel == nullptr || shape.is_depthwise()) return false;
  const bool is_planes = order == ChannelOrder::kPlanes;
  // In floats, what is not multiplied by zeros takes less time.
  if (groups_together(shape) > 1) {
    return !kernel->is_wide && (!is_planes || shape.columns() / shape.taps() * shape.group_rows() >=
                                                  kManyGroupProducts);
  }
  const bool has_short_lines = kernel->is_wide || shape.input[2] < kLongLine;
  if (is_planes && shape.channels < kFewChannels && has_short_lines) return false;
  const ConvShape::Extent size = shape.output();
  const std::int64_t positions = shape.batch * shape.positions();
  const std::int64_t pixels = kernel->costs.pixels;
  if (!is_planes && shape.is_pointwise() && pixels > 0) return positions >= pixels;
  const std::int64_t line =
      ceil_div((shape.kernel[2] - 1) * shape.dilation[2] + 1, shape.stride[2]);
  const auto rows = static_cast<float>(ceil_div(shape.group_rows(), kTileRows) * kTileRows);
  const auto tokens =
      static_cast<float>(positions / size[2] * (size[2] + line - 1)) + kernel->costs.panel_tokens;
  return kernel->costs.speed * static_cast<float>(positions) * (rows + kernel->costs.patch_rows) >
         rows * tokens;
}

bool conv_by_taps(Isa isa, const IntegerConvArgs& args, const ParallelFor& parallel_for) {
  const TapConv own(isa, args, kThreadBytes);
  if (own.strips() >= kManyStrips) return run_strips(own, parallel_for, parallel_for, serial_for);
  const TapConv shared(isa, args, kSharedBytes);
  return run_strips(shared, parallel_for, serial_for, parallel_for);
}

}  // namespace quantal::kernels
