// How much memory does a linear need beside its operands? Counts what one call takes at once, on
// threads that keep nothing of calls before, for every kind of linear and instruction set.
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include <quantal/isa.h>

#include "kernels/integer_linear.h"
#include "kernels/linear.h"

namespace {

std::atomic<std::int64_t> in_use{0}, most{0};

void* counted(void* memory) {
  if (memory == nullptr) throw std::bad_alloc();
  const std::int64_t now = in_use += static_cast<std::int64_t>(malloc_usable_size(memory));
  for (std::int64_t known = most; known < now && !most.compare_exchange_weak(known, now);) {
  }
  return memory;
}

void release(void* memory) {
  if (memory != nullptr) in_use -= static_cast<std::int64_t>(malloc_usable_size(memory));
  std::free(memory);
}

}  // namespace

void* operator new(std::size_t size) { return counted(std::malloc(size)); }
void* operator new(std::size_t size, std::align_val_t align) {
  const auto step = static_cast<std::size_t>(align);
  return counted(std::aligned_alloc(step, (size + step - 1) / step * step));
}
void operator delete(void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }

namespace {

using namespace quantal;
using namespace quantal::kernels;

constexpr double kMiB = 1 << 20;

struct Options {
  std::int64_t rows = 4096, columns = 4096, tokens = 512, threads = 2;
};

struct Kind {
  const char* name;
  QTypeId qtype;
  std::int64_t group_size;
  bool has_int8_activations;
};
constexpr Kind kKinds[] = {{"int8", QTypeId::kInt8, 0, false},
                           {"int4 g128", QTypeId::kInt4, 128, false},
                           {"int2 g128", QTypeId::kInt2, 128, false},
                           {"float8 e4m3fn", QTypeId::kFloat8E4M3FN, 0, false},
                           {"int8, int8 activations", QTypeId::kInt8, 0, true},
                           {"int4 g128, int8 activations", QTypeId::kInt4, 128, true}};
constexpr std::pair<const char*, FloatType> kTypes[] = {
    {"fp32", FloatType::kF32}, {"bf16", FloatType::kBF16}, {"fp16", FloatType::kF16}};

// Every part on a new thread: what threads keep goes with them.
ParallelFor on_new_threads(std::int64_t parts) {
  return [=](std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
    std::vector<std::jthread> threads;
    for (std::int64_t i = 0; i < parts; ++i) {
      const std::int64_t begin = count * i / parts, end = count * (i + 1) / parts;
      if (begin < end) threads.emplace_back([&body, begin, end] { body(begin, end); });
    }
  };
}

struct Operands {
  std::vector<std::byte> weight, x, y;
};

void run(Isa isa, const Kind& kind, FloatType type, const PackedLayout& layout,
         const Operands& operands, const Options& options) {
  const WeightSpec& spec = layout.spec();
  auto* y = const_cast<std::byte*>(operands.y.data());
  const ParallelFor threads = on_new_threads(options.threads);
  if (kind.has_int8_activations) {
    const IntegerLinearArgs args{.layout = &layout,
                                 .weight = operands.weight.data(),
                                 .source = {.tokens = options.tokens,
                                            .x = operands.x.data(),
                                            .type = type,
                                            .stride = spec.columns},
                                 .type = type,
                                 .y = y,
                                 .y_stride = spec.rows};
    find_integer_linear(isa, spec)(args, threads);
    return;
  }
  const LinearArgs args{.layout = &layout,
                        .weight = operands.weight.data(),
                        .tokens = options.tokens,
                        .type = type,
                        .x = operands.x.data(),
                        .x_stride = spec.columns,
                        .y = y,
                        .y_stride = spec.rows};
  find_linear(isa, spec)(args, threads);
}

/// Bytes beside the operands.
std::int64_t bytes_of(Isa isa, const Kind& kind, FloatType type, const Options& options) {
  const PackedLayout layout(
      {kind.qtype, options.rows, options.columns, kind.group_size, FloatType::kBF16});
  const std::int64_t size = size_of(type);
  const Operands operands{
      .weight = std::vector<std::byte>(layout.size() + PackedLayout::kLineBytes),
      .x = std::vector<std::byte>(options.tokens * options.columns * size),
      .y = std::vector<std::byte>(options.tokens * options.rows * size)};
  const std::int64_t before = in_use;
  most = before;
  std::jthread([&] { run(isa, kind, type, layout, operands, options); }).join();
  return most - before;
}

void print_isa(Isa isa, const Options& options) {
  std::printf(
      "\n%s\n\n| weight | activations | MiB | of the activations | less them, MiB a thread |\n"
      "| --- | --- | --- | --- | --- |\n",
      std::string(isa_name(isa)).c_str());
  for (const Kind& kind : kKinds) {
    for (const auto& [name, type] : kTypes) {
      const auto bytes = static_cast<double>(bytes_of(isa, kind, type, options));
      const auto x = static_cast<double>(options.tokens * options.columns * size_of(type));
      std::printf("| %s | %s | %.1f | %.2f | %.2f |\n", kind.name, name, bytes / kMiB, bytes / x,
                  (bytes - x) / kMiB / static_cast<double>(options.threads));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  std::string isa;
  bool quick = false;
  CLI::App app("Counts the memory that one call of a linear needs beside its operands.");
  app.add_option("--rows", options.rows, "Of the weight")->capture_default_str();
  app.add_option("--columns", options.columns, "Of the weight")->capture_default_str();
  app.add_option("--tokens", options.tokens, "Of the call")->capture_default_str();
  app.add_option("--threads", options.threads, "That share it")->capture_default_str();
  app.add_option("--isa", isa, "This instruction set alone, not all that the machine has");
  app.add_flag("--quick", quick, "A small weight: to see that it runs");
  CLI11_PARSE(app, argc, argv);
  if (quick) options.rows = 64, options.columns = 256, options.tokens = 40;
  std::printf("%lld x %lld, %lld tokens, %lld threads\n", static_cast<long long>(options.rows),
              static_cast<long long>(options.columns), static_cast<long long>(options.tokens),
              static_cast<long long>(options.threads));
  if (isa.empty()) {
    for (const Isa each : supported_isas()) print_isa(each, options);
    return 0;
  }
  const Result<Isa> chosen = choose_isa(isa.c_str());
  if (!chosen.status().ok()) {
    std::fprintf(stderr, "%s\n", std::string(chosen.status().message()).c_str());
    return 1;
  }
  print_isa(chosen.value(), options);
  return 0;
}
