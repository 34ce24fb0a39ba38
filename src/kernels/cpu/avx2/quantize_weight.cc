// Quantizing a weight for AVX2: the bits of the portable reading. Up to eight code rows of every
// section of a byte row at a time: their extremes are found, their scales chosen in one register,
// and their codes made while the floats are in the cache.
#include "kernels/quantize_weight.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kStep = 32;  ///< codes in a register
constexpr std::int64_t kBlockRows = 8;
// What one block reads should stay in the second-level cache until its codes are made.
constexpr std::int64_t kBlockElements = 1 << 15;
// With a larger scale a subnormal number changes no code: it vanishes in the sum with the shift, or
// both are below half a step.
constexpr float kNoSubnormals = 0x1p-100F;

constexpr int bits_of(QTypeId qtype) {
  return qtype == QTypeId::kInt2 ? 2 : qtype == QTypeId::kInt4 ? 4 : 8;
}
constexpr bool is_affine(QTypeId qtype) { return bits_of(qtype) < 8; }

// Subnormal numbers and -0 become 0.
inline __m256 without_subnormals(__m256 value) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value);
  const __m256 tiny = _mm256_set1_ps(std::numeric_limits<float>::min());
  return _mm256_andnot_ps(_mm256_cmp_ps(size, tiny, _CMP_LT_OQ), value);
}

inline float least_of(__m256 value) {
  __m128 half = _mm_min_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_min_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}

inline float largest_of(__m256 value) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Elements [index, index + count) of the weight as floats; the last one again up to `size`.
inline void load_padded(const QuantizeArgs& args, std::int64_t index, std::int64_t count,
                        std::int64_t size, float* values) {
  for (std::int64_t i = 0; i < size; ++i) {
    values[i] = load_float(args.weight, index + (i < count ? i : count - 1), args.type);
  }
}

// The extremes of a code row; for symmetric types 0 and the largest size. A NaN makes one of them
// no finite number.
struct Extremes {
  float low, high;
};

// fp32: as numbers, with an eye on NaNs, which do not compare.
template <bool affine>
inline Extremes extremes_f32(const float* values, std::int64_t count) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  const auto load = [&](std::int64_t i) {
    const __m256 value = _mm256_loadu_ps(values + i);
    return affine ? value : _mm256_andnot_ps(sign, value);
  };
  __m256 low[2], high[2], nans = _mm256_setzero_ps();
  low[0] = low[1] = high[0] = high[1] = load(0);
  const auto see = [&](int chain, __m256 value) {
    if (affine) low[chain] = _mm256_min_ps(low[chain], value);
    high[chain] = _mm256_max_ps(high[chain], value);
  };
  std::int64_t i = 0;
  for (; i + 2 * kHalfRows <= count; i += 2 * kHalfRows) {
    const __m256 a = load(i), b = load(i + kHalfRows);
    see(0, a);
    see(1, b);
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  // The last registers may overlap: an extreme may be seen twice.
  for (; i < count; i += kHalfRows) {
    const __m256 value = load(i + kHalfRows <= count ? i : count - kHalfRows);
    see(0, value);
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  }
  const float none = std::numeric_limits<float>::quiet_NaN();
  if (_mm256_movemask_ps(nans) != 0) return {none, none};
  return {affine ? least_of(_mm256_min_ps(low[0], low[1])) : 0.0F,
          largest_of(_mm256_max_ps(high[0], high[1]))};
}

// 16-bit numbers: by their bits, which order as the numbers do once those of negative ones are
// flipped. NaNs lie beyond the infinities.
template <bool affine>
inline Extremes extremes_16(const std::uint16_t* values, std::int64_t count, FloatType type) {
  constexpr std::int64_t kWords = 16;
  const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
  const auto load = [&](std::int64_t i) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    if (!affine) return _mm256_and_si256(bits, magnitude);
    return _mm256_xor_si256(bits, _mm256_srli_epi16(_mm256_srai_epi16(bits, 15), 1));
  };
  __m256i low = load(0), high = low;
  for (std::int64_t i = kWords; i < count; i += kWords) {
    const __m256i keys = load(i + kWords <= count ? i : count - kWords);
    if (affine) low = _mm256_min_epi16(low, keys);
    high = _mm256_max_epi16(high, keys);
  }
  // The least of unsigned words has an instruction: of keys + 2^15, and of 2^15 - 1 - keys.
  const __m128i lows = _mm_min_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i highs =
      _mm_max_epi16(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(lows, _mm_set1_epi16(-0x8000)));
  const __m128i most = _mm_minpos_epu16(_mm_xor_si128(highs, _mm_set1_epi16(0x7FFF)));
  const auto value = [&](int key) {
    const int bits = (key & 0x8000) != 0 && affine ? key ^ 0x7FFF : key;
    if (type == FloatType::kF16) return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits << 16)));
  };
  return {affine ? value((_mm_cvtsi128_si32(least) ^ 0x8000) & 0xFFFF) : 0.0F,
          value((_mm_cvtsi128_si32(most) ^ 0x7FFF) & 0xFFFF)};
}

