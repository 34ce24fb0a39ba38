#pragma once

// Included by this folder's files only, below their target pragma.
//
// The loops of every linear of this folder, over two small types:
//   a Line takes 64 bytes of the packed weight apart into `kSteps` registers, each of which has 4
//   bytes for each of the tile's 16 rows: one fp32 weight, two of bf16 or four of 8 bits;
//   a Product multiplies such a register by 4 bytes of a token and adds to 16 sums.
//
// Few tokens: memory is the limit. Several tiles are read at once, in streams that are far from
// each other, and every line is decoded in registers. Many tokens: a chunk of two tiles is decoded
// into panels that stay in a near cache, and 12 tokens by 32 rows of the result stay in 24
// registers. Meanwhile the next chunk comes from memory, and the next tokens from the second-level
// cache.

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/output.h"
#include "kernels/cpu/avx512/rows.h"
#include "kernels/cpu/detect.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr int kFewTokens = 16;  ///< as QUANTAL_UNROLL goes: sums stay in registers
constexpr int kBlockTokens = 12;
constexpr std::int64_t kMostStripTokens = 1024;
constexpr std::int64_t kStripBytes = 8 << 20;  ///< of tokens: a part of the third-level cache
constexpr int kMostSegments = 16;

/// Steps of a panel: two of 8 KiB stay in the first-level cache; two of 32 KiB come from the
/// second, which costs many tokens less than taking sums up and putting them down four times as
/// often.
constexpr std::int64_t panel_steps(std::int64_t tokens) { return tokens < 128 ? 128 : 512; }

/// Tokens that are multiplied at once, with others of zeros: every number of tokens would be one
/// more function.
constexpr std::int64_t padded_tokens(std::int64_t tokens) {
  if (tokens <= 4 || tokens > kFewTokens) return tokens;
  if (tokens <= 8) return tokens <= 6 ? 6 : 8;
  return (tokens + 3) / 4 * 4;
}

/// How tokens lie in memory for a product: in blocks, [word][token of the block]. Few tokens are
/// one block, and padded.
struct TokenBlocks {
  explicit TokenBlocks(std::int64_t count)
      : given(count),
        tokens(padded_tokens(count)),
        most(count <= kFewTokens ? tokens : kBlockTokens) {}

  std::int64_t count() const { return (tokens + most - 1) / most; }

  std::int64_t first(std::int64_t block) const { return block * most; }
  std::int64_t width(std::int64_t block) const { return std::min(most, tokens - first(block)); }
  std::int64_t present(std::int64_t block) const {
    return std::min(width(block), given - first(block));
  }

  /// Puts words [begin, begin + count) of a block's tokens there, of `words` that a token has.
  /// Those of one token are together, `stride` from the next one's.
  void put(std::int64_t block, const std::int32_t* rows, std::int64_t stride, std::int64_t begin,
           std::int64_t count, std::int64_t words, std::int32_t* blocks) const {
    const std::int64_t wide = width(block), here = present(block);
    std::int32_t* to = blocks + first(block) * words + begin * wide;
    const std::int64_t squares = count / 4 * 4;
    std::int64_t t = 0;
    for (; t + 4 <= wide; t += 4) {
      for (std::int64_t j = 0; j < squares; j += 4) {
        __m128 four[4];
        for (int i = 0; i < 4; ++i) {
          const auto* row = reinterpret_cast<const float*>(rows + (t + i) * stride + j);
          four[i] = t + i < here ? _mm_loadu_ps(row) : _mm_setzero_ps();
        }
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int i = 0; i < 4; ++i) {
          _mm_storeu_ps(reinterpret_cast<float*>(to + (j + i) * wide + t), four[i]);
        }
      }
    }
    // What no square has.
    for (std::int64_t rest = 0; rest < wide; ++rest) {
      for (std::int64_t j = rest < t ? squares : 0; j < count; ++j)
        to[j * wide + rest] = rest < here ? rows[rest * stride + j] : 0;
    }
  }

  std::int64_t given;
  std::int64_t tokens;  ///< with those of zeros
  std::int64_t most;    ///< of a block
};

/// What a product is made of, whatever the types.
struct Job {
  const PackedLayout* layout;
  const std::byte* weight;
  std::int64_t tokens;
  const std::int32_t* x;  ///< TokenBlocks; groups have whole lines
  std::int64_t steps;     ///< of a token
  /// Σ x of each block of each group, TokenBlocks too, fp32 or int32 as the Product has it; null
  /// where the Product has no use for them.
  const std::int32_t* x_sums;
  std::int64_t blocks_per_group;
  std::int64_t block_lines;
  Output out;

