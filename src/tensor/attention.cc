#include "tensor/attention.h"

#include <ATen/ATen.h>

#include "tensor/autograd.h"
#include "tensor/nested.h"
#include "tensor/weight_ops.h"

namespace quantal {
namespace {

struct Projected {
  at::Tensor query, key, value;  // (batch, tokens, embed_dim)
};

// The three projections, whose weights and biases lie one below the other.
Projected project(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& weight, const at::Tensor& bias, std::int64_t width) {
  if (query.is_same(key) && key.is_same(value)) {
    const at::Tensor all = dequantize_ste(quantal::linear(query, weight, bias));
    const auto parts = all.chunk(3, -1);
    return {parts[0], parts[1], parts[2]};
  }
  const auto part = [&](const at::Tensor& x, std::int64_t i) {
    return dequantize_ste(
        quantal::linear(x, weight.narrow(0, i * width, width), bias.narrow(0, i * width, width)));
  };
  return {part(query, 0), part(key, 1), part(value, 2)};
}

// What is added to the scores (batch, heads, queries, keys); undefined without a mask. A mask of
// booleans is true where nothing is attended to. mask_type: 0 (queries, keys), 1 (batch, keys),
// 2 (batch, heads, queries, keys).
at::Tensor additive_mask(const std::optional<at::Tensor>& mask,
                         std::optional<std::int64_t> mask_type, at::ScalarType dtype) {
  if (!mask || !mask->defined()) return {};
  at::Tensor added = *mask;
  if (added.scalar_type() == at::kBool) {
    added = at::zeros(added.sizes(), added.options().dtype(dtype))
                .masked_fill(added, -std::numeric_limits<double>::infinity());
  }
  if (mask_type.value_or(2) == 1) added = added.unsqueeze(1).unsqueeze(1);
  return added.to(dtype);
}

at::Tensor split_heads(const at::Tensor& x, std::int64_t heads) {
  const at::Tensor split = x.reshape({x.size(0), -1, heads, x.size(-1) / heads}).transpose(1, 2);
  return x.is_nested() ? split.contiguous() : split;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> native_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::int64_t embed_dim,
    std::int64_t num_head, const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
    const at::Tensor& proj_weight, const at::Tensor& proj_bias,
    const std::optional<at::Tensor>& mask, bool need_weights, bool average_attn_weights,
    std::optional<std::int64_t> mask_type) {
  const Projected projected = project(query, key, value, qkv_weight, qkv_bias, embed_dim);
  const at::Tensor q = split_heads(projected.query, num_head);
  const at::Tensor k = split_heads(projected.key, num_head);
  const at::Tensor v = split_heads(projected.value, num_head);
  const at::Tensor added = additive_mask(mask, mask_type, q.scalar_type());
  at::Tensor mixed, weights;
  if (need_weights) {
    at::Tensor scores = (q / std::sqrt(static_cast<double>(q.size(-1)))).matmul(k.mT());
    if (added.defined()) scores = scores + added;
    // A query that attends to nothing gets zeros.
    weights = scores.softmax(-1).nan_to_num(0.0);
    mixed = weights.matmul(v);
    if (average_attn_weights) weights = weights.mean(1);
  } else {
    mixed = at::scaled_dot_product_attention(q, k, v,
                                             added.defined() ? std::optional(added) : std::nullopt);
  }
  const at::Tensor joined = mixed.transpose(1, 2).reshape({mixed.size(0), -1, embed_dim});
  return {quantal::linear(joined, proj_weight, proj_bias), weights};
}

at::Tensor encoder_layer(const at::Tensor& src, std::int64_t embed_dim, std::int64_t num_heads,
                         const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
                         const at::Tensor& proj_weight, const at::Tensor& proj_bias, bool use_gelu,
                         bool norm_first, double eps, const at::Tensor& norm_weight_1,
                         const at::Tensor& norm_bias_1, const at::Tensor& norm_weight_2,
                         const at::Tensor& norm_bias_2, const at::Tensor& ffn_weight_1,
                         const at::Tensor& ffn_bias_1, const at::Tensor& ffn_weight_2,
                         const at::Tensor& ffn_bias_2, const std::optional<at::Tensor>& mask,
                         std::optional<std::int64_t> mask_type) {
  const c10::SymInt width[] = {embed_dim};
  const auto norm1 = [&](const at::Tensor& x) {
    return quantal::layer_norm(x, width, norm_weight_1, norm_bias_1, eps, true);
  };
  const auto norm2 = [&](const at::Tensor& x) {
    return quantal::layer_norm(x, width, norm_weight_2, norm_bias_2, eps, true);
  };
  const auto attend = [&](const at::Tensor& x) {
    return dequantize_ste(std::get<0>(native_attention(x, x, x, embed_dim, num_heads, qkv_weight,
                                                       qkv_bias, proj_weight, proj_bias, mask,
                                                       /*need_weights=*/false, true, mask_type)));
  };
  const auto feed_forward = [&](const at::Tensor& x) {
    const at::Tensor hidden = quantal::linear(x, ffn_weight_1, ffn_bias_1);
    const at::Tensor active = use_gelu ? at::gelu(dequantize_ste(hidden)) : at::relu(hidden);
    return dequantize_ste(quantal::linear(active, ffn_weight_2, ffn_bias_2));
  };
  if (norm_first) {
    const at::Tensor x = src + attend(norm1(src));
    return x + feed_forward(norm2(x));
  }
  const at::Tensor x = norm1(src + attend(src));
  return norm2(dequantize_ste(x) + feed_forward(x));
}

}  // namespace quantal