// Chooses the scales and shifts of eight code rows at a time, and remembers what it saw.
class Chooser {
 public:
  explicit Chooser(const QuantizeArgs& args)
      : args_(args), bounds_(scale_bounds(args.spec.qtype)) {}

  struct Lanes {
    alignas(32) float low[kHalfRows] = {};
    alignas(32) float high[kHalfRows] = {};
    alignas(32) float scale[kHalfRows];
    alignas(32) float shift[kHalfRows];
  };

  /// Code rows [code_row, code_row + count), whose extremes are in `lanes` (the others 0): their
  /// scale and shift, as stored at the args' `out`.
  template <bool affine>
  void choose(std::int64_t code_row, std::int64_t count, Lanes& lanes);

  bool is_vain() const { return _mm256_movemask_ps(_mm256_and_ps(right_, exact_)) != 0xFF; }

  GroupsSeen seen() const {
    return {.is_finite = _mm256_movemask_ps(right_) == 0xFF,
            .is_exact_enough = _mm256_movemask_ps(exact_) == 0xFF,
            .largest_scale = largest_of(largest_scale_),
            .largest_shift = largest_of(largest_shift_)};
  }

 private:
  static __m256 all_ones() { return _mm256_castsi256_ps(_mm256_set1_epi32(-1)); }
  static __m256 size_of_each(__m256 value) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value);
  }
  static __m256 is_finite(__m256 value) {
    return _mm256_cmp_ps(size_of_each(value), _mm256_set1_ps(std::numeric_limits<float>::max()),
                         _CMP_LE_OQ);
  }

  // Stores `value` for `count` code rows and returns it as stored.
  __m256 store(void* data, std::int64_t code_row, std::int64_t count, __m256 value) const;
  template <bool affine>
  __m256 is_exact_enough(__m256 scale, __m256 shift, __m256 exact_shift) const;

  const QuantizeArgs& args_;
  ScaleBounds bounds_;
  __m256 right_ = all_ones();
  __m256 exact_ = all_ones();
  __m256 largest_scale_ = _mm256_setzero_ps();
  __m256 largest_shift_ = _mm256_setzero_ps();
};

__m256 Chooser::store(void* data, std::int64_t code_row, std::int64_t count, __m256 value) const {
  const FloatType type = args_.spec.scale_type;
  if (type == FloatType::kF32 && count == kHalfRows) {
    store_rows(data, code_row, type, kHalfRows, value);
    return value;
  }
  alignas(32) std::byte stored[kHalfRows * sizeof(float)];
  store_rows(stored, 0, type, kHalfRows, value);
  const int size = quantal::kernels::size_of(type);
  std::memcpy(static_cast<std::byte*>(data) + code_row * size, stored, count * size);
  return load_rows(stored, 0, type);
}

// Whether the rounded scale and shift serve in place of the exact ones.
template <bool affine>
__m256 Chooser::is_exact_enough(__m256 scale, __m256 shift, __m256 exact_shift) const {
  const FloatType type = args_.spec.scale_type;
  const float smallest_normal =
      type == FloatType::kF16 ? 0x1p-14F : std::numeric_limits<float>::min();
  const __m256 is_normal = _mm256_cmp_ps(scale, _mm256_set1_ps(smallest_normal), _CMP_GE_OQ);
  const __m256 top = _mm256_mul_ps(scale, _mm256_set1_ps(bounds_.levels));
  alignas(32) std::byte stored[kHalfRows * sizeof(float)];
  store_rows(stored, 0, type, kHalfRows, affine ? _mm256_sub_ps(top, shift) : top);
  const __m256 holds = _mm256_and_ps(_mm256_and_ps(is_normal, is_finite(scale)),
                                     is_finite(load_rows(stored, 0, type)));
  if (!affine) return holds;
  const __m256 error = size_of_each(_mm256_sub_ps(shift, exact_shift));
  const __m256 quarter = _mm256_mul_ps(scale, _mm256_set1_ps(0.25F));
  return _mm256_and_ps(holds, _mm256_cmp_ps(error, quarter, _CMP_LE_OQ));
}

