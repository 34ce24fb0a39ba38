// In-place operations: they work or raise, on the tensor itself, through views and through aliases.
#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::HasSubstr;

struct Write {
  const char* name;
  std::function<void(at::Tensor)> run;
};

// On a tensor of shape (4, 6), by every route.
std::vector<Write> writes() {
  const at::Tensor other = normal({4, 6}, at::kFloat, 5);
  return {
      {"add_", [=](at::Tensor t) { t.add_(other); }},
      {"mul_ number", [](at::Tensor t) { t.mul_(2); }},
      {"zero_", [](at::Tensor t) { t.zero_(); }},
      {"fill_", [](at::Tensor t) { t.fill_(0.5); }},
      {"clamp_", [](at::Tensor t) { t.clamp_(-0.5, 0.5); }},
      {"relu_", [](at::Tensor t) { t.relu_(); }},
      {"copy_", [=](at::Tensor t) { t.copy_(other); }},
      {"addcmul_", [=](at::Tensor t) { t.addcmul_(other, other, 0.1); }},
      {"row zero_", [](at::Tensor t) { t[1].zero_(); }},
      {"row add_", [](at::Tensor t) { t[0].add_(100); }},
      {"element fill_", [](at::Tensor t) { t[2][3].fill_(7); }},
      {"element index assignment",
       [](at::Tensor t) {
         t.index_put_({at::tensor({1L}), at::tensor({2L})}, at::tensor({9.0F}));
       }},
      {"rows index_fill_", [](at::Tensor t) { t.index_fill_(0, at::tensor({1L, 3L}), 4); }},
      {"masked_fill_", [](at::Tensor t) { t.masked_fill_(at::eye(4, 6).to(at::kBool), -1); }},
      {"column", [](at::Tensor t) { t.select(1, 4).fill_(3); }},
      {"slice of rows", [](at::Tensor t) { t.slice(0, 1, 3).mul_(3); }},
      {"slice of columns", [](at::Tensor t) { t.slice(1, 0, 6, 2).zero_(); }},
      {"transposed", [=](at::Tensor t) { t.t().add_(other.t()); }},
      {"transposed row", [](at::Tensor t) { t.t()[2].fill_(1); }},
      {"view", [](at::Tensor t) { t.view({-1}).fill_(0.25); }},
      {"view element", [](at::Tensor t) { t.view({24})[5].fill_(0.25); }},
      {"flatten, narrow", [](at::Tensor t) { t.flatten().narrow(0, 3, 4).neg_(); }},
      {"diagonal", [](at::Tensor t) { t.diagonal().fill_(2); }},
      {"split", [](at::Tensor t) { t.split(2)[1].zero_(); }},
      {"chunk of columns", [](at::Tensor t) { t.chunk(3, 1)[1].add_(1); }},
      {"unbind", [](at::Tensor t) { t.unbind()[3].mul_(-1); }},
      {"unsqueeze", [](at::Tensor t) { t.unsqueeze(0).sub_(1); }},
      {"permute", [](at::Tensor t) { t.permute({1, 0}).sub_(1); }},
      {"as_strided", [](at::Tensor t) { t.as_strided({2, 2}, {6, 1}, 7).zero_(); }},
      {"detach", [](at::Tensor t) { t.detach().mul_(2); }},
      {"detach row", [](at::Tensor t) { t.detach()[1].zero_(); }},
      {"data", [](at::Tensor t) { t.variable_data().mul_(2); }},
      {"data row", [](at::Tensor t) { t.variable_data()[1].zero_(); }},
      {"data transposed row", [](at::Tensor t) { t.variable_data().t()[1].zero_(); }},
      {"data element", [](at::Tensor t) { t.variable_data()[1][1] = 3; }},
      {"alias", [](at::Tensor t) { t.alias().mul_(2); }},
      {"alias row", [](at::Tensor t) { t.alias()[1].mul_(2); }},
      {"out=", [=](at::Tensor t) { at::mul_out(t, other, other); }},
      {"out= of a view",
       [=](at::Tensor t) {
         at::Tensor row = t[1];
         at::add_out(row, other[0], other[1]);
       }},
      {"foreach", [=](at::Tensor t) { at::_foreach_add_({t}, 1.5); }},
      {"foreach lists",
       [=](at::Tensor t) { at::_foreach_mul_({t, other.clone()}, {other, other}); }},
      {"foreach of rows", [=](at::Tensor t) { at::_foreach_mul_(t.unbind(), 2); }},
      {"addmm_ with itself", [](at::Tensor t) { t.add_(t); }},
      {"in InferenceMode",
       [](at::Tensor t) {
         c10::InferenceMode mode;
         t.mul_(2);
       }},
      {"row in InferenceMode",
       [](at::Tensor t) {
         c10::InferenceMode mode;
         t[1].mul_(2);
       }},
  };
}

