// Copies and casts of weights: to(), clone(), set_data() as torch::nn::Module::to uses it.
#include <torch/serialize.h>

#include <sstream>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

class Casts : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  WeightOptions options() const { return {.qtype = std::get<0>(GetParam())}; }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  at::Tensor plain() const { return normal({6, 160}); }
};

// The codes stay; the value is theirs in the new dtype.
TEST_P(Casts, of_a_frozen_weight_keep_its_codes) {
  const at::Tensor frozen = quantize_weight(plain(), options());
  const at::Tensor cast = frozen.to(dtype());
  ASSERT_TRUE(is_frozen(cast));
  EXPECT_EQ(cast.scalar_type(), dtype());
  EXPECT_TRUE(at::equal(parts(cast).data.view(at::kByte), parts(frozen).data.view(at::kByte)));
  EXPECT_TRUE(is_within(value_of(cast), value_of(frozen),
                        value_of(frozen).abs() * 2 * unit_roundoff(dtype()) + 1e-6));
  const at::Tensor x = normal({2, 160}, dtype());
  EXPECT_TRUE(is_linear(at::linear(x, cast), x, cast));
  EXPECT_TRUE(same(cast.to(at::kFloat), frozen));
  EXPECT_TRUE(same(frozen.t().to(dtype()), value_of(cast).t()));
  EXPECT_TRUE(same(frozen[3].to(dtype()), value_of(cast)[3]));
}

// As freezing after the cast would: the codes are those of the weight before it was rounded.
TEST_P(Casts, of_a_live_weight_keep_its_codes_until_it_is_written) {
  const at::Tensor live = live_weight(leaf(plain()), options());
  const at::Tensor cast = live.to(dtype());
  ASSERT_TRUE(is_live(cast));
  EXPECT_TRUE(same(latent(cast), latent(live).to(dtype())));
  EXPECT_TRUE(same(cast, value_of(quantize_weight(plain(), options()).to(dtype()))));
  cast.sum().backward();
  EXPECT_TRUE(same(live.grad(), at::ones({6, 160})));
  if (dtype() == at::kFloat) return;  // to() gave the very weight
  {
    at::NoGradGuard no_grad;
    cast.detach().mul_(2);
  }
  EXPECT_TRUE(same(latent(live), plain()));
  EXPECT_TRUE(same(cast, value_of(quantize_weight(plain().to(dtype()) * 2, options()))));
}

TEST_P(Casts, by_set_data_change_the_weight_itself) {
  // Scale and shift are rounded to the dtype, and the value once more.
  const QuantizedParts exact = parts(quantize_weight(plain(), options()));
  const double codes = exact.shift.defined() ? (1 << exact.qtype.bits) - 1 : exact.qtype.qmax;
  double span = exact.scale.max().item<double>() * codes;
  if (exact.shift.defined()) span += exact.shift.abs().max().item<double>();
  const double rounding = 2 * span * unit_roundoff(dtype());
  for (const bool is_live_weight : {false, true}) {
    const at::Tensor weight = is_live_weight ? live_weight(leaf(plain()), options())
                                             : quantize_weight(plain(), options());
    const at::Tensor wanted = value_of(weight.to(dtype()));
    {
      at::NoGradGuard no_grad;
      weight.set_data(weight.to(dtype()));
    }
    EXPECT_EQ(is_live(weight), is_live_weight);
    EXPECT_EQ(weight.scalar_type(), dtype());
    EXPECT_EQ(weight.requires_grad(), is_live_weight);
    EXPECT_TRUE(is_within(value_of(weight), wanted, rounding));
    const at::Tensor x = normal({2, 160}, dtype());
    EXPECT_TRUE(is_linear(at::linear(x, weight), x, weight));
    at::linear(x.requires_grad_(), weight).sum().backward();
    EXPECT_EQ(weight.grad().defined(), is_live_weight);
  }
}

TEST_P(Casts, by_clone_share_nothing) {
  const at::Tensor source = normal({6, 160}, dtype());
  const at::Tensor frozen = quantize_weight(source, options());
  const at::Tensor copy = frozen.clone();
  ASSERT_TRUE(is_frozen(copy));
  EXPECT_TRUE(at::equal(copy, frozen));
  copy.copy_(source * 2);
  EXPECT_FALSE(at::equal(copy, frozen));
  EXPECT_TRUE(same(frozen, value_of(quantize_weight(source, options()))));
  const at::Tensor live = live_weight(leaf(source), options());
  const at::Tensor twin = live.clone();
  ASSERT_TRUE(is_live(twin));
  EXPECT_TRUE(same(twin, value_of(live)));
  twin.sum().backward();
  EXPECT_TRUE(same(live.grad(), at::ones_like(source)));
  at::NoGradGuard no_grad;
  twin.detach().zero_();
  EXPECT_TRUE(same(latent(live), source));
  freeze(twin);
  EXPECT_TRUE(is_live(live));
}

