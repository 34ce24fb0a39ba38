// Weight-only linear for AVX2 with FMA. Few tokens: every code is decoded in a register and
// multiplied at once; group by group, scale and shift are applied to the sums:
//   y = Σ_g scale_g · Σ_k code_k·x_k − shift_g · Σ_k x_k.
// Many tokens: panels.h.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/for_qtype.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/panels.h"

namespace quantal::kernels {
namespace {

constexpr int kFewTokens = kBlockTokens;
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
      load_floats(args.x, from, columns, args.type, to);
      const std::int64_t padded = layout_.group_lines(g) * layout_.depth();
      std::memset(to + columns, 0, (padded - columns) * sizeof(float));
    }
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

/// What multiply_rows() reads and writes.
class LinearTokens {
 public:
  static constexpr std::int64_t kStrip = 1024;

  LinearTokens(const LinearArgs& args, const Activations& x) : args_(args), x_(x) {}

  struct Block {
    std::int64_t column(std::int64_t c) const { return c; }
    const float* at(int token, std::int64_t column) const { return x + token * stride + column; }
    const float* x;
    std::int64_t stride;
  };

  std::int64_t columns(std::int64_t, std::int64_t begin, std::int64_t end) const {
    return end - begin;
  }
  std::int64_t together(std::int64_t) const { return kBlockTiles; }
  Block block(std::int64_t, std::int64_t token, std::int64_t, std::int64_t column) const {
    return {x_.token(token) + column, x_.stride()};
  }
  void store(const BlockSums& sums) const {
    for (std::int64_t t = 0; t < sums.tokens; ++t) {
      for (std::int64_t i = 0; i < sums.tiles; ++i) {
        store_tile(args_, sums.first_tile + i, sums.first + t, sums.at(t, i));
      }
    }
  }

 private:
  const LinearArgs& args_;
  const Activations& x_;
};

template <QTypeId qtype>
void many_tokens(const LinearArgs& args, const Activations& x, const ParallelFor& parallel_for) {
  multiply_rows<Panels<qtype>>(*args.layout, args.weight, LinearTokens(args, x), args.tokens,
                               parallel_for);
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
