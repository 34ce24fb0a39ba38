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
  if (source.has_codes()) return copy_tokens(layout, source, begin, end, out);
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t from = t * source.stride;
    const float scale =
        scale_for(max_magnitude__avx2(source.x, source.type, from, from + layout.spec().columns));
    const bool is_finite = !std::isnan(scale);
    out.scale(t) = scale;
    for (std::int64_t group = 0; group < layout.groups(); ++group) {
      std::int8_t* codes = out.codes(t) + layout.padded_begin(group);
      const std::int64_t columns = layout.group_columns(group);
      if (is_finite) {
        const std::int64_t begin = from + layout.group_begin(group);
        quantize_codes__avx2(source.x, source.type, begin, begin + columns, scale, codes - begin);
      } else {
        std::memset(codes, 0, columns);
      }
    }
    out.finish(layout, t);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
