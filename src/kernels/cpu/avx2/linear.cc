// Weight-only linear for AVX2 with FMA. Few tokens: every code is decoded in a register and
// multiplied at once; group by group, scale and shift are applied to the sums:
//   y = Σ_g scale_g · Σ_k code_k·x_k − shift_g · Σ_k x_k.
// Many tokens: some columns of a few tiles are dequantized into panels that stay in the
// second-level cache; 6 tokens by 16 rows of the result stay in registers, and the tokens in the
// first-level cache until every panel has had them.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/for_qtype.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/decode.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;
constexpr int kBlockTokens = 6;
constexpr int kFewTokens = kBlockTokens;
constexpr std::int64_t kPanelColumns = 256;
constexpr std::int64_t kBlockTiles = 4;
constexpr std::int64_t kBlockRows = kBlockTiles * kTileRows;
constexpr std::int64_t kStripTokens = 1024;
constexpr int kPrefetchBytes = 2048;

// fp32 activations with every group padded to whole lines, so that no kernel reads past the end.
class Activations {
 public:
  Activations(const LinearArgs& args, const ParallelFor& parallel_for)
      : layout_(*args.layout),
        stride_(padded_stride(layout_.padded_columns())),
        copied_(args.type != FloatType::kF32 || args.tokens > kFewTokens ||
                layout_.padded_columns() != layout_.spec().columns),
        scratch_(copied_ ? args.tokens * stride_ : 0),
        x_(copied_ ? scratch_.data() : static_cast<const float*>(args.x)),
        x_stride_(copied_ ? stride_ : args.x_stride) {
    if (!copied_) return;
    parallel_for(args.tokens, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) copy_token(args, t);
    });
  }

  const float* token(std::int64_t t) const { return x_ + t * x_stride_; }
  std::int64_t stride() const { return x_stride_; }
  /// Where a group's columns begin.
  std::int64_t group_begin(std::int64_t group) const { return layout_.padded_begin(group); }

 private:
  // Whole cache lines, and never a multiple of a page, where tokens would compete for the same
  // lines of the cache.
  static std::int64_t padded_stride(std::int64_t columns) { return (columns + 15) / 16 * 16 + 16; }

  void copy_token(const LinearArgs& args, std::int64_t t) const {
    float* out = scratch_.data() + t * stride_;
    for (std::int64_t g = 0; g < layout_.groups(); ++g) {
      float* to = out + group_begin(g);
      const std::int64_t columns = layout_.group_columns(g);
      const std::int64_t from = t * args.x_stride + layout_.group_begin(g);
      convert(args, from, columns, to);
      const std::int64_t padded = layout_.group_lines(g) * layout_.depth();
      std::memset(to + columns, 0, (padded - columns) * sizeof(float));
    }
  }

  static void convert(const LinearArgs& args, std::int64_t from, std::int64_t count, float* to) {
    std::int64_t i = 0;
    if (args.type == FloatType::kF32) {
      std::memcpy(to, static_cast<const float*>(args.x) + from, count * sizeof(float));
      return;
    }
    const auto* x = static_cast<const std::uint16_t*>(args.x) + from;
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
      const __m256 value =
          args.type == FloatType::kF16
              ? _mm256_cvtph_ps(half)
              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      _mm256_storeu_ps(to + i, value);
    }
    for (; i < count; ++i) to[i] = load_float(args.x, from + i, args.type);
  }

  const PackedLayout& layout_;
  std::int64_t stride_;
  bool copied_;
  Scratch scratch_;
  const float* x_;
  std::int64_t x_stride_;
};

// Adds the bias and rounds: y[token][tile's rows] = sums.
void store_tile(const LinearArgs& args, std::int64_t tile, std::int64_t token, const float* sums) {
  for (std::int64_t half = 0; half < kTileRows; half += kHalfRows) {
    const std::int64_t row = tile * kTileRows + half;
    const std::int64_t rows = std::min(kHalfRows, args.layout->spec().rows - row);
    if (rows <= 0) return;
    const __m256 bias = load_bias(args.bias, row, rows, args.type);
    store_rows(args.y, token * args.y_stride + row, args.type, rows,
               _mm256_add_ps(_mm256_loadu_ps(sums + half), bias));
  }
}

