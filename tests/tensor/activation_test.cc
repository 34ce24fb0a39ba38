// Activations: which operations keep the codes, what they compute, what their gradients are.
#include <limits>

#include "tensor/convolutions.h"
#include "tensor/reference.h"
#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

bool has_codes(const at::Tensor& t) {
  return is_quantized(t) && value_error_of([&] { parts(t); }) == "no error";
}

class Activation : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  at::Tensor scale() const { return scalar(3.0 / qtype().qmax); }
  at::Tensor quantize(const at::Tensor& x) const {
    return quantize_activation(x, qtype(), scale());
  }

  // `run` over codes: no fallback, a quantized result, the value of the same call on floats within
  // `tolerance`, and the gradient of that call.
  template <typename Run>
  void expect_codes(const Run& run, const at::Tensor& x, double tolerance = 0) {
    const at::Tensor input = leaf(x);
    const at::Tensor plain = leaf(value_of(quantize(x)));
    at::Tensor y;
    {
      NoFallback guard;
      y = run(quantize(input));
    }
    EXPECT_TRUE(has_codes(y));
    EXPECT_EQ(y.scalar_type(), dtype());
    const at::Tensor wanted = run(plain.clone());
    const auto bound = [&](const at::Tensor& exact) {
      const at::Tensor relative = exact.abs().to(at::kDouble) * tolerance;
      return dtype() == at::kHalf && tolerance > 0 ? relative + 0x1p-24 : relative;  // subnormals
    };
    EXPECT_TRUE(is_within(value_of(y), wanted, bound(wanted)));
    const at::Tensor grad = normal(wanted.sizes(), dtype(), 99);
    y.backward(grad);
    wanted.backward(grad);
    EXPECT_TRUE(is_within(input.grad(), plain.grad(), bound(plain.grad())));
  }
};

TEST_P(Activation, holds_the_codes_of_plain_loops) {
  for (const std::int64_t size : kSizes) {
    const at::Tensor x = normal({size, 3}, dtype(), static_cast<std::uint64_t>(size));
    const at::Tensor y = quantize(x);
    const double step = scale().item<float>();
    std::vector<double> codes, values;
    for (const double element : numbers(x)) {
      const double ratio = dtype() == at::kDouble
                               ? element / step
                               : static_cast<float>(element) / static_cast<float>(step);
      const double code = qtype().is_floating_point
                              ? round_to_float8(float8_of(qtype()), ratio)
                              : std::clamp(std::nearbyint(ratio), qtype().qmin, qtype().qmax);
      codes.push_back(code);
      values.push_back(round_to(dtype(), static_cast<float>(code) * static_cast<float>(step)));
    }
    EXPECT_EQ(numbers(parts(y).data), codes);
    EXPECT_EQ(parts(y).scale.item<double>(), step);
    EXPECT_EQ(y.scalar_type(), dtype());
    if (dtype() != at::kDouble) {
      EXPECT_EQ(numbers(value_of(y)), values);
    }
  }
}

TEST_P(Activation, views_share_codes) {
  const at::Tensor x = normal({4, 6, 5}, dtype());
  expect_codes([](const at::Tensor& y) { return y.view({24, 5}); }, x);
  expect_codes([](const at::Tensor& y) { return y.reshape({2, -1}); }, x);
  expect_codes([](const at::Tensor& y) { return y.flatten(1); }, x);
  expect_codes([](const at::Tensor& y) { return y.transpose(1, 2); }, x);
  expect_codes([](const at::Tensor& y) { return y.transpose(1, 2).reshape({4, 30}); }, x);
  expect_codes([](const at::Tensor& y) { return y.permute({2, 0, 1}); }, x);
  expect_codes([](const at::Tensor& y) { return y[2]; }, x);
  expect_codes([](const at::Tensor& y) { return y.select(-1, 3); }, x);
  expect_codes([](const at::Tensor& y) { return y.slice(1, 1, 6, 2); }, x);
  expect_codes([](const at::Tensor& y) { return y.narrow(2, 1, 3).contiguous(); }, x);
  expect_codes([](const at::Tensor& y) { return y.split(4, 1)[1]; }, x);
  expect_codes([](const at::Tensor& y) { return y.split_with_sizes({1, 5}, 1)[1]; }, x);
  expect_codes([](const at::Tensor& y) { return y.chunk(3, 1)[2]; }, x);
  expect_codes([](const at::Tensor& y) { return y.unbind(1)[5]; }, x);
  expect_codes([](const at::Tensor& y) { return y.unsqueeze(1).expand({4, 3, 6, 5}); }, x);
  expect_codes([](const at::Tensor& y) { return y.slice(0, 0, 1).squeeze(0); }, x);
  expect_codes([](const at::Tensor& y) { return y.diagonal(0, 1, 2); }, x);
  expect_codes([](const at::Tensor& y) { return y.unfold(1, 3, 2); }, x);
  expect_codes([](const at::Tensor& y) { return y.movedim(0, 2); }, x);
  expect_codes([](const at::Tensor& y) { return y.select(0, 1).t(); }, x);
  expect_codes([](const at::Tensor& y) { return y.select(0, 1).mT(); }, x);
  expect_codes([](const at::Tensor& y) { return y.view_as(y.transpose(0, 1).transpose(0, 1)); }, x);
  expect_codes([](const at::Tensor& y) { return y.alias(); }, x);
}

