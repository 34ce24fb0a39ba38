// Quantizing tokens to int8 for AVX2: the same codes and scales as the portable reading gives.
#include "kernels/token_codes.h"

#include <cmath>
#include <cstring>

#include "kernels/activation_codes.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace quantal::kernels {

void quantize_tokens__avx2(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  quantize_tokens(layout, source, begin, end, out, max_magnitude__avx2, quantize_codes__avx2);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
