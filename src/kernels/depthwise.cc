#include "kernels/depthwise.h"

#include <cmath>

#include "kernels/variants.h"

namespace quantal::kernels {

DepthwiseKernel find_depthwise(Isa isa) {
  return best_variant<DepthwiseKernel>(isa, {
#if defined(__x86_64__)
                                                {Isa::kAvx2, depthwise__avx2},
#endif
                                                {Isa::kPortable, depthwise__portable}});
}

void depthwise_channels(const DepthwiseArgs& args, std::int64_t first) {
  const DepthwiseWeight& w = args.weight;
  const std::int64_t pairs = (w.taps + 1) / 2;
  for (std::int64_t i = 0; i < args.positions; ++i) {
    const std::int8_t* const* pixels = args.pixels + i * 2 * pairs;
    for (std::int64_t c = first; c < w.channels; ++c) {
      std::int32_t total = 0, x_sum = 0;
      for (std::int64_t tap = 0; tap < w.taps; ++tap) {
        const auto x = static_cast<std::int32_t>(pixels[tap][c]);
        total += w.codes[(tap / 2 * w.channels + c) * 2 + tap % 2] * x;
        x_sum += x;
      }
      float sum = std::fma(static_cast<float>(total), w.scale[c], 0.0F);
      if (w.shift != nullptr) sum = std::fma(static_cast<float>(x_sum), -w.shift[c], sum);
      const float bias = args.bias != nullptr ? load_float(args.bias, c, args.type) : 0.0F;
      store_float(args.y, i * w.channels + c, args.type, std::fma(sum, args.scale, bias));
    }
  }
}

void depthwise__portable(const DepthwiseArgs& args) { depthwise_channels(args, 0); }

}  // namespace quantal::kernels
