#include "kernels/integer_conv.h"

#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/activation_codes.h"
#include "kernels/guarded_bytes.h"
#include "kernels/integer_linear.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

using Extent = ConvShape::Extent;

constexpr FloatType kFloatTypes[] = {FloatType::kF32, FloatType::kBF16, FloatType::kF16};
const std::vector<QTypeId> kIntegerTypes = {QTypeId::kInt2, QTypeId::kInt4, QTypeId::kInt8};

struct Case {
  ConvShape shape;
  QTypeId qtype = QTypeId::kInt8;
  std::int64_t group_size = 0;
  FloatType type = FloatType::kF32;
  ChannelOrder order = ChannelOrder::kPlanes;

  std::string name() const {
    std::ostringstream text;
    text << type_name(qtype) << " g" << group_size << " type " << static_cast<int>(type)
         << (order == ChannelOrder::kLast ? " last" : " planes");
    for (const std::int64_t n : {shape.batch, shape.channels, shape.rows, shape.groups}) {
      text << ' ' << n;
    }
    for (const Extent& e :
         {shape.input, shape.kernel, shape.stride, shape.padding, shape.dilation}) {
      text << " | " << e[0] << ' ' << e[1] << ' ' << e[2];
    }
    return text.str();
  }
};

// Codes, weight, bias and output of one call, all of them against guard pages.
struct Call {
  Case c;
  ConvShape shape;
  WeightSpec spec;
  PackedLayout layout;
  RandomWeight weight;
  GuardedBytes packed, codes, bias, y;
  std::vector<float> scales;

  explicit Call(const Case& given)
      : c(given),
        shape(c.shape),
        spec{c.qtype, shape.rows, shape.columns(), c.group_size, FloatType::kF32},
        layout(spec),
        weight(spec),
        packed(layout.size()),
        codes(shape.batch * shape.channels * shape.pixels()),
        bias(shape.rows * size_of(c.type)),
        y(size()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < shape.batch * shape.channels * shape.pixels(); ++i) {
      codes.data()[i] = static_cast<std::byte>(random());
    }
    for (std::int64_t i = 0; i < shape.rows; ++i) {
      store_float(bias.data(), i, c.type, normal(random));
    }
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      scales.push_back(0.01F * static_cast<float>(n + 1));
    }
    pack(layout, weight.canonical(), packed.data());
  }

  std::int64_t size() const {
    return shape.batch * shape.rows * shape.positions() * size_of(c.type);
  }

  IntegerConvArgs args() const {
    return {.shape = shape,
            .layout = &layout,
            .weight = packed.data(),
            .codes = reinterpret_cast<const std::int8_t*>(codes.data()),
            .order = c.order,
            .scales = scales.data(),
            .type = c.type,
            .y = y.data(),
            .bias = bias.data()};
  }

  std::vector<std::byte> run(Isa isa, const ParallelFor& parallel_for = serial_for) {
    EXPECT_TRUE(integer_conv(isa, args(), parallel_for));
    return {y.data(), y.data() + size()};
  }

  // As codes; nothing where the kernel says that there is a NaN.
  std::optional<std::vector<std::int8_t>> run_to_codes(Isa isa, float y_scale) {
    const std::int64_t count = size() / size_of(c.type);
    const GuardedBytes out(count);
    IntegerConvArgs call = args();
    call.y = out.data();
    call.y_scale = y_scale;
    if (!integer_conv(isa, call)) return std::nullopt;
    const auto* first = reinterpret_cast<const std::int8_t*>(out.data());
    return std::vector<std::int8_t>(first, first + count);
  }

  std::vector<std::int8_t> expected_codes(float y_scale) const {
    const std::vector<std::byte> numbers = expected();
    std::vector<std::int8_t> found(numbers.size() / size_of(c.type));
    quantize_codes(Isa::kPortable, numbers.data(), c.type, static_cast<std::int64_t>(found.size()),
                   y_scale, found.data());
    return found;
  }

  std::int8_t code(std::int64_t sample, std::int64_t channel, std::int64_t pixel) const {
    const std::int64_t in_sample = c.order == ChannelOrder::kPlanes
                                       ? channel * shape.pixels() + pixel
                                       : pixel * shape.channels + channel;
    return static_cast<std::int8_t>(
        codes.data()[sample * shape.channels * shape.pixels() + in_sample]);
  }

  // The codes under the kernel, index by index.
  std::vector<std::int8_t> patch(std::int64_t sample, std::int64_t group, const Extent& at) const {
    std::vector<std::int8_t> found;
    for (std::int64_t ch = 0; ch < shape.group_channels(); ++ch) {
      Extent tap{};
      for (std::int64_t t = 0; t < shape.taps(); ++t, advance(tap, shape.kernel)) {
        std::int64_t pixel = 0;
        bool inside = true;
        for (int i = 0; i < 3; ++i) {
          const std::int64_t x =
              at[i] * shape.stride[i] + tap[i] * shape.dilation[i] - shape.padding[i];
          inside = inside && x >= 0 && x < shape.input[i];
          pixel = pixel * shape.input[i] + x;
        }
        found.push_back(inside ? code(sample, group * shape.group_channels() + ch, pixel) : 0);
      }
    }
    return found;
  }

  // Each position is a token of the plain integer linear, over the tiles that hold its group.
  std::vector<std::byte> expected() const {
    std::vector<std::byte> out(size()), row(shape.rows * size_of(c.type));
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      Extent at{};
      for (std::int64_t p = 0; p < shape.positions(); ++p, advance(at, shape.output())) {
        for (std::int64_t group = 0; group < shape.groups; ++group) {
          const auto token = patch(n, group, at);
          const std::int64_t begin = group * shape.group_rows(), end = begin + shape.group_rows();
          const std::int64_t tile = begin / PackedLayout::kTileRows;
          const std::int64_t first = tile * PackedLayout::kTileRows;
          WeightSpec part = spec;
          part.rows = end - first;
          const PackedLayout tiles(part);
          const IntegerLinearArgs linear{.layout = &tiles,
                                         .weight = packed.data() + tile * layout.tile_bytes(),
                                         .source = {.tokens = 1,
                                                    .stride = shape.columns(),
                                                    .codes = token.data(),
                                                    .scale = scales[n]},
                                         .type = c.type,
                                         .y = row.data(),
                                         .y_stride = shape.rows,
                                         .bias = bias.data() + first * size_of(c.type)};
          find_integer_linear(Isa::kPortable, part)(linear, serial_for);
          for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t to = c.order == ChannelOrder::kPlanes
                                        ? (n * shape.rows + r) * shape.positions() + p
                                        : (n * shape.positions() + p) * shape.rows + r;
            store_float(out.data(), to, c.type, load_float(row.data(), r - first, c.type));
          }
        }
      }
    }
    return out;
  }
};

