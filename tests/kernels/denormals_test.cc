// Subnormal numbers, as what goes in, on the way and as what comes out. Nothing but the product of
// bf16 numbers (docs/numerics.md) may take them for zeros.
#include <numeric>

#include <gtest/gtest.h>

#include "kernels/activation_codes.h"
#include "kernels/exact.h"
#include "kernels/gather.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

// What is subnormal.
enum class Tiny { kActivations, kScales, kProducts };
constexpr Tiny kTinies[] = {Tiny::kActivations, Tiny::kScales, Tiny::kProducts};

// Brings numbers around 1 among the subnormal ones of a type.
float tiny_factor(FloatType type) { return type == FloatType::kF16 ? 0x1p-19F : 0x1p-130F; }

void scale_numbers(std::vector<std::byte>& numbers, FloatType type, float factor) {
  const auto count = static_cast<std::int64_t>(numbers.size()) / size_of(type);
  for (std::int64_t i = 0; i < count; ++i) {
    store_float(numbers.data(), i, type, load_float(numbers.data(), i, type) * factor);
  }
}

void make_tiny(Problem& problem, Tiny tiny) {
  const FloatType type = problem.type;
  // Products of normal numbers of fp16 are no subnormal fp32 numbers: the result alone is
  // subnormal.
  const float root = type == FloatType::kF16 ? 0x1p-10F : 0x1p-68F;
  switch (tiny) {
    case Tiny::kActivations:
      scale_numbers(problem.x, type, tiny_factor(type));
      break;
    case Tiny::kScales:
      problem.weight.scale_by(tiny_factor(problem.spec.scale_type));
      break;
    case Tiny::kProducts:
      scale_numbers(problem.x, type, root);
      problem.weight.scale_by(root);
      break;
  }
  scale_numbers(problem.bias, type, tiny_factor(type));
  problem.repack();
}

class Denormals : public testing::TestWithParam<IsaAndType> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  QTypeId qtype() const { return std::get<1>(GetParam()); }

  // body(problem) for every kind and type of them.
  template <typename Body>
  void for_problems(const Body& body) const {
    for (const std::int64_t group : {0, 32}) {
      if (group > 0 && !is_affine(qtype())) continue;
      for (const FloatType scale_type : kFloatTypes) {
        for (const FloatType type : kFloatTypes) {
          for (const Tiny tiny : kTinies) {
            const bool fits = tiny != Tiny::kProducts ||
                              (type == FloatType::kF16) == (scale_type == FloatType::kF16);
            if (!fits) continue;
            Problem problem({qtype(), 20, 96, group, scale_type}, type, 25);
            make_tiny(problem, tiny);
            body(problem);
          }
        }
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, Denormals,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kAllTypes)),
                         name_of);

TEST_P(Denormals, are_numbers_to_a_linear) {
  for_problems([this](const Problem& problem) {
    const Exact exact(problem);
    for (const std::int64_t tokens : {1, 2, 4, 7, 25}) {
      const Call call{.isa = isa(), .tokens = tokens, .has_bias = tokens != 7};
      exact.check(call, run_linear(problem, call));
      exact.check(call, run_canonical(problem, call));
    }
  });
}

// The processor's product of bf16 numbers, and nothing else: what is subnormal counts as zero.
TEST_P(Denormals, are_zeros_to_the_product_of_bf16_numbers_only) {
  if (is_affine(qtype())) return;  // shifts multiply the sum of the activations as they are
  for (const FloatType type : kFloatTypes) {
    Problem problem({qtype(), 20, 96, 0, FloatType::kF32}, type, 25);
    make_tiny(problem, Tiny::kActivations);
    const bool are_zeros = multiplies_bf16(isa(), type);
    for (const std::int64_t tokens : {1, 7, 25}) {
      const Call call{.isa = isa(), .tokens = tokens, .has_bias = false};
      const auto y = run_linear(problem, call);
      int zeros = 0;
      for (std::int64_t i = 0; i < tokens * 20; ++i) zeros += load_float(y.data(), i, type) == 0;
      EXPECT_EQ(zeros, are_zeros ? tokens * 20 : 0) << problem.name(call);
    }
  }
}

