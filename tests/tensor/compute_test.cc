// Operations that compute with quantized weights: which kernel ran, and what it computed.
#include "tensor/convolutions.h"
#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

enum class State { kFrozen, kLive };

at::Tensor make(const at::Tensor& weight, const QType& qtype, State state) {
  return state == State::kLive ? live_weight(weight, {.qtype = qtype})
                               : quantize_weight(weight, {.qtype = qtype});
}

at::Tensor f64(const at::Tensor& t) { return value_of(t).to(at::kDouble); }

class Compute : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType, State>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  State state() const { return std::get<2>(GetParam()); }
  at::Tensor weight(at::IntArrayRef sizes) const {
    return make(normal(sizes, dtype(), 7), qtype(), state());
  }

  // `run(x, w, b)` with the quantized weight: no fallback, and within the bound of a sum of `terms`
  // products of what the same call computes in float64 on the dequantized weight. `parts`: how many
  // rounded sums torch adds up.
  template <typename Run>
  void expect_sum(const Run& run, const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias,
                  std::int64_t terms, int parts = 1) {
    at::Tensor y;
    {
      NoFallback guard;
      y = run(x, w, bias);
    }
    ASSERT_EQ(y.scalar_type(), dtype());
    EXPECT_FALSE(is_quantized(y));
    const at::Tensor none = at::Tensor();
    const at::Tensor b = bias.defined() ? f64(bias) : none;
    const at::Tensor exact = run(f64(x), f64(w), b);
    const at::Tensor magnitude = run(f64(x).abs(), f64(w).abs(), b.defined() ? b.abs() : none);
    // A bias that is added afterwards is a second rounding.
    at::Tensor bound = sum_bound(exact, magnitude, terms + 1, dtype());
    const int roundings = parts - (bias.defined() ? 0 : 1);
    bound += magnitude * unit_roundoff(dtype()) * roundings;
    EXPECT_TRUE(is_within(y, exact, bound));
  }

  template <typename Run>
  void expect_convolution(const Run& run, const at::Tensor& x, const at::Tensor& w,
                          const at::Tensor& bias) {
    at::Tensor y;
    {
      NoFallback guard;
      y = run(x, w, bias);
    }
    EXPECT_FALSE(is_quantized(y));
    EXPECT_TRUE(is_convolution(y, run, x, w, bias));
  }

  // The same for a linear over x and all rows of w.
  template <typename Run>
  void expect_linear(const Run& run, const at::Tensor& x, const at::Tensor& w,
                     const at::Tensor& bias = {}) {
    at::Tensor y;
    {
      NoFallback guard;
      y = run(x, w, bias);
    }
    EXPECT_FALSE(is_quantized(y));
    EXPECT_TRUE(is_linear(y, x, w, bias));
  }
};

at::Tensor nn_linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias) {
  // torch::nn::functional::linear, word for word.
  if (x.dim() == 2 && bias.defined()) return at::addmm(bias, x, w.t());
  at::Tensor output = x.matmul(w.t());
  if (bias.defined()) output += bias;
  return output;
}

TEST_P(Compute, linear) {
  for (const std::int64_t in : kSizes) {
    for (const std::int64_t out : {1, 17}) {
      SCOPED_TRACE(::testing::Message() << out << " x " << in);
      const at::Tensor w = weight({out, in});
      const at::Tensor x = normal({5, in}, dtype());
      const at::Tensor bias = normal({out}, dtype(), 3);
      expect_linear([](const auto& x, const auto& w, const auto& b) { return at::linear(x, w, b); },
                    x, w, bias);
      expect_linear(nn_linear, x, w, bias);
      expect_linear(nn_linear, x, w);
      expect_linear([](const auto& x, const auto& w, const auto&) { return at::mm(x, w.t()); }, x,
                    w);
    }
  }
}

TEST_P(Compute, linear_of_any_number_of_dimensions) {
  const at::Tensor w = weight({6, 33});
  const at::Tensor bias = normal({6}, dtype(), 3);
  for (const Sizes& sizes : {Sizes{33},
                             {1, 33},
                             {2, 33},
                             {15, 33},
                             {65, 33},
                             {2, 3, 33},
                             {2, 3, 4, 33},
                             {0, 33},
                             {0, 2, 33},
                             {2, 0, 33}}) {
    SCOPED_TRACE(::testing::Message() << sizes);
    const at::Tensor x = normal(sizes, dtype());
    expect_linear([](const auto& x, const auto& w, const auto& b) { return at::linear(x, w, b); },
                  x, w, bias);
    expect_linear(nn_linear, x, w, bias);
    expect_linear(nn_linear, x, w);
  }
}

