// Every instruction set's kernels beside the exact result or the portable kernels, over shapes,
// types and numbers that the input's bytes choose, and between pages that they must not touch: a
// fuzz target of libFuzzer's form, which random_main.cc runs too. With clang, libFuzzer searches
// for inputs that reach new code, once this file is linked without random_main.cc:
//   clang++ -std=c++20 -fsanitize=fuzzer,address … fuzz/kernels_fuzz.cc …; ./a.out -max_len=8192
// Any failure ends the program, GoogleTest's too.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/activation_codes.h"
#include "kernels/conv_problem.h"
#include "kernels/exact.h"
#include "kernels/gather.h"
#include "kernels/quantize_weight.h"
#include "kernels/tap_conv.h"

namespace quantal::kernels {
namespace {

// The input, from which everything is drawn; after its end random numbers that follow from it, so
// that short inputs fill large problems.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {
    std::seed_seq seed(data, data + size);
    random_.seed(seed);
  }
  std::uint8_t next() { return at_ < size_ ? data_[at_++] : static_cast<std::uint8_t>(random_()); }
  /// One of [0, count).
  std::int64_t below(std::int64_t count) { return (next() << 8 | next()) % count; }
  bool one_in(std::int64_t count) { return below(count) == 0; }
  template <typename T, std::size_t count>
  T one_of(const T (&values)[count]) {
    return values[below(count)];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
  std::mt19937 random_;
};

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "kernels differ: %s\n", what.c_str());
  std::abort();
}

WeightSpec draw_spec(Bytes& bytes) {
  WeightSpec spec{.qtype = kAllTypes[bytes.below(kAllTypes.size())]};
  spec.rows = bytes.one_in(30) ? 0 : 1 + bytes.below(70);
  spec.columns = 1 + bytes.below(400);
  if (is_affine(spec.qtype)) spec.group_size = 8 * bytes.below(18);
  // Many kernels are for whole groups and rows that share bytes.
  if (bytes.one_in(2)) {
    spec.rows *= 4;
    spec.columns = std::max<std::int64_t>(spec.group_size, 16) * (1 + spec.columns / 100);
  }
  spec.scale_type = bytes.one_of(kFloatTypes);
  return spec;
}

// None, a few or as many as have kernels of their own.
std::int64_t draw_token_count(Bytes& bytes) {
  if (bytes.one_in(16)) return 0;
  return 1 + bytes.below(bytes.one_in(12) ? 140 : 20);
}

// Common numbers, or subnormal ones too; some tokens with a NaN or an infinity.
void draw_tokens(Bytes& bytes, Problem& problem) {
  for (auto& code : problem.codes) code = static_cast<std::int8_t>(bytes.next());
  const bool is_tiny = bytes.one_in(8), is_wild = bytes.one_in(6);
  const int least = !is_tiny ? -10 : problem.type == FloatType::kF16 ? -30 : -150;
  for (std::int64_t i = 0; i < problem.tokens * problem.spec.columns; ++i) {
    const auto bits = static_cast<std::int16_t>(bytes.next() << 8 | bytes.next());
    store_float(problem.x.data(), i, problem.type, std::ldexp(static_cast<float>(bits), least));
  }
  const float wild[] = {INFINITY, -INFINITY, NAN};
  for (std::int64_t t = 0; t < problem.tokens && is_wild; ++t) {
    if (!bytes.one_in(3)) continue;
    const std::int64_t at = t * problem.spec.columns + bytes.below(problem.spec.columns);
    store_float(problem.x.data(), at, problem.type, bytes.one_of(wild));
  }
}

void compare_float_linears(const Problem& problem, Call call, bool is_whole) {
  const Exact exact(problem);
  const auto check = [&](const std::vector<std::byte>& y) {
    is_whole ? exact.check_whole(call, y) : exact.check(call, y);
  };
  for (const Isa isa : supported_isas()) {
    call.isa = isa;
    const auto packed = run_linear(problem, call), canonical = run_canonical(problem, call);
    check(packed);
    check(canonical);
    const bool has_same_kernel = call.tokens > kFewCanonicalTokens;
    for (std::int64_t i = 0; i < std::ssize(packed) / size_of(problem.type); ++i) {
      const float one = load_float(packed.data(), i, problem.type);
      const float other = load_float(canonical.data(), i, problem.type);
      require(!has_same_kernel || one == other || (std::isnan(one) && std::isnan(other)),
              "canonical " + problem.name(call));
    }
  }
}