class Writes : public ::testing::TestWithParam<QType> {
 protected:
  // `make` gives the tensor; afterwards `read` must show what the same write did to `floats`.
  void expect_written(const Write& write, at::Tensor tensor, at::Tensor floats,
                      const std::function<at::Tensor()>& read) {
    SCOPED_TRACE(write.name);
    at::NoGradGuard no_grad;
    write.run(tensor);
    write.run(floats);
    EXPECT_TRUE(same(read(), floats));
  }
};

class ActivationWrites : public Writes {
 protected:
  at::Tensor make() const {
    return quantize_activation(normal({4, 6}), GetParam(), scalar(3 / GetParam().qmax));
  }
};

TEST_P(ActivationWrites, change_an_activation_with_codes) {
  for (const Write& write : writes()) {
    const at::Tensor y = make();
    expect_written(write, y, value_of(y).clone(), [&] { return value_of(y); });
  }
}

TEST_P(ActivationWrites, change_a_materialized_activation) {
  for (const Write& write : writes()) {
    const at::Tensor y = make();
    y.add_(0.125);
    ASSERT_THAT(value_error_of([&] { parts(y); }), HasSubstr("holds floats"));
    expect_written(write, y, value_of(y).clone(), [&] { return value_of(y); });
  }
}

TEST_P(ActivationWrites, are_seen_by_every_alias) {
  for (const Write& write : writes()) {
    const at::Tensor y = make();
    const at::Tensor turned = y.t();
    const at::Tensor rows = y.slice(0, 0, 4);
    const at::Tensor plain = value_of(y).clone();
    expect_written(write, rows, plain, [&] { return value_of(y); });
    EXPECT_TRUE(same(turned, plain.t())) << write.name;
    const at::Tensor again = make();
    const at::Tensor part = again.t();
    expect_written(write, again, value_of(again).clone(), [&] { return value_of(part).t(); });
  }
}

TEST_P(ActivationWrites, keep_identity_and_change_shape) {
  at::Tensor y = make();
  EXPECT_TRUE(y.mul_(2).is_same(y));
  EXPECT_TRUE(y.relu_().is_same(y));
  at::Tensor turned = make();
  turned.t_();
  EXPECT_TRUE(same(turned, value_of(make()).t()));
  at::Tensor square = make();
  square.unsqueeze_(0).squeeze_(0).transpose_(0, 1);
  EXPECT_TRUE(same(square, value_of(make()).t()));
  at::Tensor grown = make();
  grown.resize_({2, 6});
  EXPECT_TRUE(same(grown, value_of(make()).slice(0, 0, 2)));
}

TEST_P(ActivationWrites, relu_in_place_keeps_codes_for_all_aliases) {
  const at::Tensor y = make();
  const at::Tensor turned = y.t();
  NoFallback guard;
  y.slice(0, 0, 2).relu_();
  EXPECT_EQ(value_error_of([&] { parts(y); }), "no error");
  const at::Tensor plain = value_of(make());
  plain.slice(0, 0, 2).relu_();
  EXPECT_TRUE(same(y, plain));
  EXPECT_TRUE(same(turned, plain.t()));
}

