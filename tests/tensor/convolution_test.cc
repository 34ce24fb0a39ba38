// Convolutions of int8 activations, and of few positions: what they compute, in which order in
// memory, and their gradients.
#include <ATen/core/dispatch/Dispatcher.h>

#include "tensor/convolutions.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

struct ConvCase {
  Sizes x, w;
  std::vector<std::int64_t> stride, padding, dilation;
  std::int64_t groups = 1;

  at::Tensor operator()(const at::Tensor& input, const at::Tensor& weight,
                        const at::Tensor& bias) const {
    const auto added = bias.defined() ? std::optional(bias) : std::nullopt;
    return at::convolution(input, weight, added, stride, padding, dilation, false, {0}, groups);
  }
};

const std::vector<ConvCase>& cases() {
  static const std::vector<ConvCase> all = {
      {{2, 3, 17}, {5, 3, 4}, {2}, {3}, {2}},
      {{1, 7, 33}, {16, 7, 1}, {1}, {0}, {1}},
      {{2, 3, 9, 8}, {17, 3, 3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {{1, 5, 31, 15}, {7, 5, 5, 2}, {2, 3}, {2, 0}, {1, 2}},
      {{3, 40, 5, 3}, {33, 40, 1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {{1, 20, 15, 16}, {9, 20, 3, 3}, {1, 1}, {1, 1}, {1, 1}},  // rows of 180: one group
      {{1, 32, 7, 7}, {5, 32, 3, 3}, {1, 1}, {1, 1}, {1, 1}},    // rows of 288: groups of 96
      {{1, 64, 7, 7}, {64, 64, 3, 3}, {2, 2}, {1, 1}, {1, 1}},
      {{2, 512, 2, 1}, {65, 512, 1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {{1, 128, 9}, {65, 128, 5}, {1}, {2}, {1}},
      {{2, 6, 7, 7}, {6, 3, 3, 3}, {1, 1}, {1, 1}, {1, 1}, 2},
      {{1, 8, 5, 5}, {32, 4, 3, 3}, {1, 1}, {0, 0}, {1, 1}, 2},
      {{1, 64, 5, 7}, {96, 32, 3, 3}, {1, 1}, {1, 1}, {1, 1}, 2},
      {{2, 18, 9, 7}, {18, 1, 3, 3}, {2, 1}, {1, 1}, {1, 1}, 18},
      {{1, 3, 6, 6}, {6, 1, 3, 3}, {1, 1}, {1, 1}, {2, 1}, 3},
      {{2, 3, 5, 6, 7}, {4, 3, 3, 2, 1}, {1, 2, 1}, {1, 0, 0}, {1, 1, 2}},
      {{1, 17, 3, 4, 5}, {17, 1, 2, 2, 2}, {1, 1, 1}, {0, 1, 0}, {1, 1, 1}, 17},
  };
  return all;
}

at::MemoryFormat channels_last(const at::Tensor& x) {
  return x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

at::Tensor dynamic(const ConvCase& c, const at::Tensor& x, const at::Tensor& w,
                   const at::Tensor& bias = {}) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("quantal::conv_dynamic", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, std::int64_t)>();
  return op.call(x, w, bias.defined() ? std::optional(bias) : std::nullopt, c.stride, c.padding,
                 c.dilation, c.groups);
}

// What x becomes, in fp32, with one scale a sample.
at::Tensor by_sample(const at::Tensor& x) {
  std::vector<std::int64_t> rest;
  for (std::int64_t i = 1; i < x.dim(); ++i) rest.push_back(i);
  const at::Tensor values = x.to(at::kFloat);
  const at::Tensor scale = values.abs().amax(rest, true) / 127;
  return (values / scale).round() * scale;
}

class Convolutions : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  at::Tensor weight(const Sizes& sizes) const {
    return quantize_weight(normal(sizes, dtype(), 7), {.qtype = qtype()});
  }
  at::Tensor quantize(const at::Tensor& x) const {
    return quantize_activation(x, qint8, scalar(0.02));
  }
};

INSTANTIATE_TEST_SUITE_P(All, Convolutions,
                         ::testing::Combine(::testing::Values(qint2, qint4, qint8, qfloat8_e4m3fn),
                                            ::testing::ValuesIn(kDtypes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

TEST_P(Convolutions, of_codes_of_one_scale) {
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor w = weight(c.w), bias = normal({c.w[0]}, dtype(), 3);
    const at::Tensor x = quantize(normal(c.x, dtype()));
    const at::Tensor live = live_weight(normal(c.w, dtype(), 7), {.qtype = qtype()});
    NoFallback guard;
    const at::Tensor y = c(x, w, bias);
    EXPECT_TRUE(is_convolution(y, c, x, w, bias));
    EXPECT_TRUE(y.is_contiguous());
    EXPECT_TRUE(same(c(x, live, bias), y));
    EXPECT_TRUE(is_convolution(c(x, w, {}), c, x, w));
  }
}

TEST_P(Convolutions, of_codes_of_one_scale_a_sample) {
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor w = weight(c.w), bias = normal({c.w[0]}, dtype(), 3);
    at::Tensor x = normal(c.x, dtype());
    x[0].mul_(0.125);
    const at::Tensor y = dynamic(c, x, w, bias);
    EXPECT_EQ(y.scalar_type(), dtype());
    // Scales of double are other numbers, and float8 weights have no exact kernel.
    if (dtype() == at::kDouble || qtype().is_floating_point) continue;
    const at::Tensor exact =
        c(by_sample(x).to(at::kDouble), value_of(w.to(at::kDouble)), bias.to(at::kDouble));
    const at::Tensor size = c(x.to(at::kDouble).abs(), value_of(w.to(at::kDouble)).abs() + 8,
                              bias.to(at::kDouble).abs());
    EXPECT_TRUE(is_within(y, exact, size * 0x1p-20 + exact.abs() * unit_roundoff(dtype())));
  }
}

TEST_P(Convolutions, keep_the_memory_format_of_their_input) {
  for (const ConvCase& c : cases()) {
    if (c.x.size() < 4) continue;
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor w = weight(c.w), bias = normal({c.w[0]}, dtype(), 3);
    const at::Tensor x = normal(c.x, dtype());
    const at::Tensor last = x.contiguous(channels_last(x));
    const at::Tensor y = c(quantize(last), w, bias);
    // ATen's three-dimensional convolution does not keep it.
    const bool is_exact = dtype() != at::kDouble && !qtype().is_floating_point;
    if (is_exact || x.dim() == 4) {
      EXPECT_TRUE(y.is_contiguous(channels_last(y)));
      EXPECT_TRUE(dynamic(c, last, w).is_contiguous(channels_last(y)));
    }
    if (x.dim() == 4) {
      EXPECT_TRUE(c(last, w, bias).is_contiguous(channels_last(y)));
    }
    if (!is_exact) continue;
    EXPECT_TRUE(same(y, c(quantize(x), w, bias)));
    EXPECT_TRUE(same(dynamic(c, last, w, bias), dynamic(c, x, w, bias)));
  }
}

TEST_P(Convolutions, of_inputs_that_lie_apart) {
  if (dtype() == at::kDouble || qtype().is_floating_point) return;
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor w = weight(c.w), x = normal(c.x, dtype());
    const at::Tensor apart = at::stack({x, x}, -1).select(-1, 1);
    ASSERT_FALSE(apart.is_contiguous());
    EXPECT_TRUE(same(dynamic(c, apart, w), dynamic(c, x, w)));
    const at::Tensor turned = quantize(x.transpose(1, -1).contiguous()).transpose(1, -1);
    EXPECT_TRUE(same(c(turned, w, {}), c(quantize(x), w, {})));
  }
}

TEST_P(Convolutions, of_floats_at_few_positions_are_those_of_many) {
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor w = weight(c.w), bias = normal({c.w[0]}, dtype(), 3);
    std::vector<std::int64_t> repeats(c.x.size(), 1);
    repeats[0] = 150;
    const at::Tensor few = normal(c.x, dtype()), many = few.repeat(repeats);
    const at::Tensor live = live_weight(normal(c.w, dtype(), 7), {.qtype = qtype()});
    EXPECT_TRUE(is_convolution(c(few, w, bias), c, few, w, bias));
    EXPECT_TRUE(is_convolution(c(many, w, bias), c, many, w, bias));
    EXPECT_TRUE(same(c(few, live, bias), c(few, w, bias)));
  }
}

TEST_P(Convolutions, pass_gradients_straight_through) {
  const double u = unit_roundoff(dtype());
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor x = leaf(normal(c.x, dtype())), latent = leaf(normal(c.w, dtype(), 7));
    const at::Tensor w = live_weight(latent, {.qtype = qtype()});
    const at::Tensor bias = leaf(normal({c.w[0]}, dtype(), 3));
    const at::Tensor plain_x = leaf(value_of(quantize(x))), plain_w = leaf(value_of(w));
    const at::Tensor plain_bias = leaf(bias.detach());
    const at::Tensor y = c(quantize(x), w, bias), wanted = c(plain_x, plain_w, plain_bias);
    const at::Tensor grad = normal(y.sizes(), dtype(), 11);
    y.backward(grad);
    wanted.backward(grad);
    const auto close = [&](const at::Tensor& got, const at::Tensor& exact) {
      return is_within(got, exact, 4 * u * exact.abs().max().item<double>());
    };
    EXPECT_TRUE(close(x.grad(), plain_x.grad()));
    EXPECT_TRUE(close(w.grad(), plain_w.grad()));
    EXPECT_TRUE(close(bias.grad(), plain_bias.grad()));
  }
}

// One scale, sums below 2^24, no bias: nothing is left to round but two products.
TEST(IntegerConvolution, is_exact) {
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor w = quantize_weight(normal(c.w, at::kFloat, 7));
    const at::Tensor x = quantize_activation(normal(c.x), qint8, scalar(0.02));
    const at::Tensor sums =
        c(parts(x).data.to(at::kDouble), parts(w).data.to(at::kDouble), at::Tensor());
    ASSERT_LT(sums.abs().max().item<double>(), 0x1p24);
    std::vector<std::int64_t> rows(c.w.size(), 1);
    rows[1] = c.w[0];
    const at::Tensor scale = parts(w).scale.to(at::kDouble).reshape(rows);
    const at::Tensor scaled = (sums * scale).to(at::kFloat).to(at::kDouble);
    const at::Tensor exact = (scaled * parts(x).scale.to(at::kDouble)).to(at::kFloat);
    EXPECT_TRUE(same(c(x, w, {}), exact));
  }
}

TEST(IntegerConvolution, of_parts_of_a_weight) {
  const ConvCase c{{2, 3, 9, 8}, {48, 3, 3, 3}, {1, 1}, {1, 1}, {1, 1}};
  const at::Tensor w = quantize_weight(normal(c.w, at::kFloat, 7));
  const at::Tensor x = quantize_activation(normal(c.x), qint8, scalar(0.02));
  const at::Tensor y = c(x, w, {});
  EXPECT_TRUE(same(c(x, w.slice(0, 16, 40), {}), y.slice(1, 16, 40)));
  EXPECT_TRUE(is_convolution(c(x, w.slice(0, 5, 40), {}), c, x, w.slice(0, 5, 40)));
}

TEST(IntegerConvolution, of_nothing_and_of_one_sample_without_a_batch) {
  const at::Tensor w = quantize_weight(normal({4, 3, 3, 3}, at::kFloat, 7));
  const at::Tensor x = quantize_activation(normal({1, 3, 6, 5}), qint8, scalar(0.02));
  EXPECT_TRUE(same(at::conv2d(x.squeeze(0), w), at::conv2d(x, w).squeeze(0)));
  const at::Tensor none = quantize_activation(at::zeros({0, 3, 6, 5}), qint8, scalar(0.02));
  EXPECT_EQ(at::conv2d(none, w).sizes(), at::IntArrayRef({0, 4, 4, 3}));
  EXPECT_THAT(error_of([&] { at::conv2d(x.slice(2, 0, 2), w); }), HasSubstr("Kernel size"));
  EXPECT_THAT(error_of([&] { at::conv2d(x.slice(1, 0, 2), w); }), HasSubstr("channels"));
}

TEST(DynamicConvolution, has_nan_where_a_sample_has) {
  const ConvCase c{{3, 3, 9, 8}, {4, 3, 3, 3}, {1, 1}, {1, 1}, {1, 1}};
  const at::Tensor w = quantize_weight(normal(c.w, at::kFloat, 7));
  at::Tensor x = normal(c.x);
  x[0][1][2][3] = std::nan("");
  x[2][0][0][0] = std::numeric_limits<double>::infinity();
  const at::Tensor y = dynamic(c, x, w);
  EXPECT_TRUE(y[0].isnan().all().item<bool>());
  EXPECT_TRUE(y[2].isnan().all().item<bool>());
  EXPECT_TRUE(same(y.slice(0, 1, 2), dynamic(c, x.slice(0, 1, 2), w)));
}

// Larger than what is dequantized at a time, at more positions than are multiplied as patches.
TEST(WeightOnlyConvolution, of_large_weights) {
  const ConvCase c{{1, 512, 12, 11}, {515, 512, 3, 3}, {1, 1}, {1, 1}, {1, 1}};
  const at::Tensor w = quantize_weight(normal(c.w, at::kFloat, 7));
  const at::Tensor x = normal(c.x), bias = normal({c.w[0]}, at::kFloat, 3);
  EXPECT_TRUE(is_convolution(c(x, w, bias), c, x, w, bias));
  const at::Tensor last = c(x.contiguous(at::MemoryFormat::ChannelsLast), w, bias);
  EXPECT_TRUE(last.is_contiguous(at::MemoryFormat::ChannelsLast));
  EXPECT_TRUE(is_convolution(last, c, x, w, bias));
  EXPECT_TRUE(same(at::conv2d(x.squeeze(0), w, bias), at::conv2d(x, w, bias).squeeze(0)));
}

// Where kernels take fp32 copies of the input, they take some samples after the others.
TEST(WeightOnlyConvolution, of_more_samples_than_are_copied_at_once) {
  const at::Tensor x = normal({3, 16, 640, 640}, at::kHalf), bias = normal({512}, at::kHalf);
  const at::Tensor w = quantize_weight(normal({512, 16, 1, 1}, at::kHalf, 7));
  const auto run = [&](const at::Tensor& samples) { return at::conv2d(samples, w, bias, {8, 8}); };
  const at::Tensor y = run(x);
  for (std::int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(at::allclose(y.narrow(0, i, 1), run(x.narrow(0, i, 1)), 2e-3, 1e-2)) << i;
  }
}

TEST(WeightOnlyConvolution, names_what_does_not_fit) {
  const at::Tensor w = quantize_weight(normal({64, 32, 3, 3}, at::kFloat, 7));
  const at::Tensor x = normal({1, 32, 20, 20});
  for (const std::int64_t count : {1, 63, 65, 128}) {
    EXPECT_THAT(error_of([&] { at::conv2d(x, w, normal({count})); }), HasSubstr("bias"));
  }
  EXPECT_THAT(error_of([&] { at::conv2d(x.slice(1, 0, 31), w); }), HasSubstr("[64, 32, 3, 3]"));
}

TEST(DynamicConvolution, names_what_does_not_fit) {
  const ConvCase c{{3, 3, 9, 8}, {4, 3, 3, 3}, {1, 1}, {1, 1}, {1, 1}};
  const at::Tensor w = quantize_weight(normal(c.w));
  EXPECT_THAT(value_error_of([&] { dynamic(c, normal({1, 2, 9, 8}), w); }), HasSubstr("1, 2, 9"));
  EXPECT_THAT(value_error_of([&] { dynamic(c, normal(c.x), normal(c.w)); }),
              HasSubstr("quantized"));
  EXPECT_THAT(value_error_of([&] { dynamic(c, at::ones(c.x, at::kLong), w); }), HasSubstr("Long"));
}

TEST(DynamicConvolution, has_the_gradients_of_rounded_activations) {
  for (const ConvCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << "x " << c.x << ", w " << c.w);
    const at::Tensor x = leaf(normal(c.x)), plain_x = leaf(by_sample(x.detach()));
    const at::Tensor w = live_weight(leaf(normal(c.w, at::kFloat, 7)));
    const at::Tensor plain_w = leaf(value_of(w));
    const at::Tensor y = dynamic(c, x, w);
    const at::Tensor grad = normal(y.sizes(), at::kFloat, 11);
    y.backward(grad);
    c(plain_x, plain_w, {}).backward(grad);
    EXPECT_TRUE(is_within(x.grad(), plain_x.grad(), 1e-5));
    EXPECT_TRUE(
        is_within(w.grad(), plain_w.grad(), 1e-6 * plain_w.grad().abs().max().item<double>()));
  }
}

}  // namespace
}  // namespace quantal
