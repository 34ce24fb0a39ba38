#pragma once

// Included by files for AVX2 and what it is a part of, below their target pragma: an integer linear
// over any way to multiply bytes. 8 rows of a tile by up to 8 tokens stay in registers.
//
// A Dot multiplies codes of `kDepth` columns a line:
//   Dot::add<tokens>(lines, count, next, x, stride, total): total[t] += Σ code_w·code_x over
//   `count` lines, for the 8 rows at `lines`; Dot::Code is the type of x. Meanwhile `next` is
//   fetched.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx2/rows.h"
#include "kernels/integer_linear.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;
constexpr int kTokens = 8;
constexpr std::int64_t kPrefetchBytes = 2048;
// The halves of a tile take turns. For few tokens after so many lines, so that memory is not idle
// while the second half reads what the first one did; for more after so many columns, in whole
// groups, while both halves and the tokens are in the first-level cache.
constexpr int kFewTokens = 4;
constexpr std::int64_t kChunkLines = 32;
constexpr std::int64_t kChunkColumns = 1024;

inline __m256i broadcast_word(const void* data) {
  std::int32_t word;
  std::memcpy(&word, data, sizeof(word));
  return _mm256_set1_epi32(word);
}

/// What is wanted later: a part of it for every line.
struct Next {
  const std::byte* data;
  std::int64_t step;
  void fetch(std::int64_t line) const {
    _mm_prefetch(reinterpret_cast<const char*>(data) + line * step, _MM_HINT_T0);
  }
};

/// The tokens of a call as a dot product wants them: as they are.
template <typename Dot>
class Codes {
 public:
  Codes(const TokenCodes& x, const ParallelFor&) : x_(x) {}
  const std::int8_t* token(std::int64_t t) const { return x_.codes(t); }
  std::int64_t stride() const { return x_.stride(); }

 private:
  const TokenCodes& x_;
};

/// Up to 8 tokens by one tile.
template <typename Dot, int tokens>
class TileSums {
 public:
  TileSums(const PackedLayout& layout, const TokenCodes& x, const Codes<Dot>& codes,
           std::int64_t first_token)
      : layout_(layout), x_(x), codes_(codes), first_(first_token) {}

  void add_group(const std::byte* tile, std::int64_t group) {
    const HalfScales low_scales(layout_, tile, group, 0), high_scales(layout_, tile, group, 1);
    for_blocks(tile, group,
               [&](std::int64_t block, const std::byte* lines, std::int64_t count,
                   const typename Dot::Code* x) {
                 __m256i low[tokens], high[tokens];
                 QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) low[t] = high[t] =
                     _mm256_setzero_si256();
                 for (std::int64_t i = 0; i < count; i += kChunkLines) {
                   const std::int64_t chunk = std::min(kChunkLines, count - i);
                   const std::byte* from = lines + i * kLineBytes;
                   Next next{from + kPrefetchBytes, kLineBytes / 2};
                   Dot::add(from, chunk, next, x + i * Dot::kDepth, codes_.stride(), low);
                   next.data += chunk * next.step;
                   Dot::add(from + kLineBytes / 2, chunk, next, x + i * Dot::kDepth,
                            codes_.stride(), high);
                 }
                 add_scaled(low, low_scales, block, 0);
                 add_scaled(high, high_scales, block, 1);
               });
  }

  void add_half_group(const std::byte* tile, std::int64_t group, int half) {
    const HalfScales scales(layout_, tile, group, half);
    for_blocks(tile, group,
               [&](std::int64_t block, const std::byte* lines, std::int64_t count,
                   const typename Dot::Code* x) {
                 __m256i total[tokens];
                 QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) total[t] = _mm256_setzero_si256();
                 const std::byte* from = lines + half * (kLineBytes / 2);
                 Dot::add(from, count, Next{from + kPrefetchBytes, kLineBytes}, x, codes_.stride(),
                          total);
                 add_scaled(total, scales, block, half);
               });
  }

  void store(const IntegerLinearArgs& args, std::int64_t tile) const {
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = tile * kTileRows + half * kHalfRows;
      const std::int64_t rows = std::min(kHalfRows, layout_.spec().rows - row);
      if (rows <= 0) return;
      const __m256 bias = load_bias(args.bias, row, rows, args.type);
      for (int t = 0; t < tokens; ++t) {
        const __m256 scale = _mm256_set1_ps(x_.scale(first_ + t));
        const __m256 y = _mm256_fmadd_ps(_mm256_load_ps(sums_[half][t]), scale, bias);
        store_rows(args.y, (first_ + t) * args.y_stride + row, args.type, rows, y);
      }
    }
  }

 private:
  // Calls body(block, lines, count, x) for the parts of a group whose sums fit 32 bits.
  template <typename Body>
  void for_blocks(const std::byte* tile, std::int64_t group, const Body& body) {
    const std::byte* lines = tile + layout_.group_offset(group);
    const auto* columns = codes_.token(first_) + layout_.padded_begin(group);
    const std::int64_t count = layout_.group_lines(group);
    constexpr std::int64_t kBlockLines = kBlockColumns / Dot::kDepth;
    for (std::int64_t block = 0; block < x_.blocks_per_group(); ++block) {
      const std::int64_t begin = std::min(count, block * kBlockLines);
      const std::int64_t end = std::min(count, begin + kBlockLines);
      body(group * x_.blocks_per_group() + block, lines + begin * kLineBytes, end - begin,
           columns + begin * Dot::kDepth);
    }
  }

  void add_scaled(const __m256i (&total)[tokens], const HalfScales& scales, std::int64_t block,
                  int half) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const std::int32_t x_sum = x_.sums(first_ + t)[block];
      float* sum = sums_[half][t];
      __m256i exact = total[t];
      if (!layout_.is_affine()) exact = _mm256_sub_epi32(exact, _mm256_set1_epi32(128 * x_sum));
      __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), scales.scale, _mm256_load_ps(sum));
      if (layout_.is_affine()) {
        const __m256 shifted = _mm256_set1_ps(static_cast<float>(x_sum));
        value = _mm256_fnmadd_ps(shifted, scales.shift, value);
      }
      _mm256_store_ps(sum, value);
    }
  }

  const PackedLayout& layout_;
  const TokenCodes& x_;
  const Codes<Dot>& codes_;
  std::int64_t first_;
  alignas(32) float sums_[2][tokens][kHalfRows] = {};
};

