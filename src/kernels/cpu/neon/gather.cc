// Gathering rows of a weight in canonical form for NEON: the numbers of the portable reading.
#include "kernels/gather.h"

#include <arm_neon.h>

#include <cstring>

#include "kernels/cpu/neon/numbers.h"
#include "kernels/for_qtype.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kStep = 16;  ///< codes at a time

/// A code row's scale, shift and place in its bytes.
template <QTypeId qtype>
struct CodeRow {
  static constexpr int kBits = qtype == QTypeId::kInt2 ? 2 : qtype == QTypeId::kInt4 ? 4 : 8;

  CodeRow(const Gather& gather, std::int64_t code_row)
      : scale(vdupq_n_f32(load_float(gather.weight.scale, code_row, gather.spec.scale_type))),
        shift(vdupq_n_f32(0)),
        bit(vdupq_n_s8(static_cast<std::int8_t>(-gather.codes.shift(code_row)))) {
    if constexpr (kBits < 8) {
      shift = vdupq_n_f32(load_float(gather.weight.shift, code_row, gather.spec.scale_type));
    }
  }

  void decode(const std::uint8_t* from, FloatType type, void* y, std::int64_t index) const {
    uint8x16_t codes = vld1q_u8(from);
    if constexpr (kBits < 8) {
      codes = vandq_u8(vshlq_u8(codes, bit), vdupq_n_u8((1 << kBits) - 1));
    }
    float32x4_t values[4];
    numbers<qtype>(codes, values);
    QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
      // Two roundings, as in the portable reading.
      store_numbers(y, index + i * kQuarterRows, type,
                    vsubq_f32(vmulq_f32(values[i], scale), shift));
    }
  }

  float32x4_t scale, shift;
  int8x16_t bit;
};

template <QTypeId qtype>
void gather_all(const Gather& gather, std::int64_t begin, std::int64_t end) {
  const CanonicalCodes& codes = gather.codes;
  const std::int64_t size = size_of(gather.type);
  for (std::int64_t i = begin; i < end; ++i) {
    std::int64_t index = i * gather.spec.columns;
    for (std::int64_t group = 0; group < codes.groups(); ++group) {
      const std::int64_t code_row = codes.code_row(gather.row(i), group);
      const CodeRow<qtype> row(gather, code_row);
      const std::uint8_t* from = gather.weight.data + codes.byte(code_row);
      const std::int64_t columns = codes.columns(code_row);
      std::int64_t c = 0;
      for (; c + kStep <= columns; c += kStep) {
        row.decode(from + c, gather.type, gather.y, index + c);
      }
      if (c < columns) {
        std::uint8_t rest[kStep] = {};
        std::memcpy(rest, from + c, columns - c);
        std::byte values[kStep * sizeof(float)];
        row.decode(rest, gather.type, values, 0);
        std::memcpy(static_cast<std::byte*>(gather.y) + (index + c) * size, values,
                    (columns - c) * size);
      }
      index += columns;
    }
  }
}

}  // namespace

void gather_rows__neon(const Gather& gather, std::int64_t begin, std::int64_t end) {
  for_qtype(gather.spec.qtype, [&]<QTypeId qtype>() { gather_all<qtype>(gather, begin, end); });
}

}  // namespace quantal::kernels
