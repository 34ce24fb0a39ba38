#include "kernels/linear.h"

#include "kernels/variants.h"

namespace quantal::kernels {

LinearKernel find_linear(Isa isa, const WeightSpec&) {
  return best_variant<LinearKernel>(isa, {
#if defined(__x86_64__)
                                             {Isa::kAmx, linear__amx},
                                             {Isa::kAvx512Bf16, linear__avx512_bf16},
                                             {Isa::kAvx512Vbmi, linear__avx512_vbmi},
                                             {Isa::kAvx512, linear__avx512},
                                             {Isa::kAvx2, linear__avx2},
#elif defined(__aarch64__)
                                             {Isa::kNeonBf16, linear__neon_bf16},
                                             {Isa::kNeon, linear__neon},
#endif
                                             {Isa::kPortable, linear__portable}});
}

GroupScales load_scales(const PackedLayout& layout, const std::byte* tile, std::int64_t group) {
  const std::byte* scales =
      tile + layout.group_offset(group) + layout.group_lines(group) * PackedLayout::kLineBytes;
  GroupScales out;
  for (int r = 0; r < PackedLayout::kTileRows; ++r) {
    const FloatType type = layout.spec().scale_type;
    out.scale[r] = load_float(scales, r, type);
    out.shift[r] =
        layout.is_affine() ? load_float(scales, PackedLayout::kTileRows + r, type) : 0.0F;
  }
  return out;
}

float code_value(QTypeId qtype, std::uint8_t packed) {
  switch (qtype) {
    case QTypeId::kInt2:
    case QTypeId::kInt4:
      return packed;
    case QTypeId::kInt8:
      return static_cast<float>(static_cast<int>(packed) - 128);
    case QTypeId::kFloat8E4M3FN:
      return e4m3fn_value(packed);
    case QTypeId::kFloat8E4M3FNUZ:
      return e4m3fnuz_value(packed);
    case QTypeId::kFloat8E5M2:
      return e5m2_value(packed);
  }
  return 0;
}

}  // namespace quantal::kernels
