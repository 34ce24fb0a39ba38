// Depthwise convolution, 8 channels at a time, in plain C++.
#include <cmath>

#include "kernels/grouped_conv.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kVector = GroupedConvPlan::kVector;

template <typename Load>
void gather(const ChannelPixels& from, float* to, const Load& load) {
  for (std::int64_t c = 0; c < from.channels; ++c) {
    const std::int64_t first = from.first + c * from.channel_step;
    for (std::int64_t i = 0; i < from.pixels; ++i) {
      to[i * kVector + c] = load(first + i * from.pixel_step);
    }
  }
}

void gather_floats(const ChannelPixels& from, float* to) {
  gather(from, to, [&](std::int64_t i) { return load_float(from.x, i, from.type); });
}

void gather_codes(const ChannelPixels& from, float* to) {
  const auto* codes = static_cast<const std::int8_t*>(from.x);
  gather(from, to, [&](std::int64_t i) { return static_cast<float>(codes[i]); });
}

// One position.
void sum_taps(const GroupedConvBlock& block, const float* x, const float* weight, float* sums,
              float* x_sums) {
  for (const std::int64_t column : block.plan.columns()) {
    for (std::int64_t c = 0; c < kVector; ++c) {
      sums[c] += x[column + c] * weight[c];
      x_sums[c] += x[column + c];
    }
    weight += kVector;
  }
}

void run_channels(const GroupedConvBlock& block) {
  const std::int64_t row = block.at.row;
  const float* weight = block.rows.weight + row * block.args.shape.taps();
  const auto* const end = block.plan.runs() + block.plan.runs_of(block.at);
  for (const auto* run = block.plan.runs(); run < end; ++run) {
    for (std::int64_t i = 0; i < run->count; ++i) {
      float sums[kVector] = {}, x_sums[kVector] = {};
      sum_taps(block, block.input + run->begin + i * block.plan.position_step(), weight, sums,
               x_sums);
      const std::int64_t to = block.begin + (run->position + i) * block.position_step;
      for (std::int64_t c = 0; c < block.at.rows; ++c) {
        float sum = std::fma(sums[c], block.rows.scale[row + c], 0.0F);
        if (block.rows.shift != nullptr) sum = std::fma(x_sums[c], -block.rows.shift[row + c], sum);
        store_float(block.y, to + c * block.row_step, block.args.type,
                    std::fma(sum, block.x_scale, block.rows.bias[row + c]));
      }
    }
  }
}

}  // namespace

const GroupedConvKernel grouped_conv__portable = {
    .floats = {nullptr, gather_floats},
    .codes = {nullptr, gather_codes},
    .run = {nullptr, nullptr, run_channels},
    .line = nullptr,
};

}  // namespace quantal::kernels
