// Quantizing tokens to int8 for NEON: the same codes and scales as the portable reading gives.
#include "kernels/token_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/activation_codes.h"
#include "kernels/cpu/neon/rows.h"

namespace quantal::kernels {
namespace {

// max|x| as its bits, which order as the numbers do; a NaN or infinity gives at least 0x7F800000.
float absmax(const void* x, std::int64_t begin, std::int64_t count, FloatType type) {
  uint32x4_t most = vdupq_n_u32(0);
  std::int64_t i = 0;
  for (; i + kQuarterRows <= count; i += kQuarterRows) {
    const float32x4_t magnitude = vabsq_f32(load_rows(x, begin + i, type));
    most = vmaxq_u32(most, vreinterpretq_u32_f32(magnitude));
  }
  std::uint32_t top = vmaxvq_u32(most);
  for (; i < count; ++i) {
    const float magnitude = std::fabs(load_float(x, begin + i, type));
    std::uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    top = std::max(top, bits);
  }
  float result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

}  // namespace

void quantize_tokens__neon(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  if (source.has_codes()) {
    quantize_tokens__portable(layout, source, begin, end, out);
    return;
  }
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t from = t * source.stride;
    const float most = absmax(source.x, from, layout.spec().columns, source.type);
    const bool is_finite = std::isfinite(most);
    const float scale = std::max(most / 127, std::numeric_limits<float>::min());
    out.scale(t) = is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
    for (std::int64_t group = 0; group < layout.groups(); ++group) {
      std::int8_t* codes = out.codes(t) + layout.padded_begin(group);
      const std::int64_t columns = layout.group_columns(group);
      if (is_finite) {
        const std::int64_t first = from + layout.group_begin(group);
        quantize_codes__neon(source.x, source.type, first, first + columns, scale, codes - first);
      } else {
        std::memset(codes, 0, columns);
      }
    }
    out.finish(layout, t);
  }
}

}  // namespace quantal::kernels