TEST_P(Compute, linear_of_inputs_that_lie_strangely) {
  const at::Tensor w = weight({6, 33});
  const at::Tensor wide = normal({8, 68}, dtype());
  const auto run = [](const auto& x, const auto& w, const auto& b) { return at::linear(x, w, b); };
  const at::Tensor bias = normal({12}, dtype(), 3).slice(0, 0, 12, 2);
  expect_linear(run, wide.slice(1, 2, 68, 2), w, bias);
  expect_linear(run, wide.slice(1, 1, 34).slice(0, 1, 8, 3), w, bias);
  expect_linear(run, normal({33, 5}, dtype()).t(), w, bias);
  expect_linear(run, normal({33}, dtype()).expand({4, 33}), w, bias);
  expect_linear(nn_linear, normal({2, 33, 5}, dtype()).transpose(1, 2), w, bias);
}

// Whole tiles of rows have a kernel of their own.
TEST_P(Compute, rows_of_a_weight) {
  const at::Tensor w = weight({41, 17});
  const at::Tensor x = normal({4, 17}, dtype());
  const at::Tensor views[] = {w.slice(0, 3, 7),           w.slice(0, 16, 20), w.slice(0, 32),
                              w.narrow(0, 40, 1),         w.chunk(3)[2],      w.slice(0, 0, 16),
                              w.slice(0, 16).slice(0, 16)};
  for (const at::Tensor& view : views) {
    expect_linear([](const auto& x, const auto& w, const auto&) { return at::linear(x, w); }, x,
                  view);
    expect_linear([](const auto& x, const auto& w, const auto&) { return nn_linear(x, w, {}); }, x,
                  view);
  }
}

TEST_P(Compute, transposes_by_any_name) {
  const at::Tensor x = normal({4, 17}, dtype());
  for (const std::int64_t out : {1, 5}) {
    for (const std::int64_t in : {1, 17}) {
      const at::Tensor w = weight({out, in});
      const at::Tensor input = x.slice(1, 0, in);
      expect_linear(
          [](const auto& x, const auto& w, const auto&) { return x.matmul(w.transpose(0, 1)); },
          input, w);
      expect_linear([](const auto& x, const auto& w, const auto&) { return x.matmul(w.mT()); },
                    input, w);
      expect_linear(
          [](const auto& x, const auto& w, const auto&) { return x.matmul(w.permute({1, 0})); },
          input, w);
      expect_linear(
          [](const auto& x, const auto& w, const auto&) { return at::linear(x, w.t().t()); }, input,
          w);
    }
  }
}

TEST_P(Compute, products_with_a_weight_on_either_side) {
  const at::Tensor w = weight({7, 9});
  const at::Tensor none;
  expect_sum([](const auto& x, const auto& w, const auto&) { return at::mm(w, x); },
             normal({9, 3}, dtype()), w, none, 9);
  expect_sum([](const auto& x, const auto& w, const auto&) { return at::mm(w.t(), x); },
             normal({7, 3}, dtype()), w, none, 7);
  expect_sum([](const auto& x, const auto& w, const auto&) { return at::mm(x, w); },
             normal({3, 7}, dtype()), w, none, 7);
  expect_sum([](const auto& x, const auto& w, const auto&) { return at::mv(w, x); },
             normal({9}, dtype()), w, none, 9);
  expect_sum([](const auto& x, const auto& w, const auto&) { return at::matmul(w, x); },
             normal({2, 9, 3}, dtype()), w, none, 9);
  expect_sum(
      [](const auto& x, const auto& w, const auto&) { return at::einsum("bi,oi->bo", {x, w}); },
      normal({3, 9}, dtype()), w, none, 9);
  expect_sum(
      [](const auto& x, const auto& w, const auto& b) { return at::addmm(b, x, w.t(), 1, 1); },
      normal({3, 9}, dtype()), w, normal({3, 7}, dtype()), 9);
}

