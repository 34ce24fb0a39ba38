#include "kernels/grouped_conv.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "kernels/activation_codes.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kVector = GroupedConvPlan::kVector;
constexpr std::int64_t kTileRows = PackedLayout::kTileRows;

// Memory for ConvRows.
class RowMemory {
 public:
  RowMemory(const GroupedConvArgs& args, GroupedLanes lanes)
      : shape_(args.shape),
        rows_((shape_.rows + kVector - 1) / kVector * kVector),
        // From row to row among kVector, and from column to column.
        row_step_(lanes == GroupedLanes::kPositions ? shape_.columns() : 1),
        column_step_(lanes == GroupedLanes::kPositions ? 1 : kVector),
        is_affine_(args.codes != nullptr && args.codes->layout->is_affine()),
        weight_(rows_ * shape_.columns()),
        scale_(rows_),
        shift_(rows_),
        bias_(rows_) {
    if (shape_.rows < rows_) std::fill_n(weight_.data(), rows_ * shape_.columns(), 0.0F);
    std::fill_n(scale_.data(), rows_, 1.0F);
    std::fill_n(shift_.data(), rows_, 0.0F);
    std::fill_n(bias_.data(), rows_, 0.0F);
    if (args.codes != nullptr) {
      unpack(*args.codes);
    } else {
      copy(args.weight);
    }
    for (std::int64_t r = 0; args.bias != nullptr && r < shape_.rows; ++r) {
      bias_.data()[r] = load_float(args.bias, r, args.type);
    }
  }

  ConvRows get() const {
    return {weight_.data(), scale_.data(), is_affine_ ? shift_.data() : nullptr, bias_.data()};
  }

 private:
  float* row(std::int64_t r) const {
    return weight_.data() + r / kVector * kVector * shape_.columns() + r % kVector * row_step_;
  }
  // Calls visit(column, place) for the columns in order, (channels, taps): they go to (taps,
  // channels).
  template <typename Visit>
  void for_columns(const Visit& visit) const {
    const std::int64_t channels = shape_.group_channels(), taps = shape_.taps();
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t t = 0; t < taps; ++t) {
        visit(c * taps + t, (t * channels + c) * column_step_);
      }
    }
  }

  void copy(const float* weight) const {
    for (std::int64_t r = 0; r < shape_.rows; ++r, weight += shape_.columns()) {
      float* const to = row(r);
      for_columns([&](std::int64_t column, std::int64_t place) { to[place] = weight[column]; });
    }
  }

  void unpack(const ConvCodes& codes) const {
    const PackedLayout& layout = *codes.layout;
    for (std::int64_t first = 0; first < shape_.rows; first += kTileRows) {
      const std::byte* tile = codes.weight + first / kTileRows * layout.tile_bytes();
      const std::int64_t rows = std::min(kTileRows, shape_.rows - first);
      const GroupScales scales = load_scales(layout, tile, 0);
      std::copy_n(scales.scale, rows, scale_.data() + first);
      std::copy_n(scales.shift, rows, shift_.data() + first);
      for (std::int64_t half = 0; half < rows; half += kVector) {
        unpack_rows(layout, tile + half * 4, std::min(kVector, rows - half), row(first + half));
      }
    }
  }
  // `words`: those of the first row in the first line.
  void unpack_rows(const PackedLayout& layout, const std::byte* words, std::int64_t rows,
                   float* to) const {
    const std::int64_t depth = layout.depth();
    const auto bits = static_cast<int>(32 / depth);
    const std::uint32_t mask = (1U << bits) - 1;
    const int zero = is_affine_ ? 0 : 128;
    for_columns([&](std::int64_t column, std::int64_t place) {
      const std::byte* line = words + column / depth * PackedLayout::kLineBytes;
      const int shift = bit_of(bits, static_cast<int>(column % depth));
      float* const out = to + place;
      for (std::int64_t r = 0; r < rows; ++r) {
        std::uint32_t word;
        std::memcpy(&word, line + r * 4, sizeof(word));
        out[r * row_step_] = static_cast<float>(static_cast<int>(word >> shift & mask) - zero);
      }
    });
  }

  const ConvShape& shape_;
  std::int64_t rows_, row_step_, column_step_;
  bool is_affine_;
  Scratch weight_, scale_, shift_, bias_;
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
    if (!quantize_codes(isa, numbers_.data(), args_.type, size, *args_.codes->y_scale, codes)) {
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

// From so many positions on, those at the ends of a line matter less.
constexpr std::int64_t kLongLine = 20;
constexpr std::int64_t kManyLines = 16;

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
  const std::int64_t number = args.codes != nullptr ? 1 : size_of(FloatType::kF32);
  // Among which threads divide a call: lines here, and eight channels at a time otherwise.
  const ConvShape::Extent size = shape.output();
  const std::int64_t lines = shape.batch * size[0] * size[1];
  const bool divides = lines >= std::min(kManyLines, shape.channels / kVector);
  return kernel.line != nullptr && shape.is_depthwise() && args.order == ChannelOrder::kLast &&
         shape.channels % kVector == 0 && args.type == FloatType::kF32 &&
         shape.kernel[0] * shape.kernel[1] <= DepthwiseLine::kMostTapLines && is_narrow &&
         divides && fits_sets(shape, shape.channels * number);
}

