// Operands at addresses that are multiples of no more than their elements' sizes, at both edges of
// memory: the bits do not depend on where they lie.
#include <cstring>
#include <numeric>

#include <gtest/gtest.h>

#include "kernels/activation_codes.h"
#include "kernels/gather.h"
#include "kernels/non_finite.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

using Bytes = std::vector<std::byte>;

Bytes bytes_of(const GuardedBytes& bytes) { return {bytes.span().begin(), bytes.span().end()}; }

// run(edge, distance in elements) gives the same wherever it is told to lie.
template <typename Run>
void expect_same_anywhere(const Run& run, const std::string& name) {
  const Bytes wanted = run(Edge::kFirst, 0);
  for (const Edge edge : kEdges) {
    for (const std::int64_t distance : {0, 1, 2, 3, 4, 7, 8, 15, 16}) {
      EXPECT_TRUE(run(edge, distance) == wanted)
          << name << ", edge " << static_cast<int>(edge) << ", distance " << distance;
    }
  }
}

class Alignment : public testing::TestWithParam<IsaAndType> {
 protected:
  // Rows that lie plainly in canonical form, in whole lines, and others.
  static std::vector<WeightSpec> specs() {
    const QTypeId qtype = std::get<1>(GetParam());
    const std::int64_t group = is_affine(qtype) ? 32 : 0;
    return {{qtype, 36, 64, group, FloatType::kBF16}, {qtype, 21, 43, 0, FloatType::kF32}};
  }

  static void expect_same_anywhere_of(const RunLinear& run) {
    Sample sample;
    for (const WeightSpec& spec : specs()) {
      for (const FloatType type : kFloatTypes) {
        const Problem problem(spec, type, 25);
        for (const std::int64_t tokens : {1, 3, 7, 25}) {
          if (!sample.takes_next()) continue;
          Call call{.isa = std::get<0>(GetParam()), .tokens = tokens};
          expect_same_anywhere(
              [&](Edge edge, std::int64_t distance) {
                call.edge = edge, call.distance = distance;
                return run(problem, call);
              },
              problem.name(call));
        }
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, Alignment,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kAllTypes)),
                         name_of);

TEST_P(Alignment, is_nothing_to_a_linear) { expect_same_anywhere_of(run_linear); }

TEST_P(Alignment, is_nothing_to_a_linear_from_canonical) { expect_same_anywhere_of(run_canonical); }

TEST_P(Alignment, is_nothing_to_an_integer_linear) {
  if (find_integer_linear(Isa::kPortable, specs()[0]) == nullptr) return;
  for (const bool has_codes : {false, true}) {
    expect_same_anywhere_of([has_codes](const Problem& problem, const Call& call) {
      return run_integer(problem, has_codes, call);
    });
    expect_same_anywhere_of([has_codes](const Problem& problem, const Call& call) {
      return run_integer_canonical(problem, has_codes, call);
    });
  }
}

TEST_P(Alignment, is_nothing_to_gathering_and_dequantizing) {
  const Isa isa = std::get<0>(GetParam());
  for (const WeightSpec& spec : specs()) {
    const RandomWeight weight(spec);
    const std::int64_t rows[] = {3, 0, 20, 20, 11};
    for (const FloatType type : kFloatTypes) {
      const std::int64_t width = size_of(type);
      const auto gather = [&](Edge edge, std::int64_t distance) {
        const GuardedCanonical canonical(weight, edge, distance);
        const GuardedBytes y(5 * spec.columns * width, edge, 3 * distance * width);
        gather_rows(isa, spec, canonical.get(), rows, 5, type, y.data());
        return bytes_of(y);
      };
      expect_same_anywhere(gather, "gather");
      const auto dequantize = [&](Edge edge, std::int64_t distance) {
        const GuardedPacked packed(weight, edge);
        const GuardedBytes y(17 * spec.columns * width, edge, distance * width);
        dequantize_range(isa, packed.layout, packed.data(), 2, 17, type, y.data());
        return bytes_of(y);
      };
      expect_same_anywhere(dequantize, "dequantize");
    }
  }
}

class CodeAlignment : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, CodeAlignment, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(CodeAlignment, is_nothing_to_quantizing_and_dequantizing) {
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t count : {1, 17, 100}) {
      const std::int64_t width = size_of(type);
      const auto quantize = [&](Edge edge, std::int64_t distance) {
        const GuardedBytes x(count * width, edge, distance * width);
        const GuardedBytes codes(count, edge, 3 * distance);
        for (std::int64_t i = 0; i < count; ++i) {
          store_float(x.data(), i, type, static_cast<float>(i * 7 % 300 - 150) / 9);
        }
        EXPECT_TRUE(quantize_codes(GetParam(), x.data(), type, count, 0.1F,
                                   reinterpret_cast<std::int8_t*>(codes.data())));
        return bytes_of(codes);
      };
      expect_same_anywhere(quantize, "quantize_codes");
      const auto dequantize = [&](Edge edge, std::int64_t distance) {
        const GuardedBytes codes(count, edge, distance);
        const GuardedBytes y(count * width, edge, 3 * distance * width);
        for (std::int64_t i = 0; i < count; ++i) codes.data()[i] = static_cast<std::byte>(i * 37);
        dequantize_codes(GetParam(), reinterpret_cast<const std::int8_t*>(codes.data()), count,
                         0.1F, type, y.data());
        return bytes_of(y);
      };
      expect_same_anywhere(dequantize, "dequantize_codes");
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
