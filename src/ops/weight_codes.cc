#include "ops/weight_codes.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ops/cpu_weights.h"

namespace quantal {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t product_after_first(at::IntArrayRef sizes) {
  std::int64_t product = 1;
  for (size_t i = 1; i < sizes.size(); ++i) product *= sizes[i];
  return product;
}

std::vector<std::int64_t> per_row_shape(at::IntArrayRef sizes) {
  std::vector<std::int64_t> shape(sizes.size(), 1);
  if (!sizes.empty()) shape[0] = sizes[0];
  return shape;
}

// The shape of the codes before packing.
std::vector<std::int64_t> code_shape(at::IntArrayRef sizes, std::int64_t group) {
  if (group == 0) return sizes.vec();
  return {sizes[0] * ceil_div(product_after_first(sizes), group), group};
}

// Undoes to_groups: (groups, group_size) back to `sizes`, dropping the padding of a short group.
at::Tensor from_groups(const at::Tensor& groups, at::IntArrayRef sizes, std::int64_t group_size) {
  if (group_size == 0) return groups.reshape(sizes);
  const std::int64_t row_length = product_after_first(sizes);
  at::Tensor rows = groups.reshape({sizes[0], ceil_div(row_length, group_size) * group_size});
  if (rows.size(1) != row_length) rows = rows.narrow(1, 0, row_length);
  return rows.reshape(sizes);
}

// Rounds a computed value to the dtype that a caller asked for. It saturates where it may round
// past the largest number: 57344 * scale in fp16, values that are computed in fp64 for that very
// reason.
at::Tensor round_value(const at::Tensor& value, at::ScalarType dtype) {
  if (dtype == at::kHalf) return value.clamp(-65504, 65504).to(dtype);
  if (value.scalar_type() != at::kDouble || dtype == at::kDouble) return value.to(dtype);
  const double largest = dtype == at::kBFloat16 ? 0x1.FEp127 : 0x1.FFFFFEp127;
  return value.clamp(-largest, largest).to(dtype);
}

// Of the magnitudes.
double largest(const at::Tensor& values) {
  constexpr std::int64_t kFew = 2048;  // operations of ATen would take longer
  const bool is_few = values.numel() <= kFew && values.is_contiguous() &&
                      values.device().is_cpu() && values.scalar_type() == at::kFloat;
  if (!is_few) return values.abs().max().item<double>();
  const auto* first = values.const_data_ptr<float>();
  return std::accumulate(first, first + values.numel(), 0.0F,
                         [](float most, float value) { return std::max(most, std::abs(value)); });
}

}  // namespace

std::int64_t WeightCodes::row_length() const { return product_after_first(sizes); }

std::int64_t WeightCodes::groups_per_row() const {
  return group_size == 0 ? 1 : ceil_div(row_length(), group_size);
}

std::int64_t WeightCodes::nbytes() const {
  std::int64_t total = 0;
  for (const at::Tensor& part : {data, scale, shift}) {
    if (part.defined()) total += static_cast<std::int64_t>(part.nbytes());
  }
  return total;
}