// False where a number that y should hold as a code is NaN.
bool depthwise_by_lines(Isa isa, const GroupedConvKernel& kernel, const GroupedConvArgs& args,
                        const ParallelFor& parallel_for) {
  const ConvShape::Extent size = args.shape.output();
  const std::int64_t count = size[2] * args.shape.channels;
  const RowMemory rows(args, GroupedLanes::kChannels);
  const ConvCodes* const codes = args.codes;
  const bool stores_codes = codes != nullptr && codes->y_scale;
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
                   .rows = rows.get(),
                   .x_scale = codes != nullptr ? codes->x_scales[sample] : 1.0F,
                   .y = y});
      if (!stores_codes) continue;
      auto* const to = static_cast<std::int8_t*>(args.y) + i * count;
      if (!quantize_codes(isa, y, args.type, count, *codes->y_scale, to)) all_have_codes = false;
    }
  });
  return all_have_codes;
}

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

bool grouped_conv(Isa isa, const GroupedConvArgs& args, const ParallelFor& parallel_for) {
  if (args.shape.batch == 0) return true;
  const GroupedConvKernel& kernel = *find_grouped_conv(isa, args.shape, args.order);
  if (goes_by_lines(kernel, args)) return depthwise_by_lines(isa, kernel, args, parallel_for);
  const GroupedConvPlan plan(args);
  const RowMemory rows(args, plan.lanes());
  const ConvCodes* const codes = args.codes;
  const bool stores_codes = codes != nullptr && codes->y_scale;
  std::atomic<bool> all_have_codes = true;
  parallel_for(plan.blocks(), [&](std::int64_t begin, std::int64_t end) {
    const Scratch input(plan.block_floats());
    const BlockNumbers numbers(args, stores_codes ? plan.block_results() : 0);
    GroupedConvPlan::Block filled;
    for (std::int64_t i = begin; i < end && all_have_codes; ++i) {
      const GroupedConvPlan::Block at = plan.block(i);
      const std::int64_t positions = at.lines * plan.output()[2];
      const bool has_padding = i > begin && at.depth == filled.depth && at.line == filled.line;
      const bool has_pixels = has_padding && at.sample == filled.sample && at.group == filled.group;
      if (!has_padding) plan.fill_padding(at, input.data());
      if (!has_pixels) {
        plan.fill_pixels(args, at, codes != nullptr ? kernel.codes : kernel.floats, input.data());
      }
      filled = at;
      const Target y = target_of(args, plan, at);
      const Target to = stores_codes ? numbers.target(at, positions) : y;
      kernel.run[static_cast<int>(plan.lanes())]({
          .args = args,
          .plan = plan,
          .at = at,
          .input = input.data(),
          .rows = rows.get(),
          .x_scale = codes != nullptr ? codes->x_scales[at.sample] : 1.0F,
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
