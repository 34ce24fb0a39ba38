#pragma once

#include <algorithm>
#include <initializer_list>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <quantal/qtype.h>

#include "ops/plain_ops.h"

/// What the files of torch.ops.quantal.* over plain parts share.
namespace quantal {

inline QType qtype_of(c10::string_view name) {
  const auto qtype = find_qtype({name.data(), name.size()});
  TORCH_CHECK_VALUE(qtype, "[quantal] expected the name of a qtype, got '", name, "'");
  return *qtype;
}

inline std::optional<QType> activation_qtype(c10::string_view name) {
  if (name.empty()) return std::nullopt;
  const QType qtype = qtype_of(name);
  TORCH_CHECK_VALUE(!qtype.is_affine(), "[quantal] expected activations of 8 bits, got ", name);
  return qtype;
}

inline bool records(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor* t) { return t->defined() && t->requires_grad(); });
}

inline at::Tensor value_or_none(const MaybeTensor& t) { return t.value_or(at::Tensor()); }
inline MaybeTensor maybe(const at::Tensor& t) {
  return t.defined() ? MaybeTensor(t) : std::nullopt;
}

/// Whether a tensor's memory can be read here: nobody traces operators, and it is no wrapper.
inline bool is_readable(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return !t.is_meta() && !t.key_set().has_any(kWrappers) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Python);
}

/// The dispatcher's entry of an operator, so that graphs that are traced see it.
template <typename Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace quantal
