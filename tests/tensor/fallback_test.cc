// Operations without a quantized kernel: right values, counted, and heard of.
#include <c10/util/Exception.h>

#include <cstdlib>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

struct Kind {
  const char* name;
  at::Tensor tensor;
  at::Tensor value;  ///< what operations without a kernel read
};

std::vector<Kind> kinds() {
  const at::Tensor x = normal({4, 6});
  const at::Tensor frozen = quantize_weight(x, {.qtype = qint4});
  const at::Tensor live = live_weight(x, {.qtype = qint4});
  const at::Tensor activation = quantize_activation(x, qint8, scalar(0.03));
  const at::Tensor written = quantize_activation(x, qint8, scalar(0.03));
  written.add_(0.5);
  return {{"frozen", frozen, value_of(frozen)},
          {"live", live, latent(live)},
          {"frozen, transposed", frozen.t(), value_of(frozen).t()},
          {"frozen row", frozen[1].unsqueeze(0), value_of(frozen)[1].unsqueeze(0)},
          {"live rows", live.slice(0, 1, 3), latent(live).slice(0, 1, 3)},
          {"activation", activation, value_of(activation)},
          {"activation column", activation.select(1, 2).unsqueeze(1),
           value_of(activation).select(1, 2).unsqueeze(1)},
          {"materialized activation", written, value_of(written)}};
}

using Operation = std::function<std::vector<at::Tensor>(const at::Tensor&)>;

std::vector<Operation> operations() {
  return {
      [](const at::Tensor& t) { return std::vector{t + 1.5}; },
      [](const at::Tensor& t) { return std::vector{t * t - t}; },
      [](const at::Tensor& t) { return std::vector{t.sum()}; },
      [](const at::Tensor& t) {
        return std::vector{t.mean(0), t.std(), t.norm(), t.amax(1), t.argmax()};
      },
      [](const at::Tensor& t) {
        return std::vector{t.exp(), at::gelu(t), at::sigmoid(t), t.sign(), t.abs()};
      },
      [](const at::Tensor& t) {
        return std::vector{std::get<0>(t.sort(0)), std::get<1>(t.topk(1))};
      },
      [](const at::Tensor& t) { return std::vector{at::where(t > 0, t, -t), t.eq(t), t.lt(0.1)}; },
      [](const at::Tensor& t) {
        return std::vector{t.cumsum(1), t.flip({0}), t.roll(1, 0), t.repeat({2, 2})};
      },
      [](const at::Tensor& t) {
        return std::vector{t.index_select(0, at::tensor({0L})),
                           t.gather(0, at::zeros({1, 1}, at::kLong))};
      },
      [](const at::Tensor& t) {
        return std::vector{t.index({at::tensor({0L})}), at::constant_pad_nd(t, {1, 1}, 2)};
      },
      [](const at::Tensor& t) {
        return std::vector{at::log_softmax(t, 1), at::dropout(t, 0.5, false)};
      },
      [](const at::Tensor& t) {
        return std::vector{at::zeros_like(t), at::ones_like(t), t.new_full({2}, 3)};
      },
      [](const at::Tensor& t) { return t.split(1, 0); },
      [](const at::Tensor& t) { return at::_foreach_add({t, t}, 1); },
      [](const at::Tensor& t) { return at::_foreach_mul(std::vector{t, t}, std::vector{t, t}); },
      [](const at::Tensor& t) { return at::meshgrid({t.flatten(), t.flatten()}, "ij"); },
      [](const at::Tensor& t) { return std::vector{at::cat({t, t + 1})}; },
      [](const at::Tensor& t) {
        return std::vector{t.t().contiguous(), t.reshape({-1}), t.masked_select(t > 0)};
      },
      [](const at::Tensor& t) {
        return std::vector{at::add(t, at::ones_like(t)), at::scalar_tensor(1.0) - t};
      },
      [](const at::Tensor& t) { return std::vector{t.to(at::kLong), t.to(at::kBool), t.isnan()}; },
      [](const at::Tensor& t) {
        return std::vector{at::linalg_norm(t), at::linalg_svdvals(t.contiguous())};
      },
      [](const at::Tensor& t) {
        at::Tensor out = at::empty({0});
        at::add_out(out, t, t);
        return std::vector{out};
      },
      [](const at::Tensor& t) { return std::vector{at::scalar_tensor(t.max().item<double>())}; },
  };
}

