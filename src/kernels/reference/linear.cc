// The plain reading of the packed layout: complete, on every processor, and what the tuned kernels
// are compared with.
#include "kernels/linear.h"

#include <vector>

namespace quantal::kernels {
namespace {

float dot(const LinearArgs& args, const float* row, std::int64_t token) {
  float sum = 0;
  for (std::int64_t c = 0; c < args.layout->spec().columns; ++c) {
    sum += row[c] * load_float(args.x, token * args.x_stride + c, args.type);
  }
  return sum;
}

}  // namespace

void linear__portable(const LinearArgs& args, const ParallelFor& parallel_for) {
  const WeightSpec& spec = args.layout->spec();
  parallel_for(spec.rows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> values(spec.columns);
    for (std::int64_t row = begin; row < end; ++row) {
      dequantize_rows(*args.layout, args.weight, &row, 1, FloatType::kF32, values.data());
      const float bias = args.bias != nullptr ? load_float(args.bias, row, args.type) : 0.0F;
      for (std::int64_t token = 0; token < args.tokens; ++token) {
        store_float(args.y, token * args.y_stride + row, args.type,
                    dot(args, values.data(), token) + bias);
      }
    }
  });
}

}  // namespace quantal::kernels
