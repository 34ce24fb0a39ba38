// What is allocated: one form of a weight at a time, and no float copy of a large one.
#include <algorithm>
#include <memory>

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;

/// Bytes of this thread's tensors on the CPU, while it lives.
class Allocations {
 public:
  Allocations() : guard_(c10::DebugInfoKind::PROFILER_STATE, counts_) {}

  std::int64_t held() const { return counts_->held; }
  std::int64_t most() const { return counts_->most; }

 private:
  struct Counts final : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, std::int64_t size, std::size_t, std::size_t,
                           c10::Device) override {
      held += size;  // negative where memory is freed
      most = std::max(most, held);
    }
    bool memoryProfilingEnabled() const override { return true; }
    std::int64_t held = 0, most = 0;
  };

  std::shared_ptr<Counts> counts_ = std::make_shared<Counts>();
  c10::DebugInfoGuard guard_;
};

class Memory : public ::testing::TestWithParam<QType> {};
INSTANTIATE_TEST_SUITE_P(All, Memory, ::testing::ValuesIn(all_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(Memory, of_a_backward_pass_is_less_than_the_float_weight) {
  constexpr std::int64_t kSize = 2048;
  const at::Tensor weight = quantize_weight(normal({kSize, kSize}), {.qtype = GetParam()});
  const at::Tensor x = leaf(normal({4, kSize}));
  const at::Tensor y = at::linear(x, weight);
  const at::Tensor grad = at::ones_like(y);
  const Allocations allocations;
  y.backward(grad);
  EXPECT_GT(allocations.most(), 0);
  EXPECT_LT(allocations.most(), kSize * kSize * 4 / 2);
}

// Forward and backward, by kernels and by torch's convolution, in groups and without.
TEST_P(Memory, of_convolutions_with_gradients_is_less_than_the_float_weight) {
  for (const std::int64_t groups : {1, 8}) {
    constexpr std::int64_t kRows = 1024;
    const at::Tensor floats = normal({kRows, 512, 3, 3});
    const at::Tensor weight = quantize_weight(floats, {.qtype = GetParam()});
    const at::Tensor bias = leaf(normal({kRows}));
    for (const std::int64_t size : {3, 12}) {
      const at::Tensor x = leaf(normal({1, 512 * groups, size, size}));
      const auto convolve = [&](const at::Tensor& w) {
        return at::convolution(x, w, bias, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, groups);
      };
      convolve(weight);  // packs it, where kernels read it
      at::Tensor grad = normal({1, kRows, size, size});
      std::int64_t most = 0;
      {
        const Allocations allocations;
        convolve(weight).backward(grad);
        most = allocations.most();
      }
      EXPECT_LT(most, floats.numel() * 4 * 3 / 4) << groups << " groups, " << size;
      const at::Tensor x_grad = x.grad().clone(), bias_grad = bias.grad().clone();
      x.mutable_grad() = bias.mutable_grad() = at::Tensor();
      convolve(quantal::dequantize(weight)).backward(grad);
      EXPECT_TRUE(at::allclose(x_grad, x.grad(), 1e-3, 1e-2)) << groups << " groups, " << size;
      EXPECT_TRUE(at::allclose(bias_grad, bias.grad(), 1e-4, 1e-3));
      x.mutable_grad() = bias.mutable_grad() = at::Tensor();
    }
  }
}

TEST_P(Memory, has_one_form_of_a_weight) {
  constexpr std::int64_t kSize = 1024;
  const at::Tensor floats = normal({kSize, kSize}), x = normal({2, kSize});
  const double bits = GetParam().bits;
  const double codes = kSize * kSize * bits / 8;
  at::NoGradGuard no_grad;
  const Allocations allocations;
  const at::Tensor weight = quantize_weight(floats, {.qtype = GetParam()});
  const auto is_one_form = [&](std::int64_t bytes) {
    return static_cast<double>(bytes) >= codes && static_cast<double>(bytes) < 1.3 * codes;
  };
  EXPECT_PRED1(is_one_form, allocations.held());
  at::linear(x, weight);
  EXPECT_PRED1(is_one_form, allocations.held());
  const QuantizedParts canonical = parts(weight);
  EXPECT_EQ(canonical.data.numel() * canonical.data.element_size(), codes);
}

}  // namespace
}  // namespace quantal
