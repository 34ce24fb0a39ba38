#include "kernels/grouped_conv.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "kernels/activation_codes.h"
#include "kernels/scratch.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kVector = GroupedConvPlan::kVector;

// (taps, channels) from (channels, taps), in which `row` is; its numbers go `stride` apart.
void reorder_row(const ConvShape& shape, const float* row, float* to, std::int64_t stride) {
  for (std::int64_t c = 0; c < shape.group_channels(); ++c) {
    for (std::int64_t tap = 0; tap < shape.taps(); ++tap) {
      to[(tap * shape.group_channels() + c) * stride] = *row++;
    }
  }
}

// What belongs to each row, in fp32 and as kernels read it.
class RowNumbers {
 public:
  RowNumbers(const GroupedConvArgs& args, GroupedLanes lanes)
      : rows_((args.shape.rows + kVector - 1) / kVector * kVector),
        weight_(rows_ * args.shape.columns()),
        scale_(rows_),
        shift_(rows_),
        bias_(rows_),
        is_affine_(args.scales != nullptr && args.scales->shift != nullptr) {
    const std::int64_t rows = args.shape.rows;
    fill_weight(args, lanes == GroupedLanes::kPositions ? 1 : kVector);
    std::fill_n(scale_.data(), rows_, 1.0F);
    std::fill_n(shift_.data(), rows_, 0.0F);
    std::fill_n(bias_.data(), rows_, 0.0F);
    if (args.scales != nullptr) std::copy_n(args.scales->scale, rows, scale_.data());
    if (is_affine_) std::copy_n(args.scales->shift, rows, shift_.data());
    for (std::int64_t r = 0; args.bias != nullptr && r < rows; ++r) {
      bias_.data()[r] = load_float(args.bias, r, args.type);
    }
  }

  const float* weight() const { return weight_.data(); }
  const float* scale() const { return scale_.data(); }
  const float* shift() const { return is_affine_ ? shift_.data() : nullptr; }
  const float* bias() const { return bias_.data(); }

 private:
  void fill_weight(const GroupedConvArgs& args, std::int64_t together) {
    const std::int64_t columns = args.shape.columns();
    if (together > 1) std::fill_n(weight_.data(), rows_ * columns, 0.0F);
    for (std::int64_t r = 0; r < args.shape.rows; ++r) {
      const std::int64_t first = r / together * together;
      reorder_row(args.shape, args.weight + r * columns,
                  weight_.data() + first * columns + r - first, together);
    }
  }

  std::int64_t rows_;
  Scratch weight_, scale_, shift_, bias_;
  bool is_affine_;
};

// Where results go: row r of a block at its position p has index begin + r row_step + p
// position_step.
struct Target {
  std::int64_t begin, row_step, position_step;
};

Target target_of(const GroupedConvArgs& args, const GroupedConvPlan& plan,
                 const GroupedConvPlan::Block& block) {
  const ConvShape::Extent& size = plan.output();
  const std::int64_t positions = size[0] * size[1] * size[2], rows = args.shape.rows;
  const std::int64_t first = (block.depth * size[1] + block.line) * size[2];
  if (args.order == ChannelOrder::kPlanes) {
    return {(block.sample * rows + block.row) * positions + first, positions, 1};
  }
  return {(block.sample * positions + first) * rows + block.row, 1, rows};
}

// A block's results, before they are stored as codes.
class BlockNumbers {
 public:
  // For `most` results, or for none.
  BlockNumbers(const GroupedConvArgs& args, std::int64_t most)
      : args_(args), numbers_(most), codes_((most + 3) / 4) {}

  void* data() const { return numbers_.data(); }
  Target target(const GroupedConvPlan::Block& block, std::int64_t positions) const {
    if (args_.order == ChannelOrder::kPlanes) return {0, positions, 1};
    return {0, 1, block.rows};
  }
  // False where one is NaN.
  bool store(Isa isa, const GroupedConvPlan::Block& block, std::int64_t positions,
             const Target& to) const {
    auto* const codes = reinterpret_cast<std::int8_t*>(codes_.data());
    const std::int64_t size = block.rows * positions;
    if (!quantize_codes(isa, numbers_.data(), args_.type, size, *args_.scales->y, codes)) {
      return false;
    }
    const bool is_planes = args_.order == ChannelOrder::kPlanes;
    const std::int64_t runs = is_planes ? block.rows : positions;
    const std::int64_t count = is_planes ? positions : block.rows;
    const std::int64_t step = is_planes ? to.row_step : to.position_step;
    auto* y = static_cast<std::int8_t*>(args_.y) + to.begin;
    for (std::int64_t i = 0; i < runs; ++i) std::memcpy(y + i * step, codes + i * count, count);
    return true;
  }

 private:
  const GroupedConvArgs& args_;
  Scratch numbers_, codes_;
};

}  // namespace

const GroupedConvKernel* find_grouped_conv(Isa isa, const ConvShape& shape, ChannelOrder order) {
  const GroupedLanes lanes = lanes_of(shape, order);
  // A register has the rows of whole groups, whose channels fit another, or of a part of one.
  const std::int64_t rows = shape.group_rows();
  const bool fits = rows % kVector == 0 || (kVector % rows == 0 && shape.group_channels() <= rows);
  if (lanes == GroupedLanes::kRows && !fits) return nullptr;
  const auto* kernel =
      best_variant<const GroupedConvKernel*>(isa, {
#if defined(__x86_64__)
                                                      {Isa::kAvx2, &grouped_conv__avx2},
#endif
                                                      {Isa::kPortable, &grouped_conv__portable}});
  return kernel->run[static_cast<int>(lanes)] != nullptr ? kernel : nullptr;
}

