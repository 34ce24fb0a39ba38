// Gradients: straight through every quantizing step, of the dequantized computation otherwise.
#include <torch/csrc/autograd/autograd.h>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

at::Tensor f64_leaf(const at::Tensor& t) { return leaf(value_of(t).to(at::kDouble)); }

class Gradients : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  at::Tensor live(at::IntArrayRef sizes) const {
    return live_weight(leaf(normal(sizes, dtype(), 7)), {.qtype = qtype()});
  }

  // Gradients of `run(x, w, b)` for a given gradient of its result, against the same call in
  // float64 on the quantized weight. `terms`: the longest sum in the backward pass.
  template <typename Run>
  void expect_gradients(const Run& run, const at::Tensor& input, const at::Tensor& w,
                        const at::Tensor& bias, std::int64_t terms) {
    const at::Tensor x = leaf(input);
    const at::Tensor b = bias.defined() ? leaf(bias) : bias;
    const at::Tensor x64 = f64_leaf(input);
    const at::Tensor w64 = f64_leaf(w);
    const at::Tensor b64 = bias.defined() ? f64_leaf(bias) : bias;
    w.mutable_grad() = at::Tensor();
    const at::Tensor y = run(x, w, b);
    const at::Tensor y64 = run(x64, w64, b64);
    const at::Tensor grad = normal(y.sizes(), dtype(), 11);
    y.backward(grad);
    y64.backward(grad.to(at::kDouble));
    const auto bound = [&](const at::Tensor& exact) {
      const double size = exact.numel() == 0 ? 0 : exact.abs().max().item<double>();
      return (static_cast<double>(terms) *
                  unit_roundoff(dtype() == at::kDouble ? at::kDouble : at::kFloat) * 8 +
              2 * unit_roundoff(dtype())) *
             (size + static_cast<double>(terms));
    };
    EXPECT_TRUE(is_within(x.grad(), x64.grad(), bound(x64.grad())));
    EXPECT_TRUE(is_within(w.grad(), w64.grad(), bound(w64.grad())));
    EXPECT_EQ(w.grad().scalar_type(), dtype());
    EXPECT_FALSE(is_quantized(w.grad()));
    if (b.defined()) {
      EXPECT_TRUE(is_within(b.grad(), b64.grad(), bound(b64.grad())));
    }
  }
};

TEST_P(Gradients, of_linear) {
  const at::Tensor none;
  const auto linear = [](const auto& x, const auto& w, const auto& b) {
    return at::linear(x, w, b);
  };
  const auto matmul = [](const auto& x, const auto& w, const auto&) { return x.matmul(w.t()); };
  const auto addmm = [](const auto& x, const auto& w, const auto& b) {
    return at::addmm(b, x, w.t());
  };
  for (const std::int64_t in : {1, 7, 33, 160}) {
    for (const std::int64_t out : {1, 5}) {
      const at::Tensor w = live({out, in});
      const at::Tensor bias = normal({out}, dtype(), 3);
      for (const Sizes& batch : {Sizes{}, {9}, {2, 3}, {2, 0}}) {
        SCOPED_TRACE(::testing::Message() << batch << " x " << out << " x " << in);
        Sizes sizes = batch;
        sizes.push_back(in);
        const at::Tensor x = normal(sizes, dtype());
        expect_gradients(linear, x, w, bias, 20);
        expect_gradients(matmul, x, w, none, 20);
        if (batch.size() == 1) expect_gradients(addmm, x, w, bias, 20);
      }
    }
  }
}

// The backward pass never has all of the weight as floats.
TEST_P(Gradients, of_a_large_weight) {
  const at::Tensor w = live({1100, 1024});
  const auto linear = [](const auto& x, const auto& w, const auto& b) {
    return at::linear(x, w, b);
  };
  expect_gradients(linear, normal({2, 1024}, dtype()), w, normal({1100}, dtype(), 3), 1100);
  const auto part = [](const auto& x, const auto& w, const auto&) {
    return at::linear(x, w.slice(0, 5, 1090));
  };
  expect_gradients(part, normal({2, 1024}, dtype()), w, {}, 1085);
}

TEST_P(Gradients, of_parts_of_a_weight) {
  const at::Tensor none;
  const at::Tensor w = live({6, 16});
  const at::Tensor x = normal({3, 16}, dtype());
  expect_gradients(
      [](const auto& x, const auto& w, const auto&) { return at::linear(x, w.slice(0, 1, 4)); }, x,
      w, none, 6);
  expect_gradients(
      [](const auto& x, const auto& w, const auto&) {
        return at::linear(x, w.chunk(3)[1]) * at::linear(x, w.chunk(3)[2]);
      },
      x, w, none, 100);
  expect_gradients([](const auto& x, const auto& w, const auto&) { return at::mm(w, x.t()); }, x, w,
                   none, 6);
}

