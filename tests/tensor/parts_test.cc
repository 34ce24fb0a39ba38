// weight_from_parts: what a checkpoint holds, checked.
#include <limits>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

QuantizedParts int8_parts() {
  return {qint8, 0, at::ones({4, 6}, at::kChar), at::ones({4, 1}), {}};
}

QuantizedParts int4_parts() {
  return {qint4, 8, at::ones({4, 8}, at::kByte), at::ones({8, 1}), at::zeros({8, 1})};
}

std::string error_for(const QuantizedParts& parts, at::IntArrayRef sizes,
                      at::ScalarType dtype = at::kFloat) {
  return value_error_of([&] { weight_from_parts(parts, sizes, dtype, "encoder.weight"); });
}

TEST(WeightFromParts, takes_good_ones) {
  EXPECT_TRUE(same(weight_from_parts(int8_parts(), {4, 6}, at::kFloat), at::ones({4, 6})));
  EXPECT_EQ(value_of(weight_from_parts(int4_parts(), {4, 16}, at::kHalf)).scalar_type(), at::kHalf);
}

TEST(WeightFromParts, names_the_weight_and_both_shapes) {
  QuantizedParts bad = int8_parts();
  bad.data = at::ones({4, 5}, at::kChar);
  EXPECT_THAT(error_for(bad, {4, 6}),
              AllOf(HasSubstr("'encoder.weight'"), HasSubstr("[4, 6]"), HasSubstr("[4, 5]")));
  bad = int4_parts();
  bad.data = at::ones({8, 8}, at::kByte);
  EXPECT_THAT(error_for(bad, {4, 16}), AllOf(HasSubstr("[4, 8]"), HasSubstr("[8, 8]")));
}

TEST(WeightFromParts, refuses_wrong_or_missing_data) {
  QuantizedParts bad = int8_parts();
  bad.data = at::ones({4, 6}, at::kByte);
  EXPECT_THAT(error_for(bad, {4, 6}), AllOf(HasSubstr("Char"), HasSubstr("Byte")));
  bad.data = at::Tensor();
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("none"));
  bad = {qfloat8, 0, at::full({4, 6}, kNaN).to(at::kFloat8_e4m3fn), at::ones({4, 1}), {}};
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("NaN"));
  bad = {qfloat8_e5m2, 0, at::full({4, 6}, 1e9).to(at::kFloat8_e5m2), at::ones({4, 1}), {}};
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("Inf"));
}

TEST(WeightFromParts, refuses_bad_scales) {
  for (const double value : {0.0, -1.0, kNaN, kInf}) {
    QuantizedParts bad = int8_parts();
    bad.scale = at::ones({4, 1});
    bad.scale[2] = value;
    EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("scale")) << value;
    bad.scale = at::full({1, 1}, value);
    bad.data = at::ones({1, 6}, at::kChar);
    EXPECT_THAT(error_for(bad, {1, 6}), HasSubstr("scale")) << value;
    bad.scale = at::scalar_tensor(value);
    EXPECT_THAT(error_for(bad, {1, 6}), HasSubstr("scale")) << value;
  }
  QuantizedParts bad = int8_parts();
  bad.scale = at::ones({4});
  EXPECT_THAT(error_for(bad, {4, 6}), AllOf(HasSubstr("scale"), HasSubstr("[4, 1]")));
  bad.scale = at::ones({4, 1}, at::kInt);
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("floating-point"));
  bad.scale = at::ones({4, 1}).to(at::kFloat8_e4m3fn);
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("floating-point"));
  bad.scale = at::Tensor();
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("scale"));
}

