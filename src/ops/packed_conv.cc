#include "ops/packed_conv.h"

#include <ATen/ATen.h>

#include "kernels/activation_codes.h"
#include "kernels/canonical_linear.h"
#include "kernels/grouped_conv.h"
#include "kernels/integer_conv.h"
#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"

namespace quantal {
namespace {

using kernels::ChannelOrder;
using kernels::ConvShape;

// Contiguous, in x's memory format.
at::Tensor dense(const at::Tensor& x) { return x.contiguous(x.suggest_memory_format()); }

// Of a dense tensor.
ChannelOrder order_of(const at::Tensor& x) {
  return x.suggest_memory_format() == at::MemoryFormat::Contiguous ? ChannelOrder::kPlanes
                                                                   : ChannelOrder::kLast;
}

// Batch, rows and the output's dimensions, of which there are `dims` - 2.
std::vector<std::int64_t> output_sizes(const ConvShape& shape, std::int64_t dims) {
  const ConvShape::Extent size = shape.output();
  std::vector<std::int64_t> sizes{shape.batch, shape.rows};
  sizes.insert(sizes.end(), size.end() - (dims - 2), size.end());
  return sizes;
}

// Uninitialised, in the memory format of x, which is dense.
at::Tensor conv_output(const ConvShape& shape, const at::Tensor& x, at::ScalarType dtype) {
  return at::empty(output_sizes(shape, x.dim()), x.options().dtype(dtype),
                   x.suggest_memory_format());
}

// Samples that a kernel takes at once: their input is copied to fp32.
constexpr std::int64_t kCopiedElements = 1 << 24;

// Calls kernel(args, parallel_for) with all arguments but the weight, for some samples after the
// others.
template <typename Kernel>
at::Tensor run_float_conv(const ConvShape& shape, const kernels::PackedLayout& layout,
                          const at::Tensor& x, const at::Tensor& bias, const Kernel& kernel) {
  const at::Tensor input = dense(x), added = bias.defined() ? bias.contiguous() : bias;
  at::Tensor y = conv_output(shape, input, x.scalar_type());
  const std::int64_t taken = shape.channels * shape.pixels(),
                     given = shape.rows * shape.positions();
  const std::int64_t step = std::max<std::int64_t>(1, kCopiedElements / taken);
  const auto* const from = static_cast<const std::byte*>(input.const_data_ptr());
  auto* const to = static_cast<std::byte*>(y.mutable_data_ptr());
  const kernels::FloatType type = *float_type(x.scalar_type());
  for (std::int64_t begin = 0; begin < shape.batch; begin += step) {
    ConvShape part = shape;
    part.batch = std::min(step, shape.batch - begin);
    kernel(kernels::FloatConvArgs{.shape = part,
                                  .layout = &layout,
                                  .type = type,
                                  .order = order_of(input),
                                  .x = from + begin * taken * size_of(type),
                                  .y = to + begin * given * size_of(type),
                                  .bias = data_of(added)},
           threads_for(part.products()));
  }
  return y;
}

template <typename Element>
void write_all_patches(const ConvShape& shape, const at::Tensor& x, at::Tensor& patches) {
  const auto* input = static_cast<const Element*>(x.const_data_ptr());
  auto* out = static_cast<Element*>(patches.mutable_data_ptr());
  const std::int64_t positions = shape.positions(), stride = patches.stride(0);
  // A thread takes a few positions of one sample.
  const std::int64_t step = 8, parts = (positions + step - 1) / step;
  threads_for(patches.numel())(shape.batch * parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t sample = i / parts, first = i % parts * step;
      kernels::write_patches(shape, input + sample * shape.channels * shape.pixels(), first,
                             std::min(step, positions - first),
                             out + (sample * positions + first) * stride, stride);
    }
  });
}