TEST_P(Gradients, of_convolutions) {
  const at::Tensor none;
  const at::Tensor bias = normal({6}, dtype(), 3);
  expect_gradients(
      [](const auto& x, const auto& w, const auto& b) { return at::conv1d(x, w, b, 2, 1); },
      normal({2, 4, 9}, dtype()), live({6, 4, 3}), bias, 40);
  expect_gradients(
      [](const auto& x, const auto& w, const auto& b) { return at::conv2d(x, w, b, 1, 1, 1, 2); },
      normal({2, 4, 5, 5}, dtype()), live({6, 2, 3, 3}), bias, 60);
  expect_gradients(
      [](const auto& x, const auto& w, const auto&) { return at::conv_transpose2d(x, w, {}, 2); },
      normal({1, 4, 4, 4}, dtype()), live({4, 3, 2, 2}), none, 60);
  expect_gradients([](const auto& x, const auto& w, const auto& b) { return at::conv3d(x, w, b); },
                   normal({1, 2, 3, 4, 4}, dtype()), live({6, 2, 2, 2, 2}), bias, 60);
}

TEST_P(Gradients, of_embeddings) {
  const at::Tensor indices = at::tensor({4, 1, 1, 0, 4, 4}, at::kLong).reshape({2, 3});
  for (const std::int64_t width : {5, 160}) {
    for (const bool by_frequency : {false, true}) {
      for (const bool sparse : {false, true}) {
        if (sparse && by_frequency) continue;
        const at::Tensor w = live({6, width});
        const at::Tensor plain = leaf(value_of(w));
        const at::Tensor y = at::embedding(w, indices, 1, by_frequency, sparse);
        const at::Tensor wanted = at::embedding(plain, indices, 1, by_frequency, sparse);
        const at::Tensor grad = normal(y.sizes(), dtype(), 11);
        y.backward(grad);
        wanted.backward(grad);
        EXPECT_EQ(w.grad().is_sparse(), sparse);
        EXPECT_TRUE(same(w.grad().to_dense(), plain.grad().to_dense()));
      }
    }
  }
}

TEST_P(Gradients, of_other_layers) {
  const at::Tensor none;
  expect_gradients(
      [](const auto& x, const auto& w, const auto& b) { return at::layer_norm(x, {3, 4}, w, b); },
      normal({5, 3, 4}, dtype()), live({3, 4}), normal({3, 4}, dtype(), 3), 60);
  expect_gradients([](const auto& x, const auto& w, const auto&) { return at::bmm(x, w); },
                   normal({2, 3, 4}, dtype()), live({2, 4, 5}), none, 10);
  expect_gradients([](const auto& x, const auto& w, const auto&) { return at::bilinear(x, x, w); },
                   normal({5, 4}, dtype()), live({3, 4, 4}), none, 60);
  expect_gradients(
      [](const auto& x, const auto& w, const auto&) { return at::einsum("bi,oi->bo", {x, w}); },
      normal({5, 4}, dtype()), live({3, 4}), none, 10);
  // An operation that reads the latent has its gradient.
  const at::Tensor w = live({3, 4});
  w.pow(2).sum().backward();
  EXPECT_TRUE(same(w.grad(), latent(w) * 2));
}

TEST_P(Gradients, pass_straight_through_quantizing) {
  const at::Tensor weight = leaf(normal({4, 160}, dtype()));
  const at::Tensor grad = normal({4, 160}, dtype(), 5);
  value_of(quantize_weight(weight, {.qtype = qtype()})).backward(grad);
  EXPECT_TRUE(same(weight.grad(), grad));
  const at::Tensor w = live({4, 160});
  value_of(w).backward(grad);
  EXPECT_TRUE(same(w.grad(), grad));
  if (qtype().is_affine()) return;
  const at::Tensor x = leaf(normal({4, 160}, dtype()));
  value_of(quantize_activation(x, qtype(), scalar(1e-3))).backward(grad);  // most are clamped
  EXPECT_TRUE(same(x.grad(), grad));
}

