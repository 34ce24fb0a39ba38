#pragma once

// Included by this folder's files only, below their target pragma.
//
// The loops of every linear of this folder, over two small types:
//   a Line takes 64 bytes of the packed weight apart into `kSteps` registers, each of which has 4
//   bytes for each of the tile's 16 rows: one fp32 weight, two of bf16 or four of 8 bits;
//   a Product multiplies such a register by 4 bytes of a token and adds to 16 sums.
//
// Few tokens: memory is the limit. Four tiles are read at once, in four streams that are far from
// each other, and every line is decoded in registers.
// Many tokens: a chunk of two tiles is decoded into panels that stay in the first-level cache, and
// 12 tokens by 32 rows of the result stay in 24 registers. Tokens are taken in strips that stay in
// the second-level cache for all tiles of a thread.

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/rows.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr int kFewTokens = 4;
constexpr int kBlockTokens = 12;
constexpr std::int64_t kStripTokens = 8 * kBlockTokens;
constexpr std::int64_t kPanelSteps = 128;  ///< two panels of 8 KiB, and 6 KiB of 12 tokens
constexpr std::int64_t kPrefetchBytes = 2048;

/// What a product is made of, whatever the types.
struct Job {
  const PackedLayout* layout;
  const std::byte* weight;
  std::int64_t tokens;
  /// For each block of kBlockTokens tokens, [step][token of the block]; groups have whole lines.
  const std::int32_t* x;
  std::int64_t steps;  ///< of a token
  /// Σ x of each block of a group, [token][group][block], fp32 or int32 as the Product has it.
  const void* x_sums;
  std::int64_t blocks_per_group;
  std::int64_t block_lines;
  const float* scales;  ///< a token; null: 1
  FloatType type;       ///< of y and bias
  void* y;
  std::int64_t y_stride;
  const void* bias;

  const std::byte* tile(std::int64_t index) const { return weight + index * layout->tile_bytes(); }
  const std::int32_t* block(std::int64_t token) const { return x + token * steps; }
  template <typename T>
  T x_sum(std::int64_t token, std::int64_t block) const {
    if (x_sums == nullptr) return 0;
    return static_cast<const T*>(x_sums)[token * layout->groups() * blocks_per_group + block];
  }
};

/// block[step][t] = row[step]
inline void interleave(const std::int32_t* row, std::int64_t steps, std::int64_t t,
                       std::int64_t tokens, std::int32_t* block) {
  for (std::int64_t i = 0; i < steps; ++i) block[i * tokens + t] = row[i];
}

inline void store_rows(const Job& job, std::int64_t tile, std::int64_t token, __m512 sum) {
  const std::int64_t row = tile * kTileRows;
  const __mmask16 lanes = first_lanes(job.layout->spec().rows - row);
  const __m512 bias =
      job.bias != nullptr ? load_floats(job.bias, row, job.type, lanes) : _mm512_setzero_ps();
  const __m512 scale = _mm512_set1_ps(job.scales != nullptr ? job.scales[token] : 1.0F);
  store_floats(job.y, token * job.y_stride + row, job.type, lanes,
               _mm512_fmadd_ps(sum, scale, bias));
}

// Calls body(step) for every step of a line, with the step known at compile time.
template <int steps, typename Body>
inline __attribute__((always_inline)) void for_steps(const Body& body) {
  [&]<int... step>(std::integer_sequence<int, step...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, step>()), ...);
  }(std::make_integer_sequence<int, steps>());
}

