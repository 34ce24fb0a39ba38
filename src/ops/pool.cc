#include "ops/pool.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "kernels/max_pool.h"
#include "ops/cpu_kernels.h"
#include "ops/packed_conv.h"

namespace quantal {
std::optional<at::Tensor> max_pool_codes(const at::Tensor& codes, const at::Tensor& like,
                                         const PoolParams& params) {
  const bool is_dilated = std::any_of(params.dilation.begin(), params.dilation.end(),
                                      [](std::int64_t step) { return step != 1; });
  if (is_dilated) return std::nullopt;
  const std::int64_t dims = params.dims, channel = codes.dim() - dims - 1;
  const at::MemoryFormat format = codes.suggest_memory_format();
  const at::Tensor input = codes.contiguous(format);
  at::Tensor y = at::empty(like.sizes(), input.options(), format);
  const at::IntArrayRef stride = params.stride.empty() ? params.kernel_size : params.stride;
  kernels::max_pool(
      kernel_isa(),
      {.batch = channel == 0 ? 1 : input.size(0),
       .channels = input.size(channel),
       .input = spread(input.sizes().slice(channel + 1), dims, 1),
       .output = spread(y.sizes().slice(channel + 1), dims, 1),
       .kernel = spread(params.kernel_size, dims, 1),
       .stride = spread(stride, dims, 1),
       .padding = spread(params.padding, dims, 0),
       .order = format == at::MemoryFormat::Contiguous ? kernels::ChannelOrder::kPlanes
                                                       : kernels::ChannelOrder::kLast,
       .codes = input.const_data_ptr<std::int8_t>(),
       .y = y.mutable_data_ptr<std::int8_t>()},
      threads_for(input.numel()));
  return y;
}

}  // namespace quantal
