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

#include "kernels/gather.h"
#include "kernels/linear.h"

namespace {

namespace kernels = quantal::kernels;

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

// One weight in both forms, and memory for its value: the system clears the pages of a new result,
// which takes longer than the kernels.
class Forms {
 public:
  Forms(torch::Dtype dtype, const quantal::WeightOptions& options)
      : parts_(quantal::parts(quantal::quantize_weight(weight_of(dtype), options))),
        type_(dtype == torch::kFloat      ? kernels::FloatType::kF32
              : dtype == torch::kBFloat16 ? kernels::FloatType::kBF16
                                          : kernels::FloatType::kF16),
        layout_({options.qtype.id, weight_of(dtype).size(0), weight_of(dtype).size(1),
                 parts_.group_size,
                 parts_.scale.scalar_type() == torch::kFloat ? kernels::FloatType::kF32 : type_}),
        packed_(torch::empty(layout_.size(), torch::kByte)),
        value_(torch::empty_like(weight_of(dtype))) {
    pack();
    dequantize_packed();
  }

  void pack() {
    kernels::pack(layout_, {bytes(parts_.data), parts_.scale.data_ptr(), shift()}, packed(),
                  parallel_for, isa());
  }
  void unpack() {
    kernels::unpack(layout_, packed(), {bytes(parts_.data), parts_.scale.data_ptr(), shift()},
                    parallel_for, isa());
  }
  void dequantize() {
    kernels::dequantize_canonical(isa(), layout_.spec(),
                                  {bytes(parts_.data), parts_.scale.data_ptr(), shift()}, 0,
                                  value_.size(0), type_, value_.data_ptr(), parallel_for);
  }
  void dequantize_packed() {
    kernels::dequantize_range(isa(), layout_, packed(), 0, value_.size(0), type_, value_.data_ptr(),
                              parallel_for);
  }

 private:
  static quantal::Isa isa() { return quantal::active_isa().value(); }
  static void parallel_for(std::int64_t count,
                           const std::function<void(std::int64_t, std::int64_t)>& body) {
    at::parallel_for(0, count, 1, body);
  }
  static std::uint8_t* bytes(const torch::Tensor& t) {
    return static_cast<std::uint8_t*>(t.data_ptr());
  }
  std::byte* packed() { return static_cast<std::byte*>(packed_.data_ptr()); }
  void* shift() { return parts_.shift.defined() ? parts_.shift.data_ptr() : nullptr; }

  quantal::QuantizedParts parts_;
  kernels::FloatType type_;
  kernels::PackedLayout layout_;
  torch::Tensor packed_, value_;
};

void convert(benchmark::State& bench, torch::Dtype dtype, const quantal::WeightOptions& options,
             void (Forms::*how)()) {
  Forms forms(dtype, options);
  for (auto _ : bench) (forms.*how)();
  count_bytes(bench, weight_of(dtype));
}

// A new tensor.
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
      add("pack" + of, convert, dtype, options, &Forms::pack);
      add("unpack" + of, convert, dtype, options, &Forms::unpack);
      add("dequantize_canonical" + of, convert, dtype, options, &Forms::dequantize);
      add("dequantize_packed" + of, convert, dtype, options, &Forms::dequantize_packed);
      add("gather" + of, gather, dtype, options, false);
      add("gather_packed" + of, gather, dtype, options, true);
    }
  }
  return true;
}();

}  // namespace
