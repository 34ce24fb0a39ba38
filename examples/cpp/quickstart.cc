// The example of README.md: quantize a model, calibrate it, train it on, save it, read it back.
#include <torch/torch.h>

#include <quantal/quantal.h>
#include <iostream>

namespace q = quantal;

struct NetImpl : torch::nn::Module {
  torch::nn::Linear hidden = register_module("hidden", torch::nn::Linear(128, 256));
  torch::nn::Linear output = register_module("output", torch::nn::Linear(256, 10));
  torch::Tensor forward(torch::Tensor x) { return output(torch::relu(hidden(x))); }
};
TORCH_MODULE(Net);

int main() {
  torch::manual_seed(0);
  const torch::Tensor images = torch::rand({512, 128});
  const torch::Tensor labels = torch::randint(10, {512});

  Net net;  // any torch::nn::Module, unmodified
  q::quantize(net, {.weights = q::qint8, .activations = q::qint8});
  {
    q::Calibration calibration(net, {.momentum = 0.9});
    net->forward(images);
  }

  torch::optim::Adam optimizer(net->parameters());  // an ordinary training loop
  for (int step = 0; step < 10; ++step) {
    optimizer.zero_grad();
    torch::cross_entropy_loss(net->forward(images), labels).backward();
    optimizer.step();
  }

  q::freeze(net);
  q::save(net, "quickstart.safetensors");  // weights, scales and how they are quantized: one file

  Net fresh;
  q::requantize(fresh, "quickstart.safetensors");
  std::cout << q::report(fresh);
  return torch::equal(fresh->forward(images), net->forward(images)) ? 0 : 1;
}
