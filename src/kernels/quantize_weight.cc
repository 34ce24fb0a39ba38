#include "kernels/quantize_weight.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>

namespace quantal::kernels {
namespace {

// Elements that a thread takes before it looks whether another one found the attempt to be vain.
constexpr std::int64_t kPiece = 1 << 18;

// The largest scale whose product with the largest code is finite.
float largest_scale(float levels) {
  float scale = std::numeric_limits<float>::max() / levels;
  while (std::isinf(scale * levels)) scale = std::nextafter(scale, 0.0F);
  return scale;
}

GroupsSeen quantize_rows(Isa isa, const QuantizeArgs& args, const CanonicalCodes& codes,
                         std::int64_t begin, std::int64_t end) {
#if defined(__x86_64__)
  if (isa != Isa::kPortable) return quantize_rows__avx2(args, codes, begin, end);
#endif
  static_cast<void>(isa);
  return quantize_rows__portable(args, codes, begin, end);
}

void merge(GroupsSeen& all, const GroupsSeen& seen) {
  all.is_finite = all.is_finite && seen.is_finite;
  all.is_exact_enough = all.is_exact_enough && seen.is_exact_enough;
  all.largest_scale = std::max(all.largest_scale, seen.largest_scale);
  all.largest_shift = std::max(all.largest_shift, seen.largest_shift);
}

// Affine values or spans that come near the largest float. fp16 scales are far from it.
bool is_wide(const GroupsSeen& all, const WeightSpec& spec) {
  if (CanonicalCodes(spec).bits() == 8 || spec.scale_type == FloatType::kF16) return false;
  const double span = static_cast<double>(all.largest_scale) * scale_bounds(spec.qtype).levels;
  return span + all.largest_shift > std::numeric_limits<float>::max() / 2;
}

}  // namespace

ScaleBounds scale_bounds(QTypeId qtype) {
  constexpr float kTiny = std::numeric_limits<float>::min();
  // Of each type: the size of its largest code, and of its smallest.
  float levels = 0, code = 1;
  switch (qtype) {
    case QTypeId::kInt2:
      levels = 3;
      break;
    case QTypeId::kInt4:
      levels = 15;
      break;
    case QTypeId::kInt8:
      levels = 127;
      break;
    case QTypeId::kFloat8E4M3FN:
      levels = 448;
      code = 0x1p-9F;
      break;
    case QTypeId::kFloat8E4M3FNUZ:
      levels = 240;
      code = 0x1p-10F;
      break;
    case QTypeId::kFloat8E5M2:
      levels = 57344;
      code = 0x1p-16F;
      break;
  }
  return {levels, 2 * kTiny / code, largest_scale(levels)};
}

Quantized quantize_weight(Isa isa, const QuantizeArgs& args, const ParallelFor& parallel_for) {
  const CanonicalCodes codes(args.spec);
  const std::int64_t step =
      std::max<std::int64_t>(1, kPiece / std::max<std::int64_t>(1, codes.width()));
  GroupsSeen all;
  std::mutex mutex;
  std::atomic<bool> is_vain{false};
  parallel_for(codes.packed_rows(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end && !is_vain; row += step) {
      const GroupsSeen seen = quantize_rows(isa, args, codes, row, std::min(end, row + step));
      const std::lock_guard lock(mutex);
      merge(all, seen);
      if (!all.is_finite || !all.is_exact_enough) is_vain = true;
    }
  });
  if (!all.is_finite) return Quantized::kNotInFloat;
  if (!all.is_exact_enough) return Quantized::kNeedsFloatScales;
  return is_wide(all, args.spec) ? Quantized::kNotInFloat : Quantized::kDone;
}

}  // namespace quantal::kernels