const std::vector<ConvShape>& shapes() {
  static const std::vector<ConvShape> all = {
      {.batch = 2, .channels = 3, .rows = 5, .input = {1, 5, 7}, .kernel = {1, 3, 3}},
      {.channels = 1, .rows = 17, .input = {1, 9, 16}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}},
      {.batch = 2,
       .channels = 7,
       .rows = 33,
       .input = {1, 11, 33},
       .kernel = {1, 5, 5},
       .stride = {1, 2, 2},
       .padding = {0, 2, 2}},
      {.channels = 3,
       .rows = 16,
       .input = {1, 15, 31},
       .kernel = {1, 7, 7},
       .stride = {1, 2, 2},
       .padding = {0, 3, 3}},
      {.channels = 4,
       .rows = 3,
       .input = {1, 13, 17},
       .kernel = {1, 3, 2},
       .stride = {1, 1, 3},
       .padding = {0, 4, 5},
       .dilation = {1, 2, 3}},
      {.batch = 3, .channels = 2, .rows = 6, .input = {1, 1, 63}, .kernel = {1, 1, 17}},
      {.channels = 5, .rows = 2, .input = {1, 1, 5}, .kernel = {1, 1, 9}, .padding = {0, 0, 2}},
      {.channels = 2,
       .rows = 9,
       .input = {4, 5, 6},
       .kernel = {2, 3, 1},
       .stride = {2, 1, 2},
       .padding = {1, 1, 1}},
      {.batch = 2, .channels = 15, .rows = 31, .input = {1, 3, 5}},
      {.channels = 33, .rows = 8, .input = {1, 7, 7}, .stride = {1, 2, 2}, .padding = {0, 1, 1}},
      {.channels = 129, .rows = 40, .input = {1, 1, 1}},
      {.channels = 4,
       .rows = 6,
       .groups = 2,
       .input = {1, 6, 6},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
      {.channels = 6, .rows = 96, .groups = 3, .input = {1, 4, 9}, .kernel = {1, 2, 4}},
      {.batch = 2, .channels = 8, .rows = 20, .groups = 4, .input = {1, 5, 3}},
      {.channels = 3, .rows = 6, .groups = 3, .input = {1, 5, 3}, .kernel = {1, 2, 2}},
  };
  return all;
}

