// How fast are weights quantized, dequantized and looked up, beside what reading memory takes? A
// weight of 4096 x 14336 (QUANTAL_BENCH_QUICK: 64 x 1024, to see that it runs), in each dtype and
// qtype; bytes_per_second counts those of the float weight, read or written. read/ only reads them,
// which is the limit; reference/ quantizes by the ATen operations that every device has.
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <quantal/quantal.h>

namespace {

constexpr std::int64_t kTokens = 4096;

// One weight a dtype, made when it is first asked for: they are large.
const torch::Tensor& weight_of(torch::Dtype dtype) {
  static std::map<torch::Dtype, torch::Tensor> weights;
  torch::Tensor& weight = weights[dtype];
  if (!weight.defined()) {
    const bool quick = std::getenv("QUANTAL_BENCH_QUICK") != nullptr;
    torch::manual_seed(0);
    weight = (quick ? torch::randn({64, 1024}) : torch::randn({4096, 14336})).mul_(0.02).to(dtype);
  }
  return weight;
}

void count_bytes(benchmark::State& bench, const torch::Tensor& t) {
  bench.SetBytesProcessed(bench.iterations() * static_cast<std::int64_t>(t.nbytes()));
}

// Every thread reads its part once.
void read(benchmark::State& bench, torch::Dtype dtype) {
  const torch::Tensor words = weight_of(dtype).view(torch::kLong);
  const auto* first = words.const_data_ptr<std::int64_t>();
  const std::int64_t count = words.numel(), threads = torch::get_num_threads();
  for (auto _ : bench) {
    std::vector<std::jthread> running;
    for (std::int64_t i = 0; i < threads; ++i) {
      running.emplace_back([=] {
        const auto* end = first + count * (i + 1) / threads;
        benchmark::DoNotOptimize(
            std::accumulate(first + count * i / threads, end, std::int64_t{0}, std::bit_xor<>()));
      });
    }
  }
  count_bytes(bench, words);
}

void quantize(benchmark::State& bench, torch::Dtype dtype, const quantal::WeightOptions& options) {
  const torch::Tensor& weight = weight_of(dtype);
  for (auto _ : bench) benchmark::DoNotOptimize(quantal::quantize_weight(weight, options));
  count_bytes(bench, weight);
}

// And its first linear, which packs it.
void quantize_and_pack(benchmark::State& bench, torch::Dtype dtype,
                       const quantal::WeightOptions& options) {
  const torch::Tensor& weight = weight_of(dtype);
  const torch::Tensor x = torch::zeros({1, weight.size(1)}, dtype);
  for (auto _ : bench) {
    const torch::Tensor quantized = quantal::quantize_weight(weight, options);
    benchmark::DoNotOptimize(torch::linear(x, quantized));
  }
  count_bytes(bench, weight);
}

// From the packed form.
void dequantize(benchmark::State& bench, torch::Dtype dtype,
                const quantal::WeightOptions& options) {
  const torch::Tensor weight = quantal::quantize_weight(weight_of(dtype), options);
  for (auto _ : bench) benchmark::DoNotOptimize(quantal::dequantize(weight));
  count_bytes(bench, weight_of(dtype));
}

// Rows at random, from canonical codes, or from the packed form that a tied linear leaves.
void gather(benchmark::State& bench, torch::Dtype dtype, const quantal::WeightOptions& options,
            bool is_packed) {
  const torch::Tensor weight = quantal::quantize_weight(weight_of(dtype), options);
  if (is_packed) torch::linear(torch::zeros({1, weight.size(1)}, dtype), weight);
  const torch::Tensor indices = torch::randint(weight.size(0), {kTokens}, torch::kLong);
  torch::Tensor rows;
  for (auto _ : bench) benchmark::DoNotOptimize(rows = torch::embedding(weight, indices));
  count_bytes(bench, rows);
}

// What the built-in quantizer chooses, under a name that has no kernel.
struct Reference final : quantal::Quantizer {
  std::string_view name() const override { return "reference"; }
  bool supports(const quantal::QType&) const override { return true; }
  quantal::ScaleShift operator()(const torch::Tensor& groups,
                                 const quantal::QType& qtype) const override {
    return (*quantal::default_quantizer(qtype))(groups, qtype);
  }
};

template <typename... Arguments>
void add(const std::string& name, Arguments... arguments) {
  benchmark::RegisterBenchmark(name.c_str(), arguments...)
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime();
}

const bool kRegistered = [] {
  for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    std::string suffix = "/";
    suffix.append(torch::toString(dtype));
    add("read" + suffix, read, dtype);
    for (const quantal::QType& qtype : quantal::all_qtypes()) {
      std::string of = "/";
      of.append(qtype.name).append(suffix);
      const quantal::WeightOptions options{.qtype = qtype};
      const quantal::WeightOptions reference{.qtype = qtype,
                                             .quantizer = std::make_shared<Reference>()};
      add("quantize" + of, quantize, dtype, options);
      add("quantize_and_pack" + of, quantize_and_pack, dtype, options);
      add("reference" + of, quantize, dtype, reference);
      add("dequantize" + of, dequantize, dtype, options);
      add("gather" + of, gather, dtype, options, false);
      add("gather_packed" + of, gather, dtype, options, true);
    }
  }
  return true;
}();

}  // namespace
