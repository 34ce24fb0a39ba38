"""Gradients under torch.func, whose transforms no autograd function of C++ takes part in."""

from typing import Any

import torch

__all__ = ["straight_through", "transforms_active"]


# Looked up once: every call of a quantized module asks.
_is_compiling = torch.compiler.is_compiling
_are_transforms_active = torch._C._are_functorch_transforms_active


def transforms_active() -> bool:
    """Whether a transform of torch.func (grad, vjp, vmap, …) runs this code."""
    return _are_transforms_active() and not _is_compiling()


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(latent: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return grad.to(ctx.dtype), None


def straight_through(latent: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient of `latent`."""
    return _StraightThrough.apply(latent, value.detach())
