#include "ops/canonical_weight.h"

#include <ATen/ATen.h>

#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"
#include "ops/fake_quantize.h"

namespace quantal {
namespace {

using kernels::FloatType;

// Elements of a weight that are floats at a time during a backward pass.
constexpr std::int64_t kBlockElements = 1 << 20;

std::int64_t rows_of(const char* op, const at::Tensor& scale, std::int64_t group_size,
                     std::int64_t columns) {
  if (scale.dim() == 0) return 1;
  if (group_size == 0) return scale.size(0);
  const std::int64_t per_row = std::max<std::int64_t>((columns + group_size - 1) / group_size, 1);
  TORCH_CHECK_VALUE(scale.size(0) % per_row == 0, "[quantal::", op, "] expected ", per_row,
                    " scales a row (", columns, " columns in groups of ", group_size, "), got ",
                    scale.size(0), " in all");
  return scale.size(0) / per_row;
}

// A part of the weight as kernels read it: of the expected shape, or as many elements (the scale of
// a single row may be 0-dim).
at::Tensor checked(const char* op, const char* name, const at::Tensor& part,
                   at::IntArrayRef shape) {
  if (part.sizes() == shape) return part.contiguous();
  TORCH_CHECK_VALUE(part.numel() == 1 && c10::multiply_integers(shape) == 1, "[quantal::", op,
                    "] expected ", name, " of shape ", shape, ", got ", part.sizes());
  return part.reshape(shape);
}

}  // namespace

WeightCodes canonical_codes(const char* op, const at::Tensor& data, const at::Tensor& scale,
                            const std::optional<at::Tensor>& shift, const QType& qtype,
                            std::int64_t group_size, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(sizes.size() >= 2 && group_size >= 0 && (group_size == 0 || qtype.is_affine()),
                    "[quantal::", op,
                    "] expected a weight of two dimensions or more in groups that ", qtype.name,
                    " has, got ", sizes, " and group size ", group_size);
  TORCH_CHECK_VALUE(data.scalar_type() == code_dtype(qtype), "[quantal::", op,
                    "] expected data of ", code_dtype(qtype), " for ", qtype.name, ", got ",
                    data.scalar_type());
  TORCH_CHECK_VALUE(at::isFloatingType(scale.scalar_type()) && scale.device() == data.device(),
                    "[quantal::", op, "] expected a float scale on ", data.device(), ", got ",
                    scale.scalar_type(), " on ", scale.device());
  TORCH_CHECK_VALUE((shift && shift->defined()) == qtype.is_affine(), "[quantal::", op,
                    "] expected a shift for qint2 and qint4 alone, got ", qtype.name);
  const auto scales = scale_shape(qtype, sizes, group_size);
  WeightCodes codes{qtype, sizes.vec(), group_size, {}, {}, {}};
  codes.data = checked(op, "data", data, data_shape(qtype, sizes, group_size));
  codes.scale = checked(op, "scale", scale, scales);
  if (qtype.is_affine()) {
    TORCH_CHECK_VALUE(
        shift->scalar_type() == scale.scalar_type() && shift->device() == data.device(),
        "[quantal::", op, "] expected a shift of ", scale.scalar_type(), " on ", data.device(),
        ", got ", shift->scalar_type(), " on ", shift->device());
    codes.shift = checked(op, "shift", *shift, scales);
  }
  return codes;
}

CanonicalMatrix::CanonicalMatrix(const char* op, const at::Tensor& data, const at::Tensor& scale,
                                 const std::optional<at::Tensor>& shift, const QType& qtype,
                                 std::int64_t group_size, const at::Tensor& x)
    : CanonicalMatrix(op, data, scale, shift, qtype, group_size, x.dim() > 0 ? x.size(-1) : 1) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && at::isFloatingType(x.scalar_type()), "[quantal::", op,
                    "] expected a float input of shape (…, in), got ", x.scalar_type(), " ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.device() == data.device(), "[quantal::", op, "] expected input on ",
                    data.device(), ", got ", x.device());
}

CanonicalMatrix::CanonicalMatrix(const char* op, const at::Tensor& data, const at::Tensor& scale,
                                 const std::optional<at::Tensor>& shift, const QType& qtype,
                                 std::int64_t group_size, std::int64_t columns)
    : codes_(canonical_codes(op, data, scale, shift, qtype, group_size,
                             {rows_of(op, scale, group_size, columns), columns})) {}

CanonicalMatrix::CanonicalMatrix(const WeightCodes& codes) : codes_(codes) {
  codes_.sizes = {codes.rows(), codes.row_length()};
  const auto scales = scale_shape(codes.qtype, codes_.sizes, codes.group_size);
  codes_.data = codes.data.reshape(data_shape(codes.qtype, codes_.sizes, codes.group_size));
  codes_.scale = codes.scale.reshape(scales);
  if (codes.shift.defined()) codes_.shift = codes.shift.reshape(scales);
}