// A part of a weight that codes cannot hold is copied as floats, which can be written.
TEST_P(Casts, by_clone_of_a_part_give_floats) {
  const at::Tensor frozen = quantize_weight(normal({6, 160}, dtype()), options());
  for (const at::Tensor& part : {frozen[2], frozen.select(1, 3), frozen.view({960}),
                                 frozen.slice(1, 0, 160, 2), frozen.unsqueeze(0)}) {
    const at::Tensor copy = part.clone();
    EXPECT_FALSE(is_quantized(copy));
    EXPECT_TRUE(same(copy, value_of(part)));
    copy.zero_();
  }
  EXPECT_TRUE(same(frozen, value_of(quantize_weight(normal({6, 160}, dtype()), options()))));
  EXPECT_TRUE(same(frozen.t().contiguous(), value_of(frozen).t()));
}

INSTANTIATE_TEST_SUITE_P(All, Casts,
                         ::testing::Combine(::testing::ValuesIn(all_qtypes()),
                                            ::testing::ValuesIn(kDtypes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

// Half-precision scales of tiny weights would be zero: they stay fp32.
TEST(ToHalf, of_tiny_weights_keeps_their_scales) {
  const at::Tensor tiny = normal({4, 32}) * 1e-6;
  for (const QType& qtype : all_qtypes()) {
    const at::Tensor weight = quantize_weight(tiny, {.qtype = qtype});
    const at::Tensor value = value_of(weight);
    weight.set_data(weight.to(at::kHalf));
    EXPECT_EQ(parts(weight).scale.scalar_type(), at::kFloat) << qtype.name;
    EXPECT_TRUE(is_within(value_of(weight), value, 0x1p-24)) << qtype.name;
  }
}

TEST(Equal, compares_what_is_read) {
  const at::Tensor x = normal({4, 32});
  const at::Tensor frozen = quantize_weight(x);
  EXPECT_TRUE(at::equal(frozen, quantize_weight(x)));
  EXPECT_TRUE(at::equal(frozen, value_of(frozen)));
  EXPECT_FALSE(at::equal(frozen, quantize_weight(-x)));
  EXPECT_FALSE(at::equal(frozen, x));
  EXPECT_TRUE(at::equal(live_weight(x), x));
}

TEST(SetData, refuses_to_mix_quantized_and_plain) {
  const at::Tensor frozen = quantize_weight(normal({4, 8}));
  at::Tensor plain = normal({4, 8}).clone();
  EXPECT_THAT(error_of([&] { frozen.set_data(plain); }), HasSubstr("incompatible"));
  EXPECT_THAT(error_of([&] { plain.set_data(frozen); }), HasSubstr("quantal::clone"));
}

TEST(TorchSave, says_what_to_use_instead) {
  for (const at::Tensor& t : {quantize_weight(normal({4, 8})), live_weight(normal({4, 8})),
                              quantize_activation(normal({4, 8}), qint8, scalar(0.03))}) {
    std::ostringstream stream;
    EXPECT_THAT(error_of([&] { torch::save(t, stream); }), HasSubstr("quantal::save"));
    EXPECT_THAT(error_of([&] { torch::pickle_save(t); }), HasSubstr("quantal::save"));
  }
}

TEST(Views, that_do_not_fit_are_errors) {
  for (const at::Tensor& t : {quantize_weight(normal({4, 6})), live_weight(normal({4, 6})),
                              quantize_activation(normal({4, 6}), qint8, scalar(0.03))}) {
    EXPECT_THAT(error_of([&] { t.view({5, 5}); }), HasSubstr("invalid for input of size 24"));
    EXPECT_THAT(error_of([&] { t.t().view({24}); }), HasSubstr("view size is not compatible"));
    EXPECT_THAT(error_of([&] { t.as_strided({4, 6}, {6, 2}); }), HasSubstr("out of bounds"));
    EXPECT_THAT(error_of([&] { t.as_strided({2}, {1}, 23); }), HasSubstr("out of bounds"));
    EXPECT_THAT(error_of([&] { t.select(0, 4); }), HasSubstr("out of range"));
    EXPECT_THAT(error_of([&] { t.transpose(0, 2); }), HasSubstr("out of range"));
    EXPECT_THAT(error_of([&] { t.unsqueeze(0).t(); }), HasSubstr("2 dimensions"));
    EXPECT_TRUE(same(float_of(t.slice(0, 1, 2).as_strided({2}, {1}, 22)),
                     float_of(t).flatten().slice(0, 22, 24)));
  }
}

}  // namespace
}  // namespace quantal
