// Every instruction set's kernels beside the portable ones, over shapes, types and numbers that the
// input's bytes choose: a fuzz target of libFuzzer's form, which random_main.cc runs too.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/activation_codes.h"
#include "kernels/canonical_linear.h"
#include "kernels/problem.h"
#include "kernels/quantize_weight.h"

namespace quantal::kernels {
namespace {

// The input, from which everything is drawn; zeros after its end.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t next() { return at_ < size_ ? data_[at_++] : std::uint8_t{0}; }
  /// One of [0, count).
  std::int64_t below(std::int64_t count) { return (next() << 8 | next()) % count; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "kernels differ: %s\n", what.c_str());
  std::abort();
}

WeightSpec draw_spec(Bytes& bytes) {
  WeightSpec spec{.qtype = kAllTypes[bytes.below(kAllTypes.size())]};
  const bool is_affine = spec.qtype == QTypeId::kInt2 || spec.qtype == QTypeId::kInt4;
  spec.rows = 1 + bytes.below(70);
  spec.columns = 1 + bytes.below(400);
  if (is_affine) spec.group_size = 8 * bytes.below(18);
  // Many kernels are for whole groups and rows that share bytes.
  if (bytes.below(2) == 0) {
    spec.rows *= 4;
    spec.columns = std::max<std::int64_t>(spec.group_size, 16) * (1 + spec.columns / 100);
  }
  spec.scale_type = kFloatTypes[bytes.below(3)];
  return spec;
}

void draw_tokens(Bytes& bytes, Problem& problem) {
  for (auto& code : problem.codes) code = static_cast<std::int8_t>(bytes.next());
  for (std::int64_t i = 0; i < problem.tokens * problem.spec.columns; ++i) {
    const auto bits = static_cast<std::int16_t>(bytes.next() << 8 | bytes.next());
    store_float(problem.x.data(), i, problem.type, std::ldexp(static_cast<float>(bits), -10));
  }
}

std::vector<std::byte> run_canonical(const Problem& problem, const Call& call) {
  return problem.run(call, [&](const Operands& operands) {
    linear_from_canonical(call.isa,
                          {.layout = &problem.layout,
                           .tokens = call.tokens,
                           .type = problem.type,
                           .x = operands.x,
                           .x_stride = operands.x_stride,
                           .y = operands.y,
                           .y_stride = operands.y_stride,
                           .bias = operands.bias},
                          problem.weight.canonical(), call.parallel_for);
  });
}

// Both may miss the exact sum by γ · Σ|x|·|w|, and each rounds its output.
void compare_sums(const Problem& problem, const Call& call, const std::vector<std::byte>& got,
                  const std::vector<std::byte>& wanted) {
  const std::int64_t rows = problem.spec.rows, columns = problem.spec.columns;
  const double gamma = static_cast<double>(columns + 4) * 0x1p-24;
  for (std::int64_t i = 0; i < call.tokens * rows; ++i) {
    const double a = load_float(got.data(), i, problem.type);
    const double b = load_float(wanted.data(), i, problem.type);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    double size = std::abs(load_float(problem.bias.data(), i % rows, problem.type));
    for (std::int64_t k = 0; k < columns; ++k) {
      const double x = load_float(problem.x.data(), i / rows * columns + k, problem.type);
      size += std::abs(x) * (std::abs(problem.weight.value(i % rows, k)) + 8);
    }
    const double bound = 2 * gamma * size + 2 * epsilon_of(problem.type) * std::abs(b);
    const bool overflows = problem.type == FloatType::kF16 && std::abs(a) + bound >= 65504;
    require(overflows || std::abs(a - b) <= bound, problem.name(call));
  }
}

void compare_linears(const Problem& problem, Call call) {
  const Call portable{.tokens = call.tokens, .has_bias = call.has_bias};
  const bool is_integer = find_integer_linear(Isa::kPortable, problem.spec) != nullptr;
  const auto floats = run_linear(problem, portable);
  for (const Isa isa : supported_isas()) {
    call.isa = isa;
    const auto got = run_linear(problem, call);
    compare_sums(problem, call, got, floats);
    compare_sums(problem, call, run_canonical(problem, call), floats);
    if (!is_integer) continue;
    for (const bool has_codes : {false, true}) {
      require(run_integer(problem, has_codes, call) == run_integer(problem, has_codes, portable),
              "integer " + problem.name(call));
    }
  }
}

// Any bits, NaN and infinity too.
void compare_quantizing(Bytes& bytes, const WeightSpec& spec, FloatType type) {
  const std::int64_t count = spec.rows * spec.columns;
  std::vector<std::byte> weight(count * size_of(type));
  const bool is_wild = bytes.below(4) == 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<std::int16_t>(bytes.next() << 8 | bytes.next());
    store_float(weight.data(), i, type, std::ldexp(static_cast<float>(bits), -12));
  }
  if (is_wild) {
    for (auto& byte : weight) byte = static_cast<std::byte>(bytes.next());
  }
  WeightSpec wanted_spec = spec;
  wanted_spec.scale_type = bytes.below(2) == 0 ? FloatType::kF32 : type;
  const std::int64_t scales = spec.rows * PackedLayout(spec).groups() * 4;
  std::vector<std::byte> first;
  std::vector<std::int8_t> first_codes;
  for (auto isa = supported_isas().rbegin(); isa != supported_isas().rend(); ++isa) {
    const std::int64_t data = (canonical_data_size(spec) + 3) / 4 * 4;
    std::vector<std::byte> out(4 + data + 2 * scales);  // what was said, codes, scales, shifts
    const QuantizeArgs args{.spec = wanted_spec,
                            .weight = weight.data(),
                            .type = type,
                            .out = {reinterpret_cast<std::uint8_t*>(out.data()) + 4,
                                    out.data() + 4 + data, out.data() + 4 + data + scales}};
    const Quantized said = quantize_weight(*isa, args, in_parts(3));
    if (said != Quantized::kDone) std::fill(out.begin(), out.end(), std::byte{0});
    out[0] = static_cast<std::byte>(said);
    std::vector<std::int8_t> codes(count);
    if (!quantize_codes(*isa, weight.data(), type, count, 0.01F, codes.data())) codes.clear();
    if (first.empty()) {
      first = out;
      first_codes = codes;
    }
    require(out == first, "quantize_weight " + std::string(isa_name(*isa)));
    require(codes == first_codes, "quantize_codes " + std::string(isa_name(*isa)));
  }
}

}  // namespace
}  // namespace quantal::kernels

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace quantal::kernels;
  Bytes bytes(data, size);
  const std::int64_t parts = 1 + bytes.below(4), gap = bytes.below(3);
  const bool has_bias = bytes.below(2) == 0;
  const WeightSpec spec = draw_spec(bytes);
  const FloatType type = kFloatTypes[bytes.below(3)];
  Problem problem(spec, type, 1 + bytes.below(20));
  draw_tokens(bytes, problem);
  compare_linears(problem, {.tokens = problem.tokens,
                            .has_bias = has_bias,
                            .gap = gap,
                            .parallel_for = in_parts(parts)});
  compare_quantizing(bytes, problem.spec, problem.type);
  return 0;
}
