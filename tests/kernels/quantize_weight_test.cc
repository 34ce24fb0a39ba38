#include "kernels/quantize_weight.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

// What weights are made of that are hard on arithmetic.
enum class Kind { kNormal, kSmall, kSubnormal, kZeros, kConstant, kFarAway, kLarge, kMixed };
constexpr Kind kKinds[] = {Kind::kNormal,   Kind::kSmall,   Kind::kSubnormal, Kind::kZeros,
                           Kind::kConstant, Kind::kFarAway, Kind::kLarge,     Kind::kMixed};

float number(Kind kind, std::int64_t i, std::mt19937& random) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case Kind::kNormal:
      return normal(random) * 0.03F;
    case Kind::kSmall:
      return normal(random) * 1e-6F;
    case Kind::kSubnormal:
      return normal(random) * std::ldexp(1.0F, -149 + static_cast<int>(i / 16 % 40));
    case Kind::kZeros:
      return random() % 2 == 0 ? 0.0F : -0.0F;
    case Kind::kConstant:
      return -3.140625F;
    case Kind::kFarAway:
      return 100 + normal(random) * 0.01F;
    case Kind::kLarge:
      return random() % 3 == 0 ? normal(random) : random() % 2 == 0 ? kLargest / 4 : -kLargest / 8;
    case Kind::kMixed:
      return number(kKinds[i / 40 % 6], i, random);
  }
  return 0;
}

std::int64_t scale_count(const WeightSpec& spec) {
  return spec.rows * CanonicalCodes(spec).groups();
}

// What one call gives, between pages that cannot be read.
struct Attempt {
  Attempt(Isa isa, const WeightSpec& spec, const std::byte* weight, FloatType type,
          const ParallelFor& parallel_for = serial_for, Edge edge = Edge::kLast)
      : size(canonical_data_size(spec)),
        scale_size(scale_count(spec) * size_of(spec.scale_type)),
        data(size, edge),
        scale(scale_size, edge),
        shift(scale_size, edge),
        affine(CanonicalCodes(spec).bits() < 8) {
    result = quantize_weight(isa,
                             {.spec = spec,
                              .weight = weight,
                              .type = type,
                              .out = {reinterpret_cast<std::uint8_t*>(data.data()), scale.data(),
                                      affine ? shift.data() : nullptr}},
                             parallel_for);
  }

  void expect_equal(const Attempt& other) const {
    ASSERT_EQ(result, other.result);
    if (result != Quantized::kDone) return;
    EXPECT_EQ(std::memcmp(data.data(), other.data.data(), size), 0);
    EXPECT_EQ(std::memcmp(scale.data(), other.scale.data(), scale_size), 0);
    if (affine) {
      EXPECT_EQ(std::memcmp(shift.data(), other.shift.data(), scale_size), 0);
    }
  }

  std::int64_t size, scale_size;
  GuardedBytes data, scale, shift;
  bool affine;
  Quantized result;
};

class QuantizeWeight : public testing::TestWithParam<std::tuple<Isa, QTypeId, FloatType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  QTypeId qtype() const { return std::get<1>(GetParam()); }
  FloatType type() const { return std::get<2>(GetParam()); }
  bool is_affine() const { return qtype() == QTypeId::kInt2 || qtype() == QTypeId::kInt4; }

  WeightSpec spec(std::int64_t rows, std::int64_t columns, std::int64_t group = 0) const {
    return {qtype(), rows, columns, is_affine() ? group : 0, type()};
  }
  std::int64_t bytes(const WeightSpec& s) const { return s.rows * s.columns * size_of(type()); }

  void fill(const GuardedBytes& weight, const WeightSpec& s, Kind kind) const {
    std::mt19937 random(static_cast<unsigned>(s.columns));
    for (std::int64_t i = 0; i < s.rows * s.columns; ++i) {
      float value = number(kind, i, random);
      if (type() == FloatType::kF16) value = std::min(65504.0F, std::max(-65504.0F, value));
      store_float(weight.data(), i, type(), value);
    }
  }

  // With scales of the weight's type, and where those do not serve of fp32.
  void compare(WeightSpec s, Kind kind) const {
    SCOPED_TRACE(testing::Message() << s.rows << " x " << s.columns << " by " << s.group_size
                                    << ", kind " << static_cast<int>(kind));
    const Edge edge = kEdges[(s.rows + s.columns) % 2];
    const GuardedBytes weight(bytes(s), edge);
    fill(weight, s, kind);
    for (const FloatType scale_type : {type(), FloatType::kF32}) {
      s.scale_type = scale_type;
      const Attempt reference(Isa::kPortable, s, weight.data(), type());
      EXPECT_TRUE(scale_type != FloatType::kF32 ||
                  reference.result != Quantized::kNeedsFloatScales);
      Attempt(isa(), s, weight.data(), type(), serial_for, edge).expect_equal(reference);
    }
  }
};

