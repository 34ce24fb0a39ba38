// The number of libtorch's threads changes no bit.
#include <ATen/Parallel.h>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;

class Threads : public ::testing::TestWithParam<QType> {
 protected:
  void TearDown() override { at::set_num_threads(before_); }

 private:
  int before_ = at::get_num_threads();
};
INSTANTIATE_TEST_SUITE_P(All, Threads, ::testing::ValuesIn(all_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

// Results of everything that threads share out, of a weight that is made anew.
std::vector<at::Tensor> results(const QType& qtype, at::ScalarType dtype, int threads) {
  at::set_num_threads(threads);
  const at::Tensor weight = quantize_weight(normal({300, 256}, dtype), {.qtype = qtype});
  const QuantizedParts canonical = parts(weight);
  std::vector<at::Tensor> found{canonical.data, canonical.scale, value_of(weight)};
  for (const std::int64_t tokens : {1, 4, 40, 130}) {
    const at::Tensor x = normal({tokens, 256}, dtype, 3);
    found.push_back(at::linear(x, weight));
    found.push_back(quantal::dequantize(quantize_activation(x, qint8, at::full({}, 0.03))));
  }
  return found;
}

TEST_P(Threads, give_the_same_bits) {
  at::NoGradGuard no_grad;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const std::vector<at::Tensor> one = results(GetParam(), dtype, 1);
    for (const int threads : {2, 3, 5}) {
      const std::vector<at::Tensor> many = results(GetParam(), dtype, threads);
      for (std::size_t i = 0; i < one.size(); ++i) {
        EXPECT_TRUE(same(many[i], one[i])) << "result " << i << " of " << threads << " threads";
      }
    }
  }
}

}  // namespace
}  // namespace quantal
