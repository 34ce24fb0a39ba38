#include "kernels/max_pool.h"

#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"

namespace quantal::kernels {
namespace {

using Extent = MaxPoolArgs::Extent;

std::int64_t elements(const Extent& extent) { return extent[0] * extent[1] * extent[2]; }

// Half of the windows that torch's ceil_mode would add are there, too.
MaxPoolArgs pooling(std::int64_t batch, std::int64_t channels, Extent input, Extent kernel,
                    Extent stride, Extent padding) {
  MaxPoolArgs args{.batch = batch,
                   .channels = channels,
                   .input = input,
                   .kernel = kernel,
                   .stride = stride,
                   .padding = padding};
  for (int i = 0; i < 3; ++i) {
    std::int64_t& size = args.output[i];
    size = (input[i] + 2 * padding[i] - kernel[i]) / stride[i] + 1;
    if (batch % 2 == 0 && size * stride[i] - padding[i] < input[i]) ++size;
  }
  return args;
}

std::vector<MaxPoolArgs> poolings() {
  std::vector<MaxPoolArgs> all;
  for (const std::int64_t batch : {1, 2}) {
    for (const std::int64_t channels : {1, 3, 33, 70}) {
      for (const std::int64_t width : {1, 2, 7, 32, 67}) {
        all.push_back(pooling(batch, channels, {1, 5, width}, {1, 2, 1}, {1, 2, 1}, {0, 1, 0}));
        all.push_back(pooling(batch, channels, {1, 1, width}, {1, 1, 1}, {1, 1, 3}, {0, 0, 0}));
        if (width < 2) continue;
        all.push_back(pooling(batch, channels, {1, 6, width}, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}));
        all.push_back(pooling(batch, channels, {2, 3, width}, {2, 3, 2}, {1, 1, 1}, {1, 1, 1}));
        if (width < 7) continue;
        all.push_back(pooling(batch, channels, {1, 7, width}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}));
        all.push_back(pooling(batch, channels, {3, 4, width}, {2, 2, 5}, {2, 1, 3}, {0, 1, 2}));
      }
    }
  }
  return all;
}

struct Call {
  MaxPoolArgs args;
  std::int64_t in_size, out_size;
  GuardedBytes codes, y;

  Call(const MaxPoolArgs& given, ChannelOrder order, Edge edge = Edge::kLast)
      : args(given),
        in_size(args.batch * args.channels * elements(args.input)),
        out_size(args.batch * args.channels * elements(args.output)),
        codes(in_size, edge),
        y(out_size, edge) {
    std::mt19937 random(3);
    for (std::int64_t i = 0; i < in_size; ++i) codes.data()[i] = static_cast<std::byte>(random());
    args.order = order;
    args.codes = reinterpret_cast<const std::int8_t*>(codes.data());
    args.y = reinterpret_cast<std::int8_t*>(y.data());
  }

  std::int64_t index(std::int64_t sample, std::int64_t channel, std::int64_t pixel,
                     const Extent& extent) const {
    return args.order == ChannelOrder::kPlanes
               ? (sample * args.channels + channel) * elements(extent) + pixel
               : (sample * elements(extent) + pixel) * args.channels + channel;
  }

  int wanted(std::int64_t sample, std::int64_t channel, const Extent& at) const {
    int most = -1000;
    Extent tap{};
    for (std::int64_t t = 0; t < elements(args.kernel); ++t, advance(tap, args.kernel)) {
      std::int64_t pixel = 0;
      bool is_inside = true;
      for (int i = 0; i < 3; ++i) {
        const std::int64_t place = at[i] * args.stride[i] - args.padding[i] + tap[i];
        is_inside = is_inside && place >= 0 && place < args.input[i];
        pixel = pixel * args.input[i] + place;
      }
      if (is_inside) {
        most = std::max<int>(most, args.codes[index(sample, channel, pixel, args.input)]);
      }
    }
    return most;
  }

  void expect_maxima() const {
    for (std::int64_t sample = 0; sample < args.batch; ++sample) {
      for (std::int64_t channel = 0; channel < args.channels; ++channel) {
        Extent at{};
        for (std::int64_t i = 0; i < elements(args.output); ++i, advance(at, args.output)) {
          ASSERT_EQ(args.y[index(sample, channel, i, args.output)], wanted(sample, channel, at))
              << "channel " << channel << " of " << args.channels << ", position " << i
              << ", width " << args.input[2] << ", kernel " << args.kernel[1] << " x "
              << args.kernel[2] << ", stride " << args.stride[2];
        }
      }
    }
  }
};

class MaxPool : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, MaxPool, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(MaxPool, takes_the_largest_code_of_every_window) {
  Edge edge = Edge::kLast;
  for (const MaxPoolArgs& args : poolings()) {
    edge = edge == Edge::kLast ? Edge::kFirst : Edge::kLast;
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      Call call(args, order, edge);
      max_pool(GetParam(), call.args);
      ASSERT_NO_FATAL_FAILURE(call.expect_maxima());
    }
  }
}

TEST_P(MaxPool, divides_among_threads) {
  const auto two_threads = [](std::int64_t count, const auto& run) {
    std::thread other([&] { run(0, count / 2); });
    run(count / 2, count);
    other.join();
  };
  for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
    Call call(pooling(3, 5, {1, 9, 11}, {1, 3, 2}, {1, 2, 2}, {0, 1, 0}), order);
    max_pool(GetParam(), call.args, two_threads);
    call.expect_maxima();
  }
}

TEST_P(MaxPool, takes_nothing) {
  Call call(pooling(0, 5, {1, 9, 11}, {1, 3, 2}, {1, 2, 2}, {0, 1, 0}), ChannelOrder::kPlanes);
  max_pool(GetParam(), call.args);
}

}  // namespace
}  // namespace quantal::kernels
