// What chooses scale and shift.
#include <quantal/quantizer.h>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

double mean_error(const at::Tensor& weight, const WeightOptions& options) {
  return (value_of(quantize_weight(weight, options)) - weight).abs().mean().item<double>();
}

TEST(Absmax, divides_the_largest_size_by_the_largest_code) {
  const at::Tensor groups = at::tensor({1.0F, -254.0F, 3.0F, 0.5F}).reshape({2, 2});
  EXPECT_THAT(numbers((*absmax_quantizer())(groups, qint8).scale),
              ElementsAre(2.0, static_cast<float>(3.0F / 127)));
  EXPECT_FALSE((*absmax_quantizer())(groups, qint8).shift.defined());
  EXPECT_THAT(numbers((*absmax_quantizer())(at::full({1, 1}, -896.0), qfloat8).scale),
              ElementsAre(2.0));
}

TEST(Max, spans_the_range) {
  const at::Tensor groups = at::tensor({-1.0F, 29.0F, 4.0F, 7.0F}).reshape({2, 2});
  const ScaleShift found = (*max_quantizer())(groups, qint4);
  EXPECT_THAT(numbers(found.scale), ElementsAre(2.0, static_cast<float>(3.0F / 15)));
  EXPECT_THAT(numbers(found.shift), ElementsAre(1.0, -4.0));
  EXPECT_THAT(numbers((*max_quantizer())(groups, qint2).scale), ElementsAre(10.0, 1.0));
}

TEST(Quantizers, know_which_qtypes_they_support) {
  for (const QType& qtype : all_qtypes()) {
    EXPECT_EQ(absmax_quantizer()->supports(qtype), !qtype.is_affine());
    EXPECT_EQ(max_quantizer()->supports(qtype), qtype.is_affine());
    EXPECT_EQ(hqq_quantizer()->supports(qtype), qtype.is_affine());
    EXPECT_TRUE(default_quantizer(qtype)->supports(qtype));
  }
  EXPECT_THAT(value_error_of([] {
                quantize_weight(normal({2, 2}), {.qtype = qint8, .quantizer = max_quantizer()});
              }),
              HasSubstr("quantizer 'max' does not support qint8"));
  EXPECT_THAT(value_error_of([] {
                quantize_weight(normal({2, 2}), {.qtype = qint4, .quantizer = absmax_quantizer()});
              }),
              HasSubstr("quantizer 'absmax' does not support qint4"));
}

// optimum-quanto's own figures for N(0, 1), 256 x 1024: see docs/accuracy.md.
TEST(Hqq, is_nearer_than_max) {
  for (const QType& qtype : {qint2, qint4}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      const at::Tensor weight = normal({64, 512}, dtype);
      const double by_max = mean_error(weight, {.qtype = qtype});
      const double by_hqq = mean_error(weight, {.qtype = qtype, .quantizer = hqq_quantizer()});
      EXPECT_LT(by_hqq, by_max * 0.99) << qtype.name << " " << dtype;
      EXPECT_GT(by_hqq, by_max * 0.5) << qtype.name << " " << dtype;
    }
  }
}

TEST(Hqq, never_makes_it_worse_than_max) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const at::Tensor weight = normal({4, 32}, at::kFloat, seed).pow(3);
    EXPECT_LE(mean_error(weight, {.qtype = qint4, .quantizer = hqq_quantizer()}),
              mean_error(weight, {.qtype = qint4}));
  }
}

TEST(Hqq, keeps_the_scale_and_works_on_every_norm) {
  const at::Tensor weight = normal({8, 64});
  const auto plain = parts(quantize_weight(weight, {.qtype = qint2}));
  for (const double norm : {0.5, 0.7, 1.0}) {
    const auto found = parts(
        quantize_weight(weight, {.qtype = qint2, .quantizer = hqq_quantizer({.lp_norm = norm})}));
    EXPECT_TRUE(at::equal(found.scale, plain.scale));
    EXPECT_FALSE(at::equal(found.shift, plain.shift));
  }
  const auto none = parts(
      quantize_weight(weight, {.qtype = qint2, .quantizer = hqq_quantizer({.iterations = 0})}));
  EXPECT_TRUE(at::equal(none.shift, plain.shift));
}

TEST(Hqq, takes_zeros_constants_and_nothing) {
  const WeightOptions options{.qtype = qint4, .quantizer = hqq_quantizer()};
  EXPECT_TRUE(same(quantize_weight(at::zeros({3, 8}), options), at::zeros({3, 8})));
  EXPECT_TRUE(same(quantize_weight(at::full({3, 8}, 2.5), options), at::full({3, 8}, 2.5)));
  EXPECT_TRUE(same(quantize_weight(at::zeros({0, 8}), options), at::zeros({0, 8})));
  EXPECT_TRUE(same(quantize_weight(at::zeros({3, 0}), options), at::zeros({3, 0})));
}

TEST(Hqq, checks_its_options) {
  EXPECT_THAT(value_error_of([] { hqq_quantizer({.beta = 0}); }), HasSubstr("beta > 0"));
  EXPECT_THAT(value_error_of([] { hqq_quantizer({.iterations = -1}); }), HasSubstr("-1"));
}

// The inner loop of a custom quantizer gets every group as one row, in fp32.
TEST(Quantizers, may_be_the_users_own) {
  struct Half final : Quantizer {
    std::string_view name() const override { return "half"; }
    bool supports(const QType& qtype) const override { return qtype == qint8; }
    ScaleShift operator()(const at::Tensor& groups, const QType&) const override {
      EXPECT_EQ(groups.sizes(), at::IntArrayRef({3, 8}));
      EXPECT_EQ(groups.scalar_type(), at::kFloat);
      return {at::full({groups.size(0), 1}, 0.5, groups.options()), {}};
    }
  };
  const at::Tensor q = quantize_weight(at::full({3, 2, 4}, 1.3, at::kHalf),
                                       {.qtype = qint8, .quantizer = std::make_shared<Half>()});
  EXPECT_TRUE(same(q, at::full({3, 2, 4}, 1.5, at::kHalf)));
}

}  // namespace
}  // namespace quantal