TEST_P(Compute, addmm_with_factors) {
  const at::Tensor w = weight({7, 9});
  const at::Tensor x = normal({3, 9}, dtype());
  const at::Tensor bias = normal({7}, dtype(), 3);
  NoFallback guard;
  const at::Tensor y = at::addmm(bias, x, w.t(), 0.5, 2);
  const at::Tensor exact = at::addmm(f64(bias), f64(x), f64(w).t(), 0.5, 2);
  EXPECT_TRUE(is_within(y, exact, 60 * unit_roundoff(dtype())));
}

TEST_P(Compute, batched_products) {
  const at::Tensor w = weight({3, 5, 17});
  const at::Tensor none;
  expect_sum(
      [](const auto& x, const auto& w, const auto&) { return at::bmm(x, w.transpose(1, 2)); },
      normal({3, 4, 17}, dtype()), w, none, 17);
  expect_sum([](const auto& x, const auto& w, const auto&) { return at::bmm(w, x); },
             normal({3, 17, 4}, dtype()), w, none, 17);
}

TEST_P(Compute, convolutions) {
  const at::Tensor none;
  const at::Tensor bias = normal({6}, dtype(), 3);
  const auto conv1d = [](const auto& x, const auto& w, const auto& b) {
    return at::conv1d(x, w, b, 2, 1);
  };
  const auto conv2d = [](const auto& x, const auto& w, const auto& b) {
    return at::conv2d(x, w, b, 1, 1, 2);
  };
  const auto conv3d = [](const auto& x, const auto& w, const auto& b) {
    return at::conv3d(x, w, b);
  };
  expect_convolution(conv1d, normal({2, 4, 11}, dtype()), weight({6, 4, 3}), bias);
  expect_convolution(conv1d, normal({4, 11}, dtype()), weight({6, 4, 3}), none);
  expect_convolution(conv2d, normal({2, 4, 9, 8}, dtype()), weight({6, 4, 3, 3}), bias);
  expect_convolution(conv2d, normal({4, 9, 8}, dtype()), weight({6, 4, 3, 3}), none);
  expect_convolution(conv3d, normal({1, 2, 4, 5, 6}, dtype()), weight({6, 2, 3, 2, 1}), bias);
}

TEST_P(Compute, grouped_padded_and_transposed_convolutions) {
  const at::Tensor none;
  const at::Tensor bias = normal({6}, dtype(), 3);
  const at::Tensor x = normal({2, 6, 8, 8}, dtype());
  const auto grouped = [](const auto& x, const auto& w, const auto& b) {
    return at::conv2d(x, w, b, {1}, at::IntArrayRef({0}), {1}, 3);
  };
  const auto depthwise = [](const auto& x, const auto& w, const auto& b) {
    return at::conv2d(x, w, b, 1, 1, 1, 6);
  };
  const auto same_size = [](const auto& x, const auto& w, const auto& b) {
    return at::conv2d(x, w, b, 1, "same");
  };
  const auto reflected = [](const auto& x, const auto& w, const auto& b) {
    return at::conv2d(at::reflection_pad2d(x, {1, 1, 1, 1}), w, b);
  };
  const auto transposed = [](const auto& x, const auto& w, const auto& b) {
    return at::conv_transpose2d(x, w, b, 2, 1, 1, 2);
  };
  expect_convolution(grouped, x, weight({6, 2, 3, 3}), bias);
  expect_convolution(depthwise, x, weight({6, 1, 3, 3}), bias);
  expect_convolution(same_size, x, weight({6, 6, 3, 3}), bias);
  expect_convolution(same_size, x, weight({6, 6, 2, 4}), bias);
  expect_convolution(reflected, x, weight({6, 6, 3, 3}), bias);
  // Transposed convolutions add up one rounded product for every place of the kernel that meets.
  expect_sum(transposed, x, weight({6, 3, 3, 3}), bias, 27, 4);
  const auto transposed1d = [](const auto& x, const auto& w, const auto& b) {
    return at::conv_transpose1d(x, w, b);
  };
  const auto transposed3d = [](const auto& x, const auto& w, const auto& b) {
    return at::conv_transpose3d(x, w, b);
  };
  expect_sum(transposed1d, normal({2, 4, 7}, dtype()), weight({4, 6, 3}), bias, 12, 3);
  expect_sum(transposed3d, normal({1, 2, 3, 4, 3}, dtype()), weight({2, 6, 2, 2, 2}), bias, 16, 8);
  const auto last = at::MemoryFormat::ChannelsLast;
  expect_convolution(same_size, x.contiguous(last), weight({6, 6, 3, 3}), none);
}

