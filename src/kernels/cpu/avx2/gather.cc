// Gathering rows of a weight in canonical form for AVX2: the numbers of the portable reading.
#include "kernels/gather.h"

#include <immintrin.h>

#include <cstring>

#include "kernels/for_qtype.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/numbers.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kStep = 16;  ///< codes at a time

// What a call may touch: codes before `codes_end`, elements of y before `y_end`.
struct Bounds {
  const std::uint8_t* codes_end;
  std::int64_t y_end;
};

// A code row, the columns of padding left out. Its last step may write beyond it, where what comes
// next in y is written later.
template <QTypeId qtype, FloatType type>
void decode(const Gather& gather, const Bounds& bounds, std::int64_t code_row, std::int64_t index) {
  constexpr int kBits = qtype == QTypeId::kInt2 ? 2 : qtype == QTypeId::kInt4 ? 4 : 8;
  const CanonicalCodes& codes = gather.codes;
  const FloatType scale_type = gather.spec.scale_type;
  const __m256 scale = _mm256_set1_ps(load_float(gather.weight.scale, code_row, scale_type));
  const __m256 shift = kBits < 8
                           ? _mm256_set1_ps(load_float(gather.weight.shift, code_row, scale_type))
                           : _mm256_setzero_ps();
  const std::uint8_t* from = gather.weight.data + codes.byte(code_row);
  const std::int64_t columns = codes.columns(code_row);
  const __m128i bit = _mm_cvtsi32_si128(codes.shift(code_row));
  const auto value = [&](__m128i bytes) {
    const __m256 product = _mm256_mul_ps(numbers<qtype>(bytes), scale);
    return kBits < 8 ? _mm256_sub_ps(product, shift) : product;
  };
  const auto decode_step = [&](const std::uint8_t* step, void* y, std::int64_t at) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(step));
    if (kBits < 8) {
      bytes = _mm_and_si128(_mm_srl_epi16(bytes, bit), _mm_set1_epi8((1 << kBits) - 1));
    }
    store_numbers(y, at, type, value(bytes));
    store_numbers(y, at + 8, type, value(_mm_unpackhi_epi64(bytes, bytes)));
  };
  std::int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) decode_step(from + c, gather.y, index + c);
  if (c == columns) return;
  if (bounds.codes_end - from >= c + kStep && index + c + kStep <= bounds.y_end) {
    decode_step(from + c, gather.y, index + c);
    return;
  }
  std::uint8_t rest[kStep] = {};
  std::memcpy(rest, from + c, columns - c);
  std::byte values[kStep * sizeof(float)];
  decode_step(rest, values, 0);
  const std::int64_t size = size_of(type);
  std::memcpy(static_cast<std::byte*>(gather.y) + (index + c) * size, values, (columns - c) * size);
}

template <QTypeId qtype, FloatType type>
void gather_all(const Gather& gather, std::int64_t begin, std::int64_t end) {
  const CanonicalCodes& codes = gather.codes;
  const Bounds bounds{gather.weight.data + codes.size(), end * gather.spec.columns};
  for (std::int64_t i = begin; i < end; ++i) {
    std::int64_t index = i * gather.spec.columns;
    for (std::int64_t group = 0; group < codes.groups(); ++group) {
      const std::int64_t code_row = codes.code_row(gather.row(i), group);
      decode<qtype, type>(gather, bounds, code_row, index);
      index += codes.columns(code_row);
    }
  }
}

template <QTypeId qtype>
void gather_as(const Gather& gather, std::int64_t begin, std::int64_t end) {
  switch (gather.type) {
    case FloatType::kF32:
      return gather_all<qtype, FloatType::kF32>(gather, begin, end);
    case FloatType::kBF16:
      return gather_all<qtype, FloatType::kBF16>(gather, begin, end);
    case FloatType::kF16:
      return gather_all<qtype, FloatType::kF16>(gather, begin, end);
  }
}

}  // namespace

void gather_rows__avx2(const Gather& gather, std::int64_t begin, std::int64_t end) {
  for_qtype(gather.spec.qtype, [&]<QTypeId qtype>() { gather_as<qtype>(gather, begin, end); });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