// total[tile][token] = Σ weight·x over `count` lines of each tile. A sum of few tokens is kept in
// several chains, since one would wait for each addition.
template <typename Line, typename Product, int tiles, int tokens>
inline __attribute__((always_inline)) void sum_lines(
    const std::byte* const (&from)[tiles], std::int64_t count, const std::int32_t* x,
    typename Product::Sum (&total)[tiles][tokens]) {
  constexpr int kChains = std::min(Line::kSteps, tokens <= 2 ? 2 : 1);
  typename Product::Sum sums[kChains][tiles][tokens];
  QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) {
    QUANTAL_UNROLL for (int s = 0; s < tiles; ++s) {
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) sums[c][s][t] = Product::zero();
    }
  }
  for (std::int64_t i = 0; i < count; ++i, x += Line::kSteps * tokens) {
    Line lines[tiles];
    QUANTAL_UNROLL for (int s = 0; s < tiles; ++s) {
      const std::byte* line = from[s] + i * kLineBytes;
      _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
      lines[s].load(line);
    }
    for_steps<Line::kSteps>([&](auto step) __attribute__((always_inline)) {
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        const __m512i value = _mm512_set1_epi32(x[step * tokens + t]);
        QUANTAL_UNROLL for (int s = 0; s < tiles; ++s) {
          Product::add(sums[step % kChains][s][t], lines[s].template get<step>(), value);
        }
      }
    });
  }
  QUANTAL_UNROLL for (int s = 0; s < tiles; ++s) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      total[s][t] = sums[0][s][t];
      QUANTAL_UNROLL for (int c = 1; c < kChains; ++c) {
        total[s][t] = Product::join(total[s][t], sums[c][s][t]);
      }
    }
  }
}

/// `tiles` tiles, `distance` from each other, by all tokens.
template <typename Line, typename Product, int tiles, int tokens>
void multiply_streams(const Job& job, std::int64_t first, std::int64_t distance) {
  const PackedLayout& layout = *job.layout;
  __m512 sums[tiles][tokens];
  for (auto& tile : sums) std::fill_n(tile, tokens, _mm512_setzero_ps());
  const std::int32_t* x = job.x;
  for (std::int64_t g = 0; g < layout.groups(); ++g) {
    TileScales scales[tiles];
    for (int s = 0; s < tiles; ++s) {
      scales[s] = TileScales(layout, job.tile(first + s * distance), g);
    }
    const std::int64_t lines = layout.group_lines(g);
    for (std::int64_t b = 0; b < job.blocks_per_group; ++b) {
      const std::int64_t begin = std::min(lines, b * job.block_lines);  // a block may be empty
      const std::int64_t count = std::min(lines - begin, job.block_lines);
      const std::byte* from[tiles];
      for (int s = 0; s < tiles; ++s) {
        from[s] = job.tile(first + s * distance) + layout.group_offset(g) + begin * kLineBytes;
      }
      typename Product::Sum total[tiles][tokens];
      sum_lines<Line, Product, tiles, tokens>(from, count, x, total);
      x += count * Line::kSteps * tokens;
      QUANTAL_UNROLL for (int s = 0; s < tiles; ++s) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          const auto x_sum = job.x_sum<typename Product::XSum>(t, g * job.blocks_per_group + b);
          sums[s][t] = Product::apply(sums[s][t], total[s][t], scales[s], x_sum);
        }
      }
    }
  }
  for (int s = 0; s < tiles; ++s) {
    for (int t = 0; t < tokens; ++t) store_rows(job, first + s * distance, t, sums[s][t]);
  }
}

template <typename Line, typename Product, int tokens>
void few_tokens(const Job& job, const ParallelFor& parallel_for) {
  // More streams of several tokens would not fit the registers.
  constexpr int kStreams = tokens == 1 ? 4 : 2;
  parallel_for(job.layout->tiles(), [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t distance = (end - begin) / kStreams;
    for (std::int64_t i = 0; i < distance; ++i) {
      multiply_streams<Line, Product, kStreams, tokens>(job, begin + i, distance);
    }
    for (std::int64_t i = begin + distance * kStreams; i < end; ++i) {
      multiply_streams<Line, Product, 1, tokens>(job, i, 0);
    }
  });
}