template <bool affine>
void Chooser::choose(std::int64_t code_row, std::int64_t count, Lanes& lanes) {
  const __m256 tiny = _mm256_set1_ps(std::numeric_limits<float>::min());
  const __m256 low = without_subnormals(_mm256_load_ps(lanes.low));
  const __m256 high = _mm256_load_ps(lanes.high);
  const __m256 range = affine ? _mm256_sub_ps(without_subnormals(high), low) : high;
  right_ = _mm256_and_ps(right_, is_finite(range));
  const __m256 quotient = _mm256_div_ps(range, _mm256_set1_ps(bounds_.levels));
  const __m256 bounded = _mm256_min_ps(_mm256_max_ps(quotient, _mm256_set1_ps(bounds_.smallest)),
                                       _mm256_set1_ps(bounds_.largest));
  const __m256 exact =
      _mm256_blendv_ps(bounded, _mm256_set1_ps(1), _mm256_cmp_ps(range, tiny, _CMP_LT_OQ));
  const __m256 scale = store(args_.out.scale, code_row, count, exact);
  __m256 shift = _mm256_setzero_ps(), exact_shift = shift;
  if (affine) {
    exact_shift = _mm256_xor_ps(low, _mm256_set1_ps(-0.0F));
    shift = store(args_.out.shift, code_row, count, exact_shift);
  }
  if (args_.spec.scale_type != FloatType::kF32) {
    exact_ = _mm256_and_ps(exact_, is_exact_enough<affine>(scale, shift, exact_shift));
  }
  largest_scale_ = _mm256_max_ps(largest_scale_, scale);
  largest_shift_ = _mm256_max_ps(largest_shift_, size_of_each(shift));
  _mm256_store_ps(lanes.scale, scale);
  _mm256_store_ps(lanes.shift, shift);
}

// float8 codes of numbers in range, in 32 bits each: see float_types.cc.
template <int mantissa, int bias>
inline __m256i float8_codes(__m256 value) {
  constexpr int kDropped = 23 - mantissa;
  const __m256 sign_bit = _mm256_set1_ps(-0.0F);
  const __m256 size = _mm256_andnot_ps(sign_bit, value);
  const __m256i bits = _mm256_castps_si256(size);
  const __m256i sum = _mm256_set1_epi32((127 + 1 - bias + kDropped) << 23);
  const __m256i subnormal =
      _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(size, _mm256_castsi256_ps(sum))), sum);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, kDropped), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32((1 << (kDropped - 1)) - 1));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_add_epi32(bits, half), kDropped),
                                          _mm256_set1_epi32((127 - bias) << mantissa));
  const __m256i is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32((127 + 1 - bias) << 23), bits);
  const __m256i code = _mm256_blendv_epi8(normal, subnormal, is_subnormal);
  __m256i sign = _mm256_srli_epi32(_mm256_castps_si256(_mm256_and_ps(value, sign_bit)), 24);
  // The type with bias 8 has no -0: its code is NaN.
  if (bias == 8) sign = _mm256_andnot_si256(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()), sign);
  return _mm256_or_si256(code, sign);
}

// Eight codes, in 32 bits each; int8 with its sign.
template <QTypeId qtype, bool subnormals>
inline __m256i encode8(__m256 value, __m256 scale, __m256 shift) {
  if constexpr (is_affine(qtype)) {
    if (subnormals) value = without_subnormals(value);
    const __m256 quotient = _mm256_div_ps(_mm256_add_ps(value, shift), scale);
    const __m256 most = _mm256_set1_ps(qtype == QTypeId::kInt2 ? 3 : 15);
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(quotient, most), _mm256_setzero_ps()));
  }
  const float largest = qtype == QTypeId::kInt8             ? 127
                        : qtype == QTypeId::kFloat8E4M3FN   ? 448
                        : qtype == QTypeId::kFloat8E4M3FNUZ ? 240
                                                            : 57344;
  const __m256 quotient = _mm256_div_ps(value, scale);
  const __m256 in_range =
      _mm256_max_ps(_mm256_min_ps(quotient, _mm256_set1_ps(largest)), _mm256_set1_ps(-largest));
  if constexpr (qtype == QTypeId::kInt8) return _mm256_cvtps_epi32(in_range);
  if constexpr (qtype == QTypeId::kFloat8E4M3FN) return float8_codes<3, 7>(in_range);
  if constexpr (qtype == QTypeId::kFloat8E4M3FNUZ) return float8_codes<3, 8>(in_range);
  return float8_codes<2, 15>(in_range);
}

