// Quantizing a weight, as docs/numerics.md says it, element by element.
#include "kernels/quantize_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace quantal::kernels {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();

float rounded(float value, FloatType type) {
  std::uint32_t bits = 0;
  store_float(&bits, 0, type, value);
  return load_float(&bits, 0, type);
}

// Affine codes depend on differences of small numbers: without subnormal ones they are the same
// where the processor flushes those. -0 becomes 0.
float without_subnormal(float value) { return std::abs(value) < kTiny ? 0.0F : value; }

struct Group {
  float scale = 1;
  float shift = 0;
};

// Scale and shift of one code row, as they are stored.
Group choose(const QuantizeArgs& args, const CanonicalCodes& codes, std::int64_t code_row,
             GroupsSeen& seen) {
  const ScaleBounds bounds = scale_bounds(args.spec.qtype);
  const bool is_affine = codes.bits() < 8;
  const std::int64_t first = codes.element(code_row), count = codes.columns(code_row);
  float low = INFINITY, high = -INFINITY, most = 0;
  for (std::int64_t i = first; i < first + count; ++i) {
    const float value = load_float(args.weight, i, args.type);
    seen.is_finite = seen.is_finite && std::isfinite(value);
    low = std::min(low, value);
    high = std::max(high, value);
    most = std::max(most, std::abs(value));
  }
  low = without_subnormal(low);
  const float range = is_affine ? without_subnormal(high) - low : most;
  seen.is_finite = seen.is_finite && std::isfinite(range);
  const float quotient = range / bounds.levels;
  const float scale =
      range < kTiny ? 1.0F : std::min(std::max(quotient, bounds.smallest), bounds.largest);
  const float shift = is_affine ? -low : 0.0F;
  const FloatType type = args.spec.scale_type;
  const Group stored{rounded(scale, type), rounded(shift, type)};
  if (type != FloatType::kF32) {
    const float smallest_normal = type == FloatType::kF16 ? 0x1p-14F : kTiny;
    const float top = stored.scale * bounds.levels;
    const bool holds = stored.scale >= smallest_normal && std::isfinite(stored.scale) &&
                       std::abs(stored.shift - shift) <= stored.scale * 0.25F &&
                       std::isfinite(rounded(is_affine ? top - stored.shift : top, type));
    seen.is_exact_enough = seen.is_exact_enough && holds;
  }
  seen.largest_scale = std::max(seen.largest_scale, stored.scale);
  seen.largest_shift = std::max(seen.largest_shift, std::abs(stored.shift));
  return stored;
}

std::uint8_t encode(QTypeId qtype, float value, const Group& group, float levels) {
  if (qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4) {
    const float quotient = (without_subnormal(value) + group.shift) / group.scale;
    return static_cast<std::uint8_t>(std::clamp(std::nearbyint(quotient), 0.0F, levels));
  }
  const float quotient = value / group.scale;
  if (qtype == QTypeId::kInt8) {
    const float code = std::clamp(std::nearbyint(quotient), -levels, levels);
    return static_cast<std::uint8_t>(static_cast<std::int8_t>(code));
  }
  const float saturated = std::clamp(quotient, -levels, levels);
  return qtype == QTypeId::kFloat8E4M3FN     ? e4m3fn_code(saturated)
         : qtype == QTypeId::kFloat8E4M3FNUZ ? e4m3fnuz_code(saturated)
                                             : e5m2_code(saturated);
}

}  // namespace

GroupsSeen quantize_rows__portable(const QuantizeArgs& args, const CanonicalCodes& codes,
                                   std::int64_t begin, std::int64_t end) {
  GroupsSeen seen;
  const float levels = scale_bounds(args.spec.qtype).levels;
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* bytes = args.out.data + row * codes.width();
    std::memset(bytes, 0, codes.width());
    for (std::int64_t r = row; r < codes.code_rows(); r += codes.packed_rows()) {
      const Group group = choose(args, codes, r, seen);
      if (!seen.is_finite) return seen;  // a NaN has no code
      store_float(args.out.scale, r, args.spec.scale_type, group.scale);
      if (codes.bits() < 8) store_float(args.out.shift, r, args.spec.scale_type, group.shift);
      if (!seen.is_exact_enough) return seen;
      const std::int64_t first = codes.element(r), last = codes.columns(r) - 1;
      for (std::int64_t c = 0; c < codes.width(); ++c) {
        // Padding repeats the last element.
        const float value = load_float(args.weight, first + std::min(c, last), args.type);
        bytes[c] |= static_cast<std::uint8_t>(encode(args.spec.qtype, value, group, levels)
                                              << codes.shift(r));
      }
    }
  }
  return seen;
}

}  // namespace quantal::kernels