/// A chunk of two tiles, decoded: a register a step.
struct Panel {
  const std::byte* tiles[2];
  std::int64_t steps;
  std::int64_t step;  ///< of a token, where it begins
  bool is_first;      ///< of a block
  bool is_last;
  TileScales scales[2];
  std::int64_t block;  ///< of a token's x_sums
};

/// The results of a strip of tokens by two tiles: [token][tile], 64 bytes each.
struct Strip {
  std::int64_t first;  ///< token
  float* totals;       ///< of the block, between its chunks
  float* sums;
};

template <typename Product, int tokens>
void multiply_panel(const Job& job, const Panel& panel, std::int64_t first, const Strip& strip) {
  using Sum = typename Product::Sum;
  float* totals = strip.totals + (first - strip.first) * 2 * kTileRows;
  float* sums = strip.sums + (first - strip.first) * 2 * kTileRows;
  Sum total[tokens][2];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int s = 0; s < 2; ++s) {
      total[t][s] =
          panel.is_first ? Product::zero() : Product::load(totals + (2 * t + s) * kTileRows);
    }
  }
  const std::int32_t* x = job.block(first) + panel.step * tokens;
  const std::byte *low = panel.tiles[0], *high = panel.tiles[1];
  for (std::int64_t i = 0; i < panel.steps; ++i, x += tokens) {
    const __m512i weights[2] = {_mm512_loadu_si512(low + i * kLineBytes),
                                _mm512_loadu_si512(high + i * kLineBytes)};
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const __m512i value = _mm512_set1_epi32(x[t]);
      Product::add(total[t][0], weights[0], value);
      Product::add(total[t][1], weights[1], value);
    }
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    const auto x_sum = job.x_sum<typename Product::XSum>(first + t, panel.block);
    QUANTAL_UNROLL for (int s = 0; s < 2; ++s) {
      const int at = (2 * t + s) * kTileRows;
      if (panel.is_last) {
        _mm512_storeu_ps(sums + at, Product::apply(_mm512_loadu_ps(sums + at), total[t][s],
                                                   panel.scales[s], x_sum));
      } else {
        Product::store(totals + at, total[t][s]);
      }
    }
  }
}

template <typename Product, int... counts>
constexpr auto panel_multipliers(std::integer_sequence<int, counts...>) {
  using Multiply = void (*)(const Job&, const Panel&, std::int64_t, const Strip&);
  return std::array<Multiply, sizeof...(counts)>{multiply_panel<Product, counts + 1>...};
}

// Takes lines apart into a register a step; a Line that is its register stays where it is.
template <typename Line>
const std::byte* decode_lines(const std::byte* lines, std::int64_t count, float* panel) {
  if constexpr (Line::kSteps == 1) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::byte* next = lines + (count + i) * kLineBytes;
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    }
    return lines;
  }
  float* out = panel;
  for (std::int64_t i = 0; i < count; ++i) {
    Line line;
    _mm_prefetch(reinterpret_cast<const char*>(lines + i * kLineBytes) + kPrefetchBytes,
                 _MM_HINT_T0);
    line.load(lines + i * kLineBytes);
    for_steps<Line::kSteps>([&](auto step) __attribute__((always_inline)) {
      _mm512_storeu_si512(out + step * kTileRows, line.template get<step>());
    });
    out += Line::kSteps * kTileRows;
  }
  return reinterpret_cast<const std::byte*>(panel);
}

/// A strip of tokens by two tiles.
template <typename Line, typename Product>
class TilePair {
 public:
  explicit TilePair(const Job& job)
      : job_(job),
        panels_(2 * kPanelSteps * kTileRows),
        totals_(kStripTokens * 2 * kTileRows),
        sums_(kStripTokens * 2 * kTileRows) {}

