#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma: weights and
// results of a convolution by taps.

#include <array>

#include "kernels/cpu/avx512/rows.h"
#include "kernels/tap_conv.h"

namespace quantal::kernels {
namespace {

// Byte b of each word of four, as all four of them.
constexpr auto kSpread = [] {
  std::array<std::array<std::uint8_t, 64>, 4> order{};
  for (int b = 0; b < 4; ++b) {
    for (int i = 0; i < 64; ++i) order[b][i] = static_cast<std::uint8_t>(i % 16 / 4 * 4 + b);
  }
  return order;
}();

/// One step of a tile's lines: the bytes of up to four columns, as signed codes; zeros for none.
inline __m512i gather_step(const std::byte* lines, const TapStep& step) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i words = offset;
  for_steps<4>([&](auto j) __attribute__((always_inline)) {
    const std::int32_t column = step.columns[j];
    if (column < 0) return;
    const __m512i line = _mm512_loadu_si512(lines + column / 4 * kLineBytes);
    const __m512i order = _mm512_loadu_si512(kSpread[column % 4].data());
    words = _mm512_mask_shuffle_epi8(words, __mmask64{0x1111111111111111} << j, line, order);
  });
  return _mm512_maskz_xor_epi32(step.rows, words, offset);
}

// The same of four channels of a kernel of 3 x 3, which are nine lines, for one tap of each.
template <int tap>
inline __attribute__((always_inline)) __m512i pick_tap(const __m512i (&lines)[9]) {
  // Byte b of each word becomes byte j by turning the word.
  __m512i words = _mm512_rol_epi32(lines[tap / 4], (32 - tap % 4 * 8) % 32);
  for_steps<3>([&](auto i) __attribute__((always_inline)) {
    constexpr int j = i + 1, column = j * 9 + tap;
    const __m512i order = _mm512_loadu_si512(kSpread[column % 4].data());
    words = _mm512_mask_shuffle_epi8(words, __mmask64{0x1111111111111111} << j, lines[column / 4],
                                     order);
  });
  return words;
}

/// Calls put(step, codes) for all steps of a tile's lines.
template <typename Put>
inline void decode_tile(const TapPlan& plan, const std::byte* lines, const Put& put) {
  const TapStep* steps = plan.steps();
  const std::int64_t count = plan.step_count();
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  if (plan.has_whole_steps() && plan.taps() == 1) {
    for (std::int64_t i = 0; i < plan.tap_step_count(); ++i) {
      put(i, _mm512_xor_si512(_mm512_loadu_si512(lines + i * kLineBytes), offset));
    }
    for (std::int64_t i = plan.tap_step_count(); i < count; ++i) put(i, _mm512_setzero_si512());
    return;
  }
  if (!plan.has_whole_steps() || plan.taps() != 9) {
    for (std::int64_t i = 0; i < count; ++i) put(i, gather_step(lines, steps[i]));
    return;
  }
  const std::int32_t* first = plan.tap_steps();
  for (std::int64_t c = 0; c < plan.tap_step_count(); ++c, lines += 9 * kLineBytes) {
    __m512i words[9];
    QUANTAL_UNROLL for (int i = 0; i < 9; ++i) {
      words[i] = _mm512_xor_si512(_mm512_loadu_si512(lines + i * kLineBytes), offset);
    }
    for_steps<9>([&](auto tap)
                     __attribute__((always_inline)) { put(first[tap] + c, pick_tap<tap>(words)); });
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (steps[i].columns[0] < 0) put(i, _mm512_setzero_si512());
  }
}

template <FloatType type>
class TapStore {
 public:
  TapStore(const TapBlock& block, int tile)
      : scale_(TileScales(block.layout, block.weight + tile * block.layout.tile_bytes(), 0).scale),
        x_scale_(_mm512_set1_ps(block.x_scale)),
        y_(static_cast<std::byte*>(block.y) + tile * kTileRows * size_of(type)),
        stride_(block.y_stride),
        lanes_(first_lanes(block.rows - tile * kTileRows)),
        bias_(block.bias != nullptr ? load_floats(block.bias, tile * kTileRows, type, lanes_)
                                    : _mm512_setzero_ps()) {}

  inline __attribute__((always_inline)) void store(std::int64_t position,
                                                   const std::int32_t* totals) const {
    const __m512 total = _mm512_cvtepi32_ps(_mm512_loadu_si512(totals));
    const __m512 sum = _mm512_fmadd_ps(total, scale_, _mm512_setzero_ps());
    store_floats(y_, position * stride_, type, lanes_, _mm512_fmadd_ps(sum, x_scale_, bias_));
  }

 private:
  __m512 scale_, x_scale_;
  std::byte* y_;
  std::int64_t stride_;
  __mmask16 lanes_;
  __m512 bias_;
};

}  // namespace
}  // namespace quantal::kernels
