#pragma once

#include <functional>
#include <string>

#include <quantal/qtensor.h>

#include <torch/torch.h>

/// What the tests of checkpoints share.
namespace quantal {

// One of each: linear with and without bias, convolution, normalization with buffers.
struct CheckpointNetImpl : torch::nn::Module {
  CheckpointNetImpl() {
    conv = register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 20, 3)));
    norm = register_module("norm", torch::nn::BatchNorm2d(20));
    fc1 = register_module("fc1", torch::nn::Linear(320, 24));
    layer_norm =
        register_module("layer_norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({24})));
    fc2 = register_module("fc2", torch::nn::Linear(torch::nn::LinearOptions(24, 5).bias(false)));
  }
  torch::Tensor forward(torch::Tensor x) {
    x = norm(torch::relu(conv(x))).flatten(1);
    return fc2(layer_norm(torch::relu(fc1(x))));
  }
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
  torch::nn::Linear fc1{nullptr}, fc2{nullptr};
  torch::nn::LayerNorm layer_norm{nullptr};
};
TORCH_MODULE(CheckpointNet);
using Net = CheckpointNet;

// libtorch has no call that exchanges or ties parameters.
struct Parameters : torch::nn::Module {
  static auto& of(torch::nn::Module& module) { return module.*(&Parameters::parameters_); }
};

inline Net make_net(at::ScalarType dtype = at::kFloat, int seed = 0) {
  torch::manual_seed(seed);
  Net net;
  net->forward(torch::randn({4, 3, 6, 6}));  // the running statistics move
  net->to(dtype);
  net->eval();
  return net;
}

inline at::Tensor images(at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(1);
  return torch::randn({7, 3, 6, 6}).to(dtype);
}

inline at::Tensor run(Net& net, at::ScalarType dtype = at::kFloat) {
  at::NoGradGuard no_grad;
  return quantal::dequantize(net->forward(images(dtype)));
}

inline std::string value_error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "no ValueError";
}

}  // namespace quantal
