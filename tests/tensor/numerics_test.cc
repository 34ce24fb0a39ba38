// Weights that are hard on arithmetic: zeros, constants, extremes, non-finite and empty ones.
#include <limits>

#include <ATen/Parallel.h>

#include "tensor/reference.h"
#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Doubles have no wider type in which a range of twice their largest number could be computed.
double largest(at::ScalarType dtype) {
  return dtype == at::kHalf       ? 65504
         : dtype == at::kBFloat16 ? 0x1.FEp127
         : dtype == at::kFloat    ? std::numeric_limits<float>::max()
                                  : std::numeric_limits<double>::max() / 4;
}

at::Tensor round_trip(const at::Tensor& weight, const WeightOptions& options) {
  return value_of(quantize_weight(weight, options));
}

class Numerics : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  WeightOptions options() const { return {.qtype = qtype()}; }
  at::Tensor round_trip(const at::Tensor& weight) const {
    return quantal::round_trip(weight, options());
  }
};

TEST_P(Numerics, zeros_stay_zeros) {
  at::Tensor weight = normal({4, 160}, dtype());
  weight[1].zero_();
  weight[3].slice(0, 32, 64).zero_();
  const at::Tensor value = round_trip(weight);
  EXPECT_TRUE(same(value[1], weight[1]));
  EXPECT_TRUE(same(round_trip(at::zeros({3, 5}, dtype())), at::zeros({3, 5}, dtype())));
  if (!qtype().is_affine()) return;
  EXPECT_TRUE(same(value[3].slice(0, 32, 64), weight[3].slice(0, 32, 64)));
}

TEST_P(Numerics, minus_zero_is_zero) {
  const at::Tensor weight = at::cat({at::full({2, 4}, -0.0, dtype()), at::zeros({2, 4}, dtype())});
  EXPECT_TRUE(same(round_trip(weight), at::zeros({4, 4}, dtype())));
  const at::Tensor mixed = at::tensor({-0.0, 1.0, -1.0, 0.0}).to(dtype()).unsqueeze(0);
  EXPECT_TRUE(round_trip(mixed).isfinite().all().item<bool>());
}

TEST_P(Numerics, constants_of_affine_types_are_exact) {
  if (!qtype().is_affine()) return;
  for (const double value : {1.0, -3.140625, 0x1p-14, 30000.0}) {
    const at::Tensor weight = at::full({3, 160}, value, dtype());
    EXPECT_TRUE(same(round_trip(weight), weight)) << value;
  }
}

TEST_P(Numerics, tiny_groups_have_finite_scales) {
  for (const double size : {1e-45, 1e-40, 1e-38, 1.5e-38, 1e-37, 1e-36, 1e-30, 1e-20, 1e-12}) {
    const at::Tensor weight = (normal({4, 64}, at::kDouble) * size).to(dtype());
    const at::Tensor q = quantize_weight(weight, options());
    const auto found = parts(q);
    EXPECT_TRUE((found.scale.to(at::kDouble) > 0).all().item<bool>()) << size;
    EXPECT_TRUE(found.scale.isfinite().all().item<bool>()) << size;
    const at::Tensor error = (value_of(q).to(at::kDouble) - weight.to(at::kDouble)).abs();
    // The largest code's step is a quarter of the range (qint2) at most; below the smallest normal
    // number nothing is kept.
    const double range = weight.to(at::kDouble).abs().max().item<double>() * 2;
    EXPECT_LE(error.max().item<double>(), range / 6 * 1.02 + 4 * std::numeric_limits<float>::min())
        << size;
  }
}

TEST_P(Numerics, small_weights_keep_their_precision) {
  for (const double size : {1e-4, 1e-5, 1e-6}) {
    const at::Tensor weight = (normal({8, 64}, at::kFloat) * size).to(dtype());
    const at::Tensor q = quantize_weight(weight, options());
    const Quantized wanted =
        reference_quantize(numbers(weight), 64, 0, qtype(), dtype(), parts(q).scale.scalar_type());
    EXPECT_EQ(numbers(value_of(q)), wanted.values);
    const double relative = (value_of(q) - weight).to(at::kDouble).norm().item<double>() /
                            weight.to(at::kDouble).norm().item<double>();
    EXPECT_LT(relative, qtype().bits == 2 ? 0.5 : qtype().bits == 4 ? 0.13 : 0.06) << size;
  }
}