TEST_P(Denormals, are_numbers_to_an_integer_linear) {
  if (find_integer_linear(isa(), {qtype(), 1, 1, 0, FloatType::kF32}) == nullptr) return;
  Sample sample;
  for_problems([&](const Problem& problem) {
    if (!sample.takes_next()) return;
    for (const bool has_codes : {false, true}) {
      for (const std::int64_t tokens : {1, 4, 7, 25}) {
        const Call call{.isa = isa(), .tokens = tokens, .has_bias = tokens != 7};
        const Call portable{.tokens = tokens, .has_bias = tokens != 7};
        const auto wanted = run_integer(problem, has_codes, portable);
        EXPECT_EQ(run_integer(problem, has_codes, call), wanted) << problem.name(call);
        EXPECT_EQ(run_integer_canonical(problem, has_codes, call), wanted) << problem.name(call);
      }
    }
  });
}

// Each operation rounds once: doubles hold it exactly.
TEST_P(Denormals, are_numbers_to_gathering_and_dequantizing) {
  for (const FloatType scale_type : kFloatTypes) {
    RandomWeight weight({qtype(), 20, 33, 0, scale_type});
    weight.scale_by(tiny_factor(scale_type));
    const GuardedPacked packed(weight);
    std::vector<std::int64_t> rows(20);
    std::iota(rows.begin(), rows.end(), 0);
    for (const FloatType type : kFloatTypes) {
      const GuardedBytes gathered(20L * 33 * size_of(type)), range(20L * 33 * size_of(type));
      gather_rows(isa(), weight.spec, weight.canonical(), rows.data(), 20, type, gathered.data());
      dequantize_range(isa(), packed.layout, packed.data(), 0, 20, type, range.data());
      for (std::int64_t i = 0; i < 20L * 33; ++i) {
        const auto parts = weight.parts(i / 33, i % 33);
        const float value = static_cast<float>(parts.scale * parts.code);
        float wanted = 0;
        store_float(&wanted, 0, type, static_cast<float>(value - parts.shift));
        ASSERT_EQ(load_float(gathered.data(), i, type), load_float(&wanted, 0, type)) << i;
        ASSERT_EQ(load_float(range.data(), i, type), load_float(&wanted, 0, type)) << i;
      }
    }
  }
}

class CodeDenormals : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, CodeDenormals, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(CodeDenormals, are_numbers_to_quantizing_and_dequantizing) {
  constexpr std::int64_t kHalf = 500, kCount = 2 * kHalf;
  for (const FloatType type : kFloatTypes) {
    for (const float scale : {0x1p-126F, 0x1.8p-131F, 0x1p-140F, 0x1p-22F}) {
      const GuardedBytes x(kCount * size_of(type)), y(kCount * size_of(type)), bytes(kCount);
      auto* codes = reinterpret_cast<std::int8_t*>(bytes.data());
      for (std::int64_t i = 0; i < kCount; ++i) {
        store_float(x.data(), i, type, static_cast<float>(i - kHalf) * scale / 3);
      }
      ASSERT_TRUE(quantize_codes(GetParam(), x.data(), type, kCount, scale, codes));
      dequantize_codes(GetParam(), codes, kCount, scale, type, y.data());
      for (std::int64_t i = 0; i < kCount; ++i) {
        const float quotient = load_float(x.data(), i, type) / scale;
        const float code = std::min(127.0F, std::max(-127.0F, std::nearbyint(quotient)));
        ASSERT_EQ(codes[i], code) << "of " << quotient;
        float wanted = 0;
        store_float(&wanted, 0, type, code * scale);
        ASSERT_EQ(load_float(y.data(), i, type), load_float(&wanted, 0, type));
      }
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
