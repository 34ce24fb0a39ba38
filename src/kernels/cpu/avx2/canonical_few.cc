// A few tokens by a weight in canonical form, for AVX2: rows are read where they lie, since packing
// them first would take longer than the products. Bytes of narrow codes hold 2 or 4 rows, which are
// as far apart as the weight is high, and are multiplied together.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/canonical_linear.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/float8.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr int kPrefetchBytes = 1024;
/// Vectors of 8 columns that a step multiplies, each with sums of its own.
constexpr int kChains = 2;

template <QTypeId qtype>
constexpr int kSections = qtype == QTypeId::kInt2   ? 4
                          : qtype == QTypeId::kInt4 ? 2
                                                    : 1;

// Where what computes finds its operands: byte row r holds rows r + section · byte_rows.
struct Operands {
  const PackedLayout& layout;
  const CanonicalWeight& weight;
  std::int64_t byte_rows;
  std::int64_t groups, group_columns;

  const std::uint8_t* bytes(std::int64_t row) const {
    return weight.data + row * layout.spec().columns;
  }
};

// `count` numbers from `index` on, as fp32.
void load_floats(const void* from, std::int64_t index, std::int64_t count, FloatType type,
                 float* to) {
  std::int64_t i = 0;
  for (; i + kHalfRows <= count; i += kHalfRows) {
    _mm256_storeu_ps(to + i, load_rows(from, index + i, type));
  }
  for (; i < count; ++i) to[i] = load_float(from, index + i, type);
}

// Scales and shifts of the rows that share a byte row.
template <int sections>
class RowScales {
 public:
  explicit RowScales(std::int64_t groups) : groups_(groups), values_(2 * sections * groups) {}

  void load(const Operands& w, std::int64_t row) const {
    for (int s = 0; s < sections; ++s) {
      const std::int64_t first = (row + s * w.byte_rows) * groups_;
      const FloatType type = w.layout.spec().scale_type;
      load_floats(w.weight.scale, first, groups_, type, at(s));
      if (sections > 1) load_floats(w.weight.shift, first, groups_, type, at(sections + s));
    }
  }
  float scale(int section, std::int64_t group) const { return at(section)[group]; }
  float shift(int section, std::int64_t group) const { return at(sections + section)[group]; }

 private:
  float* at(int line) const { return values_.data() + line * groups_; }

  std::int64_t groups_;
  Scratch values_;
};

float sum_of(__m256 value) {
  float lanes[8];
  _mm256_storeu_ps(lanes, value);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

std::int32_t sum_of(__m256i value) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01'00'11'10));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10'11'00'01));
  return _mm_cvtsi128_si32(sum);
}

// ---- floats

// 8 columns of a section as floats; `words` are their bytes, one in each 32-bit lane.
template <QTypeId qtype, int section>
__m256 floats_of(__m256i words) {
  constexpr int kBits = 8 / kSections<qtype>;
  const __m256i shifted = _mm256_srli_epi32(words, kBits * section);
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

// Σ code·x over `columns` (a multiple of 8) for each section and token.
template <QTypeId qtype, int tokens>
void multiply(const std::uint8_t* bytes, std::int64_t columns, const float* const (&x)[tokens],
              __m256 (&out)[kSections<qtype>][tokens]) {
  __m256 sums[kSections<qtype>][tokens][kChains];
  QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) sums[s][t][c] = _mm256_setzero_ps();
    }
  }
  const auto step = [&](std::int64_t column, int chain) __attribute__((always_inline)) {
    __m256 values[kSections<qtype>];
    decode<qtype>(bytes + column, values);
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const __m256 numbers = _mm256_loadu_ps(x[t] + column);
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        sums[s][t][chain] = _mm256_fmadd_ps(values[s], numbers, sums[s][t][chain]);
      }
    }
  };
  std::int64_t column = 0;
  for (; column + 8 * kChains <= columns; column += 8 * kChains) {
    _mm_prefetch(reinterpret_cast<const char*>(bytes + column) + kPrefetchBytes, _MM_HINT_T0);
    QUANTAL_UNROLL for (int chain = 0; chain < kChains; ++chain) step(column + 8 * chain, chain);
  }
  for (; column < columns; column += 8) step(column, 0);
  QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      out[s][t] = _mm256_add_ps(sums[s][t][0], sums[s][t][1]);
    }
  }
}

