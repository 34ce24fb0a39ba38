#include "kernels/integer_linear.h"

#include <algorithm>

#include "kernels/activation_codes.h"
#include "kernels/conv_patches.h"
#include "kernels/scratch.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

// Of numbers that become codes: in a cache that threads share. Every block of tokens takes the
// weight apart anew, which many tokens make up for.
constexpr std::int64_t kBlockBytes = 4 << 20;
constexpr std::int64_t kLeastTokens = 256;

// Those of a source from `first` on; `patches` is where its patches are kept.
TokenSource tokens_of(const TokenSource& source, std::int64_t first, std::int64_t count,
                      CodePatches& patches) {
  TokenSource part = source;
  part.tokens = count;
  if (source.patches != nullptr) {
    patches = *source.patches;
    patches.first += first;
    part.patches = &patches;
  } else if (source.codes != nullptr) {
    part.codes = source.codes + first * source.stride;
  } else {
    part.x = static_cast<const std::byte*>(source.x) + first * source.stride * size_of(source.type);
  }
  return part;
}

}  // namespace

IntegerLinearKernel find_integer_linear(Isa isa, const WeightSpec& spec) {
  const bool is_integer =
      spec.qtype == QTypeId::kInt8 || spec.qtype == QTypeId::kInt4 || spec.qtype == QTypeId::kInt2;
  if (!is_integer) return nullptr;
  return best_variant<IntegerLinearKernel>(isa, {
#if defined(__x86_64__)
                                                    {Isa::kAmx, integer_linear__amx},
                                                    {Isa::kAvx512Vnni, integer_linear__avx512_vnni},
                                                    {Isa::kAvx512, integer_linear__avx512},
                                                    {Isa::kAvxVnni, integer_linear__avx_vnni},
                                                    {Isa::kAvx2, integer_linear__avx2},
#elif defined(__aarch64__)
                                                    {Isa::kNeonI8mm, integer_linear__neon_i8mm},
                                                    {Isa::kNeonDotprod,
                                                     integer_linear__neon_dotprod},
                                                    {Isa::kNeon, integer_linear__neon},
#endif
                                                    {Isa::kPortable, integer_linear__portable}});
}

bool integer_linear_codes(Isa isa, const IntegerLinearArgs& args, float y_scale, std::int8_t* codes,
                          const ParallelFor& parallel_for) {
  const std::int64_t tokens = args.source.tokens, rows = args.layout->spec().rows;
  if (tokens * rows == 0) return true;
  const std::int64_t token_bytes = rows * size_of(args.type);
  const std::int64_t most = std::max(kLeastTokens, kBlockBytes / token_bytes);
  const std::int64_t blocks = (tokens + most - 1) / most;
  const Scratch numbers((std::min(tokens, most) * token_bytes + 3) / 4);
  const IntegerLinearKernel kernel = find_integer_linear(isa, args.layout->spec());
  IntegerLinearArgs block = args;
  block.y = numbers.data(), block.y_stride = rows;
  CodePatches patches;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t first = tokens * i / blocks, count = tokens * (i + 1) / blocks - first;
    block.source = tokens_of(args.source, first, count, patches);
    kernel(block, parallel_for);
    const bool have_codes = quantize_codes(isa, numbers.data(), args.type, count * rows, y_scale,
                                           codes + first * rows, parallel_for);
    if (!have_codes) return false;
  }
  return true;
}

}  // namespace quantal::kernels
