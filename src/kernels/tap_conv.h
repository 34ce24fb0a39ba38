#pragma once

#include <cstdint>
#include <vector>

#include "kernels/integer_conv.h"

/// Convolution of codes with an int8 weight, without patches: the input is copied once, channels
/// last, with its padding, and products read it where it lies. What the kernel covers in one of the
/// input's lines is one run of bytes there, for every position, so that a token is a few runs.
namespace quantal::kernels {

/// Codes of a token that follow each other, from `offset` bytes behind its first one on, in units
/// of as many steps as the plan was made with; a step has four codes.
struct TapRun {
  std::int64_t offset;
  std::int64_t units;
};

/// The weight's columns that four codes of a run are multiplied by; -1: none. `rows`: those rows of
/// a tile alone, as bits.
struct TapStep {
  std::int32_t columns[4];
  std::uint16_t rows;
};

/// Groups whose rows fit a tile are computed together, as one: each of its rows has zeros for the
/// channels of other groups. 0: a group's rows are no whole tiles, and do not divide one.
QUANTAL_API std::int64_t groups_together(const ConvShape& shape);

/// Where codes lie in the copy. It consists of slabs, each with what some lines of the output of
/// one sample and depth read:
///   (kernel depth, phases, lines, pixels, channels)
/// where the lines of a phase are those that are a stride apart. So the lines of the output follow
/// each other every pitch() tokens, and all tokens of a slab are at the same distance; the last
/// ones of each line are no positions, since the kernel would reach over the line's end.
class TapPlan {
 public:
  /// Slabs of about `most_bytes`, or of one line; `unit` steps make a unit.
  /// Precondition: groups_together(shape) > 0.
  TapPlan(const ConvShape& shape, std::int64_t most_bytes, int unit);

  /// The convolution, of such groups together.
  const ConvShape& shape() const { return shape_; }

  struct Slab {
    std::int64_t sample = 0, depth = 0;
    std::int64_t line = 0, lines = 0;  ///< of the output
  };
  std::int64_t slabs() const { return shape_.batch * size_[0] * parts_; }
  Slab slab(std::int64_t index) const;
  std::int64_t slab_bytes() const { return slab_bytes_; }
  /// Bytes behind the last slab that are read, too.
  std::int64_t slack() const;

  std::int64_t tokens(const Slab& slab) const { return (slab.lines - 1) * pitch_ + size_[2]; }
  /// From one line of the output to the next one, in tokens: the first `width` are positions.
  std::int64_t pitch() const { return pitch_; }
  std::int64_t width() const { return size_[2]; }
  /// Of a sample's output, and the first one of a slab.
  std::int64_t positions() const { return size_[0] * size_[1] * size_[2]; }
  std::int64_t first_position(const Slab& slab) const {
    return (slab.depth * size_[1] + slab.line) * size_[2];
  }
  /// Positions among the first `tokens` of a slab.
  std::int64_t positions(std::int64_t tokens) const;
  /// From one token to the next.
  std::int64_t token_bytes() const { return shape_.stride[2] * shape_.channels; }

  const TapRun* runs() const { return runs_.data(); }
  std::int64_t run_count() const { return static_cast<std::int64_t>(runs_.size()); }
  const TapStep* steps() const { return steps_.data(); }
  std::int64_t step_count() const { return static_cast<std::int64_t>(steps_.size()); }
  /// Whether each step has four channels of one tap, or none: then those of a tap are steps
  /// [tap_steps()[tap], … + tap_step_count()).
  bool has_whole_steps() const { return together_ == 1 && shape_.group_channels() % 4 == 0; }
  const std::int32_t* tap_steps() const { return tap_steps_.data(); }
  std::int64_t tap_step_count() const { return shape_.group_channels() / 4; }
  std::int64_t taps() const { return shape_.taps(); }

  /// A slab is copied in so many parts.
  std::int64_t fill_parts() const { return shape_.kernel[0] * line_parts_; }
  /// Each code xor `flip`.
  void fill(const IntegerConvArgs& args, const Slab& slab, std::int64_t part, std::uint8_t flip,
            std::int8_t* to) const;

