#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dataset.h"
#include "net.h"

namespace demo {

/// Images a batch wherever nothing is trained: testing, calibration, timing.
constexpr std::int64_t kEvalBatch = 128;

struct TrainOptions {
  int epochs = 1;
  std::int64_t batch_size = 128;
  double learning_rate = 2e-3;  ///< at first; falls to 0 in a straight line
};

/// An ordinary libtorch training loop with its own Adam. It knows nothing of quantization: on a
/// quantized model it is quantization-aware training.
void train(Net& net, const Samples& samples, const TrainOptions& options);

/// The model's outputs for every image, (n, 10); `label` names the progress bar.
torch::Tensor predict(Net& net, const Samples& samples, const std::string& label);

/// How many percent of the images have their largest output at their label.
double accuracy(const torch::Tensor& logits, const torch::Tensor& labels);

/// Median milliseconds a batch takes, for each model. They take turns on the same batches, so that
/// whatever else the machine does meets all of them alike.
std::vector<double> milliseconds_per_batch(const std::vector<Net>& nets, const Samples& samples);

}  // namespace demo