// (batch * positions, columns)
at::Tensor patches_of(const ConvShape& shape, const at::Tensor& x) {
  const bool is_unpadded = shape.padding == ConvShape::Extent{};
  if (is_unpadded && shape.kernel == shape.input) return x.reshape({shape.batch, shape.columns()});
  const bool from_pixels = kernels::patch_order(shape) == ChannelOrder::kLast;
  // (batch, pixels, channels) or (batch, channels, pixels)
  const at::Tensor planes = x.flatten(2);
  const at::Tensor input = (from_pixels ? planes.transpose(1, 2) : planes).contiguous();
  if (shape.is_pointwise()) return input.flatten(0, 1);
  at::Tensor patches = at::empty(
      {shape.batch * shape.positions(), shape.columns() + kernels::kPatchSlack}, x.options());
  if (x.scalar_type() == at::kFloat) {
    write_all_patches<float>(shape, input, patches);
  } else {
    write_all_patches<std::uint16_t>(shape, input, patches);
  }
  return patches.narrow(1, 0, shape.columns());
}

// False where the numbers are as many as no convolution of `dims` dimensions has, or too small.
bool fill(ConvShape::Extent& extent, const std::vector<std::int64_t>& values, std::int64_t dims,
          std::int64_t least) {
  const auto count = static_cast<std::int64_t>(values.size());
  if (count != 1 && count != dims) return false;
  extent = spread(values, dims, extent[0]);
  return std::all_of(extent.begin(), extent.end(), [&](std::int64_t n) { return n >= least; });
}

}  // namespace

ConvShape::Extent spread(at::IntArrayRef values, std::int64_t dims, std::int64_t other) {
  ConvShape::Extent extent{other, other, other};
  for (std::int64_t i = 0; i < dims; ++i) {
    extent[3 - dims + i] = values[values.size() == 1 ? 0 : i];
  }
  return extent;
}

std::optional<ConvShape> conv_shape(at::IntArrayRef input, at::IntArrayRef weight,
                                    const ConvParams& params) {
  const auto dims = static_cast<std::int64_t>(weight.size()) - 2;
  if (params.transposed || dims < 1 || dims > 3 || input.size() != weight.size() ||
      params.groups < 1 || weight[0] % params.groups != 0 ||
      input[1] != weight[1] * params.groups || c10::multiply_integers(weight) == 0 ||
      c10::multiply_integers(input) == 0) {
    return std::nullopt;
  }
  ConvShape shape{
      .batch = input[0], .channels = input[1], .rows = weight[0], .groups = params.groups};
  for (std::int64_t i = 0; i < dims; ++i) {
    shape.input[3 - dims + i] = input[2 + i];
    shape.kernel[3 - dims + i] = weight[2 + i];
  }
  if (!fill(shape.stride, params.stride, dims, 1) ||
      !fill(shape.padding, params.padding, dims, 0) ||
      !fill(shape.dilation, params.dilation, dims, 1) || shape.positions() < 1) {
    return std::nullopt;
  }
  return shape;
}

SampleCodes quantize_samples(const at::Tensor& x) {
  const at::Tensor values = dense(x);
  SampleCodes result{at::empty_like(values, values.options().dtype(at::kChar)),
                     at::empty({x.size(0)}, at::kFloat)};
  const kernels::FloatType type = *float_type(x.scalar_type());
  const std::int64_t count = x.numel() / x.size(0);
  const auto threads = threads_for(count);
  const auto* data = static_cast<const std::byte*>(values.const_data_ptr());
  for (std::int64_t n = 0; n < x.size(0); ++n) {
    const std::byte* sample = data + n * count * size_of(type);
    std::int8_t* codes = result.codes.mutable_data_ptr<std::int8_t>() + n * count;
    const float scale =
        kernels::scale_for(kernels::max_magnitude(kernel_isa(), sample, type, count, threads));
    result.scales.mutable_data_ptr<float>()[n] = scale;
    // Codes do not matter where the scale is NaN, but are no noise either.
    if (!kernels::quantize_codes(kernel_isa(), sample, type, count, scale, codes, threads)) {
      std::fill_n(codes, count, std::int8_t{0});
    }
  }
  return result;
}