TEST_P(Activation, relu_and_neg_keep_codes) {
  const at::Tensor x = normal({4, 33}, dtype());
  expect_codes([](const at::Tensor& y) { return at::relu(y); }, x);
  expect_codes([](const at::Tensor& y) { return at::relu(y.t()); }, x);
  expect_codes([](const at::Tensor& y) { return at::neg(y); }, x);
  expect_codes([](const at::Tensor& y) { return -y.slice(1, 2, 30, 3); }, x);
  expect_codes(
      [](const at::Tensor& y) {
        at::Tensor z = y;
        return at::relu_(z);
      },
      x);
}

TEST_P(Activation, a_number_scales_the_scale) {
  const at::Tensor x = normal({4, 7}, dtype());
  const double two_roundings = 3 * unit_roundoff(dtype() == at::kDouble ? at::kFloat : dtype());
  for (const double factor : {2.0, -0.5, 3.1, -1e-3, 1e4}) {
    expect_codes([&](const at::Tensor& y) { return y * factor; }, x, two_roundings);
    expect_codes([&](const at::Tensor& y) { return factor * y; }, x, two_roundings);
    expect_codes([&](const at::Tensor& y) { return y / factor; }, x, two_roundings);
    expect_codes([&](const at::Tensor& y) { return y * at::scalar_tensor(factor); }, x,
                 two_roundings);
  }
  // Zero, infinity and what leaves the range of scales are computed on floats.
  for (const double factor : {0.0, 1e38, 1e-38, std::numeric_limits<double>::infinity()}) {
    const at::Tensor wanted = value_of(quantize(x)).mul(factor);
    EXPECT_TRUE(at::allclose(value_of(quantize(x) * factor), wanted, 1e-2, 0, /*equal_nan=*/true))
        << factor;
  }
}

TEST_P(Activation, cat_and_stack_of_equal_scales_keep_codes) {
  const at::Tensor x = normal({4, 6}, dtype());
  expect_codes([](const at::Tensor& y) { return at::cat({y, y.slice(0, 1, 3)}, 0); }, x);
  expect_codes([](const at::Tensor& y) { return at::cat({y, y, y.t().t()}, 1); }, x);
  expect_codes([](const at::Tensor& y) { return at::stack({y, at::relu(y)}, 1); }, x);
  expect_codes([](const at::Tensor& y) { return at::cat({y.transpose(0, 1)}, -1); }, x);
}

TEST_P(Activation, cat_and_stack_of_other_scales_are_floats) {
  const at::Tensor x = normal({4, 6}, dtype());
  const at::Tensor a = quantize(x);
  const at::Tensor b = quantize_activation(x, qtype(), scalar(0.5));
  reset_fallback_counts();
  for (const at::Tensor& other : {b, value_of(b)}) {
    const at::Tensor joined = at::cat({a, other}, 1);
    EXPECT_FALSE(is_quantized(joined));
    EXPECT_TRUE(same(joined, at::cat({value_of(a), value_of(other)}, 1)));
    EXPECT_TRUE(same(at::stack({other, a}), at::stack({value_of(other), value_of(a)})));
  }
  EXPECT_EQ(fallbacks_of("aten::cat"), 2);
}

TEST_P(Activation, pools_keep_codes) {
  const at::Tensor line = normal({2, 3, 11}, dtype());
  const at::Tensor image = normal({2, 3, 9, 8}, dtype());
  const at::Tensor volume = normal({1, 2, 5, 6, 7}, dtype());
  expect_codes([](const at::Tensor& y) { return at::max_pool1d(y, 3, 2, 1); }, line);
  expect_codes([](const at::Tensor& y) { return at::max_pool1d(y[0], 2); }, line);
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y, 2); }, image);
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y, {3, 2}, 2, {1, 0}, 1, true); },
               image);
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y[1], 3, 1, 1); }, image);
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y, 2, 2, 0, 2); }, image);
  expect_codes([](const at::Tensor& y) { return at::max_pool3d(y, 2); }, volume);
  const at::Tensor last = quantize(image.contiguous(at::MemoryFormat::ChannelsLast));
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y, 3, 2, 1); },
               image.contiguous(at::MemoryFormat::ChannelsLast));
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y.transpose(2, 3), {2, 3}); },
               image);
  expect_codes([](const at::Tensor& y) { return at::max_pool3d(y[0], {1, 2, 3}, 2, {0, 1, 1}); },
               volume);
  expect_codes([](const at::Tensor& y) { return at::max_pool2d(y.narrow(0, 0, 0), 2); }, image);
  const auto [pooled, indices] = at::max_pool2d_with_indices(last, 2);
  const auto [wanted, wanted_indices] = at::max_pool2d_with_indices(value_of(last), 2);
  EXPECT_TRUE(has_codes(pooled));
  EXPECT_TRUE(same(pooled, wanted));
  EXPECT_TRUE(at::equal(indices, wanted_indices));
  EXPECT_TRUE(at::max_pool2d(last, 2).is_contiguous(at::MemoryFormat::ChannelsLast));
}