void compare_integer_linears(const Problem& problem, Call call) {
  if (find_integer_linear(Isa::kPortable, problem.spec) == nullptr) return;
  const Call portable{.tokens = call.tokens, .has_bias = call.has_bias};
  for (const bool has_codes : {false, true}) {
    const auto wanted = run_integer(problem, has_codes, portable);
    const auto equals = [&](const std::vector<std::byte>& y) {
      for (std::int64_t i = 0; i < std::ssize(wanted) / size_of(problem.type); ++i) {
        const float one = load_float(y.data(), i, problem.type);
        const float other = load_float(wanted.data(), i, problem.type);
        if (one != other && !(std::isnan(one) && std::isnan(other))) return false;
      }
      return y.size() == wanted.size();
    };
    for (const Isa isa : supported_isas()) {
      call.isa = isa;
      require(equals(run_integer(problem, has_codes, call)), "integer " + problem.name(call));
      require(equals(run_integer_canonical(problem, has_codes, call)),
              "integer canonical " + problem.name(call));
    }
  }
}

// Packing and back, and rows of both forms as numbers.
void compare_weights(Bytes& bytes, const RandomWeight& weight, FloatType type) {
  const WeightSpec& spec = weight.spec;
  const Edge edge = bytes.one_of(kEdges);
  const GuardedPacked packed(weight, edge);
  const GuardedCanonical canonical(weight, edge);
  for (const Isa isa : supported_isas()) {
    const GuardedCanonical unpacked(spec, edge);
    unpack(packed.layout, packed.data(), unpacked.room(), in_parts(3), isa);
    require(unpacked.equals(weight), "unpack " + std::string(isa_name(isa)));
  }
  const std::int64_t begin = bytes.below(spec.rows + 1);
  const std::int64_t count = bytes.below(spec.rows - begin + 1);
  const std::int64_t size = count * spec.columns * size_of(type);
  std::vector<std::int64_t> rows(count);
  std::iota(rows.begin(), rows.end(), begin);
  const GuardedBytes wanted(size, edge);
  dequantize_rows(packed.layout, packed.data(), rows.data(), count, type, wanted.data());
  for (const Isa isa : supported_isas()) {
    const GuardedBytes again(packed.layout.size(), edge), range(size, edge), gathered(size, edge);
    pack(packed.layout, canonical.get(), again.data(), in_parts(2), isa);
    require(std::ranges::equal(again.span(), packed.bytes.span()), "pack");
    dequantize_range(isa, packed.layout, packed.data(), begin, count, type, range.data(),
                     in_parts(2));
    require(std::ranges::equal(range.span(), wanted.span()), "dequantize_range");
    gather_rows(isa, spec, canonical.get(), rows.data(), count, type, gathered.data());
    require(std::ranges::equal(gathered.span(), wanted.span()), "gather_rows");
  }
}

ConvShape draw_shape(Bytes& bytes) {
  ConvShape shape{.batch = 1 + bytes.below(2), .groups = 1 + bytes.below(3)};
  shape.channels = shape.groups * (1 + bytes.below(12));
  shape.rows = shape.groups * (1 + bytes.below(20));
  if (bytes.one_in(3)) {
    // Whole registers of channels, or any.
    if (bytes.one_in(2)) shape.channels = 8 * (1 + bytes.below(5));
    shape.groups = shape.rows = shape.channels;
  } else if (bytes.one_in(3)) {
    // Whole steps of channels, and tiles of rows or groups that fit one.
    constexpr std::int64_t kGroupRows[] = {4, 8, 16, 20, 48};
    shape.groups = 1 + bytes.below(8);
    shape.channels = shape.groups * 4 * (1 + bytes.below(6));
    shape.rows = shape.groups * bytes.one_of(kGroupRows);
  }
  constexpr std::int64_t kMostTaps[] = {2, 4, 7}, kMorePixels[] = {4, 4, 24};
  for (int i = 0; i < 3; ++i) {
    shape.kernel[i] = 1 + bytes.below(kMostTaps[i]);
    shape.stride[i] = 1 + bytes.below(3);
    shape.padding[i] = bytes.below(3);
    shape.dilation[i] = 1 + bytes.below(2);
    const std::int64_t reach = shape.dilation[i] * (shape.kernel[i] - 1) + 1;
    shape.input[i] =
        std::max<std::int64_t>(1, reach - 2 * shape.padding[i]) + bytes.below(kMorePixels[i]);
  }
  return shape;
}

// Codes of any value, or the largest and least ones.
void compare_convs(Bytes& bytes) {
  const QTypeId qtype = kAllTypes[bytes.below(3)];
  ConvProblem problem({.shape = draw_shape(bytes),
                       .qtype = qtype,
                       .group_size = is_affine(qtype) ? 8 * bytes.below(4) : 0,
                       .type = bytes.one_of(kFloatTypes),
                       .order = bytes.one_in(2) ? ChannelOrder::kLast : ChannelOrder::kPlanes,
                       .edge = bytes.one_of(kEdges)});
  const std::uint8_t extremes[] = {0x80, 0x7F, 0xFF, 0x00};
  const bool is_extreme = bytes.one_in(3);
  const auto code = [&] { return is_extreme ? bytes.one_of(extremes) : bytes.next(); };
  std::generate_n(problem.codes.data(), problem.codes.size(), [&] { return std::byte{code()}; });
  if (is_extreme) std::ranges::generate(problem.weight.data, code);
  problem.repack();
  const auto wanted = problem.expected();
  const auto wanted_codes = problem.expected_codes(0.7F);
  for (const Isa isa : supported_isas()) {
    const std::string name = std::string(isa_name(isa)) + " conv " + problem.c.name();
    require(problem.run(isa, in_parts(2)) == wanted, name);
    require(problem.run_to_codes(isa, 0.7F) == wanted_codes, name + " to codes");
    // Whether it takes less time or not.
    if (find_tap_conv(isa, problem.shape, problem.layout) == nullptr) continue;
    std::fill_n(problem.y.data(), problem.y.size(), std::byte{0x5A});
    require(conv_by_taps(isa, problem.args(), in_parts(2)), name + " by taps");
    require(std::ranges::equal(problem.y.span(), wanted), name + " by taps");
  }
}

