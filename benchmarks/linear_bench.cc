// What does a quantized linear cost beside the float one? One layer of 1024 x 1024 under batches of
// 1 (a decoder's step), 16 and 128 rows: float, then each qtype live (float latent) and frozen
// (packed codes), weights only, in inference.
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <quantal/quantal.h>

namespace {

constexpr std::int64_t kFeatures = 1024;
const std::vector<std::int64_t> kBatches = {1, 16, 128};

enum class State { kFloat, kLive, kFrozen };

void linear_forward(benchmark::State& bench, const quantal::QType* qtype, State state) {
  torch::manual_seed(0);
  torch::nn::Linear linear(kFeatures, kFeatures);
  if (qtype != nullptr) quantal::quantize(linear, {.weights = *qtype});
  if (state == State::kFrozen) quantal::freeze(linear);

  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({bench.range(0), kFeatures});
  quantal::reset_fallback_counts();
  for (auto _ : bench) benchmark::DoNotOptimize(linear(x));

  bench.counters["fallbacks"] = static_cast<double>(quantal::fallback_count());
  bench.counters["flops"] =
      benchmark::Counter(2.0 * static_cast<double>(bench.range(0) * kFeatures * kFeatures),
                         benchmark::Counter::kIsIterationInvariantRate);
}

void add_benchmark(const std::string& name, const quantal::QType* qtype, State state) {
  benchmark::RegisterBenchmark(("linear/" + name).c_str(), linear_forward, qtype, state)
      ->ArgsProduct({kBatches})
      ->ArgName("batch")
      ->Unit(benchmark::kMicrosecond)
      ->UseRealTime();
}

const bool kRegistered = [] {
  add_benchmark("float", nullptr, State::kFloat);
  for (const quantal::QType& qtype : quantal::all_qtypes()) {
    add_benchmark(std::string(qtype.name) + "/live", &qtype, State::kLive);
    add_benchmark(std::string(qtype.name) + "/frozen", &qtype, State::kFrozen);
  }
  return true;
}();

}  // namespace
