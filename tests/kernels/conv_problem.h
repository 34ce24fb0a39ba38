#pragma once

#include <algorithm>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/activation_codes.h"
#include "kernels/guarded_bytes.h"
#include "kernels/integer_conv.h"
#include "kernels/integer_linear.h"
#include "kernels/problem.h"
#include "kernels/weights.h"

namespace quantal::kernels {

/// Convolutions of every kind: strides, dilation, padding, one to three dimensions, groups.
inline const std::vector<ConvShape>& odd_shapes() {
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
      // Of whole registers of rows, and of too many rows and columns to go without patches.
      {.batch = 2, .channels = 6, .rows = 48, .groups = 3, .input = {1, 4, 11}},
      {.channels = 17,
       .rows = 20,
       .input = {1, 9, 13},
       .kernel = {1, 3, 3},
       .stride = {1, 1, 2},
       .padding = {0, 2, 3},
       .dilation = {1, 2, 1}},
      {.batch = 2,
       .channels = 18,
       .rows = 34,
       .input = {3, 4, 6},
       .kernel = {2, 1, 3},
       .stride = {1, 2, 1},
       .padding = {1, 0, 1}},
      {.channels = 34,
       .rows = 50,
       .groups = 2,
       .input = {1, 7, 10},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
      {.batch = 3, .channels = 11, .rows = 18, .input = {1, 1, 40}, .kernel = {1, 1, 5}},
  };
  return all;
}

/// What a convolution is of.
struct ConvCase {
  ConvShape shape;
  QTypeId qtype = QTypeId::kInt8;
  std::int64_t group_size = 0;
  FloatType type = FloatType::kF32;
  ChannelOrder order = ChannelOrder::kPlanes;
  Edge edge = Edge::kLast;

  std::int64_t input_index(std::int64_t sample, std::int64_t channel, std::int64_t pixel) const {
    const std::int64_t in_sample = order == ChannelOrder::kPlanes
                                       ? channel * shape.pixels() + pixel
                                       : pixel * shape.channels + channel;
    return sample * shape.channels * shape.pixels() + in_sample;
  }
  std::int64_t output_index(std::int64_t sample, std::int64_t row, std::int64_t position) const {
    return order == ChannelOrder::kPlanes
               ? (sample * shape.rows + row) * shape.positions() + position
               : (sample * shape.positions() + position) * shape.rows + row;
  }

  /// Where what the kernel covers lies in the input, index by index; -1 in the padding.
  std::vector<std::int64_t> patch(std::int64_t sample, std::int64_t group,
                                  const ConvShape::Extent& at) const {
    std::vector<std::int64_t> found;
    for (std::int64_t ch = 0; ch < shape.group_channels(); ++ch) {
      ConvShape::Extent tap{};
      for (std::int64_t t = 0; t < shape.taps(); ++t, advance(tap, shape.kernel)) {
        std::int64_t pixel = 0;
        bool inside = true;
        for (int i = 0; i < 3; ++i) {
          const std::int64_t x =
              at[i] * shape.stride[i] + tap[i] * shape.dilation[i] - shape.padding[i];
          inside = inside && x >= 0 && x < shape.input[i];
          pixel = pixel * shape.input[i] + x;
        }
        const std::int64_t channel = group * shape.group_channels() + ch;
        found.push_back(inside ? input_index(sample, channel, pixel) : -1);
      }
    }
    return found;
  }

  std::string name() const {
    std::ostringstream text;
    text << type_name(qtype) << " g" << group_size << " type " << static_cast<int>(type)
         << (order == ChannelOrder::kLast ? " last" : " planes");
    for (const std::int64_t n : {shape.batch, shape.channels, shape.rows, shape.groups}) {
      text << ' ' << n;
    }
    for (const ConvShape::Extent& e :
         {shape.input, shape.kernel, shape.stride, shape.padding, shape.dilation}) {
      text << " | " << e[0] << ' ' << e[1] << ' ' << e[2];
    }
    return text.str();
  }
};

/// Codes, weight, bias, scales and output of one convolution, all of them against guard pages.
struct ConvProblem {
  ConvCase c;
  ConvShape shape;
  WeightSpec spec;
  PackedLayout layout;
  RandomWeight weight;
  GuardedBytes packed, codes, bias, y, scale_bytes;
  float* scales;

  explicit ConvProblem(const ConvCase& given)
      : c(given),
        shape(c.shape),
        spec{c.qtype, shape.rows, shape.columns(), c.group_size, FloatType::kF32},
        layout(spec),
        weight(spec),
        packed(layout.size(), c.edge),
        codes(shape.batch * shape.channels * shape.pixels(), c.edge),
        bias(shape.rows * size_of(c.type), c.edge),
        y(size(), c.edge),
        scale_bytes(shape.batch * 4, c.edge),
        scales(reinterpret_cast<float*>(scale_bytes.data())) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < shape.batch * shape.channels * shape.pixels(); ++i) {
      codes.data()[i] = static_cast<std::byte>(random());
    }
    for (std::int64_t i = 0; i < shape.rows; ++i) {
      store_float(bias.data(), i, c.type, normal(random));
    }
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      scales[n] = 0.01F * static_cast<float>(n + 1);
    }
    repack();
  }

  void repack() const { pack(layout, weight.canonical(), packed.data()); }

  std::int64_t size() const {
    return shape.batch * shape.rows * shape.positions() * size_of(c.type);
  }

  IntegerConvArgs args() const {
    return {.shape = shape,
            .layout = &layout,
            .weight = packed.data(),
            .codes = reinterpret_cast<const std::int8_t*>(codes.data()),
            .order = c.order,
            .scales = scales,
            .type = c.type,
            .y = y.data(),
            .bias = bias.data()};
  }

  std::vector<std::byte> run(Isa isa, const ParallelFor& parallel_for = serial_for) {
    std::fill_n(y.data(), y.size(), std::byte{0x5A});
    EXPECT_TRUE(integer_conv(isa, args(), parallel_for));
    return {y.data(), y.data() + size()};
  }

  /// As codes; nothing where the kernel says that there is a NaN.
  std::optional<std::vector<std::int8_t>> run_to_codes(
      Isa isa, float y_scale, const ParallelFor& parallel_for = serial_for) {
    const std::int64_t count = size() / size_of(c.type);
    const GuardedBytes out(count, c.edge);
    IntegerConvArgs call = args();
    call.y = out.data();
    call.y_scale = y_scale;
    if (!integer_conv(isa, call, parallel_for)) return std::nullopt;
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

  /// The codes under the kernel.
  std::vector<std::int8_t> patch(std::int64_t sample, std::int64_t group,
                                 const ConvShape::Extent& at) const {
    std::vector<std::int8_t> found;
    for (const std::int64_t i : c.patch(sample, group, at)) {
      found.push_back(i < 0 ? std::int8_t{0} : static_cast<std::int8_t>(codes.data()[i]));
    }
    return found;
  }

  /// Each position is a token of the plain integer linear, over the tiles that hold its group.
  std::vector<std::byte> expected() const {
    std::vector<std::byte> out(size()), row(shape.rows * size_of(c.type));
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      ConvShape::Extent at{};
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
            store_float(out.data(), c.output_index(n, r, p), c.type,
                        load_float(row.data(), r - first, c.type));
          }
        }
      }
    }
    return out;
  }
};

}  // namespace quantal::kernels
