#include <quantal/qtensor.h>

#include <ATen/ATen.h>

#include <gmock/gmock.h>

namespace quantal {
namespace {

TEST(QTensor, plain_tensors_are_not_quantized) { EXPECT_FALSE(is_quantized(at::ones({2, 2}))); }

}  // namespace
}  // namespace quantal