const std::vector<ConvShape>& depthwise_shapes() {
  static const std::vector<ConvShape> all = [] {
    std::vector<ConvShape> found;
    for (const std::int64_t channels : {2, 3, 7, 15, 16, 17, 33, 48}) {
      found.push_back({.batch = 2,
                       .channels = channels,
                       .rows = channels,
                       .groups = channels,
                       .input = {1, 7, 9},
                       .kernel = {1, 3, 3},
                       .stride = {1, 2, 1},
                       .padding = {0, 1, 1}});
    }
    const ConvShape wide{.channels = 31, .rows = 31, .groups = 31};
    for (const auto& [input, kernel] :
         std::vector<std::pair<Extent, Extent>>{{{1, 1, 65}, {1, 1, 2}},
                                                {{1, 1, 20}, {1, 1, 15}},
                                                {{3, 5, 7}, {2, 3, 3}},
                                                {{1, 5, 5}, {1, 1, 1}},
                                                {{1, 11, 12}, {1, 5, 5}}}) {
      found.push_back(wide);
      found.back().input = input;
      found.back().kernel = kernel;
      found.back().dilation = {1, 2, 1};
      found.back().padding = {0, 2, 1};
    }
    return found;
  }();
  return all;
}

class IntegerConv : public testing::TestWithParam<std::tuple<Isa, QTypeId>> {
 protected:
  void expect_exact(const ConvShape& shape) {
    const auto [isa, qtype] = GetParam();
    for (const std::int64_t group_size : {0, 8, 32}) {
      if (group_size > 0 && qtype == QTypeId::kInt8) continue;
      for (const FloatType type : kFloatTypes) {
        for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
          Call call({shape, qtype, group_size, type, order});
          ASSERT_EQ(call.run(isa), call.expected()) << call.c.name();
          if (group_size != 0) continue;
          const float y_scale = 0.37F;
          ASSERT_EQ(call.run_to_codes(isa, y_scale), call.expected_codes(y_scale)) << call.c.name();
        }
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, IntegerConv,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kIntegerTypes)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  type_name(std::get<1>(info.param));
                         });

TEST_P(IntegerConv, is_the_integer_linear_of_patches) {
  for (const ConvShape& shape : shapes()) expect_exact(shape);
}

TEST_P(IntegerConv, depthwise_too) {
  for (const ConvShape& shape : depthwise_shapes()) {
    ASSERT_TRUE(shape.is_depthwise());
    expect_exact(shape);
  }
}

TEST_P(IntegerConv, gives_the_same_bits_on_any_number_of_threads_and_in_any_blocks) {
  const auto [isa, qtype] = GetParam();
  const ParallelFor threads = [](std::int64_t count,
                                 const std::function<void(std::int64_t, std::int64_t)>& body) {
    std::vector<std::thread> all;
    const std::int64_t part = (count + 3) / 4;
    for (std::int64_t i = 0; i < count; i += part) {
      all.emplace_back([&, i] { body(i, std::min(count, i + part)); });
    }
    for (auto& thread : all) thread.join();
  };
  // Blocks for every thread, one block that threads share, and several of those.
  for (const auto& [side, channels] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{100, 4}, {9, 3}, {15, 300}}) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      Call call({.shape = {.channels = channels,
                           .rows = 20,
                           .input = {1, side, side},
                           .kernel = {1, 3, 3},
                           .padding = {0, 1, 1}},
                 .qtype = qtype,
                 .order = order});
      const auto one = call.run(isa);
      EXPECT_EQ(one, call.run(isa, threads)) << call.c.name();
      EXPECT_EQ(one, call.expected()) << call.c.name();
    }
  }
}

TEST_P(IntegerConv, a_scale_that_is_nan_spoils_its_sample_only) {
  const auto [isa, qtype] = GetParam();
  for (const std::int64_t groups : {1, 2}) {
    Call call({.shape = {.batch = 2,
                         .channels = 2,
                         .rows = 2,
                         .groups = groups,
                         .input = {1, 4, 4},
                         .kernel = {1, 2, 2}},
               .qtype = qtype});
    call.scales[0] = std::numeric_limits<float>::quiet_NaN();
    const auto y = call.run(isa);
    for (int i = 0; i < 36; ++i) {
      EXPECT_EQ(std::isnan(load_float(y.data(), i, FloatType::kF32)), i < 18);
    }
    EXPECT_FALSE(call.run_to_codes(isa, 1.0F));
    call.scales[0] = 1;
    EXPECT_TRUE(call.run_to_codes(isa, 1.0F));
  }
}

TEST_P(IntegerConv, takes_empty_batches_and_outputs) {
  const auto [isa, qtype] = GetParam();
  Call({.shape = {.batch = 0, .channels = 2, .rows = 3}, .qtype = qtype}).run(isa);
  Call({.shape = {.channels = 2, .rows = 3, .kernel = {1, 2, 2}}, .qtype = qtype}).run(isa);
}

}  // namespace
}  // namespace quantal::kernels
