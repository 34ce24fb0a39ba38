// A few tokens by a weight in canonical form, for AVX2: rows are read where they lie, since packing
// them first would take longer than the products. Bytes of narrow codes hold 2 or 4 rows, which are
// as far apart as the weight is high. A step takes as many byte rows as have 8 rows of the result,
// so that their sums are independent, share what is read of a token and end in one register.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/canonical_linear.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/float8.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kPrefetchBytes = 1024;
constexpr int kOutputs = 8;

template <QTypeId qtype>
constexpr int kSections = qtype == QTypeId::kInt2   ? 4
                          : qtype == QTypeId::kInt4 ? 2
                                                    : 1;
/// Byte rows of a step. Output s · kByteRows + r is section s of its byte row r.
template <QTypeId qtype>
constexpr int kByteRows = kOutputs / kSections<qtype>;

// Where what computes finds its operands: byte row r holds rows r + section · byte_rows.
struct Operands {
  const PackedLayout& layout;
  const CanonicalWeight& weight;
  std::int64_t byte_rows;
  std::int64_t groups, group_columns;

  std::int64_t columns() const { return layout.spec().columns; }
  const std::uint8_t* bytes(std::int64_t row) const { return weight.data + row * columns(); }
};

// The byte rows of a step. Where the weight ends within it, its last row is there several times.
template <QTypeId qtype>
class Step {
 public:
  Step(const Operands& w, std::int64_t step)
      : first_(step * kByteRows<qtype>),
        rows_(std::min<std::int64_t>(kByteRows<qtype>, w.byte_rows - first_)) {}

  /// How many there are.
  std::int64_t rows() const { return rows_; }
  int clamped(int r) const { return static_cast<int>(std::min<std::int64_t>(r, rows_ - 1)); }
  const std::uint8_t* bytes(const Operands& w, int r) const { return w.bytes(first_ + clamped(r)); }
  /// The first row of the result in a section.
  std::int64_t output(const Operands& w, int section) const {
    return first_ + section * w.byte_rows;
  }

  /// y = sums · factor + bias for the outputs of a token. Args: of either linear.
  template <typename Args>
  void store(const Args& args, const Operands& w, std::int64_t token, __m256 sums,
             float factor) const {
    const std::int64_t size = size_of(args.type), section = kByteRows<qtype> * size;
    alignas(32) std::byte outputs[kOutputs * sizeof(float)] = {};
    __m256 bias = _mm256_setzero_ps();
    if (args.bias != nullptr) {
      const auto* from = static_cast<const std::byte*>(args.bias);
      for (int s = 0; s < kSections<qtype>; ++s) {
        std::memcpy(outputs + s * section, from + output(w, s) * size, rows_ * size);
      }
      bias = load_rows(outputs, 0, args.type);
    }
    store_rows(outputs, 0, args.type, kOutputs,
               _mm256_fmadd_ps(sums, _mm256_set1_ps(factor), bias));
    auto* to = static_cast<std::byte*>(args.y) + token * args.y_stride * size;
    for (int s = 0; s < kSections<qtype>; ++s) {
      std::memcpy(to + output(w, s) * size, outputs + s * section, rows_ * size);
    }
  }

 private:
  std::int64_t first_, rows_;
};

template <QTypeId qtype>
std::int64_t steps_of(const Operands& w) {
  return (w.byte_rows + kByteRows<qtype> - 1) / kByteRows<qtype>;
}

// Scales and shifts of the outputs of a step: [output][group].
template <QTypeId qtype>
class StepScales {
 public:
  explicit StepScales(std::int64_t groups)
      : groups_(groups), values_((kSections<qtype> > 1 ? 2 : 1) * kOutputs * groups) {}

  void load(const Operands& w, const Step<qtype>& step) const {
    const FloatType type = w.layout.spec().scale_type;
    for (int s = 0; s < kSections<qtype>; ++s) {
      const std::int64_t index = step.output(w, s) * groups_, count = step.rows() * groups_;
      const std::int64_t to = s * kByteRows<qtype> * groups_;
      load_floats(w.weight.scale, index, count, type, scales() + to);
      if (kSections<qtype> > 1) load_floats(w.weight.shift, index, count, type, shifts() + to);
    }
  }
  float* scales() const { return values_.data(); }
  float* shifts() const { return values_.data() + kOutputs * groups_; }