TEST_P(Compute, embeddings) {
  for (const std::int64_t width : {1, 7, 160}) {
    const at::Tensor w = weight({11, width});
    const at::Tensor indices = at::tensor({0, 10, 3, 3, 7, 1}, at::kLong).reshape({2, 3});
    for (const at::ScalarType type : {at::kLong, at::kInt}) {
      at::Tensor rows;
      {
        NoFallback guard;
        rows = at::embedding(w, indices.to(type), 3);
      }
      EXPECT_TRUE(same(rows, at::embedding(value_of(w), indices)));
    }
    const at::Tensor part = w.slice(0, 2, 9);
    EXPECT_TRUE(same(at::embedding(part, indices.remainder(7)),
                     at::embedding(value_of(w).slice(0, 2, 9), indices.remainder(7))));
    NoFallback guard;
    const auto bags = at::embedding_bag(w, indices.flatten(), at::tensor({0, 2}, at::kLong));
    const auto wanted =
        at::embedding_bag(value_of(w), indices.flatten(), at::tensor({0, 2}, at::kLong));
    EXPECT_TRUE(same(std::get<0>(bags), std::get<0>(wanted)));
  }
}

TEST_P(Compute, other_layers) {
  NoFallback guard;
  const at::Tensor x = normal({4, 5}, dtype());
  const at::Tensor w = weight({3, 5, 5});
  EXPECT_TRUE(same(at::bilinear(x, x, w), at::bilinear(x, x, value_of(w))));
  const at::Tensor norm = weight({4, 5});
  EXPECT_TRUE(same(at::layer_norm(x, {4, 5}, norm), at::layer_norm(x, {4, 5}, value_of(norm))));
  const at::Tensor input = weight({12, 5});
  const at::Tensor hidden = weight({12, 3});
  const std::vector<at::Tensor> state = {at::zeros({4, 3}, dtype()), at::zeros({4, 3}, dtype())};
  EXPECT_TRUE(same(std::get<0>(at::lstm_cell(x, state, input, hidden)),
                   std::get<0>(at::lstm_cell(x, state, value_of(input), value_of(hidden)))));
}

INSTANTIATE_TEST_SUITE_P(All, Compute,
                         ::testing::Combine(::testing::ValuesIn(all_qtypes()),
                                            ::testing::ValuesIn(kDtypes),
                                            ::testing::Values(State::kFrozen, State::kLive)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param)) +
                                  (std::get<2>(info.param) == State::kLive ? "_live" : "_frozen");
                         });

TEST(Embedding, refuses_bad_indices_as_torch_does) {
  for (const QType& qtype : {qint4, qint8}) {
    const at::Tensor w = quantize_weight(normal({4, 160}), {.qtype = qtype});
    for (const std::int64_t index : {-1, 4, 100}) {
      EXPECT_THAT(error_of([&] { at::embedding(w, at::tensor({index}, at::kLong)); }),
                  HasSubstr("out of range"))
          << index;
    }
    EXPECT_THAT(error_of([&] { at::embedding(w, at::tensor({1.5F})); }), HasSubstr("Float"));
  }
}

TEST(Linear, refuses_inputs_that_do_not_fit) {
  const at::Tensor w = quantize_weight(normal({4, 6}));
  EXPECT_THAT(error_of([&] { at::linear(normal({2, 5}), w); }),
              AllOf(HasSubstr("[4, 6]"), HasSubstr("[2, 5]")));
  EXPECT_THAT(error_of([&] { at::addmm(normal({4}), normal({2, 5}), w.t()); }),
              HasSubstr("[2, 5]"));
  EXPECT_THAT(error_of([&] { at::linear(normal({2, 6}), w, normal({3})); }), HasSubstr("3"));
  EXPECT_THAT(error_of([&] { at::addmm(normal({2, 3}), normal({2, 6}), w.t()); }), HasSubstr("3"));
  EXPECT_TRUE(
      is_linear(at::linear(normal({2, 6}), w, at::ones({1})), normal({2, 6}), w, at::ones({4})));
  EXPECT_THAT(error_of([&] { at::linear(at::scalar_tensor(1.0), w); }), HasSubstr("[]"));
  EXPECT_THAT(error_of([&] { at::linear(at::ones({2, 6}, at::kLong), w); }), HasSubstr("Long"));
  EXPECT_THAT(error_of([&] { at::matmul(at::ones({2, 6}, at::kInt), w.t()); }), HasSubstr("Int"));
}

