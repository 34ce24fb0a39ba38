"""Calls of a frozen weight through torch's own functions, which read their arguments several times
faster than operators of torch.ops read theirs.

A module's weight and what its activations are quantized to become one tensor, a bound weight:
torch's linear and conv2d with it are the operators of torch.ops.quantal with its parts.
"""

import torch

__all__ = ["PLAIN", "calls_directly"]

#: Types that no function of torch treats in a way of their own.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

# Looked up once: every call of a quantized module asks.
_is_compiling = torch.compiler.is_compiling
_are_transforms_active = torch._C._are_functorch_transforms_active
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_count_function_modes = torch._C._len_torch_function_stack
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing


def calls_directly(x: torch.Tensor) -> bool:
    """Whether nobody looks at the operators that `x`, on the CPU, meets: no compiler or tracer,
    transform of torch.func, mode of __torch_dispatch__ or __torch_function__, autocast or subclass
    of Tensor. They shall see ``torch.ops.quantal``."""
    return (type(x) in PLAIN and x.is_cpu) and not (
        _is_compiling()
        or _are_transforms_active()
        or _count_dispatch_modes()
        or _count_function_modes()
        or _is_autocast_enabled()
        or _is_tracing()
    )
