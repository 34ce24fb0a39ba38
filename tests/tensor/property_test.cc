// What holds for every weight: seeded random shapes, sizes and distributions.
#include <random>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;

struct Case {
  at::Tensor weight;
  WeightOptions options;
};

// A weight of a random shape, dtype, distribution and size, and how to quantize it.
Case random_case(std::mt19937& random) {
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const QType qtype = all_qtypes()[static_cast<size_t>(pick(0, 5))];
  const at::ScalarType dtype = kDtypes[static_cast<size_t>(pick(0, 3))];
  const std::int64_t rows = pick(1, 9);
  const std::int64_t row = pick(1, 140);
  at::Tensor weight = normal({rows, row}, at::kDouble, random());
  if (pick(0, 2) == 0) weight = weight.pow(3);
  if (pick(0, 3) == 0) weight = weight.abs();
  if (pick(0, 3) == 0) weight = weight + static_cast<double>(pick(-3, 3));
  weight = weight * std::ldexp(1.0, static_cast<int>(pick(-8, 8)));
  WeightOptions options{.qtype = qtype};
  if (qtype.is_affine() && pick(0, 1) == 1) {
    options.group_size = pick(1, 40);
    options.allow_short_group = true;
  }
  return {weight.to(dtype), options};
}

class Property : public ::testing::Test {
 protected:
  template <typename Check>
  void for_cases(int count, const Check& check) {
    std::mt19937 random(20261124);
    for (int i = 0; i < count && !HasFailure(); ++i) {
      const Case c = random_case(random);
      SCOPED_TRACE(::testing::Message()
                   << "case " << i << ": " << c.options.qtype.name << " " << c.weight.scalar_type()
                   << " " << c.weight.sizes() << " group " << c.options.group_size.value_or(-1));
      check(c);
    }
  }
};

// Scale (and shift) of every element of the weight.
at::Tensor spread(const at::Tensor& part, const QuantizedParts& parts, const at::Tensor& weight) {
  const at::Tensor column = part.to(at::kDouble).reshape({weight.size(0), -1, 1});
  const std::int64_t group = parts.group_size == 0 ? weight.size(1) : parts.group_size;
  return column.expand({-1, -1, group}).flatten(1).slice(1, 0, weight.size(1));
}

TEST_F(Property, no_value_is_further_than_half_a_step) {
  for_cases(1000, [](const Case& c) {
    const at::Tensor q = quantize_weight(c.weight, c.options);
    const auto found = parts(q);
    const at::Tensor exact = c.weight.to(at::kDouble);
    const at::Tensor scale = spread(found.scale, found, c.weight);
    at::Tensor half_step = scale / 2;
    if (c.options.qtype.is_floating_point) {
      const double mantissa = c.options.qtype == qfloat8_e5m2 ? 2 : 3;
      half_step = at::maximum(exact.abs() * std::exp2(-mantissa - 1), scale * 0x1p-8);
    }
    // Scale and shift are rounded to the weight's dtype, as is the value.
    at::Tensor size = exact.abs();
    if (found.shift.defined()) size = size + spread(found.shift, found, c.weight).abs();
    EXPECT_TRUE(is_within(value_of(q), exact,
                          half_step * 1.0001 + size * 4 * unit_roundoff(c.weight.scalar_type())));
  });
}

TEST_F(Property, powers_of_two_pass_through) {
  for_cases(300, [](const Case& c) {
    const at::Tensor weight = c.weight.to(at::kFloat);
    const at::Tensor value = value_of(quantize_weight(weight, c.options));
    for (const double factor : {4.0, 0.25}) {
      EXPECT_TRUE(same(value_of(quantize_weight(weight * factor, c.options)), value * factor));
    }
  });
}

TEST_F(Property, rows_are_quantized_one_by_one) {
  for_cases(300, [](const Case& c) {
    // Half-precision scales are kept in fp32 for a whole tensor where one row needs it.
    const at::Tensor weight = c.weight.to(at::kFloat);
    const at::Tensor value = value_of(quantize_weight(weight, c.options));
    for (std::int64_t row = 0; row < weight.size(0); ++row) {
      EXPECT_TRUE(same(value_of(quantize_weight(weight.slice(0, row, row + 1), c.options)),
                       value.slice(0, row, row + 1)));
    }
  });
}

TEST_F(Property, symmetric_types_mirror) {
  for_cases(300, [](const Case& c) {
    if (c.options.qtype.is_affine()) return;
    EXPECT_TRUE(same(value_of(quantize_weight(-c.weight, c.options)),
                     -value_of(quantize_weight(c.weight, c.options))));
  });
}

TEST_F(Property, larger_weights_never_get_smaller_values) {
  for_cases(300, [](const Case& c) {
    WeightOptions options = c.options;
    options.group_size = 0;
    const at::Tensor row = std::get<0>(c.weight.flatten().sort()).unsqueeze(0);
    const at::Tensor value = value_of(quantize_weight(row, options)).to(at::kDouble);
    EXPECT_TRUE((value.slice(1, 1) >= value.slice(1, 0, -1)).all().item<bool>());
  });
}

TEST_F(Property, rows_can_be_looked_up_without_the_others) {
  for_cases(300, [](const Case& c) {
    const at::Tensor q = quantize_weight(c.weight, c.options);
    const at::Tensor indices = at::arange(c.weight.size(0) - 1, -1, -1, at::kLong).repeat({2, 2});
    EXPECT_TRUE(same(at::embedding(q, indices), at::embedding(value_of(q), indices)));
  });
}

TEST_F(Property, a_cast_and_a_clone_keep_the_codes) {
  for_cases(200, [](const Case& c) {
    const at::Tensor q = quantize_weight(c.weight, c.options);
    EXPECT_TRUE(same(q.clone(), q));
    const at::Tensor wide = q.to(at::kDouble);
    ASSERT_TRUE(is_frozen(wide));
    EXPECT_TRUE(at::equal(parts(wide).data.view(at::kByte), parts(q).data.view(at::kByte)));
    EXPECT_TRUE(is_within(value_of(wide), value_of(q).to(at::kDouble),
                          value_of(q).abs().to(at::kDouble) * 0x1p-6 + 1e-3));
  });
}

}  // namespace
}  // namespace quantal
