// Integer linear for AVX2: 8 rows of a tile by up to 8 tokens stay in registers. int4 and int2:
// vpmaddubsw multiplies unsigned codes by signed ones and adds pairs, which fit 16 bits for several
// lines. int8 pairs would not: its codes are widened to 16 bits and go through vpmaddwd.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/integer_linear.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;
constexpr int kTokens = 8;
constexpr std::int64_t kPrefetchBytes = 2048;
// Columns after which the other half of a tile has its turn, while both halves and the tokens are
// in the first-level cache.
constexpr std::int64_t kChunkColumns = 1024;

// sum + part, now: GCC would add the parts of several steps first, and runs out of registers for
// them.
inline __m256i add_16(__m256i sum, __m256i part) {
  sum = _mm256_add_epi16(sum, part);
  __asm__("" : "+x"(sum));
  return sum;
}
inline __m256i add_32(__m256i sum, __m256i part) {
  sum = _mm256_add_epi32(sum, part);
  __asm__("" : "+x"(sum));
  return sum;
}

__m256i broadcast_word(const void* data) {
  std::int32_t word;
  std::memcpy(&word, data, sizeof(word));
  return _mm256_set1_epi32(word);
}

/// How codes of 4 and 2 bits are multiplied.
template <int bits>
struct NarrowDot {
  using Code = std::int8_t;
  static constexpr int kDepth = 32 / bits;
  static constexpr int kPlanes = 8 / bits;
  // So many lines of sums of pairs, each at most 2 · (2^bits − 1) · 128, fit 16 bits.
  static constexpr std::int64_t kSafeLines = 32767 / (2 * ((1 << bits) - 1) * 128) / kPlanes;

  /// total[t] += Σ code_w·code_x over `count` lines, for the 8 rows at `lines`.
  template <int tokens>
  static void add(const std::byte* lines, std::int64_t count, const Code* x, std::int64_t stride,
                  __m256i (&total)[tokens]) {
    const __m256i mask = _mm256_set1_epi8((1 << bits) - 1), ones = _mm256_set1_epi16(1);
    for (std::int64_t first = 0; first < count; first += kSafeLines) {
      __m256i pairs[tokens];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) pairs[t] = _mm256_setzero_si256();
      const std::int64_t end = std::min(count, first + kSafeLines);
      for (std::int64_t i = first; i < end; ++i) {
        const std::byte* line = lines + i * kLineBytes;
        _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
        QUANTAL_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
          const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(words, bits * plane), mask);
          QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
            const __m256i values = broadcast_word(x + t * stride + i * kDepth + 4L * plane);
            pairs[t] = add_16(pairs[t], _mm256_maddubs_epi16(codes, values));
          }
        }
      }
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(pairs[t], ones));
      }
    }
  }
};

/// How codes of 8 bits, stored as code + 128, are multiplied.
struct ByteDot {
  using Code = std::int16_t;  ///< columns 0, 2, 1, 3 of every four
  static constexpr int kDepth = 4;

  template <int tokens>
  static void add(const std::byte* lines, std::int64_t count, const Code* x, std::int64_t stride,
                  __m256i (&total)[tokens]) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::byte* line = lines + i * kLineBytes;
      _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
      const __m256i even = _mm256_and_si256(words, low), odd = _mm256_srli_epi16(words, 8);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        const Code* values = x + t * stride + i * kDepth;
        total[t] = add_32(total[t], _mm256_madd_epi16(even, broadcast_word(values)));
        total[t] = add_32(total[t], _mm256_madd_epi16(odd, broadcast_word(values + 2)));
      }
    }
  }
};

/// The tokens of a call as a dot product wants them.
template <typename Dot>
class Codes;

template <int bits>
class Codes<NarrowDot<bits>> {
 public:
  Codes(const TokenCodes& x, const ParallelFor&) : x_(x) {}
  const std::int8_t* token(std::int64_t t) const { return x_.codes(t); }
  std::int64_t stride() const { return x_.stride(); }

 private:
  const TokenCodes& x_;
};

template <>
class Codes<ByteDot> {
 public:
  Codes(const TokenCodes& x, const ParallelFor& parallel_for)
      : stride_(x.stride() + 32), wide_((x.tokens() * stride_ + 1) / 2) {
    parallel_for(x.tokens(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) widen(x.codes(t), x.stride(), token(t));
    });
  }
  std::int16_t* token(std::int64_t t) const {
    return reinterpret_cast<std::int16_t*>(wide_.data()) + t * stride_;
  }
  std::int64_t stride() const { return stride_; }

 private:
  // `count` is a multiple of 64. What lies behind the padded columns is not read.
  static void widen(const std::int8_t* from, std::int64_t count, std::int16_t* to) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    for (std::int64_t i = 0; i < count; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order)));
    }
  }

  std::int64_t stride_;
  Scratch wide_;
};

/// Up to 8 tokens by one tile.
template <typename Dot, int tokens>
class TileSums {
 public:
  TileSums(const PackedLayout& layout, const TokenCodes& x, const Codes<Dot>& codes,
           std::int64_t first_token)
      : layout_(layout), x_(x), codes_(codes), first_(first_token) {}

  void add_group(const std::byte* tile, std::int64_t group, int half) {
    const HalfScales scales(layout_, tile, group, half);
    const std::byte* lines = tile + layout_.group_offset(group) + half * (kLineBytes / 2);
    const auto* columns = codes_.token(first_) + layout_.padded_begin(group);
    const std::int64_t count = layout_.group_lines(group);
    constexpr std::int64_t kBlockLines = kBlockColumns / Dot::kDepth;
    for (std::int64_t block = 0; block < x_.blocks_per_group(); ++block) {
      const std::int64_t begin = std::min(count, block * kBlockLines);
      const std::int64_t end = std::min(count, begin + kBlockLines);
      __m256i total[tokens];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) total[t] = _mm256_setzero_si256();
      Dot::add(lines + begin * kLineBytes, end - begin, columns + begin * Dot::kDepth,
               codes_.stride(), total);
      add_scaled(total, scales, group * x_.blocks_per_group() + block, half);
    }
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
  const std::int64_t width = std::max<std::int64_t>(1, layout.group_lines(0) * layout.depth());
  const std::int64_t chunk = std::max<std::int64_t>(1, kChunkColumns / width);
  for (std::int64_t first = 0; first < layout.groups(); first += chunk) {
    const std::int64_t end = std::min(layout.groups(), first + chunk);
    for (int half = 0; half < 2; ++half) {
      for (std::int64_t group = first; group < end; ++group) sums.add_group(data, group, half);
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
void run(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
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

void integer_linear__avx2(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  if (args.source.tokens == 0) return;
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return run<NarrowDot<2>>(args, parallel_for);
    case QTypeId::kInt4:
      return run<NarrowDot<4>>(args, parallel_for);
    default:
      return run<ByteDot>(args, parallel_for);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
