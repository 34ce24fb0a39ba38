// Inference mode, autocast, threads, and operators that other libraries register late.
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <thread>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

using View = std::function<at::Tensor(const at::Tensor&)>;

std::vector<View> views() {
  return {
      [](const at::Tensor& t) { return t.t(); },
      [](const at::Tensor& t) { return t[1]; },
      [](const at::Tensor& t) { return t.slice(0, 1, 3); },
      [](const at::Tensor& t) { return t.slice(1, 1, 3); },
      [](const at::Tensor& t) { return t.unsqueeze(0); },
      [](const at::Tensor& t) { return t.expand({2, 4, 6}); },
      [](const at::Tensor& t) { return t.diagonal(); },
      [](const at::Tensor& t) { return t.split(2)[1]; },
      [](const at::Tensor& t) { return t.unbind(1)[2]; },
      [](const at::Tensor& t) { return t.permute({1, 0}); },
      [](const at::Tensor& t) { return t.view({24}); },
      [](const at::Tensor& t) { return t.detach(); },
      [](const at::Tensor& t) { return t.alias(); },
      [](const at::Tensor& t) { return t.as_strided({2, 2}, {6, 1}); },
      [](const at::Tensor& t) { return t.view(at::kFloat); },
  };
}

std::vector<at::Tensor> one_of_each_kind() {
  const at::Tensor x = normal({4, 6});
  const at::Tensor written = quantize_activation(x, qint8, scalar(0.03));
  written.mul_(2);
  return {quantize_weight(x, {.qtype = qint4}), live_weight(x, {.qtype = qint4}),
          quantize_activation(x, qint8, scalar(0.03)), written};
}

void expect_everything_works(const std::vector<at::Tensor>& tensors, bool normal_views) {
  const at::Tensor x = normal({3, 6});
  for (const at::Tensor& t : tensors) {
    for (const View& view : views()) {
      const at::Tensor shown = view(t);
      EXPECT_TRUE(same(shown + 0, view(float_of(t).clone())));
      EXPECT_EQ(shown.is_inference(), !normal_views);
    }
    EXPECT_TRUE(is_linear(at::linear(x, t), x, t));
    EXPECT_TRUE(is_linear(at::addmm(at::zeros({4}), x, t.t()), x, t));
    EXPECT_TRUE(is_linear(x.unsqueeze(0).matmul(t.t()), x.unsqueeze(0), t));
    EXPECT_TRUE(same(at::relu(t), at::relu(float_of(t))));
    EXPECT_TRUE(same(t.clone() + 0, float_of(t)));
    EXPECT_TRUE(same(at::embedding(t, at::tensor({2L, 0L})),
                     at::embedding(value_of(t), at::tensor({2L, 0L}))));
  }
}

TEST(InferenceMode, takes_tensors_made_outside) {
  const auto tensors = one_of_each_kind();
  c10::InferenceMode mode;
  expect_everything_works(tensors, /*normal_views=*/true);
}

TEST(InferenceMode, takes_tensors_made_inside) {
  c10::InferenceMode mode;
  auto tensors = one_of_each_kind();
  // A live weight is meant to be trained: it is an ordinary tensor wherever it was made.
  EXPECT_FALSE(tensors[1].is_inference());
  expect_everything_works({tensors[1]}, /*normal_views=*/true);
  tensors.erase(tensors.begin() + 1);
  expect_everything_works(tensors, /*normal_views=*/false);
}

TEST(InferenceMode, makes_tensors_that_work_outside) {
  std::vector<at::Tensor> tensors;
  {
    c10::InferenceMode mode;
    tensors = one_of_each_kind();
  }
  const at::Tensor x = normal({3, 6});
  for (const at::Tensor& t : tensors) {
    EXPECT_TRUE(is_linear(at::linear(x, t), x, t));
    EXPECT_TRUE(same(at::relu(t), at::relu(float_of(t))));
    EXPECT_TRUE(same(t.t() + 0, float_of(t).t()));
  }
}

TEST(InferenceMode, freezes) {
  const at::Tensor live = live_weight(leaf(normal({4, 6})));
  const at::Tensor wanted = value_of(live).detach();
  c10::InferenceMode mode;
  freeze(live);
  EXPECT_TRUE(same(live, wanted));
  EXPECT_FALSE(live.requires_grad());
}