TEST(Fallback, computes_on_float_values) {
  at::NoGradGuard no_grad;
  const auto run = operations();
  for (const Kind& kind : kinds()) {
    for (size_t i = 0; i < run.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << kind.name << ", operation " << i);
      const auto got = run[i](kind.tensor);
      const auto wanted = run[i](kind.value.clone());
      ASSERT_EQ(got.size(), wanted.size());
      for (size_t k = 0; k < got.size(); ++k) EXPECT_TRUE(same(float_of(got[k]), wanted[k]));
    }
  }
}

// Attention is made of products, which read a live weight's codes, and of others, which do not.
TEST(Fallback, computes_attention) {
  for (const Kind& kind : kinds()) {
    if (is_live(kind.tensor)) continue;
    const at::Tensor& t = kind.tensor;
    const at::Tensor value = value_of(t);
    EXPECT_TRUE(is_within(at::scaled_dot_product_attention(t, t, t),
                          at::scaled_dot_product_attention(value, value, value), 1e-5))
        << kind.name;
  }
}

TEST(Fallback, is_counted_by_operation) {
  const at::Tensor frozen = quantize_weight(normal({4, 6}));
  const at::Tensor y = quantize_activation(normal({4, 6}), qint8, scalar(0.03));
  reset_fallback_counts();
  EXPECT_EQ(fallback_count(), 0);
  frozen + 1;
  frozen.sum();
  y.sum();
  EXPECT_THAT(fallback_counts(),
              UnorderedElementsAre(Pair("aten::add.Scalar", 1), Pair("aten::sum", 2)));
  EXPECT_EQ(fallback_count(), 3);
  reset_fallback_counts();
  EXPECT_THAT(fallback_counts(), IsEmpty());
}

// A forward pass that reads the latent would train unquantized; updates may read it.
TEST(Fallback, counts_reads_of_a_latent_while_gradients_are_recorded) {
  const at::Tensor live = live_weight(leaf(normal({4, 6})));
  reset_fallback_counts();
  live.exp();
  EXPECT_EQ(fallbacks_of("aten::exp"), 1);
  at::NoGradGuard no_grad;
  live.exp();
  live.add_(1);
  live.norm();
  EXPECT_EQ(fallback_count(), 1);
}

TEST(Fallback, does_not_count_what_runs_on_codes_or_metadata) {
  const at::Tensor frozen = quantize_weight(normal({4, 6}), {.qtype = qint4});
  const at::Tensor y = quantize_activation(normal({4, 6}), qint8, scalar(0.03));
  NoFallback guard;
  at::linear(y, frozen);
  at::relu(y).view({-1}).clone();
  frozen.detach().t().slice(1, 0, 2);
  frozen[2];
  at::empty_like(frozen);
  at::zeros_like(y);
  y.new_zeros({3});
  EXPECT_EQ(frozen.size(0) * frozen.size(1), y.numel());
}

class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
  std::vector<std::string> messages;
};

TEST(Fallback, warns_once_an_operation_of_a_whole_weight) {
  Warnings warnings;
  c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  const at::Tensor frozen = quantize_weight(normal({4, 6}));
  const at::Tensor y = quantize_activation(normal({4, 6}), qint8, scalar(0.03));
  at::erfinv(y);
  EXPECT_THAT(warnings.messages, IsEmpty());
  for (int i = 0; i < 3; ++i) at::erfinv(frozen);
  ASSERT_EQ(warnings.messages.size(), 1);
  EXPECT_THAT(warnings.messages[0],
              AllOf(HasSubstr("aten::erfinv"), HasSubstr("[4, 6]"), HasSubstr("fallback_counts")));
  at::digamma(frozen);
  EXPECT_EQ(warnings.messages.size(), 2);
}

TEST(FallbackDeathTest, verbose_dispatch_names_every_one) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [] {
    setenv("QUANTAL_VERBOSE", "dispatch", 1);
    const at::Tensor frozen = quantize_weight(normal({4, 6}));
    frozen.sum();
    frozen.sum();
    std::exit(0);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0),
              "aten::sum runs on dequantized values.*4, 6(.|\n)*aten::sum runs on dequantized");
}

