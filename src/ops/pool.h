#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace quantal {

/// Arguments of a max pooling over the last `dims` dimensions: one number for all of them, or one
/// each; an empty stride is the kernel's size.
struct PoolParams {
  std::int64_t dims;
  at::IntArrayRef kernel_size, stride, padding, dilation;
};

/// Max pooling of int8 codes (channels, …) or (batch, channels, …) on the CPU; `like` has the
/// output's sizes. Nothing where windows are dilated, since one may have no pixel then.
std::optional<at::Tensor> max_pool_codes(const at::Tensor& codes, const at::Tensor& like,
                                         const PoolParams& params);

}  // namespace quantal