// The codes of elements [index, index + 32), a byte each.
template <FloatType type, QTypeId qtype, bool subnormals>
inline __m256i encode32(const void* weight, std::int64_t index, __m256 scale, __m256 shift) {
  __m256i words[4];
  QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
    const __m256 value = load_rows(weight, index + i * kHalfRows, type);
    words[i] = encode8<qtype, subnormals>(value, scale, shift);
  }
  const __m256i first = _mm256_packs_epi32(words[0], words[1]);
  const __m256i second = _mm256_packs_epi32(words[2], words[3]);
  const __m256i bytes = qtype == QTypeId::kInt8 ? _mm256_packs_epi16(first, second)
                                                : _mm256_packus_epi16(first, second);
  // Packing works on each half of a register by itself.
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <FloatType type, QTypeId qtype>
class RowQuantizer {
 public:
  static constexpr int kSections = 8 / bits_of(qtype);
  static constexpr std::int64_t kLeast = type == FloatType::kF32 ? 8 : 16;  ///< a register's

  RowQuantizer(const QuantizeArgs& args, const CanonicalCodes& codes)
      : args_(args), codes_(codes), chooser_(args) {}

  GroupsSeen run(std::int64_t begin, std::int64_t end) {
    const std::int64_t most = kBlockElements / (codes_.width() * kSections);
    const std::int64_t step = most < 1 ? 1 : most > kBlockRows ? kBlockRows : most;
    ahead_ = step * codes_.width();
    for (std::int64_t row = begin; row < end && !chooser_.is_vain(); row += step) {
      const std::int64_t count = row + step <= end ? step : end - row;
      for (int s = 0; s < kSections; ++s) choose(s, row + s * codes_.packed_rows(), count);
      for (std::int64_t r = 0; r < count; ++r) encode(row + r, r);
    }
    return chooser_.seen();
  }

 private:
  // Scale and shift of `count` code rows of a section, as far as there are so many.
  void choose(int section, std::int64_t code_row, std::int64_t count) {
    const std::int64_t there = codes_.code_rows() - code_row;
    if (count > there) count = there;
    if (count <= 0) return;
    Chooser::Lanes& lanes = lanes_[section];
    for (std::int64_t r = 0; r < kHalfRows; ++r) {
      const Extremes seen = r < count ? extremes(code_row + r) : Extremes{0, 0};
      lanes.low[r] = seen.low;
      lanes.high[r] = seen.high;
    }
    chooser_.choose<is_affine(qtype)>(code_row, count, lanes);
  }

  Extremes extremes(std::int64_t code_row) const {
    constexpr bool kAffine = is_affine(qtype);
    const std::int64_t first = codes_.element(code_row), count = codes_.columns(code_row);
    if (count < kLeast) {
      float values[kLeast];
      load_padded(args_, first, count, kLeast, values);
      return extremes_f32<kAffine>(values, kLeast);
    }
    if constexpr (type == FloatType::kF32) {
      return extremes_f32<kAffine>(static_cast<const float*>(args_.weight) + first, count);
    } else {
      return extremes_16<kAffine>(static_cast<const std::uint16_t*>(args_.weight) + first, count,
                                  type);
    }
  }