 private:
  std::int64_t groups_;
  Scratch values_;
};

/// Σ of each of 8 vectors.
__m256 sums_of(const __m256 (&v)[kOutputs]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}
__m256i sums_of(const __m256i (&v)[kOutputs]) {
  const __m256i low =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i high =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                          _mm256_permute2x128_si256(low, high, 0x31));
}

// How far ahead to prefetch at a column of a byte row: in the row, then in the next step's.
template <QTypeId qtype>
std::int64_t prefetch_distance(const Operands& w, std::int64_t column) {
  const bool in_row = column + kPrefetchBytes < w.columns();
  return kPrefetchBytes + (in_row ? 0 : (kByteRows<qtype> - 1) * w.columns());
}

inline void prefetch(const std::uint8_t* bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(bytes), _MM_HINT_T0);
}

// ---- floats

// 8 columns of a section as floats; `words` are their bytes, one in each 32-bit lane.
template <QTypeId qtype, int section>
__m256 floats_of(__m256i words) {
  constexpr int kBits = 8 / kSections<qtype>;
  const __m256i shifted = _mm256_srli_epi32(words, kBits * section);
  if constexpr (section + 1 == kSections<qtype>) return _mm256_cvtepi32_ps(shifted);
  return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << kBits) - 1)));
}

template <QTypeId qtype>
void decode(const std::uint8_t* bytes, __m256 (&values)[kSections<qtype>]) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  if constexpr (qtype == QTypeId::kInt8) {
    values[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
  } else if constexpr (kSections<qtype> == 1) {
    values[0] = float8_values<qtype>(eight);
  } else {
    const __m256i words = _mm256_cvtepu8_epi32(eight);
    [&]<int... section>(std::integer_sequence<int, section...>) __attribute__((always_inline)) {
      ((values[section] = floats_of<qtype, section>(words)), ...);
    }(std::make_integer_sequence<int, kSections<qtype>>());
  }
}

// Tokens as fp32, and the sums of their groups: one in each lane, of every eighth column.
class FloatTokens {
 public:
  FloatTokens(const LinearArgs& args, const Operands& w, int tokens)
      : columns_(w.columns()),
        groups_(w.groups),
        x_(tokens * columns_),
        sums_(tokens * groups_ * kHalfRows) {
    for (int t = 0; t < tokens; ++t) {
      float* to = x_.data() + t * columns_;
      for (std::int64_t g = 0; g < groups_; ++g) {
        __m256 sum = _mm256_setzero_ps();
        const std::int64_t end = (g + 1) * w.group_columns;
        for (std::int64_t c = g * w.group_columns; c < end; c += kHalfRows) {
          const __m256 eight = load_rows(args.x, t * args.x_stride + c, args.type);
          _mm256_storeu_ps(to + c, eight);
          sum = _mm256_add_ps(sum, eight);
        }
        _mm256_store_ps(sums_.data() + (t * groups_ + g) * kHalfRows, sum);
      }
    }
  }
  const float* token(int t) const { return x_.data() + t * columns_; }
  __m256 sum(int t, std::int64_t group) const {
    return _mm256_load_ps(sums_.data() + (t * groups_ + group) * kHalfRows);
  }

 private:
  std::int64_t columns_, groups_;
  Scratch x_, sums_;
};

// Byte rows of a step that are multiplied at once: as many as have a register for each sum.
template <QTypeId qtype, int tokens>
constexpr int kAtOnce = std::max(1, kByteRows<qtype> / (tokens == 3 ? 4 : tokens));

/// Sums of products of byte rows, sections and tokens, a column's in one of 8 lanes.
template <QTypeId qtype, int tokens>
using FloatSums = __m256[kAtOnce<qtype, tokens>][kSections<qtype>][tokens];