// Calls step(column) for every column of a line, with the column known at compile time.
template <int depth, typename Step>
inline __attribute__((always_inline)) void for_columns(const Step& step) {
  [&]<int... columns>(std::integer_sequence<int, columns...>) {
    (step(std::integral_constant<int, columns>()), ...);
  }(std::make_integer_sequence<int, depth>());
}

// One group of a tile times `tokens` tokens: sums[token] += scale · Σ code·x − shift · Σ x.
// A sum of few tokens is kept in several chains, since one would wait for each addition.
template <QTypeId qtype, int tokens>
void add_group(const std::byte* lines, std::int64_t count, const float* const* x,
               const float* x_sums, const GroupScales& scales, float (*sums)[kTileRows]) {
  constexpr int kChains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
  __m256 low[tokens][kChains], high[tokens][kChains];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) low[t][c] = high[t][c] = _mm256_setzero_ps();
  }
  for (std::int64_t i = 0; i < count; ++i, lines += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(lines) + kPrefetchBytes, _MM_HINT_T0);
    const HalfLine<qtype> rows_low(lines), rows_high(lines + kLineBytes / 2);
    for_columns<HalfLine<qtype>::kDepth>([&](auto column) __attribute__((always_inline)) {
      constexpr int kChain = column % kChains;
      const __m256 w_low = rows_low.template get<column>();
      const __m256 w_high = rows_high.template get<column>();
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        const __m256 value = _mm256_broadcast_ss(x[t] + i * HalfLine<qtype>::kDepth + column);
        low[t][kChain] = _mm256_fmadd_ps(w_low, value, low[t][kChain]);
        high[t][kChain] = _mm256_fmadd_ps(w_high, value, high[t][kChain]);
      }
    });
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int c = 1; c < kChains; ++c) {
      low[t][0] = _mm256_add_ps(low[t][0], low[t][c]);
      high[t][0] = _mm256_add_ps(high[t][0], high[t][c]);
    }
    const __m256 x_sum = _mm256_set1_ps(x_sums[t]);
    for (const int half : {0, 8}) {
      const __m256 offset = _mm256_mul_ps(_mm256_loadu_ps(scales.shift + half), x_sum);
      const __m256 part = _mm256_fmsub_ps(half == 0 ? low[t][0] : high[t][0],
                                          _mm256_loadu_ps(scales.scale + half), offset);
      float* sum = sums[t] + half;
      _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), part));
    }
  }
}

// Σ x of every group of a few tokens, for affine types: [group][token].
class GroupSums {
 public:
  GroupSums(const PackedLayout& layout, const Activations& x, std::int64_t count)
      : step_(layout.is_affine() ? count : 0),
        sums_(layout.is_affine() ? layout.groups() * count : count) {
    if (!layout.is_affine()) std::fill_n(sums_.data(), count, 0.0F);
    for (std::int64_t t = 0; t < count && layout.is_affine(); ++t) {
      for (std::int64_t g = 0; g < layout.groups(); ++g) {
        const float* values = x.token(t) + x.group_begin(g);
        sums_.data()[g * count + t] = sum_of(values, layout.group_lines(g) * layout.depth());
      }
    }
  }
  const float* group(std::int64_t g) const { return sums_.data() + g * step_; }

 private:
  // `count` is a multiple of 8 for narrow codes: groups are padded with zeros to whole lines.
  static float sum_of(const float* values, std::int64_t count) {
    __m256 sum = _mm256_setzero_ps();
    for (std::int64_t c = 0; c < count; c += 8)
      sum = _mm256_add_ps(sum, _mm256_loadu_ps(values + c));
    float lanes[8];
    _mm256_storeu_ps(lanes, sum);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
           ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }

  std::int64_t step_;  ///< from one group to the next
  Scratch sums_;
};

template <QTypeId qtype, int tokens>
void few_tokens(const LinearArgs& args, const Activations& x, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const GroupSums x_sums(layout, x, tokens);
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::byte* data = args.weight + tile * layout.tile_bytes();
      float sums[tokens][kTileRows] = {};
      for (std::int64_t g = 0; g < layout.groups(); ++g) {
        const float* values[tokens];
        for (int t = 0; t < tokens; ++t) values[t] = x.token(t) + x.group_begin(g);
        add_group<qtype, tokens>(data + layout.group_offset(g), layout.group_lines(g), values,
                                 x_sums.group(g), load_scales(layout, data, g), sums);
      }
      for (int t = 0; t < tokens; ++t) store_tile(args, tile, t, sums[t]);
    }
  });
}

