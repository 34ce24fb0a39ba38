#pragma once

#include <ATen/core/Tensor.h>

/// The operations that torch.nn's attention and encoder layers run at once where nothing needs a
/// gradient: here the same layers as otherwise, each with its quantized kernel and activations.
/// Signatures are ATen's.
namespace quantal {

std::tuple<at::Tensor, at::Tensor> native_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::int64_t embed_dim,
    std::int64_t num_head, const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
    const at::Tensor& proj_weight, const at::Tensor& proj_bias,
    const std::optional<at::Tensor>& mask, bool need_weights, bool average_attn_weights,
    std::optional<std::int64_t> mask_type);

at::Tensor encoder_layer(const at::Tensor& src, std::int64_t embed_dim, std::int64_t num_heads,
                         const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
                         const at::Tensor& proj_weight, const at::Tensor& proj_bias, bool use_gelu,
                         bool norm_first, double eps, const at::Tensor& norm_weight_1,
                         const at::Tensor& norm_bias_1, const at::Tensor& norm_weight_2,
                         const at::Tensor& norm_bias_2, const at::Tensor& ffn_weight_1,
                         const at::Tensor& ffn_bias_1, const at::Tensor& ffn_weight_2,
                         const at::Tensor& ffn_bias_2, const std::optional<at::Tensor>& mask,
                         std::optional<std::int64_t> mask_type);

}  // namespace quantal