// sums += code·x over columns [begin, end), whose number is a multiple of 8.
template <QTypeId qtype, int tokens>
void multiply(const std::uint8_t* const (&bytes)[kAtOnce<qtype, tokens>], std::int64_t begin,
              std::int64_t end, std::int64_t distance, const FloatTokens& x,
              FloatSums<qtype, tokens>& out) {
  constexpr int kRows = kAtOnce<qtype, tokens>;
  __m256 sums[kRows][kSections<qtype>][tokens];
  const auto copy = [](const auto& from, auto& to) __attribute__((always_inline)) {
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) {
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) to[r][s][t] = from[r][s][t];
      }
    }
  };
  const auto step = [&](std::int64_t column) __attribute__((always_inline)) {
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) {
      __m256 values[kSections<qtype>];
      decode<qtype>(bytes[r] + column, values);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        const __m256 numbers = _mm256_loadu_ps(x.token(t) + column);
        QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
          sums[r][s][t] = _mm256_fmadd_ps(values[s], numbers, sums[r][s][t]);
        }
      }
    }
  };
  copy(out, sums);
  std::int64_t column = begin;
  for (; column + 32 <= end; column += 32) {
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) prefetch(bytes[r] + column + distance);
    QUANTAL_UNROLL for (int i = 0; i < 4; ++i) step(column + 8 * i);
  }
  for (; column < end; column += 8) step(column);
  copy(sums, out);
}

// The outputs of a step, before the bias, as 8 parts each: totals[token][output].
template <QTypeId qtype, int tokens>
void add_rows(const Operands& w, const Step<qtype>& step, const StepScales<qtype>& scales,
              const FloatTokens& x, int first, __m256 (&totals)[tokens][kOutputs]) {
  constexpr int kRows = kAtOnce<qtype, tokens>;
  const std::uint8_t* bytes[kRows];
  for (int r = 0; r < kRows; ++r) bytes[r] = step.bytes(w, first + r);
  for (std::int64_t g = 0; g < w.groups; ++g) {
    FloatSums<qtype, tokens> sums;
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) {
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) sums[r][s][t] = _mm256_setzero_ps();
      }
    }
    const std::int64_t end = (g + 1) * w.group_columns;
    for (std::int64_t c = g * w.group_columns; c < end; c += kPrefetchBytes) {
      multiply<qtype, tokens>(bytes, c, std::min(end, c + kPrefetchBytes),
                              prefetch_distance<qtype>(w, c), x, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kSections<qtype>; ++s) {
        const int row = step.clamped(first + r);
        const std::int64_t at = (s * kByteRows<qtype> + row) * w.groups + g;
        const __m256 scale = _mm256_broadcast_ss(scales.scales() + at);
        for (int t = 0; t < tokens; ++t) {
          __m256& total = totals[t][s * kByteRows<qtype> + first + r];
          total = _mm256_fmadd_ps(sums[r][s][t], scale, total);
          if constexpr (kSections<qtype> > 1) {
            total = _mm256_fnmadd_ps(_mm256_broadcast_ss(scales.shifts() + at), x.sum(t, g), total);
          }
        }
      }
    }
  }
}

template <QTypeId qtype, int tokens>
void run_floats(const LinearArgs& args, const Operands& w, const ParallelFor& parallel_for) {
  const FloatTokens x(args, w, tokens);
  parallel_for(steps_of<qtype>(w), [&](std::int64_t begin, std::int64_t end) {
    const StepScales<qtype> scales(w.groups);
    for (std::int64_t i = begin; i < end; ++i) {
      const Step<qtype> step(w, i);
      scales.load(w, step);
      __m256 totals[tokens][kOutputs];
      for (auto& token : totals) std::fill_n(token, kOutputs, _mm256_setzero_ps());
      for (int first = 0; first < kByteRows<qtype>; first += kAtOnce<qtype, tokens>) {
        add_rows<qtype, tokens>(w, step, scales, x, first, totals);
      }
      for (int t = 0; t < tokens; ++t) step.store(args, w, t, sums_of(totals[t]), 1);
    }
  });
}

template <QTypeId qtype>
void run_floats(const LinearArgs& args, const Operands& w, const ParallelFor& parallel_for) {
  switch (args.tokens) {
    case 1:
      return run_floats<qtype, 1>(args, w, parallel_for);
    case 2:
      return run_floats<qtype, 2>(args, w, parallel_for);
    case 3:
      return run_floats<qtype, 3>(args, w, parallel_for);
    default:
      return run_floats<qtype, 4>(args, w, parallel_for);
  }
}

// ---- integers

// 16 signed bytes as 16-bit numbers.
inline __m256i widened(const void* bytes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}