TEST_P(Activation, pools_that_do_not_fit_are_errors) {
  const at::Tensor y = quantize(normal({2, 3, 9, 8}, dtype()));
  EXPECT_THROW(at::max_pool2d(y, 2, 2, 2), c10::Error);
  EXPECT_THROW(at::max_pool2d(y, 20), c10::Error);
  EXPECT_THROW(at::max_pool2d(y, 2, 0), c10::Error);
  EXPECT_THROW(at::max_pool2d(y, {2, 2, 2}), c10::Error);
  EXPECT_THROW(at::max_pool1d(y, 2), c10::Error);
}

TEST_P(Activation, pools_pass_gradients) {
  const at::Tensor input = leaf(normal({2, 3, 9, 8}, dtype()));
  const at::Tensor y = at::max_pool2d(quantize(input), 2);
  ASSERT_TRUE(has_codes(y));
  y.sum().backward();
  EXPECT_EQ(input.grad().count_nonzero().item<std::int64_t>(), y.numel());
  at::NoGradGuard no_grad;
  EXPECT_TRUE(same(at::max_pool2d(quantize(input), 2), y.detach()));
}

TEST_P(Activation, softmax_has_the_scale_of_probabilities) {
  const at::Tensor x = normal({4, 33}, dtype());
  const at::Tensor input = leaf(x);
  at::Tensor y;
  {
    NoFallback guard;
    y = at::softmax(quantize(input), -1);
  }
  ASSERT_TRUE(has_codes(y));
  EXPECT_FLOAT_EQ(parts(y).scale.item<float>(), static_cast<float>(1 / qtype().qmax));
  const at::Tensor exact = at::softmax(value_of(quantize(x)).to(at::kDouble), -1);
  const double step = qtype() == qint8 ? 0.5 / 127 : 0.0;
  const double mantissa = qtype() == qfloat8_e5m2 ? 0x1p-3 : 0x1p-4;
  const at::Tensor bound = exact * (qtype() == qint8 ? 0.0 : mantissa) + step + 1e-6 +
                           exact * 4 * unit_roundoff(dtype());
  EXPECT_TRUE(is_within(value_of(y), exact, bound));
  y.sum().backward();
  EXPECT_TRUE(input.grad().isfinite().all().item<bool>());
}

TEST_P(Activation, copies_keep_codes) {
  const at::Tensor image = normal({2, 3, 4, 5}, dtype());
  expect_codes([](const at::Tensor& y) { return y.clone(); }, image);
  expect_codes([](const at::Tensor& y) { return y.permute({0, 2, 3, 1}).contiguous(); }, image);
  const at::Tensor y = quantize(image);
  const at::Tensor last = y.contiguous(at::MemoryFormat::ChannelsLast);
  EXPECT_TRUE(last.is_contiguous(at::MemoryFormat::ChannelsLast));
  EXPECT_TRUE(has_codes(last));
  EXPECT_TRUE(same(last, y));
  EXPECT_TRUE(same(last.reshape({2, 60}), y.reshape({2, 60})));
  EXPECT_TRUE(y.detach().is_same_size(y));
  EXPECT_TRUE(has_codes(y.detach()));
  for (const at::ScalarType other : kDtypes) {
    const at::Tensor cast = y.to(other);
    EXPECT_TRUE(has_codes(cast));
    EXPECT_EQ(cast.scalar_type(), other);
    EXPECT_TRUE(at::equal(parts(cast).data.to(at::kFloat), parts(y).data.to(at::kFloat)));
  }
  EXPECT_FALSE(is_quantized(y.to(at::kInt)));
  EXPECT_TRUE(same(y.to(at::kInt), value_of(y).to(at::kInt)));
  const at::Tensor copy = y.clone();
  copy[0].zero_();
  EXPECT_TRUE(same(y, quantize(image)));
}