  // Byte row `row`, number `r` of its block.
  void encode(std::int64_t row, std::int64_t r) {
    __m256 scale[kSections], shift[kSections];
    std::int64_t first[kSections];
    std::int64_t whole = codes_.width();  // columns that every section has
    bool is_plain = true;
    int there = 0;
    for (int s = 0; s < kSections; ++s) {
      const std::int64_t code_row = row + s * codes_.packed_rows();
      if (code_row >= codes_.code_rows()) break;
      first[s] = codes_.element(code_row);
      const std::int64_t columns = codes_.columns(code_row);
      if (columns < whole) whole = columns;
      scale[s] = _mm256_set1_ps(lanes_[s].scale[r]);
      shift[s] = _mm256_set1_ps(lanes_[s].shift[r]);
      is_plain = is_plain && (!is_affine(qtype) || lanes_[s].scale[r] >= kNoSubnormals);
      there = s + 1;
    }
    if (there < kSections || !is_plain) whole = 0;
    std::uint8_t* bytes = args_.out.data + row * codes_.width();
    std::int64_t c = 0;
    for (; c + kStep <= whole; c += kStep) {
      __m256i sum = _mm256_setzero_si256();
      QUANTAL_UNROLL for (int s = 0; s < kSections; ++s) {
        const __m256i codes =
            encode32<type, qtype, false>(args_.weight, first[s] + c, scale[s], shift[s]);
        prefetch(first[s] + c + ahead_);
        sum = _mm256_or_si256(sum, _mm256_slli_epi16(codes, s * bits_of(qtype) % 8));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + c), sum);
    }
    for (; c < codes_.width(); c += kStep) {
      __m256i sum = _mm256_setzero_si256();
      for (int s = 0; s < there; ++s) {
        const std::int64_t columns = codes_.columns(row + s * codes_.packed_rows());
        float values[kStep];
        // Padding repeats the last element of a short group.
        const std::int64_t from = c < columns ? c : columns - 1;
        load_padded(args_, first[s] + from, columns - from, kStep, values);
        const __m256i codes = encode32<FloatType::kF32, qtype, true>(values, 0, scale[s], shift[s]);
        sum = _mm256_or_si256(sum, _mm256_sll_epi16(codes, _mm_cvtsi32_si128(s * bits_of(qtype))));
      }
      alignas(32) std::uint8_t last[kStep];
      _mm256_store_si256(reinterpret_cast<__m256i*>(last), sum);
      const std::int64_t rest = codes_.width() - c;
      std::memcpy(bytes + c, last, rest < kStep ? rest : kStep);
    }
  }

  // The lines of 32 elements of the next block, while this one is computed. A hint never faults.
  void prefetch(std::int64_t index) const {
    const auto* from = static_cast<const char*>(args_.weight) + index * size_of(type);
    _mm_prefetch(from, _MM_HINT_T0);
    if (type == FloatType::kF32) _mm_prefetch(from + 64, _MM_HINT_T0);
  }

  const QuantizeArgs& args_;
  const CanonicalCodes& codes_;
  std::int64_t ahead_ = 0;  ///< elements from one block to the next
  Chooser chooser_;
  Chooser::Lanes lanes_[kSections];
};

template <QTypeId qtype>
GroupsSeen quantize_rows(const QuantizeArgs& args, const CanonicalCodes& codes, std::int64_t begin,
                         std::int64_t end) {
  switch (args.type) {
    case FloatType::kF32:
      return RowQuantizer<FloatType::kF32, qtype>(args, codes).run(begin, end);
    case FloatType::kBF16:
      return RowQuantizer<FloatType::kBF16, qtype>(args, codes).run(begin, end);
    case FloatType::kF16:
      return RowQuantizer<FloatType::kF16, qtype>(args, codes).run(begin, end);
  }
  return {};
}

}  // namespace

GroupsSeen quantize_rows__avx2(const QuantizeArgs& args, const CanonicalCodes& codes,
                               std::int64_t begin, std::int64_t end) {
  switch (args.spec.qtype) {
    case QTypeId::kInt2:
      return quantize_rows<QTypeId::kInt2>(args, codes, begin, end);
    case QTypeId::kInt4:
      return quantize_rows<QTypeId::kInt4>(args, codes, begin, end);
    case QTypeId::kInt8:
      return quantize_rows<QTypeId::kInt8>(args, codes, begin, end);
    case QTypeId::kFloat8E4M3FN:
      return quantize_rows<QTypeId::kFloat8E4M3FN>(args, codes, begin, end);
    case QTypeId::kFloat8E4M3FNUZ:
      return quantize_rows<QTypeId::kFloat8E4M3FNUZ>(args, codes, begin, end);
    case QTypeId::kFloat8E5M2:
      return quantize_rows<QTypeId::kFloat8E5M2>(args, codes, begin, end);
  }
  return {};
}

}  // namespace quantal::kernels

#pragma GCC pop_options
