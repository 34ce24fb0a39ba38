#include <quantal/qtensor.h>
#include <quantal/quantize.h>

#include <torch/torch.h>

#include <gmock/gmock.h>

namespace quantal {
namespace {

TEST(Quantize, a_linear_gets_a_live_weight) {
  torch::nn::Linear linear(4, 4);
  quantize(linear, {.weights = qint8});
  EXPECT_TRUE(is_live(linear->weight));
}

}  // namespace
}  // namespace quantal