class Autocast : public ::testing::Test {
 protected:
  Autocast() {
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~Autocast() override {
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
};

TEST_F(Autocast, computes_in_bfloat16) {
  const at::Tensor x = normal({3, 6});
  const at::Tensor bias = normal({4}, at::kFloat, 2);
  for (const at::Tensor& w : one_of_each_kind()) {
    const at::Tensor half = x.to(at::kBFloat16), weight = w.to(at::kBFloat16);
    EXPECT_TRUE(is_linear(at::linear(x, w, bias), half, weight, bias.to(at::kBFloat16)));
    EXPECT_TRUE(is_linear(at::addmm(bias, x, w.t()), half, weight, bias.to(at::kBFloat16)));
  }
}

TEST_F(Autocast, gives_gradients_of_the_weights_own_dtype) {
  const at::Tensor x = leaf(normal({3, 6}));
  const at::Tensor live = live_weight(leaf(normal({4, 6})));
  const at::Tensor y = at::linear(x, live);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  y.sum().backward();
  EXPECT_EQ(x.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(live.grad().scalar_type(), at::kFloat);
  EXPECT_TRUE(is_within(live.grad(), x.detach().sum(0).expand({4, 6}), 0.05));
}

TEST(Threads, share_one_weight) {
  const at::Tensor x = normal({5, 160});
  for (const QType& qtype : {qint4, qint8, qfloat8}) {
    for (const bool is_live_weight : {true, false}) {
      const at::Tensor plain = normal({16, 160});
      const at::Tensor w = is_live_weight ? live_weight(plain, {.qtype = qtype})
                                          : quantize_weight(plain, {.qtype = qtype});
      const at::Tensor wanted = at::linear(x, quantize_weight(plain, {.qtype = qtype}));
      const at::Tensor rows = value_of(quantize_weight(plain, {.qtype = qtype})).slice(0, 3, 5);
      std::atomic<int> wrong = 0;
      std::vector<std::thread> threads;
      for (int t = 0; t < 8; ++t) {
        threads.emplace_back([&] {
          at::set_num_threads(1);  // how torch divides a product among threads changes its rounding
          for (int i = 0; i < 50; ++i) {
            wrong += !at::equal(at::linear(x, w), wanted);
            wrong += !at::equal(x.matmul(w.t()), wanted);
            wrong += !at::equal(value_of(w.slice(0, 3, 5)), rows);
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
      EXPECT_EQ(wrong, 0) << qtype.name;
    }
  }
}

TEST(Threads, train_one_weight) {
  const at::Tensor live = live_weight(leaf(normal({4, 6})));
  const at::Tensor x = normal({3, 6});
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) at::linear(x, live).sum().backward();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(is_within(live.grad(), x.sum(0).expand({4, 6}) * 160, 1e-2));
}

at::Tensor read_memory(const at::Tensor& t) {
  return at::scalar_tensor(t.contiguous().const_data_ptr<float>()[0]);
}

TEST(LateOperators, get_the_fallback) {
  const at::Tensor before = quantize_weight(normal({4, 6}));
  // Never unregistered: operators that a quantized tensor met stay covered.
  static auto* library = new torch::Library(torch::Library::DEF, "quantal_late_test", std::nullopt,
                                            __FILE__, __LINE__);
  library->def("cpu(Tensor t) -> Tensor");
  library->def("explicit(Tensor t) -> Tensor");
  library->def("implicit(Tensor t) -> Tensor", read_memory);
  library->impl("cpu", c10::DispatchKey::CPU,
                torch::CppFunction::makeFromUnboxedFunction(read_memory));
  library->impl("explicit", c10::DispatchKey::CompositeExplicitAutograd,
                torch::CppFunction::makeFromUnboxedFunction(read_memory));
  const auto run = [](const char* name, const at::Tensor& t) {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(name, "")
        .typed<at::Tensor(const at::Tensor&)>()
        .call(t);
  };
  const at::Tensor wanted = value_of(before)[0][0];
  // A backend fallback reaches CPU kernels at once.
  EXPECT_TRUE(same(run("quantal_late_test::cpu", before), wanted));
  // Composite ones raise until the next quantized tensor is made.
  EXPECT_THAT(error_of([&] { run("quantal_late_test::explicit", before); }),
              HasSubstr("quantized tensor"));
  const at::Tensor after = quantize_activation(normal({4, 6}), qint8, scalar(0.03));
  EXPECT_TRUE(same(run("quantal_late_test::explicit", before), wanted));
  EXPECT_TRUE(same(run("quantal_late_test::explicit", after), value_of(after)[0][0]));
  EXPECT_THAT(error_of([&] { run("quantal_late_test::implicit", before); }),
              HasSubstr("quantized tensor"));
  // Other libraries compute with what they are given: the quantized value.
  const at::Tensor live = live_weight(normal({4, 6}), {.qtype = qint2});
  EXPECT_TRUE(same(run("quantal_late_test::cpu", live), value_of(live)[0][0]));
  EXPECT_GT(fallbacks_of("quantal_late_test::cpu"), 0);
  EXPECT_GT(refresh_operators(), 1000);
}

}  // namespace
}  // namespace quantal
