#include "kernels/variants.h"

#include <gtest/gtest.h>

#include "kernels/activation_codes.h"
#include "kernels/float_conv.h"
#include "kernels/integer_linear.h"
#include "kernels/linear.h"
#include "kernels/tap_conv.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

WeightSpec weight_of(QTypeId qtype) { return {qtype, 1, 1, 0, FloatType::kF32}; }

const TapConvKernel* taps(Isa isa) {
  return find_tap_conv(isa, {}, PackedLayout(weight_of(QTypeId::kInt8)));
}

TEST(Variants, the_nearest_part_of_an_instruction_set_is_chosen) {
  const auto chosen = [](Isa isa, std::initializer_list<Variant<const char*>> variants) {
    return std::string_view(best_variant(isa, variants));
  };
  const Variant<const char*> portable{Isa::kPortable, "portable"}, avx2{Isa::kAvx2, "avx2"};
  const Variant<const char*> avx_vnni{Isa::kAvxVnni, "avx_vnni"}, avx512{Isa::kAvx512, "avx512"};
  for (const Isa isa :
       {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512Vbmi, Isa::kAvx512Vnni, Isa::kAvx512}) {
    EXPECT_EQ(chosen(isa, {avx512, avx_vnni, avx2, portable}), "avx512");
    EXPECT_EQ(chosen(isa, {avx_vnni, avx2, portable}), "avx2");
    EXPECT_EQ(chosen(isa, {portable}), "portable");
  }
  EXPECT_EQ(chosen(Isa::kAvxVnni, {avx512, avx_vnni, avx2, portable}), "avx_vnni");
  EXPECT_EQ(chosen(Isa::kAvxVnni, {avx512, avx2, portable}), "avx2");
  EXPECT_EQ(chosen(Isa::kAvx2, {avx512, avx_vnni, avx2, portable}), "avx2");
  EXPECT_EQ(chosen(Isa::kPortable, {avx512, avx_vnni, avx2, portable}), "portable");
}

#if defined(__x86_64__)

// Kernels are only looked up, so that this holds for processors beyond the one it runs on.
TEST(Variants, no_processor_with_avx2_gets_a_portable_kernel) {
  for (const Isa isa : {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Vbmi,
                        Isa::kAvx512Bf16, Isa::kAmx}) {
    for (const QTypeId qtype : kAllTypes) {
      ASSERT_NE(find_linear(isa, weight_of(qtype)), nullptr);
      EXPECT_NE(find_linear(isa, weight_of(qtype)), find_linear(Isa::kPortable, weight_of(qtype)));
    }
    for (const QTypeId qtype : {QTypeId::kInt2, QTypeId::kInt4, QTypeId::kInt8}) {
      ASSERT_NE(find_integer_linear(isa, weight_of(qtype)), nullptr);
      EXPECT_NE(find_integer_linear(isa, weight_of(qtype)),
                find_integer_linear(Isa::kPortable, weight_of(qtype)));
    }
    EXPECT_EQ(find_dequantize_range(isa), find_dequantize_range(Isa::kAvx2));
    EXPECT_EQ(find_quantize_codes(isa), find_quantize_codes(Isa::kAvx2));
    EXPECT_EQ(find_dequantize_codes(isa), find_dequantize_codes(Isa::kAvx2));
  }
  for (const QTypeId qtype : kAllTypes) {
    const WeightSpec spec = weight_of(qtype);
    EXPECT_EQ(find_linear(Isa::kAvxVnni, spec), find_linear(Isa::kAvx2, spec));
    EXPECT_EQ(find_linear(Isa::kAvx512Vnni, spec), find_linear(Isa::kAvx512, spec));
    for (const Isa isa : {Isa::kAvx512Vbmi, Isa::kAvx512Bf16}) {
      EXPECT_EQ(find_integer_linear(isa, spec), find_integer_linear(Isa::kAvx512Vnni, spec));
    }
  }
  EXPECT_EQ(find_float_conv(Isa::kAvxVnni), find_float_conv(Isa::kAvx2));
  EXPECT_NE(find_float_conv(Isa::kAvx512), find_float_conv(Isa::kAvx2));
  for (const Isa isa : {Isa::kAvx512Vnni, Isa::kAvx512Vbmi, Isa::kAvx512Bf16, Isa::kAmx}) {
    EXPECT_EQ(find_float_conv(isa), find_float_conv(Isa::kAvx512));
  }
  EXPECT_EQ(taps(Isa::kAvx512), taps(Isa::kAvx2));
  for (const Isa isa : {Isa::kAvx512Vbmi, Isa::kAvx512Bf16}) {
    EXPECT_EQ(taps(isa), taps(Isa::kAvx512Vnni));
  }
  EXPECT_NE(taps(Isa::kAvxVnni), taps(Isa::kAvx2));
  EXPECT_NE(taps(Isa::kAvx512Vnni), taps(Isa::kAvxVnni));
  EXPECT_NE(taps(Isa::kAmx), taps(Isa::kAvx512Vnni));
  EXPECT_NE(find_dequantize_range(Isa::kAvx2), find_dequantize_range(Isa::kPortable));
  EXPECT_NE(find_quantize_codes(Isa::kAvx2), find_quantize_codes(Isa::kPortable));
  EXPECT_NE(find_dequantize_codes(Isa::kAvx2), find_dequantize_codes(Isa::kPortable));
}

