#include "kernels/gather.h"

#include <algorithm>

#include "kernels/linear.h"
#include "kernels/variants.h"

namespace quantal::kernels {

namespace {

// A code row, the columns of padding left out, at y[index].
void gather_code_row(const Gather& gather, std::int64_t code_row, std::int64_t index) {
  const CanonicalCodes& codes = gather.codes;
  const WeightSpec& spec = gather.spec;
  const bool is_affine = codes.bits() < 8;
  const float scale = load_float(gather.weight.scale, code_row, spec.scale_type);
  const float shift = is_affine ? load_float(gather.weight.shift, code_row, spec.scale_type) : 0;
  const std::uint8_t* from = gather.weight.data + codes.byte(code_row);
  const int bit = codes.shift(code_row), mask = (1 << codes.bits()) - 1;
  const int flip = spec.qtype == QTypeId::kInt8 ? 0x80 : 0;  // code_value() takes it packed
  for (std::int64_t c = 0; c < codes.columns(code_row); ++c) {
    const auto code = static_cast<std::uint8_t>((from[c] >> bit & mask) ^ flip);
    float value = code_value(spec.qtype, code) * scale - shift;
    if (gather.type == FloatType::kF16) value = std::clamp(value, -65504.0F, 65504.0F);
    store_float(gather.y, index + c, gather.type, value);
  }
}

void gather_all(Isa isa, const Gather& gather, std::int64_t count,
                const ParallelFor& parallel_for) {
  using Rows = void (*)(const Gather&, std::int64_t, std::int64_t);
  const Rows rows = best_variant<Rows>(isa, {
#if defined(__x86_64__)
                                                {Isa::kAvx2, gather_rows__avx2},
#elif defined(__aarch64__)
                                                {Isa::kNeon, gather_rows__neon},
#endif
                                                {Isa::kPortable, gather_rows__portable}});
  parallel_for(count, [&](std::int64_t begin, std::int64_t end) { rows(gather, begin, end); });
}

}  // namespace

void gather_rows__portable(const Gather& gather, std::int64_t begin, std::int64_t end) {
  const CanonicalCodes& codes = gather.codes;
  for (std::int64_t i = begin; i < end; ++i) {
    std::int64_t index = i * gather.spec.columns;
    for (std::int64_t group = 0; group < codes.groups(); ++group) {
      const std::int64_t code_row = codes.code_row(gather.row(i), group);
      gather_code_row(gather, code_row, index);
      index += codes.columns(code_row);
    }
  }
}

void gather_rows(Isa isa, const WeightSpec& spec, const CanonicalWeight& weight,
                 const std::int64_t* indices, std::int64_t count, FloatType type, void* y,
                 const ParallelFor& parallel_for) {
  const CanonicalCodes codes(spec);
  gather_all(isa, {spec, codes, weight, indices, type, y}, count, parallel_for);
}

void dequantize_canonical(Isa isa, const WeightSpec& spec, const CanonicalWeight& weight,
                          std::int64_t first, std::int64_t count, FloatType type, void* y,
                          const ParallelFor& parallel_for) {
  const CanonicalCodes codes(spec);
  gather_all(isa, {spec, codes, weight, nullptr, type, y, first}, count, parallel_for);
}

}  // namespace quantal::kernels