TEST(WeightFromParts, refuses_bad_shifts) {
  for (const double value : {kNaN, kInf, -kInf}) {
    QuantizedParts bad = int4_parts();
    bad.shift[5] = value;
    EXPECT_THAT(error_for(bad, {4, 16}), HasSubstr("shift")) << value;
    bad = {qint4, 0, at::ones({1, 6}, at::kByte), at::ones({1, 1}), at::full({1, 1}, value)};
    EXPECT_THAT(error_for(bad, {1, 6}), HasSubstr("shift")) << value;
    bad.shift = at::scalar_tensor(value);
    EXPECT_THAT(error_for(bad, {1, 6}), HasSubstr("shift")) << value;
  }
  QuantizedParts bad = int4_parts();
  bad.shift = at::zeros({4, 1});
  EXPECT_THAT(error_for(bad, {4, 16}), AllOf(HasSubstr("shift"), HasSubstr("[8, 1]")));
  bad.shift = at::Tensor();
  EXPECT_THAT(error_for(bad, {4, 16}), HasSubstr("shift"));
  bad = int8_parts();
  bad.shift = at::zeros({4, 1});
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("shift"));
}

TEST(WeightFromParts, refuses_wrong_groups_sizes_and_dtypes) {
  QuantizedParts bad = int8_parts();
  bad.group_size = 2;
  EXPECT_THAT(error_for(bad, {4, 6}), HasSubstr("group size 2"));
  bad = int4_parts();
  bad.group_size = -8;
  EXPECT_THAT(error_for(bad, {4, 16}), HasSubstr("group size -8"));
  EXPECT_THAT(error_for(int8_parts(), {24}), HasSubstr("two dimensions"));
  EXPECT_THAT(error_for(int8_parts(), {-4, 6}), HasSubstr("-4"));
  for (const at::ScalarType dtype : {at::kInt, at::kFloat8_e5m2, at::kComplexFloat, at::kBool}) {
    EXPECT_THAT(error_for(int8_parts(), {4, 6}, dtype), HasSubstr("dtype")) << dtype;
  }
}

TEST(WeightFromParts, reads_optimum_quantos_special_cases) {
  // One output feature: a scale without dimensions.
  const at::Tensor one = weight_from_parts(
      {qint8, 0, at::full({1, 3}, 5, at::kChar), at::scalar_tensor(0.5), {}}, {1, 3}, at::kFloat);
  EXPECT_TRUE(same(one, at::full({1, 3}, 2.5)));
  // Integer zero points instead of float shifts: value = scale * (code - zero_point).
  const at::Tensor zero_point =
      weight_from_parts({qint4, 8, at::full({2, 8}, 0x73, at::kByte), at::full({4, 1}, 0.5),
                         at::full({4, 1}, 2, at::kByte)},
                        {4, 8}, at::kFloat);
  EXPECT_TRUE(same(zero_point, at::cat({at::full({2, 8}, 0.5), at::full({2, 8}, 2.5)})));
}

TEST(WeightFromParts, takes_empty_weights) {
  for (const QType& qtype : all_qtypes()) {
    for (const Sizes& sizes : {Sizes{0, 256}, {0, 5}, {3, 0}, {0, 0}}) {
      SCOPED_TRACE(::testing::Message() << qtype.name << " " << sizes);
      const at::Tensor q = quantize_weight(at::zeros(sizes), {.qtype = qtype});
      EXPECT_TRUE(same(q, at::zeros(sizes)));
      EXPECT_TRUE(same(weight_from_parts(parts(q), sizes, at::kFloat), at::zeros(sizes)));
    }
  }
}

TEST(Parts, belong_to_whole_quantized_tensors_only) {
  const at::Tensor q = quantize_weight(normal({4, 8}));
  EXPECT_THAT(value_error_of([&] { parts(at::ones({2, 2})); }), HasSubstr("quantized"));
  EXPECT_THAT(value_error_of([&] { parts(q.slice(0, 1, 3)); }), HasSubstr("whole"));
  EXPECT_THAT(value_error_of([&] { parts(q.t()); }), HasSubstr("whole"));
  EXPECT_TRUE(at::equal(parts(q.detach()).data, parts(q).data));
}

TEST(Parts, of_an_activation_are_those_that_it_shows) {
  const at::Tensor y =
      quantize_activation(at::arange(12, at::kFloat).reshape({3, 4}), qint8, scalar(1.0));
  EXPECT_TRUE(at::equal(parts(y[1]).data, at::tensor({4, 5, 6, 7}, at::kChar)));
  EXPECT_TRUE(at::equal(parts(y.t()).data, parts(y).data.t()));
}

}  // namespace
}  // namespace quantal
