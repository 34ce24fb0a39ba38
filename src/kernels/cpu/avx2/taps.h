#pragma once

// Included by files for AVX2 and what it is a part of, below their target pragma: a convolution by
// taps over any way to multiply codes. The 16 rows of a tile by up to 6 tokens stay in registers.
//
// A Dot multiplies steps of four columns:
//   Dot::kStepBytes                 of a tile's panel
//   Dot::Code                       of x
//   Dot::decode(lines, step, to, offset)
//                                   puts one there; what it adds to sums too much, to offset
//   Dot::add(step, x, stride, sums) sums[t][half] += products of the token at x + t · stride

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/avx2/rows.h"
#include "kernels/cpu/tap_product.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;

/// Both halves of 16 words, or of 16 rows' numbers.
struct HalfPair {
  __m256i low, high;
};
inline HalfPair load_pair(const void* from) {
  const auto* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_pair(const HalfPair& pair, void* to) {
  auto* halves = static_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, pair.low);
  _mm256_storeu_si256(halves + 1, pair.high);
}

// [from][to]: byte `from` of each word goes to its byte `to`, zeros to the others.
constexpr auto kPicks = [] {
  std::array<std::array<std::array<std::uint8_t, 32>, 4>, 4> order{};
  for (int from = 0; from < 4; ++from) {
    for (int to = 0; to < 4; ++to) {
      for (int i = 0; i < 32; ++i) {
        order[from][to][i] = static_cast<std::uint8_t>(i % 4 == to ? i % 16 / 4 * 4 + from : 0x80);
      }
    }
  }
  return order;
}();

/// One step of a tile's lines: the codes of its j-th column are byte order[j] of each word, signed;
/// zeros for none.
inline HalfPair gather_step(const std::byte* lines, const TapStep& step,
                            const std::array<int, 4>& order) {
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80));
  HalfPair words{_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int j = 0; j < 4; ++j) {
    const std::int32_t column = step.columns[j];
    if (column < 0) continue;
    const HalfPair line = load_pair(lines + column / 4 * kLineBytes);
    const __m256i pick =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPicks[column % 4][order[j]].data()));
    const auto picked = [&](__m256i half) __attribute__((always_inline)) {
      return _mm256_shuffle_epi8(_mm256_xor_si256(half, offset), pick);
    };
    words.low = _mm256_or_si256(words.low, picked(line.low));
    words.high = _mm256_or_si256(words.high, picked(line.high));
  }
  if (step.rows == 0xFFFF) return words;
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const auto chosen = [&](int rows) __attribute__((always_inline)) {
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(rows), bits), bits);
  };
  return {_mm256_and_si256(words.low, chosen(step.rows & 0xFF)),
          _mm256_and_si256(words.high, chosen(step.rows >> 8))};
}

template <typename Dot>
std::int64_t panel_bytes(const TapPlan& plan) {
  return TapConvKernel::kHeadBytes + plan.step_count() * Dot::kStepBytes;
}

// A tile after the other: what its sums begin with, then its steps.
template <typename Dot>
void decode_steps(const TapPlan& plan, const PackedLayout& layout, const std::byte* weight,
                  int tiles, std::byte* panel) {
  for (int j = 0; j < tiles; ++j, panel += panel_bytes<Dot>(plan)) {
    const std::byte* lines = weight + j * layout.tile_bytes() + layout.group_offset(0);
    std::byte* to = panel + TapConvKernel::kHeadBytes;
    HalfPair offset{_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (std::int64_t i = 0; i < plan.step_count(); ++i, to += Dot::kStepBytes) {
      Dot::decode(lines, plan.steps()[i], to, offset);
    }
    const __m256i zero = _mm256_setzero_si256();
    store_pair({_mm256_sub_epi32(zero, offset.low), _mm256_sub_epi32(zero, offset.high)}, panel);
  }
}

template <typename Dot>
struct HalvesProduct {
  using Code = typename Dot::Code;
  static std::int64_t panel_bytes(const TapPlan& plan) { return kernels::panel_bytes<Dot>(plan); }

  template <int tokens, std::int64_t total_stride>
  static void multiply(const TapPlan& plan, const Code* x, std::int64_t stride,
                       const std::byte* panel, std::int32_t* totals) {
    const HalfPair begin = load_pair(panel);
    panel += TapConvKernel::kHeadBytes;
    __m256i sums[tokens][2];
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) sums[t][0] = begin.low, sums[t][1] = begin.high;
    const TapRun* runs = plan.runs();
    for (std::int64_t r = 0; r < plan.run_count(); ++r) {
      const Code* run = x + runs[r].offset;
      for (std::int64_t k = 0; k < runs[r].units; ++k, run += 4, panel += Dot::kStepBytes) {
        Dot::add(panel, run, stride, sums);
      }
    }
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      store_pair({sums[t][0], sums[t][1]}, totals + t * total_stride);
    }
  }
};

template <FloatType type>
class TapStore {
 public:
  TapStore(const TapBlock& block, int tile)
      : y_(static_cast<std::byte*>(block.y) + tile * kTileRows * size_of(type)),
        stride_(block.y_stride),
        x_scale_(_mm256_set1_ps(block.x_scale)) {
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = tile * kTileRows + half * kHalfRows;
      const std::byte* weight = block.weight + tile * block.layout.tile_bytes();
      scale_[half] = HalfScales(block.layout, weight, 0, half).scale;
      rows_[half] = std::clamp<std::int64_t>(block.rows - row, 0, kHalfRows);
      bias_[half] =
          rows_[half] > 0 ? load_bias(block.bias, row, rows_[half], type) : _mm256_setzero_ps();
    }
  }

  void store(std::int64_t position, const std::int32_t* totals) const {
    const HalfPair total = load_pair(totals);
    store_half(position, total.low, 0);
    if (rows_[1] > 0) store_half(position, total.high, 1);
  }

 private:
  void store_half(std::int64_t position, __m256i total, int half) const {
    const __m256 sum =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale_[half], _mm256_setzero_ps());
    store_rows(y_, position * stride_ + half * kHalfRows, type, rows_[half],
               _mm256_fmadd_ps(sum, x_scale_, bias_[half]));
  }

  std::byte* y_;
  std::int64_t stride_;
  __m256 x_scale_, scale_[2], bias_[2];
  std::int64_t rows_[2];
};

}  // namespace
}  // namespace quantal::kernels
