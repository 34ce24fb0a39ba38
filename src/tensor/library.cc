// Every operator and every dispatcher entry of the tensor, in one place: their order matters, since
// cover_operators() must come after the kernels that it must not replace.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <quantal/isa.h>
#include <quantal/qtensor.h>

#include "ops/cpu_kernels.h"
#include "tensor/activation_ops.h"
#include "tensor/attention.h"
#include "tensor/autograd.h"
#include "tensor/bound_weight.h"
#include "tensor/copy_ops.h"
#include "tensor/fallback.h"
#include "tensor/qtensor_impl.h"
#include "tensor/weight_ops.h"

namespace quantal {
namespace {

using torch::CppFunction;

// Operations that compute with weights, and operations whose backward does (lstsq, cholesky_solve):
// forward and backward must read the same value.
constexpr const char* kComputeOps[] = {
    "bmm",
    "baddbmm",
    "addbmm",
    "mv",
    "addmv",
    "dot",
    "vdot",
    "inner",
    "einsum",
    "tensordot",
    "bilinear",
    "_trilinear",
    "embedding_bag",
    "embedding_bag.padding_idx",
    "lstm.data",
    "gru.data",
    "rnn_tanh.data",
    "rnn_relu.data",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "linalg_multi_dot",
    "_grouped_mm",
    "_addmm_activation",
    "conv_tbc",
    "linalg_lstsq",
    "linalg_pinv.atol_rtol_tensor",
    "_sparse_mm_reduce_impl",
    "cholesky_inverse",
    "cholesky_solve",
    "cdist",
};

constexpr const char* kRecurrentOps[] = {"lstm.input", "gru.input", "rnn_tanh.input",
                                         "rnn_relu.input"};

// The same that write to out=.
constexpr const char* kComputeOutOps[] = {
    "mm.out",
    "addmm.out",
    "bmm.out",
    "baddbmm.out",
    "addbmm.out",
    "mv.out",
    "addmv.out",
    "matmul.out",
    "dot.out",
    "vdot.out",
    "inner.out",
    "tensordot.out",
    "linear.out",
    "linalg_multi_dot.out",
    "_addmm_activation.out",
    "linalg_lstsq.out",
    "linalg_pinv.atol_rtol_tensor_out",
    "cholesky_inverse.out",
    "cholesky_solve.out",
};

// Gradients that take a saved activation.
constexpr const char* kActivationBackwardOps[] = {"threshold_backward", "_softmax_backward_data"};

constexpr const char* kFactoryOps[] = {
    "empty_like", "zeros_like",        "ones_like",    "full_like",
    "rand_like",  "randn_like",        "randint_like", "randint_like.low_dtype",
    "new_empty",  "new_empty_strided", "new_full",     "new_zeros",
    "new_ones",
};

constexpr const char* kPoolBackwardOps[] = {
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
};

// Views that only rearrange elements.
constexpr const char* kViewOps[] = {
    "view",       "_unsafe_view", "_reshape_alias", "as_strided",   "transpose.int",
    "permute",    "select.int",   "slice.Tensor",   "split.Tensor", "split_with_sizes",
    "unbind.int", "unsqueeze",    "squeeze",        "squeeze.dim",  "squeeze.dims",
    "expand",     "diagonal",     "unfold",
};

template <auto kernel, size_t count>
void register_all(torch::Library& library, const char* const (&names)[count]) {
  for (const char* name : names) {
    library.impl(name, CppFunction::makeFromBoxedFunction<kernel>());
  }
}

template <Results (*run)(Arguments)>
CppFunction on_codes() {
  return CppFunction::makeFromBoxedFunction<&codes_kernel<run>>();
}

QType qtype_named(std::string_view name) {
  const auto qtype = find_qtype(name);
  TORCH_CHECK_VALUE(qtype, "[quantal] expected the name of a qtype, got '", name, "'");
  return *qtype;
}

std::shared_ptr<const Quantizer> quantizer_named(const std::string& name) {
  if (name.empty()) return nullptr;
  auto quantizer = find_quantizer(name);
  TORCH_CHECK_VALUE(quantizer, "[quantal] expected quantizer absmax, max or hqq, got '", name, "'");
  return quantizer;
}

WeightOptions weight_options(std::string_view qtype, std::optional<std::int64_t> group_size,
                             bool allow_short_group, const std::string& quantizer) {
  return {qtype_named(qtype), group_size, allow_short_group, quantizer_named(quantizer)};
}

std::tuple<at::Tensor, at::Tensor, std::optional<at::Tensor>> parts_of(const at::Tensor& t) {
  const QuantizedParts found = parts(t);
  return {found.data.alias(), found.scale.alias(),
          found.shift.defined() ? std::optional(found.shift.alias()) : std::nullopt};
}

struct TypeOf {
  QType qtype;
  std::int64_t group_size;
};

/// Of views, too, and without quantizing live weights.
TypeOf type_of(const at::Tensor& t) {
  TORCH_CHECK_VALUE(is_quantized(t), "[quantal::qtype_name] expected a quantized tensor");
  const QTensorImpl* impl = impl_of(t);
  if (is_activation(t)) return {impl->activation->qtype, 0};
  const WeightScheme& scheme = *impl->weight->scheme();
  return {scheme.qtype, scheme.group_size};
}

void register_ops(torch::Library& m) {
  m.def(
      "quantize_weight(Tensor weight, str qtype, int? group_size=None, "
      "bool allow_short_group=False, str quantizer='') -> Tensor",
      [](const at::Tensor& weight, std::string_view qtype, std::optional<std::int64_t> group_size,
         bool allow_short_group, std::string_view quantizer) {
        return quantize_weight(
            weight, weight_options(qtype, group_size, allow_short_group, std::string(quantizer)));
      });
  m.def(
      "live_weight(Tensor weight, str qtype, int? group_size=None, "
      "bool allow_short_group=False, str quantizer='') -> Tensor",
      [](const at::Tensor& weight, std::string_view qtype, std::optional<std::int64_t> group_size,
         bool allow_short_group, std::string_view quantizer) {
        return live_weight(
            weight, weight_options(qtype, group_size, allow_short_group, std::string(quantizer)));
      });
  m.def("quantize_activation(Tensor x, str qtype, Tensor scale) -> Tensor",
        [](const at::Tensor& x, std::string_view qtype, const at::Tensor& scale) {
          return quantize_activation(x, qtype_named(qtype), scale);
        });
  m.def("dequantize(Tensor t) -> Tensor",
        [](const at::Tensor& t) { return quantal::dequantize(t); });
  m.def("linear_dynamic(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear_dynamic);
  m.def(
      "conv_dynamic(Tensor x, Tensor weight, Tensor? bias=None, int[] stride=[1], "
      "int[] padding=[0], int[] dilation=[1], int groups=1) -> Tensor",
      conv_dynamic);
  m.def("latent(Tensor weight) -> Tensor", [](const at::Tensor& t) { return latent(t); });
  m.def("freeze(Tensor weight) -> ()", [](const at::Tensor& t) { freeze(t); });
  m.def("is_quantized(Tensor t) -> bool", [](const at::Tensor& t) { return is_quantized(t); });
  m.def("is_live(Tensor t) -> bool", [](const at::Tensor& t) { return is_live(t); });
  m.def("is_frozen(Tensor t) -> bool", [](const at::Tensor& t) { return is_frozen(t); });
  m.def("parts(Tensor t) -> (Tensor, Tensor, Tensor?)", parts_of);
  m.def(
      "weight_from_parts(Tensor data, Tensor scale, Tensor? shift, str qtype, int group_size, "
      "int[] sizes, ScalarType dtype) -> Tensor",
      [](const at::Tensor& data, const at::Tensor& scale, const std::optional<at::Tensor>& shift,
         std::string_view qtype, std::int64_t group_size, at::IntArrayRef sizes,
         at::ScalarType dtype) {
        return weight_from_parts(
            {qtype_named(qtype), group_size, data, scale, shift.value_or(at::Tensor())}, sizes,
            dtype);
      });
  m.def(
      "bind_weight(Tensor data, Tensor scale, Tensor? shift, str qtype, int group_size, "
      "int[] sizes, ScalarType dtype, str activations='', Tensor? input_scale=None) -> Tensor",
      [](const at::Tensor& data, const at::Tensor& scale, const std::optional<at::Tensor>& shift,
         std::string_view qtype, std::int64_t group_size, at::IntArrayRef sizes,
         at::ScalarType dtype, std::string_view activations,
         const std::optional<at::Tensor>& input_scale) {
        return bind_weight({WeakTensor(data.getIntrusivePtr()), scale, shift, std::string(qtype),
                            group_size, sizes.vec(), std::string(activations), input_scale},
                           dtype);
      });
  m.def(
      "quantize_weight_with(Tensor weight, Tensor scale, Tensor? shift, str qtype, "
      "int group_size) -> Tensor",
      [](const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& shift,
         std::string_view qtype, std::int64_t group_size) {
        return quantize_weight_with(weight, scale, shift.value_or(at::Tensor()), qtype_named(qtype),
                                    group_size);
      });
  m.def("qtype_name(Tensor t) -> str",
        [](const at::Tensor& t) { return std::string(type_of(t).qtype.name); });
  m.def("group_size(Tensor t) -> int", [](const at::Tensor& t) { return type_of(t).group_size; });
  m.def("is_activation(Tensor t) -> bool", [](const at::Tensor& t) { return is_activation(t); });
  m.def("isa() -> str", [] { return std::string(isa_name(kernel_isa())); });
  m.def("supported_isas() -> str[]", [] {
    std::vector<std::string> names;
    for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("fallback_count() -> int", [] { return fallback_count(); });
  m.def("fallback_counts() -> Dict(str, int)", [] {
    c10::Dict<std::string, std::int64_t> counts;
    for (const auto& [op, count] : fallback_counts()) counts.insert(op, count);
    return counts;
  });
  m.def("reset_fallback_counts() -> ()", [] { reset_fallback_counts(); });
  m.def("refresh_operators() -> int", [] { return refresh_operators(); });
}

}  // namespace

TORCH_LIBRARY(quantal, m) { register_ops(m); }

TORCH_LIBRARY_IMPL(aten, PrivateUse3, m) {
  m.impl("linear", linear);
  m.impl("matmul", matmul);
  m.impl("mm", mm);
  m.impl("addmm", addmm);
  m.impl("convolution", convolution);
  m.impl("_convolution", traced_convolution);
  m.impl("embedding", embedding);
  m.impl("layer_norm", layer_norm);
  m.impl("_native_multi_head_attention", native_attention);
  m.impl("_transformer_encoder_layer_fwd", encoder_layer);
  m.impl("t", transpose_matrix);
  m.impl("max_pool1d", max_pool<1>);
  m.impl("max_pool2d", max_pool<2>);
  m.impl("max_pool3d", max_pool<3>);
  m.impl("clone", clone);
  m.impl("_to_copy", to_copy);
  m.impl("copy_", copy_into);
  m.impl("equal", equal);
  m.impl("set_.source_Tensor", set_source);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_type);
  // What readers of memory (tolist, numpy(force=True)) call first.
  m.impl("resolve_conj", float_value_ste);
  m.impl("resolve_neg", float_value_ste);
  m.impl("dequantize.self", dequantize_ste);
  m.impl("detach", alias);
  m.impl("alias", alias);
  m.impl("relu", on_codes<relu_codes>());
  m.impl("relu_", on_codes<relu_codes_>());
  m.impl("neg", on_codes<neg_codes>());
  m.impl("mul.Tensor", on_codes<mul_codes>());
  m.impl("mul.Scalar", on_codes<mul_codes>());
  m.impl("div.Tensor", on_codes<div_codes>());
  m.impl("div.Scalar", on_codes<div_codes>());
  m.impl("cat", on_codes<cat_codes>());
  m.impl("stack", on_codes<stack_codes>());
  m.impl("_softmax", on_codes<softmax_codes>());
  m.impl("max_pool2d_with_indices", on_codes<max_pool2d_indices>());
  m.impl("max_pool3d_with_indices", on_codes<max_pool3d_indices>());
  m.impl("add_.Tensor", on_codes<add_bias_>());
  register_all<&view_kernel>(m, kViewOps);
  register_all<&factory_kernel>(m, kFactoryOps);
  register_all<&pool_backward_kernel>(m, kPoolBackwardOps);
  register_all<&compute_kernel>(m, kComputeOps);
  register_all<&recurrent_kernel>(m, kRecurrentOps);
  register_all<&compute_kernel>(m, kComputeOutOps);
  register_all<&uncounted_kernel>(m, kActivationBackwardOps);
  // Composite, and writes through an _unsafe_view of `out`, which nothing could notice.
  m.impl("kron.out", CppFunction::makeFromBoxedFunction<&fallback_kernel>());
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse3, m) {
  m.impl("linear", linear);
  m.impl("matmul", matmul);
  m.impl("mm", mm);
  m.impl("addmm", addmm);
  m.impl("convolution", convolution);
  m.impl("_convolution", traced_convolution);
  m.impl("embedding", embedding);
  m.impl("layer_norm", layer_norm);
  m.impl("_native_multi_head_attention", native_attention);
  m.impl("_transformer_encoder_layer_fwd", encoder_layer);
  m.impl("max_pool1d", max_pool<1>);
  m.impl("max_pool2d", max_pool<2>);
  m.impl("max_pool3d", max_pool<3>);
  m.impl("resolve_conj", float_value_ste);
  m.impl("resolve_neg", float_value_ste);
  m.impl("dequantize.self", dequantize_ste);
  register_all<&compute_autograd_kernel>(m, kComputeOps);
  register_all<&recurrent_autograd_kernel>(m, kRecurrentOps);
}

// Operators over plain parts that are given a quantized activation.
TORCH_LIBRARY_IMPL(quantal, PrivateUse3, m) {
  m.impl("linear", linear_of_activation);
  m.impl("convolution", convolution_of_activation);
  m.impl("fake_quantize", CppFunction::makeFromBoxedFunction<&uncounted_kernel>());
  m.impl("linear_input_grad", CppFunction::makeFromBoxedFunction<&uncounted_kernel>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse3, m) {
  m.fallback(CppFunction::makeFromBoxedFunction<&fallback_kernel>());
}

// A sparse operand beside a quantized one.
TORCH_LIBRARY_IMPL(_, SparsePrivateUse3, m) {
  m.fallback(CppFunction::makeFromBoxedFunction<&sparse_kernel>());
}

TORCH_LIBRARY_IMPL(_, SparseCsrPrivateUse3, m) {
  m.fallback(CppFunction::makeFromBoxedFunction<&sparse_kernel>());
}

// Nested sequences beside quantized weights.
TORCH_LIBRARY_IMPL(aten, NestedTensorPrivateUse3, m) {
  m.impl("linear", linear);
  m.impl("matmul", matmul);
  m.impl("layer_norm", layer_norm);
  m.impl("_native_multi_head_attention", native_attention);
  m.impl("_transformer_encoder_layer_fwd", encoder_layer);
}

TORCH_LIBRARY_IMPL(_, NestedTensorPrivateUse3, m) {
  m.fallback(CppFunction::makeFromBoxedFunction<&sparse_kernel>());
}

TORCH_LIBRARY_IMPL(_, AutogradPrivateUse3, m) {
  m.fallback(torch::autograd::basicAutogradNotImplementedFallback());
}

namespace {
[[maybe_unused]] const std::int64_t covered_at_load = cover_operators();
}  // namespace

}  // namespace quantal
