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
// A panel of more columns leaves the second-level cache.
constexpr std::int64_t kMostColumns = 1 << 14;
// Taking the weight apart takes as long as multiplying it by so many tokens.
constexpr std::int64_t kFewTokens = 48;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

class TapConv {
 public:
  TapConv(Isa isa, const IntegerConvArgs& args, std::int64_t slab_bytes)
      : isa_(isa),
        args_(args),
        shape_(args.shape),
        kernel_(*find_tap_conv(isa, args.shape, *args.layout)),
        plan_(args.shape, slab_bytes, kernel_.unit),
        pairs_(ceil_div(shape_.group_rows(), kPairRows)),
        slab_blocks_(ceil_div(plan_.tokens(plan_.slab(0)), TapConvKernel::kTokens)) {}

  std::int64_t slabs() const { return plan_.slabs(); }
  std::int64_t slabs_in(std::int64_t bytes) const {
    return std::max<std::int64_t>(1, bytes / plan_.slab_bytes());
  }

  bool run(std::int64_t first_slab, std::int64_t slabs, const ParallelFor& parallel_for) const {
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
    const auto* x = reinterpret_cast<const std::byte*>(kernel_.is_wide ? wide.data() : copy.data());
    return multiply(first_slab, slabs, x, parallel_for);
  }

 private:
  bool multiply(std::int64_t first_slab, std::int64_t slabs, const std::byte* x,
                const ParallelFor& parallel_for) const {
    std::atomic<bool> all_have_codes = true;
    const std::int64_t blocks = slabs * slab_blocks_;
    parallel_for(shape_.groups * pairs_ * blocks, [&](std::int64_t begin, std::int64_t end) {
      const Scratch panel((plan_.step_count() * kernel_.step_bytes + TapConvKernel::kHeadBytes) *
                          TapConvKernel::kTiles / 4);
      const Scratch results(TapConvKernel::kTokens * kPairRows);
      const Scratch result_codes(args_.y_scale ? TapConvKernel::kTokens * kPairRows / 4 : 0);
      const Work work{reinterpret_cast<std::byte*>(panel.data()), results.data(),
                      reinterpret_cast<std::int8_t*>(result_codes.data())};
      for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
        const Rows rows = rows_of(i / blocks);
        if (i == begin || i % blocks == 0) {
          kernel_.decode(plan_, *args_.layout, rows.weight, rows.tiles, work.panel);
        }
        const std::int64_t slab = i % blocks / slab_blocks_;
        if (!run_block(first_slab + slab, i % slab_blocks_, rows,
                       x + slab * plan_.slab_bytes() * code_bytes(), work)) {
          all_have_codes = false;
        }
      }
    });
    return all_have_codes;
  }

  static constexpr std::int64_t kPairRows = TapConvKernel::kTiles * kTileRows;

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

  std::int64_t code_bytes() const { return kernel_.is_wide ? 2 : 1; }

  struct Work {
    std::byte* panel;
    float* results;
    std::int8_t* codes;
  };
  bool run_block(std::int64_t slab_index, std::int64_t block, const Rows& rows,
                 const std::byte* x, const Work& work) const {
    const TapPlan::Slab slab = plan_.slab(slab_index);
    const std::int64_t first = block * TapConvKernel::kTokens;
    const std::int64_t count =
        std::min<std::int64_t>(TapConvKernel::kTokens, plan_.tokens(slab) - first);
    if (count <= 0) return true;
    const std::int64_t before = plan_.positions(first);
    const std::int64_t positions = plan_.positions(first + count) - before;
    const std::int64_t position =
        (slab.depth * shape_.output()[1] + slab.line) * shape_.output()[2] + before;
    TapBlock call{
        .plan = plan_,
        .x = x + (first * plan_.token_bytes() + rows.group * shape_.group_channels()) *
                     code_bytes(),
        .first = first,
        .count = count,
        .panel = work.panel,
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
      const std::int64_t token = slab.sample * shape_.positions() + position;
      call.y = args_.y_at(token * shape_.rows + rows.first);
      call.y_stride = shape_.rows;
      kernel_.multiply(call);
      return true;
    }
    call.y = work.results;
    call.y_stride = rows.count;
    kernel_.multiply(call);
    const void* results = work.results;
    if (args_.y_scale) {
      results = work.codes;
      if (!quantize_codes(isa_, work.results, args_.type, positions * rows.count, *args_.y_scale,
                          work.codes)) {
        return false;
      }
    }
    store_rows(args_, {.source = static_cast<const std::byte*>(results),
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
  const ConvShape& shape_;
  const TapConvKernel& kernel_;
  TapPlan plan_;
  std::int64_t pairs_;        ///< of tiles, in a group
  std::int64_t slab_blocks_;  ///< of tokens
};

bool run_strips(const TapConv& conv, std::int64_t slabs, const ParallelFor& outer,
                const ParallelFor& inner) {
  const std::int64_t strips = ceil_div(conv.slabs(), slabs);
  std::atomic<bool> all_have_codes = true;
  outer(strips, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
      const std::int64_t first = i * slabs;
      if (!conv.run(first, std::min(slabs, conv.slabs() - first), inner)) all_have_codes = false;
    }
  });
  return all_have_codes;
}

}  // namespace

const TapConvKernel* find_tap_conv(Isa isa, const ConvShape& shape, const PackedLayout& layout) {
  const bool cuts_tiles = shape.groups > 1 && shape.group_rows() % kTileRows != 0;
  if (layout.spec().qtype != QTypeId::kInt8 || layout.groups() != 1 || cuts_tiles ||
      shape.columns() > kMostColumns) {
    return nullptr;
  }
  return best_variant<const TapConvKernel*>(isa, {
#if defined(__x86_64__)
                                                     {Isa::kAmx, &tap_conv__amx},
                                                     {Isa::kAvx512Vnni, &tap_conv__avx512_vnni},
                                                     {Isa::kAvxVnni, &tap_conv__avx_vnni},
                                                     {Isa::kAvx2, &tap_conv__avx2},
#endif
                                                     {Isa::kPortable, nullptr}});
}

bool goes_by_taps(Isa isa, const ConvShape& shape, const PackedLayout& layout) {
  return shape.taps() > 1 && shape.group_channels() >= 16 &&
         shape.batch * shape.positions() >= kFewTokens &&
         find_tap_conv(isa, shape, layout) != nullptr;
}

bool conv_by_taps(Isa isa, const IntegerConvArgs& args, const ParallelFor& parallel_for) {
  const TapConv own(isa, args, kThreadBytes);
  const std::int64_t slabs = own.slabs_in(kThreadBytes);
  if (own.slabs() / slabs >= kManyStrips) return run_strips(own, slabs, parallel_for, serial_for);
  const TapConv shared(isa, args, kSharedBytes);
  return run_strips(shared, shared.slabs_in(kSharedBytes), serial_for, parallel_for);
}

}  // namespace quantal::kernels
