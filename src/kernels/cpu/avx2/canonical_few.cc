// A few tokens by a weight in canonical form, for AVX2 (canonical_rows.h).
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/canonical_linear.h"
#include "kernels/for_qtype.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/canonical_floats.h"
#include "kernels/cpu/avx2/float8.h"

namespace quantal::kernels {
namespace {

// 8 columns of a section as floats; `words` are their bytes, one in each 32-bit lane.
template <QTypeId qtype, int section>
__m256 floats_of(__m256i words) {
  constexpr int kBits = 8 / kSections<qtype>;
  const __m256i shifted = _mm256_srli_epi32(words, kBits * section);
  if constexpr (section + 1 == kSections<qtype>) return _mm256_cvtepi32_ps(shifted);
  return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << kBits) - 1)));
}

struct Floats8 {
  using Register = __m256;
  static constexpr int kLanes = 8, kParts = 1, kUnrolled = 32, kSums = 8;

  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, __m256 v) { _mm256_storeu_ps(to, v); }
  static __m256 broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 fmadd(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256 fnmadd(__m256 a, __m256 b, __m256 c) { return _mm256_fnmadd_ps(a, b, c); }
  static __m256 convert(const void* x, std::int64_t index, FloatType type) {
    return load_rows(x, index, type);
  }
  static void arrange(float*, std::int64_t) {}
  static __m256 eight_parts(__m256 v) { return v; }

  template <QTypeId qtype>
  static void decode(const std::uint8_t* bytes, __m256 (&out)[kParts][kSections<qtype>]) {
    __m256(&values)[kSections<qtype>] = out[0];
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
};

__m256i sums_of(const __m256i (&v)[kOutputs]) {
  const __m256i low =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i high =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                          _mm256_permute2x128_si256(low, high, 0x31));
}

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

}  // namespace

void few_from_canonical__avx2(const LinearArgs& args, const CanonicalWeight& weight,
                              const ParallelFor& parallel_for) {
  const Operands w = operands_of(*args.layout, weight);
  for_qtype(args.layout->spec().qtype,
            [&]<QTypeId qtype>() { run_floats<Floats8, qtype>(args, w, parallel_for); });
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