INSTANTIATE_TEST_SUITE_P(All, ActivationWrites, ::testing::ValuesIn(eight_bit_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

class WeightWrites : public Writes {
 protected:
  WeightOptions options() const { return {.qtype = GetParam()}; }
};

// The latent is written, and the next computation reads codes of what was written.
TEST_P(WeightWrites, change_a_live_weight_and_its_codes) {
  const at::Tensor x = normal({3, 6});
  for (const bool requires_grad : {false, true}) {
    for (const Write& write : writes()) {
      const at::Tensor weight = normal({4, 6}).clone().set_requires_grad(requires_grad);
      const at::Tensor live = live_weight(weight, options());
      const at::Tensor before = at::linear(x, live);  // fills the cache
      const at::Tensor plain = weight.detach().clone();
      expect_written(write, live, plain, [&] { return latent(live); });
      at::NoGradGuard no_grad;
      EXPECT_TRUE(same(value_of(live), value_of(quantize_weight(plain, options())))) << write.name;
      EXPECT_TRUE(same(at::linear(x, live), at::linear(x, quantize_weight(plain, options()))))
          << write.name;
      EXPECT_FALSE(at::equal(before, at::linear(x, live))) << write.name;
      EXPECT_TRUE(is_live(live));
    }
  }
}

TEST_P(WeightWrites, to_the_float_it_was_made_of_change_a_live_weight) {
  for (const Write& write : writes()) {
    if (std::string(write.name).starts_with("data")) continue;  // which torch does not track
    const at::Tensor weight = normal({4, 6}).clone();
    const at::Tensor live = live_weight(weight, options());
    value_of(live);
    at::Tensor plain = weight.clone();
    expect_written(write, weight, plain, [&] { return latent(live); });
    EXPECT_TRUE(same(value_of(live), value_of(quantize_weight(plain, options())))) << write.name;
  }
  const at::Tensor live = live_weight(normal({4, 6}), options());
  value_of(live);
  latent(live.slice(0, 1, 3)).zero_();
  EXPECT_EQ(value_of(live).slice(0, 1, 3).abs().max().item<double>(), 0);
}

TEST_P(WeightWrites, through_old_and_many_views_change_a_live_weight) {
  const at::Tensor live = live_weight(normal({4, 6}), options());
  const at::Tensor row = live[2];
  const at::Tensor data_row = live.variable_data()[3];
  for (int i = 0; i < 3; ++i) {
    value_of(live);
    row.fill_(i + 1);
    EXPECT_EQ(value_of(live)[2].min().item<float>(), i + 1);
    value_of(live);
    data_row.fill_(-i - 1);
    EXPECT_EQ(value_of(live)[3].max().item<float>(), -i - 1);
    for (int k = 0; k < 100; ++k) live.variable_data().t()[0].fill_(k);
  }
}

TEST_P(WeightWrites, raise_on_a_frozen_weight) {
  for (const Write& write : writes()) {
    if (std::string(write.name) == "copy_") continue;
    SCOPED_TRACE(write.name);
    const at::Tensor frozen = quantize_weight(normal({4, 6}), options());
    const at::Tensor value = value_of(frozen).clone();
    EXPECT_THAT(error_of([&] {
                  write.run(frozen);
                  at::linear(normal({1, 6}), frozen);
                }),
                HasSubstr("frozen weight"));
    EXPECT_TRUE(same(value_of(quantize_weight(normal({4, 6}), options())), value));
  }
}

TEST_P(WeightWrites, raise_at_once_on_views_of_a_frozen_weight) {
  const at::Tensor frozen = quantize_weight(normal({4, 6}), options());
  const at::Tensor value = value_of(frozen);
  EXPECT_THAT(error_of([&] { frozen[1].zero_(); }), HasSubstr("frozen weight"));
  EXPECT_THAT(error_of([&] { frozen.view({24}).narrow(0, 3, 2).add_(1); }),
              HasSubstr("frozen weight"));
  EXPECT_THAT(error_of([&] { frozen.variable_data()[1][2].fill_(1); }), HasSubstr("frozen weight"));
  EXPECT_THAT(error_of([&] { frozen[1].copy_(at::zeros({6})); }), HasSubstr("frozen weight"));
  EXPECT_TRUE(same(frozen, value));
}

TEST_P(WeightWrites, through_views_made_before_freezing_raise) {
  const at::Tensor live = live_weight(normal({4, 6}), options());
  const at::Tensor row = live[1];
  const at::Tensor element = live.variable_data().view({24})[7];
  freeze(live);
  const at::Tensor value = value_of(live);
  EXPECT_THAT(error_of([&] { row.fill_(3); }), HasSubstr("frozen weight"));
  EXPECT_THAT(error_of([&] { element.fill_(3); }), HasSubstr("frozen weight"));
  EXPECT_TRUE(same(live, value));
}

// A latent whose elements lie otherwise than the weight's is viewed as plain floats.
TEST_P(WeightWrites, through_plain_views_are_seen_or_raise) {
  const at::Tensor turned = normal({6, 4}).t();
  for (const bool through_data : {false, true}) {
    const at::Tensor live =
        live_weight(turned.detach().clone(at::MemoryFormat::Preserve), options());
    ASSERT_FALSE(latent(live).is_contiguous());
    const at::Tensor row = through_data ? live.variable_data()[1] : live[1];
    EXPECT_FALSE(is_quantized(row));
    for (int i = 1; i < 4; ++i) {
      value_of(live);
      row.fill_(i);
      EXPECT_EQ(value_of(live)[1].min().item<float>(), i);
    }
    freeze(live);
    const at::Tensor value = value_of(live).clone();
    row.fill_(3);
    EXPECT_THAT(error_of([&] { value_of(live); }), HasSubstr("frozen weight"));
    EXPECT_THAT(error_of([&] { value_of(live); }), HasSubstr("frozen weight"));
    live.copy_(value);  // a new content settles it
    EXPECT_TRUE(is_frozen(live));
    EXPECT_EQ(value_of(live).sizes(), value.sizes());
  }
  for (const Write& write : writes()) {
    const at::Tensor live =
        live_weight(turned.detach().clone(at::MemoryFormat::Preserve), options());
    value_of(live);
    const at::Tensor plain = latent(live).contiguous();
    // Views that need contiguous elements raise there.
    const std::string name = write.name;
    if (name.find("view") != std::string::npos || name.find("flatten") != std::string::npos ||
        name == "as_strided") {
      continue;
    }
    expect_written(write, live, plain, [&] { return latent(live); });
    EXPECT_TRUE(same(value_of(live), value_of(quantize_weight(plain, options())))) << write.name;
  }
}

TEST_P(WeightWrites, copy_replaces_the_codes_of_a_frozen_weight) {
  const at::Tensor other = normal({4, 6}, at::kFloat, 9);
  const at::Tensor wanted = value_of(quantize_weight(other, options()));
  for (const at::Tensor& source : {other, other.to(at::kDouble), quantize_weight(other, options()),
                                   live_weight(other, options()), other.t().contiguous().t()}) {
    const at::Tensor frozen = quantize_weight(normal({4, 6}), options());
    const at::Tensor turned = frozen.t();
    const at::Tensor detached = frozen.detach();
    frozen.copy_(source);
    EXPECT_TRUE(is_frozen(frozen));
    EXPECT_TRUE(same(frozen, wanted));
    EXPECT_TRUE(same(turned, wanted.t()));
    EXPECT_TRUE(same(detached, wanted));
    frozen.copy_(source);
    EXPECT_TRUE(same(detached, wanted));
  }
  const at::Tensor frozen = quantize_weight(normal({4, 6}), options());
  at::Tensor bad = other.clone();
  bad[2][1] = std::nan("");
  EXPECT_THAT(error_of([&] { frozen.copy_(bad); }), HasSubstr("[2, 1]"));
  EXPECT_THAT(error_of([&] { frozen.copy_(at::zeros({5, 6})); }), HasSubstr("5"));
  EXPECT_THAT(error_of([&] { frozen.slice(0, 0, 2).copy_(other.slice(0, 0, 2)); }),
              HasSubstr("frozen weight"));
}

TEST_P(WeightWrites, cannot_change_the_shape) {
  at::Tensor live = live_weight(normal({6, 6}), options());
  const at::Tensor value = latent(live).clone();
  EXPECT_THAT(error_of([&] { live.resize_({3, 6}); }), HasSubstr("shape"));
  EXPECT_THAT(error_of([&] { live.t_(); }), HasSubstr("shape"));
  EXPECT_THAT(error_of([&] { live.unsqueeze_(0); }), HasSubstr("shape"));
  EXPECT_THAT(error_of([&] { live.set_(at::zeros({6, 6})); }), HasSubstr("storage"));
  EXPECT_TRUE(at::equal(latent(live), value));
  EXPECT_EQ(live.sizes(), value.sizes());
}

TEST_P(WeightWrites, by_an_optimizer_step_are_seen) {
  const at::Tensor live = live_weight(leaf(normal({4, 6})), options());
  const at::Tensor x = normal({3, 6});
  at::Tensor plain = latent(live).clone();
  for (int step = 0; step < 3; ++step) {
    at::linear(x, live).pow(2).sum().backward();
    at::NoGradGuard no_grad;
    // torch::optim::SGD steps through data().
    live.data().add_(live.grad(), -0.1);
    plain.add_(live.grad(), -0.1);
    live.mutable_grad().zero_();
    EXPECT_TRUE(same(latent(live), plain));
    EXPECT_TRUE(same(value_of(live), value_of(quantize_weight(plain, options()))));
  }
}

INSTANTIATE_TEST_SUITE_P(All, WeightWrites, ::testing::ValuesIn(all_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace quantal