at::Tensor CanonicalMatrix::linear(const at::Tensor& x, const at::Tensor& given_bias,
                                   const std::optional<QType>& activations,
                                   const at::Tensor& scale) const {
  const at::Tensor bias = given_bias.defined() ? given_bias.to(x.scalar_type()) : given_bias;
  const bool has_kernels = runs_kernels(x);
  if (has_kernels && activations == qint8 && !codes_.qtype.is_floating_point) {
    at::Tensor y = run_integer(x, bias, scale);
    if (y.defined()) return y;
  }
  at::Tensor input = x;
  if (activations) {
    input = scale.defined() ? fake_quantize_static(x, *activations, scale)
                            : fake_quantize_dynamic(x, *activations, TokenAxis::kLastDim);
  }
  if (has_kernels) return run_float(input, bias);
  return at::linear(input, dequantize(codes_, x.scalar_type()), bias);
}

at::Tensor CanonicalMatrix::times(const at::Tensor& grad) const {
  const at::Tensor rows = grad.reshape({-1, codes_.rows()});
  const std::int64_t columns = codes_.row_length();
  std::vector<std::int64_t> sizes = grad.sizes().vec();
  sizes.back() = columns;
  if (codes_.rows() * columns <= kBlockElements || grad.scalar_type() == at::kDouble) {
    return rows.mm(dequantize(codes_, grad.scalar_type())).reshape(sizes);
  }
  // Sums of several blocks stay in fp32.
  const std::int64_t step = std::max<std::int64_t>(kBlockElements / columns, 1);
  at::Tensor sum = at::zeros({rows.size(0), columns}, grad.options().dtype(at::kFloat));
  for (std::int64_t i = 0; i < codes_.rows(); i += step) {
    const std::int64_t count = std::min(step, codes_.rows() - i);
    const at::Tensor block = decode_rows(
        codes_, at::arange(i, i + count, grad.options().dtype(at::kLong)), grad.scalar_type());
    sum.add_(rows.narrow(1, i, count).mm(block));
  }
  return sum.to(grad.scalar_type()).reshape(sizes);
}

bool CanonicalMatrix::runs_kernels(const at::Tensor& x) const {
  return is_cpu_activation(x) && float_type(codes_.scale.scalar_type()) && codes_.rows() > 0 &&
         codes_.row_length() > 0;
}

at::Tensor CanonicalMatrix::run_float(const at::Tensor& x, const at::Tensor& bias) const {
  const at::Tensor tokens = as_tokens(x, codes_.row_length());
  const at::Tensor added = kernel_bias(bias, codes_.rows());
  at::Tensor y = output_for(x, codes_.rows(), x.scalar_type());
  const CanonicalPointers canonical(codes_);
  const kernels::PackedLayout whole(canonical.spec);
  const kernels::LinearArgs args{.layout = &whole,
                                 .tokens = tokens.size(0),
                                 .type = *float_type(x.scalar_type()),
                                 .x = data_of(tokens),
                                 .x_stride = tokens.stride(0),
                                 .y = y.data_ptr(),
                                 .y_stride = codes_.rows(),
                                 .bias = data_of(added)};
  kernels::linear_from_canonical(kernel_isa(), args, canonical.weight(),
                                 threads_for(args.tokens * codes_.rows() * codes_.row_length()));
  return with_bias(std::move(y), bias, codes_.rows());
}

at::Tensor CanonicalMatrix::run_integer(const at::Tensor& x, const at::Tensor& bias,
                                        const at::Tensor& scale) const {
  const at::Tensor tokens = as_tokens(x, codes_.row_length());
  const at::Tensor added = kernel_bias(bias, codes_.rows());
  kernels::TokenSource source{.tokens = tokens.size(0)};
  std::optional<at::Tensor> codes;
  if (scale.defined()) {
    source.scale = scale.item<float>();
    codes = int8_codes(tokens.contiguous(), source.scale);
    if (!codes) return {};
    source.codes = codes->const_data_ptr<std::int8_t>();
    source.stride = codes->stride(0);
  } else {
    source.x = data_of(tokens);
    source.type = *float_type(x.scalar_type());
    source.stride = tokens.stride(0);
  }
  at::Tensor y = output_for(x, codes_.rows(), x.scalar_type());
  const CanonicalPointers canonical(codes_);
  const kernels::PackedLayout whole(canonical.spec);
  const kernels::IntegerLinearArgs args{.layout = &whole,
                                        .source = source,
                                        .type = *float_type(x.scalar_type()),
                                        .y = y.data_ptr(),
                                        .y_stride = codes_.rows(),
                                        .bias = data_of(added)};
  kernels::integer_linear_from_canonical(
      kernel_isa(), args, canonical.weight(),
      threads_for(source.tokens * codes_.rows() * codes_.row_length()));
  return with_bias(std::move(y), bias, codes_.rows());
}

}  // namespace quantal