  void multiply(std::int64_t pair, std::int64_t first_token) {
    strip_ = {first_token, totals_.data(), sums_.data()};
    end_ = std::min(job_.tokens, first_token + kStripTokens);
    const PackedLayout& layout = *job_.layout;
    const std::int64_t tiles = layout.tiles();
    // An odd tile is multiplied twice and stored once.
    const std::int64_t index[2] = {2 * pair, std::min(2 * pair + 1, tiles - 1)};
    std::memset(strip_.sums, 0, kStripTokens * 2 * kTileRows * sizeof(float));
    std::int64_t step = 0;
    for (std::int64_t g = 0; g < layout.groups(); ++g) {
      const std::byte* tile[2] = {job_.tile(index[0]), job_.tile(index[1])};
      Panel panel{.scales = {{layout, tile[0], g}, {layout, tile[1], g}}};
      for (auto& lines : tile) lines += layout.group_offset(g);
      const std::int64_t lines = layout.group_lines(g);
      for (std::int64_t b = 0; b < job_.blocks_per_group; ++b) {
        panel.block = g * job_.blocks_per_group + b;
        const std::int64_t end = std::min(lines, (b + 1) * job_.block_lines);
        add_block(tile, std::min(lines, b * job_.block_lines), end, step, panel);
      }
      step += lines * Line::kSteps;
    }
    for (int s = 0; s < 2 && 2 * pair + s < tiles; ++s) {
      for (std::int64_t t = first_token; t < end_; ++t) {
        const float* sum = strip_.sums + (2 * (t - first_token) + s) * kTileRows;
        store_rows(job_, 2 * pair + s, t, _mm512_loadu_ps(sum));
      }
    }
  }

 private:
  static constexpr auto kMultiply =
      panel_multipliers<Product>(std::make_integer_sequence<int, kBlockTokens>());

  // Lines [begin, end) of a group whose first step is `step`. An empty block still has its term.
  void add_block(const std::byte* const (&tile)[2], std::int64_t begin, std::int64_t end,
                 std::int64_t step, Panel& panel) {
    constexpr std::int64_t kLines = kPanelSteps / Line::kSteps;
    std::int64_t i = begin;
    do {
      const std::int64_t count = std::min(end - i, kLines);
      for (int s = 0; s < 2; ++s) {
        panel.tiles[s] = decode_lines<Line>(tile[s] + i * kLineBytes, count,
                                            panels_.data() + s * kPanelSteps * kTileRows);
      }
      panel.steps = count * Line::kSteps;
      panel.step = step + i * Line::kSteps;
      panel.is_first = i == begin;
      panel.is_last = i + count == end;
      for (std::int64_t t = strip_.first; t < end_; t += kBlockTokens) {
        const std::int64_t tokens = std::min<std::int64_t>(kBlockTokens, end_ - t);
        kMultiply[tokens - 1](job_, panel, t, strip_);
      }
      i += count;
    } while (i < end);
  }

  const Job& job_;
  Scratch panels_, totals_, sums_;
  Strip strip_{};
  std::int64_t end_ = 0;  ///< of the strip's tokens
};

template <typename Line, typename Product>
void many_tokens(const Job& job, const ParallelFor& parallel_for) {
  parallel_for((job.layout->tiles() + 1) / 2, [&](std::int64_t begin, std::int64_t end) {
    TilePair<Line, Product> tiles(job);
    for (std::int64_t t = 0; t < job.tokens; t += kStripTokens) {
      for (std::int64_t pair = begin; pair < end; ++pair) tiles.multiply(pair, t);
    }
  });
}

template <typename Line, typename Product>
void multiply(const Job& job, const ParallelFor& parallel_for) {
  switch (job.tokens) {
    case 1:
      return few_tokens<Line, Product, 1>(job, parallel_for);
    case 2:
      return few_tokens<Line, Product, 2>(job, parallel_for);
    case 3:
      return few_tokens<Line, Product, 3>(job, parallel_for);
    case kFewTokens:
      return few_tokens<Line, Product, kFewTokens>(job, parallel_for);
    default:
      return many_tokens<Line, Product>(job, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
