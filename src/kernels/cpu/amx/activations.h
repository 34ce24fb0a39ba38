#pragma once

// Included by this folder's files only, below their target pragma: float activations as tiles of
// bf16 numbers.

#include <algorithm>
#include <array>

#include "kernels/cpu/amx/product.h"
#include "kernels/cpu/avx512/table_lines.h"
#include "kernels/linear.h"

namespace quantal::kernels {
namespace {

/// 32 numbers that follow each other, in two registers.
struct Numbers {
  __m512 low, high;
};

inline Numbers load_numbers(const void* data, std::int64_t index, std::int64_t count,
                            FloatType type) {
  const __m512 low = load_floats(data, index, type, first_lanes(count));
  if (count <= 16) return {low, _mm512_setzero_ps()};
  return {low, load_floats(data, index + 16, type, first_lanes(count - 16))};
}

/// The upper half of each number, a bf16 number, is taken off: what stays is exact. Nothing stays
/// of an infinity and of a (quiet) NaN.
inline __m512 take_upper(__m512& value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m512 upper = _mm512_castsi512_ps(_mm512_and_si512(bits, top));
  const __m512 rest = _mm512_sub_ps(value, upper);
  value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
  return upper;
}

/// x of all tokens as sums of `parts` bf16 numbers, exactly: fp16's 11 bits in two and fp32's 24
/// in three. In the order of a Line's steps; groups are filled up with zeros to whole tiles, and so
/// are tokens.
template <typename Line, int parts>
class TileActivations {
 public:
  TileActivations(const LinearArgs& args, const ParallelFor& parallel_for)
      : args_(args),
        layout_(*args.layout),
        tiles_(args.tokens, tiles_for(layout_.group_lines(0) * Line::kSteps), layout_.groups()),
        x_(parts * tiles_.size()),
        sums_(has_sums() ? tiles_.sums_size() : 0),
        scales_(args.tokens) {
    parallel_for(tiles_.count * kTileTokens, [this](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) t < args_.tokens ? take_token(t) : clear_token(t);
    });
  }

  TileJob job() const {
    return {.layout = &layout_,
            .tokens = args_.tokens,
            .x_tiles = kIsScaled<Line> ? TokenTiles(args_.tokens, tiles_.row_tiles, 1) : tiles_,
            .x = words(x_),
            .x_sums = has_sums() ? words(sums_) : nullptr,
            .blocks_per_group = 1,
            .block_lines = layout_.group_lines(0) + 1,
            .out = output_of(args_, is_scaled() ? scales_.data() : nullptr)};
  }

 private:
  // Those of the weight are shifted where its Line does not.
  bool has_sums() const { return layout_.is_affine() && !kIsScaled<Line>; }

  // The product takes numbers below 2^-126 for zeros, and such are parts of small numbers. fp32 has
  // multiples of 2^-149: a token below 1 is multiplied by a power of two, so that no part is as
  // small, nor its product with the smallest code (2^-16), and its results are divided.
  static constexpr float kFactor = 0x1p40F;

  bool is_scaled() const {
    const float* scales = scales_.data();
    return std::any_of(scales, scales + args_.tokens, [](float scale) { return scale != 1; });
  }

  static std::int32_t* words(const Scratch& scratch) {
    return reinterpret_cast<std::int32_t*>(scratch.data());
  }

  // Nothing is stored of it, but its sums are computed.
  void clear_token(std::int64_t token) const {
    for (std::int64_t g = 0; g < layout_.groups(); ++g) take_columns(token, g, 0, 0, 1);
  }

  void take_token(std::int64_t token) const {
    const std::int64_t from = token * args_.x_stride;
    const bool is_small =
        args_.type != FloatType::kF16 &&
        max_magnitude(args_.x, args_.type, from, from + layout_.spec().columns) < 1;
    scales_.data()[token] = is_small ? 1 / kFactor : 1;
    for (std::int64_t g = 0; g < layout_.groups(); ++g) {
      const std::int64_t begin = from + layout_.group_begin(g), columns = layout_.group_columns(g);
      if (parts == 1 && !is_small) {
        copy_columns(token, g, begin, columns);
      } else {
        take_columns(token, g, begin, columns, is_small ? kFactor : 1);
      }
    }
  }

  // All columns of a group, of bf16 numbers.
  void copy_columns(std::int64_t token, std::int64_t group, std::int64_t from,
                    std::int64_t columns) const {
    std::int32_t* to = words(x_) + tiles_.at(token, group, 0);
    const auto* x = static_cast<const std::uint16_t*>(args_.x) + from;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    const __m512i order = _mm512_loadu_si512(kPairs.data());
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < columns; i += 32, to += kTileWords) {
      const __m512i pairs = _mm512_maskz_loadu_epi16(first_halves(columns - i), x + i);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, pairs));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
      sum =
          _mm512_add_ps(sum, _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), odd));
    }
    clear_rest(token, group, (columns + 31) / 32);
    if (has_sums()) set_sum(token, group, sum);
  }

  // All columns of a group.
  void take_columns(std::int64_t token, std::int64_t group, std::int64_t from, std::int64_t columns,
                    float factor) const {
    std::int32_t* to = words(x_) + tiles_.at(token, group, 0);
    const __m512 scale = _mm512_set1_ps(factor);
    const __m512i order = _mm512_loadu_si512(kOrder.data());
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < columns; i += 32, to += kTileWords) {
      Numbers x = load_numbers(args_.x, from + i, columns - i, args_.type);
      x = {_mm512_mul_ps(x.low, scale), _mm512_mul_ps(x.high, scale)};
      sum = _mm512_add_ps(sum, _mm512_add_ps(x.low, x.high));
      for (int part = 0; part < parts; ++part) {
        const __m512i low = _mm512_castps_si512(take_upper(x.low));
        const __m512i high = _mm512_castps_si512(take_upper(x.high));
        _mm512_storeu_si512(to + part * tiles_.size(), _mm512_permutex2var_epi16(low, order, high));
      }
    }
    clear_rest(token, group, (columns + 31) / 32);
    if (has_sums()) set_sum(token, group, sum);
  }

  // Tiles of a group behind its last columns.
  void clear_rest(std::int64_t token, std::int64_t group, std::int64_t first) const {
    for (std::int64_t tile = first; tile < tiles_.block_tiles; ++tile) {
      for (int part = 0; part < parts; ++part) {
        _mm512_storeu_si512(words(x_) + part * tiles_.size() + tiles_.at(token, group, tile),
                            _mm512_setzero_si512());
      }
    }
  }

  void set_sum(std::int64_t token, std::int64_t group, __m512 sum) const {
    sums_.data()[tiles_.sum_at(token, group)] = _mm512_reduce_add_ps(sum);
  }

  // Of 32 halves, those of each pair of columns.
  static constexpr auto kPairs = [] {
    std::array<std::uint16_t, 32> order{};
    for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(column_at<Line>(i));
    return order;
  }();
  // Of 64 halves of two registers, the upper ones of each number.
  static constexpr auto kOrder = [] {
    std::array<std::uint16_t, 32> order{};
    for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(2 * kPairs[i] + 1);
    return order;
  }();

  const LinearArgs& args_;
  const PackedLayout& layout_;
  TokenTiles tiles_;
  Scratch x_, sums_, scales_;
};

}  // namespace
}  // namespace quantal::kernels