  const std::byte* tile(std::int64_t index) const { return weight + index * layout->tile_bytes(); }
  const std::int32_t* block(std::int64_t token) const { return x + token * steps; }
  /// Of the tokens of a block, `first` the first of them.
  const std::int32_t* block_sums(std::int64_t first) const {
    return x_sums == nullptr ? nullptr : x_sums + first * layout->groups() * blocks_per_group;
  }
};

// total[tile][token] = Σ weight·x over `count` lines of each tile. A sum of few tokens is kept in
// several chains, since one would wait for each addition.
template <typename Line, typename Product, int tiles, int tokens>
inline __attribute__((always_inline)) void sum_lines(
    const std::byte* const (&from)[tiles], std::int64_t count, const std::int32_t* x,
    std::int64_t ahead, typename Product::Sum (&total)[tiles][tokens]) {
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
      _mm_prefetch(reinterpret_cast<const char*>(line) + ahead, _MM_HINT_T0);
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
  const std::int32_t *x = job.x, *x_sums = job.x_sums;
  const std::int64_t ahead = prefetch_bytes();
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
      sum_lines<Line, Product, tiles, tokens>(from, count, x, ahead, total);
      x += count * Line::kSteps * tokens;
      QUANTAL_UNROLL for (int s = 0; s < tiles; ++s) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          sums[s][t] = Product::apply(sums[s][t], total[s][t], scales[s], x_sums, t);
        }
      }
      if (x_sums != nullptr) x_sums += tokens;
    }
  }
  for (int s = 0; s < tiles; ++s) {
    for (int t = 0; t < std::min<std::int64_t>(tokens, job.tokens); ++t) {
      store_rows(job.out, first + s * distance, t, sums[s][t]);
    }
  }
}

template <typename Line, typename Product, int tokens>
void few_tokens(const Job& job, const ParallelFor& parallel_for) {
  // More streams of several tokens would not fit the registers.
  constexpr int kStreams = tokens == 1 ? 4 : tokens <= kBlockTokens ? 2 : 1;
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

/// Consecutive steps of two tiles in one block of a group, decoded: a register a step.
struct Segment {
  const std::byte* tiles[2];
  std::int64_t steps;
  bool is_first;  ///< of the block
  bool is_last;
  TileScales scales[2];
  std::int64_t block;  ///< of a token's x_sums
};

/// Consecutive segments that are multiplied by all tokens while they are in the cache.
struct Panel {
  const Segment* segments;
  int count;
  std::int64_t step;        ///< of a token, where it begins
  std::int64_t next_bytes;  ///< of what comes next, for every step of this one
};

/// The results of a strip of tokens by two tiles: [token][tile], 64 bytes each.
struct Strip {
  std::int64_t first;  ///< token
  float* totals;       ///< of a block, between its panels
  float* sums;
};

/// The tokens of a block, and what is wanted next.
struct PanelTokens {
  std::int64_t first;
  const std::int32_t* next_x;
  const std::byte* next_weight;  ///< may be null
};

template <typename Product, int tokens>
void multiply_panel(const Job& job, const Panel& panel, const PanelTokens& block,
                    const Strip& strip) {
  using Sum = typename Product::Sum;
  float* totals = strip.totals + (block.first - strip.first) * 2 * kTileRows;
  float* sums = strip.sums + (block.first - strip.first) * 2 * kTileRows;
  const std::int32_t* x = job.block(block.first) + panel.step * tokens;
  const std::int32_t *x_sums = job.block_sums(block.first), *next_x = block.next_x;
  const std::byte* next_weight = block.next_weight;
  for (const Segment *segment = panel.segments, *end = segment + panel.count; segment != end;
       ++segment) {
    Sum total[tokens][2];
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int s = 0; s < 2; ++s) {
        total[t][s] =
            segment->is_first ? Product::zero() : Product::load(totals + (2 * t + s) * kTileRows);
      }
    }
    const std::byte *low = segment->tiles[0], *high = segment->tiles[1];
    for (std::int64_t i = segment->steps; i > 0; --i) {
      const __m512i weights[2] = {_mm512_loadu_si512(low), _mm512_loadu_si512(high)};
      _mm_prefetch(reinterpret_cast<const char*>(next_x), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(next_weight), _MM_HINT_T1);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        const __m512i value = _mm512_set1_epi32(x[t]);
        Product::add(total[t][0], weights[0], value);
        Product::add(total[t][1], weights[1], value);
      }
      low += kLineBytes, high += kLineBytes, x += tokens;
      next_x += tokens, next_weight += panel.next_bytes;
    }
    if (segment->is_last) {
      const std::int32_t* sum = x_sums == nullptr ? nullptr : x_sums + segment->block * tokens;
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        QUANTAL_UNROLL for (int s = 0; s < 2; ++s) {
          float* at = sums + (2 * t + s) * kTileRows;
          const __m512 before = _mm512_loadu_ps(at);
          _mm512_storeu_ps(at, Product::apply(before, total[t][s], segment->scales[s], sum, t));
        }
      }
    } else {
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        QUANTAL_UNROLL for (int s = 0; s < 2; ++s) {
          Product::store(totals + (2 * t + s) * kTileRows, total[t][s]);
        }
      }
    }
  }
}