TEST(Fallback, takes_lists_of_optional_tensors) {
  const at::Tensor y = quantize_activation(normal({4, 6}), qint8, scalar(0.03));
  const at::Tensor frozen = quantize_weight(normal({4, 6}));
  const c10::List<std::optional<at::Tensor>> columns({std::nullopt, at::tensor({1L, 3L})});
  for (const at::Tensor& t : {y, frozen}) {
    EXPECT_TRUE(same(at::index(t, columns), at::index(value_of(t), columns)));
    EXPECT_TRUE(same(at::index_put(t, columns, at::zeros({4, 2})),
                     at::index_put(value_of(t), columns, at::zeros({4, 2}))));
  }
  // A quantized index mask.
  const at::Tensor mask = quantize_activation(at::eye(4), qint8, scalar(1.0)).to(at::kBool);
  EXPECT_TRUE(
      same(at::index(normal({4, 4}), {mask}), at::index(normal({4, 4}), {at::eye(4, at::kBool)})));
}

TEST(Fallback, writes_to_out_arguments_and_mutable_lists) {
  const at::Tensor y = quantize_activation(normal({4, 6}), qint8, scalar(0.03));
  const at::Tensor live = live_weight(normal({4, 6}));
  at::Tensor out = y;
  EXPECT_TRUE(at::sin_out(out, live).is_same(y));
  EXPECT_TRUE(same(y, normal({4, 6}).sin()));
  at::Tensor target = live;
  EXPECT_TRUE(at::exp_out(target, normal({4, 6})).is_same(live));
  EXPECT_TRUE(same(latent(live), normal({4, 6}).exp()));
  const std::vector<at::Tensor> list = {live, y};
  at::_foreach_zero_(list);
  EXPECT_EQ(latent(live).abs().max().item<double>(), 0);
  EXPECT_EQ(value_of(y).abs().max().item<double>(), 0);
  at::Tensor values = at::empty({0});
  at::Tensor indices = at::empty({0}, at::kLong);
  at::max_out(values, indices, live, 1);
  EXPECT_EQ(values.sizes(), at::IntArrayRef({4}));
}

TEST(Storage, is_missing_and_says_what_to_do) {
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    EXPECT_FALSE(kind.tensor.has_storage());
    EXPECT_THAT(error_of([&] { kind.tensor.data_ptr(); }), HasSubstr("quantal::dequantize"));
    EXPECT_THAT(error_of([&] { kind.tensor.data_ptr<float>(); }), HasSubstr("quantal::dequantize"));
    EXPECT_THAT(error_of([&] { kind.tensor.storage(); }), HasSubstr("quantal::save"));
  }
}

TEST(Printing, shows_values) {
  for (const Kind& kind : kinds()) {
    std::ostringstream got, wanted;
    got << kind.tensor;
    wanted << kind.value;
    const auto numbers_of = [](const std::string& text) { return text.substr(0, text.find("[ ")); };
    EXPECT_EQ(numbers_of(got.str()), numbers_of(wanted.str())) << kind.name;
    EXPECT_THAT(got.str(), HasSubstr("CPUFloatType")) << kind.name;
  }
}

TEST(Meta, has_the_shape_and_dtype_only) {
  for (const Kind& kind : kinds()) {
    const at::Tensor shape = kind.tensor.to(at::kMeta);
    EXPECT_TRUE(shape.is_meta()) << kind.name;
    EXPECT_FALSE(is_quantized(shape)) << kind.name;
    EXPECT_EQ(shape.sizes(), kind.tensor.sizes());
    EXPECT_EQ(shape.scalar_type(), kind.tensor.scalar_type());
  }
}

TEST(Metadata, is_that_of_an_ordinary_tensor) {
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    EXPECT_EQ(kind.tensor.sizes(), kind.value.sizes());
    EXPECT_EQ(kind.tensor.scalar_type(), at::kFloat);
    EXPECT_TRUE(kind.tensor.device().is_cpu());
    EXPECT_TRUE(kind.tensor.is_floating_point());
    EXPECT_EQ(kind.tensor.layout(), at::kStrided);
    EXPECT_TRUE(is_quantized(kind.tensor));
    EXPECT_EQ(kind.tensor.numel(), kind.value.numel());
  }
  EXPECT_FALSE(is_quantized(at::ones({2, 2})));
  EXPECT_FALSE(is_quantized(at::Tensor()));
  EXPECT_FALSE(is_live(at::ones({2, 2})));
  EXPECT_FALSE(is_frozen(at::ones({2, 2})));
  EXPECT_TRUE(same(value_of(at::ones({2, 2})), at::ones({2, 2})));
}

}  // namespace
}  // namespace quantal
