// Integer linear for AMX: tdpbsud multiplies signed activations by unsigned weights.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/integer_linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/amx/product.h"
#include "kernels/cpu/avx512/byte_lines.h"

namespace quantal::kernels {
namespace {

template <int bits>
struct ByteProduct : ByteSums<bits> {
  template <int sums, int x, int weight>
  static inline __attribute__((always_inline)) void add() {
    add_byte_products<sums, x, weight>();
  }
};

template <int bits>
void run(const IntegerLinearArgs& args, const TokenCodes& codes, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const std::int64_t blocks = layout.groups() * codes.blocks_per_group();
  for (std::int64_t t = 0; t < codes.tokens(); ++t) {
    std::int32_t* sums = codes.sums(t);
    for (std::int64_t i = 0; i < blocks; ++i) sums[i] = ByteSums<bits>::x_sum(sums[i]);
  }
  const TileJob job{.layout = &layout,
                    .weight = args.weight,
                    .tokens = codes.tokens(),
                    .x = reinterpret_cast<const std::int32_t*>(codes.codes(0)),
                    .x_stride = codes.stride() / 4,
                    .part_stride = 0,
                    .group_words = layout.padded_begin(1) / 4,
                    .x_sums = codes.sums(0),
                    .blocks_per_group = codes.blocks_per_group(),
                    .block_lines = kBlockColumns / layout.depth(),
                    .out = {.rows = layout.spec().rows,
                            .type = args.type,
                            .y = args.y,
                            .y_stride = args.y_stride,
                            .bias = args.bias,
                            .scales = &codes.scale(0)}};
  multiply<ByteLine<bits>, ByteProduct<bits>, 1>(job, parallel_for);
}

}  // namespace

void integer_linear__amx(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const std::int64_t tokens = args.source.tokens;
  if (tokens <= kFewTileTokens) return integer_linear__avx512_vnni(args, parallel_for);
  const TokenCodes codes(layout, tokens, kTileTokens);
  parallel_for(tokens, [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__avx512(layout, args.source, begin, end, codes);
  });
  switch (layout.spec().qtype) {
    case QTypeId::kInt2:
      return run<2>(args, codes, parallel_for);
    case QTypeId::kInt4:
      return run<4>(args, codes, parallel_for);
    default:
      return run<8>(args, codes, parallel_for);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