#endif

TEST(Variants, every_isa_has_a_linear_and_float8_no_integer_one) {
  for (const Isa isa : supported_isas()) {
    for (const QTypeId qtype : kAllTypes) EXPECT_NE(find_linear(isa, weight_of(qtype)), nullptr);
    EXPECT_EQ(find_integer_linear(isa, weight_of(QTypeId::kFloat8E4M3FN)), nullptr);
  }
}

constexpr Isa kAllIsas[] = {Isa::kPortable,   Isa::kAvx2,        Isa::kAvxVnni,    Isa::kAvx512,
                            Isa::kAvx512Vnni, Isa::kAvx512Vbmi,  Isa::kAvx512Bf16, Isa::kAmx,
                            Isa::kNeon,       Isa::kNeonDotprod, Isa::kNeonI8mm,   Isa::kNeonBf16};

std::string best(Isa isa, std::initializer_list<Variant<const char*>> variants) {
  return best_variant<const char*>(isa, variants);
}

TEST(Variants, is_that_of_the_isa_or_of_the_nearest_of_its_parts) {
  EXPECT_EQ(best(Isa::kNeonI8mm, {{Isa::kNeonI8mm, "i8mm"}, {Isa::kPortable, "portable"}}), "i8mm");
  EXPECT_EQ(best(Isa::kNeonI8mm,
                 {{Isa::kNeonDotprod, "dotprod"}, {Isa::kNeon, "neon"}, {Isa::kPortable, ""}}),
            "dotprod");
  EXPECT_EQ(
      best(Isa::kNeonI8mm, {{Isa::kAvx2, "avx2"}, {Isa::kNeon, "neon"}, {Isa::kPortable, ""}}),
      "neon");
  EXPECT_EQ(best(Isa::kNeon, {{Isa::kNeonDotprod, "dotprod"}, {Isa::kPortable, "portable"}}),
            "portable");
  EXPECT_EQ(best(Isa::kAvx2, {{Isa::kNeon, "neon"}, {Isa::kPortable, "portable"}}), "portable");
}

TEST(Variants, is_never_null) {
  for (const Isa isa : kAllIsas) {
    EXPECT_NE(find_quantize_codes(isa), nullptr);
    EXPECT_NE(find_dequantize_codes(isa), nullptr);
    EXPECT_NE(find_dequantize_range(isa), nullptr);
    for (const QTypeId qtype : kAllTypes) {
      const WeightSpec spec{qtype, 1, 1, 0, FloatType::kF32};
      EXPECT_NE(find_linear(isa, spec), nullptr);
      const bool is_integer = find_integer_linear(Isa::kPortable, spec) != nullptr;
      EXPECT_EQ(find_integer_linear(isa, spec) != nullptr, is_integer);
    }
  }
}

#if defined(__aarch64__)
constexpr bool kIsArm = true;
#else
constexpr bool kIsArm = false;
#endif

// Dot products are for integers: what is float runs on the kernels of plain NEON.
TEST(Variants, of_dot_products_is_their_own_for_integers_only) {
  const WeightSpec spec{QTypeId::kInt4, 1, 1, 0, FloatType::kF32};
  for (const Isa isa : {Isa::kNeonDotprod, Isa::kNeonI8mm}) {
    EXPECT_EQ(find_linear(isa, spec), find_linear(Isa::kNeon, spec));
    EXPECT_EQ(find_quantize_codes(isa), find_quantize_codes(Isa::kNeon));
    EXPECT_EQ(find_dequantize_codes(isa), find_dequantize_codes(Isa::kNeon));
    EXPECT_EQ(find_dequantize_range(isa), find_dequantize_range(Isa::kNeon));
  }
  EXPECT_EQ(find_linear(Isa::kNeonBf16, spec) != find_linear(Isa::kNeonI8mm, spec), kIsArm);
  EXPECT_EQ(find_integer_linear(Isa::kNeonBf16, spec), find_integer_linear(Isa::kNeonI8mm, spec));
  const IntegerLinearKernel i8mm = find_integer_linear(Isa::kNeonI8mm, spec);
  const IntegerLinearKernel dotprod = find_integer_linear(Isa::kNeonDotprod, spec);
  const IntegerLinearKernel neon = find_integer_linear(Isa::kNeon, spec);
  EXPECT_EQ(i8mm != dotprod, kIsArm);
  EXPECT_EQ(dotprod != neon, kIsArm);
  EXPECT_EQ(taps(Isa::kNeon), nullptr);
  EXPECT_EQ(taps(Isa::kNeonDotprod) != nullptr, kIsArm);
  EXPECT_EQ(taps(Isa::kNeonBf16), taps(Isa::kNeonDotprod));
  EXPECT_EQ(neon != find_integer_linear(Isa::kPortable, spec), kIsArm);
  EXPECT_EQ(find_linear(Isa::kNeon, spec) != find_linear(Isa::kPortable, spec), kIsArm);
}

}  // namespace
}  // namespace quantal::kernels