template <QTypeId qtype, int tokens>
void float_row(const LinearArgs& args, const Operands& w, const float* x, const float* x_sums,
               const RowScales<kSections<qtype>>& scales, std::int64_t row) {
  scales.load(w, row);
  __m256 total[kSections<qtype>][tokens];
  QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) total[s][t] = _mm256_setzero_ps();
  }
  float offset[kSections<qtype>][tokens] = {};
  const std::int64_t columns = w.layout.spec().columns;
  for (std::int64_t g = 0; g < w.groups; ++g) {
    const std::int64_t first = g * w.group_columns;
    const float* tokens_x[tokens];
    for (int t = 0; t < tokens; ++t) tokens_x[t] = x + t * columns + first;
    __m256 sums[kSections<qtype>][tokens];
    multiply<qtype, tokens>(w.bytes(row) + first, w.group_columns, tokens_x, sums);
    for (int s = 0; s < kSections<qtype>; ++s) {
      const __m256 scale = _mm256_set1_ps(scales.scale(s, g));
      const float shift = kSections<qtype> > 1 ? scales.shift(s, g) : 0.0F;
      for (int t = 0; t < tokens; ++t) {
        total[s][t] = _mm256_fmadd_ps(sums[s][t], scale, total[s][t]);
        if (kSections<qtype> > 1) offset[s][t] += shift * x_sums[t * w.groups + g];
      }
    }
  }
  for (int s = 0; s < kSections<qtype>; ++s) {
    const std::int64_t out = row + s * w.byte_rows;
    const float bias = args.bias != nullptr ? load_float(args.bias, out, args.type) : 0.0F;
    for (int t = 0; t < tokens; ++t) {
      const float y = sum_of(total[s][t]) - offset[s][t] + bias;
      store_float(args.y, t * args.y_stride + out, args.type, y);
    }
  }
}

template <QTypeId qtype, int tokens>
void run_floats(const LinearArgs& args, const Operands& w, const ParallelFor& parallel_for) {
  const std::int64_t columns = w.layout.spec().columns;
  const Scratch x(tokens * columns), x_sums(tokens * w.groups);
  for (int t = 0; t < tokens; ++t) {
    float* to = x.data() + t * columns;
    for (std::int64_t c = 0; c < columns; c += 8) {
      _mm256_storeu_ps(to + c, load_rows(args.x, t * args.x_stride + c, args.type));
    }
    for (std::int64_t g = 0; g < w.groups; ++g) {
      __m256 sum = _mm256_setzero_ps();
      for (std::int64_t c = 0; c < w.group_columns; c += 8) {
        sum = _mm256_add_ps(sum, _mm256_loadu_ps(to + g * w.group_columns + c));
      }
      x_sums.data()[t * w.groups + g] = sum_of(sum);
    }
  }
  parallel_for(w.byte_rows, [&](std::int64_t begin, std::int64_t end) {
    const RowScales<kSections<qtype>> scales(w.groups);
    for (std::int64_t row = begin; row < end; ++row) {
      float_row<qtype, tokens>(args, w, x.data(), x_sums.data(), scales, row);
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

// Σ code_w·code_x over a group, exact, for each section.
template <QTypeId qtype>
struct IntegerDot {
  static constexpr int kBits = 8 / kSections<qtype>;
  // So many sums of pairs, each at most 2 · (2^bits − 1) · 128, fit 16 bits.
  static constexpr int kSafe = 32767 / (2 * ((1 << kBits) - 1) * 128);

  static void sums(const std::uint8_t* bytes, std::int64_t columns, const std::int8_t* x,
                   std::int32_t (&out)[kSections<qtype>]) {
    const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1), ones = _mm256_set1_epi16(1);
    // Not by `= {}`, which GCC zeroes in memory, in halves that no 32-byte load can be served from.
    __m256i total[kSections<qtype>];
    QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) total[s] = _mm256_setzero_si256();
    std::int64_t column = 0;
    while (column + 32 <= columns) {
      const std::int64_t end = std::min(columns - 31, column + 32 * kSafe);
      __m256i pairs[kSections<qtype>];
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) pairs[s] = _mm256_setzero_si256();
      for (; column < end; column += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(bytes + column) + kPrefetchBytes, _MM_HINT_T0);
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + column));
        const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + column));
        QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
          const __m256i section = _mm256_and_si256(_mm256_srli_epi16(codes, kBits * s), mask);
          pairs[s] = _mm256_add_epi16(pairs[s], _mm256_maddubs_epi16(section, numbers));
        }
      }
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        total[s] = _mm256_add_epi32(total[s], _mm256_madd_epi16(pairs[s], ones));
      }
    }
    QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) out[s] = sum_of(total[s]);
    for (; column < columns; ++column) {
      for (int s = 0; s < kSections<qtype>; ++s) {
        out[s] += (bytes[column] >> kBits * s & ((1 << kBits) - 1)) * x[column];
      }
    }
  }
};