template <QTypeId qtype>
int code_at(const std::uint8_t* bytes, std::int64_t column, int section) {
  if constexpr (qtype == QTypeId::kInt8) return static_cast<std::int8_t>(bytes[column]);
  constexpr int kBits = 8 / kSections<qtype>;
  return bytes[column] >> kBits * section & ((1 << kBits) - 1);
}

// Σ code_w·code_x over columns [begin, end) of the rows of a step, exact, of every output.
template <QTypeId qtype>
class IntegerSums {
 public:
  IntegerSums(const Operands& w, const Step<qtype>& step) : w_(w) {
    for (int r = 0; r < kByteRows<qtype>; ++r) bytes_[r] = step.bytes(w, r);
  }

  __m256i over(std::int64_t begin, std::int64_t end, const std::int8_t* x) const {
    __m256i total[kOutputs];
    QUANTAL_UNROLL for (int o = 0; o < kOutputs; ++o) total[o] = _mm256_setzero_si256();
    std::int64_t column = begin;
    while (column + 32 <= end) {
      const std::int64_t stop = std::min(end, column + kPiece);
      column = add(column, stop, prefetch_distance<qtype>(w_, column), x, total);
    }
    const __m256i sums = sums_of(total);
    return column == end ? sums : _mm256_add_epi32(sums, rest(column, end, x));
  }

 private:
  static constexpr int kBits = 8 / kSections<qtype>;
  // So many sums of pairs, each at most 2 · (2^bits − 1) · 128, fit 16 bits.
  static constexpr std::int64_t kPiece =
      qtype == QTypeId::kInt8 ? kPrefetchBytes : 32767 / (2 * ((1 << kBits) - 1) * 128) * 32;

  // Whole steps of 32 columns, and where they end.
  std::int64_t add(std::int64_t column, std::int64_t end, std::int64_t distance,
                   const std::int8_t* x, __m256i (&total)[kOutputs]) const {
    __m256i sums[kOutputs];
    QUANTAL_UNROLL for (int o = 0; o < kOutputs; ++o) sums[o] = _mm256_setzero_si256();
    for (; column + 32 <= end; column += 32) {
      QUANTAL_UNROLL for (int r = 0; r < kByteRows<qtype>; ++r) {
        prefetch(bytes_[r] + column + distance);
      }
      if constexpr (qtype == QTypeId::kInt8) {
        QUANTAL_UNROLL for (int i = 0; i < 32; i += 16) {
          const __m256i numbers = widened(x + column + i);
          QUANTAL_UNROLL for (int r = 0; r < kOutputs; ++r) {
            const __m256i pairs = _mm256_madd_epi16(widened(bytes_[r] + column + i), numbers);
            sums[r] = _mm256_add_epi32(sums[r], pairs);
          }
        }
      } else {
        add_narrow(column, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + column)), sums);
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    QUANTAL_UNROLL for (int o = 0; o < kOutputs; ++o) {
      const __m256i words = qtype == QTypeId::kInt8 ? sums[o] : _mm256_madd_epi16(sums[o], ones);
      total[o] = _mm256_add_epi32(total[o], words);
    }
    return column;
  }

  // 32 columns: sums of pairs of products, of 16 bits.
  void add_narrow(std::int64_t column, __m256i numbers, __m256i (&sums)[kOutputs]) const {
    const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
    QUANTAL_UNROLL for (int r = 0; r < kByteRows<qtype>; ++r) {
      const __m256i codes =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes_[r] + column));
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        const __m256i section = _mm256_and_si256(_mm256_srli_epi16(codes, kBits * s), mask);
        __m256i& sum = sums[s * kByteRows<qtype> + r];
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(section, numbers));
      }
    }
  }

  __m256i rest(std::int64_t begin, std::int64_t end, const std::int8_t* x) const {
    alignas(32) std::int32_t sums[kOutputs] = {};
    for (int s = 0; s < kSections<qtype>; ++s) {
      for (int r = 0; r < kByteRows<qtype>; ++r) {
        for (std::int64_t c = begin; c < end; ++c) {
          sums[s * kByteRows<qtype> + r] += code_at<qtype>(bytes_[r], c, s) * x[c];
        }
      }
    }
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(sums));
  }

  const Operands& w_;
  const std::uint8_t* bytes_[kByteRows<qtype>];
};