/// A weight that is to be quantized, and what every instruction set must make of it.
struct Quantizing {
  WeightSpec spec;
  FloatType type;
  std::vector<std::byte> weight;
  std::int64_t count() const { return spec.rows * spec.columns; }

  /// What was said, codes, scales and shifts. Where scales have to be fp32 it is called again, as
  /// its caller does: for a weight with a NaN, too, any instruction set may say so first.
  std::vector<std::byte> quantized(Isa isa) const {
    const std::int64_t scales = spec.rows * PackedLayout(spec).groups() * 4;
    const std::int64_t data = (canonical_data_size(spec) + 3) / 4 * 4;
    std::vector<std::byte> out(4 + data + 2 * scales);
    QuantizeArgs args{.spec = spec,
                      .weight = weight.data(),
                      .type = type,
                      .out = {reinterpret_cast<std::uint8_t*>(out.data()) + 4,
                              out.data() + 4 + data, out.data() + 4 + data + scales}};
    Quantized said = quantize_weight(isa, args, in_parts(3));
    if (said == Quantized::kNeedsFloatScales) {
      std::ranges::fill(out, std::byte{0});
      args.spec.scale_type = FloatType::kF32;
      said = quantize_weight(isa, args, in_parts(3));
    }
    if (said != Quantized::kDone) std::ranges::fill(out, std::byte{0});
    out[0] = static_cast<std::byte>(said);
    return out;
  }

  /// Codes of one scale; none where there is a NaN.
  std::vector<std::int8_t> codes(Isa isa) const {
    std::vector<std::int8_t> found(count());
    if (!quantize_codes(isa, weight.data(), type, count(), 0.01F, found.data())) found.clear();
    return found;
  }
};

// Any bits, NaN and infinity too.
void compare_quantizing(Bytes& bytes, const WeightSpec& spec, FloatType type) {
  if (spec.rows == 0) return;
  Quantizing problem{.spec = spec, .type = type, .weight = {}};
  problem.weight.resize(problem.count() * size_of(type));
  const bool is_wild = bytes.one_in(4);
  for (std::int64_t i = 0; i < problem.count(); ++i) {
    const auto bits = static_cast<std::int16_t>(bytes.next() << 8 | bytes.next());
    store_float(problem.weight.data(), i, type, std::ldexp(static_cast<float>(bits), -12));
  }
  if (is_wild) {
    for (auto& byte : problem.weight) byte = static_cast<std::byte>(bytes.next());
  }
  problem.spec.scale_type = bytes.one_in(2) ? FloatType::kF32 : type;
  const auto wanted = problem.quantized(Isa::kPortable);
  const auto wanted_codes = problem.codes(Isa::kPortable);
  for (const Isa isa : supported_isas()) {
    const std::string name(isa_name(isa));
    require(problem.quantized(isa) == wanted, "quantize_weight " + name);
    require(problem.codes(isa) == wanted_codes, "quantize_codes " + name);
  }
}

void compare_kernels(Bytes& bytes) {
  const std::int64_t parts = 1 + bytes.below(4), gap = bytes.below(3), distance = bytes.below(4);
  const bool has_bias = bytes.one_in(2), is_whole = bytes.one_in(4);
  const Edge edge = bytes.one_of(kEdges);
  const WeightSpec spec = draw_spec(bytes);
  const FloatType type = bytes.one_of(kFloatTypes);
  Problem problem(spec, type, draw_token_count(bytes));
  draw_tokens(bytes, problem);
  if (is_whole) problem.make_whole();
  const Call call{.tokens = problem.tokens,
                  .has_bias = has_bias,
                  .gap = gap,
                  .parallel_for = in_parts(parts),
                  .edge = edge,
                  .distance = distance};
  compare_float_linears(problem, call, is_whole);
  compare_integer_linears(problem, call);
  compare_weights(bytes, problem.weight, type);
  compare_quantizing(bytes, spec, type);
  compare_convs(bytes);
}

}  // namespace
}  // namespace quantal::kernels

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  GTEST_FLAG_SET(break_on_failure, true);
  quantal::kernels::Bytes bytes(data, size);
  quantal::kernels::compare_kernels(bytes);
  return 0;
}
