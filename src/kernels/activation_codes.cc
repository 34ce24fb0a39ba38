#include "kernels/activation_codes.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

// What one thread takes at a time, so that few elements stay on one.
constexpr std::int64_t kChunk = 1 << 14;

void in_chunks(std::int64_t count, const ParallelFor& parallel_for,
               const std::function<void(std::int64_t, std::int64_t)>& body) {
  parallel_for((count + kChunk - 1) / kChunk, [&](std::int64_t begin, std::int64_t end) {
    body(begin * kChunk, std::min(count, end * kChunk));
  });
}

}  // namespace

QuantizeCodes find_quantize_codes(Isa isa) {
  return best_variant<QuantizeCodes>(isa, {
#if defined(__x86_64__)
                                              {Isa::kAvx2, quantize_codes__avx2},
#elif defined(__aarch64__)
                                              {Isa::kNeon, quantize_codes__neon},
#endif
                                              {Isa::kPortable, quantize_codes__portable}});
}

DequantizeCodes find_dequantize_codes(Isa isa) {
  return best_variant<DequantizeCodes>(isa, {
#if defined(__x86_64__)
                                                {Isa::kAvx2, dequantize_codes__avx2},
#elif defined(__aarch64__)
                                                {Isa::kNeon, dequantize_codes__neon},
#endif
                                                {Isa::kPortable, dequantize_codes__portable}});
}

bool quantize_codes(Isa isa, const void* x, FloatType type, std::int64_t count, float scale,
                    std::int8_t* codes, const ParallelFor& parallel_for) {
  const QuantizeCodes quantize = find_quantize_codes(isa);
  std::atomic<bool> is_right{true};
  in_chunks(count, parallel_for, [&](std::int64_t begin, std::int64_t end) {
    if (!quantize(x, type, begin, end, scale, codes)) is_right = false;
  });
  return is_right;
}

void dequantize_codes(Isa isa, const std::int8_t* codes, std::int64_t count, float scale,
                      FloatType type, void* y, const ParallelFor& parallel_for) {
  const DequantizeCodes dequantize = find_dequantize_codes(isa);
  in_chunks(count, parallel_for, [&](std::int64_t begin, std::int64_t end) {
    dequantize(codes, begin, end, scale, type, y);
  });
}

// Bits of numbers that are not negative order as the numbers do, NaN above all.
float max_magnitude(Isa isa, const void* x, FloatType type, std::int64_t count,
                    const ParallelFor& parallel_for) {
  const auto kernel =
      best_variant<MaxMagnitude>(isa, {
#if defined(__x86_64__)
                                          {Isa::kAvx2, max_magnitude__avx2},
#endif
                                          {Isa::kPortable, max_magnitude__portable}});
  std::atomic<std::int32_t> most{0};
  in_chunks(count, parallel_for, [&](std::int64_t begin, std::int64_t end) {
    const float part = kernel(x, type, begin, end);
    const auto bits = std::bit_cast<std::int32_t>(part);
    std::int32_t seen = most;
    while (seen < bits && !most.compare_exchange_weak(seen, bits)) {
    }
  });
  return std::bit_cast<float>(most.load());
}

float scale_for(float magnitude) {
  return std::isfinite(magnitude) ? std::max(magnitude / 127, std::numeric_limits<float>::min())
                                  : std::numeric_limits<float>::quiet_NaN();
}

float max_magnitude__portable(const void* x, FloatType type, std::int64_t begin, std::int64_t end) {
  std::int32_t most = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    most = std::max(most, std::bit_cast<std::int32_t>(std::abs(load_float(x, i, type))));
  }
  return std::bit_cast<float>(most);
}

bool quantize_codes__portable(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                              float scale, std::int8_t* codes) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float value = load_float(x, i, type) / scale;
    if (std::isnan(value)) return false;
    codes[i] = static_cast<std::int8_t>(std::clamp(std::nearbyint(value), -127.0F, 127.0F));
  }
  return true;
}

void dequantize_codes__portable(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                                float scale, FloatType type, void* y) {
  for (std::int64_t i = begin; i < end; ++i) {
    store_float(y, i, type, static_cast<float>(codes[i]) * scale);
  }
}

}  // namespace quantal::kernels
