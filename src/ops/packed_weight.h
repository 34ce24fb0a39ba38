#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/token_codes.h"
#include "ops/weight_codes.h"

namespace quantal {

/// A quantized weight as the CPU's kernels read it (kernels/packed_layout.h): a matrix (rows,
/// columns), the dimensions after the first as one.
class PackedWeight {
 public:
  /// Whether kernels take it: it has elements, is on the CPU, and fp32 computes its values.
  static bool takes(const WeightCodes& codes);

  /// Precondition: takes(codes).
  explicit PackedWeight(const WeightCodes& codes);

  std::int64_t rows() const { return layout_.spec().rows; }
  std::int64_t columns() const { return layout_.spec().columns; }
  /// True where integer_linear() takes it.
  bool is_integer() const;
  /// Bytes of the canonical form.
  std::int64_t nbytes() const;

  /// The layout of `rows` rows alone, and where a row's tile begins: what kernels are called with.
  kernels::PackedLayout layout_of(std::int64_t rows) const;
  const std::byte* tile_of(std::int64_t row) const;

  /// What it was made of, bit for bit.
  WeightCodes codes() const;
  /// Rows [begin, begin + count) of the float value.
  at::Tensor decode(std::int64_t begin, std::int64_t count, at::ScalarType dtype) const;
  /// Rows `indices` (1-D, int64) of the float value.
  at::Tensor decode_rows(const at::Tensor& indices, at::ScalarType dtype) const;

  /// Whether the linears below compute rows [begin, …) alone: tiles are not cut.
  static bool begins_tile(std::int64_t row) { return row % kernels::PackedLayout::kTileRows == 0; }
  /// Activations that the kernels read.
  static bool takes_activations(const at::Tensor& x);

  /// x · wᵀ + bias over rows [begin, begin + count): x (…, columns), bias of x's dtype or
  /// undefined, (count) or what broadcasts to the result; in x's dtype. Precondition:
  /// takes_activations(x), begins_tile(begin).
  at::Tensor linear(const at::Tensor& x, const at::Tensor& bias, std::int64_t begin,
                    std::int64_t count) const;
  /// The same with x quantized to int8, one scale a token. Precondition: is_integer() too. With an
  /// `output_scale` it is int8 codes of that scale, as int8_codes() makes them, or undefined where
  /// there are none: of a NaN, or with a bias that is not (count).
  at::Tensor dynamic_linear(const at::Tensor& x, const at::Tensor& bias, std::int64_t begin,
                            std::int64_t count,
                            std::optional<float> output_scale = std::nullopt) const;
  /// The same over int8 codes x (…, columns) of one scale; in `dtype`.
  at::Tensor static_linear(const at::Tensor& codes, float scale, at::ScalarType dtype,
                           const at::Tensor& bias, std::int64_t begin, std::int64_t count,
                           std::optional<float> output_scale = std::nullopt) const;

 private:
  /// Into `y`, (…, count) numbers of `dtype` or codes of `output_scale`; undefined as above.
  at::Tensor integer_linear(const kernels::TokenSource& source, at::ScalarType dtype,
                            const at::Tensor& bias, std::int64_t begin, at::Tensor y,
                            std::optional<float> output_scale) const;
  /// Sizes of `rows` rows.
  std::vector<std::int64_t> sizes_of(std::int64_t rows) const;

  QType qtype_;
  std::vector<std::int64_t> sizes_;
  std::int64_t group_size_;
  at::ScalarType scale_dtype_;
  kernels::PackedLayout layout_;
  at::Tensor data_;  ///< bytes
};

}  // namespace quantal