TEST_P(Numerics, the_largest_numbers_stay_finite_and_near) {
  const double top = largest(dtype());
  const at::Tensor weight =
      at::tensor({top, -top, 0.0, top / 2, -top / 2, top / 3, -top / 5, 1.0}, at::kDouble)
          .to(dtype())
          .reshape({1, 8})
          .repeat({3, 1});
  const at::Tensor value = round_trip(weight);
  EXPECT_TRUE(value.isfinite().all().item<bool>()) << value;
  const double step = qtype().is_affine()       ? 2.0 / ((1 << qtype().bits) - 1)
                      : qtype() == qint8        ? 1.0 / 127
                      : qtype() == qfloat8_e5m2 ? 1.0 / 7
                                                : 1.0 / 14;
  const at::Tensor error = (value.to(at::kDouble) / top - weight.to(at::kDouble) / top).abs();
  EXPECT_LE(error.max().item<double>(), step * 0.51 + 2 * unit_roundoff(dtype())) << value;
}

TEST_P(Numerics, one_sided_weights_with_a_large_offset_lose_half_a_step_at_most) {
  if (!qtype().is_affine()) return;
  for (const double offset : {1.0, -1.0, 8.0, 100.0}) {
    const at::Tensor weight = (normal({8, 128}, at::kFloat) * 0.02 + offset).to(dtype());
    const at::Tensor value = round_trip(weight);
    const at::Tensor range =
        weight.amax(1, true).to(at::kDouble) - weight.amin(1, true).to(at::kDouble);
    const double ulp = std::abs(offset) * 4 * unit_roundoff(dtype());
    EXPECT_TRUE(
        is_within(value, weight, range.expand({8, 128}) / ((1 << qtype().bits) - 1) * 0.502 + ulp))
        << offset;
  }
}

TEST_P(Numerics, one_bad_weight_is_an_error_that_names_it) {
  for (const double bad : {kNaN, kInf, -kInf}) {
    at::Tensor weight = normal({5, 160}, dtype());
    weight[3][77] = bad;
    weight[4][0] = bad;
    EXPECT_THAT(value_error_of([&] { quantize_weight(weight, options()); }),
                AllOf(HasSubstr("'weight'"), HasSubstr("[3, 77]")));
    EXPECT_THAT(value_error_of([&] { live_weight(weight, options()); }), HasSubstr("[3, 77]"));
  }
  at::Tensor kernel = normal({3, 2, 3, 3}, dtype());
  kernel[1][0][2][1] = kNaN;
  EXPECT_THAT(value_error_of([&] { quantize_weight(kernel, options()); }),
              HasSubstr("[1, 0, 2, 1]"));
  // A live weight may go bad in training; freezing it is the error then, and leaves it live.
  const at::Tensor live = live_weight(normal({5, 160}, dtype()), options());
  latent(live)[2][9] = kInf;
  EXPECT_THAT(value_error_of([&] { freeze(live); }), HasSubstr("[2, 9]"));
  EXPECT_TRUE(is_live(live));
}

TEST_P(Numerics, empty_weights_work) {
  for (const Sizes& sizes : {Sizes{0, 5}, {0, 256}, {5, 0}, {0, 0}, {0, 3, 3, 3}, {4, 0, 3, 3}}) {
    SCOPED_TRACE(::testing::Message() << sizes);
    const at::Tensor weight = at::zeros(sizes, dtype());
    for (const at::Tensor& q :
         {quantize_weight(weight, options()), live_weight(weight, options())}) {
      EXPECT_TRUE(same(value_of(q), weight));
      EXPECT_TRUE(same(q.clone(), weight));
      if (weight.dim() != 2) continue;
      const at::Tensor x = normal({3, sizes[1]}, dtype());
      const at::Tensor bias = normal({sizes[0]}, dtype());
      EXPECT_TRUE(same(at::linear(x, q, bias), at::linear(x, weight, bias)));
      EXPECT_TRUE(same(at::addmm(bias, x, q.t()), at::linear(x, weight, bias)));
      EXPECT_TRUE(same(at::matmul(x.unsqueeze(0), q.t()), at::linear(x.unsqueeze(0), weight)));
      const at::Tensor none = at::zeros({0}, at::kLong);
      EXPECT_TRUE(same(at::embedding(q, none), at::embedding(weight, none)));
    }
  }
}

TEST_P(Numerics, quantizing_twice_changes_nothing) {
  if (qtype().is_affine()) return;  // the ends of a group's range need not be reached again
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const at::Tensor once = round_trip(normal({4, 65}, at::kFloat, seed).to(dtype()));
    const at::Tensor error = (round_trip(once) - once).to(at::kDouble).abs();
    EXPECT_TRUE(
        is_within(round_trip(once), once, once.abs().to(at::kDouble) * 2 * unit_roundoff(dtype())));
  }
}

