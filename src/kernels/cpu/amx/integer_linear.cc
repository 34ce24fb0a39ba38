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

/// Codes as tiles: what follows a group's last columns, and tokens past the last, is anything,
/// since it is multiplied by zeros or not stored.
template <int bits>
class CodeTiles {
 public:
  CodeTiles(const PackedLayout& layout, const TokenCodes& codes, const ParallelFor& parallel_for)
      : layout_(layout),
        blocks_(codes.blocks_per_group()),
        tiles_(codes.tokens(), tiles_for(block_columns(0, 0) / 4), layout.groups() * blocks_),
        x_(tiles_.size()),
        sums_(tiles_.count * kTileTokens * layout.groups() * blocks_) {
    parallel_for(codes.tokens(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) take_token(codes, t);
    });
  }
  const TokenTiles& tiles() const { return tiles_; }
  std::int32_t* data() const { return reinterpret_cast<std::int32_t*>(x_.data()); }
  std::int32_t* sums() const { return reinterpret_cast<std::int32_t*>(sums_.data()); }

 private:
  // Padded to whole lines.
  std::int64_t block_columns(std::int64_t group, std::int64_t block) const {
    const std::int64_t columns = layout_.group_lines(group) * layout_.depth();
    return std::clamp<std::int64_t>(columns - block * kBlockColumns, 0, kBlockColumns);
  }

  void take_token(const TokenCodes& codes, std::int64_t token) const {
    const std::int64_t blocks = layout_.groups() * blocks_;
    for (std::int64_t i = 0; i < blocks; ++i) {
      sums()[token * blocks + i] = ByteSums<bits>::x_sum(codes.sums(token)[i]);
      const std::int64_t group = i / blocks_, block = i % blocks_;
      const std::int64_t columns = block_columns(group, block);
      const std::int8_t* from =
          codes.codes(token) + layout_.padded_begin(group) + block * kBlockColumns;
      for (std::int64_t c = 0; c < columns; c += kLineBytes) {
        _mm512_storeu_si512(data() + tiles_.at(token, i, c / kLineBytes),
                            _mm512_loadu_si512(from + c));
      }
    }
  }

  const PackedLayout& layout_;
  std::int64_t blocks_;
  TokenTiles tiles_;
  Scratch x_, sums_;
};

template <int bits>
void run(const IntegerLinearArgs& args, const TokenCodes& codes, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const CodeTiles<bits> x(layout, codes, parallel_for);
  const TileJob job{.layout = &layout,
                    .weight = args.weight,
                    .tokens = codes.tokens(),
                    .x_tiles = x.tiles(),
                    .x = x.data(),
                    .x_sums = x.sums(),
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

// Up to so many, the kernel without tiles is as fast.
constexpr std::int64_t kFewTokens = 4;

}  // namespace

void integer_linear__amx(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const std::int64_t tokens = args.source.tokens;
  if (tokens <= kFewTokens) return integer_linear__avx512_vnni(args, parallel_for);
  const TokenCodes codes(layout, tokens);
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
