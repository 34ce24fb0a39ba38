#pragma once

// Included by this folder's files only, below their target pragma.

#include <algorithm>
#include <array>

#include "kernels/cpu/neon/rows.h"
#include "kernels/integer_linear.h"

/// An integer linear but for its dot product. `Dot` says how codes are multiplied:
///
///   kDepth                  columns of a line
///   kTokens                 so many tokens at once
///   kQuartersAtOnce<tokens> so many registers of 4 rows at once, 4 or 2
///   add(lines, count, x, stride, total)   total[t][q] += Σ code_w·code_x over `count` lines
namespace quantal::kernels {
namespace {

// Columns after which the other part of a tile has its turn, while the whole tile's lines and the
// tokens are in the first-level cache.
constexpr std::int64_t kChunkColumns = 1024;

/// Planes of codes of a quarter of a line, signed: four columns of 4 rows each.
template <int bits, int plane>
inline int8x16_t plane_codes(uint8x16_t words) {
  // Stored as code + 128.
  if constexpr (bits == 8) return vreinterpretq_s8_u8(veorq_u8(words, vdupq_n_u8(0x80)));
  uint8x16_t codes = words;
  if constexpr (plane > 0) codes = vshrq_n_u8(codes, bits * plane);
  if constexpr (bits * (plane + 1) < 8) codes = vandq_u8(codes, vdupq_n_u8((1 << bits) - 1));
  return vreinterpretq_s8_u8(codes);
}

/// Up to Dot::kTokens tokens by one tile.
template <typename Dot, int tokens>
class TileSums {
 public:
  static constexpr int kPartQuarters = Dot::template kQuartersAtOnce<tokens>;
  static constexpr int kParts = kQuarters / kPartQuarters;

  TileSums(const PackedLayout& layout, const TokenCodes& x, std::int64_t first_token)
      : layout_(layout), x_(x), first_(first_token) {}

  void add_group(const std::byte* tile, std::int64_t group, int part) {
    const TileScales scales(layout_, tile, group);
    const int quarter = part * kPartQuarters;
    const std::byte* lines = tile + layout_.group_offset(group) + quarter * kQuarterBytes;
    const std::int8_t* columns = x_.codes(first_) + layout_.padded_begin(group);
    const std::int64_t count = layout_.group_lines(group);
    constexpr std::int64_t kBlockLines = kBlockColumns / Dot::kDepth;
    for (std::int64_t block = 0; block < x_.blocks_per_group(); ++block) {
      const std::int64_t begin = std::min(count, block * kBlockLines);
      const std::int64_t end = std::min(count, begin + kBlockLines);
      int32x4_t total[tokens][kPartQuarters];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        QUANTAL_UNROLL for (int q = 0; q < kPartQuarters; ++q) total[t][q] = vdupq_n_s32(0);
      }
      Dot::add(lines + begin * kLineBytes, end - begin, columns + begin * Dot::kDepth, x_.stride(),
               total);
      add_scaled(total, scales, group * x_.blocks_per_group() + block, quarter);
    }
  }

  void store(const IntegerLinearArgs& args, std::int64_t tile) const {
    for (int q = 0; q < kQuarters; ++q) {
      const std::int64_t row = tile * kTileRows + q * kQuarterRows;
      const std::int64_t rows = std::min(kQuarterRows, layout_.spec().rows - row);
      if (rows <= 0) return;
      const float32x4_t bias = load_bias(args.bias, row, rows, args.type);
      for (int t = 0; t < tokens; ++t) {
        const float32x4_t scale = vdupq_n_f32(x_.scale(first_ + t));
        store_rows(args.y, (first_ + t) * args.y_stride + row, args.type, rows,
                   vfmaq_f32(bias, vld1q_f32(sums_[t] + q * kQuarterRows), scale));
      }
    }
  }

 private:
  void add_scaled(const int32x4_t (&total)[tokens][kPartQuarters], const TileScales& scales,
                  std::int64_t block, int quarter) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const float32x4_t x_sum = vdupq_n_f32(static_cast<float>(x_.sums(first_ + t)[block]));
      QUANTAL_UNROLL for (int q = 0; q < kPartQuarters; ++q) {
        float* sum = sums_[t] + (quarter + q) * kQuarterRows;
        float32x4_t value =
            vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(total[t][q]), scales.scale[quarter + q]);
        if (layout_.is_affine()) value = vfmsq_f32(value, x_sum, scales.shift[quarter + q]);
        vst1q_f32(sum, value);
      }
    }
  }

  const PackedLayout& layout_;
  const TokenCodes& x_;
  std::int64_t first_;
  float sums_[tokens][kTileRows] = {};
};

template <typename Dot, int tokens>
void run_tile(const IntegerLinearArgs& args, const TokenCodes& x, std::int64_t first_token,
              std::int64_t tile) {
  const PackedLayout& layout = *args.layout;
  const std::byte* data = args.weight + tile * layout.tile_bytes();
  TileSums<Dot, tokens> sums(layout, x, first_token);
  const std::int64_t width = std::max<std::int64_t>(1, layout.group_lines(0) * layout.depth());
  const std::int64_t chunk = std::max<std::int64_t>(1, kChunkColumns / width);
  for (std::int64_t first = 0; first < layout.groups(); first += chunk) {
    const std::int64_t end = std::min(layout.groups(), first + chunk);
    for (int part = 0; part < sums.kParts; ++part) {
      for (std::int64_t group = first; group < end; ++group) sums.add_group(data, group, part);
    }
  }
  sums.store(args, tile);
}

template <typename Dot, int... counts>
constexpr auto tile_runners(std::integer_sequence<int, counts...>) {
  using Run = void (*)(const IntegerLinearArgs&, const TokenCodes&, std::int64_t, std::int64_t);
  return std::array<Run, sizeof...(counts)>{run_tile<Dot, counts + 1>...};
}

template <typename Dot>
void run(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  constexpr int kTokens = Dot::kTokens;
  static constexpr auto kRunners = tile_runners<Dot>(std::make_integer_sequence<int, kTokens>());
  const PackedLayout& layout = *args.layout;
  const std::int64_t tokens = args.source.tokens;
  const TokenCodes x(layout, tokens);
  parallel_for(tokens, [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__neon(layout, args.source, begin, end, x);
  });
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      for (std::int64_t t = 0; t < tokens; t += kTokens) {
        const std::int64_t count = std::min<std::int64_t>(kTokens, tokens - t);
        kRunners[count - 1](args, x, t, tile);
      }
    }
  });
}

/// The kernel of an instruction set, given its dot product for codes of 2, 4 and 8 bits.
template <template <int bits> typename Dot>
void run_any(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  if (args.source.tokens == 0) return;
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return run<Dot<2>>(args, parallel_for);
    case QTypeId::kInt4:
      return run<Dot<4>>(args, parallel_for);
    default:
      return run<Dot<8>>(args, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