/// The scales and shifts of a tile's group.
struct TileScales {
  TileScales(const PackedLayout& layout, const std::byte* tile, std::int64_t group)
      : low(layout, tile, group, 0), high(layout, tile, group, 1) {}
  HalfScales low, high;
};

// Takes `count` lines of a group apart into 16 numbers a column. What the next panel takes of this
// tile comes from memory meanwhile.
template <QTypeId qtype>
void decode_lines(const std::byte* lines, std::int64_t count, const TileScales& scales,
                  float* panel) {
  constexpr std::int64_t kPanelBytes = kPanelColumns / HalfLine<qtype>::kDepth * kLineBytes;
  for (std::int64_t i = 0; i < count; ++i, lines += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(lines) + kPanelBytes, _MM_HINT_T1);
    const HalfLine<qtype> low(lines), high(lines + kLineBytes / 2);
    for_columns<HalfLine<qtype>::kDepth>([&](auto column) __attribute__((always_inline)) {
      const __m256 w_low = low.template get<column>(), w_high = high.template get<column>();
      float* to = panel + column * kTileRows;
      _mm256_store_ps(to, _mm256_fmsub_ps(w_low, scales.low.scale, scales.low.shift));
      _mm256_store_ps(to + kHalfRows,
                      _mm256_fmsub_ps(w_high, scales.high.scale, scales.high.shift));
    });
    panel += HalfLine<qtype>::kDepth * kTileRows;
  }
}

// sums[token][16] += Σ x[token][c] · panel[c][16]; sums of two tokens are kBlockRows apart.
template <int tokens>
void multiply_panel(const float* x, std::int64_t x_stride, const float* panel, std::int64_t columns,
                    float* sums) {
  __m256 low[tokens], high[tokens];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    low[t] = _mm256_load_ps(sums + t * kBlockRows);
    high[t] = _mm256_load_ps(sums + t * kBlockRows + kHalfRows);
  }
  for (std::int64_t c = 0; c < columns; ++c, panel += kTileRows) {
    const __m256 w_low = _mm256_load_ps(panel), w_high = _mm256_load_ps(panel + kHalfRows);
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const __m256 value = _mm256_broadcast_ss(x + t * x_stride + c);
      low[t] = _mm256_fmadd_ps(w_low, value, low[t]);
      high[t] = _mm256_fmadd_ps(w_high, value, high[t]);
    }
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    _mm256_store_ps(sums + t * kBlockRows, low[t]);
    _mm256_store_ps(sums + t * kBlockRows + kHalfRows, high[t]);
  }
}

using MultiplyPanel = void (*)(const float*, std::int64_t, const float*, std::int64_t, float*);
constexpr MultiplyPanel kMultiplyPanel[kBlockTokens + 1] = {
    nullptr,           multiply_panel<1>, multiply_panel<2>, multiply_panel<3>,
    multiply_panel<4>, multiply_panel<5>, multiply_panel<6>};

/// `count` tokens in parts of about the same size, at most `most`.
struct Parts {
  Parts(std::int64_t count, std::int64_t most) : total(count), parts((count + most - 1) / most) {}
  std::int64_t begin(std::int64_t part) const { return total * part / parts; }
  std::int64_t total, parts;
};

/// Up to kBlockTiles tiles by a strip of tokens.
template <QTypeId qtype>
class RowBlock {
 public:
  RowBlock(const LinearArgs& args, const Activations& x, std::int64_t strip_tokens)
      : args_(args),
        x_(x),
        panels_(kBlockTiles * kPanelColumns * kTileRows),
        sums_(strip_tokens * kBlockRows) {}

