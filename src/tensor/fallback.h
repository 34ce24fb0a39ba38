#pragma once

#include <cstdint>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace quantal {

/// The PrivateUse3 kernel of every operation without one of its own: replaces quantized arguments
/// by float tensors and calls again. Written arguments keep their identity: live weights are
/// written through to their latent, activations become float, frozen weights raise. Live weights
/// give aten's operations their latent, other libraries' operations their quantized value.
void fallback_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// PrivateUse3 kernel of operations that compute with weights (bmm, lstm, …): as the fallback, but
/// live weights give their quantized value, and nothing is counted.
void compute_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);
/// The fallback of operations with a sparse operand: as compute_kernel, but counted.
void sparse_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);
/// The fallback, not counted.
void uncounted_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);
/// The same one level up: gradients pass straight through to the latent.
void compute_autograd_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// PrivateUse3 and AutogradPrivateUse3 kernels of layers over a sequence (lstm, gru, …): as
/// compute_kernel, with the same bits whether or not the weights require grad.
void recurrent_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);
void recurrent_autograd_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// PrivateUse3 kernel of operations that make a new tensor in the likeness of their first argument.
void factory_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// PrivateUse3 kernel of the gradients of pooling, whose second argument, the input, matters only
/// by its shape.
void pool_backward_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// PrivateUse3 kernel of views that rearrange elements: activations and whole rows of weights stay
/// quantized.
void view_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack);

/// Gives every operator with a composite-explicit kernel the fallback: the backend fallback alone
/// would not reach it. Returns how many have it by now.
std::int64_t cover_operators();
/// The same where libraries registered operators since.
void cover_new_operators();

}  // namespace quantal