 private:
  void add_run(std::int64_t offset, std::int64_t first_tap, std::int64_t taps, int unit);
  std::int64_t input_lines(std::int64_t lines) const;
  void gather_lines(const std::int8_t* planes, std::int64_t above, std::int64_t first,
                    std::int64_t end, std::int8_t* to) const;
  std::int64_t line_bytes() const { return pitch_ * token_bytes(); }
  std::int8_t* line_at(std::int8_t* plane, std::int64_t line) const;

  std::int64_t together_;
  ConvShape shape_;
  ConvShape::Extent size_;
  std::int64_t pitch_;
  std::int64_t lines_, parts_;  ///< of the output, in a slab; slabs of one sample and depth
  std::int64_t phase_lines_;    ///< of the copy
  std::int64_t plane_bytes_, slab_bytes_;
  std::int64_t fill_lines_, line_parts_;
  std::vector<TapRun> runs_;
  std::vector<TapStep> steps_;
  std::vector<std::int32_t> tap_steps_;
};

/// Some tokens by some tiles of the weight's rows.
struct TapBlock {
  const TapPlan& plan;
  const void* x;              ///< the block's first token, from the group's first channel on
  std::int64_t first, count;  ///< tokens of the slab
  const std::byte* panel;     ///< what decode() made of
  const std::byte* weight;    ///< those tiles
  const PackedLayout& layout;
  int tiles;
  std::int64_t rows;  ///< of the weight
  float x_scale;
  FloatType type;
  const void* bias;  ///< (rows), or null
  void* y;           ///< (positions, y_stride), of `type`
  std::int64_t y_stride;
};

/// y as integer_linear.h has it, of one group a row: y = fma(fma(S, scale_w, 0), scale_x, bias).
struct TapConvKernel {
  static constexpr int kTiles = 2;          ///< of rows, at most
  static constexpr int kTokens = 288;       ///< at most
  static constexpr int kFewestTokens = 96;  ///< a multiple of those that are computed together
  static constexpr int kTileTokens = 16;    ///< that are read together, whether there are or not
  static constexpr int kHeadBytes = 64;     ///< of a tile's panel, beside its steps

  /// What patches and panels cost, counted in products: of a position by so many rows, of a tile by
  /// so many tokens; and how much faster products are than the integer linear's. Fitted to 40
  /// layers on one core (Intel Xeon with AMX).
  struct Costs {
    float patch_rows, panel_tokens, speed;
    /// 1x1 over pixels that lie where they are has no patches: from so many positions on; 0: any.
    std::int64_t pixels = 0;
  };

  Costs costs;
  int unit;                  ///< steps
  bool is_unsigned = false;  ///< x has codes + 128
  bool is_wide = false;      ///< x has 16-bit numbers
  int step_bytes = 64;       ///< of a panel
  /// Takes up to kTiles tiles apart.
  void (*decode)(const TapPlan& plan, const PackedLayout& layout, const std::byte* weight,
                 int tiles, std::byte* panel);
  void (*multiply)(const TapBlock& block);
  /// Codes as x has them, where that is wide: `count` of them, a multiple of 16.
  void (*widen)(const std::int8_t* from, std::int64_t count, std::int16_t* to) = nullptr;
};
extern const TapConvKernel tap_conv__avx2, tap_conv__avx_vnni, tap_conv__avx512_vnni, tap_conv__amx;
extern const TapConvKernel tap_conv__neon_dotprod;

/// The kernel of an instruction set for such a convolution, or null.
QUANTAL_API const TapConvKernel* find_tap_conv(Isa isa, const ConvShape& shape,
                                               const PackedLayout& layout);

/// Whether that takes less time than patches, and than going without them in floats.
QUANTAL_API bool goes_by_taps(Isa isa, const ConvShape& shape, const PackedLayout& layout,
                              ChannelOrder order);

/// What integer_conv() gives. Precondition: there is a kernel.
QUANTAL_API bool conv_by_taps(Isa isa, const IntegerConvArgs& args,
                              const ParallelFor& parallel_for = serial_for);

}  // namespace quantal::kernels