TEST_P(Activation, equal_compares_values) {
  const at::Tensor x = normal({4, 6}, dtype());
  EXPECT_TRUE(at::equal(quantize(x), quantize(x)));
  EXPECT_TRUE(at::equal(quantize(x), value_of(quantize(x))));
  EXPECT_TRUE(at::equal(value_of(quantize(x)), quantize(x)));
  EXPECT_FALSE(at::equal(quantize(x), quantize(-x)));
  EXPECT_FALSE(at::equal(quantize(x), quantize_activation(x, qtype(), scalar(0.5))));
  EXPECT_FALSE(at::equal(quantize(x), quantize(x).t()));
}

TEST_P(Activation, is_the_input_of_compute_operations) {
  const at::Tensor y = quantize(normal({4, 16}, dtype()));
  const at::Tensor plain = normal({5, 16}, dtype(), 2);
  const at::Tensor w = quantize_weight(plain, {.qtype = qint4});
  NoFallback guard;
  EXPECT_TRUE(is_linear(at::linear(y, w), y, w));
  EXPECT_TRUE(same(at::linear(y, plain), at::linear(value_of(y), plain)));
  EXPECT_TRUE(is_linear(at::matmul(y, w.t()), y, w));
  EXPECT_TRUE(same(at::mm(y, y.t()), at::mm(value_of(y), value_of(y).t())));
  EXPECT_TRUE(same(at::bmm(y.unsqueeze(0), y.t().unsqueeze(0)),
                   at::bmm(value_of(y).unsqueeze(0), value_of(y).t().unsqueeze(0))));
  const at::Tensor image = quantize(normal({1, 2, 6, 6}, dtype()));
  const at::Tensor kernel = quantize_weight(normal({3, 2, 3, 3}, dtype(), 3));
  const auto conv = [](const auto& x, const auto& w, const auto& b) { return at::conv2d(x, w, b); };
  EXPECT_TRUE(is_convolution(conv(image, kernel, at::Tensor()), conv, image, kernel));
  EXPECT_TRUE(same(at::layer_norm(y, {16}), at::layer_norm(value_of(y), {16})));
}

INSTANTIATE_TEST_SUITE_P(All, Activation,
                         ::testing::Combine(::testing::ValuesIn(eight_bit_qtypes()),
                                            ::testing::ValuesIn(kDtypes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

TEST(QuantizeActivation, keeps_not_a_number_by_staying_float) {
  at::Tensor x = normal({3, 4});
  x[1][2] = std::nan("");
  for (const QType& qtype : eight_bit_qtypes()) {
    const at::Tensor y = quantize_activation(x, qtype, scalar(0.1));
    EXPECT_TRUE(at::equal(value_of(y).isnan(), x.isnan()));
    EXPECT_TRUE(at::relu(y)[1][2].isnan().item<bool>());
    EXPECT_TRUE(at::linear(y, quantize_weight(normal({2, 4})))[1].isnan().all().item<bool>());
  }
  const double inf = std::numeric_limits<double>::infinity();
  const at::Tensor both = at::tensor({inf, -inf, 1.0});
  EXPECT_THAT(numbers(parts(quantize_activation(both, qint8, scalar(1.0))).data),
              ElementsAre(127, -127, 1));
}

TEST(QuantizeActivation, checks_its_arguments) {
  const at::Tensor x = normal({3, 4});
  const auto error = [&](const at::Tensor& x, const QType& qtype, const at::Tensor& scale) {
    return value_error_of([&] { quantize_activation(x, qtype, scale); });
  };
  EXPECT_THAT(error(x, qint4, scalar(1.0)), HasSubstr("qint4"));
  EXPECT_THAT(error(x, qint8, at::ones({3})), HasSubstr("scale"));
  for (const double bad : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_THAT(error(x, qint8, scalar(bad)), HasSubstr("scale")) << bad;
  }
  EXPECT_THAT(error(at::ones({2}, at::kInt), qint8, scalar(1.0)), HasSubstr("Int"));
  EXPECT_THAT(error(quantize_activation(x, qint8, scalar(1.0)), qint8, scalar(1.0)),
              HasSubstr("float tensor"));
  EXPECT_TRUE(has_codes(quantize_activation(x, qint8, at::ones({1, 1}))));
  EXPECT_TRUE(has_codes(quantize_activation(at::zeros({0, 4}), qint8, scalar(1.0))));
  EXPECT_TRUE(has_codes(quantize_activation(at::scalar_tensor(2.0), qint8, scalar(1.0))));
}

TEST(Activation, has_no_fractional_scale_beyond_float) {
  // A double scale that fp32 cannot hold would be zero.
  EXPECT_THAT(value_error_of([] {
                quantize_activation(normal({2}), qint8, at::scalar_tensor(1e-60, at::kDouble));
              }),
              HasSubstr("scale"));
}

}  // namespace
}  // namespace quantal