template <typename Dot, int tokens>
void run_tile(const IntegerLinearArgs& args, const TokenCodes& x, const Codes<Dot>& codes,
              std::int64_t first_token, std::int64_t tile) {
  const PackedLayout& layout = *args.layout;
  const std::byte* data = args.weight + tile * layout.tile_bytes();
  TileSums<Dot, tokens> sums(layout, x, codes, first_token);
  if constexpr (tokens <= kFewTokens) {
    for (std::int64_t group = 0; group < layout.groups(); ++group) sums.add_group(data, group);
  } else {
    const std::int64_t width = std::max<std::int64_t>(1, layout.group_lines(0) * layout.depth());
    const std::int64_t chunk = std::max<std::int64_t>(1, kChunkColumns / width);
    for (std::int64_t first = 0; first < layout.groups(); first += chunk) {
      const std::int64_t end = std::min(layout.groups(), first + chunk);
      for (int half = 0; half < 2; ++half) {
        for (std::int64_t g = first; g < end; ++g) sums.add_half_group(data, g, half);
      }
    }
  }
  sums.store(args, tile);
}

template <typename Dot, int... counts>
constexpr auto tile_runners(std::integer_sequence<int, counts...>) {
  using Run = void (*)(const IntegerLinearArgs&, const TokenCodes&, const Codes<Dot>&, std::int64_t,
                       std::int64_t);
  return std::array<Run, sizeof...(counts)>{run_tile<Dot, counts + 1>...};
}

template <typename Dot>
void integer_linear(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  static constexpr auto kRunners = tile_runners<Dot>(std::make_integer_sequence<int, kTokens>());
  const PackedLayout& layout = *args.layout;
  const std::int64_t tokens = args.source.tokens;
  const TokenCodes x(layout, tokens);
  parallel_for(tokens, [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__avx2(layout, args.source, begin, end, x);
  });
  const Codes<Dot> codes(x, parallel_for);
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      for (std::int64_t t = 0; t < tokens; t += kTokens) {
        const std::int64_t count = std::min<std::int64_t>(kTokens, tokens - t);
        kRunners[count - 1](args, x, codes, t, tile);
      }
    }
  });
}

}  // namespace
}  // namespace quantal::kernels