// [output][group] to [group][output]. Outputs that are not there get numbers that nobody reads.
void transpose(const float* from, std::int64_t groups, float* to) {
  std::int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    for (int o = 0; o < kOutputs; o += 4) {
      __m128 four[4];
      for (int i = 0; i < 4; ++i) four[i] = _mm_loadu_ps(from + (o + i) * groups + g);
      _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
      for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (g + i) * kOutputs + o, four[i]);
    }
  }
  for (; g < groups; ++g) {
    for (int o = 0; o < kOutputs; ++o) to[g * kOutputs + o] = from[o * groups + g];
  }
}

// The order of integer_linear.h, for the outputs of a step.
template <QTypeId qtype>
__m256 integer_step(const Operands& w, const Step<qtype>& step, const TokenCodes& x,
                    std::int64_t token, const float* scales, const float* shifts) {
  const IntegerSums<qtype> codes(w, step);
  __m256 sums = _mm256_setzero_ps();
  const std::int32_t* x_sum = x.sums(token);
  for (std::int64_t g = 0; g < w.groups; ++g) {
    const std::int64_t end = (g + 1) * w.group_columns;
    const __m256 scale = _mm256_loadu_ps(scales + g * kOutputs);
    for (std::int64_t c = g * w.group_columns; c < end; c += kBlockColumns, ++x_sum) {
      const __m256i exact = codes.over(c, std::min(end, c + kBlockColumns), x.codes(token));
      sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), scale, sums);
      if constexpr (kSections<qtype> > 1) {
        const __m256 x_value = _mm256_set1_ps(static_cast<float>(*x_sum));
        sums = _mm256_fnmadd_ps(x_value, _mm256_loadu_ps(shifts + g * kOutputs), sums);
      }
    }
  }
  return sums;
}

template <QTypeId qtype>
void run_integers(const IntegerLinearArgs& args, const Operands& w,
                  const ParallelFor& parallel_for) {
  const TokenCodes x(w.layout, args.source.tokens);
  quantize_tokens__avx2(w.layout, args.source, 0, args.source.tokens, x);
  parallel_for(steps_of<qtype>(w), [&](std::int64_t begin, std::int64_t end) {
    const StepScales<qtype> given(w.groups), turned(w.groups);
    for (std::int64_t i = begin; i < end; ++i) {
      const Step<qtype> step(w, i);
      given.load(w, step);
      transpose(given.scales(), w.groups, turned.scales());
      if (kSections<qtype> > 1) transpose(given.shifts(), w.groups, turned.shifts());
      for (std::int64_t t = 0; t < args.source.tokens; ++t) {
        const __m256 sums = integer_step(w, step, x, t, turned.scales(), turned.shifts());
        step.store(args, w, t, sums, x.scale(t));
      }
    }
  });
}

Operands operands_of(const PackedLayout& layout, const CanonicalWeight& weight) {
  const std::int64_t sections = layout.depth() / 4;
  return {layout, weight, layout.spec().rows / sections, layout.groups(), layout.group_columns(0)};
}

}  // namespace

void few_from_canonical__avx2(const LinearArgs& args, const CanonicalWeight& weight,
                              const ParallelFor& parallel_for) {
  const Operands w = operands_of(*args.layout, weight);
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return run_floats<QTypeId::kInt2>(args, w, parallel_for);
    case QTypeId::kInt4:
      return run_floats<QTypeId::kInt4>(args, w, parallel_for);
    case QTypeId::kInt8:
      return run_floats<QTypeId::kInt8>(args, w, parallel_for);
    case QTypeId::kFloat8E4M3FN:
      return run_floats<QTypeId::kFloat8E4M3FN>(args, w, parallel_for);
    case QTypeId::kFloat8E4M3FNUZ:
      return run_floats<QTypeId::kFloat8E4M3FNUZ>(args, w, parallel_for);
    case QTypeId::kFloat8E5M2:
      return run_floats<QTypeId::kFloat8E5M2>(args, w, parallel_for);
  }
}

void few_from_canonical__avx2(const IntegerLinearArgs& args, const CanonicalWeight& weight,
                              const ParallelFor& parallel_for) {
  const Operands w = operands_of(*args.layout, weight);
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return run_integers<QTypeId::kInt2>(args, w, parallel_for);
    case QTypeId::kInt4:
      return run_integers<QTypeId::kInt4>(args, w, parallel_for);
    default:
      return run_integers<QTypeId::kInt8>(args, w, parallel_for);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