INSTANTIATE_TEST_SUITE_P(
    EveryIsa, QuantizeWeight,
    testing::Combine(testing::ValuesIn(supported_isas()), testing::ValuesIn(kAllTypes),
                     testing::Values(FloatType::kF32, FloatType::kBF16, FloatType::kF16)),
    [](const auto& info) {
      return std::string(isa_name(std::get<0>(info.param))) + "_" +
             type_name(std::get<1>(info.param)) + "_" +
             std::to_string(static_cast<int>(std::get<2>(info.param)));
    });

TEST_P(QuantizeWeight, is_the_same_on_every_isa) {
  for (const Kind kind : kKinds) {
    for (const std::int64_t rows : {1, 2, 3, 5, 17}) {
      for (const std::int64_t columns : {1, 7, 8, 9, 16, 31, 32, 33, 63, 129, 1023}) {
        compare(spec(rows, columns), kind);
      }
      compare(spec(rows, 384, 128), kind);
      compare(spec(rows, 96, 24), kind);
      compare(spec(rows, 12, 1), kind);
    }
  }
}

TEST_P(QuantizeWeight, pads_a_short_last_group) {
  if (!is_affine()) return;
  for (const std::int64_t rows : {1, 3, 4, 9}) {
    for (const std::int64_t columns : {1, 5, 33, 127, 130, 200}) {
      for (const std::int64_t group : {2, 32, 128})
        compare(spec(rows, columns, group), Kind::kMixed);
    }
  }
}

TEST_P(QuantizeWeight, does_not_depend_on_threads) {
  const auto threads = [](std::int64_t count, const auto& body) {
    std::vector<std::thread> running;
    for (int i = 0; i < 3; ++i) {
      running.emplace_back([=] { body(count * i / 3, count * (i + 1) / 3); });
    }
    for (std::thread& thread : running) thread.join();
  };
  const WeightSpec s = spec(37, 1024, 128);
  const GuardedBytes weight(bytes(s));
  fill(weight, s, Kind::kNormal);
  Attempt(isa(), s, weight.data(), type(), threads)
      .expect_equal(Attempt(isa(), s, weight.data(), type()));
}

TEST_P(QuantizeWeight, refuses_what_is_not_finite) {
  for (const WeightSpec& s : {spec(3, 5), spec(5, 256, 128), spec(4, 1023)}) {
    const std::int64_t count = s.rows * s.columns;
    for (const std::int64_t place : {std::int64_t{0}, count / 2, count - 1}) {
      for (const float bad : {INFINITY, -INFINITY, NAN}) {
        const GuardedBytes weight(bytes(s));
        fill(weight, s, Kind::kNormal);
        store_float(weight.data(), place, type(), bad);
        WeightSpec in_float = s;
        in_float.scale_type = FloatType::kF32;
        EXPECT_EQ(Attempt(isa(), in_float, weight.data(), type()).result, Quantized::kNotInFloat);
        EXPECT_NE(Attempt(isa(), s, weight.data(), type()).result, Quantized::kDone);
      }
    }
  }
}

// By the definition of a code: none other is nearer.
TEST_P(QuantizeWeight, gives_the_nearest_codes) {
  WeightSpec s = spec(5, 64);
  s.scale_type = FloatType::kF32;
  const GuardedBytes weight(bytes(s));
  fill(weight, s, Kind::kNormal);
  const Attempt run(isa(), s, weight.data(), type());
  ASSERT_EQ(run.result, Quantized::kDone);
  RandomWeight found(s);
  std::memcpy(found.data.data(), run.data.data(), run.size);
  std::memcpy(found.scale.data(), run.scale.data(), run.scale_size);
  if (run.affine) std::memcpy(found.shift.data(), run.shift.data(), run.scale_size);
  for (std::int64_t r = 0; r < s.rows; ++r) {
    const double scale = load_float(run.scale.data(), r, FloatType::kF32);
    for (std::int64_t c = 0; c < s.columns; ++c) {
      const double value = load_float(weight.data(), r * s.columns + c, type());
      // Steps of float8 are an eighth (e5m2: a quarter) of the number, subnormal ones apart.
      const double step = qtype() == QTypeId::kFloat8E5M2     ? std::abs(value) / 4
                          : qtype() >= QTypeId::kFloat8E4M3FN ? std::abs(value) / 8 + scale * 0x1p-9
                                                              : scale;
      ASSERT_NEAR(found.value(r, c), value, step * 0.501 + 1e-7) << r << ", " << c;
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
