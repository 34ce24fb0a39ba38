// Quantizes one layer through the public API; exits 0 where the frozen layer computes what the live
// one did, on codes.
#include <iostream>

#include <torch/nn/modules/linear.h>

#include <quantal/quantal.h>

int main() {
  const torch::NoGradGuard no_grad;
  torch::nn::Linear linear(16, 8);
  const auto x = torch::ones({2, 16});
  quantal::quantize(linear, {.weights = quantal::qint8});
  const auto live = linear(x);
  quantal::freeze(linear);
  const auto frozen = linear(x);

  std::cout << quantal::report(linear);
  const bool passed =
      quantal::is_frozen(linear->weight) && live.equal(frozen) && quantal::fallback_count() == 0;
  std::cout << (passed ? "passed\n" : "failed\n");
  return passed ? 0 : 1;
}
