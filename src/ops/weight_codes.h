#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include <quantal/api.h>
#include <quantal/qtype.h>

namespace quantal {

/// A quantized weight in canonical form: optimum-quanto's layout (docs/formats.md), on any device.
///
///   qint8, qfloat8   data: int8/float8, shape `sizes`; scale: (rows, 1, …)
///   qint4, qint2     data: uint8, several codes a byte, first-dimension split;
///                    group_size > 0: codes are (rows * groups_per_row, group_size),
///                      scale and shift (rows * groups_per_row, 1);
///                    group_size = 0: codes are `sizes`, scale and shift (rows, 1, …)
/// rows = sizes[0]. Where group_size does not divide the row, the last group is padded.
struct WeightCodes {
  QType qtype = qint8;
  std::vector<std::int64_t> sizes;
  std::int64_t group_size = 0;
  at::Tensor data;
  at::Tensor scale;
  at::Tensor shift;   ///< undefined for symmetric types
  bool wide = false;  ///< scale * code may overflow fp32: the value is computed in fp64

  std::int64_t rows() const { return sizes.empty() ? 1 : sizes[0]; }
  /// Elements of one row: the product of the dimensions after the first.
  std::int64_t row_length() const;
  std::int64_t groups_per_row() const;
  /// Bytes of data, scale and shift.
  std::int64_t nbytes() const;
};

/// The dtype that holds the codes of `qtype` in canonical form.
at::ScalarType code_dtype(const QType& qtype);

/// The shapes that `data` and `scale` have in canonical form.
std::vector<std::int64_t> data_shape(const QType& qtype, at::IntArrayRef sizes, std::int64_t group);
std::vector<std::int64_t> scale_shape(const QType& qtype, at::IntArrayRef sizes,
                                      std::int64_t group);

/// `weight` as a float matrix of one group a row; a short last group repeats its last element.
at::Tensor to_groups(const at::Tensor& weight, std::int64_t group_size);

/// Codes of a weight of shape `sizes`, as to_groups() gave it, for the given scale and shift, one
/// value a group, shape (groups, 1). Rounds half to even, saturates. fp32 arithmetic (fp64 for
/// double weights).
WeightCodes encode_groups(const at::Tensor& groups, at::IntArrayRef sizes, const QType& qtype,
                          std::int64_t group_size, const at::Tensor& scale,
                          const at::Tensor& shift);

/// Whether codes of this scale and shift need WeightCodes::wide: affine ones whose values or spans
/// come near the largest float.
bool is_wide(const at::Tensor& scale, const at::Tensor& shift, int bits);

/// The float value `scale * code (- shift)`, shape `sizes`, computed in fp32 and rounded once.
at::Tensor decode_weight(const WeightCodes& codes, at::ScalarType dtype);

/// Rows `indices` (1-D, int64) of the float value, without decoding the others.
at::Tensor decode_rows(const WeightCodes& codes, const at::Tensor& indices, at::ScalarType dtype);

/// Unsigned codes `values` (uint8), several a byte: item i holds rows [i*n, (i+1)*n) in bits
/// [bits*i, bits*(i+1)), n = ceil(rows / (8 / bits)).
at::Tensor pack_codes(const at::Tensor& values, int bits);

/// The inverse: the first `rows` rows of the unpacked codes.
at::Tensor unpack_codes(const at::Tensor& packed, int bits, std::int64_t rows);

/// `values` saturated to the range of `qtype` and cast to its code dtype (8-bit types).
at::Tensor cast_codes(const at::Tensor& values, const QType& qtype);

/// fp64 for double tensors, fp32 for every other: the dtype in which codes are computed.
inline at::ScalarType arithmetic_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace quantal
