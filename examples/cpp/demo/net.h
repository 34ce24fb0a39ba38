#pragma once

#include <string>

#include <torch/nn.h>

#include "dataset.h"

namespace demo {

/// A small convolutional network for 28 x 28 images: ordinary libtorch, nothing of Quantal in it.
/// Cloneable, so that one trained model can be quantized in several ways.
class NetImpl : public torch::nn::Cloneable<NetImpl> {
 public:
  NetImpl() { reset(); }

  void reset() override {
    using torch::nn::Conv2dOptions;
    conv1 = register_module("conv1", torch::nn::Conv2d(Conv2dOptions(1, 16, 3).padding(1)));
    conv2 = register_module("conv2", torch::nn::Conv2d(Conv2dOptions(16, 64, 3).padding(1)));
    linear1 = register_module("linear1", torch::nn::Linear(64 * 7 * 7, 128));
    linear2 = register_module("linear2", torch::nn::Linear(128, kClasses));
  }

  torch::Tensor forward(torch::Tensor x) {
    // Pooling first leaves relu a quarter of the work, and the result is the same.
    x = torch::relu(torch::max_pool2d(conv1(x), 2));
    x = torch::relu(torch::max_pool2d(conv2(x), 2));
    x = torch::relu(linear1(x.flatten(1)));
    return linear2(x);
  }

 private:
  torch::nn::Conv2d conv1{nullptr};
  torch::nn::Conv2d conv2{nullptr};
  torch::nn::Linear linear1{nullptr};
  torch::nn::Linear linear2{nullptr};
};
TORCH_MODULE(Net);

inline const std::string kNetName = "CNN of 2 conv and 2 linear layers";

}  // namespace demo