template <typename Product, int... counts>
constexpr auto panel_multipliers(std::integer_sequence<int, counts...>) {
  using Multiply = void (*)(const Job&, const Panel&, const PanelTokens&, const Strip&);
  return std::array<Multiply, sizeof...(counts)>{multiply_panel<Product, counts + 1>...};
}

// Takes lines apart into a register a step; a Line that is its register stays where it is.
template <typename Line>
const std::byte* decode_lines(const std::byte* lines, std::int64_t count, float* panel) {
  if constexpr (Line::kSteps == 1) return lines;
  float* out = panel;
  for (std::int64_t i = 0; i < count; ++i) {
    Line line;
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
  TilePair(const Job& job, std::int64_t strip_tokens)
      : job_(job),
        strip_tokens_(strip_tokens),
        panel_steps_(panel_steps(job.tokens)),
        panels_(2 * panel_steps_ * kTileRows),
        totals_(strip_tokens * 2 * kTileRows),
        sums_(strip_tokens * 2 * kTileRows) {}

  void multiply(std::int64_t pair, std::int64_t first_token) {
    strip_ = {first_token, totals_.data(), sums_.data()};
    end_ = std::min(job_.tokens, first_token + strip_tokens_);
    const PackedLayout& layout = *job_.layout;
    const std::int64_t tiles = layout.tiles();
    // An odd tile is multiplied twice and stored once.
    const std::int64_t index[2] = {2 * pair, std::min(2 * pair + 1, tiles - 1)};
    std::memset(strip_.sums, 0, strip_tokens_ * 2 * kTileRows * sizeof(float));
    step_ = filled_ = count_ = 0;
    for (std::int64_t g = 0; g < layout.groups(); ++g) {
      const std::byte* tile[2] = {job_.tile(index[0]), job_.tile(index[1])};
      Segment segment{.scales = {{layout, tile[0], g}, {layout, tile[1], g}}};
      for (auto& lines : tile) lines += layout.group_offset(g);
      const std::int64_t lines = layout.group_lines(g);
      for (std::int64_t b = 0; b < job_.blocks_per_group; ++b) {
        segment.block = g * job_.blocks_per_group + b;
        const std::int64_t end = std::min(lines, (b + 1) * job_.block_lines);
        add_block(tile, std::min(lines, b * job_.block_lines), end, segment);
      }
    }
    // What comes next is the next pair.
    for (int s = 0; s < 2; ++s) next_[s] = job_.tile(std::min(index[s] + 2, tiles - 1));
    multiply_segments();
    for (std::int64_t t = first_token; t < end_; ++t) {
      const float* sums = strip_.sums + 2 * (t - first_token) * kTileRows;
      store_rows(job_.out, index[0], t, _mm512_loadu_ps(sums));
      if (index[1] > index[0]) store_rows(job_.out, index[1], t, _mm512_loadu_ps(sums + kTileRows));
    }
  }

 private:
  static constexpr std::int64_t kScaleLines = 2;  ///< of a group, at most
  static constexpr auto kMultiply =
      panel_multipliers<Product>(std::make_integer_sequence<int, kBlockTokens>());

  // Lines [begin, end) of a group. An empty block still has its term.
  void add_block(const std::byte* const (&tile)[2], std::int64_t begin, std::int64_t end,
                 Segment& segment) {
    std::int64_t i = begin;
    do {
      const std::int64_t room = (panel_steps_ - filled_) / Line::kSteps;
      const std::int64_t count = std::min(end - i, room);
      for (int s = 0; s < 2; ++s) {
        float* panel = panels_.data() + (s * panel_steps_ + filled_) * kTileRows;
        segment.tiles[s] = decode_lines<Line>(tile[s] + i * kLineBytes, count, panel);
        // The scales behind the last line were among the lines that came before.
        next_[s] = tile[s] + (i + count + kScaleLines) * kLineBytes;
      }
      segment.steps = count * Line::kSteps;
      segment.is_first = i == begin;
      i += count;
      segment.is_last = i == end;
      segments_[count_++] = segment;
      filled_ += segment.steps;
      if (filled_ + Line::kSteps > panel_steps_ || count_ == kMostSegments) multiply_segments();
    } while (i < end);
  }

  // By all tokens of the strip.
  void multiply_segments() {
    if (count_ == 0) return;
    // As many bytes as this panel had, lines and scales.
    const std::int64_t bytes = (filled_ / Line::kSteps + kScaleLines * count_) * kLineBytes;
    const Panel panel{.segments = segments_,
                      .count = count_,
                      .step = step_,
                      .next_bytes = filled_ == 0 ? 0 : (bytes + filled_ - 1) / filled_};
    for (std::int64_t t = strip_.first; t < end_; t += kBlockTokens) {
      const std::int64_t count = tokens_at(t), following = t + kBlockTokens;
      PanelTokens tokens{.first = t, .next_x = nullptr, .next_weight = nullptr};
      tokens.next_x = following < end_
                          ? job_.block(following) + step_ * tokens_at(following)
                          : job_.block(strip_.first) + (step_ + filled_) * tokens_at(strip_.first);
      // The first two blocks fetch a tile each.
      const std::int64_t index = (t - strip_.first) / kBlockTokens;
      if (index < 2) tokens.next_weight = next_[index];
      kMultiply[count - 1](job_, panel, tokens, strip_);
    }
    step_ += filled_;
    filled_ = count_ = 0;
  }

  std::int64_t tokens_at(std::int64_t first) const {
    return std::min<std::int64_t>(kBlockTokens, job_.tokens - first);
  }

  const Job& job_;
  std::int64_t strip_tokens_;
  std::int64_t panel_steps_;
  Scratch panels_, totals_, sums_;
  Segment segments_[kMostSegments];
  Strip strip_{};
  std::int64_t end_ = 0;     ///< of the strip's tokens
  std::int64_t step_ = 0;    ///< of a token, where the panel begins
  std::int64_t filled_ = 0;  ///< steps in the panel
  int count_ = 0;            ///< segments in the panel
  const std::byte* next_[2]{};
};

// Strips of equal length: every one decodes the whole weight.
inline std::int64_t strip_tokens(const Job& job) {
  const std::int64_t tokens = job.tokens;
  const std::int64_t fitting = kStripBytes / (job.steps * 4 + 1);
  const std::int64_t most = std::clamp<std::int64_t>(fitting, kBlockTokens, kMostStripTokens);
  const std::int64_t strips = (tokens + most - 1) / most;
  const std::int64_t blocks = (tokens + strips * kBlockTokens - 1) / (strips * kBlockTokens);
  return blocks * kBlockTokens;
}

template <typename Line, typename Product>
void many_tokens(const Job& job, const ParallelFor& parallel_for) {
  const std::int64_t strip = strip_tokens(job);
  parallel_for((job.layout->tiles() + 1) / 2, [&](std::int64_t begin, std::int64_t end) {
    TilePair<Line, Product> tiles(job, strip);
    for (std::int64_t t = 0; t < job.tokens; t += strip) {
      for (std::int64_t pair = begin; pair < end; ++pair) tiles.multiply(pair, t);
    }
  });
}

template <typename Line, typename Product, int... counts>
bool multiply_few(const Job& job, const ParallelFor& parallel_for,
                  std::integer_sequence<int, counts...>) {
  const std::int64_t tokens = padded_tokens(job.tokens);
  return ((tokens == counts && (few_tokens<Line, Product, counts>(job, parallel_for), true)) ||
          ...);
}

template <typename Line, typename Product>
void multiply(const Job& job, const ParallelFor& parallel_for) {
  constexpr std::integer_sequence<int, 1, 2, 3, 4, 6, 8, 12, 16> kCounts;
  if (!multiply_few<Line, Product>(job, parallel_for, kCounts)) {
    many_tokens<Line, Product>(job, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
