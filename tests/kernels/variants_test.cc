#include "kernels/variants.h"

#include <gtest/gtest.h>

#include "kernels/activation_codes.h"
#include "kernels/integer_linear.h"
#include "kernels/linear.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kNeon, Isa::kNeonDotprod,
                            Isa::kNeonI8mm};

std::string best(Isa isa, std::initializer_list<Variant<const char*>> variants) {
  return best_variant<const char*>(isa, variants);
}

TEST(BestVariant, is_that_of_the_isa_or_of_the_nearest_of_its_parts) {
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

TEST(BestVariant, is_never_null) {
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

// Dot products are for integers: what is float runs on the kernels of plain NEON.
TEST(BestVariant, of_dot_products_is_their_own_for_integers_only) {
  const WeightSpec spec{QTypeId::kInt4, 1, 1, 0, FloatType::kF32};
  for (const Isa isa : {Isa::kNeonDotprod, Isa::kNeonI8mm}) {
    EXPECT_EQ(find_linear(isa, spec), find_linear(Isa::kNeon, spec));
    EXPECT_EQ(find_quantize_codes(isa), find_quantize_codes(Isa::kNeon));
    EXPECT_EQ(find_dequantize_codes(isa), find_dequantize_codes(Isa::kNeon));
    EXPECT_EQ(find_dequantize_range(isa), find_dequantize_range(Isa::kNeon));
  }
  const IntegerLinearKernel i8mm = find_integer_linear(Isa::kNeonI8mm, spec);
  const IntegerLinearKernel dotprod = find_integer_linear(Isa::kNeonDotprod, spec);
  const IntegerLinearKernel neon = find_integer_linear(Isa::kNeon, spec);
#if defined(__aarch64__)
  constexpr bool kIsArm = true;
#else
  constexpr bool kIsArm = false;
#endif
  EXPECT_EQ(i8mm != dotprod, kIsArm);
  EXPECT_EQ(dotprod != neon, kIsArm);
  EXPECT_EQ(neon != find_integer_linear(Isa::kPortable, spec), kIsArm);
  EXPECT_EQ(find_linear(Isa::kNeon, spec) != find_linear(Isa::kPortable, spec), kIsArm);
}

}  // namespace
}  // namespace quantal::kernels
