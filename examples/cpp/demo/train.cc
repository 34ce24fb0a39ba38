#include "train.h"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <iomanip>
#include <sstream>

#include "progress.h"

namespace demo {
namespace {

constexpr int kWarmUpRounds = 5;
constexpr int kTimedRounds = 41;

std::string loss_note(double loss) {
  std::ostringstream text;
  text << "loss " << std::fixed << std::setprecision(3) << loss;
  return text.str();
}

double milliseconds(Net net, const torch::Tensor& inputs) {
  const auto start = std::chrono::steady_clock::now();
  net->forward(inputs);
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
  return taken.count();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void set_learning_rate(torch::optim::Optimizer& optimizer, double rate) {
  for (auto& group : optimizer.param_groups()) group.options().set_lr(rate);
}

}  // namespace

void train(Net& net, const Samples& samples, const TrainOptions& options) {
  torch::optim::Adam optimizer(net->parameters(), options.learning_rate);
  net->train();
  const double images = static_cast<double>(options.epochs * samples.size());
  std::int64_t seen = 0;
  for (int epoch = 1; epoch <= options.epochs; ++epoch) {
    ProgressBar bar("epoch " + std::to_string(epoch) + "/" + std::to_string(options.epochs),
                    samples.size());
    double average = 0;
    for (const torch::Tensor& picked :
         torch::randperm(samples.size(), torch::kInt64).split(options.batch_size)) {
      const torch::Tensor inputs = to_inputs(samples.images.index_select(0, picked));
      const torch::Tensor labels = samples.labels.index_select(0, picked);
      set_learning_rate(optimizer,
                        options.learning_rate * (1 - static_cast<double>(seen) / images));
      optimizer.zero_grad();
      const torch::Tensor loss = torch::cross_entropy_loss(net->forward(inputs), labels);
      loss.backward();
      optimizer.step();
      seen += picked.size(0);
      const double now = loss.item<double>();
      average = average == 0 ? now : 0.95 * average + 0.05 * now;
      bar.advance(picked.size(0), loss_note(average));
    }
  }
}

torch::Tensor predict(Net& net, const Samples& samples, const std::string& label) {
  torch::NoGradGuard no_grad;
  net->eval();
  ProgressBar bar(label, samples.size());
  std::vector<torch::Tensor> logits;
  for (std::int64_t begin = 0; begin < samples.size(); begin += kEvalBatch) {
    logits.push_back(net->forward(samples.inputs(begin, kEvalBatch)));
    bar.advance(logits.back().size(0));
  }
  return torch::cat(logits);
}

double accuracy(const torch::Tensor& logits, const torch::Tensor& labels) {
  return 100 * logits.argmax(1).eq(labels).to(torch::kDouble).mean().item<double>();
}

std::vector<double> milliseconds_per_batch(const std::vector<Net>& nets, const Samples& samples) {
  torch::NoGradGuard no_grad;
  for (Net net : nets) net->eval();
  std::vector<std::vector<double>> times(nets.size());
  ProgressBar bar("timing", kWarmUpRounds + kTimedRounds);
  for (int round = 0; round < kWarmUpRounds + kTimedRounds; ++round) {
    const torch::Tensor picked =
        torch::arange(round * kEvalBatch, (round + 1) * kEvalBatch).remainder(samples.size());
    const torch::Tensor inputs = to_inputs(samples.images.index_select(0, picked));
    for (size_t i = 0; i < nets.size(); ++i) {
      const double taken = milliseconds(nets[i], inputs);
      if (round >= kWarmUpRounds) times[i].push_back(taken);
    }
    bar.advance(1);
  }
  std::vector<double> medians;
  medians.reserve(times.size());
  for (const auto& of_net : times) medians.push_back(median(of_net));
  return medians;
}

}  // namespace demo