TEST_P(Numerics, is_the_same_for_any_number_of_threads) {
  const int threads = at::get_num_threads();
  const at::Tensor weight = normal({300, 640}, dtype());
  at::set_num_threads(1);
  const auto expected = parts(quantize_weight(weight, options()));
  for (const int count : {2, 3, 4}) {
    at::set_num_threads(count);
    const auto found = parts(quantize_weight(weight, options()));
    EXPECT_TRUE(at::equal(found.data.view(at::kByte), expected.data.view(at::kByte)));
    EXPECT_TRUE(at::equal(found.scale, expected.scale));
  }
  at::set_num_threads(threads);
}

INSTANTIATE_TEST_SUITE_P(All, Numerics,
                         ::testing::Combine(::testing::ValuesIn(all_qtypes()),
                                            ::testing::ValuesIn(kDtypes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

TEST(Denormals, give_the_same_codes_with_and_without_flush_to_zero) {
  if (!at::Context::setFlushDenormal(true)) GTEST_SKIP() << "no flush-to-zero here";
  at::Context::setFlushDenormal(false);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);  // the mode is the thread's own
  std::vector<double> sizes;
  for (int exponent = -149; exponent < -110; ++exponent) sizes.push_back(std::ldexp(1.0, exponent));
  const at::Tensor rows = normal({static_cast<std::int64_t>(sizes.size()), 32}, at::kDouble) *
                          at::tensor(sizes, at::kDouble).unsqueeze(1);
  for (const QType& qtype : all_qtypes()) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor weight = rows.to(dtype);
      const auto kept = parts(quantize_weight(weight, {.qtype = qtype}));
      at::Context::setFlushDenormal(true);
      const auto flushed = parts(quantize_weight(weight, {.qtype = qtype}));
      at::Context::setFlushDenormal(false);
      EXPECT_TRUE(at::equal(kept.scale, flushed.scale)) << qtype.name;
      const at::Tensor kept_codes = kept.data.to(at::kFloat);  // -0 is 0
      EXPECT_TRUE(at::equal(kept_codes, flushed.data.to(at::kFloat))) << qtype.name;
    }
  }
  at::set_num_threads(threads);
}

TEST(Saturation, keeps_8_bit_codes_in_range) {
  const at::Tensor x = at::tensor({1e30, -1e30, kInf, -kInf, 1000.0, -1000.0});
  for (const QType& qtype : eight_bit_qtypes()) {
    const at::Tensor y = quantize_activation(x, qtype, scalar(0.001));
    EXPECT_TRUE((value_of(y).abs() <= qtype.qmax * 0.00101).all().item<bool>()) << qtype.name;
    EXPECT_TRUE((value_of(y).abs() >= qtype.qmax * 0.00099).all().item<bool>()) << qtype.name;
  }
  // Half-precision values of e5m2 may round beyond the largest half.
  const at::Tensor half = at::full({1, 4}, 65504, at::kHalf);
  EXPECT_TRUE(same(round_trip(half, {.qtype = qfloat8_e5m2}), half));
}

TEST(Weights, of_other_dtypes_or_dimensions_are_errors) {
  for (const at::ScalarType dtype : {at::kInt, at::kChar, at::kBool, at::kComplexFloat}) {
    EXPECT_THAT(value_error_of([&] { quantize_weight(at::ones({2, 2}, dtype)); }),
                HasSubstr("dtype"))
        << dtype;
    EXPECT_THAT(value_error_of([&] { live_weight(at::ones({2, 2}, dtype)); }), HasSubstr("dtype"));
  }
  EXPECT_THAT(value_error_of([] { quantize_weight(at::ones({4})); }), HasSubstr("two dimensions"));
  EXPECT_THAT(value_error_of([] { quantize_weight(at::ones({})); }), HasSubstr("two dimensions"));
  const at::Tensor q = quantize_weight(at::ones({2, 2}));
  EXPECT_THAT(value_error_of([&] { quantize_weight(q); }), HasSubstr("quantized"));
  EXPECT_THAT(value_error_of([&] { live_weight(q); }), HasSubstr("quantized"));
  EXPECT_THAT(value_error_of([] { freeze(at::ones({2, 2})); }), HasSubstr("quantized"));
  EXPECT_THAT(value_error_of([&] { latent(q); }), HasSubstr("live"));
}

}  // namespace
}  // namespace quantal