  void multiply(std::int64_t first_tile, std::int64_t tiles, std::int64_t first_token,
                std::int64_t tokens) {
    const PackedLayout& layout = *args_.layout;
    first_tile_ = first_tile, tiles_ = tiles, first_token_ = first_token, tokens_ = tokens;
    column_ = filled_ = 0;
    std::memset(sums_.data(), 0, tokens * kBlockRows * sizeof(float));
    for (std::int64_t g = 0; g < layout.groups(); ++g) {
      const std::int64_t lines = layout.group_lines(g);
      for (std::int64_t i = 0; i < lines;) {
        const std::int64_t count = std::min(lines - i, (kPanelColumns - filled_) / kDepth);
        decode(g, i, count);
        i += count;
        if (filled_ == kPanelColumns) multiply_panels();
      }
    }
    multiply_panels();
    store();
  }

 private:
  static constexpr std::int64_t kDepth = HalfLine<qtype>::kDepth;

  float* panel(std::int64_t index) const {
    return panels_.data() + index * kPanelColumns * kTileRows;
  }

  // Lines [first, first + count) of a group of every tile.
  void decode(std::int64_t group, std::int64_t first, std::int64_t count) {
    const PackedLayout& layout = *args_.layout;
    for (std::int64_t i = 0; i < tiles_; ++i) {
      const std::byte* tile = args_.weight + (first_tile_ + i) * layout.tile_bytes();
      decode_lines<qtype>(tile + layout.group_offset(group) + first * kLineBytes, count,
                          TileScales(layout, tile, group), panel(i) + filled_ * kTileRows);
    }
    filled_ += count * kDepth;
  }

  // What is decoded, by every token.
  void multiply_panels() {
    const Parts blocks(tokens_, kBlockTokens);
    for (std::int64_t b = 0; b < blocks.parts; ++b) {
      const std::int64_t t = blocks.begin(b), count = blocks.begin(b + 1) - t;
      for (std::int64_t i = 0; i < tiles_; ++i) {
        kMultiplyPanel[count](x_.token(first_token_ + t) + column_, x_.stride(), panel(i), filled_,
                              sums_.data() + t * kBlockRows + i * kTileRows);
      }
    }
    column_ += filled_;
    filled_ = 0;
  }

  void store() const {
    for (std::int64_t t = 0; t < tokens_; ++t) {
      for (std::int64_t i = 0; i < tiles_; ++i) {
        const float* sums = sums_.data() + t * kBlockRows + i * kTileRows;
        store_tile(args_, first_tile_ + i, first_token_ + t, sums);
      }
    }
  }

  const LinearArgs& args_;
  const Activations& x_;
  Scratch panels_, sums_;
  std::int64_t first_tile_ = 0, tiles_ = 0, first_token_ = 0, tokens_ = 0;
  std::int64_t column_ = 0;  ///< of a token, where the panels begin
  std::int64_t filled_ = 0;  ///< columns in the panels
};

template <QTypeId qtype>
void many_tokens(const LinearArgs& args, const Activations& x, const ParallelFor& parallel_for) {
  const Parts strips(args.tokens, kStripTokens);
  parallel_for(args.layout->tiles(), [&](std::int64_t begin, std::int64_t end) {
    RowBlock<qtype> rows(args, x, std::min(args.tokens, kStripTokens));
    for (std::int64_t s = 0; s < strips.parts; ++s) {
      const std::int64_t token = strips.begin(s), tokens = strips.begin(s + 1) - token;
      for (std::int64_t tile = begin; tile < end; tile += kBlockTiles) {
        rows.multiply(tile, std::min(kBlockTiles, end - tile), token, tokens);
      }
    }
  });
}

template <QTypeId qtype>
void run(const LinearArgs& args, const ParallelFor& parallel_for) {
  using FewTokens = void (*)(const LinearArgs&, const Activations&, const ParallelFor&);
  static constexpr FewTokens kFew[kFewTokens + 1] = {nullptr,
                                                     few_tokens<qtype, 1>,
                                                     few_tokens<qtype, 2>,
                                                     few_tokens<qtype, 3>,
                                                     few_tokens<qtype, 4>,
                                                     few_tokens<qtype, 5>,
                                                     few_tokens<qtype, 6>};
  const Activations x(args, parallel_for);
  const auto multiply = args.tokens <= kFewTokens ? kFew[args.tokens] : many_tokens<qtype>;
  multiply(args, x, parallel_for);
}

}  // namespace

void linear__avx2(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.tokens == 0) return;
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() { run<qtype>(args, parallel_for); });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