at::ScalarType code_dtype(const QType& qtype) {
  switch (qtype.id) {
    case QTypeId::kInt2:
    case QTypeId::kInt4:
      return at::kByte;
    case QTypeId::kInt8:
      return at::kChar;
    case QTypeId::kFloat8E4M3FN:
      return at::kFloat8_e4m3fn;
    case QTypeId::kFloat8E4M3FNUZ:
      return at::kFloat8_e4m3fnuz;
    case QTypeId::kFloat8E5M2:
      return at::kFloat8_e5m2;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown qtype");
}

std::vector<std::int64_t> data_shape(const QType& qtype, at::IntArrayRef sizes,
                                     std::int64_t group) {
  std::vector<std::int64_t> shape = code_shape(sizes, group);
  if (qtype.is_affine()) shape[0] = ceil_div(shape[0], 8 / qtype.bits);
  return shape;
}

std::vector<std::int64_t> scale_shape(const QType& qtype, at::IntArrayRef sizes,
                                      std::int64_t group) {
  if (group == 0) return per_row_shape(sizes);
  return {sizes[0] * ceil_div(product_after_first(sizes), group), 1};
}

at::Tensor to_groups(const at::Tensor& weight, std::int64_t group_size) {
  const at::Tensor value = weight.detach().to(arithmetic_dtype(weight.scalar_type()));
  const std::int64_t rows = weight.size(0);
  const std::int64_t row_length = product_after_first(weight.sizes());
  at::Tensor matrix = value.reshape({rows, row_length});
  if (group_size == 0) return matrix;
  if (const std::int64_t rest = row_length % group_size; rest != 0 && rows > 0) {
    // Repeating the last element leaves the group's minimum, maximum and absmax as they are.
    const at::Tensor last = matrix.narrow(1, row_length - 1, 1).expand({rows, group_size - rest});
    matrix = at::cat({matrix, last}, 1);
  }
  return matrix.reshape({-1, group_size});
}

at::Tensor cast_codes(const at::Tensor& values, const QType& qtype) {
  if (qtype.is_floating_point) return values.clamp(qtype.qmin, qtype.qmax).to(code_dtype(qtype));
  return values.round().clamp_(qtype.qmin, qtype.qmax).to(code_dtype(qtype));
}

WeightCodes encode_groups(const at::Tensor& groups, at::IntArrayRef sizes, const QType& qtype,
                          std::int64_t group_size, const at::Tensor& scale,
                          const at::Tensor& shift) {
  WeightCodes codes{qtype, sizes.vec(), group_size, {}, {}, {}};
  codes.wide = is_wide(scale, shift, qtype.bits);
  const at::Tensor value = codes.wide ? groups.to(at::kDouble) : groups;
  const at::Tensor divisor = scale.to(value.scalar_type());
  if (qtype.is_affine()) {
    const double levels = (1 << qtype.bits) - 1;
    const at::Tensor values = ((value + shift.to(value.scalar_type())) / divisor).round_();
    codes.data = pack_codes(
        values.clamp_(0, levels).to(at::kByte).reshape(code_shape(sizes, group_size)), qtype.bits);
    codes.shift = shift.reshape(scale_shape(qtype, sizes, group_size)).contiguous();
  } else {
    codes.data = cast_codes(value / divisor, qtype).reshape(sizes);
  }
  codes.scale = scale.reshape(scale_shape(qtype, sizes, group_size)).contiguous();
  return codes;
}

bool is_wide(const at::Tensor& scale, const at::Tensor& shift, int bits) {
  if (!shift.defined() || scale.scalar_type() == at::kHalf || scale.numel() == 0) return false;
  const double span = largest(scale) * ((1 << bits) - 1);
  return span + largest(shift) > std::numeric_limits<float>::max() / 2;
}

at::Tensor decode_weight(const WeightCodes& codes, at::ScalarType dtype) {
  const at::ScalarType compute = codes.wide ? at::kDouble : arithmetic_dtype(dtype);
  const at::Tensor scale = codes.scale.to(compute);
  if (!codes.qtype.is_affine()) return round_value(codes.data.to(compute).mul_(scale), dtype);
  const std::int64_t rows = code_shape(codes.sizes, codes.group_size)[0];
  at::Tensor value = unpack_codes(codes.data, codes.qtype.bits, rows).to(compute);
  value.mul_(scale).sub_(codes.shift.to(compute));
  return round_value(from_groups(value, codes.sizes, codes.group_size), dtype);
}

at::Tensor decode_rows(const WeightCodes& codes, const at::Tensor& indices, at::ScalarType dtype) {
  if (gathers_on_cpu(codes, dtype)) return gather_on_cpu(codes, indices, dtype);
  std::vector<std::int64_t> sizes = codes.sizes;
  sizes[0] = indices.numel();
  WeightCodes rows{codes.qtype, sizes, codes.group_size, {}, {}, {}, codes.wide};
  const std::int64_t per_row = codes.groups_per_row();
  at::Tensor groups = indices;
  if (per_row > 1) {
    groups = (indices.unsqueeze(1) * per_row + at::arange(per_row, indices.options())).flatten();
  }
  rows.scale = codes.scale.index_select(0, groups);
  if (!codes.qtype.is_affine()) {
    // float8 has no index_select: the codes move as bytes.
    rows.data = codes.data.view(at::kChar).index_select(0, indices).view(codes.data.scalar_type());
    return decode_weight(rows, dtype);
  }
  rows.shift = codes.shift.index_select(0, groups);
  const std::int64_t packed_rows = codes.data.size(0);
  const at::Tensor bit = groups.div(packed_rows, "floor").mul_(codes.qtype.bits);
  std::vector<std::int64_t> column(codes.data.dim(), 1);
  column[0] = groups.numel();
  const at::Tensor bytes = codes.data.index_select(0, groups.remainder(packed_rows));
  const at::Tensor values = bytes.bitwise_right_shift(bit.to(at::kByte).reshape(column))
                                .bitwise_and_((1 << codes.qtype.bits) - 1);
  const at::ScalarType compute = codes.wide ? at::kDouble : arithmetic_dtype(dtype);
  at::Tensor value = values.to(compute).mul_(rows.scale.to(compute)).sub_(rows.shift.to(compute));
  return round_value(from_groups(value, sizes, codes.group_size), dtype);
}

at::Tensor pack_codes(const at::Tensor& values, int bits) {
  const std::int64_t per_byte = 8 / bits;
  const std::int64_t rows = values.size(0);
  const std::int64_t packed_rows = ceil_div(rows, per_byte);
  std::vector<std::int64_t> shape = values.sizes().vec();
  shape[0] = packed_rows;
  at::Tensor packed = at::zeros(shape, values.options().dtype(at::kByte));
  for (std::int64_t i = 0; i < per_byte && i * packed_rows < rows; ++i) {
    const std::int64_t count = std::min(packed_rows, rows - i * packed_rows);
    packed.narrow(0, 0, count)
        .bitwise_or_(values.narrow(0, i * packed_rows, count).bitwise_left_shift(bits * i));
  }
  return packed;
}

at::Tensor unpack_codes(const at::Tensor& packed, int bits, std::int64_t rows) {
  std::vector<at::Tensor> parts;
  for (int shift = 0; shift < 8; shift += bits) {
    parts.push_back(packed.bitwise_right_shift(shift).bitwise_and_((1 << bits) - 1));
  }
  return at::cat(parts, 0).narrow(0, 0, rows);
}

}  // namespace quantal