at::Tensor integer_convolution(const PackedWeight& weight, std::int64_t begin,
                               const ConvShape& shape, const SampleCodes& x, at::ScalarType dtype,
                               const at::Tensor& bias, std::optional<float> output_scale) {
  const at::Tensor codes = dense(x.codes), scales = x.scales.contiguous();
  at::Tensor y = conv_output(shape, codes, output_scale ? at::kChar : dtype);
  const kernels::PackedLayout layout = weight.layout_of(shape.rows);
  const at::Tensor added = bias.defined() ? bias.contiguous() : bias;
  const bool all_have_codes = kernels::integer_conv(kernel_isa(),
                                                    {.shape = shape,
                                                     .layout = &layout,
                                                     .weight = weight.tile_of(begin),
                                                     .codes = codes.const_data_ptr<std::int8_t>(),
                                                     .order = order_of(codes),
                                                     .scales = scales.const_data_ptr<float>(),
                                                     .type = *float_type(dtype),
                                                     .y = y.mutable_data_ptr(),
                                                     .bias = data_of(added),
                                                     .y_scale = output_scale},
                                                    threads_for(shape.products()));
  return all_have_codes ? y : at::Tensor();
}

ConvWay conv_way(const ConvShape& shape, const at::Tensor& x) {
  return kernels::conv_way(kernel_isa(), shape, order_of(x), *float_type(x.scalar_type()));
}

at::Tensor direct_convolution(const PackedWeight& weight, std::int64_t begin,
                              const ConvShape& shape, const at::Tensor& x, const at::Tensor& bias) {
  const kernels::PackedLayout layout = weight.layout_of(shape.rows);
  return run_float_conv(shape, layout, x, bias,
                        [&](kernels::FloatConvArgs args, const kernels::ParallelFor& threads) {
                          args.weight = weight.tile_of(begin);
                          kernels::float_conv(kernel_isa(), args, threads);
                        });
}

at::Tensor direct_convolution(const WeightCodes& weight, const ConvShape& shape,
                              const at::Tensor& x, const at::Tensor& bias) {
  const CanonicalPointers canonical(weight);
  const kernels::PackedLayout layout(canonical.spec);
  return run_float_conv(
      shape, layout, x, bias,
      [&](const kernels::FloatConvArgs& args, const kernels::ParallelFor& threads) {
        kernels::float_conv_from_canonical(kernel_isa(), args, canonical.weight(), threads);
      });
}

at::Tensor grouped_convolution(const at::Tensor& weight, const ConvShape& shape,
                               const at::Tensor& x, const at::Tensor& bias) {
  const at::Tensor input = dense(x), added = bias.defined() ? bias.contiguous() : bias;
  at::Tensor y = conv_output(shape, input, x.scalar_type());
  kernels::grouped_conv(kernel_isa(),
                        {.shape = shape,
                         .weight = weight.const_data_ptr<float>(),
                         .type = *float_type(x.scalar_type()),
                         .order = order_of(input),
                         .x = input.const_data_ptr(),
                         .y = y.mutable_data_ptr(),
                         .bias = data_of(added)},
                        threads_for(shape.products()));
  return y;
}

at::Tensor patch_convolution(const ConvShape& shape, const at::Tensor& x,
                             const std::function<at::Tensor(const at::Tensor&)>& linear) {
  const at::Tensor y = linear(patches_of(shape, x));
  const std::vector<std::int64_t> sizes = output_sizes(shape, x.dim());
  if (shape.positions() == 1) return y.view(sizes).contiguous(x.suggest_memory_format());
  return y.view({shape.batch, shape.positions(), shape.rows})
      .transpose(1, 2)
      .unflatten(2, at::IntArrayRef(sizes).slice(2))
      .contiguous(x.suggest_memory_format());
}

}  // namespace quantal