namespace {

// From so many positions on, those at the ends of a line matter less.
constexpr std::int64_t kLongLine = 20;

// Whether the pixels that a run reads fit the sets of the first-level cache that their distance
// leaves them, with two ways of eight for all else.
bool fits_sets(const ConvShape& shape, std::int64_t pixel_bytes) {
  constexpr std::int64_t kLine = 64, kSets = 64, kWays = 6;
  const std::int64_t lines = pixel_bytes % kLine == 0 ? pixel_bytes / kLine : 1;
  const std::int64_t sets = kSets / std::gcd(kSets, lines);
  const std::int64_t pixels = (kVector - 1) * shape.stride[2] + shape.kernel[2];
  return pixels * shape.kernel[0] * shape.kernel[1] <= sets * kWays;
}

// The copy costs more than it saves: but where lines are short for a wide kernel, most positions
// read padding.
bool goes_by_lines(const GroupedConvKernel& kernel, const GroupedConvArgs& args) {
  const ConvShape& shape = args.shape;
  const bool is_narrow = shape.kernel[2] <= 3 || shape.stride[2] > 1 ||
                         (shape.kernel[2] <= 5 && shape.output()[2] >= kLongLine);
  const std::int64_t number = args.scales != nullptr ? 1 : size_of(FloatType::kF32);
  return kernel.line != nullptr && shape.is_depthwise() && args.order == ChannelOrder::kLast &&
         shape.channels % kVector == 0 && args.type == FloatType::kF32 &&
         shape.kernel[0] * shape.kernel[1] <= DepthwiseLine::kMostTapLines && is_narrow &&
         fits_sets(shape, shape.channels * number);
}

// False where a number that y should hold as a code is NaN.
bool depthwise_by_lines(Isa isa, const GroupedConvKernel& kernel, const GroupedConvArgs& args,
                        const ParallelFor& parallel_for) {
  const ConvShape::Extent size = args.shape.output();
  const std::int64_t count = size[2] * args.shape.channels;
  const RowNumbers rows(args, GroupedLanes::kChannels);
  const ConvScales* const scales = args.scales;
  const bool stores_codes = scales != nullptr && scales->y;
  std::atomic<bool> all_have_codes = true;
  parallel_for(args.shape.batch * size[0] * size[1], [&](std::int64_t begin, std::int64_t end) {
    const Scratch numbers(stores_codes ? count : 0);
    for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
      const std::int64_t outer = i / size[1], sample = outer / size[0];
      float* const y = stores_codes ? numbers.data() : static_cast<float*>(args.y) + i * count;
      kernel.line({.args = args,
                   .sample = sample,
                   .depth = outer % size[0],
                   .line = i % size[1],
                   .weight = rows.weight(),
                   .scale = rows.scale(),
                   .shift = rows.shift(),
                   .bias = rows.bias(),
                   .x_scale = scales != nullptr ? scales->x[sample] : 1.0F,
                   .y = y});
      if (!stores_codes) continue;
      auto* const codes = static_cast<std::int8_t*>(args.y) + i * count;
      if (!quantize_codes(isa, y, args.type, count, *scales->y, codes)) all_have_codes = false;
    }
  });
  return all_have_codes;
}

}  // namespace

bool grouped_conv(Isa isa, const GroupedConvArgs& args, const ParallelFor& parallel_for) {
  if (args.shape.batch == 0) return true;
  const GroupedConvKernel& kernel = *find_grouped_conv(isa, args.shape, args.order);
  if (goes_by_lines(kernel, args)) return depthwise_by_lines(isa, kernel, args, parallel_for);
  const GroupedConvPlan plan(args);
  const RowNumbers rows(args, plan.lanes());
  const ConvScales* const scales = args.scales;
  const bool stores_codes = scales != nullptr && scales->y;
  std::atomic<bool> all_have_codes = true;
  parallel_for(plan.blocks(), [&](std::int64_t begin, std::int64_t end) {
    const Scratch input(plan.block_floats());
    const BlockNumbers numbers(args, stores_codes ? plan.block_results() : 0);
    GroupedConvPlan::Block filled;
    for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
      const GroupedConvPlan::Block at = plan.block(i);
      const std::int64_t positions = at.lines * plan.output()[2];
      const bool has_padding = i > begin && at.depth == filled.depth && at.line == filled.line;
      if (!has_padding) plan.fill_padding(at, input.data());
      filled = at;
      plan.fill_pixels(args, at, scales != nullptr ? kernel.codes : kernel.floats, input.data());
      const Target y = target_of(args, plan, at);
      const Target to = stores_codes ? numbers.target(at, positions) : y;
      kernel.run[static_cast<int>(plan.lanes())]({
          .args = args,
          .plan = plan,
          .at = at,
          .input = input.data(),
          .weight = rows.weight(),
          .scale = rows.scale(),
          .shift = rows.shift(),
          .bias = rows.bias(),
          .x_scale = scales != nullptr ? scales->x[at.sample] : 1.0F,
          .y = stores_codes ? numbers.data() : args.y,
          .begin = to.begin,
          .row_step = to.row_step,
          .position_step = to.position_step,
      });
      if (stores_codes && !numbers.store(isa, at, positions, y)) all_have_codes = false;
    }
  });
  return all_have_codes;
}

}  // namespace quantal::kernels
