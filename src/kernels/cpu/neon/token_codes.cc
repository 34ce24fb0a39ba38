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
float magnitude(const void* x, FloatType type, std::int64_t begin, std::int64_t end) {
  uint32x4_t most = vdupq_n_u32(0);
  std::int64_t i = begin;
  for (; i + kQuarterRows <= end; i += kQuarterRows) {
    most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(load_rows(x, i, type))));
  }
  std::uint32_t top = vmaxvq_u32(most);
  for (; i < end; ++i) {
    const float value = std::fabs(load_float(x, i, type));
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    top = std::max(top, bits);
  }
  float result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

}  // namespace

void quantize_tokens__neon(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  quantize_tokens(layout, source, begin, end, out,
                  {magnitude, quantize_codes__neon, sum_codes__portable});
}

}  // namespace quantal::kernels
