#pragma once

// Included by this folder's files only, below their target pragma.

#include <cstring>

#include "kernels/cpu/amx/tile_job.h"
#include "kernels/cpu/avx512/table_lines.h"

namespace quantal::kernels {
namespace {

/// The words of 4 bytes of 16 rows of 32 bytes, `stride` apart: words[k] has word k of every row.
inline __attribute__((always_inline)) void take_words(const std::uint8_t* rows, std::int64_t stride,
                                                      __m512i (&words)[8]) {
  const auto half = [&](int row) __attribute__((always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * stride));
  };
  // 4 by 4 words in each 16 bytes, of rows 0 to 7 and of rows 8 to 15.
  __m512i parts[2][4];
  QUANTAL_UNROLL for (int p = 0; p < 2; ++p) {
    __m512i four[4];
    QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
      four[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(8 * p + i)), half(8 * p + 4 + i), 1);
    }
    const __m512i low[2] = {_mm512_unpacklo_epi32(four[0], four[1]),
                            _mm512_unpacklo_epi32(four[2], four[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(four[0], four[1]),
                             _mm512_unpackhi_epi32(four[2], four[3])};
    parts[p][0] = _mm512_unpacklo_epi64(low[0], low[1]);
    parts[p][1] = _mm512_unpackhi_epi64(low[0], low[1]);
    parts[p][2] = _mm512_unpacklo_epi64(high[0], high[1]);
    parts[p][3] = _mm512_unpackhi_epi64(high[0], high[1]);
  }
  QUANTAL_UNROLL for (int k = 0; k < 4; ++k) {
    words[k] = _mm512_shuffle_i32x4(parts[0][k], parts[1][k], 0b10'00'10'00);
    words[4 + k] = _mm512_shuffle_i32x4(parts[0][k], parts[1][k], 0b11'01'11'01);
  }
}

/// The Source of a weight in canonical form, as codes or as pairs of bf16 numbers, in the steps of
/// the packed weight's Line. Bytes of narrow codes hold 2 or 4 rows that are as far apart as the
/// weight is high: tiles that share bytes follow each other.
template <QTypeId qtype, typename LineType>
class CanonicalSource {
 public:
  using Line = LineType;
  // 32 rows: where those are a multiple of 4 KiB apart, more would compete for the lines of the
  // first-level cache.
  static constexpr int kStreams = 2;
  static constexpr bool kIsFar = false;
  static constexpr int kTogether = 2;  ///< pairs of 64 columns: whole lines of the cache
  static constexpr int kSections = qtype == QTypeId::kInt2 ? 4 : qtype == QTypeId::kInt4 ? 2 : 1;
  static constexpr std::int64_t kColumns = 32;  ///< that are taken at once

  CanonicalSource(const PackedLayout& layout, const CanonicalWeight& weight)
      : layout_(layout),
        weight_(weight),
        columns_(layout.spec().columns),
        byte_tiles_(layout.spec().rows / kSections / kTileRows) {}

  std::int64_t tile(std::int64_t index) const {
    return index % kSections * byte_tiles_ + index / kSections;
  }

  void decode(std::int64_t tile, std::int64_t group, std::int64_t first, std::int64_t count,
              std::byte* steps) const {
    const std::int64_t row = tile % byte_tiles_ * kTileRows;
    const __m512i shift =
        _mm512_set1_epi16(static_cast<short>(tile / byte_tiles_ * (8 / kSections)));
    const std::int64_t begin = layout_.group_begin(group) + first * layout_.depth();
    const std::int64_t end = begin + count * layout_.depth();
    const auto line = line_of(*this, tile, group);
    for (std::int64_t column = begin; column < end; column += kColumns) {
      const std::uint8_t* rows = weight_.data + row * columns_ + column;
      if (column % kLineBytes == 0) fetch(rows, column);
      __m512i words[8];
      take_words(rows, columns_, words);
      for_steps<8>([&](auto k)
                       __attribute__((always_inline)) { store<k>(line, words[k], shift, steps); });
      steps += kColumns / layout_.depth() * Line::kSteps * kLineBytes;
    }
  }

  TileScales scales(std::int64_t tile, std::int64_t group) const {
    TileScales scales;
    scales.scale = load(weight_.scale, tile, group);
    if constexpr (kSections > 1) scales.shift = load(weight_.shift, tile, group);
    return scales;
  }

 private:
  static constexpr std::int64_t kAhead = 512;  ///< bytes of each of 16 rows

  // The same columns of what comes next: in the rows, then in the next tile's.
  void fetch(const std::uint8_t* rows, std::int64_t column) const {
    const std::int64_t next =
        kAhead + (column + kAhead < columns_ ? 0 : (kTileRows - 1) * columns_);
    for (int r = 0; r < kTileRows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(rows + r * columns_ + next), _MM_HINT_T0);
    }
  }

  // Word `index` of each row, codes of 4 columns: one step of bytes, or two of pairs.
  template <int index>
  static void store(const Line& line, __m512i codes, __m512i shift, std::byte* steps) {
    if constexpr (qtype == QTypeId::kInt8) {
      codes = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
    }
    if constexpr (kSections > 1) codes = _mm512_srlv_epi16(codes, shift);
    constexpr bool kIsBytes = Line::kSteps == kSections;
    if constexpr (kIsBytes) {
      constexpr char kMask = static_cast<char>((1 << 8 / kSections) - 1);
      if constexpr (kSections > 1) codes = _mm512_and_si512(codes, _mm512_set1_epi8(kMask));
      _mm512_storeu_si512(steps + index * kLineBytes, codes);
    } else {
      constexpr int kStep = index / kSections * Line::kSteps + index % kSections;
      std::byte* first = steps + kStep * kLineBytes;
      std::byte* second = first + kSections * kLineBytes;
      if constexpr (kSections > 1) {
        _mm512_storeu_si512(first, line.look_up(codes));
        _mm512_storeu_si512(second, line.look_up(_mm512_srli_epi16(codes, 8)));
      } else {
        Line pairs;
        pairs.decode(codes);
        _mm512_storeu_si512(first, pairs.template get<0>());
        _mm512_storeu_si512(second, pairs.template get<1>());
      }
    }
  }

  __m512 load(const void* values, std::int64_t tile, std::int64_t group) const {
    const FloatType type = layout_.spec().scale_type;
    const std::int64_t first = tile * kTileRows, groups = layout_.groups();
    if (groups == 1) return load_floats(values, first, type, first_lanes(kTileRows));
    const int size = size_of(type);
    const auto* from = static_cast<const std::byte*>(values) + (first * groups + group) * size;
    alignas(64) std::byte column[kTileRows * sizeof(float)];
    if (size == 2) {
      for (int r = 0; r < kTileRows; ++r) std::memcpy(column + 2 * r, from + r * groups * 2, 2);
    } else {
      for (int r = 0; r < kTileRows; ++r) std::memcpy(column + 4 * r, from + r * groups * 4, 4);
    }
    return load_floats(column, 0, type, first_lanes(kTileRows));
  }

  const PackedLayout& layout_;
  const CanonicalWeight& weight_;
  std::int64_t columns_, byte_tiles_;
};

}  // namespace
}  // namespace quantal::kernels
