// The whole story: float, then each way to quantize. All that Quantal does is in this file.
#include "demo.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <quantal/quantal.h>
#include <iomanip>
#include <iostream>
#include <stdexcept>

#include "dataset.h"
#include "net.h"
#include "plot.h"
#include "table.h"
#include "train.h"

namespace demo {
namespace {

namespace q = quantal;

constexpr std::int64_t kCalibrationImages = 2048;

void say(const std::string& text) { std::cout << "\n" << text << std::endl; }

class Demo {
 public:
  Demo(const Options& options, const Dataset& data) : options_(options), data_(data) {}

  std::vector<Result> run() {
    run_float();
    run_weights("int8", q::qint8);
    run_weights_and_activations();
    run_weights("int4", q::qint4);
    run_weights("int2", q::qint2);
    run_weights("float8", q::qfloat8);
    say("Milliseconds a batch of " + std::to_string(kEvalBatch) + " images, all models in turn");
    const auto times = milliseconds_per_batch(nets_, data_.test);
    for (size_t i = 0; i < times.size(); ++i) results_[i].ms_per_batch = times[i];
    return results_;
  }

 private:
  void run_float() {
    say("Train in float");
    train(float_net_, data_.train, {.epochs = options_.epochs, .batch_size = options_.batch_size});
    save_and_read_back("float", float_net_);
  }

  void run_weights(const std::string& scheme, const q::QType& weights) {
    say("Quantize the weights to " + scheme);
    Net net = q::clone(float_net_);
    q::quantize(net, {.weights = weights});
    save_and_read_back(scheme, net);
  }

  void run_weights_and_activations() {
    say("Quantize weights and activations to int8");
    Net net = q::clone(float_net_);
    q::quantize(net, {.weights = q::qint8, .activations = q::qint8});
    test(net, "not calibrated");
    {
      q::Calibration calibration(net);
      predict(net, calibration_samples(), "calibrate");
    }
    save_and_read_back("int8-int8", q::clone(net));

    say("Train one epoch more, quantized (QAT)");
    train(net, data_.train, {.batch_size = options_.batch_size, .learning_rate = 5e-4});
    save_and_read_back("int8-int8-qat", net);
    std::cout << "\n" << q::report(net);
  }

  // Freezes and tests the model, saves it, and reads the file into a fresh model, which must give
  // the very same outputs.
  void save_and_read_back(const std::string& scheme, Net net) {
    const std::filesystem::path path = options_.out / (scheme + ".safetensors");
    q::freeze(net);
    const torch::Tensor before = test(net, "test " + scheme);
    q::save(net, path);

    Net fresh;
    q::requantize(fresh, path);
    const torch::Tensor after = test(fresh, "test the file");
    if (!torch::equal(before, after)) {
      throw std::runtime_error(path.string() +
                               ": the model read back from it gives other outputs "
                               "than the one that was saved");
    }
    nets_.push_back(fresh);
    results_.push_back({.scheme = scheme,
                        .accuracy = accuracy(after, data_.test.labels),
                        .file_bytes = std::filesystem::file_size(path)});
  }

  torch::Tensor test(Net& net, const std::string& label) {
    const torch::Tensor logits = predict(net, data_.test, label);
    std::cout << "  accuracy " << std::fixed << std::setprecision(2)
              << accuracy(logits, data_.test.labels) << " %" << std::endl;
    return logits;
  }

  // Training images: the test must stay unseen.
  Samples calibration_samples() const {
    const std::int64_t count = std::min(kCalibrationImages, data_.train.size());
    return {data_.train.images.narrow(0, 0, count), data_.train.labels.narrow(0, 0, count)};
  }

  const Options& options_;
  const Dataset& data_;
  Net float_net_;
  std::vector<Net> nets_;
  std::vector<Result> results_;
};

}  // namespace

std::vector<Result> run(const Options& options) {
  require_gnuplot();
  prepare_folder(options.out);
  const Dataset data = load_dataset(options.data, options.limit);
  if (options.threads > 0) at::set_num_threads(options.threads);
  torch::manual_seed(options.seed);
  std::cout << data.name << ": " << data.train.size() << " images to train, " << data.test.size()
            << " to test; " << kNetName << "; threads: " << at::get_num_threads() << std::endl;

  const std::vector<Result> results = Demo(options, data).run();

  say(table(results));
  const std::filesystem::path json = options.out / "results.json";
  const std::filesystem::path png = options.out / "results.png";
  write_json(results, json);
  draw_plot(results,
            data.name + ", " + kNetName + ", batches of " + std::to_string(kEvalBatch) +
                ": quantized beside float",
            png);
  std::cout << "Written: " << json.string() << ", " << png.string() << std::endl;
  return results;
}

}  // namespace demo
