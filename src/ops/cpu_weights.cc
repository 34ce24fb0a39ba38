#include "ops/cpu_weights.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "kernels/finite.h"
#include "kernels/gather.h"
#include "kernels/quantize_weight.h"
#include "ops/cpu_kernels.h"

namespace quantal {
namespace {

using kernels::FloatType;

bool is_quantizable(const at::Tensor& weight, const QType& qtype, std::int64_t group_size) {
  return is_cpu_activation(weight) && weight.dim() > 0 && weight.numel() > 0 &&
         (qtype.is_affine() || group_size == 0);
}

// One attempt, with scale and shift in `scale_dtype`.
kernels::Quantized quantize_into(WeightCodes& codes, const at::Tensor& weight,
                                 at::ScalarType scale_dtype) {
  const auto scales = scale_shape(codes.qtype, codes.sizes, codes.group_size);
  codes.scale = at::empty(scales, scale_dtype);
  if (codes.qtype.is_affine()) codes.shift = at::empty(scales, scale_dtype);
  const kernels::QuantizeArgs args{
      .spec = {codes.qtype.id, codes.rows(), codes.row_length(), codes.group_size,
               *float_type(scale_dtype)},
      .weight = weight.const_data_ptr(),
      .type = *float_type(weight.scalar_type()),
      .out = {static_cast<std::uint8_t*>(codes.data.data_ptr()), codes.scale.data_ptr(),
              codes.shift.defined() ? codes.shift.data_ptr() : nullptr}};
  return kernels::quantize_weight(kernel_isa(), args, threads_for(weight.numel()));
}

}  // namespace

std::optional<WeightCodes> quantize_on_cpu(const at::Tensor& weight, const QType& qtype,
                                           std::int64_t group_size) {
  using kernels::Quantized;
  if (!is_quantizable(weight, qtype, group_size)) return std::nullopt;
  const at::Tensor dense = weight.detach().contiguous();
  WeightCodes codes{qtype, weight.sizes().vec(), group_size, {}, {}, {}};
  codes.data = weight_memory(data_shape(qtype, codes.sizes, group_size), code_dtype(qtype));
  Quantized done = quantize_into(codes, dense, dense.scalar_type());
  if (done == Quantized::kNeedsFloatScales) done = quantize_into(codes, dense, at::kFloat);
  if (done != Quantized::kDone) return std::nullopt;
  return codes;
}

std::int64_t find_non_finite_on_cpu(const at::Tensor& x) {
  const at::Tensor dense = x.detach().contiguous();
  return kernels::find_non_finite(kernel_isa(), dense.const_data_ptr(),
                                  *float_type(dense.scalar_type()), dense.numel(),
                                  threads_for(dense.numel()));
}

kernels::WeightSpec spec_of(const WeightCodes& codes) {
  return {codes.qtype.id, codes.rows(), codes.row_length(), codes.group_size,
          *float_type(codes.scale.scalar_type())};
}

CanonicalPointers::CanonicalPointers(const WeightCodes& codes)
    : data(codes.data.contiguous()),
      scale(codes.scale.contiguous()),
      shift(codes.shift.defined() ? codes.shift.contiguous() : codes.shift),
      spec(spec_of(codes)) {}

kernels::CanonicalWeight CanonicalPointers::weight() const {
  return {static_cast<const std::uint8_t*>(data.const_data_ptr()), scale.const_data_ptr(),
          data_of(shift)};
}

bool gathers_on_cpu(const WeightCodes& codes, at::ScalarType dtype) {
  return codes.data.device().is_cpu() && !codes.wide && float_type(dtype) &&
         float_type(codes.scale.scalar_type()) &&
         (!codes.shift.defined() || codes.shift.scalar_type() == codes.scale.scalar_type());
}

at::Tensor gather_on_cpu(const WeightCodes& codes, const at::Tensor& indices,
                         at::ScalarType dtype) {
  const at::Tensor rows = indices.contiguous();
  check_indices(rows, codes.rows());
  std::vector<std::int64_t> sizes = codes.sizes;
  sizes[0] = rows.numel();
  at::Tensor value = at::empty(sizes, dtype);
  const CanonicalPointers canonical(codes);
  kernels::gather_rows(kernel_isa(), canonical.spec, canonical.weight(),
                       rows.const_data_ptr<std::int64_t>(), rows.numel(), *float_type(dtype),
                       value.data_ptr(), threads_for(value.numel()));
  return value;
}

at::Tensor dequantize(const WeightCodes& codes, at::ScalarType dtype) {
  // Rows whose last group is short would be a view of whole groups.
  if (!gathers_on_cpu(codes, dtype)) return decode_weight(codes, dtype).contiguous();
  at::Tensor value = at::empty(codes.sizes, dtype);
  dequantize_into(codes, 0, value);
  return value;
}

void dequantize_into(const WeightCodes& codes, std::int64_t begin, const at::Tensor& out) {
  const CanonicalPointers canonical(codes);
  kernels::dequantize_canonical(kernel_isa(), canonical.spec, canonical.weight(), begin,
                                out.size(0), *float_type(out.scalar_type()), out.mutable_data_ptr(),
                                threads_for(out.numel()));
}

void check_indices(const at::Tensor& indices, std::int64_t rows) {
  const auto* first = indices.const_data_ptr<std::int64_t>();
  TORCH_CHECK_INDEX(std::all_of(first, first + indices.numel(),
                                [&](std::int64_t i) { return i >= 0 && i < rows; }),
                    "index out of range in self");
}

}  // namespace quantal