// The input's dtype is the output's; the weight's and the bias's follow it.
TEST(Linear, takes_every_mix_of_dtypes) {
  for (const at::ScalarType of_x : kDtypes) {
    for (const at::ScalarType of_w : kDtypes) {
      SCOPED_TRACE(::testing::Message() << of_x << " x " << of_w);
      const at::Tensor x = normal({3, 16}, of_x);
      const at::Tensor w = quantize_weight(normal({5, 16}, of_w));
      const at::Tensor bias = normal({5}, of_w);
      const at::Tensor read = of_w == at::kDouble ? w.to(of_x) : w;
      EXPECT_TRUE(is_linear(at::linear(x, w, bias), x, read, bias.to(of_x)));
      EXPECT_TRUE(is_linear(at::addmm(bias, x, w.t()), x, read, bias.to(of_x)));
      const at::Tensor kernel = quantize_weight(normal({4, 2, 3}, of_w));
      const at::Tensor image = normal({1, 2, 9}, of_x);
      const auto conv = [](const auto& x, const auto& w, const auto& b) {
        return at::conv1d(x, w, b);
      };
      const at::Tensor added = normal({4}, of_x);
      const at::Tensor seen = of_w == at::kDouble ? kernel.to(of_x) : kernel;
      EXPECT_TRUE(is_convolution(conv(image, kernel, added), conv, image, seen, added));
    }
  }
}

TEST(Linear, is_finite_where_the_true_result_is) {
  const at::Tensor x = at::full({1, 64}, 300.0, at::kHalf);
  at::Tensor weight = at::full({2, 64}, 300.0, at::kHalf);
  weight[0].slice(0, 0, 32).neg_();
  weight[1].slice(0, 0, 31).neg_();
  const at::Tensor w = quantize_weight(weight);
  const at::Tensor y = at::linear(x, w);
  EXPECT_EQ(y[0][0].item<double>(), 0.0);
  EXPECT_TRUE(std::isinf(y[0][1].item<double>()));  // 180000
}

TEST(Linear, passes_on_a_bias_that_is_nan) {
  at::Tensor bias = at::zeros({4});
  bias[2] = std::nan("");
  const at::Tensor y = at::linear(normal({2, 6}), quantize_weight(normal({4, 6})), bias);
  EXPECT_TRUE(at::equal(y.isnan(), bias.isnan().expand({2, 4})));
}

TEST(Linear, gives_the_same_result_twice) {
  const at::Tensor w = quantize_weight(normal({64, 256}), {.qtype = qint4});
  const at::Tensor x = normal({17, 256});
  EXPECT_TRUE(same(at::linear(x, w), at::linear(x, w)));
}

TEST(LiveWeights, compute_what_the_frozen_ones_do) {
  for (const QType& qtype : all_qtypes()) {
    for (const at::ScalarType dtype : kDtypes) {
      const at::Tensor x = normal({5, 33}, dtype);
      const at::Tensor image = normal({2, 4, 6, 6}, dtype);
      const at::Tensor indices = at::tensor({0, 6, 2}, at::kLong);
      const at::Tensor matrix = live_weight(normal({7, 33}, dtype), {.qtype = qtype});
      const at::Tensor kernel = live_weight(normal({3, 4, 3, 3}, dtype), {.qtype = qtype});
      const auto run = [&] {
        return std::vector<at::Tensor>{at::linear(x, matrix),
                                       at::addmm(at::zeros({7}, dtype), x, matrix.t()),
                                       at::matmul(x.unsqueeze(0), matrix.t()),
                                       at::conv2d(image, kernel),
                                       at::embedding(matrix, indices),
                                       value_of(matrix)};
      };
      const auto live = run();
      freeze(matrix);
      freeze(kernel);
      const auto frozen = run();
      for (size_t i = 0; i < live.size(); ++i) EXPECT_TRUE(same(live[i], frozen[i])) << i;
    }
  }
}

}  // namespace
}  // namespace quantal
