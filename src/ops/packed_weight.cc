#include "ops/packed_weight.h"

#include <ATen/ATen.h>

#include "kernels/integer_linear.h"
#include "kernels/linear.h"
#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"

namespace quantal {

using kernels::FloatType;
using kernels::PackedLayout;

bool PackedWeight::takes(const WeightCodes& codes) {
  return codes.sizes.size() >= 2 && codes.rows() > 0 && codes.row_length() > 0 && !codes.wide &&
         codes.data.device().is_cpu() && float_type(codes.scale.scalar_type()) &&
         (!codes.shift.defined() || codes.shift.scalar_type() == codes.scale.scalar_type());
}

PackedWeight::PackedWeight(const WeightCodes& codes)
    : qtype_(codes.qtype),
      sizes_(codes.sizes),
      group_size_(codes.group_size),
      scale_dtype_(codes.scale.scalar_type()),
      layout_(spec_of(codes)),
      data_(weight_memory({layout_.size()}, at::kByte)) {
  const at::Tensor data = codes.data.contiguous();
  const at::Tensor scale = codes.scale.contiguous();
  const at::Tensor shift = codes.shift.defined() ? codes.shift.contiguous() : codes.shift;
  kernels::pack(layout_,
                {static_cast<const std::uint8_t*>(data.const_data_ptr()), scale.const_data_ptr(),
                 data_of(shift)},
                static_cast<std::byte*>(data_.data_ptr()), threads_for(rows() * columns()),
                kernel_isa());
}

bool PackedWeight::is_integer() const { return !qtype_.is_floating_point; }

std::int64_t PackedWeight::nbytes() const {
  const std::int64_t scales = rows() * layout_.groups() * (qtype_.is_affine() ? 2 : 1);
  return kernels::canonical_data_size(layout_.spec()) +
         scales * static_cast<std::int64_t>(c10::elementSize(scale_dtype_));
}

WeightCodes PackedWeight::codes() const {
  const auto scales = scale_shape(qtype_, sizes_, group_size_);
  WeightCodes codes{qtype_, sizes_, group_size_, {}, {}, {}};
  codes.data = at::empty(data_shape(qtype_, sizes_, group_size_), code_dtype(qtype_));
  codes.scale = at::empty(scales, scale_dtype_);
  if (qtype_.is_affine()) codes.shift = at::empty(scales, scale_dtype_);
  kernels::unpack(layout_, tile_of(0),
                  {static_cast<std::uint8_t*>(codes.data.data_ptr()), codes.scale.data_ptr(),
                   qtype_.is_affine() ? codes.shift.data_ptr() : nullptr},
                  threads_for(rows() * columns()), kernel_isa());
  return codes;
}

at::Tensor PackedWeight::decode(std::int64_t begin, std::int64_t count,
                                at::ScalarType dtype) const {
  if (!float_type(dtype)) {
    return decode_rows(at::arange(begin, begin + count, at::kLong), dtype);
  }
  at::Tensor value = at::empty(sizes_of(count), dtype);
  kernels::dequantize_range(kernel_isa(), layout_, tile_of(0), begin, count, *float_type(dtype),
                            value.data_ptr(), threads_for(count * columns()));
  return value;
}

at::Tensor PackedWeight::decode_rows(const at::Tensor& indices, at::ScalarType dtype) const {
  if (!float_type(dtype)) return quantal::decode_rows(codes(), indices, dtype);
  const at::Tensor rows = indices.contiguous();
  check_indices(rows, this->rows());
  at::Tensor value = at::empty(sizes_of(rows.numel()), dtype);
  kernels::dequantize_rows(layout_, tile_of(0), rows.const_data_ptr<std::int64_t>(), rows.numel(),
                           *float_type(dtype), value.data_ptr(),
                           threads_for(rows.numel() * columns()));
  return value;
}

bool PackedWeight::takes_activations(const at::Tensor& x) { return is_cpu_activation(x); }

at::Tensor PackedWeight::linear(const at::Tensor& x, const at::Tensor& bias, std::int64_t begin,
                                std::int64_t count) const {
  const at::Tensor tokens = as_tokens(x, columns());
  at::Tensor y = output_for(x, count, x.scalar_type());
  const PackedLayout layout = layout_of(count);
  const at::Tensor added = kernel_bias(bias, count);
  const kernels::LinearArgs args{.layout = &layout,
                                 .weight = tile_of(begin),
                                 .tokens = tokens.size(0),
                                 .type = *float_type(x.scalar_type()),
                                 .x = data_of(tokens),
                                 .x_stride = tokens.stride(0),
                                 .y = y.data_ptr(),
                                 .y_stride = count,
                                 .bias = data_of(added)};
  kernels::find_linear(kernel_isa(), layout.spec())(args,
                                                    threads_for(args.tokens * count * columns()));
  return with_bias(std::move(y), bias, count);
}

at::Tensor PackedWeight::dynamic_linear(const at::Tensor& x, const at::Tensor& bias,
                                        std::int64_t begin, std::int64_t count,
                                        std::optional<float> output_scale) const {
  const at::Tensor tokens = as_tokens(x, columns());
  const at::ScalarType dtype = x.scalar_type();
  return integer_linear({.tokens = tokens.size(0),
                         .x = data_of(tokens),
                         .type = *float_type(dtype),
                         .stride = tokens.stride(0)},
                        dtype, bias, begin, output_for(x, count, output_scale ? at::kChar : dtype),
                        output_scale);
}

at::Tensor PackedWeight::static_linear(const at::Tensor& codes, float scale, at::ScalarType dtype,
                                       const at::Tensor& bias, std::int64_t begin,
                                       std::int64_t count,
                                       std::optional<float> output_scale) const {
  const at::Tensor tokens = as_tokens(codes, columns());
  return integer_linear({.tokens = tokens.size(0),
                         .stride = tokens.stride(0),
                         .codes = tokens.const_data_ptr<std::int8_t>(),
                         .scale = scale},
                        dtype, bias, begin,
                        output_for(codes, count, output_scale ? at::kChar : dtype), output_scale);
}

at::Tensor PackedWeight::integer_linear(const kernels::TokenSource& source, at::ScalarType dtype,
                                        const at::Tensor& bias, std::int64_t begin, at::Tensor y,
                                        std::optional<float> output_scale) const {
  const std::int64_t count = y.size(-1);
  const PackedLayout layout = layout_of(count);
  const at::Tensor added = kernel_bias(bias, count);
  kernels::IntegerLinearArgs args{.layout = &layout,
                                  .weight = tile_of(begin),
                                  .source = source,
                                  .type = *float_type(dtype),
                                  .bias = data_of(added)};
  const kernels::ParallelFor threads = threads_for(source.tokens * count * columns());
  if (output_scale) {
    const bool adds_all = added.defined() == bias.defined();
    const bool have_codes =
        adds_all && kernels::integer_linear_codes(kernel_isa(), args, *output_scale,
                                                  y.mutable_data_ptr<std::int8_t>(), threads);
    return have_codes ? y : at::Tensor();
  }
  args.y = y.mutable_data_ptr(), args.y_stride = count;
  kernels::find_integer_linear(kernel_isa(), layout.spec())(args, threads);
  return with_bias(std::move(y), bias, count);
}

std::vector<std::int64_t> PackedWeight::sizes_of(std::int64_t rows) const {
  std::vector<std::int64_t> sizes = sizes_;
  sizes[0] = rows;
  return sizes;
}

PackedLayout PackedWeight::layout_of(std::int64_t count) const {
  kernels::WeightSpec spec = layout_.spec();
  spec.rows = count;
  return PackedLayout(spec);
}

const std::byte* PackedWeight::tile_of(std::int64_t row) const {
  return static_cast<const std::byte*>(data_.const_data_ptr()) +
         row / PackedLayout::kTileRows * layout_.tile_bytes();
}

}  // namespace quantal