// 16 signed bytes as 16-bit numbers.
inline __m256i widened(const void* bytes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}

template <>
struct IntegerDot<QTypeId::kInt8> {
  static void sums(const std::uint8_t* bytes, std::int64_t columns, const std::int8_t* x,
                   std::int32_t (&out)[1]) {
    __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    std::int64_t column = 0;
    for (; column + 32 <= columns; column += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes + column) + kPrefetchBytes, _MM_HINT_T0);
      QUANTAL_UNROLL for (int i = 0; i < 2; ++i) {
        const std::int64_t at = column + 16 * i;
        total[i] =
            _mm256_add_epi32(total[i], _mm256_madd_epi16(widened(bytes + at), widened(x + at)));
      }
    }
    out[0] = sum_of(_mm256_add_epi32(total[0], total[1]));
    for (; column < columns; ++column)
      out[0] += static_cast<std::int8_t>(bytes[column]) * x[column];
  }
};

// The order of integer_linear.h, a row and token at a time.
template <QTypeId qtype>
void integer_row(const IntegerLinearArgs& args, const Operands& w, const TokenCodes& x,
                 const RowScales<kSections<qtype>>& scales, std::int64_t row, std::int64_t token) {
  float sums[kSections<qtype>] = {};
  for (std::int64_t g = 0; g < w.groups; ++g) {
    const std::int64_t first = g * w.group_columns;
    for (std::int64_t block = 0; block < x.blocks_per_group(); ++block) {
      const std::int64_t begin = std::min(w.group_columns, block * kBlockColumns);
      const std::int64_t end = std::min(w.group_columns, begin + kBlockColumns);
      std::int32_t exact[kSections<qtype>];
      IntegerDot<qtype>::sums(w.bytes(row) + first + begin, end - begin,
                              x.codes(token) + first + begin, exact);
      const auto x_sum = static_cast<float>(x.sums(token)[g * x.blocks_per_group() + block]);
      for (int s = 0; s < kSections<qtype>; ++s) {
        sums[s] = __builtin_fmaf(static_cast<float>(exact[s]), scales.scale(s, g), sums[s]);
        if (kSections<qtype> > 1) sums[s] = __builtin_fmaf(x_sum, -scales.shift(s, g), sums[s]);
      }
    }
  }
  for (int s = 0; s < kSections<qtype>; ++s) {
    const std::int64_t out = row + s * w.byte_rows;
    const float bias = args.bias != nullptr ? load_float(args.bias, out, args.type) : 0.0F;
    store_float(args.y, token * args.y_stride + out, args.type,
                __builtin_fmaf(sums[s], x.scale(token), bias));
  }
}

template <QTypeId qtype>
void run_integers(const IntegerLinearArgs& args, const Operands& w,
                  const ParallelFor& parallel_for) {
  const TokenCodes x(w.layout, args.source.tokens);
  quantize_tokens__avx2(w.layout, args.source, 0, args.source.tokens, x);
  parallel_for(w.byte_rows, [&](std::int64_t begin, std::int64_t end) {
    const RowScales<kSections<qtype>> scales(w.groups);
    for (std::int64_t row = begin; row < end; ++row) {
      scales.load(w, row);
      for (std::int64_t t = 0; t < args.source.tokens; ++t) {
        integer_row<qtype>(args, w, x, scales, row, t);
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