TEST_P(Gradients, take_gradients_that_lie_strangely) {
  const at::Tensor none;
  const at::Tensor w = live({4, 6});
  const at::Tensor x = normal({3, 6}, dtype());
  const auto turned = [](const auto& x, const auto& w, const auto&) {
    return at::linear(x, w).t();
  };
  const auto reduced = [](const auto& x, const auto& w, const auto&) {
    return at::linear(x, w).sum(0);
  };
  const auto strided = [](const auto& x, const auto& w, const auto&) {
    return at::linear(x, w).slice(1, 0, 4, 2);
  };
  const auto middle = [](const auto& x, const auto& w, const auto&) {
    return x.unsqueeze(1).expand({3, 2, 6}).matmul(w.t()).transpose(0, 2);
  };
  expect_gradients(turned, x, w, none, 20);
  expect_gradients(reduced, x, w, none, 20);
  expect_gradients(strided, x, w, none, 20);
  expect_gradients(middle, x, w, none, 20);
}

INSTANTIATE_TEST_SUITE_P(All, Gradients,
                         ::testing::Combine(::testing::ValuesIn(all_qtypes()),
                                            ::testing::ValuesIn(kDtypes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

using Layer = std::function<at::Tensor(const at::Tensor& x, const at::Tensor& w)>;

std::vector<std::pair<Layer, std::pair<Sizes, Sizes>>> double_layers() {
  return {
      {[](const auto& x, const auto& w) { return at::linear(x, w).tanh(); }, {{3, 5}, {4, 5}}},
      {[](const auto& x, const auto& w) { return x.matmul(w.t()).tanh(); }, {{2, 3, 5}, {4, 5}}},
      {[](const auto& x, const auto& w) { return at::conv1d(x, w).tanh(); },
       {{2, 3, 7}, {2, 3, 3}}},
      {[](const auto& x, const auto& w) { return at::bmm(x, w).tanh(); }, {{2, 3, 4}, {2, 4, 3}}},
      {[](const auto& x, const auto& w) { return at::layer_norm(x, {2, 3}, w).tanh(); },
       {{4, 2, 3}, {2, 3}}},
  };
}

TEST(GradientsOfInputs, are_those_of_finite_differences) {
  for (const auto& [layer, sizes] : double_layers()) {
    const at::Tensor w = quantize_weight(normal(sizes.second, at::kDouble), {.qtype = qint4});
    const at::Tensor x = leaf(normal(sizes.first, at::kDouble));
    layer(x, w).sum().backward();
    at::NoGradGuard no_grad;
    const double h = 1e-6;
    for (std::int64_t i = 0; i < x.numel(); ++i) {
      at::Tensor step = at::zeros_like(x);
      step.view(-1)[i] = h;
      const double slope =
          (layer(x + step, w).sum() - layer(x - step, w).sum()).item<double>() / (2 * h);
      EXPECT_NEAR(x.grad().reshape({-1})[i].item<double>(), slope, 1e-7);
    }
  }
}

TEST(DoubleBackward, is_that_of_the_dequantized_computation) {
  for (const auto& [layer, sizes] : double_layers()) {
    const at::Tensor w = live_weight(leaf(normal(sizes.second, at::kDouble)), {.qtype = qint4});
    const at::Tensor x = leaf(normal(sizes.first, at::kDouble));
    const at::Tensor plain_w = leaf(value_of(w));
    const at::Tensor plain_x = leaf(x);
    for (const auto& [a, b] : {std::pair{x, w}, std::pair{plain_x, plain_w}}) {
      const at::Tensor y = layer(a, b);
      const auto grads = torch::autograd::grad({y.pow(2).sum()}, {a, b}, {}, std::nullopt, true);
      (grads[0].pow(2).sum() + grads[1].pow(2).sum()).backward();
    }
    EXPECT_TRUE(is_within(x.grad(), plain_x.grad(), 1e-12));
    EXPECT_TRUE(is_within(w.grad(), plain_w.grad(), 1e-12));
  }
}

TEST(Gradients, add_up_over_backward_passes) {
  const at::Tensor w = live_weight(leaf(normal({4, 6})));
  const at::Tensor x = normal({3, 6});
  const at::Tensor y = at::linear(x, w);
  y.sum().backward({}, /*retain_graph=*/true);
  const at::Tensor once = w.grad().clone();
  y.sum().backward();
  EXPECT_TRUE(same(w.grad(), once * 2));
  EXPECT_THAT(error_of([&] { y.sum().backward(); }), HasSubstr("second time"));
  at::linear(x, w).sum().backward();
  EXPECT_TRUE(same(w.grad(), once * 3));
}

TEST(Gradients, of_mixed_dtypes_have_each_leafs_own) {
  const at::Tensor w = live_weight(leaf(normal({4, 6}, at::kBFloat16)));
  const at::Tensor x = leaf(normal({3, 6}));
  const at::Tensor bias = leaf(normal({4}, at::kHalf));
  at::linear(x, w, bias).sum().backward();
  EXPECT_EQ(w.grad().scalar_type(), at::kBFloat16);
  EXPECT_EQ(x.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(bias.grad().scalar_type(), at::kHalf);
}

TEST(FrozenWeights, require_no_gradient_and_pass_the_inputs) {
  const at::Tensor live = live_weight(leaf(normal({4, 6})));
  at::linear(normal({3, 6}), live).sum().backward();
  EXPECT_TRUE(live.grad().defined());
  freeze(live);
  EXPECT_FALSE(live.requires_grad());
  EXPECT_FALSE(live.grad().defined());
  EXPECT_FALSE(quantize_weight(normal({4, 6})).requires_grad());
  const at::Tensor x = leaf(normal({3, 6}));
  at::linear(x, live).sum().backward();
  EXPECT_TRUE(is_within(x.grad(), value_of(live).sum(0).expand({3, 6}), 1e-5));
  EXPECT_FALSE(live.grad().defined());
}

TEST(Saved, tensors_that_were_written_since_are_an_error) {
  const at::Tensor w = live_weight(leaf(normal({4, 6})));
  const at::Tensor x = leaf(normal({3, 6}));
  for (const auto& write : std::vector<std::function<void()>>{
           [&] { w.mul_(2); }, [&] { w[1].zero_(); }, [&] { w.t()[1].zero_(); }}) {
    const at::Tensor y = at::linear(x, w);
    {
      at::NoGradGuard no_grad;
      write();
    }
    EXPECT_THAT(error_of([&] { y.sum().backward(); }), HasSubstr("modified by an inplace"));
  }
  const at::Tensor activation = quantize_activation(leaf(normal({3, 6})), qint8, scalar(0.03));
  const at::Tensor z = at::linear(activation, w);
  {
    at::NoGradGuard no_grad;
    activation.detach().add_(1);
  }
  EXPECT_THAT(error_of([&] { z.sum().backward(); }), HasSubstr("modified by an inplace"));
}

TEST(Saved, tensors_are_let_go_of) {
  const at::Tensor x = leaf(normal({3, 6}));
  const at::Tensor w = live_weight(leaf(normal({4, 6})));
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> watched;
  {
    const at::Tensor q = quantize_weight(leaf(normal({4, 6})));
    const at::Tensor y = quantize_activation(at::linear(x, q), qint8, scalar(0.03));
    const at::Tensor z = at::linear(at::relu(y), live_weight(leaf(normal({5, 4}))));
    const at::Tensor kept = at::linear(x, w);
    for (const at::Tensor& t : {q, parts(q).data, y, z}) watched.emplace_back(t.getIntrusivePtr());
    z.sum().backward();
  }
  for (const auto& weak : watched) EXPECT_TRUE(weak.expired());
  EXPECT_EQ(w.use_count(), 1);
}

TEST(Hooks, run_on_weights_and_activations) {
  const at::Tensor w = live_weight(leaf(normal({4, 6})));
  const at::Tensor x = leaf(normal({3, 6}));
  int calls = 0;
  w.register_hook([&](const at::Tensor& grad) {
    ++calls;
    return grad * 2;
  });
  const at::Tensor y = quantize_activation(at::linear(x, w), qint8, scalar(0.03));
  y.register_hook([&](const at::Tensor& grad) {
    ++calls;
    return grad * 3;
  });
  y.retain_grad();
  y.sum().backward();
  EXPECT_EQ(calls, 2);
  EXPECT_TRUE(is_within(w.grad(), x.detach().sum(0).expand({4, 6}) * 6, 1e-5));
  EXPECT_TRUE(y.grad().defined());
}

TEST(InPlace, on_an_activation_has_the_gradient_of_floats) {
  const at::Tensor x = leaf(normal({3, 6}));
  const at::Tensor plain = leaf(value_of(quantize_activation(x, qint8, scalar(0.03))));
  const at::Tensor grad = normal({3, 6}, at::kFloat, 5);
  const auto run = [&](at::Tensor t) {
    t.mul_(2).add_(1);
    t[1].mul_(3);
    t.select(1, 2).zero_();
    t.relu_();
    t.backward(grad);
  };
  run(quantize_activation(x, qint8, scalar(0.03)));
  run(plain.clone());
  EXPECT_TRUE(same(x.grad(), plain.grad()));
}

}  // namespace
}  // namespace quantal
